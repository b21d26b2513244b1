"""A run from its arguments: model, adapter, data, training, saving and, if asked, the push."""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DatasetMixtureConfig, GRPOConfig, get_peft_config, get_quantization_config

from ..config import EchoSFTConfig
from ..files import ADAPTER_WEIGHTS, RUN_RECORD
from ..method.depth import CKA
from ..rendering.forms import RowOptions
from ..rendering.rendering import Rendering
from ..run.agreement import Agreement
from ..selection.lora_config import lora_config_kwargs
from ..selection.select import number_of_layers, select_layers
from ..selection.use import baseline_layers
from ..trainer import EchoSFTTrainer
from .arguments import AdapterArguments, DataArguments
from .data import load_data

logger = logging.getLogger(__name__)

OF_A_RUN = ("checkpoint-*", "evaluation", "assets", "adapter_*", "README.md", RUN_RECORD)
"""What a run writes into its folder and a new run must not find there."""

WHOLE_MODELS = ("model.safetensors", "model.safetensors.index.json")
"""What a run without an adapter leaves at its end."""


def run(
    data: DataArguments, config: EchoSFTConfig, adapter: AdapterArguments, mixture: DatasetMixtureConfig
) -> EchoSFTTrainer:
    """Train, save and, if asked, push. Returns the trainer."""
    model: Any = _model_name(adapter)
    Agreement().decide(lambda: refuse_finished(config, data.overwrite_output_dir))
    config.model_init_kwargs = model_options(adapter, config)
    dataset = load_data(data, mixture)
    check_base(model, adapter.model_revision, config.trust_remote_code)
    evaluate = config.eval_strategy != "no"
    if not evaluate and data.dataset_test_split in dataset:
        logger.warning(
            "The dataset has a split %r, which is not used: write `eval_strategy: epoch` to follow the loss on it, or "
            "measure the adapter afterwards with `echo-trainer evaluate`.",
            data.dataset_test_split,
        )
    for split in [data.dataset_train_split, *([data.dataset_test_split] if evaluate else [])]:
        if split not in dataset:
            raise ValueError(f"The dataset has no split {split!r}; it has {sorted(dataset)}.")
    train_dataset = dataset[data.dataset_train_split]
    warn_of_silence(config)
    quantization = get_quantization_config(adapter)
    peft_config = get_peft_config(adapter)
    if adapter.lora_layers is not None:
        model, quantization, peft_config = on_chosen_layers(adapter, config, peft_config, train_dataset)
    trainer = EchoSFTTrainer(
        model=model,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=dataset[data.dataset_test_split] if evaluate else None,
        quantization_config=quantization,
        peft_config=peft_config,
    )
    trainer.add_callback(SaysWhereItGoesOn())
    trainer.dataset_name = None if data.dataset_name and Path(data.dataset_name).exists() else data.dataset_name
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    finish(trainer)
    return trainer


def finish(trainer: EchoSFTTrainer) -> None:
    """Save and, if asked, push what was trained, say where it is, and end what was begun."""
    config = trainer.args
    if not config.push_to_hub:
        trainer.save_model(config.output_dir)
    elif not trainer.pushes.final:  # with hub_strategy="end" training has pushed, and so saved, it already
        trainer.push_to_hub()
    trainer.accelerator.print(
        f"The adapter is in {config.output_dir}. Next: `echo-trainer check {config.output_dir}` says which servers "
        f"take it, `echo-trainer evaluate {config.output_dir} --tasks FILE --against base` whether it is better."
    )
    trainer.end()


class SaysWhereItGoesOn(TrainerCallback):
    """Prints the step that a resumed run goes on from."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero and state.global_step:
            print(f"Going on from step {state.global_step} of {state.max_steps}.", flush=True)


def warn_of_silence(config: EchoSFTConfig) -> None:
    """Say where a run ends before it has logged anything."""
    every = config.logging_steps
    if config.logging_strategy == "steps" and 0 < config.max_steps < every and every >= 1:
        logger.warning(
            "max_steps=%d is below logging_steps=%d, so no loss is logged and no curve drawn. Write logging_steps: 1.",
            config.max_steps,
            every,
        )


def refuse_finished(config: EchoSFTConfig | GRPOConfig, overwrite: bool, goes_on: bool = False) -> None:
    """
    Keep a run from being replaced by accident; with `overwrite` what a run writes is deleted first.

    Args:
        config: of the run that is to begin.
        overwrite: whether what is there may be deleted.
        goes_on: whether the command goes on with a run that was stopped, by itself.

    Raises:
        ValueError: `output_dir` holds a run that has finished, or one that was stopped.
    """
    if config.resume_from_checkpoint:
        return
    folder = Path(str(config.output_dir))
    checkpoints = list(folder.glob("checkpoint-*"))
    if not (folder / RUN_RECORD).is_file() and not checkpoints:
        return
    finished = any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, *WHOLE_MODELS))
    if not overwrite and not finished and goes_on:
        return
    if not overwrite and not finished:
        raise ValueError(
            f"output_dir is {config.output_dir}, which holds a run that was stopped before it ended, with "
            f"{len(checkpoints)} checkpoints. Write `resume_from_checkpoint: true` to go on with it, "
            f"`overwrite_output_dir: true` to delete it and begin anew, or name another folder."
        )
    if not overwrite:
        raise ValueError(
            f"output_dir is {config.output_dir}, which holds a finished run. Training into it would replace its "
            f"adapter, card and evaluation, and leave its checkpoints among the new ones. Name another folder, "
            f"write `overwrite_output_dir: true` to delete the old run first, or `resume_from_checkpoint: true` "
            f"to go on with it."
        )
    for path in [path for pattern in OF_A_RUN for path in folder.glob(pattern)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def model_options(adapter: AdapterArguments, config: EchoSFTConfig | GRPOConfig) -> dict[str, Any]:
    """How the base is loaded: `model_init_kwargs`, and the arguments that stand for some of them."""
    return {
        "revision": adapter.model_revision,
        "attn_implementation": adapter.attn_implementation,
        "dtype": adapter.dtype,
        **_given_options(config),
    }


def check_base(name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """
    Look at the base before anything else is done.

    Raises:
        ValueError: it has no configuration here or on the Hub.
    """
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`model_name_or_path` is {name!r}, and no model can be loaded from it: {reason} There is "
            f"{'a' if Path(name).is_dir() else 'no'} folder of that name here. Give the folder of a model, or an id "
            f"of the Hub, and see that the Hub can be reached."
        ) from error


def _model_name(adapter: AdapterArguments) -> str:
    if adapter.model_name_or_path is None:
        raise ValueError("No model: give `model_name_or_path` (an id on the Hub or a local folder).")
    return adapter.model_name_or_path


def _given_options(config: EchoSFTConfig | GRPOConfig) -> dict[str, Any]:
    given = config.model_init_kwargs or {}
    assert isinstance(given, dict)  # text is what the command line gives, and it is parsed when the config is made
    return given


def load_model(adapter: AdapterArguments, config: EchoSFTConfig) -> tuple[Any, Any]:
    """The base model and its tokenizer, as the trainer would load them."""
    name = _model_name(adapter)
    options = {key: value for key, value in _given_options(config).items() if value is not None}
    options.setdefault("trust_remote_code", config.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=get_quantization_config(adapter), **options)
    return model, load_tokenizer(adapter, config)


def load_tokenizer(adapter: AdapterArguments, config: EchoSFTConfig) -> Any:
    """The tokenizer of the base, with the end token and the chat template that the trainer would give it."""
    revision = _given_options(config).get("revision") or adapter.model_revision
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(_model_name(adapter), revision=revision, **options)
    if config.eos_token is not None:
        tokenizer.eos_token = config.eos_token
    template = config.chat_template_path
    if template is not None and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif template is not None:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(template, **options).get_chat_template()
    return tokenizer


def on_chosen_layers(
    adapter: AdapterArguments, config: EchoSFTConfig, peft_config: Any, dataset: Any
) -> tuple[Any, None, Any]:
    """
    The loaded model and the LoraConfig that adapts only the layers `lora_layers` chooses.

    Args:
        adapter, config: of the run.
        peft_config: for all layers; it is changed.
        dataset: training data, looked at where layers are chosen by CKA.

    Returns:
        Model, quantisation (None: the model has it) and configuration, for the trainer.
    """
    assert adapter.lora_layers is not None
    model, tokenizer = load_model(adapter, config)
    depth = model.config.get_text_config().num_hidden_layers
    if adapter.lora_layers == CKA:
        options = {"ratio": adapter.lora_layers_ratio, "seed": config.seed}
        rendering = Rendering(RowOptions.of(config), tokenizer)
        selected = partial(select_layers, model, dataset, processing_class=tokenizer, rendering=rendering, **options)
        layers = Agreement().decide(lambda: selected().layers)
    else:
        count = number_of_layers(adapter.lora_layers_ratio, depth)
        layers = baseline_layers(adapter.lora_layers, depth, count, config.seed)
    fields = lora_config_kwargs(model, layers, peft_config.target_modules)
    for name, value in fields.items():
        setattr(peft_config, name, value)
    config.model_init_kwargs = None
    return model, None, peft_config
