"""The exact contrastive loss: tiles, ids of pairs, and how ranks share it."""
