// The cubins that travel with a model: depthwire/runtime/triton/bundle.py writes the folder and its index.
#pragma once

#include <cuda.h>

#include <string>

#include "driver.h"

namespace depthwire {

// One cubin, a line of the index.
struct Cubin {
  std::string path, symbol;
  int capability;  // 87 for 8.7
  unsigned threads, shared;
  unsigned programs;  // blocks a row; of routing kernels, slots or tokens a block
  std::size_t parameters;
  CUkernel kernel = nullptr;  // once it was loaded
};

// Reads the index of a folder, once; false, with the reason, if it cannot be used. Kernels of all folders are known by
// their key alone, which holds every constant of the function that they compute: any folder's cubin is the right one.
bool add_bundle(const std::string& folder, std::string& reason);

// Whether a folder that was added has kernels of the routing operators.
bool bundle_routes(const std::string& folder);

// The cubin of a kernel for a device of capability `major`.`minor`; null, with the reason, if none of them fits.
// Until 8.9 a cubin also runs on later minor versions of its major; from 9.0 on they are made for one alone.
Cubin* select_cubin(const std::string& key, int major, int minor, std::string& reason);

// Its kernel, loaded at the first call; null, with the reason.
CUkernel load_cubin(Cubin& cubin, const Driver& driver, std::string& reason);

}  // namespace depthwire
