"""Rule for ‖W h + b‖² without W h (objectives.py). Letters as in reference.py; the outputs O are the vocabulary."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast import objectives
from mas_fast.capture.binding import Binding, Delta, rule
from mas_fast.kernels import ops
from mas_fast.reference import magnitude


def _accumulate(omega: Mapping[str, Tensor], delta: Delta, saved: tuple[Any, ...], square: bool) -> None:
    input, weight, bias = (*saved, None)[:3]
    factors, h = delta.positions(delta.value), delta.positions(input)  # [N, T, 1], [N, T, D]
    samples, positions, width = h.shape
    if "offset" in omega:
        # 2 Σ_t δ_t (W h_t + b)
        sums = (factors * h).sum(1).to(factors.dtype)
        for part in objectives.chunks_of(len(weight), samples):
            gradients = sums @ weight[part].to(sums.dtype).T
            gradients += factors.sum(1) * bias[part].to(sums.dtype)
            omega["offset"][part] += magnitude(2 * gradients, square).sum(0).to(omega["offset"].dtype)
    if "weight" not in omega:
        return
    if objectives.by_gram(positions, len(weight), width):
        # 2 (W S_n + b s_nᵀ) with S_n = Σ_t δ_t h_t h_tᵀ, one sample after the other
        for delta_n, h_n in zip(factors, h.to(factors.dtype), strict=True):
            weighed = delta_n * h_n
            moments = weighed.T @ h_n
            for part in objectives.chunks_of(len(weight), width):
                gradient = weight[part].to(moments.dtype) @ moments
                if bias is not None:
                    gradient.addr_(bias[part].to(moments.dtype), weighed.sum(0))
                omega["weight"][part] += magnitude(2 * gradient, square).to(omega["weight"].dtype)
        return
    for part in objectives.chunks_of(len(weight), samples * positions):
        # What would be δ of these logits: 2 δ_t (W h_t + b).
        logits = F.linear(h, weight[part].to(h.dtype), None if bias is None else bias[part].to(h.dtype))
        ops.accumulate_linear_(omega["weight"][part], 2 * factors * logits, h, square)


def _gradients(role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...]) -> Tensor:
    input, weight, bias = (*saved, None)[:3]
    factors, h = delta.positions(delta.value), delta.positions(input)
    index = 0 if role == "weight" else 1  # of what weight_gradients returns
    h = h.to(factors.dtype)
    rows = [
        objectives.weight_gradients(weight, bias, (d * x).T @ x, (d * x).sum(0), d.sum())[index]
        for d, x in zip(factors, h, strict=True)
    ]
    return torch.stack(rows)


@rule(objectives.linear_output_norm)
def linear_output_norm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Binding:
    """‖W h + b‖² of every position, W [V, D]."""
    return Binding(
        rule="linear output norm",
        # Not "bias": of that one, δ alone would be kept.
        roles={"weight": weight, "offset": bias},
        saved=tuple(tensor.detach() for tensor in (input, weight, bias) if tensor is not None),
        accumulate=_accumulate,
        gradients=_gradients,
        axes=lambda output, _: range(len(output) - 1),
    )
