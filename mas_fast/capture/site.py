"""What is remembered, from batch to batch, of one place in the model where a parameter is used."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from mas_fast.capture.layout import Layout

MOST_LAYOUTS = 256

# (function, names of the parameters, which of the equal calls of one forward)
SiteKey = tuple[str, tuple[str, ...], int]


@dataclass
class Site:
    """A call that uses parameters, how it is understood, and where its samples are as far as that is proved."""

    call: str  # such as "torch.nn.functional.linear"
    ways: tuple[str, ...]  # to understand it (forward.py), best guess first
    way: int = 0
    differentiable: bool = False  # whether what it returns is known to depend on a parameter by a gradient
    layouts: dict[Hashable, Layout] = field(default_factory=dict)  # (trace of the forward, N) -> where its samples were

    def remember(self, forward: Hashable, layout: Layout) -> None:
        """Keep what was proved; programs that never come again must not pile up."""
        if len(self.layouts) >= MOST_LAYOUTS:
            self.layouts.clear()
        self.layouts[forward] = layout

    def next_way(self) -> bool:
        """Turn to the next way to understand the call; return False if there is none."""
        self.layouts.clear()
        if self.way + 1 >= len(self.ways):
            return False
        self.way += 1
        return True
