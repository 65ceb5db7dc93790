#include <algorithm>
#include <set>

#include "error.h"
#include "package.h"

namespace depthwire {

namespace {

constexpr const char* kGoldens = "goldens.safetensors";
constexpr std::uint64_t kLargestHeader = 100'000'000;  // what the safetensors library admits

Error bad_goldens(const std::string& path, std::string got) {
  return Error(Exit::artefact, "verify.goldens", "The artefact's goldens cannot be used", path,
               "input.<name> and output.<name> for every input and output of the manifest, one or more windows each",
               std::move(got), "Convert the model again.");
}

// A tensor of the file: its bytes are [begin, end) behind the header.
struct Entry {
  Element element;
  Shape shape;
  std::uint64_t begin, end;
};

Entry entry_of(const Json& json) {
  Entry entry{element_by_safetensors(json.at("dtype").string()), {}, 0, 0};
  if (entry.element == Element::unknown) throw JsonError("no dtype " + json_text(json.at("dtype").string()));
  for (const Json& size : json.at("shape").array()) {
    // Beyond 2^63 the number turns negative, which count_of refuses.
    entry.shape.push_back(static_cast<std::int64_t>(size.unsigned_integer()));
  }
  const std::vector<Json>& offsets = json.at("data_offsets").array();
  if (offsets.size() != 2) throw JsonError("data_offsets that are not a pair");
  entry.begin = offsets[0].unsigned_integer();
  entry.end = offsets[1].unsigned_integer();
  std::size_t count = 0;
  if (!count_of(entry.shape, entry.element, count)) throw JsonError("shape " + text_of(entry.shape));
  if (entry.end < entry.begin || entry.end - entry.begin != count * facts(entry.element).bytes)
    throw JsonError("data_offsets that do not hold shape " + text_of(entry.shape));
  return entry;
}

// Reads the header. The tensors must cover the data without gap or overlap, as the format demands.
std::map<std::string, Entry> read_header(std::ifstream& file, std::uint64_t bytes, std::uint64_t& data) {
  unsigned char length[8];
  if (bytes < sizeof length || !file.read(reinterpret_cast<char*>(length), sizeof length))
    throw JsonError("a file of " + std::to_string(bytes) + " bytes");
  std::uint64_t size = 0;
  for (int i = 7; i >= 0; --i) size = size << 8 | length[i];
  if (size > kLargestHeader || size > bytes - sizeof length)
    throw JsonError("a header of " + std::to_string(size) + " bytes in a file of " + std::to_string(bytes));
  std::string text(size, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) throw JsonError("a header that cannot be read");
  data = sizeof length + size;
  std::map<std::string, Entry> entries;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
  const Json header = Json::parse(text);
  for (const auto& [name, json] : header.object()) {
    if (name == "__metadata__") continue;
    const Entry& entry = entries.emplace(name, entry_of(json)).first->second;
    spans.emplace_back(entry.begin, entry.end);
  }
  std::sort(spans.begin(), spans.end());
  std::uint64_t reached = 0;
  for (const auto& [begin, end] : spans) {
    if (begin != reached) throw JsonError("tensors that leave a gap or overlap at byte " + std::to_string(begin));
    reached = end;
  }
  if (reached != bytes - data)
    throw JsonError(std::to_string(bytes - data) + " bytes of data, of which tensors hold " + std::to_string(reached));
  return entries;
}

}  // namespace

Goldens::Goldens(const Artifact& artifact) : path_(artifact.path(kGoldens).string()) {
  std::error_code failed;
  const std::uint64_t bytes = std::filesystem::file_size(path_, failed);
  file_.open(path_, std::ios::binary);
  if (failed || !file_) throw bad_goldens(path_, failed ? failed.message() : "a file that cannot be opened");
  std::uint64_t data = 0;
  std::map<std::string, Entry> entries;
  try {
    entries = read_header(file_, bytes, data);
  } catch (const JsonError& error) {
    throw bad_goldens(path_, error.what());
  }
  std::set<std::int64_t> counts;
  const auto take = [&](const std::string& key, const TensorInfo& info, std::vector<Slot>& slots) {
    const auto found = entries.find(key);
    if (found == entries.end()) throw bad_goldens(path_, "no tensor " + json_text(key));
    const Entry& entry = found->second;
    Shape wanted{entry.shape.empty() ? 0 : entry.shape[0]};
    wanted.insert(wanted.end(), info.shape.begin(), info.shape.end());
    // numpy has no bfloat16, so such values may lie in the file as float32, which holds them exactly.
    const bool widened = info.element == Element::bf16 && entry.element == Element::f32;
    if (entry.shape != wanted || (entry.element != info.element && !widened))
      throw bad_goldens(path_, key + " is " + std::string(facts(entry.element).name) + " " + text_of(entry.shape) +
                                   ", the manifest says " + std::string(facts(info.element).name) + " [windows] + " +
                                   text_of(info.shape));
    counts.insert(entry.shape[0]);
    const std::uint64_t each = entry.shape[0] == 0 ? 0 : (entry.end - entry.begin) / entry.shape[0];
    slots.push_back({{info.name, entry.element, info.shape, {}}, info.element, data + entry.begin, each});
    entries.erase(found);
  };
  for (const TensorInfo& info : artifact.inputs) take("input." + info.name, info, inputs_);
  for (const TensorInfo& info : artifact.outputs) take("output." + info.name, info, outputs_);
  if (!entries.empty()) throw bad_goldens(path_, "a tensor " + json_text(entries.begin()->first) + " of no known use");
  if (outputs_.empty() || counts.size() != 1 || *counts.begin() < 1)
    throw bad_goldens(path_, "no window, or not the same number of windows for all");
  windows_ = static_cast<std::size_t>(*counts.begin());
}

std::vector<Tensor> Goldens::inputs(std::size_t window) {
  std::vector<Tensor> tensors = read(inputs_, window);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    Tensor& tensor = tensors[i];
    if (tensor.element == inputs_[i].wanted) continue;
    // The upper half of each little-endian float32.
    for (std::size_t at = 0; at < tensor.data.size() / 4; ++at)
      std::copy_n(&tensor.data[4 * at + 2], 2, &tensor.data[2 * at]);
    tensor.data.resize(tensor.data.size() / 2);
    tensor.element = inputs_[i].wanted;
  }
  return tensors;
}

std::vector<Tensor> Goldens::read(const std::vector<Slot>& slots, std::size_t window) {
  std::vector<Tensor> tensors;
  for (const Slot& slot : slots) {
    Tensor& tensor = tensors.emplace_back(slot.empty);
    tensor.data.resize(slot.bytes);
    file_.seekg(static_cast<std::streamoff>(slot.begin + window * slot.bytes));
    if (!file_.read(reinterpret_cast<char*>(tensor.data.data()), static_cast<std::streamsize>(slot.bytes)))
      throw bad_goldens(path_, "a file that ends before tensor " + json_text(tensor.name) + " does");
  }
  return tensors;
}

}  // namespace depthwire
