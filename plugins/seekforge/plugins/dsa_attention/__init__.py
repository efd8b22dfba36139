"""`DsaAttention`: absorbed multi-query latent attention over the positions the indexer picked."""
