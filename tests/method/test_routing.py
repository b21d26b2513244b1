"""Routing: a pure function with the right frequencies, and the same whatever the order of the work."""

import math

import pytest

from echo_trainer.method.routing import RoutingSchedule, uniform


def test_probability_is_linear_from_start_to_end():
    schedule = RoutingSchedule(0, 1.0, 0.2, total_steps=5)
    assert [schedule.probability(k) for k in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert RoutingSchedule(0, 0.7, 0.2, total_steps=1).probability(0) == 0.7


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_frequency(p):
    schedule = RoutingSchedule(3, p, p, total_steps=10**9, batch_size=1)
    n = 4000
    share = sum(schedule.draw(step, 0, 0) for step in range(n)) / n
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_neighbours_are_independent():
    """Draws of neighbouring positions and documents are uncorrelated, and seeds differ."""
    n = 4000
    columns = [
        [uniform(0, i) for i in range(n)],
        [uniform(0, i + 1) for i in range(n)],
        [uniform(0, i, 1) for i in range(n)],
        [uniform(1, i) for i in range(n)],
    ]
    for column in columns[1:]:
        products = sum((a - 0.5) * (b - 0.5) for a, b in zip(columns[0], column, strict=True)) / n
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
