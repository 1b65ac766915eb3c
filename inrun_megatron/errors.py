"""The one exception type that a command line prints as a single line."""


class UserError(ValueError):
    """Bad input: the message names the value and the remedy; commands print it and exit with code 1."""
