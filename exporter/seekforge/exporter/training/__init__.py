"""Training of small models: tasks, losses, the loop (extra `train`)."""
