"""`MlaCacheWrite`: this step's latents go into the paged cache, in place."""
