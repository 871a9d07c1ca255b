// What every instruction set implements, and how one is chosen. A kernel does the part [begin, end) of its work, and what
// it gives does not depend on how the work was divided.
#pragma once

#include "../operators.h"

namespace ptq4vm {

struct Kernels {
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);            // rows
  void (*pack)(const Pack&, int64_t begin, int64_t end);                    // groups of 16 features
  void (*linear)(const Linear&, int64_t begin, int64_t end);                // blocks()
  void (*scan)(const Scan&, int64_t begin, int64_t end);                    // images × groups of LANES channels
  void (*scan_backward)(const ScanBackward&, int64_t begin, int64_t end);   // images × panels of channels
  void (*directional_scan)(const DirectionalScan&, int64_t begin, int64_t end);  // images × panels of channels
  void (*choose_qparams)(const ChooseQparams&, int64_t begin, int64_t end);  // rows
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);        // rows
  void (*rotate)(const Rotate&, int64_t begin, int64_t end);                // rows
  void (*rotate_quantize)(const RotateQuantize&, int64_t begin, int64_t end);  // rows
  void (*norm_quantize)(const NormQuantize&, int64_t begin, int64_t end);   // rows
  void (*conv)(const Conv&, int64_t begin, int64_t end);         // directions × images × groups of LANES channels
  void (*conv2d)(const Conv2d&, int64_t begin, int64_t end);     // images × rows of the map
  void (*conv_backward)(const ConvBackward&, int64_t begin, int64_t end);   // images × groups of LANES channels
  void (*fake_quantize)(const FakeQuantize&, int64_t begin, int64_t end);                    // rows
  void (*fake_quantize_backward)(const FakeQuantizeBackward&, int64_t begin, int64_t end);   // blocks of ROWS_IN_SUM
};

// Instruction sets, each with all before it.
enum class Isa { portable, avx2, vnni, amx };

const char* name(Isa);
Isa best_isa();              // of this machine, as far as it was compiled in and PTQ4VM_ISA allows
Isa isa();                   // in use
void use_isa(Isa);           // at most best_isa()
const Kernels& kernels();    // of the one in use

}  // namespace ptq4vm
