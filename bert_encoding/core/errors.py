"""The error for a user's mistake."""


class InputError(ValueError):
    """Bad input: one line that names the file, story or value, and says what to do. Programs exit with 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for use inside another one-line message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def in_one_line(error: BaseException) -> str:
    """Return a user's mistake as it is, and any other error in one line with its type."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"


def first_names(names: list[str], most: int = 8) -> str:
    """Return a list of names for a message, shortened where it is long."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
