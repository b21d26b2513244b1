"""Recipes of an ablation: what is read, what is refused and in which words; the shipped ones load."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from ablation_cases import LABELS, tiny_recipe, write_workplace

from echo_trainer import cli
from echo_trainer.ablation.arms import ARMS
from echo_trainer.ablation.data import load_examples, load_tests
from echo_trainer.ablation.plan import Run
from echo_trainer.ablation.recipe import load_recipe, parse_seeds
from echo_trainer.ablation.run_one import Workbench, build_trainer
from echo_trainer.recipe.find import available_recipes, recipe_path
from echo_trainer.recipe.read import read_recipe

ANSWERS = {
    "boolq": "true", "piqa": "solution1", "social_i_qa": "answer1", "winogrande": "option1", "ARC-Easy": "answer2",
    "ARC-Challenge": "answer1", "openbookqa": "answer4",
}  # fmt: skip


def test_the_embedded_recipe():
    recipe = load_recipe(recipe_path("ablation/embedded"))
    assert len(recipe.arms) == 13 and set(recipe.arms) <= set(ARMS)
    assert {"lora", "echo", "echo-zero"} <= set(recipe.arms)
    assert recipe.adapters == ["lora", "dora"]
    assert len(recipe.seeds) >= 5
    train, held_out = load_examples(recipe)
    (task,) = load_tests(recipe)
    assert len(train) > 1000 and len(held_out) == recipe.validation_items
    assert not {item.prompt for item in task.items} & {row["prompt"] for row in train + held_out}


def test_the_smollm2_recipe(tmp_path, monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)
    with pytest.raises(ValueError, match="Set MODEL"):
        load_recipe(recipe_path("ablation/smollm2"))
    for name, answer in ANSWERS.items():
        rows = [{"instruction": "q", "input": "", "output": f"the correct answer is {answer}", "answer": answer}]
        for split, n in (("train", 200), ("test", 3)):
            (tmp_path / f"{name}-{split}.json").write_text(json.dumps(rows * n))
    monkeypatch.setenv("MODEL", "some/model")
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("LIMIT", "2")
    recipe = load_recipe(recipe_path("ablation/smollm2"))
    assert [task.name for task in load_tests(recipe)] == [*ANSWERS]
    assert all(len(task.items) == 2 for task in load_tests(recipe))
    assert {"lora", "lora-compute-matched", "echo-teacher-plain", "echo-mutual", "echo-zero"} <= set(recipe.arms)
    train, _ = load_examples(recipe)
    assert train[0]["prompt"].endswith("### Response:\n")
    assert load_tests(recipe)[0].items[0].prompt == train[0]["prompt"]  # one template


def test_the_strong_recipe(tmp_path, monkeypatch):
    """On the data that its command makes: every arm, the upper half of the layers, examples by seed."""
    for name in ("train", "test"):
        row = {"prompt": "Story: Ada is in the barn. Question: where is Ada? Answer:", "completion": " Ada."}
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 201)
    monkeypatch.setenv("DATA", str(tmp_path))
    recipe = load_recipe(recipe_path("ablation/strong"))
    assert (recipe.train_draw, recipe.seeds) == ("seed", list(range(300, 308)))
    assert {"strong", "strong-zero", "lora-longer", "lora-strong-matched"} <= set(recipe.arms)
    bench = Workbench(recipe)
    trainer = build_trainer(bench, Run("strong", "lora", 300, 0.004), tmp_path, lambda *a: None)
    assert trainer.echo.source_layers == [5] and {site.layer for site in trainer.echo.sites} == {4}
    assert sorted(trainer.model.peft_config["default"].layers_to_transform) == [4, 5, 6, 7]
    assert len(trainer.echo.sites) == 7 and trainer.args.max_steps == 200


def test_the_labels_recipe(monkeypatch):
    """The first training of strong.yaml, on other seeds, and a second one in the ratio of the plan."""
    monkeypatch.setenv("DATA", "data")
    recipe, strong = (load_recipe(recipe_path(f"ablation/{name}")) for name in ("labels", "strong"))
    assert recipe.training == strong.training and recipe.train_limit == strong.train_limit == 384
    assert recipe.seeds == list(range(400, 408)) and not set(recipe.seeds) & set(strong.seeds)
    assert recipe.labels == {"prompts": 800, "steps": 150, "learning_rate": 2e-3, "ratio": "4:8", "max_new_tokens": 12}
    assert {"strong-labels", "strong-plain-labels", "self-training", "lora-longer"} <= set(recipe.arms)


def test_shipped_recipes_say_what_they_need():
    names = [name for name in available_recipes() if name.startswith("ablation/")]
    shipped = ("depth", "embedded", "labels", "latent", "smollm2", "strong", "upper")
    assert set(names) == {f"ablation/{name}" for name in shipped}
    for name in names:
        text = recipe_path(name).read_text()
        assert re.match(r"# .*\n(#.*\n)*# Needs: .*\n(#.*\n)*# Expect: ", text)


def test_the_gpu_command_is_a_script():
    script = recipe_path("ablation/smollm2").parent / "gpu.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.parametrize(
    ("section", "training", "message"),
    [
        ({"arms": ["lora", "ecko"]}, {}, "ecko"),
        ({"arms": ["echo", "echo"]}, {}, "each once"),
        ({"adapters": ["qlora"]}, {}, "qlora"),
        ({"seeds": [0, 0]}, {}, "different whole numbers"),
        ({"seeds": [-1]}, {}, "at least 0"),
        ({"seeds": "zero"}, {}, "0-4"),
        ({"learning_rates": []}, {}, "learning_rates"),
        ({"learning_rates": [0]}, {}, "positive"),
        ({"learning_rates": ["fast"]}, {}, "fast"),
        ({"learning_rate_choice": "best"}, {}, "family"),
        ({"validation_items": 0}, {}, "held-out"),
        ({"validation_items": 40}, {}, "none is left"),
        ({"train_limit": 0}, {}, "at least 1"),
        ({"train_draw": "twice"}, {}, "'once', 'seed'"),
        ({}, {"echo_held_out": 5}, "validation_items"),
        ({"train": []}, {}, "at least one file"),
        ({"arms": ["strong-labels"]}, {}, "Add `labels: {prompts: 800"),
        ({**LABELS, "labels": {"prompts": 5, "steps": 2}}, {}, "whole numbers of at least 1, and a `learning_rate`"),
        ({**LABELS, "labels": {**LABELS["labels"], "teacher": "echo"}}, {}, "who answers is a matter of the arm"),
        ({**LABELS, "labels": {**LABELS["labels"], "rat": 1}}, {}, "unexpected keyword argument 'rat'"),
        ({**LABELS, "labels": {**LABELS["labels"], "ratio": "2"}}, {}, "as A:B"),
        ({**LABELS, "labels": 800}, {}, "It needs `prompts` and `steps`"),
        ({**LABELS, "train_draw": "once"}, {}, "Write `train_draw: seed` and a `train_limit`"),
        ({"epochs": 3}, {}, "unknown keys"),
        ({"train": ["nowhere.jsonl"]}, {}, "nowhere.jsonl"),
        ({"tests": [{"name": "x", "file": "nowhere.jsonl"}]}, {}, "nowhere.jsonl"),
        ({"tests": [{"nam": "x", "file": "test.jsonl"}]}, {}, "needs `name` and `file`"),
        ({"tests": ["test.jsonl"]}, {}, "needs `name` and `file`"),
        ({"tests": [{"name": "x", "file": "test.jsonl", "mode": "guess"}]}, {}, "It can be 'generate', 'rank'"),
        ({"tests": [{"name": "x", "file": "test.jsonl", "mode": "rank"}]}, {}, "rows without `options`"),
        ({"learning_rate_seeds": 0}, {}, "learning_rate_seeds"),
        ({}, {"lora_rr": 8}, "Did you mean 'lora_r'"),
        ({}, {"model_name_or_path": "./nowhere"}, "no model can be loaded from it"),
        ({}, {"learning_rate": 1e-3}, "learning_rates"),
        ({}, {"seed": 3}, "seeds"),
        ({}, {"use_dora": True}, "adapters"),
        ({}, {"packing": True}, "paired"),
        ({}, {"completion_only_loss": False}, "lora-unmasked"),
        ({}, {"echo_p_start": 0, "echo_p_end": 0}, "no echo"),
        ({}, {"lora_layers": "cka"}, "select-layers"),
        ({}, {"dataset_template": "alpaca"}, "instruction"),
    ],
)
def test_refused_in_plain_words(tmp_path, monkeypatch, capsys, section, training, message):
    monkeypatch.chdir(tmp_path)
    write_workplace(tmp_path, training, **section)
    assert cli.main(["ablate", "recipe.yaml", "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_bad_files_and_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_workplace(tmp_path)
    (tmp_path / "sft.yaml").write_text("max_steps: 3\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    for arguments, message in (
        (["sft.yaml"], "no section `ablation`"),
        (["broken.yaml"], "is not YAML"),
        (["nothing"], "neither a file"),
        (["recipe.yaml", "--jobs", "0"], "--jobs is 0"),
        (["recipe.yaml", "--arms", "ecko"], "ecko"),
        (["recipe.yaml", "--seeds", "a-b"], "0-4"),
    ):
        assert cli.main(["ablate", *arguments, "--output", "out"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["ablate", "recipe.yaml", "--output", "out", "--report-only"]) == 0
    assert "nothing to report" in capsys.readouterr().out


def test_command_line_over_recipe(tmp_path):
    path = write_workplace(tmp_path, seeds="0-4", arms=["lora"])
    recipe = load_recipe(path, arms=["echo"], seeds="7", learning_rates=[1e-4])
    assert (recipe.arms, recipe.seeds, recipe.learning_rates) == (["echo"], [7], [1e-4])
    assert recipe.adapters == ["lora"]


def test_yaml_reads_1e_3_as_text_and_we_as_a_number(tmp_path):
    path = write_workplace(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["ablation"]["learning_rates"] = "RATES"
    path.write_text(yaml.safe_dump(content).replace("RATES", "[1e-3, 2e-3]"))
    assert load_recipe(path).learning_rates == [1e-3, 2e-3]


def test_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO_TEST_A", "7")
    monkeypatch.delenv("ECHO_TEST_B", raising=False)
    monkeypatch.setenv("ECHO_TEST_C", "x: [y # z")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "a: ${ECHO_TEST_A}\nb: '${ECHO_TEST_B:-x}/z'\nc: ${ECHO_TEST_C}\n"
        "d: [2e-3, -1E5, 1e, '${ECHO_TEST_A}']\n# ${ECHO_TEST_B}"
    )
    assert read_recipe(path) == {"a": 7, "b": "x/z", "c": "x: [y # z", "d": [0.002, -1e5, "1e", 7]}
    path.write_text("a: ${QUICKSTART}/base")
    assert Path(read_recipe(path)["a"]).is_dir()
    path.write_text("a: {b: ${ECHO_TEST_A}}")
    with pytest.raises(ValueError, match="in quotes"):
        read_recipe(path)
    path.write_text("a: ${ECHO_TEST_B}")
    with pytest.raises(ValueError, match=r"recipe\.yaml uses .* Set ECHO_TEST_B"):
        read_recipe(path)


def test_a_key_that_stands_twice(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text in ("seed: 1\noutput_dir: a\nseed: 2", "output_dir: a\nmodel_init_kwargs: {a: 1, b: 2, a: 3}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="twice"):
            read_recipe(path)


def test_seeds():
    assert parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert parse_seeds("0,3,5-6") == [0, 3, 5, 6]
    assert parse_seeds(2) == [2]


def test_examples_are_drawn_once_and_limited(tmp_path):
    limited, whole = tiny_recipe(tmp_path, train_limit=5), tiny_recipe(tmp_path)
    assert load_examples(limited)[0] == load_examples(whole)[0][:5]
    assert load_examples(limited)[1] == load_examples(whole)[1]
