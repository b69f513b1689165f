"""One run: its stages in order (`stages/`), what they share, its folder on disk, and its dry run.

May import all of `search` but `search.cli`, which imports it.
"""
