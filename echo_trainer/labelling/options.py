"""Options of labelling and of the training on its labels."""

import re
from dataclasses import dataclass, field
from math import gcd

TEACHERS = ("echo", "plain", "base")
LABELS = ("hard", "soft")
STARTS = ("run", "fresh")


@dataclass
class DistillOptions:
    """
    How prompts without answers are labelled, and how the labels are trained on.

    | field | meaning | unit, range |
    |---|---|---|
    | `teacher` | who answers | "echo" (the echo pass), "plain" (the adapter), "base" (no adapter) |
    | `labels` | what is learnt of an answer | "hard" (its tokens), "soft" (the teacher's distributions there) |
    | `n_samples` | answers to each prompt; the most frequent one is taken | >= 1; 1: greedy |
    | `temperature` | of the samples | > 0 |
    | `min_confidence` | less confident answers are left out | [0, 1] |
    | `max_new_tokens` | longest answer; one that does not end by then is left out | tokens |
    | `label_batch_size` | prompts at a time | >= 1 |
    | `ratio` | labelled rows to taught rows in every batch | "A:B", such as "1:2" |
    | `start` | what the second training starts from | "run" (the adapter as it is), "fresh" (a new one) |
    | `soft_tokens` | tokens of a distribution that are kept; all others are one class | >= 1 |
    | `soft_temperature` | tau of the distillation | > 0 |

    Confidence: of a greedy answer the geometric mean of the probabilities of its tokens, of a vote its share of the
    samples.

    Raises:
        ValueError: a value is outside its range.
    """

    teacher: str = field(
        default="echo",
        metadata={
            "help": "Who answers: the echo pass, the plain pass, or the base without adapter.",
            "choices": [*TEACHERS],
        },
    )
    labels: str = field(
        default="hard",
        metadata={
            "help": "Learn the tokens of an answer (hard) or the teacher's distributions there (soft).",
            "choices": [*LABELS],
        },
    )
    n_samples: int = field(
        default=1, metadata={"help": "Answers to each prompt, of which the most frequent is taken. 1: greedy."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples."})
    min_confidence: float = field(
        default=0.0,
        metadata={
            "help": "Leave out answers less confident than this, 0 to 1. Greedy: mean probability of a token; "
            "samples: share of the votes."
        },
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer. One that is cut off is left out."})
    label_batch_size: int = field(default=32, metadata={"help": "Prompts at a time."})
    ratio: str = field(default="1:1", metadata={"help": "Labelled to taught rows in every batch, such as 1:2."})
    start: str = field(
        default="run",
        metadata={"help": "Train the adapter on from where it is (run), or a new one (fresh).", "choices": [*STARTS]},
    )
    soft_tokens: int = field(
        default=64, metadata={"help": "Most likely tokens that are kept of a distribution; the others count as one."}
    )
    soft_temperature: float = field(default=1.0, metadata={"help": "Temperature of soft labels."})  # fmt: skip

    def __post_init__(self) -> None:
        for name, known in (("teacher", TEACHERS), ("labels", LABELS), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}. It can be one of {', '.join(map(repr, known))}."
                )
        for name in ("n_samples", "max_new_tokens", "label_batch_size", "soft_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}. Write a whole number of at least 1.")
        for name in ("temperature", "soft_temperature"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < float("inf"):
                raise ValueError(f"`{name}` is {value!r}, and it divides logits. Write a number above 0, such as 1.0.")
        if not _is_number(self.min_confidence) or not 0 <= self.min_confidence <= 1:
            raise ValueError(
                f"`min_confidence` is {self.min_confidence!r}. Write a number from 0 (keep every answer) to 1."
            )
        _ = self.parts

    @property
    def parts(self) -> tuple[int, int]:
        """Labelled and taught rows of the smallest batch with this ratio."""
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", self.ratio) if isinstance(self.ratio, str) else None
        labelled, taught = map(int, found.groups()) if found else (0, 0)
        if not taught:
            raise ValueError(
                f"`ratio` is {self.ratio!r}. Write labelled to taught rows as A:B with B above 0, such as 1:2 (4 and "
                f"8 in a batch of 12), or 0:1 for taught rows alone."
            )
        common = gcd(labelled, taught)
        return labelled // common, taught // common


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
