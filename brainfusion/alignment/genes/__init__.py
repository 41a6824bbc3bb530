"""A modality that comes as genes: vectors, conditioning, the tower that pools them."""
