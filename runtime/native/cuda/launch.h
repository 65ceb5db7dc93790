// One launch of a cubin: what it is called, what it is given, how many blocks.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <string>
#include <vector>

namespace depthwire {

struct Launch {
  std::string op;   // the operator, for messages
  std::string key;  // the kernel, as the index of the cubins names it
  std::vector<const void*> pointers;
  std::vector<std::int32_t> numbers;  // behind the pointers
  std::int64_t rows = 0;              // of `size` items each
  std::int64_t size = 0;              // 0: a row takes as many blocks as the index says; else that many items a block
};

// Launches it on the stream of the call; an error names the operator.
OrtStatus* launch_kernel(const OrtApi& api, OrtKernelContext* context, const Launch& launch);

}  // namespace depthwire
