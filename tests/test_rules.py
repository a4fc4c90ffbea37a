"""Exactness of single rules: what a Binding adds to Ω for one call, against one backward of that call per sample."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from compare import relative_error
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mas_fast.capture import activation, bag, bilinear, linear, product, transposed  # noqa: F401  (register rules)
from mas_fast.capture.binding import Delta, bind
from mas_fast.capture.layout import Layout

SAMPLES = 3

# How the samples lie on an axis of 3 or 6 entries: to which of them each entry belongs.
OWNERS = {
    "outer": {3: [0, 1, 2], 6: [0, 0, 1, 1, 2, 2]},
    "inner": {3: [0, 1, 2], 6: [0, 1, 2, 0, 1, 2]},
    "rows": {3: [2, 0, 1], 6: [1, 0, 1, 2, 1, 0]},
}


def x(*shape):
    """Return random data, of few digits so that bfloat16 holds the same numbers."""
    return torch.randn(shape).bfloat16().double()


def w(*shape):
    """Return a random parameter."""
    return nn.Parameter(x(*shape))


def h(*shape):
    """Return data that require a gradient, as those of every hidden layer do."""
    return x(*shape).requires_grad_()


def ids(*shape):
    return torch.randint(0, 7, shape)


# name -> (function, arguments, keyword arguments, axis of the output that holds the samples)
CASES = {
    "conv_transpose1d": lambda: (F.conv_transpose1d, (x(3, 4, 5), w(4, 2, 3), w(2)), {}, 0),
    "conv_transpose1d_strided": lambda: (
        F.conv_transpose1d,
        (x(3, 4, 5), w(4, 2, 3), w(2), 2, 1, 1),
        {},
        0,
    ),
    "conv_transpose1d_folded": lambda: (F.conv_transpose1d, (x(6, 4, 5), w(4, 2, 3), w(2)), {"stride": 2}, 0),
    "conv_transpose1d_one_position": lambda: (F.conv_transpose1d, (x(3, 4, 1), w(4, 2, 3)), {"padding": 1}, 0),
    "conv_transpose2d": lambda: (F.conv_transpose2d, (x(3, 4, 5, 3), w(4, 2, 3, 2), w(2)), {}, 0),
    "conv_transpose2d_groups": lambda: (
        F.conv_transpose2d,
        (x(3, 4, 5, 3), w(4, 3, 3, 2), w(6)),
        {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2), "groups": 2},
        0,
    ),
    "conv_transpose2d_depthwise": lambda: (F.conv_transpose2d, (x(3, 4, 5, 3), w(4, 1, 3, 3)), {"groups": 4}, 0),
    "conv_transpose2d_dilated": lambda: (
        F.conv_transpose2d,
        (x(3, 4, 5, 3), w(4, 2, 3, 2), w(2)),
        {"stride": 2, "padding": 1, "dilation": (2, 3), "output_padding": 1},
        0,
    ),
    # With a dilation, the output_padding may be a stride or more.
    "conv_transpose2d_overhang": lambda: (
        F.conv_transpose2d,
        (x(3, 4, 5, 3), w(4, 2, 3, 2), w(2), 1, (2, 0), (1, 2), 1, (3, 3)),
        {},
        0,
    ),
    "conv_transpose2d_folded": lambda: (
        F.conv_transpose2d,
        (x(6, 4, 5, 3), w(4, 2, 3, 2), w(4)),
        {"stride": 2, "groups": 2, "padding": 1, "output_padding": 1},
        0,
    ),
    "conv_transpose2d_wide_padding": lambda: (F.conv_transpose2d, (x(3, 2, 5, 5), w(2, 2, 2, 2)), {"padding": 2}, 0),
    "conv_transpose3d": lambda: (
        F.conv_transpose3d,
        (x(3, 2, 3, 2, 3), w(2, 2, 2, 3, 1), w(2)),
        {"stride": (2, 1, 2), "padding": (0, 1, 0), "output_padding": (1, 0, 0)},
        0,
    ),
    "conv_transpose3d_folded": lambda: (
        F.conv_transpose3d,
        (x(6, 2, 3, 2, 3), w(2, 2, 2, 3, 1), w(2)),
        {"stride": 2, "output_padding": 1},
        0,
    ),
    "bag_mean": lambda: (F.embedding_bag, (ids(3, 5), w(7, 4)), {}, 0),
    "bag_sum": lambda: (F.embedding_bag, (ids(6, 5), w(7, 4)), {"mode": "sum"}, 0),
    "bag_one_id": lambda: (F.embedding_bag, (ids(3, 1), w(7, 4)), {}, 0),
    "bag_int32": lambda: (F.embedding_bag, (ids(6, 5).int(), w(7, 4)), {"mode": "sum"}, 0),
    "bag_weighted": lambda: (
        F.embedding_bag,
        (ids(6, 5), w(7, 4)),
        {"mode": "sum", "per_sample_weights": x(6, 5)},
        0,
    ),
    "bag_padded_mean": lambda: (F.embedding_bag, (ids(6, 5), w(7, 4)), {"padding_idx": -3}, 0),
    "bag_padded_sum": lambda: (F.embedding_bag, (ids(6, 5), w(7, 4)), {"padding_idx": 2, "mode": "sum"}, 0),
    "bag_padded_weighted": lambda: (
        F.embedding_bag,
        (ids(6, 5), w(7, 4)),
        {"mode": "sum", "per_sample_weights": x(6, 5), "padding_idx": 1},
        0,
    ),
    # Bags 1, 2 and the last one are empty.
    "bag_offsets_mean": lambda: (
        F.embedding_bag,
        (ids(11), w(7, 4), torch.tensor([0, 2, 2, 2, 7, 11])),
        {"padding_idx": 0},
        0,
    ),
    "bag_offsets_weighted": lambda: (
        F.embedding_bag,
        (ids(11), w(7, 4), torch.tensor([0, 3, 4])),
        {"mode": "sum", "per_sample_weights": x(11)},
        0,
    ),
    "bag_last_offset": lambda: (
        F.embedding_bag,
        (ids(11), w(7, 4), torch.tensor([0, 3, 4, 4, 6, 7, 11])),
        {"include_last_offset": True},
        0,
    ),
    "bag_all_empty": lambda: (F.embedding_bag, (ids(0), w(7, 4), torch.zeros(3).long()), {}, 0),
    "matmul_left": lambda: (torch.matmul, (w(5, 4), x(4, 3)), {}, 1),
    "matmul_left_folded": lambda: (torch.Tensor.matmul, (w(5, 4), h(4, 6)), {}, 1),
    "matmul_left_square": lambda: (torch.mm, (w(3, 3), h(3, 3)), {}, 1),
    "matmul_left_picked": lambda: (torch.matmul, (w(4, 5).mT, h(4, 3)), {}, 1),
    "matmul_left_experts": lambda: (torch.matmul, (w(2, 5, 4), h(4, 6)), {}, 2),
    "matmul_left_stack": lambda: (torch.matmul, (w(5, 4), h(6, 4, 2)), {}, 0),
    "matmul_left_stack_last": lambda: (torch.matmul, (w(5, 4), h(2, 4, 3)), {}, 2),
    "matmul_left_deep": lambda: (torch.matmul, (w(5, 4), h(2, 3, 4, 2)), {}, 1),
    "matmul_right_hidden": lambda: (torch.matmul, (h(3, 2, 4), w(4, 5)), {}, 0),
    "matmul_right_picked": lambda: (torch.matmul, (h(6, 4), w(5, 4).mT), {}, 0),
    "matmul_right_vector": lambda: (torch.matmul, (h(3, 2, 4), w(4)), {}, 0),
    "matmul_left_vector": lambda: (torch.matmul, (w(4), h(3, 4, 2)), {}, 0),
    "matmul_experts": lambda: (torch.matmul, (h(2, 6, 4), w(2, 4, 5)), {}, 1),
    "matmul_experts_stack": lambda: (torch.matmul, (h(3, 2, 6, 4), w(2, 4, 5)), {}, 0),
    "matmul_experts_broadcast": lambda: (torch.matmul, (h(6, 1, 2, 4), w(5, 4, 3)), {}, 0),
    "matmul_experts_left": lambda: (torch.matmul, (w(2, 5, 4), h(3, 2, 4, 2)), {}, 0),
    "matmul_experts_repeated": lambda: (torch.matmul, (h(2, 3, 2, 4), w(2, 1, 4, 5)), {}, 1),
    "matmul_stacked_once": lambda: (torch.matmul, (h(3, 6, 4), w(1, 4, 5)), {}, 0),
    "matmul_experts_of_one": lambda: (torch.matmul, (h(2, 3, 4), w(2, 4, 1)), {}, 1),
    "matmul_experts_strided": lambda: (torch.matmul, (h(2, 3, 4), w(4, 2, 5).transpose(0, 1)), {}, 1),
    "bmm_right": lambda: (torch.bmm, (h(2, 6, 4), w(2, 4, 5)), {}, 1),
    "bmm_left": lambda: (torch.bmm, (w(2, 5, 4), h(2, 4, 3)), {}, 2),
    "baddbmm": lambda: (torch.baddbmm, (w(2, 1, 5), h(2, 6, 4), w(2, 4, 5)), {}, 1),
    "baddbmm_one_bias": lambda: (torch.baddbmm, (w(5), h(2, 3, 4), w(2, 4, 5)), {}, 1),
    "baddbmm_column_bias": lambda: (torch.Tensor.baddbmm, (w(2, 5, 1), w(2, 5, 4), h(2, 4, 6)), {}, 2),
    "mv": lambda: (torch.mv, (h(6, 4), w(4)), {}, 0),
    "inner": lambda: (torch.inner, (h(2, 3, 4), w(5, 4)), {}, 1),
    "inner_left": lambda: (torch.inner, (w(5, 4), h(3, 4)), {}, 1),
    "outer": lambda: (torch.outer, (h(6), w(4)), {}, 0),
    "tensordot": lambda: (torch.tensordot, (h(3, 2, 4), w(2, 4, 5)), {}, 0),
    "tensordot_lists": lambda: (torch.tensordot, (h(3, 2, 4), w(5, 4, 2)), {"dims": ([1, -1], [2, 1])}, 0),
    "tensordot_left": lambda: (torch.tensordot, (w(5, 4), h(4, 2, 6), 1), {}, 2),
    "einsum_linear": lambda: (torch.einsum, ("bti, oi -> bto", h(3, 2, 4), w(5, 4)), {}, 0),
    "einsum_list": lambda: (torch.einsum, ("oi,bi->bo", [w(5, 4), h(6, 4)]), {}, 0),
    "einsum_implicit": lambda: (torch.einsum, ("nc,cz", h(6, 4), w(4, 2)), {}, 0),
    "einsum_implicit_order": lambda: (torch.einsum, ("zc,ca", h(3, 4), w(4, 2)), {}, 1),
    "einsum_heads": lambda: (torch.einsum, ("bthd,hde->bthe", h(3, 2, 4, 5), w(4, 5, 2)), {}, 0),
    "einsum_heads_permuted": lambda: (torch.einsum, ("bthd,dhe->ehtb", h(6, 2, 4, 5), w(5, 4, 2)), {}, 3),
    "einsum_split_heads": lambda: (torch.einsum, ("btd,hde->bhte", h(3, 2, 5), w(4, 5, 2)), {}, 0),
    "einsum_merge_heads": lambda: (torch.einsum, ("bhtd,hde->bte", h(3, 4, 2, 5), w(4, 5, 2)), {}, 0),
    "einsum_sum_then_project": lambda: (torch.einsum, ("btd,de->be", h(3, 2, 5), w(5, 2)), {}, 0),
    "einsum_scale": lambda: (torch.einsum, ("btd,d->btd", h(6, 2, 5), w(5)), {}, 0),
    "einsum_heads_scores": lambda: (torch.einsum, ("bthd,hd->bth", h(6, 2, 4, 5), w(4, 5)), {}, 0),
    "einsum_outer": lambda: (torch.einsum, ("b,o->bo", h(6), w(5)), {}, 0),
    "einsum_folded_positions": lambda: (torch.einsum, ("tbi,io->tbo", h(2, 6, 4), w(4, 5)), {}, 1),
    "einsum_length_one": lambda: (torch.einsum, ("bi,io->bo", h(3, 4), w(1, 5)), {}, 0),
    "einsum_ellipsis": lambda: (torch.einsum, ("...i,io->...o", h(3, 2, 4), w(4, 5)), {}, 0),
    "einsum_ellipsis_both": lambda: (torch.einsum, ("...ti,...io->...to", h(3, 2, 2, 4), w(2, 4, 5)), {}, 0),
    "einsum_ellipsis_implicit": lambda: (torch.einsum, ("...i,io", h(3, 2, 4), w(4, 5)), {}, 0),
    "bilinear": lambda: (F.bilinear, (h(3, 2), h(3, 4), w(5, 2, 4), w(5)), {}, 0),
    "bilinear_positions": lambda: (F.bilinear, (h(3, 6, 2), h(3, 6, 4), w(5, 2, 4)), {}, 1),
    "bilinear_strided": lambda: (F.bilinear, (h(6, 2), h(6, 4), w(4, 5, 2).permute(1, 2, 0), w(5)), {}, 0),
    "prelu": lambda: (F.prelu, (h(3, 4, 2), w(4)), {}, 0),
    "prelu_one": lambda: (F.prelu, (h(6, 4, 2), w(1)), {}, 0),
    "prelu_features": lambda: (F.prelu, (h(6, 4), w(4)), {}, 0),
    "prelu_samples_last": lambda: (F.prelu, (h(2, 4, 3), w(4)), {}, 2),
    "prelu_vector": lambda: (F.prelu, (h(6), w(1)), {}, 0),
    "where": lambda: (torch.where, (x(3, 2, 4) > 0, w(4), h(3, 2, 4)), {}, 0),
    "where_other": lambda: (torch.where, (x(6, 2, 1) > 0, 0.0, w(4)), {}, 0),
    "where_method": lambda: (torch.Tensor.where, (w(2, 1), x(6, 2, 4) > 0, h(6, 2, 4)), {}, 0),
    "lerp": lambda: (torch.lerp, (h(3, 2, 4), w(4), 0.3), {}, 0),
    "lerp_start": lambda: (torch.lerp, (w(2, 4), h(6, 2, 4), 0.3), {}, 0),
    "lerp_weight": lambda: (torch.lerp, (h(6, 2, 4), h(6, 2, 4), w(4)), {}, 0),
    "lerp_end_weighted": lambda: (torch.lerp, (h(6, 2, 4), w(2, 4), h(6, 2, 4)), {}, 0),
    "addcmul": lambda: (torch.addcmul, (h(6, 2, 4), h(6, 2, 4), w(4)), {"value": 0.5}, 0),
    "addcmul_input": lambda: (torch.addcmul, (w(4), h(3, 2, 4), h(3, 2, 4)), {}, 0),
    "addcmul_left": lambda: (torch.addcmul, (h(3, 2, 4), w(2, 1), h(3, 2, 4)), {}, 0),
}


# Calls that have no axis of samples: the batch is one sample.
SINGLES = {
    "conv_transpose2d_without_batch": lambda: (F.conv_transpose2d, (x(4, 5, 3), w(4, 2, 3, 2), w(2)), {}, None),
    "matmul_row": lambda: (torch.matmul, (h(4), w(4, 5)), {}, None),
    "matmul_column": lambda: (torch.matmul, (w(5, 4), h(4)), {}, None),
    "mv_left": lambda: (torch.mv, (w(5, 4), h(4)), {}, None),
    "dot": lambda: (torch.dot, (h(4), w(4)), {}, None),
    "einsum_scalar": lambda: (torch.einsum, ("ij,ji->", w(3, 4), h(4, 3)), {}, None),
}


class Call:
    """One call with random data, random δ, and the gradients of every sample by autograd."""

    def __init__(self, name, order, seed=0, narrow=False, axis=None):
        torch.manual_seed(seed)
        function, args, kwargs, own = (CASES | SINGLES)[name]()
        axis = own if axis is None else axis
        output = function(*args, **kwargs)
        delta = x(*output.shape)
        self.axis, self.shape = axis, output.shape
        self.delta = Delta(delta, *_layout(order, axis, output.shape))
        self.binding = bind(function, args, kwargs)
        assert self.binding is not None
        self.targets = {role: t for role, t in self.binding.roles.items() if t is not None and _is_parameter(t)}
        if narrow:
            args, kwargs = tree_map_only(Tensor, _narrow, (args, kwargs))
            self.binding = bind(function, args, kwargs)
            self.delta = self.delta._replace(value=delta.bfloat16())
        self.saved = tuple(t.detach() for t in self.binding.saved)
        parts = [delta]
        if order != "whole":
            owners = torch.tensor(OWNERS[order][output.shape[axis]])
            mask = [(owners == n).view(-1, *[1] * (output.dim() - axis - 1)) for n in range(SAMPLES)]
            parts = [delta * m for m in mask]
        self.truth = {
            role: torch.stack([torch.autograd.grad(output, t, d, retain_graph=True)[0] for d in parts])
            for role, t in self.targets.items()
        }


def _is_parameter(t: Tensor) -> bool:
    """Parameters, and what was picked from them; other data that requires a gradient is a leaf of its own."""
    return isinstance(t, nn.Parameter) or t.grad_fn is not None


def _narrow(t: Tensor) -> Tensor:
    """Convert to bfloat16 what is floating-point, and leave parameters, what was picked from them, and data as such."""
    if not t.is_floating_point() or t.grad_fn is not None:
        return t.bfloat16() if t.is_floating_point() else t
    narrow = t.detach().bfloat16()
    return nn.Parameter(narrow) if isinstance(t, nn.Parameter) else narrow.requires_grad_(t.requires_grad)


def _layout(order, axis, shape):
    if order == "whole":
        return None, 1
    if order != "rows":
        return Layout(axis, order), SAMPLES
    owners = OWNERS["rows"][shape[axis]]
    own = [[place for place, owner in enumerate(owners) if owner == n] for n in range(SAMPLES)]
    longest = max(map(len, own))
    return Layout(axis, "rows", torch.tensor([row + [-1] * (longest - len(row)) for row in own])), SAMPLES


def _magnitude(gradients, square):
    return (gradients.square() if square else gradients.abs()).sum(0)


def _empty(target, strided, dtype=torch.float64):
    """Return Ω of ones: what was there must stay. Strided, its axes lie in memory in the opposite order."""
    if strided:
        return torch.ones(target.shape[::-1], dtype=dtype).permute(*reversed(range(target.dim())))
    return torch.ones(target.shape, dtype=dtype)


# Every case with every order; without an axis of samples, only as one sample.
EVERY = [(name, order) for name in CASES for order in (*OWNERS, "whole")] + [(name, "whole") for name in SINGLES]


@pytest.mark.parametrize("name, order", EVERY)
def test_accumulate(name, order):
    call = Call(name, order)
    assert call.targets
    for role, target in call.targets.items():
        for square, strided in ((False, False), (True, True)):
            omega = _empty(target, strided)
            call.binding.accumulate({role: omega}, call.delta, call.saved, square)
            assert relative_error(omega, 1 + _magnitude(call.truth[role], square)) <= 1e-12


@pytest.mark.parametrize("name, order", EVERY)
def test_gradients(name, order):
    call = Call(name, order)
    for role, target in call.targets.items():
        for part in (slice(None), slice(0, 1)) if order == "whole" else (slice(None), slice(1, 3), slice(0, 1)):
            actual = call.binding.gradients(role, target, call.delta._replace(part=part), call.saved)
            truth = call.truth[role][part]
            assert actual.shape == truth.shape
            assert relative_error(actual, truth) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_any_candidate_may_hold_the_samples(name):
    call = Call(name, "outer")
    for role, target in call.targets.items():
        candidates = set(call.binding.axes(call.shape, target.shape))
        assert call.axis in candidates
        for axis in candidates:
            if call.shape[axis] in OWNERS["outer"]:
                other = Call(name, "outer", axis=axis)
                omega = _empty(target, False)
                other.binding.accumulate({role: omega}, other.delta, other.saved, False)
                assert relative_error(omega, 1 + _magnitude(other.truth[role], False)) <= 1e-12


@pytest.mark.parametrize("name", SINGLES)
def test_no_axis_is_a_candidate(name):
    call = Call(name, "whole")
    for target in call.targets.values():
        assert set(call.binding.axes(call.shape, target.shape)) == set()


@pytest.mark.parametrize("name", CASES)
def test_all_roles_at_once(name):
    call = Call(name, "outer")
    omega = {role: torch.zeros_like(target).detach() for role, target in call.targets.items()}
    call.binding.accumulate(omega, call.delta, call.saved, False)
    for role, total in omega.items():
        assert relative_error(total, _magnitude(call.truth[role], False)) <= 1e-12


@pytest.mark.parametrize("order", ["outer", "inner"])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_accumulates_in_float32(name, order):
    call = Call(name, order, narrow=True)
    for role, target in call.targets.items():
        omega = _empty(target, False, torch.float32)
        call.binding.accumulate({role: omega}, call.delta, call.saved, False)
        assert relative_error(omega, 1 + _magnitude(call.truth[role], False)) <= 1e-6


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("matmul", "bmm", "einsum"))])
def test_join(name):
    calls = [Call(name, "outer", seed) for seed in (1, 2)]
    for role, target in calls[0].targets.items():
        assert calls[0].binding.join is calls[1].binding.join is not None
        omega = _empty(target, False)
        calls[0].binding.join(omega, role, [(call.delta, call.saved) for call in calls], False)
        truth = _magnitude(sum(call.truth[role] for call in calls), False)
        assert relative_error(omega, 1 + truth) <= 1e-12


# Axes that parameter and output share hold no samples in any model we know; should it be so, the sums must be right.
@pytest.mark.parametrize("order", [*OWNERS])
@pytest.mark.parametrize(
    "function, shapes, axis",
    [(torch.mm, ((6, 4), (4, 2)), 0), (torch.bmm, ((3, 2, 4), (3, 4, 2)), 0), (torch.matmul, ((3, 3), (3, 3)), 0)],
)
def test_samples_that_own_entries_of_the_parameter(function, shapes, axis, order):
    CASES["owned"] = lambda: (function, (w(*shapes[0]), h(*shapes[1])), {}, axis)
    try:
        test_accumulate("owned", order)
        test_gradients("owned", order)
    finally:
        del CASES["owned"]


@pytest.mark.parametrize(
    "function, args, kwargs",
    [
        (F.embedding_bag, (ids(3, 5), w(7, 4)), {"mode": "max"}),
        (F.embedding_bag, (ids(3, 5), w(7, 4)), {"max_norm": 1.0}),
        (F.embedding_bag, (ids(5), w(7, 4), torch.tensor([0, 2, 4])), {"include_last_offset": True}),
        (torch.baddbmm, (w(5), x(2, 3, 4), w(2, 4, 5)), {"alpha": 2}),
        (torch.einsum, ("bii,io->bo", x(3, 4, 4), w(4, 5)), {}),
        (torch.einsum, ("bi,io,b->bo", x(3, 4), w(4, 5), x(3)), {}),
        (torch.einsum, (x(3, 4), [0, 1], w(4, 5), [1, 2]), {}),
        (torch.tensordot, (x(3, 4), w(4, 5), torch.tensor([[1], [0]])), {}),
    ],
)
def test_no_rule(function, args, kwargs):
    assert bind(function, args, kwargs) is None


def test_a_parameter_that_is_summed_by_itself_has_no_role():
    assert bind(torch.einsum, ("bi,iok->bo", x(3, 4), w(4, 5, 2)), {}).roles == {}


def test_hand_computed_left_product():
    # y = W x for the columns x = (1, 0) and (−1, 1): δ = (2, 6) and (2, 2).
    weight, data = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    binding = bind(torch.matmul, (weight, data), {})
    delta = Delta(2 * (weight @ data).detach(), Layout(1), 2)
    omega = torch.zeros(2, 2)
    binding.accumulate({"left": omega}, delta, binding.saved, False)
    # |δ xᵀ|: [[2, 0], [6, 0]] + [[2, 2], [2, 2]]
    assert omega.tolist() == [[4.0, 2.0], [8.0, 2.0]]
