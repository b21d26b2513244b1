"""`evaluate_adapter`: from the name of an adapter or a model to its figures, in one call."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import RUN_RECORD
from ..options import marker
from ..rendering.forms import RowOptions
from .beside import differences
from .echo import echo_checkpoint, load_echo
from .evaluate import Task
from .model import Loaded, load_for_evaluation, load_tokenizer, require_id
from .readers import Reader
from .results import add_to_run
from .run import OF_ANOTHER_ECHO, OF_THE_ECHO, run_evaluation
from .tasks import load_tasks

logger = logging.getLogger(__name__)

BASE = "base"
"""What `against` calls the base of the adapter."""

Advance = Callable[[Task, int], None]


def evaluate_adapter(
    adapter: str | Path,
    tasks: Sequence[str] | str,
    *,
    data: str | Path | None = None,
    base: str | None = None,
    mode: str = "generate",
    template: str | None = None,
    answer_marker: str | None = None,
    prompt_marker: str | None = None,
    batch_size: int = 32,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    restart: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    with_echo: bool = False,
    against: str | Path | None = None,
    columns: tuple[str, str] | None = None,
    watch: Callable[[Loaded, list[Task]], Advance] | None = None,
) -> dict[str, Any]:
    """
    Evaluate an adapter on its base, or a model, and keep every record; an interrupted evaluation continues.

    ```python
    results = evaluate_adapter("runs/my-adapter", "commonsense", data="llm-adapters/", mode="rank")
    results["average"]["value"]  # accuracy in [0, 1]
    ```

    Args:
        adapter: folder or Hub id of an adapter or of a model.
        tasks: names of tasks, "commonsense", "gsm8k", or files of prompts and completions (`tasks.load_tasks`).
        data: folder with files TASK-test.json; None reads the public datasets.
        base: base of the adapter, in place of the one it names.
        mode: "generate" (write an answer), "rank" (the most likely option) or "nll" (score the reference: nats per
            answer).
        template: as in training, one of `templates.TEMPLATES`; None is "alpaca", and none for files.
        answer_marker: what stands before each answer in rows of text; None is what the adapter's `echo_run.json` says,
            as for everything else about rows. Conversations are written with the template of training.
        prompt_marker: what stands before each prompt in a text of several turns.
        batch_size: items at a time.
        num_beams: beams in mode "generate"; 1 is greedy.
        max_new_tokens: longest answer in tokens; None is the task's own.
        limit: items of each task, drawn with `seed`; None is all.
        seed: seed of that draw.
        output: folder of records and results; None is evaluation/ in the model's folder, or below this one.
        restart: delete earlier records of the same tasks and mode first.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU.
        device: such as "cuda:0"; None is a GPU where there is one.
        trust_remote_code: run code of the model's repository.
        with_echo: evaluate the echo pass as well, which existed in training only, with the own echo of each item and
            with that of another one. `adapter` is then a checkpoint that holds echo networks, or the folder of a run,
            whose last such checkpoint is taken.
        against: evaluate this adapter or model on the same items as well, or "base", the adapter's base.
        columns: names of the columns of prompt and completion in files; they are joined as training joins them.
        watch: called with the model and the tasks before the first item, and again before each echo pass or what is
            compared; what it returns is called with a task and a number of finished items.

    Returns:
        What results.MODE.json holds (`run.run_evaluation`), and `written`: what of a finished run's folder now holds
        the figures, in words, or None. With `with_echo` also `echo` and `other`, the same of the echo pass with both
        kinds of echo, with `against` also `against`; and with either `differences` (`beside.differences`; "this" minus
        "against"; "echo" minus "plain", then "echo" minus "other").

    Raises:
        ValueError: an option or a task cannot work, the folder holds records of another model, data or options, or
            there is no checkpoint with echo networks.
        FileNotFoundError: there is no data for a task.
    """
    for name, value in (("batch_size", batch_size), ("num_beams", num_beams), ("limit", limit),
                        ("max_new_tokens", max_new_tokens)):  # fmt: skip
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if num_beams > 1 and mode != "generate":
        raise ValueError(f"num_beams={num_beams} is for mode generate; mode {mode} writes nothing.")
    if with_echo and against is not None:
        raise ValueError("`with_echo` compares both passes of one run, so there is no place for `against`. Give one.")
    name = str(echo_checkpoint(str(adapter)) if with_echo else adapter)
    drawn = {"limit": limit, "seed": seed, "max_new_tokens": max_new_tokens}
    # The tasks come first: their mistakes are found before a large model loads.
    tokenizer = load_tokenizer(name, base, trust_remote_code)
    said = row_options(str(Path(name).parent) if with_echo else name, answer_marker, prompt_marker)
    wanted = load_tasks(
        tasks, data, template=template, tokenizer=tokenizer, row_options=said, columns=columns, **drawn
    )
    loaded = load_for_evaluation(name, base, dtype, device, trust_remote_code)
    folder = Path(output) if output is not None else records_folder(name, with_echo)

    def evaluate(
        loaded: Loaded, reader: Reader | None = None, folder: Path = folder, ending: str = ""
    ) -> dict[str, Any]:
        return run_evaluation(
            loaded,
            wanted,
            folder,
            mode=mode,
            batch_size=batch_size,
            num_beams=num_beams,
            settings={"template": template, "limit": limit, "seed": seed},
            restart=restart,
            advance=watch(loaded, wanted) if watch is not None else None,
            reader=reader,
            ending=ending,
        )

    summary = evaluate(loaded)
    if with_echo:
        for key, ending, of in (("echo", OF_THE_ECHO, {}), ("other", OF_ANOTHER_ECHO, {"echo_of": "another item"})):
            reader, digest = load_echo(loaded.model, loaded.tokenizer, Path(name), borrowed=key == "other")
            identity = {**loaded.identity, "echo_networks": digest, **of}
            summary[key] = evaluate(replace(loaded, identity=identity), reader, ending=ending)
        own = ("echo", folder, mode + OF_THE_ECHO)
        beside = ("plain", folder, mode), ("other", folder, mode + OF_ANOTHER_ECHO)
        found = [row for other in beside for row in differences(wanted, mode, own, other)]
        return {**summary, "differences": found, "written": None}
    results = [*summary["results"], *([summary["average"]] if summary["average"] else [])]
    written = add_to_run(Path(name), results) if Path(name).is_dir() else None
    summary |= {"written": written}
    if against is None:
        return summary
    other = loaded.base if str(against) == BASE else str(against)
    if other == name:
        raise ValueError(f"{name} is to be compared with itself. Name another adapter or model in `against`.")
    del loaded  # the two need not lie in memory together
    beside = folder / "against" / Path(other).name
    theirs = evaluate(load_for_evaluation(other, None, dtype, device, trust_remote_code), folder=beside)
    pair = ("this", folder, mode), ("against", beside, mode)
    return {**summary, "against": theirs, "differences": differences(wanted, mode, *pair)}


def row_options(model: str, answer_marker: str | None = None, prompt_marker: str | None = None) -> RowOptions:
    """
    What a training run said about its rows, from the record beside its adapter; markers that are given come first.

    Args:
        model: folder, or id on the Hub; offline its cached files.
        answer_marker, prompt_marker: in place of the record's.

    Raises:
        OSError, ValueError: there is a record, and it could not be read.
    """
    record = _record(model)
    markers = {"answer_marker": answer_marker, "prompt_marker": prompt_marker}
    given = {name: marker(name, value) for name, value in markers.items() if value is not None}
    return replace(RowOptions.of(record.get("rows") or {}), **given)


def _record(model: str) -> dict[str, Any]:
    """The record of a training run; empty where there is none."""
    path = Path(model) / RUN_RECORD if Path(model).is_dir() else _downloaded(model)
    if path is None or not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{RUN_RECORD} of {model} is not JSON ({error}). Restore it, or delete the file.") from error


def _downloaded(model: str) -> Path | None:
    """The record of a training run on the Hub; None where its repository has none."""
    require_id(model)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(model, RUN_RECORD))
    except LocalEntryNotFoundError as error:  # the Hub was not asked, or did not answer
        known = any(
            isinstance(try_to_load_from_cache(model, name), str) for name in ("adapter_config.json", "config.json")
        )
        if not known or not isinstance(error.__cause__, OfflineModeIsEnabled):
            raise ValueError(
                f"{RUN_RECORD} of {model} says how its rows were written in training, and the Hub could not be asked "
                f"for it: {error.__cause__ or error}. Try again, or give the folder of a downloaded adapter."
            ) from error
        logger.warning(
            "%s of %s is not among the files kept here, and the Hub is not asked (HF_HUB_OFFLINE): rows are written "
            "as by default. If it was trained with an answer_marker, give that.",
            RUN_RECORD,
            model,
        )
        return None
    except EntryNotFoundError:
        return None


def records_folder(model: str, with_echo: bool = False) -> Path:
    """
    Where records go unless told otherwise: into the model's folder, or below this one.

    Args:
        model: folder or id; with the echo a checkpoint, beside which the folder of its run is.
        with_echo: whether the echo pass is evaluated as well.
    """
    if with_echo:  # nothing is written into a checkpoint
        return Path(model).parent / "evaluation" / Path(model).name
    return Path(model) / "evaluation" if Path(model).is_dir() else Path("evaluation") / Path(model).name
