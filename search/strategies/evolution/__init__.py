"""Evolutionary search as published by others (EvoPress, Týr-the-Pruner), and random search as its baseline.

May import `search.strategies.base` and what is shared beside it.
"""
