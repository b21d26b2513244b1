"""The beams of each prompt, in the place of samples."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

SEARCH = {"do_sample": False, "length_penalty": 0.0, "early_stopping": "never"}
"""
Beams by *summed* log-probability: with `length_penalty=0` scores are not divided by a length, and with "never" a
search goes on until no running beam can come before a finished one.
"""

OF_SAMPLES = ("temperature", "top_p", "top_k", "min_p")
"""What TRL sets for sampling, and a beam search has no use for."""


CONSTRAINTS = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "min_length",
    "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "renormalize_logits",
    "guidance_scale", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config",
)  # fmt: skip
"""Options of a model's `generation_config` that change which beams are found, and that TRL leaves as they are."""

NEUTRAL = {"guidance_scale": 1, "typical_p": 1, "encoder_repetition_penalty": 1}


class BeamHost(Protocol):
    """The trainer, as `Beams` sees it."""

    model: Any
    generation_kwargs: dict[str, Any]

    def use_generation(self, options: dict[str, Any]) -> None:
        """See `compat.beams.BeamJointTrainer`."""


class Beams:
    """
    Generation of a trainer: one beam search a prompt, whose beams are the group's rows, best first.

    Args:
        host: the trainer.
    """

    def __init__(self, host: BeamHost):
        self.host = host

    def generate(
        self, generate: Callable[[list[list[int]]], tuple[list[list[int]], None]], prompts: list[list[int]], width: int
    ) -> tuple[list[list[int]], None]:
        """
        Completions of the rows.

        Args:
            generate: TRL's generation; returns the completions of the prompts it is given.
            prompts: token ids of each row; each prompt stands `width` times, one after the other.
            width: G.

        Returns:
            Token ids of each row's completion, up to and with the token that ends it; and None, for TRL.

        Raises:
            RuntimeError: rows of a group have different prompts.
            ValueError: a prompt is empty.
        """
        firsts = prompts[::width]
        if len(prompts) % width or any(prompt != firsts[i // width] for i, prompt in enumerate(prompts)):
            instead = (
                "leave the sampler and the data loader to TRL"
                if self.host.model.training
                else f"write per_device_eval_batch_size={width}, or a multiple, or num_generations_eval=1 (greedy)"
            )
            raise RuntimeError(
                f"A batch of {len(prompts)} rows is not made of whole groups of {width} rows with the same prompt. "
                f"Beams of a group are those of one prompt: {instead}."
            )
        refuse_empty(firsts)
        self.host.use_generation(beam_options(self.host.generation_kwargs, width))
        training = self.host.model.training
        self.host.model.eval()  # with dropout the most probable completions would be those of another model
        try:
            return generate(firsts)
        finally:
            self.host.model.train(training)


def refuse_empty(prompts: Sequence[Sequence[int]]) -> None:
    """Refuse, with a ValueError, prompts (token ids) without a token: a search has nothing to begin with."""
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(
            f"Prompt {empty[0]} of {len(prompts)} in this batch has no tokens, so there is nothing to go on from. "
            f"Remove rows with an empty prompt, or begin every prompt with a word."
        )


def beam_options(options: dict[str, Any], width: int) -> dict[str, Any]:
    """
    Options of `generate` for a beam search.

    Args:
        options: TRL's, for sampling, or those of an earlier call.
        width: G; with 1 the search is greedy.
    """
    kept = {name: value for name, value in options.items() if name not in OF_SAMPLES}
    search = SEARCH if width > 1 else {"do_sample": False}
    kept = {name: value for name, value in kept.items() if name not in SEARCH}
    return {**kept, **search, "num_beams": width, "num_return_sequences": width}


def constraints_of(generation_config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """
    What a model brings with it that would rank beams by something else than their log-probability.

    Args:
        generation_config: of the model.
        options: of the run, which go before those of the model.
    """
    given = {name: getattr(generation_config, name, None) for name in CONSTRAINTS if options.get(name) is None}
    return {name: value for name, value in given.items() if value and value != NEUTRAL.get(name)}
