"""The kernels themselves: the one place whose modules import triton at their top, as its compiler reads their source.

Nothing imports this package but functions that are about to compile or run a kernel.
"""
