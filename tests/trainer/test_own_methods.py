"""Methods that subclasses write for themselves, as people do: what they see and return is that of `SFTTrainer`."""

import pytest
import torch
from datasets import Dataset
from models import prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import get_peft_model
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader, SequentialSampler
from training import SETTINGS, assert_equal, lora_config, losses, trainable
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import EvalLoopOutput

from echo_trainer import EchoSFTConfig, EchoSFTTrainer

HELD_OUT = prompt_completion_rows(6, seed=3)


def build(trainer_class, folder, *, settings=None, **kwargs):
    torch.manual_seed(0)
    options = {**SETTINGS, "max_steps": 3, "echo_p_end": 1.0, "eval_strategy": "steps", "eval_steps": 1}
    return trainer_class(
        model=get_peft_model(tiny_model(), lora_config()),
        args=EchoSFTConfig(output_dir=str(folder), **{**options, **(settings or {})}),
        train_dataset=Dataset.from_list(prompt_completion_rows(16)),
        eval_dataset=Dataset.from_list(HELD_OUT),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class OwnLog(EchoSFTTrainer):
    """Adds a figure, in the words of an older release."""

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "mine": 1.0}, *args, **kwargs)


class SilentLog(EchoSFTTrainer):
    """Keeps its logs somewhere else."""

    def log(self, logs, start_time=None):
        self.kept = [*getattr(self, "kept", []), logs]


class OwnEvaluation(EchoSFTTrainer):
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output.metrics[f"{metric_key_prefix}_mine"] = 1.0
        return output


class CountsRows(EchoSFTTrainer):
    """Never runs the model."""

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        n = sum(len(batch["input_ids"]) for batch in dataloader)
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_mine": n}, n)


class OwnPrediction(EchoSFTTrainer):
    """Generates from each batch that is evaluated."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self.batches_seen = [*getattr(self, "batches_seen", []), set(inputs)]
        with torch.no_grad():
            model.generate(input_ids=inputs["input_ids"][:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class LossWithOutputs(EchoSFTTrainer):
    """Looks at the logits of every batch, as older releases gave them."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        return (loss, outputs) if return_outputs else loss


class OwnScheduler(EchoSFTTrainer):
    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = ConstantLR(optimizer or self.optimizer, factor=1.0)
        return self.lr_scheduler


class OwnLoader(EchoSFTTrainer):
    """A plain loader; transformers prepares it."""

    def get_train_dataloader(self):
        rows = self.train_dataset.select_columns(["input_ids", "labels"])
        return DataLoader(rows, batch_size=4, collate_fn=self.data_collator)


class PreparedLoader(OwnLoader):
    def get_train_dataloader(self):
        return self.accelerator.prepare(super().get_train_dataloader())


class OwnSampler(EchoSFTTrainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


CHANGES_NOTHING = [OwnLog, OwnEvaluation, CountsRows, OwnPrediction, LossWithOutputs]


@pytest.mark.parametrize("kind", CHANGES_NOTHING, ids=lambda kind: kind.__name__)
def test_looking_changes_nothing(tmp_path, kind):
    plain, own = build(EchoSFTTrainer, tmp_path / "a"), build(kind, tmp_path / "b")
    plain.train(), own.train()
    assert losses(own) == losses(plain) and logged(own, "echo/routed") == [1, 1, 1]
    assert_equal(trainable(own), trainable(plain))
    if kind in (OwnEvaluation, CountsRows):
        assert len(logged(own, "eval_mine")) == 3
    if kind is not CountsRows:
        assert logged(own, "eval_loss") == logged(plain, "eval_loss")
    if kind is OwnPrediction:
        assert all(seen == {"input_ids", "attention_mask", "labels"} for seen in own.batches_seen)
    if kind is OwnLog:
        assert logged(own, "mine") == [1.0] * len(own.state.log_history)


def test_logs_that_are_kept_somewhere_else(tmp_path):
    trainer = build(SilentLog, tmp_path)
    trainer.train()
    trainer.save_model()  # card and record have no curve to draw
    assert sum("loss" in logs for logs in trainer.kept) == 3 and not logged(trainer, "loss")
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", [OwnScheduler, OwnLoader, PreparedLoader, OwnSampler], ids=lambda kind: kind.__name__)
def test_other_rates_and_batches_have_an_echo(tmp_path, kind):
    trainer = build(kind, tmp_path)
    trainer.train()
    assert logged(trainer, "echo/routed") == [1, 1, 1]


def test_metrics_of_the_caller_see_logits_of_the_plain_path(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"places": int((prediction.label_ids != -100).sum())}

    kwargs = {"compute_metrics": metrics, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    trainer = build(EchoSFTTrainer, tmp_path, **kwargs)
    trainer.train()
    assert len(set(logged(trainer, "eval_places"))) == 1 and seen[0].predictions.shape == seen[0].label_ids.shape
    output = trainer.predict(trainer.eval_dataset)
    batch = trainer.data_collator([dict(row) for row in trainer.eval_dataset])
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"].bool().numpy()
    assert (output.predictions[real] == logits.argmax(-1).numpy()[real]).all()


def test_early_stopping_takes_the_best_of_the_plain_path(tmp_path):
    settings = {
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "max_steps": 6,
        "metric_for_best_model": "eval_loss", "learning_rate": 0.5,
    }  # fmt: skip
    trainer = build(EchoSFTTrainer, tmp_path, settings=settings, callbacks=[EarlyStoppingCallback(1)])
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_loss"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_optimizer_and_scheduler_made_by_hand_before_training(tmp_path):
    by_hand, plain = build(EchoSFTTrainer, tmp_path / "a"), build(EchoSFTTrainer, tmp_path / "b")
    by_hand.create_optimizer_and_scheduler(num_training_steps=3)
    by_hand.train(), plain.train()
    assert losses(by_hand) == losses(plain)
    assert_equal(trainable(by_hand), trainable(plain))
