"""What several methods have in common: ranking, N:M patterns, grids, blocks of inputs, members.

May be imported by methods and by nobody else in `local_prune`.
"""
