"""Formats on disk that one side writes and another reads: checkpoint, bindings, program, manifest.

numpy and pydantic only: the runtime imports this package and must start without torch or onnx.
"""
