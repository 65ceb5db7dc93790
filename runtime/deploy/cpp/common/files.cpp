#include "files.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>

#include "sha256.h"

namespace depthwire {

namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kSchema = 1;
constexpr std::uintmax_t kLargestManifest = 256u << 20;

std::string text_of_file(const fs::path& path) {
  std::error_code failed;
  const std::uintmax_t bytes = fs::file_size(path, failed);
  if (failed) throw JsonError(failed.message());
  if (bytes > kLargestManifest) throw JsonError("a file of " + std::to_string(bytes) + " bytes");
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) throw JsonError("a file that cannot be read");
  return text.str();
}

std::string hash_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  Sha256 hash;
  std::vector<char> chunk(1 << 20);
  while (file) {
    file.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    hash.update(std::as_bytes(std::span(chunk.data(), static_cast<std::size_t>(file.gcount()))));
  }
  return file.bad() ? "of a file that cannot be read" : hash.hex();
}

void check_file(const fs::path& path, const Package::File& entry, bool check_hash) {
  const std::string want = std::to_string(entry.bytes) + " bytes, sha256 " + entry.sha256;
  std::error_code failed;
  if (!fs::is_regular_file(path, failed))
    throw damaged("artifact.file-missing", "A file of the artefact is missing", path, want, "nothing",
                  "Copy the artefact again, whole, or convert again.");
  const std::uintmax_t bytes = fs::file_size(path, failed);
  std::string got;
  if (failed || bytes != entry.bytes) {
    got = failed ? failed.message() : std::to_string(bytes) + " bytes";
  } else if (check_hash) {
    if (std::string hash = hash_of(path); hash != entry.sha256) got = "sha256 " + hash;
  }
  if (!got.empty())
    throw damaged("artifact.hash-mismatch", "A file of the artefact is not what the manifest says", path, want, got,
                  "Copy the artefact again, or convert again; do not use it as it is.");
}

}  // namespace

Error damaged(const char* code, const char* what, const fs::path& at, std::string want, std::string got,
              const char* todo) {
  return Error(Exit::artefact, code, what, at.string(), std::move(want), std::move(got), todo);
}

void read_manifest(const fs::path& path, void (*fill)(Package&, const Json&), Package& package) {
  try {
    fill(package, Json::parse(text_of_file(path)));
  } catch (const JsonError& error) {
    throw damaged("artifact.bad-manifest", "The manifest cannot be read", path,
                  "a manifest of schema version " + std::to_string(kSchema), error.what(),
                  "Convert the model again with this version of Depthwire.");
  }
}

void require_schema(const Json& manifest, const fs::path& at) {
  if (const std::uint64_t schema = manifest.at("schema_version").unsigned_integer(); schema != kSchema)
    throw damaged("artifact.schema-version", "The artefact was written by another version of Depthwire", at,
                  "schema_version " + std::to_string(kSchema), "schema_version " + std::to_string(schema),
                  "Convert the model again, or use a runner of that version.");
}

void require_inside(const fs::path& root, const std::string& name) {
  const fs::path pure(name);
  bool inside = !name.empty() && !pure.is_absolute() && name.find('\\') == std::string::npos &&
                name.find('\0') == std::string::npos &&
                std::none_of(pure.begin(), pure.end(), [](const fs::path& part) { return part == ".."; });
  if (inside) {
    std::error_code failed, failed_too;
    // Absolute first: what does not exist stays relative otherwise.
    const fs::path base = fs::weakly_canonical(fs::absolute(root), failed);
    const fs::path target = fs::weakly_canonical(fs::absolute(root) / pure, failed_too);
    inside = !failed && !failed_too &&
             std::mismatch(base.begin(), base.end(), target.begin(), target.end()).first == base.end();
  }
  if (!inside)
    throw damaged("artifact.path-outside", "The manifest names a file outside the artefact", root,
                  "relative paths inside the directory", json_text(name),
                  "Do not use this artefact: it was tampered with.");
}

void read_files(Package& package, const Json& files) {
  for (const auto& [name, entry] : files.object())
    package.files[name] = {entry.at("bytes").unsigned_integer(), entry.at("sha256").string()};
}

void check_files(const Package& package, bool check_hashes) {
  for (const auto& [name, entry] : package.files) {
    require_inside(package.root, name);
    check_file(package.path(name), entry, check_hashes);
  }
}

TensorInfo read_tensor(const Json& entry) {
  const std::string& dtype = entry.at("dtype").string();
  TensorInfo info{entry.at("name").string(), {}, element_by_name(dtype), element_by_name(dtype)};
  // Beyond 2^63 a size turns negative, which count_of refuses.
  for (const Json& size : entry.at("shape").array())
    info.shape.push_back(static_cast<std::int64_t>(size.unsigned_integer()));
  std::size_t count = 0;
  if (info.element == Element::unknown) throw JsonError("no dtype " + json_text(dtype));
  if (!count_of(info.shape, info.element, count)) throw JsonError("a shape beyond all memory");
  return info;
}

}  // namespace depthwire
