"""What precisions cost: engines and forms of the PyTorch model beside each other on the same tasks."""
