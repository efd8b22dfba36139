"""From a DeepSeek-V3.2 checkpoint to a canonical ONNX program, and from a program to an engine."""
