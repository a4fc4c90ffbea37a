"""Objectives of large outputs: ‖W h + b‖² of a last linear layer, such as a language model's head, without its logits.

```python
importance = mas_fast.estimate_importance(
    model, batches, forward=mas_fast.objectives.causal_lm_norm, objective=mas_fast.objectives.summed
)
```

is the Ω of `estimate_importance(model, batches)` for a causal language model of Hugging Face, without its [N, T, V]
logits: ‖W h + b‖² = h·G h + 2 (Wᵀb)·h + b·b with G = Wᵀ W [D, D], and its derivatives need no logits either.
Nothing of ours is imported here.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

# Numbers that may be held at once for a part of the outputs: 64 MiB in float32.
CHUNK_ENTRIES = 1 << 24
# Settings of a Hugging Face model by which its logits are no linear function of the last hidden state: caps and scales.
# Others of such names are of attention, of routers, or of the first weights.
BEYOND_LINEAR = re.compile(r"(?!.*(attn|attention|router|init))(.*logit.*(cap|scal|mult)|lm_head_(scal|mult))")
NEUTRAL = (None, False, 1, 1.0)  # where such a setting changes nothing


def linear_output_norm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ‖W h + b‖² for every position, differentiable, without forming W h.

    The arithmetic is in float32, or float64 for float64. With more positions than half the width, the derivative goes
    through G = WᵀW, which costs 2 V D² operations a call and 2 D² a position, where the logits cost 4 V D; else through
    some outputs at a time. The error is relative to ‖W‖² ‖h‖².

    Args:
        input: h, [..., D], floating-point.
        weight: W, [V, D].
        bias: b, [V].

    Returns:
        [..., 1], in the wide dtype.

    Raises:
        ValueError: The shapes do not fit.
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(linear_output_norm, (input, weight, bias), input, weight, bias)
    if weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must be [..., D] and weight [V, D], got {list(input.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")
    return _LinearOutputNorm.apply(input, weight, bias)


def summed(values: Tensor) -> Tensor:
    """Return the sum over all but the samples, [N, ...] -> [N]: the objective that goes with `causal_lm_norm`."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


# What it is of, for records: Ω of ‖F‖² is the same, whichever way it was computed.
summed.__qualname__ = "l2_squared"


def causal_lm_norm(model: nn.Module, batch: Any) -> Tensor:
    """Run a Hugging Face causal language model up to its head, and return ‖logits‖² of every position, [N, T, 1].

    Args:
        model: A model with `get_decoder` (or `base_model`) and `get_output_embeddings`.
        batch: A mapping for the model, of which labels are left out, or its ids.

    Raises:
        TypeError: The model has no such parts, or its head is no linear layer.
        ValueError: Its logits are capped or scaled after the head, or other layers stand before it.
    """
    any_model: Any = model
    head = any_model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise TypeError(f"model must have an nn.Linear as get_output_embeddings(), got {type(head).__name__}")
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    changed = {
        f"{name}={value}"
        for settings in (config, text)
        for name, value in (vars(settings) if hasattr(settings, "__dict__") else {}).items()
        if BEYOND_LINEAR.match(name) and value not in NEUTRAL
    }
    if changed:
        raise ValueError(f"the logits must be those of a linear layer, got a model with {', '.join(sorted(changed))}")
    decoder = any_model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder = getattr(model, "base_model", None) if decoder is None else decoder
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise TypeError("model must have a decoder below its head: get_decoder() or base_model")
    known = {id(parameter) for part in (decoder, head) for parameter in part.parameters()}
    more = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if more:
        raise ValueError(
            "the logits must be those of a linear layer on what the decoder gives, got parameters beside decoder and "
            f"head: {', '.join(more[:5])}"
        )
    if isinstance(batch, Mapping):
        output = decoder(**{key: value for key, value in batch.items() if key not in ("labels", "label", "label_ids")})
    else:
        output = decoder(batch[0] if isinstance(batch, (tuple, list)) else batch)
    hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return linear_output_norm(hidden.to(head.weight.dtype), head.weight, head.bias)


def chunks_of(outputs: int, entries_each: int) -> Iterator[slice]:
    """Return parts of the outputs that need no more than CHUNK_ENTRIES numbers together."""
    step = max(1, CHUNK_ENTRIES // max(1, entries_each))
    for start in range(0, outputs, step):
        yield slice(start, min(outputs, start + step))


def by_gram(positions: int, outputs: int, width: int) -> bool:
    """Return whether products of the inputs with themselves cost less than the outputs would, twice."""
    return width * (positions + outputs) < 2 * outputs * positions


class _LinearOutputNorm(torch.autograd.Function):
    """‖W h + b‖² by position, with the derivative in h ready when its value is."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        h = input.detach().to(wide).reshape(-1, input.shape[-1])  # [P, D]
        half = torch.zeros_like(h)  # half of the derivative: Σ_v W_v (W_v·h + b_v)
        value = h.new_zeros(len(h))
        outputs, width = weight.shape
        if by_gram(len(h), outputs, width):
            gram, mixed, constant = h.new_zeros(width, width), h.new_zeros(width), h.new_zeros(())
            for part in chunks_of(outputs, width):
                rows = weight[part].detach().to(wide)
                gram.addmm_(rows.T, rows)
                if bias is not None:
                    b = bias[part].detach().to(wide)
                    mixed.addmv_(rows.T, b)
                    constant += b.dot(b)
            half = h @ gram
            value = (h * (half + 2 * mixed)).sum(1) + constant
            half += mixed
        else:
            for part in chunks_of(outputs, len(h)):
                rows = weight[part].detach().to(wide)
                logits = h @ rows.T
                if bias is not None:
                    logits += bias[part].detach().to(wide)
                value += logits.square().sum(1)
                half.addmm_(logits, rows)
        ctx.save_for_backward(input, weight, bias, half)
        return value.view(*input.shape[:-1], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, half = ctx.saved_tensors
        delta = gradient.reshape(-1, 1)
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = (2 * delta * half).view(input.shape).to(input.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            h = input.detach().to(half.dtype).reshape(-1, input.shape[-1])
            of_weight, of_bias = weight_gradients(weight, bias, (delta * h).T @ h, (delta * h).sum(0), delta.sum())
        return (
            of_input,
            of_weight if ctx.needs_input_grad[1] else None,
            of_bias if bias is not None and ctx.needs_input_grad[2] else None,
        )


def weight_gradients(
    weight: Tensor, bias: Tensor | None, moments: Tensor, sums: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ∂/∂W = 2 (W S + b sᵀ) and ∂/∂b = 2 (W s + b σ), with S = Σ δ h hᵀ, s = Σ δ h and σ = Σ δ, in W's dtype."""
    rows = weight.detach().to(moments.dtype)
    of_weight, of_bias = 2 * (rows @ moments), 2 * (rows @ sums)
    if bias is not None:
        b = bias.detach().to(moments.dtype)
        of_weight += 2 * torch.outer(b, sums)
        of_bias += 2 * b * total
    return of_weight.to(weight.dtype), of_bias.to(weight.dtype)
