"""The proof at the first step: what is exact is used, what is not is not, and the run does not notice."""

import contextlib
import json
import logging

import pytest
import torch
from made_up import made_up_model
from mixes import LLAMA_7B, examples_of
from models import DEPTH, adapted, conversation_rows, lora_config, prompt_completion_rows, tiny_model
from steps import (
    assert_same_gradients,
    echo_setup,
    packed_example,
    padded_collator,
    padding_free_collator,
    planned_batch,
    random_examples,
    step_gradients,
)
from training import DATA_FORMS, adapter, all_parameters, assert_equal, echo_trainer, losses

from echo_trainer.method import costs
from echo_trainer.method.routing import RoutingSchedule
from echo_trainer.passes.echo import BATCH, FORMS, ROWS, SUFFIX
from echo_trainer.passes.proof import ProofResult, observe, prove
from echo_trainer.run.agreement import Agreement
from echo_trainer.run.collate import EchoCollator
from echo_trainer.run.pass_choice import PassChoice, Verdict
from echo_trainer.run.proof_rows import no_trace, proof_inputs


def made_up_trainer(folder, fault, **settings):
    lora = lora_config(init_lora_weights=True, target_modules=["qkv_proj", "o_proj", "up_proj", "down_proj"])
    return echo_trainer(folder, model=made_up_model(fault), lora=lora, gradient_checkpointing=False, **settings)


def forms(trainer):
    return [verdict.form for verdict in trainer.pass_choice.verdicts.values()]


def test_a_renamed_cache_argument_is_served(tmp_path):
    """Nothing knows `kv_store`, `blocks`, `to_words` or this family's rule for logits; the suffix pass is exact."""
    trainer = made_up_trainer(tmp_path, "none")
    trainer.train()
    assert forms(trainer) == [SUFFIX]
    assert trainer.echo.cache.layer == trainer.echo.cache.backbone == "kv_store"
    full = made_up_trainer(tmp_path / "full", "none", echo_pass="full")
    full.train()
    assert forms(full) == [ROWS]
    torch.testing.assert_close(losses(trainer), losses(full), rtol=1e-5, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_gradients_of_a_renamed_family(checkpointing):
    model = adapted(made_up_model(), target_modules=["qkv_proj", "o_proj", "up_proj", "down_proj"]).double().train()
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable()
    setup = echo_setup(model)
    gradients = [
        step_gradients(model, setup, *planned_batch(random_examples(4, seed=2), suffix=suffix))[1]
        for suffix in (False, True)
    ]
    assert_same_gradients(*gradients, rtol=1e-9)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("ignores the cache", "final states differ by"),
        ("wrong by 1e-2", "final states differ by"),
        ("asks", "AttributeError: 'KeyValueRecord' object has no attribute 'running_average'"),
        ("no cache, please", "NotImplementedError: this family has no use for a cache"),
    ],
)
def test_faults_run_the_full_pass_and_say_why(tmp_path, caplog, fault, words):
    trainer = made_up_trainer(tmp_path / "auto", fault)
    trainer.train()
    assert forms(trainer) == [ROWS]
    said = [r.getMessage() for r in caplog.records if "runs whole sequences" in r.getMessage()]
    assert len(said) == 1 and words in said[0]
    full = made_up_trainer(tmp_path / "full", fault, echo_pass="full")
    full.train()
    assert losses(trainer) == losses(full)
    assert_equal(adapter(trainer), adapter(full))
    with pytest.raises(ValueError, match=r"echo_pass='suffix' is not exact for MadeUpForCausalLM on padded rows"):
        made_up_trainer(tmp_path / "suffix", fault, echo_pass="suffix").train()


def test_a_model_that_mixes_rows_runs_whole_batches(tmp_path):
    """Its routed rows alone are other rows; only the batch as it was is the plain pass again."""
    trainer = made_up_trainer(tmp_path, "mixes rows", max_steps=2)
    trainer.train()
    assert forms(trainer) == [BATCH]
    assert trainer.state.log_history[0]["echo/kd"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("sees ahead", "MadeUpForCausalLM is no causal model"),
        ("head by position", "The logits that MadeUpForCausalLM computes are not those of its output embeddings"),
        ("random", "No echo pass is exact for MadeUpForCausalLM on padded rows"),
    ],
)
def test_what_no_pass_can_serve_is_refused_by_name(tmp_path, fault, words):
    trainer = made_up_trainer(tmp_path, fault)
    before = all_parameters(trainer)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert_equal(before, all_parameters(trainer))
    assert trainer.state.global_step == 0


def test_models_that_see_both_ways_are_refused(tmp_path):
    from families import family_model

    for family in ("bert", "roberta"):
        with pytest.raises(ValueError, match="is no causal model"):
            echo_trainer(tmp_path, model=family_model(family), gradient_checkpointing=False).train()


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_packed_documents_that_a_model_mixes(tmp_path, caplog, form):
    """OPT on sdpa builds its mask without position ids: in packed rows documents see each other, in plain SFT too."""
    settings, rows = DATA_FORMS[form]
    trainer = echo_trainer(tmp_path, model=tiny_model("opt"), rows=rows(), max_steps=2, **settings)
    trainer.train()
    text = " ".join(r.getMessage() for r in caplog.records)
    assert trainer.state.log_history[0]["echo/kd"] == pytest.approx(0, abs=1e-6)
    if form == "padded":
        assert forms(trainer) == [SUFFIX] and "mixes" not in text
    else:
        assert forms(trainer) == [BATCH if trainer.pass_choice.one_form else ROWS]
        assert "OPTForCausalLM itself mixes packed documents" in text and "in plain SFT as well" in text


def believe_everything(monkeypatch, form=SUFFIX):
    """No proof from here on."""

    def believe(self, drafts, prove, step):
        for draft in drafts:
            self.verdicts[draft.kind] = Verdict(draft.kind, form, draft.length, measured(0.0), step)

    monkeypatch.setattr(PassChoice, "settle", believe)


@pytest.mark.parametrize("form", DATA_FORMS)
def test_the_run_does_not_notice(tmp_path, monkeypatch, form):
    """Losses, routes and weights of a run with dropout are bit for bit those of a run without a proof."""
    settings, rows = DATA_FORMS[form]
    lora = lora_config(init_lora_weights=True, lora_dropout=0.2)

    def run(folder, place=None):
        trainer = echo_trainer(folder, rows=rows(), lora=lora, gradient_accumulation_steps=2, **settings)
        trainer.echo.cache = place
        trainer.train()
        return trainer

    proved = run(tmp_path / "proved")
    assert forms(proved) == [SUFFIX]

    believe_everything(monkeypatch)
    blind = run(tmp_path / "blind", place=proved.echo.cache)
    assert blind.pass_choice.verdicts and losses(proved) == losses(blind)
    assert_equal(all_parameters(proved), all_parameters(blind))


def test_modes_and_random_numbers_are_put_back(tmp_path):
    model = adapted(tiny_model(), lora_dropout=0.1).train()
    frozen = model.get_base_model().model.layers[1]
    frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with contextlib.suppress(RuntimeError), no_trace(model):
        assert not any(module.training for module in model.modules())
        torch.rand(100)
        raise RuntimeError
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.rand(3), expected)


def long_and_short_rows():
    return prompt_completion_rows(16) + [
        {"prompt": " ".join(f"w{(7 * i + j) % 50}" for j in range(n)), "completion": " w3 w4 w5"}
        for i, n in enumerate([60, 8, 70, 9] * 4)
    ]


IN_ORDER = {"max_steps": 8, "train_sampling_strategy": "sequential", "shuffle_dataset": False}


def test_a_longer_batch_is_proved_again(tmp_path, caplog):
    """What goes wrong beyond a length is seen when the first batch of that length comes."""
    trainer = made_up_trainer(tmp_path / "auto", "wrong when long", rows=long_and_short_rows(), **IN_ORDER)
    trainer.train()
    (verdict,) = trainer.pass_choice.verdicts.values()
    assert verdict.form is ROWS and verdict.length > 24 and verdict.step == 4
    assert "from here on" in caplog.text
    full = made_up_trainer(
        tmp_path / "full", "wrong when long", rows=long_and_short_rows(), echo_pass="full", **IN_ORDER
    )
    full.train()
    torch.testing.assert_close(losses(trainer), losses(full), rtol=1e-5, atol=0)


def test_a_form_that_failed_is_not_tried_again_after_a_resume(tmp_path):
    """Stopped after the suffix pass had failed and continued with short batches: the same bits as in one go."""
    settings = {"rows": long_and_short_rows(), **IN_ORDER, "save_strategy": "steps", "save_steps": 6}
    whole = made_up_trainer(tmp_path, "wrong when long", **settings)
    whole.train()
    again = made_up_trainer(tmp_path, "wrong when long", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert forms(again) == forms(whole) == [ROWS]
    assert "before the run was interrupted" in again.pass_choice.records()[0]["not"][0]
    assert_equal(all_parameters(again), all_parameters(whole))


ROPES = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, {"max_position_embeddings": 32}),
    "longrope": (
        "phi3",
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 10.0], "factor": 4.0,
         "rope_theta": 1e4, "original_max_position_embeddings": 32},
        {"original_max_position_embeddings": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("form", ["padded", "one row", "packed"])
def test_embeddings_that_depend_on_the_largest_position(tmp_path, form, name):
    """The suffix pass sees the largest position of the batch, also where the longest row is not in it."""
    family, rope, more = ROPES[name]
    settings = {"rows": long_and_short_rows(), **IN_ORDER, "echo_p_start": 0.5, "echo_p_end": 0.5}
    if form == "packed":
        settings |= {"packing": True, "max_length": 100, "max_steps": 2}
    if form == "one row":
        settings |= {"per_device_train_batch_size": 1, "max_steps": 24, "echo_p_start": 1.0}

    def train(echo_pass):
        model = tiny_model(family, rope_parameters=rope, **more)
        trainer = echo_trainer(tmp_path / echo_pass, model=model, echo_pass=echo_pass, **settings)
        trainer.train()
        return trainer

    torch.testing.assert_close(losses(train("suffix")), losses(train("full")), rtol=1e-5, atol=0)


def test_the_proof_leaves_no_memory_of_lengths(tmp_path, monkeypatch):
    """Dynamic rotary embeddings remember the longest sequence; the proof runs it before its turn."""
    family, rope, more = ROPES["dynamic"]
    settings = {"rows": long_and_short_rows()[:16] + long_and_short_rows()[16:][::-1], **IN_ORDER}
    settings |= {"gradient_accumulation_steps": 4, "max_steps": 2, "echo_pass": "full"}
    found = []
    for _ in range(2):
        trainer = echo_trainer(tmp_path, model=tiny_model(family, rope_parameters=rope, **more), **settings)
        trainer.train()
        found.append(losses(trainer))
        believe_everything(monkeypatch, ROWS)
    assert found[0] == found[1]


def test_the_model_is_freed_with_the_trainer(tmp_path):
    import gc
    import weakref

    trainer = echo_trainer(tmp_path, max_steps=1)
    trainer.train()
    layer = weakref.ref(trainer.model.get_base_model().model.layers[0])
    del trainer
    gc.collect()
    assert layer() is None


def test_a_second_training_proves_anew(tmp_path):
    trainer = made_up_trainer(tmp_path, "none", max_steps=2)
    trainer.train()
    trainer.model.get_base_model().config.fault = "wrong by 1e-2"
    assert forms(trainer) == [SUFFIX]
    trainer.train()
    assert forms(trainer) == [ROWS]


def test_rows_that_no_echo_reaches_prove_nothing(tmp_path):
    """One-token answers are predicted at the boundary: the first batch compares nothing, the next one does."""
    one_token = [{"input_ids": [5, 6, 7 + i % 9], "labels": [-100, -100, 7 + i % 9]} for i in range(8)]
    longer = [{"input_ids": [4 + i, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]} for i in range(8)]
    trainer = made_up_trainer(tmp_path, "wrong by 1e-2", rows=one_token + longer, **IN_ORDER | {"max_steps": 4})
    trainer.train()
    (verdict,) = trainer.pass_choice.verdicts.values()
    assert verdict.form is ROWS and verdict.step == 2


def test_routable_rows_are_compared_wherever_they_stand(tmp_path):
    """The longest and the shortest row have no prompt; those between them have one."""
    text = {"input_ids": [3 + i for i in range(30)], "labels": [3 + i for i in range(30)]}
    short = {"input_ids": [3, 4], "labels": [3, 4]}
    prompted = {"input_ids": list(range(10, 20)), "labels": [-100] * 5 + list(range(15, 20))}
    trainer = made_up_trainer(tmp_path, "wrong by 1e-2", rows=[text, short, prompted, prompted] * 4, max_steps=1)
    trainer.train()
    assert forms(trainer) == [ROWS]


def test_position_ids_of_three_dimensions_belong_to_rows(tmp_path):
    """Position ids of the text, of height and of width (M-RoPE): rows are taken out of their second dimension."""

    def with_planes(examples):
        batch = padded_collator()(examples)
        places = torch.arange(batch["input_ids"].shape[1]).expand(3, *batch["input_ids"].shape)
        return {**batch, "position_ids": places}

    from families import vision_language_model

    trainer = echo_trainer(
        tmp_path, model=vision_language_model("qwen2_vl"), lora=lora_config(target_modules=["q_proj", "up_proj"]),
        max_steps=1, trainer_kwargs={"data_collator": with_planes},
    )  # fmt: skip
    trainer.train()
    assert forms(trainer) == [ROWS]


def test_record_and_log_say_what_was_measured(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="echo_trainer"):
        trainer = echo_trainer(tmp_path, max_steps=2)
        trainer.train()
    assert "Echo pass: suffix. Compared with the plain pass on padded rows" in caplog.text
    trainer.save_model()
    echo = json.loads((tmp_path / "echo_run.json").read_text())["echo"]
    (proof,) = echo["proof"]
    assert echo["pass"] == proof["pass"] == "suffix" and proof["batches"] == "padded rows"
    assert 0 <= proof["difference"] <= proof["allowed"] < 1e-4 and proof["logits_difference"] <= 1e-6
    card = (tmp_path / "README.md").read_text()
    assert "| echo pass | suffix |" in card and "with no echo the final states differ by" in card


def test_layers_that_cannot_be_found_are_named_by_hand(tmp_path):
    """A config that counts its layers otherwise (LongCat-Flash counts two for each); the path leads to them."""
    model = made_up_model()
    model.config.num_hidden_layers = 10
    names = ["qkv_proj", "o_proj", "up_proj", "down_proj"]
    settings = {"model": model, "lora": lora_config(init_lora_weights=True, target_modules=names), "max_steps": 2}
    with pytest.raises(ValueError, match=r"backbone\.blocks \(5\).*echo_layers"):
        echo_trainer(tmp_path / "a", gradient_checkpointing=False, **settings)
    settings["model"] = made_up_model()
    settings["model"].config.num_hidden_layers = 10
    trainer = echo_trainer(tmp_path / "b", gradient_checkpointing=False, echo_layers="backbone.blocks", **settings)
    trainer.train()
    assert forms(trainer) == [SUFFIX] and trainer.echo.source_layers == [4]


# What is allowed belongs to the dtype


def proof_of(model, *, fault=None, form=SUFFIX, packed=False, autocast=False):
    examples = random_examples(4, seed=2, low=8, high=14)
    collator = padded_collator()
    if packed:
        examples, collator = [packed_example(examples)], padding_free_collator()
    echo = EchoCollator(collator)
    echo.schedule = RoutingSchedule(1, 1.0, 1.0, total_steps=10, batch_size=len(examples))
    setup = echo_setup(model)
    with no_trace(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        inputs, task = proof_inputs(echo.draft(examples, 0, 0), form, collator, "cpu")
        return prove(setup, inputs, task)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_rounding_is_allowed(family, packed, dtype):
    result = proof_of(adapted(tiny_model(family, dtype=dtype)), packed=packed)
    assert result.agrees and result.head_agrees and result.sees_ahead <= result.allowed
    assert result.allowed < (0.5 if dtype is torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lost_prefix_is_caught_in_every_dtype(dtype):
    model = adapted(made_up_model("ignores the cache").to(dtype), target_modules=["qkv_proj", "o_proj"])
    assert not proof_of(model).agrees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize(("fault", "agrees"), [("none", True), ("wrong by 1e-2", False)])
def test_coarse_numbers_do_not_hide_an_error_of_a_percent(fault, agrees, dtype):
    """Products of bfloat16 are coarse: the passes are compared in float32, too, and weights are put back."""
    model = adapted(made_up_model(fault).to(dtype), target_modules=["qkv_proj", "o_proj"])
    before = {name: (p.dtype, p.clone()) for name, p in model.named_parameters()}
    assert proof_of(model, autocast=dtype is torch.float32).agrees is agrees
    assert all(p.dtype == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["gpt_oss", "opt", "xglm"])
def test_mixed_documents_are_seen_in_bfloat16(family):
    from families import family_model

    for dtype in (torch.float32, torch.bfloat16):
        attention = "sdpa" if family == "opt" else "eager"
        model = family_model(family, attention=attention, dtype=dtype)
        model = adapted(model, target_modules=["q_proj", "v_proj"]).to(dtype)
        result = proof_of(model, packed=True)
        assert not result.agrees and result.mixes_documents


def test_where_nothing_can_be_refined_two_right_computations_set_the_bound(monkeypatch):
    """Quantised or sharded weights stay coarse: 4 times what a document alone differs from itself in its row."""
    from echo_trainer.passes import proof

    monkeypatch.setattr(proof, "can_refine", lambda setup: False)
    result = proof_of(adapted(tiny_model("llama", dtype=torch.bfloat16)))
    assert result.agrees and result.allowed < 0.1
    model = adapted(made_up_model("ignores the cache").bfloat16(), target_modules=["qkv_proj", "o_proj"])
    assert not proof_of(model).agrees


def test_nan_is_no_agreement():
    """A maximum that skips NaN would call it one."""
    result = proof_of(adapted(made_up_model("nan"), target_modules=["qkv_proj", "o_proj"]))
    assert result.states == float("inf") and not result.agrees


@pytest.mark.parametrize("way", ["matmul", "everywhere", "legacy", "off"])
def test_tf32_widens_the_bound_however_it_was_switched_on(way):
    """transformers uses the newer switch, after which torch refuses to read the older one."""
    from echo_trainer.passes.rounding import unit_roundoff

    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        if way == "matmul":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        elif way == "everywhere":
            torch.backends.fp32_precision = "tf32"
        elif way == "legacy":
            torch.set_float32_matmul_precision("high")
        found = unit_roundoff([torch.zeros(1)], torch.device("cuda"), torch.float32)
        assert found == (2.0**-24 if way == "off" else 2.0**-11)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def test_positions_of_a_cache_are_observed():
    """GPT-2 hands its cache over by position, Llama by keyword."""
    gpt2, llama = (echo_setup(adapted(tiny_model(family))).cache for family in ("gpt2", "llama"))
    assert gpt2.position == 1 and llama.position is None
    setup = echo_setup(adapted(tiny_model("llama")))
    setup.cache = None
    why, moved, _ = observe(setup, torch.tensor([[2, 3, 4], [2, 3, 5]]))
    assert why is None and moved == 0 and setup.cache == llama


# Which form a batch gets


def draft_of(rows, length=0):
    examples = random_examples(rows, seed=1, low=8 + length, high=14 + length)
    echo = EchoCollator(padded_collator())
    echo.schedule = RoutingSchedule(1, 1.0, 1.0, total_steps=10, batch_size=rows)
    return echo.draft(examples, 0, 0)


def measured(states, **more):
    return ProofResult(
        **{"logits": 0, "logits_allowed": 1, "sees_ahead": 0, "allowed": 1, "compared": 3, "states": states, **more}
    )


def test_each_kind_is_proved_once_and_longer_ones_again():
    choice, asked = PassChoice("auto", Agreement(), "Llama"), []

    def prove(draft, form):
        asked.append((draft.length, form))
        return measured(2.0 if form is SUFFIX and draft.length > 40 else 0.5)

    short, long, longer = draft_of(3), draft_of(3, length=40), draft_of(3, length=60)
    for drafts in ([short], [short], [long], [short, long], [longer, short]):
        choice.settle(drafts, prove, step=len(asked))
    assert [form for _, form in asked] == [SUFFIX, SUFFIX, ROWS, ROWS]
    assert [length for length, _ in asked] == [short.length, long.length, long.length, longer.length]
    assert choice.form(short) is choice.form(longer) is ROWS
    assert choice.state() == {"padded rows": "suffix"}
    choice.begin(choice.state())
    choice.settle([short], prove, step=9)
    assert [form for _, form in asked[4:]] == [ROWS]


def test_no_answer_needs_no_proof():
    choice = PassChoice("auto", Agreement(), "Llama")
    draft = draft_of(2)
    echo = EchoCollator(padded_collator())
    echo.schedule = RoutingSchedule(1, 1.0, 1.0, total_steps=10)
    silent = echo.draft([{"input_ids": [3, 4, 5], "labels": [-100] * 3}], 0, 0)
    choice.settle([silent], None, 0)
    assert not choice.verdicts and choice.form(silent) is SUFFIX
    choice.settle([silent, draft], lambda draft, form: measured(0.0), 1)
    assert choice.verdicts[draft.kind].step == 1


class Others(Agreement):
    """Two processes in one, of which the other says what it is told to."""

    def __init__(self, flag, values):
        super().__init__()
        self.flag, self.values = flag, list(values)

    def any(self, flag):
        return flag or self.flag

    def gather(self, value):
        return [value, self.values.pop(0)]


def test_a_process_keeps_others_company():
    """It has nothing to prove, and takes part; the other's result counts, its own does not."""
    forms_seen = []
    draft = draft_of(2)
    kind = "rows of several documents (packed or padding-free)"
    others = Others(True, [[(kind, 30)], dict.fromkeys(FORMS.values()), (True, measured(3.0)), (True, measured(0.1))])
    choice = PassChoice("auto", others, "Llama", one_form=True)
    choice.verdicts[draft.kind] = Verdict(draft.kind, SUFFIX, 100, measured(0.0), 0)

    def prove(draft, form):
        forms_seen.append(form)
        return measured(9.0)

    choice.settle([draft], prove, step=1)
    assert forms_seen == [SUFFIX, ROWS]
    assert choice.verdicts[kind].form is ROWS
    # where parameters are sharded, every process runs the same form from now on
    assert choice.form(draft) is ROWS


def test_multi_turn_rows_are_proved_like_others(tmp_path):
    trainer = echo_trainer(tmp_path, rows=conversation_rows(20), assistant_only_loss=True, max_steps=1)
    trainer.train()
    assert forms(trainer) == [SUFFIX] and len(trainer.model.get_base_model().model.layers) == DEPTH


def test_whole_rows_where_they_cost_less():
    """Such batches are a kind of their own, for which the full pass is proved; others keep the suffix pass."""
    choice = PassChoice("auto", Agreement(), "Llama", model=LLAMA_7B)
    echo = EchoCollator(padding_free_collator())
    echo.schedule = RoutingSchedule(1, 1.0, 1.0, total_steps=10, batch_size=13)
    answers = echo.draft(examples_of([1] * 13, [2] * 12 + [60]), 0, 0)
    prompts = echo.draft(examples_of([30] * 13, [2] * 12 + [60]), 0, 1)
    asked = []

    def prove(draft, form):
        asked.append(form)
        return measured(0.0)

    choice.settle([answers, prompts], prove, 0)
    assert asked == [SUFFIX, ROWS]
    assert [choice.form(draft) for draft in (answers, prompts)] == [ROWS, SUFFIX]
    assert [plan.n_parts for plan in choice.plans([answers, prompts])] == [0, 2]
    assert {record["batches"]: record["pass"] for record in choice.records()} == {
        "rows of several documents (packed or padding-free)": "suffix",
        "rows of several documents (packed or padding-free), where whole rows cost less": "full",
    }
    # The suffix pass is still there, should whole rows not be exact.
    choice.begin()
    choice.settle([answers], lambda draft, form: measured(2.0 if form is ROWS else 0.5), 0)
    assert choice.form(answers) is BATCH
    for wanted, one_form in (("suffix", False), ("auto", True)):
        other = PassChoice(wanted, Agreement(), "Llama", one_form, LLAMA_7B)
        assert other.kind(answers) == answers.kind


def test_a_run_takes_whole_rows_where_they_cost_less(tmp_path, monkeypatch):
    """The losses are those of the suffix pass."""
    # Of a tiny model the bytes would count most, of which suffixes keep fewer.
    monkeypatch.setattr(costs, "FLOPS_PER_BYTE", 1)
    rows = examples_of([1] * 13, [2] * 12 + [60])
    settings = {
        "rows": rows, "padding_free": True, "per_device_train_batch_size": 13, "max_steps": 2, "max_length": None,
        "echo_p_end": 1.0, "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip
    auto = echo_trainer(tmp_path / "auto", **settings)
    auto.train()
    assert forms(auto) == [ROWS]
    suffix = echo_trainer(tmp_path / "suffix", echo_pass="suffix", **settings)
    suffix.train()
    assert forms(suffix) == [SUFFIX]
    torch.testing.assert_close(losses(auto), losses(suffix), rtol=1e-5, atol=0)
