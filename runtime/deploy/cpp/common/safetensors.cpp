#include <algorithm>
#include <fstream>

#include "goldens.h"

namespace depthwire {

namespace {

constexpr std::uint64_t kLargestHeader = 100'000'000;  // what the safetensors library admits

Stored entry_of(const Json& json, const std::filesystem::path& path, std::uint64_t data) {
  Stored entry{path, element_by_safetensors(json.at("dtype").string()), {}, 0, 0};
  if (entry.element == Element::unknown) throw JsonError("no dtype " + json_text(json.at("dtype").string()));
  // Beyond 2^63 a size turns negative, which count_of refuses.
  for (const Json& size : json.at("shape").array())
    entry.shape.push_back(static_cast<std::int64_t>(size.unsigned_integer()));
  const std::vector<Json>& offsets = json.at("data_offsets").array();
  if (offsets.size() != 2) throw JsonError("data_offsets that are not a pair");
  const std::uint64_t begin = offsets[0].unsigned_integer(), end = offsets[1].unsigned_integer();
  std::size_t count = 0;
  if (!count_of(entry.shape, entry.element, count)) throw JsonError("shape " + text_of(entry.shape));
  if (end < begin || end - begin != count * facts(entry.element).bytes)
    throw JsonError("data_offsets that do not hold shape " + text_of(entry.shape));
  entry.begin = data + begin;
  entry.bytes = end - begin;
  return entry;
}

// The tensors must cover the data without gap or overlap, as the format demands.
void require_covered(const std::map<std::string, Stored>& entries, std::uint64_t data, std::uint64_t bytes) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
  for (const auto& [name, entry] : entries) spans.emplace_back(entry.begin, entry.begin + entry.bytes);
  std::sort(spans.begin(), spans.end());
  for (const auto& [begin, end] : spans) {
    if (begin != data) throw JsonError("tensors that leave a gap or overlap at byte " + std::to_string(begin));
    data = end;
  }
  if (data != bytes)
    throw JsonError("a file of " + std::to_string(bytes) + " bytes whose tensors end at " + std::to_string(data));
}

}  // namespace

std::map<std::string, Stored> read_safetensors(const std::filesystem::path& path) {
  std::error_code failed;
  const std::uint64_t bytes = std::filesystem::file_size(path, failed);
  if (failed) throw JsonError(failed.message());
  std::ifstream file(path, std::ios::binary);
  unsigned char length[8];
  if (!file.read(reinterpret_cast<char*>(length), sizeof length))
    throw JsonError("a file of " + std::to_string(bytes) + " bytes");
  std::uint64_t size = 0;
  for (int i = 7; i >= 0; --i) size = size << 8 | length[i];
  if (size > kLargestHeader || size > bytes - sizeof length)
    throw JsonError("a header of " + std::to_string(size) + " bytes in a file of " + std::to_string(bytes));
  std::string text(size, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) throw JsonError("a header that cannot be read");
  const std::uint64_t data = sizeof length + size;
  std::map<std::string, Stored> entries;
  const Json header = Json::parse(text);
  for (const auto& [name, json] : header.object())
    if (name != "__metadata__") entries.emplace(name, entry_of(json, path, data));
  require_covered(entries, data, bytes);
  return entries;
}

}  // namespace depthwire
