// The example inputs and expected outputs of a package, a window at a time.
#pragma once

#include "json.h"
#include "package.h"

namespace depthwire {

// A tensor in a file: `bytes` of it from `begin` on, with a leading axis over windows.
struct Stored {
  std::filesystem::path path;
  Element element;
  Shape shape;
  std::uint64_t begin, bytes;
};

// What the formats' readers throw as JsonError, the caller turns into verify.goldens.
std::map<std::string, Stored> read_safetensors(const std::filesystem::path& path);
Stored read_npy(const std::filesystem::path& path);

class Goldens {
 public:
  explicit Goldens(const Package& package);  // throws Error (verify.goldens)

  std::size_t windows() const { return windows_; }
  std::vector<Tensor> inputs(std::size_t window) const;
  // bfloat16 may come as float32, which holds it exactly: numpy has no bfloat16.
  std::vector<Tensor> outputs(std::size_t window) const;

 private:
  struct Slot {
    TensorInfo info;
    Stored stored;
  };

  Tensor read(const Slot& slot, std::size_t window) const;

  std::string at_;
  std::size_t windows_ = 0;
  std::vector<Slot> inputs_, outputs_;
};

}  // namespace depthwire
