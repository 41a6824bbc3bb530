"""Runs that end in the middle."""


class PowerCutError(BaseException):
    """Ends a run in the middle; nothing catches it."""
