"""A save that fails leaves nothing half done, and a full disk is called one."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from .checkpoint_files import last_whole_checkpoint

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def removed_on_failure(staging: str) -> Iterator[None]:
    """Remove what a failed save has left; around a section in which other processes write there as well."""
    try:
        yield
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def clean_failure(staging: str | None, run_dir: str, final: str) -> Iterator[None]:
    """Remove what a failed save has left (not with None), and say what is lost (nothing) where the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = _disk_is_full(error, run_dir)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if not full or "The disk is full" in str(error):  # said already
            raise
        whole, _ = last_whole_checkpoint(run_dir)
        back = (
            f"The last whole checkpoint is {whole}: start again with resume_from_checkpoint=True"
            if whole
            else f"There is no checkpoint in {run_dir} to go on from yet"
        )
        raise OSError(
            errno.ENOSPC,
            f"The disk is full: {final} could not be written ({error}). Free some space; save_total_limit=2 keeps two "
            f"checkpoints only. {back}",
        ) from error


def _disk_is_full(error: BaseException, folder: str) -> bool:
    """Whether a failed write ran out of space; torch and safetensors do not say so by an error number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NO_SPACE
    text = str(error)
    if any(sign in text for sign in ("No space left", "File too large", "quota exceeded")):
        return True
    return "file write failed" in text or ("unexpected pos" in text and shutil.disk_usage(folder).free < 2**24)
