"""Probes: nested cross-validated linear and k-nearest-neighbour models of targets."""
