#include "bundle.h"

#include <charconv>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace depthwire {

namespace {

constexpr const char* kIndex = "kernels.tsv";
constexpr const char* kHeader = "depthwire-kernels 1";
constexpr std::size_t kColumns = 9;

struct Table {
  std::mutex guard;
  std::map<std::string, bool> folders;  // whether they have routing kernels
  std::unordered_map<std::string, std::vector<std::unique_ptr<Cubin>>> cubins;  // by key
};

Table& table() {
  static auto& one = *new Table();  // sessions may outlive static destructors
  return one;
}

std::vector<std::string> columns(const std::string& line) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0;;) {
    const std::size_t tab = line.find('\t', begin);
    parts.push_back(line.substr(begin, tab - begin));
    if (tab == std::string::npos) return parts;
    begin = tab + 1;
  }
}

template <class Number>
bool number(const std::string& text, Number& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

// key, capability, file, sha256, symbol, threads, shared, programs, parameters
bool parse(const std::string& folder, const std::string& line, std::string& key, Cubin& cubin) {
  const std::vector<std::string> parts = columns(line);
  if (parts.size() != kColumns || parts[2].empty() || parts[2].find('/') != std::string::npos) return false;
  key = parts[0];
  cubin.path = folder + "/" + parts[2];
  cubin.symbol = parts[4];
  return number(parts[1], cubin.capability) && number(parts[5], cubin.threads) && number(parts[6], cubin.shared) &&
         number(parts[7], cubin.programs) && number(parts[8], cubin.parameters) && cubin.threads >= 1 &&
         cubin.threads <= 1024 && cubin.programs >= 1;
}

}  // namespace

bool add_bundle(const std::string& folder, std::string& reason) {
  Table& known = table();
  const std::lock_guard lock(known.guard);
  if (known.folders.contains(folder)) return true;
  std::ifstream index(folder + "/" + kIndex);
  std::string line;
  if (!index || !std::getline(index, line)) {
    reason = "'" + folder + "' holds no " + kIndex;
    return false;
  }
  if (line != kHeader) {
    reason = "'" + folder + "/" + kIndex + "' begins with '" + line + "', wanted '" + kHeader + "'";
    return false;
  }
  std::vector<std::pair<std::string, std::unique_ptr<Cubin>>> found;
  while (std::getline(index, line)) {
    std::string key;
    auto cubin = std::make_unique<Cubin>();
    if (!parse(folder, line, key, *cubin)) {
      reason = "'" + folder + "/" + kIndex + "' has a damaged line: '" + line + "'";
      return false;
    }
    found.emplace_back(std::move(key), std::move(cubin));
  }
  bool routing = false;
  for (auto& [key, cubin] : found) {
    routing = routing || !key.starts_with("AttnRes");
    known.cubins[key].push_back(std::move(cubin));
  }
  known.folders.emplace(folder, routing);
  return true;
}

bool bundle_routes(const std::string& folder) {
  Table& known = table();
  const std::lock_guard lock(known.guard);
  const auto entry = known.folders.find(folder);
  return entry != known.folders.end() && entry->second;
}

constexpr int kOrin = 87;

Cubin* select_cubin(const std::string& key, int major, int minor, std::string& reason) {
  Table& known = table();
  const std::lock_guard lock(known.guard);
  const auto entry = known.cubins.find(key);
  const int device = 10 * major + minor;
  if (entry == known.cubins.end()) {
    reason = "no folder of kernels has '" + key + "'";
    return nullptr;
  }
  Cubin* best = nullptr;
  std::string present;
  for (const auto& cubin : entry->second) {
    // A cubin runs on later minor versions too; but CUDA's binary compatibility leaves Tegra, here Orin, out.
    const bool tegra = device == kOrin || cubin->capability == kOrin;
    const bool forward = major < 9 && !tegra && cubin->capability / 10 == major && cubin->capability <= device;
    if (cubin->capability != device && !forward) {
      present += (present.empty() ? "SM" : ", SM") + std::to_string(cubin->capability);
    } else if (best == nullptr || cubin->capability > best->capability) {
      best = cubin.get();
    }
  }
  if (best == nullptr) {
    reason = "'" + key + "' was compiled for " + present + ", and this GPU is SM" + std::to_string(device);
  }
  return best;
}

CUkernel load_cubin(Cubin& cubin, const Driver& driver, std::string& reason) {
  const std::lock_guard lock(table().guard);
  if (cubin.kernel != nullptr) return cubin.kernel;
  std::ifstream file(cubin.path, std::ios::binary);
  const std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file || image.empty()) {
    reason = "cannot read '" + cubin.path + "'";
    return nullptr;
  }
  CUlibrary library = nullptr;  // stays loaded with the process, as its kernels do
  CUkernel kernel = nullptr;
  CUresult result = driver.load(&library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (result == CUDA_SUCCESS) result = driver.kernel(&kernel, library, cubin.symbol.c_str());
  if (result != CUDA_SUCCESS) {
    reason = "cannot load '" + cubin.path + "': " + driver.describe(result);
    return nullptr;
  }
  return cubin.kernel = kernel;
}

}  // namespace depthwire
