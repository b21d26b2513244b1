"""An adapter for llama.cpp, through llama.cpp's own converter."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..adapter.base import read_base
from ..adapter.check import check_adapter
from ..adapter.logit_error import base_name
from ..adapter.portable import make_portable
from ..adapter.read import read_adapter
from ..adapter.refuse import ExportError, refuse_broken

CONVERTER = "convert_lora_to_gguf.py"
GET_CONVERTER = f"""llama.cpp's converter, {CONVERTER}, was not found. To get it:
    git clone --depth 1 https://github.com/ggml-org/llama.cpp
    pip install gguf sentencepiece
then pass --converter llama.cpp/{CONVERTER}, or set LLAMA_CPP=llama.cpp."""


def export_gguf(
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    outtype: str = "f32",
    converter: str | Path | None = None,
) -> Path:
    """Write a GGUF adapter for llama.cpp, through llama.cpp's own converter and from the portable form.

    The converter ignores rsLoRA and alpha patterns, which is why it is given the portable form.

    Args:
        adapter: the adapter's folder.
        out: the file to write.
        base: folder or Hub name of the base; only its config is read. None takes the name in the adapter's config.
        outtype: f32, f16, bf16 or q8_0.
        converter: path of ``convert_lora_to_gguf.py``; None looks for it.

    Raises:
        ExportError: the converter is not there (the message says how to get it), or it failed.
        NotPortableError: the adapter is DoRA or holds more than LoRA.

    """
    out = Path(out)
    script = find_converter(converter)
    source = read_adapter(adapter)
    base = base_name(adapter, base)
    refuse_broken(source, read_base(base, download=True))
    with tempfile.TemporaryDirectory() as folder:
        portable = make_portable(adapter, base, Path(folder) / "portable")
        report = check_adapter(portable, engine="llama.cpp", base=base)
        if not report.ok:
            reasons = "; ".join(f"{found.rule.says} {found.rule.fix}" for found in report.findings)
            raise ExportError(f"llama.cpp does not serve this adapter: {reasons}")
        assert base is not None  # `make_portable` has read its shapes
        written = Path(folder) / "adapter.gguf"
        where = ["--base", str(base)] if Path(base).is_dir() else ["--base-model-id", str(base)]
        command = [sys.executable, str(script), "--outfile", str(written), "--outtype", outtype, *where, str(portable)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not written.is_file():
            last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            raise ExportError(f"llama.cpp's converter stopped with status {done.returncode}:\n{last}")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        shutil.copyfile(written, partial)
        partial.replace(out)
    return out


def find_converter(given: str | Path | None = None) -> Path:
    """The path of llama.cpp's LoRA converter: given, in ``$LLAMA_CPP``, on the path, or beside the gguf package."""
    if given is not None:
        if not Path(given).is_file():
            raise ExportError(f"There is no file '{given}'. {GET_CONVERTER}")
        return Path(given)
    places = [Path(os.environ["LLAMA_CPP"]) / CONVERTER] if os.environ.get("LLAMA_CPP") else []
    places += [Path(found)] if (found := shutil.which(CONVERTER)) else []
    if (spec := importlib.util.find_spec("gguf")) and spec.origin:
        places.append(Path(spec.origin).parents[2] / CONVERTER)  # a llama.cpp checkout's gguf-py, installed in place
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ExportError(GET_CONVERTER)
    return found
