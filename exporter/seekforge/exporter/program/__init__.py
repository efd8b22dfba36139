"""From the PyTorch model to the canonical ONNX program: trace, translate, name, check, write."""
