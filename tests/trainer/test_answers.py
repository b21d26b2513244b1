"""Rows as people have them train without a flag, and their answers are the ones meant; what cannot work is named."""

import json
import logging

import pytest
from chat import CHATML, answers, byte_model, byte_tokenizer, template
from datasets import Dataset, IterableDataset
from models import conversation_rows, prompt_completion_rows, tiny_tokenizer
from training import SETTINGS, echo_trainer, lora_config, losses, plain_trainer
from trl import SFTConfig

from echo_trainer import EchoSFTConfig, EchoSFTTrainer

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOL = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {}}}])


def chats(n=8, turns=2):
    """Conversations of an even number of messages, each text another one."""
    return [
        {
            "messages": [
                {"role": role, "content": f"{role} {i} {turn}"}
                for turn in range(turns)
                for role in ("user", "assistant")
            ]
        }
        for i in range(n)
    ]


def on_bytes(folder, rows, chat_template=CHATML, trainer_kwargs=None, **settings):
    """A trainer on a tokenizer that reads every text."""
    return EchoSFTTrainer(
        model=byte_model(),
        args=EchoSFTConfig(output_dir=str(folder), **{**SETTINGS, "max_steps": 2, "echo_p_end": 1.0, **settings}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=byte_tokenizer(chat_template),
        peft_config=lora_config(init_lora_weights=True),
        **(trainer_kwargs or {}),
    )


def said(trainer):
    """The answers of every training row, as text."""
    return [answers(row, trainer.processing_class) for row in trainer.train_dataset]


def test_conversations_train_with_default_options(tmp_path, caplog):
    trainer = echo_trainer(tmp_path / "a", rows=conversation_rows(24), max_steps=3)
    assert trainer.args.assistant_only_loss is True
    assert len([r for r in caplog.records if "assistant_only_loss=True is set" in r.getMessage()]) == 1
    trainer.train()
    by_hand = echo_trainer(tmp_path / "b", rows=conversation_rows(24), max_steps=3, assistant_only_loss=True)
    by_hand.train()
    assert losses(trainer) == losses(by_hand)
    labels = plain_trainer(tmp_path / "c", rows=conversation_rows(24), assistant_only_loss=True).train_dataset[
        "labels"
    ]
    assert trainer.train_dataset["labels"] == labels == by_hand.train_dataset["labels"]


def test_an_sft_config_says_nothing_about_it(tmp_path):
    trainer = EchoSFTTrainer(
        model=byte_model(),
        args=SFTConfig(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list(chats()),
        processing_class=byte_tokenizer(),
        peft_config=lora_config(),
    )
    assert said(trainer)[0] == ["assistant 0 0<|im_end|>\n", "assistant 0 1<|im_end|>\n"]


def test_switched_off_by_hand_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"assistant_only_loss=False trains on all of their tokens.*Leave"):
        echo_trainer(tmp_path, rows=conversation_rows(8), assistant_only_loss=False)
    # Where it changes nothing it may be said.
    echo_trainer(tmp_path, rows=prompt_completion_rows(8), assistant_only_loss=False)


def test_with_the_echo_off_nothing_is_switched_on(tmp_path):
    off = {"echo_p_start": 0.0, "echo_p_end": 0.0, "max_steps": 2}
    trainer = echo_trainer(tmp_path / "a", rows=conversation_rows(16), **off)
    plain = plain_trainer(tmp_path / "b", rows=conversation_rows(16), max_steps=2)
    trainer.train(), plain.train()
    assert losses(trainer) == losses(plain) and not trainer.args.assistant_only_loss


def test_a_configuration_serves_another_trainer_with_other_rows(tmp_path):
    args = EchoSFTConfig(output_dir=str(tmp_path), **SETTINGS)
    for rows in (conversation_rows(8), prompt_completion_rows(8)):
        trainer = EchoSFTTrainer(
            model=byte_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(),
            peft_config=lora_config(),
        )  # fmt: skip
        assert trainer.args is args
        assert bool(args.assistant_only_loss) == ("messages" in rows[0])


@pytest.mark.parametrize("family", ["qwen3", "llama3", "phi3"])
def test_families_with_a_training_template_of_trls(tmp_path, family):
    trainer = on_bytes(tmp_path, chats(), template(family))
    assert trainer.chat_template == template(f"{family}_training")
    first, second = said(trainer)[0]
    assert "assistant 0 0" in first and "assistant 0 1" in second and "user" not in first + second
    assert trainer.processing_class.chat_template == template(family)  # what is saved and served
    trainer.train()


@pytest.mark.parametrize("given", [{}, {"assistant_only_loss": True}])
def test_a_family_that_nobody_knows(tmp_path, given, caplog):
    trainer = on_bytes(tmp_path, chats(), **given)
    assert said(trainer)[3] == ["assistant 3 0<|im_end|>\n", "assistant 3 1<|im_end|>\n"]
    whole = trainer.processing_class.apply_chat_template(chats()[3]["messages"], tokenize=True, return_dict=True)
    assert trainer.train_dataset[3]["input_ids"] == whole["input_ids"]
    assert ("found by rendering" in caplog.text) is not bool(given)
    trainer.train()
    assert trainer.state.log_history[0]["echo/routed"] == 1


FORMS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 192},
    "packed, split": {"packing": True, "max_length": 192, "packing_strategy": "bfd_split"},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("known", [True, False], ids=["marked", "rendered"])
def test_every_layout(tmp_path, form, known):
    written = template("qwen2_5_vl_training") if known else CHATML
    trainer = on_bytes(tmp_path, chats(24), written, **FORMS[form])
    texts = [text for row in said(trainer) for text in row]
    assert sorted(texts) == sorted(f"assistant {i} {turn}<|im_end|>\n" for i in range(24) for turn in range(2))
    trainer.train()
    assert trainer.state.log_history[-2]["echo/unroutable"] == 0


@pytest.mark.parametrize("known", [True, False], ids=["marked", "rendered"])
def test_streams(tmp_path, known):
    written = template("llama3_training") if known else CHATML
    rows = chats(16)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = on_bytes(tmp_path, stream, written)
    found = [answers(row, trainer.processing_class) for row in trainer.train_dataset]
    assert [len(row) for row in found] == [2] * 16 and all("user" not in "".join(row) for row in found)
    trainer.train()
    assert len(losses(trainer)) == 2


def test_tools_calls_and_switches(tmp_path):
    messages = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "content": "seven"},
        {"role": "assistant", "content": "it is seven"},
    ]
    row = {"messages": messages, "tools": TOOL, "chat_template_kwargs": {"enable_thinking": False}}
    trainer = on_bytes(tmp_path / "a", [row] * 8)
    call, answer = said(trainer)[0]
    assert call == '<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call><|im_end|>\n'
    assert answer == "it is seven<|im_end|>\n"
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert '{"type": "function", "function": {"name": "look"' in text and text.count("<think>") == 2
    known = on_bytes(tmp_path / "b", [row] * 8, template("qwen3"))
    call, answer = said(known)[0]
    assert (
        '<tool_call>\n{"name": "look"' in call and "it is seven" in answer and "seven\n</tool_response>" not in answer
    )


@pytest.mark.parametrize("written", [CHATML, template("qwen3")], ids=["rendered", "marked"])
def test_switches_of_some_rows(tmp_path, written):
    """A dataset has None where a row has no switches, which TRL cannot unpack."""
    rows = chats(4)
    rows[0]["chat_template_kwargs"] = {"enable_thinking": False}
    trainer = on_bytes(tmp_path, rows, written)
    assert [len(row) for row in said(trainer)] == [2] * 4
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:2]} for row in rows]
    pairs[1]["chat_template_kwargs"] = {"enable_thinking": False}
    assert all(said(on_bytes(tmp_path / "b", pairs, written)))


def test_roles_that_only_the_template_knows(tmp_path):
    messages = [
        *chats(1)[0]["messages"],
        {"role": "ipython", "content": "7"},
        {"role": "assistant", "content": "seven"},
    ]
    trainer = on_bytes(tmp_path, [{"messages": messages}] * 8)
    assert said(trainer)[0][-1] == "seven<|im_end|>\n"
    assert "<|im_start|>ipython\n7" in trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])


@pytest.mark.parametrize("off", [{}, {"echo_p_start": 0.0, "echo_p_end": 0.0}], ids=["on", "off"])
@pytest.mark.parametrize("rows", [[{"text": "x"}] * 4, prompt_completion_rows(4)], ids=["text", "pair"])
def test_turns_of_rows_that_have_none(tmp_path, rows, off):
    with pytest.raises(ValueError, match="assistant_only_loss=True needs conversations"):
        echo_trainer(tmp_path, rows=rows, assistant_only_loss=True, **off)


def test_with_the_echo_off_turns_are_those_of_trl_also_where_trl_has_none(tmp_path):
    """For the comparison with plain LoRA: what TRL can mask is masked as TRL does, and the rest is."""
    off = {"echo_p_start": 0.0, "echo_p_end": 0.0, "assistant_only_loss": True, "max_steps": 2}
    trainer = echo_trainer(tmp_path / "a", rows=conversation_rows(16), **off)
    plain = plain_trainer(tmp_path / "b", rows=conversation_rows(16), assistant_only_loss=True, max_steps=2)
    trainer.train(), plain.train()
    assert losses(trainer) == losses(plain)
    unknown = on_bytes(tmp_path / "c", chats(), **off)
    assert said(unknown) == said(on_bytes(tmp_path / "d", chats()))


def test_harmony(tmp_path):
    messages = [
        {"role": "system", "content": "reasoning language: German", "thinking": None},
        {"role": "user", "content": "why?", "thinking": None},
        {"role": "assistant", "content": "because", "thinking": "darum"},
    ]
    rows = [{"reasoning_language": "German", "user": "why?", "final": "because", "messages": messages}] * 8
    trainer = on_bytes(tmp_path, rows, template("gptoss"))
    (answer,) = said(trainer)[0]
    assert "<|channel|>analysis<|message|>darum<|end|>" in answer
    assert answer.endswith("<|channel|>final<|message|>because<|return|>")
    trainer.train()


def test_sharegpt(tmp_path):
    turns = [{"from": "human", "value": "h1"}, {"from": "gpt", "value": "g1"}, {"from": "human", "value": "h2"},
             {"from": "gpt", "value": "g2"}]  # fmt: skip
    rows = [{"conversations": [{"from": "system", "value": "be brief"}, *turns], "source": "x"}] * 8
    trainer = on_bytes(tmp_path / "a", rows)
    assert said(trainer)[0] == ["g1<|im_end|>\n", "g2<|im_end|>\n"]
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text.startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nh1<|im_end|>\n<|im_start|>assistant\n"
    )
    known = on_bytes(
        tmp_path / "b", rows, template("llama3"), trainer_kwargs={"eval_dataset": Dataset.from_list(rows)}
    )
    assert said(known)[0] == ["g1<|eot_id|>", "g2<|eot_id|>"]
    assert known.eval_dataset["labels"] == known.train_dataset["labels"]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert [answers(row, byte_tokenizer()) for row in on_bytes(tmp_path / "c", stream).train_dataset] == said(trainer)


def test_columns_that_look_like_another_format(tmp_path):
    """UltraChat has `prompt` beside `messages`; TRL takes such a row for prompt and completion and fails."""
    rows = [{**row, "prompt": "user", "prompt_id": "7"} for row in chats()]
    trainer = on_bytes(tmp_path, rows)
    assert said(trainer)[0] == ["assistant 0 0<|im_end|>\n", "assistant 0 1<|im_end|>\n"]
    trainer.train()


def test_evaluation_rows_get_their_answers_as_well(tmp_path):
    trainer = on_bytes(tmp_path, chats(), trainer_kwargs={"eval_dataset": Dataset.from_list(chats(4))})
    assert trainer.eval_dataset["labels"] == trainer.train_dataset["labels"][:4]
    given = trainer.evaluate(eval_dataset=Dataset.from_list(chats(4)))["eval_loss"]
    assert given == trainer.evaluate()["eval_loss"]


def test_a_tokenizer_without_a_template(tmp_path):
    with pytest.raises(ValueError, match=r"conversations, and the tokenizer has no chat template.*chat_template_path"):
        on_bytes(tmp_path, chats(), None)


def test_a_conversation_without_an_answer_is_named_by_its_number(tmp_path):
    rows = [*chats(5), {"messages": [{"role": "user", "content": "hello?"}]}]
    for written in (CHATML, template("llama3")):
        with pytest.raises(ValueError, match=r"Row 5 \(the first is row 0\) has no turn of the assistant"):
            on_bytes(tmp_path, rows, written)


# Text

MARK = "### Response:\n"
ALPACA = [{"text": f"### Instruction:\nask {i}\n\n{MARK}say {i}"} for i in range(12)]


def test_text_with_a_marker(tmp_path):
    trainer = on_bytes(tmp_path, ALPACA, answer_marker=MARK)
    assert said(trainer) == [[f"say {i}<|im_end|>"] for i in range(12)]
    trainer.train()
    assert trainer.state.log_history[0]["echo/routed"] == 1
    pairs = [{"prompt": f"### Instruction:\nask {i}\n\n{MARK}", "completion": f"say {i}"} for i in range(12)]
    same = on_bytes(tmp_path / "b", pairs)
    same.train()
    assert same.train_dataset["labels"] == trainer.train_dataset["labels"]
    assert losses(same) == losses(trainer)


@pytest.mark.parametrize("form", FORMS)
def test_text_with_a_marker_in_every_layout(tmp_path, form):
    trainer = on_bytes(tmp_path, ALPACA * 3, answer_marker=MARK, **FORMS[form])
    assert sorted(t for row in said(trainer) for t in row) == sorted(
        f"say {i}<|im_end|>" for i in range(12)
    ) * 0 + sorted(f"say {i}<|im_end|>" for i in range(12) for _ in range(3))
    trainer.train()


def test_streams_of_text_with_a_marker(tmp_path):
    rows = [*ALPACA, {"text": "nothing"}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = on_bytes(tmp_path, stream, answer_marker=MARK, drop_without_marker=True)
    assert len(list(trainer.train_dataset)) == 12
    trainer.train()


def test_text_of_several_turns(tmp_path):
    text = "### Human: a### Assistant: b### Human: c### Assistant: d"
    marks = {"answer_marker": "### Assistant:", "prompt_marker": "### Human:"}
    trainer = on_bytes(tmp_path, [{"text": text}] * 8, **marks)
    assert said(trainer)[0] == [" b", " d<|im_end|>"]
    trainer.train()


def test_text_of_another_column(tmp_path):
    rows = [{"content": row["text"], "text": "something else"} for row in ALPACA]
    trainer = on_bytes(tmp_path, rows, answer_marker=MARK, dataset_text_field="content")
    assert said(trainer)[1] == ["say 1<|im_end|>"]


def test_a_formatting_func_with_a_marker(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(8)]
    function = {"formatting_func": lambda row: f"{row['question']}\n{MARK}{row['answer']}"}
    trainer = on_bytes(tmp_path, rows, answer_marker=MARK, trainer_kwargs=function)
    assert said(trainer)[2] == ["a2<|im_end|>"]
    # TRL refuses one beside these columns.
    pairs = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    function = {"formatting_func": lambda row: f"{row['prompt']}\n{MARK}{row['completion']}"}
    trainer = on_bytes(tmp_path / "b", pairs, answer_marker=MARK, trainer_kwargs=function)
    assert said(trainer)[2] == ["a2<|im_end|>"]
    trainer.train()


def test_a_formatting_func_that_writes_what_the_template_writes(tmp_path):
    tokenizer = byte_tokenizer()

    def function(row):
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)

    trainer = on_bytes(tmp_path, chats(), trainer_kwargs={"formatting_func": function})
    assert said(trainer)[0] == ["assistant 0 0<|im_end|>\n", "assistant 0 1<|im_end|>\n"]
    with pytest.raises(ValueError, match=r"(?s)Row 0 .*write it differently.*writes\n'Once'.*answer_marker"):
        on_bytes(tmp_path, chats(), trainer_kwargs={"formatting_func": lambda row: "Once"})


def test_a_row_without_the_marker(tmp_path, caplog):
    rows = [*ALPACA[:3], {"text": "no marker"}, *ALPACA[3:]]
    with pytest.raises(ValueError, match=r"Row 3 \(the first is row 0\) does not hold the answer marker.*no marker"):
        on_bytes(tmp_path, rows, answer_marker=MARK)
    trainer = on_bytes(tmp_path, rows, answer_marker=MARK, drop_without_marker=True)
    assert len(trainer.train_dataset) == 12
    assert "1 of 13 rows do not hold" in caplog.text and "no answer left after truncation" not in caplog.text


def test_the_marker_without_an_echo_masks_the_same(tmp_path):
    """For the comparison with plain LoRA."""
    off = {"echo_p_start": 0.0, "echo_p_end": 0.0}
    labels = on_bytes(tmp_path / "a", ALPACA, answer_marker=MARK, **off).train_dataset["labels"]
    assert labels == on_bytes(tmp_path / "b", ALPACA, answer_marker=MARK).train_dataset["labels"]


@pytest.mark.parametrize(
    ("rows", "settings", "match"),
    [
        (chats(), {"answer_marker": MARK}, "looked for in text, and the rows are a conversation"),
        (prompt_completion_rows(4), {"answer_marker": MARK}, "the rows are prompt and completion"),
        ([{"input_ids": [9, 10], "labels": [-100, 10]}], {"answer_marker": MARK}, "the rows are token ids"),
        (ALPACA, {"answer_marker": MARK, "dataset_text_field": "words"}, "dataset_text_field"),
        (ALPACA, {}, "answer_marker, such as"),
    ],
    ids=["conversation", "pair", "tokens", "another column", "no marker"],
)
def test_markers_where_there_is_no_text(tmp_path, rows, settings, match):
    with pytest.raises(ValueError, match=match):
        on_bytes(tmp_path, rows, **settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"completion_only_loss": False}, r"`completion_only_loss=False` trains on prompts as well"),
        ({"prompt_marker": "x"}, "`prompt_marker` is set and `answer_marker` is not"),
        ({"drop_without_marker": True}, "`drop_without_marker` is set and `answer_marker` is not"),
        ({"answer_marker": ""}, "`answer_marker` is ''"),
        ({"answer_marker": 3}, "`answer_marker` is 3"),
    ],
)
def test_options_that_cannot_work(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        EchoSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_completion_only_loss_off_where_the_turns_are_the_answers(tmp_path):
    """Both options together are the turns of prompt and completion, as in TRL."""
    pairs = [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in conversation_rows(8)]
    options = {"completion_only_loss": False, "assistant_only_loss": True}
    trainer = echo_trainer(tmp_path / "a", rows=pairs, **options)
    plain = plain_trainer(tmp_path / "b", rows=pairs, **options)
    assert trainer.train_dataset["labels"] == plain.train_dataset["labels"]


def test_markers_on_the_command_line_and_in_a_recipe(tmp_path):
    from echo_trainer.recipe.arguments import parse

    there = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text('answer_marker: "### Response:\\n"\nprompt_marker: "### Instruction:\\n"\n')
    for arguments in (
        ["--answer_marker", "### Response:\\n", "--prompt_marker", "### Instruction:\\n"],
        ["--config", str(recipe)],
    ):
        config = parse([*arguments, *there])[1]
        assert (config.answer_marker, config.prompt_marker) == (MARK, "### Instruction:\n")
        assert config.assistant_only_loss is None
    assert parse(["--assistant_only_loss", "false", *there])[1].assistant_only_loss is False
    assert parse(["--assistant_only_loss", *there])[1].assistant_only_loss is True  # a flag, as in TRL


def test_it_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    evaluated = {name: Dataset.from_list(chats()) for name in ("a", "b")}
    trainer = on_bytes(tmp_path, chats(), trainer_kwargs={"eval_dataset": evaluated})
    trainer.train()
    trainer.evaluate(eval_dataset=Dataset.from_list(chats(2)))
    assert caplog.text.count("assistant_only_loss=True is set") == 1
