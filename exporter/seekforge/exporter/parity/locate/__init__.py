"""Where two sides part: the first layer, the first operation."""
