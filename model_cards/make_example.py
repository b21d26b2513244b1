"""Make `model_cards/example/` again: the card of the quickstart's Echo-LoRA adapter, with its record and picture.

python model_cards/make_example.py          # after a change of the quickstart or of the record; about two minutes
python model_cards/make_example.py --card   # after a change of the templates: the same record, rendered again
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from echo_trainer.evaluation.results import wilson
from echo_trainer.quickstart import run as quickstart
from echo_trainer.report.folder import update_record
from echo_trainer.report.render import render_card

EXAMPLE = Path(__file__).resolve().parent / "example"


def main() -> None:
    """Run the quickstart, write its measured figure into the record, and keep the card."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "quickstart")
        accuracy = quickstart.quickstart(out, quickstart.Settings(), 0, Console())["Echo-LoRA"]
        n = len(quickstart.TEST.read_text(encoding="utf-8").splitlines())
        n = min(n, getattr(quickstart, "N_TEST", n))
        result = {
            "task": "two hops", "dataset": quickstart.DATASET_NAME, "split": "test", "metric": "exact match",
            "value": accuracy, "n": n, "interval": list(wilson(round(accuracy * n), n)), "seeds": [0],
        }  # fmt: skip
        update_record(out, evaluation=[result])
        shutil.rmtree(EXAMPLE, ignore_errors=True)
        for name in ("README.md", "echo_run.json", "assets/training.png"):
            (EXAMPLE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / name, EXAMPLE / name)


def render() -> None:
    """Render the card of the record that is there."""
    record = json.loads((EXAMPLE / "echo_run.json").read_text(encoding="utf-8"))
    (EXAMPLE / "README.md").write_text(render_card(record), encoding="utf-8")


if __name__ == "__main__":
    render() if sys.argv[1:] == ["--card"] else main()
    print(f"Written: {EXAMPLE}")
