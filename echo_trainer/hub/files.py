"""Which files of a run's folder go to the Hub, and a clean copy of them.

What is uploaded is always a copy of files on a list: nothing else of the folder (optimizer state, pickled arguments,
logs, data) can slip through, training may go on writing, and what the Hub must not see is taken out of the copy:
paths of this machine in `adapter_config.json`, `README.md` and `trainer_state.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from ..adapter.folder import CONFIG_NAME, WEIGHTS_NAME, Adapter, AdapterError, non_finite
from ..adapter.read import adapter_folder, read_adapter
from ..files import id_from_cache, is_local
from ..manifest import MANIFEST, read_manifest, write_manifest

ADAPTER = (CONFIG_NAME, WEIGHTS_NAME)
MODEL = ("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors",
         "model.safetensors.index.json")  # fmt: skip
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
BESIDES = ("README.md", "LICENSE", "echo_run.json", "layer_selection.json", "assets/*.png", ".eval_results/*.yaml",
           *TOKENIZER)  # fmt: skip
# What a resume needs besides the adapter; the pickled arguments are not among it.
RESUME = ("echo_networks.safetensors", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth",
          "beam_groups_*.pt",
          "trainer_state.json", MANIFEST)  # fmt: skip

_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_TEXTS = {".json", ".md", ".jinja", ".yaml", ".txt"}


def copy_listed(folder: Path, out: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copy the files of `folder` that match a pattern to `out`; their names, relative to `out`."""
    copied = []
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        if not path.is_file() or (path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())):
            continue
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        copied.append(target.relative_to(out).as_posix())
    return copied


def copy_run(folder: Path, out: Path, whole_model: bool = False) -> Adapter | None:
    """
    Copy what is pushed of a finished run, or of a checkpoint, to the empty folder `out`.

    Returns:
        The copy of the adapter; None with `whole_model`.

    Raises:
        AdapterError: the folder holds no adapter (or, with `whole_model`, no model), or it cannot be read.
    """
    adapter = None
    if whole_model:
        if not copy_listed(folder, out, MODEL) or not list(out.glob("*.safetensors")):
            raise AdapterError(f"'{folder}' holds no model: config.json and model.safetensors are expected in it.")
    else:
        source = adapter_folder(folder)
        copy_listed(source, out, (*ADAPTER, "README.md"))
        try:
            adapter = read_adapter(out)  # says what is missing or cut short
        except AdapterError as error:
            raise AdapterError(str(error).replace(str(out), str(source))) from error
    copy_listed(folder, out, BESIDES)
    return adapter


def require_finite(folder: Path, adapter: Adapter | None) -> None:
    """
    Look at every value of the adapter, or of the model's files where there is none.

    Raises:
        AdapterError: a tensor holds NaN or infinity; the message names it.
    """
    if adapter is not None:
        bad = {WEIGHTS_NAME: adapter.non_finite}
    else:
        bad = {path.name: non_finite(path) for path in sorted(folder.glob("*.safetensors"))}
    for file, names in bad.items():
        if names:
            raise AdapterError(
                f"The tensor '{names[0]}' in {file} holds NaN or infinity: training diverged or the file is damaged. "
                f"An engine that loads it corrupts other requests as well, so it is not pushed. Take an earlier "
                f"checkpoint."
            )


def clean_copy(folder: Path, base_model: str | None) -> list[str]:
    """
    Take local paths out of a copy made by `copy_run`.

    Args:
        folder: the copy.
        base_model: id of the base on the Hub, if it is known.

    Returns:
        Notes for the user.
    """
    nameless = False
    for path in sorted(folder.rglob(CONFIG_NAME)):
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config.get("base_model_name_or_path")
        known = base_model or id_from_cache(name)
        if known or is_local(name) or _base_was_local(folder):
            config["base_model_name_or_path"] = known
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _clean_card(path.with_name("README.md"), name, known)
        nameless |= config.get("base_model_name_or_path") is None
    for path in sorted(folder.rglob("trainer_state.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        if state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
            path.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(folder.rglob(MANIFEST)):
        _list_again(path.parent)
    if not nameless:
        return []
    return [
        "The adapter does not name its base model on the Hub, since it was trained on a local folder: others must "
        "load the base by hand. If it is on the Hub, push again with --base ID (or base_model=ID)."
    ]


def _list_again(checkpoint: Path) -> None:
    """Bring the list of a checkpoint's files in line with the copy, so that a resume from it finds no damage."""
    facts = read_manifest(checkpoint)
    assert facts is not None  # the copy of a whole checkpoint
    del facts["files"], facts["format"]
    write_manifest(checkpoint, facts)


def _base_was_local(folder: Path) -> bool:
    """Whether the record of the run says so; a relative path looks like an id from another folder."""
    path = folder / "echo_run.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"base_model": True}
    return not record.get("base_model", True)


def _clean_card(path: Path, name: str | None, known: str | None) -> None:
    """Correct a card of PEFT's or the user's that names a local base; the Hub refuses such metadata."""
    if not path.is_file() or not name:
        return
    text = path.read_text(encoding="utf-8")
    if not known:
        text = re.sub(rf"^base_model:[ \t]*['\"]?{re.escape(name)}['\"]?[ \t]*\n", "", text, flags=re.MULTILINE)
        text = re.sub(rf"^- base_model:adapter:{re.escape(name)}\n", "", text, flags=re.MULTILINE)
    if os.path.isabs(name) or known:
        text = text.replace(name, known or Path(name).name)
    path.write_text(text, encoding="utf-8")


def require_no_token(folder: Path, tokens: tuple[str, ...]) -> None:
    """
    Look for access tokens in every file, byte by byte.

    Raises:
        AdapterError: a file holds one; the message names the file, not the token.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        found = any(token.encode() in data for token in tokens)
        if found or (path.suffix in _TEXTS and _TOKEN.search(data)):
            raise AdapterError(f"{path.relative_to(folder)} holds an access token, so nothing is pushed. Remove it "
                               f"from that file, and make a new token if the file was ever shared.")  # fmt: skip
