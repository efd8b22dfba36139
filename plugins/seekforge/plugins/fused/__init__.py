"""Pieces of a layer that are one node each in an engine for the CPU, put together of operators of ONNX and of ours.

At batch 1 each costs less than a microsecond of arithmetic and a dozen nodes, of which ONNX Runtime takes some
microseconds each. They are no operators of a program: a build puts them into its graph, and their bodies, functions of
the file, are what they mean.
"""
