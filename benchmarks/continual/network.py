"""The network of the experiments: a small convolutional trunk, and a head for each task or one output for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 64


class Network(nn.Module):
    """Three convolutions, the last two of stride 2, and a linear layer; then the head asked for."""

    def __init__(self, image: torch.Size, outputs: Sequence[int]) -> None:
        """Create the trunk for images of shape [C, H, W] and a head for each number of outputs."""
        super().__init__()
        channels, height, width = image
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.linear = nn.Linear(32 * -(-height // 4) * -(-width // 4), WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, size) for size in outputs)

    def forward(self, images: Tensor, head: int = 0) -> Tensor:
        """Return what one head says: [N, C, H, W] -> [N, outputs of the head]."""
        return self.heads[head](self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return what the trunk hands to every head: [N, C, H, W] -> [N, 64]."""
        features = F.relu(self.conv1(images))
        features = F.relu(self.conv2(features))
        features = F.relu(self.conv3(features))
        return F.relu(self.linear(features.flatten(1)))


def make_network(image: torch.Size, outputs: Sequence[int], seed: int) -> Network:
    """Return a network whose weights depend on ``seed`` alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(image, outputs)
