"""What is logged arrives in trackers: every figure of every step, in groups of training, echo and evaluation.

Needs the extra `trackers`; read back from what they left on the disk.
"""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("trackio")

RUN = """
import json, sys
from datasets import Dataset
from models import prompt_completion_rows
from training import echo_trainer

held_out = Dataset.from_list(prompt_completion_rows(8, seed=5))
trainer = echo_trainer(
    sys.argv[1], report_to=["tensorboard", "trackio"], project="echo", run_name="one", eval_strategy="steps",
    eval_steps=3, trainer_kwargs={"eval_dataset": held_out},
)
trainer.train()
print(json.dumps(trainer.state.log_history))
"""
NOT_SENT = {"step"}  # the place of a figure, not a figure
OF_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
"""What transformers gives trackio as a summary of the run, not as a figure of a step."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was logged to both, and what it logged."""
    folder = tmp_path_factory.mktemp("run")
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parents[1] / "support")])
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def sent(history):
    """Of each figure its values by step, under the names that transformers gives them."""
    found = {}
    for entry in history:
        for name, value in entry.items():
            if name not in NOT_SENT:
                group = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                found.setdefault(group, {})[entry["step"]] = value
    return found


def test_the_log_has_all_three_groups(run):
    names = set(sent(run[1]))
    assert {"train/loss", "train/echo/objective", "train/echo/advantage", "train/echo/relative_delta"} <= names
    assert {"eval/loss", "eval/echo_loss", "eval/echo_advantage", "eval/echo_advantage_se"} <= names
    assert all(
        name.startswith("train/echo/") for name in names if "echo" in name and not name.startswith("eval/echo_")
    )


def test_tensorboard_holds_what_was_logged(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, history = run
    (file,) = folder.glob("runs/*/events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    expected = sent(history)
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(values, rel=1e-6), name  # kept in float32


def test_trackio_holds_what_was_logged(run):
    folder, history = run
    rows = sqlite3.connect(folder / "trackio" / "echo.db").execute("select metrics from metrics").fetchall()
    found = {}
    for metrics in (json.loads(text) for (text,) in rows):
        for name, value in metrics.items():
            found.setdefault(name, {})[metrics["train/global_step"]] = value
    expected = {name: by_step for name, by_step in sent(history).items() if name.split("/")[1] not in OF_THE_END}
    assert {name: found.get(name) for name in expected} == expected
