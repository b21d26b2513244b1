"""Load what is to be evaluated: an adapter on its base, or a whole model; and say exactly which one it is."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.base import read_base
from ..adapter.folder import Adapter, AdapterError
from ..adapter.logit_error import with_adapter
from ..adapter.read import adapter_folder, read_adapter
from ..adapter.refuse import refuse_broken
from ..compat.building import load_model
from ..compat.identity import commit_of

logger = logging.getLogger(__name__)

_SAMPLED_ABOVE = 1 << 30  # bytes; larger weight files are hashed in part
_CHUNK = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Loaded:
    """
    A model ready to be evaluated.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: of the adapter's folder, else of the base.
        base: id or folder of the base.
        adapter: folder or id of the adapter, None for a whole model.
        identity: what the model is: ids, revisions and digests of local files. Holds no path.
    """

    model: Any
    tokenizer: Any
    base: str
    adapter: str | None
    identity: dict[str, Any]


def load_for_evaluation(
    name: str, base: str | None = None, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> Loaded:
    """
    Load an adapter on its base, or a model.

    Args:
        name: folder or id of an adapter or of a model.
        base: folder or id of the base, in place of the one named by the adapter.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU.
        device: such as "cuda:0"; None is a GPU where there is one.
        trust_remote_code: run code of a model's repository.

    Raises:
        ValueError: the adapter names no base that can be found, `base` was given for a whole model, or the name is
            neither.
    """
    import torch

    device = _device(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    source, adapter = _parts(name, base)
    files = _adapter_files(adapter, source) if adapter is not None else None
    options = {"trust_remote_code": trust_remote_code}
    try:
        model: Any = load_model(source, dtype=getattr(torch, dtype), **options)
    except OSError as error:
        raise _not_loaded(source, adapter, error) from error
    identity = {"model": _public(source), **_digest(source, model), "dtype": dtype}
    tokenizer = load_tokenizer(name, base, trust_remote_code)
    if adapter is not None and files is not None:
        model = with_adapter(model, files)
        place = str(files.folder) if Path(adapter).is_dir() else adapter
        identity |= {"adapter": _digest(place, None) | {"name": _public(adapter)}}
    else:
        _make_room(model, tokenizer, source)
    return Loaded(model.to(device).eval(), tokenizer, source, adapter, identity)


def _make_room(model: Any, tokenizer: Any, name: str) -> None:
    """Give a whole model a row for each token, so that one it never saw is padding or nonsense, and no IndexError."""
    rows = getattr(getattr(model.get_input_embeddings(), "weight", None), "shape", (len(tokenizer),))[0]
    if len(tokenizer) > rows:
        logger.warning(
            "The tokenizer of %s has %d tokens, and the model %d rows: what it knows of the last ones is random.",
            name,
            len(tokenizer),
            rows,
        )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def load_tokenizer(name: str, base: str | None = None, trust_remote_code: bool = False) -> Any:
    """
    The tokenizer of an adapter's folder or of a model; that of the base where the adapter has none.

    Args and errors are those of `load_for_evaluation`.
    """
    from transformers import AutoTokenizer

    source, adapter = _parts(name, base)
    options = {"trust_remote_code": trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        try:
            return AutoTokenizer.from_pretrained(source, **options)
        except OSError as error:
            raise _not_loaded(source, adapter, error) from error


def _parts(name: str, base: str | None) -> tuple[str, str | None]:
    """Base and adapter; the adapter is None for a whole model."""
    config = _adapter_config(name)
    if config is None and base is not None:
        raise ValueError(f"{name} is a whole model, not an adapter, so it has no base. Leave --base out.")
    source = name if config is None else base or config.get("base_model_name_or_path")
    if not source:
        raise ValueError(f"The adapter {name} does not name its base model. Give --base MODEL.")
    return source, None if config is None else name


def _not_loaded(source: str, adapter: str | None, error: Exception) -> ValueError:
    hint = "" if adapter is None else " Give --base MODEL if the base is elsewhere."
    return ValueError(f"{source} could not be loaded: {error}{hint}")


def _device(wanted: str | None) -> str:
    """The device to use, checked before anything is loaded onto it."""
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"The device {wanted!r} cannot be used here: {reason}. Leave it out, or write cpu."
        ) from error
    return wanted


def _adapter_files(adapter: str, base: str) -> Adapter:
    """
    The files of an adapter, in its folder or from the Hub, once they are known to be sound on its base.

    Raises:
        ValueError: the adapter is broken, so its figures would be those of another model.
    """
    from huggingface_hub import snapshot_download

    wanted = ["adapter_*", "tokenizer*"]
    folder = adapter if Path(adapter).is_dir() else snapshot_download(adapter, allow_patterns=wanted)
    files = read_adapter(folder)
    try:
        known = read_base(base)
    except AdapterError:  # a model with code of its own, for example
        known = None
    refuse_broken(files, known)
    return files


def _adapter_config(name: str) -> dict[str, Any] | None:
    """The configuration of an adapter; None where the name is that of a whole model."""
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            return None
        try:
            path = adapter_folder(folder) / "adapter_config.json"
        except AdapterError as error:
            raise ValueError(f"The folder {name} holds neither an adapter nor a model: {error}") from error
        return json.loads(path.read_text(encoding="utf-8"))
    require_id(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return json.loads(Path(hf_hub_download(name, "adapter_config.json")).read_text(encoding="utf-8"))
    except LocalEntryNotFoundError as error:
        raise ValueError(f"{name} is no folder, and the Hub could not be asked for it: {error}") from error
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name} is neither a folder nor a repository on the Hub that you may read.") from error


def require_id(name: str) -> None:
    """
    Refuse the name of a folder that is not there, which cannot be an id on the Hub.

    Raises:
        ValueError: it has the form of a path.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name}.")


def _public(name: str) -> str | None:
    """An id on the Hub, None for a local folder, whose path is nobody's business."""
    return None if Path(name).exists() else name


def _digest(name: str, model: Any) -> dict[str, Any]:
    """What tells a model (or an adapter: no `model`) from another: the commit of its repository, or a file digest."""
    folder = Path(name)
    if not folder.is_dir():
        if model is not None:
            return {"revision": commit_of(model.config)}
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "adapter_config.json")  # .../snapshots/COMMIT/adapter_config.json
        return {"revision": Path(cached).parent.name if isinstance(cached, str) else None}
    digest = hashlib.sha256()
    adapter = folder / "adapter_config.json"
    files = [adapter if adapter.is_file() else folder / "config.json"]
    files += sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    for path in files:
        digest.update(path.name.encode())
        _add_file(digest, path)
    return {"sha256": digest.hexdigest()}


def _add_file(digest: Any, path: Path) -> None:
    """Add a file to a digest: all of it, or its size and 64 parts of it where it is very large."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _SAMPLED_ABOVE:
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                digest.update(chunk)
            return
        digest.update(str(size).encode())
        for part in range(64):
            file.seek(part * (size - _CHUNK) // 63)
            digest.update(file.read(_CHUNK))
