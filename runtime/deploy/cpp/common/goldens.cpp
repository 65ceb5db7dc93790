#include "goldens.h"

#include <algorithm>
#include <fstream>
#include <set>

#include "error.h"

namespace depthwire {

namespace {

Error bad_goldens(const std::string& at, std::string got) {
  return Error(Exit::artefact, "verify.goldens", "The artefact's goldens cannot be used", at,
               "input.<name> and output.<name> for every input and output of the manifest, one or more windows each",
               std::move(got), "Convert the model again.");
}

// A bundle's outputs may be joined by routing decisions, which build_and_verify.py compares; an artefact has no more.
std::map<std::string, Stored> read_all(const Package& package) {
  const std::filesystem::path path = package.path(package.goldens);
  if (!std::filesystem::is_directory(path)) return read_safetensors(path);
  std::map<std::string, Stored> entries;
  const auto take = [&](const std::string& key) {
    const std::string file = key + ".npy";
    if (file.find('/') != std::string::npos) throw JsonError("a name that is a path: " + json_text(key));
    entries.emplace(key, read_npy(path / file));
  };
  for (const TensorInfo& info : package.inputs) take("input." + info.name);
  for (const TensorInfo& info : package.outputs) take("output." + info.name);
  return entries;
}

void require_fit(const std::string& at, const std::string& key, const Stored& stored, const TensorInfo& info) {
  Shape wanted{stored.shape.empty() ? 0 : stored.shape[0]};
  wanted.insert(wanted.end(), info.shape.begin(), info.shape.end());
  const bool widened = info.element == Element::bf16 && stored.element == Element::f32;
  if (stored.shape == wanted && (stored.element == info.element || widened)) return;
  throw bad_goldens(at, key + " is " + std::string(facts(stored.element).name) + " " + text_of(stored.shape) +
                            ", the manifest says " + std::string(facts(info.element).name) + " [windows] + " +
                            text_of(info.shape));
}

}  // namespace

Goldens::Goldens(const Package& package) : at_(package.path(package.goldens).string()) {
  std::map<std::string, Stored> entries;
  try {
    entries = read_all(package);
  } catch (const JsonError& error) {
    throw bad_goldens(at_, error.what());
  }
  std::set<std::int64_t> counts;
  const auto take = [&](const std::string& key, const TensorInfo& info, std::vector<Slot>& slots) {
    const auto found = entries.find(key);
    if (found == entries.end()) throw bad_goldens(at_, "no tensor " + json_text(key));
    require_fit(at_, key, found->second, info);
    counts.insert(found->second.shape[0]);
    slots.push_back({info, std::move(found->second)});
    entries.erase(found);
  };
  for (const TensorInfo& info : package.inputs) take("input." + info.name, info, inputs_);
  for (const TensorInfo& info : package.outputs) take("output." + info.name, info, outputs_);
  if (!entries.empty()) throw bad_goldens(at_, "a tensor " + json_text(entries.begin()->first) + " of no known use");
  if (outputs_.empty() || counts.size() != 1 || *counts.begin() < 1)
    throw bad_goldens(at_, "no window, or not the same number of windows for all");
  windows_ = static_cast<std::size_t>(*counts.begin());
}

std::vector<Tensor> Goldens::inputs(std::size_t window) const {
  std::vector<Tensor> tensors;
  for (const Slot& slot : inputs_) {
    Tensor& tensor = tensors.emplace_back(read(slot, window));
    if (tensor.element == slot.info.element) continue;
    // The upper half of each little-endian float32 is its bfloat16.
    for (std::size_t at = 0; at < tensor.data.size() / 4; ++at)
      std::copy_n(&tensor.data[4 * at + 2], 2, &tensor.data[2 * at]);
    tensor.data.resize(tensor.data.size() / 2);
    tensor.element = slot.info.element;
  }
  return tensors;
}

std::vector<Tensor> Goldens::outputs(std::size_t window) const {
  std::vector<Tensor> tensors;
  for (const Slot& slot : outputs_) tensors.push_back(read(slot, window));
  return tensors;
}

Tensor Goldens::read(const Slot& slot, std::size_t window) const {
  const std::uint64_t bytes = slot.stored.bytes / windows_;
  Tensor tensor{slot.info.name, slot.stored.element, slot.info.shape, std::vector<std::byte>(bytes)};
  std::ifstream file(slot.stored.path, std::ios::binary);
  file.seekg(static_cast<std::streamoff>(slot.stored.begin + window * bytes));
  if (!file.read(reinterpret_cast<char*>(tensor.data.data()), static_cast<std::streamsize>(bytes)))
    throw bad_goldens(at_, "a file that ends before tensor " + json_text(tensor.name) + " does");
  return tensor;
}

}  // namespace depthwire
