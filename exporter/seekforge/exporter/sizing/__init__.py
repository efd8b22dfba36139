"""What a model, its caches and its steps take in memory."""
