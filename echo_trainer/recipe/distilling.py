"""A finished run and a file of prompts -> labels -> a second training: what `echo-trainer distill` does."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DatasetMixtureConfig

from ..config import EchoSFTConfig
from ..evaluation.adapter import row_options
from ..evaluation.data import read_rows
from ..evaluation.echo import echo_checkpoint, load_echo
from ..evaluation.model import Loaded, load_for_evaluation, load_tokenizer
from ..files import RUN_RECORD
from ..labelling.label import LABELS, Label, counts, examples, label
from ..labelling.mixture import of_each
from ..labelling.options import DistillOptions
from ..labelling.phase import cut, second_config, second_trainer, student_model
from ..labelling.prompts import Prompt, read_prompts
from ..labelling.teacher import Teacher, refuse_useless_echo
from ..rendering.forms import RowOptions
from ..rendering.rendering import Rendering
from ..run.agreement import Agreement
from ..run.checkpoint_files import is_checkpoint, last_whole_checkpoint
from ..templates import COLUMNS, TEMPLATES
from ..trainer import EchoSFTTrainer
from .arguments import DataArguments
from .data import load_data, load_rows
from .training import finish, refuse_finished

Watch = Callable[[list[Prompt]], Callable[[int], None]]


@dataclass
class RunArguments:
    """Which run, which prompts, and how its model is loaded."""

    run: str | None = field(default=None, metadata={"help": "Folder of the run, or one of its checkpoints."})
    prompts: str | None = field(default=None, metadata={"help": "File with rows of `prompt` only."})
    base: str | None = field(default=None, metadata={"help": "Base of the adapter, in place of the one it names."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the base's weights. auto: float32 on a CPU, bfloat16 on a GPU.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    label_only: bool = field(default=False, metadata={"help": "Write labels.jsonl and train nothing."})


@dataclass(frozen=True)
class Outcome:
    """What `distill_run` has done: where labels.jsonl is, `label.counts`, and the trainer, None where none trained."""

    labels: Path
    counts: dict[str, int]
    trainer: EchoSFTTrainer | None


def distill_run(
    which: RunArguments,
    options: DistillOptions,
    data: DataArguments,
    config: EchoSFTConfig,
    watch: Watch | None = None,
) -> Outcome:
    """
    Label prompts with the teacher of a run, and train its adapter on them.

    Called again with the same arguments it goes on where it was stopped, in labelling and in training.

    Args:
        which: run and prompts.
        options: of labelling and mixing.
        data: the labelled rows, as in the run.
        config: of the second training; `output_dir` gets labels, checkpoints and adapter.
        watch: called with the prompts before the first is answered; what it returns is called with a number of
            prompts answered.

    Raises:
        ValueError: something is missing, or cannot work; nothing is loaded then.
        FileNotFoundError: a file is not there.
    """
    if not which.run or not which.prompts:
        missing = "RUN, the folder of a run," if not which.run else "--prompts FILE, rows with `prompt` only,"
        raise ValueError(f"{missing} is missing: echo-trainer distill RUN --prompts FILE --output_dir OUT.")
    if config.output_dir == "trainer_output":
        raise ValueError("No --output_dir: name a folder for labels and adapter, another one than that of the run.")
    mixes = not which.label_only and options.parts[0] > 0
    evaluates = not which.label_only and config.eval_strategy != "no"
    if (mixes or evaluates) and not data.dataset_name:
        raise ValueError(
            f"The ratio {options.ratio} mixes labelled rows in, and there are none. Give the run's training data, "
            f"--dataset_name FILE, or write --ratio 0:1 to train on taught rows alone."
            if mixes
            else f"eval_strategy={config.eval_strategy} evaluates on labelled rows. Give them: --dataset_name FILE."
        )
    second = second_config(config, {})
    of_each(second.per_device_train_batch_size, options.parts)
    name = _source(which.run, options.teacher)
    folder = Path(name).parent if is_checkpoint(name) else Path(name)
    if Path(config.output_dir).resolve() == folder.resolve():
        raise ValueError(f"--output_dir {config.output_dir} is the folder of the run itself. Name another one.")
    Agreement().decide(lambda: refuse_finished(config, data.overwrite_output_dir, goes_on=True))
    said = row_options(str(folder))
    record = _record(folder)
    if options.teacher == "echo":
        refuse_useless_echo((record.get("echo") or {}).get("probation"))
    tokenizer = load_tokenizer(name, which.base, config.trust_remote_code)
    prompts = read_prompts(_prompt_rows(which.prompts, data), Rendering(said, tokenizer))
    splits = load_data(data, DatasetMixtureConfig()) if mixes or evaluates else {}
    labelled = _tokens(splits, data.dataset_train_split, said, tokenizer, second) if mixes else None
    held_out = _tokens(splits, data.dataset_test_split, said, tokenizer, second) if evaluates else None
    loaded = load_for_evaluation(name, which.base, which.dtype, str(config.device), config.trust_remote_code)
    if loaded.adapter is None:
        raise ValueError(f"{name} is a whole model, and the second training goes on with an adapter. Name a run.")
    path = Path(config.output_dir) / LABELS
    advance = watch(prompts) if watch is not None else None
    labels = label(
        _teacher(loaded, name, options), prompts, path, options, config.seed, advance, processes=config.world_size
    )
    found = counts(labels, options.min_confidence)
    if which.label_only:
        return Outcome(path, found, None)
    return Outcome(path, found, _train(loaded, second, options, labels, labelled, held_out, record.get("rows")))


def _train(
    loaded: Loaded,
    config: EchoSFTConfig,
    options: DistillOptions,
    labels: list[Label],
    labelled: Dataset | None,
    held_out: Dataset | None,
    rows: dict[str, Any] | None,
) -> EchoSFTTrainer:
    model, peft_config = student_model(loaded.model, options.start, config.seed)
    resume = config.resume_from_checkpoint or (last_whole_checkpoint(config.output_dir)[0] is not None or None)
    student = second_trainer(
        EchoSFTTrainer, model, loaded.tokenizer, config, options, labels, labelled=labelled, rows=rows,
        eval_dataset=held_out, peft_config=peft_config, resume=resume,
    )  # fmt: skip
    student.train(resume_from_checkpoint=resume)
    finish(student)
    return student


def _source(run: str, teacher: str) -> str:
    """The adapter to start from: for the echo that of the checkpoint that has one, else what the run has saved."""
    if teacher == "echo":
        return str(echo_checkpoint(run))
    folder = Path(run)
    if not folder.is_dir() or is_checkpoint(folder) or (folder / RUN_RECORD).is_file():
        return run
    found, _ = last_whole_checkpoint(run)
    return run if found is None else str(found)


def _teacher(loaded: Loaded, name: str, options: DistillOptions) -> Teacher:
    if options.teacher != "echo":
        return Teacher(loaded.model, loaded.tokenizer, options.teacher)
    reader, _ = load_echo(loaded.model, loaded.tokenizer, Path(name))
    return Teacher(loaded.model, loaded.tokenizer, "echo", reader.setup, reader.positions)


def _prompt_rows(name: str, data: DataArguments) -> list[dict[str, Any]]:
    """Rows with `prompt`, of the columns that the options name."""
    path = Path(name)
    rows = read_rows(path) if path.suffix in (".json", ".jsonl") else load_rows(name).to_list()
    if data.prompt_column:
        column = data.prompt_column
        without = next((number for number, row in enumerate(rows) if column not in row), None)
        if without is not None:
            raise ValueError(f"Row {without} of {name} has no column {column!r}; it has {sorted(rows[without])}.")
        return [{"prompt": row[column]} for row in rows]
    if data.dataset_template:
        return [_templated(row, data.dataset_template) for row in rows]
    return rows


def _templated(row: dict[str, Any], template: str) -> dict[str, Any]:
    """A prompt in a template, of a question that has no answer; any other row as it is."""
    for question, _, answer in COLUMNS:
        if isinstance(row.get(question), str) and not row.get(answer) and "prompt" not in row:
            return {"prompt": TEMPLATES[template]({**row, answer: ""})["prompt"]}
    return row


def _tokens(splits: Any, split: str, said: RowOptions, tokenizer: Any, config: EchoSFTConfig) -> Dataset:
    """Labelled rows of a split as token ids, as the run was trained on them."""
    if split not in splits:
        raise ValueError(f"The dataset has no split {split!r}; it has {sorted(splits)}.")
    rows = splits[split]
    if not isinstance(rows, Dataset):
        raise ValueError("dataset_streaming=True cannot be mixed row by row. Load the labelled rows as a whole.")
    tokens = examples(rows.to_list(), tokenizer, said)
    found = {name: [each[name] for each in tokens] for name in ("input_ids", "labels")}
    return cut(Dataset.from_dict(found), config)


def _record(folder: Path) -> dict[str, Any]:
    """The record of a run, as far as there is one."""
    path = folder / RUN_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
