"""The command ``python -m mas_fast report``: one page to look at, made from the result files of experiments."""

from mas_fast.report.command import add_arguments, main

__all__ = ["add_arguments", "main"]
