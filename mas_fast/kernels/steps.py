"""The ops of the training step, for lists of parameters: checks, memory layouts, and the differentiable penalty."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_fast.kernels import ops
from mas_fast.reference_steps import BLOCK, of_each


class Held(NamedTuple):
    """What holds a list of parameters, all on one device: Ω, θ* and λ.

    Ω is floating-point with an empty scale, or uint8 with the scales of its blocks (`encode_omega`); all is contiguous.
    Without `places` each parameter has an entry of its size in all lists, without elements if nothing holds it. With
    them many small parameters share an entry of `omegas`, `scales` and `anchors`: a list is handed to an op tensor by
    tensor, which takes longer than to step a small one. Whoever makes one calls `check_held`; the steps do not.

    Attributes:
        omegas: Ω.
        scales: Of Ω.
        anchors: θ*.
        lams: λ of each parameter.
        places: Empty, or three numbers for each parameter: its entry, negative if nothing holds it; the first of its
            numbers there; the first of its scales.
    """

    omegas: list[Tensor]
    scales: list[Tensor]
    anchors: list[Tensor]
    lams: list[float]
    places: list[int] = []  # noqa: RUF012  (never changed)


def encode_omega(omega: Tensor) -> tuple[Tensor, Tensor]:
    """Encode Ω in 8 bits; see `reference_steps.encode_omega`.

    Raises:
        ValueError: Ω is not floating-point, or holds a negative number, inf or nan.
    """
    if not omega.is_floating_point():
        raise ValueError(f"omega must be floating-point, got {omega.dtype}")
    if omega.numel() and not (0 <= float(omega.min()) and float(omega.max()) < float("inf")):
        raise ValueError("omega must be finite and non-negative to be encoded")
    codes, scales = torch.ops.mas_fast.encode_omega(omega.detach().float().contiguous())
    return codes, scales


def decode_omega(codes: Tensor, scales: Tensor) -> Tensor:
    """Return Ω, float32 [numel]; see `reference_steps.decode_omega`.

    Raises:
        ValueError: Codes or scales are not what `encode_omega` gives.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 1 or scales.shape != (-(-len(codes) // BLOCK),):
        raise ValueError(f"codes must be uint8 [numel] with a scale per {BLOCK}, got {codes.dtype} {list(codes.shape)}")
    return torch.ops.mas_fast.decode_omega(codes, scales.contiguous())


def add_penalty_grad_(grads: Sequence[Tensor], thetas: Sequence[Tensor], held: Held) -> Tensor:
    """Add 2λΩ(θ − θ*) to every gradient in one pass, and return float64 [n, 2]; see `reference_steps.penalty_grad_`."""
    with contiguous(thetas) as flat, contiguous(grads, written=True) as flat_grads:
        return torch.ops.mas_fast.penalty_grad_(flat_grads, flat, *held[:4], places=held.places)


def values(thetas: Sequence[Tensor], held: Held) -> Tensor:
    """Return the values λ Σ Ω (θ − θ*)² of every parameter, float64 [n]."""
    return torch.ops.mas_fast.penalty_grad_([], thetas, *held[:4], places=held.places)[:, 0].clone()


def penalty(thetas: Sequence[Tensor], held: Held) -> Tensor:
    """Return the values λ Σ Ω (θ − θ*)² of every parameter, float64 [n], differentiable in θ."""
    return torch.ops.mas_fast.penalty([theta.contiguous() for theta in thetas], *held)


@contextmanager
def contiguous(tensors: Sequence[Tensor], written: bool = False) -> Iterator[Sequence[Tensor]]:
    """Give tensors that a kernel can walk through; copies of others are written back if they are changed."""
    if all(map(Tensor.is_contiguous, tensors)):
        yield tensors
        return
    flat = [tensor.contiguous() for tensor in tensors]
    yield flat
    if written:
        for own, copy in zip(tensors, flat, strict=True):
            if own is not copy:
                own.copy_(copy)


def check_held(thetas: Sequence[Tensor], held: Held) -> None:
    """Raise unless Ω and θ* fit the parameters.

    Raises:
        ValueError: They do not.
    """
    entries = len(held.places) // 3 if held.places else len(held.omegas)
    if not (len(thetas) == len(held.lams) == entries and len(held.omegas) == len(held.scales) == len(held.anchors)):
        raise ValueError(f"held must have an entry for each of {len(thetas)} parameters, got {entries}")
    omegas, _, anchors = of_each(thetas, held.omegas, held.scales, held.anchors, held.places)
    for i, (theta, omega, anchor) in enumerate(zip(thetas, omegas, anchors, strict=True)):
        if omega.numel() != anchor.numel() or (omega.numel() and omega.numel() != theta.numel()):
            raise ValueError(
                f"omega and anchor must be of the size of the parameter, {theta.numel()}, got {omega.numel()} and "
                f"{anchor.numel()} in entry {i}"
            )


# The penalty as functions that return new tensors: what autograd and torch.compile can work with.


def _values(
    thetas: Sequence[Tensor],
    omegas: Sequence[Tensor],
    scales: Sequence[Tensor],
    anchors: Sequence[Tensor],
    lams: Sequence[float],
    places: Sequence[int],
) -> Tensor:
    return values(thetas, Held([*omegas], [*scales], [*anchors], [*lams], [*places]))


def _gradients(
    factors: Tensor,
    thetas: Sequence[Tensor],
    omegas: Sequence[Tensor],
    scales: Sequence[Tensor],
    anchors: Sequence[Tensor],
    lams: Sequence[float],
    places: Sequence[int],
) -> list[Tensor]:
    grads = [torch.empty_like(theta) for theta in thetas]
    # A gradient that autograd made of a sum repeats one number.
    factors = factors.contiguous()
    torch.ops.mas_fast.penalty_grad_(grads, thetas, omegas, scales, anchors, lams, factors, False, places=places)
    return grads


for _name, _schema, _kernel, _fake in (
    (
        "penalty",
        f"(Tensor[] thetas, {ops.HELD}, int[] places) -> Tensor",
        _values,
        lambda thetas, *held: thetas[0].new_empty(len(thetas), dtype=torch.float64),
    ),
    (
        "penalty_grad",
        f"(Tensor factors, Tensor[] thetas, {ops.HELD}, int[] places) -> Tensor[]",
        _gradients,
        lambda factors, thetas, *held: [torch.empty_like(theta) for theta in thetas],
    ),
):
    ops._library.define(_name + _schema)
    ops._library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mas_fast::{_name}", _fake, lib=ops._library)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, ctx.lams, ctx.places = inputs[-6:]
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.factors = len(inputs) - 6
    ctx.save_for_backward(*inputs[: ctx.factors], *(t for tensors in lists for t in tensors))


def _kept(ctx: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
    saved = list(ctx.saved_tensors)
    first, rest, lists = saved[: ctx.factors], saved[ctx.factors :], []
    for count in ctx.counts:
        lists.append(rest[:count])
        rest = rest[count:]
    return first, lists


def _none(ctx: Any) -> list[list[None] | None]:
    # Of lists of numbers too; an empty list is taken for one of tensors.
    return [*([None] * count for count in ctx.counts[1:]), None, None if ctx.places else []]


def _penalty_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    _, lists = _kept(ctx)
    return torch.ops.mas_fast.penalty_grad(gradient, *lists, ctx.lams, ctx.places), *_none(ctx)


def _penalty_grad_backward(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    # Second derivatives are rare: in plain torch.
    (factors,), (thetas, *lists) = _kept(ctx)
    omegas, scales, anchors = of_each(thetas, lists[0], lists[1], lists[2], ctx.places)
    of_factors, of_thetas = [], []
    for i, (theta, gradient) in enumerate(zip(thetas, gradients, strict=True)):
        if omegas[i].numel() == 0:
            of_factors.append(factors.new_zeros(()))
            of_thetas.append(torch.zeros_like(theta))
            continue
        omega = omegas[i] if omegas[i].dtype != torch.uint8 else decode_omega(omegas[i], scales[i])
        weight = 2 * ctx.lams[i] * omega.view(theta.shape).double()
        g = torch.zeros_like(weight) if gradient is None else gradient.double()
        of_factors.append((weight * (theta.double() - anchors[i].view(theta.shape).double()) * g).sum())
        of_thetas.append((factors[i] * weight * g).to(theta.dtype))
    return torch.stack(of_factors), of_thetas, *_none(ctx)


torch.library.register_autograd("mas_fast::penalty", _penalty_backward, setup_context=_keep, lib=ops._library)
torch.library.register_autograd("mas_fast::penalty_grad", _penalty_grad_backward, setup_context=_keep, lib=ops._library)


@torch.no_grad()
def sgd_step_(
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    held: Held,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    implicit: bool = False,
) -> Tensor:
    """Take a step of SGD on loss + penalty in one pass, and return float64 [n, 2]; see `reference_steps.sgd_step_`."""
    options = momentum, dampening, weight_decay, nesterov, maximize, first, implicit
    with (
        contiguous(thetas, written=True) as flat,
        contiguous(grads) as flat_grads,
        contiguous(momenta, written=True) as flat_momenta,
    ):
        return torch.ops.mas_fast.sgd_step_(flat, flat_grads, flat_momenta, *held[:4], lr, *options, places=held.places)


@torch.no_grad()
def adamw_step_(
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    held: Held,
    *,
    steps: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    implicit: bool = False,
) -> Tensor:
    """Take a step of AdamW on loss + penalty in one pass, and return float64 [n, 2]; see `reference_steps`."""
    options = lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, implicit
    with (
        contiguous(thetas, written=True) as flat,
        contiguous(grads) as flat_grads,
        contiguous(exp_avgs, written=True) as flat_means,
        contiguous(exp_avg_sqs, written=True) as flat_squares,
        contiguous(max_exp_avg_sqs, written=True) as flat_largest,
    ):
        return torch.ops.mas_fast.adamw_step_(
            flat, flat_grads, flat_means, flat_squares, flat_largest, *held[:4], steps, *options, places=held.places
        )
