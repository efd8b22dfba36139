"""Engines for ONNX Runtime on a CPU."""
