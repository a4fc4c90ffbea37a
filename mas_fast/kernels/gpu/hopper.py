"""Ω[o, i] += Σ_n |Σ_t δ[n, t, o] x[n, t, i]| on Hopper, in Gluon: a warp loads, two or three groups of warps multiply.

The same tiles and sums as linear.py, with what portable Triton has no words for: the copy engine (TMA) brings boxes of
δ and x to shared memory, with zeros past every edge; each group of four warps multiplies its 64 rows of the tile out of
it, and starts a sample without clearing its accumulator; and while one group adds magnitudes the others multiply.

It has not run on a GPU yet. So it is not chosen unless MAS_FAST_HOPPER=1 asks for it; benchmarks/gpu.py compares the
two, and whichever loses there will go.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from mas_fast.kernels.gpu.common import splits_of

# Renamed between Triton 3.6 and 3.9.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

ROWS = gl.constexpr(64)  # of a tile of Ω, for each group of warps
COLUMNS = 128
STAGES = 4
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Groups of warps -> registers of a thread: what those beside the first get, and what the kernel is compiled for. Two
# accumulators of 64 each must fit.
REGISTERS = {2: (208, 168), 3: (152, 128)}


@aggregate
class Work:
    """What all groups of warps of a program know: where the data is, which tile and samples are theirs, constants."""

    delta: tma.tensor_descriptor
    x: tma.tensor_descriptor
    delta_boxes: gl.shared_memory_descriptor
    x_boxes: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    corner: gl.tensor
    rows: gl.tensor
    columns: gl.tensor
    inputs: gl.tensor
    o: gl.tensor
    i: gl.tensor
    first: gl.tensor
    samples: gl.tensor
    steps: gl.tensor
    SQUARE: gl.constexpr
    ADD: gl.constexpr
    BI: gl.constexpr
    BT: gl.constexpr
    GROUPS: gl.constexpr
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, delta, x, delta_boxes, x_boxes, full, empty, corner, rows, columns, inputs, o, i, first, samples, steps,
        SQUARE, ADD, BI, BT, GROUPS, STAGES,
    ):  # fmt: skip
        self.delta, self.x, self.delta_boxes, self.x_boxes = delta, x, delta_boxes, x_boxes
        self.full, self.empty = full, empty
        self.corner, self.rows, self.columns, self.inputs = corner, rows, columns, inputs
        self.o, self.i, self.first, self.samples, self.steps = o, i, first, samples, steps
        self.SQUARE, self.ADD = gl.constexpr(SQUARE), gl.constexpr(ADD)
        self.BI, self.BT = gl.constexpr(BI), gl.constexpr(BT)
        self.GROUPS, self.STAGES = gl.constexpr(GROUPS), gl.constexpr(STAGES)


@gluon.jit
def produce(work):
    """Bring the boxes of all steps to shared memory, each as soon as those that lay there are used up."""
    for it in range(work.samples * work.steps):
        stage = it % work.STAGES
        n = work.first + it // work.steps
        t = (it % work.steps) * work.BT
        full = work.full.index(stage)
        mbarrier.wait(work.empty.index(stage), ((it // work.STAGES) & 1) ^ 1)
        mbarrier.expect(full, work.GROUPS * work.delta.block_type.nbytes + work.x.block_type.nbytes)
        for group in gl.static_range(work.GROUPS):
            box = work.delta_boxes.index(stage * work.GROUPS + group)
            load_box(work.delta, [n, t, work.o + group * ROWS], full, box)
        load_box(work.x, [n, t, work.i], full, work.x_boxes.index(stage))


@gluon.jit
def consume(work, GROUP: gl.constexpr):
    """Form the products of all samples for the rows of one group of warps, add their magnitudes up, and write them."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BI, 16])
    total = gl.zeros([ROWS, work.BI], gl.float32, layout)
    acc = gl.zeros([ROWS, work.BI], gl.float32, layout)
    it = 0
    for _ in range(work.samples):
        for step in range(work.steps):
            stage = it % work.STAGES
            mbarrier.wait(work.full.index(stage), (it // work.STAGES) & 1)
            a = work.delta_boxes.index(stage * work.GROUPS + GROUP).reshape([work.BT, ROWS]).permute((1, 0))
            b = work.x_boxes.index(stage).reshape([work.BT, work.BI])
            # The first step of a sample overwrites the accumulator.
            acc = warpgroup_mma(a, b, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(work.empty.index(stage), count=1)
            it += 1
        if work.SQUARE:
            total = gl.fma(acc, acc, total)
        else:
            total = gl.inline_asm_elementwise(
                "{ .reg .f32 t; abs.f32 t, $2; add.f32 $0, $1, t; }",
                "=f,f,f",
                [total, acc],
                dtype=gl.float32,
                is_pure=True,
                pack=1,
            )
    # From the tile's corner on, so that the columns are constants of the instructions.
    rows = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, work.BI, gl.SliceLayout(0, layout))
    target = work.corner + rows[:, None].to(gl.int64) * work.inputs + columns[None, :]
    inside = (rows < work.rows)[:, None] & (columns < work.columns)[None, :]
    if work.ADD:
        # Once for each entry, so in no order that could differ; to load Ω here would take registers that are not there.
        gl.atomic_add(target, total, mask=inside, sem="relaxed")
    else:
        gl.store(target, total, mask=inside)


@gluon.jit
def consume_first(work):
    """Consume for the first group of warps; all that runs beside it takes the same arguments."""
    consume(work, 0)


@gluon.jit
def consume_second(work):
    """Consume for the second group of warps."""
    consume(work, 1)


@gluon.jit
def consume_third(work):
    """Consume for the third group of warps."""
    consume(work, 2)


@gluon.jit(do_not_specialize=["samples", "positions", "per_split"])
def hopper_kernel(
    delta,
    x,
    out,
    samples,
    positions,
    outputs,
    inputs,
    out_split,
    per_split,
    SQUARE: gl.constexpr,
    ADD: gl.constexpr,
    BI: gl.constexpr,
    BT: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Write the sum over a split's samples to out[split], or add it there with ADD."""
    # Tiles in groups of 8 rows, so that those that run together share their columns of x in L2.
    row_tiles, column_tiles = gl.cdiv(outputs, ROWS * GROUPS), gl.cdiv(inputs, BI)
    tile = gl.program_id(0)
    group = tile // (8 * column_tiles)
    rest = tile - group * 8 * column_tiles
    height = min(row_tiles - group * 8, 8)
    o = (group * 8 + rest % height) * (ROWS * GROUPS)
    i = (rest // height) * BI
    split = gl.program_id(1)
    first = split * per_split
    corner = out + split.to(gl.int64) * out_split + o.to(gl.int64) * inputs + i

    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    work = Work(
        delta,
        x,
        gl.allocate_shared_memory(delta.dtype, [STAGES * GROUPS, 1, BT, ROWS], delta.layout),
        gl.allocate_shared_memory(x.dtype, [STAGES, 1, BT, BI], x.layout),
        full,
        empty,
        corner,
        outputs - o,
        inputs - i,
        gl.to_tensor(inputs),
        o,
        i,
        first,
        max(0, min(per_split, samples - first)),
        gl.cdiv(positions, BT),
        SQUARE,
        ADD,
        BI,
        BT,
        GROUPS,
        STAGES,
    )
    if GROUPS == 2:
        gl.warp_specialize(
            [(consume_first, (work,)), (consume_second, (work,)), (produce, (work,))],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [(consume_first, (work,)), (consume_second, (work,)), (consume_third, (work,)), (produce, (work,))],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


def suits(delta: Tensor, x: Tensor) -> bool:
    """Return whether the device has what the kernel is made of, and δ and x lie in memory as it needs."""
    is_hopper = delta.is_cuda and torch.cuda.get_device_capability(delta.device) == (9, 0)
    return is_hopper and delta.dtype in TYPES and is_boxed(delta) and is_boxed(x)


def is_boxed(data: Tensor) -> bool:
    """Return whether TMA can read a tensor: rows in one piece, and everything on multiples of 16 bytes."""
    pitches = [stride * data.element_size() for stride in data.stride()[:-1]]
    # Rows that start over, as those of an expanded tensor, are no grid; 2^40 bytes is what a pitch may be.
    return (
        data.stride(-1) == 1
        and data.data_ptr() % 16 == 0
        and all(0 < pitch < 1 << 40 and pitch % 16 == 0 for pitch in pitches)
    )


def groups_for(outputs: int) -> int:
    """Return how many groups of warps share a tile: three need least of L2, two waste least of a small Ω."""
    return 3 if outputs > 2 * ROWS.value else 2


def step_for(positions: int) -> int:
    """Return the positions in a box: a multiple of the 16 that an instruction multiplies."""
    return max(16, min(64, triton.next_power_of_2(positions)))


def describe(data: Tensor, box: int, step: int) -> TensorDescriptor:
    """Return what TMA must know to bring [1, step, box] pieces of data [N, T, C]."""
    shape = [1, step, box]
    return TensorDescriptor.from_tensor(data, shape, gl.NVMMASharedLayout.get_default_for(shape, TYPES[data.dtype]))


def accumulate(omega: Tensor, delta: Tensor, x: Tensor, square: bool) -> None:
    """Add Σ_n |Σ_t δ xᵀ| to Ω [O, I], of δ [N, T, O] and x [N, T, I] that suit."""
    samples, positions, outputs = delta.shape
    inputs = x.shape[2]
    groups = groups_for(outputs)
    tiles = triton.cdiv(outputs, ROWS.value * groups) * triton.cdiv(inputs, COLUMNS)
    splits = splits_of(tiles, samples, 4 * outputs * inputs, omega.device)
    step = step_for(positions)
    out = omega if splits == 1 else omega.new_empty(splits, outputs, inputs)
    registers, limit = REGISTERS[groups]
    hopper_kernel[(tiles, splits)](
        describe(delta, ROWS.value, step),
        describe(x, COLUMNS, step),
        out,
        samples,
        positions,
        outputs,
        inputs,
        outputs * inputs,
        triton.cdiv(samples, splits),
        SQUARE=square,
        ADD=splits == 1,
        BI=COLUMNS,
        BT=step,
        GROUPS=groups,
        STAGES=STAGES,
        REGISTERS=registers,
        num_warps=4,
        maxnreg=limit,
    )
    if splits > 1:
        omega += out.sum(0)
