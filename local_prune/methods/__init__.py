"""The local pruners, a file a method: pure functions over tensors with the paper's formula, and the class that `prune=`
names. What several methods have in common is in `shared/`.

May import `local_prune.text`, the protocol, statistics and `supernet`. The configuration names methods; hardly anything
else does.
"""
