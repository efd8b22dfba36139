"""`DsaIndexer`: score every cached key for every query and pick the `index_topk` best (lightning indexer)."""
