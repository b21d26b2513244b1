"""A run of `BeamGRPOTrainer`, from its groups to the folder that it leaves."""

import json

import pytest
import torch
from beam_cases import G, beam_trainer, even_length, prompt_rows, tiny_base
from datasets import Dataset
from models import adapted, lora_config, tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from echo_trainer import BeamGRPOConfig, check_adapter
from echo_trainer.bgrpo.accuracy import best_scores


def figures(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def test_defaults_are_those_of_the_method(tmp_path):
    config = BeamGRPOConfig(str(tmp_path), use_cpu=True)
    assert (config.num_generations, config.num_iterations, config.beta, config.epsilon) == (10, 5, 0.01, 0.2)
    assert (config.scale_rewards, config.loss_type, config.max_grad_norm) == ("none", "bnpo", 0.5)
    assert (config.learning_rate, config.generation_batch_size) == (1e-5, 200)  # 20 prompts of 10 beams
    assert not config.use_bias_correction_kl and GRPOConfig(str(tmp_path), use_cpu=True).use_bias_correction_kl


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("reward", ["rank", "reverse_rank"])
def test_groups_that_agree_move_nothing(tmp_path, always, reward):
    """All right or all wrong: every advantage is zero, to the last bit, and so is every gradient."""
    trainer = beam_trainer(
        tmp_path, verifier=lambda *_: always, beam_reward=reward, beta=0.0, weight_decay=0.0, max_steps=2
    )
    before = weights(trainer)
    trainer.train()
    assert figures(trainer, "loss") == [0.0, 0.0] and figures(trainer, "grad_norm") == [0.0, 0.0]
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert all(not batch["advantages"].any() for batch in trainer.generated)


def test_every_trained_weight_moves_and_the_base_does_not(tmp_path):
    trainer = beam_trainer(tmp_path, max_steps=3)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) is not value.requires_grad, name


def test_beams_are_made_once_for_all_iterations(tmp_path):
    """Six steps, three on the same beams: two generations, each of one search a prompt."""
    searches = []
    trainer = beam_trainer(tmp_path, max_steps=6, num_iterations=3)
    generate = trainer.model.generate

    def counted(*args, **kwargs):
        options = kwargs["generation_config"]
        searches.append((len(kwargs["input_ids"]), options.num_beams, options.num_return_sequences))
        assert not options.do_sample and options.length_penalty == 0 and options.early_stopping == "never"
        assert not trainer.model.training
        return generate(*args, **kwargs)

    trainer.model.generate = counted
    trainer.train()
    assert searches == [(4, G, G)] * 2


def test_verifier_gets_prompt_completion_and_the_other_columns(tmp_path):
    seen = []

    def verifier(prompt, completion, row):
        seen.append((prompt, completion, row))
        return 0.5

    beam_trainer(tmp_path, verifier=verifier, max_steps=1).train()
    assert len(seen) == 4 * G
    rows = {row["prompt"]: row["number"] for row in prompt_rows()}
    for i, (prompt, completion, row) in enumerate(seen):
        assert prompt == seen[i - i % G][0] and row == {"number": rows[prompt]} and isinstance(completion, str)


def test_conversations(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompt_rows()]
    seen = []
    trainer = beam_trainer(
        tmp_path, rows=rows, verifier=lambda prompt, completion, row: seen.append((prompt, completion)) or True
    )
    trainer.train()
    prompt, completion = seen[0]
    assert prompt[0]["role"] == "user" and completion[0]["role"] == "assistant"
    model, tokenizer = trainer.model, trainer.processing_class
    assert best_scores(model, tokenizer, rows, lambda p, c, r: c[0]["role"] == "assistant", 2, 3) == [1.0] * 12


def test_own_reward_and_a_whole_model(tmp_path):
    base = tiny_base(tmp_path / "base")
    trainer = beam_trainer(
        tmp_path / "out", model=base, lora=False, beam_reward=lambda right, rank, size: right * (size - rank)
    )
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "out/adapter_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, again.get_parameter(name)) for name, value in trainer.model.named_parameters())
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: transformers" in card and "all of whose weights" in card and "LoRA" not in card


def test_saved_adapter_is_clean_and_checked(tmp_path):
    base = tiny_base(tmp_path / "base")
    trainer = beam_trainer(tmp_path / "out", model=base)
    trainer.train()
    trainer.save_model()
    report = check_adapter(tmp_path / "out", base=base)
    assert str(report.verdicts["vllm"]) == "serves" and not [found for found in report.findings if found.rule.broken]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "echo_run.json", "assets",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    ids = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    record = json.loads((tmp_path / "out/echo_run.json").read_text())
    assert record["bgrpo"]["reward"] == "rank" and record["bgrpo"]["verifier"] == "even_length"
    card = (tmp_path / "out/README.md").read_text()
    assert "beam GRPO" in card and "- bgrpo" in card and "sft" not in card and str(tmp_path) not in card


def test_an_adapter_goes_on_against_itself(tmp_path):
    """A trained adapter is trained on: the reference is its copy, which is not saved once more."""
    trainer = beam_trainer(tmp_path, model=adapted(tiny_model()), lora=False)
    trainer.train()
    assert figures(trainer, "kl")[0] == pytest.approx(0, abs=1e-6) and figures(trainer, "kl")[1] > 1e-3
    trainer.save_model()
    assert not (tmp_path / "ref").exists()
    check_adapter(tmp_path)


@pytest.mark.parametrize("dropout", [0.05, 0.3])
def test_fresh_beams_have_a_ratio_of_one(tmp_path, dropout):
    """Dropout would clip tokens of beams that the model has just made, and move it away from itself."""
    trainer = beam_trainer(tmp_path, lora=None, model=adapted(tiny_model(), lora_dropout=dropout), max_steps=1)
    trainer.train()
    assert figures(trainer, "clip_ratio/region_mean") == [0.0] and figures(trainer, "kl") == [0.0]


def test_dropout_of_a_new_adapter_is_off(tmp_path):
    trainer = beam_trainer(tmp_path, lora=lora_config(init_lora_weights=True, lora_dropout=0.5), max_steps=1)
    trainer.train()
    assert figures(trainer, "clip_ratio/region_mean") == [0.0]
    assert trainer.model.peft_config["default"].lora_dropout == 0.5  # as it was written


@pytest.mark.parametrize(("size", "wide"), [(8, 3), (4, 3), (3, 2)])
def test_evaluation_in_batches_that_split_groups(tmp_path, size, wide):
    trainer = beam_trainer(
        tmp_path,
        more={"eval_dataset": Dataset.from_list(prompt_rows(5))},
        per_device_eval_batch_size=size,
        num_generations_eval=wide,
    )
    with pytest.raises(RuntimeError, match=f"groups of {wide} .* per_device_eval_batch_size={wide}, or a multiple"):
        trainer.evaluate()


def test_evaluation_has_its_own_width(tmp_path):
    """`num_generations_eval=1` is greedy, and the reward then is its accuracy."""
    rows = prompt_rows(8)
    trainer = beam_trainer(
        tmp_path,
        more={"eval_dataset": Dataset.from_list(rows)},
        num_generations_eval=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        max_steps=1,
    )
    trainer.train()
    greedy = best_scores(trainer.model, trainer.processing_class, rows, even_length, 1, 4)
    assert figures(trainer, "eval_reward") == [pytest.approx(sum(greedy) / 8)]
    assert figures(trainer, "eval_beams/first_right") == [pytest.approx(sum(greedy) / 8)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", 2), ("min_new_tokens", 3), ("suppress_tokens", [10, 11]), ("bad_words_ids", [[10]]),
        ("exponential_decay_length_penalty", (1, 3.0)),
    ],
)  # fmt: skip
def test_rules_of_the_model_are_named(tmp_path, caplog, name, value):
    model = tiny_model()
    beam_trainer(tmp_path, model=model)
    assert "generation_config has" not in caplog.text
    setattr(model.generation_config, name, value)
    beam_trainer(tmp_path, model=model)
    assert f"generation_config has {name}={value}, so beams are not" in caplog.text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stream_that_is_too_short(tmp_path, count):
    stream = Dataset.from_list(prompt_rows(count)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"Nothing was trained: the streamed dataset ended before the 12 / 3 = 4"):
        beam_trainer(tmp_path, more={"train_dataset": stream}).train()


def test_a_stream(tmp_path):
    trainer = beam_trainer(tmp_path, more={"train_dataset": Dataset.from_list(prompt_rows(4)).to_iterable_dataset()})
    trainer.train()
    assert trainer.state.global_step == 2


def test_lora_kinds(tmp_path):
    trainer = beam_trainer(tmp_path, lora=lora_config(use_dora=True, init_lora_weights=True))
    trainer.train()
    trainer.save_model()
    assert "DoRA" in (tmp_path / "README.md").read_text()
