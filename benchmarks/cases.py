"""The whole-model workloads, as a table: a model, its data and the objective, all from fixed seeds.

Letters: N samples, T positions, C channels, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kinks import decided_samples


@dataclass(frozen=True)
class Workload:
    """What a method is given: a model in eval mode, a list of batches, and the objective's name.

    Attributes:
        decided: Whether every sample's gradient is the same in float32 and float64 up to rounding (kinks.py).
    """

    model: nn.Module
    batches: list[Tensor]
    objective: str = "l2_squared"
    decided: bool = True

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
        ratio_bar: The most that the pass may cost, in ordinary batched backwards; None without a bar.
        num_batches: Batches of one pass.
        decided: Leave out samples with a ReLU that float32 decides. Very deep and wide nets leave none.
        joined_mib: What the pass may take besides: gradients of single samples, where a parameter's are summed over
            several uses; or small batches that are joined.
    """

    build_model: Callable[[], nn.Module]
    draw_batch: Callable[[int, torch.Generator], Tensor]
    batch_size: int
    ratio_bar: float | None = None
    num_batches: int = 32
    decided: bool = True
    joined_mib: float = 0.0

    def build(
        self, num_batches: int, dtype: torch.dtype = torch.float32, batches: list[Tensor] | None = None
    ) -> Workload:
        """Build the workload; the same arguments give the same model and the same data.

        Args:
            num_batches: How many to draw; unused if `batches` are given.
            dtype: Of the model and of its floating-point data.
            batches: Those that a call like this has drawn before: to find decided samples takes seconds.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build_model()
        generator = torch.Generator().manual_seed(1)
        settle_batch_norm(model, self.draw_batch(self.batch_size, generator))
        model = model.to(dtype).eval()
        if batches is None:
            batches = [self._draw(model, generator, dtype) for _ in range(num_batches)]
        return Workload(model, batches, decided=self.decided)

    def _draw(self, model: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        samples: list[Tensor] = []
        while len(samples) < self.batch_size:
            drawn = self.draw_batch(self.batch_size, generator)
            drawn = drawn.to(dtype) if drawn.is_floating_point() else drawn
            samples += decided_samples(model, drawn) if self.decided else drawn
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


def build_resnet18() -> nn.Module:
    """Return ResNet-18 with a 3×3 first convolution, as for small images: widths 64 to 512, two blocks at each."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
    ]
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
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


class VisionTransformer(nn.Module):
    """A ViT for 32×32 images in patches of 4×4, with a class token and learned positions."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        """Make the patches' projection, the blocks and the head."""
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads, causal=False) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 3, 32, 32] to [N, 10]."""
        patches = self.patches(x).flatten(2).transpose(1, 2)  # [N, 64, D]
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


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


def draw_images(num_samples: int, generator: torch.Generator, size: int = 32) -> Tensor:
    """Draw images [N, 3, size, size]."""
    return torch.randn(num_samples, 3, size, size, generator=generator)


def draw_ids(num_samples: int, generator: torch.Generator, positions: int, vocabulary: int) -> Tensor:
    """Draw token ids [N, T]."""
    return torch.randint(vocabulary, (num_samples, positions), generator=generator)


def draw_series(num_samples: int, generator: torch.Generator, positions: int) -> Tensor:
    """Draw series of 64 channels, [N, T, 64]."""
    return torch.randn(num_samples, positions, 64, generator=generator)


CASES: dict[str, Case] = {
    "mlp": Case(
        build_mlp,
        lambda n, g: torch.randn(n, 784, generator=g),
        batch_size=256,
        ratio_bar=1.3,
        num_batches=64,
        joined_mib=6.0,
    ),
    "conv_net": Case(build_conv_net, draw_images, batch_size=32, ratio_bar=1.3),
    "resnet20": Case(build_resnet, draw_images, batch_size=32, ratio_bar=1.5),
    "resnet18_32": Case(build_resnet18, draw_images, batch_size=16, ratio_bar=1.5, num_batches=16, decided=False),
    "resnet18_64": Case(
        build_resnet18, partial(draw_images, size=64), batch_size=8, ratio_bar=1.5, num_batches=8, decided=False
    ),
    "vit": Case(lambda: VisionTransformer(192, layers=12, heads=3), draw_images, batch_size=16, num_batches=16),
    "transformer": Case(
        lambda: LanguageModel(vocabulary=256, context=64, width=384, layers=4, heads=6),
        partial(draw_ids, positions=64, vocabulary=256),
        batch_size=16,
        ratio_bar=1.15,
        num_batches=16,
    ),
    "tied_transformer": Case(
        lambda: LanguageModel(vocabulary=2000, context=64, width=384, layers=4, heads=6, tied=True),
        partial(draw_ids, positions=64, vocabulary=2000),
        batch_size=16,
        ratio_bar=1.35,
        num_batches=16,
        joined_mib=8.0,
    ),
    "lstm": Case(
        lambda: LastState(64, 128, layers=2), partial(draw_series, positions=64), batch_size=32, ratio_bar=3.0
    ),
}


@dataclass(frozen=True)
class Curve:
    """How cost grows along one axis.

    Attributes:
        title: What grows, in words.
        axis: What is varied: N, T or parameters.
        values: Where it is measured.
        case: value -> the workload.
    """

    title: str
    axis: str
    values: tuple[int, ...]
    case: Callable[[int], Case]


def square_mlp(parameters: int) -> nn.Module:
    """Return an MLP of three square layers with some `parameters` weights."""
    width = round((parameters / 3) ** 0.5)
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width, bias=False), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


def draw_rows_for(parameters: int) -> Callable[[int, torch.Generator], Tensor]:
    """Return what draws rows as wide as the layers of `square_mlp`."""
    return lambda n, g: torch.randn(n, round((parameters / 3) ** 0.5), generator=g)


def small_language_model(positions: int) -> nn.Module:
    """Return a language model of two blocks, for a context of `positions`."""
    return LanguageModel(vocabulary=256, context=positions, width=192, layers=2, heads=3)


SAMPLES = (1, 4, 16, 64, 256, 1024)
POSITIONS = (1, 8, 64, 256, 512, 1024, 2048)
# Passes of four batches: what is paid once is the same part of each.
CURVES: dict[str, Curve] = {
    "mlp-N": Curve("MLP 784-400-400-10", "N", SAMPLES, lambda n: replace(CASES["mlp"], batch_size=n, num_batches=4)),
    "conv_net-N": Curve(
        "conv net, 32×32", "N", SAMPLES, lambda n: replace(CASES["conv_net"], batch_size=n, num_batches=4)
    ),
    "language_model-N": Curve(
        "language model d = 192, T = 64",
        "N",
        SAMPLES,
        lambda n: Case(partial(small_language_model, 64), partial(draw_ids, positions=64, vocabulary=256), n, None, 4),
    ),
    "language_model-T": Curve(
        "language model d = 192, N = 4",
        "T",
        POSITIONS,
        lambda t: Case(partial(small_language_model, t), partial(draw_ids, positions=t, vocabulary=256), 4, None, 4),
    ),
    "lstm-T": Curve(
        "LSTM 64→128→128, N = 4",
        "T",
        POSITIONS,
        lambda t: Case(partial(LastState, 64, 128, 2), partial(draw_series, positions=t), 4, None, 4),
    ),
    "mlp-parameters": Curve(
        "MLP of three square layers, N = 32",
        "parameters",
        (10**4, 10**5, 10**6, 10**7, 10**8),
        lambda p: Case(partial(square_mlp, p), draw_rows_for(p), 32, None, 4),
    ),
}


def find_case(name: str) -> Case:
    """Return the case of a name: one of `CASES`, or `curve=value` for a point of one of `CURVES`.

    Raises:
        ValueError: There is none.
    """
    curve, _, value = name.partition("=")
    if name in CASES:
        return CASES[name]
    if curve in CURVES and value.isdecimal():
        return CURVES[curve].case(int(value))
    raise ValueError(f"case must be one of {', '.join(CASES)} or CURVE=VALUE with {', '.join(CURVES)}, got {name!r}")
