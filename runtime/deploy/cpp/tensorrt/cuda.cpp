#include "cuda.h"

#include <algorithm>

#include "error.h"

namespace depthwire {

void require_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw Error(Exit::runtime, "runtime.run", "CUDA failed", call, "success", cudaGetErrorString(status),
              "See whether 'nvidia-smi' (on a Jetson 'tegrastats') shows the GPU, and how much of its memory is free.");
}

DeviceBuffer::DeviceBuffer(std::size_t bytes) {
  require_cuda(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
}

double Event::milliseconds_since(const Event& before) const {
  float found = 0;
  require_cuda(cudaEventSynchronize(event_), "cudaEventSynchronize");
  require_cuda(cudaEventElapsedTime(&found, before.event_, event_), "cudaEventElapsedTime");
  return found;
}

void Graph::instantiate(cudaGraph_t graph, cudaError_t captured) {
  // Without flags this has one signature in CUDA 11, 12 and 13.
  if (captured == cudaSuccess) captured = cudaGraphInstantiateWithFlags(&executable_, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);
  require_cuda(captured, "recording of a CUDA graph; run without --cuda-graph");
}

std::string device_name() {
  int device = 0;
  cudaDeviceProp properties;
  require_cuda(cudaGetDevice(&device), "cudaGetDevice");
  require_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return std::string(properties.name) + " SM" + std::to_string(properties.major) + std::to_string(properties.minor);
}

}  // namespace depthwire
