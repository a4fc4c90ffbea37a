"""The whole-model workloads, as a table: a model, its data and the objective, all from fixed seeds.

Letters: N samples, T positions, C channels, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kinks import decided_samples


@dataclass(frozen=True)
class Workload:
    """What a method is given: a model in eval mode, a list of batches, and the objective's name."""

    model: nn.Module
    batches: list[Tensor]
    objective: str = "l2_squared"

    @property
    def batch_size(self) -> int:
        """Samples in one batch; every batch has the same number."""
        return self.batches[0].shape[0]

    def head(self, num_samples: int) -> Workload:
        """Return the same workload cut to the first `num_samples` samples of the first batch."""
        return replace(self, batches=[self.batches[0][:num_samples]])


@dataclass(frozen=True)
class Case:
    """One row of the table of workloads.

    Attributes:
        build_model: Makes the model; called with the global generator seeded.
        draw_batch: Draws one batch [N, …] of the given size from a generator.
        batch_size: N of one batch.
        ratio_bar: The most that the pass may cost, in ordinary batched backwards.
        joined_mib: What gradients of single samples may take, where a parameter's are summed over several uses.
    """

    build_model: Callable[[], nn.Module]
    draw_batch: Callable[[int, torch.Generator], Tensor]
    batch_size: int
    ratio_bar: float
    joined_mib: float = 0.0

    def build(self, num_batches: int, dtype: torch.dtype = torch.float32) -> Workload:
        """Build the workload; the same arguments give the same model and the same data."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build_model()
        generator = torch.Generator().manual_seed(1)
        settle_batch_norm(model, self.draw_batch(self.batch_size, generator))
        model = model.to(dtype).eval()
        return Workload(model, [self._decided_batch(model, generator, dtype) for _ in range(num_batches)])

    def _decided_batch(self, model: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        samples: list[Tensor] = []
        while len(samples) < self.batch_size:
            drawn = self.draw_batch(self.batch_size, generator)
            samples += decided_samples(model, drawn.to(dtype) if drawn.is_floating_point() else drawn)
        return torch.stack(samples[: self.batch_size])


def settle_batch_norm(model: nn.Module, batch: Tensor) -> None:
    """Set the running statistics of every batch norm to those of `batch`.

    Freshly made ones (mean 0, variance 1) let activations grow from block to block, which no trained network does.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(batch)


def build_mlp() -> nn.Module:
    """Return the MLP 784-400-400-10 of the permuted-digits experiments."""
    return nn.Sequential(
        nn.Linear(784, 400), nn.ReLU(inplace=True), nn.Linear(400, 400), nn.ReLU(inplace=True), nn.Linear(400, 10)
    )


def build_conv_net() -> nn.Module:
    """Return the plain conv net 3→64→64→128→128, all 3×3, halved after the second and the fourth convolution."""
    layers: list[nn.Module] = []
    for depth, (channels_in, channels_out) in enumerate(pairwise([3, 64, 64, 128, 128])):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(inplace=True)]
        if depth % 2 == 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 8 * 8, 10))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut, projected by a 1×1 convolution where shapes change."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        """Make the two convolutions and, where needed, the projection."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C', H/stride, W/stride]."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def build_resnet() -> nn.Module:
    """Return ResNet-20 for 32×32 images: widths 16, 32, 64 and three blocks at each."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
    ]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(3):
            layers.append(ResidualBlock(channels, width, stride=1 if channels == width else 2))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class TransformerBlock(nn.Module):
    """A pre-norm block: self-attention, causal unless told otherwise, and a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        """Make the layers; `heads` must divide `width`."""
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, D] to [N, T, D]."""
        n, t, d = x.shape
        # [N, T, 3D] -> three of [N, heads, T, D / heads]
        query, key, value = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.projection(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """A small transformer LM with learned positions; its head has weights of its own, or those of the embedding."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int, tied: bool = False) -> None:
        """Make the embeddings, the blocks and the head."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids [N, T] to logits [N, T, V]."""
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions)))


class LastState(nn.Module):
    """A recurrent net that classifies by its last hidden state."""

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        """Make the LSTM and the head."""
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, I] to [N, 10]."""
        return self.head(self.lstm(x)[0][:, -1])


def draw_images(num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw images [N, 3, 32, 32]."""
    return torch.randn(num_samples, 3, 32, 32, generator=generator)


CASES: dict[str, Case] = {
    "mlp": Case(build_mlp, lambda n, g: torch.randn(n, 784, generator=g), batch_size=256, ratio_bar=1.3),
    "conv_net": Case(build_conv_net, draw_images, batch_size=32, ratio_bar=1.3),
    "resnet20": Case(build_resnet, draw_images, batch_size=32, ratio_bar=1.5),
    "transformer": Case(
        lambda: LanguageModel(vocabulary=256, context=64, width=384, layers=4, heads=6),
        lambda n, g: torch.randint(256, (n, 64), generator=g),
        batch_size=16,
        ratio_bar=1.15,
    ),
    "tied_transformer": Case(
        lambda: LanguageModel(vocabulary=2000, context=64, width=384, layers=4, heads=6, tied=True),
        lambda n, g: torch.randint(2000, (n, 64), generator=g),
        batch_size=16,
        ratio_bar=1.35,
        joined_mib=8.0,
    ),
    "lstm": Case(
        lambda: LastState(64, 128, layers=2),
        lambda n, g: torch.randn(n, 64, 64, generator=g),
        batch_size=32,
        ratio_bar=3.0,
    ),
}
