"""Numbers of few bits in blocks that share a scale."""
