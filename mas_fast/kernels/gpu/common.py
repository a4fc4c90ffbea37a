"""What the Triton kernels share: device facts, and the arithmetic that every one of them ends with."""

import functools
import os

import torch
import triton
import triton.language as tl

# Triton's interpreter runs kernels on the CPU, for tests. It multiplies the bits of bfloat16 and knows no assembly.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# A workspace of partial sums, in bytes.
WORKSPACE = 64 << 20


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return how many streaming multiprocessors a device has; the interpreter is one."""
    return 1 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory a program may have."""
    if INTERPRET:
        return 1 << 20
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def splits_of(tiles: int, samples: int, bytes_each: int, device: torch.device) -> int:
    """Return into how many parts samples are split, so that every multiprocessor has something to do.

    The parts are added up in their order afterwards, so the result does not depend on which ends first.
    """
    wanted = -(-2 * num_sms(device) // max(1, tiles))
    return max(1, min(wanted, samples, WORKSPACE // max(1, bytes_each)))


@triton.jit
def add_magnitude(total, value, SQUARE: tl.constexpr, INTERPRET: tl.constexpr):
    """Return total + |value|, or total + value²."""
    if SQUARE:
        total = tl.fma(value, value, total)
    elif INTERPRET:
        total += tl.abs(value)
    else:
        # One instruction: an addition takes |·| of an operand for nothing. tl.abs and + are four.
        total = tl.inline_asm_elementwise(
            "{ .reg .f32 t; abs.f32 t, $2; add.f32 $0, $1, t; }",
            "=f,f,f",
            [total, value],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return total


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Return total + a b, of two tiles as they were loaded."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
