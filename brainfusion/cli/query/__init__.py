"""Queries: who asks, what is searched, what comes back."""
