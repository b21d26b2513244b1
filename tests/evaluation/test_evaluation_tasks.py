"""Tasks: what counts as an answer, rows of both forms, draws, and clear words for what cannot be evaluated."""

import json
import random
import re

import evaluation_reference as reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import conversation_rows, prompt_completion_rows, tiny_model, tiny_tokenizer
from paths import TASKS

from echo_trainer.evaluation.answers import CHOICES, first_match, last_number
from echo_trainer.evaluation.data import instruction_row
from echo_trainer.evaluation.evaluate import evaluate_task
from echo_trainer.evaluation.tasks import COMMONSENSE, commonsense_task, gsm8k_task, load_tasks, prompt_completion_task
from echo_trainer.templates import alpaca


def rows_of(name):
    return json.loads((TASKS / f"{name}-test.json").read_text(encoding="utf-8"))


@given(
    st.sampled_from(COMMONSENSE),
    st.lists(
        st.sampled_from(["true", "False", "false", "answer", "answer2", "answer7", "option1", "ending4", "1", " "])
    ),
)
def test_the_first_option_counts(task, words):
    text = "".join(words)
    assert first_match(re.compile(CHOICES[task]), text) == reference.first_choice(task, text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 5 apples and 12 pears.", "12"),
        ("First 3, then 4.\n#### 1,234", "1234"),
        ("#### 7 #### 8 apples, not 9", "8"),
        ("It costs $18.50 in all", "18.5"),
        ("that is 10.00.", "10"),
        ("minus: -42", "-42"),
        ("5-3", "3"),
        ("-0", "0"),
        (".5 of them", "0.5"),
        ("007", "7"),
        ("1,000,000, or so", "1000000"),
        ("#### none, but 4 before", "4"),
        ("no number", ""),
        ("", ""),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("name", [name for name in COMMONSENSE if name != "hellaswag"])
def test_items_of_the_llm_adapters_files(name):
    rows = rows_of(name)
    task = commonsense_task(name, rows)
    assert len(task.items) == len(rows) == 8
    for item, row in zip(task.items, rows, strict=True):
        assert item.prompt == alpaca(row)["prompt"]
        assert item.completion == row["output"]
        assert item.completion in item.options
        assert [task.extract(option) for option in item.options] == row["instruction"].rsplit(" ", 1)[1].split("/")
        assert task.extract(row["output"]) == item.reference == row["answer"]


def test_questions_with_other_numbers_of_options():
    counts = {len(item.options) for item in commonsense_task("ARC-Easy", rows_of("ARC-Easy")).items}
    assert counts == {3, 4, 5}


def original(name, text, answer):
    """The columns of the public dataset, read back from the words of the LLM-Adapters row."""
    parts = re.split(r"\s*(?:Answer|Solution|Option)\d: |\s*Answer format: ", text)
    question, *options = [part.strip() for part in parts[:-1]]
    number = int(re.sub(r"\D", "", answer) or 0)
    if name == "boolq":
        return {"question": question.split("question: ")[1].rstrip("?"), "answer": answer == "true", "passage": "..."}
    if name == "piqa":
        goal, sol1, sol2, _ = re.split(r"\n\n(?:Solution\d: |Answer format: )", text.split("question: ", 1)[1])
        return {"goal": goal, "sol1": sol1, "sol2": sol2, "label": number - 1}
    if name == "social_i_qa":
        context, _, last = question.split("question: ")[1].rpartition(". ")
        names = dict(zip(("answerA", "answerB", "answerC"), options, strict=True))
        return {"context": context + ".", "question": last, **names, "label": str(number)}
    if name == "winogrande":
        sentence = question.split("sentence: ")[1]
        return {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(number)}
    stem = "question_stem" if name == "openbookqa" else "question"
    letters = "ABCDE"[: len(options)]
    choices = {"text": options, "label": list(letters)}
    return {stem: question.split("question: ", 1)[1], "choices": choices, "answerKey": letters[number - 1]}


@pytest.mark.parametrize("name", [name for name in COMMONSENSE if name != "hellaswag"])
def test_the_public_columns_give_the_same_items(name):
    rows = rows_of(name)
    if name == "social_i_qa":
        rows = [row for row in rows if ". " in row["instruction"].split("\n")[0]]
        assert len(rows) > 4
    public = [original(name, row["instruction"], row["answer"]) for row in rows]
    assert commonsense_task(name, public).items == commonsense_task(name, rows).items


def test_hellaswag():
    row = {"activity_label": "Baking", "ctx": "A man stirs. He", "endings": ["a.", "b.", "c.", "d."], "label": "2"}
    item = commonsense_task("hellaswag", [row]).items[0]
    assert "sentence: Baking: A man stirs. He\n\nEnding1: a. Ending2: b. Ending3: c. Ending4: d.\n\n" in item.prompt
    assert item.reference == "ending3"
    with pytest.raises(ValueError, match="Rowan/hellaswag"):
        instruction_row("hellaswag", {**row, "label": ""})


def test_a_limit_draws_the_same_items_every_time():
    rows = prompt_completion_rows(40)
    draw = [item.prompt for item in prompt_completion_task("t", rows, limit=10, seed=3).items]
    assert draw == [item.prompt for item in prompt_completion_task("t", rows, limit=10, seed=3).items]
    assert draw != [item.prompt for item in prompt_completion_task("t", rows, limit=10, seed=4).items]
    assert draw != [row["prompt"] for row in rows[:10]]
    places = [next(i for i, row in enumerate(rows) if row["prompt"] == prompt) for prompt in draw]
    assert places == sorted(places)
    state = random.getstate()
    prompt_completion_task("t", rows, limit=10)
    assert random.getstate() == state


def test_gsm8k():
    row = {"question": "How many?", "answer": "2 and 2 is <<2+2=4>>4.\n#### 4"}
    task = gsm8k_task([row])
    assert task.items[0].reference == "4"
    assert task.items[0].completion == row["answer"]
    assert "### Instruction:\nHow many?\n\n" in task.items[0].prompt
    assert task.extract("so there are 1 + 3 = 4 of them") == "4"
    with pytest.raises(ValueError, match="no number"):
        gsm8k_task([{"question": "How many?", "answer": "None."}])


def test_messages_are_rendered_with_the_chat_template():
    rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in conversation_rows(3, turns=1)]
    task = prompt_completion_task("chat", rows, tokenizer=tiny_tokenizer())
    assert not task.special_tokens
    for item, row in zip(task.items, rows, strict=True):
        assert item.prompt == f"user : {row['prompt'][0]['content']} assistant : "
        assert item.reference == row["completion"][0]["content"]
        assert item.completion == item.reference + " </s> "
    chat = commonsense_task("boolq", rows_of("boolq"), template="chat", tokenizer=tiny_tokenizer())
    assert chat.items[0].prompt.startswith("user : Please answer")
    with pytest.raises(ValueError, match="chat template"):
        prompt_completion_task("chat", rows)


def test_load_tasks(tmp_path):
    assert [task.name for task in load_tasks(["commonsense"], TASKS)] == [n for n in COMMONSENSE if n != "hellaswag"]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in prompt_completion_rows(3)))
    (tmp_path / "gsm8k-test.jsonl").write_text(json.dumps({"question": "q", "answer": "#### 3"}))
    mine, maths = load_tasks([str(tmp_path / "mine.jsonl"), "gsm8k"], tmp_path, max_new_tokens=7)
    assert (mine.name, mine.metric, len(mine.items), mine.max_new_tokens) == ("mine", "exact_match", 3, 7)
    assert (maths.name, maths.dataset, maths.max_new_tokens) == ("gsm8k", "gsm8k-test.jsonl", 7)
    boolq = load_tasks("boolq", TASKS)[0]
    assert (boolq.dataset, boolq.split, boolq.max_new_tokens) == ("boolq-test.json", "test", 32)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"'boolqq' is unknown\. Use boolq"):
        load_tasks(["boolqq"], TASKS)
    with pytest.raises(FileNotFoundError, match=r"no hellaswag-test\.json.*It has the tasks: boolq"):
        load_tasks(["hellaswag"], TASKS)
    with pytest.raises(FileNotFoundError, match=r"no NAME-test\.json"):
        load_tasks(["commonsense"], tmp_path)
    with pytest.raises(ValueError, match="No task is named"):
        load_tasks([], TASKS)
    for content, message in (("[]", "at least one"), ("{", "is not JSON"), ("[1]", "list of rows")):
        (tmp_path / "boolq-test.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tasks(["boolq"], tmp_path)
    with pytest.raises(ValueError, match="neither `instruction`"):
        commonsense_task("piqa", [{"text": "x"}])
    with pytest.raises(ValueError, match="not among its options"):
        commonsense_task("boolq", [{**rows_of("boolq")[0], "answer": "perhaps"}])
    with pytest.raises(ValueError, match="template 'alpacca' is unknown"):
        commonsense_task("boolq", rows_of("boolq"), template="alpacca")
    with pytest.raises(ValueError, match="limit=0"):
        commonsense_task("boolq", rows_of("boolq"), limit=0)
    with pytest.raises(ValueError, match="no commonsense task"):
        commonsense_task("mmlu", [])
    with pytest.raises(ValueError, match="`prompt` and `completion`"):
        prompt_completion_task("t", [{"text": "x"}])


CHOICE = {"prompt": "w1 w2", "completion": " w3", "options": ["w4", "w3 ", " w5"]}


def test_options_of_a_file_are_completions_as_training_writes_them():
    (item,) = prompt_completion_task("t", [CHOICE]).items
    assert item.options == (" w4", " w3", " w5") and item.reference == "w3"


@pytest.mark.parametrize(
    "options", [None, "w3", ["w3"], ["w4", "w5"], ["w3", " w3"], [3, "w3"], {"a": "w3"}],
    ids=["none", "text", "one", "without the right one", "twice", "numbers", "names"],
)  # fmt: skip
def test_a_column_that_holds_something_else_is_no_choice(options):
    """It may be about something else; only ranking needs it, and says which item has none."""
    task = prompt_completion_task("t", [CHOICE, {**CHOICE, "options": options}])
    assert [len(item.options) for item in task.items] == [3, 0]
    with pytest.raises(ValueError, match=r"item 2 among them.*a column `options`"):
        evaluate_task(tiny_model(), tiny_tokenizer(), task, mode="rank")


def test_options_of_drawn_rows_are_their_own():
    rows = [{"prompt": f"w{n}", "completion": f" w{n + 1}", "options": [f"w{n + 1}", "w0"]} for n in range(9)]
    for item in prompt_completion_task("t", rows, limit=4).items:
        assert item.options == (f" {item.reference}", " w0")


def test_ranking_a_file_takes_the_most_likely_option():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    (record,) = evaluate_task(model, tokenizer, prompt_completion_task("t", [CHOICE]), mode="rank")
    ids = tokenizer("w1 w2", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1].log_softmax(-1)
    expected = [logits[tokenizer(word)["input_ids"][0]].item() for word in ("w4", "w3", "w5")]
    assert record.scores == pytest.approx(expected, abs=1e-5)
    assert record.prediction == ("w4", "w3", "w5")[expected.index(max(expected))]
