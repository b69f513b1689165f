"""What every program needs of the machine: files that appear whole or not at all, checked records, memory, signals.

May import nothing of the project but `supernet.errors`; everybody may import it.
"""
