"""What the families share: latent attention and experts, the step programs made of them, and running them."""
