"""Tools that people watch runs with: each is shown a copy of what the run's directory has (`search.trackers.base`).

May import `supernet`, and no other folder of `search`; the run imports it.
"""
