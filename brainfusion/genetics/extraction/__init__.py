"""Making embeddings: from a reference, phased variants and regions to a store of vectors.

`brainfusion extract` calls this. The models are packages of their own, heavy and often compiled:
nothing here imports them before they are needed.
"""
