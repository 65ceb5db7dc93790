#include "driver.h"

#include <dlfcn.h>

namespace depthwire {

namespace {

struct Found {
  Driver driver{};
  std::string reason;  // why there is none

  Found() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* error = dlerror();
      reason = std::string("there is no CUDA driver: ") + (error == nullptr ? "libcuda.so.1" : error);
      return;
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr && reason.empty()) {
        reason = std::string("the CUDA driver has no ") + name + ": it must be of CUDA 12 or newer";
      }
    };
    find(driver.init, "cuInit");
    find(driver.current_device, "cuCtxGetDevice");
    find(driver.device_attribute, "cuDeviceGetAttribute");
    find(driver.load, "cuLibraryLoadData");
    find(driver.kernel, "cuLibraryGetKernel");
    find(driver.launch, "cuLaunchKernel");
    find(driver.error_string, "cuGetErrorString");
    if (!reason.empty()) return;
    if (const CUresult result = driver.init(0); result != CUDA_SUCCESS) {
      reason = "the CUDA driver does not start: " + driver.describe(result);
    }
  }
};

}  // namespace

std::string Driver::describe(CUresult result) const {
  const char* text = nullptr;
  if (error_string(result, &text) != CUDA_SUCCESS || text == nullptr) text = "unknown error";
  return std::string(text) + " (" + std::to_string(static_cast<int>(result)) + ")";
}

const Driver* driver(std::string& reason) {
  static const Found found;
  reason = found.reason;
  return found.reason.empty() ? &found.driver : nullptr;
}

}  // namespace depthwire
