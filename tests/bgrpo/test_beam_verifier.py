"""Functions in files: what such a file may do, and what is said where it cannot be loaded."""

import sys

import pytest

from echo_trainer.bgrpo.verifier import load_callable

DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Answer:
    text: str

def right(prompt, completion, row):
    return Answer(completion).text == row["answer"]
"""
NEIGHBOUR = "import neighbour_of_checks\nright = neighbour_of_checks.right\n"
PICKLED = """
import pickle

class Answer:
    pass

right = pickle.loads(pickle.dumps(Answer))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "neighbour_of_checks.py").write_text("def right(prompt, completion, row):\n    return True\n")
    yield tmp_path
    sys.modules.pop("neighbour_of_checks", None)


@pytest.mark.parametrize("text", [DATACLASS, NEIGHBOUR, PICKLED])
def test_a_file_is_loaded_as_a_script_is(folder, text):
    (folder / "checks.py").write_text(text)
    paths = list(sys.path)
    assert load_callable(f"{folder / 'checks.py'}:right", "verifier").__name__ in ("right", "Answer")
    assert sys.path == paths


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def right(:\n", "SyntaxError"),
        ("import nothing_here\n", "ModuleNotFoundError: No module named 'nothing_here'"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_loaded(folder, text, words):
    (folder / "checks2.py").write_text(text)
    with pytest.raises(ValueError, match=f"`verifier` names the file .*cannot be imported: {words}"):
        load_callable(f"{folder / 'checks2.py'}:right", "verifier")
    assert "checks2_of_verifier" not in sys.modules and str(folder) not in sys.path


def test_a_file_with_the_name_of_a_module(folder):
    import json

    (folder / "json.py").write_text("def right(prompt, completion, row):\n    return True\n")
    assert load_callable(f"{folder / 'json.py'}:right", "verifier")(None, None, {}) is True
    assert sys.modules["json"] is json
