"""Takes calibration text through the model block by block: its residual streams, its gradients, and the device's part.

May import `supernet`; the walk and the methods use it.
"""
