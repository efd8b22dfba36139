"""Engines for TensorRT and TensorRT-RTX."""
