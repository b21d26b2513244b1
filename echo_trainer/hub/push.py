"""Pushing a finished run to the Hub: preflight, a clean copy, one upload, checksums, and clear last words.

folder -> copy of the listed files, without local paths     [files]
       -> refuse NaN, folders without adapter               [pack, in the thread that trains]
token, repository, privacy                                  [preflight]
refuse access tokens in files
one upload_folder, again after passing faults               [client]
checksums of every file, read back from the Hub             [send, perhaps in the background]
what is said when it fails                                  [last_words]
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..adapter.check import check_adapter
from ..adapter.folder import Adapter
from ..compat.hub_client import use_timeout
from ..files import RUN_RECORD
from ..report.folder import saved_facts, update_record
from .client import Patience, patiently
from .files import clean_copy, copy_run, require_finite, require_no_token
from .last_words import Again, RefusedError, known_tokens, last_words

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where to push, after the preflight."""

    repo_id: str
    private: bool
    token: str = field(repr=False)
    revision: str | None = None


@dataclass(frozen=True)
class Parcel:
    """
    A copy of what is to be pushed, ready to be sent.

    Attributes:
        folder: the copy; every file in it may be uploaded.
        again: where it goes, and how to push it again.
        saved: what the adapter's files say (`report.folder.saved_facts`); None without a record of the run.
        notes: what the user should know.
    """

    folder: Path
    again: Again
    saved: dict[str, Any] | None
    notes: list[str]


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now.

    Attributes:
        repo_id: the repository, with its namespace.
        url: its address.
        private: whether only its owner sees it.
        commit: the commit's id.
        commit_url: the commit's address.
        files: names of the files whose checksums were compared.
        notes: what the user should know.
    """

    repo_id: str
    url: str
    private: bool
    commit: str
    commit_url: str
    files: list[str]
    notes: list[str] = field(default_factory=list)


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    whole_model: bool = False,
    commit_message: str = "Upload adapter",
    patience: Patience | None = None,
) -> Pushed:
    """
    Push a finished run's folder, or a PEFT adapter, to the Hub and compare every checksum.

    Args:
        folder: the folder; only files on a list are uploaded (see `echo_trainer.hub.files`).
        repo_id: "namespace/name", or a name in the namespace of the token's owner. Made if it does not exist.
        private: True: the repository must be private, and an existing public one is an error. False: a new one is
            public; an existing private one stays private. None: a new one gets the account's default.
        token: access token with write permission; None takes HF_TOKEN or that of `hf auth login`.
        revision: branch to commit to; it must exist. None is "main".
        base_model: id of the base on the Hub, where the run was trained on a local folder.
        whole_model: push a merged model instead of an adapter.
        commit_message: first line of the commit.
        patience: timeouts and retries.

    Returns:
        What is on the Hub now: repository, commit, address, and notes for the user.

    Raises:
        PushError: not pushed; the message says what failed, where the files are, and the command to push again.
    """
    patience = patience or Patience()
    use_timeout(patience.timeout)
    again = Again(folder, repo_id, private, revision, base_model, whole_model)
    with tempfile.TemporaryDirectory(prefix="echo-push-") as stage, last_words(again, token):
        copy = Path(stage, "push")
        copy.mkdir()
        parcel = pack(copy, copy_run(Path(folder), copy, whole_model), again)
        return send(parcel, token, commit_message, patience)


def pack(copy: Path, adapter: Adapter | None, again: Again, base: Any = None) -> Parcel:
    """
    Make a copy of a run ready to be sent, in the thread that trains.

    Args:
        copy: from `files.copy_run`; its files are changed.
        adapter: the adapter in it; None for a whole model.
        again: where it goes, and how to push it again.
        base: the base model or its shapes, for the engines' verdicts; None takes the name in the adapter's config.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    require_finite(copy, adapter)
    saved = None
    if adapter is not None and (copy / RUN_RECORD).is_file():
        saved = saved_facts(check_adapter(adapter, base=base, values=False))
    return Parcel(copy, again, saved, clean_copy(copy, again.base_model))


def send(parcel: Parcel, token: str | None, commit_message: str, patience: Patience) -> Pushed:
    """
    Upload what was packed. It may run beside a training: nothing of the process is changed, and no model is built.

    Raises:
        RefusedError, Exception: as `preflight`, or what huggingface_hub raised.
    """
    again = parcel.again
    target = preflight(again.repo_id, again.private, token, patience, again.revision)
    known = {"base_model": again.base_model} if again.base_model else {}
    update_record(parcel.folder, saved=parcel.saved, repo_id=target.repo_id, **known)
    require_no_token(parcel.folder, known_tokens(target.token))
    return _upload(parcel.folder, target, commit_message, patience, parcel.notes)


def preflight(
    repo_id: str, private: bool | None, token: str | None, patience: Patience, revision: str | None = None
) -> Target:
    """
    Find out whether a push can work, and make the repository if it does not exist. Uploads nothing.

    Raises:
        RefusedError: no token, a token that may only read, a bad name, or a public repository where a private one
            was asked for.
        Exception: what huggingface_hub raised.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RefusedError(f"{repo_id!r} is no name of a repository: {error} Write NAMESPACE/NAME.") from error
    token = token or get_token()
    if not token:
        raise RefusedError("there is no access token. Log in with `hf auth login`, or set HF_TOKEN to a token "
                                 "with write permission")  # fmt: skip
    api, secrets = hub_api(token), (token,)
    who = patiently("Asking the Hub whose token this is", lambda: api.whoami(token, cache=True), patience, secrets)
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise RefusedError("the token may only read. Make one with write permission in your account's settings, "
                                 "and log in again with `hf auth login`")  # fmt: skip
    if "/" not in repo_id:
        repo_id = f"{who['name']}/{repo_id}"
    try:
        info = patiently("Looking for the repository", lambda: api.repo_info(repo_id), patience, secrets)
    except RepositoryNotFoundError:
        make = lambda: api.create_repo(repo_id, private=private, exist_ok=True)  # noqa: E731
        repo_id = patiently("Making the repository", make, patience, secrets).repo_id
        info = patiently("Looking at the new repository", lambda: api.repo_info(repo_id), patience, secrets)
    if private and not info.private:
        raise RefusedError(
            f"{repo_id} is public, and a private repository was asked for. Make it private in its settings on the "
            f"Hub, choose another name, or push without asking for private"
        )
    if private is False and info.private:
        logger.warning("%s is private and stays so; make it public in its settings on the Hub.", repo_id)
    return Target(repo_id, bool(info.private), token, revision)


def _upload(copy: Path, target: Target, message: str, patience: Patience, notes: list[str]) -> Pushed:
    api, secrets = hub_api(target.token), (target.token,)
    files = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    where = {"repo_id": target.repo_id, "revision": target.revision}

    def upload() -> Any:
        return api.upload_folder(folder_path=copy, commit_message=message, **where)

    commit = patiently(f"Uploading {len(files)} files", upload, patience, secrets)

    def verify() -> Any:
        return api.verify_repo_checksums(target.repo_id, revision=commit.oid, local_dir=copy)

    check = patiently("Comparing checksums", verify, patience, secrets)
    wrong = [entry["path"] for entry in check.mismatches] + list(check.extra_paths)
    if wrong:
        raise RefusedError(f"these files on the Hub are not those that were sent: {', '.join(sorted(wrong))}")
    url = f"{api.endpoint}/{target.repo_id}"
    logger.info("Pushed %d files to %s (%s).", len(files), url, "private" if target.private else "public")
    return Pushed(target.repo_id, url, target.private, commit.oid, commit.commit_url, files, notes)


@lru_cache(maxsize=8)
def hub_api(token: str) -> Any:
    """The library's client for a token; one for all pushes, since the Hub allows few questions whose token it is."""
    from huggingface_hub import HfApi

    return HfApi(token=token)
