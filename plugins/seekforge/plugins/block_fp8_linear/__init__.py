"""`BlockFp8Linear`: y = x · Wᵀ with FP8 weights in 128×128 blocks."""
