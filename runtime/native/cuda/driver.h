// The CUDA driver, found when the first kernel is launched: the library links and loads where there is none.
#pragma once

#include <cuda.h>

#include <string>

namespace depthwire {

// The entry points that launching a cubin takes. cuLibrary* (CUDA 12) load once for all contexts and devices.
struct Driver {
  decltype(&::cuInit) init;
  decltype(&::cuCtxGetDevice) current_device;
  decltype(&::cuDeviceGetAttribute) device_attribute;
  decltype(&::cuLibraryLoadData) load;
  decltype(&::cuLibraryGetKernel) kernel;
  decltype(&::cuLaunchKernel) launch;
  decltype(&::cuGetErrorString) error_string;

  std::string describe(CUresult result) const;
};

// The driver of this process; null, with the reason, where there is none. Found once.
const Driver* driver(std::string& reason);

}  // namespace depthwire
