"""Knows what can be pruned in a model, and keeps the candidates on disk. It knows nothing of methods or of search."""
