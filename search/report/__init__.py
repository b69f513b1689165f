"""What a run tells its user: the table at its end, warnings, and what it writes of its allocation.

May import `search.budgets`; the run and the exports import it.
"""
