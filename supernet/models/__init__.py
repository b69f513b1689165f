"""What a model is made of: families as data, sub-blocks, what of them can be pruned, and an allocation put into a
model.

May import encodings, store and space of `supernet`; imported by everybody above.
"""
