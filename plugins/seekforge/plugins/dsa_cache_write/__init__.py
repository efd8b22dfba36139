"""`DsaCacheWrite`: this step's latents and indexer keys go into the paged caches, in place."""
