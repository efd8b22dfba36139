"""DeepSeek-V3.2 in plain PyTorch, written for reading: the model that is traced, and the reference for parity."""
