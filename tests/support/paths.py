"""Where the repository and the data of its tests lie."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
DATA = ROOT / "tests" / "data"
TASKS = DATA / "commonsense"
BASE = ROOT / "echo_trainer" / "quickstart" / "base"
EXAMPLE_CARD = ROOT / "model_cards" / "example"
