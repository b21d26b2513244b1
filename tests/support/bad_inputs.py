"""The table of wrong inputs, part 1: options, data, models and adapters given to the trainer.

A case says what was given in words, how to give it, and what must come back. `test_bad_input.py` runs all of them;
`make_help.py` turns them into `recipes/what-went-wrong/README.md`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset
from made_up import made_up_model
from models import conversation_rows, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from training import echo_trainer
from transformers import T5Config, T5ForConditionalGeneration

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.method.losses import NonFiniteLossError


@dataclass(frozen=True)
class BadInput:
    """
    A wrong input.

    Attributes:
        group: heading in the help.
        given: what the user gave, in words or as code.
        give: gives it; works in an empty folder and may leave nothing new in `folder / "out"`.
        message: a fragment of the message.
        error: the type of the exception.
    """

    group: str
    given: str
    give: Callable[[Path], object]
    message: str
    error: type[Exception] = ValueError


OPTIONS = [
    ({"echo_p_start": 1.5}, "not in [0, 1]"),
    ({"echo_p_start": -0.1}, "not in [0, 1]"),
    ({"echo_p_end": float("nan")}, "not in [0, 1]"),
    ({"echo_p_end": "0.5"}, "not in [0, 1]"),
    ({"echo_p_start": True}, "not in [0, 1]"),
    ({"echo_kd_temperature": 0}, "divides the logits"),
    ({"echo_kd_temperature": -1.0}, "divides the logits"),
    ({"echo_kd_temperature": float("inf")}, "divides the logits"),
    ({"echo_kd_weight": -1.0}, "push the two passes apart"),
    ({"echo_kd_weight": None}, "push the two passes apart"),
    ({"echo_bottleneck": 0}, "width of a layer"),
    ({"echo_bottleneck": 2.5}, "width of a layer"),
    ({"echo_aggregation": "max"}, "'mean', 'weighted'"),
    ({"echo_positions": "all"}, "'answer', 'predicting'"),
    ({"echo_teacher": "both"}, "'echo', 'plain', 'mutual'"),
    ({"card_prompt": "all"}, "'none', 'format', 'example'"),
    ({"echo_pass": "half"}, "'auto', 'suffix', 'full'"),
    ({"echo_learning_rate": 0.0}, "positive number"),
    ({"echo_learning_rate": "fast"}, "positive number"),
    ({"echo_seed": -1}, "at least 0"),
    ({"echo_seed": 1.5}, "at least 0"),
    ({"echo_preset": "loud"}, "'paper', 'strong'"),
    ({"echo_gate": "tanh"}, "'sigmoid', 'none'"),
    ({"echo_gate_bias": "open"}, "Write a number"),
    ({"echo_scale": 0.0}, "no gradient would ever reach"),
    ({"echo_scale": -1.0}, "no gradient would ever reach"),
    ({"echo_detach": "maybe"}, "true (no gradient"),
    ({"echo_loss": "average"}, "'sum', 'mean'"),
    ({"echo_probation": -1}, "a share of the run"),
    ({"echo_probation": "late"}, "a share of the run"),
    ({"echo_held_out": 2.5}, "how many training rows"),
    ({"echo_held_out": -5}, "how many training rows"),
    ({"echo_when_useless": "cry"}, "'say', 'stop'"),
    ({"echo_source_layers": "lowest"}, "the layer just above the targets"),
    ({"echo_target_layers": "above"}, "the lowest layer with an adapter"),
    ({"echo_source_layers": []}, "list of layer indices"),
    ({"echo_source_layers": "deep"}, "list of layer indices"),
    ({"echo_target_layers": [1.5]}, "list of layer indices"),
    ({"echo_target_layers": [1, 1]}, "names a layer twice"),
    ({"loss_type": "dft"}, "loss_type='nll'"),
    ({"label_smoothing_factor": 0.1}, "changes the targets of both passes"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "non-reentrant"),
    ({"torch_compile": True}, "compiled again each time"),
]


def option(settings, message):
    given = ", ".join(f"`{name}={value!r}`" for name, value in settings.items())
    name = next(iter(settings)).split("_kwargs")[0]

    def give(folder):
        try:
            EchoSFTConfig(output_dir=str(folder / "out"), use_cpu=True, **settings)
        except ValueError as error:
            if name not in str(error):
                raise AssertionError(f"the message does not name {name}") from error
            raise

    return BadInput("Options", given, give, message)


def lora_on_layers(*layers):
    return LoraConfig(target_modules=["q_proj"], layers_to_transform=list(layers), layers_pattern="layers")


def encoder_decoder():
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(config)


def rows_of(**columns):
    return lambda: Dataset.from_list([columns for _ in range(8)])


def texts():
    return Dataset.from_list([{"text": row["prompt"]} for row in prompt_completion_rows(8)])


def conversations():
    return Dataset.from_list(conversation_rows(8))


def questions():
    return Dataset.from_list([{"messages": row["messages"][:1]} for row in conversation_rows(8)])


def stream_of_texts():
    return IterableDataset.from_generator(lambda: ({"text": row["prompt"]} for row in prompt_completion_rows(8)))


def stream_of_rows():
    return Dataset.from_list(prompt_completion_rows(8)).to_iterable_dataset()


def evaluated():
    return {"eval_dataset": Dataset.from_list(prompt_completion_rows(8))}


DATA, LAYERS, ADAPTER, MODEL = "Data", "Layers of the echo", "Adapter to train", "Model"
TRAINER = [
    (DATA, "rows with `text` only", {"rows": texts}, "no boundary"),
    (DATA, "labels without a prompt", {"rows": rows_of(input_ids=[3, 4], labels=[3, 4])}, "no boundary"),
    (
        DATA,
        "labels that are all -100",
        {"rows": rows_of(input_ids=[3, 4], labels=[-100] * 2), "max_length": None},
        "no boundary",
    ),
    (DATA, "a stream of `text`", {"rows": stream_of_texts}, "no boundary"),
    (
        DATA,
        "conversations with `assistant_only_loss=False`",
        {"rows": conversations, "assistant_only_loss": False},
        "Leave assistant_only_loss out",
    ),
    (
        DATA,
        "a conversation without an answer",
        {"rows": questions},
        "Row 0 (the first is row 0) has no turn of the assistant",
    ),
    (DATA, "a text without the answer marker", {"rows": texts, "answer_marker": "### Response:\n"}, "Row 0"),
    (DATA, "an answer marker, and rows that are no text", {"answer_marker": "### Response:\n"}, "looked for in text"),
    (DATA, "`max_length=3`, which cuts off every answer", {"max_length": 3}, "max_length"),
    (
        DATA,
        "`echo_held_out` beside an `eval_dataset`",
        {"echo_held_out": 4, "trainer_kwargs": evaluated},
        "Leave one of them out",
    ),
    (DATA, "more rows held out than there are", {"echo_held_out": 40}, "the training data is 40 rows"),
    (
        DATA,
        "`echo_held_out` of a stream",
        {"rows": stream_of_rows, "echo_held_out": 4},
        "the training data is a stream",
    ),
    (LAYERS, "a source below a target", {"echo_source_layers": [1], "echo_target_layers": [3]}, "must lie below"),
    (LAYERS, "a source that is a target", {"echo_source_layers": [2], "echo_target_layers": [2]}, "must lie below"),
    (LAYERS, "one target too deep", {"echo_source_layers": [3, 4], "echo_target_layers": [0, 3]}, "must lie below"),
    (LAYERS, "a source the model does not have", {"echo_source_layers": [5]}, "outside the model"),
    (LAYERS, "a target the model does not have", {"echo_target_layers": [-6]}, "outside the model"),
    (LAYERS, "the same layer as 4 and as -1", {"echo_source_layers": [4, -1]}, "twice"),
    (LAYERS, "`echo_layers` that names no list", {"echo_layers": "model.blocks"}, "model.layers (5)"),
    (
        LAYERS,
        "a target without LoRA",
        {"lora": lambda: lora_on_layers(3, 4), "echo_target_layers": [1]},
        "hold no LoRA module",
    ),
    (
        LAYERS,
        "LoRA on the last layer only",
        {"lora": lambda: lora_on_layers(4)},
        "adapt a lower one",
    ),
    (LAYERS, "the last layer as target", {"echo_target_layers": [4]}, "the last of 5"),
    (ADAPTER, "`bias='all'`", {"lora": lambda: lora_config(bias="all")}, "bias='none'"),
    (ADAPTER, "`bias='lora_only'`", {"lora": lambda: lora_config(bias="lora_only")}, "bias='none'"),
    (ADAPTER, "an IA3Config", {"lora": lambda: IA3Config(task_type="CAUSAL_LM")}, "IA3Config"),
    (
        ADAPTER,
        "a PromptTuningConfig",
        {"lora": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
        "LoraConfig",
    ),
    (
        MODEL,
        "a `compute_loss_func`",
        {"trainer_kwargs": lambda: {"compute_loss_func": lambda *a, **k: 0}},
        "compute_loss_func",
    ),
    (MODEL, "a model of one layer", {"model": lambda: tiny_model(num_hidden_layers=1)}, "at least 2"),
]


def given_to_trainer(group, given, settings, message):
    def give(folder):
        echo_trainer(folder / "out", **{name: v() if callable(v) else v for name, v in settings.items()})

    return BadInput(group, given, give, message)


FIRST_STEP = "Found at the first step"


def made_up(fault, **settings):
    def give(folder):
        names = ["qkv_proj", "o_proj", "up_proj", "down_proj"]
        settings.update(lora=lora_config(init_lora_weights=True, target_modules=names), gradient_checkpointing=False)
        echo_trainer(folder / "out", model=made_up_model(fault), **settings).train()

    return give


def full_parameters(folder):
    EchoSFTTrainer(
        model=tiny_model(),
        args=EchoSFTConfig(output_dir=str(folder / "out"), use_cpu=True),
        train_dataset=Dataset.from_list(prompt_completion_rows(4)),
        processing_class=tiny_tokenizer(),
    )


def frozen_adapter(folder):
    model = get_peft_model(tiny_model(), lora_config())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    EchoSFTTrainer(
        model=model,
        args=EchoSFTConfig(output_dir=str(folder / "out"), use_cpu=True, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(prompt_completion_rows(4)),
        processing_class=tiny_tokenizer(),
    )


def arguments_as_a_mapping(folder):
    EchoSFTTrainer(
        model=tiny_model(),
        args={"output_dir": str(folder / "out")},
        train_dataset=None,
        peft_config=lora_config(),
    )


def layers_of_an_encoder_decoder(folder):
    from echo_trainer.passes.layers import decoder_layers

    decoder_layers(encoder_decoder())


CASES = [
    *(option(settings, message) for settings, message in OPTIONS),
    *(given_to_trainer(*row) for row in TRAINER),
    BadInput(ADAPTER, "no `peft_config`", full_parameters, "without `peft_config`"),
    BadInput(ADAPTER, "a PeftModel whose adapter is frozen", frozen_adapter, "is_trainable=True"),
    BadInput(MODEL, "an encoder-decoder", layers_of_an_encoder_decoder, "encoder-decoder"),
    BadInput(FIRST_STEP, "a model that sees later tokens", made_up("sees ahead"), "is no causal model"),
    BadInput(FIRST_STEP, "a model whose logits are not those of its head", made_up("head by position"), "logits"),
    BadInput(
        FIRST_STEP, "a model that draws random numbers in evaluation", made_up("random"), "No echo pass is exact"
    ),
    BadInput(
        FIRST_STEP,
        "`echo_pass='suffix'` where it is not exact",
        made_up("wrong by 1e-2", echo_pass="suffix"),
        "echo_pass='suffix' is not exact",
    ),
    BadInput(
        FIRST_STEP,
        "a base with NaN in its weights",
        made_up("nan in the base"),
        "before the first step",
        NonFiniteLossError,
    ),
    BadInput("Options", "`args` as a dict", arguments_as_a_mapping, "EchoSFTConfig", TypeError),
]
