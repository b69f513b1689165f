"""The pruned model in formats that other tools load: a file a format, its check in a fresh process, and the model card.

May import `search.inputs`, `search.report` and `supernet`; the run imports it.
"""
