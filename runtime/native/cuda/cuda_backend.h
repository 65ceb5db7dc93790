// The CUDA provider's kernels: cubins of the Triton kernels, launched through the driver.
#pragma once

#include <onnxruntime_c_api.h>

#include "op.h"
#include "operands.h"

namespace depthwire {

// Session configuration entry: the folder of cubins (depthwire/runtime/triton/bundle.py). The operators are registered
// for the CUDA provider only where it is given.
constexpr const char* kKernelsEntry = "depthwire.kernels";

const Backend& cuda_backend();

// Makes a folder's kernels known, and says whether the routing operators' are among them.
OrtStatus* add_kernels(const OrtApi& api, const std::string& folder, bool& routing);

// The routing operators (routing_cuda.cpp).
OrtStatus* route_on_cuda(const OrtApi& api, const RoutingSpec& spec, const RoutingAttributes& attributes,
                         OrtKernelContext* context);

// The name of the kernel of a call; KernelSpec.key in depthwire/runtime/triton/spec.py makes the same.
std::string kernel_key(const OpSpec& spec, const Attributes& attributes, const Operands& operands);

}  // namespace depthwire
