"""Rule for embedding bags, y_b = Σ_{t in bag b} c_t W[id_t]: an embedding whose rows are summed, with constants c."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, rule
from mas_fast.kernels import ops


def _places(delta: Delta, bags: Tensor) -> Tensor:
    """Return where each sample's ids stand among all, [N, T]; -1 where a sample has fewer than T."""
    count = delta.value.shape[0]
    # Bags are numbered from 1, for a layout by rows fills with zeros.
    own = delta.positions(torch.arange(1, count + 1, device=bags.device), features=0)  # [N, m]
    owner = bags.new_full((count,), -1)  # of each bag
    owner[own[own > 0] - 1] = (own > 0).nonzero()[:, 0]
    owners = owner[bags]
    order = owners.argsort(stable=True)[int((owners < 0).sum()) :]
    counts = owners[order].bincount(minlength=len(own))
    column = torch.arange(len(order), device=bags.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = bags.new_full((len(own), int(counts.max())), -1)
    places[owners[order], column] = order
    return places


def _rows(delta: Delta, saved: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return each sample's ids [N, T] and what the gradient of their rows grows by [N, T, D]: zero where is no id."""
    ids, bags, *scale = saved
    places = _places(delta, bags)
    at = places.clamp(min=0)
    grad_output = delta.value.to(torch.promote_types(delta.value.dtype, torch.float32))
    factor = (places >= 0).to(grad_output.dtype)
    if scale:
        factor = factor * scale[0][at]
    return ids[at], grad_output[bags[at]] * factor.unsqueeze(2)


def _accumulate(omega: Mapping[str, Tensor], delta: Delta, saved: tuple[Any, ...], square: bool) -> None:
    ids, grad_output = _rows(delta, saved)
    ops.accumulate_embedding_(omega["weight"], grad_output, ids, square=square)


def _gradients(role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...]) -> Tensor:
    ids, grad_output = _rows(delta, saved)
    rows = ids.long() + torch.arange(len(ids), device=ids.device).unsqueeze(1) * target.shape[0]
    gradients = grad_output.new_zeros(len(ids) * target.shape[0], target.shape[1])
    gradients.index_add_(0, rows.flatten(), grad_output.flatten(0, 1))
    return gradients.unflatten(0, (len(ids), target.shape[0]))


def _scale(
    ids: Tensor, bags: Tensor, count: int, weight: Tensor, mode: str, weights: Tensor | None, padding_idx: int | None
) -> Tensor | None:
    """Return the constant of every id; None if all are 1."""
    if mode == "sum" and weights is None and padding_idx is None:
        return None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    kept = torch.ones(ids.shape, dtype=dtype, device=ids.device)
    if padding_idx is not None:
        kept = (ids != padding_idx % weight.shape[0]).to(dtype)
    if weights is not None:
        return kept * weights.detach().reshape(-1).to(dtype)
    if mode == "sum":
        return kept
    sizes = kept.new_zeros(count).index_add_(0, bags, kept)
    return kept / sizes.clamp(min=1)[bags]


@rule(F.embedding_bag)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Binding | None:
    """F.embedding_bag, modes sum and mean. `scale_grad_by_freq` and `sparse` are as for F.embedding."""
    if mode not in ("sum", "mean") or max_norm is not None or input.is_floating_point():
        return None
    ids = input.reshape(-1)
    places = torch.arange(len(ids), device=ids.device)
    if input.dim() == 2:
        count = len(input)
        bags = places // max(1, input.shape[1])
    elif offsets is None or (include_last_offset and int(offsets[-1]) != len(ids)):
        # Of ids after the last offset, torch itself says now that they count and now that they do not.
        return None
    else:
        count = len(offsets) - include_last_offset
        bags = torch.searchsorted(offsets[:count].to(places.dtype), places, right=True) - 1
    scale = _scale(ids, bags, count, weight, mode, per_sample_weights, padding_idx)
    return Binding(
        rule="embedding_bag",
        roles={"weight": weight},
        saved=(ids, bags) if scale is None else (ids, bags, scale),
        accumulate=_accumulate,
        gradients=_gradients,
        axes=lambda *_: range(1),
    )
