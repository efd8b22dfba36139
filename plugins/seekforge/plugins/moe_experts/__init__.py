"""`MoeExperts`: the routed experts' SwiGLU MLPs, combined by weight."""
