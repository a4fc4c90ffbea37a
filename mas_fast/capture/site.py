"""What is remembered, from batch to batch, of one place in the model where a parameter is used."""

from dataclasses import dataclass

from mas_fast.capture.layout import Layout

# (function, names of the parameters, which of the equal calls of one forward)
SiteKey = tuple[str, tuple[str, ...], int]


@dataclass
class Site:
    """A call that uses parameters, how it is understood, and where its samples are once that is proved."""

    call: str  # such as "torch.nn.functional.linear"
    ways: tuple[str, ...]  # ways to understand it, "rule" or "select", best guess first
    way: int = 0
    layout: Layout | None = None

    def next_way(self) -> bool:
        """Turn to the next way to understand the call; return False if there is none."""
        self.layout = None
        if self.way + 1 >= len(self.ways):
            return False
        self.way += 1
        return True
