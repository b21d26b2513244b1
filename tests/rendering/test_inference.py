"""The prompt of training beside that of inference: what differs is said with both texts, what agrees is not."""

import logging

import pytest
from chat import CHATML, byte_tokenizer
from models import CHAT_TEMPLATE, conversation_rows, prompt_completion_rows, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from training import echo_trainer

from echo_trainer.rendering.forms import RowOptions
from echo_trainer.rendering.inference import disagreements
from echo_trainer.rendering.rendering import Rendering

UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
OTHER_PROMPT = "{% if add_generation_prompt %}assistant : w9 {% endif %}"
ASKED = "{% if add_generation_prompt %}assistant : {% endif %}"
CHAT = {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]}
PAIR = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
TURNS = {"messages": CHAT["messages"] * 2}


def said(row, template=CHAT_TEMPLATE, stops=(1,), **options):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return disagreements(row, Rendering(RowOptions(**options), tokenizer), stops)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("row", [CHAT, TURNS, PAIR], ids=["conversation", "turns", "pair"])
def test_nothing_is_said_where_both_agree(row, template):
    assert said(row, template) == []


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": "w1 w2", "completion": " w3"}, {}),
        ({"text": "w1 w2 assistant : w3"}, {"answer_marker": "assistant : "}),
        ({"text": "w1 w2"}, {}),
        ({"input_ids": [5, 6], "labels": [-100, 6]}, {}),
    ],
    ids=["text", "marker", "no marker", "tokens"],
)
def test_nothing_is_said_of_text(row, options):
    assert said(row, **options) == []


@pytest.mark.parametrize("row", [CHAT, PAIR], ids=["conversation", "pair"])
def test_another_generation_prompt_is_said_with_both_texts(row):
    """The template asks with other words than it writes before an answer: the usual mistake."""
    template = CHAT_TEMPLATE.replace(ASKED, OTHER_PROMPT)
    (message,) = said(row, template, stops=())
    assert "'user : w1 w2 assistant :'" in message and "'user : w1 w2 assistant : w9'" in message
    assert "from token 6 on" in message


def test_no_generation_prompt_at_all():
    template = CHAT_TEMPLATE.replace(ASKED, "")
    (message,) = said(CHAT, template)
    assert "'user : w1 w2'" in message and "'user : w1 w2 assistant :'" in message


def test_words_before_the_answer_that_only_training_writes():
    """As templates do that put an empty thought before the answers of training."""
    template = CHAT_TEMPLATE.replace("{% generation %}", "{{ 'w8 ' }}{% generation %}")
    (message,) = said(CHAT, template)
    assert "assistant : w8'" in message


@pytest.mark.parametrize("row", [CHAT, TURNS, PAIR], ids=["conversation", "turns", "pair"])
def test_an_end_that_is_not_learned(row):
    template = CHAT_TEMPLATE.replace(" </s>", "")
    messages = said(row, template)
    assert len(messages) == 1 and "'</s>'" in messages[0] and "'w3'" in messages[0]


def test_an_end_outside_of_the_marks():
    template = CHAT_TEMPLATE.replace(" + ' </s>' }}{% endgeneration %}", " }}{% endgeneration %}{{ ' </s>' }}")
    assert template != CHAT_TEMPLATE
    assert any("may not learn to stop" in message for message in said(CHAT, template))


def test_a_template_that_fails_when_it_is_asked():
    template = CHAT_TEMPLATE.replace(ASKED, "{% if add_generation_prompt %}{{ raise_exception('no!') }}{% endif %}")
    assert any("no!" in message for message in said(CHAT, template))


@pytest.mark.parametrize("echo", [True, False], ids=["echo", "off"])
def test_the_trainer_says_it_once_before_training(tmp_path, caplog, echo):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(ASKED, OTHER_PROMPT)
    settings = {} if echo else {"echo_p_start": 0.0, "echo_p_end": 0.0, "assistant_only_loss": True}
    trainer = echo_trainer(
        tmp_path, rows=conversation_rows(8), max_steps=1, trainer_kwargs={"processing_class": tokenizer}, **settings
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.train()
    found = [record.message for record in caplog.records if "in training and in use" in record.message]
    assert len(found) == echo


def said_of_bytes(row, tokenizer, function=None, **options):
    return disagreements(row, Rendering(RowOptions(**options), tokenizer, function), (1,))


def asked(row):
    return f"Q: {row['q']}\nA:{row['a']}"


def test_a_text_of_the_chat_template_with_two_begins():
    """The template writes the begin token and the tokenizer adds it: training sees two, whoever asks sends one."""
    tokenizer = byte_tokenizer("{{ '<bos>' }}" + CHATML)
    text = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert said_of_bytes({"text": text}, tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    (message,) = said_of_bytes({"text": text}, tokenizer)
    assert "'<bos><bos>" in message and "from token 1 on" in message


@pytest.mark.parametrize(
    ("answer", "marker", "agrees"),
    [(" yes", "\nA:", True), ("\nyes", "\nA:", False), (" was", "\nA: ", False)],
    ids=["whole tokens", "a token over the end of the marker", "a marker that ends in a space"],
)
@pytest.mark.parametrize("formatting", [True, False], ids=["formatting_func", "text"])
def test_tokens_across_the_end_of_a_marker(answer, marker, agrees, formatting):
    row = {"q": "x", "a": answer}
    row = row if formatting else {"text": asked(row)}
    found = said_of_bytes(row, byte_tokenizer(), asked if formatting else None, answer_marker=marker)
    assert [*(message.split(",")[0] for message in found)] == (
        [] if agrees else ["The first row's prompt is written differently in training and in use"]
    )


def test_a_formatting_func_that_writes_the_conversation_is_compared():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(ASKED, OTHER_PROMPT)

    def function(row):
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)

    (message, *_) = disagreements(CHAT, Rendering(RowOptions(), tokenizer, function), ())
    assert "'user : w1 w2 assistant : w9'" in message


def test_a_formatting_func_that_agrees_says_nothing(tmp_path, caplog):
    rows = [{"question": f"w{n} w2", "answer": "w3"} for n in range(8)]
    kwargs = {"formatting_func": lambda row: f"{row['question']} : {row['answer']}"}
    trainer = echo_trainer(tmp_path, rows=rows, max_steps=1, answer_marker=": ", trainer_kwargs=kwargs)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.log_history[0]["echo/routed"] > 0
    assert not [r for r in caplog.records if "first row" in r.message]


def test_a_usual_run_says_nothing(tmp_path, caplog):
    trainer = echo_trainer(tmp_path, rows=prompt_completion_rows(8), max_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert not [r for r in caplog.records if "first row" in r.message]
