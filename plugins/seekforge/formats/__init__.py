"""Formats on disk that one side writes and another reads: checkpoint, bindings, program, manifest.

numpy only: the runtime imports this package and starts without torch and onnx.
"""
