"""`trainer.distill()`: an ordinary training on both kinds of rows, exact in its batches, its loss and its resume."""

import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from models import conversation_rows, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from training import adapter, assert_equal, echo_trainer, losses

from echo_trainer import DistillOptions
from echo_trainer.labelling.soft import SoftCollator

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt": row["prompt"]} for row in prompt_completion_rows(9, seed=8)]


def ending_model():
    """A random model that ends an answer now and then."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[1] *= 2
    return model


def trained(folder, prompts=PROMPTS, echo=True, **settings):
    """A trainer after its first training."""
    form = {"echo_preset": "strong"} if echo else {"echo_p_start": 0.0, "echo_p_end": 0.0}
    unlabeled = Dataset.from_list(prompts) if isinstance(prompts, list) else prompts
    given = {"trainer_kwargs": {"unlabeled_dataset": unlabeled}, "max_steps": 2, "max_length": 64}
    trainer = echo_trainer(folder / "run", model=ending_model(), **{**given, **form, **settings})
    trainer.train()
    return trainer


def distilled(trainer, resume=None, training=None, **options):
    given = {"ratio": "1:3", "max_new_tokens": 8, "label_batch_size": 4, "soft_tokens": 5, **options}
    return trainer.distill(DistillOptions(**given), resume, **{"max_steps": 4, **(training or {})})


def lines(student):
    with open(f"{student.args.output_dir}/labels.jsonl") as file:
        return [json.loads(line) for line in file][1:]


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize(("teacher", "echo"), [("echo", True), ("plain", True), ("base", True), ("plain", False)])
def test_batches_and_record(tmp_path, teacher, echo, labels):
    """Also without an echo at all: self-training of an ordinary LoRA run."""
    trainer = trained(tmp_path, echo=echo)
    before = adapter(trainer)
    student = distilled(trainer, teacher=teacher, labels=labels)
    assert student.echo is None and student.model is trainer.model
    assert any(not torch.equal(before[name], value) for name, value in adapter(student).items())
    found = [line for line in lines(student) if line["fault"] is None]
    assert len(lines(student)) == 9 and 0 < len(found) < 9
    tokenizer = tiny_tokenizer()
    texts = [line["row"]["prompt"] + line["row"]["completion"] for line in found]
    taught = {(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts}
    n = 0
    for batch in student.get_train_dataloader():
        both = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in both]
        assert [row in taught for row in rows] == [False, True, True, True]
        assert ("teacher_tokens" in batch) == (labels == "soft")
        n += 1
    assert n == student.state.global_step == 4
    student.save_model()
    record = json.loads((tmp_path / "run" / "distilled" / "echo_run.json").read_text())
    assert record["distillation"]["counts"]["kept"] == len(found) == record["distillation"]["n_taught"]
    assert record["distillation"]["teacher"] == teacher and record["distillation"]["n_labelled"] == 40
    assert record["data"]["n_train"] == 40 and not record["echo"]["enabled"]


@pytest.mark.parametrize("form", ["format", "example"])
def test_nothing_of_prompts_and_answers_in_card_and_record(tmp_path, form):
    """Words that stand in no labelled row do not reach what is published."""
    rows = [{"prompt": f"w{i % 7} w{i % 5} w9", "completion": f" w{i % 3}"} for i in range(24)]
    prompts = [{"prompt": f"w40 w{41 + i} w{30 + i} w45"} for i in range(9)]
    secret = [f"w{i}" for i in range(30, 50)]
    trainer = trained(tmp_path, prompts, rows=rows, card_prompt=form)
    student = distilled(trainer)
    student.save_model()
    folder = tmp_path / "run" / "distilled"
    assert any(word in (folder / "labels.jsonl").read_text().split() for word in secret)
    for name in ("README.md", "echo_run.json", "distill.json"):
        text = (folder / name).read_text()
        found = [word for word in secret if f"{word} " in text or f'{word}"' in text]
        assert not found, (name, found)
    card = (folder / "README.md").read_text()
    assert "prompts without answers" in card and "the echo pass" in card
    published = {path.name for path in folder.iterdir()}
    assert {"labels.jsonl", "distill.json"} <= published  # beside the run, for its owner


def test_soft_loss_is_the_reference(tmp_path):
    """Cross-entropy of labelled rows and KD of taught ones, token by token in float64."""
    trainer = trained(tmp_path)
    student = distilled(trainer, labels="soft", soft_temperature=2.0, training={"max_steps": 1})
    batch = next(iter(student.get_train_dataloader()))
    model = student.model.double().eval()
    total = 0.0
    for number in range(4):
        ids = batch["input_ids"][number][batch["attention_mask"][number].bool()]
        labels = batch["labels"][number][: len(ids)]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        places, taught = [t for t in range(1, len(ids)) if labels[t] != -100], int(batch["teacher_lengths"][number])
        assert taught == (len(places) if number else 0)
        for k, t in enumerate(places):
            if not taught:
                total -= math.log(float(logits[t - 1].softmax(-1)[labels[t]]))
                continue
            student_p = (logits[t - 1] / 2.0).softmax(-1).tolist()
            top, teacher_log = batch["teacher_tokens"][number, k].tolist(), batch["teacher_logs"][number, k].tolist()
            mine = [*(student_p[token] for token in top), sum(p for i, p in enumerate(student_p) if i not in top)]
            total += 4.0 * sum(math.exp(p) * (p - math.log(q)) for p, q in zip(teacher_log, mine, strict=True))
    n = int((batch["labels"][:, 1:] != -100).sum())
    found = student.compute_loss(student.model, dict(batch), num_items_in_batch=torch.tensor(n))
    assert float(found) == pytest.approx(total / n, rel=1e-5)
    assert float(student.compute_loss(student.model, dict(batch))) == pytest.approx(total / n, rel=1e-5)


def test_accumulation_changes_nothing(tmp_path):
    """2 micro-batches of 4 are a batch of 8: the same rows, and a loss over the tokens of all of them."""
    found = []
    for batch, accumulation in ((8, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        found.append(distilled(trained(tmp_path / str(batch)), labels="soft", training=sizes))
    one, two = found
    assert sorted(one.train_dataset["input_ids"]) == sorted(two.train_dataset["input_ids"])
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for name, value in adapter(one).items():
        assert torch.allclose(value, adapter(two)[name], atol=1e-5), name
    logged = one.state.log_history[0]
    assert 0 < logged["distill/kd"] < logged["loss"] < logged["distill/ce"]


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_resumed_it_ends_in_the_same_bits(tmp_path, labels):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole = distilled(trained(tmp_path / "a"), labels=labels, training=saving)
    again = trained(tmp_path / "b")
    first = distilled(again, labels=labels, training=saving)
    folder = f"{first.args.output_dir}/checkpoint-2"
    restarted = trained(tmp_path / "b")  # another process begins with the first training again
    second = distilled(restarted, folder, labels=labels, training=saving)
    assert second.state.global_step == 5
    assert_equal(adapter(whole), adapter(second))
    assert losses(whole)[-3:] == losses(second)[-3:]
    with pytest.raises(ValueError, match=r"under way with other rows: ratio '1:3' .now '1:1'"):
        distilled(trained(tmp_path / "b"), folder, labels=labels, training=saving, ratio="1:1")


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_it_is_evaluated_as_the_first_was(tmp_path, labels):
    held_out = Dataset.from_list(prompt_completion_rows(6, seed=5))
    datasets = {"unlabeled_dataset": Dataset.from_list(PROMPTS), "eval_dataset": held_out}
    trainer = trained(tmp_path, trainer_kwargs=datasets, eval_strategy="steps", eval_steps=2)
    student = distilled(trainer, labels=labels)
    found = [entry["eval_loss"] for entry in student.state.log_history if "eval_loss" in entry]
    assert len(found) == 2 and found[-1] == pytest.approx(student.evaluate()["eval_loss"])
    again = trainer.evaluate()  # of the same model, with a collator that knows no distributions
    assert again["eval_loss"] == pytest.approx(found[-1], rel=1e-5)


def test_epochs_are_passes_through_the_taught_rows(tmp_path):
    student = distilled(trained(tmp_path), training={"max_steps": -1, "num_train_epochs": 2.0})
    n = student.distillation.record["n_taught"]
    assert student.state.global_step == math.ceil(2 * n / 3)


def test_a_fresh_adapter(tmp_path):
    trainer = trained(tmp_path)
    student = distilled(trainer, start="fresh", training={"learning_rate": 1e-9})
    assert trainer.model is student.model and trainer.echo is None
    assert all(value.abs().max() < 1e-6 for name, value in adapter(student).items() if "lora_B" in name)
    assert trainer.model.peft_config["default"].r == 4


def test_messages(tmp_path):
    prompts = [{"prompt": row["messages"][:1]} for row in conversation_rows(9, seed=3)]
    student = distilled(trained(tmp_path, prompts, rows=conversation_rows(20)), labels="soft")
    assert student.state.global_step == 4
    assert any(line["row"]["completion"][0]["role"] == "assistant" for line in lines(student))


def test_long_answers_are_cut_with_their_distributions():
    def collate(rows):
        return {"labels": torch.tensor([row["labels"] for row in rows])}

    ids = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    row = {**ids, "teacher_tokens": [[1], [2], [3]], "teacher_logs": [[0.0, -1.0]] * 3}
    empty = {**ids, "teacher_tokens": None, "teacher_logs": None}
    start, end = (SoftCollator(collate, keep_end)([empty, row]) for keep_end in (False, True))
    assert start["teacher_tokens"][1].flatten().tolist() == [1, 2]
    assert end["teacher_tokens"][1].flatten().tolist() == [2, 3]
    assert start["teacher_lengths"].tolist() == [0, 2]
    assert start.keys() == {"labels", "teacher_tokens", "teacher_logs", "teacher_lengths"}


# What cannot work


def test_no_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"no prompts to label\. Give EchoSFTTrainer `unlabeled_dataset=`"):
        distilled(trained(tmp_path, None))


def test_no_echo_to_teach(tmp_path):
    with pytest.raises(ValueError, match="needs echo networks, and there are none"):
        distilled(trained(tmp_path, echo=False))


def test_frozen_prefixes_are_kept_in_the_second_training_too(tmp_path):
    upper = {
        "lora": lora_config(init_lora_weights=True, target_modules=["q_proj", "v_proj"], layers_to_transform=[3, 4])
    }
    upper |= {"echo_source_layers": [4], "echo_target_layers": [3]}
    found = {}
    for keep in (False, True):
        trainer = trained(tmp_path / str(keep), frozen_prefix_cache=keep, **upper)
        found[keep] = losses(distilled(trainer))
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    with pytest.raises(ValueError, match="`frozen_prefix_cache=True` does not go together with"):
        distilled(trainer, labels="soft", training={"output_dir": str(tmp_path / "soft")})


def test_an_echo_that_was_found_useless(tmp_path, caplog):
    """A run that went on without it has no teacher any more; one that kept it is told."""
    datasets = {
        "unlabeled_dataset": Dataset.from_list(PROMPTS),
        "eval_dataset": Dataset.from_list(prompt_completion_rows(6, seed=5)),
    }
    judged = {"trainer_kwargs": datasets, "echo_probation": 1, "echo_learning_rate": 1e-9}  # it learns nothing
    with pytest.raises(ValueError, match=r"at step 1, and the run went on without it .echo_when_useless='stop'."):
        distilled(trained(tmp_path / "stop", echo_when_useless="stop", **judged))
    kept = trained(tmp_path / "say", **judged)
    caplog.clear()
    distilled(kept)
    assert "At step 1 the echo predicted held-out answers no better" in caplog.text
    assert distilled(trained(tmp_path / "plain", echo_when_useless="stop", **judged), teacher="plain").echo is None


@pytest.mark.parametrize(("given", "message"), [
    ({"training": {"learningrate": 1}}, "learningrate is no option of EchoSFTConfig"),
    ({"training": {"packing": True}}, "the ratio of labelled to taught rows is kept by counting"),
    ({"training": {"per_device_train_batch_size": 6}}, "Write a multiple of 4"),
    ({"min_confidence": 1.0}, "None of the 9 answers of the teacher 'echo' can be trained on: .* less sure than"),
    ({"labels": "soft", "training": {"padding_free": True, "max_length": None}}, "does not go together"),
    ({"training": {"max_length": 4}}, "No answer is left after truncation to max_length=4"),
])  # fmt: skip
def test_what_cannot_work(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        distilled(trained(tmp_path), **given)


def test_a_stream_of_labelled_rows(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(prompt_completion_rows(40)))
    with pytest.raises(ValueError, match="The training data is a stream"):
        distilled(trained(tmp_path, rows=stream))
    assert distilled(trained(tmp_path, rows=stream), ratio="0:1").state.global_step == 4


def test_distributions_do_not_go_with_an_echo(tmp_path):
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], "teacher_tokens": [[1]], "teacher_logs": [[-1.0, -0.5]]}] * 8
    with pytest.raises(ValueError, match=r"`echo_p_start=1\.0` does not go together with"):
        echo_trainer(tmp_path, rows=rows)
