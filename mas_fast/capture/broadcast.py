"""Rules for a parameter that broadcasts against data: x + b, x − b, w·x, x / w, w / x, token.expand(N, ...)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mas_fast.capture.binding import Binding, Delta, flattened, rule
from mas_fast.kernels import ops

# (role of the parameter, left operand, right operand) -> what δ is multiplied with: g_n = reduce(δ_n · factor_n)
Factor = Callable[[str, Tensor, Tensor], Tensor]


def repeated_axes(parameter: torch.Size, output: torch.Size) -> list[int]:
    """Return the axes of the output over which a parameter that broadcasts to it repeats."""
    missing = len(output) - len(parameter)
    return [a for a, size in enumerate(output) if a < missing or (parameter[a - missing] == 1 and size != 1)]


def _sums(target: torch.Size, delta: Delta) -> list[bool]:
    """Return for each axis of one sample of a split δ whether the parameter repeats over it."""
    output, layout = delta.value.shape, delta.layout
    repeated = repeated_axes(target, output)
    # `split` takes the sample axis away unless several positions of a sample were folded into it.
    gone = layout.axis if layout is not None and layout.single(output, delta.samples) else None
    return [a in repeated for a in range(len(output)) if a != gone]


def _rows(split: Tensor, sums: Sequence[bool]) -> Tensor | None:
    """Bring [N, *axes] to [N, R, K, S], axes to sum over before and after those to keep; None if they interleave."""
    kept = [axis for axis, summed in enumerate(sums) if not summed]
    first, last = (kept[0], kept[-1] + 1) if kept else (len(sums), len(sums))
    if any(sums[first:last]):
        return None
    sizes = split.shape[1:]
    return split.reshape(split.shape[0], sizes[:first].numel(), sizes[first:last].numel(), sizes[last:].numel())


def accumulate(
    omega: Mapping[str, Tensor], delta: Delta, saved: tuple[Any, ...], square: bool, factor: Factor | None
) -> None:
    """Add Σ_n |g_n| to Ω of a parameter that broadcasts to the output, g_n = δ · factor reduced to its shape."""
    ((role, target),) = omega.items()
    output = delta.value.shape
    sums = _sums(target.shape, delta)
    grad_output = delta.split(delta.value)
    # Data may be narrower than the result, or integers; the factor is formed in no less than the result's dtype.
    operands = [t.to(torch.promote_types(t.dtype, delta.value.dtype)) for t in saved]
    other = None if factor is None else delta.split(factor(role, *operands).broadcast_to(output))
    rows = _rows(grad_output, sums)
    if rows is None:
        product = grad_output if other is None else grad_output * other
        rows = product.sum([a + 1 for a, summed in enumerate(sums) if summed]).flatten(1)[:, None, :, None]
        other = None
    with flattened(target) as entries:
        if other is None:
            ops.accumulate_affine_(None, entries, rows, square=square)
        else:
            ops.accumulate_affine_(entries, None, rows, _rows(other, sums), square=square)


def gradients(role: str, target: Tensor, delta: Delta, saved: tuple[Any, ...], factor: Factor | None) -> Tensor:
    """Return g_n for every sample of δ's part, [n, *shape]."""
    output = delta.value.shape
    grad_output = delta.split(delta.value)
    if factor is not None:
        operands = [t.to(torch.promote_types(t.dtype, delta.value.dtype)) for t in saved]
        grad_output = grad_output * delta.split(factor(role, *operands).broadcast_to(output))
    axes = [a + 1 for a, summed in enumerate(_sums(target.shape, delta)) if summed]
    return (grad_output.sum(axes) if axes else grad_output).reshape(-1, *target.shape)


def _bind(
    name: str,
    roles: Mapping[str, Tensor],
    factor: Factor | None = None,
    inplace: bool = False,
    view: bool = False,
) -> Binding:
    saved = tuple(roles.values()) if factor is not None else ()
    if inplace and saved:
        # The call is about to overwrite its first argument.
        saved = (saved[0].detach().clone(), *saved[1:])
    return Binding(
        rule=name,
        roles=roles,
        saved=saved,
        accumulate=partial(accumulate, factor=factor),
        gradients=partial(gradients, factor=factor),
        axes=lambda output, target: repeated_axes(target, output),
        inplace=inplace,
        view=view,
        single=True,
    )


def _product_factor(role: str, left: Tensor, right: Tensor) -> Tensor:
    return right if role == "left" else left


def _quotient_factor(role: str, left: Tensor, right: Tensor) -> Tensor:
    return right.reciprocal() if role == "left" else left / right / right


def _register(
    name: str, functions: Sequence[str], factor: Factor | None, inplace: bool = False, swapped: bool = False
) -> None:
    def bind(
        input: Any, other: Any, *, alpha: float = 1, rounding_mode: str | None = None, out: Any = None
    ) -> Binding | None:
        if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        if alpha != 1 or rounding_mode is not None or out is not None:
            return None
        left, right = (other, input) if swapped else (input, other)
        return _bind(name, {"left": left, "right": right}, factor, inplace)

    owners = (torch, torch.Tensor)
    rule(*{getattr(owner, f) for owner in owners for f in functions if hasattr(owner, f)})(bind)


# The derivative of a sum or difference in either term is ±1, and |·| forgets the sign.
_register("add", ("add", "__add__", "__radd__"), None)
_register("add", ("add_", "__iadd__"), None, inplace=True)
_register("sub", ("sub", "subtract", "__sub__", "__rsub__", "rsub"), None)
_register("sub", ("sub_", "__isub__"), None, inplace=True)
_register("mul", ("mul", "multiply", "__mul__", "__rmul__"), _product_factor)
_register("mul", ("mul_", "__imul__"), _product_factor, inplace=True)
_register("div", ("div", "divide", "true_divide", "__truediv__", "__div__"), _quotient_factor)
_register("div", ("div_", "__itruediv__"), _quotient_factor, inplace=True)
_register("div", ("__rtruediv__", "__rdiv__"), _quotient_factor, swapped=True)


# Calls that repeat a parameter for every sample, and meet no data in doing so.
EXPANSIONS = frozenset(
    {torch.Tensor.expand, torch.Tensor.broadcast_to, torch.broadcast_to, torch.Tensor.expand_as, torch.Tensor.repeat}
)


@rule(torch.Tensor.expand, torch.Tensor.broadcast_to, torch.broadcast_to)
def expand(input: Tensor, *size: Any) -> Binding:
    """token.expand(N, ...): every sample gets the same values."""
    return _bind("expand", {"input": input}, view=True)


@rule(torch.Tensor.expand_as)
def expand_as(input: Tensor, other: Tensor) -> Binding | None:
    """token.expand_as(x)."""
    return expand(input)


@rule(torch.Tensor.repeat)
def repeat(input: Tensor, *repeats: Any) -> Binding | None:
    """token.repeat(N, 1, 1): as expand, where only axes of length 1 repeat."""
    counts = repeats[0] if repeats and not isinstance(repeats[0], int) else repeats
    own = counts[len(counts) - input.dim() :]
    if any(size != 1 and count != 1 for size, count in zip(input.shape, own, strict=True)):
        return None
    return _bind("expand", {"input": input})
