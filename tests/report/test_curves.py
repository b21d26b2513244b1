"""The curves of a run: same samples beside each other, and a plain word on an echo that does nothing."""

import pytest
from matplotlib.figure import Figure

from echo_trainer.report.curves import what_it_does, write_curves


def history(size=0.1, echo=True):
    """Three log lines and an evaluation."""
    found = []
    for step in (1, 2, 3):
        found.append({"step": step, "loss": 9.0 / step})
        if echo:
            found[-1] |= {"echo/ce_plain_routed": 4.0 / step, "echo/ce_echo": 3.0 / step, "echo/kd": 0.1,
                          "echo/relative_delta": size * step / 3, "echo/agreement": 0.9, "echo/p": 0.5}  # fmt: skip
    return [*found, {"step": 3, "eval_loss": 2.0, "eval_echo_advantage": 0.1, "eval_echo_advantage_se": 0.05}]


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are written."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def test_both_passes_are_drawn_on_the_same_samples(tmp_path, drawn):
    assert write_curves(history(), tmp_path) == ["assets/training.png"]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    losses, at_work, gain = drawn[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in losses.lines}
    assert lines["plain, routed samples"] == [4.0, 2.0, 4 / 3] and lines["echo, same samples"] == [3.0, 1.5, 1.0]
    assert list(gain.lines[0].get_ydata()) == pytest.approx([1.0, 0.5, 1 / 3])
    assert "10%" in at_work.get_title(loc="left")


@pytest.mark.parametrize("size", [0.0, 0.004, 0.019])
def test_an_echo_that_does_nothing_is_said_to(tmp_path, drawn, size):
    write_curves(history(size), tmp_path)
    assert "next to nothing" in drawn[0].axes[1].get_title(loc="left")
    assert "next to nothing" not in what_it_does([{"echo/relative_delta": 0.03}])


def test_a_plain_run_and_one_without_anything_to_draw(tmp_path, drawn):
    write_curves(history(echo=False), tmp_path)
    assert len(drawn[0].axes) == 1
    assert write_curves(history()[:1], tmp_path / "none") == [] and not (tmp_path / "none").exists()


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_curves(history(), tmp_path / name)
    assert (tmp_path / "a/training.png").read_bytes() == (tmp_path / "b/training.png").read_bytes()
