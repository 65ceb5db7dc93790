// What is used of CUDA's runtime, released by itself.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <utility>

namespace depthwire {

// Throws Error (runtime.run) where `status` is a failure of `call`.
void require_cuda(cudaError_t status, const char* call);

class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes);
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

class Stream {
 public:
  Stream() { require_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }

  cudaStream_t get() const { return stream_; }
  void wait() const { require_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { require_cuda(cudaEventCreate(&event_), "cudaEventCreate"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }

  void record(const Stream& stream) const { require_cuda(cudaEventRecord(event_, stream.get()), "cudaEventRecord"); }
  double milliseconds_since(const Event& before) const;

 private:
  cudaEvent_t event_ = nullptr;
};

// Work of one stream, recorded once and launched as a whole.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
  }

  bool recorded() const { return executable_ != nullptr; }

  template <class Work>
  void record(const Stream& stream, Work&& work) {
    require_cuda(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    const bool enqueued = work();
    cudaGraph_t graph = nullptr;
    const cudaError_t status = cudaStreamEndCapture(stream.get(), &graph);
    instantiate(graph, enqueued ? status : cudaErrorStreamCaptureInvalidated);
  }

  void launch(const Stream& stream) const {
    require_cuda(cudaGraphLaunch(executable_, stream.get()), "cudaGraphLaunch");
  }

 private:
  void instantiate(cudaGraph_t graph, cudaError_t captured);

  cudaGraphExec_t executable_ = nullptr;
};

// Such as "NVIDIA Jetson AGX Orin, SM87".
std::string device_name();

}  // namespace depthwire
