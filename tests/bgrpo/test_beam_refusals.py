"""What cannot work with beams is refused in words: what was received, why, and what to write instead."""

from dataclasses import fields

import pytest
from beam_cases import beam_trainer, prompt_rows
from datasets import Dataset
from models import tiny_model, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig

from echo_trainer import BeamGRPOConfig, BeamGRPOTrainer, EchoSFTConfig, cli
from echo_trainer.bgrpo.accuracy import best_scores
from echo_trainer.bgrpo.refuse import refuse_wide_beams
from echo_trainer.bgrpo.verifier import load_callable
from echo_trainer.compat import beams

CONFIGS = [
    ({"use_vllm": True}, "vLLM samples"),
    ({"use_transformers_paged": True}, "continuous batching samples"),
    ({"use_transformers_continuous_batching": True}, "continuous batching samples"),
    ({"num_generations": 1}, "at least two beams"),
    ({"num_generations": None}, "at least two beams"),
    ({"temperature": 0.7}, "temperature=0.7: beams are ranked"),
    ({"top_p": 0.9}, "top_p=0.9"),
    ({"top_k": 50}, "top_k=50"),
    ({"min_p": 0.1}, "min_p=0.1"),
    ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
    (
        {"generation_kwargs": {"length_penalty": 1.0, "num_beams": 4}},
        "generation_kwargs sets num_beams, length_penalty",
    ),
    ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs sets temperature"),
    ({"generation_kwargs": '{"repetition_penalty": 1.5}'}, "generation_kwargs sets repetition_penalty"),
    ({"generation_kwargs": '{"num_beams": 2, "do_sample": true}'}, "generation_kwargs sets num_beams, do_sample"),
    ({"generation_kwargs": '{"top_p": 0.9}'}, "generation_kwargs sets top_p"),
    ({"per_device_train_batch_size": 3, "num_generations": 2, "gradient_accumulation_steps": 1}, "no multiple of"),
    (
        {"per_device_train_batch_size": 4, "num_generations": 3, "gradient_accumulation_steps": 2},
        "a group lies on",
    ),
    ({"eval_strategy": "epoch", "per_device_eval_batch_size": 8}, "per_device_eval_batch_size=10"),
    ({"eval_strategy": "epoch", "num_generations_eval": 3, "per_device_eval_batch_size": 8}, "of the 3 beams"),
    ({"beam_reward": "first"}, "none of rank, simple, reverse_rank"),
    ({"beam_reward": "nowhere.py:reward"}, "there is none at"),
    ({"beam_decay": 0.0}, "beam_decay=0.0"),
    ({"beam_decay": float("nan")}, "beam_decay=nan"),
    ({"beam_wrong": -0.1}, "beam_wrong=-0.1"),
    ({"remove_unused_columns": True}, "remove_unused_columns=True would remove"),
    ({"generation_batch_size": 305}, "divisible"),  # TRL's own words
]


@pytest.mark.parametrize(("options", "words"), CONFIGS, ids=lambda value: str(value)[:60])
def test_options(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        BeamGRPOConfig(str(tmp_path), use_cpu=True, **options)


def test_there_are_no_echo_options(tmp_path):
    assert not [field.name for field in fields(BeamGRPOConfig) if field.name.startswith("echo_")]
    with pytest.raises(TypeError, match="echo_p_start"):
        BeamGRPOConfig(str(tmp_path), echo_p_start=0.5)


@pytest.mark.parametrize("config", [EchoSFTConfig, GRPOConfig, SFTConfig])
def test_configurations_of_other_trainers(tmp_path, config):
    args = config(str(tmp_path), use_cpu=True, bf16=False)
    words = "echo belongs to supervised" if config is EchoSFTConfig else "Pass a BeamGRPOConfig"
    with pytest.raises(TypeError, match=words):
        BeamGRPOTrainer(tiny_model(), lambda *_: True, args, Dataset.from_list(prompt_rows()))


ARGUMENTS = [
    ({"tools": [len]}, "`tools` does not go with beams"),
    ({"environment_factory": object}, "`environment_factory` does not go"),
    ({"rollout_func": len}, "`rollout_func` does not go"),
    ({"reward_funcs": len}, "pass `verifier`"),
    ({"eval_dataset": Dataset.from_list([{"prompt": "w1", "image": 1}])}, "`eval_dataset` has the column 'image'"),
]


@pytest.mark.parametrize(("more", "words"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_arguments(tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        beam_trainer(tmp_path, more=more)


def test_rows(tmp_path):
    with pytest.raises(ValueError, match="has 3 prompts, and a generation takes 4"):
        beam_trainer(tmp_path, rows=prompt_rows(3))
    with pytest.raises(ValueError, match="has the column 'images'"):
        beam_trainer(tmp_path, rows=[{**row, "images": []} for row in prompt_rows()])
    with pytest.raises(ValueError, match="has the columns question, number, and no column 'prompt'"):
        beam_trainer(tmp_path, rows=[{"question": row["prompt"], "number": row["number"]} for row in prompt_rows()])


@pytest.mark.parametrize("name", ["completion", "prompts", "completions", "environments", "log_metric"])
def test_columns_that_are_taken(tmp_path, name):
    with pytest.raises(ValueError, match=f"`train_dataset` has the column '{name}', which TRL takes"):
        beam_trainer(tmp_path, rows=[{**row, name: "w1"} for row in prompt_rows()])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "w1", "completion": "w2"}, "the column 'completion'"),
        ({"prompt": "w1", "images": []}, "the column 'images'"),
        ({"text": "w1"}, "no column 'prompt'"),
    ],
)
def test_datasets_of_evaluation_by_name(tmp_path, row, words):
    datasets = {"good": Dataset.from_list([{"prompt": "w1"}]), "bad": Dataset.from_list([row])}
    with pytest.raises(ValueError, match=f"`eval_dataset` has .*{words}"):
        beam_trainer(tmp_path, more={"eval_dataset": datasets})


@pytest.mark.parametrize("place", [0, 5, 11])
def test_empty_prompts(tmp_path, place):
    rows = prompt_rows()
    rows[place]["prompt"] = ""
    with pytest.raises(ValueError, match="has no tokens, so there is nothing"):
        beam_trainer(tmp_path, rows=rows, max_steps=6, num_iterations=1).train()
    with pytest.raises(ValueError, match=f"Prompt {place} of 12 in this batch has no tokens"):
        best_scores(tiny_model(), tiny_tokenizer(), rows, lambda *_: True, 2, 2)


@pytest.mark.parametrize("verifier", [None, "right"])
def test_verifiers(tmp_path, verifier):
    with pytest.raises(ValueError, match="Pass a callable"):
        beam_trainer(tmp_path, verifier=verifier)


def test_a_model_that_cannot_be_loaded_again(tmp_path):
    with pytest.raises(ValueError, match="made in memory"):
        beam_trainer(tmp_path, lora=False)
    beam_trainer(tmp_path, lora=False, beta=0.0)


@pytest.mark.parametrize(("width", "ends", "fits"), [(59, 1, True), (60, 1, False), (58, 2, True), (59, 2, False)])
def test_more_beams_than_first_tokens(width, ends, fits):
    if fits:
        refuse_wide_beams(width, 60, ends)
    else:
        with pytest.raises(ValueError, match=f"the vocabulary has 60 tokens, {ends} of which end"):
            refuse_wide_beams(width, 60, ends)


def test_the_trainer_counts_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r"num_generations=60 beams.*at most num_generations=59"):
        beam_trainer(tmp_path, num_generations=60, per_device_train_batch_size=60)


def test_a_joint_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(GRPOTrainer, "_generate_single_turn")
    with pytest.raises(RuntimeError, match="uses _generate_single_turn of "):
        beams.require_beam_joints()


def test_an_attribute_that_is_gone_is_named(tmp_path):
    trainer = beam_trainer(tmp_path, max_steps=1)
    del trainer.generation_kwargs
    with pytest.raises(RuntimeError, match="uses generation_kwargs of"):
        trainer.use_generation({})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("right", "FILE.py:FUNCTION"),
        ("nowhere.py:right", "there is none at"),
        ("no_such_module:right", "cannot be imported"),
        ("polynomials/polynomials.py:wrong", "no such function"),
        ("json:__name__", "no such function"),
    ],
)
def test_functions_by_name(name, words):
    with pytest.raises(ValueError, match=words):
        load_callable(name, "verifier")
    assert load_callable("polynomials/polynomials.py:right", "verifier").__name__ == "right"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "nowhere"], "neither a file nor one that ships"),
        (["--config", "polynomials/bgrpo", "--echo_p_end", "1"], "echo_p_end is an option of the echo"),
        (["--config", "echo.yaml"], "echo_preset is an option of the echo"),
        (["--config", "wrong.yaml"], "no option of `echo-trainer bgrpo`"),
        (["--num_generation", "4"], "Did you mean --num_generations?"),
        (["--output_dir", "out"], "No model_name_or_path"),
        (["--model_name_or_path", "base"], "No dataset_name"),
        (["--model_name_or_path", "base", "--dataset_name", "rows.jsonl"], "No verifier"),
        (["--config", "polynomials/bgrpo", "--lora_layers", "cka"], "leave it out"),
        (["--beam_eval_widths", "0"], "beam_eval_widths=[0]: a search has at least one"),
        (["--beam_eval_widths", "1", "-2"], "beam_eval_widths=[1, -2]"),
        (["--beam_eval_rows", "-1"], "beam_eval_rows=-1"),
        (
            ["--config", "polynomials/bgrpo", "--dataset_name", "rows.jsonl", "--prompt_column", "text"],
            "no column 'text'",
        ),
        (
            ["--config", "polynomials/bgrpo", "--dataset_name", "rows.jsonl", "--dataset_train_split", "x"],
            "no split 'x'",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_the_command(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.yaml").write_text("echo_preset: strong\n")
    (tmp_path / "wrong.yaml").write_text("beam_rewards: rank\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1"}\n')
    assert cli.main(["bgrpo", *words]) == 2
    assert said in capsys.readouterr().err


def test_help_fits_a_screen(capsys):
    assert cli.main(["bgrpo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--verifier" in text and len(text.splitlines()) < 60
