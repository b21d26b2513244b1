"""Talking to the Hub with patience: timeouts, retries with backoff, and what an error means in plain words.

huggingface_hub's client waits for ever on a server that does not answer, and repeats only some of its requests. Here
every attempt has a timeout (`compat.hub_client`), passing faults (network, 408, 409, 429, 5xx) are tried again, and a
lasting one (401, 403, 404 ...) stops at once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub.errors import OfflineModeIsEnabled
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_any,
    stop_before_delay,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}


class PushError(RuntimeError):
    """Nothing was pushed, or not all of it; the message says why, where the files are and how to push again."""


@dataclass(frozen=True)
class Patience:
    """
    How long to go on trying.

    Attributes:
        attempts: tries of each step of a push, >= 1.
        wait: seconds before the second try; doubled before each further one.
        longest_wait: upper limit of a wait in seconds, also of one that the server asks for.
        timeout: seconds without a sign of life after which a request is given up.
        deadline: seconds after which no new try is begun.
    """

    attempts: int = 5
    wait: float = 2.0
    longest_wait: float = 120.0
    timeout: float = 60.0
    deadline: float = 900.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"{self.attempts} attempts cannot push anything; write at least 1.")
        for name in ("wait", "longest_wait", "timeout", "deadline"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)} seconds; write 0 or more.")


def patiently(what: str, call: Callable[[], Result], patience: Patience, secrets: tuple[str, ...] = ()) -> Result:
    """
    `call()`, again after passing faults.

    Args:
        what: what the call does, for the log ("uploading 7 files").
        call: the request; safe to repeat.
        patience: how often and how long.
        secrets: texts that must not appear in a log.

    Raises:
        Exception: what `call` raised last, if it does not pass or patience is at an end.
    """

    def error_of(state: RetryCallState) -> BaseException:
        error = state.outcome.exception() if state.outcome is not None else None
        assert error is not None  # only a failure is tried again
        return error

    def pause(state: RetryCallState) -> float:
        asked = retry_after(error_of(state)) or 0.0
        return min(max(patience.wait * 2 ** (state.attempt_number - 1), asked), patience.longest_wait)

    def say(state: RetryCallState) -> None:
        error, number = error_of(state), state.attempt_number + 1
        again = f"Trying again in {state.upcoming_sleep:.0f} s ({number} of {patience.attempts})"
        logger.warning("%s: %s. %s.", what, in_words(error, secrets), again)

    retrying = Retrying(
        retry=retry_if_exception(passes),
        stop=stop_any(stop_after_attempt(patience.attempts), stop_before_delay(patience.deadline)),
        wait=pause,
        before_sleep=say,
        reraise=True,
    )
    return retrying(call)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of huggingface_hub carries."""
    return getattr(getattr(error, "response", None), "status_code", None)


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    # A proxy's error page where JSON was expected; the client reads one answer before it looks at the status.
    return _is_network(error) or isinstance(error, json.JSONDecodeError)


def _is_network(error: BaseException) -> bool:
    # By name: the library's HTTP package has changed before, and TransportError is the same in all of them.
    by_name = any(cls.__name__ == "TransportError" for cls in type(error).__mro__)
    # A bare RuntimeError is how hf_xet tells of faults of its storage.
    return by_name or isinstance(error, ConnectionError | TimeoutError) or type(error) is RuntimeError


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait (Retry-After: a number or a date), or None."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def in_words(error: BaseException, secrets: tuple[str, ...] = ()) -> str:
    """What went wrong, in one sentence without secrets and without a full stop."""
    status, reason = status_of(error), _hide(_reason(error), secrets)
    if isinstance(error, OfflineModeIsEnabled):
        return "huggingface_hub is in offline mode; unset HF_HUB_OFFLINE to push"
    if status == 401:
        return (
            "the Hub does not accept the token (401): it is wrong, expired, or belongs to another site. "
            "Log in again with `hf auth login`, or set HF_TOKEN to a token with write permission"
        )
    if status == 403:
        return (
            f"the token may not do this (403: {reason}). Use a token with write permission for this repository, "
            f"or a repository of your own"
        )
    if status == 404:
        return f"the Hub does not know it (404: {reason}). Look at the spelling of the repository and the revision"
    if status == 429:
        return "the Hub asks for fewer requests (429)"
    if status is not None and status >= 500:
        return f"the Hub has a fault ({status})"
    if status is not None:
        return f"the Hub refuses the request ({status}: {reason})"
    if any(cls.__name__ in ("TimeoutException", "TimeoutError") for cls in type(error).__mro__):
        return "the Hub did not answer in time"
    if _is_network(error):
        return f"the connection to the Hub failed ({type(error).__name__}: {reason})"
    if isinstance(error, json.JSONDecodeError):
        return "the Hub, or a proxy before it, answered with something that is not JSON"
    return f"{type(error).__name__}: {reason}"


def _reason(error: BaseException) -> str:
    """The first line that says something; HfHubHTTPError begins with the address and a request id."""
    message = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return (lines[-1] if getattr(error, "server_message", None) else lines[0])[:300].rstrip(".") if lines else "?"


def _hide(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, "[token]")
    return text
