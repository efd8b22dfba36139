"""`MoeRoute`: group-limited expert selection with a bias that selects and never weighs."""
