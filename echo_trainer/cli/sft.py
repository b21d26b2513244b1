"""`echo-trainer sft`: a run from a recipe and the command line, on TRL's own argument classes and parser."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..config import EchoSFTConfig
from ..options import CKA
from ..selection.select import number_of_layers, select_layers
from ..selection.use import baseline_layers, lora_config_kwargs
from ..templates import TEMPLATES
from ..trainer import EchoSFTTrainer
from .recipe import recipe_path
from .recipe_check import check_recipe

LAYER_BASELINES = ("first-half-plus-last", "last", "random", "uniform")


@dataclass
class DataArguments(ScriptArguments):
    """TRL's script arguments, and how to turn the dataset's columns into prompts and completions."""

    dataset_template: str | None = field(
        default=None,
        metadata={
            "help": "How to make prompts and completions from the columns instruction/output (LLM-Adapters) or "
            "question_stem/choices/answerKey (OpenBookQA): 'alpaca' (text, for base models) or 'chat' (messages). "
            "None: the dataset is in a format of TRL already.",
            "choices": [*TEMPLATES],
        },
    )


@dataclass
class AdapterArguments(ModelConfig):
    """TRL's model arguments; Echo-LoRA always trains an adapter, on all linear layers unless told otherwise."""

    use_peft: bool = field(default=True, metadata={"help": "Train an adapter. Echo-LoRA needs one."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"nargs": "+", "help": "Modules that get LoRA, by name; 'all-linear' is every linear layer."},
    )
    lora_layers: str | None = field(
        default=None,
        metadata={
            "help": "Adapt half of the layers: 'cka' (the most important ones by layer selection on the data), or "
            "a baseline to compare it with. None: all layers.",
            "choices": [CKA, *LAYER_BASELINES],
        },
    )
    lora_layers_ratio: float = field(
        default=0.5, metadata={"help": "Share of the layers that `lora_layers` adapts, in (0, 1]."}
    )


CLASSES = (DataArguments, EchoSFTConfig, AdapterArguments, DatasetMixtureConfig)
"""Where the options of a run are declared."""


def make_parser(prog: str = "echo-trainer sft") -> TrlParser:
    """The parser: every field of `EchoSFTConfig` and of TRL's script, model and dataset-mixture arguments."""
    return TrlParser(
        CLASSES,
        prog=prog,
        usage=f"{prog} [--config RECIPE] [--OPTION VALUE ...]",
        description="Fine-tune with Echo-LoRA. `--config RECIPE` takes a YAML file or the name of a recipe that ships "
        "with echo_trainer; any field below can be given as well and overrides the recipe.",
    )


def parse(arguments: list[str]) -> tuple[DataArguments, EchoSFTConfig, AdapterArguments, DatasetMixtureConfig]:
    """
    Arguments of a run from the command line and the recipe it names.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the recipe has an unknown key, or a value is refused.
    """
    return make_parser().parse_args_and_config(with_recipe_path(arguments))


def with_recipe_path(arguments: list[str], classes: tuple[type, ...] = CLASSES) -> list[str]:
    """
    The arguments with the recipe that `--config` names replaced by its path.

    Args:
        arguments: of a command.
        classes: the dataclasses whose fields the recipe may set.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: nothing follows `--config`, or the recipe cannot work.
    """
    arguments = list(arguments)
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):
            arguments[place : place + 1] = ["--config", argument.removeprefix("--config=")]
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        if place == len(arguments):
            raise ValueError("`--config` needs the name or the path of a recipe after it.")
        arguments[place] = str(recipe_path(arguments[place]))
        check_recipe(arguments[place], classes)
    return arguments


def load_data(data: DataArguments, mixture: DatasetMixtureConfig) -> Any:
    """
    The dataset, by split.

    `dataset_name` is an id on the Hub, a folder with data files (split by "train" and "test" in their names), or a
    folder written by `save_to_disk`.

    Raises:
        ValueError: no dataset is named, or a template does not fit its columns.
    """
    if mixture.datasets:
        dataset = get_dataset(mixture)
    elif data.dataset_name:
        dataset = _load_named(data)
    else:
        raise ValueError("No dataset: give `dataset_name` (an id on the Hub or a local folder) or `datasets`.")
    if data.dataset_template is None:
        return dataset
    template = TEMPLATES[data.dataset_template]
    splits = {}
    for split, rows in dataset.items():
        options = {"desc": f"Writing {split} prompts"} if isinstance(rows, Dataset) else {}
        splits[split] = rows.map(template, remove_columns=rows.column_names, **options)
    return type(dataset)(splits)


def _load_named(data: DataArguments) -> Any:
    folder = Path(data.dataset_name)
    if (folder / "dataset_dict.json").is_file():
        return load_from_disk(data.dataset_name)
    if (folder / "state.json").is_file():
        return DatasetDict(train=load_from_disk(data.dataset_name))
    return load_dataset(data.dataset_name, name=data.dataset_config, streaming=data.dataset_streaming)


def run(
    data: DataArguments, config: EchoSFTConfig, adapter: AdapterArguments, mixture: DatasetMixtureConfig
) -> EchoSFTTrainer:
    """Train, save and, if asked, push. Returns the trainer."""
    if adapter.model_name_or_path is None:
        raise ValueError("No model: give `model_name_or_path` (an id on the Hub or a local folder).")
    config.model_init_kwargs = {
        "revision": adapter.model_revision,
        "attn_implementation": adapter.attn_implementation,
        "dtype": adapter.dtype,
        **(config.model_init_kwargs or {}),
    }
    dataset = load_data(data, mixture)
    evaluate = config.eval_strategy != "no"
    for split in [data.dataset_train_split, *([data.dataset_test_split] if evaluate else [])]:
        if split not in dataset:
            raise ValueError(f"The dataset has no split {split!r}; it has {sorted(dataset)}.")
    train_dataset = dataset[data.dataset_train_split]
    model, quantization = adapter.model_name_or_path, get_quantization_config(adapter)
    peft_config = get_peft_config(adapter)
    if adapter.lora_layers is not None:
        model, quantization, peft_config = _on_selected_layers(adapter, config, peft_config, train_dataset)
    trainer = EchoSFTTrainer(
        model=model,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=dataset[data.dataset_test_split] if evaluate else None,
        quantization_config=quantization,
        peft_config=peft_config,
    )
    trainer.dataset_name = None if data.dataset_name and Path(data.dataset_name).exists() else data.dataset_name
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)
    trainer.accelerator.print(f"The adapter is in {config.output_dir}.")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=trainer.dataset_name)
    trainer.end()
    return trainer


def load_model(adapter: AdapterArguments, config: EchoSFTConfig) -> tuple[Any, Any]:
    """The base model and its tokenizer, as the trainer would load them."""
    options = {key: value for key, value in (config.model_init_kwargs or {}).items() if value is not None}
    options.setdefault("trust_remote_code", config.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        adapter.model_name_or_path, quantization_config=get_quantization_config(adapter), **options
    )
    tokenizer = AutoTokenizer.from_pretrained(
        adapter.model_name_or_path, revision=options.get("revision"), trust_remote_code=config.trust_remote_code
    )
    return model, tokenizer


def _on_selected_layers(
    adapter: AdapterArguments, config: EchoSFTConfig, peft_config: Any, dataset: Any
) -> tuple[Any, None, Any]:
    """The loaded model and the LoraConfig that adapts only the layers `lora_layers` chooses."""
    model, tokenizer = load_model(adapter, config)
    depth = model.config.get_text_config().num_hidden_layers
    if adapter.lora_layers == CKA:
        selection = select_layers(
            model, dataset, processing_class=tokenizer, ratio=adapter.lora_layers_ratio, seed=config.seed
        )
        layers = selection.layers
    else:
        count = number_of_layers(adapter.lora_layers_ratio, depth)
        layers = baseline_layers(adapter.lora_layers, depth, count, config.seed)
    fields = lora_config_kwargs(model, layers, peft_config.target_modules)
    for name, value in fields.items():
        setattr(peft_config, name, value)
    config.model_init_kwargs = None
    return model, None, peft_config


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer sft`."""
    run(*parse(arguments))
    return 0
