// Registers the operators of PROBE_OPS with the CUDA provider's kernels as the CPU provider's, so that a session runs
// them here.
#include <cstdlib>
#include <sstream>
#include <string>

#include "cuda_backend.h"
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
  DEPTHWIRE_TRY(depthwire::add_kernels(*api, folder));
  backend.compute = depthwire::cuda_backend().compute;
  OrtCustomOpDomain* domain = nullptr;
  DEPTHWIRE_TRY(api->CreateCustomOpDomain("depthwire", &domain));
  std::istringstream names(std::getenv("PROBE_OPS"));
  for (std::string name; std::getline(names, name, ',');) {
    DEPTHWIRE_TRY(api->CustomOpDomain_Add(domain, depthwire::custom_op(*depthwire::parse_spec(name), backend)));
  }
  return api->AddCustomOpDomain(options, domain);
}
