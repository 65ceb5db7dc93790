// Registers the operators of PROBE_OPS with the CUDA provider's kernels as the CPU provider's, so that a session runs
// them here.
#include <cstdlib>
#include <sstream>
#include <string>

#include "cuda_backend.h"
#include "routing_op.h"
#include "shapes.h"
#include "status.h"

static depthwire::Backend backend{nullptr, nullptr};

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(depthwire::kApiVersion);
  depthwire::set_api(api);
  char folder[1024];
  std::size_t size = sizeof(folder);
  DEPTHWIRE_TRY(api->GetSessionConfigEntry(options, depthwire::kKernelsEntry, folder, &size));
  bool routing = false;
  DEPTHWIRE_TRY(depthwire::add_kernels(*api, folder, routing));
  backend.compute = depthwire::cuda_backend().compute;
  backend.route = routing ? depthwire::cuda_backend().route : nullptr;
  OrtCustomOpDomain* domain = nullptr;
  DEPTHWIRE_TRY(api->CreateCustomOpDomain("depthwire", &domain));
  std::istringstream names(std::getenv("PROBE_OPS"));
  for (std::string name; std::getline(names, name, ',');) {
    const auto spec = depthwire::parse_routing_spec(name);
    if (spec && backend.route == nullptr) continue;
    OrtCustomOp* op = spec ? depthwire::routing_custom_op(*spec, backend)
                           : depthwire::custom_op(*depthwire::parse_spec(name), backend);
    DEPTHWIRE_TRY(api->CustomOpDomain_Add(domain, op));
  }
  return api->AddCustomOpDomain(options, domain);
}
