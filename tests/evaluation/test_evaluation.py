"""Evaluation is exact: the same for every batch size, and the same as an implementation without batches."""

import json
import re
from functools import partial

import evaluation_reference as reference
import pytest
import torch
from models import FAMILIES, adapted, prompt_completion_rows, tiny_model, tiny_tokenizer
from paths import BASE, TASKS
from transformers import AutoModelForCausalLM, AutoTokenizer

from echo_trainer.evaluation import Item, Record, Task, accuracy, evaluate_task
from echo_trainer.evaluation.answers import first_match
from echo_trainer.evaluation.generation import greedy_answers
from echo_trainer.evaluation.scoring import score_rows, tokenize_row
from echo_trainer.evaluation.tasks import load_tasks, prompt_completion_task


@pytest.fixture(scope="module")
def base():
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def fifty():
    """50 questions of the seven tasks, and the name of each one's task."""
    tasks = load_tasks(["commonsense"], TASKS)
    items = [(task, item) for task in tasks for item in task.items][:50]
    assert len(items) == 50
    return items


@pytest.fixture(scope="module")
def ranked_slowly(base, fifty):
    return [[reference.log_likelihood(*base, item.prompt, option) for option in item.options] for _, item in fifty]


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_ranking_of_50_items_equals_the_slow_implementation(base, fifty, ranked_slowly, batch_size):
    names = {}
    for task, item in fifty:
        names.setdefault(task.name, (task, []))[1].append(item)
    found = []
    for task, items in names.values():
        found += evaluate_task(*base, Task(task.name, items, task.extract, 8), mode="rank", batch_size=batch_size)
    for record, (_, item), slow in zip(found, fifty, ranked_slowly, strict=True):
        assert record.scores == pytest.approx(slow, rel=1e-6, abs=1e-5)
        best = max(range(len(slow)), key=slow.__getitem__)
        assert record.prediction == item.options[best].rsplit(" ", 1)[1]
        assert record.correct == (record.prediction == item.reference)
        assert record.nll == pytest.approx(-slow[[o.rsplit(" ", 1)[1] for o in item.options].index(item.reference)])


@pytest.fixture(scope="module")
def stories():
    """50 beginnings of stories that the base goes on with, of many lengths."""
    lines = (BASE.parent / "test.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    words = [json.loads(line)["prompt"].split() for line in lines]
    return [" ".join(story[: 4 + 3 * (n % 9)]) for n, story in enumerate(words)]


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_generation_of_50_items_equals_the_slow_implementation(base, stories, written_slowly, batch_size):
    task = Task("stories", [Item(prompt, "") for prompt in stories], str.strip, max_new_tokens=10)
    assert [r.text for r in evaluate_task(*base, task, batch_size=batch_size)] == written_slowly
    # The same with an answer that is looked for, at which each row ends.
    words = re.compile(r"\b(in|and|has|is)\b")
    task = Task("words", task.items, partial(first_match, words), max_new_tokens=10, first_match=True)
    expected = [(words.findall(text) or [""])[0] for text in written_slowly]
    assert [r.prediction for r in evaluate_task(*base, task, batch_size=batch_size)] == expected
    assert len(set(expected)) > 1


@pytest.fixture(scope="module")
def written_slowly(base, stories):
    return [reference.greedy_text(*base, prompt, 10) for prompt in stories]


TAILS = ["w1 w2 w3", "w1 w2 w4 w5 w6", "w1", "w1 w2", "w7 w8 w9 w9 w9 w9"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_of_every_family(family):
    """Options that part early, late and by ending, beside prompts of other lengths."""
    model = tiny_model(family, "eager" if family == "gemma2" else "sdpa").eval()
    check_scores(model)
    check_scores(model, shared=True)


def test_scores_where_keys_and_values_cannot_be_shared():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    check_scores(tiny_model("llama", rope_parameters=rope).eval())


def check_scores(model, shared=False):
    tokenizer = tiny_tokenizer()
    common = "w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 " if shared else ""
    prompts = [common + row["prompt"] for row in prompt_completion_rows(5)]
    options = [[f" {tail}" for tail in TAILS[: 2 + n % 4]] for n in range(5)]
    rows = [tokenize_row(tokenizer, p, o) for p, o in zip(prompts, options, strict=True)]
    scores = score_rows(model, tokenizer, rows)
    for prompt, texts, found in zip(prompts, options, scores, strict=True):
        slow = [reference.log_likelihood(model, tokenizer, prompt, text) for text in texts]
        assert [score.log_likelihood for score in found] == pytest.approx(slow, rel=1e-6, abs=1e-5)
        assert [score.n_tokens for score in found] == [len(text.split()) for text in texts]


def test_an_adapter_counts_and_can_be_turned_off():
    tokenizer, plain = tiny_tokenizer(), tiny_model()
    rows = [tokenize_row(tokenizer, "w1 w2 w3", [" w4 w5", " w6 w7"])]
    without = score_rows(plain.eval(), tokenizer, rows)[0]
    model = adapted(plain).eval()
    with_adapter = score_rows(model, tokenizer, rows)[0]
    assert abs(with_adapter[0].log_likelihood - without[0].log_likelihood) > 1e-3
    slow = reference.log_likelihood(model, tokenizer, "w1 w2 w3", " w4 w5")
    assert with_adapter[0].log_likelihood == pytest.approx(slow, rel=1e-6, abs=1e-5)
    with model.disable_adapter():
        assert score_rows(model, tokenizer, rows)[0][0].log_likelihood == pytest.approx(without[0].log_likelihood)


def test_tokens_that_merge_over_the_boundary(base):
    """All options of a question are scored from the first place where one of them leaves the prompt alone."""
    model, tokenizer = base
    words = [token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha()]
    word = max((word for word in words if "Ġ" not in word), key=len)  # one token, cut in the middle
    prompt, options = f"Amy has the {word[:3]}", [word[3:], " and", "."]
    row = tokenize_row(tokenizer, prompt, options)
    assert row.start < len(tokenizer(prompt)["input_ids"])
    for score, ids in zip(score_rows(model, tokenizer, [row])[0], row.sequences, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        slow = sum(float(logits[place - 1, ids[place]]) for place in range(row.start, len(ids)))
        assert score.log_likelihood == pytest.approx(slow, rel=1e-6, abs=1e-5)


def test_greedy_says_what_generation_writes(base):
    model, tokenizer = base
    prompts = [item.prompt for task in load_tasks(["boolq", "piqa"], TASKS) for item in task.items]
    written = greedy_answers(model, tokenizer, prompts, max_new_tokens=60)
    rows = [{"prompt": p, "completion": text} for p, text in zip(prompts, written, strict=True)]
    ended = [len(tokenizer(text)["input_ids"]) < 60 for text in written]
    assert any(ended)
    rows += [{"prompt": row["prompt"], "completion": row["completion"] + " no"} for row in rows]
    records = evaluate_task(model, tokenizer, prompt_completion_task("own words", rows), mode="nll")
    assert [record.correct for record in records] == [*ended, *[False] * len(prompts)]
    assert all(record.nll > 0 for record in records)


def test_the_models_own_generation_settings_change_nothing(base):
    model, tokenizer = base
    prompts = ["Story: Amy is in the kitchen.", "Amy has the ball. Amy has the ball. Amy has"]
    plain = greedy_answers(model, tokenizer, prompts, max_new_tokens=12)
    kept = model.generation_config.to_dict()
    try:
        model.generation_config.update(
            do_sample=True, temperature=2.0, repetition_penalty=3.0, no_repeat_ngram_size=2, min_length=40, num_beams=3
        )
        assert greedy_answers(model, tokenizer, prompts, max_new_tokens=12) == plain
    finally:
        model.generation_config.update(**kept)


def test_beams_do_not_depend_on_the_batch(base, stories):
    model, tokenizer = base
    task = Task("stories", [Item(prompt, "") for prompt in stories[:16]], str.strip, max_new_tokens=10)
    one, eight = (evaluate_task(model, tokenizer, task, batch_size=n, num_beams=4) for n in (1, 8))
    assert one == eight
    ids = tokenizer(task.items[0].prompt, return_tensors="pt")["input_ids"]
    alone = model.generate(ids, max_new_tokens=10, num_beams=4, do_sample=False)[0, ids.shape[1] :]
    assert one[0].text == tokenizer.decode(alone, skip_special_tokens=True)
    greedy = evaluate_task(model, tokenizer, task, batch_size=16)
    assert [r.text for r in greedy] != [r.text for r in one]


def test_generation_ends_at_the_answer_and_nowhere_else(base):
    model, tokenizer = base
    prompts = ["Amy is in the kitchen. Amy is in the", "Tom is in the garden and Amy is in the office. Tom is in the"]
    free = greedy_answers(model, tokenizer, prompts, max_new_tokens=20)
    word = free[0].split()[0].strip(".")
    ended = greedy_answers(model, tokenizer, prompts, max_new_tokens=20, stop=lambda text: word in text)
    for before, after in zip(free, ended, strict=True):
        assert before.startswith(after)
        assert after == before if word not in before else word in after
        assert not after[: after.rfind(word)].count(word)
    assert len(ended[0]) < len(free[0])


def test_an_interrupted_evaluation_continues():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    task = prompt_completion_task("t", prompt_completion_rows(12), max_new_tokens=3)
    whole = evaluate_task(model, tokenizer, task, mode="nll", batch_size=5)
    saved: list[Record] = []

    def save(records):
        saved.extend(records)
        if len(saved) >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_task(model, tokenizer, task, mode="nll", batch_size=5, save=save)
    assert len(saved) == 5
    done, later, steps = {record.index: record for record in saved}, [], []
    records = evaluate_task(
        model, tokenizer, task, mode="nll", batch_size=5, done=done, save=later.extend, advance=steps.append
    )
    assert {record.index for record in later} == set(range(12)) - set(done)
    assert sum(steps) == 12
    assert [r.nll for r in records] == pytest.approx([r.nll for r in whole], abs=2e-5)
    assert [r.index for r in records] == list(range(12))


def test_accuracy():
    right, wrong = Record(0, "a", "a", True), Record(1, "", "a", False)
    assert accuracy([right, wrong, wrong, right]) == 0.5
    with pytest.raises(ValueError, match="no records"):
        accuracy([])


def test_bad_input():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    task = prompt_completion_task("t", prompt_completion_rows(2), max_new_tokens=3)
    for options, message in (
        ({"mode": "guess"}, "mode='guess' is unknown"),
        ({"mode": "rank"}, "without options to rank"),
        ({"batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_task(model, tokenizer, task, **options)
    with pytest.raises(ValueError, match="has no items"):
        evaluate_task(model, tokenizer, Task("t", [], str.strip, 3))
    with pytest.raises(ValueError, match="No token stands before"):
        tokenize_row(tokenizer, "", ["w1"])
    with pytest.raises(ValueError, match="has no tokens"):
        tokenize_row(tokenizer, "w1", [""])
    with pytest.raises(ValueError, match="is not among its options"):
        evaluate_task(model, tokenizer, Task("t", [Item("w1", "w9", (" w2", " w3"))], str.strip, 3), mode="rank")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        evaluate_task(model, tokenizer, task, mode="nll")
