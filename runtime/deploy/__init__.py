"""What runs on the device: a bundle's script and the modules that it brings along.

Standard library and numpy only, TensorRT and Polygraphy where they are used. ``depthwire.runtime.bundle`` copies these
modules, and the few others of ``depthwire`` that they import, into the bundle as they are.
"""
