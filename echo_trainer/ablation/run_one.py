"""One run: train an arm, evaluate it, write what was found. The result does not depend on what ran before."""

import gc
import hashlib
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import get_peft_config

from .._version import __version__
from ..files import write_json
from ..passes.modules import base_model_of
from ..passes.setup import plain_setup
from ..recipe.arguments import arguments_of
from ..recipe.training import model_options, on_chosen_layers
from ..rendering.forms import Form, form_of
from ..run.building import loss_terms_of
from . import memory
from .arms import ARMS
from .data import drawn, held_out_task, load_examples, load_tests, row_options
from .evaluating import Report, evaluate_run
from .files import ITEMS, RESULT
from .flops import SIZES, count_coefficients
from .labels import train_on_labels
from .plan import Run, digest, run_folder
from .recipe import AblationRecipe
from .trainer import AblationTrainer


class Workbench:
    """
    What runs of one process share: examples, test sets and tokenised training data. Sharing changes no result.

    Args:
        recipe: the recipe.
    """

    def __init__(self, recipe: AblationRecipe):
        self.recipe = recipe
        self.train, held_out = load_examples(recipe)
        self.held_out = held_out_task(recipe, held_out)
        self.tests = load_tests(recipe)
        self.conversations = form_of(self.train[0], row_options(recipe)) is Form.CONVERSATION
        self.coefficients: dict[tuple, np.ndarray] = {}
        self._tokenised: dict[tuple[bool, int], Dataset] = {}

    def dataset(self, run: Run) -> Dataset:
        """Training data of a run: tokenised by an earlier run with the same loss mask and draw, else text."""
        return self._tokenised.get(self._key(run)) or Dataset.from_list(drawn(self.recipe, self.train, run.seed))

    def keep(self, run: Run, dataset: Dataset) -> None:
        """Keep what the trainer made of the text."""
        self._tokenised.setdefault(self._key(run), dataset)

    def _key(self, run: Run) -> tuple[bool, int]:
        return _masked(run.arm), run.seed if self.recipe.train_draw == "seed" else 0


def run_one(bench: Workbench, run: Run, spec: dict[str, Any], output: Path, report: Report) -> dict[str, Any]:
    """
    Train and evaluate one run and write `items.json` and, last and atomically, `result.json` into its folder.

    Args:
        bench: shared data.
        run: what to run.
        spec: its specification (`plan.specification`), kept with the result.
        output: folder of the ablation.
        report: called with (what is done, number done, number to do).

    Returns:
        The content of `result.json`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(bench, run, Path(scratch), report)
        bench.keep(run, trainer.train_dataset)
        result = {"run": asdict(run), "hash": digest(spec), "spec": spec, "echo_trainer": __version__}
        result["initial_weights"] = _weights_hash(trainer)
        memory.reset()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        trainer.train()
        student, taught = trainer, None
        if ARMS[run.arm].teacher:
            student, taught = train_on_labels(bench.recipe, bench.train, run, trainer, Path(scratch))
        result["training_seconds"] = time.perf_counter() - begin
        result["training_cpu_seconds"] = time.process_time() - begin_cpu
        result["peak_memory"] = memory.peak()
        result["steps"] = trainer.state.global_step
        result["losses"] = _final_losses(trainer)
        result["batches"], result["loss_weight"] = trainer.batch_checksums(), trainer.loss_weight()
        result |= _flops(bench, run.adapter, trainer)
        if taught is not None:
            second = _flops(bench, run.adapter, student)
            result |= {"steps": result["steps"] + student.state.global_step, "labels": taught}
            result |= {"flops": result["flops"] + second["flops"], "second": second | _final_losses(student)}
        tasks, items = evaluate_run(bench, student, report)
        result["tasks"], result["held_out_nll"] = tasks, tasks.pop(bench.held_out.name)["nll"]
        result["device"] = torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else "CPU"
    folder = run_folder(output, run)
    write_json(folder / ITEMS, items)
    write_json(folder / RESULT, result)
    del trainer, student
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def build_trainer(
    bench: Workbench,
    run: Run,
    scratch: Path,
    report: Report,
    trainer_class: type[AblationTrainer] = AblationTrainer,
) -> AblationTrainer:
    """The trainer of a run. Train it before building another: constructors seed the global generators."""
    arm = ARMS[run.arm]
    options = {
        "logging_steps": 10,
        **bench.recipe.training,
        **arm.settings,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "use_dora": run.adapter == "dora",
        "output_dir": str(scratch / "run"),
        "save_strategy": "no",
        "eval_strategy": "no",
        "echo_probation": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if run.max_steps is not None:
        options["max_steps"] = run.max_steps
    elif arm.length != 1:
        if options.get("max_steps", -1) > 0:
            options["max_steps"] = round(options["max_steps"] * arm.length)
        else:
            options["num_train_epochs"] = options.get("num_train_epochs", 3.0) * arm.length
    dataset = bench.dataset(run)
    if not _masked(run.arm) or "input_ids" in dataset.column_names:
        options |= {"answer_marker": None, "prompt_marker": None, "drop_without_marker": False}
    elif bench.conversations:  # without an echo nobody would switch it on
        options["assistant_only_loss"] = True
    _, config, adapter, _ = arguments_of(options)
    config.model_init_kwargs = model_options(adapter, config)
    set_seed(run.seed)
    model, peft_config = adapter.model_name_or_path, get_peft_config(adapter)
    if adapter.lora_layers is not None:
        model, _, peft_config = on_chosen_layers(adapter, config, peft_config, dataset)
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=dataset,
        peft_config=peft_config,
        callbacks=[_Steps(report)],
        echo=arm.echo,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Steps(TrainerCallback):
    """Reports optimizer steps."""

    def __init__(self, report: Report):
        self.report = report

    def on_step_end(self, args, state, control, **kwargs):
        self.report("training", state.global_step, state.max_steps)


def _masked(arm: str) -> bool:
    return ARMS[arm].settings.get("completion_only_loss", True)


def _flops(bench: Workbench, adapter: str, trainer: AblationTrainer) -> dict[str, Any]:
    """Counted FLOPs of the whole training, and the sizes they were computed from."""
    args, echo = trainer.args, trainer.echo
    layers = (tuple(echo.source_layers), tuple(sorted({site.layer for site in echo.sites}))) if echo else None
    sizes, counted = trainer.sizes(), {}
    trainer.model.train()
    for form in sizes:
        key = (adapter, layers, args.echo_positions, args.echo_gate, args.echo_detach, form)
        if key not in bench.coefficients:  # whole numbers that depend on nothing else, so counted once
            setup = echo or plain_setup(base_model_of(trainer.model))
            terms, positions = loss_terms_of(args), args.echo_positions
            bench.coefficients[key] = count_coefficients(setup, terms, form, positions, echo is not None)
        counted[form] = bench.coefficients[key]
    return {
        "flops": float(sum(sizes[form] @ counted[form] for form in sizes)),
        "flops_sizes": dict(zip(SIZES, np.sum(list(sizes.values()), axis=0).tolist(), strict=True)),
        "flops_coefficients": {
            str(form): dict(zip(SIZES, coefficients.tolist(), strict=True)) for form, coefficients in counted.items()
        },
    }


def _weights_hash(trainer: AblationTrainer) -> str:
    """A hash of the adapter's weights before the first step."""
    total = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        if "lora_" in name:
            total.update(name.encode())
            total.update(parameter.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def _final_losses(trainer: AblationTrainer) -> dict[str, float]:
    """Means over the last fifth of the logged training losses, and over all of them."""
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not logged:
        return {}
    last = logged[-max(1, len(logged) // 5) :]
    echo = next((entry for entry in reversed(trainer.state.log_history) if "echo/ce_plain" in entry), {})
    return {
        "loss": float(np.mean(last)),
        "loss_all": float(np.mean(logged)),
        **{key.removeprefix("echo/"): value for key, value in echo.items() if key.startswith("echo/")},
    }
