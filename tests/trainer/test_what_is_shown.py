"""What a user of TRL reads: the loss in the log, the batches as text, and messages in words."""

import json

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from families import vision_language_model
from models import FAMILIES, conversation_rows, lora_config, prompt_completion_rows, tiny_model
from training import DATA_FORMS, assert_equal, echo_trainer, losses, plain_trainer, revive, trainable

from echo_trainer import EchoSFTConfig
from echo_trainer.method.routing import RoutingSchedule

# The logged loss


@pytest.mark.parametrize("form", DATA_FORMS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_logged_loss_is_that_of_sft(tmp_path, form, accumulation):
    """The first step's `loss` is SFT's on the same rows, whatever is routed; the objective has the rest."""
    settings, rows = DATA_FORMS[form]
    settings = {**settings, "max_steps": 1, "gradient_accumulation_steps": accumulation}
    ours = echo_trainer(tmp_path / "a", rows=rows(), **settings)
    revive(ours)
    ours.train()
    theirs = plain_trainer(tmp_path / "b", rows=rows(), **settings)
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
    left, right = ours.state.log_history[-1]["train_loss"], theirs.state.log_history[-1]["train_loss"]
    assert left == pytest.approx(right, rel=1e-6)
    logged = ours.state.log_history[0]
    assert logged["echo/routed"] == 1
    expected = logged["echo/ce_plain"] + logged["echo/ce_echo"] + logged["echo/kd"]
    assert logged["echo/objective"] == pytest.approx(expected, rel=1e-6) and logged["echo/kd"] > 0.001


def test_the_logged_loss_of_a_mixture_of_experts_is_that_of_sft(tmp_path):
    FAMILIES.setdefault("qwen3_moe", FAMILIES["qwen3"])
    model = {
        "family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "output_router_logits": True, "router_aux_loss_coef": 0.1,
    }  # fmt: skip
    settings = {"lora": lora_config(target_modules=["q_proj", "v_proj"], init_lora_weights=True), "max_steps": 1}
    ours, theirs = (
        make(tmp_path / make.__name__, model=tiny_model(**model), **settings) for make in (echo_trainer, plain_trainer)
    )
    ours.train()
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)
    assert ours.state.log_history[0]["aux_loss"] > 0


def test_the_loss_does_not_follow_the_routing_probability(tmp_path):
    """With a rate of almost zero the loss of one batch stays what it is while p falls; the objective falls with it."""
    row = prompt_completion_rows(1)
    settings = {"rows": row * 8, "learning_rate": 1e-12, "echo_p_end": 0.0, "max_steps": 5}
    trainer = echo_trainer(tmp_path, **settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in entries] == pytest.approx([entries[0]["loss"]] * 5, rel=1e-6)
    assert entries[0]["echo/objective"] == pytest.approx(2 * entries[0]["loss"], rel=1e-6)
    assert entries[-1]["echo/objective"] == pytest.approx(entries[-1]["loss"], rel=1e-6)


def test_what_noise_means_for_the_distillation(tmp_path):
    """Before anything is learned KD is the noise that the passes do not share (docs/method.md)."""

    def first(name, **settings):
        trainer = echo_trainer(tmp_path / name, max_steps=1, **settings)
        trainer.train()
        return trainer.state.log_history[0]

    dropout = {"lora": lora_config(lora_dropout=0.5)}
    shared = first("shared", echo_pass="suffix", neftune_noise_alpha=50.0)
    assert shared["echo/kd"] == pytest.approx(0, abs=1e-6) and shared["echo/agreement"] == 1
    assert first("anew", echo_pass="full", neftune_noise_alpha=50.0)["echo/kd"] > 1e-3
    assert first("suffix", echo_pass="suffix", **dropout)["echo/kd"] > 1e-3
    assert first("full", echo_pass="full", **dropout)["echo/kd"] > 1e-3


# Batches as text


@pytest.mark.parametrize("form", DATA_FORMS)
def test_decode_batch_shows_what_training_sees(tmp_path, form, monkeypatch):
    """The first batch and its routes, twice the same, and without a trace in the run that follows."""
    settings, rows = DATA_FORMS[form]
    settings = {**settings, "max_steps": 2, "echo_p_start": 0.5, "echo_p_end": 0.5, "dataloader_num_workers": 0}
    ours, other = (echo_trainer(tmp_path / name, rows=rows(), **settings) for name in ("a", "b"))
    shown = ours.decode_batch()
    assert str(ours.decode_batch()) == str(shown)
    seen, draw = [], RoutingSchedule.draw
    monkeypatch.setattr(RoutingSchedule, "draw", lambda *args: seen.append(draw(*args)) or seen[-1])
    batches = []
    collate = ours.data_collator
    ours.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
    ours.train()
    assert [document.routed for document in shown] == np.asarray(seen[0]).tolist()
    ids = batches[0]["input_ids"]
    decoded = ours.processing_class.decode(ids.flatten(), skip_special_tokens=False).replace(" <pad>", "")
    assert " ".join(part.text for document in shown for part in document.parts) == decoded
    other.train()
    assert losses(ours) == losses(other)
    assert_equal(trainable(ours), trainable(other))


def test_decode_batch_names_prompt_answer_and_boundary(tmp_path):
    trainer = echo_trainer(tmp_path, rows=[{"prompt": "w1 w2", "completion": " w3 w4"}] * 8)
    document = trainer.decode_batch()[0]
    assert (document.prompt, document.answer, document.routed) == ("w1 w2", "w3 w4 </s>", True)
    assert (document.parts[1].boundary, document.parts[1].boundary_token) == (1, "w2")
    assert str(document) == (
        "row 0: gets an echo pass\n  prompt   'w1 w2'\n  boundary 'w2' (column 1)\n  answer   'w3 w4 </s>'"
    )


def test_decode_batch_of_the_loader_and_of_the_caller(tmp_path):
    """Every turn of a conversation has its own boundary; an answer without a prompt says that it has none."""
    trainer = echo_trainer(tmp_path, rows=conversation_rows(16))
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    shown = trainer.decode_batch(batch)
    assert all([part.answer for part in document.parts] == [False, True] * 2 for document in shown)
    assert all(part.boundary_token == ":" for document in shown for part in document.parts if part.answer)
    batch["labels"] = batch["input_ids"].clone()
    (part,) = trainer.decode_batch(dict(batch))[0].parts
    assert part.answer and part.boundary is None and "no prompt before it" in str(part)
    assert trainer.decode_batch(dict(batch))[0].routed is False


def test_decode_batch_of_a_stream_and_without_an_echo(tmp_path):
    stream = Dataset.from_list(prompt_completion_rows(16)).to_iterable_dataset()
    assert len(echo_trainer(tmp_path / "a", rows=stream).decode_batch()) == 4
    off = echo_trainer(tmp_path / "b", echo_p_start=0.0, echo_p_end=0.0)
    assert {document.routed for document in off.decode_batch()} == {None}
    assert "the echo is off" in str(off.decode_batch())


# Messages


def test_the_form_of_the_saved_adapter_is_one_line(tmp_path, caplog):
    trainer = echo_trainer(tmp_path / "a", max_steps=1)
    trainer.train()
    trainer.save_model()
    lines = [record.getMessage() for record in caplog.records if "is saved with" in record.getMessage()]
    assert len(lines) == 1
    assert "trained with r=4, lora_alpha=8 and is saved with r=16, lora_alpha=32" in lines[0]
    caplog.clear()
    same = echo_trainer(tmp_path / "b", lora=lora_config(r=16, lora_alpha=32, init_lora_weights=True), max_steps=1)
    same.train()
    same.save_model()
    kept = echo_trainer(tmp_path / "c", max_steps=1, portable_adapter=False)
    kept.train()
    kept.save_model()
    assert not [record for record in caplog.records if "is saved with" in record.getMessage()]


def test_engines_are_spoken_of_in_sentences(tmp_path, caplog):
    trainer = echo_trainer(tmp_path, lora=lora_config(use_dora=True, init_lora_weights=True), max_steps=1)
    trainer.train()
    trainer.save_model()
    lines = [record.getMessage() for record in caplog.records if "says why" in record.getMessage()]
    assert any(line.startswith("vllm refuses to load this adapter (") for line in lines)
    assert any(line.startswith("tgi loads this adapter without an error and answers differently") for line in lines)
    assert not any("silently-wrong" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "foo"}, "`loss_type` is 'foo', which TRL does not know"),
        ({"loss_type": "dft"}, "re-weights the cross-entropy"),
        ({"echo_kd_weight": None}, "`echo_kd_weight` is None, and it multiplies a loss"),
        ({"echo_kd_temperature": float("inf")}, "a finite number above 0"),
    ],
)
def test_options_are_refused_for_the_right_reason(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        EchoSFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    assert ("re-weights" in str(error.value)) is (options.get("loss_type") == "dft")


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"prompt": "w1 w2 w3", "completion": " w4"}] * 4, {"max_length": 3}),
        ([{"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}] * 4, {}),
    ],
    ids=["every answer is cut off", "every label is masked"],
)
def test_data_of_which_nothing_is_left(tmp_path, rows, options):
    with pytest.raises(ValueError, match="has no rows left to train on") as error:
        echo_trainer(tmp_path, rows=rows, **options)
    assert "None of the 0" not in str(error.value)


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_datasets_without_a_row_are_named(tmp_path, stream):
    """TRL asks for the first row, and ends in a StopIteration without a word."""

    def data(n):
        if stream:
            return IterableDataset.from_generator(lambda: iter([{"prompt": "w1", "completion": "w2"}] * n))
        return Dataset.from_dict({"prompt": ["w1"] * n, "completion": ["w2"] * n})

    with pytest.raises(ValueError, match="The training dataset has no row at all"):
        echo_trainer(tmp_path, rows=data(0))
    for empty, name in ((data(0), "dataset has"), ({"some": data(4), "none": data(0)}, "dataset 'none' has")):
        with pytest.raises(ValueError, match=f"The evaluation {name} no row at all"):
            echo_trainer(tmp_path, rows=data(4), trainer_kwargs={"eval_dataset": empty})


# The record and the card


def saved(trainer, folder):
    trainer.train()
    trainer.save_model()
    return json.loads((folder / "echo_run.json").read_text())["echo"], (folder / "README.md").read_text()


def test_record_and_card_say_what_was_seen(tmp_path):
    """Counted in the run; one that is continued counts on, whatever was logged before it stopped."""
    settings = {
        "max_steps": 6, "gradient_accumulation_steps": 2, "echo_p_start": 0.5, "echo_p_end": 0.5,
        "save_strategy": "steps", "save_steps": 2, "logging_steps": 5,
    }  # fmt: skip
    rows = [*prompt_completion_rows(39), {"prompt": "", "completion": "w3 w4 w5"}]
    trainer = echo_trainer(tmp_path / "whole", rows=rows, **settings)
    echo, card = saved(trainer, tmp_path / "whole")
    seen = echo["seen"]
    assert seen["micro_batches"] == 12 and seen["samples"] == 48 and 0 < seen["routed"] < 48
    assert seen["without_prompt"] >= 1 and seen["not_finite"] == 0
    assert f"{seen['routed']} of 48; {seen['without_prompt']} had no prompt before their answer" in card
    assert "echo-lora" in card and "(cross-entropy of the plain pass)" in card
    resumed = echo_trainer(tmp_path / "resumed", rows=rows, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.echo_metrics.seen == seen
    trainer.train()
    assert trainer.echo_metrics.seen["micro_batches"] == 12  # of this run


def test_no_card_claims_an_echo_that_nobody_had(tmp_path):
    """Switched on, and so seldom drawn that no sample got one."""
    trainer = echo_trainer(tmp_path, max_steps=2, echo_p_start=1e-12, echo_p_end=1e-12)
    echo, card = saved(trainer, tmp_path)
    assert echo["enabled"] and echo["seen"]["routed"] == echo["seen"]["echo_passes"] == 0
    assert "no echo pass has run: this is plain LoRA" in card
    assert "echo-lora" not in card and "echo-augmented" not in card


@pytest.mark.parametrize("family", vision_language_model.families)
def test_card_of_a_vision_language_model_on_rows_of_text(tmp_path, family):
    """LoRA on all linear layers, those of the vision tower and its numbered ones included; saved, it loads again."""
    trainer = echo_trainer(tmp_path, model=vision_language_model(family), max_steps=1)
    echo, card = saved(trainer, tmp_path)
    assert echo["seen"]["routed"] == 4 and f"adapter for a {family} model" in card
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16
