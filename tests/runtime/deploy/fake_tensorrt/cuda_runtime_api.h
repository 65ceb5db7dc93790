// A stand-in for CUDA's runtime: what depthwire_run_trt calls of it, on the host. Work of a stream is done when the
// stream is waited for and not before, so that a result that is read too early is wrong.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNoDevice = 100,
  cudaErrorStreamCaptureInvalidated = 901
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
constexpr unsigned cudaStreamNonBlocking = 1;

using FakeWork = std::vector<std::function<void()>>;
struct FakeStream {
  FakeWork waiting, captured;
  bool capturing = false;
  double clock = 0;  // ms
};
struct FakeEvent {
  FakeStream* stream = nullptr;
  double at = -1;
};
struct FakeGraph {
  FakeWork work;
};
using cudaStream_t = FakeStream*;
using cudaEvent_t = FakeEvent*;
using cudaGraph_t = FakeGraph*;
using cudaGraphExec_t = FakeGraph*;
struct cudaDeviceProp {
  char name[64];
  int major, minor;
};

inline bool fake_is(const char* name) { return std::getenv(name) != nullptr; }

inline void fake_enqueue(cudaStream_t stream, std::function<void()> work) {
  (stream->capturing ? stream->captured : stream->waiting).push_back(std::move(work));
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorNoDevice           ? "no CUDA-capable device is detected"
         : status == cudaErrorMemoryAllocation ? "out of memory"
                                               : "failed";
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = 0, fake_is("FAKE_NO_GPU") ? cudaErrorNoDevice : cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::snprintf(properties->name, sizeof properties->name, "stand-in");
  properties->major = 8, properties->minor = 7;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  if (fake_is("FAKE_NO_MEMORY")) return cudaErrorMemoryAllocation;
  *data = std::malloc(bytes);
  std::memset(*data, 0xaa, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) { return std::free(data), cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = new FakeStream, cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  for (const auto& work : stream->waiting) work();
  stream->waiting.clear();
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  fake_enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new FakeEvent, cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream;
  fake_enqueue(stream, [=] { event->at = stream->clock; });
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaStreamSynchronize(event->stream); }
inline cudaError_t cudaEventElapsedTime(float* found, cudaEvent_t begin, cudaEvent_t end) {
  *found = static_cast<float>(end->at - begin->at);
  return cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  return stream->capturing = true, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  stream->capturing = false;
  *graph = new FakeGraph{std::move(stream->captured)};
  stream->captured.clear();
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return *executable = new FakeGraph(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const auto& work : executable->work) fake_enqueue(stream, work);
  return cudaSuccess;
}
