"""Errors that users of mas_fast may want to catch."""


class CaptureError(RuntimeError):
    """Exactness that cannot be had: every parameter concerned is listed, with the reason and the way out."""
