"""Write the quickstart's training and test questions, and hold the little world that they are about.

    python recipes/quickstart/make_data.py            # writes train.jsonl and test.jsonl, about a second

A *story* puts three people into places, gives each a coloured thing, and then lets some of them walk about and
hand things over. The base model was pretrained (`pretrain_base.py`) on such stories with six kinds of question, each
about one person, one thing, one colour or one place. The fine-tuning task is a seventh kind, which the base never saw:
"where is the lamp?", to be answered by who holds it *and* where that person is now, "with Mia in the garden."
Everything is drawn from `random.Random(seed)`, so the same command writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
]
PLACES = [
    "attic",
    "barn",
    "cellar",
    "forest",
    "garden",
    "hall",
    "kitchen",
    "library",
    "market",
    "office",
    "park",
    "school",
]
THINGS = [
    "apple",
    "bag",
    "book",
    "coin",
    "cup",
    "drum",
    "flute",
    "hat",
    "kite",
    "lamp",
    "map",
    "pen",
    "ring",
    "rope",
    "shell",
    "sword",
]
COLOURS = ["black", "blue", "brown", "green", "grey", "pink", "red", "white"]

PACKAGE_DATA = Path(__file__).resolve().parents[2] / "echo_trainer" / "quickstart"


@dataclass
class Story:
    """What a reader of the story knows at its end."""

    sentences: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)  # person -> where they are now
    holder: dict[str, str] = field(default_factory=dict)  # thing -> who has it now
    colour: dict[str, str] = field(default_factory=dict)  # thing -> its colour

    @property
    def text(self) -> str:
        return "Story: " + " ".join(self.sentences)

    def walk(self, person: str, place: str) -> None:
        self.place[person] = place
        self.sentences.append(f"{person} went to the {place}.")

    def give(self, thing: str, person: str) -> None:
        giver = self.holder.pop(thing)
        self.holder[thing] = person  # re-inserted: a person's things are told in the order they came
        self.sentences.append(f"{giver} gave the {thing} to {person}.")


def make_story(rng: random.Random, people: tuple[int, int] = (3, 3), events: tuple[int, int] = (1, 2)) -> Story:
    """Draw a story: first who is where and who has what, in any order, then a few events."""
    story = Story()
    names = rng.sample(NAMES, rng.randint(*people))
    facts = []
    for name, thing, colour in zip(
        names, rng.sample(THINGS, len(names)), rng.sample(COLOURS, len(names)), strict=True
    ):
        place = rng.choice(PLACES)
        facts.append((name, place, None, None))
        facts.append((name, None, thing, colour))
    rng.shuffle(facts)
    for name, place, thing, colour in facts:
        if thing is None:
            story.place[name] = place
            story.sentences.append(f"{name} is in the {place}.")
        else:
            story.holder[thing] = name
            story.colour[thing] = colour
            story.sentences.append(f"{name} has the {colour} {thing}.")
    for _ in range(rng.randint(*events)):
        if rng.random() < 0.5:
            name = rng.choice(names)
            story.walk(name, rng.choice([p for p in PLACES if p != story.place[name]]))
        else:
            thing = rng.choice(list(story.holder))
            story.give(thing, rng.choice([n for n in names if n != story.holder[thing]]))
    return story


def base_question(rng: random.Random, story: Story) -> tuple[str, str]:
    """One question of the six kinds that the base is pretrained on, with its answer."""
    name = rng.choice(list(story.place))
    thing, holder = rng.choice(list(story.holder.items()))
    colour, place = story.colour[thing], story.place[name]
    things = " and ".join(f"the {story.colour[t]} {t}" for t, n in story.holder.items() if n == holder)
    there = " and ".join(n for n, p in story.place.items() if p == place)
    return rng.choice(
        [
            (f"where is {name}?", f"{name} is in the {place}."),
            (f"who is in the {place}?", f"{there}."),
            (f"who has the {thing}?", f"{holder} has the {thing}."),
            (f"what does {holder} have?", f"{holder} has {things}."),
            (f"what colour is the {thing}?", f"the {thing} is {colour}."),
            (f"which thing is {colour}?", f"the {thing} is {colour}."),
        ]
    )


def task_question(rng: random.Random, story: Story, latent: bool = False) -> tuple[str, str]:
    """
    The question of the fine-tuning task: who has the thing, and where is that person?

    Args:
        latent: answer the place alone. Who has the thing must then be found without writing it down.
    """
    thing = rng.choice(list(story.holder))
    holder = story.holder[thing]
    place = f"in the {story.place[holder]}."
    return f"where is the {thing}?", place if latent else f"with {holder} {place}"


def ask(question: str) -> str:
    """How a question follows a story. The answer begins with a space, so that the prompt's tokens stay a prefix."""
    return f" Question: {question} Answer:"


def make_items(
    rng: random.Random, count: int, taken: set[str], events: tuple[int, int] = (1, 2), latent: bool = False
) -> list[dict[str, str]]:
    """`count` prompt-completion items about stories that are not in `taken`, which is added to."""
    items: list[dict[str, str]] = []
    while len(items) < count:
        story = make_story(rng, events=events)
        if story.text in taken:
            continue
        taken.add(story.text)
        question, answer = task_question(rng, story, latent)
        items.append({"prompt": story.text + ask(question), "completion": f" {answer}"})
    return items


def write_data(
    out: Path,
    seed: int = 0,
    train: int = 3000,
    test: int = 1000,
    events: tuple[int, int] = (1, 2),
    latent: bool = False,
) -> None:
    """Write `train.jsonl` and `test.jsonl` into `out`; no story is in both."""
    rng = random.Random(seed)
    taken: set[str] = set()
    for name, count in (("test", test), ("train", train)):
        lines = [json.dumps(item) + "\n" for item in make_items(rng, count, taken, events, latent)]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE_DATA, help="folder to write into (default: the package's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=3000, help="training items")
    parser.add_argument("--test", type=int, default=1000, help="test items")
    parser.add_argument("--events", type=int, nargs=2, default=(1, 2), help="fewest and most events of a story")
    parser.add_argument("--latent", action="store_true", help="answer the place alone, not who has the thing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(args.out, args.seed, args.train, args.test, tuple(args.events), args.latent)
    for name in ("train", "test"):
        path = args.out / f"{name}.jsonl"
        print(f"{path.name}: {path.stat().st_size:,} bytes; {path.open(encoding='utf-8').readline().strip()}")


if __name__ == "__main__":
    main()
