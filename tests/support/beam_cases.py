"""A tiny model whose answers a simple verifier judges, and trainers of it."""

from datasets import Dataset
from models import lora_config, tiny_model, tiny_tokenizer

from echo_trainer import BeamGRPOConfig, BeamGRPOTrainer

G = 3
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2 * G,
    "gradient_accumulation_steps": 2,
    "num_generations": G,
    "num_iterations": 2,
    "max_completion_length": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
}


def even_length(prompt, completion, row):
    """A completion is right when its words and the row's number make an even sum; depends on all three."""
    words = [int(word[1:]) for word in completion.split() if word[1:].isdigit()]
    return (sum(words) + row["number"] + len(prompt)) % 2 == 0


def prompt_rows(n=12):
    """Prompts of unequal lengths, each with a number for the verifier."""
    return [{"prompt": " ".join(f"w{(7 * i + j) % 50}" for j in range(2 + i % 3)), "number": i} for i in range(n)]


def tiny_base(folder, dtype=None):
    """A saved tiny model; the reference of full-parameter training is loaded from where it lies."""
    model = tiny_model() if dtype is None else tiny_model(dtype=dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def beam_trainer(folder, *, model=None, lora=True, verifier=even_length, rows=None, more=None, **settings):
    """A `BeamGRPOTrainer` on a tiny model; `lora` may be a LoraConfig."""
    peft_config = lora_config(init_lora_weights=True) if lora is True else lora or None
    return BeamGRPOTrainer(
        model=tiny_model() if model is None else model,
        verifier=verifier,
        args=BeamGRPOConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        peft_config=peft_config,
        **{
            "train_dataset": Dataset.from_list(prompt_rows() if rows is None else rows),
            "processing_class": tiny_tokenizer(),
            **(more or {}),
        },
    )
