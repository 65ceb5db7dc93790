"""GPU kernels of the depth-attention operators: one Triton source for every NVIDIA GPU, compiled without one.

``spec`` says which function a kernel computes and how it is launched; ``kernels`` holds the sources; ``launch`` runs
one on torch tensors, on a GPU or in Triton's interpreter; ``compile`` makes cubins and ``bundle`` writes those of a
whole artefact. triton itself is imported only inside functions.
"""
