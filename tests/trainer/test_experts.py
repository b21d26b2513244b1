"""Adapters on expert parameters alone (`target_parameters`): the echo goes to what the mixture of experts returns."""

import pytest
import torch
from families import family_model
from models import lora_config
from training import all_parameters, echo_trainer, losses, revive

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "gpt_oss": EXPERTS,
    "qwen3_moe": EXPERTS,
    "one of both": EXPERTS[1:],
    "a linear layer by its weight": ["mlp.down_proj.weight"],
}


def build(folder, case, **settings):
    family = {"one of both": "qwen3_moe", "a linear layer by its weight": "llama"}.get(case, case)
    lora = lora_config(target_modules=[], target_parameters=CASES[case], init_lora_weights=True)
    trainer = echo_trainer(folder, model=family_model(family, attention="eager"), lora=lora, max_steps=3, **settings)
    revive(trainer)
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_suffix_and_full_train_alike(tmp_path, case):
    runs = {}
    for wanted in ("suffix", "full"):
        for checkpointing in (False, True):
            settings = {"echo_pass": wanted, "gradient_checkpointing": checkpointing, "optim": "sgd"}
            trainer = build(tmp_path / f"{wanted}-{checkpointing}", case, **settings)
            trainer.train()
            runs[wanted, checkpointing] = trainer
    first, *others = runs.values()
    for other in others:
        torch.testing.assert_close(losses(first), losses(other), rtol=1e-5, atol=0)
        for name, value in all_parameters(first).items():
            torch.testing.assert_close(all_parameters(other)[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_every_part_learns(tmp_path, case):
    trainer = build(tmp_path, case, echo_p_end=1.0)
    (site,) = {site.name for site in trainer.echo.sites}
    assert site == ("mlp.down_proj" if "linear" in case else "mlp.experts")
    assert all(site.out_features == 32 for site in trainer.echo.sites)
    before = all_parameters(trainer)
    trainer.train()
    assert trainer.state.log_history[1]["echo/relative_delta"] > 0
    for name, parameter in all_parameters(trainer).items():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
