"""Copies of a run's history for tools that people watch runs with.

May import `supernet`; the run imports it.
"""
