"""The one error a user can cause."""


class InputError(ValueError):
    """Bad input: one line that names the file, story or value, and says what to do. Programs exit with 2."""
