"""Between the shell and a run: arguments, Hydra, and one line for whatever goes wrong.

May import all of `search`; only `python -m search` imports it.
"""
