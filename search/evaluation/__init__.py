"""How a generation of allocations is measured on the search text: the fitness, its gradient, and how work is shared.

May import `local_prune` and `supernet`; strategies and the run import it.
"""
