"""From prompts to labels: who answers, how sure they are, and the same file however often it was stopped."""

import json
import math

import pytest
import reference
import torch
from models import adapted, prompt_completion_rows, tiny_model, tiny_tokenizer
from steps import echo_setup

from echo_trainer.labelling.label import Label, counts, examples, label
from echo_trainer.labelling.options import DistillOptions
from echo_trainer.labelling.prompts import read_prompts
from echo_trainer.labelling.teacher import Teacher
from echo_trainer.method.sites import site_key
from echo_trainer.rendering.forms import RowOptions
from echo_trainer.rendering.rendering import Rendering

ROWS = [{"prompt": row["prompt"]} for row in prompt_completion_rows(11, seed=4)]
CHAT = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]


def read(rows, tokenizer=None):
    return read_prompts(rows, Rendering(RowOptions(), tokenizer or tiny_tokenizer()))


def a_teacher(kind="echo", **options):
    model = adapted(tiny_model()).eval()
    setup = echo_setup(model, gate="none")
    for name, parameter in setup.networks.named_parameters():
        if name.endswith("scale"):
            parameter.data.fill_(2.0)
    with torch.no_grad():  # a random model ends an answer now and then
        model.get_base_model().lm_head.weight[1] *= 3
    return Teacher(model, tiny_tokenizer(), kind, setup, **options)


def options(**given):
    return DistillOptions(**{"max_new_tokens": 12, "label_batch_size": 4, **given})


# Who answers


def test_teachers_answer_differently_and_by_themselves():
    """Base and plain teacher say what the models say alone; the echo says something else."""
    said = {}
    for kind in ("echo", "plain", "base"):
        teacher = a_teacher(kind)
        said[kind] = [answers[0].text for answers in teacher.write(read(ROWS), max_new_tokens=6)]
        one = [teacher.write([prompt], max_new_tokens=6)[0][0].text for prompt in read(ROWS)]
        assert one == said[kind]
    assert len({tuple(texts) for texts in said.values()}) == 3
    tokenizer, adapted_model = tiny_tokenizer(), a_teacher("base").model
    ids = tokenizer(ROWS[0]["prompt"], return_tensors="pt")
    alone = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for kind in ("plain", "base"):  # in this order: the adapter is taken off
        model = adapted_model if kind == "plain" else adapted_model.unload()
        written = model.generate(**ids, **alone)[0, ids["input_ids"].shape[1] :]
        assert said[kind][0].split() == tokenizer.decode(written, skip_special_tokens=True).split()


def boundary_state(setup, prompt):
    """z of a prompt: the mean over source layers at its last token."""
    kept = []
    hooks = [setup.layers[s].register_forward_hook(lambda m, a, out: kept.append(out)) for s in setup.source_layers]
    with torch.no_grad():
        setup.model(input_ids=torch.tensor([prompt]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum((out[0] if isinstance(out, tuple) else out)[0, -1] for out in kept) / len(kept)


@pytest.mark.parametrize("positions", ["answer", "predicting"])
def test_what_the_echo_says_of_an_answer(positions):
    """Log-likelihood and distributions, token by token, from a computation with loops."""
    teacher = a_teacher(positions=positions)
    read_rows = examples([{**row, "completion": " w3 w4 w5"} for row in ROWS[:5]], teacher.tokenizer)
    found = teacher.judge(read_rows, top=4, temperature=2.0)
    setup, networks = teacher.setup, teacher.setup.networks.networks
    for row, judged in zip(read_rows, found, strict=True):
        ids = row["input_ids"]
        places = [place for place, value in enumerate(row["labels"]) if value != -100]
        z = boundary_state(setup, ids[: places[0]])
        reached = dict.fromkeys(range(places[0] - (positions == "predicting"), len(ids)), 0)
        with torch.no_grad():
            logits = reference.echo_logits(setup.model, setup.sites, networks, ids, [z], reached, site_key)
        log = logits.double().log_softmax(-1)
        expected = sum(float(log[place - 1, ids[place]]) for place in places)
        assert judged.n_tokens == len(places) == 4
        assert judged.log_likelihood == pytest.approx(expected, abs=1e-4)
        for place, top, logs in zip(places, judged.top, judged.logs, strict=True):
            soft = (logits[place - 1].double() / 2.0).log_softmax(-1)
            assert top == soft.topk(4).indices.tolist()
            rest = math.log(sum(math.exp(float(soft[t])) for t in range(len(soft)) if t not in top))
            assert logs == pytest.approx([*(float(soft[t]) for t in top), rest], abs=1e-4)


def test_teachers_that_cannot_be():
    model = adapted(tiny_model())
    with pytest.raises(ValueError, match="needs echo networks, and there are none"):
        Teacher(model, tiny_tokenizer(), "echo")
    with pytest.raises(ValueError, match="without its adapter, and this model has none"):
        Teacher(tiny_model(), tiny_tokenizer(), "base")


# The file


@pytest.mark.parametrize("given", [{}, {"n_samples": 5}, {"labels": "soft", "soft_tokens": 3}])
def test_stopped_anywhere_it_ends_with_the_same_file(tmp_path, given):
    prompts, whole = read(ROWS), tmp_path / "whole.jsonl"
    expected, done = label(a_teacher(), prompts, whole, options(**given), 7), []
    text = whole.read_bytes()
    assert len(text.splitlines()) == 1 + len(ROWS) and [each.index for each in expected] == list(range(len(ROWS)))
    for size in (0, 5, text.index(b"\n") + 1, len(text) // 2, len(text) - 3, len(text)):
        path = tmp_path / f"{size}.jsonl"
        path.write_bytes(text[:size])
        torch.manual_seed(size)  # what is sampled does not depend on the process
        done.clear()
        assert label(a_teacher(), prompts, path, options(**given), 7, done.append) == expected
        assert path.read_bytes() == text and sum(done) == len(ROWS)
    before = path.stat().st_mtime_ns
    label(a_teacher(), prompts, path, options(**given), 7, processes=2)  # finished: several may read it
    assert path.stat().st_mtime_ns == before


def test_killed_while_it_answers(tmp_path):
    class Killed(BaseException):
        pass

    prompts, calls = read(ROWS), []

    def killed(n):
        calls.append(n)
        if len(calls) == 2:  # after a batch of its own
            raise Killed

    expected = label(a_teacher(), prompts, tmp_path / "whole.jsonl", options(n_samples=3), 0)
    for _ in range(3):
        calls.clear()
        with pytest.raises(Killed):
            label(a_teacher(), prompts, tmp_path / "killed.jsonl", options(n_samples=3), 0, killed)
    found = label(a_teacher(), prompts, tmp_path / "killed.jsonl", options(n_samples=3), 0)
    assert found == expected
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_labels_of_something_else_are_refused(tmp_path):
    path = tmp_path / "labels.jsonl"
    label(a_teacher(), read(ROWS), path, options(n_samples=2), 0)
    others = [
        (a_teacher("plain"), ROWS, options(n_samples=2), 0, "teacher 'echo' .now 'plain'"),
        (a_teacher(), ROWS[1:], options(n_samples=2), 0, "prompts '"),
        (a_teacher(), ROWS, options(n_samples=3), 0, "n_samples 2 .now 3"),
        (a_teacher(), ROWS, options(n_samples=2), 1, "seed 0 .now 1"),
        (a_teacher(), ROWS, options(n_samples=2, labels="soft"), 0, "labels 'hard'"),
    ]
    weights = a_teacher()
    next(weights.setup.networks.parameters()).data.add_(1e-3)
    others.append((weights, ROWS, options(n_samples=2), 0, "weights '"))
    for teacher, rows, given, seed, message in others:
        with pytest.raises(ValueError, match=f"holds labels of another labelling: .*{message}"):
            label(teacher, read(rows), path, given, seed)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="is no file of labels"):
        label(a_teacher(), read(ROWS), path, options(), 0)


def test_several_processes_do_not_label(tmp_path):
    with pytest.raises(ValueError, match="in one process, and there are 2"):
        label(a_teacher(), read(ROWS), tmp_path / "labels.jsonl", options(), 0, processes=2)


# Scores


def test_confidence(tmp_path):
    greedy = label(a_teacher(), read(ROWS), tmp_path / "greedy.jsonl", options(), 0)
    good = [each for each in greedy if each.fault is None]
    assert good and all(each.votes == 1 for each in good)
    for each in good:
        assert each.confidence == pytest.approx(math.exp(each.log_likelihood / each.n_tokens))
    sampled = label(a_teacher(), read(ROWS), tmp_path / "sampled.jsonl", options(n_samples=6, temperature=0.3), 0)
    assert {each.votes for each in sampled if each.fault is None} - {1}
    assert all(each.confidence == each.votes / 6 for each in sampled)


def test_threshold_and_counts():
    def a_label(confidence, fault=None):
        return Label(0, {}, confidence, -1.0, 1, 1, fault)

    labels = [a_label(0.2), a_label(0.5), a_label(0.9), a_label(0.9, "empty"), a_label(0.0, "unfinished")]
    assert counts(labels, 0.5) == {"prompts": 5, "kept": 2, "empty": 1, "unfinished": 1, "unsure": 1}
    assert counts(labels, 0.0)["kept"] == 3 and counts(labels, 1.0)["unsure"] == 3


def test_messages_are_answered_as_messages(tmp_path):
    labels = label(a_teacher(), read(CHAT), tmp_path / "labels.jsonl", options(), 0)
    good = [each for each in labels if each.fault is None]
    assert good
    for each in good:
        (said,) = each.row["completion"]
        assert said["role"] == "assistant" and said["content"] == said["content"].strip()
        assert each.row["prompt"] == CHAT[each.index]["prompt"]
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert lines[0]["identity"]["teacher"] == "echo" and len(lines) == 1 + len(CHAT)


# Prompts


WITHOUT_TEMPLATE = tiny_tokenizer()
WITHOUT_TEMPLATE.chat_template = None


@pytest.mark.parametrize(("rows", "message"), [
    ([], "the data has no rows"),
    ([{"prompt": "w1", "completion": " w2"}], "has `completion`, so its answer is known"),
    ([{"messages": CHAT[0]["prompt"]}], "has `messages`, so its answer is known"),
    ([{"question": "w1"}], "Name the column of the questions `prompt`"),
    ([{"prompt": 3}], "no `prompt` that is text or a list of messages"),
    ([{"prompt": []}], "no `prompt` that is text or a list of messages"),
    ([{"prompt": ["w1"]}], "no `prompt` that is text or a list of messages"),
    ([{"prompt": "w1"}, {"prompt": " \n"}], r"Row 1 .the first is row 0. has an empty prompt"),
    ([{"prompt": [*CHAT[0]["prompt"], {"role": "assistant", "content": "w2"}]}], "ends with the assistant's turn"),
    ([ROWS[0], CHAT[0]], "Some prompts are text and others are messages"),
    (["w1"], "is str and not a row"),
])  # fmt: skip
def test_rows_that_are_no_prompts(rows, message):
    with pytest.raises(ValueError, match=message):
        read(rows)


def test_messages_without_a_chat_template():
    with pytest.raises(ValueError, match="no chat template"):
        read(CHAT, WITHOUT_TEMPLATE)


def test_empty_columns_of_a_table_are_no_answers():
    assert read([{"prompt": "w1", "completion": None}])[0].row == {"prompt": "w1"}
