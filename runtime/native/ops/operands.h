// The operands of a call, fetched and checked. The same for every provider: pointers are those of its memory.
#pragma once

#include "kernels.h"
#include "op.h"
#include "tensor.h"

namespace depthwire {

struct Operands {
  Element element;           // of the sources
  Tensor row;                // what a source looks like: the shape [..., width] and type of `out`; no data
  std::int64_t rows, width;  // product of the leading axes, last axis
  Tensor query;              // "queries" [query_count, width] for AttnResInter
  std::int64_t query_count = 1;
  Tensor norm_weight, mixed, mixed_logit, delta;  // data is null where the operator has none
  const void* sources[kMaxSources];
};

// Fetches the inputs of a call. Returns an error that names the input, or null.
OrtStatus* fetch_operands(const OrtApi& api, const OpSpec& spec, const Attributes& attributes,
                          const OrtKernelContext* context, Operands& operands);

std::size_t element_bytes(Element element);
std::optional<Element> element_of(ONNXTensorElementDataType type);

// Creates output `index` with the shape of `like`, after `leading` where that is not negative.
OrtStatus* make_output(const OrtApi& api, OrtKernelContext* context, std::size_t index, std::int64_t leading,
                       const std::int64_t* shape, std::size_t rank, void** data);

}  // namespace depthwire
