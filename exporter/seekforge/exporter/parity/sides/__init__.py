"""What is compared: PyTorch, transformers, an engine."""
