#include "kernels.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>

#include "error.h"

namespace depthwire {

namespace {

namespace fs = std::filesystem;

constexpr int kAbi = 2;  // as in runtime/native/__init__.py
constexpr const char* kLibrary = "libdepthwire_ort.so";
constexpr const char* kCubins = "kernels";

// Whether the library may have an operator of this name; it refuses to register others.
bool is_known(const std::string& name) {
  if (name == "GatherTokens" || name == "ScatterTokens" || name == "SurpriseScore") return true;
  const std::size_t dash = name.rfind('_');
  if (dash == std::string::npos || dash + 1 == name.size()) return false;
  const std::string kind = name.substr(0, dash);
  return (kind.starts_with("AttnRes") || kind == "SelectTokens" || kind == "SelectTokensBudget") &&
         std::all_of(name.begin() + static_cast<std::ptrdiff_t>(dash) + 1, name.end(),
                     [](char c) { return c >= '0' && c <= '9'; });
}

std::string ops_of(const Package& package) {
  std::string ops;
  for (const std::string& name : package.custom_ops)
    if (is_known(name)) ops += (ops.empty() ? "" : ",") + name;
  return ops;
}

// --kernels FILE, else beside the program, else where this build was told to look.
fs::path library_of(const Options& options) {
  if (options.has("--kernels")) return options.text("--kernels");
  std::error_code failed;
  const fs::path beside = fs::read_symlink("/proc/self/exe", failed).parent_path() / kLibrary;
  if (!failed && fs::is_regular_file(beside, failed)) return beside;
  return DEPTHWIRE_KERNELS;
}

}  // namespace

Kernels choose_kernels(const Package& package, const Options& options, bool cuda) {
  Kernels kernels;
  kernels.ops = ops_of(package);
  // On the CUDA provider a kernel for the CPU would copy every source to the host: bodies run unless there are cubins.
  if (kernels.ops.empty() || options.has("--no-kernels") || (cuda && !package.has_cubins)) return kernels;
  const fs::path path = library_of(options);
  const auto refuse = [&](const char* code, const char* what, std::string got) {
    return Error(Exit::runtime, code, what, path.string(), "kernels for the operators of domain depthwire",
                 std::move(got),
                 "Build it with 'make native', name it with --kernels, or give --no-kernels: the "
                 "function bodies in the file compute the same.");
  };
  std::error_code failed;
  if (!fs::is_regular_file(path, failed))
    throw refuse("runtime.no-kernels", "The library of kernels is not there", "no such file");
  void* handle = dlopen(fs::absolute(path).c_str(), RTLD_NOW | RTLD_LOCAL);
  const auto abi = handle == nullptr ? nullptr : reinterpret_cast<int (*)()>(dlsym(handle, "DepthwireAbi"));
  const auto set =
      handle == nullptr ? nullptr : reinterpret_cast<const char* (*)()>(dlsym(handle, "DepthwireInstructionSet"));
  if (abi == nullptr || set == nullptr || abi() != kAbi)
    throw refuse("runtime.stale-kernels", "The library of kernels does not fit this runner",
                 abi == nullptr ? std::string(dlerror()) : "version " + std::to_string(abi()));
  kernels.library = fs::absolute(path).string();
  kernels.instruction_set = set();
  if (cuda) kernels.cubins = fs::absolute(package.path(kCubins)).string();
  return kernels;
}

}  // namespace depthwire
