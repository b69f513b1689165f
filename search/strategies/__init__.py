"""Ways to find an allocation, one file each. All meet `search.strategies.base.Strategy`.

May import `search.evaluation`, `search.budgets`, `local_prune` and `supernet`. The run imports it, and the
configuration names its classes.
"""
