"""Our own search: predictions from a gradient say where to go, and races of offspring check how far.

May import `search.strategies.base` and what is shared beside it.
"""
