// The operators of domain "depthwire": their names, their inputs, and how a provider's kernels are plugged in.
#pragma once

#include <onnxruntime_c_api.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace depthwire {

constexpr std::uint32_t kApiVersion = 24;  // of the oldest ONNX Runtime this library runs in, 1.24

enum class Family { read, inter, merge };

// One operator: AttnRes[Add][Unit]Read[Norm]_n, AttnResInter_n or AttnRes[Add]Merge[Norm]_n, with n sources.
struct OpSpec {
  Family family;
  bool add, unit, norm;
  int sources;

  std::string name() const;
  // Positions of the inputs: query, [norm_weight], [inter_out, inter_lse], sources, [delta].
  int norm_weight() const { return 1; }
  int inter_out() const { return 1 + norm; }
  int inter_lse() const { return 2 + norm; }
  int first_source() const { return 1 + norm + (family == Family::merge ? 2 : 0); }
  int delta() const { return first_source() + sources; }
  int inputs() const { return delta() + add; }
  int outputs() const { return family == Family::inter || add ? 2 : 1; }
  std::string input_name(int index) const;
};

// Every operator there is, and the one of a name.
std::vector<OpSpec> all_specs();
std::optional<OpSpec> parse_spec(std::string_view name);

struct Attributes {
  float eps = 0, scale = 1, last_bias = 0, norm_eps = 0;
  std::int64_t index = 0;
};

struct RoutingSpec;
struct RoutingAttributes;

// One execution provider's implementation of the operators.
struct Backend {
  const char* provider;  // null for the CPU
  OrtStatus* (*compute)(const OrtApi& api, const OpSpec& spec, const Attributes& attributes, OrtKernelContext* context);
  // The routing operators (routing_op.h); null where the provider has no kernels for them.
  OrtStatus* (*route)(const OrtApi& api, const RoutingSpec& spec, const RoutingAttributes& attributes,
                      OrtKernelContext* context) = nullptr;
};

const Backend& cpu_backend();

// The operator as ONNX Runtime takes it; lives as long as the process.
OrtCustomOp* custom_op(const OpSpec& spec, const Backend& backend);

}  // namespace depthwire
