"""What scripts of other projects do around a trainer: parsers, resized vocabularies, the usual end, running again."""

import inspect
import json
import sys
from dataclasses import dataclass, field

import pytest
import torch
from chat import CHATML, byte_model, byte_tokenizer
from datasets import DatasetDict, load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from training import echo_trainer, plain_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, SFTTrainer, TrlParser, get_peft_config

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.compat.trainer import JointTrainer

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@pytest.mark.parametrize(
    "name",
    [name for owner in (JointTrainer, EchoSFTTrainer) for name, value in vars(owner).items()
     if callable(value) and (name == "__init__" or not name.startswith("__")) and hasattr(SFTTrainer, name)],
)  # fmt: skip
def test_methods_of_trl_take_what_they_took(name):
    """A method of our own under a name of TRL's would be called by scripts that mean TRL's."""
    ours = inspect.signature(getattr(EchoSFTTrainer, name)).parameters.values()
    theirs = inspect.signature(getattr(SFTTrainer, name)).parameters.values()
    known = {p.name for p in theirs if p.kind not in VARIADIC}
    if not any(p.kind is p.VAR_KEYWORD for p in ours):
        assert known <= {p.name for p in ours}
    if not any(p.kind in VARIADIC for p in theirs):
        assert {p.name for p in ours if p.default is p.empty and p.kind not in VARIADIC} <= known


def test_attributes_of_trl_keep_what_they_held(tmp_path):
    ours, theirs = echo_trainer(tmp_path / "a"), plain_trainer(tmp_path / "b")
    assert vars(theirs).keys() <= vars(ours).keys()
    other = [n for n, v in vars(theirs).items() if v is not None and not isinstance(getattr(ours, n), type(v))]
    # Made of the config's own class, or with labels that TRL cannot give.
    assert set(other) <= {"args"}, other


# In the style of alignment-handbook and open-r1


@dataclass
class ConfigOfTheScript(EchoSFTConfig):
    """With a field of the script's own."""

    chat_template: str | None = field(default=None, metadata={"help": "The chat template to use."})


class Counts(TrainerCallback):
    def __init__(self):
        self.saves = 0

    def on_save(self, *args, **kwargs):
        self.saves += 1


def handbook(folder, *more):
    """A script with the usual end; it goes on from the last checkpoint it finds."""
    sys.argv = ["sft.py", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "data"),
                "--output_dir", str(folder / "out"), "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj",
                "v_proj", "--max_length", "128", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy",
                "steps", "--save_steps", "2", "--do_eval", "--use_cpu", "--report_to", "none", "--logging_steps", "1",
                "--per_device_train_batch_size", "2", "--chat_template", CHATML, "--dtype", "float32",
                *more]  # fmt: skip
    script, args, model_args = TrlParser((ScriptArguments, ConfigOfTheScript, ModelConfig)).parse_args_and_config()
    last = get_last_checkpoint(args.output_dir) if (folder / "out").is_dir() else None
    dataset = load_dataset(script.dataset_name)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    tokenizer.chat_template = args.chat_template
    counts = Counts()
    trainer = EchoSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, use_cache=False),
        args=args,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split],
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[counts],
    )
    metrics = trainer.train(resume_from_checkpoint=last).metrics
    metrics["train_samples"] = len(dataset["train"])
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.model.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer.model.config.eos_token_id = tokenizer.eos_token_id
    trainer.save_model(args.output_dir)
    if trainer.accelerator.is_main_process:
        trainer.create_model_card(model_name=None, dataset_name=script.dataset_name, tags=["handbook"])
        trainer.model.config.use_cache = True
        trainer.model.config.save_pretrained(args.output_dir)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return trainer, counts


@pytest.fixture
def folder(tmp_path):
    byte_model().save_pretrained(tmp_path / "model")
    byte_tokenizer(None).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, n in (("train", 24), ("test", 6)):
        rows = [
            {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
            for i in range(n)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_script_with_the_usual_end_runs_and_runs_again(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    _, counts = handbook(folder, "--max_steps", "4")
    out = folder / "out"
    assert counts.saves == 2 and json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    assert json.loads((out / "train_results.json").read_text())["train_samples"] == 24
    assert "eval_loss" in json.loads((out / "eval_results.json").read_text())
    again, counts = handbook(folder, "--max_steps", "6")
    assert counts.saves == 1 and again.state.global_step == 6
    assert [h["step"] for h in again.state.log_history if "echo/objective" in h] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "echo_run.json").read_text())["steps"]["done"] == 6
    loaded = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, again.model.eval()(ids).logits, atol=1e-5)


# In the style of PEFT's examples/sft


def test_a_script_with_new_tokens_and_texts_of_its_own_template(folder, monkeypatch):
    """New special tokens, a template of the script's own, a resized vocabulary, texts made in a map."""
    new = ["<|im_start|>user", "<|im_start|>assistant", "<|im_start|>system"]
    written = (
        "{% for message in messages %}\n{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n'}}{% if loop.last and add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(
        sys, "argv",
        ["train.py", "--output_dir", str(folder / "out"), "--max_steps", "3", "--use_cpu", "True", "--bf16", "False",
         "--report_to", "none", "--logging_steps", "1", "--dataset_text_field", "content", "--max_length", "128",
         "--gradient_checkpointing", "True", "--eval_strategy", "epoch", "--save_strategy", "epoch",
         "--per_device_train_batch_size", "2", "--echo_source_layers", "3", "4"],
    )  # fmt: skip
    (args,) = HfArgumentParser(EchoSFTConfig).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(
        folder / "model", eos_token="<|im_end|>", additional_special_tokens=new, pad_token="<pad>"
    )
    tokenizer.chat_template = written
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    model.config.use_cache = not args.gradient_checkpointing
    args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    args.dataset_kwargs = {"append_concat_token": False, "add_special_tokens": False}
    raw = DatasetDict({split: load_dataset(str(folder / "data"), split=split) for split in ("train", "test")})
    raw = raw.map(
        lambda rows: {"content": [tokenizer.apply_chat_template(m, tokenize=False) for m in rows["messages"]]},
        batched=True,
        remove_columns=raw["train"].column_names,
    )
    trainer = EchoSFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        train_dataset=raw["train"],
        eval_dataset=raw["test"],
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.accelerator.print(f"{trainer.model}")
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=None)
    trainer.save_model()
    record = json.loads((folder / "out" / "echo_run.json").read_text())
    assert record["steps"]["done"] == 3 and record["metrics"][0]["echo/routed"] == 1
    assert record["rows"]["answers"] == "what follows '<|im_start|>assistant\\n'"
    labels = trainer.train_dataset[0]["labels"]
    assert tokenizer.decode([token for token in labels if token != -100]) == "a0<|im_end|>"
