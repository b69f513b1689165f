"""Loads what a run begins with: the dense model and its text.

May import `supernet` and the helpers beside it (`errors`, `paths`); all that follows in `search` may import it.
"""
