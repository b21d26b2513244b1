"""Write docs/families.md and the results it is made of, tests/data/families.json: suffix or full, and since when.

    python tests/make_families.py            every family (about ten minutes)
    python tests/make_families.py llama opt  these only

Run it with each release of transformers that the package is tested with: a result that stays the same keeps the
oldest release it was seen with; one that changed begins anew.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import transformers
from packaging.version import Version

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "data" / "families.json"
PAGE = ROOT / "docs" / "families.md"

HEAD = """# Which echo pass a family gets

Made by `python tests/make_families.py` from tiny random models of every causal family of transformers, with LoRA on
all linear layers. The passes were compared as a training run compares them at its first step, and the step that was
chosen has the loss and every gradient of a full second pass, with and without gradient checkpointing.

- **suffix**: the echo pass runs the answers only.
- **full**: it runs whole rows, about twice the price of LoRA. Where the model itself mixes packed documents (its mask
  is made without position ids on this attention kernel) plain SFT mixes them as well: train it padded.
- **refused**: the model sees later tokens, so it cannot be trained on answers.

Your own model is compared in every run, whatever this table says. "Since" is the oldest release of transformers that
was seen to give this result. On a CPU, with sdpa, or eager attention where a family knows no sdpa; {missing} families
could not be made small enough to try ({names}).

| family | padded | packed, padding-free | since | why not suffix |
|---|---|---|---|---|
"""


def known_outcome(family: str, layout: str) -> str | None:
    """The form that the results give for a family and a layout; None where they have none."""
    found = read().get(family, {}).get(layout)
    return found["form"] if found else None


def read() -> dict:
    """The results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def main(families: list[str]) -> None:
    """Try the families and write both files."""
    from families import causal_families, vision_language_model
    from family_cases import LAYOUTS, NotTriedError, try_family

    results, release = read(), transformers.__version__
    for family in families or [*causal_families(), *vision_language_model.families]:
        for layout in LAYOUTS:
            try:
                outcome = try_family(family, layout)
            except NotTriedError as error:
                print(f"{family}: {error}")
                results.setdefault(family, {}).setdefault("not tried", str(error))
                break
            results.setdefault(family, {}).pop("not tried", None)
            before = results[family].get(layout, {})
            since = before.get("since", release) if before.get("form") == outcome.form else release
            since = min(since, release, key=Version)
            results[family][layout] = {"form": outcome.form, "why": outcome.why, "since": since}
            print(f"{family:24} {layout:13} {outcome.form}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(results))


def render(results: dict) -> str:
    """The page."""
    missing = sorted(family for family, found in results.items() if "padded" not in found)
    rows = []
    for family, found in sorted(results.items()):
        if "padded" not in found:
            continue
        packed = {found[layout]["form"] for layout in ("packed", "padding-free")}
        since = max((entry["since"] for entry in found.values()), key=Version)
        why = "; ".join(dict.fromkeys(_short(entry["why"]) for entry in found.values() if entry["why"]))
        rows.append(f"| {family} | {found['padded']['form']} | {' or '.join(sorted(packed))} | {since} | {why} |\n")
    return HEAD.format(missing=len(missing), names=", ".join(missing)) + "".join(rows)


def _short(why: str) -> str:
    if "mixes packed documents" in why:
        return "mixes packed documents itself"
    if "differ by" in why:
        return "the passes differ"
    return why.removeprefix("suffix: it cannot be run ").strip("()").replace("|", "\\|")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    logging.getLogger("echo_trainer").setLevel(logging.CRITICAL)
    main(sys.argv[1:])
