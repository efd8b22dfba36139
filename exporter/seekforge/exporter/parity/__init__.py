"""Prove that an engine computes what PyTorch computes, and find the first place where it does not."""
