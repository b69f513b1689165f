"""Evolution by selection as published (EvoPress, Týr-the-Pruner), and random search as its baseline.

May import `search.strategies.base` and what is shared beside it.
"""
