"""An engine's folder: its manifest, and what proves that it is undamaged."""
