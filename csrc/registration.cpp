// Defines the operators.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(ptq4vm, m) {
  for (const char* schema : ptq4vm::SCHEMAS) m.def(schema);
  m.def("_use_isa(str name) -> str");
}
