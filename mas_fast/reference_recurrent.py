"""What an LSTM does step by step, in plain torch: ahead for its cells, and back for the gradients of its gates.

    c_t = f_t ⊙ c_{t−1} + i_t ⊙ g_t,    h_t = o_t ⊙ tanh c_t, or W_hr of that

`capture/recurrent.py` forms everything else for all steps at once. Compiled kernels replace these two functions on the
CPU and are tested against them. Nothing of ours is imported here.

Letters: T steps, N samples, H cells, P outputs, which are H unless projected. Step t leads from state t to t + 1 or,
reversed, from t + 1 to t. `sizes` says for each step how many of the samples have it, the first ones; if empty, all.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def steps(buffers: Sequence[Tensor], sizes: Sequence[int], backward: bool) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over views of each [T, N, ·] by step, with the samples that have it; `backward` from the last one."""
    columns: list[Sequence[Tensor]] = [buffer.unbind(0) for buffer in buffers]
    if sizes:
        columns = [[view[:size] for view, size in zip(column, sizes, strict=True)] for column in columns]
    return zip(*[column[::-1] if backward else column for column in columns], strict=True)


@torch.no_grad()
def lstm_cells_(cells: Tensor, added: Tensor, kept: Tensor, sizes: Sequence[int], reverse: bool = False) -> None:
    """Fill in the cells that follow the initial ones: c = added + kept ⊙ c of the step before.

    Args:
        cells: [T + 1, N, H], changed in place; holds the initial ones.
        added: i ⊙ g, [T, N, H].
        kept: f, [T, N, H].
        sizes: Samples of each step, or nothing.
        reverse: From the last step to the first.
    """
    before, after = (cells[1:], cells[:-1]) if reverse else (cells[:-1], cells[1:])
    for new, keep, old, out in steps((added, kept, before, after), sizes, backward=reverse):
        torch.addcmul(new, keep, old, out=out)


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
