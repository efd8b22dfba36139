"""What launches of kernels cost: bytes, FLOPs and programs of each operator's plan, and a time from a simple model of a GPU."""
