"""The error that a script reports as one line."""


class UserError(Exception):
    """Wrong input. The message names the value and what would be accepted, so that no traceback is needed."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
