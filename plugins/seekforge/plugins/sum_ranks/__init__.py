"""`SumRanks`: the one collective, the sum of a tensor over all tensor-parallel ranks."""
