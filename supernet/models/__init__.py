"""What a model is made of: families as data, sub-blocks, their layers, what can be pruned, and pruned models.

May import encodings, store and space of `supernet`; imported by everybody above.
"""
