"""What other libraries report, put so that it fits into our one-line messages."""


def reason(error: Exception) -> str:
    """The first line of what an exception says, or the name of its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
