"""What the processes of test_distributed.py run: one function per case, called on every rank of a pool."""

import contextlib
import io
import time
import traceback
import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from cases import Doubled, TransformerLM, images, resnet
from compare import relative_error, truth_of, worst_error
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import mas_fast
from mas_fast import CaptureError, Importance
from mas_fast.distributed import Ranks
from mas_fast.errors import LoopWarning
from mas_fast.kernels.steps import decode_omega, encode_omega

WORLD = 4
SAMPLES = 13
# How many samples each batch of each rank has. The last batches are ragged, and ranks run different numbers of them.
SPREAD = {2: [[4, 4, 1], [4]], 3: [[5, 2], [3, 1], [2]], 4: [[2, 2, 1], [3], [2, 2], [1]]}
IDLE_RANK = {2: [[5, 5, 3], []], 3: [[5, 2], [], [5, 1]]}

GROUPS: dict[int, dist.ProcessGroup] = {}
MESHES: dict[int, DeviceMesh] = {}


def serve(rank, store, connection):
    """Run what the parent asks for, and answer with None or the traceback."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    for size in (2, 3, 4):
        MESHES[size] = DeviceMesh("cpu", list(range(size)))
        GROUPS[size] = dist.new_group(list(range(size)))
    connection.send(None)
    while (call := connection.recv()) is not None:
        name, size, arguments = call
        answer = None
        if rank < size:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    warnings.simplefilter("ignore", LoopWarning)
                    globals()[name](size, **arguments)
            except BaseException:
                answer = f"rank {rank}:\n{traceback.format_exc()}"
        connection.send(answer)
    dist.destroy_process_group()


# Models and what they are wrapped in


class Net(nn.Module):
    """Sizes that no number of ranks divides, a parameter for the loop, one of no dimension, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.randn(7))
        self.block = nn.Sequential(nn.Linear(7, 3), nn.LayerNorm(3), nn.Tanh())
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.encode(x)

    def encode(self, x):
        return self.head(self.frozen(self.block(Doubled.apply(torch.tanh(self.first(x)), self.scale))))


MODELS = {
    "net": lambda: (Net(), torch.randn(SAMPLES, 5)),
    "resnet": lambda: (resnet(), images(SAMPLES)),
    "transformer": lambda: (TransformerLM(), torch.randint(0, 29, (SAMPLES, 9))),
}


def make(name):
    torch.manual_seed(11)
    return MODELS[name]()


def shards(model, size, **options):
    """Shard some modules of a model on their own, one of them within another, and the rest together."""
    mesh, root = options.pop("mesh", MESHES[size]), options.pop("root", {})
    inner = [module for module in (getattr(model, "block", None), getattr(model, "first", None)) if module is not None]
    inner += [module for block in getattr(model, "blocks", ()) for module in (block["norm1"], block["norm2"])]
    for module in inner:
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options, **root)


def shard_together(model, size):
    fully_shard([model.first, model.head], mesh=MESHES[size])
    return fully_shard(model, mesh=MESHES[size])


def shard_with_methods(model, size):
    shards(model, size)
    register_fsdp_forward_method(model, "encode")
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.block = compiled(model.block)
    return model


def checkpointed(model):
    model.block = checkpoint_wrapper(model.block)
    return model


def ddp(model, size):
    return nn.parallel.DistributedDataParallel(model, process_group=GROUPS[size])


def hsdp(model, size):
    return shards(model, size, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def replicated(model, size):
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(model, mesh=MESHES[size])


WRAPS = {
    "ddp": ddp,
    "compile of ddp": lambda model, size: compiled(ddp(model, size)),
    "ddp of compile": lambda model, size: ddp(compiled(model), size),
    "ddp of a compiled part": lambda model, size: ddp(compiled_inside(model), size),
    "ddp of data parallel": lambda model, size: ddp(nn.DataParallel(model), size),
    "fsdp": shards,
    "fsdp of the root alone": lambda model, size: fully_shard(model, mesh=MESHES[size]),
    "fsdp never resharded": lambda model, size: shards(model, size, reshard_after_forward=False),
    "fsdp with a method": shard_with_methods,
    "fsdp together": shard_together,
    "compile of fsdp": lambda model, size: compiled(shards(model, size)),
    "fsdp of a compiled part": lambda model, size: shards(compiled_inside(model), size),
    "fsdp but for one parameter": lambda model, size: shards(model, size, root={"ignored_params": {model.scale}}),
    "ddp of a checkpointed part": lambda model, size: ddp(checkpointed(model), size),
    "fsdp of a checkpointed part": lambda model, size: shards(checkpointed(model), size),
    "hsdp": hsdp,
    "replicate": replicated,
}


def mine(data, spread):
    """Return this rank's batches."""
    sizes = [size for sizes in spread for size in sizes]
    assert sum(sizes) == SAMPLES
    batches = data.split(sizes)
    before = sum(len(sizes) for sizes in spread[: dist.get_rank()])
    return list(batches[before : before + len(spread[dist.get_rank()])])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wholes(tensors):
    return {name: whole(tensor.detach()) for name, tensor in tensors.items()}


@cache
def truths(name, **options):
    return truth_of(*make(name), **options)


# An exact Ω


def exact(size, model, wrap, idle=False, **options):
    plain, data = make(model)
    wrapped = WRAPS[wrap](plain, size)
    batches = mine(data, (IDLE_RANK if idle else SPREAD)[size])
    importance = mas_fast.estimate_importance(wrapped, batches, **options)
    options = {key: value for key, value in options.items() if key in ("objective", "statistic")}
    assert importance.num_samples == SAMPLES
    error = worst_error(wholes(importance), truths(model, **options))
    assert error <= 2e-5, error
    alone = mas_fast.estimate_importance(make(model)[0], [data], statistic=options.get("statistic", "abs"))
    assert {row.name: row for row in importance.coverage} == {row.name: row for row in alone.coverage}
    parameters = dict(zip(alone, (p for p in plain.parameters() if p.requires_grad), strict=True))
    for name, tensor in importance.items():
        parameter = parameters[name]
        assert isinstance(tensor, DTensor) == isinstance(parameter, DTensor)
        if isinstance(tensor, DTensor):
            assert (tensor.device_mesh, tensor.placements) == (parameter.device_mesh, parameter.placements)
        # Every rank has the same.
        assert len({value.sum().item() for value in Ranks.of(wrapped).gather(whole(tensor))}) == 1


def exact_in_mixed_precision(size):
    """Parameters, inputs and outputs in the dtypes of the policy: the gradients of a bfloat16 copy, summed in float32.

    The reference takes one sample at a time, because bfloat16 rounds samples otherwise in another batch.
    """
    plain, data = make("net")
    expected = mas_fast.estimate_importance(deepcopy(plain).to(torch.bfloat16), list(data.bfloat16().split(1)))
    fully_shard(plain.block, mesh=MESHES[size], mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    policy = MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32)
    model = fully_shard(plain, mesh=MESHES[size], mp_policy=policy)
    outputs = []

    def forward(model, batch):
        outputs.append(model(batch))
        return outputs[-1].to(torch.bfloat16)

    batches = [sample for batch in mine(data, SPREAD[size]) for sample in batch.split(1)]
    importance = mas_fast.estimate_importance(model, batches, forward=forward)
    assert outputs[0].dtype == torch.float32 and torch.equal(outputs[0], model.eval()(batches[0]))
    assert all(tensor.dtype == torch.float32 for tensor in importance.values())
    error = worst_error(wholes(importance), expected)
    assert error <= 2e-5, error


def own_loop(size, model, wrap):
    """Calls of the wrapped model itself, importance() in the middle, at the end and after it."""
    truth = truths(model)
    plain, data = make(model)
    model = WRAPS[wrap](plain, size)
    batches = mine(data, SPREAD[size])
    with mas_fast.capture(model) as session:
        first, *rest = batches
        session.accumulate(lambda: model(first).square().sum(1))
        early = session.importance()
        for batch in rest:
            session.accumulate(lambda batch=batch: model(batch).square().sum(1))
        importance = session.importance()
    late = session.importance()
    firsts = [sizes[0] for sizes in SPREAD[size]]
    assert early.num_samples == sum(firsts) and importance.num_samples == late.num_samples == SAMPLES
    assert worst_error(wholes(importance), truth) <= 2e-5
    for name, tensor in importance.items():
        assert torch.equal(whole(tensor), whole(late[name]))


# What is left behind


def state_of(model):
    """Everything of a model that a pass could change."""
    state = {"parameters": [], "modes": [], "hooks": [], "fsdp": [], "buffers": []}
    for module in model.modules():
        state["modes"].append(module.training)
        state["hooks"].append([list(module._forward_pre_hooks.items()), list(module._forward_hooks.items())])
        state["hooks"].append([vars(module).get("forward"), vars(module).keys()])
        state["buffers"] += [(id(b), b.clone()) for b in module._buffers.values() if b is not None]
        for parameter in module._parameters.values():
            grad = None if parameter is None or parameter.grad is None else (id(parameter.grad), whole(parameter.grad))
            state["parameters"].append((id(parameter), grad))
        if isinstance(module, FSDPModule):
            fsdp = module._get_fsdp_state()
            group = fsdp._fsdp_param_group
            names = "post_forward_mesh_info reshard_after_backward reduce_grads all_reduce_grads _training_state"
            settings = {key: getattr(group, key) for key in names.split()} if group else {}
            state["fsdp"].append((settings, fsdp._training_state, fsdp._is_root, vars(fsdp).keys()))
    state["random"] = torch.get_rng_state()
    return state


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first == second


def train(model, data, steps=2):
    """Return the parameters after some steps, whose last gradient is left in `.grad`."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    return [whole(p.detach()).clone() for p in model.parameters()]


def leaves_no_trace(size, wrap, model, trained, fails):
    """Training before and after the pass is bit for bit that without one."""
    wrapped, twin = (WRAPS[wrap](make(model)[0], size) for _ in range(2))
    data = make(model)[1]
    batches = mine(data, SPREAD[size])
    if trained:
        assert same(train(wrapped, batches[0]), train(twin, batches[0]))
        assert any(p.grad is not None for p in wrapped.parameters())
    before = state_of(wrapped)
    if fails:
        with contextlib.suppress(CaptureError, ArithmeticError):
            mas_fast.estimate_importance(wrapped, failing(batches, ArithmeticError("broken")))
            raise AssertionError("the failure must not pass unnoticed")
    else:
        with torch.inference_mode(not trained):
            mas_fast.estimate_importance(wrapped, batches)
    after = state_of(wrapped)
    for key in before:
        assert same(before[key], after[key]), f"{key}: {before[key]} became {after[key]}"
    assert same(train(wrapped, batches[0]), train(twin, batches[0]))
    importance = mas_fast.estimate_importance(wrapped, batches)
    assert same(wholes(importance), wholes(mas_fast.estimate_importance(twin, batches)))


def stays_unsharded(size):
    """A module that its user has unsharded stays so, and the others are sharded again."""
    model = shards(make("net")[0], size)
    model.block.unshard()
    kinds = [isinstance(p, DTensor) for p in model.parameters()]
    assert not all(kinds) and any(kinds)
    mas_fast.estimate_importance(model, mine(make("net")[1], SPREAD[size]))
    assert [isinstance(p, DTensor) for p in model.parameters()] == kinds


# Errors


def failing(batches, error):
    """Yield batches, and raise on rank 1 after the first of them."""
    for batch in batches:
        yield batch
        if dist.get_rank() == 1:
            raise error


def spoilt(batches):
    for batch in batches:
        yield batch * float("nan") if dist.get_rank() == 1 else batch


def bad_option(model, batches):
    mas_fast.estimate_importance(model, batches, statistic="cube" if dist.get_rank() == 1 else "abs")


def user_error(model, batches):
    with mas_fast.capture(model) as session:
        for batch in failing(batches, KeyError("mine")):
            session.accumulate(lambda batch=batch: model(batch).square().sum(1))


def early_user_error(model, batches):
    """One rank reads importance() while another fails."""
    with mas_fast.capture(model) as session:
        session.accumulate(lambda: model(batches[0]).square().sum(1))
        if dist.get_rank() == 1:
            raise KeyError("mine")
        session.importance()


def late_error(model, batches):
    with mas_fast.capture(model) as session:
        session.accumulate(lambda: model(batches[0]).square().sum(1))
    if dist.get_rank() == 1:
        session.broken = True
    session.importance()


def disagree(model, batches):
    mas_fast.estimate_importance(model, batches, parameters=["first.bias"] if dist.get_rank() == 1 else ["head.bias"])


def mean_of(model, batches, **options):
    mas_fast.estimate_importance(model, batches, **options)


# name -> (what runs on every rank, the error on rank 1, the error on all others)
ERRORS = {
    "data": (
        lambda model, batches: mean_of(model, failing(batches, OSError("disk"))),
        (OSError, "disk"),
        (CaptureError, "rank 1 failed: OSError: disk"),
    ),
    "interrupt": (
        lambda model, batches: mean_of(model, failing(batches, KeyboardInterrupt())),
        (KeyboardInterrupt, ""),
        (CaptureError, "rank 1 failed: KeyboardInterrupt"),
    ),
    "nan": (
        lambda model, batches: mean_of(model, spoilt(batches)),
        (FloatingPointError, "batch 0"),
        (CaptureError, "rank 1 failed: FloatingPointError: batch 0"),
    ),
    "option": (
        bad_option,
        (ValueError, "statistic must be"),
        (CaptureError, "rank 1 failed: ValueError: statistic must be"),
    ),
    "user": (user_error, (KeyError, "mine"), (CaptureError, "rank 1 failed: KeyError: 'mine'")),
    "early": (early_user_error, (KeyError, "mine"), (CaptureError, "rank 1 failed: KeyError: 'mine'")),
    "late": (late_error, (CaptureError, "partial sums"), (CaptureError, "rank 1 failed: CaptureError: capture must")),
    "parameters": (
        disagree,
        (CaptureError, r"got first.bias [7] torch.float32 on rank 1 and head.bias [1] torch.float32 on rank 0"),
        (CaptureError, r"got first.bias [7] torch.float32 on rank 1 and head.bias [1] torch.float32 on rank 0"),
    ),
    "no data": (
        lambda model, batches: mean_of(model, []),
        (ValueError, "data must hold at least one batch"),
        (ValueError, "data must hold at least one batch"),
    ),
}


def raises(function, error, message):
    """Return the error of a call, which must be of a type and have a message."""
    try:
        function()
    except BaseException as found:
        assert type(found) is error and message in str(found), f"expected {error} {message!r}, got {found!r}"
        return found
    raise AssertionError(f"expected {error} {message!r}, got none")


def fails_together(size, wrap, how):
    """An error on one rank is one on all, in no time, and nothing hangs or is wrong afterwards."""
    plain, data = make("net")
    model = WRAPS[wrap](plain, size)
    batches = mine(data, SPREAD[size])
    function, on_one, on_others = ERRORS[how]
    start = time.monotonic()
    raises(lambda: function(model, batches), *(on_one if dist.get_rank() == 1 else on_others))
    assert time.monotonic() - start < 10
    importance = mas_fast.estimate_importance(model, batches)
    assert worst_error(wholes(importance), truths("net")) <= 2e-5


def refuses_shapes_that_differ(size):
    """Without communication a model can be built that fits no other rank's."""
    model = fully_shard(nn.Sequential(nn.Linear(5, 3 + dist.get_rank())), mesh=MESHES[size])
    message = "got 0.weight [4, 5] torch.float32 on rank 1 and 0.weight [3, 5] torch.float32 on rank 0"
    raises(lambda: mas_fast.estimate_importance(model, [torch.randn(2, 5)]), CaptureError, message)


def refuses_split_samples(size):
    """Tensor parallelism, alone and under fully_shard, and FSDP of the first version."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    x = torch.randn(2, 5)
    split = parallelize_module(nn.Sequential(nn.Linear(5, 4)), MESHES[size], {"0": ColwiseParallel()})
    raises(lambda: mas_fast.estimate_importance(split, [x]), CaptureError, "0.weight, 0.bias; tensor parallelism")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    both = parallelize_module(nn.Sequential(nn.Linear(5, 4)), mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(both, mesh=mesh["data"])
    raises(lambda: mas_fast.estimate_importance(both, [x]), CaptureError, "0.weight, 0.bias; tensor parallelism")
    assert all(isinstance(p, DTensor) and p.device_mesh.ndim == 2 for p in both.parameters())
    part = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    parallelize_module(part, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(part, mesh=mesh["data"])
    raises(lambda: mas_fast.estimate_importance(part, [x]), CaptureError, "by data parallelism alone, got 2 groups")
    first = FullyShardedDataParallel(nn.Linear(5, 4), process_group=GROUPS[size], device_id=torch.device("cpu"))
    raises(lambda: mas_fast.estimate_importance(first, [x]), CaptureError, "use torch.distributed.fsdp.fully_shard")


# Importance and MAS with DTensors


def importance_round_trip(size, folder):
    model = shards(make("net")[0], size)
    importance = mas_fast.estimate_importance(model, mine(make("net")[1], SPREAD[size]))
    path = Path(folder) / "omega0.safetensors"
    importance.save(Path(folder) / f"omega{dist.get_rank()}.safetensors")
    # The first rank writes, and the others wait for it.
    assert [file.name for file in Path(folder).iterdir()] == [path.name]
    loaded = Importance.load(path, expected=model)
    assert not any(isinstance(tensor, DTensor) for tensor in loaded.values())
    assert same(dict(loaded), wholes(importance)) and loaded.coverage == importance.coverage
    assert loaded.num_samples == SAMPLES

    back = loaded.to_sharding(model)
    for name, tensor in back.items():
        assert tensor.placements == importance[name].placements
        assert torch.equal(tensor.to_local(), importance[name].to_local())
    assert same(dict(back.to_sharding(make("net")[0])), dict(loaded))

    for other in (back, loaded):
        merged = importance.merge(other, "mean")
        assert merged.num_samples == 2 * SAMPLES and same(wholes(merged), dict(loaded))
        assert all(isinstance(tensor, DTensor) for tensor in merged.values())
    doubles = importance.to(torch.float64)
    assert same(wholes(doubles), dict(loaded.to(torch.float64)))

    # One rank alone may look at it.
    if dist.get_rank() == 0:
        assert "total=sharded" in repr(importance)
    assert sorted(importance.summary().splitlines()) == sorted(loaded.summary().splitlines())

    raises(
        lambda: importance.save(Path(folder) / "absent" / "file"),
        *((FileNotFoundError, "absent") if dist.get_rank() == 0 else (OSError, "rank 0 failed: FileNotFoundError")),
    )
    parameter = dict(model.named_parameters())["first.weight"]
    bad = torch.ones_like(parameter).detach()
    if dist.get_rank() == 1:
        bad.to_local()[0, 0] = -1
    raises(lambda: Importance({"first.weight": bad}, 1), ValueError, "of the part of rank 1")


def optimize(model, mas, batches, how):
    """Train with the penalty on one batch per step, in one of the ways to apply it; return its values."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    values = []
    for batch in batches:
        optimizer.zero_grad()
        if how == "in place":
            model(batch).square().mean().backward()
            values.append(mas.add_penalty_grad_())
        elif how == "before":
            value = mas.penalty()
            (model(batch).square().mean() + value).backward()
            values.append(value.detach())
        else:
            loss = model(batch).square().mean()
            value = mas.penalty()
            (loss + value).backward()
            values.append(value.detach())
        optimizer.step()
    return torch.stack(values)


def mas_matches_one_process(size, wrap, how, folder):
    """Two tasks and training under the penalty: as one process on the batches of all ranks together."""
    plain, data = make("net")
    alone = deepcopy(plain)
    model = WRAPS[wrap](plain, size)
    batches = mine(data, SPREAD[size])
    # As many samples on every rank, so that the mean of means is the mean.
    steps = [torch.randn(2 * size, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    own = [step.chunk(size)[dist.get_rank()] for step in steps]
    mine_, theirs = mas_fast.MAS(model, lam=0.7), mas_fast.MAS(alone, lam=0.7)
    for _ in range(2):
        mine_.consolidate(batches)
        theirs.consolidate([data])
        values = optimize(model, mine_, own, how)
        expected = optimize(alone, theirs, steps, "in place")
        assert relative_error(values, expected) <= 1e-5, (values, expected)
        # The same on every rank, to the last bit.
        assert len({tuple(value.tolist()) for value in Ranks.of(model).gather(values)}) == 1
        for p, q in zip(plain.parameters(), alone.parameters(), strict=True):
            assert relative_error(whole(p.detach()), q.detach()) <= 1e-5
    assert worst_error(wholes(mine_.omega), theirs.omega) <= 2e-5
    for name, tensor in mine_.omega.items():
        assert isinstance(tensor, DTensor) == ("ddp" not in wrap)
        assert isinstance(mine_.anchor[name], DTensor) == ("ddp" not in wrap)

    path = Path(folder) / f"mas{dist.get_rank() if 'ddp' in wrap else ''}.safetensors"
    mine_.save(path)
    restored, single = mas_fast.MAS(model), mas_fast.MAS(alone)
    restored.load(path)
    single.load(path)
    for kind in ("omega", "anchor"):
        before = getattr(mine_, kind)
        for name, tensor in getattr(restored, kind).items():
            assert isinstance(tensor, DTensor) == isinstance(before[name], DTensor)
            assert torch.equal(whole(tensor), whole(before[name]))
            assert torch.equal(getattr(single, kind)[name], whole(before[name]))
    values = optimize(model, restored, own, how)
    assert relative_error(values, optimize(alone, theirs, steps, "in place")) <= 1e-4


def mas_follows_its_model(size):
    """A plain model that is sharded later takes Ω and θ* along."""
    model, data = make("net")
    mas = mas_fast.MAS(model)
    mas.consolidate([data])
    omega = dict(mas.omega)
    shards(model, size)
    value = mas.penalty()
    assert float(value.detach()) == 0.0
    for name, tensor in mas.omega.items():
        assert isinstance(tensor, DTensor) and torch.equal(whole(tensor), omega[name])


SMALL = {"omega_dtype": torch.uint8, "anchor_dtype": torch.bfloat16}


def coded(tensor):
    """Return what 8 bits keep of a tensor, of a DTensor by parts."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    decoded = decode_omega(*encode_omega(part)).view(part.shape)
    if not isinstance(tensor, DTensor):
        return decoded
    return DTensor.from_local(
        decoded, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )


def mas_in_few_bytes(size, folder):
    """Codes are of each rank's part; they are saved whole, and come back as they were, or sharded otherwise."""
    model = shards(make("net")[0], size)
    mas, exact = mas_fast.MAS(model, lam=0.7, **SMALL), mas_fast.MAS(model, lam=0.7)
    exact.consolidate(mas.consolidate(mine(make("net")[1], SPREAD[size])))
    for name, omega in exact.omega.items():
        assert mas.omega[name].placements == omega.placements
        assert torch.equal(mas.omega[name].to_local(), coded(omega).to_local())
    numel = sum(parameter.to_local().numel() for name, parameter in model.named_parameters() if name in exact.omega)
    assert mas.state_bytes <= 3 * numel + 4 * len(exact.omega) and exact.state_bytes == 8 * numel

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    value = mas.add_penalty_grad_()
    expected = 0.0
    for name, parameter in model.named_parameters():
        if name in mas.omega:
            omega, difference = whole(mas.omega[name]), whole(parameter.detach()) - whole(mas.anchor[name])
            expected += 0.7 * (omega * difference.square()).sum()
            assert relative_error(whole(parameter.grad), 1.4 * omega * difference) <= 1e-6
    assert relative_error(value, expected) <= 1e-6
    assert relative_error(torch.tensor(sum(mas.penalty_by_parameter().values())), expected) <= 1e-6

    path = Path(folder) / "mas.safetensors"
    mas.save(path)
    loaded, plain = mas_fast.MAS(model, **SMALL), mas_fast.MAS(make("net")[0], **SMALL)
    loaded.load(path)
    plain.load(path)
    other = mas_fast.MAS(fully_shard(make("net")[0], mesh=MESHES[2]), **SMALL) if dist.get_rank() < 2 else None
    if other is not None:
        other.load(path)
    for name, omega in mas.omega.items():
        assert torch.equal(loaded.omega[name].to_local(), omega.to_local())
        # Decoded, and encoded in other blocks.
        assert torch.equal(plain.omega[name], coded(whole(omega)))
        if other is not None:
            assert relative_error(whole(other.omega[name]), plain.omega[name]) <= 1e-2
    loaded.load_state_dict(mas.state_dict())
    assert all(torch.equal(loaded.omega[name].to_local(), o.to_local()) for name, o in mas.omega.items())
    again = mas_fast.MAS(model, **SMALL)
    again.load_state_dict(plain.state_dict())
    assert all(torch.equal(whole(again.omega[name]), whole(coded(o))) for name, o in sharded_like(plain, model).items())


def sharded_like(mas, model):
    return Importance(dict(mas.omega), 1).to_sharding(model)


def mas_adapts(size):
    """A sharded head grows."""
    plain, data = make("net")
    model = shards(plain, size)
    mas = mas_fast.MAS(model)
    mas.consolidate(mine(data, SPREAD[size]))
    before = wholes(mas.omega), wholes(mas.anchor)
    raises(lambda: mas.adapt(rename={"none": "head.bias"}), ValueError, "rename has 'none'")
    torch.manual_seed(3)
    larger = make("net")[0]
    larger.head = nn.Linear(3, 4)
    expected = larger.head.weight.detach().clone()
    mas.model = shards(larger, size)
    raises(mas.penalty, ValueError, "'head.weight' has shape [1, 3], the model has [4, 3]")
    mas.adapt(grow=["head.*"])
    omega, anchor = whole(mas.omega["head.weight"]), whole(mas.anchor["head.weight"])
    assert torch.equal(omega, nn.functional.pad(before[0]["head.weight"], (0, 0, 0, 3)))
    assert torch.equal(anchor[:1], before[1]["head.weight"]) and torch.equal(anchor[1:], expected[1:])
    mas.add_penalty_grad_()
    assert larger.head.weight.grad.placements == larger.head.weight.placements


def mas_overflows_together(size):
    """An overflow of float16 in the part of one rank is an error on all."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(4, size, bias=False).half(), mesh=MESHES[size])
    mas = mas_fast.MAS(model)
    omega = torch.zeros(size, 4)
    omega[1, 2] = 1e5
    mas.consolidate(Importance({"weight": omega}, 1))
    with torch.no_grad():
        model.weight += 1.0
    message = "'weight' has 1 of" if dist.get_rank() == 1 else "those of other ranks"
    raises(mas.add_penalty_grad_, FloatingPointError, message)


def mas_with_gradients_yet_to_be_summed(size):
    """A gradient that is a sum over ranks, not yet formed, gets the penalty once."""
    mesh = MESHES[size]
    model = nn.Linear(3, 2, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(torch.zeros(2, 3), mesh, [Replicate()]))
    mas = mas_fast.MAS(model, lam=0.5)
    mas.consolidate(Importance({"weight": torch.ones(2, 3)}, 1))
    with torch.no_grad():
        model.weight += 1.0
    model.weight.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Partial()])
    assert mas.add_penalty_grad_().item() == 3.0
    assert torch.equal(whole(model.weight.grad), torch.full((2, 3), size + 1.0))


def mas_with_a_parameter_left_out(size):
    """The penalty over sharded parameters and a plain one, at θ = θ* + 1/2."""
    plain, data = make("net")
    alone = deepcopy(plain)
    model = WRAPS["fsdp but for one parameter"](plain, size)
    ours, theirs = mas_fast.MAS(model, lam=0.7), mas_fast.MAS(alone, lam=0.7)
    ours.consolidate(mine(data, SPREAD[size]))
    theirs.consolidate([data])
    with torch.no_grad():
        for parameter in (*model.parameters(), *alone.parameters()):
            parameter += 0.5
    value, expected = ours.penalty(), theirs.penalty()
    value.backward()
    expected.backward()
    twice, expected_twice = ours.add_penalty_grad_(), theirs.add_penalty_grad_()
    for actual, truth in ((value.detach(), expected.detach()), (twice, expected_twice)):
        assert relative_error(actual, truth) <= 1e-5
    for p, q in zip(plain.parameters(), alone.parameters(), strict=True):
        if q.grad is not None:
            assert relative_error(whole(p.grad), q.grad) <= 1e-5


def shows_progress_once(size):
    plain, data = make("net")
    model = WRAPS["ddp"](plain, size)
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        mas_fast.estimate_importance(model, mine(data, SPREAD[size]), progress=True)
    assert ("importance" in shown.getvalue()) == (dist.get_rank() == 0)


def placements(size):
    """Other placements than the rows: a sharding by columns, and a mesh of one rank per axis."""
    plain = nn.Sequential(nn.Linear(6, 6 * size, bias=False), nn.Tanh(), nn.Linear(6 * size, 12, bias=False))
    data = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1))
    dist.broadcast_object_list([None], group=GROUPS[size])
    for parameter in plain.parameters():
        dist.broadcast(parameter.data, 0, group=GROUPS[size])
    truth = truth_of(plain, data)
    model = fully_shard(plain, mesh=MESHES[size], shard_placement_fn=lambda p: Shard(1))
    importance = mas_fast.estimate_importance(model, mine(data, SPREAD[size]))
    assert all(tensor.placements == (Shard(1),) for tensor in importance.values())
    assert worst_error(wholes(importance), truth) <= 2e-5
    assert not any(isinstance(p, Replicate) for tensor in importance.values() for p in tensor.placements)
