"""
The table of options: those of `trl.SFTConfig` and the most used of `TrainingArguments`, each with what becomes of it.

`tests/trainer/test_options.py` sets every one of them in a run of `SFTTrainer` and in one of `EchoSFTTrainer`;
`make_options.py` writes `docs/options.md` from the same table.
"""

from dataclasses import dataclass, field
from typing import Any

SAME, DIFFERENT, REFUSED = "the same", "different", "refused"
TEXT, TURNS, MARKED, TOKENS = "prompt and completion", "messages", "text", "token ids"


@dataclass(frozen=True)
class Option:
    """
    What becomes of a value of an option.

    Attributes:
        name: of the field.
        value: that the test sets.
        verdict: `SAME`, `DIFFERENT` or `REFUSED`.
        how: what is different, why it is refused, or a word on what it does; may be empty.
        others: options that are set beside it, in both runs.
        rows: what the run is trained on.
        model: "made", "folder" (loaded by name, as options about loading need it) or "experts".
        steps: optimizer steps of the run.
        alone: whether it gets a run of its own; others that fit together share one.
    """

    name: str
    value: Any
    verdict: str = SAME
    how: str = ""
    others: dict[str, Any] = field(default_factory=dict)
    rows: str = TEXT
    model: str = "made"
    steps: int = 1
    alone: bool = False


_SAVE = {"save_strategy": "steps", "save_steps": 1}
_EVALUATE = {"eval_strategy": "steps", "eval_steps": 1}
_BEST = {**_SAVE, **_EVALUATE, "load_best_model_at_end": True}
_OFF = "Switch the echo off (`echo_p_start=0, echo_p_end=0`) to have it."

SFT_OPTIONS = [
    Option("learning_rate", 1e-3, how="Of the adapter; `echo_learning_rate` is that of the echo networks."),
    Option("model_init_kwargs", {"dtype": "float32"}, model="folder"),
    Option("trust_remote_code", True, model="folder"),
    Option("router_aux_loss_coef", 0.05, model="experts", how="Computed by the plain pass alone."),
    Option("chat_template_path", "template.jinja", rows=TURNS, others={"assistant_only_loss": True}, model="folder"),
    Option(
        "dataset_text_field",
        "content",
        DIFFERENT,
        "Rows of text need an `answer_marker` as well.",
        rows=MARKED,
    ),
    Option("dataset_kwargs", {"skip_prepare_dataset": True}, rows=TOKENS),
    Option("dataset_num_proc", 1),
    Option("eos_token", "w1", model="folder"),
    Option("max_length", 8, how="What is left without an answer is dropped, which is said."),
    Option("truncation_mode", "keep_start", others={"max_length": 8}),
    Option("shuffle_dataset", True),
    Option("packing", True, others={"max_length": 48}, how="Each document keeps its own prompts, boundary and route."),
    Option("packing_strategy", "bfd_split", others={"packing": True, "max_length": 48}),
    Option("padding_free", True, others={"max_length": None}),
    Option("pad_to_multiple_of", 16),
    Option("eval_packing", False, others={"packing": True, "max_length": 48, **_EVALUATE}),
    Option("completion_only_loss", True),
    Option(
        "completion_only_loss",
        False,
        REFUSED,
        f"Prompts would be answers too. {_OFF}",
    ),
    Option("assistant_only_loss", True, rows=TURNS),
    Option(
        "assistant_only_loss",
        None,
        DIFFERENT,
        "The default here: on for conversations. TRL's default, False, trains on all turns.",
        rows=TURNS,
    ),
    Option(
        "assistant_only_loss",
        False,
        REFUSED,
        f"For conversations, likewise. {_OFF}",
        rows=TURNS,
    ),
    Option("loss_type", "nll"),
    Option("loss_type", "dft", REFUSED, f"It re-weights the cross-entropy that Echo-LoRA's loss is made of. {_OFF}"),
    Option("activation_offloading", False),
    Option("pad_token", "<pad>", how="Deprecated by TRL: set it on the tokenizer."),
]

TRAINING_OPTIONS = [
    Option(
        "output_dir",
        "elsewhere",
        alone=True,
        how="`echo-trainer sft` refuses the folder of a finished run.",
    ),
    Option("num_train_epochs", 2.0, others={"max_steps": -1}),
    Option("max_steps", 2, steps=2, how="p falls from `echo_p_start` to `echo_p_end` over these steps."),
    Option("per_device_train_batch_size", 2),
    Option("gradient_accumulation_steps", 2, how="Same routes and gradients as one batch of that size."),
    Option("per_device_eval_batch_size", 2, others=_EVALUATE),
    Option("auto_find_batch_size", True, alone=True),
    Option("average_tokens_across_devices", False),
    Option("lr_scheduler_type", "cosine", steps=3),
    Option("lr_scheduler_kwargs", {"num_cycles": 2}, others={"lr_scheduler_type": "cosine_with_restarts"}, steps=3),
    Option("warmup_steps", 2, steps=3),
    Option("optim", "sgd", alone=True, how="Of adapter and echo networks."),
    Option("optim_args", "eps=1e-6", others={"optim": "adamw_torch"}),
    Option("weight_decay", 0.1, how="Of adapter and echo networks."),
    Option("adam_beta1", 0.8),
    Option("adam_beta2", 0.99),
    Option("adam_epsilon", 1e-6),
    Option("max_grad_norm", 0.5, how="The norm is that of adapter and echo networks together."),
    Option("label_smoothing_factor", 0.1, REFUSED, f"It changes the targets of both passes. {_OFF}"),
    Option(
        "neftune_noise_alpha",
        5.0,
        alone=True,
        how="The suffix pass shares the prompt's noise.",
    ),
    Option("bf16", True, alone=True),
    Option(
        "bf16",
        None,
        DIFFERENT,
        "TRL's default is bfloat16; here float32 where there is no GPU and bfloat16 is 6 to 12 times slower.",
    ),
    Option("gradient_checkpointing", True),
    Option("gradient_checkpointing", False, alone=True),
    Option("gradient_checkpointing_kwargs", {"use_reentrant": False}, others={"gradient_checkpointing": True}),
    Option(
        "gradient_checkpointing_kwargs",
        {"use_reentrant": True},
        REFUSED,
        f"Gradients of the echo networks inside a checkpointed layer would be lost. {_OFF}",
    ),
    Option("torch_compile", True, REFUSED, f"The echo adds and removes hooks in every step. {_OFF}"),
    Option("torch_empty_cache_steps", 1),
    Option("logging_strategy", "epoch", others={"num_train_epochs": 1, "max_steps": -1}),
    Option("logging_steps", 2, steps=2, how="`loss` is that of the plain path; the echo's metrics stand beside it."),
    Option("logging_first_step", True, others={"logging_steps": 2}, steps=2),
    Option("logging_nan_inf_filter", False),
    Option("include_num_input_tokens_seen", "all"),
    Option("log_level", "error"),
    Option("disable_tqdm", True),
    Option("report_to", "none"),
    Option("run_name", "mine"),
    Option(
        "eval_strategy",
        "steps",
        others={"eval_steps": 1},
        how="Of the plain path; `eval_echo_loss` and `eval_echo_advantage` are added.",
    ),
    Option("eval_steps", 1, others=_EVALUATE),
    Option("eval_delay", 1, others=_EVALUATE, steps=2),
    Option("eval_on_start", True, others=_EVALUATE),
    Option("eval_accumulation_steps", 1, others=_EVALUATE),
    Option("prediction_loss_only", True, others=_EVALUATE),
    Option("batch_eval_metrics", False, others=_EVALUATE),
    Option(
        "save_strategy",
        "steps",
        others={"save_steps": 1},
        how="Checkpoints hold the echo networks too, and appear whole or not at all.",
    ),
    Option("save_steps", 1, others=_SAVE, steps=2),
    Option("save_total_limit", 1, others=_SAVE, steps=2),
    Option(
        "save_only_model",
        True,
        DIFFERENT,
        "The echo networks are left out, as optimizer and scheduler are, so such a checkpoint cannot be resumed from.",
        others=_SAVE,
    ),
    Option("load_best_model_at_end", True, others=_BEST, steps=2),
    Option("metric_for_best_model", "eval_loss", others=_BEST, steps=2),
    Option("greater_is_better", False, others=_BEST, steps=2),
    Option("ignore_data_skip", True),
    Option("seed", 3, how="Also of routing and echo networks, without `echo_seed`."),
    Option("data_seed", 5),
    Option("use_cpu", True),
    Option("accelerator_config", {"dispatch_batches": False}),
    Option("dataloader_drop_last", True),
    Option("dataloader_num_workers", 1, how="Answers are found in the workers, routes drawn when the step is known."),
    Option("dataloader_pin_memory", False),
    Option("dataloader_prefetch_factor", 2, others={"dataloader_num_workers": 1}),
    Option("dataloader_persistent_workers", True, others={"dataloader_num_workers": 1}),
    Option("remove_unused_columns", True),
    Option("train_sampling_strategy", "sequential"),
    Option("ddp_find_unused_parameters", False),
    Option("ddp_timeout", 600),
    Option("skip_memory_metrics", True),
    Option("push_to_hub", False, how="True pushes the adapter, its card and its record, and nothing else."),
    Option("hub_model_id", "me/mine"),
    Option("hub_strategy", "end"),
    Option("hub_private_repo", True),
    Option("hub_token", "hf_secret", how="Reaches no file."),
]


def runs() -> list[list[Option]]:
    """Options that are the same, by the run that they share: those on one kind of rows, model and length."""
    found: dict[tuple, list[Option]] = {}
    for option in (option for option in [*SFT_OPTIONS, *TRAINING_OPTIONS] if option.verdict == SAME):
        key: tuple = (option.name,) if option.alone else (str(option.others), option.rows, option.model, option.steps)
        while any(option.name == other.name for other in found.get(key, [])):
            key = (*key, "another value")
        found.setdefault(key, []).append(option)
    return list(found.values())
