"""‖W h + b‖² without W h: its value and derivatives, and Ω through it."""

from types import SimpleNamespace

import pytest
import torch
from compare import assert_as_accurate, relative_error, truth_of
from torch import nn

import mas_fast
from mas_fast import objectives

# Positions, width and outputs: on both sides of what decides how it is computed.
SIZES = {"gram": (30, 6, 40), "logits": (2, 12, 20), "one": (1, 1, 1), "none": (0, 3, 4), "no_outputs": (4, 3, 0)}
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])


@pytest.fixture(autouse=True, params=[1 << 24, 50], ids=["whole", "chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK_ENTRIES", request.param)


@BIAS
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_value_and_derivatives(dtype, size, bias):
    torch.manual_seed(0)
    positions, width, outputs = size
    h = torch.randn(positions, width).to(dtype).requires_grad_()
    weight = torch.randn(outputs, width).to(dtype).requires_grad_()
    b = torch.randn(outputs).to(dtype).requires_grad_() if bias else None
    given = [h, weight, b][: 3 if bias else 2]
    factors = torch.rand(positions, 1, dtype=torch.float64)
    exact = [t.detach().double().requires_grad_() for t in given]
    truth = nn.functional.linear(*exact).square().sum(-1, keepdim=True)
    value = objectives.linear_output_norm(*given)
    assert value.shape == (positions, 1) and value.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert relative_error(value.detach(), truth.detach()) <= tolerance
    found = torch.autograd.grad((value * factors.to(value.dtype)).sum(), given)
    expected = torch.autograd.grad((truth * factors).sum(), exact)
    for actual, true in zip(found, expected, strict=True):
        assert relative_error(actual, true) <= (4e-3 if dtype == torch.bfloat16 else tolerance)


class Model(nn.Module):
    def __init__(self, width, outputs, bias, tied):
        super().__init__()
        self.embedding = nn.Embedding(outputs, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def hidden(self, ids):
        return self.body(self.embedding(ids)).tanh()

    def forward(self, ids):
        return self.head(self.hidden(ids))


def norm_of(model, batch):
    return objectives.linear_output_norm(model.hidden(batch), model.head.weight, model.head.bias)


@BIAS
@pytest.mark.parametrize("statistic", ["abs", "square"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_importance_is_that_through_the_logits(dtype, positions, tied, statistic, bias):
    torch.manual_seed(0)
    model, ids = Model(6, 17, bias, tied).to(dtype), torch.randint(0, 17, (5, positions))
    truth = truth_of(model, ids, statistic=statistic)
    baseline = truth_of(model, ids, statistic=statistic, dtype=None)
    options = {"forward": norm_of, "objective": objectives.summed, "statistic": statistic}
    importance = mas_fast.estimate_importance(model, [ids[:2], ids[2:]], dtype=dtype, **options)
    for name, omega in importance.items():
        assert_as_accurate(omega, truth[name], baseline[name], 1e-11 if dtype == torch.float64 else 3e-6)
    assert [row for row in importance.coverage if row.fallback] == []
    assert importance.meaning == mas_fast.estimate_importance(model, [ids], statistic=statistic).meaning
    mas_fast.verify(model, ids, **options, show=False).raise_if_wrong()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_causal_language_model(tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).double()
    batch = {"input_ids": torch.randint(0, 50, (3, 12))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    options = {"forward": objectives.causal_lm_norm, "objective": objectives.summed}
    expected = mas_fast.estimate_importance(model, [batch], dtype=torch.float64)
    found = mas_fast.estimate_importance(model, [batch], dtype=torch.float64, **options)
    assert found.meaning == expected.meaning
    for name, omega in found.items():
        assert relative_error(omega, expected[name]) <= 1e-11, name


def test_logits_are_never_there(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(objectives, "CHUNK_ENTRIES", 2000)
    model, ids = Model(8, 5000, False, False), torch.randint(0, 5000, (4, 20))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "empty" not in str(func):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        mas_fast.estimate_importance(model, [ids], forward=norm_of, objective=objectives.summed)
    parameters = max(p.nbytes for p in model.parameters())
    assert largest <= parameters < 4 * ids.numel() * 5000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: setattr(m.config, "final_logit_softcapping", 30.0), ValueError, "final_logit_softcapping=30.0"),
        (lambda m: setattr(m.config, "logit_scale", 0.5), ValueError, "logit_scale=0.5"),
        (lambda m: setattr(m.config, "output_logit_soft_cap", 30.0), ValueError, "output_logit_soft_cap=30.0"),
        (
            lambda m: setattr(m.config, "get_text_config", lambda **kw: SimpleNamespace(final_logit_softcapping=5.0)),
            ValueError,
            "final_logit_softcapping=5.0",
        ),
        (lambda m: setattr(m, "more", torch.nn.Linear(8, 8)), ValueError, "parameters beside decoder and head: more"),
        (lambda m: setattr(m, "get_output_embeddings", lambda: None), TypeError, "must have an nn.Linear"),
        (lambda m: setattr(m, "get_decoder", lambda: m), TypeError, "must have a decoder"),
    ],
)
def test_models_that_are_not_such_are_refused(change, error, message):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    change(model)
    with pytest.raises(error, match=message):
        objectives.causal_lm_norm(model, torch.zeros(1, 2, dtype=torch.long))


def test_a_head_of_several_layers_is_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.RobertaConfig(vocab_size=11, max_position_embeddings=8, is_decoder=True, **sizes)
    with pytest.raises(ValueError, match=r"beside decoder and head: .*lm_head.dense.weight"):
        objectives.causal_lm_norm(transformers.RobertaForCausalLM(config), torch.zeros(1, 2, dtype=torch.long))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"input must be \[..., D\] and weight \[V, D\]"):
        objectives.linear_output_norm(torch.ones(2, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"bias must have shape \[4\]"):
        objectives.linear_output_norm(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3))
