"""What prompts share is found; what belongs to one example stays out of it, unless an example is asked for."""

import json

import pytest
from models import prompt_completion_rows
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from training import echo_trainer
from transformers import PreTrainedTokenizerFast

from echo_trainer.report.prompt_format import MAX_CHARACTERS, N_LEAST, example, prompt_format
from echo_trainer.report.render import render_card, usage
from echo_trainer.templates import ALPACA

CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = [f"{'zyxwvutsrq'[i % 10]}{i}, or {'not' * (i % 3)} {i * 7}{'!?.'[i % 3]}" for i in range(100)]


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, so that every text comes back as it was; with `bos` it writes <s> before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def prepared(pairs, tokens):
    """Rows as `SFTTrainer` prepares prompts and completions."""
    rows = []
    for prompt, answer in pairs:
        ids, rest = tokens(prompt)["input_ids"], tokens(answer, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": ids + rest, "labels": [-100] * len(ids) + rest})
    return rows


@pytest.mark.parametrize(("template", "start", "end"), [
    (CHATML, *CHATML.split("{}")), (ALPACA.replace("{instruction}", "{}"), *ALPACA.split("{instruction}")),
    ("Q: {}\nA:", "Q: ", "\nA:"), ("{}", "", ""),
])  # fmt: skip
@pytest.mark.parametrize("bos", [False, True])
def test_templates_are_found_whole(template, start, end, bos):
    tokens = tokenizer(bos)
    answers = [f"the answer is {i}</s>" for i in range(100)]
    rows = prepared(zip((template.format(q) for q in QUESTIONS), answers, strict=True), tokens)
    found = prompt_format(rows, tokens)
    added = "<s>" if bos else ""
    questions = [QUESTIONS[i * 100 // 64] for i in range(64)]
    assert found["n"] == 64 and found["exact"] and found["added"] == added
    assert found["prompt"] == (added + start, _shared_end(questions) + end)
    assert found["answer"] == ("the answer is ", "</s>")
    assert example(rows, tokens) == {
        "prompt": added + template.format(QUESTIONS[0]), "answer": answers[0], "exact": True, "added": added,
    }  # fmt: skip


def _shared_end(texts):
    return "" if len({text[-1] for text in texts}) > 1 else pytest.fail("the questions of this test must differ")


@pytest.mark.parametrize("bos", [False, True])
def test_a_server_is_sent_what_becomes_the_same_ids(bos):
    """vLLM and SGLang write <s> before a prompt themselves; twice would be another prompt."""
    tokens = tokenizer(bos)
    rows = prepared([(CHATML.format(q), f"{q[0]}</s>") for q in QUESTIONS], tokens)
    base = {"base_model": "org/base", "saved": None, "example": None, "prompt_format": prompt_format(rows, tokens)}
    for record, content in ((base, "Hello"), (base | {"example": example(rows, tokens)}, QUESTIONS[0])):
        use = usage(record)
        ids = tokens(CHATML.format(content))["input_ids"]
        assert tokens(json.loads(use["request"])["prompt"])["input_ids"] == ids  # as a server encodes it
        assert tokens(use["prompt"], add_special_tokens=False)["input_ids"] == ids  # as the card's Python does


def test_nothing_is_said_where_nothing_is_known():
    tokens = tokenizer()
    rows = prepared([(q, "yes") for q in QUESTIONS], tokens)
    assert prompt_format(rows[: N_LEAST - 1], tokens) is None  # what few share may be what they say
    assert prompt_format(rows[:1] * 100, tokens) is None
    assert prompt_format(iter(rows), tokens) is None and example(iter(rows), tokens) is None  # a stream
    assert prompt_format([], tokens) is None and example([], tokens) is None
    assert prompt_format(rows, object()) is None  # no tokenizer
    long = prepared([("x" * MAX_CHARACTERS + q, "yes") for q in QUESTIONS[:10]], tokens)
    assert prompt_format(long, tokens) is None and example(long, tokens) is None
    unmasked = [{**row, "labels": row["input_ids"]} for row in rows]
    assert prompt_format(unmasked, tokens) is None and example(unmasked, tokens) is None
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    assert prompt_format(silent, tokens) is None and example(silent, tokens) is None


def test_an_answer_that_all_share_is_not_shown():
    tokens = tokenizer()
    found = prompt_format(prepared([(CHATML.format(q), "hunter2</s>") for q in QUESTIONS], tokens), tokens)
    assert found["prompt"] == (CHATML.split("{}")[0], CHATML.split("{}")[1]) and found["answer"] is None


def test_several_turns_show_the_first_answer():
    tokens = tokenizer()
    (row,) = prepared([("a?", "b")], tokens)
    twice = {name: values * 2 for name, values in row.items()}
    assert example([twice], tokens)["answer"] == "b"


def test_a_run_publishes_no_training_example_unless_told(tmp_path):
    """Searched for in every file of the run's folder."""
    secret = prompt_completion_rows(40)[0]["prompt"]
    found = {}
    for shown in ("format", "example", "none"):
        out = tmp_path / shown
        trainer = echo_trainer(out, **({} if shown == "format" else {"card_prompt": shown}))
        trainer.train()
        trainer.save_model()
        files = [path for path in out.rglob("*") if path.is_file()]
        found[shown] = sorted(path.name for path in files if secret.encode() in path.read_bytes())
        record = json.loads((out / "echo_run.json").read_text())
        assert (record["prompt_format"] or {"n": 0})["n"] == (0 if shown == "none" else 40)
        assert ("training examples share" in (out / "README.md").read_text()) == (shown != "none")
        assert render_card(record) == (out / "README.md").read_text()
    assert found == {"format": [], "none": [], "example": ["README.md", "echo_run.json"]}
