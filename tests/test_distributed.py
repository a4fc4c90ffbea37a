"""Data-parallel models: the same Ω as one process gives, nothing left behind, and no rank that waits for ever."""

import pytest
import torch
from compare import truth_of, worst_error
from distributed_worker import ERRORS, WORLD, serve
from torch import nn

import mas_fast
from mas_fast.distributed import uncoupled

# No case takes more than seconds; what hangs must not hang the tests.
TIMEOUT_S = 30


class Pool:
    """Processes that form a group and run one case after the other; starting them takes longer than most cases."""

    def __init__(self, folder):
        context = torch.multiprocessing.get_context("forkserver")
        # Imported once, and not by every process.
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "mas_fast"])
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.connections = [ours for ours, _ in pipes]
        store = str(folder / "store")
        self.processes = [
            context.Process(target=serve, args=(rank, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        self._answers()

    def run(self, case, size, **arguments):
        for connection in self.connections:
            connection.send((case, size, arguments))
        failures = [answer for answer in self._answers() if answer is not None]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)

    def _answers(self):
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(TIMEOUT_S):
                self.kill()
                pytest.fail(f"rank {rank} gave no answer in {TIMEOUT_S} s")
            answers.append(connection.recv())
        return answers

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def close(self):
        if self.alive:
            for connection in self.connections:
                connection.send(None)
        for process in self.processes:
            process.join(TIMEOUT_S)

    def kill(self):
        for process in self.processes:
            process.kill()


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    made = []

    def pool():
        if not made or not made[-1].alive:
            made.append(Pool(tmp_path_factory.mktemp("pool")))
        return made[-1]

    yield pool
    for one in made:
        one.close()


@pytest.fixture
def run(pools):
    return pools().run


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", ["net", "resnet", "transformer"])
def test_is_exact(run, size, wrap, model):
    run("exact", size, model=model, wrap=wrap)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_is_exact_with_a_rank_that_has_no_batch(run, size, wrap):
    run("exact", size, model="net", wrap=wrap, idle=True)


@pytest.mark.parametrize(
    "wrap",
    [
        "compile of ddp",
        "ddp of compile",
        "ddp of a compiled part",
        "ddp of data parallel",
        "fsdp of the root alone",
        "fsdp never resharded",
        "fsdp with a method",
        "fsdp together",
        "ddp of a checkpointed part",
        "fsdp of a checkpointed part",
        "fsdp but for one parameter",
        "compile of fsdp",
        "fsdp of a compiled part",
    ],
)
def test_is_exact_however_it_is_wrapped(run, wrap):
    run("exact", 2, model="net", wrap=wrap)


def test_is_exact_on_a_mesh_of_two_axes(run):
    run("exact", 4, model="transformer", wrap="hsdp")


def test_is_exact_with_squares_and_other_objectives(run):
    run("exact", 3, model="net", wrap="fsdp", statistic="square", objective="l2")
    run("exact", 3, model="net", wrap="ddp", statistic="square", objective="l2")


def test_is_exact_with_columns_sharded(run):
    run("placements", 3)


def test_mixed_precision(run):
    run("exact_in_mixed_precision", 2)


@pytest.mark.parametrize(("wrap", "model"), [("ddp", "resnet"), ("fsdp", "net"), ("compile of ddp", "net")])
def test_own_loop(run, wrap, model):
    run("own_loop", 3, model=model, wrap=wrap)


@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    ("wrap", "model"),
    [("ddp", "resnet"), ("fsdp", "resnet"), ("fsdp never resharded", "transformer"), ("fsdp with a method", "net")],
)
def test_leaves_no_trace(run, wrap, model, trained, fails):
    run("leaves_no_trace", 2, wrap=wrap, model=model, trained=trained, fails=fails)


def test_unsharded_modules_stay_so(run):
    run("stays_unsharded", 2)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ERRORS)
def test_fails_together(run, how, wrap):
    run("fails_together", 3, wrap=wrap, how=how)


def test_fails_together_on_a_mesh_of_two_axes(run):
    run("fails_together", 4, wrap="hsdp", how="data")


def test_refuses_shapes_that_differ(run):
    run("refuses_shapes_that_differ", 2)


def test_refuses_split_samples(run):
    run("refuses_split_samples", 4)


def test_importance_round_trip(run, tmp_path):
    run("importance_round_trip", 3, folder=str(tmp_path))


@pytest.mark.parametrize(
    ("wrap", "size", "how"),
    [
        ("ddp", 2, "in place"),
        ("ddp", 2, "after"),
        ("fsdp", 3, "in place"),
        ("fsdp", 3, "before"),
        ("fsdp", 3, "after"),
        ("fsdp never resharded", 2, "after"),
        ("hsdp", 4, "in place"),
        ("hsdp", 4, "after"),
    ],
)
def test_mas_matches_one_process(run, wrap, size, how, tmp_path):
    run("mas_matches_one_process", size, wrap=wrap, how=how, folder=str(tmp_path))


def test_mas_with_a_parameter_left_out(run):
    run("mas_with_a_parameter_left_out", 3)


def test_mas_follows_its_model(run):
    run("mas_follows_its_model", 2)


def test_mas_in_few_bytes(run, tmp_path):
    run("mas_in_few_bytes", 3, folder=str(tmp_path))


def test_mas_adapts(run):
    run("mas_adapts", 3)


def test_mas_overflows_together(run):
    run("mas_overflows_together", 2)


def test_mas_with_gradients_yet_to_be_summed(run):
    run("mas_with_gradients_yet_to_be_summed", 2)


def test_one_rank_shows_progress(run):
    run("shows_progress_once", 2)


def test_inputs_follow_the_model():
    model = nn.DataParallel(nn.Linear(5, 2, device="meta"))
    model.device_ids = [0]  # as where there are such devices
    with uncoupled(model):
        for called in (model, model.module):
            assert called(torch.randn(3, 5)).is_meta
    assert "forward" not in vars(model) and not model.module._forward_pre_hooks


def test_data_parallel_in_one_process():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(13, 5)
    truth = truth_of(model, data)
    importance = mas_fast.estimate_importance(nn.DataParallel(model), data.split(4))
    assert importance.num_samples == 13 and worst_error(importance, truth) <= 2e-5
