"""DeepSeek-V3.2 checkpoints: which tensors one has, checks of a download, and writing small ones with every trait."""
