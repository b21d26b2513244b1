"""The messages of a row, in the spelling of chat templates, from whatever spelling the row has."""

import json
from collections.abc import Sequence
from typing import Any

from .forms import row_name

# Speakers of collections (ShareGPT), by the role that chat templates know them under.
SPEAKERS = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
}  # fmt: skip
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
RESULTS = {"observation": "tool", "function_response": "tool", "tool_response": "tool"}
CALLS = {"function_call": "assistant", "tool_call": "assistant"}

Message = dict[str, Any]


def messages_of(row: dict[str, Any], number: int | None = None, joined: bool = False) -> list[Message]:
    """
    The conversation of a row, from `messages` or `conversations`.

    Args:
        row: with one of the two; as JSON text as well.
        number: of the row, for errors.
        joined: make one text of contents that are parts of text, for templates that write texts only.

    Raises:
        ValueError: there is no conversation, or a turn of it cannot be read.
    """
    name = "messages" if row.get("messages") is not None or "conversations" not in row else "conversations"
    turns = row.get(name)
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{row_name(number)} has text in `{name}`, and it is not JSON ({error}). Write a list of messages, "
                f"each with `role` and `content`."
            ) from error
    if not turns:
        raise ValueError(f"{row_name(number)} has no messages: `{name}` is {row.get(name)!r}. Drop such rows.")
    messages = as_messages(turns, number)
    return [with_text(message) for message in messages] if joined else messages


def as_messages(turns: Sequence[Message], number: int | None = None) -> list[Message]:
    """
    Messages (role, content) from turns of any of the usual spellings (from, value; human, gpt; function_call).

    Args:
        turns: of one conversation.
        number: of its row, for the error.

    Raises:
        ValueError: a turn is no message, is `from` somebody whom nobody knows, or calls a function in words that
            cannot be read.
    """
    return [_message(turn, number) for turn in turns]


def _message(turn: Any, number: int | None) -> Message:
    if not isinstance(turn, dict) or (turn.get("role") is None and turn.get("from") is None):
        raise ValueError(
            f"{row_name(number)} has a turn that does not say who speaks: {turn!r}. Write each turn as "
            f"{{'role': 'user', 'content': ...}} (or {{'from': 'human', 'value': ...}})."
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role")}
    role = SPEAKERS.get(str(turn.get("role")).lower(), turn.get("role"))  # a template may know others
    if turn.get("from") is not None:
        known = {**ROLES, **SPEAKERS, **RESULTS, **CALLS}
        speaker = str(turn["from"]).lower()
        role = known.get(speaker)
        if role is None:
            raise ValueError(
                f"{row_name(number)} has a turn from {turn['from']!r}, whose role is not known. Known are "
                f"{', '.join(known)}: rename it in the rows."
            )
        if speaker in CALLS:
            return {"role": role, **rest, "content": "", "tool_calls": _calls(turn.get("value"), number)}
    said = {"content": turn["value"]} if turn.get("value") is not None else {}
    return {"role": role, **rest, **said}


def _calls(value: Any, number: int | None) -> list[dict[str, Any]]:
    """Function calls as chat templates know them, from the JSON of ShareGPT: one call, or a list of them."""
    try:
        written = json.loads(value) if isinstance(value, str) else value
        return [_call(call) for call in (written if isinstance(written, list) else [written])]
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{row_name(number)} has a turn that calls a function, and its value is not the JSON of a call: "
            f'{value!r}. Write \'{{"name": "look", "arguments": {{"at": "it"}}}}\', or let the turn be from \'gpt\' '
            f"where the model is to write this text as it is."
        ) from error


def _call(call: dict[str, Any]) -> dict[str, Any]:
    call = call.get("function", call)
    arguments = call["arguments"] if "arguments" in call else call["parameters"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def with_text(message: Message) -> Message:
    """A message with its content as one text, where it is parts of text."""
    parts = message.get("content")
    if not isinstance(parts, list) or not parts or any(_kind(part) != "text" for part in parts):
        return message
    return {**message, "content": "".join(part["text"] or "" for part in parts)}


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None
