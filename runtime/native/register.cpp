// RegisterCustomOps: what ONNX Runtime calls when the library is given to a session.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "op.h"
#include "routing_op.h"
#include "shapes.h"
#include "status.h"
#ifdef DEPTHWIRE_CUDA
#include "cuda_backend.h"
#endif

namespace depthwire {

namespace {

constexpr const char* kDomain = "depthwire";
// Session configuration entry: the operators to register, "AttnResRead_9,AttnResAddReadNorm_2-33"; all if absent.
constexpr const char* kOpsEntry = "depthwire.ops";

OrtStatus* read_entry(const OrtApi& api, const OrtSessionOptions* options, const char* name, bool& present,
                      std::string& value) {
  int has = 0;
  DEPTHWIRE_TRY(api.HasSessionConfigEntry(options, name, &has));
  present = has != 0;
  if (!present) return nullptr;
  std::size_t size = 0;
  DEPTHWIRE_TRY(api.GetSessionConfigEntry(options, name, nullptr, &size));
  value.resize(size);
  DEPTHWIRE_TRY(api.GetSessionConfigEntry(options, name, value.data(), &size));
  value.resize(size == 0 ? 0 : size - 1);  // its terminating zero
  return nullptr;
}

// The providers that a session gets kernels for: the CPU's always, the CUDA provider's where there are cubins. Where it
// has none for routing, the CPU's would make each node copy its tensors to the host and back: then neither has.
OrtStatus* choose_backends(const OrtApi& api, const OrtSessionOptions* options, std::vector<const Backend*>& backends,
                           bool& routed) {
  backends = {&cpu_backend()};
  routed = true;
#ifdef DEPTHWIRE_CUDA
  bool present = false;
  std::string folder;
  DEPTHWIRE_TRY(read_entry(api, options, kKernelsEntry, present, folder));
  if (!present) return nullptr;
  DEPTHWIRE_TRY(add_kernels(api, folder, routed));
  backends.push_back(&cuda_backend());
#else
  static_cast<void>(api), static_cast<void>(options);
#endif
  return nullptr;
}

struct Specs {
  std::vector<OpSpec> reads;
  std::vector<RoutingSpec> routing;
};

// One item of the entry: a name, or a name with a range of counts.
bool expand(const std::string& item, Specs& specs) {
  const std::size_t dash = item.rfind('_'), hyphen = item.rfind('-');
  if (const auto spec = parse_routing_spec(item)) {
    specs.routing.push_back(*spec);
    return true;
  }
  if (dash == std::string::npos) return false;
  const bool range = hyphen != std::string::npos && hyphen > dash;
  const std::string begin = range ? item.substr(0, hyphen) : item;
  const std::string end = range ? item.substr(0, dash + 1) + item.substr(hyphen + 1) : item;
  const auto lowest = parse_routing_spec(begin), highest = parse_routing_spec(end);
  if (lowest && highest) {
    for (RoutingSpec spec = *lowest; spec.levels <= highest->levels; ++spec.levels) specs.routing.push_back(spec);
    return true;
  }
  const auto first = parse_spec(begin), last = parse_spec(end);
  if (!first || !last) return false;
  for (OpSpec spec = *first; spec.sources <= last->sources; ++spec.sources) specs.reads.push_back(spec);
  return true;
}

OrtStatus* chosen(const OrtApi& api, const std::string& entry, Specs& specs) {
  for (std::size_t begin = 0; begin < entry.size();) {
    const std::size_t comma = std::min(entry.find(',', begin), entry.size());
    const std::string item = entry.substr(begin, comma - begin);
    if (!expand(item, specs)) {
      const std::string text =
          std::string("session configuration entry '") + kOpsEntry + "': no operator '" + item + "'";
      return api.CreateStatus(ORT_INVALID_ARGUMENT, text.c_str());
    }
    begin = comma + 1;
  }
  return nullptr;
}

OrtStatus* add_domain(const OrtApi& api, OrtSessionOptions* options) {
  bool present = false;
  std::string entry;
  DEPTHWIRE_TRY(read_entry(api, options, kOpsEntry, present, entry));
  std::vector<const Backend*> backends;
  bool routed = false;
  DEPTHWIRE_TRY(choose_backends(api, options, backends, routed));
  // Sessions use a domain for as long as they live; the same operators share one, which is never released.
  static std::mutex guard;
  static auto& domains = *new std::map<std::string, OrtCustomOpDomain*>();
  const std::lock_guard lock(guard);
  const std::string key = (present ? entry : "*") + "/" + std::to_string(backends.size()) + "/" + std::to_string(routed);
  if (const auto known = domains.find(key); known != domains.end())
    return api.AddCustomOpDomain(options, known->second);
  Specs specs;
  if (present) {
    DEPTHWIRE_TRY(chosen(api, entry, specs));
  } else {
    specs = {all_specs(), all_routing_specs()};
  }
  OrtCustomOpDomain* domain = nullptr;
  DEPTHWIRE_TRY(api.CreateCustomOpDomain(kDomain, &domain));
  for (const Backend* backend : backends) {
    for (const OpSpec& spec : specs.reads) DEPTHWIRE_TRY(api.CustomOpDomain_Add(domain, custom_op(spec, *backend)));
    if (!routed) continue;
    for (const RoutingSpec& spec : specs.routing) {
      DEPTHWIRE_TRY(api.CustomOpDomain_Add(domain, routing_custom_op(spec, *backend)));
    }
  }
  domains.emplace(key, domain);
  return api.AddCustomOpDomain(options, domain);
}

}  // namespace

}  // namespace depthwire

#define DEPTHWIRE_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the operators of domain "depthwire" with a session's options.
DEPTHWIRE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(depthwire::kApiVersion);
  if (api == nullptr) {
    // The first interface has what reports an error.
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "depthwire: needs ONNX Runtime 1.24 or newer");
  }
  depthwire::set_api(api);
  try {
    return depthwire::add_domain(*api, options);
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}

// The version of the operators' interface, which depthwire/runtime/native/__init__.py asks for; and what runs them.
DEPTHWIRE_EXPORT int DepthwireAbi() { return 2; }
DEPTHWIRE_EXPORT const char* DepthwireInstructionSet() { return depthwire::instruction_set(); }
