"""`EchoSFTTrainer` and the Hub: `push_to_hub`, `hub_strategy`, and failures in the background."""

import hashlib
import json

import pytest
import torch
from hub_server import STRANGER_TOKEN, WRITE_TOKEN, Fault, Repo
from models import tiny_model

pytestmark = pytest.mark.slow

FINAL = {"README.md", "adapter_config.json", "adapter_model.safetensors", "assets/training.png", "chat_template.jinja",
         "echo_run.json", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
RESUME = {"adapter_model.safetensors", "echo_networks.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
          "trainer_state.json"}  # fmt: skip
PUSHING = {"push_to_hub": True, "hub_model_id": "ada/one", "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def fresh(hub, client):
    hub.reset()
    client("forget_user")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


def train(client, out, base, token=WRITE_TOKEN, **options):
    return client("train", out, base, token, **options)


def assert_clean(hub, out, base):
    """Only listed files, no token, no path of this machine; and no token in any file on the disk."""
    for name, repo in hub.repos.items():
        for path, data in repo.files.items():
            assert WRITE_TOKEN.encode() not in data, (name, path)
            assert not path.endswith((".bin", ".log"))
            if not path.endswith((".pt", ".pth")):  # torch's archives hold no text of ours
                assert str(base).encode() not in data and str(out).encode() not in data, (name, path)
    for path in out.rglob("*"):
        assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes(), path


def test_push_to_hub(client, hub, base, tmp_path):
    out = tmp_path / "out"
    answer = train(client, out, base, after="push_to_hub", arguments={"private": True}, hub_model_id="one")
    assert "error" not in answer, answer
    assert answer["hub_model_id"] == "ada/one" and hub.repos["ada/one"].private
    assert hub.repos["ada/one"].files.keys() == FINAL
    assert_clean(hub, out, base)
    assert {path.name for path in out.iterdir() if path.suffix in (".json", ".safetensors", ".md")} <= FINAL
    card = hub.repos["ada/one"].files["README.md"].decode()
    assert '"ada/one"' in card and "one=ada/one" in card  # the commands name the repository
    assert json.loads(hub.repos["ada/one"].files["echo_run.json"])["saved"]["sha256"] in card

    again = client("logits", base, "ada/one", WRITE_TOKEN, tmp_path / "logits.pt")
    assert "error" not in again, again
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), torch.load(out / "trained.pt"), rtol=1e-5, atol=1e-6
    )


def test_files_are_saved_before_anything_can_go_wrong(client, hub, base, tmp_path):
    answer = train(client, tmp_path, base, after="push_to_hub", hub_model_id="bob/one")
    assert answer["kind"] == "PushError" and "403" in answer["error"]
    assert f"echo-trainer push {tmp_path} bob/one" in answer["error"]
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_strategy_end_leaves_the_adapter(client, hub, base, tmp_path):
    answer = train(client, tmp_path, base, hub_strategy="end", hub_private_repo=True, **PUSHING)
    assert "error" not in answer, answer
    assert hub.repos["ada/one"].files.keys() == FINAL and hub.repos["ada/one"].private
    assert len(hub.repos["ada/one"].commits) == 1
    assert_clean(hub, tmp_path, base)


@pytest.mark.long
def test_strategy_every_save(client, hub, base, tmp_path):
    answer = train(client, tmp_path, base, hub_strategy="every_save", hub_always_push=True, **PUSHING)
    assert "error" not in answer, answer
    repo = hub.repos["ada/one"]
    assert repo.files.keys() >= FINAL - {"assets/training.png"}
    assert not any("checkpoint" in path or "optimizer" in path for path in repo.files)
    messages = [message for message, _ in repo.commits]
    assert messages == ["Training in progress, step 2", "Training in progress, step 4"]
    assert json.loads(repo.files["adapter_config.json"])["r"] == 16  # portable, like a final adapter
    assert_clean(hub, tmp_path, base)


STRATEGIES = [("checkpoint", ["last-checkpoint"]), ("all_checkpoints", ["checkpoint-2", "checkpoint-4"])]


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "folders"), STRATEGIES)
def test_strategies_with_checkpoints(client, hub, base, tmp_path, strategy, folders):
    answer = train(client, tmp_path, base, hub_strategy=strategy, hub_always_push=True, **PUSHING)
    assert "error" not in answer, answer
    files = hub.repos["ada/one"].files.keys()
    for folder in folders:
        assert {f"{folder}/{name}" for name in RESUME} <= files
    assert {path.split("/")[0] for path in files if "checkpoint" in path.split("/")[0]} == set(folders)
    assert_clean(hub, tmp_path, base)

    resumed = tmp_path / "downloaded"
    for path, data in hub.repos["ada/one"].files.items():
        (resumed / path).parent.mkdir(parents=True, exist_ok=True)
        (resumed / path).write_bytes(data)
    answer = train(client, tmp_path / "more", base, resume=str(resumed / folders[-1]))
    assert "error" not in answer, answer
    (resumed / folders[-1] / "optimizer.pt").write_bytes(b"")
    answer = train(client, tmp_path / "more", base, resume=str(resumed / folders[-1]))
    assert "optimizer.pt" in answer["error"]  # the list of its files came along


def test_failing_background_pushes_are_said_and_made_up_for(client, hub, base, tmp_path):
    hub.repos["ada/one"] = Repo(private=False)
    hub.faults = [Fault("/commit/", 500, 4)]  # two pushes with two attempts each
    answer = train(client, tmp_path, base, hub_strategy="every_save", hub_always_push=True, **PUSHING)
    assert "error" not in answer, answer  # the training itself is whole
    for words in ("In the background, the push of checkpoint-2 failed", "(500)", "2 of 2 background pushes failed",
                  f"echo-trainer push {tmp_path}/checkpoint-2 ada/one", "which is not on the Hub yet"):  # fmt: skip
        assert words in answer["log"], answer["log"]
    assert "adapter_model.safetensors" in hub.repos["ada/one"].files  # the last try, after training, went well
    assert WRITE_TOKEN not in answer["log"]


def test_checkpoint_left_out_for_a_slow_push_comes_later(client, hub, base, tmp_path):
    hub.faults = [Fault("/commit/", "hang", seconds=4.0)]
    answer = train(client, tmp_path, base, hub_strategy="every_save", **PUSHING)
    assert "error" not in answer, answer
    assert hub.repos["ada/one"].commits[-1][0] == "Training in progress, step 4"


@pytest.mark.parametrize("strategy", ["end", pytest.param("every_save", marks=pytest.mark.long)])
def test_hub_that_fails_throughout(client, hub, base, tmp_path, strategy):
    """Unreachable from the start: a warning before training, the adapter on the disk, last words."""
    hub.faults = [Fault("", 503, 10_000)]
    answer = train(client, tmp_path, base, hub_strategy=strategy, **PUSHING)
    assert "error" not in answer, answer
    assert "will not work as things are" in answer["log"]
    assert "Not pushed to ada/one" in answer["log"] and "echo-trainer push" in answer["log"]
    assert hub.repos == {}


@pytest.mark.long
def test_public_repository_and_a_private_run(client, hub, base, tmp_path):
    hub.repos["ada/one"] = Repo(private=False)
    arguments = {"hub_private_repo": True, "hub_strategy": "every_save", **PUSHING}
    answer = train(client, tmp_path, base, after="push_to_hub", **arguments)
    assert "is public" in answer["error"]
    assert answer["log"].count("is public") >= 2  # before training, and at each checkpoint
    assert hub.repos["ada/one"].files == {}


@pytest.mark.long
def test_wrong_token_is_said_before_training(client, hub, base, tmp_path):
    answer = train(client, tmp_path, base, token="hf_wrong", hub_strategy="end", **PUSHING)
    assert "error" not in answer
    log = answer["log"]
    assert log.index("does not accept the token (401)") < log.index("Echo-LoRA: echo from layers")
    assert "hf_wrong" not in log and STRANGER_TOKEN not in log


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_sft_pushes_once(client, hub, base, tmp_path, strategy):
    answer = client("sft", tmp_path, base, WRITE_TOKEN, hub_strategy=strategy)
    assert answer["status"] == 0, answer
    repo = hub.repos["ada/one"]
    assert [message for message, _ in repo.commits] == ["End of training"]
    assert hub.count("POST /api/models/ada/one/commit/") == 1
    saved = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert repo.files["adapter_model.safetensors"] == saved and repo.files.keys() == FINAL


def test_sft_pushes_checkpoints_and_the_end_once_each(client, hub, base, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2, "hub_always_push": "true"}
    answer = client("sft", tmp_path, base, WRITE_TOKEN, **more)
    assert answer["status"] == 0, answer
    expected = ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    assert [message for message, _ in hub.repos["ada/one"].commits] == expected


def test_sft_tries_again_what_training_could_not_push(client, hub, base, tmp_path):
    hub.faults = [Fault("/commit/", 500, 2)]
    answer = client("sft", tmp_path, base, WRITE_TOKEN, hub_strategy="end")
    assert answer["status"] == 0, answer
    assert "Not pushed to ada/one" in answer["log"] and len(hub.repos["ada/one"].commits) == 1


def test_sft_whose_push_fails_ends_with_that(client, hub, base, tmp_path):
    hub.faults = [Fault("/commit/", 500, 100)]
    answer = client("sft", tmp_path, base, WRITE_TOKEN, hub_strategy="end")
    assert answer["status"] == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


OF_THE_PROCESS = {
    "default dtype": ("__init__.py:set_default_dtype", "modeling_utils.py:local_torch_dtype"),
    "client": ("_http.py:set_client_factory", "hub_client.py:use_timeout"),
    "model": ("module.py:__init__", "modeling_utils.py:_from_config", "building.py:empty_model"),
    "ZeRO-3": ("modeling_utils.py:set_zero3_state",),
    "shapes, digests and forms": ("base.py:read_base", "portable.py:make_portable", "check.py:check_adapter"),
}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_a_push_beside_the_training_leaves_the_process_alone(client, hub, base, tmp_path, strategy):
    """The training goes on while a push hangs; nothing of the process changes, and the losses are the same bits."""
    hub.repos["ada/one"] = Repo(private=False)
    hub.faults = [Fault("/commit/", "hang", 1, seconds=4.0)]
    pushing = {"hub_strategy": strategy, "hub_always_push": True, **PUSHING}
    answer = client("train_and_look", tmp_path / "pushed", base, WRITE_TOKEN, **pushing)
    assert "error" not in answer, answer
    assert answer["beside"] and answer["threads"] == ["echo-push_0"]
    assert answer["dtypes"] == ["torch.float32"] and len(answer["clients"]) == 1
    for what, functions in OF_THE_PROCESS.items():
        assert not set(functions) & set(answer["calls"]), what
    assert "push.py:send" in answer["calls"] and "hf_api.py:upload_folder" in answer["calls"]
    assert hub.repos["ada/one"].commits[-1][0] == "Training in progress, step 6"
    alone = client("train_and_look", tmp_path / "alone", base, WRITE_TOKEN)
    assert len(alone["losses"]) == 6 and answer["losses"] == alone["losses"]


def test_the_final_push_in_the_background_is_made_ready_before(client, hub, base, tmp_path):
    """What is saved afterwards does not change what is on its way."""
    answer = client("push_and_save", tmp_path, base, WRITE_TOKEN)
    assert "error" not in answer, answer
    assert (
        hub.repos["ada/one"].files["adapter_model.safetensors"]
        != (tmp_path / "adapter_model.safetensors").read_bytes()
    )
    digest = hashlib.sha256(hub.repos["ada/one"].files["adapter_model.safetensors"]).hexdigest()
    assert json.loads(hub.repos["ada/one"].files["echo_run.json"])["saved"]["sha256"] == digest
    for what, functions in OF_THE_PROCESS.items():
        assert not set(functions) & set(answer["calls"]), what
