// An operator as ONNX Runtime's C interface takes it.
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "kernels.h"
#include "shapes.h"
#include "status.h"

namespace depthwire {

namespace {

struct Op : OrtCustomOp {
  OpSpec spec;
  std::string name;
  const Backend* backend;
};

struct Kernel {
  const OrtApi* api;
  const Op* op;
  Attributes attributes;
};

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

// The fixed inputs have a formal parameter each, all that follows (sources, delta) is one variadic parameter: what
// ONNX Runtime does for an operator when a session starts grows with the number of formal parameters.
std::size_t formal_inputs(const OpSpec& spec) {
  const int fixed = spec.first_source();
  return static_cast<std::size_t>(spec.inputs() > fixed ? fixed + 1 : fixed);
}

bool is_variadic(const OpSpec& spec, std::size_t index) {
  return index == static_cast<std::size_t>(spec.first_source());
}

// `out` may take the memory of the last source, `sum` that of `delta`: where ONNX Runtime finds that nothing else
// reads those, a read writes no new memory. The callback is not told its operator, so there is one for each position.
template <int kDelta>
std::size_t may_inplace(int** inputs, int** outputs) {
  *inputs = static_cast<int*>(std::malloc(2 * sizeof(int)));
  *outputs = static_cast<int*>(std::malloc(2 * sizeof(int)));
  if (*inputs == nullptr || *outputs == nullptr) return 0;
  (*inputs)[0] = kDelta, (*outputs)[0] = 1;
  (*inputs)[1] = kDelta - 1, (*outputs)[1] = 0;
  return 2;
}

void release_inplace(int* inputs, int* outputs) {
  std::free(inputs);
  std::free(outputs);
}

using MayInplace = decltype(&may_inplace<0>);

template <int... kDelta>
MayInplace inplace_at(int delta, std::integer_sequence<int, kDelta...>) {
  static constexpr MayInplace table[] = {may_inplace<kDelta>...};
  return table[delta];
}

OrtStatus* create_kernel(const OrtCustomOp* base, const OrtApi* api, const OrtKernelInfo* info, void** kernel) try {
  const Op& op = self(base);
  const OpSpec& spec = op.spec;
  std::size_t count = 0;
  DEPTHWIRE_TRY(api->KernelInfo_GetInputCount(info, &count));
  if (count != static_cast<std::size_t>(spec.inputs())) {
    return refuse(*api, spec, "has " + std::to_string(count) + " inputs, wanted " + std::to_string(spec.inputs()));
  }
  Attributes found;
  const auto number = [&](const char* name, float& value, bool required) -> OrtStatus* {
    OrtStatus* status = api->KernelInfoGetAttribute_float(info, name, &value);
    if (status == nullptr) return nullptr;
    api->ReleaseStatus(status);
    return required ? refuse(*api, spec, std::string("has no attribute '") + name + "'") : nullptr;
  };
  DEPTHWIRE_TRY(number("eps", found.eps, true));
  DEPTHWIRE_TRY(number("scale", found.scale, false));
  DEPTHWIRE_TRY(number("last_bias", found.last_bias, false));
  DEPTHWIRE_TRY(number("norm_eps", found.norm_eps, spec.norm));
  if (spec.family == Family::merge) {
    if (OrtStatus* status = api->KernelInfoGetAttribute_int64(info, "index", &found.index)) {
      api->ReleaseStatus(status);
      return refuse(*api, spec, "has no attribute 'index'");
    }
  }
  *kernel = new Kernel{api, &op, found};
  return nullptr;
} catch (const std::bad_alloc&) {
  return api->CreateStatus(ORT_FAIL, "depthwire: out of memory");
}

OrtStatus* compute(void* state, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return kernel.op->backend->compute(*kernel.api, kernel.op->spec, kernel.attributes, context);
}

}  // namespace

OrtCustomOp* custom_op(const OpSpec& spec, const Backend& backend) {
  static std::mutex guard;
  static auto& known = *new std::map<std::pair<std::string, const Backend*>, std::unique_ptr<Op>>();  // never destroyed
  const std::lock_guard lock(guard);
  std::unique_ptr<Op>& entry = known[{spec.name(), &backend}];
  if (entry != nullptr) return entry.get();
  entry = std::make_unique<Op>();
  Op& op = *entry;
  op.spec = spec;
  op.name = spec.name();
  op.backend = &backend;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* base) { return self(base).name.c_str(); };
  op.GetExecutionProviderType = [](const OrtCustomOp* base) { return self(base).backend->provider; };
  op.GetInputTypeCount = [](const OrtCustomOp* base) { return formal_inputs(self(base).spec); };
  op.GetInputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
  op.GetOutputTypeCount = [](const OrtCustomOp* base) { return static_cast<std::size_t>(self(base).spec.outputs()); };
  op.GetOutputType = [](const OrtCustomOp* base, std::size_t index) {
    const bool lse = self(base).spec.family == Family::inter && index == 1;
    return lse ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp* base, std::size_t index) {
    return is_variadic(self(base).spec, index) ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };  // mixed types get our own error
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const OrtCustomOp* base, OrtShapeInferContext* context) {
    return infer_output_shapes(self(base).spec, context);
  };
  if (spec.add) {
    op.GetMayInplace = inplace_at(spec.delta(), std::make_integer_sequence<int, kMaxSources + 5>());
    op.ReleaseMayInplace = release_inplace;
  }
  return &op;
}

}  // namespace depthwire
