"""Answers of a text by a marker: on the text, whatever the tokenizer makes of it."""

import pytest
from chat import answers, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_tokenizer

from echo_trainer.rendering.forms import RowOptions
from echo_trainer.rendering.marker import NoMarkerError, marked_spans
from echo_trainer.rendering.rows import marked_row
from echo_trainer.rendering.spans import encode

ALPACA = RowOptions(answer_marker="### Response:\n", prompt_marker="### Instruction:\n")
ONE = "### Instruction:\nq\n\n### Response:\n"


def marked(text, options=ALPACA, end="<end>"):
    return [text[start:stop] for start, stop in marked_spans(text, options, [end], 4)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ONE + "a<end>", ["a<end>"]),
        (ONE + "\n\na\nb", ["\n\na\nb"]),
        (ONE + "a<end>\n" + ONE, ["a<end>"]),  # rendered with the words that ask for the next answer
        (ONE + "\n" + ONE + "b<end>", ["b<end>"]),
        (ONE + "a\n\n" + ONE + "b<end>", ["a\n\n", "b<end>"]),
        (ONE + "a<end>\n" + ONE + "b<end>", ["a<end>", "b<end>"]),
        (ONE + "a<end>" + ONE + "b\n### Instruction:\nand then?", ["a<end>", "b\n"]),
        ("### Response:\nno prompt<end>", ["no prompt<end>"]),
    ],
)
def test_answers_of_a_text(text, expected):
    assert marked(text) == expected


def test_an_end_token_alone_ends_the_answers_of_several_turns():
    options = RowOptions(answer_marker="[/INST]")
    text = "<s>[INST] q [/INST] a </s><s>[INST] r [/INST] b </s>"
    assert marked(text, options, "</s>") == [" a </s>", " b </s>"]


def test_several_turns_and_nothing_that_ends_an_answer():
    options = RowOptions(answer_marker="### Response:\n")
    with pytest.raises(ValueError, match=r"Row 4 .*2 times.*'a\\n\\n### Instruction:\\nq\\n\\n' ends.*prompt_marker"):
        marked(ONE + "a\n\n" + ONE + "b", options)


def test_a_text_without_the_marker_is_named():
    with pytest.raises(NoMarkerError, match=r"Row 4 .*'### Response:\\n'.*'hello'.*drop_without_marker"):
        marked("hello")


@pytest.mark.parametrize("rest", ["", "\n", "<end>", "\n <end>"])
def test_a_marker_that_nothing_follows(rest):
    with pytest.raises(NoMarkerError, match=r"Row 4 .*'### Response:\\n'.*no answer follows it.*drop_without_marker"):
        marked(ONE + rest)


@pytest.mark.parametrize("prompt", ["q\n\n### Response:\n", "#\n### Response:\n", "aa### Response:\n"])
@pytest.mark.parametrize("answer", ["\nb", "\n\nb", "b", "# b", " w", "é"])
def test_the_marker_is_found_whatever_tokens_it_falls_into(prompt, answer):
    """With ":\\n" and "\\n\\n" as tokens the end of the marker is another one before every other answer."""
    options = RowOptions(answer_marker="### Response:\n")
    tokenizer = byte_tokenizer()
    row = marked_row({"text": prompt + answer}, 0, options, tokenizer, ["<|im_end|>"])
    text = prompt + answer + "<|im_end|>"
    assert row["input_ids"] == tokenizer(text)["input_ids"]
    # A token that holds characters of both is the answer's.
    (found,) = answers(row, tokenizer)
    assert found.endswith(answer + "<|im_end|>") and len(found) <= len(answer + "<|im_end|>") + 2


def test_the_same_labels_as_prompt_and_completion():
    """Word by word, where no token holds characters of both."""
    tokenizer = tiny_tokenizer()
    row = marked_row(
        {"text": "w1 w2 assistant : w3 w4"}, 0, RowOptions(answer_marker="assistant :"), tokenizer, ["</s>"]
    )
    assert row["labels"] == [-100] * 4 + tokenizer("w3 w4</s>")["input_ids"]
    tail = marked_row(
        {"text": "w1 assistant : w3 </s>"}, 0, RowOptions(answer_marker="assistant :"), tokenizer, ["</s>"]
    )
    assert tail["labels"] == [-100] * 3 + tokenizer("w3 </s>")["input_ids"]


TEXTS = st.text(st.sampled_from("ab#: \nw"), max_size=12)


@given(st.lists(st.tuples(TEXTS, TEXTS.filter(len)), min_size=1, max_size=3))
def test_tokens_of_answers_are_labels_and_others_are_not(parts):
    tokenizer = byte_tokenizer()
    text, spans = "", []
    for prompt, answer in parts:
        text += prompt
        spans.append((len(text), len(text) + len(answer)))
        text += answer
    row = encode(text, spans, tokenizer)
    places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for (start, stop), token, label in zip(places, row["input_ids"], row["labels"], strict=True):
        holds = any(start < end and stop > begin for begin, end in spans)
        assert label == (token if holds else -100)


class Slow:
    """A tokenizer that does not say which characters a token holds."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}


def test_slow_tokenizers_give_the_same_labels():
    fast = byte_tokenizer()
    for text, spans in (("one two three", [(4, 7)]), ("ab## w", [(0, 2), (4, 6)]), ("x", [(0, 1)])):
        assert encode(text, spans, Slow(fast)) == encode(text, spans, fast)
