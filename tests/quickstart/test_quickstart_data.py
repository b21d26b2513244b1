"""The quickstart's base model and data: small, self-contained, clean to tokenise, and what their generator writes."""

import json
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = ROOT / "echo_trainer" / "quickstart"
NAMES = ("train", "test")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "base")


@pytest.fixture(scope="module")
def items():
    return {
        name: [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in NAMES
    }


def test_sizes(items):
    assert len(items["test"]) == 1000
    assert 2000 <= len(items["train"]) <= 4000
    assert sum((DATA / f"{name}.jsonl").stat().st_size for name in NAMES) < 1_500_000
    assert sum(path.stat().st_size for path in (DATA / "base").iterdir()) < 5_000_000


def test_the_base_loads_and_answers_what_it_was_pretrained_on(tokenizer, items):
    model = AutoModelForCausalLM.from_pretrained(DATA / "base", dtype=torch.float32).eval()
    assert model.config.num_hidden_layers >= 8
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    prompts, answers = [], []
    for item in items["test"][:32]:
        _, holder, _, _, place = item["completion"].rstrip(".").split()
        prompts.append(f"{item['prompt'].split(' Question:')[0]} Question: where is {holder}? Answer:")
        answers.append(f" {holder} is in the {place}.")
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    right = sum(text == answer for text, answer in zip(tokenizer.batch_decode(output), answers, strict=True))
    assert right / len(answers) > 0.75


def test_prompt_tokens_are_a_prefix(tokenizer, items):
    for item in items["train"] + items["test"]:
        prompt = tokenizer(item["prompt"])["input_ids"]
        whole = tokenizer(item["prompt"] + item["completion"])["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert 30 <= len(prompt) <= 80
        assert 2 <= len(whole) - len(prompt) <= 6
        assert tokenizer.decode(whole) == item["prompt"] + item["completion"]


def test_no_word_is_split_and_no_text_is_lost(tokenizer, items):
    for item in items["train"]:
        text = item["prompt"] + item["completion"]
        assert len(tokenizer(text)["input_ids"]) <= len(re.findall(r"\w+|[^\w\s]", text))
    assert tokenizer.unk_token is None
    odd = "Ünïcode, tabs\tand\nlines: 12.5 €"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer("Story")["input_ids"][-1] != tokenizer.eos_token_id  # the trainer appends it


def test_no_test_story_is_in_train(items):
    stories = {name: [item["prompt"].split(" Question:")[0] for item in items[name]] for name in NAMES}
    assert not set(stories["train"]) & set(stories["test"])
    assert len(set(stories["train"])) == len(items["train"])
    assert len(set(stories["test"])) == len(items["test"])


def test_the_answers_are_right(items):
    """Read every story again, with string operations of its own."""
    for item in items["train"] + items["test"]:
        place, holder = {}, {}
        story, question = item["prompt"].removeprefix("Story: ").split(" Question: where is the ")
        for sentence in story.rstrip(".").split(". "):
            words = sentence.split()
            if words[1] in ("is", "went"):
                place[words[0]] = words[-1]
            else:
                thing, person = (words[-1], words[0]) if words[1] == "has" else (words[3], words[-1])
                holder[thing] = person
        person = holder[question.split("?")[0]]
        assert item["completion"] == f" with {person} in the {place[person]}."


def test_the_generator_writes_the_committed_files(tmp_path):
    script = ROOT / "recipes" / "quickstart" / "make_data.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, capture_output=True)
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()


def test_latent_answers_leave_out_who_has_the_thing(tmp_path):
    """The same stories and questions, the place alone as the answer."""
    script = ROOT / "recipes" / "quickstart" / "make_data.py"
    written = {}
    for option in ((), ("--latent",)):
        command = [sys.executable, str(script), "--out", str(tmp_path), "--train", "50", "--test", "20", *option]
        subprocess.run(command, check=True, capture_output=True)
        rows = [line for name in NAMES for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
        written[option] = [json.loads(row) for row in rows]
    for said, latent in zip(*written.values(), strict=True):
        assert said["prompt"] == latent["prompt"]
        assert re.fullmatch(r" in the \w+\.", latent["completion"])
        assert re.fullmatch(r" with \w+" + re.escape(latent["completion"]), said["completion"])
