"""An engine of several ranks: a process for each of them, and what passes between them."""
