"""Accuracy by beam width: against loops, and on the beams that training would see."""

import pytest
from beam_cases import G, beam_trainer, even_length, prompt_rows
from beam_reference import beam_search
from models import tiny_model, tiny_tokenizer

from echo_trainer.bgrpo.accuracy import accuracy_by_width, before_and_after, best_scores, draw


def test_accuracy_by_width(tmp_path):
    model, tokenizer, rows = tiny_model().eval(), tiny_tokenizer(), prompt_rows(7)
    found = accuracy_by_width(model, tokenizer, rows, even_length, 4, (1, 3))
    one = best_scores(model, tokenizer, rows[3:4], even_length, 3, 4)
    assert best_scores(model, tokenizer, rows, even_length, 3, 4, batch_size=2)[3] == one[0]
    for width in (1, 3):
        right = []
        for row in rows:
            beams = beam_search(model, tokenizer(row["prompt"])["input_ids"], width, 4, {1})
            texts = [tokenizer.decode(list(tokens), skip_special_tokens=True) for tokens, _ in beams]
            right.append(any(even_length(row["prompt"], text, row) for text in texts))
        assert found[width] == sum(right) / 7
    assert tokenizer.padding_side == "right"
    table = before_and_after(found, {1: 0.5, 3: 1.0}, 7)
    assert table[1] == {"width": 3, "before": found[3], "after": 1.0, "n": 7}
    assert draw(table, tmp_path / "beams.png").stat().st_size > 5000


def trained_and_measured(folder, rows, **settings):
    """Beams of every prompt, in training and as accuracy looks at them."""
    seen = []

    def verifier(prompt, completion, row):
        seen.append((str(prompt), str(completion)))
        return True

    more = {key: settings.pop(key) for key in ("processing_class",) if key in settings}
    trainer = beam_trainer(folder, rows=rows, verifier=verifier, max_steps=1, num_iterations=1, more=more, **settings)
    how = {"options": trainer.generation_kwargs, "template": trainer.args.chat_template_kwargs}
    accuracy_by_width(trainer.model, trainer.processing_class, rows, verifier, 4, [G], **how)
    measured, seen[:] = set(seen), []
    trainer.train()
    assert len(set(seen)) == 4 * G
    return set(seen), measured


def another_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "w17"
    return tokenizer


@pytest.mark.parametrize(
    "settings",
    [
        {"processing_class": another_end()},
        {"generation_kwargs": {"suppress_tokens": [10, 11, 12, 17, 24, 43]}},
        {"generation_kwargs": {"no_repeat_ngram_size": 1}},
    ],
)
def test_accuracy_is_that_of_the_beams_of_training(tmp_path, settings):
    seen, measured = trained_and_measured(tmp_path, prompt_rows(), **settings)
    assert seen <= measured


def test_accuracy_has_the_chat_template_of_training(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if think %} w40 w41{% else %} w2{% endif %}"
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompt_rows()]
    options = {"processing_class": tokenizer, "chat_template_kwargs": {"think": True}}
    seen, measured = trained_and_measured(tmp_path, rows, **options)
    assert seen <= measured
