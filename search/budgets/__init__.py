"""What an allocation costs and may cost: limits, counted costs, measured latency, and the knapsacks that keep a budget.

May import `search.inputs` and `supernet`; evaluation, strategies and the run import it.
"""
