"""Model families: each is one folder."""
