"""Where an operator's kernels come from: Triton, or our CUDA C++ over the headers of a library that a user installs.

Either is compiled ahead of time to cubins with the same descriptor, launched by the same launcher and judged by the
same cost model. Nothing of a library is copied here, imported or run: nvcc reads its headers.
"""
