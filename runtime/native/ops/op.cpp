#include "op.h"

#include <charconv>

#include "kernels.h"

namespace depthwire {

namespace {

struct Kind {
  std::string_view name;
  OpSpec spec;  // without the number of sources
};

constexpr Kind kKinds[] = {
    {"Read", {Family::read, false, false, false, 0}},        {"ReadNorm", {Family::read, false, false, true, 0}},
    {"AddRead", {Family::read, true, false, false, 0}},      {"AddReadNorm", {Family::read, true, false, true, 0}},
    {"UnitRead", {Family::read, false, true, false, 0}},     {"UnitReadNorm", {Family::read, false, true, true, 0}},
    {"AddUnitRead", {Family::read, true, true, false, 0}},   {"AddUnitReadNorm", {Family::read, true, true, true, 0}},
    {"Inter", {Family::inter, false, false, false, 0}},      {"Merge", {Family::merge, false, false, false, 0}},
    {"MergeNorm", {Family::merge, false, false, true, 0}},   {"AddMerge", {Family::merge, true, false, false, 0}},
    {"AddMergeNorm", {Family::merge, true, false, true, 0}},
};
constexpr std::string_view kPrefix = "AttnRes";

int fewest(const OpSpec& spec) { return spec.family == Family::merge && !spec.add ? 0 : 1; }

}  // namespace

std::string OpSpec::name() const {
  std::string text(kPrefix);
  if (add) text += "Add";
  if (unit) text += "Unit";
  text += family == Family::read ? "Read" : family == Family::inter ? "Inter" : "Merge";
  if (norm) text += "Norm";
  return text + "_" + std::to_string(sources);
}

std::string OpSpec::input_name(int index) const {
  if (index == 0) return family == Family::inter ? "queries" : "query";
  if (norm && index == norm_weight()) return "norm_weight";
  if (family == Family::merge && index == inter_out()) return "inter_out";
  if (family == Family::merge && index == inter_lse()) return "inter_lse";
  if (add && index == delta()) return "delta";
  return "source " + std::to_string(index - first_source());
}

std::vector<OpSpec> all_specs() {
  std::vector<OpSpec> specs;
  for (const Kind& kind : kKinds) {
    OpSpec spec = kind.spec;
    for (spec.sources = fewest(spec); spec.sources <= kMaxSources; ++spec.sources) specs.push_back(spec);
  }
  return specs;
}

std::optional<OpSpec> parse_spec(std::string_view name) {
  const std::size_t dash = name.rfind('_');
  if (!name.starts_with(kPrefix) || dash == std::string_view::npos) return std::nullopt;
  const std::string_view digits = name.substr(dash + 1), middle = name.substr(0, dash).substr(kPrefix.size());
  for (const Kind& kind : kKinds) {
    if (kind.name != middle) continue;
    OpSpec spec = kind.spec;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), spec.sources);
    const bool whole = error == std::errc() && end == digits.data() + digits.size();
    if (whole && spec.sources >= fewest(spec) && spec.sources <= kMaxSources) return spec;
  }
  return std::nullopt;
}

}  // namespace depthwire
