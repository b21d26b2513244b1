"""A model that is split over devices in one process (`device_map`) trains as it does on one of them."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from models import DEPTH, adapted, tiny_model
from second_device import ELSEWHERE, second_device
from training import DATA_FORMS, echo_trainer, losses, revive, trainable

from echo_trainer.passes.echo import ROWS, SUFFIX
from echo_trainer.run.validation import check_model

HERE = "cpu"


def split(model, n_here):
    """The model with its embeddings and first layers here and everything else elsewhere, as `device_map` leaves it."""
    places = {"model.embed_tokens": HERE, "model.rotary_emb": HERE, "model.norm": ELSEWHERE, "lm_head": ELSEWHERE}
    places |= {f"model.layers.{i}": HERE if i < n_here else ELSEWHERE for i in range(DEPTH)}
    model = dispatch_model(model, places, main_device=HERE, force_hooks=True)
    model.hf_device_map = places
    return model


def run(folder, form, n_here=None, **settings):
    more, rows = DATA_FORMS[form]
    model = tiny_model() if n_here is None else split(tiny_model(), n_here)
    settings = {"max_steps": 3, "optim": "sgd", "gradient_accumulation_steps": 2, **more, **settings}
    trainer = echo_trainer(folder, model=model, rows=rows(), **settings)
    revive(trainer)
    trainer.train()
    return trainer


CASES = [
    # sources elsewhere, targets here
    (3, "padded", {"gradient_checkpointing": False}),
    # both elsewhere, the echo networks here
    (1, "packed", {"gradient_checkpointing": True}),
    # targets on both; weights of the sources, which lie on both
    (2, "multi-turn", {"echo_target_layers": [1, 2], "echo_source_layers": [3, 4], "echo_aggregation": "weighted"}),
    (2, "padded", {"echo_pass": "full", "echo_target_layers": [1, 2], "gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("n_here", "form", "settings"), CASES, ids=["sources", "both", "targets", "full"])
def test_a_split_model_trains_as_a_whole_one(tmp_path, n_here, form, settings):
    whole = run(tmp_path / "whole", form, **settings)
    with second_device():
        parts = run(tmp_path / "parts", form, n_here, **settings)
        weights = {name: value.cpu() for name, value in trainable(parts).items()}
        devices = {name: parameter.device for name, parameter in parts.model.named_parameters()}
    assert parts.is_model_parallel and len(set(devices.values())) == 2
    assert {p.device.type for p in parts.echo_networks.parameters()} == {HERE}
    expected = ROWS if settings.get("echo_pass") == "full" else SUFFIX
    assert [verdict.form for verdict in parts.pass_choice.verdicts.values()] == [expected]
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-5, atol=0)
    for name, value in trainable(whole).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)
    logged = [{k: v for k, v in entry.items() if "echo/" in k} for entry in parts.state.log_history[:-1]]
    for ours, theirs in zip(logged, whole.state.log_history[:-1], strict=True):
        assert ours and all(theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in ours.items())


def test_the_second_device_is_one():
    """Else the test above would show nothing: what lies here and elsewhere cannot be mixed, and values are real."""
    with second_device():
        away = torch.arange(3.0, device=ELSEWHERE)
        with pytest.raises(RuntimeError, match="two devices"):
            away + torch.ones(3)
        assert torch.equal((away + torch.ones(3).to(ELSEWHERE)).cpu(), torch.tensor([1.0, 2.0, 3.0]))
        away[1:] = 7.0
        assert away.sum().item() == 14.0


@pytest.mark.parametrize(("place", "device"), [("disk", "cuda"), ("cpu", "cuda"), ("disk", "cpu")])
def test_a_model_whose_weights_are_fetched_for_every_pass_is_refused(place, device):
    model = adapted(tiny_model())
    model.base_model.model.hf_device_map = {"model.layers.0": "cuda:0", "model.layers.1": place, "lm_head": "cuda:1"}
    accelerator = SimpleNamespace(device=torch.device(device))
    with pytest.raises(ValueError, match=rf"`device_map` has left 'model.layers.1' on '{place}'.*device_map='auto'"):
        check_model(model, accelerator, detach=True)
