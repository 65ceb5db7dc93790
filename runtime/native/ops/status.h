// Errors: one line that names the operator, the input and what was wanted, as an OrtStatus.
#pragma once

#include <onnxruntime_c_api.h>

#include <string>

#define DEPTHWIRE_TRY(expression)                                           \
  do {                                                                      \
    if (OrtStatus* failed = (expression); failed != nullptr) return failed; \
  } while (false)

namespace depthwire {

// `spec` is an OpSpec or a RoutingSpec.
template <class Spec>
inline OrtStatus* refuse(const OrtApi& api, const Spec& spec, const std::string& text) {
  return api.CreateStatus(ORT_INVALID_ARGUMENT, ("depthwire " + spec.name() + ": " + text).c_str());
}

}  // namespace depthwire
