#include "shapes.h"

#include <atomic>
#include <new>

#include "status.h"

namespace depthwire {

namespace {

std::atomic<const OrtApi*> interface_of_process{nullptr};

// One axis: its size, or -1 and perhaps a name.
struct Axis {
  std::int64_t size;
  const char* name;
};

struct Shape {
  ONNXTensorElementDataType type;
  std::vector<Axis> axes;
};

OrtStatus* input_shape(const OrtApi& api, OrtShapeInferContext* context, int index, Shape& shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's
  DEPTHWIRE_TRY(api.ShapeInferContext_GetInputTypeShape(context, static_cast<std::size_t>(index), &info));
  if (info == nullptr) return api.CreateStatus(ORT_INVALID_ARGUMENT, "an input has no type");
  DEPTHWIRE_TRY(api.GetTensorElementType(info, &shape.type));
  std::size_t rank = 0;
  DEPTHWIRE_TRY(api.GetDimensionsCount(info, &rank));
  std::vector<std::int64_t> sizes(rank);
  std::vector<const char*> names(rank);
  if (rank != 0) {
    DEPTHWIRE_TRY(api.GetDimensions(info, sizes.data(), rank));
    DEPTHWIRE_TRY(api.GetSymbolicDimensions(info, names.data(), rank));
  }
  for (std::size_t i = 0; i < rank; ++i) shape.axes.push_back({sizes[i], names[i]});
  return nullptr;
}

OrtStatus* set_output(const OrtApi& api, OrtShapeInferContext* context, std::size_t index, const Shape& shape) {
  std::vector<std::int64_t> sizes;
  std::vector<const char*> names;
  for (const Axis& axis : shape.axes) {
    sizes.push_back(axis.size);
    names.push_back(axis.name == nullptr ? "" : axis.name);
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  DEPTHWIRE_TRY(api.CreateTensorTypeAndShapeInfo(&info));
  OrtStatus* status = api.SetTensorElementType(info, shape.type);
  if (status == nullptr) status = api.SetDimensions(info, sizes.data(), sizes.size());
  if (status == nullptr) status = api.SetSymbolicDimensions(info, names.data(), names.size());
  if (status == nullptr) status = api.ShapeInferContext_SetOutputTypeShape(context, index, info);
  api.ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

OrtStatus* infer(const OrtApi& api, const OpSpec& spec, OrtShapeInferContext* context) {
  std::size_t count = 0;
  DEPTHWIRE_TRY(api.ShapeInferContext_GetInputCount(context, &count));
  // A wrong number of inputs is told when the kernel is made; ONNX Runtime would hide an error of this function behind
  // its own. So whatever is there gives the outputs their types.
  const bool merge = spec.family == Family::merge;
  const int model = merge ? spec.inter_out() : spec.first_source();
  Shape row;
  DEPTHWIRE_TRY(input_shape(api, context, static_cast<std::size_t>(model) < count ? model : 0, row));
  if (merge && !row.axes.empty()) row.axes.erase(row.axes.begin());
  if (spec.family != Family::inter) {
    DEPTHWIRE_TRY(set_output(api, context, 0, row));
    return spec.add ? set_output(api, context, 1, row) : nullptr;
  }
  Shape queries;
  DEPTHWIRE_TRY(input_shape(api, context, 0, queries));
  row.axes.insert(row.axes.begin(), queries.axes.empty() ? Axis{-1, nullptr} : queries.axes.front());
  DEPTHWIRE_TRY(set_output(api, context, 0, row));
  if (row.axes.size() > 1) row.axes.pop_back();
  row.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  return set_output(api, context, 1, row);
}

OrtStatus* infer_routing(const OrtApi& api, const RoutingSpec& spec, OrtShapeInferContext* context) {
  Shape inputs[kMaxRoutingInputs];
  for (int index = 0; index < spec.inputs(); ++index) DEPTHWIRE_TRY(input_shape(api, context, index, inputs[index]));
  // A rank that cannot be is told when the node runs, by an error that names the input.
  const auto axis = [](const Shape& shape, std::size_t at) {
    return at < shape.axes.size() ? shape.axes[at] : Axis{-1, nullptr};
  };
  Shape first = inputs[0];
  if (spec.kind == Routing::scatter) return set_output(api, context, 0, first);
  if (spec.kind == Routing::gather) {
    if (first.axes.size() > 1) first.axes[1] = axis(inputs[1], 1);
    return set_output(api, context, 0, first);
  }
  const Axis batch = axis(first, 0);
  if (spec.kind == Routing::surprise) {
    const bool wide = first.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    const auto type = wide ? ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return set_output(api, context, 0, {type, {batch, axis(first, 1)}});
  }
  const Axis slots = axis(inputs[spec.inputs() - 1], 0);
  DEPTHWIRE_TRY(set_output(api, context, 0, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {batch, slots}}));
  DEPTHWIRE_TRY(set_output(api, context, 1, {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, {batch, slots}}));
  if (spec.kind == Routing::select) return nullptr;
  return set_output(api, context, 2, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {batch, {2, nullptr}}});
}

// Runs an inference with the process's interface; nothing may be thrown into ONNX Runtime.
template <class Infer>
OrtStatus* guarded(const Infer& infer) {
  const OrtApi& api = *interface_of_process.load();
  try {
    return infer(api);
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, "depthwire: out of memory");
  }
}

}  // namespace

void set_api(const OrtApi* api) { interface_of_process = api; }

OrtStatus* infer_output_shapes(const OpSpec& spec, OrtShapeInferContext* context) {
  return guarded([&](const OrtApi& api) { return infer(api, spec, context); });
}

OrtStatus* infer_routing_shapes(const RoutingSpec& spec, OrtShapeInferContext* context) {
  return guarded([&](const OrtApi& api) { return infer_routing(api, spec, context); });
}

}  // namespace depthwire
