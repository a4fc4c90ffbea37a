"""Parameter names: the same for a model and for what it is wrapped in."""

import pytest
import torch
from torch import nn

from mas_fast.names import named_parameters, parameter_name


class Net(nn.Module):
    """A layer called `module` and a tied weight, which are no wrapper's doing."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = self.module[0].weight


def compiled(model):
    return torch.compile(model, backend="eager")


def distributed(model):
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_inside(model):
    model.module = compiled(model.module)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda model: model, id="plain"),
        pytest.param(compiled, id="compile"),
        pytest.param(nn.DataParallel, id="DataParallel"),
        pytest.param(distributed, id="DDP"),
        pytest.param(lambda model: compiled(nn.DataParallel(model)), id="compile of DataParallel"),
        pytest.param(lambda model: distributed(compiled(model)), id="DDP of compile"),
        pytest.param(compiled_inside, id="compiled submodule"),
    ],
)
def test_names_are_those_of_the_plain_model(wrap, process_group):
    model = Net()
    plain = dict(model.named_parameters())
    wrapped = wrap(model)
    found = named_parameters(wrapped)
    assert list(found) == ["module.0.weight", "module.0.bias", "module.1.weight", "module.1.bias"]
    assert all(found[name] is plain[name] for name in plain)
    for name, parameter in wrapped.named_parameters():
        assert found[parameter_name(wrapped, name)] is parameter


def test_unknown_names_stay():
    assert parameter_name(Net(), "_orig_mod.module.weight") == "_orig_mod.module.weight"
    assert parameter_name(nn.DataParallel(Net()), "module.absent.weight") == "absent.weight"
