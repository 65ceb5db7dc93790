/* A stand-in for libcuda.so.1 whose device memory is the host's: enough of a driver to call every function that
 * depthwire.runtime.deploy.cuda declares, with its real number and width of arguments. It knows no CUDA graphs.
 * The compute capability is that of DEPTHWIRE_STAND_IN, such as 87. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
enum { OK = 0, INVALID = 1, NOT_SUPPORTED = 801 };

static int capability(void) {
  const char *text = getenv("DEPTHWIRE_STAND_IN");
  return text ? atoi(text) : 0;
}

CUresult cuInit(unsigned flags) { return flags ? INVALID : OK; }
CUresult cuDriverGetVersion(int *version) { return *version = 13020, OK; }
CUresult cuDeviceGetCount(int *count) { return *count = capability() ? 1 : 0, OK; }
CUresult cuDeviceGet(int *device, int ordinal) { return *device = ordinal, OK; }
CUresult cuDeviceGetName(char *name, int length, int device) {
  (void)device;
  return snprintf(name, (size_t)length, "Stand-in %d", capability()), OK;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 75: return *value = capability() / 10, OK;
    case 76: return *value = capability() % 10, OK;
    case 18: return *value = 1, OK;
    default: return INVALID;
  }
}
CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; return *bytes = (size_t)8 << 30, OK; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; return *context = (void *)16, OK; }
CUresult cuCtxSetCurrent(void *context) { return context == (void *)16 ? OK : INVALID; }
CUresult cuMemGetInfo_v2(size_t *left, size_t *total) { return *left = (size_t)5 << 30, *total = (size_t)8 << 30, OK; }
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
  *address = (CUdeviceptr)(size_t)calloc(bytes, 1);
  return *address ? OK : 2;
}
CUresult cuMemFree_v2(CUdeviceptr address) { return free((void *)(size_t)address), OK; }
CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
  (void)flags;
  return (*address = calloc(bytes, 1)) ? OK : 2;
}
CUresult cuMemFreeHost(void *address) { return free(address), OK; }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, void *stream) {
  return stream == (void *)32 ? (memcpy((void *)(size_t)to, from, bytes), OK) : INVALID;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, void *stream) {
  return stream == (void *)32 ? (memcpy(to, (void *)(size_t)from, bytes), OK) : INVALID;
}
CUresult cuStreamCreate(void **stream, unsigned flags) { return *stream = (void *)32, flags == 1 ? OK : INVALID; }
CUresult cuStreamSynchronize(void *stream) { return stream == (void *)32 ? OK : INVALID; }
CUresult cuStreamDestroy_v2(void *stream) { return stream == (void *)32 ? OK : INVALID; }
CUresult cuStreamBeginCapture_v2(void *stream, int mode) { (void)stream; (void)mode; return NOT_SUPPORTED; }
CUresult cuStreamEndCapture(void *stream, void **graph) { (void)stream; (void)graph; return NOT_SUPPORTED; }
CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  (void)executable, (void)graph, (void)flags;
  return NOT_SUPPORTED;
}
CUresult cuGraphLaunch(void *executable, void *stream) { (void)executable, (void)stream; return NOT_SUPPORTED; }
CUresult cuGraphExecDestroy(void *executable) { (void)executable; return NOT_SUPPORTED; }
CUresult cuGraphDestroy(void *graph) { (void)graph; return NOT_SUPPORTED; }
CUresult cuEventCreate(void **event, unsigned flags) {
  (void)flags;
  return (*event = calloc(1, sizeof(struct timespec))) ? OK : 2;
}
CUresult cuEventRecord(void *event, void *stream) {
  if (stream != (void *)32) return INVALID;
  return clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event), OK;
}
CUresult cuEventSynchronize(void *event) { return event ? OK : INVALID; }
CUresult cuEventElapsedTime(float *milliseconds, void *first, void *last) {
  const struct timespec *a = first, *b = last;
  *milliseconds = (float)((b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6);
  return OK;
}
CUresult cuEventDestroy_v2(void *event) { return free(event), OK; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  return *text = error == NOT_SUPPORTED ? "operation not supported" : "invalid argument", OK;
}
