"""The echo judged on rows that nothing is trained on: in `evaluate`, after the probation, and what follows."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows
from training import adapter, assert_equal, echo_trainer, losses, revive, trainable

from echo_trainer.method.advantage import Advantage
from echo_trainer.method.routing import RoutingSchedule
from echo_trainer.passes.full import ROWS
from echo_trainer.passes.score import ScoreTask
from echo_trainer.run.answers import backbone_inputs
from echo_trainer.run.collate import EchoCollator
from echo_trainer.run.held_out import Rows
from echo_trainer.run.proof_rows import no_trace

READY = {"dataset_kwargs": {"skip_prepare_dataset": True}}
WEAK = {"target_modules": ["down_proj"], "layers_to_transform": [3], "layers_pattern": "layers", "r": 1}


def classified(n, seed, told=True, alike=0):
    """
    Five tokens, of which the last names one of six classes, and the answer: a word, the class (`told`), the end.

    The first tokens say nothing; so many of them are `alike` in all rows.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        ids = torch.randint(10, 60, (5,), generator=generator).tolist()
        kind, other = torch.randint(0, 6, (2,), generator=generator).tolist()
        ids[:alike] = [5] * alike
        ids[-1] = 10 + kind
        ids += [7, 30 + ((5 * kind + 2) % 6 if told else other), 1]
        rows.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:]})
    return Dataset.from_list(rows)


def useless(folder, **settings):
    """A run whose answers cannot be told from the prompts: what the echo learns of them is of no use elsewhere."""
    settings = {"max_steps": 14, "echo_probation": 12, "rows": classified(32, 0, told=False), **READY, **settings}
    held_out = {} if settings.get("echo_held_out") else {"eval_dataset": classified(40, 1, told=False)}
    return echo_trainer(folder, trainer_kwargs=held_out, per_device_train_batch_size=8, **settings)


def useful(folder, told=True, **settings):
    """
    A run with an adapter too weak for the task, and an echo that is not.

    Without `told` answers say nothing of the prompt: what the networks add is which words there are.
    """
    rows, held_out = classified(128, 0, told, alike=3), classified(40, 1, told, alike=3)
    return echo_trainer(
        folder, rows=rows, lora=lora_config(**WEAK, init_lora_weights=True), trainer_kwargs={"eval_dataset": held_out},
        echo_preset="strong", learning_rate=2e-2, per_device_train_batch_size=16, lr_scheduler_type="constant",
        **{"max_steps": 31, "echo_probation": 30, **READY, **settings},
    )  # fmt: skip


def said(caplog):
    return [r for r in caplog.records if r.name == "echo_trainer.run.probation"]


# evaluate


def scores(trainer, rows, **settings):
    """What `evaluate` says about the echo pass."""
    trainer.args.per_device_eval_batch_size = settings.get("batch", 8)
    return {k: v for k, v in trainer.evaluate(rows).items() if "echo" in k}


def test_evaluate_says_what_the_echo_pass_predicts(tmp_path):
    rows = classified(21, 5)
    trainer = echo_trainer(tmp_path, rows=classified(16, 0), trainer_kwargs={"eval_dataset": rows}, **READY)
    silent = scores(trainer, rows)
    assert silent["eval_echo_advantage"] == pytest.approx(0, abs=1e-6)
    revive(trainer)
    found = scores(trainer, rows)
    names = ["loss", *(name + end for name in ("advantage", "advantage_content", "own") for end in ("", "_se"))]
    assert {*found} == {f"eval_echo_{name}" for name in names}
    # all samples have three answer tokens, so TRL's loss over batches is that over tokens
    plain = trainer.evaluate(rows.select(range(16)))["eval_loss"]
    whole = scores(trainer, rows.select(range(16)))
    assert whole["eval_echo_loss"] + whole["eval_echo_advantage"] == pytest.approx(plain, rel=1e-5)
    assert abs(found["eval_echo_advantage"]) > 1e-3 < found["eval_echo_advantage_se"]
    for batch in (1, 5, 40, 8):
        again = scores(trainer, rows, batch=batch)
        other = {key: again.pop(key) for key in [*again] if "_own" in key}  # depends on who is beside whom
        assert again == pytest.approx({key: found[key] for key in again}, rel=1e-4, abs=1e-6)
        assert abs(other["eval_echo_own"]) > 1e-4 < other["eval_echo_own_se"]
    named = {k: v for k, v in trainer.evaluate({"a": rows}).items() if "a_echo" in k}
    assert named == pytest.approx({k.replace("eval_", "eval_a_"): v for k, v in found.items()}, rel=1e-4)
    stream = scores(trainer, rows.to_iterable_dataset())
    assert stream == pytest.approx(found, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 64}, {"echo_positions": "predicting"}])
def test_evaluate_after_training_in_every_layout(tmp_path, settings):
    held_out = Dataset.from_list(prompt_completion_rows(24, seed=5))
    trainer = echo_trainer(
        tmp_path, rows=prompt_completion_rows(160), max_steps=3, echo_preset="strong", eval_strategy="steps",
        eval_steps=3, trainer_kwargs={"eval_dataset": held_out}, **settings,
    )  # fmt: skip
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "eval_echo_loss" in entry)
    again = scores(trainer, None)  # the networks are off the model by now, and the trainer keeps them
    assert again == {k: v for k, v in logged.items() if "echo" in k}
    trainer.save_model()
    card, record = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "echo_run.json").read_text())
    assert "| echo_advantage |" in card and "which existed during training only" in card
    assert any("eval_echo_advantage_se" in entry for entry in record["metrics"])
    assert (tmp_path / "assets" / "training.png").exists()


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_the_own_echo_is_compared_with_that_of_another_row(tmp_path, batch):
    """Against scores of both echoes that are computed one by one, whatever the batches."""
    rows = classified(8, 5)
    trainer = echo_trainer(
        tmp_path, rows=classified(16, 0), trainer_kwargs={"eval_dataset": rows}, per_device_eval_batch_size=batch,
        **READY,
    )  # fmt: skip
    revive(trainer)
    found = trainer.held_out.measure(list(rows))
    # batch b holds the rows b, b + n, ...; a row that is alone has the echo of the one before, the first one has none
    n = 8 // batch
    batches = [list(range(8))[first::n] for first in range(n)]
    partner = {mine: other for some in batches for mine, other in zip(some, some[1:] + some[:1], strict=True)}
    if batch == 1:
        partner = {row: row - 1 for row in range(1, 8)}
    trainer.args.per_device_eval_batch_size = 2
    differences = []
    for mine, other in partner.items():
        pair = []
        for pair_of in ((mine, other), (mine, mine)):
            ids = [rows[place] for place in pair_of]
            draft = EchoCollator(trainer.data_collator, "answer", False).draft_with_all(ids)
            plan = draft.plan(ROWS)
            task = ScoreTask(plan, torch.tensor([1, 0]))
            with torch.no_grad(), trainer.attachment.measuring(), no_trace(trainer.model_wrapped):
                pair.append(trainer.model_wrapped(**backbone_inputs(draft.batch), echo_score=task).ce_other_N)
        differences += (pair[0] - pair[1])[:3].tolist()[1:2]  # the class: all answers begin and end alike
    assert found.own.samples == len(partner) and found.own.tokens == len(partner)
    assert found.own.value == pytest.approx(sum(differences) / len(differences), rel=1e-3, abs=1e-6)
    assert abs(found.own.value) > 1e-3


def test_the_echo_of_the_same_prompt_is_not_another(tmp_path):
    """Rows of one prompt, whichever batch they are in, are not given each other's echoes."""
    rows = [row for row in classified(2, 5) for _ in range(2)]
    for number, row in enumerate(rows):
        row["labels"][-2] = row["input_ids"][-2] = 20 + number
    trainer = echo_trainer(
        tmp_path, rows=classified(16, 0), trainer_kwargs={"eval_dataset": classified(8, 5)}, **READY
    )
    revive(trainer)
    found = {}
    for size in (4, 2, 1):
        trainer.args.per_device_eval_batch_size = size
        found[size] = trainer.held_out.measure(rows).own
    assert found[4].samples == 4 and found[4].value == pytest.approx(found[2].value, rel=1e-4)
    assert found[1].samples == 2  # nobody else has come before either of the first two
    for size in (4, 1):
        trainer.args.per_device_eval_batch_size = size
        alone = trainer.held_out.measure(rows[:2])
        assert alone.own is None and alone.useless and alone.gain.samples == 2


def test_no_batch_holds_rows_of_two_datasets(tmp_path):
    """They may have different columns, of which a collator looks at those of the first row."""
    sets = {"a": classified(20, 1, alike=1), "b": classified(12, 2)}
    trainer = echo_trainer(
        tmp_path, rows=classified(16, 0), trainer_kwargs={"eval_dataset": sets}, max_steps=3, echo_probation=2, **READY
    )
    collate, seen = trainer.data_collator, []

    def watched(rows):
        seen.append([row["input_ids"][0] == 5 for row in rows])
        return collate(rows)

    trainer.data_collator = watched
    trainer.train()
    assert trainer.probation.verdict.gain["samples"] == 32
    held_out = [batch for batch in seen if batch[0]]
    assert sum(map(len, held_out)) == 20 and all(map(all, held_out))


def test_nothing_is_said_of_rows_without_a_boundary(tmp_path):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4)
    trainer = echo_trainer(tmp_path, rows=classified(16, 0), trainer_kwargs={"eval_dataset": rows}, **READY)
    assert not scores(trainer, rows)


def test_evaluations_and_judgement_leave_no_trace(tmp_path):
    """Dropout, and packed rows of another length: the same losses and weights as without."""
    settings = {
        "lora": lora_config(init_lora_weights=True, lora_dropout=0.1), "max_steps": 5, "echo_preset": "strong",
        "trainer_kwargs": {"eval_dataset": Dataset.from_list(prompt_completion_rows(9, seed=5))},
    }  # fmt: skip
    none = echo_trainer(tmp_path / "none", echo_probation=0, **settings)
    none.train()
    many = echo_trainer(tmp_path / "many", echo_probation=2, **settings)
    many.train()
    assert many.probation.verdict.step == 2 and none.probation.verdict is None
    assert losses(none) == losses(many)
    assert_equal(trainable(none), trainable(many))


# the judgement


def test_a_useless_echo_says_so(tmp_path, caplog):
    trainer = useless(tmp_path, echo_preset="strong")
    trainer.train()
    (line,) = said(caplog)
    assert line.levelno == logging.WARNING
    assert "Step 12: the echo gives nothing so far" in line.message and "on 40 held-out samples" in line.message
    assert "echo_when_useless='stop' would" in line.message
    verdict = trainer.probation.verdict
    # prompts of 5, answers of 3 tokens, 4 rows: two suffix tokens each and one place of padding, five layers of five
    assert verdict.price == pytest.approx(9 / 32) and f"costs {9 / 32:.0%}" in line.message
    entry = next(e for e in trainer.state.log_history if "echo/held_out_advantage" in e)
    assert entry["step"] == 12 and entry["echo/held_out_advantage"] == verdict.gain["value"]
    trainer.save_model()
    record = json.loads((tmp_path / "echo_run.json").read_text())["echo"]["probation"]
    assert record["useless"] and not record["stopped"] and record["gain"]["samples"] == 40
    assert "no better than the plain pass" in (tmp_path / "README.md").read_text()
    assert trainer.state.log_history[-2]["echo/p"] == 1


def test_an_echo_that_helps_does_not(tmp_path, caplog):
    caplog.set_level(logging.INFO, "echo_trainer.run.probation")
    trainer = useful(tmp_path, echo_when_useless="stop")
    trainer.train()
    (line,) = said(caplog)
    assert line.levelno == logging.INFO and "predicts answers better than the plain pass" in line.message
    assert not trainer.probation.stopped and trainer.state.log_history[-2]["echo/p"] == 1
    assert "and better than with the echo of another sample: by +" in line.message
    found = trainer.evaluate()
    assert found["eval_echo_own"] > 3 * found["eval_echo_own_se"]
    assert trainer.probation.record()["networks_alone"] is False
    assert found["eval_echo_advantage_content"] > 3 * found["eval_echo_advantage_content_se"]
    seen = [entry["echo/advantage"] for entry in trainer.state.log_history if "echo/advantage" in entry]
    assert seen[0] == pytest.approx(0, abs=1e-6) and seen[-1] > 0.1  # P2 starts at zero


def test_networks_that_help_with_any_echo_are_found_out(tmp_path, caplog):
    """The pass knows more than the plain one, and as much with the echo of another sample."""
    trainer = useful(tmp_path, told=False, echo_when_useless="stop")
    trainer.train()
    (line,) = said(caplog)
    verdict = trainer.probation.verdict
    assert Advantage(**verdict.content).clear and not Advantage(**verdict.own).clear
    assert verdict.useless and verdict.networks_alone and trainer.probation.stopped
    assert line.levelno == logging.WARNING and "it is the echo networks that help" in line.message
    assert trainer.state.log_history[-2]["echo/p"] == 0
    trainer.save_model()
    assert "no better with the own echo" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "echo_run.json").read_text())["echo"]["probation"]["networks_alone"]


def test_where_all_prompts_are_alike_the_echo_says_nothing(tmp_path, caplog):
    """There is no other echo to compare with, and the line says so."""
    rows = classified(32, 1, told=False)
    same = Dataset.from_list([{**row, "input_ids": [5] * 5 + row["input_ids"][5:]} for row in rows])
    trainer = useful(tmp_path, told=False)
    trainer.train_dataset = trainer.eval_dataset = same
    trainer.train()
    verdict = trainer.probation.verdict
    assert verdict.own is None and verdict.networks_alone
    trainer.save_model()
    assert "with no other prompt beside them" in (tmp_path / "README.md").read_text()
    assert "and no other prompt was held out" in said(caplog)[0].message


def test_what_all_answers_share_does_not_count(tmp_path, caplog):
    """The echo of the default learns the words of every answer, and nothing of what they say."""
    trainer = useless(tmp_path, max_steps=31, echo_probation=30)
    trainer.train()
    verdict = trainer.probation.verdict
    assert verdict.useless and verdict.content["tokens"] == 40 and verdict.gain["tokens"] == 120
    assert "on the tokens in which answers differ" in said(caplog)[0].message


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that goes on as plain LoRA after step 3 of 6, with checkpoints before and after."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer = useless(folder, **STOPPING)
    trainer.train()
    return folder, trainer


STOPPING = {
    "max_steps": 6, "echo_probation": 3, "echo_when_useless": "stop", "echo_preset": "strong",
    "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2,
}  # fmt: skip


def test_stopping_is_plain_lora_from_there(stopped, tmp_path, monkeypatch):
    _, trainer = stopped
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["echo/p"] for entry in entries] == [1, 1, 1, 0, 0, 0]
    for entry in entries[3:]:
        assert entry["loss"] == pytest.approx(entry["echo/ce_plain"], rel=1e-6)
        assert "echo/ce_echo" not in entry
    probability = RoutingSchedule.probability
    monkeypatch.setattr(RoutingSchedule, "probability", lambda self, k: probability(self, k) if k < 3 else 0.0)
    other = useless(tmp_path, **{**STOPPING, "echo_probation": 0})
    other.train()
    assert_equal(adapter(trainer), adapter(other))
    assert not [key for key in trainer.evaluate() if "echo" in key]


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_stopped_run_resumes_in_the_same_bits(stopped, tmp_path, step, caplog):
    """From before the judgement, from its very step, and from after it, when it is not judged again."""
    folder, whole = stopped
    resumed = useless(tmp_path, **STOPPING)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.probation.verdict == whole.probation.verdict
    assert len(said(caplog)) == (step < 4)
    assert losses(whole) == losses(resumed)
    assert_equal(trainable(whole), trainable(resumed))


def test_training_again_is_judged_again(stopped, caplog):
    _, trainer = stopped
    trainer.train()
    assert len(said(caplog)) == 1


@pytest.mark.parametrize(
    ("share", "steps", "due"),
    [(0.1, 1000, 100), (0.1, 300, 50), (0.1, 50, None), (0.1, 51, 50), (12, 14, 12), (12, 12, None), (0, 1000, None),
     (0.25, 999, 250)],
)  # fmt: skip
def test_when_it_is_judged(tmp_path, share, steps, due):
    trainer = echo_trainer(tmp_path, echo_probation=share)
    trainer.state.max_steps = steps
    assert trainer.probation.due() == due


# what is held out


def test_rows_set_aside_are_not_trained_on(tmp_path):
    trainer = useless(tmp_path, echo_held_out=10, max_steps=4, echo_probation=2)
    kept, aside = trainer.train_dataset["input_ids"], trainer.held_out.rows["input_ids"]
    assert (len(kept), len(aside)) == (22, 10)
    assert sorted([*kept, *aside]) == sorted(classified(32, 0, told=False)["input_ids"])
    again = useless(tmp_path / "again", echo_held_out=10)
    assert again.held_out.rows["input_ids"] == aside
    trainer.train()
    assert trainer.probation.verdict.gain["samples"] == 10
    trainer.save_model()
    data = json.loads((tmp_path / "echo_run.json").read_text())["data"]
    assert (data["n_train"], data["n_held_out"]) == (22, 10)


def test_without_rows_the_user_is_told_once(tmp_path, caplog):
    trainer = echo_trainer(tmp_path, max_steps=4, echo_probation=2)
    trainer.train()
    (line,) = said(caplog)
    assert "nothing tells whether the echo helps" in line.message and "echo_held_out=200" in line.message
    assert trainer.probation.record() is None


def test_rows_are_spread_evenly():
    class Loader:
        dataset = list(range(10))

    assert Rows(Loader)[:] == list(range(10)) and Rows(Loader)[4:6] == [4, 5]
    assert Rows(Loader, 4)[:] == [0, 2, 5, 7] and len(Rows(Loader, 40)) == 10
