"""`frozen_prefix_cache`: the same training, with the lower layers run once for each document."""

import pytest
import torch
from family_cases import running_model
from models import adapted, lora_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training import DATA_FORMS, all_parameters, assert_equal, echo_trainer, losses

from echo_trainer.method.segments import find_segments
from echo_trainer.passes.frozen import Documents, FrozenPrefix, FrozenPrefixError
from echo_trainer.passes.frozen_proof import prove_prefix
from echo_trainer.passes.layers import backbone, decoder_layers
from echo_trainer.run.frozen_prefix import documents_of

pytestmark = pytest.mark.slow

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UPPER = {"layers_to_transform": [3, 4], "target_modules": LINEAR, "init_lora_weights": True}
STEPS = 12  # more than one epoch of 10 steps
OFF = {"echo_p_start": 0.0, "echo_p_end": 0.0}


def trained(folder, monkeypatch=None, form="padded", lora=None, model=None, **settings):
    options, rows = DATA_FORMS[form]
    trainer = echo_trainer(
        folder,
        rows=rows(),
        lora=lora_config(**(lora or UPPER)),
        model=model or tiny_model(dtype=torch.float64),
        **{"max_steps": STEPS, **options, **settings},
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("echo", [{"echo_preset": "strong"}, {}, OFF], ids=["strong", "paper", "off"])
@pytest.mark.parametrize("form", list(DATA_FORMS))
def test_trains_the_same(tmp_path, form, echo, checkpointing):
    settings = {"form": form, "gradient_checkpointing": checkpointing, **echo}
    one = trained(tmp_path / "one", frozen_prefix_cache=True, **settings)
    other = trained(tmp_path / "other", **settings)
    assert losses(one) == pytest.approx(losses(other), rel=1e-9)
    ours, theirs = all_parameters(one), all_parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9)


@pytest.fixture
def keepers(monkeypatch):
    """The `FrozenPrefix` of each run."""
    found = []
    begin = FrozenPrefix.__init__

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(FrozenPrefix, "__init__", init)
    return found


@pytest.mark.parametrize("echo", [{}, OFF], ids=["echo", "off"])
def test_lower_layers_run_once_for_each_document(tmp_path, keepers, echo):
    trained(tmp_path, frozen_prefix_cache=True, max_steps=30, **echo)
    (prefix,) = keepers
    assert prefix.start == 3
    assert prefix.computed <= 40 < prefix.used == 120  # 30 steps of 4 rows, 40 rows, some of them alike
    assert not prefix.full


def test_what_has_no_room_is_computed_again_and_changes_nothing(tmp_path, keepers, monkeypatch):
    whole = trained(tmp_path / "whole", frozen_prefix_cache=True)
    monkeypatch.setattr("echo_trainer.run.frozen_prefix.SHARE", 0.0)
    none = trained(tmp_path / "none", frozen_prefix_cache=True)
    assert keepers[1].n_bytes == 0 and keepers[1].full and keepers[1].computed > keepers[0].computed
    assert_equal(all_parameters(whole), all_parameters(none))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_for_bit(tmp_path, workers):
    settings = {
        "frozen_prefix_cache": True,
        "save_strategy": "steps",
        "save_steps": 5,
        "dataloader_num_workers": workers,
    }
    whole = trained(tmp_path / "whole", **settings)
    options, rows = DATA_FORMS["padded"]
    again = echo_trainer(
        tmp_path / "again",
        rows=rows(),
        lora=lora_config(**UPPER),
        model=tiny_model(dtype=torch.float64),
        **{"max_steps": STEPS, **options, **settings},
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_equal(all_parameters(whole), all_parameters(again))


TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}
FAMILIES = [
    "qwen3",
    "gpt2",
    "opt",
    "falcon",
    "bloom",
    "mistral",
    "gemma2",
    "mixtral",
    "mamba2",
    "jamba",
    "phi",
    "gpt_oss",
]


def padded_batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(7, 60, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[2, 7:] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    start = torch.tensor([0, 9, 18])
    return batch, Documents((b"a", b"b", b"c"), start, start + torch.tensor([5, 9, 7]))


def prefix_of(model, start=2):
    layers = decoder_layers(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{i}." in name for i in range(start, len(layers))) and "lora_" in name)
    return FrozenPrefix(backbone(model.get_base_model(), layers), layers, room=2**20)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model, dtype = running_model(family)
    prefix = prefix_of(model)
    batch, documents = padded_batch()
    expected = prefix.backbone(**batch, use_cache=False).last_hidden_state
    prove_prefix(prefix, batch, documents)
    with prefix.watching(), prefix.announced(documents, batch):
        found = prefix.backbone(**batch, use_cache=False).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], **TOLERANCE[dtype])
    assert prefix.computed == 3


def test_layers_that_share_keys_with_lower_ones_are_refused():
    model, _ = running_model("gemma3n_text")
    with pytest.raises(FrozenPrefixError, match="take something else from those below"):
        prove_prefix(prefix_of(model), *padded_batch())


def test_counted_flops():
    model = adapted(tiny_model())
    prefix = prefix_of(model, start=4)
    batch, documents = padded_batch()

    def flops(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def plain():
        prefix.backbone(**batch, use_cache=False)

    def cached():
        with prefix.announced(documents, batch):
            plain()

    prove_prefix(prefix, batch, documents)
    with prefix.watching():
        cached()
        assert flops(cached) * 5 == flops(plain)  # one of five layers


REFUSED = {
    "all layers": ({"lora": {"init_lora_weights": True}}, "layer 0 has trained weights"),
    "embeddings": (
        {"lora": {**UPPER, "modules_to_save": ["embed_tokens"]}},
        "runs below layer 3",
    ),
    "new tokens": ({"lora": {**UPPER, "trainable_token_indices": [5]}}, "runs below layer 3"),
    "NEFTune": ({"neftune_noise_alpha": 5.0}, "draws random numbers"),
    "compiled": ({"torch_compile": True, **OFF}, "torch_compile"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused(tmp_path, what):
    settings, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        trained(tmp_path, frozen_prefix_cache=True, **settings)


def test_dropout_below_is_refused(tmp_path):
    model = tiny_model("gpt2", embd_pdrop=0.1)
    lora = {**UPPER, "target_modules": ["c_attn", "c_fc"]}
    with pytest.raises(FrozenPrefixError, match="draws random numbers"):
        trained(tmp_path, frozen_prefix_cache=True, model=model, lora=lora, **OFF)


def test_a_layer_that_reads_from_below_is_refused():
    prefix = prefix_of(adapted(tiny_model()))
    layers, seen = prefix.layers, []
    layers[0].register_forward_hook(lambda module, args, output: seen.append(output * 1.0))
    own = layers[4].forward
    layers[4].forward = lambda hidden, *args, **kwargs: own(hidden + 0.1 * seen[-1], *args, **kwargs)
    with pytest.raises(FrozenPrefixError, match="take something else from those below"):
        prove_prefix(prefix, *padded_batch())


def test_documents_that_see_each_other_are_refused():
    prefix = prefix_of(adapted(tiny_model("opt")))  # its mask on sdpa does not know position ids
    ids = torch.arange(10, 20)[None]
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    documents = Documents((b"a", b"b"), torch.tensor([0, 4]), torch.tensor([4, 10]))
    with pytest.raises(FrozenPrefixError, match="packed documents"):
        prove_prefix(prefix, {"input_ids": ids, "position_ids": places}, documents)


def test_a_forward_on_other_tokens_is_an_error():
    model = adapted(tiny_model())
    prefix = prefix_of(model)
    batch, documents = padded_batch()
    prove_prefix(prefix, batch, documents)
    with (
        pytest.raises(FrozenPrefixError, match="was not run on the `input_ids`"),
        prefix.watching(),
        prefix.announced(documents, batch),
    ):
        prefix.backbone(input_ids=batch["input_ids"].flip(1), use_cache=False)


OTHER_POSITIONS = {
    "padded on the left": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])},
    "padded in between": {"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])},
    "shifted": {"position_ids": torch.arange(2, 10)[None], "attention_mask": torch.ones(1, 8, dtype=torch.int64)},
}


@pytest.mark.parametrize("places", list(OTHER_POSITIONS))
def test_other_positions_are_refused(places):
    ids = torch.arange(10, 18).view(1, 8)
    batch = {"input_ids": ids, "labels": ids.clone(), **OTHER_POSITIONS[places]}
    with pytest.raises(FrozenPrefixError, match="from position 0 on"):
        documents_of(batch, find_segments(batch))


def test_a_mask_of_ones_own_is_left_to_the_model():
    """Which token sees which may be another matter in each batch, and is no part of a document's key."""
    ids = torch.arange(10, 18).view(1, 8)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    assert documents_of(batch, find_segments(batch)) is None


def test_same_tokens_are_one_document():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 9]])
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    one, two, three = documents_of(batch, find_segments(batch)).keys
    assert one == two != three
