// The library of kernels (docs/native.md): where it lies, whether it fits, and which operators it is asked for.
#pragma once

#include <string>
#include <vector>

#include "runner.h"

namespace depthwire {

struct Kernels {
  std::string library;          // empty where function bodies run
  std::string ops;              // "depthwire.ops": the operators to register
  std::string cubins;           // "depthwire.kernels": their folder, for the CUDA provider
  std::string instruction_set;  // "avx512"
};

// Throws Error: it is not there (runtime.no-kernels) or of another version (runtime.stale-kernels).
Kernels choose_kernels(const Package& package, const Options& options, bool cuda);

}  // namespace depthwire
