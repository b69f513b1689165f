"""The pruned model in formats that other tools load: a file a format, its check in a fresh process, and the model card.

A new format is a class that keeps to `Exporter` in `base.py`, a file in `conf/export/` that names it, and an entry in
`tests/search/export/test_contract.py`.

May import `search.inputs`, `search.report` and `supernet`; the run imports it.
"""
