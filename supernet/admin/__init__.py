"""What `python -m supernet ls|verify|size|gc` does with the folders of supernets on disk.

May import the rest of `supernet`; nothing but the command line imports it.
"""
