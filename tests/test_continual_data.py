"""Data of the experiments: what is loaded, how it is split, and what is said of folders that do not hold it."""

import gzip
import sys
from pathlib import Path

import pytest
import torch

# Last, so that mas_fast is the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.continual.__main__ import main  # noqa: E402
from benchmarks.continual.data import (  # noqa: E402
    DataError,
    Images,
    class_folders,
    digits,
    mnist,
    split_rows,
    task_of,
)
from benchmarks.continual.facts import FACTS, compose, fact_task, vectors  # noqa: E402
from benchmarks.continual.recognition import Source  # noqa: E402


def idx(magic, *shape, values=None):
    header = b"".join(number.to_bytes(4, "big") for number in (magic, *shape))
    return header + bytes(values)


def mnist_folder(folder, *, packed=True, count=6):
    folder.mkdir(parents=True, exist_ok=True)
    images = idx(0x803, count, 28, 28, values=[i % 256 for i in range(count * 28 * 28)])
    labels = idx(0x801, count, values=[i % 10 for i in range(count)])
    for name, content in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(tmp_path, packed):
    found = mnist(mnist_folder(tmp_path, packed=packed))
    assert found.pixels.shape == (6, 1, 14, 14) and found.labels.tolist() == [0, 1, 2, 3, 4, 5]
    # The mean of the first 2 × 2 pixels: 0, 1 and 28, 29.
    assert found.pixels[0, 0, 0, 0].item() == pytest.approx((0 + 1 + 28 + 29) / 4 / 255)


def cut_short(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])


def fewer_pixels(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(0x803, 6, 28, 28, values=[0] * 100)))


def labels_for_images(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())


def fewer_labels(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(0x801, 2, values=[0, 1])))


def no_labels(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_short, "must be a whole gzip file"),
        (fewer_pixels, r"must hold 4,704 bytes of \[6, 28, 28\], got 100"),
        (labels_for_images, "must begin with the number 0x803, got 0x801"),
        (fewer_labels, "got 6 images, 2 labels"),
        (no_labels, "got 1 entries: t10k-images-idx3-ubyte.gz"),
    ],
)
def test_mnist_that_is_not_whole(tmp_path, harm, message):
    harm(mnist_folder(tmp_path))
    with pytest.raises(DataError, match=message):
        mnist(tmp_path)


def test_no_folder(tmp_path, capsys):
    with pytest.raises(DataError, match="got no such folder"):
        mnist(tmp_path / "none")
    with pytest.raises(DataError, match="got no such folder"):
        class_folders(tmp_path / "none")
    assert main(["pairs", "--out", str(tmp_path / "out"), "--mnist", str(tmp_path / "none")]) == 2
    assert "must hold t10k-images-idx3-ubyte" in capsys.readouterr().err


def image_tree(folder, classes=("rose", "tulip"), each=5, size=(50, 40)):
    from PIL import Image

    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", size, (200 * index, 10 * number, 0)).save(folder / name / f"{number}.png")
    return folder


def test_class_folders(tmp_path):
    found = class_folders(image_tree(tmp_path / "flowers"), side=8)
    assert found.classes == ["rose", "tulip"] and found.labels.tolist() == [0] * 5 + [1] * 5
    assert found.pixels.shape == (10, 3, 8, 8)
    assert found.pixels[7].flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([200 / 255, 20 / 255, 0])


def test_class_folders_list_what_is_wrong(tmp_path):
    folder = image_tree(tmp_path / "flowers")
    (folder / "rose" / "3.png").write_bytes(b"not an image")
    (folder / "rose" / "4.png").write_bytes((folder / "rose" / "2.png").read_bytes()[:50])
    (folder / "empty").mkdir()
    with pytest.raises(DataError) as error:
        class_folders(folder)
    for part in ("3.png", "4.png", "empty: no image"):
        assert part in str(error.value)


def test_one_class_is_no_task(tmp_path):
    with pytest.raises(DataError, match="two or more classes, got 1 folders"):
        class_folders(image_tree(tmp_path / "flowers", classes=("rose",)))


def test_tasks_of_folders(tmp_path):
    folders = [image_tree(tmp_path / name, each=10) for name in ("flowers", "scenes", "birds")]
    source = Source(folders=folders)
    pairings = source.pairings(validation=False)
    assert len(pairings) == 6 and "birds → scenes" in pairings
    assert [task.name for task in source.sequence(validation=False).tasks] == ["flowers", "scenes", "birds"]
    with pytest.raises(DataError, match="two or more tasks, each once"):
        Source(folders=folders[:1])
    with pytest.raises(DataError, match="two or more tasks, each once"):
        Source(folders=[folders[0], folders[0]])


def test_classes_with_too_few_images_cannot_be_split():
    images = Images(torch.zeros(5, 1, 4, 4), torch.tensor([0, 0, 0, 0, 1]), ["a", "b"])
    with pytest.raises(DataError, match=r"too few of \['b'\]"):
        task_of("few", images)


def test_split_keeps_test_images_out_of_everything():
    labels = digits().labels
    train, test = split_rows(labels)
    rest, validation = split_rows(labels, validation=True)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    assert sorted([*rest.tolist(), *validation.tolist()]) == train.tolist()
    for label in range(10):
        share = (labels[test] == label).sum() / (labels == label).sum()
        assert share == pytest.approx(0.3, abs=0.01)


def test_classes_are_numbered_anew():
    own = digits().of((7, 3))
    assert own.classes == ["7", "3"]
    assert torch.equal(own.pixels[own.labels == 0], digits().pixels[digits().labels == 7])


def test_images_state_their_facts():
    source = digits()
    facts = [index for index, fact in enumerate(FACTS) if fact in [(3, 0, 5), (3, 1, 5), (0, 2, 9)]]
    images, targets = compose(source, torch.arange(len(source.labels)), facts, 2, 0)
    tops = {0: (4, 4), 1: (0, 8), 2: (8, 0)}  # level with, above, below
    for image, target in zip(images[:, 0], targets.tolist(), strict=True):
        fact, rest = FACTS[target], image.clone()
        for column, digit, top in zip((0, 8), (fact.left, fact.right), tops[fact.relation], strict=True):
            part = image[top : top + 8, column : column + 8]
            assert any(torch.equal(part, own[0]) for own in source.pixels[source.labels == digit])
            rest[top : top + 8, column : column + 8] = 0
        assert rest.abs().max() == 0


def test_fact_tasks_share_no_digit_image_between_training_and_test():
    source = digits()
    task = fact_task("two", source, [0, 299], per_fact=40)
    parts = [
        {tuple(part.flatten().tolist()) for image in images for part in (image[0, 4:12, :8], image[0, 8:, :8])}
        for images in (task.train, task.test)
    ]
    blank = {tuple([0.0] * 64)}
    assert len(task.train) == 80 and len(task.test) == 20
    assert not (parts[0] & parts[1]) - blank


def test_vectors_of_facts_are_told_apart():
    own = vectors()
    assert own.shape == (300, 24)
    distances = torch.cdist(own, own) + 10 * torch.eye(300)
    assert distances.min() > 0.1
