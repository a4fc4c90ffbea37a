"""The demo: what it writes, that its numbers agree with each other, and what it does when it cannot run."""

import argparse
import io
import json
import math
import statistics
import struct
import sys

import pytest
import torch

from mas_fast import demo
from mas_fast.demo import command, files, metrics, plot, report, train
from mas_fast.demo.data import load_tasks
from mas_fast.demo.network import LAYERS, make_network
from mas_fast.demo.settings import Settings

METHODS = ("fine-tuning", "MAS", "joint")
SHORT = Settings(epochs=1)


def parse(*options):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


def run(*options):
    return demo.main(parse(*options))


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    with train.single_thread():
        yield


@pytest.fixture(scope="module")
def tasks():
    return load_tasks()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One quick run: its folder, its result and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        # sys.stdout itself, since capsys does not reach a fixture of a module.
        printed = io.StringIO()
        patch.setattr(sys, "stdout", printed)
        patch.setattr(command, "QUICK_EPOCHS", 3)
        patch.setattr(command, "QUICK_REPEATS", 3)
        random_state = torch.random.get_rng_state()
        torch.set_num_threads(2)
        status = run("--out", folder, "--quick", "--seeds", 2)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
    assert (status, threads) == (0, 2)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    result = json.loads((folder / "demo.json").read_text("utf-8"), parse_constant=refuse_constant)
    return folder, result, printed.getvalue()


def test_writes_exactly_two_files(finished):
    folder, _, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "demo.png"]
    png = (folder / "demo.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1500 and height > 600


def test_result_says_what_was_run(finished):
    _, result, _ = finished
    assert result["seeds"] == [0, 1]
    assert result["settings"] == {
        "lam": Settings.lam,
        "lr": Settings.lr,
        "epochs": 3,
        "batch_size": Settings.batch_size,
    }
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["threads"] == 1 and result["machine"]["platform"]
    assert [task["name"] for task in result["tasks"]] == ["0/1", "2/3", "4/5", "6/7", "8/9"]
    assert sum(task["train"] + task["test"] for task in result["tasks"]) == 1797
    assert tuple(result["methods"]) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_aggregates_follow_from_the_matrices(finished, method):
    _, result, _ = finished
    summary = result["methods"][method]
    matrices = summary["accuracy"]["per_seed"]
    assert len(matrices) == 2
    for matrix in matrices:
        assert [len(row) for row in matrix] == [1, 2, 3, 4, 5]
        for row in matrix:
            for accuracy, task in zip(row, result["tasks"], strict=False):
                # A share of that task's test images.
                assert accuracy * task["test"] == pytest.approx(round(accuracy * task["test"]))

    average = [sum(matrix[4]) / 5 for matrix in matrices]
    assert summary["average_accuracy"]["per_seed"] == pytest.approx(average)
    assert summary["average_accuracy"]["mean"] == pytest.approx(sum(average) / 2)
    assert summary["average_accuracy"]["standard_error"] == pytest.approx(abs(average[0] - average[1]) / 2)
    assert summary["accuracy_along_sequence"][4]["per_seed"] == pytest.approx(average)
    forgetting = [sum(max(m[i][j] for i in range(j, 4)) - m[4][j] for j in range(4)) / 4 for m in matrices]
    assert summary["forgetting"]["per_seed"] == pytest.approx(forgetting)
    new = [sum(matrix[i][i] for i in range(5)) / 5 for matrix in matrices]
    assert summary["new_task_accuracy"]["per_seed"] == pytest.approx(new)
    assert summary["accuracy"]["mean"][3][1] == pytest.approx(statistics.fmean(m[3][1] for m in matrices))


def test_methods_start_alike(finished):
    """All methods see the same weights and batches until the second task."""
    _, result, _ = finished
    first = [[matrix[0] for matrix in result["methods"][name]["accuracy"]["per_seed"]] for name in METHODS]
    assert first[0] == first[1] == first[2]


def test_importance_of_the_tasks_adds_up(finished):
    _, result, _ = finished
    assert tuple(result["importance"]) == LAYERS
    for name, layer in result["importance"].items():
        # Each head belongs to one of the five tasks; the trunk to all.
        share = 5 if name == "heads" else 1
        assert layer["mean"] == pytest.approx(sum(layer["mean_of_each_task"]) / share, rel=1e-5)
        quantiles = list(layer["quantiles_of_nonzero"].values())
        assert 0 < quantiles[0] and quantiles == sorted(quantiles)
        assert 0 <= layer["zero_fraction"] < 1


def test_cost(finished):
    _, result, _ = finished
    cost = result["cost"]
    median_ms = {name: times["p50"] for name, times in cost["time_ms"].items()}
    assert set(median_ms) == {"ordinary", "pass", "loop"} and min(median_ms.values()) > 0
    assert cost["pass_over_ordinary"] == pytest.approx(median_ms["pass"] / median_ms["ordinary"])
    assert cost["loop_over_pass"] == pytest.approx(median_ms["loop"] / median_ms["pass"])
    assert cost["num_samples"] == sum(task["train"] for task in result["tasks"])
    assert 0 < cost["max_relative_error"] < 1e-5


def test_prints_the_numbers_that_it_writes(finished):
    folder, result, printed = finished
    assert printed.splitlines()[-1] == result["conclusion"]
    assert str(folder / "demo.json") in printed
    for method in result["methods"].values():
        for key in ("average_accuracy", "forgetting"):
            assert f"{100 * method[key]['mean']:.1f} ± {100 * method[key]['standard_error']:.1f}" in printed
    assert f"{result['cost']['pass_over_ordinary']:.2f} × the ordinary" in printed
    assert f"{result['cost']['max_relative_error']:.1e}" in printed


MATRIX = [[0.9], [0.5, 0.8], [0.6, 0.9, 0.7], [0.3, 0.7, 0.8, 1.0]]


def test_metrics_by_hand():
    # Best before the last row: 0.9, 0.9, 0.7; after it: 0.3, 0.7, 0.8.
    assert metrics.forgetting(MATRIX) == pytest.approx((0.6 + 0.2 - 0.1) / 3)
    assert metrics.average_accuracy(MATRIX) == pytest.approx(0.7)
    assert metrics.new_task_accuracy(MATRIX) == pytest.approx(0.85)
    assert metrics.accuracy_along_sequence(MATRIX) == pytest.approx([0.9, 0.65, 2.2 / 3, 0.7])
    with pytest.raises(ValueError, match="matrix must have at least 2 tasks, got 1"):
        metrics.forgetting([[1.0]])


def test_spread_by_hand():
    assert metrics.mean_and_error([1.0, 2.0, 6.0]) == {"mean": 3.0, "standard_error": pytest.approx(math.sqrt(7 / 3))}
    assert metrics.mean_and_error([0.5]) == {"mean": 0.5, "standard_error": None}
    # Student's t with 2 degrees of freedom has its 97.5 % point at 4.30265.
    reach = 4.30265 * math.sqrt(7 / 3)
    assert metrics.interval_95([1.0, 2.0, 6.0]) == pytest.approx([3 - reach, 3 + reach], rel=1e-5)
    assert metrics.interval_95([0.5]) is None


def test_split_is_fixed_and_the_choice_never_sees_test_images(tasks):
    def images(tensors):
        return {image.numpy().tobytes() for tensor in tensors for image in tensor}

    chosen_on = load_tasks(validation=True)
    for task, again, choice in zip(tasks, load_tasks(), chosen_on, strict=True):
        assert torch.equal(task.train_images, again.train_images) and torch.equal(task.test_labels, again.test_labels)
        assert set(task.train_labels.tolist()) == set(task.test_labels.tolist()) == {0, 1}
        assert len(choice.train_images) + len(choice.test_images) == len(task.train_images)
        assert images([choice.train_images, choice.test_images]) == images([task.train_images])
        assert not images([task.train_images]) & images([task.test_images])
        assert not images([choice.train_images]) & images([choice.test_images])


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything(tasks, method):
    # Two tasks, so that joint training is short too.
    first, again, other = (train.METHODS[method](tasks[:2], SHORT, seed, lambda trained: None) for seed in (3, 3, 4))
    parameters = [dict(each.network.named_parameters()) for each in (first, again, other)]
    assert first.accuracy == again.accuracy
    assert all(torch.equal(parameters[0][name], parameters[1][name]) for name in parameters[0])
    assert not all(torch.equal(parameters[0][name], parameters[2][name]) for name in parameters[0])


def test_mas_without_weight_is_fine_tuning(tasks):
    settings = Settings(lam=0.0, epochs=1)
    mas = train.run_mas(tasks[:3], settings, 0, lambda trained: None)
    plain = train.run_fine_tuning(tasks[:3], settings, 0, lambda trained: None)
    for (name, one), (_, other) in zip(mas.network.named_parameters(), plain.network.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_mas_holds_what_is_important(tasks):
    """Σ Ω (θ − θ*)², how far the second task moves what the first one needs, is far smaller with the penalty."""

    def movement(lam):
        settings = Settings(lam=lam, epochs=5)
        first, both = (train.run_mas(tasks[:seen], settings, 0, lambda trained: None) for seen in (1, 2))
        end = first.network.state_dict(), both.network.state_dict()
        return sum((omega * (end[1][name] - end[0][name]) ** 2).sum().item() for name, omega in first.omega.items())

    assert 0 < movement(1.0) < 0.2 * movement(0.0)


def test_a_head_has_importance_for_its_own_task_only(tasks):
    done = train.run_mas(tasks[:3], SHORT, 0, lambda trained: None)
    for task, importance in enumerate(done.importance):
        assert {name for name in importance if name.startswith("heads")} == {
            f"heads.{task}.weight",
            f"heads.{task}.bias",
        }
        assert torch.equal(done.omega[f"heads.{task}.weight"], importance[f"heads.{task}.weight"])
        assert importance.num_samples == len(tasks[task].train_images)


def test_progress_reaches_its_end(tasks):
    steps = []
    for method in train.METHODS.values():
        method(tasks[:3], SHORT, 0, steps.append)
    assert sum(steps) == train.trainings_per_seed(3) == 12


def conclusion(fine_tuning, mas):
    avoided = [a - b for a, b in zip(fine_tuning, mas, strict=True)]
    forgetting = {"fine-tuning": fine_tuning, "MAS": mas, "joint": [0.0] * len(mas)}
    return report.conclude(
        {
            "seeds": list(range(len(mas))),
            "settings": {"lam": 0.5},
            "methods": {name: {"forgetting": metrics.mean_and_error(values)} for name, values in forgetting.items()},
            "forgetting_avoided": metrics.mean_and_error(avoided)
            | {"per_seed": avoided, "interval_95": metrics.interval_95(avoided)},
        }
    )


@pytest.mark.parametrize(
    ("fine_tuning", "mas", "verdict"),
    [
        (
            [0.20, 0.22, 0.21],
            [0.02, 0.03, 0.02],
            "forgot less than fine-tuning over 3 seeds: 2.3 ± 0.3 points against 21.0",
        ),
        ([0.02, 0.30, 0.04], [0.03, 0.03, 0.03], "was not shown to forget less than fine-tuning over 3 seeds"),
        ([0.02, 0.03, 0.02], [0.20, 0.22, 0.21], "did not forget less than fine-tuning over 3 seeds"),
        ([0.20], [0.02], "forgot less than fine-tuning over 1 seed: 2.0 points against 20.0 (joint training: 0.0)."),
        ([0.20], [0.20], "did not forget less than fine-tuning over 1 seed"),
    ],
    ids=["less", "noise", "more", "one seed", "equal"],
)
def test_conclusion_follows_the_numbers(fine_tuning, mas, verdict):
    assert conclusion(fine_tuning, mas).startswith(f"MAS (λ = 0.5) {verdict}")


@pytest.fixture
def untrained(monkeypatch):
    """Fail if the training starts."""

    def start(*args):
        raise AssertionError("the training has started")

    monkeypatch.setattr(command, "_train_all", start)


@pytest.mark.usefixtures("untrained")
def test_out_that_cannot_be_written_is_found_before_the_training(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "taken" / "demo.png").mkdir(parents=True)
    for out, message in [
        (file, f"--out must be a folder that can be written to, got {str(file)!r} (it is a file): choose another"),
        (file / "below", f"--out must be a folder that can be written to, got {str(file / 'below')!r}"),
        (tmp_path / "taken", "--out must have no folder named 'demo.png'"),
    ]:
        assert run("--out", out) == 2
        assert message in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    # The owner of the machine may write anywhere, so the refusal is put on.
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(files.OutputError, match=r"--out must be a folder .* \(Permission denied\): choose another"):
        files.prepare_folder(tmp_path, ("demo.json",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "0"), "must be a whole number of at least 1, got '0'"),
        (("--seeds", "two"), "must be a whole number of at least 1, got 'two'"),
        (("--lam=-1",), "must be a finite number of at least 0, got '-1'"),
        (("--lam", "nan"), "must be a finite number of at least 0, got 'nan'"),
        (("--lam", "much"), "must be a finite number of at least 0, got 'much'"),
    ],
)
def test_bad_options(capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        parse(*options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_missing_package(tmp_path, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert run("--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert {"sklearn": "scikit-learn"}.get(module, module) in error and 'pip install "mas_fast[demo]"' in error
    assert not (tmp_path / "out").exists()


def test_divergence_is_an_error_and_writes_nothing(tmp_path, capsys):
    assert run("--out", tmp_path, "--quick", "--seeds", 1, "--lam", 1e9) == 1
    assert "loss must stay finite" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_the_files_as_they_were(tmp_path, capsys, monkeypatch):
    (tmp_path / "demo.json").write_text("of an earlier run")

    def interrupt(result, path):
        path.write_bytes(b"half a pic")
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "draw", interrupt)
    monkeypatch.setattr(command, "QUICK_EPOCHS", 1)
    assert run("--out", tmp_path, "--quick", "--seeds", 1) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
    assert (tmp_path / "demo.json").read_text() == "of an earlier run"


def test_full_disk_is_a_clear_error(tmp_path):
    def refuse(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(files.OutputError, match="No space left on device"):
        files.write_together(tmp_path, {"first": lambda path: path.write_text("whole"), "second": refuse})
    assert not list(tmp_path.iterdir())


def test_weights_follow_the_seed_and_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    first, again, other = (make_network(2, seed).conv1.weight for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
