"""`SumRanks`: the one collective, the sum of a tensor over all ranks that share the model."""
