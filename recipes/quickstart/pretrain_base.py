"""Pretrain the quickstart's small base model from scratch, offline, on one CPU core.

    OMP_NUM_THREADS=1 python recipes/quickstart/pretrain_base.py      # writes echo_trainer/quickstart/base/

About eleven minutes of CPU.

A model this small learns to look up what was said about *this* person only if it is led there. Word lists to repeat
come first (they make induction heads), mixed with facts about many people to repeat in another order, first without
and then with the words between the name and what is said of it; then come stories with questions. Trained on stories
and questions alone it was still guessing among what the story mentions after 800 steps.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from make_data import COLOURS, NAMES, PACKAGE_DATA, PLACES, THINGS, ask, base_question, make_story
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<eos>", "<pad>"
ANSWER_WEIGHT = 5.0  # of a token that the text before it determines; the others are drawn at random and teach little
WORDS = NAMES + PLACES + THINGS + COLOURS
PHRASES = (  # one token each: shorter texts, and the name stands next to what is said of it
    r" Question: what colour is the",
    r" Question: which thing is",
    r" Question: who is in the",
    r" Question: who has the",
    r" Question: where is",
    r" Question: what does",
    r"\? Answer:",
    r" went to the",
    r" is in the",
    r" gave the",
    r" has the",
    r" in the",
)

Pieces = list[tuple[str, bool]]  # text, and whether the text before determines it


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: the shares of lists and of facts; the rest are stories."""

    until: float  # share of all steps at which it ends
    lists: float
    facts: float
    whole: float  # share of the fact documents that are in whole sentences


CURRICULUM = (
    Stage(until=0.18, lists=0.5, facts=0.5, whole=0.5),
    Stage(until=0.42, lists=0.2, facts=0.8, whole=0.7),
    Stage(until=1.00, lists=0.0, facts=0.3, whole=1.0),
)


def make_list(rng: random.Random) -> Pieces:
    """Random words, then the same words three more times."""
    words = "".join(f" {word}" for word in rng.sample([*WORDS, "with", "in the"], rng.randint(8, 16)))
    return [(f"List:{words}.", False), *[(" Again:", False), (f"{words}.", True)] * 3]


def make_facts(rng: random.Random, whole: bool) -> Pieces:
    """What is known about four to eight people, then twice more in another order: the same, or what leads back."""
    names = rng.sample(NAMES, rng.randint(4, 8))
    facts, backward = [], []
    for name, place, thing in zip(names, rng.sample(PLACES, 8), rng.sample(THINGS, 8), strict=False):
        colour = rng.choice(COLOURS)
        if rng.random() < 0.5:
            facts.append((f" {name}", f"{' is in the' if whole else ''} {place}."))
            backward.append((ask(f"who is in the {place}?") if whole else f" {place}", f" {name}."))
        else:
            facts.append((f" {name}", f"{' has the' if whole else ''} {colour} {thing}."))
            if rng.random() < 0.5:
                backward.append((ask(f"who has the {thing}?"), f" {name} has the {thing}."))
            else:
                backward.append((ask(f"what colour is the {thing}?"), f" the {thing} is {colour}."))
            if not whole:
                backward[-1] = (f" {thing}", f" {colour} {name}.")
    pieces = [("Story:" + "".join(cue + rest for cue, rest in facts), False)]
    for _ in range(2):
        forward = rng.random() < 0.5
        pieces.append((" Again:" if forward else " Back:", False))
        for cue, rest in rng.sample(facts if forward else backward, len(facts)):
            pieces += [(cue, False), (rest, True)]
    return pieces


def make_questions(rng: random.Random) -> Pieces:
    """A story and several questions about it with their answers."""
    story = make_story(rng)
    pieces = [(story.text, False)]
    for _ in range(rng.randint(6, 10)):
        question, answer = base_question(rng, story)
        pieces += [(ask(question), False), (f" {answer}", True)]
    return pieces


def make_document(rng: random.Random, stage: Stage) -> Pieces:
    """One document of a stage."""
    draw = rng.random()
    if draw < stage.lists:
        return make_list(rng)
    if draw < stage.lists + stage.facts:
        return make_facts(rng, whole=rng.random() < stage.whole)
    return make_questions(rng)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so any text round-trips; each word of the world, with the space before it, is one token."""
    rng = random.Random(seed)
    documents = [make_document(rng, stage) for stage in CURRICULUM for _ in range(1000)]
    tokenizer = Tokenizer(models.BPE())
    words = Regex("|".join([*PHRASES, r" ?\p{L}+", r"[^\s\p{L}]+", r"\s"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=[AddedToken(PAD, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["".join(text for text, _ in pieces) for pieces in documents], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    split = [word for word in WORDS if len(fast(f" {word}")["input_ids"]) != 1]
    assert not split, f"not one token each: {split}"
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with grouped queries (4 heads on 2 at width 128) and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def make_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, stage: Stage, size: int):
    """Token ids (B, T) and loss weights (B, T), padded on the right, where causal attention needs no mask."""
    rows, weights = [], []
    for _ in range(size):
        ids, weight = [], []
        for text, determined in make_document(rng, stage):
            piece = tokenizer(text)["input_ids"]
            ids += piece
            weight += [ANSWER_WEIGHT if determined else 1.0] * len(piece)
        rows.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        weights.append(torch.tensor([*weight, 1.0]))
    return pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id), pad_sequence(weights, True)


def make_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> tuple[list, list]:
    """Muon for the matrices, AdamW for embeddings and norms, both with warm-up and a cosine down to zero."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]

    def factor(step: int) -> float:
        progress = max(step - args.warmup, 0) / max(args.steps - args.warmup, 1)
        return min((step + 1) / args.warmup, 0.5 * (1 + math.cos(math.pi * progress)))

    return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> dict[str, float]:
    """Run all steps; returns the mean losses (nats per token) of the last 50, and the seconds of CPU."""
    rng = random.Random(args.seed + 1)
    optimizers, schedules = make_optimizers(model, args)
    model.train()
    losses: list[tuple[float, float]] = []
    report: dict[str, float] = {}
    progress = trange(args.steps, mininterval=2)
    for step in progress:
        stage = next(stage for stage in CURRICULUM if step < stage.until * args.steps)
        ids, weight = make_batch(rng, tokenizer, stage, args.batch)
        logits = model(input_ids=ids[:, :-1]).logits
        nll, weight = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"), weight[:, 1:]
        ((nll * weight).sum() / weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        losses.append((nll[weight == ANSWER_WEIGHT].mean().item(), nll[weight == 1].mean().item()))
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            recent = torch.tensor(losses[-50:]).mean(0).tolist()
            report = {
                "answers": round(recent[0], 4),
                "others": round(recent[1], 4),
                "cpu_s": round(time.process_time()),
            }
            progress.set_postfix(stage=CURRICULUM.index(stage), **{k: f"{v:.3f}" for k, v in report.items()})
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PACKAGE_DATA / "base", help="folder (default: the package's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=12, help="documents per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="AdamW's, for embeddings and norms")
    parser.add_argument("--muon-learning-rate", type=float, default=5e-3, help="Muon's, for the matrices")
    parser.add_argument("--warmup", type=int, default=40, help="steps")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the order of a sum, and so its last bit, depends on the number of threads
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.hidden, args.layers)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    print(train(model, tokenizer, args))
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
