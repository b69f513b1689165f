"""The project's own search: predictions say where to go, and races between offspring check how far.

May import `search.strategies.base` and what is shared beside it.
"""
