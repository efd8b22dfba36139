"""The endpoints, each interface in a module: bodies to requests, pieces to answers."""
