"""Triton kernels of all operators: compiled ahead of time, described as data, launched by anything."""
