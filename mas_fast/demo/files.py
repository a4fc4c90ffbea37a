"""The output folder: checked before the work, written to only when all of it is there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


class OutputError(ValueError):
    """The output folder cannot take the results."""


def prepare_folder(folder: Path, names: tuple[str, ...]) -> None:
    """Create the folder if need be, and make sure that files of these names can be written into it.

    Raises:
        OutputError: It is a file, cannot be created or written to, or has a folder of one of the names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise OutputError(
            f"--out must be a folder that can be written to, got {str(folder)!r} ({reason}): choose another folder"
        ) from error
    for name in names:
        if (folder / name).is_dir():
            raise OutputError(f"--out must have no folder named {name!r}, got one in {str(folder)!r}: move it away")


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write all files under temporary names, then give them their names: all or none, also when interrupted.

    Args:
        folder: Where to.
        writers: File name -> callable that writes the file to the path it is given.

    Raises:
        OutputError: The operating system refused, for example because the disk is full.
    """
    staged: dict[Path, Path] = {}
    try:
        for name, writer in writers.items():
            # The suffix is kept: a writer may choose its format by it.
            temporary = folder / f".{os.getpid()}-{name}"
            staged[temporary] = folder / name
            writer(temporary)
        for temporary, path in staged.items():
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"the results must fit into {str(folder)!r}, got: {error}") from error
    finally:
        for temporary in staged:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
