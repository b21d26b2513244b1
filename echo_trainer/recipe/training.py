"""A run from its arguments: model, adapter, data, training, saving and, if asked, the push."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, get_peft_config, get_quantization_config

from ..config import EchoSFTConfig
from ..options import CKA
from ..rendering.forms import RowOptions
from ..rendering.rendering import Rendering
from ..selection.lora_config import lora_config_kwargs
from ..selection.select import number_of_layers, select_layers
from ..selection.use import baseline_layers
from ..trainer import EchoSFTTrainer
from .arguments import AdapterArguments, DataArguments
from .data import load_data


def run(
    data: DataArguments, config: EchoSFTConfig, adapter: AdapterArguments, mixture: DatasetMixtureConfig
) -> EchoSFTTrainer:
    """Train, save and, if asked, push. Returns the trainer."""
    if adapter.model_name_or_path is None:
        raise ValueError("No model: give `model_name_or_path` (an id on the Hub or a local folder).")
    config.model_init_kwargs = model_options(adapter, config)
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


def model_options(adapter: AdapterArguments, config: EchoSFTConfig) -> dict[str, Any]:
    """How the base is loaded: `model_init_kwargs`, and the arguments that stand for some of them."""
    return {
        "revision": adapter.model_revision,
        "attn_implementation": adapter.attn_implementation,
        "dtype": adapter.dtype,
        **(config.model_init_kwargs or {}),
    }


def load_model(adapter: AdapterArguments, config: EchoSFTConfig) -> tuple[Any, Any]:
    """The base model and its tokenizer, as the trainer would load them."""
    options = {key: value for key, value in (config.model_init_kwargs or {}).items() if value is not None}
    options.setdefault("trust_remote_code", config.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        adapter.model_name_or_path, quantization_config=get_quantization_config(adapter), **options
    )
    return model, load_tokenizer(adapter, config)


def load_tokenizer(adapter: AdapterArguments, config: EchoSFTConfig) -> Any:
    """The tokenizer of the base, with the end token and the chat template that the trainer would give it."""
    options = {"trust_remote_code": config.trust_remote_code}
    revision = (config.model_init_kwargs or {}).get("revision") or adapter.model_revision
    tokenizer = AutoTokenizer.from_pretrained(adapter.model_name_or_path, revision=revision, **options)
    if config.eos_token is not None:
        tokenizer.eos_token = config.eos_token
    template = config.chat_template_path
    if template is not None and Path(template).is_file():
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif template is not None:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(template, **options).get_chat_template()
    return tokenizer


def _on_selected_layers(
    adapter: AdapterArguments, config: EchoSFTConfig, peft_config: Any, dataset: Any
) -> tuple[Any, None, Any]:
    """The loaded model and the LoraConfig that adapts only the layers `lora_layers` chooses."""
    model, tokenizer = load_model(adapter, config)
    depth = model.config.get_text_config().num_hidden_layers
    if adapter.lora_layers == CKA:
        selection = select_layers(
            model,
            dataset,
            processing_class=tokenizer,
            ratio=adapter.lora_layers_ratio,
            seed=config.seed,
            rendering=Rendering(RowOptions.of(config), tokenizer),
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
