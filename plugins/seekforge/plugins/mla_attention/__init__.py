"""`MlaAttention`: absorbed multi-query latent attention over every position up to a token's own."""
