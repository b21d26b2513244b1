"""Many processes through `accelerate launch`: the same training as one process, and no process ever waits for ever.

Each launch runs several cases of process_worker.py with gloo on the CPU, under the configurations that ship in
recipes/accelerate (on GPUs where ECHO_PROCESSES_ON=gpu, see check.sh there). A launch that hangs is killed, which
fails its tests.
"""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import process_worker
import pytest
import torch
from models import tiny_model
from paths import ROOT
from peft import PeftModel
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

DEADLINE = process_worker.DEADLINE + 60

MORE_CASES = ["read", "parts", "recomputed", "strong-equal", "strong-fading", "judged"]
DDP_CASES = [
    "equal", "differs", "stream", "dispatched", "poisoned", "silent", "uneven", "whole", "resumed",
    "frozen", *MORE_CASES,
]  # fmt: skip
SHARDED_CASES = ["equal", "differs", "poisoned", "fading", "whole-sharded", "resumed-sharded", *MORE_CASES]
ALL_CASES = ["equal", "differs", "stream", "dispatched", "poisoned", "silent", "fading", "uneven", "whole", "resumed"]
DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

ENGINES = [
    pytest.param(("ddp", 2, DDP_CASES), id="ddp-2"),
    pytest.param(("fsdp2", 2, SHARDED_CASES), id="fsdp2-2"),
    pytest.param(("ddp", 4, [*ALL_CASES, *MORE_CASES]), id="ddp-4", marks=pytest.mark.long),
    pytest.param(("fsdp2", 4, [*ALL_CASES, *MORE_CASES]), id="fsdp2-4", marks=pytest.mark.long),
    pytest.param(("zero2", 2, ALL_CASES), id="zero2-2", marks=[pytest.mark.long, DEEPSPEED]),
    pytest.param(("zero3", 2, ALL_CASES), id="zero3-2", marks=[pytest.mark.long, DEEPSPEED]),
]


class Launch:
    """The results of one launch."""

    def __init__(self, engine: str, world: int, cases: list[str], output: Path):
        self.engine, self.world, self.cases, self.output = engine, world, cases, output

    def case(self, *names: str) -> str:
        """The first of `names` that was run; skips the test if none was."""
        for name in names:
            if name in self.cases:
                return name
        pytest.skip(f"{self.engine} was launched without {' or '.join(names)}")

    def ranks(self, case: str) -> list[dict]:
        """What each process saw."""
        return [json.loads((self.output / case / f"rank{r}.json").read_text()) for r in range(self.world)]

    def routes(self, case: str) -> dict[int, bool]:
        """All routing decisions by global position; a position drawn by two processes must agree."""
        return _merged(self.ranks(case))

    def weights(self, case: str) -> dict[str, torch.Tensor]:
        """The final adapter and the echo networks."""
        return _weights(self.output / case)


def _merged(ranks: list[dict]) -> dict[int, bool]:
    routes: dict[int, bool] = {}
    for rank in ranks:
        for position, routed in rank["routes"].items():
            assert routes.setdefault(int(position), routed) == routed
    return routes


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "final" / "adapter_model.safetensors"), **load_file(folder / "echo.safetensors")}


@pytest.fixture(scope="module", params=ENGINES)
def launch(request, tmp_path_factory) -> Launch:
    engine, world, cases = request.param
    output = tmp_path_factory.mktemp(f"{engine}-{world}")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{engine}.yaml",
        "--num_processes", str(world), "--mixed_precision", "no", "--main_process_port", "0",
        "tests/support/process_worker.py", str(output), *cases,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if os.environ.get("ECHO_PROCESSES_ON") != "gpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=DEADLINE, capture_output=True, text=True, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{engine} on {world} processes hangs:\n{(error.stderr or b'')[-4000:]}")
    assert done.returncode == 0, f"{engine} on {world} processes failed:\n{_first_error(done.stderr)}"
    return Launch(engine, world, cases, output)


def _first_error(text: str) -> str:
    """The part of the output that tells what went wrong first, without progress bars."""
    lines = [line for line in text.splitlines() if "it/s" not in line and "examples/s" not in line]
    first = next((i for i, line in enumerate(lines) if "Error" in line), len(lines))
    return "\n".join(lines[max(0, first - 40) : first + 20])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does with the same global batch; each case is run once."""
    output, done = tmp_path_factory.mktemp("alone"), {}

    def run(case: str, compared: int) -> tuple[dict, dict[str, torch.Tensor]]:
        if (case, compared) not in done:
            folder = output / str(compared)
            done[case, compared] = (process_worker.run(case, folder, 1, compared), _weights(folder / case))
        return done[case, compared]

    return run


def assert_same_training(launch: Launch, alone, case: str) -> None:
    """Routes exactly, losses, gradient norms and final weights within float32 rounding."""
    ranks, (reference, weights) = launch.ranks(case), alone(case, launch.world)
    assert launch.routes(case) == _merged([reference])
    assert ranks[0]["tokens"] == reference["tokens"] and all(type(n) is int for n in reference["tokens"])
    torch.testing.assert_close(ranks[0]["losses"], reference["losses"], rtol=2e-5, atol=0)
    torch.testing.assert_close(ranks[0]["gradient_norms"], reference["gradient_norms"], rtol=1e-4, atol=0)
    ours = launch.weights(case)
    assert ours.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_equals_one_process(launch, alone):
    """Invariant 3: batch 8 = 2 processes x batch 2 x accumulation 2 (4 processes x batch 1 x accumulation 2)."""
    assert_same_training(launch, alone, launch.case("equal"))


def test_readers_see_the_plain_model_and_change_nothing(launch, alone):
    """Callbacks at every event and evaluations in between, in every process: none sees the echo networks."""
    case = launch.case("read")
    for rank in launch.ranks(case):
        assert {"on_step_end", "on_pre_optimizer_step", "on_evaluate", "on_train_end"} <= set(rank["read"])
        assert {event: names for event, names in rank["read"].items() if names} == {}
    assert_same_training(launch, alone, case)
    for name, value in launch.weights(launch.case("equal")).items():
        assert torch.equal(launch.weights(case)[name], value), name


def test_passes_over_suffixes_of_many_lengths(launch, alone):
    """Rows differ between processes, and so does how many passes they are split into; sharded, all run as many."""
    case = launch.case("parts")
    parts = [rank["parts"] for rank in launch.ranks(case)]
    if launch.ranks(case)[0]["lockstep"]:
        assert all(counts == parts[0] for counts in parts)
    else:
        assert any(counts != parts[0] for counts in parts)
    assert max(parts[0]) > 1
    assert_same_training(launch, alone, case)


def test_what_the_echo_computes_again_equals_one_process_that_keeps_it(launch, alone):
    """`echo_memory="recompute"` under checkpointing: layers run once more by themselves, in several passes."""
    case = launch.case("recomputed")
    ranks = launch.ranks(case)
    assert [rank["forms"] for rank in ranks] == [["suffix, recomputed"]] * launch.world
    assert max(ranks[0]["parts"]) > 1
    assert_same_training(launch, alone, case)
    assert alone(case, launch.world)[0]["forms"] == ["suffix"]


def test_one_process_whose_rows_differ_decides_for_all(launch, alone):
    """The suffix pass is wrong in the last process only; every process runs the full pass, and says so alike."""
    case = launch.case("differs")
    ranks = launch.ranks(case)
    assert [rank["forms"] for rank in ranks] == [["full"]] * launch.world
    assert all(rank["against"] == ranks[0]["against"] for rank in ranks)
    assert "final states differ by" in ranks[0]["against"][0][0]
    assert [rank["forms"] for rank in launch.ranks("equal")] == [["suffix"]] * launch.world
    assert_same_training(launch, alone, case)


def test_a_frozen_prefix_equals_one_process_without(launch, alone):
    """More than one epoch, so that each process begins steps with states it has kept."""
    assert_same_training(launch, alone, launch.case("frozen"))


def test_stream_equals_one_process(launch, alone):
    """A streamed dataset: each process reads it and keeps its share."""
    assert_same_training(launch, alone, launch.case("stream"))


def test_batches_that_one_process_collates_for_all(launch, alone):
    """`dispatch_batches=True`: what accelerate has cut out of a larger batch is planned like any other."""
    assert_same_training(launch, alone, launch.case("dispatched"))


def test_an_echo_that_is_not_finite_in_one_process(launch, alone):
    """Its micro-batch runs without an echo everywhere, the others of its step with theirs."""
    case = launch.case("poisoned")
    assert_same_training(launch, alone, case)
    assert launch.ranks(case)[0]["nonfinite"] == [0, launch.world, 0]


def test_process_without_any_answer(launch, alone):
    """A process that never has an answer to predict keeps up with the others, and changes nothing."""
    case = launch.case("silent", "fading")
    ranks = launch.ranks(case)
    if launch.ranks(case)[0]["lockstep"]:
        assert {rank["echo_passes"] for rank in ranks} == {4}
    else:
        assert ranks[0]["echo_passes"] == 4 and ranks[1]["echo_passes"] == 0
    assert_same_training(launch, alone, case)


def test_processes_that_route_nothing_stay_in_step(launch, alone):
    """Where parameters are sharded every process runs equally many echo passes, also when p has come down to 0."""
    case = launch.case("fading")
    ranks = launch.ranks(case)
    assert ranks[0]["lockstep"] == (launch.engine != "ddp")
    if ranks[0]["lockstep"]:
        assert {rank["echo_passes"] for rank in ranks} == {ranks[0]["steps"]}
    assert_same_training(launch, alone, case)


@pytest.mark.parametrize("case", ["strong-equal", "strong-fading"])
def test_graph_of_the_echo_equals_one_process(launch, alone, case):
    """`echo_detach=False`: the echo's gradient through the plain pass; also where some processes route nothing."""
    assert_same_training(launch, alone, launch.case(case))


def test_the_echo_is_judged_by_all_and_stopped_for_all(launch, alone):
    """Held-out rows are shared out; every process comes to the verdict that one process comes to."""
    case = launch.case("judged")
    verdicts = [rank["probation"] for rank in launch.ranks(case)]
    assert verdicts == [verdicts[0]] * launch.world and verdicts[0]["stopped"]
    expected = alone(case, launch.world)[0]["probation"]
    assert verdicts[0]["gain"] == pytest.approx(expected["gain"], rel=1e-4)
    assert verdicts[0]["gain"]["samples"] == 5
    assert_same_training(launch, alone, case)


def test_uneven_last_batches(launch):
    """An epoch that does not divide among the processes ends, with as many steps and as many draws on each."""
    ranks = launch.ranks(launch.case("uneven"))
    assert len({(rank["steps"], len(rank["routes"])) for rank in ranks}) == 1
    assert ranks[0]["steps"] == len(ranks[0]["losses"]) > 2
    assert all(math.isfinite(loss) for loss in ranks[0]["losses"])
    for rank, other in itertools.pairwise(ranks):
        assert not set(rank["routes"]) & set(other["routes"]), "two processes drew for the same position"


def test_resume_is_bit_identical(launch):
    """Stopped after a checkpoint and resumed (dropout, AdamW): the same routes, losses, adapter and echo networks."""
    resumed = launch.case("resumed-sharded", "resumed")
    whole = resumed.replace("resumed", "whole")
    after = launch.routes(resumed)
    assert after and after.items() <= launch.routes(whole).items()
    assert launch.ranks(resumed)[0]["losses"] == launch.ranks(whole)[0]["losses"]
    ours, theirs = launch.weights(resumed), launch.weights(whole)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, such as {different[:3]}"
    at_checkpoint = load_file(launch.output / whole / "checkpoint-2" / "echo_networks.safetensors")
    assert {n: v.shape for n, v in at_checkpoint.items()} == {n: ours[n].shape for n in at_checkpoint}
    assert any(not torch.equal(at_checkpoint[n], ours[n]) for n in at_checkpoint)


def test_final_adapter_is_clean_and_saved_once(launch):
    """The main process saves, the others do not; the adapter is whole, without echo, and loads with PEFT alone."""
    case = launch.case("equal")
    assert [rank["saves"] for rank in launch.ranks(case)] == [1] + [0] * (launch.world - 1)
    folder = launch.output / case / "final"
    assert not [path for path in folder.rglob("*") if "echo_networks" in path.name or path.suffix in (".bin", ".pt")]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors and all("lora_" in name for name in tensors)
    model = PeftModel.from_pretrained(tiny_model(), folder)
    loaded = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
