"""What a run starts from: something is trained, building a trainer changes nothing, and the KL begins at 0."""

import pytest
from beam_cases import beam_trainer
from models import adapted, tiny_model
from peft import PeftModel


def frozen_adapter(folder):
    adapted(tiny_model()).save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_model(), folder)


def frozen_base():
    return tiny_model().requires_grad_(False)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_that_is_not_trained(tmp_path, beta):
    with pytest.raises(ValueError, match=r"no trainable parameter .* is_trainable=True"):
        beam_trainer(tmp_path / "out", model=frozen_adapter(tmp_path / "sft"), lora=False, beta=beta)


def test_a_model_that_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match=r"All weights of the model are frozen .* `peft_config`"):
        beam_trainer(tmp_path, model=frozen_base(), lora=False, beta=0.0)
    beam_trainer(tmp_path, model=frozen_base())
