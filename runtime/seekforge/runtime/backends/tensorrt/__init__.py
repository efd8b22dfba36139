"""Engines of TensorRT and TensorRT-RTX on a GPU."""
