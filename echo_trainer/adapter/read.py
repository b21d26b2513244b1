"""Reading an adapter's folder: its config and the headers of its tensors, or in words why that cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .folder import CONFIG_NAME, WEIGHTS_NAME, Adapter, AdapterError, Tensor

_TYPES = {
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "modules_to_save": (list,),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
}


def adapter_folder(folder: str | Path) -> Path:
    """
    Where the adapter's files lie: the folder itself, or its one sub-folder that PEFT named after the adapter.

    Raises:
        AdapterError: there is no adapter, or there are several.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"'{folder}' is not a folder. Give the folder of a finished run.")
    if (folder / CONFIG_NAME).is_file() or (folder / WEIGHTS_NAME).is_file():
        return folder
    named = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    found = _named_adapters(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(f"'{folder}' holds several adapters: {', '.join(p.name for p in found)}. Push one of these "
                           f"folders.")  # fmt: skip
    hint = f" It holds checkpoints; push one of them, such as '{named[-1]}'." if named else ""
    if (folder / "config.json").is_file():
        hint = " It holds a whole model: add --model to push that."
    raise AdapterError(f"'{folder}' holds no adapter: there is no {CONFIG_NAME} and no {WEIGHTS_NAME} in it.{hint}")


def _named_adapters(folder: Path) -> list[Path]:
    """The sub-folders that hold an adapter and are no checkpoints."""
    found = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    return [path for path in found if not path.name.startswith("checkpoint-")]


def read_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT adapter folder: the config and the tensor headers, no values.

    Args:
        folder: where it is, or the folder of a run that has one adapter with a name of its own.

    Raises:
        AdapterError: no folder, no readable config, no safetensors weights, or weights that are cut short. The
            attribute ``rule`` names the rule of `adapter.rules` that this breaks.

    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"'{folder}' is not a folder. Give the folder that holds {CONFIG_NAME}; an adapter on the "
                           f"Hub is fetched first with `hf download NAME --local-dir DIR`.")  # fmt: skip
    run_folder = folder
    if not (folder / CONFIG_NAME).is_file() and not (folder / WEIGHTS_NAME).is_file():
        named = _named_adapters(folder)
        folder = named[0] if len(named) == 1 else folder
    config = _read_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(f"adapter{pattern}"))
        if pickles:
            raise _broken("pickle", f"the weights are in {', '.join(pickles)}")
        raise _broken("no-weights", f"there is no {WEIGHTS_NAME} in '{folder}'")
    extra = {p.name: list(_headers(p)) for p in sorted(folder.glob("*.safetensors")) if p.name != WEIGHTS_NAME}
    return Adapter(folder, config, _headers(weights), extra, run_folder=run_folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise _broken("no-config", f"there is no {CONFIG_NAME} in '{folder}'")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken("broken-config", f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _broken("broken-config", f"{CONFIG_NAME} holds a {type(config).__name__}, not an object")
    for name, types in _TYPES.items():
        if not isinstance(config.get(name), (*types, type(None))):
            raise _broken("bad-setting", f"{name}={config[name]!r} is no {' or '.join(t.__name__ for t in types)}")
    patterns = [value for name in _TYPES if (value := config.get(name)) and not isinstance(value, int)]
    for pattern in (each for value in patterns for each in ([value] if isinstance(value, str) else value)):
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise _broken("bad-setting", f"{pattern!r} is no regular expression: {error}") from error
    return config


def _headers(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: Tensor(tuple(part.get_shape()), part.get_dtype(), path) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            raise _broken("lfs-pointer", f"{path.name} is a git-lfs pointer of {path.stat().st_size} bytes, not the "
                                         f"weights; `git lfs pull` in the clone fetches them") from error  # fmt: skip
        raise _broken("broken-weights", f"{path.name} cannot be read: {error}") from error


def _is_lfs_pointer(path: Path) -> bool:
    """Whether git put its stand-in for a large file here, because git-lfs was not installed or skipped it."""
    try:
        with path.open("rb") as file:
            return file.read(64).startswith(b"version https://git-lfs.github.com/spec/")
    except OSError:
        return False


def _broken(rule: str, what: str) -> AdapterError:
    first = what.partition(" ")[0]
    error = AdapterError(f"{what if '.' in first else what[0].upper() + what[1:]}.")  # file names stay as they are
    error.rule, error.what = rule, what
    return error
