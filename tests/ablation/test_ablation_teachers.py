"""Other teachers: what each adds to the loss or changes about z, on the embedded base and a handful of stories."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from echo_trainer.ablation.arms import ARMS
from echo_trainer.ablation.echoes import NETWORKS
from echo_trainer.ablation.plan import Run
from echo_trainer.ablation.recipe import load_recipe
from echo_trainer.ablation.run_one import Workbench, build_trainer
from echo_trainer.evaluation.echo import EchoReader
from echo_trainer.evaluation.readers import PlainReader
from echo_trainer.evaluation.scoring import tokenize_row
from echo_trainer.quiet import quiet_libraries

FOLDER = Path(__file__).parents[2] / "recipes" / "ablation"
PEOPLE = (("Ada", "barn", "hat"), ("Gus", "hall", "coin"), ("Eva", "park", "lamp"))


def story(k):
    """One of different length, about person k; who is where comes first, so nothing relevant ends it."""
    told = [f"{name} is in the {place}." for name, place, _ in PEOPLE]
    told += [f"{name} has the red {thing}." for name, _, thing in PEOPLE[: 3 - k % 2]]
    name, place, thing = PEOPLE[k % (3 - k % 2)]
    prompt = f"Story: {' '.join(told)} Question: where is the {thing}? Answer:"
    return {"prompt": prompt, "completion": f" with {name} in the {place}."}


PROMPTS = [story(k)["prompt"] for k in range(4)]


@pytest.fixture(scope="module")
def teachers():
    arms, networks = dict(ARMS), dict(NETWORKS)
    sys.path.insert(0, str(FOLDER))
    import teacher_trainers
    import teachers

    yield teachers
    sys.path.remove(str(FOLDER))
    for name in ("teachers", "teacher_trainers"):
        del sys.modules[name]
    for table, before in ((ARMS, arms), (NETWORKS, networks)):
        table.clear()
        table.update(before)
    assert teacher_trainers


@pytest.fixture(scope="module")
def bench(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(story(k)) for k in range(24)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA", str(folder))
        patch.setenv("STEPS", "3")
        given = {"arms": [*teachers.REFERENCES, *teachers.TEACHERS], "validation_items": 4, "train_limit": 12}
        return Workbench(load_recipe(FOLDER / "strong.yaml", **given))


@pytest.fixture
def trainer_of(teachers, bench, tmp_path):
    def make(arm, **attributes):
        """A trainer that notes every `extra`."""
        kind = teachers.TEACHERS[arm][0] if arm in teachers.TEACHERS else teachers.AblationTrainer

        class Noting(kind):
            def extra(self, *args):
                self.noted = [*getattr(self, "noted", []), super().extra(*args)]
                return self.noted[-1]

        with quiet_libraries():
            trainer = build_trainer(bench, Run(arm, "lora", 1, 4e-3), tmp_path, lambda *_: None, Noting)
        for name, value in attributes.items():
            setattr(trainer, name, value)
        return trainer

    return make


def trained(trainer):
    with quiet_libraries():
        trainer.train()
    trainer.model.eval()
    return trainer


def scores(reader, tokenizer, prompts=PROMPTS):
    rows = [tokenize_row(tokenizer, prompt, [" with Ada in the barn."]) for prompt in prompts]
    return torch.tensor([score.log_likelihood for (score,) in reader.score(rows)])


def test_the_average_of_now_teaches_nothing_and_is_the_model(trainer_of):
    trainer = trained(trainer_of("ema", decay=0.0))
    assert [x.item() for x in trainer.noted] == [0.0, 0.0, 0.0]
    plain = PlainReader(trainer.model, trainer.processing_class)
    assert torch.equal(scores(trainer.teacher(), plain.tokenizer), scores(plain, plain.tokenizer))


def test_an_average_of_the_past_teaches_and_leaves_the_model_as_it_was(trainer_of):
    trainer = trained(trainer_of("ema"))
    assert trainer.noted[0].item() == 0.0 < trainer.noted[2].item()
    own = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trained_ones = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    plain = PlainReader(trainer.model, trainer.processing_class)
    assert not torch.equal(scores(trainer.teacher(), plain.tokenizer), scores(plain, plain.tokenizer))
    assert all(torch.equal(weight, own[name]) for name, weight in trainer.model.state_dict().items())
    assert trained_ones == [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]


def test_the_echo_pass_runs_with_averaged_weights_and_the_plain_pass_with_its_own(trainer_of):
    trainer, seen = trainer_of("ema-strong"), []
    swapped = trainer.run_averaged

    def noting(run, *args):
        def inside(*args):
            seen.append([(m.weight.requires_grad, torch.equal(m.weight, mean)) for m, mean in trainer.average.items()])
            return run(*args)

        return swapped(inside, *args)

    trainer.run_averaged = noting
    trained(trainer)
    assert len(seen) == 3 and {state for step in seen for state in step} == {(False, True)}
    assert len(seen[0]) == 2 * 7 * 4  # A and B of seven modules in four layers
    assert all(module.weight.requires_grad for module in trainer.average)
    assert any(not torch.equal(module.weight, mean) for module, mean in trainer.average.items())
    assert trainer.teacher().reader.setup is trainer.echo


def test_two_dropout_masks(trainer_of, teachers):
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    both = [
        F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="sum", log_target=True) for a, b in ((p, q), (q, p))
    ]
    torch.testing.assert_close(teachers.RDrop.extra.__globals__["symmetric_kl"](p, q), sum(both))


def test_hidden_states_agree_while_the_echo_is_silent(trainer_of):
    for arm in ("hidden-kd", "hidden-kd-upper"):
        trainer = trained(trainer_of(arm))
        assert abs(trainer.noted[0].item()) < 1e-3 < trainer.noted[2].item(), arm


def loud(trainer):
    """Echo networks that say something."""
    for network in trainer.echo.networks.networks.values():
        torch.nn.init.normal_(network.project_out, std=0.1, generator=torch.Generator().manual_seed(1))
    trainer.model.eval()
    return trainer


def test_privileged_z_is_that_of_its_own_prompt_and_the_plain_path_has_none(trainer_of):
    trainer = loud(trainer_of("privileged"))
    tokenizer, reader = trainer.processing_class, trainer.teacher()
    own = EchoReader(trainer.echo, tokenizer, "answer")
    together, plain = scores(reader, tokenizer), scores(PlainReader(trainer.model, tokenizer), tokenizer)
    assert trainer.echo.networks.given is None  # used up
    alone = torch.cat([scores(reader, tokenizer, [prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=0)
    assert ((together - scores(own, tokenizer)).abs() > 1e-2).all()
    assert torch.equal(plain, scores(PlainReader(trainer.model, tokenizer), tokenizer))
    options = {"max_new_tokens": 6, "batch_size": 4}
    written = reader.answers(PROMPTS, **options)
    assert written == [reader.answers([prompt], **options)[0] for prompt in PROMPTS]
    assert written != own.answers(PROMPTS, **options)


def test_shuffled_sentences_are_those_of_the_next_row(trainer_of, teachers):
    trainer = loud(trainer_of("privileged-shuffled"))
    relevant = teachers.Privileged.give.__globals__["relevant"]
    assert relevant(PROMPTS[1]) == "Gus has the red coin. Gus is in the hall."
    trainer.give(PROMPTS)
    shuffled = trainer.echo.networks.given
    others = [p.replace("Question:", f"{relevant(PROMPTS[(k + 1) % 4])} Question:") for k, p in enumerate(PROMPTS)]
    tokenizer, source = trainer.processing_class, trainer.echo.source_layers[0]
    for k, text in enumerate(others):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        state = trainer.echo.model(ids, output_hidden_states=True).hidden_states[source + 1][0, -1]
        torch.testing.assert_close(shuffled[0, k], state, atol=1e-4, rtol=1e-4)


def test_the_first_step_has_the_plain_loss_of_the_strong_echo(trainer_of):
    """P2 starts at zero, so what z is made of changes nothing yet; a step later it does."""
    logged = {}
    for arm in ("strong", "privileged", "privileged-shuffled"):
        trainer = trainer_of(arm)
        trainer.args.logging_steps = trainer.state.logging_steps = 1
        history = trained(trainer).state.log_history
        logged[arm] = [
            (entry["echo/ce_plain"], entry["echo/ce_echo"]) for entry in history if "echo/ce_plain" in entry
        ]
    assert logged["strong"][0] == logged["privileged"][0] == logged["privileged-shuffled"][0]
    assert len({steps[-1][1] for steps in logged.values()}) == 3
