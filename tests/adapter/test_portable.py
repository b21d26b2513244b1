"""The portable form: the same logits, in the shape that `check_adapter` passes for every engine."""

import json
import math
import shutil

import adapter_cases as make
import pytest
import torch
from adapter_cases import ALL
from peft import PeftModel
from safetensors.torch import load_file, save_file

from echo_trainer.adapter import write as portable_write
from echo_trainer.adapter.check import check_adapter
from echo_trainer.adapter.folder import AdapterError
from echo_trainer.adapter.portable import NotPortableError, make_portable

EXACT = {"rtol": 1e-5, "atol": 1e-6}  # of logits computed in float64: only folding into float32 tensors may round

VARIANTS = {
    "plain": {},
    "rank 12": {"r": 12, "lora_alpha": 20},
    "rank 1": {"r": 1, "lora_alpha": 3},
    "rslora": {"r": 8, "use_rslora": True},
    "rank pattern": {"rank_pattern": {"layers.1.mlp.up_proj": 20, "q_proj": 3}},
    "alpha pattern": {"alpha_pattern": {"layers.0.self_attn.v_proj": 7, "down_proj": 5}},
    "all patterns, rslora": {
        "use_rslora": True, "r": 5, "rank_pattern": {"q_proj": 17}, "alpha_pattern": {"q_proj": 3, "o_proj": 11},
    },
    "one layer": {"layers_to_transform": [1]},
    "one module": {"target_modules": ["model.layers.2.self_attn.k_proj"]},
    "regex": {"target_modules": r"model\.layers\.[02]\..*(q_proj|down_proj)"},
    "excluded": {"exclude_modules": ["layers.0.mlp.up_proj"]},
    "bias announced": {"bias": "all"},
    "head": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "r": 6},
    "dropout": {"lora_dropout": 0.3},
    "gaussian init": {"init_lora_weights": "gaussian"},
    "alpha zero for some": {"alpha_pattern": {"q_proj": 0}},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_stay_equal(name, bases, tmp_path):
    base = bases["llama"]
    make.save_adapter(base, tmp_path / "a", **VARIANTS[name])
    before = make.logits(base, tmp_path / "a")
    assert (before - make.logits(base)).abs().max() > 0.05  # the adapter does something
    assert make_portable(tmp_path / "a", base, tmp_path / "b") == tmp_path / "b"
    torch.testing.assert_close(make.logits(base, tmp_path / "b"), before, **EXACT)


@pytest.mark.parametrize(("family", "settings"), [
    ("qwen2", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2], "use_rslora": True}),
    ("gpt2", {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True, "layers_to_transform": [0, 1]}),
    ("gpt2", {"target_modules": ["attn.c_proj"], "r": 4, "fan_in_fan_out": True}),
    ("llama-tied", {"target_modules": list(ALL), "r": 24, "layers_to_transform": [0]}),
])  # fmt: skip
def test_logits_stay_equal_on_other_families(family, settings, bases, tmp_path):
    base = bases[family]
    make.save_adapter(base, tmp_path / "a", **settings)
    make_portable(tmp_path / "a", base, tmp_path / "b")
    torch.testing.assert_close(make.logits(base, tmp_path / "b"), make.logits(base, tmp_path / "a"), **EXACT)


def test_logits_stay_equal_in_float32(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path / "a", **VARIANTS["all patterns, rslora"])
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b")
    before, after = (make.logits(bases["llama"], tmp_path / x, torch.float32) for x in "ab")
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_weight_changes_are_equal_in_double_precision(bases, tmp_path):
    """B A of every module against PEFT's scale times B A, computed here from the files alone."""
    settings = VARIANTS["all patterns, rslora"]
    make.save_adapter(bases["llama"], tmp_path / "a", **settings)
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b")
    old, new = (load_file(tmp_path / x / make.WEIGHTS) for x in "ab")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    scales = {"q_proj": 3 / math.sqrt(17), "o_proj": 11 / math.sqrt(5)}
    assert len(old) == 2 * 3 * 7
    for key in [key for key in old if "lora_A" in key]:
        scale = scales.get(key.split(".")[-3], 32 / math.sqrt(5))
        other = key.replace("lora_A", "lora_B")
        expected = scale * old[other].double() @ old[key].double()
        got = config["lora_alpha"] / config["r"] * new[other].double() @ new[key].double()
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_form(bases, tmp_path):
    make.save_adapter(
        bases["llama"], tmp_path / "a", r=12, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]
    )
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config == {
        "base_model_name_or_path": str(bases["llama"]), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": 16 * 32 / 12,
        "lora_dropout": 0.0, "peft_type": "LORA", "r": 16,
        "target_modules": ["k_proj", "q_proj", "up_proj", "v_proj"], "task_type": "CAUSAL_LM", "use_rslora": False,
    }  # fmt: skip
    tensors = load_file(tmp_path / "b" / make.WEIGHTS)
    assert len(tensors) == 2 * 3 * 4
    old = load_file(tmp_path / "a" / make.WEIGHTS)
    assert {key for key, value in tensors.items() if "lora_B" in key and value.any()} == {k for k in old if "_B" in k}
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    a, b = tensors[name.format("A")], tensors[name.format("B")]
    assert a.shape == (16, 32) and torch.equal(a[:12], old[name.format("A")])
    assert b.shape == (48, 16) and torch.equal(b[:, :12], old[name.format("B")]) and not b[:, 12:].any()


def added(folder, before):
    """Rows of A and columns of B that the portable form in `folder` has and the adapter in `before` had not."""
    old = load_file(before / make.WEIGHTS)
    for name, value in load_file(folder / make.WEIGHTS).items():
        side, trained = 0 if "_A" in name else 1, old[name].shape if name in old else (0, 0)
        if trained[side] < value.shape[side]:
            yield name, side, slice(trained[side], None)


GROWN = {
    "rank 12": {"r": 12},
    "one layer": {"layers_to_transform": [1]},
    "rank pattern, rslora": {"r": 8, "use_rslora": True, "rank_pattern": {"layers.1.mlp.up_proj": 20, "q_proj": 3}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "r": 6},
    "bfloat16": {"dtype": torch.bfloat16, "r": 4},
}


@pytest.mark.parametrize("name", GROWN)
def test_what_is_added_changes_nothing(name, bases, tmp_path):
    """Bit for bit the function that zeros in its place give, and as PEFT begins: one side random, the other zero."""
    make.save_adapter(bases["llama"], tmp_path / "a", **GROWN[name])
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "zeros")
    places = list(added(tmp_path / "b", tmp_path / "a"))
    assert places
    tensors = load_file(tmp_path / "b" / make.WEIGHTS)
    for key, side, where in places:
        new = tensors[key].narrow(side, where.start, tensors[key].shape[side] - where.start)
        if key.endswith(("lora_A.weight", "lora_embedding_B")):
            assert len(new.unique()) > new.numel() / 4  # bfloat16 has few values
        else:
            assert not new.any()
        if key.endswith("lora_A.weight"):
            bound = math.sqrt(1 / new.shape[1])  # kaiming_uniform_ with a = sqrt(5)
            assert new.abs().max() <= bound * 1.01 and new.float().std() == pytest.approx(bound / 3**0.5, rel=0.2)
        new.zero_()
    save_file(tensors, tmp_path / "zeros" / make.WEIGHTS)
    assert torch.equal(*(make.logits(bases["llama"], tmp_path / form, torch.float32) for form in ("b", "zeros")))


@pytest.mark.parametrize("name", GROWN)
def test_what_is_added_learns(name, bases, tmp_path):
    """Two steps on the saved form move every tensor, and each rank of it (SFT, then DPO)."""
    make.save_adapter(bases["llama"], tmp_path / "a", **GROWN[name])
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b")
    model = PeftModel.from_pretrained(make.load_base(bases["llama"]), tmp_path / "b", is_trainable=True).train()
    parameters = {key.replace(".default", ""): p for key, p in model.named_parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    assert before.keys() == load_file(tmp_path / "b" / make.WEIGHTS).keys()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(2):
        model(make.IDS, labels=make.IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, parameter in parameters.items():
        moved = (parameter != before[key]).any(dim=1 if "_A" in key else 0)
        assert moved.all(), f"{key}: {int((~moved).sum())} of {len(moved)} ranks stay where they were"


def test_what_is_added_is_the_same_every_time(bases, tmp_path):
    """And drawn from no generator that a training beside it may use."""
    make.save_adapter(bases["llama"], tmp_path / "a", **GROWN["rank pattern, rslora"])
    state = torch.get_rng_state()
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "c")
    assert (tmp_path / "b" / make.WEIGHTS).read_bytes() == (tmp_path / "c" / make.WEIGHTS).read_bytes()


def test_plain_adapter_keeps_its_tensors_and_alpha(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path / "a", dtype=torch.bfloat16)
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b")
    old, new = (load_file(tmp_path / x / make.WEIGHTS) for x in "ab")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) and new[key].dtype == torch.bfloat16 for key in old)
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["lora_alpha"] == 32


def test_bfloat16_is_kept_only_where_nothing_is_rounded(bases, tmp_path):
    base = bases["llama"]
    for alpha, dtype in ((8, torch.bfloat16), (5, torch.float32)):
        make.save_adapter(base, tmp_path / f"{alpha}", dtype=torch.bfloat16, alpha_pattern={"up_proj": alpha})
        make_portable(tmp_path / f"{alpha}", base, tmp_path / f"{alpha}p")
        assert {v.dtype for v in load_file(tmp_path / f"{alpha}p" / make.WEIGHTS).values()} == {dtype}
        before, after = (make.logits(base, tmp_path / f"{alpha}{p}") for p in ("", "p"))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_twice_is_the_same_as_once(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, **VARIANTS["all patterns, rslora"])
    make_portable(tmp_path, bases["llama"])
    once = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_portable(tmp_path, bases["llama"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == once


def test_in_place_keeps_what_is_beside_it(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, r=12)
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "checkpoint-1").mkdir()
    names = {path.name for path in tmp_path.iterdir()}
    assert make_portable(tmp_path) == tmp_path  # the base's name is in the config
    assert {path.name for path in tmp_path.iterdir()} == names
    assert check_adapter(tmp_path).ok


def test_new_folder_gets_the_card_and_no_checkpoints(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path / "a")
    (tmp_path / "a/README.md").write_text("card")
    (tmp_path / "a/assets").mkdir()
    (tmp_path / "a/assets/loss.png").write_bytes(b"png")
    (tmp_path / "a/training_args.bin").write_bytes(b"hub_token")
    make_portable(tmp_path / "a", out_dir=tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        "README.md", "assets", "adapter_config.json", make.WEIGHTS,
    }  # fmt: skip
    assert (tmp_path / "b/README.md").read_text() == "card"
    assert (tmp_path / "b/assets/loss.png").exists()


def test_chosen_rank(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path / "a")
    make_portable(tmp_path / "a", bases["llama"], tmp_path / "b", rank=64)
    torch.testing.assert_close(
        make.logits(bases["llama"], tmp_path / "b"), make.logits(bases["llama"], tmp_path / "a"), **EXACT
    )
    for rank in (24, 0, 8):
        with pytest.raises(AdapterError, match=f"rank={rank}"):
            make_portable(tmp_path / "a", bases["llama"], tmp_path / "c", rank=rank)


@pytest.mark.parametrize("step", ["save", "config", "second replace", "last replace"])
def test_failure_leaves_the_old_adapter(step, bases, tmp_path, monkeypatch):
    """Whatever breaks while writing, the trained form is still there, byte for byte, and nothing else is."""
    make.save_adapter(bases["llama"], tmp_path, r=12)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace, calls = portable_write.os.replace, []

    def failing_replace(source, target):
        calls.append(target)
        if len(calls) == {"second replace": 2, "last replace": 4}[step]:
            raise OSError("no space left on device")
        replace(source, target)

    if "replace" in step:
        monkeypatch.setattr(portable_write.os, "replace", failing_replace)
    else:
        target = "echo_trainer.adapter.write.save_file" if step == "save" else "pathlib.Path.write_text"

        def fail(*args, **kwargs):
            raise OSError("no space left on device")

        monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match="no space"):
        make_portable(tmp_path, bases["llama"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("settings", "change", "says"), [
    ({"use_dora": True}, None, "DoRA"),
    ({"use_dora": True}, make.config(use_dora=False), "DoRA"),
    ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    ({"trainable_token_indices": [1]}, None, "trainable_token_indices"),
    ({}, make.config(init_lora_weights="pissa"), "pissa"),
    ({"lora_bias": True}, None, "lora_B.bias"),
    ({}, make.config(layer_replication=[[0, 3]]), "layer_replication"),
    ({}, make.config(peft_type="IA3"), "IA3"),
    ({}, make.add(base_model__model__echo=torch.ones(2)), "base_model.model.echo"),
])  # fmt: skip
def test_more_than_lora_is_refused(settings, change, says, bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path, **settings)
    if change:
        change(tmp_path)
    before = (tmp_path / make.WEIGHTS).read_bytes()
    with pytest.raises(NotPortableError, match=says) as caught:
        make_portable(tmp_path, bases["llama"])
    assert "export --merged" in str(caught.value)
    assert (tmp_path / make.WEIGHTS).read_bytes() == before


def test_trained_biases_are_refused(bases, tmp_path):
    make.save_adapter(bases["qwen2"], tmp_path, bias="lora_only")
    with pytest.raises(NotPortableError, match="bias"):
        make_portable(tmp_path, bases["qwen2"])


@pytest.mark.parametrize(("change", "says"), [
    (make.config(r=32), "shapes"),
    (make.reshape("layers.1.mlp.up_proj.lora_A", lambda t: t[:, :9]), r"layers\.1\.mlp\.up_proj"),
    (make.rename("layers.2", "layers.9"), r"layers\.9"),
    (make.value("model.layers.0.self_attn.q_proj.lora_A.weight", float("nan")), "NaN"),
    (make.config(target_modules=["q_proj"]), "target_modules"),
    (make.drop("layers.0.mlp.up_proj.lora_B"), "shapes"),
    (make.drop(""), "no LoRA tensor"),
    (make.to_pickle, "adapter_model.bin"),
    (make.foreign_file, "model.safetensors"),
    (make.cut, "cannot be read"),
    (make.remove("adapter_config.json"), "adapter_config.json"),
    (make.config(base_model_name_or_path=...), "base model"),
])  # fmt: skip
def test_damaged_adapters_are_refused(change, says, bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path)
    change(tmp_path)
    with pytest.raises(AdapterError, match=says):
        make_portable(tmp_path)


def test_wrong_base_is_refused(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path)
    with pytest.raises(AdapterError, match="is not in the base"):
        make_portable(tmp_path, bases["gpt2"])
    with pytest.raises(AdapterError, match="nowhere"):
        make_portable(tmp_path, tmp_path / "nowhere")


def test_only_the_config_of_the_base_is_needed(bases, tmp_path):
    make.save_adapter(bases["llama"], tmp_path / "a", layers_to_transform=[1])
    (tmp_path / "base").mkdir()
    shutil.copy(bases["llama"] / "config.json", tmp_path / "base")
    for base in (tmp_path / "base", make.load_base(bases["llama"]).config, make.load_base(bases["llama"])):
        make_portable(tmp_path / "a", base, tmp_path / "b")
        assert check_adapter(tmp_path / "b").ok
        shutil.rmtree(tmp_path / "b")
