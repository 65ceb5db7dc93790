#include "routing_op.h"

#include <charconv>

namespace depthwire {

namespace {

struct Kind {
  std::string_view name;
  bool levels;  // part of the name
  int outputs;
  const char* inputs[kMaxRoutingInputs];
};

constexpr Kind kKinds[] = {
    {"SelectTokens", true, 2, {"score", "valid", "slots"}},
    {"SelectTokensBudget", true, 3, {"score", "valid", "threshold", "budget", "state", "slots"}},
    {"GatherTokens", false, 1, {"x", "index"}},
    {"ScatterTokens", false, 1, {"base", "index", "taken", "rows"}},
    {"SurpriseScore", false, 1, {"delta", "prior", "criteria", "valid"}},
};

const Kind& kind_of(const RoutingSpec& spec) { return kKinds[static_cast<int>(spec.kind)]; }

}  // namespace

std::string RoutingSpec::name() const {
  std::string text(kind_of(*this).name);
  if (kind_of(*this).levels) text.append("_").append(std::to_string(levels));
  return text;
}

int RoutingSpec::inputs() const {
  int count = 0;
  while (count < kMaxRoutingInputs && kind_of(*this).inputs[count] != nullptr) ++count;
  return count;
}

int RoutingSpec::outputs() const { return kind_of(*this).outputs; }

const char* RoutingSpec::input_name(int index) const { return kind_of(*this).inputs[index]; }

std::vector<RoutingSpec> all_routing_specs() {
  std::vector<RoutingSpec> specs;
  for (std::size_t kind = 0; kind < std::size(kKinds); ++kind) {
    const int most = kKinds[kind].levels ? kMaxLevels : 0;
    for (int levels = kKinds[kind].levels ? 1 : 0; levels <= most; ++levels) {
      specs.push_back({static_cast<Routing>(kind), levels});
    }
  }
  return specs;
}

std::optional<RoutingSpec> parse_routing_spec(std::string_view name) {
  for (std::size_t index = 0; index < std::size(kKinds); ++index) {
    const Kind& kind = kKinds[index];
    RoutingSpec spec{static_cast<Routing>(index), 0};
    if (!kind.levels) {
      if (name == kind.name) return spec;
      continue;
    }
    if (!name.starts_with(kind.name) || name.substr(kind.name.size()).substr(0, 1) != "_") continue;
    const std::string_view digits = name.substr(kind.name.size() + 1);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), spec.levels);
    const bool whole = error == std::errc() && end == digits.data() + digits.size();
    if (whole && spec.levels >= 1 && spec.levels <= kMaxLevels) return spec;
  }
  return std::nullopt;
}

}  // namespace depthwire
