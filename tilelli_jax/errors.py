"""The error that bad input from the user causes."""


class InputError(ValueError):
    """Bad input; the message names the file, key or value and what was expected, in one line."""
