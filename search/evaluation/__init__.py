"""How a generation of allocations is measured on the search text: fitness, its gradient, and the machinery that shares
work.

May import `local_prune` and `supernet`; strategies and the run import it.
"""
