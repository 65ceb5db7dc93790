// A stand-in for TensorRT: what depthwire_run_trt calls of it. An "engine" is a text of lines
//   fake | input NAME TYPE SIZES... | host-output NAME TYPE SIZES... | output NAME TYPE SIZES...
// where a size may be -1 (that of the first input), and every output is the first input, a float, cast to its type.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <sstream>

namespace nvinfer1 {

enum class DataType : std::int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64, kINT4 };
enum class TensorIOMode : std::int32_t { kNONE, kINPUT, kOUTPUT };
enum class TensorLocation : std::int32_t { kDEVICE, kHOST };

struct Dims {
  static constexpr std::int32_t MAX_DIMS = 8;
  std::int32_t nbDims;
  std::int64_t d[MAX_DIMS];
};

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, const char* text) noexcept = 0;
  virtual ~ILogger() = default;
};

struct FakeTensor {
  std::string name;
  TensorIOMode mode;
  TensorLocation location;
  DataType type;
  Dims dims;
};

class IExecutionContext {
 public:
  IExecutionContext(const std::vector<FakeTensor>& tensors, ILogger& log) : tensors_(tensors), log_(log) {}

  bool setInputShape(const char* name, const Dims& dims) noexcept {
    FakeTensor& tensor = find(name);
    bool fits = tensor.dims.nbDims == dims.nbDims;
    for (int i = 0; fits && i < dims.nbDims; ++i) fits = tensor.dims.d[i] == -1 || tensor.dims.d[i] == dims.d[i];
    if (!fits) return log_.log(ILogger::Severity::kERROR, "static dimension mismatch"), false;
    tensor.dims = dims;
    return true;
  }
  Dims getTensorShape(const char* name) const noexcept {
    Dims dims = const_cast<IExecutionContext*>(this)->find(name).dims;
    for (int i = 0; i < dims.nbDims; ++i)
      if (dims.d[i] == -1) dims.d[i] = tensors_.front().dims.d[i];
    return dims;
  }
  bool setTensorAddress(const char* name, void* data) noexcept { return addresses_[name] = data, data != nullptr; }
  bool enqueueV3(cudaStream_t stream) noexcept {
    if (fake_is("FAKE_FAILS")) return log_.log(ILogger::Severity::kERROR, "a tactic failed"), false;
    fake_enqueue(stream, [this, stream] { compute(), stream->clock += stream->capturing ? 0 : 1.5; });
    return true;
  }

 private:
  FakeTensor& find(const std::string& name) {
    for (FakeTensor& tensor : tensors_)
      if (tensor.name == name) return tensor;
    std::abort();
  }

  void compute() {
    const Dims dims = getTensorShape(tensors_.front().name.c_str());
    std::int64_t count = 1;
    for (int i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
    const float* from = static_cast<const float*>(addresses_.at(tensors_.front().name));
    for (const FakeTensor& tensor : tensors_)
      for (std::int64_t i = 0; tensor.mode == TensorIOMode::kOUTPUT && i < count; ++i)
        store(tensor.type, addresses_.at(tensor.name), i, from[i] + (fake_is("FAKE_WRONG") && i == count - 1 ? 1 : 0));
  }

  template <class T>
  static void put(void* to, std::int64_t at, T value) {
    std::memcpy(static_cast<char*>(to) + at * static_cast<std::int64_t>(sizeof value), &value, sizeof value);
  }

  static void store(DataType type, void* to, std::int64_t at, float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    // Small whole numbers alone come by: their lower mantissa is zero.
    const auto half = static_cast<std::uint16_t>(value == 0 ? 0 : (((bits >> 23) - 112) << 10) | (bits >> 13 & 0x3ff));
    switch (type) {
      case DataType::kFLOAT:
        return put(to, at, value);
      case DataType::kHALF:
        return put(to, at, half);
      case DataType::kBF16:
        return put(to, at, static_cast<std::uint16_t>(bits >> 16));
      case DataType::kINT64:
        return put(to, at, static_cast<std::int64_t>(value));
      case DataType::kINT32:
        return put(to, at, static_cast<std::int32_t>(value));
      case DataType::kBOOL:
        return put(to, at, static_cast<std::uint8_t>(value != 0));
      default:
        return put(to, at, static_cast<std::uint8_t>(value));
    }
  }

  std::vector<FakeTensor> tensors_;
  ILogger& log_;
  std::map<std::string, void*> addresses_;
};

class ICudaEngine {
 public:
  ICudaEngine(std::vector<FakeTensor> tensors, ILogger& log) : tensors_(std::move(tensors)), log_(log) {}

  std::int32_t getNbIOTensors() const noexcept { return static_cast<std::int32_t>(tensors_.size()); }
  const char* getIOTensorName(std::int32_t index) const noexcept {
    return tensors_[static_cast<std::size_t>(index)].name.c_str();
  }
  TensorIOMode getTensorIOMode(const char* name) const noexcept { return find(name).mode; }
  DataType getTensorDataType(const char* name) const noexcept { return find(name).type; }
  TensorLocation getTensorLocation(const char* name) const noexcept { return find(name).location; }
  IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext(tensors_, log_); }

 private:
  const FakeTensor& find(const std::string& name) const {
    for (const FakeTensor& tensor : tensors_)
      if (tensor.name == name) return tensor;
    std::abort();
  }

  std::vector<FakeTensor> tensors_;
  ILogger& log_;
};

class IRuntime {
 public:
  explicit IRuntime(ILogger& log) : log_(log) {}

  ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept {
    std::istringstream text(std::string(static_cast<const char*>(blob), size));
    std::string line;
    std::vector<FakeTensor> tensors;
    if (!std::getline(text, line) || line != "fake")
      return log_.log(ILogger::Severity::kERROR, "the engine was built by another version"), nullptr;
    while (std::getline(text, line)) {
      std::istringstream words(line);
      std::string kind;
      FakeTensor tensor{};
      int type = 0;
      words >> kind >> tensor.name >> type;
      tensor.type = static_cast<DataType>(type);
      tensor.mode = kind == "input" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
      tensor.location = kind == "host-output" ? TensorLocation::kHOST : TensorLocation::kDEVICE;
      while (words >> tensor.dims.d[tensor.dims.nbDims]) ++tensor.dims.nbDims;
      tensors.push_back(tensor);
    }
    return new ICudaEngine(tensors, log_);
  }

 private:
  ILogger& log_;
};

inline IRuntime* createInferRuntime(ILogger& log) noexcept { return new IRuntime(log); }

}  // namespace nvinfer1

inline std::int32_t getInferLibVersion() noexcept { return 100300; }
