"""A MAS in training loops that others wrote: Hugging Face's Trainer, with accumulation and clipping."""

import copy

import pytest
import torch
from compare import relative_error

import mas_fast
from mas_fast import MAS
from mas_fast.reference import importance_loop

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="pip install accelerate for Hugging Face's Trainer")

LR = 1e-2


class PenaltyBeforeStep(transformers.TrainerCallback):
    """Adds the penalty's gradient by hand, where gradients are complete and clipped."""

    def __init__(self, mas):
        self.mas = mas

    def on_pre_optimizer_step(self, *_, **__):
        self.mas.add_penalty_grad_()


def small_model():
    torch.manual_seed(0)
    own = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**own, **ends, **off))


def sentences(seed, count=24):
    ids = torch.randint(0, 50, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model, data, folder, optimizer=None, callbacks=()):
    settings = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        learning_rate=LR,
        max_grad_norm=0.1,
        lr_scheduler_type="constant",
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model, settings, train_dataset=data, optimizers=(optimizer, None), callbacks=list(callbacks)
    )


def test_the_batches_of_a_trainer_give_omega(tmp_path):
    model = small_model()
    data = sentences(1)
    trainer = trainer_of(model, data, tmp_path)
    found = mas_fast.estimate_importance(model, trainer.get_train_dataloader())  # with labels, shuffled
    own = importance_loop(model, torch.stack([row["input_ids"] for row in data]))
    assert found.num_samples == len(data)
    assert all(row.fallback is None for row in found.coverage)
    assert all(relative_error(found[name], own[name]) < 2e-6 for name in own)


@pytest.mark.parametrize("decoupled", [0.0, 0.01])
def test_the_penalty_in_the_optimizer_is_that_before_its_step(decoupled, tmp_path):
    start = small_model()
    models = {}
    for name in ("inside", "before", "none"):
        model = models[name] = copy.deepcopy(start)
        mas = MAS(model, lam=0.0 if name == "none" else 10.0)
        mas.consolidate([torch.stack([row["input_ids"] for row in sentences(1)])])
        settings = {"lr": LR, "weight_decay": decoupled}
        if name == "inside":
            optimizer = mas_fast.optim.AdamW(model.parameters(), mas=mas, **settings)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), **settings)
        callbacks = [PenaltyBeforeStep(mas)] if name == "before" else []
        trainer_of(model, sentences(2), tmp_path, optimizer, callbacks).train()

    def moved(name, other):
        pairs = zip(models[name].parameters(), other.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5

    assert moved("inside", models["before"]) < 1e-4 * moved("inside", start)
    assert moved("inside", start) < 0.5 * moved("none", start)
