"""More rows as people have them: calls of functions, texts of a chat template, masks; what cannot be read is named."""

import json

import pytest
from chat import CHATML, answers, byte_model, byte_tokenizer, template
from datasets import Dataset, IterableDataset
from training import SETTINGS, lora_config, losses

from echo_trainer import EchoSFTConfig, EchoSFTTrainer

ASK, ANSWER = "<|im_start|>assistant\n", "<|im_end|>\n"


def chats(n=8):
    return [
        {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}]}
        for i in range(n)
    ]


def trainer_on(folder, rows, written=CHATML, tokenizer=None, trainer_kwargs=None, **settings):
    return EchoSFTTrainer(
        model=byte_model(),
        args=EchoSFTConfig(output_dir=str(folder), **{**SETTINGS, "max_steps": 2, "echo_p_end": 1.0, **settings}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer or byte_tokenizer(written),
        peft_config=lora_config(init_lora_weights=True),
        **(trainer_kwargs or {}),
    )


def said(trainer):
    return [answers(row, trainer.processing_class) for row in trainer.train_dataset]


def text_of(trainer, i=0):
    return trainer.processing_class.decode(list(trainer.train_dataset)[i]["input_ids"])


def trains(trainer):
    trainer.train()
    return trainer.state.log_history[0]["echo/routed"] == 1


# Calls of functions, as ShareGPT writes them

CALL = {"name": "look", "arguments": {"at": "it"}}
AS_CHATML = '<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call><|im_end|>\n'


def asked(speaker, call, result="observation"):
    turns = [("human", "what?"), (speaker, call), (result, "seven"), ("gpt", "it is seven")]
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


@pytest.mark.parametrize("speaker", ["function_call", "tool_call"])
@pytest.mark.parametrize(
    "call",
    [
        json.dumps(CALL),
        json.dumps([CALL]),
        json.dumps({"name": "look", "parameters": {"at": "it"}}),
        json.dumps({"type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}),
    ],
    ids=["call", "list", "parameters", "function"],
)
def test_calls_of_functions(tmp_path, speaker, call):
    trainer = trainer_on(tmp_path, [asked(speaker, call, "function_response")] * 8)
    assert said(trainer)[0] == [AS_CHATML, "it is seven<|im_end|>\n"]
    assert "<|im_start|>tool\nseven" in text_of(trainer)


@pytest.mark.parametrize("written", [CHATML, template("qwen3")], ids=["rendered", "marked"])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_with_other_arguments_in_every_row(tmp_path, written, stream):
    """In a dataset of columns each call would have the arguments of all, None where it has none."""
    calls = [{"name": f"f{i}", "arguments": {f"a{i}": i, "b": [i]}} for i in range(8)]
    rows = [asked("function_call", json.dumps(call)) for call in calls] + [asked("gpt", "so")]
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(8)]
    rows = [{**row, "tools": json.dumps(tools)} for row in rows]
    given = IterableDataset.from_generator(lambda: iter(rows)) if stream else rows
    trainer = trainer_on(tmp_path, given, written)
    found = said(trainer)
    for i in range(8):
        assert f'{{"name": "f{i}", "arguments": {{"a{i}": {i}, "b": [{i}]}}}}' in found[i][0]
        assert "None" not in text_of(trainer, i) and "null" not in text_of(trainer, i)
    assert trains(trainer)


@pytest.mark.parametrize("call", ["look at it", '{"arguments": {}}', '{"name": "look"}', "7", "[7]", None])
def test_calls_that_cannot_be_read(tmp_path, call):
    with pytest.raises(ValueError, match=r"Row 0 .*calls a function.*not the JSON of a call.*'gpt'"):
        trainer_on(tmp_path, [asked("function_call", call)] * 8)


@pytest.mark.parametrize("speakers", [("user", "assistant"), ("Human", "GPT"), ("human", "model")])
def test_speakers(tmp_path, speakers):
    turns = [{"from": who, "value": f"words {i}"} for i, who in enumerate(speakers)]
    trainer = trainer_on(tmp_path, [{"conversations": [{"from": "system", "value": "s"}, *turns]}] * 8)
    assert said(trainer)[0] == ["words 1<|im_end|>\n"] and "<|im_start|>user\nwords 0" in text_of(trainer)


# Conversations


def test_conversations_as_json(tmp_path):
    rows = [{"messages": json.dumps(row["messages"])} for row in chats()]
    assert said(trainer_on(tmp_path / "a", rows)) == said(trainer_on(tmp_path / "b", chats()))


@pytest.mark.parametrize("written", [CHATML, template("qwen3"), template("llama3")], ids=["own", "qwen3", "llama3"])
def test_contents_in_parts(tmp_path, written):
    """A template of texts writes parts as Python does, or leaves them out."""
    parts = [
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]}
        for row in chats()
    ]
    trainer, plain = trainer_on(tmp_path / "a", parts, written), trainer_on(tmp_path / "b", chats(), written)
    assert trainer.train_dataset["input_ids"] == plain.train_dataset["input_ids"] and said(trainer) == said(plain)
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in parts]
    paired = trainer_on(tmp_path / "c", pairs, written)
    assert all("say" in answer for row in said(paired) for answer in row)
    assert paired.train_dataset["input_ids"] == plain.train_dataset["input_ids"]


@pytest.mark.parametrize("written", [CHATML, template("llama3")], ids=["rendered", "marked"])
@pytest.mark.parametrize(
    ("messages", "match"),
    [([], r"Row 3 .*has no messages"), (None, r"Row 3 .*has no messages")],
    ids=["empty", "none"],
)
def test_conversations_without_messages(tmp_path, written, messages, match):
    rows = chats()
    rows[3] = {"messages": messages}
    with pytest.raises(ValueError, match=match):
        trainer_on(tmp_path, rows, written)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", r"Row 0 .*has text in `messages`, and it is not JSON"),
        (["hello"], r"Row 0 .*does not say who speaks: 'hello'"),
        ([{"content": "hello"}], r"Row 0 .*does not say who speaks"),
        ([{"from": "narrator", "value": "x"}], r"Row 0 .*'narrator'.*function_call"),
    ],
)
def test_turns_that_cannot_be_read(tmp_path, messages, match):
    with pytest.raises(ValueError, match=match):
        trainer_on(tmp_path, [{"messages": messages}] * 8)


# Texts that the chat template wrote

TEXTS = [{"text": f"<|im_start|>user\nask {i}{ANSWER}{ASK}say {i}{ANSWER}"} for i in range(12)]


def test_texts_of_the_chat_template(tmp_path, caplog):
    trainer = trainer_on(tmp_path / "a", TEXTS, trainer_kwargs={"eval_dataset": Dataset.from_list(TEXTS[:4])})
    assert said(trainer) == [[f"say {i}<|im_end|>"] for i in range(12)]
    assert trainer.eval_dataset["labels"] == trainer.train_dataset["labels"][:4]
    assert caplog.text.count("answer_marker='<|im_start|>assistant\\n' is set") == 1
    by_hand = trainer_on(tmp_path / "b", TEXTS, answer_marker=ASK)
    assert by_hand.train_dataset["labels"] == trainer.train_dataset["labels"]
    assert trains(trainer)
    by_hand.train()
    assert losses(by_hand) == losses(trainer)


def test_several_turns_end_with_the_words_of_the_template(tmp_path):
    """The end of a turn is not the end token of this tokenizer, as with base models of Qwen."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "</s>"
    rows = [{"text": TEXTS[i]["text"] + f"<|im_start|>tool\n7{ANSWER}" + TEXTS[i + 1]["text"]} for i in range(8)]
    for settings in ({}, {"answer_marker": ASK}):
        trainer = trainer_on(tmp_path, rows, tokenizer=tokenizer, **settings)
        assert said(trainer)[0] == ["say 0<|im_end|>", "say 1<|im_end|>"]


def test_a_formatting_func_that_applies_the_template(tmp_path):
    tokenizer = byte_tokenizer()

    def function(row):
        turns = [("system", "be brief"), ("user", row["q"]), ("assistant", row["a"])]
        return tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)

    rows = [{"q": f"q{i}", "a": f"a{i}"} for i in range(8)]
    trainer = trainer_on(tmp_path, rows, trainer_kwargs={"formatting_func": function})
    assert said(trainer) == [[f"a{i}<|im_end|>"] for i in range(8)]
    assert trains(trainer)


def test_a_formatting_func_that_adds_to_a_conversation(tmp_path):
    tokenizer = byte_tokenizer()

    def function(row):
        messages = [{"role": "system", "content": "be brief"}, *row["messages"]]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    trainer = trainer_on(tmp_path, chats(), trainer_kwargs={"formatting_func": function})
    assert said(trainer)[1] == ["say 1<|im_end|>"] and "system\nbe brief" in text_of(trainer)


def test_a_prompt_that_asks_at_the_end_is_no_answer(tmp_path):
    """What add_generation_prompt=True writes after the last answer."""
    trainer = trainer_on(tmp_path, [{"text": row["text"] + ASK} for row in TEXTS])
    assert said(trainer)[2] == ["say 2<|im_end|>"]


def test_a_text_of_other_words_among_those_of_the_template(tmp_path):
    with pytest.raises(ValueError, match=r"Row 4 .*answer marker '<\|im_start\|>assistant\\n'.*'once"):
        trainer_on(tmp_path, [*TEXTS[:4], {"text": "once"}])


def test_with_the_echo_off_texts_are_those_of_trl(tmp_path):
    trainer = trainer_on(tmp_path, TEXTS, echo_p_start=0.0, echo_p_end=0.0)
    assert trainer.train_dataset["labels"] == trainer.train_dataset["input_ids"]


# Markers

MARK = "### Response:\n"


@pytest.mark.parametrize("rest", ["", "\n", " <|im_end|>"])
def test_a_marker_without_an_answer(tmp_path, rest):
    rows = [{"text": f"ask {i}\n{MARK}say {i}"} for i in range(8)]
    rows[2]["text"] = f"ask 2\n{MARK}{rest}"
    with pytest.raises(ValueError, match=r"Row 2 .*holds the answer marker.*no answer follows it"):
        trainer_on(tmp_path, rows, answer_marker=MARK)
    trainer = trainer_on(tmp_path, rows, answer_marker=MARK, drop_without_marker=True)
    assert said(trainer) == [[f"say {i}<|im_end|>"] for i in (0, 1, 3, 4, 5, 6, 7)]


def test_a_row_without_a_text(tmp_path):
    rows = [{"text": f"ask {i}\n{MARK}say {i}"} for i in range(8)]
    rows[1]["text"] = None
    with pytest.raises(ValueError, match=r"Row 1 .*has None in `text`"):
        trainer_on(tmp_path, rows, answer_marker=MARK)
    assert len(trainer_on(tmp_path, rows, answer_marker=MARK, drop_without_marker=True).train_dataset) == 7


# Token ids


@pytest.mark.parametrize("name", ["labels", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize("form", [{}, {"packing": True, "max_length": 32}], ids=["padded", "packed"])
def test_token_ids_with_masks(tmp_path, name, form):
    values = [-100, -100, 12, 13, 1] if name == "labels" else [0, 0, 1, 1, 1]
    trainer = trainer_on(tmp_path, [{"input_ids": [10, 11, 12, 13, 1], name: values}] * 24, **form)
    row = trainer.train_dataset[0]
    assert row["labels"][:5] == [-100, -100, 12, 13, 1] and row["input_ids"][:5] == [10, 11, 12, 13, 1]
    assert trains(trainer)


def test_a_mask_of_another_length(tmp_path):
    rows = [{"input_ids": [10, 11, 12], "completion_mask": [0, 1]}] * 8
    with pytest.raises(ValueError, match=r"Row 0 .*has 3 `input_ids` and 2 numbers in `completion_mask`"):
        trainer_on(tmp_path, rows)


# Columns that nobody knows


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"question": "q", "answer": "a"}, r"rename_columns\(\{'question': 'prompt', 'answer': 'completion'\}\)"),
        ({"prompt": "q", "response": "a", "source": "x"}, r"rename_columns\(\{'response': 'completion'\}\)"),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            r"'completion': row\['output'\].*dataset_template: alpaca",
        ),
        ({"dialog": [{"role": "user", "content": "x"}]}, r"rename_column\('dialog', 'messages'\)"),
        ({"conversation": [{"from": "gpt", "value": "x"}]}, r"rename_column\('conversation', 'messages'\)"),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
            r"rename_column\('chosen', 'completion'\)",
        ),
        (
            {
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
            },
            r"rename_column\('chosen', 'messages'\)",
        ),
        ({"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}, r"'chosen', 'text'.*answer_marker"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, r"rename_column\('chosen', 'completion'\)"),
        ({"words": "x"}, r"the columns \['words'\].*needs one of these formats"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, "`prompt` is text and `completion`"),
        ({"prompt": "q", "completion": None}, "The first row has None for 'completion'"),
        ({"prompt": None, "completion": "a"}, "The first row has None for 'prompt'"),
        ({"messages": None, "text": "x"}, "Row 0 .*has no messages: `messages` is None"),
        ({"conversations": None, "id": "x"}, "Row 0 .*has no messages: `conversations` is None"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, "`prompt` is messages and `completion`"),
    ],
)
def test_columns_that_nobody_knows(tmp_path, row, match):
    with pytest.raises(ValueError, match=match):
        trainer_on(tmp_path, [row] * 8)


@pytest.mark.parametrize(
    ("returned", "match"), [({"text": "x"}, r"dataset\.map\(formatting_func\)"), (["x"], "need none")]
)
def test_a_formatting_func_that_returns_no_text(tmp_path, returned, match):
    with pytest.raises(
        ValueError, match=rf"`formatting_func` returned a {type(returned).__name__} for row 0.*{match}"
    ):
        trainer_on(tmp_path, [{"q": "x"}] * 8, trainer_kwargs={"formatting_func": lambda row: returned})
