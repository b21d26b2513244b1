"""Each arm does what it says and nothing else; all arms of a seed start alike and see the same batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ablation_cases import UNTAUGHT, do, tiny_recipe, trainer_of
from models import adapted, tiny_model

from echo_trainer.ablation.arms import ARMS, find_arms
from echo_trainer.ablation.data import drawn, load_examples
from echo_trainer.ablation.echoes import NETWORKS, one_cycle
from echo_trainer.ablation.plan import Run, specification
from echo_trainer.ablation.results import load_items
from echo_trainer.ablation.run_one import Workbench
from echo_trainer.ablation.schedule import matched_run
from echo_trainer.method.network import EchoNetworks, NetworkForm
from echo_trainer.passes.layers import find_sites
from echo_trainer.quiet import quiet_libraries

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def recipe(folder):
    return tiny_recipe(folder, {"gradient_accumulation_steps": 2})


@pytest.fixture(scope="module")
def bench(recipe):
    return Workbench(recipe)


@pytest.fixture(scope="module")
def results(recipe, bench, folder):
    """Every arm, trained for three steps with LoRA."""
    return {arm: do(recipe, folder / "out", arm, bench=bench) for arm in UNTAUGHT}


# what the networks see


def networks(kind, seed=3):
    model = adapted(tiny_model())
    return NETWORKS[kind](find_sites(model.get_base_model(), [1]), 2, 32, NetworkForm(bottleneck=8), seed=seed)


def states(segments=5):
    return torch.randn(2, segments, 32, generator=torch.Generator().manual_seed(1))


def test_zero_means_no_injection_at_all():
    control = networks("zero")
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter)
    delta, _ = control(states())
    assert all(not value.any() for value in delta.values())


def test_shuffled_gives_everyone_the_echo_of_another():
    control, own = networks("shuffled"), states().mean(dim=0)
    orders = set()
    for step in range(20):
        control.place = (step, 0)
        given = control.aggregate(states())
        order = [int((own == z).all(dim=1).nonzero()) for z in given]
        assert sorted(order) == [0, 1, 2, 3, 4]
        assert all(place != source for place, source in enumerate(order))
        orders.add(tuple(order))
    assert len(orders) > 5


def test_shuffled_alone_gets_nothing():
    assert not networks("shuffled").aggregate(states(1)).any()


def test_shuffled_answers_to_one_prompt_do_not_trade_with_each_other():
    control = networks("shuffled")
    z = torch.arange(1.0, 4.0)[[0, 0, 1, 2, 2, 2]][:, None].expand(-1, 32)
    for step in range(10):
        control.place, control.prompt_G = (step, 0), np.array([0, 0, 1, 2, 2, 2])
        given = control.alter(z)
        assert (given != z).all()
        assert [len(part.unique()) for part in given.split([2, 1, 3])] == [1, 1, 1]  # one echo for a prompt
        assert set(given.unique().tolist()) == {1.0, 2.0, 3.0}
    control.prompt_G = np.zeros(6, int)
    assert not control.alter(z).any()


def test_noise_has_the_norm_and_nothing_else_of_z():
    control, own = networks("noise"), states().mean(dim=0)
    given = control.aggregate(states())
    torch.testing.assert_close(given.norm(dim=1), own.norm(dim=1))
    assert torch.cosine_similarity(given, own, dim=1).abs().max() < 0.6  # 32 dimensions, 5 vectors
    assert len({tuple(z.tolist()) for z in given}) == 5


@pytest.mark.parametrize("kind", ["shuffled", "noise"])
def test_draws_depend_on_the_place_only(kind):
    control = networks(kind)
    first = control.aggregate(states())
    torch.manual_seed(99)
    assert torch.equal(control.aggregate(states()), first)
    before = torch.get_rng_state()
    others = []
    for place in ((0, 1), (1, 0), (2, 0)):
        control.place = place
        others.append(control.aggregate(states()))
    assert torch.equal(torch.get_rng_state(), before)
    assert any(not torch.equal(other, first) for other in others)
    if kind == "noise":
        assert all(not torch.equal(other, first) for other in others)
        assert not torch.equal(networks(kind, seed=4).aggregate(states()), first)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_one_cycle(n):
    for seed in range(30):
        order = one_cycle(n, np.random.default_rng(seed))
        place, seen = 0, 0
        while seen == 0 or place != 0:
            place, seen = order[place], seen + 1
        assert seen == n


# what is trained


@pytest.mark.parametrize(
    ("arm", "field", "value"),
    [
        ("lora", "echo_enabled", False),
        ("lora-unmasked", "completion_only_loss", False),
        ("echo-no-kd", "echo_kd_weight", 0.0),
        ("echo-no-routing", "echo_p_end", 1.0),
        ("echo-teacher-plain", "echo_teacher", "plain"),
        ("echo-mutual", "echo_teacher", "mutual"),
        ("echo-predicting", "echo_positions", "predicting"),
    ],
)
def test_settings_of_the_arms(bench, folder, arm, field, value):
    plain, changed = (trainer_of(bench, folder, name).args for name in ("echo", arm))
    assert getattr(changed, field) == value
    assert getattr(plain, field) != value
    ours = {*ARMS[arm].settings, "distributed_state"}
    different = {k for k in vars(plain) if getattr(plain, k) != getattr(changed, k) and not k.startswith("_")}
    assert different <= ours


def test_arms_are_paired(results):
    """Same initial weights and, step by step, the same batches, whatever the arm."""
    for arm, result in results.items():
        assert result["initial_weights"] == results["lora"]["initial_weights"], arm
        assert result["batches"][:3] == results["lora"]["batches"], arm
        assert len(result["batches"]) == (4 if arm == "lora-longer" else 3)
    assert len(set(results["lora"]["batches"])) == 3


def test_arms_differ(results):
    """No arm is another one under a second name (compute-matched has the same steps here)."""
    nll = {arm: result["tasks"]["words"]["nll"] for arm, result in results.items() if not ARMS[arm].flops_of}
    assert nll.pop("strong-zero") == pytest.approx(nll["lora"], rel=1e-4)  # it is LoRA, up to rounding
    assert len(set(nll.values())) == len(nll), nll


def test_weight_of_the_loss(results):
    """1 where nothing is routed or routed samples count once; 1 + p where they count twice."""
    weight = {arm: result["loss_weight"] for arm, result in results.items()}
    once = [arm for arm in UNTAUGHT if arm.startswith(("lora", "strong"))]
    assert {weight[arm] for arm in once} == {1.0}
    assert weight["echo-no-routing"] == weight["echo-zero-no-routing"] == 2.0
    assert 1.2 < weight["echo"] == weight["echo-zero"] == weight["echo-predicting"] < 2.0


def test_the_echo_pass_is_evaluated_where_an_arm_has_its_own(results, folder):
    with_echo = {arm for arm, result in results.items() if "echo_nll" in result["tasks"]["words"]}
    assert with_echo == {arm for arm in UNTAUGHT if ARMS[arm].echo != "zero" and not arm.startswith("lora")}
    task = results["strong"]["tasks"]["words"]
    assert task["echo_nll"] != pytest.approx(task["nll"], rel=1e-4)
    items = load_items(folder / "out", Run("strong", "lora", 0, 0.01))["words"]
    assert len(items["echo_nll"]) == len(items["echo_correct"]) == task["n"]
    assert np.mean(items["echo_nll"]) == pytest.approx(task["echo_nll"], abs=1e-5)


def test_seeds_differ_and_repeat(recipe, bench, folder, results):
    again = do(recipe, folder / "again", "echo", bench=bench)
    assert again["tasks"] == results["echo"]["tasks"]  # whatever ran before in this process
    fresh = do(recipe, folder / "fresh", "echo-shuffled")
    assert fresh["tasks"] == results["echo-shuffled"]["tasks"]
    other = do(recipe, folder / "other", "echo", bench=bench, seed=1)
    assert other["initial_weights"] != again["initial_weights"]
    assert other["batches"] != again["batches"]


@pytest.mark.long
def test_dora_is_trained_and_paired(recipe, bench, folder, results):
    one, other = (do(recipe, folder / "dora", arm, bench=bench, adapter="dora") for arm in ("lora", "echo"))
    assert one["initial_weights"] == other["initial_weights"] != results["lora"]["initial_weights"]
    assert one["batches"] == other["batches"] == results["lora"]["batches"]


def test_unmasked_scores_the_prompt(results):
    masked, whole = (results[arm]["flops_sizes"] for arm in ("lora", "lora-unmasked"))
    assert masked["tokens"] == whole["tokens"]
    assert whole["scored"] > 1.5 * masked["scored"]


def test_zero_keeps_masking_and_routing_only(bench, folder, results):
    log = results["echo-zero"]["losses"]
    assert abs(log["kd"]) < 1e-6  # rounding; 1e-3 and more with an echo
    assert log["relative_delta"] == 0
    assert log["ce_echo"] == pytest.approx(log["ce_plain_routed"], rel=1e-5)
    assert log["routed"] > 0
    assert results["echo"]["losses"]["relative_delta"] > 0
    trainer = trainer_of(bench, folder, "echo-zero")
    before = {n: p.clone() for n, p in trainer.echo_networks.named_parameters()}
    with quiet_libraries():
        trainer.train()
    assert all(torch.equal(before[n], p) for n, p in trainer.echo_networks.named_parameters())


@pytest.mark.parametrize("arm", ["echo-shuffled", "echo-noise"])
def test_controls_know_their_place_in_the_run(bench, folder, arm):
    trainer = trainer_of(bench, folder, arm)
    places, alter = [], trainer.echo_networks.alter

    def watched(z):
        places.append(trainer.echo_networks.place)
        return alter(z)

    trainer.echo_networks.alter = watched
    with quiet_libraries():
        trainer.train()
    assert places[0] == (0, 0)
    assert places == sorted(set(places))
    assert {place for place, _ in places} == {0, 1, 2}
    assert {micro for _, micro in places} == {0, 1}


def test_echo_networks_of_all_arms_start_alike(bench, folder):
    start = [dict(trainer_of(bench, folder, arm).echo_networks.state_dict()) for arm in ("echo", "echo-noise")]
    assert all(torch.equal(start[0][name], start[1][name]) for name in start[0])
    assert type(trainer_of(bench, folder, "echo").echo_networks) is EchoNetworks


def test_compute_matched_spends_the_flops_of_echo(tmp_path):
    recipe = tiny_recipe(tmp_path, {"max_steps": 20, "echo_p_end": 1.0})
    bench = Workbench(recipe)
    output = tmp_path / "out"
    spent = {arm: do(recipe, output, arm, bench=bench) for arm in ("lora", "echo")}
    run, reason = matched_run(
        recipe, Run("lora-compute-matched", "lora", 0, 0.01), output, {"lora": {"lora": 0.01, "echo": 0.01}}
    )
    assert reason is None
    assert run.max_steps > 20
    matched = do(recipe, output, "lora-compute-matched", bench=bench, max_steps=run.max_steps)
    assert matched["steps"] == run.max_steps
    step = spent["lora"]["flops"] / 20
    assert abs(matched["flops"] - spent["echo"]["flops"]) < 1.5 * step  # half a step, and batches are unequal
    assert matched["batches"][:20] == spent["lora"]["batches"]


def test_matched_waits_for_its_references(tmp_path):
    recipe = tiny_recipe(tmp_path)
    _, reason = matched_run(
        recipe, Run("lora-compute-matched", "lora", 0, 0.01), tmp_path, {"lora": {"lora": 0.01, "echo": 0.01}}
    )
    assert "lora" in reason


# data and names


def test_held_out_examples_are_in_no_training_set(recipe):
    train, held_out = load_examples(recipe)
    assert len(held_out) == 4
    assert len(train) == 36
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert load_examples(recipe) == (train, held_out)


def test_each_seed_may_draw_its_own_examples(tmp_path):
    """Others for each seed, the same for all arms; what is held out is in none of them."""
    recipe = tiny_recipe(tmp_path, train_limit=12, train_draw="seed")
    pool, held_out = load_examples(recipe)
    draws = [drawn(recipe, pool, seed) for seed in (0, 1)]
    assert [len(draw) for draw in draws] == [12, 12] and draws[0] != draws[1]
    assert draws[0] == drawn(recipe, pool, 0)
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for draw in draws for row in draw}
    bench = Workbench(recipe)
    one, other = (do(recipe, tmp_path / "out", arm, bench=bench, seed=1) for arm in ("lora", "strong"))
    assert one["batches"] == other["batches"] != do(recipe, tmp_path / "out", "lora", bench=bench)["batches"]
    run = Run("lora", "lora", 0, 0.01)
    once = replace(recipe, train_draw="once")
    assert "train_draw" not in specification(once, run, {}) and specification(recipe, run, {})["train_draw"] == "seed"


def test_what_an_arm_is_measured_against_is_added():
    assert [arm.name for arm in find_arms(["lora-compute-matched"])] == ["lora", "lora-compute-matched", "echo"]
    assert [arm.name for arm in find_arms(["lora-strong-matched"])] == ["lora", "strong", "lora-strong-matched"]
    assert len(ARMS) == 24 and len(UNTAUGHT) == 21
    with pytest.raises(ValueError, match="echo-typo"):
        find_arms(["echo-typo"])
