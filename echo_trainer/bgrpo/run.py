"""A run of beam GRPO from its arguments: data, model, accuracy before, training, saving, accuracy after."""

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config, get_quantization_config

from ..recipe.arguments import AdapterArguments
from ..recipe.data import load_rows_by_split
from ..recipe.training import model_options, refuse_finished
from ..run.agreement import Agreement
from .accuracy import accuracy_by_width, before_and_after, draw
from .arguments import BeamArguments
from .config import BeamGRPOConfig
from .trainer import BeamGRPOTrainer
from .verifier import load_callable

logger = logging.getLogger(__name__)

PICTURE = "beams.png"
TOKENIZER = "tokenizer_config.json"


def run(
    data: BeamArguments, config: BeamGRPOConfig, adapter: AdapterArguments, say: Callable[[str], None] = print
) -> BeamGRPOTrainer:
    """
    Train, save and, if asked, push.

    Args:
        data, config, adapter: of the run.
        say: told of what was measured, a line at a time, on the main process.

    Returns:
        The trainer; `accuracy` holds the accuracies by width.
    """
    _require(data, adapter)
    assert data.verifier is not None
    Agreement().decide(lambda: refuse_finished(config, data.overwrite_output_dir))
    verifier = load_callable(data.verifier, "verifier")
    splits = _rows(data)
    model, quantization, peft_config = _model(data, config, adapter)
    trainer = BeamGRPOTrainer(
        model=model,
        verifier=verifier,
        args=config,
        train_dataset=splits[data.dataset_train_split],
        eval_dataset=splits.get(data.dataset_test_split) if config.eval_strategy != "no" else None,
        processing_class=_tokenizer(data, config),
        quantization_config=quantization,
        peft_config=peft_config,
    )
    trainer.dataset_name = None if Path(str(data.dataset_name)).exists() else data.dataset_name
    tell = say if trainer.is_world_process_zero() else lambda line: None
    rows = _held_out(data, splits)

    def measured(when: str) -> dict[int, float]:
        tokenizer, longest = trainer.processing_class, trainer.max_completion_length
        as_in_training = {"options": trainer.generation_kwargs, "template": config.chat_template_kwargs}
        widths = data.beam_eval_widths
        found = accuracy_by_width(trainer.model, tokenizer, rows, verifier, longest, widths, **as_in_training)
        words = ", ".join(f"{100 * value:.1f} % with {width}" for width, value in found.items())
        tell(f"Right on {len(rows)} held-out prompts, {when} training, by beam width: {words}.")
        return found

    before = measured("before") if rows else None
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir, _internal_call=True)  # before a verifier can fail on it; pushed below
    if before is not None:
        trainer.accuracy = before_and_after(before, measured("after"), len(rows))
        if trainer.is_world_process_zero():
            draw(trainer.accuracy, Path(config.output_dir, "assets", PICTURE))
            trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()
    tell(
        f"What was trained is in {config.output_dir}. Answer with num_beams={trainer.num_generations}, as in training."
    )
    return trainer


def _require(data: BeamArguments, adapter: AdapterArguments) -> None:
    for value, name, what in (
        (adapter.model_name_or_path, "model_name_or_path", "an id on the Hub or a local folder"),
        (data.dataset_name, "dataset_name", "a file, a folder or an id on the Hub, with a column of prompts"),
        (data.verifier, "verifier", "FILE.py:FUNCTION, which judges (prompt, completion, row)"),
    ):
        if value is None:
            raise ValueError(f"No {name}: give `{name}` ({what}).")
    if adapter.lora_layers is not None:
        raise ValueError("`lora_layers` chooses layers on answers, which beam GRPO has none of: leave it out.")


def _rows(data: BeamArguments) -> Any:
    splits = load_rows_by_split(str(data.dataset_name), data.dataset_config, bool(data.dataset_streaming))
    if data.dataset_train_split not in splits:
        raise ValueError(f"The dataset has no split {data.dataset_train_split!r}; it has {sorted(splits)}.")
    if data.prompt_column == "prompt":
        return splits
    for split, rows in splits.items():
        if data.prompt_column not in (rows.column_names or [data.prompt_column]):
            raise ValueError(f"The split {split!r} has no column {data.prompt_column!r}; it has {rows.column_names}.")
    return type(splits)({split: rows.rename_column(data.prompt_column, "prompt") for split, rows in splits.items()})


def _held_out(data: BeamArguments, splits: Any) -> list[dict[str, Any]]:
    """Rows that are answered before and after; none where there is no test split."""
    if data.dataset_test_split in splits:
        return list(splits[data.dataset_test_split].take(data.beam_eval_rows)) if data.beam_eval_rows else []
    if data.beam_eval_rows:
        logger.warning(
            "The dataset has no split %r, so nothing is measured before and after. A folder with train.jsonl and "
            "test.jsonl has both.",
            data.dataset_test_split,
        )
    return []


def _model(data: BeamArguments, config: BeamGRPOConfig, adapter: AdapterArguments) -> tuple[Any, Any, Any]:
    """Model, quantisation and configuration of an adapter, for the trainer."""
    name, quantization = str(adapter.model_name_or_path), get_quantization_config(adapter)
    config.model_init_kwargs = options = model_options(adapter, config)
    if data.adapter_name_or_path is None:
        return name, quantization, get_peft_config(adapter)
    if ignored := _given_for_lora(adapter):
        logger.warning(
            "adapter_name_or_path is %s, an adapter with a form of its own, so %s will do nothing.",
            data.adapter_name_or_path,
            ", ".join(f"{option}={value}" for option, value in ignored.items()),
        )
    config.model_init_kwargs = None
    options = {"dtype": "float32", **{key: value for key, value in options.items() if value is not None}}
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, **options)
    return PeftModel.from_pretrained(model, data.adapter_name_or_path, is_trainable=True), None, None


def _given_for_lora(adapter: AdapterArguments) -> dict[str, Any]:
    """Options of a new adapter that are not at their defaults."""
    plain = AdapterArguments()
    names = [option.name for option in fields(adapter) if option.name.startswith(("lora_", "use_rslora", "use_dora"))]
    return {name: getattr(adapter, name) for name in names if getattr(adapter, name) != getattr(plain, name)}


def _tokenizer(data: BeamArguments, config: BeamGRPOConfig) -> Any:
    """The tokenizer that was saved with the adapter to go on with, and its chat template; None: that of the base."""
    name = data.adapter_name_or_path
    if name is None:
        return None
    if Path(name).is_dir():
        if not Path(name, TOKENIZER).is_file():
            return None
    else:
        try:
            hf_hub_download(name, TOKENIZER)
        except EntryNotFoundError:  # there is none, or the Hub cannot be asked
            logger.warning("No tokenizer was found beside the adapter %s: that of the base is used.", name)
            return None
    sides = {"padding_side": "left", "truncation_side": "left"}  # as TRL loads that of a base
    return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, **sides)
