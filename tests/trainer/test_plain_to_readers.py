"""Whoever reads the model sees the plain adapted model: before, while and after it trains with an echo."""

import inspect

import pytest
import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from peft import get_peft_model
from training import SETTINGS, assert_equal, echo_trainer, losses, plain_trainer, revive, trainable
from transformers import TrainerCallback

from echo_trainer import EchoSFTConfig, EchoSFTTrainer

EVALUATION = {
    "trainer_kwargs": {"eval_dataset": Dataset.from_list(prompt_completion_rows(8, seed=5))},
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def sight(model) -> dict:
    """What can be read of a model, besides values."""
    return {
        "parameters": [name for name, _ in model.named_parameters()],
        "modules": [name for name, _ in model.named_modules()],
        "state": list(model.state_dict()),
        "counts": model.get_nb_trainable_parameters(),
        "text": repr(model),
        "takes": str(inspect.signature(model.forward)),
        "own forward": "forward" in vars(model),
    }


class Reader(TrainerCallback):
    """Reads the model it is given at every event, and lets it generate."""

    def __init__(self):
        self.seen = {}

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def read(args, state, control, model=None, **kwargs):
            if model is not None:
                self.seen.setdefault(name, []).append(sight(model))
            if name == "on_step_end":
                was_training = model.training
                model.eval()
                model.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
                model.train(was_training)

        return read


def test_every_reader_sees_the_plain_model(tmp_path):
    plain = sight(plain_trainer(tmp_path / "plain").model)
    reader, seen_in_metrics = Reader(), []
    kwargs = {
        "eval_dataset": EVALUATION["trainer_kwargs"]["eval_dataset"],
        "callbacks": [reader],
        "compute_metrics": lambda _: seen_in_metrics.append(sight(trainer.model)) or {},
    }
    settings = {**EVALUATION, "trainer_kwargs": kwargs, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = echo_trainer(tmp_path / "echo", **settings)
    assert sight(trainer.model) == plain
    trainer.train()
    assert sight(trainer.model) == plain
    assert {"on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_evaluate", "on_save",
            "on_log", "on_prediction_step", "on_train_end"} <= set(reader.seen)  # fmt: skip
    reader.seen["compute_metrics"] = seen_in_metrics
    for event, sights in reader.seen.items():
        for each in sights:
            assert {**each, "own forward": False} == plain, event


def test_reading_changes_nothing(tmp_path):
    """The same losses and the same bits with and without a callback that reads at every event, accumulation too."""
    runs = []
    for callbacks in ([], [Reader()]):
        kwargs = {**EVALUATION["trainer_kwargs"], "callbacks": callbacks}
        settings = {**EVALUATION, "trainer_kwargs": kwargs, "gradient_accumulation_steps": 2, "max_steps": 4}
        trainer = echo_trainer(tmp_path / str(len(callbacks)), **settings)
        revive(trainer)
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == losses(runs[1])
    assert_equal(trainable(runs[0]), trainable(runs[1]))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_names_from_before_training_are_found_after_it(tmp_path, bf16):
    """What TRL's own tests do: look every parameter up by the name it had."""
    trainer = echo_trainer(tmp_path, max_steps=4, bf16=bf16)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, value in before.items():
        parameter = trainer.model.get_parameter(name)
        assert torch.equal(value, parameter) != parameter.requires_grad, name


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_the_plain_model(tmp_path, error):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise error

    trainer = echo_trainer(tmp_path, trainer_kwargs={"callbacks": [Stop()]})
    plain = sight(trainer.model)
    with pytest.raises(error):
        trainer.train()
    assert sight(trainer.model) == plain
    trainer.remove_callback(Stop)
    trainer.train()
    assert trainer.state.log_history[0]["echo/routed"] == 1


def test_evaluation_before_training_changes_nothing(tmp_path):
    runs = []
    for evaluates in (False, True):
        kwargs = EVALUATION["trainer_kwargs"]
        trainer = echo_trainer(tmp_path / str(evaluates), max_steps=3, trainer_kwargs=kwargs)
        if evaluates:
            trainer.evaluate()
            trainer.predict(trainer.eval_dataset)
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == losses(runs[1])
    assert_equal(trainable(runs[0]), trainable(runs[1]))


def test_a_model_that_is_made_anew_gets_an_echo_of_its_own(tmp_path):
    """
    As in a search of hyperparameters: `model_init` gives each run its model, options change in between.

    TRL's loss needs the forward that its constructor gave the model, so the same model is brought back to its start.
    """
    trainer = echo_trainer(tmp_path / "search", max_steps=3)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def as_it_was():
        trainer.model.load_state_dict(start)
        return trainer.model

    trainer.model_init = as_it_was
    for rate in (5e-3, 1e-3):
        trainer.args.learning_rate = rate
        trainer.train()
        fresh = echo_trainer(tmp_path / str(rate), max_steps=3, learning_rate=rate)
        fresh.train()
        assert losses(trainer)[-3:] == losses(fresh)
        assert_equal(trainable(trainer), trainable(fresh))


def test_another_model_gets_an_echo_of_its_own(tmp_path):
    trainer = echo_trainer(tmp_path, max_steps=2)
    first = trainer.model
    before = {name: value.clone() for name, value in first.state_dict().items()}
    torch.manual_seed(0)
    trainer.model_init = lambda: get_peft_model(tiny_model(), lora_config(init_lora_weights=True))
    trainer.train()
    assert trainer.model is not first and trainer.echo.model is trainer.model.get_base_model()
    assert trainer.state.log_history[0]["echo/routed"] == 1
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    trainer.model_init = lambda: tiny_model()
    with pytest.raises(ValueError, match="without `peft_config`"):
        trainer.train()


def test_two_trainers_share_a_model(tmp_path):
    first = echo_trainer(tmp_path / "first", max_steps=2)
    names = [name for name, _ in first.model.named_parameters()]
    second = EchoSFTTrainer(
        model=first.model,
        args=EchoSFTConfig(output_dir=str(tmp_path / "second"), **{**SETTINGS, "max_steps": 2}),
        train_dataset=Dataset.from_list(prompt_completion_rows(16)),
        processing_class=tiny_tokenizer(),
    )
    for trainer in (first, second, first):
        before = {name: parameter.clone() for name, parameter in trainer.echo_networks.named_parameters()}
        trainer.train()
        moved = [name for name, p in trainer.echo_networks.named_parameters() if not torch.equal(p, before[name])]
        assert any(name.endswith("project_out") for name in moved)
        assert [name for name, _ in trainer.model.named_parameters()] == names
