"""The local pruners, a file a method: pure functions over tensors with the paper's formula, and a thin class that
`prune=` names.

May import `local_prune.text`, the protocol, statistics and `supernet`; nothing but the configuration names a method.
"""
