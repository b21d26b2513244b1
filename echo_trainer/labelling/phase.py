"""The second training: the plain adapter on labelled rows and on what a teacher answered, without an echo."""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import set_seed

from ..config import EchoSFTConfig, kept_by_truncation
from ..files import write_json
from ..method.segments import IGNORE_INDEX
from .label import LABELS, Label, counts, examples, label
from .mixture import batches_for, mixture, of_each, taught_rows
from .options import DistillOptions
from .prompts import read_prompts
from .teacher import Teacher, refuse_useless_echo

logger = logging.getLogger(__name__)

SETTINGS = "distill.json"
"""What decides the order of the rows; a run is not gone on with under another one."""
FOLDER = "distilled"


@dataclass(frozen=True)
class Distillation:
    """
    What a trainer of the second training is told about it.

    Attributes:
        record: for the run's record: options and counts; no text.
        labelled: rows that may be shown on the card; None where there are none.
        rows: what the first run said about its rows, for whoever evaluates; None where it is not known.
        taught: the labels that are trained on.
    """

    record: dict[str, Any]
    labelled: Dataset | None
    rows: dict[str, Any] | None
    taught: Sequence[Label] = ()


def distill(trainer: Any, options: DistillOptions, resume: str | bool | None = None, **training: Any) -> Any:
    """
    What `EchoSFTTrainer.distill` does; see there.

    Args:
        trainer: the trainer of the first training.
        options: of labelling and mixing.
        resume: `resume_from_checkpoint` of the second training.
        training: options of `EchoSFTConfig` that differ in the second training.
    """
    if trainer.unlabeled_dataset is None:
        raise ValueError(
            "There are no prompts to label. Give EchoSFTTrainer `unlabeled_dataset=`, rows with `prompt` only, or set "
            "trainer.unlabeled_dataset."
        )
    if options.parts[0]:
        _check_labelled(trainer)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    given = {"output_dir": str(Path(trainer.args.output_dir) / FOLDER), "push_to_hub": False, **training}
    config = second_config(trainer.args, given)
    of_each(config.per_device_train_batch_size, options.parts)
    if options.teacher == "echo":
        refuse_useless_echo(trainer.probation.record())
    teacher = Teacher(trainer.model, tokenizer, options.teacher, trainer.echo, trainer.args.echo_positions)
    rendering = trainer.rows.renders(trainer.processing_class)
    prompts = read_prompts(list(trainer.unlabeled_dataset), rendering)
    path = Path(config.output_dir) / LABELS
    with tqdm(total=len(prompts), desc=f"answering ({teacher.kind})", disable=config.disable_tqdm) as bar:
        labels = label(teacher, prompts, path, options, config.seed, bar.update, processes=config.world_size)
    model, peft_config = student_model(trainer.model, options.start, config.seed)
    if options.start == "fresh":  # the trained adapter is off the model, and the echo with it
        trainer.echo = trainer.pass_choice = None
    student = second_trainer(
        type(trainer), model, trainer.processing_class, config, options, labels,
        labelled=trainer.train_dataset if options.parts[0] else None, rows=trainer.rows.record(),
        eval_dataset=trainer.eval_dataset, peft_config=peft_config, resume=resume,
    )  # fmt: skip
    trainer.model = student.model
    student.train(resume_from_checkpoint=resume)
    return student


def second_config(config: EchoSFTConfig, changes: dict[str, Any]) -> EchoSFTConfig:
    """
    Options of the second training: those of the first without an echo, and with changes.

    Raises:
        ValueError: there is no such option, or one that cannot work.
    """
    known = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no option of EchoSFTConfig, which the second training takes. How prompts are "
            f"labelled and mixed is said in DistillOptions."
        )
    second = copy.copy(config)
    for name, value in {**changes, "echo_p_start": 0.0, "echo_p_end": 0.0, "echo_held_out": 0}.items():
        setattr(second, name, value)
    # The rows are token ids in the order of training, labels found already.
    fixed = {"answer_marker": None, "prompt_marker": None, "drop_without_marker": False, "shuffle_dataset": False}
    for name, value in {**fixed, "train_sampling_strategy": "sequential"}.items():
        setattr(second, name, value)
    if second.packing:
        raise ValueError(
            "packing=True puts several rows into one, and the ratio of labelled to taught rows is kept by counting "
            "rows. Train without packing: packing=False (the first training too, whose rows are used again)."
        )
    second.check()
    return second


def student_model(model: Any, start: str, seed: int) -> tuple[Any, Any]:
    """
    The model to train, and the configuration of a new adapter (None: it has the one that is trained on).

    Args:
        model: with its adapter.
        start: "run" or "fresh"; the latter takes the adapter off the model.
        seed: of a new adapter.
    """
    name = model.active_adapter
    if start == "run":
        model.peft_config[name].inference_mode = False
        model.set_adapter(name)
        return model, None
    peft_config = copy.deepcopy(model.peft_config[name])
    peft_config.inference_mode = False
    set_seed(seed)
    return model.unload(), peft_config


def second_trainer(
    make: Callable[..., Any],
    model: Any,
    processing_class: Any,
    config: EchoSFTConfig,
    options: DistillOptions,
    labels: Sequence[Label],
    *,
    labelled: Dataset | None,
    rows: dict[str, Any] | None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    resume: str | bool | None = None,
) -> Any:
    """
    The trainer of the second training, not trained yet.

    Args:
        make: its class.
        model, peft_config: from `student_model`.
        processing_class: of the first training.
        config: from `second_config`. With `max_steps` above 0 so many steps, else `num_train_epochs` times through
            the taught rows.
        options: of mixing.
        labels: from `label`.
        labelled: prepared rows with answers; None where the ratio asks for none.
        rows: what the first run said about its rows.
        eval_dataset: prepared rows to evaluate on, if any.
        resume: whether a training is gone on with.

    Raises:
        ValueError: no label can be trained on, the ratio does not fit the batch, or a training under way had other
            rows.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    kept = [each for each in labels if each.left_out(options.min_confidence) is None]
    found = counts(labels, options.min_confidence)
    if not kept:
        raise ValueError(_nothing_left(found, options))
    taught = cut(taught_rows(kept, examples([each.row for each in kept], tokenizer), options.labels == "soft"), config)
    batch, micro = config.per_device_train_batch_size, config.gradient_accumulation_steps * config.world_size
    steps = config.max_steps
    if steps <= 0:
        steps = -(-batches_for(config.num_train_epochs, len(taught), batch, options.parts) // micro)
    seed = config.seed if config.data_seed is None else config.data_seed
    dataset = mixture(labelled, taught, options.parts, batch, steps * micro, seed)
    settings = {
        **dataclasses.asdict(options), "counts": found, "steps": steps, "batch": batch, "micro": micro, "seed": seed,
        "labelled": 0 if labelled is None else len(labelled),
    }  # fmt: skip
    _keep_settings(Path(config.output_dir), settings, resume)
    config.max_steps, config.num_train_epochs = steps, 1.0
    student = make(
        model=model, args=config, train_dataset=dataset, eval_dataset=eval_dataset, peft_config=peft_config,
        processing_class=processing_class,
    )  # fmt: skip
    student.soft.temperature = options.soft_temperature
    record = {
        **{name: settings[name] for name in ("teacher", "labels", "n_samples", "min_confidence", "ratio", "start")},
        "counts": found,
        "confidence": sum(each.confidence for each in kept) / len(kept),
        "n_labelled": settings["labelled"],
        "n_taught": len(taught),
    }
    student.distillation = Distillation(record, labelled, rows, kept)
    logger.warning(
        "%d of %d prompts have an answer to train on (%d empty, %d cut off, %d less sure than %g).", found["kept"],
        found["prompts"], found["empty"], found["unfinished"], found["unsure"], options.min_confidence,
    )  # fmt: skip
    return student


def cut(rows: Dataset, config: EchoSFTConfig) -> Dataset:
    """
    Rows as long as training takes them, without those of which no answer is left: a batch has the rows it counts on.

    Raises:
        ValueError: nothing is left.
    """
    part = kept_by_truncation(config)
    left = [n for n, row in enumerate(rows["labels"]) if any(value != IGNORE_INDEX for value in row[part][1:])]
    if not left:
        raise ValueError(f"No answer is left after truncation to max_length={config.max_length}. Raise `max_length`.")
    return rows if len(left) == len(rows) else rows.select(left)


def _check_labelled(trainer: Any) -> None:
    """Refuse training data that cannot be mixed row by row."""
    data = trainer.train_dataset
    if isinstance(data, Dataset) and {"input_ids", "labels"} <= set(data.column_names):
        return
    found = "a stream" if not isinstance(data, Dataset) else f"rows with {', '.join(data.column_names)}"
    raise ValueError(
        f"The training data is {found}, and labelled rows are mixed with taught ones as token ids, row by row. Give "
        f"rows of text or messages as a Dataset, or write ratio='0:1' to train on taught rows alone."
    )


def _nothing_left(found: dict[str, int], options: DistillOptions) -> str:
    return (
        f"None of the {found['prompts']} answers of the teacher {options.teacher!r} can be trained on: "
        f"{found['empty']} are empty, {found['unfinished']} were cut off after max_new_tokens="
        f"{options.max_new_tokens}, {found['unsure']} are less sure than min_confidence={options.min_confidence:g}. "
        f"Look at {LABELS}; raise max_new_tokens, lower min_confidence, or take another teacher."
    )


def _keep_settings(folder: Path, settings: dict[str, Any], resume: Any) -> None:
    path = folder / SETTINGS
    if resume and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} {before.get(name)!r} (now {value!r})" for name, value in settings.items()
                   if before.get(name) != value]  # fmt: skip
        if changed:
            raise ValueError(
                f"The training in {folder} is under way with other rows: {', '.join(changed)}. Go on with what it "
                f"began with, or name another output_dir."
            )
    write_json(path, settings, indent=2)
