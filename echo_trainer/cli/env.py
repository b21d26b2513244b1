"""`echo-trainer env`: versions, device and kernels, and what was tested; the first thing to paste into a report."""

import argparse
import importlib.util
import platform

from .._version import __version__


def make_parser() -> argparse.ArgumentParser:
    """Options of the command: none."""
    return argparse.ArgumentParser(
        prog="echo-trainer env",
        description="Print the versions of echo_trainer and what it stands on, beside those it was tested with, the "
        "device, and the attention kernels that are installed. Paste it into a report. It names no path, no user and "
        "no token.",
    )


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer env`."""
    make_parser().parse_args(arguments)
    print(describe())
    return 0


def describe() -> str:
    """What the command prints."""
    import torch

    from ..compat.versions import TESTED, installed, newer_than_tested

    newer = newer_than_tested()
    lines = [f"{'echo_trainer':16} {__version__}", f"{'Python':16} {platform.python_version()}"]
    for name, tested in TESTED.items():
        there = installed()[name] or "not installed"
        note = f"tested with {tested}" + (", this one is newer" if name in newer else "")
        lines.append(f"{name:16} {there:16} {note}")
    lines.append(f"{'system':16} {platform.system()} {platform.release()}, {platform.machine()}")
    if torch.cuda.is_available():
        lines += [f"{'device':16} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        lines.append(f"{'CUDA':16} {torch.version.cuda}, bf16 {torch.cuda.is_bf16_supported()}")
    else:
        lines.append(f"{'device':16} CPU, {torch.get_num_threads()} threads")
    kernels = [name for name in ("flash_attn", "kernels", "causal_conv1d", "mamba_ssm", "deepspeed", "bitsandbytes")
               if importlib.util.find_spec(name)]  # fmt: skip
    lines.append(f"{'also there':16} {', '.join(kernels) or 'none of flash_attn, kernels, deepspeed, bitsandbytes'}")
    return "\n".join(lines)
