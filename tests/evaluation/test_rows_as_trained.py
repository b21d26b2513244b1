"""What is evaluated is what was trained on: the NLL of rows is the training loss of the same rows, in every form."""

import json

import pytest
import torch
from chat import CHATML, byte_model, byte_tokenizer, template
from datasets import Dataset
from models import lora_config
from training import SETTINGS

from echo_trainer import EchoSFTConfig, EchoSFTTrainer, evaluate_adapter
from echo_trainer.ablation.data import held_out_task, load_tests
from echo_trainer.ablation.recipe import AblationRecipe
from echo_trainer.evaluation import evaluate_task
from echo_trainer.evaluation.tasks import prompt_completion_task
from echo_trainer.rendering.forms import RowOptions
from echo_trainer.rendering.rendering import Rendering
from echo_trainer.selection.samples import encode_rows

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}


def talk(i, turns=2):
    roles = ("user", "assistant")
    return [{"role": role, "content": f"{role} {i} {turn}"} for turn in range(turns) for role in roles]


def called(i):
    return [
        {"role": "user", "content": f"what is {i}?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "content": "seven"},
        {"role": "assistant", "content": f"it is {i}"},
    ]


def from_and_value(messages):
    """The same in the spelling of ShareGPT, whose calls are turns of their own."""
    speakers = {"user": "human", "assistant": "gpt", "tool": "observation"}
    return [
        {"from": "function_call", "value": json.dumps(message["tool_calls"][0]["function"])}
        if "tool_calls" in message
        else {"from": speakers[message["role"]], "value": message["content"]}
        for message in messages
    ]


CHATML_TEXT = "<|im_start|>user\nask {i}<|im_end|>\n<|im_start|>assistant\nsay {i}<|im_end|>\n"
SHARED = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
MARK = "### Response:\n"
FORMS = {
    "prompt and completion": (lambda i: {"prompt": f"ask {i}", "completion": f" say {i}"}, {}),
    "messages of both": (lambda i: {"prompt": talk(i)[:3], "completion": talk(i)[3:]}, {}),
    "both, with tools and switches": (lambda i: {"prompt": talk(i)[:1], "completion": talk(i)[1:2], **SHARED}, {}),
    "conversations": (lambda i: {"messages": talk(i, 1 + i % 3)}, {}),
    "calls of tools": (lambda i: {"messages": called(i), "tools": json.dumps(TOOLS)}, {}),
    "tools and switches": (lambda i: {"messages": talk(i), **SHARED}, {}),
    "sharegpt": (
        lambda i: {"conversations": [{"from": "human", "value": f"h {i}"}, {"from": "gpt", "value": f"g {i}"}]},
        {},
    ),
    "sharegpt with calls": (lambda i: {"conversations": from_and_value(called(i)), "tools": json.dumps(TOOLS)}, {}),
    "messages as json": (lambda i: {"messages": json.dumps(talk(i))}, {}),
    "contents in parts": (
        lambda i: {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk(i)]},
        {},
    ),
    "text of the template": (lambda i: {"text": CHATML_TEXT.format(i=i)}, {}),
    "text with a marker": (lambda i: {"text": f"ask {i}\n{MARK}say {i}"}, {"answer_marker": MARK}),
    "text of several turns": (
        lambda i: {"text": f"[Q] a{i} [A] b{i} [Q] c [A] d"},
        {"answer_marker": "[A]", "prompt_marker": "[Q]"},
    ),
}
TEMPLATES = {"unknown": CHATML, "trl": template("qwen3"), "marked": template("qwen2_5_vl_training")}


def trained(folder, rows, chat_template, settings, steps=1):
    return EchoSFTTrainer(
        model=byte_model(),
        args=EchoSFTConfig(
            output_dir=str(folder),
            **{**SETTINGS, "max_steps": steps, "per_device_train_batch_size": len(rows), **settings},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(chat_template),
        peft_config=lora_config(),
    )


def losses_of(trainer):
    """Summed loss and number of the answer tokens of every training row, from logits alone."""
    found = []
    trainer.model.eval()
    for row in trainer.train_dataset:
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        places = [place for place in range(1, len(row["labels"])) if row["labels"][place] != -100]
        found.append((-sum(float(logits[p - 1, row["labels"][p]]) for p in places), len(places)))
    return found


@pytest.mark.parametrize("written", TEMPLATES)
@pytest.mark.parametrize("form", FORMS)
def test_the_nll_of_rows_is_their_training_loss(tmp_path, form, written):
    make, settings = FORMS[form]
    rows = [make(i) for i in range(6)]
    trainer = trained(tmp_path, rows, TEMPLATES[written], settings)
    expected = losses_of(trainer)
    tokenizer = trainer.processing_class
    task = prompt_completion_task("t", rows, tokenizer=tokenizer, row_options=RowOptions.of(trainer.rows.record()))
    records = evaluate_task(trainer.model, tokenizer, task, mode="nll", batch_size=4)
    assert [record.n_tokens for record in records] == [count for _, count in expected]
    assert [record.nll for record in records] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    # And the loss that is logged: the first step has all rows and the weights as they were.
    trainer.train()
    mean = sum(loss for loss, _ in expected) / sum(count for _, count in expected)
    assert trainer.state.log_history[0]["echo/ce_plain"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    "form",
    ["tools and switches", "text with a marker", "text of the template", "conversations", "sharegpt with calls"],
)
def test_the_figures_of_a_saved_adapter(tmp_path, form):
    make, settings = FORMS[form]
    rows = [make(i) for i in range(6)]
    base = tmp_path / "base"
    byte_model().save_pretrained(base), byte_tokenizer().save_pretrained(base)
    trainer = EchoSFTTrainer(
        model=str(base),
        args=EchoSFTConfig(output_dir=str(tmp_path / "run"), **{**SETTINGS, "max_steps": 2, **settings}),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora_config(),
    )
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "run" / "echo_run.json").read_text())
    assert record["rows"]["answer_marker"] == settings.get("answer_marker")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = [loss for loss, _ in losses_of(trainer)]
    task = str(tmp_path / "rows.jsonl")
    found = evaluate_adapter(tmp_path / "run", [task], base=str(base), mode="nll", output=tmp_path / "out")
    assert found["results"][0]["value"] == pytest.approx(sum(expected) / 6, rel=1e-4)
    # The base alone has no record; what was said in training is said again.
    options = {"mode": "nll", "output": tmp_path / "base-out", **settings}
    assert evaluate_adapter(str(base), [task], **options)["results"][0]["n"] == 6


def test_tools_of_different_shapes(tmp_path):
    """A dataset fills in what the tools of other rows have; a row alone would be written without."""
    bare = {"type": "function", "function": {"name": "stop"}}
    rows = [{"messages": talk(i), "tools": [bare if i % 2 else TOOLS[0]]} for i in range(6)]
    trainer = trained(tmp_path, rows, CHATML, {})
    assert '"parameters": null' in trainer.processing_class.decode(trainer.train_dataset[1]["input_ids"])
    task = prompt_completion_task("t", rows, limit=2, seed=1, tokenizer=trainer.processing_class)
    records = evaluate_task(trainer.model, trainer.processing_class, task, mode="nll", batch_size=1)
    expected = losses_of(trainer)
    chosen = [next(i for i in range(6) if item.row["messages"] == rows[i]["messages"]) for item in task.items]
    assert [r.nll for r in records] == pytest.approx([expected[i][0] for i in chosen], rel=1e-5)
    mixed = [{"messages": talk(0), "tools": "[]"}, {"messages": talk(1), "tools": TOOLS}]
    with pytest.raises(ValueError, match=r"values of a column are of different kinds.*JSON text"):
        prompt_completion_task("t", mixed, tokenizer=trainer.processing_class)


def test_a_question_is_asked_as_it_was_trained():
    """For generation: prompt and reference, with tools and switches, by the template of training."""
    rows = [FORMS["tools and switches"][0](i) for i in range(3)]
    tokenizer = byte_tokenizer()
    task = prompt_completion_task("t", rows, tokenizer=tokenizer)
    first = task.items[0]
    assert '"name": "look"' in first.prompt and first.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "assistant 0 0<|im_end|>" in first.prompt and "assistant 0 1" not in first.prompt
    assert (first.reference, first.completion) == ("assistant 0 1", "assistant 0 1<|im_end|>\n")
    (example,) = Rendering(RowOptions(), tokenizer).examples(rows[:1])
    assert tokenizer.decode(example["input_ids"]) == first.prompt + first.completion
    known = prompt_completion_task("t", rows, tokenizer=byte_tokenizer(template("qwen3")))
    assert known.items[0].prompt.count("<think>\n\n</think>") == 2  # TRL's template writes it in every turn
    marked = RowOptions(answer_marker="[A]", prompt_marker="[Q]")
    text = prompt_completion_task("t", [FORMS["text of several turns"][0](7)], tokenizer=tokenizer, row_options=marked)
    assert (text.items[0].prompt, text.items[0].reference) == ("[Q] a7 [A] b7 [Q] c [A]", "d")


def test_layer_selection_reads_the_tokens_of_training(tmp_path):
    for form in ("both, with tools and switches", "tools and switches", "text with a marker"):
        make, settings = FORMS[form]
        rows = [make(i) for i in range(4)]
        trainer = trained(tmp_path, rows, CHATML, settings)
        rendering = Rendering(RowOptions.of(trainer.args), trainer.processing_class)
        samples = encode_rows(rows, trainer.processing_class, None, rendering)
        assert [s["input_ids"][0].tolist() for s in samples] == trainer.train_dataset["input_ids"], form


@pytest.mark.parametrize("form", ["conversations", "tools and switches", "text with a marker", "messages of both"])
def test_the_ablation_scores_what_it_trains_on(tmp_path, form):
    make, settings = FORMS[form]
    rows = [make(i) for i in range(12)]
    byte_model().save_pretrained(tmp_path / "base"), byte_tokenizer().save_pretrained(tmp_path / "base")
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = AblationRecipe(
        training={"model_name_or_path": str(tmp_path / "base"), "bf16": False, "use_cpu": True, **settings},
        train=[str(tmp_path / "train.jsonl")],
        tests=[{"name": "t", "file": str(tmp_path / "test.jsonl")}],
        learning_rates=[1e-3],
        arms=["lora", "echo"],
        adapters=["lora"],
        seeds=[0],
        validation_items=4,
    )
    trainer = trained(tmp_path / "run", rows, CHATML, settings)
    for task in (*load_tests(recipe), held_out_task(recipe, rows)):
        records = evaluate_task(trainer.model, trainer.processing_class, task, mode="nll")
        assert [r.nll for r in records] == pytest.approx([loss for loss, _ in losses_of(trainer)], rel=1e-5)
