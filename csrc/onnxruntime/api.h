// The part of ONNX Runtime's C interface that is used. Its calls stand in a table that only ever grows at its end, so
// that the places below hold in all versions from OLDEST on, the first that has all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
struct OrtOpAttr;

struct OrtApi {
  void (*calls[1])();
};

struct OrtApiBase {
  const OrtApi* (*get_api)(uint32_t version);
  const char* (*version)();
};

// An operator, as the runtime asks for it; unused members are null.
struct OrtCustomOp {
  uint32_t version;
  void* (*create_v1)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*name)(const OrtCustomOp*);
  const char* (*provider)(const OrtCustomOp*);
  int (*input_type)(const OrtCustomOp*, size_t);
  size_t (*input_count)(const OrtCustomOp*);
  int (*output_type)(const OrtCustomOp*, size_t);
  size_t (*output_count)(const OrtCustomOp*);
  void (*compute_v1)(void* kernel, OrtKernelContext*);
  void (*destroy)(void* kernel);
  int (*input_optional)(const OrtCustomOp*, size_t);
  int (*output_optional)(const OrtCustomOp*, size_t);
  int (*input_memory)(const OrtCustomOp*, size_t);
  int (*variadic[4])(const OrtCustomOp*);
  OrtStatus* (*create)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*compute)(void* kernel, OrtKernelContext*);
  OrtStatus* (*infer)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*first_version)(const OrtCustomOp*);
  int (*last_version)(const OrtCustomOp*);
};

}  // extern "C"

namespace ptq4vm::ort {

constexpr uint32_t OLDEST = 17;  // ONNX Runtime 1.17

// The calls, by their places in the table. A status other than null is thrown.
class Api {
 public:
  explicit Api(const OrtApi* table) : table_(table) {}

  OrtStatus* status(const char* message) const { return call<OrtStatus*>(0, 1, message); }

  void add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const { ask(28, options, domain); }
  void add_operator(OrtCustomOpDomain* domain, const OrtCustomOp* added) const { ask(27, domain, added); }
  OrtCustomOpDomain* domain(const char* name) const { return got<OrtCustomOpDomain*>(26, name); }

  float float_attribute(const OrtKernelInfo* node, const char* name) const { return got<float>(85, node, name); }
  int64_t int_attribute(const OrtKernelInfo* node, const char* name) const { return got<int64_t>(86, node, name); }
  size_t input_count(const OrtKernelInfo* node) const { return got<size_t>(230, node); }

  // Null for an input that is no constant.
  const OrtValue* constant(const OrtKernelInfo* node, size_t index) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    ask(249, node, index, &is_constant, &value);
    return is_constant ? value : nullptr;
  }

  const OrtValue* input(const OrtKernelContext* run, size_t index) const {
    return got<const OrtValue*>(90, run, index);
  }

  // Null for one that the node has no name for.
  OrtValue* output(OrtKernelContext* run, size_t index, const int64_t* sizes, size_t axes) const {
    return got<OrtValue*>(91, run, index, sizes, axes);
  }

  void parallel_for(const OrtKernelContext* run, void (*part)(void*, size_t), size_t parts, void* data) const {
    ask(274, run, part, parts, size_t{0}, data);
  }

  void* data(const OrtValue* tensor) const { return got<void*>(51, const_cast<OrtValue*>(tensor)); }
  OrtTensorTypeAndShapeInfo* info(const OrtValue* tensor) const { return got<OrtTensorTypeAndShapeInfo*>(65, tensor); }
  int type(const OrtTensorTypeAndShapeInfo* info) const { return got<int>(60, info); }
  size_t axes(const OrtTensorTypeAndShapeInfo* info) const { return got<size_t>(61, info); }
  void sizes(const OrtTensorTypeAndShapeInfo* info, int64_t* to, size_t axes) const { ask(62, info, to, axes); }
  void names(const OrtTensorTypeAndShapeInfo* info, const char** to, size_t axes) const { ask(63, info, to, axes); }
  void release(OrtTensorTypeAndShapeInfo* info) const { call<void>(99, info); }

  OrtTensorTypeAndShapeInfo* new_info() const { return got<OrtTensorTypeAndShapeInfo*>(57); }
  void set_type(OrtTensorTypeAndShapeInfo* info, int type) const { ask(58, info, type); }
  void set_sizes(OrtTensorTypeAndShapeInfo* info, const int64_t* sizes, size_t axes) const {
    ask(59, info, sizes, axes);
  }
  void set_names(OrtTensorTypeAndShapeInfo* info, const char** names, size_t axes) const {
    ask(271, info, names, axes);
  }

  // The context's own.
  const OrtTensorTypeAndShapeInfo* input(const OrtShapeInferContext* node, size_t index) const {
    return got<OrtTensorTypeAndShapeInfo*>(268, node, index);
  }
  const OrtOpAttr* attribute(const OrtShapeInferContext* node, const char* name) const {
    return got<const OrtOpAttr*>(269, node, name);
  }
  int64_t int_value(const OrtOpAttr* attribute) const {
    constexpr int INT = 1;
    int64_t value = 0;
    size_t bytes = 0;
    ask(272, attribute, INT, static_cast<void*>(&value), sizeof value, &bytes);
    return value;
  }
  void set_output(const OrtShapeInferContext* node, size_t index, const OrtTensorTypeAndShapeInfo* info) const {
    ask(270, node, index, info);
  }

 private:
  template <class Result, class... Arguments>
  Result call(int place, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table_->calls[place])(arguments...);
  }

  template <class... Arguments>
  void ask(int place, Arguments... arguments) const {
    OrtStatus* status = call<OrtStatus*>(place, arguments...);
    if (!status) return;
    const std::string message = call<const char*>(2, static_cast<const OrtStatus*>(status));
    call<void>(93, status);
    throw std::runtime_error(message);
  }

  // What a call writes to its last argument.
  template <class Result, class... Arguments>
  Result got(int place, Arguments... arguments) const {
    Result result{};
    ask(place, arguments..., &result);
    return result;
  }

  const OrtApi* table_;
};

}  // namespace ptq4vm::ort
