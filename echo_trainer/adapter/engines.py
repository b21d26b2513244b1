"""The serving engines that `check` knows: choices of the command line, notes, and commands on the card follow from it.

What an engine makes of an adapter is its column of the table in `rules`; without a column, or without a sign there, it
is not known. Imports nothing: a command line starts with it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """
    A serving engine.

    Attributes:
        title: as sentences call it; its name, as options and records do, is its key in `ENGINES`.
        page: of its documentation.
        flags: with which it takes an adapter; `{rank}` stands for the largest rank.
        command: that serves an adapter, with `{base}`, `{name}`, `{adapter}` and `{flags}`, for the card; None where
            the card shows none.
        port: on which that answers as OpenAI's server does.
        ranks: that it has flags for; None where it takes every rank.
        per_gpu: the rank that each GPU must hold for the scale to be right; None where that does not matter.
    """

    title: str
    page: str
    flags: str | None = None
    command: str | None = None
    port: int | None = None
    ranks: tuple[int, ...] | None = None
    per_gpu: int | None = None

    def flags_for(self, rank: int) -> str | None:
        """Its flags for an adapter of this rank; None where it needs none, or takes no such rank."""
        if self.ranks is not None:
            rank = min((allowed for allowed in self.ranks if allowed >= rank), default=0)
        return self.flags.format(rank=rank) if self.flags is not None and rank > 0 else None


ENGINES: dict[str, Engine] = {
    "vllm": Engine(
        title="vLLM",
        page="https://docs.vllm.ai",
        flags="--enable-lora --max-lora-rank {rank}",
        command="vllm serve {base} {flags} --lora-modules {name}={adapter}",
        port=8000,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    ),
    "tgi": Engine("TGI", "https://huggingface.co/docs/text-generation-inference", per_gpu=8),
    "lorax": Engine("LoRAX", "https://loraexchange.ai", per_gpu=8),
    "sglang": Engine(
        title="SGLang",
        page="https://docs.sglang.ai",
        flags="--enable-lora --max-lora-rank {rank}",
        command="python -m sglang.launch_server --model-path {base} {flags} --lora-paths {name}={adapter}",
        port=30000,
    ),
    "llama.cpp": Engine("llama.cpp", "https://github.com/ggml-org/llama.cpp"),
}

COLUMNS: tuple[str, ...] = ("vllm", "tgi", "lorax", "sglang", "llama.cpp")
"""Whose sign stands where in the rows of `rules`; a new one's stand at their end."""


def titles(names: list[str]) -> str:
    """Engines as a sentence lists them: "vLLM, TGI and LoRAX"."""
    *others, last = [ENGINES[name].title for name in names]
    return f"{', '.join(others)} and {last}" if others else last
