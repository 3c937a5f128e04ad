"""The one error a user can cause: a sentence that names the value, the limit and the remedy."""


class InputError(ValueError):
    """Something given to the library cannot be used as it is; the command line exits with 2."""
