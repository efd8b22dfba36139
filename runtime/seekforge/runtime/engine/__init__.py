"""An open engine and the loop that steps it: requests, scheduler, paged cache."""
