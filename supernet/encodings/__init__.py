"""What a candidate is, and the compact tensors that it is stored as: kept members, masks with values, N:M patterns,
bits.

May import nothing of the project but `supernet.errors`; the store and the local pruners use it.
"""
