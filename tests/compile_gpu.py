"""Compile every Triton kernel in every configuration for GPUs that are not here, and look at the machine code.

`python tests/compile_gpu.py` prints a table and fails if a kernel spills registers, leaves the tensor cores idle where
it multiplies matrices, or loads aligned rows in small pieces. It needs triton alone, and neither a GPU nor a driver.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mas_fast.kernels.gpu import affine, conv, embedding, hopper, linear

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
# Compute capability -> bytes of shared memory that a program may have. 8.6 is as 8.0 with less of it.
SHARED = {80: 166912, 86: 101376, 90: 232448}
ARCHITECTURES = (80, 90)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Instructions: products of matrices, asynchronous or not; loads of 8 or 16 bytes, also right into shared memory.
COUNTED = {
    "MMA": r"\bHMMA\.|\bHGMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "TMA": r"\bUTMALDG\b",
    "wide": r"\bLDG(STS)?\.E(\.BYPASS)?(\.LTC\w+)?\.(64|128)\b",
}

TASKS = []  # of a process of the pool


class Configuration(NamedTuple):
    """A kernel as it is launched: types of its pointers, constants, and numbers known to be multiples of 16.

    All other arguments are 32-bit integers.
    """

    label: str
    kernel: object
    pointers: dict
    constants: dict
    aligned: tuple
    options: dict
    is_product: bool = False
    is_wide: bool = False
    architectures: tuple = ARCHITECTURES
    warps: int | None = None  # of a program, where they are more than options say

    @property
    def kernel_variables(self):
        """Numbers that never become constants."""
        return [parameter.name for parameter in self.kernel.params if parameter.do_not_specialize]


def linear_configurations():
    # Less shared memory, fewer stages.
    tile = linear.fitted(linear.WIDE, 2, SHARED[86])
    yield linear_configuration(torch.bfloat16, tile)._replace(architectures=(86,))
    # What autotuning would compare.
    for dtype in (torch.bfloat16, torch.float32):
        for tile in linear.candidates_for(4096, 4096, 512, dtype):
            yield linear_configuration(dtype, tile)
    for dtype, positions in itertools.product(TYPES, (2, 17, 33, 512)):
        tile = linear.tile_for(4096, 4096, positions, dtype)
        for precision in ("tf32x3", "tf32") if dtype == torch.float32 else ("tf32x3",):
            for square in (False, True) if positions == 512 else (False,):
                yield linear_configuration(dtype, tile, precision, square)


def linear_configuration(dtype, tile, precision="tf32x3", square=False):
    return Configuration(
        f"linear {name_of(dtype)} {tile.outputs}x{tile.inputs}x{tile.positions} s{tile.stages} {precision}"
        + " square" * square,
        linear.linear_kernel,
        {"delta": TYPES[dtype], "x": TYPES[dtype], "out": "*fp32"},
        {
            **{"SQUARE": square, "ADD": True, "PRECISION": precision},
            **{"INTERPRET": False, "BO": tile.outputs, "BI": tile.inputs, "BT": tile.positions, "GROUP": 8},
        },
        ("delta", "x", "out", "outputs", "inputs", "delta_n", "delta_t", "x_n", "x_t", "out_split"),
        {"num_warps": tile.warps, "num_stages": tile.stages},
        is_product=True,
        is_wide=True,
    )


def hopper_configurations():
    """Gluon, for sm_90 alone: a warp that loads beside two or three groups of four that multiply."""
    for dtype, groups, positions in itertools.product(hopper.TYPES, (2, 3), (2, 17, 512)):
        step = hopper.step_for(positions)
        for square, add in ((False, True), (False, False), (True, True)) if positions == 512 else ((False, True),):
            registers, limit = hopper.REGISTERS[groups]
            rows = hopper.ROWS.value
            yield Configuration(
                f"hopper {name_of(dtype)} {rows * groups}x{hopper.COLUMNS}x{step}"
                + " square" * square
                + " split" * (not add),
                hopper.hopper_kernel,
                {
                    "delta": box_of(dtype, [1, step, rows]),
                    "x": box_of(dtype, [1, step, hopper.COLUMNS]),
                    "out": "*fp32",
                },
                {
                    **{"SQUARE": square, "ADD": add, "BI": hopper.COLUMNS, "BT": step, "GROUPS": groups},
                    **{"STAGES": hopper.STAGES, "REGISTERS": registers},
                },
                ("out", "outputs", "inputs", "out_split"),
                {"num_warps": 4, "maxnreg": limit},
                is_product=True,
                architectures=(90,),
                # The warp that loads takes the registers of four.
                warps=4 * (groups + 1),
            )


def box_of(dtype, shape):
    """Return the type of a descriptor of boxes, as the launcher writes it."""
    layout = gl.NVMMASharedLayout.get_default_for(shape, hopper.TYPES[dtype])
    return f"tensordesc<{name_of(dtype)}[{','.join(map(str, shape))}],{layout!r}>"


def conv_configurations():
    shared = ("delta", "x", "out")
    for dtype, last, columns in itertools.product(TYPES, (False, True), (27, 576)):
        tile = conv.tile_for(64, columns, 49, dtype)
        inner = {"delta_o": 1, "x_c": 1} if last else {"delta_w": 1, "x_w": 1}
        yield Configuration(
            f"conv {name_of(dtype)} {tile.outputs}x{tile.inputs}x{tile.positions} {'last' if last else 'first'}",
            conv.conv_kernel,
            dict.fromkeys(shared, TYPES[dtype]) | {"out": "*fp32"},
            {
                **{"SQUARE": False, "ADD": False, "CHANNELS_LAST": last, "VOLUME": False, "INTERPRET": False},
                "PRECISION": "tf32x3",
                **{"INDEX": tl.int32, "BO": tile.outputs, "BJ": tile.inputs, "BT": tile.positions, **inner},
                # Images: the first of three axes is 1 long.
                **dict.fromkeys(("stride_d", "stride_h", "stride_w"), 1),
            },
            (*shared, "outputs", "delta_n", "x_n", *(("channels", "x_h", "x_w") if last and columns > 27 else ())),
            {"num_warps": tile.warps, "num_stages": tile.stages},
            is_product=True,
        )
        if columns == 27:
            block = {"BO": 64, "BT": 16} if last else {"BO": 4, "BT": 256}
            yield Configuration(
                f"depthwise {name_of(dtype)} {'last' if last else 'first'}",
                conv.depthwise_kernel,
                dict.fromkeys(shared, TYPES[dtype]) | {"out": "*fp32"},
                {
                    "SQUARE": False,
                    "ADD": False,
                    "INTERPRET": False,
                    "INDEX": tl.int32,
                    "multiplier": 1,
                    **block,
                    **inner,
                },
                (*shared, "outputs", "delta_n", "x_n"),
                {"num_warps": 4},
            )


def embedding_configurations():
    pointers = {"keys": "*i64", "order": "*i64", "ends": "*i64", "ranks": "*i64", "sums": "*fp32"}
    blocks = {"BR": embedding.ROWS, "BD": 128}
    for dtype in TYPES:
        yield Configuration(
            f"embedding pairs {name_of(dtype)}",
            embedding.pairs_kernel,
            {"delta": TYPES[dtype], **pointers},
            {"SQUARE": False, "INTERPRET": False, "delta_d": 1, **blocks},
            ("delta", *pointers, "columns", "first_column", "delta_n", "delta_t"),
            {"num_warps": 4},
            is_wide=True,
        )
    del pointers["order"]
    yield Configuration(
        "embedding rows",
        embedding.rows_kernel,
        {"omega": "*fp32", **pointers},
        blocks,
        ("omega", *pointers, "columns", "first_column", "width"),
        {"num_warps": 4},
        is_wide=True,
    )


def affine_configurations():
    pointers = ("delta", "x", "mean", "rstd", "of_weight", "of_bias")
    for dtype, (inner, norm), rows in itertools.product(
        TYPES, (("r", True), ("r", False), ("s", True), ("both", True)), (1, 1000)
    ):
        last = inner == "r"
        block_q, block_k = affine.blocks_for(rows, last)
        yield Configuration(
            f"affine {name_of(dtype)} {inner} {'norm' if norm else 'bias'} {block_q}x{block_k}",
            affine.sums_kernel,
            dict.fromkeys(pointers, "*fp32") | {"delta": TYPES[dtype], "x": TYPES[dtype]},
            {
                **{
                    "WEIGHT": norm,
                    "BIAS": True,
                    "MEAN": norm,
                    "RSTD": norm,
                    "INNER": inner,
                    "BQ": block_q,
                    "BK": block_k,
                },
                **({"delta_k": 1, "x_k": 1} if last else {"delta_s": 1, "x_s": 1}),
                **{"MAGNITUDES": rows == 1, "SQUARE": False, "INTERPRET": False},
            },
            (*pointers, "entries", "delta_n", "delta_r", "x_n", "x_r"),
            {"num_warps": 4},
            is_wide=last,
        )


def with_ones(configurations):
    """Numbers that are 1 become constants of the kernel: as many of them at once as there can be."""
    for configuration in configurations:
        free = set(configuration.kernel.arg_names) - set(configuration.pointers) - set(configuration.constants)
        ones = dict.fromkeys(free - set(configuration.kernel_variables), 1)
        yield configuration._replace(
            label=configuration.label + " ones",
            constants=configuration.constants | ones,
            aligned=tuple(name for name in configuration.aligned if name not in ones),
            is_wide=False,
        )


def name_of(dtype):
    return TYPES[dtype].removeprefix("*")


def report(configuration, architecture):
    """Return registers, bytes of stack and shared memory, and how often what is counted occurs."""
    names = configuration.kernel.arg_names
    given = configuration.pointers | dict.fromkeys(configuration.constants, "constexpr")
    source = (GluonASTSource if configuration.kernel.is_gluon() else ASTSource)(
        configuration.kernel,
        {name: given.get(name, "i32") for name in names},
        constexprs=configuration.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in configuration.aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=configuration.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spills = len(re.findall(r"\b(STL|LDL)\b", code))
    counts = {name: len(re.findall(pattern, code)) for name, pattern in COUNTED.items()}
    return {"registers": registers, "stack": stack, "spills": spills, "shared": compiled.metadata.shared, **counts}


def report_task(index):
    """Report on a task, in a process of the pool."""
    return report(*TASKS[index])


def faults_of(configuration, architecture, found):
    if found["stack"] or found["spills"]:
        yield f"{found['stack']} bytes of stack and {found['spills']} spills"
    threads = 32 * (configuration.warps or configuration.options["num_warps"])
    if found["registers"] * threads > 65536:
        yield f"{found['registers']} registers for {threads} threads"
    if found["shared"] > SHARED[architecture]:
        yield f"{found['shared']} bytes of shared memory"
    if configuration.is_product and not found["MMA"]:
        yield "no tensor cores"
    narrow = next(iter(configuration.pointers.values())) != "*fp32"
    if configuration.is_product and narrow and architecture == 90 and not found["HGMMA"]:
        yield "no HGMMA"
    if configuration.kernel is hopper.hopper_kernel and not found["TMA"]:
        yield "no loads by TMA"
    if configuration.is_wide and not found["wide"]:
        yield "only loads of 4 bytes or less"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="configurations whose label has this in it")
    only = parser.parse_args(argv).only
    configurations = [
        *linear_configurations(),
        *hopper_configurations(),
        *conv_configurations(),
        *embedding_configurations(),
        *affine_configurations(),
    ]
    of_each_kernel = {c.kernel: c for c in configurations}.values()
    configurations += with_ones(of_each_kernel)
    chosen = [c for c in dict((c.label, c) for c in configurations).values() if only in c.label]
    tasks = [(configuration, architecture) for configuration in chosen for architecture in configuration.architectures]
    failed = []
    # Forked, as kernels cannot be sent to other processes.
    with multiprocessing.get_context("fork").Pool(initializer=TASKS.extend, initargs=(tasks,)) as pool:
        for (configuration, architecture), found in zip(tasks, pool.imap(report_task, range(len(tasks))), strict=True):
            faults = list(faults_of(configuration, architecture, found))
            failed += [f"{configuration.label} sm_{architecture}: {fault}" for fault in faults]
            numbers = "  ".join(f"{name} {value:>6}" for name, value in found.items())
            print(f"{configuration.label:34} sm_{architecture}  {numbers}  {'; '.join(faults)}", flush=True)
    print(f"triton {triton.__version__}: " + (f"{len(failed)} faults" if failed else "no faults"))
    for line in failed:
        print(line)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
