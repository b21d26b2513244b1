"""Scores with shared keys and values are those of each text alone, whatever stood in the batches before."""

import pytest
import torch
from families import family_model
from models import VOCABULARY, tiny_model, tiny_tokenizer
from peft import PromptTuningConfig, get_peft_model

from echo_trainer.compat.dispatch import TorchDispatchMode
from echo_trainer.evaluation import scoring, sharing
from echo_trainer.method import losses


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


class LargestLogits(TorchDispatchMode):
    """The most numbers of a tensor whose last dimension is the vocabulary."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.t.default:  # the head's weights, turned around
            return result
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == VOCABULARY:
            self.found = max(self.found, result.numel())
        return result


@pytest.mark.parametrize("places", [1, 3, 1000])
def test_logits_exist_for_a_chunk_of_places_at_a_time(places, monkeypatch):
    """The scores are the same however many there are at a time; never those of all positions of a batch."""
    model = tiny_model("gemma2", attention="eager").eval()
    rows = [
        scoring.TokenizedRow([[2, 3, 4, 5, 6, 7], [2, 3, 4, 8]], 2, 3),
        scoring.TokenizedRow([[9, 10, 11, 12], [9, 10, 13, 14, 15]], 1, 2),
    ]
    expected = scoring.score_rows(model, tiny_tokenizer(), rows)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", places * VOCABULARY)
    with LargestLogits() as largest:
        found = scoring.score_rows(model, tiny_tokenizer(), rows)
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-6)
            assert (one.n_tokens, one.greedy) == (other.n_tokens, other.greedy)
    assert largest.found <= places * VOCABULARY
    # And they are the model's own, with its soft-capping.
    for row, scores in zip(rows, found, strict=True):
        for ids, score in zip(row.sequences, scores, strict=True):
            log_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = sum(float(log_TV[t - 1, ids[t]]) for t in range(row.start, len(ids)))
            assert score.log_likelihood == pytest.approx(own, rel=1e-5)


def test_prompt_tuning_is_refused_by_name():
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with pytest.raises(ValueError, match="PROMPT_TUNING, which puts tokens before every text"):
        scoring.score_rows(model, tiny_tokenizer(), [scoring.TokenizedRow([[2, 3, 4]], 1, 3)])
