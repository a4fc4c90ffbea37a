"""Every op of mas_fast, declared once: schema, argument checks, fake, and which implementation runs on which device.

The plain-torch reference is the default kernel of every op, so the package is complete before anything is compiled. The
compiled library overlays it through PyTorch's dispatcher: for CPU tensors (csrc/cpu), and, if it was built so, for the
ops of the training step on NVIDIA GPUs (csrc/cuda). The ops that accumulate Ω are Triton kernels there (gpu/), compiled
when they are first called. Letters as in reference.py.
"""

import ctypes
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mas_fast import reference, reference_recurrent, reference_steps

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

LIBRARY_PATH = Path(__file__).resolve().parent.parent / (
    "_kernels.dylib" if sys.platform == "darwin" else "_kernels.so"
)

# Ω, θ* and λ of a list of parameters; `places` say where in Ω and θ* each of them is (reference_steps.py).
HELD = "Tensor[] omegas, Tensor[] scales, Tensor[] anchors, float[] lams"

# op -> (schema, reference kernel)
OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "accumulate_linear_": (
        "(Tensor(a!) omega, Tensor grad_output, Tensor input, bool square=False) -> ()",
        reference.accumulate_linear_,
    ),
    "accumulate_conv_": (
        "(Tensor(a!) omega, Tensor grad_output, Tensor input, int[] stride, int[] padding, int[] dilation,"
        " int groups=1, bool square=False) -> ()",
        reference.accumulate_conv_,
    ),
    "accumulate_embedding_": (
        "(Tensor(a!) omega, Tensor grad_output, Tensor ids, int padding_idx=-1, bool square=False) -> ()",
        reference.accumulate_embedding_,
    ),
    "accumulate_affine_": (
        "(Tensor(a!)? omega_weight, Tensor(b!)? omega_bias, Tensor grad_output, Tensor? input=None, Tensor? mean=None,"
        " Tensor? rstd=None, bool square=False) -> ()",
        reference.accumulate_affine_,
    ),
    "linear_": (
        "(Tensor(a!) output, Tensor input, Tensor weight, Tensor? bias=None) -> ()",
        reference.linear_,
    ),
    "lstm_ahead_": (
        "(Tensor(a!) gates, Tensor(b!) states, Tensor(c!) cells, Tensor(d!) to_c, Tensor(e!) kept,"
        " Tensor(f!)? unprojected, Tensor w_hh, Tensor? b_hh, Tensor? w_hr, int[] sizes, bool reverse=False) -> ()",
        reference_recurrent.lstm_ahead_,
    ),
    "lstm_back_": (
        "(Tensor(a!) delta, Tensor(b!) of_h, Tensor(c!) of_c, Tensor w_hh, Tensor? w_hr, Tensor to_gates, Tensor to_c,"
        " Tensor kept, int[] sizes, bool reverse=False) -> ()",
        reference_recurrent.lstm_back_,
    ),
    "penalty_grad_": (
        f"(Tensor(a!)[] grads, Tensor[] thetas, {HELD}, Tensor? factors=None, bool add=True,"
        " *, int[] places=[]) -> Tensor",
        reference_steps.penalty_grad_,
    ),
    "sgd_step_": (
        f"(Tensor(a!)[] thetas, Tensor[] grads, Tensor(b!)[] momenta, {HELD}, float lr, float momentum=0,"
        " float dampening=0, float weight_decay=0, bool nesterov=False, bool maximize=False, bool first=False,"
        " bool implicit=False, *, int[] places=[]) -> Tensor",
        reference_steps.sgd_step_,
    ),
    "adamw_step_": (
        "(Tensor(a!)[] thetas, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        f" Tensor(d!)[] max_exp_avg_sqs, {HELD}, float[] steps, float lr, float beta1, float beta2, float eps,"
        " float weight_decay=0, bool amsgrad=False, bool maximize=False, bool implicit=False,"
        " *, int[] places=[]) -> Tensor",
        reference_steps.adamw_step_,
    ),
    "encode_omega": ("(Tensor omega) -> (Tensor, Tensor)", reference_steps.encode_omega),
    "decode_omega": ("(Tensor codes, Tensor scales) -> Tensor", reference_steps.decode_omega),
}


def _fake_values(first: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return first[0].new_empty((len(first), 2), dtype=torch.float64)


def _fake_penalty_values(grads: Sequence[Tensor], thetas: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return _fake_values(thetas)


def _fake_codes(omega: Tensor) -> tuple[Tensor, Tensor]:
    blocks = -(-omega.numel() // reference_steps.BLOCK)
    return omega.new_empty(omega.numel(), dtype=torch.uint8), omega.new_empty(blocks, dtype=torch.float32)


# What an op returns that returns anything, as shapes and dtypes.
_FAKES: dict[str, Callable[..., Any]] = {
    "penalty_grad_": _fake_penalty_values,
    "sgd_step_": _fake_values,
    "adamw_step_": _fake_values,
    "encode_omega": _fake_codes,
    "decode_omega": lambda codes, scales: codes.new_empty(codes.shape, dtype=torch.float32),
}

_library = torch.library.Library("mas_fast", "DEF")
for _name, (_schema, _kernel) in OPS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    # Nothing to differentiate: they are called on detached data or under no_grad. Without this, autograd looks at every
    # tensor of a list, which takes as long as the kernels do on hundreds of small ones.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"mas_fast::{_name}", _FAKES.get(_name, lambda *args, **kwargs: None), lib=_library)


def _load() -> str | None:
    """Load the compiled library; return None, or the reason why the reference kernels run instead."""
    wanted = os.environ.get("MAS_FAST_KERNELS", "auto")
    if wanted not in ("auto", "reference"):
        raise ValueError(f"MAS_FAST_KERNELS must be auto or reference, got {wanted!r}")
    if wanted == "reference":
        return "MAS_FAST_KERNELS=reference"
    if not LIBRARY_PATH.exists():
        return "not compiled in this installation (MAS_FAST_BUILD=python, or no compiler was found)"
    try:
        torch.ops.load_library(LIBRARY_PATH)
    except OSError as error:
        # Importing must still work, so that `python -m mas_fast doctor` can say this again.
        warnings.warn(
            f"mas_fast runs its slow kernels: {LIBRARY_PATH} was built but cannot be loaded: {error}; reinstall "
            "mas_fast for this torch, or set MAS_FAST_KERNELS=reference to choose them",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"cannot be loaded: {error}"
    return None


_reference_reason = _load()


def _triton_reason() -> str | None:
    """Return why Triton kernels do not run on GPUs; None if they do."""
    if os.environ.get("MAS_FAST_KERNELS") == "reference":
        return "MAS_FAST_KERNELS=reference"
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "mas_fast[gpu]")'
    return None


def _accumulate_on_gpu(op: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        omega, other = args[:2]
        omega = other if omega is None else omega
        # Triton kernels add up in float32; and older GPUs have not what they are made of.
        if omega.dtype == torch.float64 or torch.cuda.get_device_capability(omega.device) < (8, 0):
            OPS[op][1](*args)
            return
        from mas_fast.kernels import gpu  # imports Triton, which takes long and is not needed elsewhere

        with torch.cuda.device(omega.device):
            getattr(gpu, op)(*args)

    return run


_gpu_reason = _triton_reason()
if _gpu_reason is None:
    for _name in OPS:
        if _name.startswith("accumulate_"):
            _library.impl(_name, _accumulate_on_gpu(_name), "CUDA")
load_error = _reference_reason if (_reference_reason or "").startswith("cannot be loaded") else None


def cpu_capability() -> str | None:
    """Return the instruction set that the compiled CPU kernels chose at run time, or None if the reference runs."""
    if _reference_reason is not None:
        return None
    probe = ctypes.CDLL(str(LIBRARY_PATH)).mas_fast_cpu_instruction_set
    probe.restype = ctypes.c_char_p
    return probe().decode()


class Implementation(NamedTuple):
    """What runs one op on one device, and why nothing faster does (empty if nothing faster exists)."""

    op: str
    device: str
    implementation: str
    reason: str


class Implementations(Sequence[Implementation]):
    """Rows of op × device; prints as a table."""

    def __init__(self, rows: Sequence[Implementation]) -> None:
        """Hold the rows in order."""
        self._rows = tuple(rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        """Return a row, or a tuple of rows for a slice."""
        return self._rows[index]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Implementation]:
        """Iterate over the rows."""
        return iter(self._rows)

    def __str__(self) -> str:
        """Return the rows as an aligned table."""
        lines = [tuple(name.replace("_", " ") for name in Implementation._fields), *self._rows]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def implementations() -> Implementations:
    """Return what runs each op on each device on this machine, and why the alternatives do not."""
    isa = cpu_capability()
    cpu = ("reference", _reference_reason or "") if isa is None else (f"C++ ({isa})", "")
    return Implementations(
        [Implementation(op, device, *row) for op in OPS for device, row in (("cpu", cpu), ("cuda", _on_cuda(op)))]
    )


def _on_cuda(op: str) -> tuple[str, str]:
    """Return what runs an op on NVIDIA GPUs, and why nothing faster does."""
    if op.startswith("accumulate_"):
        return ("Triton", "float64 runs the reference") if _gpu_reason is None else ("reference", _gpu_reason)
    if op == "linear_":
        return "reference", "torch's own products run there"
    if op.startswith("lstm_"):
        return "reference", "there is no kernel of its own: a few launches a step"
    if _reference_reason is not None:
        return "reference", _reference_reason
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mas_fast::{op}", "CUDA"):
        return "CUDA", ""
    return "reference", "not compiled in this installation (MAS_FAST_BUILD=cuda compiles it)"


def linear_(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write x Wᵀ + b to output; see `reference.linear_`.

    Args:
        output: [R, O], float32 or float64, contiguous, written to.
        input: x [R, I], of the same dtype.
        weight: W [O, I], of the same dtype, with any strides.
        bias: b [O], of the same dtype, or None.

    Raises:
        RuntimeError: A shape, dtype or device does not fit.
    """
    if 1 not in weight.stride():
        weight = weight.contiguous()
    torch.ops.mas_fast.linear_(output, input.contiguous(), weight, None if bias is None else bias.contiguous())


def lstm_ahead_(
    gates: Tensor,
    states: Tensor,
    cells: Tensor,
    to_c: Tensor,
    kept: Tensor,
    unprojected: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    sizes: Sequence[int],
    reverse: bool = False,
) -> None:
    """Go through the steps of an LSTM; see `reference_recurrent.lstm_ahead_`."""
    w_hh, b_hh, w_hr = (None if t is None else t.contiguous() for t in (w_hh, b_hh, w_hr))  # type: ignore[assignment]
    given = (gates, states, cells, to_c, kept, unprojected, w_hh, b_hh, w_hr)
    compiled = all(_dense_numbers(t) and t.dtype == gates.dtype for t in given if t is not None)
    run = torch.ops.mas_fast.lstm_ahead_ if compiled else reference_recurrent.lstm_ahead_
    run(*given, sizes, reverse)


def lstm_back_(
    delta: Tensor,
    of_h: Tensor,
    of_c: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    to_gates: Tensor,
    to_c: Tensor,
    kept: Tensor,
    sizes: Sequence[int],
    reverse: bool = False,
) -> None:
    """Go back through the steps of an LSTM; see `reference_recurrent.lstm_back_`."""
    w_hh = w_hh.contiguous()
    w_hr = None if w_hr is None else w_hr.contiguous()
    given = (delta, of_h, of_c, w_hh, to_gates, to_c, kept)
    compiled = all(_dense_numbers(t) and t.dtype == delta.dtype for t in given)
    run = torch.ops.mas_fast.lstm_back_ if compiled else reference_recurrent.lstm_back_
    run(delta, of_h, of_c, w_hh, w_hr, to_gates, to_c, kept, sizes, reverse)


def _dense_numbers(t: Tensor) -> bool:
    """Return whether the compiled kernels of recurrent layers take a tensor."""
    return t.dtype in (torch.float32, torch.float64) and t.is_contiguous()


def accumulate_linear_(omega: Tensor, grad_output: Tensor, input: Tensor, square: bool = False) -> None:
    """Add Σ_n |Σ_t δ_nt x_ntᵀ| to omega; see `reference.accumulate_linear_`.

    Args:
        omega: [O, I], float32 or float64, changed in place.
        grad_output: δ [N, T, O], any floating dtype.
        input: x [N, T, I], any floating dtype.
        square: Σ_n (·)² instead of Σ_n |·|.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    _check_omega("omega", omega, 2)
    samples, positions = _check_data("grad_output", grad_output, omega, 3).shape[:2]
    _check_shape("grad_output", grad_output, (samples, positions, omega.shape[0]))
    _check_shape("input", _check_data("input", input, omega, 3), (samples, positions, omega.shape[1]))
    if not omega.is_contiguous() and omega.mT.is_contiguous():
        # Ωᵀ of y = W x is Ω with x and δ exchanged.
        omega, grad_output, input = omega.mT, input, grad_output
    grad_output, input = _common_dtype(omega, grad_output, input)
    _add_into(omega, torch.ops.mas_fast.accumulate_linear_, grad_output, input, square)


def accumulate_conv_(
    omega: Tensor,
    grad_output: Tensor,
    input: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    square: bool = False,
) -> None:
    """Add Σ_n |∂⟨δ_n, conv(x_n, W)⟩/∂W| to omega; see `reference.accumulate_conv_`.

    On the CPU, 3 × 3 with steps of 1 goes by Winograd's minimal filtering where that is faster: with 16 multiply-adds
    in the place of 36, and errors of some eps of ‖δ_n‖ ‖x_n‖ (of one output and channel) for all nine entries alike.

    Args:
        omega: [O, I/groups, *kernel] with 1, 2 or 3 kernel axes, float32 or float64, changed in place.
        grad_output: δ [N, O, *out], any floating dtype.
        input: x [N, I, *in], any floating dtype.
        stride: One positive number per axis.
        padding: Zeros on both sides, one number per axis.
        dilation: One positive number per axis.
        groups: Channel groups.
        square: Σ_n (·)² instead of Σ_n |·|.

    Raises:
        ValueError: A shape, dtype, device or geometry does not fit.
    """
    axes = omega.dim() - 2
    if axes not in (1, 2, 3):
        raise ValueError(f"omega must have 1, 2 or 3 kernel axes, got shape {list(omega.shape)}")
    _check_omega("omega", omega, axes + 2)
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != axes or any(value < least for value in values):
            raise ValueError(f"{name} must be {axes} numbers of at least {least}, got {list(values)}")
    if groups < 1 or omega.shape[0] % groups:
        raise ValueError(f"groups must divide the {omega.shape[0]} output channels, got {groups}")
    samples = _check_data("input", input, omega, axes + 2).shape[0]
    _check_shape("input", input, (samples, omega.shape[1] * groups, *input.shape[2:]))
    out = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(input.shape[2:], omega.shape[2:], stride, padding, dilation, strict=True)
    ]
    _check_data("grad_output", grad_output, omega, axes + 2)
    _check_shape("grad_output", grad_output, (samples, omega.shape[0], *out))
    grad_output, input = _common_dtype(omega, grad_output, input)
    geometry = list(stride), list(padding), list(dilation), groups
    _add_into(omega, torch.ops.mas_fast.accumulate_conv_, grad_output, input, *geometry, square)


def accumulate_embedding_(
    omega: Tensor, grad_output: Tensor, ids: Tensor, padding_idx: int = -1, square: bool = False
) -> None:
    """Add Σ_n |Σ_{t: ids_nt = v} δ_nt| to every row v of omega; see `reference.accumulate_embedding_`.

    Args:
        omega: [V, D], float32 or float64, changed in place.
        grad_output: δ [N, T, D], any floating dtype.
        ids: int32 or int64 [N, T], each in [0, V).
        padding_idx: Row that gets nothing; negative for none.
        square: Σ_n (·)² instead of Σ_n |·|.

    Raises:
        ValueError: A shape, dtype, device or id does not fit.
    """
    _check_omega("omega", omega, 2)
    samples, positions = _check_data("grad_output", grad_output, omega, 3).shape[:2]
    _check_shape("grad_output", grad_output, (samples, positions, omega.shape[1]))
    _check_shape("ids", ids, (samples, positions))
    if ids.dtype not in (torch.int32, torch.int64) or ids.device != omega.device:
        raise ValueError(f"ids must be int32 or int64 on {omega.device}, got {ids.dtype} on {ids.device}")
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < omega.shape[0]:
        raise ValueError(f"ids must lie in [0, {omega.shape[0]}), got {int(ids.min())} to {int(ids.max())}")
    (grad_output,) = _common_dtype(omega, grad_output)
    _add_into(omega, torch.ops.mas_fast.accumulate_embedding_, grad_output, ids.long(), padding_idx, square)


def accumulate_affine_(
    omega_weight: Tensor | None,
    omega_bias: Tensor | None,
    grad_output: Tensor,
    input: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    square: bool = False,
) -> None:
    """Add Σ_n |Σ_rs δ (x − mean) rstd| to omega_weight and Σ_n |Σ_rs δ| to omega_bias; see `reference`.

    Args:
        omega_weight: [K], float32 or float64, changed in place, or None.
        omega_bias: [K], of the same dtype, changed in place, or None.
        grad_output: δ [N, R, K, S], any floating dtype.
        input: x, of the shape of δ; needed with omega_weight.
        mean: Broadcasts to the shape of δ; None is 0.
        rstd: Broadcasts to the shape of δ; None is 1.
        square: Σ_n (·)² instead of Σ_n |·|.

    Raises:
        ValueError: A shape, dtype or device does not fit, or nothing is to be accumulated.
    """
    first = omega_bias if omega_weight is None else omega_weight
    if first is None:
        raise ValueError("omega_weight or omega_bias must be a tensor, got None for both")
    for name, omega in (("omega_weight", omega_weight), ("omega_bias", omega_bias)):
        if omega is None:
            continue
        _check_omega(name, omega, 1)
        if omega.shape != first.shape or omega.dtype != first.dtype:
            raise ValueError(f"omega_weight and omega_bias must agree, got {first.shape} and {omega.shape}")
    shape = _check_data("grad_output", grad_output, first, 4).shape
    _check_shape("grad_output", grad_output, (*shape[:2], first.shape[0], shape[3]))
    if omega_weight is None:
        input = mean = rstd = None
    elif input is None:
        raise ValueError("input must be a tensor where omega_weight is given, got None")
    else:
        _check_shape("input", _check_data("input", input, first, 4), shape)
        grad_output, input = _common_dtype(first, grad_output, input)
        mean, rstd = (None if t is None else t.to(first.dtype).broadcast_to(shape) for t in (mean, rstd))
    (grad_output,) = _common_dtype(first, grad_output)
    data = grad_output, input, mean, rstd, square
    if all(omega is None or omega.is_contiguous() for omega in (omega_weight, omega_bias)):
        torch.ops.mas_fast.accumulate_affine_(omega_weight, omega_bias, *data)
        return
    with contiguous(omega_weight) as weight, contiguous(omega_bias) as bias:
        torch.ops.mas_fast.accumulate_affine_(weight, bias, *data)


@contextmanager
def contiguous(omega: MaybeTensor) -> Iterator[MaybeTensor]:
    """Give a contiguous Ω to write to; what was added to a copy is added back at the end, unless an error flew."""
    if omega is None or omega.is_contiguous():
        yield omega
    else:
        buffer = torch.zeros_like(omega, memory_format=torch.contiguous_format)
        yield buffer
        omega += buffer


def _add_into(omega: Tensor, op: Callable[..., None], *rest: Any) -> None:
    # Without the context where it does nothing: small models feel it.
    if omega.is_contiguous():
        op(omega, *rest)
        return
    with contiguous(omega) as buffer:
        op(buffer, *rest)


def _check_omega(name: str, omega: Tensor, dims: int) -> None:
    if omega.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {omega.dtype}; Ω is never accumulated in less")
    if omega.dim() != dims:
        raise ValueError(f"{name} must have {dims} axes, got shape {list(omega.shape)}")
    if omega.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it is changed in place; pass {name}.detach()")


def _check_data(name: str, data: Tensor, omega: Tensor, dims: int) -> Tensor:
    if not data.is_floating_point() or data.device != omega.device:
        raise ValueError(f"{name} must be floating-point on {omega.device}, got {data.dtype} on {data.device}")
    if data.dim() != dims:
        raise ValueError(f"{name} must have {dims} axes, got shape {list(data.shape)}")
    return data


def _check_shape(name: str, data: Tensor, shape: tuple[int, ...]) -> None:
    if data.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(data.shape)}")


def _common_dtype(omega: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
    """Bring data to one dtype that the kernels take: float64 for a float64 Ω, else float32, bfloat16 or float16."""
    dtype = omega.dtype
    if dtype != torch.float64:
        dtypes = {t.dtype for t in data}
        narrow = dtypes in ({torch.bfloat16}, {torch.float16})
        dtype = dtypes.pop() if narrow else torch.float32
    return tuple([t.detach().to(dtype) if t.requires_grad or t.dtype != dtype else t for t in data])
