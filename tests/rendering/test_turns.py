"""The assistant's turns by rendering: what TRL's own marks say, wherever there are marks to compare with."""

import pytest
from chat import CHATML, TEMPLATES, answers, byte_tokenizer, template

from echo_trainer.rendering.messages import as_messages
from echo_trainer.rendering.rows import chat_row, renderer, special_words
from echo_trainer.rendering.turns import turn_spans

MESSAGES = [
    {"role": "user", "content": "one is"},
    {"role": "assistant", "content": "a first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second ok"},
]

# TRL marks what asks for the answer as well, or its template is one of those that write the same turn in two ways.
OTHERWISE = {
    "qwen2_5", "muse_glimmer", "gptoss", "deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning",
    "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6",
    "qwen3_8", "llava_next",
}  # fmt: skip
MARKED = sorted(path.stem.removesuffix("_training") for path in TEMPLATES.glob("*_training.jinja"))


def turns(messages, tokenizer, row=None, chat_template=None):
    text, spans = turn_spans(messages, renderer(row or {}, tokenizer, chat_template), special_words(tokenizer), 3)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("family", [name for name in MARKED if name not in OTHERWISE])
def test_turns_are_those_that_trl_marks(family):
    tokenizer = byte_tokenizer(template(f"{family}_training"))
    marked = tokenizer.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [i if bit else -100 for i, bit in zip(marked["input_ids"], marked["assistant_masks"], strict=True)]
    expected = answers({"input_ids": marked["input_ids"], "labels": labels}, tokenizer)
    assert turns(MESSAGES, tokenizer) == expected
    # And their tokens: the template is rendered, tokenised and masked the same.
    row = chat_row({"messages": MESSAGES}, 0, tokenizer)
    assert (row["input_ids"], row["labels"]) == (marked["input_ids"], labels)


def test_most_of_trls_templates_are_compared():
    assert set(MARKED) > OTHERWISE and len(set(MARKED) - OTHERWISE) >= 15


@pytest.mark.parametrize("family", ["llama3_1", "llama3_2", "gemma4", "gemma4_v5", "lfm2_2_5"])
def test_families_that_trl_has_no_training_template_for(family):
    found = turns(MESSAGES, byte_tokenizer(template(family)))
    assert [text.startswith(said) for text, said in zip(found, ("a first", "second ok"), strict=True)] == [True, True]


def test_a_template_that_closes_every_conversation():
    """Phi-3 writes the end token after the last message, so what is rendered up to a turn is no beginning."""
    found = turns(MESSAGES, byte_tokenizer(template("phi3")))
    assert found == ["a first<|end|>\n", "second ok<|end|>\n<|im_end|>"]


def test_tools_switches_and_tool_calls_are_rendered():
    tokenizer = byte_tokenizer()
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "it is 7"},
    ]
    row = {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"enable_thinking": False}}
    text, _ = turn_spans(messages, renderer(row, tokenizer), special_words(tokenizer))
    assert text.startswith('<|im_start|>system\n# Tools\n{"name": "f"}\n<|im_end|>\n')
    assert text.count("<think>\n\n</think>\n\n") == 2
    assert turns(messages, tokenizer, row) == [
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>\n',
        "it is 7<|im_end|>\n",
    ]
    assert turns(messages, tokenizer, {**row, "tools": [{"name": "f"}]}) == turns(messages, tokenizer, row)


FORGETS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTS = "{{ messages | length }} " + CHATML


@pytest.mark.parametrize(
    ("written", "alone", "whole"),
    [
        (FORGETS, r"assistant\\n<think>deep</think>shallow", r"assistant\\nshallow"),
        (COUNTS, r"'1<\|im_start", r"'4<\|im_start"),
        (template("deepseek_r1_distill"), r"<think>\\n'", "shallow"),
    ],
    ids=["forgets reasoning", "counts messages", "asks for reasoning"],
)
def test_a_template_that_writes_the_beginning_differently_is_refused_with_both_texts(written, alone, whole):
    messages = [*MESSAGES]
    messages[1] = {"role": "assistant", "content": "<think>deep</think>shallow"}
    with pytest.raises(ValueError, match=rf"(?s)Row 3 .*{alone}.*\n.*{whole}.*generation"):
        turns(messages, byte_tokenizer(written))


def test_one_turn_of_such_a_template_is_fine():
    messages = [MESSAGES[0], {"role": "assistant", "content": "<think>deep</think>shallow"}]
    assert turns(messages, byte_tokenizer(FORGETS)) == ["<think>deep</think>shallow<|im_end|>\n"]


def test_a_conversation_that_begins_with_the_assistant():
    found = turns(MESSAGES[1:], byte_tokenizer())
    assert found == ["a first<|im_end|>\n", "second ok<|im_end|>\n"]


def test_a_conversation_without_the_assistant_is_named():
    with pytest.raises(ValueError, match=r"Row 3 .* no turn of the assistant.*user, user"):
        turns([MESSAGES[0], MESSAGES[2]], byte_tokenizer())


def test_speakers_of_other_collections():
    turns_ = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    assert as_messages(turns_) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": "g"},
    ]
    mixed = [{"role": "Human", "content": "h", "weight": 0}, {"from": "model", "value": "g"}]
    assert as_messages(mixed) == [
        {"role": "user", "content": "h", "weight": 0},
        {"role": "assistant", "content": "g"},
    ]
    own = [{"role": "ipython", "content": "7"}, {"role": "function", "content": "8"}]
    assert as_messages(own) == own  # a template may know them
    with pytest.raises(ValueError, match=r"Row 5 .*'narrator'.*human"):
        as_messages([{"from": "narrator", "value": "x"}], 5)
