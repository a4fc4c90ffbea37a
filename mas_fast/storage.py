"""Files of tensors with a provenance header: safetensors, written whole or not at all."""

from __future__ import annotations

import datetime
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mas_fast.distributed import Ranks
from mas_fast.sharding import full, is_sharded

FORMAT_VERSION = 1


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write `tensors` and a header to `path` atomically: afterwards it is either the old file or the complete new one.

    The header says what wrote the file (versions of the format, of mas_fast and of torch, and the date), then `header`.
    With DTensors among the tensors all ranks that hold parts must call this: they are gathered one after the other to
    the first rank, which writes.

    Args:
        path: The file to create or replace. Its folder must exist.
        kind: What the file holds, such as "mas_fast.importance"; `read` asks for it.
        tensors: Dense tensors of any strides and on any device; tensors that share memory are written separately.
        header: Further entries, all text.

    Raises:
        FileNotFoundError: The folder of `path` does not exist.
        OSError: The file could not be written, for instance for want of space; or the rank that writes failed.
    """
    ranks = Ranks.holding(tensors.values(), error=OSError)
    # Through a symbolic link the file it points to is replaced, not the link.
    target = Path(path).resolve()
    with ranks.reporting():
        if ranks.first and not target.parent.is_dir():
            raise FileNotFoundError(
                f"path must lie in an existing folder, got {os.fspath(path)!r}: create {target.parent} first"
            )
        ranks.gather(None)
    gathered = _gathered(tensors, keep=ranks.first)
    with ranks.reporting():
        if ranks.first:
            _write(path, target, kind, gathered, header)
        ranks.gather(None)


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return tensors with the DTensors among them whole, on the CPU; nothing unless `keep`."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if keep:
            gathered[name] = whole.cpu() if is_sharded(tensor) else whole
    return gathered


def _write(
    path: str | os.PathLike[str], target: Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> None:
    provenance = {
        "format": "pt",
        "kind": kind,
        "format_version": str(FORMAT_VERSION),
        "mas_fast_version": _package_version(),
        "torch_version": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    # The temporary file is a neighbour because os.replace is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        # An ordinary new file has the permissions that the user's umask grants; the one of safetensors is private.
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        try:
            save_file(_savable(tensors), temporary, metadata=provenance | dict(header))
        except SafetensorError as error:
            raise OSError(f"{os.fspath(path)!r} could not be written, an older file is unchanged: {error}") from error
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that `write` made.

    Args:
        path: The file.
        kind: What the file must hold.

    Returns:
        The tensors on the CPU and the header. The tensors are backed by the file: copy them to keep them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, is no safetensors file, holds something else, or is of another version.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"path must name a file, got the folder {path!r}")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(
            f"{path!r} must be a complete safetensors file, got one that cannot be read ({error}): "
            "it is truncated or not such a file; write it again"
        ) from error
    if header.get("kind") != kind:
        held = header.get("kind", "a safetensors file without the header of mas_fast")
        raise ValueError(f"{path!r} must hold {kind}, got {held}")
    version = header_entry(header, "format_version", path)
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"{path!r} must have format_version {FORMAT_VERSION}, got {version!r}: it was written by mas_fast "
            f"{header.get('mas_fast_version')}; read it with that version"
        )
    return tensors, header


def header_entry(header: Mapping[str, str], key: str, path: str | os.PathLike[str]) -> str:
    """Return one entry of a header.

    Raises:
        ValueError: The header lacks it.
    """
    if key not in header:
        raise ValueError(f"the header of {os.fspath(path)!r} must have the entry {key!r}, got only {sorted(header)}")
    return header[key]


def _savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses strided and memory-sharing tensors; a copy is made of those alone.
    savable, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        savable[name] = tensor
    return savable


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable. Systems that cannot open a folder (Windows) do that on their own.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _package_version() -> str:
    # Late, because the package imports this module.
    import mas_fast

    return str(getattr(mas_fast, "__version__", "unknown"))
