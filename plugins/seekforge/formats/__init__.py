"""Formats on disk that one side writes and another reads: checkpoint, bindings, program, manifest.

numpy only, and pydantic in `model_config`: the runtime imports this package and starts without
torch, onnx and pydantic.
"""
