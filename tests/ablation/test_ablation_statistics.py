"""Intervals that keep their promise: coverage, power and error rates on simulated runs like ours."""

import math

import numpy as np
import pytest

from echo_trainer.ablation.statistics import compare, holm, variance_of_mean

SEEDS = 5
N = 1000


def simulate(generator, items, seed_spread, effect=0.15, tasks=1, answers=True, seeds=SEEDS):
    """
    Differences (seeds, items) of each task between two arms whose runs answer the same items.

    On a logit scale: item difficulty, an item's own liking for the arm, luck of each run (with spread `seed_spread`,
    shared by its tasks), luck of each answer. With `answers` the scores are right or wrong, else the logits.
    """
    lucky_S, unlucky_S = generator.normal(0, seed_spread, (2, seeds, 1))
    found = []
    for _ in range(tasks):
        item_I, liking_I = generator.normal(0, 1.5, items), generator.normal(0, 0.3, items)
        noise_SI, other_SI = generator.normal(0, 0.5, (2, seeds, items))
        one_SI, other_SI = item_I + effect + liking_I + lucky_S + noise_SI, item_I + unlucky_S + other_SI
        if answers:
            one_SI, other_SI = (generator.random(x.shape) < 1 / (1 + np.exp(-x)) for x in (one_SI, other_SI))
        found.append(np.subtract(one_SI, other_SI, dtype=float))
    return found


def truth(seed_spread, effect=0.15):
    """The difference over infinitely many seeds and items."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()

    def share(mean, spread):
        return weights @ (1 / (1 + np.exp(-(mean + spread * nodes))))

    rest = 1.5**2 + 0.5**2 + seed_spread**2
    return share(effect, math.sqrt(rest + 0.3**2)) - share(0, math.sqrt(rest))


def coverage(true, draw, n=N):
    generator = np.random.default_rng(1)
    found = [compare(draw(generator)) for _ in range(n)]
    return np.mean([c.low <= true <= c.high for c in found])


@pytest.mark.parametrize(
    ("items", "seed_spread"), [(200, 0.0), (200, 0.15), (200, 0.4), (2000, 0.0), (2000, 0.05), (2000, 0.2)]
)
def test_intervals_of_accuracy_cover_the_truth(items, seed_spread):
    share = coverage(truth(seed_spread), lambda g: simulate(g, items, seed_spread))
    assert 0.93 <= share <= 0.97, share


@pytest.mark.parametrize(("items", "seed_spread"), [(200, 0.0), (200, 0.05)])
def test_intervals_of_nll_cover_the_truth(items, seed_spread):
    share = coverage(0.15, lambda g: simulate(g, items, seed_spread, answers=False))
    assert 0.93 <= share <= 0.97, share


def test_intervals_of_a_macro_average_cover_the_truth():
    share = coverage(truth(0.1), lambda g: simulate(g, 300, 0.1, tasks=4))
    assert 0.93 <= share <= 0.97, share


@pytest.mark.parametrize("seeds", [3, 10])
def test_other_numbers_of_seeds(seeds):
    share = coverage(truth(0.15), lambda g: simulate(g, 200, 0.15, seeds=seeds))
    assert 0.93 <= share <= 0.975, share


def test_items_or_seeds_alone_would_not_do():
    """The simulation can tell: an interval over items alone is wrong where seeds differ."""

    def over_items(differences):
        per_item = differences[0].mean(axis=0)
        return per_item.mean(), 1.96 * per_item.std(ddof=1) / math.sqrt(len(per_item))

    generator = np.random.default_rng(2)
    true, hits = truth(0.15), 0
    for _ in range(300):
        mean, half = over_items(simulate(generator, 2000, 0.15))
        hits += abs(mean - true) <= half
    assert hits / 300 < 0.75


def test_a_detectable_difference_is_detected_four_times_in_five():
    """The true effect set to the mean detectable difference is found in about 80 % of simulations."""
    generator = np.random.default_rng(3)
    detectable = np.mean([compare(simulate(generator, 300, 0.05, 0.0)).detectable for _ in range(200)])
    # effect on the logit scale with that difference in accuracy
    effects = np.linspace(0, 2, 400)
    effect = float(np.interp(detectable, [truth(0.05, e) for e in effects], effects))
    found = np.mean([compare(simulate(generator, 300, 0.05, effect)).p < 0.05 for _ in range(N)])
    assert 0.75 <= found <= 0.87, found


def test_no_effect_is_found_in_one_of_twenty():
    generator = np.random.default_rng(4)
    found = np.mean([compare(simulate(generator, 200, 0.1, 0.0)).p < 0.05 for _ in range(N)])
    assert 0.03 <= found <= 0.07, found


def test_p_and_interval_agree():
    generator = np.random.default_rng(5)
    for _ in range(100):
        c = compare(simulate(generator, 50, 0.2, 0.3))
        assert (c.p < 0.05) == (c.low > 0 or c.high < 0)
        assert c.low < c.difference < c.high < c.difference + 1.5 * c.detectable


def test_variance_is_that_of_a_table_done_by_hand():
    """Two-way layout without replication: mean squares written out with loops."""
    d = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 5.0]])
    rows, columns, mean = [1.0, 2.0], [0.5, 0.5, 3.5], 1.5
    seed = sum((r - mean) ** 2 for r in rows) / 1 * 3
    item = sum((c - mean) ** 2 for c in columns) / 2 * 2
    rest = sum((d[s][i] - rows[s] - columns[i] + mean) ** 2 for s in range(2) for i in range(3)) / 2
    variance, df = variance_of_mean([d])
    assert variance == pytest.approx((seed + item - rest) / 6)
    assert df == pytest.approx(max(1, (seed + item - rest) ** 2 / (seed**2 / 1 + item**2 / 2 + rest**2 / 2)))


def test_macro_weighs_tasks_alike():
    one, other = np.full((3, 10), 1.0), np.zeros((3, 1000))
    assert compare([one, other]).difference == 0.5


def test_order_of_arms_and_items_does_not_matter():
    generator = np.random.default_rng(6)
    d = simulate(generator, 40, 0.2)[0]
    there, back = compare([d]), compare([-d[:, ::-1]])
    assert back.difference == pytest.approx(-there.difference)
    assert (back.low, back.p) == pytest.approx((-there.high, there.p))


def test_edges():
    same = compare([np.zeros((5, 20))])
    assert (same.low, same.high, same.p) == (0, 0, 1)
    one_seed = compare([np.ones((1, 20))])
    assert one_seed.difference == 1
    assert math.isnan(one_seed.low) and math.isnan(one_seed.p) and math.isnan(one_seed.detectable)
    one_item = compare([np.array([[1.0], [0.0], [1.0]])])
    assert one_item.low < 2 / 3 < one_item.high
    for wrong in ([], [np.zeros((0, 4))], [np.zeros(4)], [np.zeros((2, 4)), np.zeros((3, 4))]):
        with pytest.raises(ValueError, match="seeds, items"):
            compare(wrong)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    corrected = holm([0.01, math.nan, 0.04])
    assert corrected[0] == pytest.approx(0.02) and math.isnan(corrected[1]) and corrected[2] == pytest.approx(0.04)
    assert holm([]) == []


def test_holm_keeps_the_family_wise_error():
    generator = np.random.default_rng(7)
    wrong = np.mean([min(holm(list(generator.random(11)))) < 0.05 for _ in range(4000)])
    assert 0.035 <= wrong <= 0.065
