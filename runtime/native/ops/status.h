// Errors: one line that names the operator, the input and what was wanted, as an OrtStatus.
#pragma once

#include <onnxruntime_c_api.h>

#include <string>

#include "op.h"

#define DEPTHWIRE_TRY(expression)                                           \
  do {                                                                      \
    if (OrtStatus* failed = (expression); failed != nullptr) return failed; \
  } while (false)

namespace depthwire {

inline OrtStatus* refuse(const OrtApi& api, const OpSpec& spec, const std::string& text) {
  return api.CreateStatus(ORT_INVALID_ARGUMENT, ("depthwire " + spec.name() + ": " + text).c_str());
}

}  // namespace depthwire
