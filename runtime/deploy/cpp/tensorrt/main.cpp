// depthwire_run_trt: an engine without Python, by TensorRT.
#include "trt_backend.h"

int main(int count, char** arguments) {
  const depthwire::Program program{
      "depthwire_run_trt", "Run the goldens of an artefact or a bundle by its engine and compare with the outputs.",
      depthwire::kTrtOptions, depthwire::load_package, depthwire::open_trt};
  return depthwire::run_program(program, count, arguments);
}
