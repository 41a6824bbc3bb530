"""The brain encoder in the graph of an alignment."""
