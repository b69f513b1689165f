"""The compact tensors that candidates are stored as: kept members, masks with values, N:M patterns, bits.

May import nothing of the project but `supernet.candidates` and `supernet.errors`; the store uses it.
"""
