"""What can be pruned, and the candidates on disk. Knows nothing of pruning methods or of search."""
