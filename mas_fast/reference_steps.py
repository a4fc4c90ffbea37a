"""What the training step computes, in plain torch: the penalty, optimizer steps that contain it, and Ω in 8 bits.

    value = λ Σ Ω (θ − θ*)²,    gradient = 2 λ Ω (θ − θ*)        (Aljundi et al., ECCV 2018, Eq. 3; no ½)

One function for each op; compiled kernels replace them, and are tested against them. All take lists, one entry per
parameter: `thetas`, `grads`, `anchors` θ* and state in any floating dtype, and Ω as `omegas` and `scales`: floating
numbers with an empty scale, or the codes and scales of `encode_omega`. The arithmetic is in float32, or in float64
where a tensor of the parameter is. Nothing of ours is imported here.

Ω and θ* of many small parameters may stand one behind the other in one entry of `omegas`, `scales` and `anchors`:
`places` then has three numbers for each parameter, its entry (negative for none), the first of its numbers there, and
the first of its scales.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Entries of Ω that share a scale.
BLOCK = 128


@torch.no_grad()
def encode_omega(omega: Tensor) -> tuple[Tensor, Tensor]:
    """Encode Ω in 8 bits: v ≈ s (c / 255)², with s the largest of a block of 128 entries, which it is exact for.

    The square gives small values finer steps. Zeros stay zeros. The relative error in L2 is about 0.3 % for the
    heavy-tailed values of importances; a block of numbers made for it reaches 0.93 %.

    Args:
        omega: Non-negative and finite, any shape.

    Returns:
        Codes c, uint8 [numel], and scales s, float32 [⌈numel / 128⌉], in the order of the flattened tensor.
    """
    flat = omega.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.amax(1) if len(blocks) else flat.new_empty(0)
    # Division by the scale alone: its inverse overflows where it is denormal.
    parts = torch.where(scales[:, None] > 0, blocks / scales[:, None], 0.0)
    codes = (parts.sqrt() * 255.0).round().to(torch.uint8)
    return codes.flatten()[: len(flat)].clone(), scales


@torch.no_grad()
def decode_omega(codes: Tensor, scales: Tensor) -> Tensor:
    """Return Ω, float32 [numel], of what `encode_omega` returned."""
    parts = codes.float() * (1.0 / 255.0)  # exactly 1 for 255
    return parts.square() * scales.repeat_interleave(BLOCK)[: len(codes)]


@torch.no_grad()
def penalty_grad_(
    grads: Sequence[Tensor],
    thetas: Sequence[Tensor],
    omegas: Sequence[Tensor],
    scales: Sequence[Tensor],
    anchors: Sequence[Tensor],
    lams: Sequence[float],
    factors: Tensor | None = None,
    add: bool = True,
    *,
    places: Sequence[int] = (),
) -> Tensor:
    """Add 2 f λ Ω (θ − θ*) to every gradient, and return the values λ Σ Ω (θ − θ*)².

    Args:
        grads: Changed in place; an empty list for the values alone.
        thetas: θ.
        omegas: Ω.
        scales: Of Ω.
        anchors: θ*.
        lams: λ of each parameter; an entry of `omegas` without elements means no penalty.
        factors: f, float64 [len(thetas)]; None is 1.
        add: Add to the gradients; otherwise they are overwritten.
        places: Where Ω and θ* of each parameter are; empty where each has its own.

    Returns:
        float64 [len(thetas), 2]: the values, and how many entries of the gradient were finite before and are not now.
    """
    omegas, scales, anchors = of_each(thetas, omegas, scales, anchors, places)
    rows = []
    for i, theta in enumerate(thetas):
        if omegas[i].numel() == 0:
            if grads and not add:
                grads[i].zero_()
            rows.append(torch.zeros(2, dtype=torch.float64, device=theta.device))
            continue
        wide = _wide(theta, omegas[i], anchors[i], *grads[i : i + 1])
        difference, pull = _pull(theta, omegas[i], scales[i], anchors[i], lams[i], wide)
        lost = torch.zeros((), dtype=torch.float64, device=theta.device)
        if grads:
            added = pull * 2 if factors is None else pull * (2 * factors[i]).to(wide)
            before = grads[i].to(wide) if add else torch.zeros_like(added)
            finite = before.isfinite()  # now: `before` may be the gradient itself
            grads[i].copy_(before + added)
            lost = (finite & ~grads[i].isfinite()).sum().double()
        rows.append(torch.stack([(pull * difference).double().sum(), lost]))
    return torch.stack(rows)


@torch.no_grad()
def sgd_step_(
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    omegas: Sequence[Tensor],
    scales: Sequence[Tensor],
    anchors: Sequence[Tensor],
    lams: Sequence[float],
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    implicit: bool = False,
    *,
    places: Sequence[int] = (),
) -> Tensor:
    """Take the step of torch.optim.SGD on loss + penalty; entries of `omegas` without elements mean no penalty.

    Args:
        thetas: Changed in place.
        grads: Gradients of the loss alone.
        momenta: Momentum buffers, changed in place; empty without momentum.
        omegas: Ω.
        scales: Of Ω.
        anchors: θ*.
        lams: λ of each parameter.
        lr: η.
        momentum: Of the buffers.
        dampening: Of the momentum.
        weight_decay: As in torch: its gradient joins that of the loss.
        nesterov: Nesterov momentum.
        maximize: Follow +grads; the penalty is minimised all the same.
        first: The buffers hold nothing yet.
        implicit: Leave the penalty out of the gradient and take its proximal step afterwards:
            θ ← (θ + 2ηλΩθ*) / (1 + 2ηλΩ), stable for any λΩ.
        places: As in `penalty_grad_`.

    Returns:
        float64 [len(thetas), 2]: the values λ Σ Ω (θ − θ*)² before the step, and zeros.
    """
    omegas, scales, anchors = of_each(thetas, omegas, scales, anchors, places)
    rows = []
    for i, theta in enumerate(thetas):
        wide = _wide(theta, omegas[i], anchors[i], grads[i])
        value, pull = _value_and_pull(theta, omegas[i], scales[i], anchors[i], lams[i], wide)
        new, grad = theta.to(wide), -grads[i].to(wide) if maximize else grads[i].to(wide)
        if not implicit:
            grad = grad + 2 * pull
        if weight_decay:
            grad = grad + weight_decay * new
        if momentum:
            buffer = grad if first else momentum * momenta[i].to(wide) + (1 - dampening) * grad
            momenta[i].copy_(buffer)
            grad = grad + momentum * buffer if nesterov else buffer
        new = new - lr * grad
        theta.copy_(_proximal(new, omegas[i], scales[i], anchors[i], lr * lams[i]) if implicit else new)
        rows.append(value)
    return torch.stack(rows)


@torch.no_grad()
def adamw_step_(
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    omegas: Sequence[Tensor],
    scales: Sequence[Tensor],
    anchors: Sequence[Tensor],
    lams: Sequence[float],
    steps: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    implicit: bool = False,
    *,
    places: Sequence[int] = (),
) -> Tensor:
    """Take the step of torch.optim.AdamW on loss + penalty; entries of `omegas` without elements mean no penalty.

    Args:
        thetas: Changed in place.
        grads: Gradients of the loss alone.
        exp_avgs: First moments, changed in place.
        exp_avg_sqs: Second moments, changed in place.
        max_exp_avg_sqs: Largest second moments, changed in place; empty without amsgrad.
        omegas: Ω.
        scales: Of Ω.
        anchors: θ*.
        lams: λ of each parameter.
        steps: The number t of this step for each parameter, from 1.
        lr: η.
        beta1: Of the first moments.
        beta2: Of the second moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: θ ← (1 − η·weight_decay) θ first.
        amsgrad: Divide by the largest second moment so far.
        maximize: Follow +grads; the penalty is minimised all the same.
        implicit: As in `sgd_step_`, with this η: the penalty is not scaled by the moments then.
        places: As in `penalty_grad_`.

    Returns:
        As `sgd_step_`.
    """
    omegas, scales, anchors = of_each(thetas, omegas, scales, anchors, places)
    rows = []
    for i, theta in enumerate(thetas):
        wide = _wide(theta, omegas[i], anchors[i], grads[i])
        value, pull = _value_and_pull(theta, omegas[i], scales[i], anchors[i], lams[i], wide)
        new, grad = theta.to(wide) * (1 - lr * weight_decay), -grads[i].to(wide) if maximize else grads[i].to(wide)
        if not implicit:
            grad = grad + 2 * pull
        mean = exp_avgs[i].to(wide)
        mean = mean + (1 - beta1) * (grad - mean)
        square = beta2 * exp_avg_sqs[i].to(wide) + (1 - beta2) * grad * grad
        exp_avgs[i].copy_(mean)
        exp_avg_sqs[i].copy_(square)
        if amsgrad:
            square = torch.maximum(max_exp_avg_sqs[i].to(wide), square)
            max_exp_avg_sqs[i].copy_(square)
        root = square.sqrt() / (1 - beta2 ** steps[i]) ** 0.5 + eps
        new = new - lr / (1 - beta1 ** steps[i]) * (mean / root)
        theta.copy_(_proximal(new, omegas[i], scales[i], anchors[i], lr * lams[i]) if implicit else new)
        rows.append(value)
    return torch.stack(rows)


def of_each(
    thetas: Sequence[Tensor],
    omegas: Sequence[Tensor],
    scales: Sequence[Tensor],
    anchors: Sequence[Tensor],
    places: Sequence[int],
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Return Ω, scales and θ* with an entry for each parameter, without elements where nothing holds it."""
    if not places:
        return omegas, scales, anchors
    own: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for theta, entry, first, block in zip(thetas, places[::3], places[1::3], places[2::3], strict=True):
        numbers, of_scales = slice(first, first + theta.numel()), slice(block, block + -(-theta.numel() // BLOCK))
        for mine, tensors, part in zip(own, (omegas, scales, anchors), (numbers, of_scales, numbers), strict=True):
            mine.append(torch.empty(0, device=theta.device) if entry < 0 else tensors[entry][part])
    return own


def _wide(*tensors: Tensor) -> torch.dtype:
    # An Ω without elements is none, whatever its dtype.
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors if t.numel()) else torch.float32


def _omega(omega: Tensor, scale: Tensor, theta: Tensor) -> Tensor:
    # Ω and θ* may be kept in host memory.
    omega, scale = omega.to(theta.device), scale.to(theta.device)
    return (decode_omega(omega, scale) if omega.dtype == torch.uint8 else omega).view(theta.shape)


def _pull(
    theta: Tensor, omega: Tensor, scale: Tensor, anchor: Tensor, lam: float, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return θ − θ* and λ Ω (θ − θ*)."""
    difference = theta.to(wide) - anchor.view(theta.shape).to(theta.device, wide)
    return difference, lam * (_omega(omega, scale, theta).to(wide) * difference)


def _value_and_pull(
    theta: Tensor, omega: Tensor, scale: Tensor, anchor: Tensor, lam: float, wide: torch.dtype
) -> tuple[Tensor, Tensor | float]:
    if omega.numel() == 0:
        return torch.zeros(2, dtype=torch.float64, device=theta.device), 0.0
    difference, pull = _pull(theta, omega, scale, anchor, lam, wide)
    return torch.stack([(pull * difference).double().sum(), difference.new_zeros((), dtype=torch.float64)]), pull


def _proximal(theta: Tensor, omega: Tensor, scale: Tensor, anchor: Tensor, rate: float) -> Tensor:
    """Return (θ + cθ*) / (1 + c), c = 2ηλΩ, in the form that keeps θ where nothing holds it, and θ* where all does."""
    if omega.numel() == 0:
        return theta
    # Finite, so that it is 0 times Ω = 0.
    c = min(2 * rate, torch.finfo(theta.dtype).max) * _omega(omega, scale, theta).to(theta.dtype)
    part = 1 / (1 + c)
    anchor = anchor.view(theta.shape).to(theta)
    difference = theta - anchor
    return torch.where(c < 1, theta - difference * (c * part), anchor + difference * part)
