// Types and shapes of the outputs, while a model is loaded.
#pragma once

#include "op.h"
#include "routing_op.h"

namespace depthwire {

// The interface that shape inference uses: ONNX Runtime hands none to that callback. Set before anything is registered.
void set_api(const OrtApi* api);

OrtStatus* infer_output_shapes(const OpSpec& spec, OrtShapeInferContext* context);
OrtStatus* infer_routing_shapes(const RoutingSpec& spec, OrtShapeInferContext* context);

}  // namespace depthwire
