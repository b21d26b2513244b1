"""The recipe of an ablation: a recipe of `echo-trainer sft` with a section `ablation`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..labelling.options import DistillOptions
from ..method.depth import CKA
from ..recipe.read import read_recipe
from .arms import ADAPTERS, ARMS

CHOICES = ("family", "shared", "arm")
DRAWS = ("once", "seed")
_SET_BY_US = {
    "seed": "`seeds` of the ablation section",
    "data_seed": "`seeds` of the ablation section",
    "echo_seed": "`seeds` of the ablation section",
    "learning_rate": "`learning_rates` of the ablation section",
    "use_dora": "`adapters` of the ablation section",
    "completion_only_loss": "the arms `lora` (answer only) and `lora-unmasked`",
    "dataset_name": "`train` of the ablation section",
    "datasets": "`train` of the ablation section",
    "echo_probation": "nothing: both passes of every run are evaluated",
    "echo_held_out": "`validation_items` of the ablation section",
    "echo_when_useless": "nothing: an arm that changes on the way could not be compared",
    "push_to_hub": "nothing: the runs of an ablation are measured and not published",
    "packing": "nothing: packed rows mix examples, so arms could not be paired",
}


@dataclass(frozen=True)
class AblationRecipe:
    """
    What to compare.

    Attributes:
        training: options of `echo-trainer sft`, for every run.
        train: files of training examples (JSON list or JSON lines).
        tests: test sets; each a dict with `file` and options of `data.make_task`.
        learning_rates: grid per family of arms; with one rate nothing is chosen.
        arms, adapters, seeds: what to cross.
        learning_rate_choice: "family" (one choice per family of arms), "arm" (one per arm) or "shared" (that of
            `lora` for all).
        learning_rate_seeds: every rate is tried on so many of the seeds, the first ones; what luck of one seed makes
            of a rate that is nearly too high says little about the others.
        validation_items: training examples held out of every run, for the choice of the learning rate.
        train_limit: use so many training examples; None: all.
        train_draw: "once" (the same ones in all runs) or "seed" (each seed draws its own, the same for all arms).
        evaluation_batch_size: test items at a time.
        labels: of the arms that have a teacher: `prompts` (how many of the pool a seed did not draw are answered),
            `steps` and `learning_rate` of the second training, and fields of `labelling.options.DistillOptions`.
    """

    training: dict[str, Any]
    train: list[str]
    tests: list[dict[str, Any]]
    learning_rates: list[float]
    arms: list[str]
    adapters: list[str]
    seeds: list[int]
    learning_rate_choice: str = "family"
    learning_rate_seeds: int = 3
    validation_items: int = 200
    train_limit: int | None = None
    train_draw: str = "once"
    evaluation_batch_size: int = 64
    labels: dict[str, Any] | None = None

    def __post_init__(self):
        for name, known in (("arms", ARMS), ("adapters", ADAPTERS)):
            values = getattr(self, name)
            unknown = [value for value in values if value not in known]
            if not values or unknown or len(set(values)) != len(values):
                raise ValueError(f"`{name}` is {values!r}. Write each once, out of: {', '.join(known)}.")
        if self.learning_rate_choice not in CHOICES:
            raise ValueError(
                f"`learning_rate_choice` is {self.learning_rate_choice!r}. It can be {', '.join(map(repr, CHOICES))}."
            )
        if self.train_draw not in DRAWS:
            raise ValueError(f"`train_draw` is {self.train_draw!r}. It can be {', '.join(map(repr, DRAWS))}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(_whole(s, 0) for s in self.seeds):
            raise ValueError(f"`seeds` is {self.seeds!r}. Write different whole numbers of at least 0, such as 0-4.")
        rates = self.learning_rates
        if not rates or len(set(rates)) != len(rates) or not all(_positive(r) for r in rates):
            raise ValueError(f"`learning_rates` is {rates!r}. Write different positive numbers, such as [1e-3, 2e-3].")
        if not self.train or not self.tests:
            raise ValueError("`train` and `tests` of the ablation section must name at least one file each.")
        if not _whole(self.validation_items, 1):
            raise ValueError(
                f"`validation_items` is {self.validation_items!r}; the learning rate is chosen on held-out training "
                f"examples, so write a whole number of at least 1."
            )
        for name in ("train_limit", "evaluation_batch_size", "learning_rate_seeds"):
            value = getattr(self, name)
            if not _whole(value, 1) and not (name == "train_limit" and value is None):
                raise ValueError(f"`{name}` is {value!r}; write a whole number of at least 1.")
        _check_labels(self)
        if "model_name_or_path" not in self.training:
            raise ValueError("No model: give `model_name_or_path` (an id on the Hub or a local folder) in the recipe.")
        taken = [f"`{key}` ({_SET_BY_US[key]} decides)" for key in self.training if key in _SET_BY_US]
        if taken:
            raise ValueError(f"The ablation sets these itself; leave them out of the recipe: {', '.join(taken)}.")
        if self.training.get("lora_layers") == CKA:
            raise ValueError(
                "`lora_layers: cka` would choose layers anew in every run. Choose once with `echo-trainer "
                "select-layers`, or take a part that needs no choice, such as `lora_layers: last`."
            )
        if not self.training.get("echo_p_start", 1.0) and not self.training.get("echo_p_end", 0.2):
            raise ValueError("The recipe has echo_p_start=0 and echo_p_end=0, so its arm `echo` would have no echo.")


def load_recipe(path: Path, **overrides: Any) -> AblationRecipe:
    """
    Read a recipe.

    Args:
        path: the YAML file.
        overrides: values of the ablation section that replace those of the file; None leaves the file's.

    Raises:
        ValueError: the file is no such recipe, or a value cannot work.
    """
    content = read_recipe(path)
    if not isinstance(content.get("ablation"), dict):
        raise ValueError(
            f"{path} has no section `ablation`. Take a recipe of `echo-trainer sft` and add one; "
            f"recipes/ablation/embedded.yaml is an example."
        )
    section = content.pop("ablation")
    known = {field.name for field in fields(AblationRecipe)} - {"training"}
    unknown = sorted(set(section) - known)
    if unknown:
        raise ValueError(f"The ablation section has unknown keys {unknown}. Known are: {sorted(known)}.")
    section |= {name: value for name, value in overrides.items() if value is not None}
    every = [arm.name for arm in ARMS.values() if arm.teacher is None or section.get("labels")]
    section = {"arms": every, "adapters": ["lora"], "seeds": "0-4", **section}
    section["seeds"] = parse_seeds(section["seeds"])
    section["learning_rates"] = _as_list(section.get("learning_rates", []))
    for name in ("train", "tests", "arms", "adapters"):
        section[name] = _as_list(section.get(name, []))
    return AblationRecipe(training=content, **section)


def _check_labels(recipe: AblationRecipe) -> None:
    """Refuse arms with a teacher without a section that says what it answers, and a section that cannot work."""
    taught = [name for name in recipe.arms if ARMS[name].teacher]
    if recipe.labels is None:
        if taught:
            raise ValueError(
                f"The arms {', '.join(taught)} have prompts labelled. Add `labels: {{prompts: 800, steps: 150, "
                f"learning_rate: 2.0e-3, ratio: '1:2'}}` to the ablation section, or leave them out."
            )
        return
    section = dict(recipe.labels) if isinstance(recipe.labels, dict) else {}
    needed = {"prompts": _whole, "steps": _whole, "learning_rate": lambda value, _: _positive(value)}
    wrong = [name for name, good in needed.items() if not good(section.pop(name, None), 1)]
    taken = {"teacher", "label_batch_size"} & section.keys()
    if wrong or taken:
        raise ValueError(
            f"`labels` is {recipe.labels!r}. It needs `prompts` and `steps`, whole numbers of at least 1, and a "
            f"`learning_rate`; who answers is a matter of the arm."
        )
    if recipe.train_draw != "seed" or recipe.train_limit is None:
        raise ValueError(
            "`labels` answers the examples that a seed does not draw. Write `train_draw: seed` and a `train_limit`."
        )
    try:
        DistillOptions(**section)
    except TypeError as error:
        raise ValueError(f"`labels` of the ablation section: {error}. It knows fields of DistillOptions.") from None


def parse_seeds(value: Any) -> list[int]:
    """
    Seeds from a list, a number, or text such as "0-4" or "0,1,5".

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, list):
        return value
    try:
        seeds: list[int] = []
        for part in str(value).split(","):
            first, _, last = part.strip().partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ValueError(f"`seeds` is {value!r}. Write for example 0-4, or 0,1,2.") from None
    return seeds


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
