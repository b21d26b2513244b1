"""What is said of a push that failed: why, where the files are, and the command to push again. No access token."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..adapter.folder import AdapterError
from .client import PushError, in_words, passes, status_of


class RefusedError(ValueError):
    """The token, the repository or its visibility does not allow the push; nothing was uploaded."""


def known_tokens(*given: str | None) -> tuple[str, ...]:
    """Every access token that this process knows."""
    from huggingface_hub import get_token

    return tuple({token for token in (*given, get_token(), os.environ.get("HF_TOKEN")) if token})


@dataclass(frozen=True)
class Again:
    """How to push again what could not be pushed."""

    folder: str | Path
    repo_id: str
    private: bool | None = None
    revision: str | None = None
    base_model: str | None = None
    whole_model: bool = False

    @property
    def command(self) -> str:
        """The command line, without the token."""
        words = ["echo-trainer", "push", str(Path(self.folder).resolve()), self.repo_id]
        words += ["--private"] * bool(self.private) + ["--public"] * (self.private is False)
        words += ["--revision", self.revision] if self.revision else []
        words += ["--base", self.base_model] if self.base_model else []
        words += ["--model"] * self.whole_model
        return shlex.join(words)

    def error(self, reason: str) -> PushError:
        """The error with its last words."""
        return PushError(
            f"Not pushed to {self.repo_id}: {reason}.\n"
            f"The files are in {Path(self.folder).resolve()}; nothing there was changed. To push again:\n"
            f"    {self.command}"
        )


@contextmanager
def last_words(again: Again, token: str | None = None) -> Iterator[None]:
    """Turn whatever ends a push into a `PushError`."""
    try:
        yield
    except PushError:
        raise
    except (RefusedError, AdapterError) as error:
        raise again.error(str(error).strip().rstrip(".")) from error
    except Exception as error:
        plain = isinstance(error, ValueError) and status_of(error) is None and not passes(error)
        reason = str(error).strip().rstrip(".") if plain else in_words(error, known_tokens(token))
        raise again.error(reason) from error
