"""Errors that users of mas_fast may want to catch."""


class CaptureError(RuntimeError):
    """Exactness that cannot be had: every parameter concerned is listed, with the reason and the way out."""


class LoopWarning(UserWarning):
    """Some parameters take one backward per sample: exact, and slow."""
