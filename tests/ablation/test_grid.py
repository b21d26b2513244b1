"""recipes/ablation/grid.py: the table over the cells of a grid is that of the reports it is made from."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from echo_trainer.ablation.statistics import holm

RECIPES = Path(__file__).parents[2] / "recipes" / "ablation"


@pytest.fixture
def grid(monkeypatch):
    spec = importlib.util.spec_from_file_location("grid", RECIPES / "grid.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["grid.py", *map(str, words)])
        module.main()

    return run


def test_the_shipped_grid_is_that_of_its_reports(grid, tmp_path, capsys):
    folder = shutil.copytree(RECIPES / "results" / "depth", tmp_path / "depth")
    shipped = (folder / "grid.json").read_bytes()
    for name in ("grid.json", "grid.png"):
        (folder / name).unlink()
    grid(folder, "--compare", "strong", "lora-longer")
    assert (folder / "grid.json").read_bytes() == shipped and (folder / "grid.png").stat().st_size > 10_000
    found = json.loads(shipped)["cells"]
    assert [(cell["share"], cell["examples"]) for cell in found[:3]] == [(0.5, 96), (0.5, 384), (0.5, 3000)]
    corrected = [cell["plain"]["accuracy"]["holm_over_cells"] for cell in found]
    assert corrected == holm([cell["plain"]["accuracy"]["p"] for cell in found])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 + len(found)
    for line, cell in zip(shown[2:], found, strict=True):
        report = folder / f"layers-{cell['share']}-examples-{cell['examples']}" / "report.md"
        row = next(line for line in report.read_text().splitlines() if line.startswith("| `strong` - `lora-longer`"))
        figures = row.split("|")[4].strip()
        assert f"| {figures} |" in line


def test_what_cannot_be_compared(grid, tmp_path):
    with pytest.raises(SystemExit, match=r"holds no layers-SHARE-examples-N/summary.json"):
        grid(tmp_path, "--compare", "strong", "lora")
    shutil.copytree(RECIPES / "results" / "depth", tmp_path / "depth")
    with pytest.raises(
        SystemExit, match="No cell compares strong with hope: there are echo - echo-zero, strong - lora-l"
    ):
        grid(tmp_path / "depth", "--compare", "strong", "hope")
