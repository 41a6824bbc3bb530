"""Pages, figures, sentences and tables made from results."""
