"""What a GPU build changes in a graph before TensorRT parses it, one file for each change."""
