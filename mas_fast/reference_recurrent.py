"""What an LSTM does step by step, in plain torch: ahead for its states, and back for the gradients of its gates.

`capture/recurrent.py` forms everything else for all steps at once. Compiled kernels replace these two functions on the
CPU and are tested against them. Nothing of ours is imported here.

Letters: T steps, N samples, H cells, P outputs, which are H unless projected. Step t leads from state t to t + 1 or,
reversed, from t + 1 to t. `sizes` says for each step how many of the samples have it, the first ones; if empty, all.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def steps(buffers: Sequence[Tensor], sizes: Sequence[int], backward: bool) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over views of each [T, N, ·] by step, with the samples that have it; `backward` from the last one."""
    columns: list[Sequence[Tensor]] = [buffer.unbind(0) for buffer in buffers]
    if sizes:
        columns = [[view[:size] for view, size in zip(column, sizes, strict=True)] for column in columns]
    return zip(*[column[::-1] if backward else column for column in columns], strict=True)


@torch.no_grad()
def lstm_ahead_(
    gates: Tensor,
    states: Tensor,
    cells: Tensor,
    to_c: Tensor,
    kept: Tensor,
    unprojected: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    sizes: Sequence[int],
    reverse: bool = False,
) -> None:
    """Go through the steps, and keep what the way back needs.

    With z = gates + h_{t−1} W_hhᵀ + b_hh, and i, f, o = σ(z), g = tanh(z), each of its quarter,

        c_t = f ⊙ c_{t−1} + i ⊙ g,    u = o ⊙ tanh c_t,    h_t = u, or u W_hrᵀ

    Args:
        gates: x W_ihᵀ + b_ih, [T, N, 4, H], in the order i, f, g, o; ∂c/∂z of i, f, g and ∂u/∂z of o, afterwards.
        states: h, [T + 1, N, P]; holds the initial ones, and all afterwards.
        cells: c, [T + 1, N, H]; holds the initial ones, and all afterwards.
        to_c: Filled in: ∂u/∂c, [T, N, H].
        kept: Filled in: f, [T, N, H].
        unprojected: Filled in: u, [T, N, H]; None without W_hr.
        w_hh: [4·H, P].
        b_hh: [4·H], or None.
        w_hr: [P, H], or None.
        sizes: Samples of each step, or nothing.
        reverse: From the last step to the first.
    """
    befores, afters = zip(*[(t[1:], t[:-1]) if reverse else (t[:-1], t[1:]) for t in (states, cells)], strict=True)
    outputs = afters[0] if unprojected is None else unprojected
    for z, h_before, c_before, h, c, u in steps((gates, *befores, *afters, outputs), sizes, backward=reverse):
        z += F.linear(h_before, w_hh, b_hh).view_as(z)
        i, f, g, o = z.unbind(1)
        for gate, activate in ((i, torch.sigmoid), (f, torch.sigmoid), (g, torch.tanh), (o, torch.sigmoid)):
            activate(gate, out=gate)
        torch.addcmul(i * g, f, c_before, out=c)
        torch.mul(o, c.tanh(), out=u)
        if w_hr is not None:
            h.copy_(F.linear(u, w_hr))
    # What follows does not lead from step to step: all at once, if every step has all samples.
    known = (gates, befores[1], afters[1], to_c, kept)
    for z, c_before, c, out_to_c, out_kept in steps(known, sizes, backward=reverse) if sizes else [known]:
        i, f, g, o = z.unbind(-2)
        tanh_c = c.tanh()
        out_to_c.copy_(o * (1 - tanh_c * tanh_c))
        out_kept.copy_(f)
        factors = (g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o))
        z.copy_(torch.stack(factors, -2))


@torch.no_grad()
def lstm_back_(
    delta: Tensor,
    of_h: Tensor,
    of_c: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    to_gates: Tensor,
    to_c: Tensor,
    kept: Tensor,
    sizes: Sequence[int],
    reverse: bool = False,
) -> None:
    """Go back through the steps.

    With u what arrives at o ⊙ tanh c, which is of_h_t, or of_h_t W_hr,

        of_c += u ⊙ to_c,  δ of i, f, g = of_c ⊙ to_gates,  δ of o = u ⊙ to_gates,
        of_c *= kept,  of_h_{t−1} += δ W_hh

    Args:
        delta: Filled in: the gradients of the gates i, f, g, o before their activations, [T, N, 4, H].
        of_h: What arrives at each h from outside, [T + 1, N, P]; what arrives in all, afterwards.
        of_c: What arrives at the final c, [N, H]; what arrives at the initial one, afterwards.
        w_hh: [4·H, P].
        w_hr: [P, H], or None.
        to_gates: ∂c/∂ each of i, f, g before its activation, and ∂h/∂ that of o, [T, N, 4, H].
        to_c: ∂h/∂c, [T, N, H].
        kept: f, [T, N, H].
        sizes: Samples of each step, or nothing.
        reverse: The steps lead from the last to the first.
    """
    before, after = (of_h[1:], of_h[:-1]) if reverse else (of_h[:-1], of_h[1:])
    of_cells = of_c.expand_as(kept)
    buffers = (of_cells, of_cells.unsqueeze(2), after, before, to_c, kept, delta.flatten(2))
    gates = (to_gates[:, :, :3], delta[:, :, :3], to_gates[:, :, 3], delta[:, :, 3])
    for c, c_each, h, h_before, u_to_c, c_to_c, row, to_ifg, ifg, to_o, o in steps(
        (*buffers, *gates), sizes, backward=not reverse
    ):
        u = h if w_hr is None else h @ w_hr
        c.addcmul_(u, u_to_c)
        torch.mul(c_each, to_ifg, out=ifg)
        torch.mul(u, to_o, out=o)
        c.mul_(c_to_c)
        h_before.addmm_(row, w_hh)
