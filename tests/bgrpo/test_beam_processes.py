"""Two processes: whole groups on each, the same weights on both, one adapter, and a resumed run that is the same."""

import json
import os
import subprocess
import sys

import pytest
from beam_cases import G, beam_trainer
from beam_worker import SETTINGS
from paths import ROOT

from echo_trainer import check_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    worker = str(ROOT / "tests" / "support" / "beam_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29577"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, worker, str(folder)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def results(output, name):
    return [json.loads((output / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def test_groups_are_whole_on_each_process(output):
    prompts = []
    for found in results(output, "whole"):
        assert len(found["seen"]) == 2 * 2 * G  # two generations, two prompts each
        for start in range(0, len(found["seen"]), G):
            group = found["seen"][start : start + G]
            assert len({prompt for prompt, _ in group}) == 1 and len({completion for _, completion in group}) == G
        prompts += [prompt for prompt, _ in found["seen"][::G]]
    assert len(set(prompts)) == 8


def test_both_processes_have_the_same_weights_and_one_adapter_is_saved(output):
    first, second = results(output, "whole")
    assert first["weights"] == second["weights"] and first["advantages"] != second["advantages"]
    check_adapter(output / "run")


def test_resumed_run_is_the_same_on_each_process(output):
    for whole, resumed in zip(results(output, "whole"), results(output, "resumed"), strict=True):
        assert resumed["weights"] == whole["weights"] and resumed["seen"] == []  # the beams of the checkpoint


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_of_fewer_processes_is_another_run(output, tmp_path, step):
    with pytest.raises(
        ValueError, match=r"made with num_processes 2, .* now has num_processes 1, .* as many processes"
    ):
        beam_trainer(tmp_path, **SETTINGS).train(resume_from_checkpoint=str(output / "run" / f"checkpoint-{step}"))
