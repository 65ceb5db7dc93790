// A directory that depthwire wrote, an artefact or a device bundle: what it says of itself, checked.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "tensor.h"

namespace depthwire {

struct TensorInfo {
  std::string name;
  Shape shape;
  Element element;
  Element judged;  // whose row of the table of tolerances applies: what the values were rounded to inside the graph
};

struct Package {
  std::filesystem::path root;
  std::vector<TensorInfo> inputs, outputs;
  std::string goldens;  // goldens.safetensors of an artefact; folder of .npy files of a bundle

  struct File {
    std::uint64_t bytes;
    std::string sha256;
  };
  std::map<std::string, File> files;           // of which nothing else is read
  std::map<std::string, std::string> engines;  // by target: files of an artefact, or of a bundle's work directory

  // Of artefacts alone.
  std::vector<std::string> custom_ops;  // "AttnResRead_9"
  bool has_cubins = false;              // depthwire kernels has been here

  std::filesystem::path path(const std::string& name) const { return root / name; }
};

// As depthwire's own Artifact.load: schema, names that stay inside, sizes, hashes. Throws Error with Exit::artefact.
Package load_artifact(const std::filesystem::path& root, bool check_hashes);

// An artefact, or the first model of a bundle that `depthwire bundle` wrote. The same errors.
Package load_package(const std::filesystem::path& root, bool check_hashes);

}  // namespace depthwire
