"""Bad input: an error before anything is written that says what was received and what to write instead.

The inputs are in `bad_inputs.py` and `bad_inputs_on_disk.py`. Here each is given, and warnings are tested.
"""

from pathlib import Path

import bad_inputs
import bad_inputs_on_disk
import make_help
import pytest
import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from training import echo_trainer
from trl import SFTConfig

from echo_trainer import EchoSFTConfig, EchoSFTTrainer

CASES = [*bad_inputs.CASES, *bad_inputs_on_disk.CASES]
PAGE = make_help.PAGE.read_text(encoding="utf-8")
IDS = [f"{case.group}: {case.given}" for case in CASES]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_bad_input(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {}
    give = case.give
    if case.group == bad_inputs_on_disk.CHECKPOINTS:  # what is there must stay as it is
        before = files(bad_inputs_on_disk.finished_run())
    with pytest.raises(case.error) as error:
        give(tmp_path)
    assert case.message in str(error.value)
    row = f"| {case.given} | {make_help.tidy(str(error.value), str(tmp_path))} |"
    assert row in PAGE, "the page shows another message; run: python tests/support/make_help.py"
    if case.group == bad_inputs_on_disk.CHECKPOINTS:
        after = files(tmp_path / "out")
        changed = {name for name in after if after[name] != before.get(name)}
        assert not {name for name in after if name not in before}
        assert len(changed) <= 2  # what the case itself harmed
    else:
        assert not files(tmp_path / "out") and not (tmp_path / "new").exists()


def test_there_are_at_least_sixty_and_the_help_shows_every_one():
    assert len(CASES) >= 60 and len(set(IDS)) == len(IDS)
    assert all(f"\n| {case.given} | " in PAGE for case in CASES), "run: python tests/support/make_help.py"


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_options_of_trl_work_without_the_echo(tmp_path, settings):
    trainer = echo_trainer(tmp_path, echo_p_start=0, echo_p_end=0, max_steps=1, **settings)
    trainer.train()
    assert trainer.echo is None


def test_lost_answers_are_counted_once(tmp_path, caplog):
    rows = [{"prompt": "w1 " * 20, "completion": " w2"}] * 3 + prompt_completion_rows(20)
    trainer = echo_trainer(tmp_path, rows=rows, max_length=18)
    lines = [record.getMessage() for record in caplog.records if "no answer left" in record.getMessage()]
    assert lines == [
        "3 of 23 examples of the train dataset have no answer left after truncation to max_length=18 and are dropped. "
        "Raise `max_length` to keep them."
    ]
    assert len(trainer.train_dataset) == 20


def test_unroutable_samples_are_counted(tmp_path):
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}, {"input_ids": [3, 4], "labels": [3, 4]}] * 8
    trainer = echo_trainer(tmp_path, rows=rows, max_steps=4, per_device_train_batch_size=4)
    trainer.train()
    entries = trainer.state.log_history[:-1]
    assert entries[0]["echo/unroutable"] + entries[0]["echo/routed"] == 1  # p = 1 at the first step
    assert sum(entry["echo/unroutable"] for entry in entries) / 4 == 0.5  # one epoch, half of the rows


def test_sft_config_gets_the_defaults_of_the_echo(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, learning_rate=1e-3, report_to="none")
    trainer = EchoSFTTrainer(
        tiny_model(), args, None, Dataset.from_list(prompt_completion_rows(4)), None, tiny_tokenizer(),
        peft_config=lora_config(),
    )  # fmt: skip
    assert isinstance(trainer.args, EchoSFTConfig) and trainer.args.learning_rate == 1e-3
    assert trainer.echo is not None and torch.is_tensor(next(trainer.echo_networks.parameters()))
