"""The commands ``echo-trainer check`` and ``echo-trainer export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..adapter.engines import ENGINES

CHECK = """\
Say for each serving engine whether it will serve the adapter as it was trained, refuse it, or serve something else
without a word, with the rule, the tensor or setting, and the fix.

Only headers are read, except to look for NaN and infinity. Pickles (*.bin) are never opened. Nothing is downloaded
unless --base names a model on the Hub, of which only config.json is fetched.
"""
CHECK_END = """\
exit status:
  0  every engine asked for serves the adapter correctly
  1  an engine refuses it, or would serve something else
  2  the adapter or the base cannot be read
  3  nothing is known to be wrong, but for an engine it is not known to be right

examples:
  echo-trainer check runs/my-adapter
  echo-trainer check runs/my-adapter --engine vllm --base HuggingFaceTB/SmolLM2-135M
  echo-trainer check runs/my-adapter --json > report.json
"""
EXPORT = """\
Write the adapter in another form. The result appears when it is complete and verified, or not at all.

  --portable  the same adapter, without loss, in the form that every engine serves correctly
  --merged    base and adapter as one ordinary model; right for every method, DoRA included
  --lora      an ordinary LoRA fitted to a DoRA adapter; loses something, the error is measured and printed
  --gguf      an adapter file for llama.cpp, through llama.cpp's converter
"""
EXPORT_END = """\
exit status:
  0  written
  2  not written; the message says why and what to do instead

examples:
  echo-trainer export --portable runs/my-adapter portable
  echo-trainer export --merged runs/my-dora merged --dtype bfloat16
  echo-trainer export --lora runs/my-dora as-lora --rank 64
  echo-trainer export --gguf runs/my-adapter adapter.gguf --converter llama.cpp/convert_lora_to_gguf.py
"""
_BASE_HELP = "the base model: a folder, or a name on the Hub (default: the name in the adapter's config)"


def add_check_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``check``; its handler returns the exit status."""
    parser = _parser(subparsers, "check", "will an engine serve this adapter as it was trained?", CHECK, CHECK_END)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a PEFT adapter")
    parser.add_argument(
        "--engine",
        choices=(*ENGINES, "all"),
        default="all",
        help="the engine to check for (default: all)",
    )
    parser.add_argument("--base", help=_BASE_HELP)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--headers-only", action="store_true", help="do not look for NaN and infinity in the values")
    parser.set_defaults(func=run_check)
    return parser


def add_export_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command ``export``; its handler returns the exit status."""
    parser = _parser(subparsers, "export", "write an adapter in a form that a server wants", EXPORT, EXPORT_END)
    parser.usage = "%(prog)s (--portable | --merged | --lora | --gguf) [options] ADAPTER OUT"
    form = parser.add_mutually_exclusive_group()
    for name in ("portable", "merged", "lora", "gguf"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=argparse.SUPPRESS)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a PEFT adapter")
    parser.add_argument("out", metavar="OUT", help="folder to write (--gguf: file); must not exist")
    parser.add_argument("--base", help=_BASE_HELP)
    parser.add_argument(
        "--rank",
        type=_rank,
        help="--portable: rank to pad to, a multiple of 16 (default: the smallest). "
        "--lora: rank of the fit, or the share of the change to keep, such as 0.99 (default: 4 times the adapter's)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="--merged: (default: bfloat16)"
    )
    parser.add_argument(
        "--outtype", choices=("f32", "f16", "bf16", "q8_0"), default="f32", help="--gguf: (default: f32)"
    )
    parser.add_argument("--converter", help="--gguf: path of llama.cpp's convert_lora_to_gguf.py")
    parser.set_defaults(func=run_export)
    return parser


def run_check(arguments: argparse.Namespace) -> int:
    """Handle ``echo-trainer check``."""
    from ..adapter.check import check_adapter
    from ..adapter.folder import AdapterError

    try:
        report = check_adapter(arguments.adapter, arguments.engine, arguments.base, not arguments.headers_only)
    except AdapterError as error:
        return _fail(error)
    if arguments.json:
        print(report.to_json())
    else:
        report.print()
    return report.exit_status


def run_export(arguments: argparse.Namespace) -> int:
    """Handle ``echo-trainer export``."""
    if arguments.form is None:
        raise ValueError("No form was named. Give one of --portable, --merged, --lora and --gguf.")
    from ..adapter.folder import AdapterError
    from ..export import forms as export
    from ..export.gguf import export_gguf

    adapter, out, base, rank = arguments.adapter, arguments.out, arguments.base, arguments.rank
    try:
        if Path(out).exists() and arguments.form == "gguf":
            raise AdapterError(f"'{out}' exists already. Choose a new file, or remove it first.")
        if arguments.form == "portable":
            if isinstance(rank, float):
                raise AdapterError(f"--rank {rank} is a share; --portable needs a multiple of 16.")
            export.export_portable(adapter, out, base, rank)
            print(f"Wrote {out}: the same adapter in the portable form.")
        elif arguments.form == "merged":
            print(export.export_merged(adapter, out, base, arguments.dtype))
            print(
                f"Wrote {out}: base and adapter in {arguments.dtype}. Serve it like any model, without LoRA options."
            )
        elif arguments.form == "lora":
            print(export.export_lora(adapter, out, base, rank))
            print(f"Wrote {out}: a LoRA fitted to the adapter. Evaluate it before you use it.")
        else:
            export_gguf(adapter, out, base, arguments.outtype, arguments.converter)
            print(f"Wrote {out}: serve it with `llama-server -m BASE.gguf --lora {out}`.")
    except AdapterError as error:
        return _fail(error)
    return 0


def _parser(subparsers, name: str, short: str, description: str, epilog: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    return subparsers.add_parser(name, help=short, description=description, epilog=epilog, formatter_class=form)


def _rank(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a rank such as 64 nor a share such as 0.99")
    return share


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
