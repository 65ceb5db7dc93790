// depthwire_run: an artefact without Python, by ONNX Runtime.
#include "ort_backend.h"

int main(int count, char** arguments) {
  const depthwire::Program program{"depthwire_run",
                                   "Run an artefact's goldens by ONNX Runtime and compare with the stored outputs.",
                                   depthwire::kOrtOptions, depthwire::load_artifact, depthwire::open_ort};
  return depthwire::run_program(program, count, arguments);
}
