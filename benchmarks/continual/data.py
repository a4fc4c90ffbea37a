"""Images with labels: scikit-learn's digits, a folder of MNIST files, or class folders; always split the same way."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Fixed, so that every seed and every method sees the same images.
SPLIT_SEED = 0
TEST_FRACTION = 0.3
VALIDATION_FRACTION = 0.25
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MNIST_IMAGES, MNIST_LABELS = 0x803, 0x801


class DataError(ValueError):
    """A folder does not hold what was expected; says what was expected and what was found."""


class Images(NamedTuple):
    """Images of known classes.

    Attributes:
        pixels: [N, C, H, W] float32 in [0, 1].
        labels: [N] int64.
        classes: Names of the classes, by label.
    """

    pixels: Tensor
    labels: Tensor
    classes: list[str]

    def of(self, classes: Sequence[int]) -> Images:
        """Return the images of some classes, whose labels are then 0, 1, … in the order given."""
        rows = torch.cat([(self.labels == label).nonzero().flatten() for label in classes]).sort().values
        new = torch.full((len(self.classes),), -1)
        new[list(classes)] = torch.arange(len(classes))
        return Images(self.pixels[rows], new[self.labels[rows]], [self.classes[label] for label in classes])


class Task(NamedTuple):
    """What is learned at one time.

    Attributes:
        name: For tables.
        train: Images to train on.
        train_targets: Their labels [N], or vectors [N, D].
        test: Images that are never trained on.
        test_targets: Likewise.
        outputs: Classes of the task's own head; 0 where all tasks share one output.
    """

    name: str
    train: Tensor
    train_targets: Tensor
    test: Tensor
    test_targets: Tensor
    outputs: int


def digits() -> Images:
    """Return scikit-learn's 1,797 handwritten digits, [N, 1, 8, 8].

    Source: the UCI optical recognition of handwritten digits data.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return Images(images, torch.tensor(labels), [str(digit) for digit in range(10)])


def mnist(folder: Path) -> Images:
    """Return the MNIST test images of a folder, pooled to [10000, 1, 14, 14].

    Raises:
        DataError: The two files are missing, cut short, or something else.
    """
    names = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    paths = [next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None) for name in names]
    if None in paths:
        what = "no such folder" if found is None else f"{len(found)} entries: {', '.join(found[:5]) or 'none'}"
        raise DataError(f"{folder} must hold {' and '.join(names)}, plain or .gz, got {what}")
    pixels = _idx(paths[0], MNIST_IMAGES).float() / 255
    labels = _idx(paths[1], MNIST_LABELS).long()
    if len(pixels) != len(labels):
        raise DataError(f"{folder} must hold a label for each image, got {len(pixels)} images, {len(labels)} labels")
    pooled = torch.nn.functional.avg_pool2d(pixels[:, None], 2)
    return Images(pooled, labels, [str(digit) for digit in range(10)])


def class_folders(folder: Path, side: int = 32) -> Images:
    """Return the images of `folder/<class>/<image>`, as RGB, cut to the central square and scaled: [N, 3, side, side].

    Raises:
        DataError: There is no such folder, fewer than two classes, a class without images, or images that cannot be
            read; all such are listed.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not folder.is_dir():
        raise DataError(f"{folder} must be a folder with a folder of images for each class, got no such folder")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        files = sum(path.is_file() for path in folder.iterdir())
        raise DataError(
            f"{folder} must hold a folder of images for each of two or more classes, got {len(classes)} folders "
            f"and {files} files"
        )
    pixels, labels, problems = [], [], []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            problems.append(f"{name}: no image ({', '.join(SUFFIXES)})")
        for path in paths:
            try:
                with Image.open(path) as image:
                    square = ImageOps.fit(image.convert("RGB"), (side, side))
            except (OSError, UnidentifiedImageError) as error:
                problems.append(f"{path}: {error}")
                continue
            values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
            pixels.append(values.view(side, side, 3).permute(2, 0, 1))
            labels.append(label)
    if problems:
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"{folder} must hold readable images only, got:\n" + "\n".join(problems[:10]) + more)
    return Images(torch.stack(pixels).float() / 255, torch.tensor(labels), classes)


def task_of(name: str, images: Images, *, validation: bool = False) -> Task:
    """Return a task with a head of its own: 70 % of each class to train on, the others to test on.

    Args:
        name: Of the task.
        images: All of its images.
        validation: Hold out a quarter of the training images in place of the test images, which are then not there at
            all. Settings are chosen this way.

    Raises:
        DataError: A class has too few images to be split.
    """
    train, test = split_rows(images.labels, validation=validation)
    outputs = len(images.classes)
    missing = [
        name
        for label, name in enumerate(images.classes)
        if any(label not in images.labels[rows] for rows in (train, test))
    ]
    if missing:
        raise DataError(f"{name} must have enough images of each class to be split, got too few of {missing}")
    return Task(name, images.pixels[train], images.labels[train], images.pixels[test], images.labels[test], outputs)


def split_rows(labels: Tensor, *, validation: bool = False) -> tuple[Tensor, Tensor]:
    """Return the rows to train and to test on, of each class in the same proportion."""
    train, test = _split(torch.arange(len(labels)), labels, TEST_FRACTION)
    return _split(train, labels[train], VALIDATION_FRACTION) if validation else (train, test)


def _split(rows: Tensor, labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    first, second = [], []
    for label in labels.unique():
        own = rows[labels == label]
        own = own[torch.randperm(len(own), generator=generator)]
        held_out = max(1, round(fraction * len(own)))
        first.append(own[held_out:])
        second.append(own[:held_out])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def _idx(path: Path | None, magic: int) -> Tensor:
    """Read a file of unsigned bytes in MNIST's format.

    Source: http://yann.lecun.com/exdb/mnist, FILE FORMATS.
    """
    assert path is not None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError) as error:
        raise DataError(f"{path} must be a whole gzip file, got: {error}") from error
    dimensions = magic & 0xFF
    header = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(dimensions + 1)]
    if header[0] != magic:
        raise DataError(f"{path} must begin with the number {magic:#x}, got {header[0]:#x}")
    shape, start = header[1:], 4 * (dimensions + 1)
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path} must hold {math.prod(shape):,} bytes of {shape}, got {len(content) - start:,}")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)
