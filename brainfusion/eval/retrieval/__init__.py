"""Cross-modal retrieval: rankings, metrics, comparisons, FAISS galleries."""
