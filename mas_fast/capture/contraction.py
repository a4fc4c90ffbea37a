"""What all products of a parameter with data have in common: Y[y] = Σ W[w] X[x], with a letter for every axis.

For the gradient of W, [N, B, O, I], the letters are of four kinds:

    batch B      in W, X and Y, such as heads or experts: one linear layer each
    outputs O    in W and Y
    inputs I     in W and X
    positions T  in X and Y; the samples are among them

δ and X are brought to [N, B, T, O] and [N, B, T, I], and Ω to [B, O, I].
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, flattened
from mas_fast.kernels import ops


class Form(NamedTuple):
    """The letters of a product, seen from the operand that is the parameter. Axes of length 1 that repeat are gone."""

    output: str
    parameter: str
    data: str
    parameter_ones: tuple[int, ...]  # axes of the parameter without a letter
    data_ones: tuple[int, ...]
    batch: str  # B, O, I and T: see above
    outputs: str
    inputs: str
    positions: str


def form_of(
    output: str, parameter: str, data: str, parameter_shape: Sequence[int], data_shape: Sequence[int]
) -> Form | None:
    """Return the form of a product; None if the parameter has an axis that neither data nor output have."""
    sizes = dict(zip(parameter, parameter_shape, strict=True))
    other = dict(zip(data, data_shape, strict=True))
    single = {c for c, size in sizes.items() if size == 1 and (c in other or c not in output)}
    other_single = {c for c, size in other.items() if size == 1 and sizes.get(c, 1) != 1}
    kept = "".join(c for c in parameter if c not in single)
    other_kept = "".join(c for c in data if c not in other_single)
    if any(c not in output and c not in other_kept for c in kept):
        return None
    return Form(
        output,
        kept,
        other_kept,
        parameter_ones=tuple(axis for axis, c in enumerate(parameter) if c in single),
        data_ones=tuple(axis for axis, c in enumerate(data) if c in other_single),
        batch="".join(c for c in kept if c in other_kept and c in output),
        outputs="".join(c for c in kept if c not in other_kept),
        inputs="".join(c for c in kept if c not in output),
        positions="".join(c for c in output if c not in kept),
    )


def _grouped(tensor: Tensor, letters: str, groups: tuple[str, ...]) -> Tensor:
    """Bring [N, *letters] to [N, *groups], with one axis for all letters of a group."""
    order, ends = _order(letters, groups)
    ordered = tensor.permute(order)
    sizes = [prod(ordered.shape[begin:end]) for begin, end in zip((0, *ends), ends, strict=False)]
    return ordered.reshape(sizes)


@lru_cache(maxsize=1024)
def _order(letters: str, groups: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Return the axes of [N, *letters] in the order of N and the groups, and where each of those ends."""
    order = [0, *(1 + letters.index(c) for group in groups for c in group)]
    return order, [1, *(1 + end for end in accumulate(len(group) for group in groups))]


def _split(delta: Delta, tensor: Tensor, letters: str, sample: str) -> tuple[Tensor, str]:
    """Give a tensor a first axis of N samples; returns it with its letters, without that of the samples if used up."""
    assert delta.layout is not None
    rows = delta._replace(layout=delta.layout._replace(axis=letters.index(sample))).split(tensor)
    return rows, letters if rows.dim() > len(letters) else letters.replace(sample, "")


def _pair(form: Form, delta: Delta, data: Tensor) -> tuple[Tensor, Tensor]:
    """Return δ [N, B, T, O] and the data [N, B, T, I]."""
    data, letters = data.squeeze(form.data_ones), form.data
    summed = [axis for axis, c in enumerate(letters) if c not in form.output and c not in form.parameter]
    if summed:
        data = data.sum(summed, dtype=torch.promote_types(data.dtype, torch.float32))
        letters = "".join(c for c in letters if c in form.output or c in form.parameter)
    sample = "" if delta.layout is None else form.output[delta.layout.axis]
    if sample and sample in form.positions:
        data, letters = _split(delta, data, letters, sample)
        value, output = _split(delta, delta.value, form.output, sample)
    elif sample:
        # Samples that own entries of the parameter: every sample has δ of its own, zero elsewhere, and all data.
        value = torch.stack([delta.alone(n) for n in range(delta.samples)[delta.part]])
        data, output = data.expand(len(value), *data.shape), form.output
    else:
        data, value, output = data.unsqueeze(0), delta.value.unsqueeze(0), form.output
    positions = "".join(c for c in form.positions if c in output)
    grad_output = _grouped(value, output, (form.batch, positions, form.outputs))
    return grad_output, _grouped(data, letters, (form.batch, positions, form.inputs))


def _ungrouped(matrices: Tensor, shape: torch.Size, form: Form) -> Tensor:
    """Bring [n, B, O, I] back to the axes of the parameter, of which `shape` [1, ...] tells the lengths."""
    order, _ = _order(form.parameter, (form.batch, form.outputs, form.inputs))
    rows = matrices.reshape(len(matrices), *(shape[axis] for axis in order[1:]))
    return rows.permute(sorted(range(len(order)), key=order.__getitem__))


@contextmanager
def _matrices(omega: Tensor, form: Form) -> Iterator[Tensor]:
    """Give Ω as [B, O, I] to add to."""
    groups = (form.batch, form.outputs, form.inputs)
    squeezed = omega.squeeze(form.parameter_ones).unsqueeze(0)
    matrices = _grouped(squeezed, form.parameter, groups)[0]
    if matrices.untyped_storage().data_ptr() == omega.untyped_storage().data_ptr():
        yield matrices
    else:
        buffer = torch.zeros_like(matrices)
        yield buffer
        squeezed += _ungrouped(buffer.unsqueeze(0), squeezed.shape, form)


def _add(omega: Tensor, form: Form, grad_output: Tensor, x: Tensor, square: bool) -> None:
    """Add Σ_n |δ_nᵀ x_n| to Ω."""
    with _matrices(omega, form) as matrices:
        batch, outputs, inputs = matrices.shape
        if batch > 1 and min(outputs, inputs) == 1:
            # One entry times one entry everywhere, so one kernel does it: [N, B, T, K] -> [N, T, B·K, 1].
            wide = (*x.shape[:3], max(outputs, inputs))
            delta, x = (t.expand(wide).transpose(1, 2).flatten(2).unsqueeze(3) for t in (grad_output, x))
            with flattened(matrices) as entries:
                ops.accumulate_affine_(entries, None, delta, x, square=square)
            return
        for b in range(batch):
            ops.accumulate_linear_(matrices[b], grad_output[:, b], x[:, b], square)


# role -> its form
Forms = Mapping[str, Form]


def _data(role: str, saved: tuple[Any, ...]) -> Tensor:
    left, right = saved
    return right if role == "left" else left


def _accumulate(omega: Mapping[str, Tensor], delta: Delta, saved: tuple[Any, ...], square: bool, forms: Forms) -> None:
    for role, target in omega.items():
        _add(target, forms[role], *_pair(forms[role], delta, _data(role, saved)), square)


def _gradients(role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...], forms: Forms) -> Tensor:
    form = forms[role]
    grad_output, x = _pair(form, delta, _data(role, saved))
    dtype = torch.promote_types(torch.promote_types(grad_output.dtype, x.dtype), torch.float32)
    gradients = grad_output.to(dtype).mT @ x.to(dtype)  # [N, B, O, I]
    shape = torch.Size([1, *target.squeeze(form.parameter_ones).shape])
    return _ungrouped(gradients, shape, form).reshape(len(gradients), *target.shape)


def _join(omega: Tensor, role: str, calls: Sequence[tuple[Delta, tuple[Any, ...]]], square: bool, forms: Forms) -> None:
    """Sum over calls as over positions: they stand side by side along T."""
    form = forms[role]
    deltas, xs = zip(*(_pair(form, delta, _data(role, saved)) for delta, saved in calls), strict=True)
    _add(omega, form, torch.cat(deltas, 2), torch.cat(xs, 2), square)


@lru_cache(maxsize=1024)
def _binding(name: str, output: str, left: str, right: str, left_shape: torch.Size, right_shape: torch.Size) -> Binding:
    """Bind a product of such shapes, but for its tensors: so that calls that can be joined share their `join`."""
    found = {
        "left": form_of(output, left, right, left_shape, right_shape),
        "right": form_of(output, right, left, right_shape, left_shape),
    }
    forms = {role: form for role, form in found.items() if form is not None}
    shapes = {"left": left_shape, "right": right_shape}

    def axes(_: torch.Size, target: torch.Size) -> Iterable[int]:
        fitting = [form for role, form in forms.items() if shapes[role] == target]
        return sorted({output.index(c) for form in fitting for c in form.positions})

    return Binding(
        rule=name,
        roles=dict.fromkeys(forms),
        saved=(),
        accumulate=partial(_accumulate, forms=forms),
        gradients=partial(_gradients, forms=forms),
        axes=axes,
        join=partial(_join, forms=forms),
        single=True,
    )


def contraction(name: str, left: tuple[Tensor, str], right: tuple[Tensor, str], output: str) -> Binding | None:
    """Bind a product of two tensors, either of which may be the parameter.

    Args:
        name: Of the rule.
        left: The first operand, and a letter for each of its axes.
        right: The second.
        output: Letters of the output.

    Returns:
        None if a letter stands twice in one of them.
    """
    if any(len(set(letters)) != len(letters) for letters in (left[1], right[1], output)):
        return None
    binding = _binding(name, output, left[1], right[1], left[0].shape, right[0].shape)
    tensors = {"left": left[0], "right": right[0]}
    # Only what requires a gradient is a parameter.
    roles = {role: tensors[role] for role in binding.roles if tensors[role].requires_grad}
    return binding._replace(roles=roles, saved=(left[0], right[0]))
