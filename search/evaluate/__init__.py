"""What the stage `evaluate` measures: the dense, the uniform and the searched model on held-out text.

May import `search.evaluation`; the run imports it.
"""
