"""Which of a few configurations is the fastest on this GPU: measured once for shapes of a kind, and kept in a file.

Only where MAS_FAST_AUTOTUNE=1 asks for it; the configurations that are chosen without are as right, and the reasons for
them stand beside them. The file is `$MAS_FAST_CACHE` (`~/.cache/mas_fast`) `/tiles-<GPU>-triton-<version>.json`.
"""

import json
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import triton

T = TypeVar("T", bound=Hashable)

_chosen: dict[Path, dict[str, int]] = {}


def is_wanted() -> bool:
    """Return whether configurations are to be measured."""
    return os.environ.get("MAS_FAST_AUTOTUNE") == "1"


def bucket(*sizes: int) -> str:
    """Return a name for shapes of a kind: each size up to the next power of two, so that few are measured."""
    return "x".join(str(triton.next_power_of_2(size)) for size in sizes)


def cache_file(device: torch.device) -> Path:
    """Return where choices for a device are kept."""
    folder = Path(os.environ.get("MAS_FAST_CACHE") or Path.home() / ".cache" / "mas_fast")
    name = torch.cuda.get_device_name(device).replace("/", "-").replace(" ", "-").lower()
    return folder / f"tiles-{name}-triton-{triton.__version__}.json"


def fastest(
    key: str,
    candidates: Sequence[T],
    run: Callable[[T], None],
    file: Path,
    time_ms: Callable[[Callable[[], None]], float] | None = None,
) -> T:
    """Return the candidate that runs fastest; what was measured before is not measured again.

    Args:
        key: Names the kernel, the dtype and the kind of shapes.
        candidates: Configurations, in an order that stays; another list of them must have another key.
        run: Runs the kernel with one of them, on data that may be spoilt.
        file: Keeps choices.
        time_ms: Times a call; None for `triton.testing.do_bench`.
    """
    known = _chosen.setdefault(file, _read(file))
    key = f"{key} of {list(candidates)}"
    if key not in known:
        time_ms = time_ms or (lambda call: float(triton.testing.do_bench(call, warmup=5, rep=20)))
        times = [time_ms(partial(run, candidate)) for candidate in candidates]
        # What others have found meanwhile is kept.
        known.update(_read(file) | {key: times.index(min(times))})
        _write(file, known)
    if not 0 <= known[key] < len(candidates):
        raise RuntimeError(
            f"{file} cannot be read (choice {known[key]} for {key}); delete it, and tiles are measured anew"
        )
    return candidates[known[key]]


def _read(file: Path) -> dict[str, int]:
    try:
        found = json.loads(file.read_text())
        return {str(key): int(index) for key, index in found.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(f"{file} cannot be read ({error}); delete it, and tiles are measured anew") from error


def _write(file: Path, known: dict[str, int]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".new", delete=False) as new:
            json.dump(known, new, indent=1)
        os.replace(new.name, file)
    except OSError as error:
        raise RuntimeError(f"{file} cannot be written ({error}); name another folder in MAS_FAST_CACHE") from error
