#include "engine_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "files.h"

namespace depthwire {

namespace {

namespace fs = std::filesystem;

Error no_engine(const fs::path& at, std::string got) {
  return damaged(
      "artifact.file-missing", "There is no engine", at, "a file that TensorRT wrote", std::move(got),
      "Build it: 'depthwire build' for an artefact, build_and_verify.py for a bundle. Or name it: --engine.");
}

}  // namespace

fs::path choose_engine(const Package& package, const Options& options) {
  if (options.has("--engine")) return options.text("--engine");
  std::string known;
  for (const auto& [target, file] : package.engines) known += (known.empty() ? "" : ", ") + target;
  if (package.engines.empty()) throw no_engine(package.root, "none in the manifest");
  auto chosen = package.engines.begin();
  if (options.has("--target")) {
    chosen = package.engines.find(options.text("--target"));
  } else if (package.engines.size() > 1) {
    chosen = package.engines.end();
  }
  if (chosen == package.engines.end())
    throw Error(Exit::usage, "cli.bad-value", "It is not clear which engine is meant", "--target", known,
                options.text("--target", "no --target"), "Name one of them with --target, or a file with --engine.");
  // An artefact lists its engines with their hashes; a bundle's is built on the device, into its work directory.
  if (package.files.contains(chosen->second)) return package.path(chosen->second);
  return fs::path(options.text("--work", package.path("work").string())) / chosen->second;
}

MappedFile::MappedFile(const fs::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat facts = {};
  const bool sized = file >= 0 && fstat(file, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_size > 0;
  void* mapped = MAP_FAILED;
  if (sized) {
    bytes_ = static_cast<std::size_t>(facts.st_size);
    mapped = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
  }
  const std::string reason = file >= 0 && !sized ? "no file with content" : std::strerror(errno);
  if (file >= 0) close(file);
  if (mapped == MAP_FAILED) throw no_engine(path, reason);
  data_ = mapped;
}

MappedFile::~MappedFile() { munmap(data_, bytes_); }

}  // namespace depthwire
