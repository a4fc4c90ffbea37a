"""What mas_fast computes, in plain torch: read this page to learn what the package means.

    Ω = (1/N) Σ_n |∂‖F(x_n; θ)‖² / ∂θ|        (Aljundi et al., Memory Aware Synapses, ECCV 2018, Eq. 2)

`importance_loop` is that formula for a whole model, one sample at a time: slow, obviously right, and what the tests
call truth. The `accumulate_*_` functions are the same sum for one layer, when its input x and the gradient δ of its
output are known for a whole batch; compiled kernels replace them, and are tested against them. Nothing of ours is
imported here, but the way around an error of torch's own.

Letters: N samples, T positions per sample, O outputs, I inputs, V vocabulary, D embedding width, K entries of a vector
parameter, R and S positions before and after it. x is `input`, δ = ∂objective/∂output is `grad_output`.
`square=True` gives Σ_n g_n² (the exact diagonal empirical Fisher of the objective) instead of Σ_n |g_n|.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mas_fast.batch_norm import RightBatchNorm

# A chunk of per-sample gradients that the reference kernels may hold at once: 64 MiB in float32.
CHUNK_ENTRIES = 1 << 24

LABEL_KEYS = ("labels", "label", "label_ids")


def l2_squared(output: Tensor) -> Tensor:
    """Return ‖F(x_n)‖² for each sample: [N, ...] -> [N]. The objective of the paper (Sec. 4.1)."""
    return output.flatten(1).square().sum(1) if output.dim() > 1 else output.square()


def l2(output: Tensor) -> Tensor:
    """Return ‖F(x_n)‖ for each sample: [N, ...] -> [N]. The objective of FACIL's implementation."""
    return torch.linalg.vector_norm(output.flatten(1), dim=1) if output.dim() > 1 else output.abs()


def l1(output: Tensor) -> Tensor:
    """Return Σ|F(x_n)| for each sample: [N, ...] -> [N]."""
    return output.flatten(1).abs().sum(1) if output.dim() > 1 else output.abs()


OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {"l2_squared": l2_squared, "l2": l2, "l1": l1}


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model: tensor -> model(b); tuple or list -> model(b[0]); mapping -> model(**b without labels).

    Raises:
        TypeError: The batch is none of these, or holds no tensor.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return model(batch[0])
    if isinstance(batch, Mapping) and any(isinstance(value, Tensor) for value in batch.values()):
        return model(**{key: value for key, value in batch.items() if key not in LABEL_KEYS})
    raise TypeError(
        "batch must be a tensor, a tuple or list that starts with a tensor, or a mapping that holds tensors, got "
        f"{_describe(batch)}; pass forward=lambda model, batch: ... to say how the model is called"
    )


def output_tensor(output: Any) -> Tensor:
    """Return the tensor whose norm counts: the output itself, its .logits, or its .last_hidden_state.

    Raises:
        TypeError: None of the three is a tensor.
        ValueError: The tensor is a scalar, so that it has no sample axis.
    """
    for candidate in (output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)):
        if isinstance(candidate, Tensor):
            if candidate.dim() == 0:
                raise ValueError(
                    "output must have the samples on its first axis, got a scalar; return one row per sample"
                )
            return candidate
    raise TypeError(
        f"output must be a tensor or have .logits or .last_hidden_state, got {_describe(output)}; "
        "pass forward=lambda model, batch: ... that returns the tensor"
    )


def sample_objective(objective: str | Callable[[Any], Tensor], output: Any) -> Tensor:
    """Return one scalar per sample, [N], from a model's output.

    Args:
        objective: "l2_squared", "l2", "l1", or a callable from the model's output to [N] scalars.
        output: What the model (or `forward`) returned.

    Raises:
        ValueError: The name is unknown, or the objective is not one scalar per sample.
        TypeError: The output has no obvious tensor, or the objective is not a tensor.
    """
    if callable(objective):
        values = objective(output)
        if not isinstance(values, Tensor):
            raise TypeError(f"objective must return a tensor of one scalar per sample, got {_describe(values)}")
    elif objective in OBJECTIVES:
        values = OBJECTIVES[objective](output_tensor(output))
    else:
        raise ValueError(f"objective must be one of {sorted(OBJECTIVES)} or a callable, got {objective!r}")
    if values.dim() != 1:
        raise ValueError(
            f"objective must be one scalar per sample, shape [N], got shape {list(values.shape)}; "
            "sum over everything but the sample axis"
        )
    if values.shape[0] == 0:
        raise ValueError("batch must hold at least one sample, got an objective of shape [0]")
    if not values.is_floating_point():
        raise TypeError(
            f"objective must be real floating-point, got {values.dtype}; for complex outputs, use their abs()"
        )
    return values


def importance_loop(
    model: nn.Module,
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    objective: str | Callable[[Any], Tensor] = "l2_squared",
    statistic: str = "abs",
    dtype: torch.dtype | None = torch.float64,
) -> dict[str, Tensor]:
    """Compute Ω by one backward per sample: the definition, and the truth that everything else is tested against.

    Ω = (1/N) Σ_n |∂objective_n/∂θ|, or (1/N) Σ_n (∂objective_n/∂θ)² with statistic="square".

    Args:
        model: Any model; a copy of it is run in eval mode, so it is left untouched.
        batch: As for `estimate_importance`. Samples share a forward: pass batches of one sample if they interact.
        forward: Callable (model, batch) -> output; by default see `default_forward`.
        objective: Name or callable, see `sample_objective`.
        statistic: "abs" or "square".
        dtype: Floating dtype to which model and batch are converted; None leaves both as they are.

    Returns:
        Name -> Ω, in the dtype of the (converted) parameters, for every parameter that requires a gradient.
    """
    with torch.inference_mode(False), torch.enable_grad(), RightBatchNorm():
        model = copy.deepcopy(model).eval()
        # What was made in inference mode cannot be saved for a backward; a clone can.
        batch = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, batch)
        if dtype is not None:
            model = model.to(dtype)
            batch = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        omega = {name: torch.zeros_like(p) for name, p in parameters.items()}
        objectives = sample_objective(objective, (forward or default_forward)(model, batch))
        for gradients in sample_gradients(objectives, list(parameters.values()), model):
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    omega[name] += magnitude(gradient, statistic == "square")
    return {name: total / len(objectives) for name, total in omega.items()}


def sample_gradients(
    values: Tensor, parameters: Sequence[Tensor], model: nn.Module
) -> Iterator[Sequence[Tensor | None]]:
    """Walk over ∂value/∂θ of all values [N], of each by a backward of its own; None for a parameter that it misses.

    A reentrant activation checkpoint shows `torch.autograd.grad` no parameters: where one is in the graph, gradients
    are taken from `.grad`, of the model and of what else the graph shows, and what was there is put back.
    """
    nodes = list(graph_nodes(values))
    if not any(name == "CheckpointFunctionBackward" for _, name, _ in nodes):
        for value in values:
            yield torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return
    seen = [node.variable for node, _, _ in nodes if hasattr(node, "variable")]
    leaves = [*parameters, *model.parameters(), *seen]
    for value in values:
        with without_gradients(leaves):
            torch.autograd.backward(value, retain_graph=True)
            gradients = [parameter.grad for parameter in parameters]
        yield gradients


@contextmanager
def without_gradients(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Take `.grad` from leaves, and put it back at the end.

    So with hooks on complete gradients: they are for training, and an optimizer may step in them.
    """
    own = [(leaf, leaf.grad, leaf._post_accumulate_grad_hooks) for leaf in {id(t): t for t in leaves}.values()]
    try:
        for leaf, _, hooks in own:
            leaf.grad = None
            if hooks:
                leaf._post_accumulate_grad_hooks = OrderedDict()  # None would leave them in place
        yield
    finally:
        for leaf, gradient, hooks in own:
            leaf.grad = gradient
            if hooks:
                leaf._post_accumulate_grad_hooks = hooks


def graph_nodes(values: Tensor) -> Iterator[tuple[Any, str, str]]:
    """Walk over all nodes of a graph: each with its name, and with that of a node that uses it."""
    seen, stack = set(), [(values.grad_fn, "")]
    while stack:
        node, user = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        yield node, name, user
        stack.extend((function, name) for function, _ in node.next_functions)


def magnitude(gradient: Tensor, square: bool) -> Tensor:
    """Return |g| or g²."""
    return gradient.square() if square else gradient.abs()


@torch.no_grad()
def accumulate_linear_(omega: Tensor, grad_output: Tensor, input: Tensor, square: bool = False) -> None:
    """Add Σ_n |Σ_t δ_nt x_ntᵀ| to omega: the weight of a linear layer, y = W x.

    Args:
        omega: [O, I], changed in place.
        grad_output: δ [N, T, O].
        input: x [N, T, I].
        square: Σ_n (·)² instead of Σ_n |·|.
    """
    samples, positions, _ = grad_output.shape
    if positions == 1:
        # |δ xᵀ| = |δ| |x|ᵀ, so one matrix product sums all samples.
        delta, x = (magnitude(t.squeeze(1).to(omega.dtype), square) for t in (grad_output, input))
        omega.addmm_(delta.T, x)
        return
    step = max(1, CHUNK_ENTRIES // max(1, omega.numel()))
    for start in range(0, samples, step):
        delta = grad_output[start : start + step].to(omega.dtype)
        x = input[start : start + step].to(omega.dtype)
        omega += magnitude(delta.mT @ x, square).sum(0)  # [n, O, I] -> [O, I]


@torch.no_grad()
def accumulate_conv_(
    omega: Tensor,
    grad_output: Tensor,
    input: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    square: bool = False,
) -> None:
    """Add Σ_n |∂⟨δ_n, conv(x_n, W)⟩/∂W| to omega: the weight of a convolution over 1, 2 or 3 axes.

    Args:
        omega: [O, I/groups, *kernel], changed in place.
        grad_output: δ [N, O, *out].
        input: x [N, I, *in].
        stride: One number per axis.
        padding: Zeros on both sides, one number per axis.
        dilation: One number per axis.
        groups: Channel groups.
        square: Σ_n (·)² instead of Σ_n |·|.
    """
    # Of the weight, only shape and dtype count for its own gradient: Ω stands in for it.
    for delta, x in zip(grad_output.to(omega.dtype).split(1), input.to(omega.dtype).split(1), strict=True):
        _, gradient, _ = torch.ops.aten.convolution_backward(
            delta, x, omega, None, stride, padding, dilation, False, [0] * len(stride), groups, [False, True, False]
        )
        omega += magnitude(gradient, square)


@torch.no_grad()
def accumulate_embedding_(
    omega: Tensor, grad_output: Tensor, ids: Tensor, padding_idx: int = -1, square: bool = False
) -> None:
    """Add Σ_n |Σ_{t: ids_nt = v} δ_nt| to every row v of omega: the weight of an embedding.

    Args:
        omega: [V, D], changed in place.
        grad_output: δ [N, T, D].
        ids: int64 [N, T], each in [0, V).
        padding_idx: Row that gets nothing; negative for none.
        square: Σ_n (·)² instead of Σ_n |·|.
    """
    sample = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)
    kept = ids != padding_idx  # [N, T] -> P kept positions
    pairs, slot = torch.unique(sample[kept] * omega.shape[0] + ids[kept], return_inverse=True)
    sums = omega.new_zeros(pairs.shape[0], omega.shape[1])
    sums.index_add_(0, slot, grad_output[kept].to(omega.dtype))
    omega.index_add_(0, pairs % max(1, omega.shape[0]), magnitude(sums, square))


@torch.no_grad()
def accumulate_affine_(
    omega_weight: Tensor | None,
    omega_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    square: bool = False,
) -> None:
    """Add Σ_n |Σ_rs δ x̂| to omega_weight and Σ_n |Σ_rs δ| to omega_bias: y = w x̂ + b with x̂ = (x − mean)·rstd.

    Biases, norms in every form, scales and shifts that broadcast are all of this shape.

    Args:
        omega_weight: [K], changed in place, or None.
        omega_bias: [K], changed in place, or None.
        grad_output: δ [N, R, K, S].
        input: x, of the shape of δ; needed with omega_weight.
        mean: Broadcasts to the shape of δ; None is 0.
        rstd: Broadcasts to the shape of δ; None is 1.
        square: Σ_n (·)² instead of Σ_n |·|.
    """
    dtype = (omega_weight if omega_weight is not None else omega_bias).dtype  # type: ignore[union-attr]
    delta = grad_output.to(dtype)
    if omega_bias is not None:
        omega_bias += magnitude(delta.sum((1, 3)), square).sum(0)  # [N, R, K, S] -> [N, K] -> [K]
    if omega_weight is not None and input is not None:
        x = input.to(dtype)
        x = x if mean is None else x - mean
        x = x if rstd is None else x * rstd
        omega_weight += magnitude((delta * x).sum((1, 3)), square).sum(0)


@torch.no_grad()
def linear_(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write x Wᵀ + b to output: a linear layer itself, and, with Wᵀ for W, the gradient of its input.

    Args:
        output: [R, O], written to.
        input: x [R, I], any number of rows.
        weight: W [O, I].
        bias: b [O], or None.
    """
    output.copy_(torch.nn.functional.linear(input, weight, bias))


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)[:8]}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {[type(item).__name__ for item in value[:4]]}"
    return type(value).__name__
