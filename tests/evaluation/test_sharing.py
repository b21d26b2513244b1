"""Scores with shared keys and values are those of each text alone, whatever stood in the batches before."""

import pytest
import torch
from families import family_model
from models import tiny_tokenizer

from echo_trainer.evaluation import scoring, sharing


def rows(spec, seed, common=10):
    """Rows of a common beginning, a prompt and two completions of the given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(2, 60, (n,), generator=generator).tolist()

    head, found = draw(common), []
    for prompt, answer in spec:
        begin = head + draw(prompt)
        sequences = [[*begin, 3, 4, 10 + number, *draw(answer)] for number in range(2)]
        found.append(scoring.TokenizedRow(sequences, len(begin), len(begin) + 2))
    return found


SHORT, LONG = rows([(3, 2), (5, 2)], 1), rows([(30, 2), (60, 3), (5, 2), (45, 1)], 4)
EVEN, MIXED = rows([(5, 2), (5, 2)], 2), rows([(3, 2), (15, 3), (5, 2), (9, 1)], 5)
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 10.0],
                        "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "attention", "options", "first"),
    [
        ("llama", "sdpa", {}, SHORT),
        ("mistral", "sdpa", {"sliding_window": 16}, SHORT),
        ("gpt_neo", "eager", {"window_size": 24}, SHORT),  # a window that has another name
        ("llama4_text", "sdpa", {"attention_chunk_size": 24}, SHORT),
        ("mpt", "eager", {}, EVEN),  # biases by position
        ("phi3", "sdpa", LONGROPE, SHORT),  # a rotary embedding that depends on the longest text of the batch
        ("jamba", "eager", {}, SHORT),  # another state than keys and values
    ],
    ids=["plain", "window", "local", "chunks", "alibi", "longrope", "hybrid"],
)
def test_scores_are_those_of_each_text_alone(family, attention, options, first, dtype):
    if family == "jamba" and dtype is torch.bfloat16:
        pytest.skip("its routers send tokens elsewhere in bfloat16, alone and in a batch")
    model, tokenizer = family_model(family, attention=attention, dtype=dtype, **options).eval(), tiny_tokenizer()
    scoring.score_rows(model, tokenizer, first)
    for batch in (MIXED, LONG):
        found = scoring.score_rows(model, tokenizer, batch)
        for row, scores in zip(batch, found, strict=True):
            for sequence, score in zip(row.sequences, scores, strict=True):
                one = scoring.TokenizedRow([sequence], row.start, len(sequence) - 1)
                (expected,) = scoring.score_rows(model, tokenizer, [one])[0]
                bound = 1e-4 if dtype is torch.float32 else 0.35
                assert abs(score.log_likelihood - expected.log_likelihood) < bound


def test_a_form_is_tried_when_it_comes_and_longer_rows_again(monkeypatch):
    model, tokenizer, tried = family_model("llama").eval(), tiny_tokenizer(), []
    attempt = sharing._try

    def counted(model, rows, *scorers):
        tried.append(max(len(ids) for row in rows for ids in row.sequences))
        return attempt(model, rows, *scorers)

    monkeypatch.setattr(sharing, "_try", counted)
    for batch in (SHORT, SHORT, EVEN, LONG, MIXED, LONG):
        scoring.score_rows(model, tokenizer, batch)
    lengths = [max(len(ids) for row in batch for ids in row.sequences) for batch in (SHORT, EVEN, LONG)]
    assert tried == lengths
