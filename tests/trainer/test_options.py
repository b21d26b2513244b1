"""The table of options (docs/options.md): what is the same, different or refused, each row set in a real run."""

import dataclasses
from pathlib import Path

import pytest
from datasets import Dataset
from families import family_model
from make_options import PAGE, render
from models import CHAT_TEMPLATE, conversation_rows, prompt_completion_rows, tiny_model, tiny_tokenizer
from option_cases import DIFFERENT, MARKED, REFUSED, SFT_OPTIONS, TEXT, TOKENS, TRAINING_OPTIONS, TURNS, runs
from training import echo_trainer, losses, plain_trainer
from trl import SFTConfig

pytestmark = pytest.mark.slow

OPTIONS = [*SFT_OPTIONS, *TRAINING_OPTIONS]
COMPARED = ("learning_rate", "epoch", "num_tokens", "eval_loss", "step", "num_input_tokens_seen")
N = 8

ROWS = {
    TEXT: lambda: prompt_completion_rows(N),
    TURNS: lambda: conversation_rows(N),
    MARKED: lambda: [{"content": f"{row['prompt']} :{row['completion']}"} for row in prompt_completion_rows(N)],
    TOKENS: lambda: [{"input_ids": [5, 6, 7 + n, 8, 1], "labels": [-100, -100, -100, 8, 1]} for n in range(N)],
}


def those(verdict):
    found = [option for option in OPTIONS if option.verdict == verdict]
    return pytest.mark.parametrize("option", found, ids=lambda option: f"{option.name}={option.value}")


def build(make, folder, *options, **more):
    """A trainer with options set, on the data and the model that they need."""
    first, given = options[0], {option.name: option.value for option in options}
    settings = {"max_steps": first.steps, "save_strategy": "no", **first.others, **given, **more}
    kwargs, model = {}, family_model("qwen3_moe") if first.model == "experts" else tiny_model()
    if first.model == "folder":
        model.save_pretrained(folder.parent / "base")
        tiny_tokenizer().save_pretrained(folder.parent / "base")
        model, kwargs["processing_class"] = str(folder.parent / "base"), None
    if settings.get("eval_strategy", "no") != "no":
        kwargs["eval_dataset"] = Dataset.from_list(prompt_completion_rows(4, seed=2))
    folder = settings.pop("output_dir", folder)
    return make(folder, rows=ROWS[first.rows](), model=model, trainer_kwargs=kwargs, **settings)


def logged(trainer):
    """What TRL logs that does not depend on what was learned, line by line."""
    lines = [entry for entry in trainer.state.log_history if not any(name.startswith("echo/held") for name in entry)]
    return [
        {name: entry[name] for name in COMPARED if name in entry and (name != "eval_loss" or not entry["step"])}
        for entry in lines
    ]


def checkpoints(trainer):
    folder = Path(trainer.args.output_dir)
    return sorted(path.name for path in folder.glob("checkpoint-*")) if folder.is_dir() else []


@pytest.mark.parametrize("options", runs(), ids=lambda options: ",".join(option.name for option in options))
def test_the_same(tmp_path, monkeypatch, options):
    """Before the echo has learned anything the loss is TRL's; schedules, logs and checkpoints are it always."""
    found = {}
    for name, make in (("plain", plain_trainer), ("echo", echo_trainer)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        (tmp_path / name / "template.jinja").write_text(CHAT_TEMPLATE)
        found[name] = build(make, tmp_path / name / "out", *options)
        found[name].train()
    plain, echo = found["plain"], found["echo"]
    for option in options:
        if option.name != "pad_token":  # which TRL takes out
            assert getattr(echo.args, option.name) == getattr(plain.args, option.name), option.name
    assert plain.state.global_step == echo.state.global_step
    if losses(plain):
        coarse = any(option.name == "bf16" for option in options)
        assert losses(echo)[0] == pytest.approx(losses(plain)[0], rel=2e-2 if coarse else 1e-4)
    assert logged(echo) == logged(plain)
    names = [{name for entry in trainer.state.log_history for name in entry} for trainer in (plain, echo)]
    assert names[0] <= names[1]
    assert checkpoints(echo) == checkpoints(plain)


@those(REFUSED)
def test_refused(tmp_path, option):
    with pytest.raises(ValueError, match=option.name):
        build(echo_trainer, tmp_path / "out", option).train()
    assert not (tmp_path / "out").exists()


@those(DIFFERENT)
def test_different(tmp_path, option):
    more = {"answer_marker": ": "} if option.rows == MARKED else {}
    trainer = build(echo_trainer, tmp_path / "out", option, **more)
    trainer.train()
    assert trainer.state.log_history[0]["echo/routed"] > 0
    if option.name == "assistant_only_loss":
        assert trainer.args.assistant_only_loss is True
    if option.name == "bf16":
        assert trainer.args.bf16 is False
    if option.name == "dataset_text_field":
        with pytest.raises(ValueError, match="answer_marker"):
            build(echo_trainer, tmp_path / "other", option)
    if option.name == "save_only_model":
        saved = {path.name for path in (tmp_path / "out" / "checkpoint-1").iterdir()}
        assert "adapter_model.safetensors" in saved and not {"optimizer.pt"} & saved
        with pytest.raises(ValueError):
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_every_option_of_trl_has_a_row():
    named = {option.name for option in SFT_OPTIONS}
    assert set(SFTConfig.__annotations__) <= named | {option.name for option in TRAINING_OPTIONS}
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert named | {option.name for option in TRAINING_OPTIONS} <= fields
    assert len({option.name for option in TRAINING_OPTIONS}) >= 60


def test_the_page_is_what_the_script_writes():
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python tests/support/make_options.py"
