"""Operators as ONNX functions: bodies of standard operators for runtimes without plugins."""
