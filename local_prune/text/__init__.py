"""Calibration text through the dense model, block by block: streams of activations, gradients, and the device they are
lent to.

May import `supernet`; the walk and the methods use it.
"""
