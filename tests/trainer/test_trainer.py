"""The invariants of docs/method.md at the level of the trainer."""

import pytest
import torch
from models import lora_config, prompt_completion_rows, tiny_model
from training import (
    DATA_FORMS,
    adapter,
    all_parameters,
    assert_equal,
    echo_trainer,
    losses,
    plain_trainer,
    revive,
    trainable,
)

FORMS = pytest.mark.parametrize("form", DATA_FORMS)
DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])


def trained(trainer):
    """Train at once: the constructor seeds torch's generator, so nothing may come in between."""
    trainer.train()
    return trainer


@FORMS
@DORA
@CHECKPOINTING
def test_without_routing_equals_sft_trainer(tmp_path, form, dora, checkpointing):
    """Invariant 1: p = 0 gives the losses and weights of `SFTTrainer`, step for step, bit for bit, with dropout."""
    settings, rows = DATA_FORMS[form]
    lora = {"use_dora": dora, "init_lora_weights": True, "lora_dropout": 0.1}
    shared = {"gradient_checkpointing": checkpointing, "max_steps": 20, **settings}
    off = {"echo_p_start": 0.0, "echo_p_end": 0.0}
    ours = trained(echo_trainer(tmp_path / "a", rows=rows(), lora=lora_config(**lora), **off, **shared))
    theirs = trained(plain_trainer(tmp_path / "b", rows=rows(), lora=lora_config(**lora), **shared))
    assert losses(ours) == losses(theirs)
    assert_equal(trainable(ours), trainable(theirs))


@FORMS
def test_own_step_without_routed_samples_equals_sft_trainer(tmp_path, form):
    """The echo's own step, in a run whose p is so small that nothing is routed, agrees with TRL's to rounding."""
    settings, rows = DATA_FORMS[form]
    ours = trained(echo_trainer(tmp_path / "a", rows=rows(), echo_p_start=1e-12, echo_p_end=1e-12, **settings))
    theirs = trained(plain_trainer(tmp_path / "b", rows=rows(), **settings))
    assert ours.state.log_history[0]["echo/routed"] == 0
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-5, atol=0)
    for name, value in adapter(ours).items():
        torch.testing.assert_close(value, adapter(theirs)[name], rtol=1e-3, atol=1e-5)
    for ours_entry, theirs_entry in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        for metric in ("entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
            assert ours_entry[metric] == pytest.approx(theirs_entry[metric], rel=1e-3), metric


@DORA
@CHECKPOINTING
@FORMS
def test_accumulation_does_not_matter(tmp_path, form, dora, checkpointing):
    """Invariant 3, one process: batch 8 = batch 4 x accumulation 2: same routes, same weights to float32 rounding."""
    settings, rows = DATA_FORMS[form]
    shared = {
        "gradient_checkpointing": checkpointing, "max_steps": 3, "echo_p_start": 0.6, "echo_p_end": 0.6,
        "optim": "sgd", **settings,
    }  # fmt: skip
    runs = []
    for batch, accumulation in ((8, 1), (4, 2)):
        trainer = echo_trainer(
            tmp_path / str(batch),
            rows=rows(),
            lora=lora_config(use_dora=dora, init_lora_weights=True),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **shared,
        )
        revive(trainer)
        trainer.train()
        runs.append(trainer)
    large, small = runs
    assert [e["echo/routed"] for e in large.state.log_history[:-1]] == [
        e["echo/routed"] for e in small.state.log_history[:-1]
    ]
    torch.testing.assert_close(losses(large), losses(small), rtol=1e-5, atol=0)
    for name, value in trainable(large).items():
        torch.testing.assert_close(trainable(small)[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_matter(tmp_path, workers, form):
    """Invariant 4: routes, losses and weights are bit-identical for any number of workers."""
    settings, rows = DATA_FORMS[form]
    settings = {**settings, "gradient_accumulation_steps": 2, "max_steps": 4, "echo_p_start": 0.5, "echo_p_end": 0.5}
    none = trained(echo_trainer(tmp_path / "none", rows=rows(), **settings))
    some = trained(echo_trainer(tmp_path / "some", rows=rows(), dataloader_num_workers=workers, **settings))
    assert losses(none) == losses(some)
    assert_equal(trainable(none), trainable(some))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_identical(tmp_path, workers):
    """Invariant 4: stopping after any checkpoint and resuming ends in the same bits (dropout, accumulation)."""
    settings = {
        "lora": lora_config(init_lora_weights=True, lora_dropout=0.1 if not workers else 0.0),
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "dataloader_num_workers": workers,
        "echo_learning_rate": 1e-2,
    }
    whole = echo_trainer(tmp_path / "whole", **settings)
    whole.train()
    for stop in (2, 4):
        resumed = echo_trainer(tmp_path / f"from-{stop}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert_equal(trainable(whole), trainable(resumed))
        assert losses(whole) == losses(resumed)


@DORA
@CHECKPOINTING
def test_every_echo_parameter_learns(tmp_path, dora, checkpointing):
    """Invariant 5: each echo and LoRA parameter gets a gradient and moves within a few steps; nothing frozen does."""
    trainer = echo_trainer(
        tmp_path,
        lora=lora_config(use_dora=dora, init_lora_weights=True),
        gradient_checkpointing=checkpointing,
        max_steps=4,
        echo_p_end=1.0,
        echo_aggregation="weighted",
        echo_source_layers=[3, 4],
        echo_target_layers=[0, 1],
    )
    before = all_parameters(trainer)
    assert any("echo_networks" in name for name in before)
    trainer.train()
    for name, parameter in all_parameters(trainer).items():
        moved = not torch.equal(parameter.detach(), before[name])
        assert moved == parameter.requires_grad, f"{name}: requires_grad={parameter.requires_grad}, moved={moved}"


def test_first_echo_pass_equals_plain_pass(tmp_path):
    """P2 starts at zero, so the first echo pass changes nothing: equal losses, no divergence, full agreement."""
    trainer = echo_trainer(tmp_path, max_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["echo/routed"] == 1 and first["echo/agreement"] == 1
    assert first["echo/kd"] == pytest.approx(0, abs=1e-6)
    assert first["echo/ce_echo"] == pytest.approx(first["echo/ce_plain"], rel=1e-6)
    assert first["loss"] == pytest.approx(first["echo/ce_plain"], rel=1e-6)
    assert first["echo/objective"] == pytest.approx(2 * first["echo/ce_plain"], rel=1e-6)


def test_lora_and_echo_runs_are_paired(tmp_path):
    """The same seed gives the same LoRA initialisation and data order with and without the echo."""
    orders, adapters = [], []
    for make in (echo_trainer, plain_trainer):
        trainer = make(tmp_path / make.__name__, max_steps=2)
        adapters.append(adapter(trainer))
        seen = []
        trainer.compute_loss = lambda model, inputs, *args, seen=seen, trainer=trainer, **kwargs: (
            seen.append(inputs["input_ids"].clone()),
            type(trainer).compute_loss(trainer, model, inputs, *args, **kwargs),
        )[1]
        trainer.train()
        orders.append(seen)
    assert_equal(*adapters)
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))


def test_evaluation_is_the_plain_path(tmp_path):
    """Evaluation gives what `SFTTrainer` gives for the same weights, and is not routed."""
    rows = prompt_completion_rows(12, seed=5)
    from datasets import Dataset

    kwargs = {"trainer_kwargs": {"eval_dataset": Dataset.from_list(rows)}}
    ours, theirs = echo_trainer(tmp_path / "a", **kwargs), plain_trainer(tmp_path / "b", **kwargs)
    revive(ours)
    ours.train()
    theirs.model.load_state_dict({n: p for n, p in ours.model.state_dict().items() if "echo_networks" not in n})
    left, right = ours.evaluate(), theirs.evaluate()
    for metric in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert left[metric] == right[metric], metric


def test_own_learning_rate(tmp_path):
    trainer = echo_trainer(tmp_path, echo_learning_rate=0.5, max_steps=1, weight_decay=0.1)
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.5 if "echo_networks" in name else 5e-3), name
    trainer.train()


def test_mixture_of_experts(tmp_path):
    """The load-balancing loss is that of TRL."""
    model = {
        "family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "output_router_logits": True, "router_aux_loss_coef": 0.1,
    }  # fmt: skip
    from models import FAMILIES

    FAMILIES.setdefault("qwen3_moe", FAMILIES["qwen3"])
    lora = lora_config(target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    settings = {"lora": lora, "max_steps": 2}
    ours = trained(
        echo_trainer(tmp_path / "a", model=tiny_model(**model), echo_p_start=1e-12, echo_p_end=1e-12, **settings)
    )
    theirs = trained(plain_trainer(tmp_path / "b", model=tiny_model(**model), **settings))
    assert ours.state.log_history[0]["aux_loss"] == pytest.approx(theirs.state.log_history[0]["aux_loss"], rel=1e-5)
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-5, atol=0)
