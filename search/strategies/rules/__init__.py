"""Allocation rules: no search, one allocation computed from the dense model (and the front of an earlier run).

May import `search.strategies.base` and what is shared beside it.
"""
