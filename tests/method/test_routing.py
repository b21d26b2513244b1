"""Routing: a pure function with the right frequencies, and the same whatever the order of the work."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trainer.method.routing import RoutingSchedule, uniform


def test_probability_is_linear_from_start_to_end():
    schedule = RoutingSchedule(0, 1.0, 0.2, total_steps=5)
    assert [schedule.probability(k) for k in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert RoutingSchedule(0, 0.7, 0.2, total_steps=1).probability(0) == 0.7


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_frequency(p):
    n = 4000
    schedule = RoutingSchedule(3, p, p, total_steps=10**9, batch_size=n)
    share = schedule.draw(7, 0, np.arange(n)).mean()
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_neighbours_are_independent():
    """Draws of neighbouring positions and documents are uncorrelated, and seeds differ."""
    n = 4000
    i = np.arange(n)
    columns = [uniform(0, i), uniform(0, i + 1), uniform(0, i, 1), uniform(1, i)]
    for column in columns[1:]:
        products = ((columns[0] - 0.5) * (column - 0.5)).mean()
        assert abs(12 * products) < 4 / math.sqrt(n)


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8), (1, 8, 1)])
def test_position_depends_on_the_global_order_only(batch, accumulation, world):
    """The eight samples of a step have positions 0 .. 7 of it, however the step is split."""
    positions = [
        RoutingSchedule(0, 1, 1, 10, accumulation, world, rank, batch).position(3, micro_batch, row)
        for micro_batch in range(accumulation)
        for rank in range(world)
        for row in range(batch)
    ]
    assert positions == list(range(24, 32))


def test_routes_never_change():
    """The draws are part of what a resumed run relies on, also after an upgrade."""
    assert [round(uniform(42, i), 12) for i in range(3)] == [0.820198147861, 0.368128450909, 0.876797967446]


@given(
    seed=st.integers(-(2**63), 2**70),
    places=st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 2**63)), min_size=1, max_size=20),
)
def test_draws_are_those_of_numpys_generator(seed, places):
    """All at once, bit for bit what a generator made for each of them gives."""
    positions, documents = (np.array(column, np.uint64) for column in zip(*places, strict=True))
    expected = []
    for place in places:
        generator = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64), counter=[*place, 0, 0])
        expected.append(int(generator.random_raw() >> np.uint64(11)) * 2.0**-53)
    assert uniform(seed, positions, documents).tolist() == expected
    assert [float(uniform(seed, *place)) for place in places] == expected


def test_many_draws_are_as_many_single_ones():
    schedule = RoutingSchedule(5, 0.4, 0.4, total_steps=10, accumulation=2, world_size=3, rank=1, batch_size=7)
    rows, documents = np.arange(7).repeat(4), np.tile(np.arange(4), 7)
    drawn = schedule.draw(3, 1, rows, documents)
    assert drawn.tolist() == [bool(schedule.draw(3, 1, r, d)) for r, d in zip(rows, documents, strict=True)]
    assert 0 < drawn.sum() < 28
