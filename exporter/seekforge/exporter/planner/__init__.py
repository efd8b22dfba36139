"""Which GPUs, and how many, a model needs: from its config.json and the target files alone."""
