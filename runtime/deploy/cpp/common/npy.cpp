#include <fstream>

#include "goldens.h"

namespace depthwire {

namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::size_t kLargestHeader = 1 << 20;

// The header is a Python literal, {'descr': '<f4', 'fortran_order': False, 'shape': (1, 16), }; here it becomes JSON.
std::string as_json(const std::string& literal) {
  std::string text;
  for (std::size_t at = 0; at < literal.size(); ++at) {
    const char next = literal[at];
    if (next == '\'') {
      text += '"';
    } else if (next == '(' || next == ')') {
      text += next == '(' ? '[' : ']';
    } else if (next == ',') {
      const std::size_t behind = literal.find_first_not_of(' ', at + 1);
      const bool last = behind == std::string::npos || literal[behind] == ')' || literal[behind] == '}';
      if (!last) text += ',';
    } else if (literal.compare(at, 5, "False") == 0 || literal.compare(at, 4, "True") == 0) {
      text += next == 'F' ? "false" : "true";
      at += next == 'F' ? 4 : 3;
    } else {
      text += next;
    }
  }
  return text;
}

// "<f4", "|b1": little-endian, as every machine that this runs on.
Element element_of(const std::string& descr) {
  if (descr.size() != 3 || (descr[0] != '<' && descr[0] != '|')) return Element::unknown;
  const std::string bits = std::to_string((descr[2] - '0') * 8);
  switch (descr[1]) {
    case 'f':
      return element_by_name("float" + bits);
    case 'i':
      return element_by_name("int" + bits);
    case 'u':
      return element_by_name("uint" + bits);
    case 'b':
      return descr == "|b1" ? Element::boolean : Element::unknown;
    default:
      return Element::unknown;
  }
}

}  // namespace

Stored read_npy(const std::filesystem::path& path) {
  std::error_code failed;
  const std::uint64_t bytes = std::filesystem::file_size(path, failed);
  if (failed) throw JsonError(path.filename().string() + ": " + failed.message());
  std::ifstream file(path, std::ios::binary);
  unsigned char start[12] = {};
  file.read(reinterpret_cast<char*>(start), 10);
  const bool is_long = start[6] >= 2;  // the length then takes four bytes
  if (is_long) file.read(reinterpret_cast<char*>(start) + 10, 2);
  if (!file || std::string_view(reinterpret_cast<char*>(start), kMagic.size()) != kMagic || start[6] < 1 ||
      start[6] > 3)
    throw JsonError(path.filename().string() + " is no .npy file");
  std::uint64_t size = start[8] | start[9] << 8;
  if (is_long) size |= static_cast<std::uint64_t>(start[10]) << 16 | static_cast<std::uint64_t>(start[11]) << 24;
  if (size > kLargestHeader) throw JsonError("a header of " + std::to_string(size) + " bytes");
  std::string text(size, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) throw JsonError("a header that cannot be read");
  const Json header = Json::parse(as_json(text));
  Stored stored{path, element_of(header.at("descr").string()), {}, (is_long ? 12u : 10u) + size, 0};
  if (stored.element == Element::unknown) throw JsonError("no dtype " + json_text(header.at("descr").string()));
  if (header.at("fortran_order").kind() != Json::Kind::boolean || header.at("fortran_order").is_true())
    throw JsonError("an array in Fortran's order");
  for (const Json& axis : header.at("shape").array())
    stored.shape.push_back(static_cast<std::int64_t>(axis.unsigned_integer()));
  std::size_t count = 0;
  if (!count_of(stored.shape, stored.element, count)) throw JsonError("shape " + text_of(stored.shape));
  stored.bytes = count * facts(stored.element).bytes;
  if (stored.bytes != bytes - stored.begin)
    throw JsonError(path.filename().string() + " does not hold shape " + text_of(stored.shape));
  return stored;
}

}  // namespace depthwire
