"""Long work says how far it is, on a terminal and in a file."""

import io

import torch
from rich.console import Console

from echo_trainer.progress import Lines
from echo_trainer.quickstart.run import Settings, one_thread, quickstart


def test_lines_are_said_where_bars_are_not_seen():
    for terminal in (True, False):
        file = io.StringIO()
        with Lines(Console(file=file, force_terminal=terminal)) as progress:
            progress.say("[half] of it")
        assert ("[half] of it" in file.getvalue()) == (not terminal)


def test_the_quickstart_says_what_it_has_done_in_a_file(tmp_path):
    file = io.StringIO()
    quickstart(tmp_path / "out", Settings(steps=1), 0, Console(file=file, width=200))
    lines = file.getvalue().splitlines()
    said = [line for line in lines if line.startswith(("base, held-out", "LoRA, ", "Echo-LoRA, "))]
    assert len([line for line in said if "1 steps in" in line]) == 2
    assert len([line for line in said if "of 200 right" in line]) == 3


def test_the_quickstart_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
