"""A distributed optimizer service: sharded optimizer state and parameters on Ray."""
