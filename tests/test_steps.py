"""The ops of the training step: against their references, against float64, and on what they must refuse."""

import itertools

import pytest
import torch
from compare import assert_as_accurate, relative_error

from mas_fast import reference_steps as reference
from mas_fast.kernels import ops, steps

compiled = torch.ops.mas_fast

SIZES = (1, 7, 127, 128, 1024, 1025, 40_000, 0)
NONE = torch.empty(0)
# (θ, Ω, θ*, gradient and state)
DTYPES = [
    (torch.float32, torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.uint8, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.uint8, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float16, torch.float16),
    (torch.float16, torch.float32, torch.float32, torch.float32),
    (torch.float64, torch.float64, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float32, torch.float64),
    (torch.float32, torch.float64, torch.float32, torch.float32),
    (torch.float64, torch.uint8, torch.bfloat16, torch.float64),
]
SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "first": {"momentum": 0.9, "dampening": 0.5, "first": True},
    "dampening": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov_first": {"momentum": 0.9, "nesterov": True, "first": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "implicit": {"implicit": True},
    "implicit_momentum": {"implicit": True, "momentum": 0.9, "nesterov": True, "maximize": True},
}
ADAMW = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.01},
    "implicit": {"implicit": True},
    "implicit_amsgrad": {"implicit": True, "amsgrad": True, "weight_decay": 0.01},
}


def held(dtypes, sizes=SIZES):
    """Draw θ, Ω, θ* and gradients; one entry has no Ω."""
    torch.manual_seed(0)
    of_theta, of_omega, of_anchor, of_grad = dtypes
    thetas = [torch.randn(size).to(of_theta) for size in sizes]
    omegas = [(torch.randn(size) * torch.randn(size)).abs() for size in sizes]
    scales = [NONE] * len(sizes)
    if of_omega == torch.uint8:
        omegas, scales = map(list, zip(*map(steps.encode_omega, omegas), strict=True))
    else:
        omegas = [omega.to(of_omega) for omega in omegas]
    anchors = [torch.randn(size).to(of_anchor) for size in sizes]
    if len(sizes) > 2:
        omegas[2], scales[2], anchors[2] = omegas[2][:0], scales[2][:0], anchors[2][:0]
    lams = [0.3 + 0.1 * i for i in range(len(sizes))]
    return thetas, [torch.randn(size).to(of_grad) for size in sizes], (omegas, scales, anchors, lams)


def copies(*lists):
    return [[t.clone() for t in tensors] for tensors in lists]


def widened(tensors):
    return [t if t.dtype == torch.uint8 else t.double() for t in tensors]


def in_float64(own):
    """Return Ω, scales, θ* and λ with everything decoded to float64."""
    omegas, scales, anchors, lams = own
    decoded = [
        reference.decode_omega(o, s) if o.dtype == torch.uint8 else o for o, s in zip(omegas, scales, strict=True)
    ]
    return widened(decoded), [NONE] * len(lams), widened(anchors), lams


def assert_agree(actual, truth, baseline):
    """Demand that the kernel is as near the truth as the reference, but for the rounding of one more sum."""
    for a, t, b in zip(actual, truth, baseline, strict=True):
        # Two roundings of one number to a narrow dtype may fall on different sides: torch's error, or one more bit.
        slack = (
            1e-15 if a.dtype == torch.float64 else 2e-7 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps / 8
        )
        assert_as_accurate(a, t, b, slack)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_penalty_grad(dtypes, add, scaled):
    thetas, grads, own = held(dtypes)
    factors = torch.rand(len(thetas), dtype=torch.float64) if scaled else None
    ours, theirs = copies(grads, grads)
    truth = widened(copies(grads)[0])
    values = compiled.penalty_grad_(ours, thetas, *own, factors, add)
    expected = reference.penalty_grad_(theirs, thetas, *own, factors, add)
    true_values = reference.penalty_grad_(truth, widened(thetas), *in_float64(own), factors, add)
    assert_agree(ours, truth, theirs)
    assert relative_error(values[:, 0], true_values[:, 0]) <= (1e-14 if dtypes[0] == torch.float64 else 1e-6)
    assert values[:, 1].tolist() == expected[:, 1].tolist() == [0.0] * len(thetas)
    alone = compiled.penalty_grad_([], thetas, *own)
    assert torch.equal(alone[:, 0], values[:, 0]) or relative_error(alone, values) <= 1e-7


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
def test_sgd_step(dtypes, options):
    thetas, grads, own = held(dtypes)
    momenta = [torch.randn_like(grad) for grad in grads] if "momentum" in options else []
    results = []
    for run, prepare, state in (
        (compiled.sgd_step_, copies, own),
        (reference.sgd_step_, lambda *lists: [widened(tensors) for tensors in copies(*lists)], in_float64(own)),
        (reference.sgd_step_, copies, own),
    ):
        new, gradients, buffers = prepare(thetas, grads, momenta)
        values = run(new, gradients, buffers, *state, lr=0.1, **options)
        results.append([*new, *buffers, values[:, 0] if torch.float64 in dtypes else values[:, 0].float()])
    assert_agree(*results)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("options", ADAMW.values(), ids=ADAMW)
def test_adamw_step(dtypes, options):
    thetas, grads, own = held(dtypes)
    state = [[torch.randn_like(grad).abs() for grad in grads] for _ in range(3 if "amsgrad" in options else 2)]
    state += [[]] * (3 - len(state))
    numbers = [float(1 + 10 * i) for i in range(len(thetas))]
    results = []
    for run, prepare, holding in (
        (compiled.adamw_step_, copies, own),
        (reference.adamw_step_, lambda *lists: [widened(tensors) for tensors in copies(*lists)], in_float64(own)),
        (reference.adamw_step_, copies, own),
    ):
        new, gradients, *moments = prepare(thetas, grads, *state)
        values = run(new, gradients, *moments, *holding, numbers, 0.01, 0.9, 0.99, 1e-8, **options)
        values = values[:, 0] if torch.float64 in dtypes else values[:, 0].float()
        results.append([*new, *itertools.chain(*moments), values])
    assert_agree(*results)


def test_by_hand():
    # λ = 0.5, Ω = (1, 2), θ − θ* = (3, −1): value 0.5·(9 + 2), gradient 2·0.5·(3, −2).
    theta, grad = torch.tensor([4.0, 0.0]), torch.tensor([10.0, 20.0])
    own = steps.Held([torch.tensor([1.0, 2.0])], [NONE], [torch.tensor([1.0, 1.0])], [0.5])
    assert steps.add_penalty_grad_([grad], [theta], own).tolist() == [[5.5, 0.0]]
    assert grad.tolist() == [13.0, 18.0]


def together(own, sizes):
    """Return what `held` drew with all in one entry: an odd number apart, and in another order than the parameters."""
    omegas, scales, anchors, lams = own
    places, parts = [[-1, 0, 0] for _ in sizes], ([], [], [])
    for i in reversed(range(len(sizes))):
        if len(omegas[i]):
            # Of other lists only the lengths count: Ω and θ* begin together.
            places[i] = [0, sum(map(len, parts[0])), sum(map(len, parts[1]))]
            for part, tensor in zip(parts, (omegas[i], scales[i], anchors[i]), strict=True):
                part.append(torch.cat([tensor, tensor[:1]]))
    return [[torch.cat(part)] for part in parts], lams, list(itertools.chain(*places))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("implementation", [compiled, reference], ids=["compiled", "reference"])
def test_parameters_that_share_an_entry(dtypes, implementation):
    thetas, grads, own = held(dtypes)
    lists, lams, places = together(own, SIZES)
    results = []
    for holding, options in ((own, {}), ((*lists, lams), {"places": places})):
        new, added, stepped, mean, square = copies(grads, grads, thetas, grads, grads)
        square = [s.abs_() for s in square]
        results.append(
            [
                implementation.penalty_grad_(new, thetas, *holding, **options),
                *new,
                implementation.sgd_step_(stepped, added, [], *holding, 0.1, **options),
                *stepped,
                implementation.adamw_step_(
                    stepped, added, mean, square, [], *holding, [1.0] * len(SIZES), 0.01, 0.9, 0.99, 1e-8, **options
                ),
                *stepped,
            ]
        )
    if implementation is compiled and ops.cpu_capability() is not None:
        assert all(map(torch.equal, *results))
    else:
        # torch's own sums depend on where in memory a tensor begins.
        torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.skipif(ops.cpu_capability() is None, reason="the kernels' own checks")
@pytest.mark.parametrize("place", [(0, 2, 0), (0, -1, 0), (1, 0, 0), (0, 0, 2), (0, 0, -1), (0, 2**62, 0)], ids=str)
def test_places_outside_of_the_entries_are_refused(place):
    codes, scales = steps.encode_omega(torch.rand(200))
    theta = [torch.ones(199)]
    held = steps.Held([codes], [scales], [torch.ones(200)], [1.0], [*place])
    with pytest.raises(RuntimeError, match="must"):
        steps.add_penalty_grad_([torch.ones(199)], theta, held)
    fitting = held._replace(places=[0, 1, 0])
    assert steps.add_penalty_grad_([torch.ones(199)], theta, fitting).shape == (1, 2)


@pytest.mark.skipif(ops.cpu_capability() is None, reason="torch's own sums depend on the number of threads")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_sum_is_the_same_bits_on_every_run_and_for_any_number_of_threads(threads):
    thetas, grads, own = held(DTYPES[0], sizes=(300_001, 5, 128, 70_000))
    before = torch.get_num_threads()
    first = compiled.penalty_grad_(copies(grads)[0], thetas, *own)
    try:
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(compiled.penalty_grad_(copies(grads)[0], thetas, *own), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_is_rounded_as_torch_rounds_it(dtype):
    # All numbers of the dtype, what lies between neighbours, a hair to both sides of that, and what overflows.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    exact = every[every.isfinite()].sort().values
    halves = (exact[1:] + exact[:-1]) / 2
    infinite = torch.tensor([float("inf"), float("-inf"), float("nan"), 65519.0, 65520.0, 3.3895e38, 3.4e38])
    low, high = (torch.nextafter(halves, torch.tensor(way)) for way in (float("-inf"), float("inf")))
    numbers = torch.cat([every, halves, low, high, infinite, torch.tensor([1e-8, 1e-30, -0.0, 1e-45])])
    grad = torch.empty(len(numbers), dtype=dtype)
    # 2 · 0.5 · 1 · (number − 0), written anew.
    ones, zeros, half = torch.ones_like(numbers), torch.zeros_like(numbers), torch.tensor([0.5], dtype=torch.float64)
    compiled.penalty_grad_([grad], [numbers], [ones], [NONE], [zeros], [1.0], half, False)
    expected = numbers.to(dtype)
    assert torch.equal(grad.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(grad[known], expected[known])
    # And read again: a step of size 0 takes every number to itself.
    theta, wide = every[~every.isnan()].to(dtype), torch.zeros(int((~every.isnan()).sum()))
    value = torch.empty_like(wide)
    compiled.penalty_grad_([value], [theta], [torch.ones_like(wide)], [NONE], [wide], [1.0], half, False)
    assert torch.equal(value, theta.float())


def test_entries_that_overflow_are_counted():
    theta, grad = torch.full((5,), 60000.0, dtype=torch.float16), torch.full((5,), 60000.0, dtype=torch.float16)
    grad[0] = float("inf")  # was lost before
    omega = torch.tensor([1.0, 1.0, 0.0, 1e-4, 1.0])
    values = compiled.penalty_grad_([grad], [theta], [omega], [NONE], [torch.zeros(5)], [1.0])
    assert values[0, 1] == 2
    assert grad.isinf().tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 100_001])
def test_eight_bits(size):
    torch.manual_seed(0)
    omega = (torch.randn(size) * torch.randn(size)).abs()
    omega[::7] = 0
    codes, scales = steps.encode_omega(omega)
    assert codes.dtype == torch.uint8 and codes.shape == (size,) and scales.shape == (-(-size // 128),)
    expected = reference.encode_omega(omega)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    decoded = steps.decode_omega(codes, scales)
    assert relative_error(decoded, omega) <= 0.005
    assert bool((decoded[::7] == 0).all())
    if size:
        assert [block.amax() for block in decoded.split(128)] == [block.amax() for block in omega.split(128)]
    again = steps.encode_omega(decoded)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e38], ids=str)
def test_eight_bits_of_very_small_and_large_numbers(scale):
    omega = torch.rand(300, dtype=torch.float64).mul(scale).float()
    assert bool(steps.decode_omega(*steps.encode_omega(omega)).isfinite().all())
    assert relative_error(steps.decode_omega(*steps.encode_omega(omega)), omega) <= (0.3 if scale < 1e-40 else 0.005)


def test_derivatives():
    thetas, _, own = held(DTYPES[7], sizes=(3, 5))
    thetas = [theta.requires_grad_() for theta in thetas]
    own = steps.Held(*own)
    assert torch.autograd.gradcheck(lambda *t: steps.penalty(list(t), own), thetas)
    assert torch.autograd.gradgradcheck(lambda *t: steps.penalty(list(t), own), thetas)


def test_opcheck():
    thetas, grads, own = held(DTYPES[2], sizes=(3, 200))
    thetas = [theta.requires_grad_() for theta in thetas]
    torch.library.opcheck(compiled.penalty, (thetas, *own, []))
    detached = [theta.detach() for theta in thetas]
    torch.library.opcheck(compiled.penalty_grad_, (grads, detached, *own))
    torch.library.opcheck(compiled.penalty_grad, (torch.ones(2, dtype=torch.float64), detached, *own, []))
    torch.library.opcheck(compiled.sgd_step_, (detached, grads, [], *own, 0.1))
    lists, lams, places = together(own, (3, 200))
    torch.library.opcheck(compiled.penalty, (thetas, *lists, lams, places))
    torch.library.opcheck(compiled.penalty_grad_, (grads, detached, *lists, lams), {"places": places})
    moments = copies(grads, grads)
    torch.library.opcheck(compiled.adamw_step_, (detached, grads, *moments, [], *own, [1.0, 2.0], 0.1, 0.9, 0.99, 1e-8))
    torch.library.opcheck(compiled.encode_omega, (torch.rand(200),))
    torch.library.opcheck(compiled.decode_omega, steps.encode_omega(torch.rand(200)))
    checked = {"penalty_grad_", "sgd_step_", "adamw_step_", "encode_omega", "decode_omega"}
    assert checked == {name for name in ops.OPS if not name.startswith(("accumulate_", "linear_", "lstm_"))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"omegas": [torch.ones(4)]}, "omega and anchor must be of the size"),
        ({"anchors": [NONE]}, "omega and anchor must be of the size"),
        ({"lams": []}, "held must have an entry for each of 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, message):
    fitting = {"omegas": [torch.ones(3)], "scales": [NONE], "anchors": [torch.ones(3)], "lams": [1.0]}
    with pytest.raises(ValueError, match=message):
        steps.check_held([torch.ones(3)], steps.Held(**{**fitting, **change}))


@pytest.mark.skipif(ops.cpu_capability() is None, reason="the kernels' own checks")
@pytest.mark.parametrize("change", [{"omegas": [torch.ones(4)]}, {"anchors": [torch.ones(2)]}, {"lams": []}])
def test_kernels_stay_inside_of_their_memory(change):
    fitting = {"omegas": [torch.ones(3)], "scales": [NONE], "anchors": [torch.ones(3)], "lams": [1.0]}
    with pytest.raises(RuntimeError, match="must have"):
        steps.add_penalty_grad_([torch.ones(3)], [torch.ones(3)], steps.Held(**{**fitting, **change}))
    codes = torch.ones(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="scales must be float32") as caught:
        compiled.penalty_grad_([torch.ones(3)], [torch.ones(3)], [codes], [NONE], [torch.ones(3)], [1.0])
    # Where in the sources, and not where they were built.
    assert "csrc/cpu/steps.h" in str(caught.value) and "/csrc" not in str(caught.value)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")], ids=str)
def test_what_is_no_importance_is_not_encoded(bad):
    with pytest.raises(ValueError, match="omega must be finite and non-negative"):
        steps.encode_omega(torch.tensor([1.0, bad, 2.0]))
    with pytest.raises(ValueError, match="omega must be floating-point"):
        steps.encode_omega(torch.tensor([1, 2]))


def test_memory_that_is_not_contiguous():
    theta, grad = torch.randn(4, 6).t(), torch.randn(6, 4)
    own = steps.Held([torch.rand(24)], [NONE], [torch.randn(24)], [0.5])
    expected = grad + own.omegas[0].view(6, 4) * (theta - own.anchors[0].view(6, 4))
    turned = grad.t().contiguous().t()
    steps.add_penalty_grad_([turned], [theta], own)
    torch.testing.assert_close(turned, expected)
