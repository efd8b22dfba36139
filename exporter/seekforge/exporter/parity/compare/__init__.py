"""How far two sides are apart."""
