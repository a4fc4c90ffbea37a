"""Models of the shapes that people run on GPUs, with random weights: GPT-2 small, ViT-B/16, ResNet-50 and Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.cases import LanguageModel, TransformerBlock
from mas_fast import objectives


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, blocks, and a head on the class token."""

    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads, causal=False) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map [N, 3, H, W] to [N, classes]."""
        patches = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


def build_resnet(width: int, blocks: tuple[int, ...], classes: int) -> nn.Module:
    """Make a ResNet of bottlenecks; its batch norms are used as they are in evaluation."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = width
    for stage, count in enumerate(blocks):
        inner = width << stage
        for block in range(count):
            layers.append(Bottleneck(inputs, inner, 4 * inner, 2 if stage > 0 and block == 0 else 1))
            inputs = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, and a gated MLP."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, groups * self.size, bias=False)
        self.value = nn.Linear(width, groups * self.size, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, D] to [N, T, D]."""
        n, t, _ = x.shape
        normed = self.norm1(x)
        query = turned(self.query(normed).view(n, t, self.heads, self.size).transpose(1, 2))
        key = turned(self.key(normed).view(n, t, self.groups, self.size).transpose(1, 2))
        value = self.value(normed).view(n, t, self.groups, self.size).transpose(1, 2)
        key, value = (s.repeat_interleave(self.heads // self.groups, 1) for s in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(n, t, -1))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def turned(x: Tensor) -> Tensor:
    """Return queries or keys [N, heads, T, size] with rotary positions."""
    half = x.shape[-1] // 2
    frequencies = 500_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Llama(nn.Module):
    """A Llama-shaped language model, whose output is ‖logits‖² of every position: the logits are never formed."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[LlamaBlock(width, heads, groups, hidden) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids [N, T] to [N, T, 1]."""
        return objectives.linear_output_norm(self.norm(self.blocks(self.tokens(ids))), self.head.weight)


@dataclass(frozen=True)
class Shape:
    """A model, a batch for it, and its objective; all smaller for a rehearsal.

    Attributes:
        build: Small or not -> the model.
        batch: Small or not -> a batch on the CPU.
        objective: For `estimate_importance`.
    """

    build: Callable[[bool], nn.Module]
    batch: Callable[[bool], Tensor]
    objective: str | Callable[[Tensor], Tensor] = "l2_squared"


def draw_ids(vocabulary: int, samples: int, positions: int) -> Tensor:
    """Draw token ids [N, T]."""
    return torch.randint(0, vocabulary, (samples, positions), generator=torch.Generator().manual_seed(0))


def draw_images(samples: int, size: int) -> Tensor:
    """Draw images [N, 3, size, size]."""
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(0))


SHAPES = {
    "GPT-2 small": Shape(
        lambda small: (
            LanguageModel(31, 8, 16, 1, 2, tied=True) if small else LanguageModel(50257, 512, 768, 12, 12, tied=True)
        ),
        lambda small: draw_ids(31, 2, 8) if small else draw_ids(50257, 8, 512),
    ),
    "ViT-B/16": Shape(
        lambda small: VisionTransformer(16, 8, 16, 1, 2, 5) if small else VisionTransformer(224, 16, 768, 12, 12, 1000),
        lambda small: draw_images(2, 16) if small else draw_images(32, 224),
    ),
    "ResNet-50": Shape(
        lambda small: build_resnet(4, (1, 1), 5) if small else build_resnet(64, (3, 4, 6, 3), 1000),
        lambda small: draw_images(2, 32) if small else draw_images(32, 224),
    ),
    "Llama 1B": Shape(
        lambda small: Llama(31, 16, 1, 4, 2, 24) if small else Llama(128_256, 2048, 16, 32, 8, 8192),
        lambda small: draw_ids(31, 2, 8) if small else draw_ids(128_256, 4, 1024),
        objectives.summed,
    ),
}
# Layers of Llama shapes of width 4096, of which the largest that fits is measured: 21, 14 and 8 billion parameters.
LARGE_LAYERS = (92, 60, 32)


def build_large(layers: int, small: bool, device: torch.device) -> nn.Module:
    """Make a Llama shape in bfloat16, right on the device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Llama(31, 16, 1, 4, 2, 24) if small else Llama(128_256, 4096, layers, 32, 8, 14336)
    finally:
        torch.set_default_dtype(default)
