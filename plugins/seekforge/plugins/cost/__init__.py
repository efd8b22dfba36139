"""What launches of kernels cost: bytes, FLOPs and programs of plans, and a time from a simple model of a GPU."""
