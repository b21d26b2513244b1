"""Layer selection on tiny models of every family, against per-sample forwards and the CKA formula written out."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from selection_models import DEPTH, ENCODERS, FAMILIES, tiny_processor, tiny_tokenizer
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from echo_trainer.selection import LayerSelection, choose_layers, select_layers
from echo_trainer.selection.lora_config import lora_config_kwargs
from echo_trainer.selection.representations import collect_representations, find_blocks, pool
from echo_trainer.selection.samples import draw_rows, encode_row, make_batches
from echo_trainer.selection.select import number_of_layers
from echo_trainer.selection.use import BASELINES, baseline_layers, echo_layers


def build(family, seed=0):
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        # larger weights than at initialisation, so that layers differ by more than rounding
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data *= 5
    return model


def token_rows(count=12, seed=1, first=None, last=None):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 20, (), generator=g))
        ids = torch.randint(5, 60, (length,), generator=g).tolist()
        ids[0] = ids[0] if first is None else first
        ids[-1] = ids[-1] if last is None else last
        rows.append({"input_ids": ids})
    return rows


def hidden_rows(model, rows, pooling):
    """Rows of R_0..R_L from the model's own `output_hidden_states`, one unpadded sample at a time."""
    kept = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            states = model.eval()(input_ids=ids, output_hidden_states=True).hidden_states
        kept.append([{"last": s[0, -1], "cls": s[0, 0], "mean": s[0].mean(0)}[pooling].double() for s in states])
    return [torch.stack(layer) for layer in zip(*kept, strict=True)]


def slow_biased_cka(x, y):
    x, y = x.numpy() - x.numpy().mean(0), y.numpy() - y.numpy().mean(0)
    cross = sum(float(np.dot(x[:, a], y[:, b])) ** 2 for a in range(x.shape[1]) for b in range(y.shape[1]))
    own = [
        sum(float(np.dot(z[:, a], z[:, b])) ** 2 for a in range(z.shape[1]) for b in range(z.shape[1])) for z in (x, y)
    ]
    return cross / (own[0] * own[1]) ** 0.5


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_hidden_states_of_each_sample_alone(family, pooling):
    model, rows = build(family), token_rows()
    samples = [encode_row(row, None, None) for row in rows]
    batches = make_batches(samples, 5, 0)
    got = collect_representations(model, batches, pooling=pooling, blocks=find_blocks(model), progress=False)
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    expected = hidden_rows(model, ordered, pooling)
    assert len(got) == len(expected) == DEPTH + 1
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_chooses_and_halves_the_parameters(family):
    model, rows = build(family), token_rows()
    selection = select_layers(model, rows, batch_size=5, progress=False)
    encoder = family in ENCODERS
    assert selection.pooling == ("cls" if encoder else "last")
    assert selection.excluded == ([0] if encoder else [])
    assert len(selection.layers) == DEPTH // 2
    states = hidden_rows(model, rows, selection.pooling)
    slow = [1 - slow_biased_cka(a, b) for a, b in itertools.pairwise(states)]
    assert selection.importance == pytest.approx(slow, rel=1e-2, abs=1e-5)
    order = sorted(range(1 if encoder else 0, DEPTH), key=lambda i: -slow[i])
    assert selection.ranking == order
    assert selection.layers == sorted(order[: DEPTH // 2])

    half = get_peft_model(model, LoraConfig(r=2, **selection.lora_config_kwargs(model)))
    full_model = build(family)
    full = get_peft_model(full_model, LoraConfig(r=2, **lora_config_kwargs(full_model, range(DEPTH))))
    assert 2 * half.get_nb_trainable_parameters()[0] == full.get_nb_trainable_parameters()[0] > 0
    path = selection.blocks_path
    adapted = {n for n, m in half.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert {int(n.removeprefix(f"{path}.").split(".")[0]) for n in adapted} == set(selection.layers)
    assert all(n.startswith(f"{path}.") for n in adapted)
    # every linear module of the blocks has an adapter when all layers are taken
    linear = [
        n for n, m in full.get_base_model().named_modules() if n.startswith(f"{path}.") and hasattr(m, "base_layer")
    ]
    plain = [
        n
        for n, m in build(family).named_modules()
        if n.startswith(f"{path}.") and type(m).__name__ in ("Linear", "Conv1D")
    ]
    assert sorted(linear) == sorted(plain)


def test_the_bare_output_of_the_last_layer_can_be_taken():
    model, rows = build("llama"), token_rows()
    kept = {}
    handle = model.model.layers[-1].register_forward_hook(lambda _m, _a, out: kept.__setitem__("x", out))
    samples = [encode_row(row, None, None) for row in rows]
    blocks = find_blocks(model)
    got = collect_representations(
        model, make_batches(samples, 12, 0), pooling="last", blocks=blocks, final_norm=False, progress=False
    )
    handle.remove()
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    torch.testing.assert_close(got[-1], torch.stack([kept["x"][i, n - 1] for i, n in enumerate(lengths)]))
    with_norm = select_layers(model, rows, progress=False)
    without = select_layers(model, rows, final_norm=False, progress=False)
    assert with_norm.importance[:-1] == pytest.approx(without.importance[:-1])
    assert abs(with_norm.importance[-1] - without.importance[-1]) > 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "deberta-v3"])
def test_padding_side_and_batch_size_change_nothing(family):
    model, rows = build(family), token_rows()

    def padded(left):
        out = []
        for row in rows:
            fill = 24 - len(row["input_ids"])
            ids, mask = row["input_ids"], [1] * len(row["input_ids"])
            out.append(
                {
                    "input_ids": [7] * fill + ids if left else ids + [7] * fill,
                    "attention_mask": [0] * fill + mask if left else mask + [0] * fill,
                }
            )
        return out

    plain = select_layers(model, rows, batch_size=1, progress=False)
    for dataset, size in ((rows, 12), (padded(True), 5), (padded(False), 3), (Dataset.from_list(padded(True)), 4)):
        other = select_layers(model, dataset, batch_size=size, progress=False)
        assert other.layers == plain.layers
        assert other.importance == pytest.approx(plain.importance, rel=1e-3, abs=1e-6)


def test_pool_finds_the_token_on_either_side():
    hidden = torch.arange(2 * 4 * 1.0).reshape(2, 4, 1)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert pool(hidden, mask, "last").squeeze().tolist() == [3, 6]
    assert pool(hidden, mask, "cls").squeeze().tolist() == [2, 4]
    assert pool(hidden, mask, "mean").squeeze().tolist() == [2.5, 5]


def test_only_one_row_per_sample_and_layer_is_alive():
    model = build("llama")
    states = []

    def watch(_module, _args, output):
        states.append(weakref.ref(output))

    handles = [layer.register_forward_hook(watch) for layer in model.model.layers]
    for length in (8, 40):
        rows = [{"input_ids": [5 + (i * 7 + t) % 50 for t in range(length)]} for i in range(6)]
        batches = make_batches([encode_row(row, None, None) for row in rows], 3, 0)
        got = collect_representations(model, batches, pooling="last", blocks=find_blocks(model), progress=False)
        assert [tuple(r.shape) for r in got] == [(6, 16)] * (DEPTH + 1)
        # no view that would keep the states of all tokens alive
        assert all(r.untyped_storage().nbytes() == 6 * 16 * 4 for r in got)
    for handle in handles:
        handle.remove()
    gc.collect()
    assert len(states) == 2 * 2 * DEPTH
    assert all(state() is None for state in states)


def test_the_model_is_left_as_it_was():
    model = build("llama")
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    select_layers(model, token_rows(), progress=False, device="cpu")
    broken = [{"input_ids": [999] * 5}] * 6
    with pytest.raises(IndexError):
        select_layers(model, broken, progress=False)
    assert [module.training for module in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_adapters_are_off_while_reading_and_on_again_afterwards():
    rows = token_rows()
    plain = select_layers(build("llama"), rows, progress=False)
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.tensor([rows[0]["input_ids"]])
    logits = model.eval()(input_ids=ids).logits
    adapted = select_layers(model, rows, progress=False)
    assert adapted.importance == pytest.approx(plain.importance, rel=1e-6)
    assert adapted.blocks_path == "model.layers"
    assert torch.equal(model(input_ids=ids).logits, logits)
    fields = adapted.lora_config_kwargs(model)
    assert fields == plain.lora_config_kwargs(build("llama"))


def test_a_model_with_layers_offloaded_by_accelerate(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
    }
    device_map |= {"model.layers.3": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert next(spread.model.layers[1].parameters()).device.type == "meta"
    plain = select_layers(build("llama"), token_rows(), progress=False)
    got = select_layers(spread, token_rows(), progress=False)
    assert got.importance == pytest.approx(plain.importance, rel=1e-6)
    with pytest.raises(ValueError, match="spread over cpu, disk, so it must not be moved"):
        select_layers(spread, token_rows(), progress=False, device="cpu")


def test_bfloat16_is_scored_in_float64():
    rows = token_rows(24)
    exact = select_layers(build("llama"), rows, progress=False)
    rough = select_layers(build("llama").to(torch.bfloat16), rows, progress=False)
    assert rough.importance != exact.importance
    assert rough.importance == pytest.approx(exact.importance, abs=0.02)


# --- the first layer


@pytest.mark.parametrize("family", ENCODERS)
def test_the_first_layer_of_an_encoder_is_never_chosen(family):
    rows = token_rows(first=1)
    selection = select_layers(build(family), rows, ratio=1.0, progress=False)
    assert selection.constant == [0]
    assert selection.importance[0] == 1  # what would have put it first
    assert selection.layers == [1, 2, 3]
    assert selection.stability == [0, 1, 1, 1]
    assert 0 in select_layers(build(family), rows, ratio=1.0, first_layer="keep", progress=False).layers
    mean = select_layers(build(family), rows, ratio=1.0, pooling="mean", progress=False)
    assert (mean.layers, mean.constant) == ([0, 1, 2, 3], [])


def test_a_decoder_whose_samples_end_in_the_same_token():
    rows = token_rows(last=2)
    kept = select_layers(build("llama"), rows, ratio=0.25, progress=False)
    assert (kept.constant, kept.layers, kept.importance[0]) == ([0], [0], 1)
    left = select_layers(build("llama"), rows, ratio=0.25, first_layer="exclude", progress=False)
    assert left.layers != [0]
    assert echo_layers(kept)[1] != [0]  # an undefined score is no reason to make it a target


# --- choosing, bootstrap


def chain(strengths, n=64, d=24, seed=0):
    """R_i = (R_{i-1} + strength_i * noise) / norm: the larger the strength, the lower the CKA, at any depth."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, d, generator=g)]
    for strength in strengths:
        rows.append((rows[-1] + strength * torch.randn(n, d, generator=g)) / (1 + strength**2) ** 0.5)
    return rows


@pytest.mark.parametrize("debiased", [False, True])
def test_planted_layers_are_found_and_stable(debiased):
    selection = choose_layers(chain([0.05, 0.9, 0.05, 0.1, 0.9, 0.05]), ratio=1 / 3, debiased=debiased)
    assert selection.layers == [1, 4]
    assert selection.stability == [0, 1, 0, 0, 1, 0]
    assert selection.method == ("debiased" if debiased else "biased")
    scored = selection.cka_debiased if debiased else selection.cka_biased
    assert selection.importance == pytest.approx([1 - c for c in scored])
    for (low, high), importance in zip(selection.intervals, selection.importance, strict=True):
        assert low < importance < high


def test_equal_layers_are_reported_as_unstable():
    selection = choose_layers(chain([0.5] * 6), ratio=0.5, n_bootstrap=300)
    assert sum(selection.stability) == pytest.approx(3)
    assert sum(0.05 < share < 0.95 for share in selection.stability) >= 3


def test_the_interval_covers_the_spread_over_fresh_samples():
    strengths = [0.3, 0.8]
    values = torch.tensor([choose_layers(chain(strengths, seed=s), n_bootstrap=0).importance for s in range(1, 200)])
    selection = choose_layers(chain(strengths), n_bootstrap=400)
    # strength and width: the spread of the statistic over data sets, which one data set must tell
    for layer, (low, high) in enumerate(selection.intervals):
        assert high - low == pytest.approx(4 * float(values[:, layer].std()), rel=0.5)


def test_seeds_decide_the_draws():
    rows = chain([0.5] * 6)
    first, again, other = (choose_layers(rows, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first.stability != other.stability
    assert first.importance == other.importance


def test_without_bootstrap_the_point_estimate_is_given():
    selection = choose_layers(chain([0.1, 0.9, 0.5]), ratio=0.7, n_bootstrap=0)
    assert selection.stability == [0, 1, 1]
    assert selection.intervals == [(v, v) for v in selection.importance]


def test_exclusion_leaves_fewer_layers_rather_than_a_forbidden_one():
    selection = choose_layers(chain([0.9, 0.1, 0.5]), ratio=1.0, exclude=[0])
    assert selection.layers == [1, 2]
    assert 0 not in selection.ranking
    with pytest.raises(ValueError, match="none to choose"):
        choose_layers(chain([0.9]), exclude=[0])


@pytest.mark.parametrize(
    ("ratio", "depth", "count"), [(0.5, 32, 16), (0.5, 7, 3), (0.01, 4, 1), (1, 5, 5), (0.29, 100, 29)]
)
def test_number_of_layers(ratio, depth, count):
    assert number_of_layers(ratio, depth) == count


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
def test_a_ratio_that_is_no_share(ratio):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        select_layers(build("llama"), token_rows(), ratio=ratio, progress=False)


def test_json_and_plot(tmp_path):
    selection = select_layers(build("roberta"), token_rows(first=1), progress=False)
    again = LayerSelection.from_json(selection.to_json(tmp_path / "new" / "selection.json"))
    assert again == selection
    picture = Image.open(again.plot(tmp_path / "other" / "selection.png"))
    assert picture.format == "PNG"
    colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
    assert {(0x1F, 0x6F, 0x8B), (0xC9, 0xC9, 0xC9)} <= colours  # chosen and frozen bars


# --- data

TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"


def ids_of(row, tokenizer, max_length=None):
    sample = encode_row(row, tokenizer, max_length)
    assert sample["input_ids"].shape == sample["attention_mask"].shape
    return tokenizer.convert_ids_to_tokens(sample["input_ids"][0].tolist())


def test_the_formats_of_a_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt, completion = {"role": "user", "content": "what is"}, {"role": "assistant", "content": "red"}
    assert ids_of("what is red", tokenizer) == ["what", "is", "red"]
    assert ids_of({"text": "what is red"}, tokenizer) == ["what", "is", "red"]
    assert ids_of({"prompt": "what is ", "completion": "red"}, tokenizer) == ["what", "is", "red"]
    talk = ["user", ":", "what", "is", "assistant", ":", "red"]
    assert ids_of({"prompt": [prompt], "completion": [completion]}, tokenizer) == talk
    assert ids_of({"messages": [prompt, completion]}, tokenizer) == talk
    assert ids_of({"input_ids": [9, 10], "labels": [-100, 10]}, tokenizer) == ["colour", "red"]
    assert ids_of("what is red", tokenizer, max_length=2) == ["what", "is"]
    assert ids_of({"input_ids": [8, 9, 10]}, tokenizer, max_length=2) == ["what", "colour"]
    encoder = tiny_tokenizer(encoder=True)
    assert ids_of({"text": "good", "text_pair": "bad"}, encoder) == ["<s>", "good", "</s>", "bad", "</s>"]
    encoder.chat_template = TEMPLATE  # a template writes its own special tokens
    assert ids_of({"messages": [completion]}, encoder) == ["assistant", ":", "red"]


@pytest.mark.parametrize(
    ("row", "tokenizer", "message"),
    [
        ({"question": "a", "answer": "b"}, tiny_tokenizer(), r"\['answer', 'question'\].*prompt"),
        ({"text": "red"}, None, "pass processing_class="),
        ({"messages": [{"role": "user", "content": "red"}]}, tiny_tokenizer(), "no chat template"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "red"}]}, tiny_tokenizer(), "same kind"),
        ({"text": ""}, tiny_tokenizer(), "no token at all"),
        ({"input_ids": [3, 4], "attention_mask": [0, 0]}, None, "no token at all"),
        (5, tiny_tokenizer(), "a row of the dataset is a int"),
    ],
)
def test_rows_that_cannot_be_read(row, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        encode_row(row, tokenizer, 16)


def test_drawing_rows():
    rows = [{"input_ids": [i]} for i in range(50)]
    drawn = draw_rows(rows, 10, seed=0)
    assert len(drawn) == 10
    assert drawn == sorted(drawn, key=lambda row: row["input_ids"])
    assert drawn == draw_rows(Dataset.from_list(rows), 10, seed=0) != draw_rows(rows, 10, seed=1)
    assert draw_rows(rows, 500, seed=0) == rows
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert draw_rows(stream, 10, seed=0) == rows[:10]
    with pytest.raises(ValueError, match=r'pass one split.*"train"'):
        draw_rows({"train": rows}, 10, 0)
    with pytest.raises(ValueError, match="has no rows"):
        draw_rows(3, 10, 0)
    with pytest.raises(ValueError, match=r"got 3 samples.*at least 4"):
        draw_rows(rows[:3], 10, 0)


def test_wrong_options_and_models():
    model, rows = build("llama"), token_rows()
    with pytest.raises(ValueError, match="pooling='first' is unknown"):
        select_layers(model, rows, pooling="first")
    with pytest.raises(ValueError, match="first_layer='no' is unknown"):
        select_layers(model, rows, first_layer="no")
    with pytest.raises(ValueError, match="batch_size=0"):
        select_layers(model, rows, batch_size=0)
    with pytest.raises(ValueError, match=r"`blocks_path` is 'x'.*model\.layers \(4\)"):
        select_layers(model, rows, blocks_path="x")
    assert select_layers(model, rows, blocks_path="model.layers", progress=False).blocks_path == "model.layers"
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20))
    with pytest.raises(ValueError, match="encoder-decoder"):
        select_layers(t5, rows)
    model.model.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        select_layers(model, rows, progress=False)


def picture_rows(count=10):
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    rows = []
    for i in range(count):
        name = list(colours)[i % 3]
        question = "what colour is the square" if i % 2 else "what colour is the good square"
        rows.append(
            {
                "images": [Image.new("RGB", (8, 8), tuple(c // (1 + i // 3) for c in colours[name]))],
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": name}],
            }
        )
    return rows


def test_a_vision_language_model_reads_its_images():
    model, processor = build("llava"), tiny_processor()
    rows = picture_rows()
    selection = select_layers(model, rows, processing_class=processor, batch_size=4, progress=False)
    assert selection.blocks_path == "model.language_model.layers"
    blank = [{**row, "images": [Image.new("RGB", (8, 8))]} for row in rows]
    other = select_layers(model, blank, processing_class=processor, batch_size=4, progress=False)
    assert selection.importance != pytest.approx(other.importance, rel=1e-3)
    single = select_layers(model, rows, processing_class=processor, batch_size=1, progress=False)
    assert selection.importance == pytest.approx(single.importance, rel=1e-3, abs=1e-6)
    text = [{k: v for k, v in row.items() if k != "images"} for row in rows[:5]]
    with pytest.raises(ValueError, match="batch_size=1"):
        select_layers(model, rows[:5] + text, processing_class=processor, batch_size=10, progress=False)


# --- use


def test_lora_fields_of_a_list_and_of_a_vision_language_model():
    model = build("llava")
    fields = lora_config_kwargs(model, [3, 1], ["v_proj", "q_proj"])
    assert fields == {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1, 3],
        "layers_pattern": "language_model.layers",
    }
    # without the pattern PEFT would adapt the vision tower as well
    del fields["layers_pattern"]
    adapted = get_peft_model(model, LoraConfig(r=2, **fields)).get_base_model().named_modules()
    assert any("vision_tower" in name for name, module in adapted if hasattr(module, "lora_A"))
    assert lora_config_kwargs(build("llama"), [0], ["mlp.up_proj"]) == {
        "target_modules": ["mlp.up_proj"],
        "layers_to_transform": [0],
    }


def test_lora_fields_that_cannot_work():
    model = build("llama")
    with pytest.raises(ValueError, match=r"regular expression.*all-linear"):
        lora_config_kwargs(model, [0], r".*q_proj")
    with pytest.raises(ValueError, match=r"\['query'\].*q_proj"):
        lora_config_kwargs(model, [0], ["query"])
    for layers in ([4], [-1], []):
        with pytest.raises(ValueError, match="0 to 3"):
            lora_config_kwargs(model, layers)


@pytest.mark.parametrize("depth", [2, 3, 4, 12, 30, 32, 80])
def test_echo_layers(depth):
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        strengths = (0.1 + torch.rand(depth, generator=g)).tolist()
        selection = choose_layers(chain(strengths, n=8, d=4, seed=seed), n_bootstrap=0)
        sources, targets = echo_layers(selection)
        count = max(1, round(depth / 8))
        assert 1 <= len(targets) <= count
        assert 1 <= len(sources) <= count
        assert max(targets) < min(sources)
        shallow = sorted(range(depth // 2), key=lambda i: -selection.importance[i])
        assert targets == sorted(shallow[:count])
        adapted = [i for i in selection.layers if i < depth - 1] or [0]
        sources, targets = echo_layers(selection, adapted=adapted)
        assert set(targets) <= set(adapted)
        assert max(targets) < min(sources)


def test_echo_layers_take_the_most_important_ones():
    strengths = [0.1] * 32
    for layer in (2, 9, 11, 14, 17, 20, 28, 31):
        strengths[layer] = 0.8
    selection = choose_layers(chain(strengths, n=128, d=64), n_bootstrap=0)
    assert echo_layers(selection) == ([17, 20, 28, 31], [2, 9, 11, 14])
    sources, targets = echo_layers(selection, adapted=[20, 25])  # none of them shallow: the lowest
    assert targets == [20]
    assert {28, 31} < set(sources)
    assert min(sources) > 20
    with pytest.raises(ValueError, match=r"only \[31\] may have one"):
        echo_layers(selection, adapted=[31])


def test_baselines():
    assert baseline_layers("first-half-plus-last", 8, 4) == [0, 1, 2, 7]
    assert baseline_layers("last", 8, 4) == [4, 5, 6, 7]
    assert baseline_layers("uniform", 8, 4) == [1, 3, 5, 7]
    assert baseline_layers("uniform", 30, 1) == [15]
    assert baseline_layers("random", 8, 4, 1) == baseline_layers("random", 8, 4, 1)
    assert len({tuple(baseline_layers("random", 30, 15, s)) for s in range(5)}) == 5
    for name, depth in itertools.product(BASELINES, (1, 2, 5, 12, 33)):
        for count in range(1, depth + 1):
            layers = baseline_layers(name, depth, count, 7)
            assert layers == sorted(set(layers))
            assert len(layers) == count
            assert 0 <= layers[0] <= layers[-1] < depth
    with pytest.raises(ValueError, match="use one of"):
        baseline_layers("middle", 8, 4)
    with pytest.raises(ValueError, match="use 1 to 8"):
        baseline_layers("last", 8, 9)


def test_only_the_chosen_layers_train():
    """One optimizer step moves the adapters of the chosen layers and nothing else."""
    model, rows = build("gpt2"), token_rows()
    selection = select_layers(model, rows, progress=False)
    model = get_peft_model(model, LoraConfig(r=2, **selection.lora_config_kwargs(model)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # lora_A gets a gradient once lora_B has left zero
        ids = torch.tensor([rows[0]["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert {int(name.split(".h.")[1].split(".")[0]) for name in moved} == set(selection.layers)
