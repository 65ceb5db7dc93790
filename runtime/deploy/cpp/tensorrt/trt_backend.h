// TensorRT, or TensorRT-RTX, over an engine of an artefact or of a bundle.
#pragma once

#include <memory>

#include "runner.h"

namespace depthwire {

extern const std::vector<OptionSpec> kTrtOptions;

std::unique_ptr<Backend> open_trt(const Package& package, const Options& options);

}  // namespace depthwire
