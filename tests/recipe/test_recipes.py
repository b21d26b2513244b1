"""Every recipe loads and trains: a tiny model in place of its own, a few local rows with its dataset's columns."""

import json

import pytest
from models import tiny_model, tiny_tokenizer, words
from torch import Generator

from echo_trainer.evaluation.tasks import COMMONSENSE, commonsense_task
from echo_trainer.recipe.arguments import parse
from echo_trainer.recipe.find import available_recipes, recipe_path
from echo_trainer.recipe.training import run
from echo_trainer.templates import ALPACA, TEMPLATES

COLUMNS = {
    "zwhe99/commonsense_170k": ("instruction", "input", "output", "answer"),
    "openai/gsm8k": ("question", "answer"),
    "meta-math/MetaMathQA": ("type", "query", "original_question", "response"),
    "ise-uiuc/Magicoder-Evol-Instruct-110K": ("instruction", "response"),
    "databricks/databricks-dolly-15k": ("instruction", "context", "response", "category"),
    "allenai/openbookqa": ("instruction", "input", "output", "answer"),  # the LLM-Adapters copy
}
CKA = "meta-math/MetaMathQA"  # its recipe selects layers, which takes 128 rows
CPU = ("--use_cpu", "true")  # half of the recipes want bfloat16, which transformers refuses without a GPU or this
# Recipes of other commands have options of their own.
RECIPES = [
    name for name in available_recipes() if name.partition("/")[0] not in ("ablation", "accelerate", "polynomials")
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A tiny model, and rows with the columns of every dataset."""
    folder = tmp_path_factory.mktemp("recipes")
    model = tiny_model("llama", num_hidden_layers=10)
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    generator = Generator().manual_seed(1)
    for dataset, columns in COLUMNS.items():
        rows = [{column: words(generator, 2, 4) for column in columns} for _ in range(128 if dataset == CKA else 16)]
        place = folder / "data" / dataset.replace("/", "--")
        place.mkdir(parents=True)
        (place / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = parse(["--config", name, *CPU])
    dataset = written[0].dataset_name
    place = workplace / "data" / dataset.replace("/", "--")
    data, config, adapter, mixture = parse(
        ["--config", name, "--model_name_or_path", str(workplace / "base"), "--dataset_name", str(place),
         "--dataset_config", "default", "--dtype", "float32", "--bf16", "false", *CPU,
         "--max_steps", "2", "--num_train_epochs", "1", "--per_device_train_batch_size", "4",
         "--logging_steps", "1", "--save_strategy", "no", "--output_dir", "out"]
    )  # fmt: skip
    trainer = run(data, config, adapter, mixture)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["r"] >= written[2].lora_r) and saved["base_model_name_or_path"]
    record = json.loads((tmp_path / "out" / "echo_run.json").read_text())
    assert record["adapter"]["r"] == written[2].lora_r
    assert record["adapter"]["use_dora"] is written[2].use_dora
    assert record["hyperparameters"]["learning_rate"] == written[1].learning_rate
    assert record["echo"]["enabled"]

    # What was trained is the template of the recipe, and the loss is on the answer only.
    row = json.loads((place / "train.jsonl").read_text().splitlines()[0])
    example = TEMPLATES[written[0].dataset_template](row)
    tokenizer = trainer.processing_class
    if written[0].dataset_template == "alpaca":
        expected = tokenizer(example["prompt"])["input_ids"], example["completion"]
    else:
        prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, tokenize=False)
        expected = tokenizer(prompt, add_special_tokens=False)["input_ids"], example["completion"][0]["content"]
    first = trainer.train_dataset[0]
    answer = [token for token, label in zip(first["input_ids"], first["labels"], strict=True) if label != -100]
    assert first["input_ids"][: -len(answer)] == expected[0]
    assert tokenizer.decode(answer).split()[:-1] == expected[1].split()
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", RECIPES)
def test_header(name):
    """It says how to run the recipe, what that needs and what to expect."""
    header = recipe_path(name).read_text().split("\nmodel_name_or_path")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    text = "\n".join(header)
    assert f"echo-trainer sft --config {name}" in text
    assert "# Needs: " in text and "# Expect: " in text


@pytest.mark.parametrize("model", ["llama-7b", "llama2-7b", "llama3-8b"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_published_setting(model, kind):
    data, config, adapter, _ = parse(["--config", f"{model}/commonsense-{kind}", *CPU])
    assert (data.dataset_name, data.dataset_template) == ("zwhe99/commonsense_170k", "alpaca")
    assert (adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == (32, 64, 0.05)
    assert sorted(adapter.lora_target_modules) == ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert adapter.use_dora is (kind == "dora")
    rate = 3e-4 if kind == "lora" else 1e-4 if model == "llama3-8b" else 2e-4
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert (config.learning_rate, batch, config.num_train_epochs) == (rate, 16, 3)
    assert (config.max_length, config.warmup_steps, config.completion_only_loss) == (256, 100, True)


def test_training_and_evaluation_share_the_template():
    """A row of the training file and a test item of the same question are the same text."""
    row = {
        "instruction": "Please answer.\n\nAnswer format: true/false",
        "input": "",
        "output": "the correct answer is true",
    }
    trained, item = TEMPLATES["alpaca"](row), commonsense_task("boolq", [row]).items[0]
    assert item.prompt == trained["prompt"] == ALPACA.format(instruction=row["instruction"])
    assert trained["completion"] == item.completion == item.options[0]
    assert len(COMMONSENSE) == 8
