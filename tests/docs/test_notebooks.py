"""The notebooks run from their first cell to the last, and show what they show in the repository."""

import importlib.util
import re
import sys

import pytest
from paths import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytestmark = pytest.mark.slow

FOLDER = ROOT / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLACE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|Users|opt)/")


def runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(notebook):
    """Of each cell the kinds of its outputs; figures differ between machines."""
    return [
        [(output["output_type"], sorted(output.get("data", {}))) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_showed(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(entry for entry in sys.path if entry))  # of a checkout, too
    found = runner().run(path)
    assert shown(found) == shown(nbformat.read(path, as_version=4))
    texts = [output.get("text", "") for cell in found.cells for output in cell.get("outputs", [])]
    assert any("PEFT alone answers the same: True" in text for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_names_no_machine_and_is_small(path):
    assert not PLACE.search(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 300_000
    assert sum(map(len, shown(nbformat.read(path, as_version=4)))) >= 5


def test_a_text_that_progress_bars_cut_is_made_whole():
    parts = [("stdout", "a\n"), ("stderr", "50%"), ("stdout", "b\n")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in parts]
    outputs.append(nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=7))
    text, value = runner().kept(outputs)
    assert text.text == "a\nb\n" and value.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_a_notebook(path):
    nbformat.validate(nbformat.read(path, as_version=4))
