#include <algorithm>
#include <array>
#include <limits>
#include <sstream>

#include "error.h"
#include "package.h"
#include "sha256.h"

namespace depthwire {

namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.json";
constexpr std::uint64_t kSchema = 1;
constexpr std::uintmax_t kLargestManifest = 256u << 20;

Error damaged(const char* code, const char* what, const fs::path& at, std::string want, std::string got,
              const char* todo) {
  return Error(Exit::artefact, code, what, at.string(), std::move(want), std::move(got), todo);
}

Error bad_manifest(const fs::path& at, std::string got) {
  return damaged("artifact.bad-manifest", "The manifest cannot be read", at, "a manifest of schema version 1",
                 std::move(got), "Convert the model again with this version of Depthwire.");
}

Json read_manifest(const fs::path& path) {
  std::error_code failed;
  const std::uintmax_t bytes = fs::file_size(path, failed);
  if (failed || bytes > kLargestManifest)
    throw bad_manifest(path, failed ? failed.message() : std::to_string(bytes) + " bytes");
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) throw bad_manifest(path, "a file that cannot be read");
  return Json::parse(text.view());
}

std::vector<TensorInfo> tensors(const Json& list) {
  std::vector<TensorInfo> found;
  for (const Json& entry : list.array()) {
    TensorInfo info{entry.at("name").string(), {}, element_by_name(entry.at("dtype").string())};
    for (const Json& size : entry.at("shape").array()) {
      const std::uint64_t value = size.unsigned_integer();
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) throw JsonError("a bad shape");
      info.shape.push_back(static_cast<std::int64_t>(value));
    }
    std::size_t count = 0;
    if (info.element == Element::unknown) throw JsonError("no dtype " + json_text(entry.at("dtype").string()));
    if (!count_of(info.shape, info.element, count)) throw JsonError("a shape beyond all memory");
    found.push_back(std::move(info));
  }
  return found;
}

// A member's name may not leave the directory, by its spelling or through a link.
void require_inside(const fs::path& root, const std::string& name) {
  const fs::path pure(name);
  bool inside = !name.empty() && !pure.is_absolute() && name.find('\\') == std::string::npos &&
                name.find('\0') == std::string::npos &&
                std::none_of(pure.begin(), pure.end(), [](const fs::path& part) { return part == ".."; });
  if (inside) {
    std::error_code failed;
    const fs::path base = fs::weakly_canonical(root, failed), target = fs::weakly_canonical(root / pure, failed);
    const auto split = std::mismatch(base.begin(), base.end(), target.begin(), target.end());
    inside = !failed && split.first == base.end();
  }
  if (!inside)
    throw damaged("artifact.path-outside", "The manifest names a file outside the artefact", root / kManifest,
                  "relative paths inside the directory", json_text(name),
                  "Do not use this artefact: it was tampered with.");
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

void check_file(const fs::path& path, const Artifact::File& entry, bool check_hash) {
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

void fill(Artifact& artifact, const Json& manifest) {
  if (const std::uint64_t schema = manifest.at("schema_version").unsigned_integer(); schema != kSchema)
    throw damaged("artifact.schema-version", "The artefact was written by another version of Depthwire",
                  artifact.root / kManifest, "schema_version " + std::to_string(kSchema),
                  "schema_version " + std::to_string(schema), "Convert the model again, or use another runner.");
  artifact.inputs = tensors(manifest.at("inputs"));
  artifact.outputs = tensors(manifest.at("outputs"));
  for (const auto& [name, op] : manifest.at("custom_ops").object()) {
    if (name.starts_with("depthwire::")) artifact.custom_ops.push_back(name.substr(name.rfind(':') + 1));
  }
  const Json* kernels = manifest.find("kernels");
  artifact.has_cubins = kernels != nullptr && !kernels->is_null();
  for (const auto& [name, entry] : manifest.at("files").object())
    artifact.files[name] = {entry.at("bytes").unsigned_integer(), entry.at("sha256").string()};
}

}  // namespace

Artifact load_artifact(const fs::path& root, bool check_hashes) {
  Artifact artifact;
  artifact.root = root;
  const fs::path manifest = root / kManifest;
  std::error_code failed;
  if (!fs::is_regular_file(manifest, failed))
    throw damaged("artifact.not-an-artifact", "This directory is not a Depthwire artefact", root,
                  std::string("a directory with ") + kManifest,
                  fs::exists(root, failed) ? std::string("no ") + kManifest + " in it" : "no such directory",
                  "Give the directory that 'depthwire convert -o' wrote.");
  try {
    fill(artifact, read_manifest(manifest));
  } catch (const JsonError& error) {
    throw bad_manifest(manifest, error.what());
  }
  for (const auto& [name, entry] : artifact.files) {
    require_inside(root, name);
    check_file(root / name, entry, check_hashes);
  }
  return artifact;
}

}  // namespace depthwire
