// Inputs and outputs of a call: fetched, described and made. Pointers are those of the provider's memory.
#pragma once

#include <cstring>
#include <string>

#include "status.h"

namespace depthwire {

constexpr std::size_t kMaxRank = 16;

struct Tensor {
  const void* data = nullptr;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  const std::int64_t* shape = nullptr;
  std::size_t rank = 0;
};

// Element types by name and size; a null name for those that no operator takes.
struct ElementType {
  const char* name;
  std::int64_t bytes;
};

inline ElementType element_type(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return {"float", 4};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return {"float16", 2};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return {"bfloat16", 2};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      return {"double", 8};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return {"int64", 8};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
      return {"int32", 4};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16:
      return {"int16", 2};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return {"int8", 1};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64:
      return {"uint64", 8};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32:
      return {"uint32", 4};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16:
      return {"uint16", 2};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
      return {"uint8", 1};
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return {"bool", 1};
    default:
      return {nullptr, 0};
  }
}

inline const char* type_name(ONNXTensorElementDataType type) {
  const char* name = element_type(type).name;
  return name == nullptr ? "of another type" : name;
}

inline std::string describe(const Tensor& tensor) {
  std::string text = std::string(type_name(tensor.type)) + " [";
  for (std::size_t i = 0; i < tensor.rank; ++i) {
    if (i != 0) text += ", ";
    text += std::to_string(tensor.shape[i]);
  }
  return text + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.rank == b.rank && (a.rank == 0 || std::memcmp(a.shape, b.shape, a.rank * sizeof(*a.shape)) == 0);
}

// Input `index`; its type is UNDEFINED if the node leaves it out.
inline OrtStatus* fetch_input(const OrtApi& api, const OrtKernelContext* context, int index, Tensor& tensor) {
  const OrtValue* value = nullptr;
  DEPTHWIRE_TRY(api.KernelContext_GetInput(context, static_cast<std::size_t>(index), &value));
  if (value == nullptr) return nullptr;
  DEPTHWIRE_TRY(api.GetTensorElementTypeAndShapeDataReference(value, &tensor.type, &tensor.shape, &tensor.rank));
  void* data = nullptr;
  DEPTHWIRE_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return nullptr;
}

}  // namespace depthwire
