// ONNX Runtime over model.onnx of an artefact.
#pragma once

#include <memory>

#include "runner.h"

namespace depthwire {

extern const std::vector<OptionSpec> kOrtOptions;

std::unique_ptr<Backend> open_ort(const Package& package, const Options& options);

}  // namespace depthwire
