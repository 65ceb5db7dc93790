// Which engine is run, and its bytes.
#pragma once

#include <cstddef>
#include <filesystem>

#include "runner.h"

namespace depthwire {

// --engine FILE, else the one of --target, else the only one. Throws Error (cli.bad-value, artifact.file-missing).
std::filesystem::path choose_engine(const Package& package, const Options& options);

// A file in memory, not copied: on a Jetson the GPU's memory is this one too.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);  // throws Error (artifact.file-missing)
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace depthwire
