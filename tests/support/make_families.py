"""Write docs/families.md and the results it is made of, tests/data/families.json: suffix or full, and since when.

    python tests/support/make_families.py            every family (about ten minutes)
    python tests/support/make_families.py llama opt  these only

Run it with each release of transformers that the package is tested with; the results of each are kept beside those of
the others, and "since" is the oldest release from which on they are the same.
"""

import json
import logging
import sys
import warnings

import transformers
from packaging.version import Version
from paths import DATA, ROOT

RESULTS = DATA / "families.json"
PAGE = ROOT / "docs" / "families.md"

HEAD = """# Which echo pass a family gets

Made by `python tests/support/make_families.py` from tiny random models of every causal family of transformers, with
LoRA on all linear layers. The passes were compared as a training run compares them at its first step, and the step
that was chosen has the loss and every gradient of a full second pass, with and without gradient checkpointing.

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
    """The form that the results give for a family and a layout with this release; None where they have none."""
    found = read().get(family, {}).get(layout, {}).get(transformers.__version__)
    return found["form"] if found else None


def read() -> dict:
    """The results so far: by family, layout and release."""
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
            found = results[family].setdefault(layout, {})
            found[release] = {"form": outcome.form, "why": outcome.why}
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
        newest = {layout: found[layout][max(found[layout], key=Version)] for layout in found}
        packed = {newest[layout]["form"] for layout in ("packed", "padding-free")}
        since = max((_since(releases) for releases in found.values()), key=Version)
        why = "; ".join(dict.fromkeys(_short(entry["why"]) for entry in newest.values() if entry["why"]))
        rows.append(f"| {family} | {newest['padded']['form']} | {' or '.join(sorted(packed))} | {since} | {why} |\n")
    return HEAD.format(missing=len(missing), names=", ".join(missing)) + "".join(rows)


def _since(releases: dict) -> str:
    """The oldest release from which on the form is that of the newest."""
    order = sorted(releases, key=Version, reverse=True)
    since = order[0]
    for release in order:
        if releases[release]["form"] != releases[order[0]]["form"]:
            break
        since = release
    return since


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
