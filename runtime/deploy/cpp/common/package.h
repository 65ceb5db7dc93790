// A directory that depthwire wrote: what it says of itself, checked, and its goldens.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "json.h"
#include "tensor.h"

namespace depthwire {

struct TensorInfo {
  std::string name;
  Shape shape;
  Element element;
};

// An artefact, read as depthwire's own Artifact.load reads it: schema, names that stay inside, sizes, hashes.
struct Artifact {
  std::filesystem::path root;
  std::vector<TensorInfo> inputs, outputs;
  std::vector<std::string> custom_ops;  // "AttnResRead_9"
  bool has_cubins = false;              // depthwire kernels has been here
  bool is_listed(const std::string& name) const { return files.contains(name); }

  struct File {
    std::uint64_t bytes;
    std::string sha256;
  };
  std::map<std::string, File> files;

  std::filesystem::path path(const std::string& name) const { return root / name; }
};

// Throws Error with Exit::artefact.
Artifact load_artifact(const std::filesystem::path& root, bool check_hashes);

// goldens.safetensors: input.<name> and output.<name>, with a leading axis over windows. One window at a time is read.
class Goldens {
 public:
  explicit Goldens(const Artifact& artifact);  // throws Error (verify.goldens)

  std::size_t windows() const { return windows_; }
  std::vector<Tensor> inputs(std::size_t window);
  std::vector<Tensor> outputs(std::size_t window) { return read(outputs_, window); }  // bfloat16 may come as float32

 private:
  struct Slot {
    Tensor empty;    // of one window, of the file's type
    Element wanted;  // the manifest's type
    std::uint64_t begin, bytes;
  };

  std::vector<Tensor> read(const std::vector<Slot>& slots, std::size_t window);

  std::string path_;
  std::ifstream file_;
  std::size_t windows_ = 0;
  std::vector<Slot> inputs_, outputs_;
};

}  // namespace depthwire
