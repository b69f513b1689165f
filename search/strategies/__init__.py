"""Ways to find an allocation, one file each; all of them implement the protocol `search.strategies.base.Strategy`.

May import `search.evaluation`, `search.budgets`, `local_prune` and `supernet`. The run imports it, and the
configuration names its classes.
"""
