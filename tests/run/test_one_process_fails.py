"""A fault of one process ends all of them, with the same words and within seconds; none waits for ever.

fault_worker.py runs the cases in two processes with gloo on the CPU, one after another in the same processes: after a
fault they are still in step.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fault_worker
import pytest
from paths import ROOT

pytestmark = pytest.mark.slow

LIMIT = fault_worker.DEADLINE + 60

DENIED = "[Errno 13] Permission denied: 'echo_checkpoint.json'"
BROKEN = "[Errno 5] Input/output error"
FULL = "The disk is full"

# Case: the error on both processes, and the process it came from.
FAULTS = {
    "manifest": ("OSError", BROKEN, 0),
    "publishing": ("OSError", FULL, 0),
    "rotating": ("OSError", BROKEN, 0),
    "staging": ("OSError", FULL, 0),
    "echo_networks": ("OSError", FULL, 0),
    "adapter": ("OSError", BROKEN, 0),
    "card": ("OSError", BROKEN, 0),
    "random_state_of_the_second": ("OSError", BROKEN, 1),
    "key_while_resuming": ("KeyError", "'adapter'", 0),
    "permission_while_resuming": ("PermissionError", DENIED, 0),
    "adapter_while_resuming": ("PermissionError", DENIED, 1),
    "best": ("PermissionError", DENIED, 0),
    "not_finite": ("NonFiniteAdapterError", "hold NaN or infinity", 0),
    "pushing": ("PushError", "echo-trainer push", 0),
    "pushing_a_checkpoint": ("OSError", BROKEN, 0),
    "selection": ("PermissionError", DENIED, 0),
}
SIGHTS = ["pushing_after_training", "selection_that_differs", "fingerprint", "selection_in_shards", "another_place"]
SHARDED_FAULTS = ["manifest", "publishing", "echo_networks", "adapter", "card", "permission_while_resuming"]
SHARDED_FAULTS += ["adapter_while_resuming", "not_finite"]


def command(engine: str, output: Path, cases: list[str], *options: str) -> list[str]:
    config = f"{ROOT}/recipes/accelerate/{engine}.yaml"
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", config,
        "--num_processes", "2", "--mixed_precision", "no", *options, f"{ROOT}/tests/support/fault_worker.py",
        str(output), *cases,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {**os.environ, **settings}


def results(outputs: list[Path], cases: list[str], errors: str) -> list[dict]:
    seen = [output / f"rank{rank}.json" for rank, output in enumerate(outputs)]
    found = [json.loads(path.read_text()) if path.exists() else {} for path in seen]
    assert all(list(result) == cases for result in found), f"{[list(result) for result in found]}\n{errors[-6000:]}"
    return found


def launch(engine: str, cases: list[str], output: Path) -> list[dict]:
    """What each process saw, by case."""
    done = subprocess.run(
        command(engine, output, cases, "--main_process_port", "0"),
        cwd=ROOT, env=environment(), timeout=LIMIT, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    return results([output, output], cases, done.stderr)


def launch_on_two_nodes(engine: str, cases: list[str], output: Path) -> list[dict]:
    """As `launch`, on two nodes that share no disk: each has one process and a working directory of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for node in range(2):
        folder = output / f"node{node}"
        folder.mkdir()
        where = ["--num_machines", "2", "--machine_rank", str(node), "--main_process_ip", "127.0.0.1"]
        words = command(engine, Path("out"), cases, *where, "--main_process_port", port)
        with (folder / "log").open("w") as log:
            nodes.append(subprocess.Popen(words, cwd=folder, env=environment(), stdout=log, stderr=log))
    try:
        for node in nodes:
            node.wait(LIMIT)
    finally:
        for node in nodes:
            node.kill()
    errors = "".join(path.read_text(errors="replace") for path in output.glob("*/log"))
    return results([output / f"node{node}" / "out" for node in range(2)], cases, errors)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> list[dict]:
    return launch("ddp", [*FAULTS, *SIGHTS], tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> list[dict]:
    return launch("fsdp2", SHARDED_FAULTS, tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> list[dict]:
    cases = ["own_disks", "own_part_is_damaged", "own_part_is_gone"]
    return launch_on_two_nodes("fsdp2", cases, tmp_path_factory.mktemp("nodes"))


def assert_both_ended(results: list[dict], case: str) -> None:
    kind, words, source = FAULTS[case]
    first, second = (result[case] for result in results)
    assert first["kind"] == second["kind"] == kind, (first, second)
    assert first["error"] == second["error"] and words in first["error"], (first, second)
    notes = [any("It happened in process" in note for note in told["notes"]) for told in (first, second)]
    if words != FULL:  # what follows from it is said by each process for itself
        assert notes == [source != 0, source != 1]


@pytest.mark.parametrize("case", FAULTS)
def test_both_processes_end_with_the_error(ddp, case):
    assert_both_ended(ddp, case)
    if FAULTS[case][1] == FULL:
        assert ddp[0][case]["left"] == []


@pytest.mark.parametrize("case", SHARDED_FAULTS)
def test_where_parameters_are_sharded_as_well(fsdp, case):
    assert_both_ended(fsdp, case)


def test_a_push_that_fails_at_the_end_costs_no_process_its_training(ddp):
    assert [result["pushing_after_training"] for result in ddp] == [{"result": "went on"}] * 2


def test_layers_are_selected_once_for_all(ddp):
    assert [result["selection_that_differs"] for result in ddp] == [{"result": [[4], [0]]}] * 2


def test_the_fingerprint_of_a_base_in_shards_is_that_of_the_whole(ddp):
    (first, whole), second = ddp[0]["fingerprint"]["result"], ddp[1]["fingerprint"]["result"]
    assert first == whole and second == [whole, whole]


def test_selection_in_a_sharded_model_is_refused(ddp):
    for result in ddp:
        assert result["selection_in_shards"]["kind"] == "ValueError"
        assert "echo-trainer select-layers" in result["selection_in_shards"]["error"]


def test_a_process_that_fails_does_not_wait_for_ever(ddp):
    """The other one is held up elsewhere; it learns that nobody comes."""
    assert ddp[0]["another_place"]["error"] == BROKEN
    assert ddp[1]["another_place"]["kind"] == "RuntimeError"
    assert "did not come to this point" in ddp[1]["another_place"]["error"]


def test_checkpoints_in_shards_of_nodes_without_a_shared_disk(nodes):
    """Each node publishes its own part with a list of its files, and deletes its old ones; none stays unfinished."""
    for number, seen in enumerate(result["own_disks"]["result"] for result in nodes):
        assert seen["whole"] == {"checkpoint-3": None, "checkpoint-2": None} and seen["hidden"] == []
        shards = [name for name in seen["files"] if name.endswith(".distcp") and name.startswith("checkpoint-3/")]
        assert shards and all(Path(name).name.startswith(f"__{number}_") for name in shards)
        for name in ("trainer_state.json", "echo_checkpoint.json", f"rng_state_{number}.pth"):
            assert f"checkpoint-3/{name}" in seen["files"]


@pytest.mark.parametrize(("case", "words"), [("damaged", "bytes and had"), ("gone", "trainer_state.json is missing")])
def test_the_part_of_another_node_is_looked_at_before_resuming(nodes, case, words):
    first, second = (result[f"own_part_is_{case}"] for result in nodes)
    assert first["kind"] == second["kind"] == "ValueError" and first["error"] == second["error"]
    assert "on the node of process 1 it is not" in first["error"] and words in first["error"]
