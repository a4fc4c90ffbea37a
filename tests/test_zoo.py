"""Exactness on models that people use: families of Hugging Face's transformers from small configs, no downloads."""

import pytest
import torch
from compare import truth_of

from mas_fast import estimate_importance
from mas_fast.capture.forward import Forward

transformers = pytest.importorskip("transformers", reason="pip install transformers to test its models")

# Not ours: what the library itself warns of while it is imported and its models are built.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

VOCABULARY = 50
TEXT = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
VISION = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16)
SPEECH = dict(
    conv_dim=(8, 8),
    conv_stride=(4, 2),
    conv_kernel=(8, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
LAYERS = dict(
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
)
WHISPER = dict(
    num_mel_bins=6,
    max_source_positions=10,
    max_target_positions=10,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    suppress_tokens=[],
    begin_suppress_tokens=[],
)


def make(model, config=None, **options):
    """Return a builder of a family's model: the names of its classes, and its config."""

    def build():
        made = getattr(transformers, config)(**options)
        return getattr(transformers, model)(made)

    return build


def tokens(samples=5, length=7):
    return {"input_ids": torch.randint(3, VOCABULARY, (samples, length))}


def padded(samples=5, length=7):
    mask = torch.arange(length) < torch.tensor([length, 3, 5, 4, length])[:samples, None]
    return {**tokens(samples, length), "attention_mask": mask.long()}


def pairs():
    return {**tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY, (5, 4))}


def images(samples=4, size=16):
    return {"pixel_values": torch.randn(samples, 3, size, size, dtype=torch.float64)}


def spectra():
    ids = torch.randint(3, VOCABULARY, (3, 4))
    return {"input_features": torch.randn(3, 6, 20, dtype=torch.float64), "decoder_input_ids": ids}


FAMILIES = {
    "gpt2": (
        make("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16),
        tokens,
    ),
    "gpt_neox": (make("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT), tokens),
    "bloom": (
        make("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
        tokens,
    ),
    "llama": (make("LlamaForCausalLM", "LlamaConfig", **TEXT, num_key_value_heads=1), tokens),
    "qwen2_tied": (
        make("Qwen2ForCausalLM", "Qwen2Config", **TEXT, num_key_value_heads=1, tie_word_embeddings=True),
        padded,
    ),
    "mixtral": (
        make(
            "MixtralForCausalLM",
            "MixtralConfig",
            **TEXT,
            num_key_value_heads=1,
            num_local_experts=3,
            experts_implementation="eager",
        ),
        tokens,
    ),
    "mamba": (
        make(
            "MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4
        ),
        tokens,
    ),
    "bert": (make("BertForMaskedLM", "BertConfig", **TEXT), padded),
    "roberta": (make("RobertaModel", "RobertaConfig", **TEXT), tokens),
    "albert": (
        make("AlbertForMaskedLM", "AlbertConfig", **{**TEXT, "num_hidden_layers": 3}, embedding_size=8),
        tokens,
    ),
    "deberta_v2": (
        make(
            "DebertaV2Model",
            "DebertaV2Config",
            **TEXT,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
        ),
        tokens,
    ),
    "t5": (
        make(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
        ),
        pairs,
    ),
    "bart": (
        make(
            "BartForConditionalGeneration",
            "BartConfig",
            **LAYERS,
            vocab_size=VOCABULARY,
            d_model=16,
            max_position_embeddings=20,
        ),
        pairs,
    ),
    "whisper": (
        make(
            "WhisperForConditionalGeneration", "WhisperConfig", **LAYERS, **WHISPER, vocab_size=VOCABULARY, d_model=16
        ),
        spectra,
    ),
    "wav2vec2": (
        make("Wav2Vec2ForCTC", "Wav2Vec2Config", **TEXT, **SPEECH),
        lambda: {"input_values": torch.randn(3, 200, dtype=torch.float64)},
    ),
    "vit": (make("ViTForImageClassification", "ViTConfig", **VISION, patch_size=4, num_labels=3), images),
    "clip_vision": (make("CLIPVisionModel", "CLIPVisionConfig", **VISION, patch_size=4), images),
    "swin": (
        make(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=2,
            num_labels=3,
        ),
        images,
    ),
    "convnext": (
        make(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 12],
            depths=[1, 2],
            num_stages=2,
            num_labels=3,
        ),
        lambda: images(3, 32),
    ),
    "resnet": (
        make(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_labels=3,
            layer_type="basic",
        ),
        lambda: images(4, 32),
    ),
}
# Mamba's own code computes parts of a float64 model in float32.
TOLERANCES = {"mamba": 1e-6}


@pytest.mark.parametrize("name", FAMILIES)
def test_no_parameter_loops_and_all_are_exact(name):
    builder, draw = FAMILIES[name]
    torch.manual_seed(0)
    model = builder().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p += 0.1 * torch.randn_like(p)  # biases of zero and scales of one would hide errors
    batch = draw()
    importance = estimate_importance(model, [batch], dtype=torch.float64)
    truth = truth_of(model, batch)
    # Keys' biases change no attention: their gradients are zero but for rounding, and no relative error means anything.
    zero = 1e-12 * max(float(t.norm()) for t in truth.values())
    assert set(importance) == set(truth)
    for parameter, expected in truth.items():
        error = float((importance[parameter] - expected).norm())
        assert error <= TOLERANCES.get(name, 1e-9) * float(expected.norm()) + zero, parameter
    assert [row for row in importance.coverage if row.fallback] == []


@pytest.mark.parametrize(
    "name", ["gpt2", "roberta", "llama", "vit", "clip_vision", "swin", "t5", "wav2vec2", "deberta_v2"]
)
def test_batches_of_a_kind_are_proved_once(name, monkeypatch):
    forwards = []
    run = Forward.run

    def counted(self, objectives):
        forwards.append(self)
        return run(self, objectives)

    monkeypatch.setattr(Forward, "run", counted)
    builder, draw = FAMILIES[name]
    torch.manual_seed(0)
    model = builder().double().eval()
    batches = [draw() for _ in range(4)]

    def one_by_one():
        for number, batch in enumerate(batches):
            if number > 1:
                assert len(forwards) == 1
            forwards.clear()
            yield batch

    estimate_importance(model, one_by_one())
    assert len(forwards) == 1
