"""Rows with no, one or two images: the right ones go with each row, and the losses are those of a run of all rows."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from families import vision_language_model
from models import conversation_rows, lora_config
from training import SETTINGS, assert_equal, losses, revive, trainable
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from vision import UNMARKED, PatchCollator, TokenizerOnly, idefics3, image_rows, llava, vision_tokenizer

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.passes import step
from echo_trainer.passes.echo import BATCH, ROWS
from echo_trainer.run.ownership import Ownership

LORA = r".*(text_model|language_model).*(q_proj|v_proj|up_proj)"


def qwen2_vl(places=False):
    return vision_language_model("qwen2_vl"), TokenizerOnly(vision_tokenizer()), PatchCollator(places)


FAMILIES = {
    "llava": llava,
    "idefics3": idefics3,
    "qwen2_vl": qwen2_vl,
    "qwen2_vl, places in three": partial(qwen2_vl, places=True),
}


def vision_trainer(folder, make, rows=None, **settings):
    model, processor, *collator = make()
    half = {"echo_p_start": 0.5, "echo_p_end": 0.5, "echo_learning_rate": 0.05, "max_length": None}
    settings = {**half, **settings}
    rows = image_rows(36) if rows is None else rows
    return EchoSFTTrainer(
        model=model,
        args=EchoSFTConfig(
            output_dir=str(folder), **{**SETTINGS, "per_device_train_batch_size": 3, "max_steps": 8, **settings}
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=lora_config(target_modules=LORA),
        data_collator=collator[0] if collator else None,
    )


def forms_of(trainer):
    """Forms of the echo pass for batches with images."""
    verdicts = trainer.pass_choice.verdicts.values()
    return {verdict.form for verdict in verdicts if "pixel_values" in verdict.kind}


@pytest.fixture
def rows_run(monkeypatch):
    """Rows that each echo pass ran, of how many."""
    found, run = [], step.run_echo_pass

    def counted(setup, inputs, plan, plain, delta):
        if plan.suffixes is None:
            rows = plan.layout.row_R
            found.append((len(inputs["input_ids"]) if rows is None else len(rows), len(inputs["input_ids"])))
        return run(setup, inputs, plan, plain, delta)

    monkeypatch.setattr(step, "run_echo_pass", counted)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [(0, 1, 2), (1, 1, 1), (2, 0, 1, 0)], ids=str)
def test_losses_are_those_of_all_rows(tmp_path, monkeypatch, rows_run, family, counts):
    """Three rows with three images among them in every batch, in the first case: no shape tells rows from images."""
    rows = image_rows(36, counts=counts)
    some = vision_trainer(tmp_path / "some", FAMILIES[family], rows)
    revive(some)
    some.train()
    assert forms_of(some) == {ROWS}
    assert any(run < total for run, total in rows_run)
    monkeypatch.setattr(Ownership, "of", lambda *args: None)
    whole = vision_trainer(tmp_path / "all", FAMILIES[family], rows)
    revive(whole)
    whole.train()
    assert forms_of(whole) == {BATCH}
    torch.testing.assert_close(losses(some), losses(whole), rtol=1e-5, atol=0)
    for name in ("echo/ce_echo", "echo/kd", "echo/routed"):
        left, right = ([e[name] for e in run.state.log_history if name in e] for run in (some, whole))
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.long)])
def test_what_runs_does_not_depend_on_the_workers(tmp_path, rows_run, workers):
    """A collator that fails on a row without an image; some batches have one image in each row, others say more."""

    class NeedsAnImage(PatchCollator):
        def __call__(self, examples):
            if not any(example["images"] for example in examples):
                raise ValueError("no image")
            return super().__call__(examples)

    def make():
        return vision_language_model("qwen2_vl"), TokenizerOnly(vision_tokenizer()), NeedsAnImage()

    counts, runs = (1, 1, 1, 2, 1, 1, 2, 0, 1), []
    for number in (0, workers):
        found = len(rows_run)
        settings = {"dataloader_num_workers": number, "train_sampling_strategy": "sequential"}
        trainer = vision_trainer(tmp_path / str(number), make, image_rows(36, counts=counts), **settings)
        revive(trainer)
        trainer.train()
        runs.append((losses(trainer), rows_run[found:], trainable(trainer)))
    assert runs[0][:2] == runs[1][:2]
    assert_equal(runs[0][2], runs[1][2])


def test_what_is_not_known_runs_all_rows(tmp_path, rows_run, caplog):
    """Images in a column that nobody knows: as many entries as rows, and not one for each."""

    def collate(examples):
        return PatchCollator()([{**example, "images": example["pictures"]} for example in examples])

    rows = [{"messages": row["messages"], "pictures": row["images"]} for row in image_rows(24)]
    model, processor, _ = qwen2_vl()
    settings = {**SETTINGS, "per_device_train_batch_size": 3, "max_steps": 4, "max_length": None, "echo_p_start": 0.5}
    trainer = EchoSFTTrainer(
        model=model,
        args=EchoSFTConfig(
            output_dir=str(tmp_path),
            **{**settings, "dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=lora_config(target_modules=LORA),
        data_collator=collate,
    )
    trainer.train()
    assert forms_of(trainer) == {BATCH}
    assert all(run == total for run, total in rows_run)
    assert "that is not known" in caplog.text


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 1, 2), (0, 2, 1)], ids=str)
def test_images_that_only_the_collator_knows(tmp_path, monkeypatch, counts):
    """The first batches have one image a row, so as many as rows; later ones have as many again, and not one each."""
    inner = None

    def collate(examples):
        return inner([{"messages": example["messages"], "images": example["pictures"]} for example in examples])

    rows = [*image_rows(6, counts=(1,)), *image_rows(18, counts=counts, seed=5)]
    rows = [{"messages": row["messages"], "pictures": row["images"]} for row in rows]
    runs = []
    for known in (True, False):
        model, processor = llava()
        inner = DataCollatorForVisionLanguageModeling(processor=processor, max_length=None, assistant_only_loss=True)
        if not known:
            monkeypatch.setattr(Ownership, "of", lambda *args: None)
        settings = {
            **SETTINGS, "per_device_train_batch_size": 3, "max_steps": 8, "max_length": None, "echo_p_start": 0.5,
            "echo_p_end": 0.5, "dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False,
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        trainer = EchoSFTTrainer(
            model=model,
            args=EchoSFTConfig(output_dir=str(tmp_path), **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
            peft_config=lora_config(target_modules=LORA),
            data_collator=collate,
        )
        revive(trainer)
        trainer.train()
        runs.append([entry["echo/ce_echo"] for entry in trainer.state.log_history if "echo/ce_echo" in entry])
    torch.testing.assert_close(*runs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 1, 2)], ids=str)
def test_one_image_for_each_row_is_no_rule(counts):
    """What was seen of earlier batches is asked again of each, where no column says how many images a row has."""

    def collate(examples):
        pixels = torch.tensor([value for example in examples for value in example["pictures"]])
        return {
            "input_ids": torch.ones(len(examples), 4),
            "pixel_values": pixels,
            "kind": torch.ones(len(examples), 4),
        }

    ownership = Ownership(collate)
    one_each = [{"pictures": [float(i)]} for i in range(3)]
    some = [{"pictures": [float(10 * i + j) for j in range(count)]} for i, count in enumerate(counts)]
    for _ in range(2):
        owned = ownership.of(collate(one_each), one_each, ["kind", "pixel_values"])
        assert owned.parts == {"kind": (0, (1, 1, 1)), "pixel_values": (0, (1, 1, 1))}
        assert ownership.of(collate(some), some, ["kind", "pixel_values"]) is None


def test_a_row_with_an_image_comes_along(tmp_path, monkeypatch, rows_run):
    """A model may go another way where a batch has no image, so the rows of a text get one that has."""
    seen, select = [], step.run_echo_pass

    def noted(setup, inputs, plan, plain, delta):
        if plan.suffixes is None and "pixel_values" in plan.layout.picks:
            seen.append(len(plan.layout.picks["pixel_values"].index))
        return select(setup, inputs, plan, plain, delta)

    monkeypatch.setattr(step, "run_echo_pass", noted)
    vision_trainer(tmp_path, llava, image_rows(36, counts=(0, 0, 1)), max_steps=10).train()
    assert seen and min(seen) >= 1


# Answers of rows with images


def labels_of(trainer, n=6):
    batch = trainer.data_collator([dict(trainer.train_dataset[i]) for i in range(n)])
    return batch, [[t for t in row.tolist() if t != -100] for row in batch["labels"]]


@pytest.mark.parametrize("family", [llava, idefics3])
def test_templates_without_marks(tmp_path, family):
    """The same tokens, and the same labels, as with marks."""
    with_marks, _ = labels_of(vision_trainer(tmp_path / "a", family))
    trainer = vision_trainer(tmp_path / "b", partial(family, template=UNMARKED))
    assert trainer.args.assistant_only_loss
    found, answers = labels_of(trainer)
    assert found.keys() == with_marks.keys()
    for name, value in with_marks.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    tokenizer = vision_tokenizer()
    said = [row["messages"][1]["content"][0]["text"] + " </s>" for row in image_rows(6)]
    assert answers == [tokenizer(text)["input_ids"] for text in said]
    trainer.train()


@pytest.mark.parametrize("written", [UNMARKED, None], ids=["rendered", "marked"])
def test_conversations_without_images_on_a_processor(tmp_path, written):
    rows = conversation_rows(12)
    make = llava if written is None else partial(llava, template=written)
    trainer = vision_trainer(tmp_path, make, rows)
    tokenizer = vision_tokenizer()
    said = [t["content"] + " </s>" for t in rows[3]["messages"] if t["role"] == "assistant"]
    assert [t for t in trainer.train_dataset[3]["labels"] if t != -100] == tokenizer(" ".join(said))["input_ids"]
    trainer.train()


def test_rows_with_images_and_turns_switched_off(tmp_path):
    with pytest.raises(ValueError, match="assistant_only_loss=False trains on all of their tokens"):
        vision_trainer(tmp_path, llava, assistant_only_loss=False)


def test_conversations_of_llava(tmp_path):
    """`conversations` with the image's place in the words, and a single image in `image`."""
    rows = [
        {
            "image": row["images"][0],
            "conversations": [
                {"from": "human", "value": "<image>\nw1 w2"},
                {"from": "gpt", "value": f"w{i} w4"},
                {"from": "human", "value": "w5"},
                {"from": "gpt", "value": "w6"},
            ],
        }
        for i, row in enumerate(image_rows(12, counts=(1,)))
    ]
    trainer = vision_trainer(tmp_path, llava, rows)
    batch, answers = labels_of(trainer, 2)
    tokenizer = vision_tokenizer()
    assert answers == [tokenizer(f"w{i} w4 </s> w6 </s>")["input_ids"] for i in range(2)]
    assert batch["pixel_values"].shape[0] == 2
    trainer.train()


def test_text_with_a_marker_and_images(tmp_path):
    rows = [
        {"images": row["images"], "text": "<image> " * len(row["images"]) + f"w1 assistant : w{i} w3 </s>"}
        for i, row in enumerate(image_rows(12))
    ]
    trainer = vision_trainer(tmp_path, llava, rows, answer_marker="assistant :")
    _, answers = labels_of(trainer, 6)
    assert answers == [vision_tokenizer()(f"w{i} w3 </s>")["input_ids"] for i in range(6)]
    trainer.train()
