"""Rules for products of a parameter with data that are no plain linear layer, on whichever side the parameter is."""

from collections.abc import Mapping
from functools import partial
from string import ascii_letters, ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, rule
from mas_fast.capture.contraction import contraction


def matmul(input: Tensor, other: Tensor) -> Binding | None:
    """torch.matmul of any two tensors; linear.py registers it, and takes the plain layers itself."""
    leading = ascii_lowercase[: max(0, input.dim() - 2, other.dim() - 2)]
    left = leading[len(leading) + 2 - input.dim() :] + "YZ" if input.dim() > 1 else "Z"
    right = leading[len(leading) + 2 - other.dim() :] + "ZX" if other.dim() > 1 else "Z"
    output = leading + "Y" * (input.dim() > 1) + "X" * (other.dim() > 1)
    return contraction("matmul", (input, left), (other, right), output)


@rule(torch.bmm, torch.Tensor.bmm)
def bmm(input: Tensor, mat2: Tensor) -> Binding | None:
    """torch.bmm, such as of experts [E, C, I] @ [E, I, O]."""
    return contraction("bmm", (input, "bYZ"), (mat2, "bZX"), "bYX")


@rule(torch.mv, torch.Tensor.mv)
def mv(input: Tensor, vec: Tensor) -> Binding | None:
    """torch.mv: [O, I] @ [I]."""
    return contraction("mv", (input, "YZ"), (vec, "Z"), "Y")


@rule(torch.dot, torch.Tensor.dot)
def dot(input: Tensor, tensor: Tensor) -> Binding | None:
    """torch.dot, whose output has no axis: the batch must be one sample."""
    return contraction("dot", (input, "Z"), (tensor, "Z"), "")


@rule(torch.inner, torch.Tensor.inner)
def inner(input: Tensor, other: Tensor) -> Binding | None:
    """torch.inner: the last axes of both are summed over, and all others stay."""
    if not input.dim() or not other.dim():
        return None
    left = ascii_lowercase[: input.dim() - 1]
    right = ascii_lowercase[len(left) : len(left) + other.dim() - 1]
    return contraction("inner", (input, left + "Z"), (other, right + "Z"), left + right)


@rule(torch.outer, torch.Tensor.outer, torch.ger, torch.Tensor.ger)
def outer(input: Tensor, vec2: Tensor) -> Binding | None:
    """torch.outer: [Y] and [X] to [Y, X]."""
    return contraction("outer", (input, "Y"), (vec2, "X"), "YX")


@rule(torch.tensordot)
def tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Binding | None:
    """torch.tensordot, with a number of axes or two lists of them."""
    if out is not None or isinstance(dims, Tensor):
        return None
    if isinstance(dims, int):
        dims = range(a.dim() - dims, a.dim()), range(dims)
    summed_a, summed_b = ([d] if isinstance(d, int) else list(d) for d in dims)
    left = ascii_letters[: a.dim()]
    right = list(ascii_letters[a.dim() : a.dim() + b.dim()])
    for axis_a, axis_b in zip(summed_a, summed_b, strict=True):
        right[axis_b] = left[axis_a]
    output = "".join(c for c in (*left, *right) if not (c in left and c in right))
    return contraction("tensordot", (a, left), (b, "".join(right)), output)


@rule(torch.einsum)
def einsum(equation: Any, *operands: Any) -> Binding | None:
    """torch.einsum of two operands, written as a string; no letter may stand twice in one of them."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    unused = "".join(c for c in ascii_letters if c not in equation)
    # How many axes are under each ellipsis; they are counted from the last.
    pairs = zip(terms, operands, strict=True)
    under = [t.dim() - len(term.replace("...", "")) if "..." in term else 0 for term, t in pairs]
    left, right = (
        term.replace("...", unused[max(under) - count : max(under)]) for term, count in zip(terms, under, strict=True)
    )
    if not arrow:
        counted = inputs.replace(".", "")
        output = "..." + "".join(sorted(c for c in set(counted) - {","} if counted.count(c) == 1))
    output = output.replace("...", unused[: max(under)])
    return contraction("einsum", (operands[0], left), (operands[1], right), output)


@rule(torch.baddbmm, torch.Tensor.baddbmm)
def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Binding | None:
    """torch.baddbmm(b, x, W): b + x @ W in batches, with b that broadcasts."""
    product = bmm(batch1, batch2)
    # To broadcast is to be multiplied by ones.
    ones = batch1.new_ones(()).expand(*batch1.shape[:2], batch2.shape[2])
    bias = contraction("add", (input, "bYX"[3 - input.dim() :]), (ones, "bYX"), "bYX")
    if product is None or bias is None or beta != 1 or alpha != 1:
        return None
    return product._replace(
        rule="baddbmm",
        roles={**product.roles, "bias": bias.roles.get("left")},
        accumulate=partial(_accumulate_biased, product=product, bias=bias),
        gradients=partial(_gradients_biased, product=product, bias=bias),
        axes=lambda output, target: {*product.axes(output, target), *bias.axes(output, target)},
        join=None,
        single=False,
    )


def _accumulate_biased(
    omega: Mapping[str, Tensor], delta: Delta, saved: tuple[Any, ...], square: bool, product: Binding, bias: Binding
) -> None:
    factors = {role: target for role, target in omega.items() if role != "bias"}
    if factors and product.accumulate is not None:
        product.accumulate(factors, delta, saved, square)
    if "bias" in omega and bias.accumulate is not None:
        bias.accumulate({"left": omega["bias"]}, delta, bias.saved, square)


def _gradients_biased(
    role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...], product: Binding, bias: Binding
) -> Tensor:
    if role == "bias":
        return bias.gradients("left", target, delta, bias.saved)
    return product.gradients(role, target, delta, saved)
