"""The network: a small convolutional trunk shared by all tasks, and one head per task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = ("conv1", "conv2", "conv3", "linear", "heads")


class DigitNet(nn.Module):
    """Three convolutions and a linear layer, then the head of the task asked for."""

    def __init__(self, num_tasks: int) -> None:
        """Create the trunk and ``num_tasks`` heads of two classes each."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.linear = nn.Linear(32 * 2 * 2, 64)
        self.heads = nn.ModuleList(nn.Linear(64, 2) for _ in range(num_tasks))

    def forward(self, images: Tensor, task: int) -> Tensor:
        """Return the logits of one task's head: [N, 1, 8, 8] -> [N, 2]."""
        return self.heads[task](self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return what the trunk hands to every head: [N, 1, 8, 8] -> [N, 64]."""
        features = F.relu(self.conv1(images))  # [N, 16, 8, 8]
        features = F.relu(self.conv2(features))  # [N, 32, 4, 4]
        features = F.relu(self.conv3(features))  # [N, 32, 2, 2]
        return F.relu(self.linear(features.flatten(1)))  # [N, 64]


def make_network(num_tasks: int, seed: int) -> DigitNet:
    """Return a network whose weights depend on ``seed`` alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitNet(num_tasks)
