"""Where the samples are in the output of a call: proved, never guessed.

Nothing in a tensor says which of its axes is the sample axis: (T, N, C) attention, windows folded into the batch and
T equal to N all occur. The proof used here needs no knowledge of the model. The gradient δ of Σ_n objective_n is
computed twice, once with every sample weighted by its own power of two, w_n. If entry s of some axis belongs to
sample n(s) and to no other, then the weighted δ is w_n(s) times the plain one at every s, exactly, because scaling by a
power of two commutes with rounding. If samples meet anywhere, it is not. Both are compared through random projections,
so few numbers per entry of the axis are kept from the first backward to the second.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The samples are on `axis`; where it holds m positions of each, the sample index is the "outer" or the "inner".

    With order "rows" the entries of the axis belong to samples in any way: `rows` [N, m] holds their places, and -1
    where a sample has fewer than m.
    """

    axis: int
    order: str = "outer"
    rows: Tensor | None = None

    def single(self, shape: torch.Size, samples: int) -> bool:
        """Return whether every sample has one entry, so that `split` leaves no axis of positions."""
        return self.rows is None and shape[self.axis] == samples

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """Move the samples to a first axis of their own: [..., N·m, ...] -> [N, ..., m, ...]; m = 1 leaves no axis."""
        if self.rows is not None:
            places = self.rows.flatten()
            picked = tensor.movedim(self.axis, 0)[places.clamp(min=0)]
            picked[places < 0] = 0
            return picked.unflatten(0, self.rows.shape).movedim(1, self.axis + 1)
        folded = tensor.shape[self.axis] // samples
        if folded == 1:
            return tensor.movedim(self.axis, 0) if self.axis else tensor
        if self.order == "outer":
            return tensor.unflatten(self.axis, (samples, folded)).movedim(self.axis, 0)
        return tensor.unflatten(self.axis, (folded, samples)).movedim(self.axis + 1, 0)

    def alone(self, tensor: Tensor, sample: int, samples: int) -> Tensor:
        """Return the tensor with zeros where the other samples are."""
        places = self.rows
        if places is None:
            every = torch.arange(tensor.shape[self.axis], device=tensor.device)
            places = every.view(samples, -1) if self.order == "outer" else every.view(-1, samples).T
        own = places[sample][places[sample] >= 0]
        return torch.zeros_like(tensor).index_copy_(self.axis, own, tensor.index_select(self.axis, own))


def split_samples(tensor: Tensor, layout: Layout | None, samples: int) -> Tensor:
    """Give tensor a first axis of N samples; without a layout the whole tensor is the one sample."""
    return tensor.unsqueeze(0) if layout is None else layout.split(tensor, samples)


def sample_weights(samples: int, like: Tensor, half: bool = False) -> Tensor:
    """Return [N] powers of two that differ between samples as far as dtypes allow.

    Args:
        samples: N.
        like: Of the dtype and device that they shall have.
        half: Some of the backward is in float16, whatever the dtype of `like`.
    """
    # float16 leaves room for few powers; elsewhere 81 of them keep every plain product far from overflow.
    return _powers(samples, 4 if half or like.dtype == torch.float16 else 40).to(like)


@lru_cache(maxsize=16)
def _powers(samples: int, span: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    rounds = math.ceil(samples / (2 * span + 1))
    # Each of the powers once, in an order of its own, and again.
    exponents = torch.rand(rounds, 2 * span + 1, generator=generator).argsort(1).flatten() - span
    return torch.exp2(exponents[:samples].double())


# A leak may happen to vanish in a projection. In bfloat16, whose rounding hides a fortieth of δ, one of twenty does; in
# all of these, none in a hundred thousand.
_PROJECTIONS = 4
# Up to this tolerance, entries that all belong to the same sample are told: float32 has 6e-6, bfloat16 2e-2.
_ONE_OWNER = 1e-5
# The most numbers of a probe that are drawn, and kept.
_KEPT = 4096


class Fingerprint(NamedTuple):
    """Random projections of δ on each axis that may hold the samples, and the magnitude of what was summed."""

    sums: dict[int, Tensor]  # axis -> [size, _PROJECTIONS]
    scales: dict[int, Tensor]  # axis -> [size], unless left out

    @classmethod
    def of(cls, delta: Tensor, axes: Iterable[int], scaled: bool = True) -> "Fingerprint":
        """Project δ on each of the candidate axes."""
        axes = [axis for axis in axes if delta.shape[axis]]
        if not axes:
            return cls({}, {})
        wide = delta.float() if delta.dtype in (torch.bfloat16, torch.float16) else delta
        # What lies behind the last candidate is projected once for all of them, so that δ is read once.
        leading, behind = delta.shape[: max(axes) + 1], delta.shape[max(axes) + 1 :]
        if math.prod(behind) == 1:
            entries = wide.reshape(leading)
            sums = {axis: (rows := _rows(entries, axis)) @ _probes(rows.shape[1], 0, rows) for axis in axes}
        else:
            rows = wide.reshape(math.prod(leading), math.prod(behind))
            projected = (rows @ _probes(rows.shape[1], 0, rows)).view(*leading, _PROJECTIONS)
            sums = {axis: _project_again(projected, axis) for axis in axes}
            entries = torch.linalg.vector_norm(rows, dim=1).view(leading) if scaled else rows
        # A projection has the size of the Euclidean norm: by a larger measure, what leaks from another sample would
        # seem small in wide rows.
        scales = {axis: 1.5 * torch.linalg.vector_norm(_rows(entries, axis), dim=1) for axis in axes} if scaled else {}
        return cls(sums, scales)

    def vanishes(self, delta: Tensor) -> bool:
        """Return whether δ, of which this is, is zero throughout, so that any layout adds nothing."""
        # δ itself is asked where no magnitude is left: squares of small numbers are zero.
        measured = any(bool(scale.any()) for scale in self.scales.values())
        return not delta.numel() or (bool(self.sums) and not measured and not bool(delta.any()))


def _rows(tensor: Tensor, axis: int) -> Tensor:
    size = tensor.shape[axis]
    return tensor.movedim(axis, 0).reshape(size, tensor.numel() // size)


def _project_again(projected: Tensor, axis: int) -> Tensor:
    """Project what was projected, [*leading, _PROJECTIONS], on one of its axes, each by numbers of its own."""
    rows = _rows(projected, axis).unflatten(1, (-1, _PROJECTIONS))
    return rows.squeeze(1) if rows.shape[1] == 1 else (rows * _probes(rows.shape[1], 1, rows)).sum(1)


def _probes(width: int, draw: int, like: Tensor) -> Tensor:
    """Return random numbers away from 0, [width, _PROJECTIONS]: contributions of several samples must not cancel.

    Args:
        width: How many each projection takes.
        draw: Where numbers of two draws are multiplied, theirs must differ.
        like: Of the dtype and device that they shall have.
    """
    if width <= _KEPT:
        return _kept_probes(width, draw).to(like)
    # To draw millions takes longer than all else here. Products of two that were drawn cancel as little.
    outer, inner = _probes(-(-width // _KEPT), draw + 2, like), _probes(_KEPT, draw, like)
    return (outer[:, None] * inner).flatten(0, 1)[:width]


@lru_cache(maxsize=64)
def _kept_probes(width: int, draw: int) -> Tensor:
    """Draw from ±[0.5, 1.5)."""
    generator = torch.Generator().manual_seed(8 * width + draw)
    probes = torch.rand(width, _PROJECTIONS, generator=generator, dtype=torch.float64) * 2 - 1
    return probes + probes.sign() / 2


def prove(plain: Fingerprint, weighted: Fingerprint, weights: Tensor, eps: float) -> list[Layout]:
    """Return the layouts that both fingerprints agree on.

    Any of them groups the entries of this δ rightly. If there are several, as where most of δ is zero, only one of them
    may hold for another batch.

    Args:
        plain: Of δ of Σ_n objective_n.
        weighted: Of δ of Σ_n w_n objective_n, on the same graph.
        weights: w [N].
        eps: Machine epsilon of the dtype in which δ was computed.
    """
    samples = len(weights)
    proved = []
    # Rounding is the same in both runs except near underflow; a leak between samples below this is below rounding too.
    tolerance = eps**0.75
    for axis, sums in plain.sums.items():
        folded, rest = divmod(len(sums), samples)
        if rest:
            continue
        expected = {"outer": weights}
        if folded > 1:
            expected = {"outer": weights.repeat_interleave(folded), "inner": weights.repeat(folded)}
        scales = plain.scales[axis]
        for order, w in expected.items():
            w = w.to(sums)
            differences = torch.addcmul(weighted.sums[axis], w[:, None], sums, value=-1)
            told = scaled = _within(differences, tolerance * w * scales)
            if not bool(told.all()):
                told = scaled | _fades(w, scales, weighted.sums[axis], tolerance)
            # One weight alone is no evidence: two samples with different ones must have been told apart.
            if bool(told.all()) and w[(scales > 0) & scaled].unique().numel() > 1:
                proved.append(Layout(axis, order))
    if proved:
        return proved
    return [layout for axis in plain.sums for layout in _owned_rows(axis, plain, weighted, weights, tolerance)]


def _within(differences: Tensor, bound: Tensor) -> Tensor:
    """Return where all projections differ by no more than their bound; what overflows tells nothing, for inf <= inf."""
    largest = differences.abs().amax(-1)
    return (largest <= bound) & largest.isfinite()


def _fades(w: Tensor, scales: Tensor, weighted: Tensor, tolerance: float) -> Tensor:
    """Return which entries are too small for the proof, and too small to matter for Ω beside the largest.

    Weighted, they are so near underflow that they are not scaled exactly. Where the others show how samples lie on the
    axis, these lie there likewise: samples of which a classifier is sure have log-likelihoods without a gradient.
    """
    near_underflow = torch.finfo(scales.dtype).tiny * 2.0**40
    return (
        (w * scales <= near_underflow)
        & (weighted.abs().amax(1) <= near_underflow)
        & (scales <= tolerance * scales.max())
    )


def _owned_rows(
    axis: int, plain: Fingerprint, weighted: Fingerprint, weights: Tensor, tolerance: float
) -> list[Layout]:
    """Return the layout in which every entry of an axis belongs to the sample by whose weight it was scaled.

    So tokens that are routed to experts, sequences packed by length, and samples spread over several tensors are found.
    It needs a weight of its own for each sample.
    """
    sums, scales = plain.sums[axis], plain.scales[axis]
    places = (scales > 0).nonzero().squeeze(1)  # of zeros nothing is added, whosever they are
    if len(weights.unique()) < len(weights) or not len(places):
        return []
    w, sums, scales = weights.to(sums), sums[places, None], scales[places, None]
    differences = weighted.sums[axis][places, None] - w[:, None] * sums  # [places, N, _PROJECTIONS]
    near = _within(differences, tolerance * w * scales)
    owner = near.int().argmax(1)
    if not bool((near.sum(1) == 1).all()):
        return []
    # All of one sample is evidence enough where next to nothing can hide in rounding.
    if len(owner.unique()) < 2 and tolerance > _ONE_OWNER:
        return []
    counts = owner.bincount(minlength=len(weights))
    order = owner.argsort(stable=True)
    column = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    rows = torch.full((len(weights), int(counts.max())), -1, device=owner.device)
    rows[owner[order], column] = places[order]
    return [Layout(axis, "rows", rows)]
