"""What families share whose attention chooses its keys by an indexer (DSA), and may share a choice among layers."""
