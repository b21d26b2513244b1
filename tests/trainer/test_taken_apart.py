"""The usual ways to take a trainer apart: each works with the echo, or is refused by its name, never half."""

import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from models import conversation_rows, lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from steps import padded_collator
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from training import SETTINGS, assert_equal, echo_trainer, losses, plain_trainer, trainable
from transformers import TrainerCallback
from trl import SFTConfig

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.run.first_step import EchoNotTrainedError


def build(trainer_class, folder, *, args=None, model=None, rows=None, **kwargs):
    """A trainer of a class on a PeftModel that is the same every time."""
    torch.manual_seed(0)
    settings = {**SETTINGS, "max_steps": 3, **kwargs.pop("settings", {})}
    return trainer_class(
        model=model or get_peft_model(tiny_model(), lora_config()),
        args=args or EchoSFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(prompt_completion_rows(16) if rows is None else rows),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )


def copies(trainer):
    return {name: parameter.clone() for name, parameter in trainer.echo_networks.named_parameters()}


def assert_the_echo_was_trained(trainer, before):
    """Every echo parameter is in one group of the optimizer; P2 moves from the first step on, the rest after it."""
    groups = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    for name, parameter in trainer.echo_networks.named_parameters():
        assert groups.count(id(parameter)) == 1, name
        assert not torch.equal(parameter, before[name]), name


# The optimizer

SCHEDULERS = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 - step / 3),
    "a lambda a group": lambda optimizer: LambdaLR(optimizer, [lambda step: 1 - step / 3]),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, T_max=3),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=5e-3, total_steps=4),
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=1),
    "none": lambda optimizer: None,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_optimizers_of_the_caller(tmp_path, scheduler):
    model = get_peft_model(tiny_model(), lora_config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    trainer = build(
        EchoSFTTrainer, tmp_path, model=model, optimizers=(optimizer, SCHEDULERS[scheduler](optimizer)),
        settings={"echo_p_end": 1.0, "max_steps": 4},
    )  # fmt: skip
    before = copies(trainer)
    trainer.train()
    assert_the_echo_was_trained(trainer, before)


def test_an_optimizer_of_the_caller_gives_the_bits_of_the_same_one_made_by_the_trainer(tmp_path):
    own = build(EchoSFTTrainer, tmp_path / "own")
    own.train()
    model = get_peft_model(tiny_model(), lora_config())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 3)
    given = build(EchoSFTTrainer, tmp_path / "given", model=model, optimizers=(optimizer, scheduler))
    given.train()
    assert losses(own) == losses(given)
    assert_equal(trainable(own), trainable(given))


def test_a_rate_of_the_echo_and_a_scheduler_of_the_caller_are_refused(tmp_path):
    model = get_peft_model(tiny_model(), lora_config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    both = (optimizer, LambdaLR(optimizer, lambda step: 1.0))
    trainer = build(EchoSFTTrainer, tmp_path, model=model, optimizers=both, settings={"echo_learning_rate": 1e-2})
    with pytest.raises(ValueError, match=r"echo_learning_rate=0.01.* LambdaLR .*optimizers=\(optimizer, None\)"):
        trainer.train()


class GroupsByName(EchoSFTTrainer):
    """As in LoRA+: names are known in advance, and each has its group."""

    def create_optimizer(self, *args, **kwargs):
        groups = {"lora_A": [], "lora_B": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[name.split(".")[-3]].append(parameter)
        a, b = groups.values()
        self.optimizer = torch.optim.AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 1e-2}])
        return self.optimizer


class ChangesRates(EchoSFTTrainer):
    """Takes the optimizer as it comes."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3
        return optimizer


class WholeModel(EchoSFTTrainer):
    """Does not look at names at all."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.RMSprop(filter(lambda p: p.requires_grad, self.model.parameters()), lr=1e-3)
        return self.optimizer


@pytest.mark.parametrize("kind", [GroupsByName, ChangesRates, WholeModel])
@pytest.mark.parametrize("rate", [None, 7e-3])
def test_own_create_optimizer(tmp_path, kind, rate):
    settings = {"echo_learning_rate": rate, "echo_p_end": 1.0, "lr_scheduler_type": "constant"}
    trainer = build(kind, tmp_path, settings=settings)
    before = copies(trainer)
    trainer.train()
    assert_the_echo_was_trained(trainer, before)
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    wanted = rate if rate and kind is not ChangesRates else {"ChangesRates": 2e-3}.get(kind.__name__, 1e-3)
    assert {rates[id(p)] for p in trainer.echo_networks.parameters()} == {wanted}


def test_own_create_optimizer_resumes_in_the_same_bits(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = build(GroupsByName, tmp_path / "whole", settings=settings)
    whole.train()
    resumed = build(GroupsByName, tmp_path / "resumed", settings=settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(trainable(whole), trainable(resumed))


def test_an_optimizer_class_of_the_caller(tmp_path):
    kwargs = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-3})}
    trainer = build(EchoSFTTrainer, tmp_path, settings={"echo_p_end": 1.0}, **kwargs)
    before = copies(trainer)
    trainer.train()
    assert_the_echo_was_trained(trainer, before)


def test_optimizers_of_peft(tmp_path):
    """LoRA+ has groups with rates of their own; those of LoRA-FA hold facts of each parameter, and it is refused."""
    model = get_peft_model(tiny_model(), lora_config())
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    trainer = build(
        EchoSFTTrainer, tmp_path / "plus", model=model, optimizers=(optimizer, None), settings={"echo_p_end": 1.0}
    )
    before = copies(trainer)
    trainer.train()
    assert_the_echo_was_trained(trainer, before)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    trainer = build(EchoSFTTrainer, tmp_path / "fa", model=model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"\(LoraFAOptimizer\) hold \['names', 'scaling_factors'\].*create_optimizer"):
        trainer.train()


def test_an_optimizer_that_is_replaced_later_is_refused(tmp_path):
    class Replace(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            trainer.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    trainer = build(EchoSFTTrainer, tmp_path, callbacks=[Replace()])
    before = trainable(trainer)
    with pytest.raises(EchoNotTrainedError, match=r"in no parameter group of the optimizer \(SGD\)"):
        trainer.train()
    assert_equal(trainable(trainer), before)  # it stops before the first step


@pytest.mark.parametrize("frozen", ["project_out", "gate_bias"])
def test_a_part_of_the_echo_that_is_frozen_is_refused(tmp_path, frozen):
    trainer = build(EchoSFTTrainer, tmp_path)
    for name, parameter in trainer.echo_networks.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    with pytest.raises(EchoNotTrainedError, match=f"such as .*{frozen}.* got no gradient"):
        trainer.train()


# The loss


class Doubles(EchoSFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert set(inputs) <= {"input_ids", "labels", "attention_mask"}
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return 2 * loss


class Regularises(EchoSFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        loss = loss + 0.1
        return (loss, outputs) if return_outputs else loss


def test_own_compute_loss_that_changes_what_it_gets(tmp_path):
    """Gradients are scaled as the loss is, and what is logged is what it would log of SFT's loss."""
    runs = {}
    for kind in (EchoSFTTrainer, Doubles, Regularises):
        runs[kind] = build(kind, tmp_path / kind.__name__, settings={"max_steps": 1})
        runs[kind].train()
    first = {kind: trainer.state.log_history[0] for kind, trainer in runs.items()}
    plain = first[EchoSFTTrainer]
    assert first[Doubles]["loss"] == 2 * plain["loss"]
    assert first[Doubles]["grad_norm"] == pytest.approx(2 * plain["grad_norm"], rel=1e-6)
    assert first[Regularises]["loss"] == pytest.approx(plain["loss"] + 0.1, rel=1e-6)
    assert first[Regularises]["grad_norm"] == plain["grad_norm"]
    assert {entry["echo/objective"] for entry in first.values()} == {plain["echo/objective"]}


class OwnLoss(EchoSFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class EveryOther(OwnLoss):
    calls = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls += 1
        kind = EchoSFTTrainer if self.calls % 2 else OwnLoss
        return kind.compute_loss(self, model, inputs, *args, **kwargs)


@pytest.mark.parametrize(("kind", "share"), [(OwnLoss, "2 of 2"), (EveryOther, "1 of 2")])
def test_own_compute_loss_without_an_echo_is_refused(tmp_path, kind, share):
    trainer = build(kind, tmp_path, settings={"gradient_accumulation_steps": 2})
    before = trainable(trainer)
    with pytest.raises(EchoNotTrainedError, match=rf"{share} micro-batches .*`{kind.__name__}.compute_loss` did not"):
        trainer.train()
    assert_equal(trainable(trainer), before)
    off = {"echo_p_start": 0.0, "echo_p_end": 0.0}
    build(kind, tmp_path / "off", settings=off).train()


class HalfABatch(EchoSFTTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {k: v[:2] for k, v in inputs.items()}, *args, **kwargs)


def test_own_compute_loss_on_another_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compute_loss was given `input_ids` of shape \(2, \d+\)"):
        build(HalfABatch, tmp_path).train()


def last_masked(inputs):
    """Labels whose last ones are masked, in another tensor."""
    labels = inputs["labels"].clone()
    labels[:, -3:] = -100
    return labels


class MasksInLoss(EchoSFTTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "labels": last_masked(inputs)}, *args, **kwargs)


class UnmasksInLoss(EchoSFTTrainer):
    """Trains on the prompt as well."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "labels": inputs["input_ids"]}, *args, **kwargs)


class MasksInPlace(EchoSFTTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        inputs["labels"].copy_(last_masked(inputs))
        return super().training_step(model, inputs, *args, **kwargs)


class MasksInStep(EchoSFTTrainer):
    """And runs forward and backward by itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs["labels"] = last_masked(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class MasksInLoader(EchoSFTTrainer):
    """In a loader of its own, whose batches are those of TRL: it knows nothing of a plan."""

    def get_train_dataloader(self):
        batches = []
        for batch in super().get_train_dataloader():
            batch["labels"] = last_masked(batch)
            batches.append(batch)
        return batches


MASKING = [MasksInLoss, UnmasksInLoss, MasksInPlace, MasksInStep, MasksInLoader]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", MASKING, ids=lambda kind: kind.__name__)
def test_labels_that_were_not_planned_are_refused(tmp_path, kind, accumulation):
    """Both losses are computed on the labels of the plan, so others would be left out without a word."""
    trainer = build(kind, tmp_path, settings={"gradient_accumulation_steps": accumulation})
    before = trainable(trainer)
    with pytest.raises(ValueError, match="given other `labels` than those that this micro-batch was planned with"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_equal(trainable(trainer), before)
    off = {"echo_p_start": 0.0, "echo_p_end": 0.0}
    build(kind, tmp_path / "off", settings=off).train()


class CopiesLabels(EchoSFTTrainer):
    """Another tensor with the same labels."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {k: v.clone() for k, v in inputs.items()}, *args, **kwargs)


def test_copies_of_what_was_planned_change_nothing(tmp_path):
    copies_them, ours = build(CopiesLabels, tmp_path / "a"), build(EchoSFTTrainer, tmp_path / "b")
    copies_them.train(), ours.train()
    assert losses(copies_them) == losses(ours)
    assert_equal(trainable(copies_them), trainable(ours))


class EmbedsByItself(EchoSFTTrainer):
    """As in adversarial training on embeddings."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs)
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        return super().compute_loss(model, {**inputs, "inputs_embeds": embeddings}, *args, **kwargs)


def test_own_compute_loss_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"given \['attention_mask', 'inputs_embeds', 'labels'\] and no `input_ids`"):
        build(EmbedsByItself, tmp_path).train()


class DropsTokens(EchoSFTTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        return super().compute_loss(model, rest, *args, **kwargs)


class RenamesTokens(EchoSFTTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        names = {"input_ids": "ids"}
        renamed = {names.get(name, name): value for name, value in inputs.items()}
        return super().compute_loss(model, renamed, *args, **kwargs)


@pytest.mark.parametrize("trainer", [DropsTokens, RenamesTokens])
def test_tokens_that_get_lost_on_the_way_are_named(trainer, tmp_path):
    with pytest.raises(ValueError, match=r"no `input_ids`"):
        build(trainer, tmp_path).train()


class SkipsBatches(EchoSFTTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return torch.tensor(0.0)


class SkipsEveryOther(EchoSFTTrainer):
    calls = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.calls += 1
        return torch.tensor(0.0) if self.calls % 2 else super().training_step(model, inputs, num_items_in_batch)


class SkipsTheLast(EchoSFTTrainer):
    calls = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.calls += 1
        return super().training_step(model, inputs, num_items_in_batch) if self.calls % 2 else torch.tensor(0.0)


@pytest.mark.parametrize("trainer", [SkipsBatches, SkipsEveryOther, SkipsTheLast])
def test_a_step_that_is_skipped_is_named(trainer, tmp_path):
    with pytest.raises(
        EchoNotTrainedError, match=rf"`{trainer.__name__}\.training_step` did not call that of EchoSFTTrainer"
    ):
        build(trainer, tmp_path, settings={"gradient_accumulation_steps": 2}).train()


class OwnStep(EchoSFTTrainer):
    """As transformers' examples of curriculum or adversarial training: forward and backward by itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


def test_own_training_step(tmp_path):
    own, ours = build(OwnStep, tmp_path / "own"), build(EchoSFTTrainer, tmp_path / "ours")
    own.train()
    ours.train()
    assert losses(own) == losses(ours)
    assert_equal(trainable(own), trainable(ours))


class OwnBatches(EchoSFTTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


def test_batches_without_plans_are_refused(tmp_path):
    with pytest.raises(EchoNotTrainedError, match=r"`OwnBatches\.get_batch_samples` took the batches"):
        build(OwnBatches, tmp_path).train()


# The arguments


@dataclass
class ConfigOfSomebody(SFTConfig):
    """As a project has it: its own fields, and its own opinion of others."""

    temperature: float = 0.5
    kinds: str = "a,b"

    def __post_init__(self):
        super().__post_init__()
        self.learning_rate *= 10

    @property
    def kind_list(self):
        return self.kinds.split(",")


def test_a_config_of_somebody_else(tmp_path):
    args = ConfigOfSomebody(str(tmp_path), **{**SETTINGS, "max_steps": 2, "learning_rate": 1e-4}, kinds="c")
    trainer = build(EchoSFTTrainer, tmp_path, args=args)
    assert isinstance(trainer.args, ConfigOfSomebody) and isinstance(trainer.args, EchoSFTConfig)
    assert trainer.args.kind_list == ["c"] and trainer.args.temperature == 0.5
    assert trainer.args.learning_rate == pytest.approx(1e-3)  # its __post_init__ ran once
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "echo_run.json").read_text())
    assert record["hyperparameters"]["kinds"] == "c" and record["echo"]["pass"] == "suffix"
    reloaded = torch.load(_pickled(trainer.args, tmp_path), weights_only=False)
    assert reloaded == trainer.args and reloaded.kind_list == ["c"]


def _pickled(args, folder):
    torch.save(args, folder / "args.bin")
    return folder / "args.bin"


def test_what_is_set_on_the_callers_config_is_seen(tmp_path):
    """The trainer's arguments are those that it was given, as with `SFTTrainer`."""
    for kind in (SFTConfig, ConfigOfSomebody):
        args = kind(str(tmp_path / kind.__name__), **SETTINGS)
        trainer = build(EchoSFTTrainer, tmp_path, args=args)
        args.max_steps = 1
        trainer.train()
        assert trainer.state.global_step == trainer.args.max_steps == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss_type", "dft", "loss_type='dft'"),
        ("echo_pass", "half", "`echo_pass` is 'half'"),
        ("echo_p_start", 1.5, "`echo_p_start` is a probability"),
        ("echo_source_layers", ["x"], "`echo_source_layers` is"),
        ("echo_target_layers", [4], "names layer 4, the last of 5"),
        ("label_smoothing_factor", 0.1, "label_smoothing_factor=0.1"),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}, "use_reentrant"),
        ("torch_compile", True, "torch_compile=True"),
    ],
)
def test_options_set_after_construction_are_checked(tmp_path, name, value, message):
    trainer = build(EchoSFTTrainer, tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [
        {"echo_pass": "full"},
        {"echo_kd_weight": 0.0, "echo_kd_temperature": 1.0, "echo_teacher": "plain"},
        {"echo_positions": "predicting", "echo_seed": 5},
        {"echo_source_layers": ["3", "4"], "echo_target_layers": [0, 1], "echo_aggregation": "weighted"},
        {"echo_bottleneck": 8, "echo_learning_rate": 1e-2},
        {"echo_p_start": 0.0, "echo_p_end": 0.0},
    ],
    ids=lambda options: ", ".join(options),
)
def test_options_set_after_construction_are_used(tmp_path, options):
    before = build(EchoSFTTrainer, tmp_path / "before", settings=options)
    after = build(EchoSFTTrainer, tmp_path / "after")
    for name, value in options.items():
        setattr(after.args, name, value)
    for trainer in (before, after):
        trainer.train()
    assert losses(before) == losses(after)
    assert_equal(trainable(before), trainable(after))


def test_the_echo_is_switched_on_after_construction(tmp_path):
    on = build(EchoSFTTrainer, tmp_path / "on")
    late = build(EchoSFTTrainer, tmp_path / "late", settings={"echo_p_start": 0.0, "echo_p_end": 0.0})
    late.args.echo_p_start, late.args.echo_p_end = 1.0, 0.2
    for trainer in (on, late):
        trainer.train()
    assert losses(on) == losses(late)
    assert_equal(trainable(on), trainable(late))


# The data


class Masks:
    """A collator that masks by itself: what follows the token `marker` is the answer."""

    def __init__(self, marker=None):
        self.marker = marker

    def __call__(self, examples):
        rows = []
        for example in examples:
            start = example["input_ids"].index(self.marker) + 1 if self.marker else len(example["input_ids"])
            labels = [-100] * start + list(example["input_ids"][start:]) if self.marker else example["input_ids"]
            rows.append({"input_ids": example["input_ids"], "labels": labels})
        return padded_collator()(rows)


TEXTS = [{"text": f"w{i % 9} w{i % 5} : w{i % 7} w{i % 11}"} for i in range(80)]


@pytest.mark.parametrize("prepared", [True, False])
def test_a_collator_that_masks_by_itself(tmp_path, prepared):
    tokenizer = tiny_tokenizer()
    rows = TEXTS if prepared else [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in TEXTS]
    settings = {"dataset_kwargs": {"skip_prepare_dataset": not prepared}}
    kwargs = {"data_collator": Masks(tokenizer.convert_tokens_to_ids(":")), "settings": settings}
    trainer = build(EchoSFTTrainer, tmp_path, rows=rows, **kwargs)
    before = copies(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["echo/routed"] == 1
    assert any(not torch.equal(p, before[name]) for name, p in trainer.echo_networks.named_parameters())


def test_a_collator_that_leaves_no_prompt_is_refused(tmp_path):
    trainer = build(EchoSFTTrainer, tmp_path, rows=TEXTS, data_collator=Masks(), settings={"max_steps": 40})
    with pytest.raises(ValueError, match="None of the first 64 answers follows a prompt"):
        trainer.train()
    assert trainer.state.global_step == 15


def test_data_masked_after_construction(tmp_path):
    """What follows the first answer token of each row is no longer trained on."""
    trainer = build(EchoSFTTrainer, tmp_path)
    full = build(EchoSFTTrainer, tmp_path / "full")

    def mask(example):
        first = next(i for i, label in enumerate(example["labels"]) if label != -100)
        return {"labels": [-100] * first + example["input_ids"][first : first + 2] + [-100] * len(example["labels"])}

    def cut(example):
        return {"labels": example["labels"][: len(example["input_ids"])]}

    trainer.train_dataset = trainer.train_dataset.map(mask).map(cut)
    for each in (trainer, full):
        each.train()
    assert losses(trainer) != losses(full)
    trainer.train_dataset = trainer.train_dataset.map(lambda example: {"labels": example["input_ids"]})
    with pytest.raises(ValueError, match="None of the 16 training examples"):
        trainer.train()
    trainer.train_dataset = trainer.train_dataset.select([])
    with pytest.raises(ValueError, match="no rows left"):
        trainer.train()


@pytest.mark.parametrize(
    "rows",
    [prompt_completion_rows(8), conversation_rows(8), [{"text": "w1 w2"}] * 8, [{"conversations": []}] * 8],
    ids=["pair", "messages", "text", "conversations"],
)
def test_data_that_is_set_later_and_no_tokens(tmp_path, rows):
    trainer = build(EchoSFTTrainer, tmp_path)
    trainer.train_dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=r"no `input_ids`.*set later.*Give it to the trainer as `train_dataset`"):
        trainer.train()


def test_p_zero_is_sft_also_for_a_trainer_taken_apart(tmp_path):
    off = {"echo_p_start": 0.0, "echo_p_end": 0.0}
    ours, theirs = echo_trainer(tmp_path / "a", **off), plain_trainer(tmp_path / "b")
    for trainer in (ours, theirs):
        trainer.create_optimizer()
        trainer.train()
    assert losses(ours) == losses(theirs)
    assert_equal(trainable(ours), trainable(theirs))
