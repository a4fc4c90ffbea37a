"""`python -m mas_fast doctor`: what runs on this machine, and why the alternatives do not."""

import importlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mas_fast
from mas_fast.kernels import ops, products

PACKAGE_DIR = Path(mas_fast.__file__).resolve().parent

# What the machine cannot say, but a model can.
POINTERS = (
    "Is the importance of your model right? mas_fast.verify(model, batch) compares it with the per-sample loop.",
    "Which rule served which parameter, and why did some loop? print(importance.coverage), see Importance.coverage.",
)


def main() -> int:
    """Print the report; return 0, or 1 if something that was built cannot be used."""
    print(report())
    found = problems()
    for problem in found:
        print(f"\nPROBLEM  {problem}")
    return 1 if found else 0


def report() -> str:
    """Return versions, how the package was built, every op's implementation by device, and where to ask further."""
    chosen = ops.cpu_capability() or "reference kernels only"
    facts = {
        "mas_fast": f"{mas_fast.__version__} in {PACKAGE_DIR}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "CPU": f"{chosen} (torch: {torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads",
        "products": "linear_ of mas_fast, twice as fast here as MKL" if products.torch_is_slow() else "torch's own",
        "GPU": ", ".join(gpu_names()) or "none that torch can use",
        "build": build_text(build_info()),
    }
    width = max(map(len, facts))
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts.items()]
    if torch.cuda.is_available():
        lines += ["", *first_call_lines(torch.device("cuda"))]
    return "\n".join([*lines, "", str(ops.implementations()), "", *POINTERS])


def first_call_lines(device: torch.device) -> list[str]:
    """Return what the first call of each op that accumulates Ω costs, which compiles it, and the second."""
    data = torch.ones(2, 8, 16, device=device)
    ids = torch.zeros(2, 8, dtype=torch.long, device=device)
    image, kernel = data.view(2, 16, 8, 1), torch.zeros(16, 16, 1, 1, device=device)
    omega, column = torch.zeros(16, 16, device=device), torch.zeros(16, device=device)
    calls = {
        "accumulate_linear_": lambda: ops.accumulate_linear_(omega, data, data),
        "accumulate_conv_": lambda: ops.accumulate_conv_(kernel, image, image, [1, 1], [0, 0], [1, 1]),
        "accumulate_embedding_": lambda: ops.accumulate_embedding_(omega, data, ids),
        "accumulate_affine_": lambda: ops.accumulate_affine_(None, column, data.unsqueeze(3)),
    }
    lines = ["first call on the GPU, which compiles or finds in Triton's cache, and the next:"]
    for name, call in calls.items():
        first, second = (time_ms(call, device) for _ in range(2))
        lines.append(f"  {name.ljust(22)}  {first:9.3f} ms  {second:8.3f} ms")
    return lines


def time_ms(call: Callable[[], None], device: torch.device) -> float:
    """Return how long a call takes, with all that it starts on the device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def gpu_names() -> list[str]:
    """Return the names of the CUDA devices that torch sees now."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(index) for index in range(count)]


def build_info() -> dict[str, Any] | None:
    """Return what `_C` says about the compiled library; None if nothing was compiled or `_C` cannot be imported."""
    try:
        return importlib.import_module("mas_fast._C").build_info()
    except ImportError:
        return None


def build_text(info: dict[str, Any] | None) -> str:
    """Return one line on how the package was built."""
    if info is None:
        return (
            "Python only; the compiled kernels come with 'MAS_FAST_BUILD=cpu pip install --no-build-isolation', "
            "which names whatever it lacks"
        )
    cuda = ", ".join(info.get("cuda_architectures", ()))  # a `_C` from before there were any does not say
    return (
        f"C++ kernels for {info['architecture']} ({', '.join(info['instruction_sets'])}) by {info['compiler']}, "
        + (f"CUDA kernels for compute capability {cuda} by {info['cuda_compiler']}, " if cuda else "no CUDA kernels, ")
        + f"with torch {info['torch']}; needs torch >= {info['oldest_torch']}"
    )


def problems() -> list[str]:
    """Return what was built into the package and cannot be used: one line each, with the way out."""
    library, modules = built_files()
    if library is None and not modules:
        return []
    found = []
    if library is None:
        found.append(f"{ops.LIBRARY_PATH} is missing although {modules[0].name} is there")
    elif (error := load_error(library)) is not None:
        found.append(f"{library} cannot be loaded: {error}")
    info = build_info()
    if info is None:
        found.append(f"mas_fast._C cannot be imported by Python {platform.python_version()}: {names_of(modules)}")
    elif info["version"] != mas_fast.__version__:
        found.append(f"the kernels were built from version {info['version']}, the package is {mas_fast.__version__}")
    return [f"{problem}; reinstall mas_fast for this Python and torch" for problem in found]


def built_files() -> tuple[Path | None, list[Path]]:
    """Return the compiled op library, if it is there, and every build of the module `_C`, for whichever Python."""
    return ops.LIBRARY_PATH if ops.LIBRARY_PATH.exists() else None, sorted(PACKAGE_DIR.glob("_C.*.so"))


def load_error(library: Path) -> str | None:
    """Return why torch cannot load a library, or None if it can."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return str(error)
    return None


def names_of(modules: list[Path]) -> str:
    """Return what was found of `_C`, for a message."""
    return "found " + (", ".join(path.name for path in modules) or "no file of it")
