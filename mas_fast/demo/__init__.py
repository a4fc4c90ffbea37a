"""The demo: five tasks of digits learned in sequence, with and without MAS, and what the importance pass costs."""

from mas_fast.demo.command import add_arguments, main

__all__ = ["add_arguments", "main"]
