"""The one exception for a user's mistake: the command line prints its message as a single line and exits with 1."""


class InputError(Exception):
    """A mistake in what the user gave: the message says what is wrong, where, and what would be right."""
