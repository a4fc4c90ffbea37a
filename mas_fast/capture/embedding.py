"""Rule for embeddings whose ids differ between samples; ids that all samples share are a selection (select.py)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, rule
from mas_fast.kernels import ops


def _accumulate(
    omega: Mapping[str, Tensor], delta: Delta, saved: tuple[Any, ...], square: bool, padding_idx: int
) -> None:
    ids = delta.positions(saved[0], features=0)  # [N, T]
    ops.accumulate_embedding_(omega["weight"], delta.positions(delta.value), ids, padding_idx, square)


def _gradients(role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...], padding_idx: int) -> Tensor:
    ids, grad_output = delta.positions(saved[0], features=0), delta.positions(delta.value)
    if padding_idx >= 0:
        grad_output = grad_output.masked_fill((ids == padding_idx).unsqueeze(2), 0)
    rows = ids.long() + torch.arange(len(ids), device=ids.device).unsqueeze(1) * target.shape[0]
    gradients = grad_output.new_zeros(len(ids) * target.shape[0], target.shape[1])
    gradients.index_add_(0, rows.flatten(), grad_output.flatten(0, 1))
    return gradients.unflatten(0, (len(ids), target.shape[0]))


@rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Binding | None:
    """F.embedding. `scale_grad_by_freq` and `sparse` say how an optimizer gets the gradient, not what it is."""
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += weight.shape[0]
    return Binding(
        rule="embedding",
        roles={"weight": weight},
        saved=(input,),
        accumulate=partial(_accumulate, padding_idx=padding_idx),
        gradients=partial(_gradients, padding_idx=padding_idx),
        axes=lambda output, _: range(len(output) - 1),
    )


@rule(torch.embedding)
def torch_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Binding | None:
    """torch.embedding, where a negative padding_idx is none; in F.embedding it counts from the end."""
    return embedding(indices, weight, padding_idx if padding_idx >= 0 else None)
