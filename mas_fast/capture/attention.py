"""Rule for a parameter that is added to attention scores, such as a relative position bias: δ of the scores is formed.

P = softmax(q kᵀ · scale + mask),   y = P v,   ∂/∂mask = P ⊙ (δ vᵀ − rowsum(P ⊙ δ vᵀ))
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, rule


def _gradients(role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...], scale: float) -> Tensor:
    def heads(t: Tensor) -> Tensor:
        """Bring [N·m, H, T, D] to [n, m, H, T, D]."""
        t = delta.split(t)
        return t.unsqueeze(1) if t.dim() == 4 else t

    query, key, value, mask = saved
    q, k, v, grad_output = heads(query), heads(key), heads(value), heads(delta.value)
    shared = q.shape[2] // k.shape[2]  # query heads that share a key
    k, v = (t.repeat_interleave(shared, 2) if shared > 1 else t for t in (k, v))
    scores = torch.softmax((q @ k.mT) * scale + mask, -1)  # [n, m, H, T, S]
    product = scores * (grad_output @ v.mT)
    product -= scores * product.sum(-1, keepdim=True)
    shape = (1,) * (4 - target.dim()) + target.shape
    axes = [axis + 1 for axis, size in enumerate(shape) if size == 1]
    return (product.sum(axes) if axes else product).reshape(-1, *target.shape)


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Binding | None:
    """F.scaled_dot_product_attention with a float mask that is the same for all samples."""
    if attn_mask is None or dropout_p or is_causal or query.dim() != 4 or not attn_mask.is_floating_point():
        return None
    leading = 1 if attn_mask.dim() < 4 or attn_mask.shape[0] == 1 else 0
    return Binding(
        rule="attention bias",
        roles={"attn_mask": attn_mask},
        saved=(query, key, value, attn_mask),
        accumulate=None,
        gradients=partial(_gradients, scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale),
        axes=lambda *_: range(leading),
    )
