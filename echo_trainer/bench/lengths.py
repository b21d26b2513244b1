"""Lengths of prompts and answers that a benchmark runs on: all alike, very different, or read from a file."""

from pathlib import Path

import numpy as np

KINDS = ("lognormal", "uniform")


def lengths_of(kind: str | None, prompt: int, answer: int, samples: int) -> list[tuple[int, int]]:
    """
    Tokens of the prompt and of the answer of every sample, the same ones every time.

    Args:
        kind: None for `prompt` and `answer` everywhere; "lognormal" with these as medians and sigma 1; "uniform" from
            2 to twice these; else the path of a text file with a prompt's and an answer's length in each line.
        prompt, answer, samples: as said; a file is read again from its beginning where it has fewer lines.

    Raises:
        ValueError: the file is not there, or holds something else.
    """
    if kind is None:
        return [(prompt, answer)] * samples
    generator = np.random.default_rng(0)
    if kind == "lognormal":
        found = [np.exp(generator.normal(np.log(middle), 1.0, samples)) for middle in (prompt, answer)]
    elif kind == "uniform":
        found = [generator.integers(2, 2 * middle + 1, samples) for middle in (prompt, answer)]
    else:
        read = _read(kind)
        return [read[i % len(read)] for i in range(samples)]
    prompts, answers = (np.maximum(x, least).astype(int) for x, least in zip(found, (1, 2), strict=True))
    return list(zip(prompts.tolist(), answers.tolist(), strict=True))


def _read(path: str) -> list[tuple[int, int]]:
    try:
        lines = [line.replace(",", " ").split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--lengths is {path!r}, which is neither {' nor '.join(KINDS)} nor a text file one can read ({error})."
        ) from None
    found = []
    for number, words in enumerate(lines, 1):
        if not words:
            continue
        if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[0]) < 1 or int(words[1]) < 2:
            raise ValueError(
                f"Line {number} of {path} is {' '.join(words)!r}. Write the tokens of a prompt (at least 1) and of "
                f"its answer (at least 2, since the echo reaches no answer of one token), such as '256 16'."
            )
        found.append((int(words[0]), int(words[1])))
    if not found:
        raise ValueError(f"{path} holds no lengths. Write a prompt's and an answer's in each line, such as '256 16'.")
    return found
