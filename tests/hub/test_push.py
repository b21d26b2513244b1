"""Pushing with the real client, over HTTP, to the small Hub of `hub_server.py`: what goes well and what goes wrong."""

import json
import shutil

import pytest
import torch
from adapter_cases import ALL, load_base, save_adapter, save_base, value
from hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, Fault, Hub, http_date
from peft import PeftModel
from push_client import Client

from echo_trainer.files import id_from_cache, is_local

pytestmark = pytest.mark.slow

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(autouse=True)
def fresh(hub):
    hub.reset()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """An adapter's folder with much in it that must not be pushed."""
    folder = save_adapter(base, tmp_path_factory.mktemp("finished") / "run")
    (folder / "assets").mkdir()
    (folder / "assets" / "training.png").write_bytes(b"\x89PNG")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "train.jsonl",
        "assets/notes.txt",
        ".env",
        "echo_networks.safetensors",
    ):
        (folder / name).write_text(f"token={WRITE_TOKEN}")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def push(client, run, repo="ada/one", **options):
    return client("push", run, repo, **{"token": WRITE_TOKEN, **options})


def test_push_makes_the_repository_and_uploads_the_listed_files_only(client, hub, run):
    answer = push(client, run, private=True)
    assert "error" not in answer, answer
    repo = hub.repos["ada/one"]
    assert repo.private and answer["private"] and answer["repo_id"] == "ada/one"
    assert repo.files.keys() == ADAPTER | {"README.md", "assets/training.png"} == set(answer["files"])
    assert repo.lfs == {"adapter_model.safetensors"}
    assert repo.files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert len(repo.commits) == 1 and answer["commit"] == repo.sha
    assert hub.count("GET /api/models/ada/one/tree") == 1  # the checksums were compared


def test_the_user_is_found_for_a_name_without_one(client, hub, run):
    assert push(client, run, "one")["repo_id"] == "ada/one"


def test_pushing_again_without_a_change_makes_no_commit(client, hub, run):
    push(client, run)
    uploads = hub.count("PUT /storage")
    answer = push(client, run)
    assert "error" not in answer and len(hub.repos["ada/one"].commits) == 1
    assert hub.count("PUT /storage") == uploads == 1


def test_pushed_adapter_loads_with_equal_logits(client, hub, run, base, tmp_path):
    push(client, run, private=True)
    answer = client("logits", base, "ada/one", WRITE_TOKEN, tmp_path / "logits.pt")
    assert "error" not in answer, answer
    model = PeftModel.from_pretrained(load_base(base), run).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.arange(2, 20)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert "error" in client("logits", base, "ada/one", STRANGER_TOKEN, tmp_path / "x.pt")  # it is private


def test_no_path_of_this_machine_is_pushed(client, hub, run, base, tmp_path):
    assert str(base) in (run / "adapter_config.json").read_text() + (run / "README.md").read_text()
    answer = push(client, run)
    assert "does not name its base model" in answer["notes"][0]
    for name, data in hub.repos["ada/one"].files.items():
        assert str(base).encode() not in data and str(tmp_path).encode() not in data, name
    assert json.loads(hub.repos["ada/one"].files["adapter_config.json"])["base_model_name_or_path"] is None
    answer = push(client, run, base_model="org/base")
    assert answer["notes"] == []
    assert json.loads(hub.repos["ada/one"].files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert str(base) in (run / "adapter_config.json").read_text()  # the local one stays


@pytest.mark.parametrize("name", ["README.md", "assets/training.png", "tokenizer_config.json"])
def test_a_file_with_a_token_is_refused(client, hub, run, name):
    with (run / name).open("ab") as file:
        file.write(WRITE_TOKEN.encode())
    answer = push(client, run)
    assert f"{name} holds an access token" in answer["error"]
    assert WRITE_TOKEN not in answer["error"] + answer["log"]
    assert not hub.repos["ada/one"].files
    if name == "README.md":  # somebody else's token is found by its looks
        (run / name).write_text(f"my token: {STRANGER_TOKEN}")
        assert "holds an access token" in push(client, run)["error"]


def test_no_token_anywhere(client, hub, run):
    """Byte by byte, in everything that was pushed and everything that was said."""
    answers = [push(client, run), push(client, run, "bob/one"), push(client, run, token=READ_TOKEN)]
    pushed = b"".join(data for repo in hub.repos.values() for data in repo.files.values())
    for token in (WRITE_TOKEN, READ_TOKEN, STRANGER_TOKEN):
        assert token.encode() not in pushed and token not in json.dumps(answers)


# Refused before anything is uploaded


def refused(client, hub, run, *parts, repo="ada/one", **options):
    answer = push(client, run, repo, **options)
    assert answer["kind"] == "PushError"
    for part in (*parts, str(run), f"echo-trainer push {run} {repo}"):
        assert part in answer["error"], answer["error"]
    assert not any(repository.files for repository in hub.repos.values())
    assert hub.count("PUT /storage") == 0
    return answer


def test_not_finite(client, hub, run):
    value("model.layers.0.mlp.up_proj.lora_B.weight", float("nan"))(run)
    refused(client, hub, run, "model.layers.0.mlp.up_proj.lora_B.weight", "NaN")
    assert hub.requests == []


@pytest.mark.parametrize("missing", sorted(ADAPTER))
def test_half_an_adapter(client, hub, run, missing):
    (run / missing).unlink()
    refused(client, hub, run, missing)


def test_no_adapter(client, hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(client, hub, tmp_path, "holds no adapter", "--model")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoint-7" / "adapter_config.json").write_text("{}")
    refused(client, hub, tmp_path, "checkpoint-7")


def test_public_repository_for_a_private_push(client, hub, run):
    push(client, run, private=False)
    hub.repos["ada/one"].files.clear()
    hub.requests.clear()
    answer = refused(client, hub, run, "is public", private=True)
    assert answer["error"].endswith("--private")


def test_private_repository_stays_private(client, hub, run):
    push(client, run, private=True)
    answer = push(client, run, private=False)
    assert answer["private"] and "stays so" in answer["log"] and hub.repos["ada/one"].private


def test_a_server_that_ignores_the_wish_for_privacy(client, hub, run):
    """The repository that was just made is public all the same: nothing is uploaded."""
    from hub_server import Repo

    class Careless(dict):
        def __setitem__(self, name, repo):
            super().__setitem__(name, Repo(private=False))

    hub.repos = Careless()
    refused(client, hub, run, "is public", private=True)


def test_token_that_may_only_read(client, hub, run):
    refused(client, hub, run, "may only read", token=READ_TOKEN)


def test_401(client, hub, run):
    answer = refused(client, hub, run, "does not accept the token (401)", "hf auth login", token="hf_wrong")
    assert hub.count("whoami") == 1 and answer["seconds"] < 5  # not tried again


def test_no_token(client, hub, run):
    refused(client, hub, run, "no access token", "hf auth login", token=None)
    assert hub.requests == []


def test_403(client, hub, run):
    answer = refused(client, hub, run, "may not do this (403", "rights to create", repo="bob/one")
    assert hub.count("repos/create") == 1 and answer["seconds"] < 5


@pytest.mark.parametrize(
    ("status", "words"), [(403, "403: no more storage"), (404, "does not know it (404"), (413, "413")]
)
def test_lasting_refusal_of_the_commit(client, hub, run, status, words):
    hub.faults = [Fault("/commit/", status, 9, body='{"error": "no more storage"}')]
    answer = push(client, run)
    assert words in answer["error"] and hub.count("/commit/") == 1
    assert not hub.repos["ada/one"].files


def test_bad_name(client, hub, run):
    refused(client, hub, run, "is no name of a repository", repo="a/b/c")


# Passing faults


PLACES = ["whoami", "GET /api/models/ada/one$", "repos/create", "validate-yaml", "/preupload/", "/objects/batch",
          "PUT /storage", "POST /verify", "/commit/", "/tree/"]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("action", [503, pytest.param("drop", marks=pytest.mark.long)])
def test_one_fault_anywhere_is_survived(client, hub, run, where, action):
    client("forget_user")
    hub.faults = [Fault(where, action, body="<html>not JSON</html>")]
    answer = push(client, run)
    assert "error" not in answer, answer
    assert hub.faults[0].times == 0  # it did happen
    assert hub.repos["ada/one"].files.keys() > ADAPTER and len(hub.repos["ada/one"].commits) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_lasting_fault_of_the_server(client, hub, run, status):
    hub.faults = [Fault("/commit/", status, 99)]
    answer = push(client, run)
    assert hub.count("/commit/") == 3  # the attempts
    assert f"({status})" in answer["error"] and f"echo-trainer push {run} ada/one" in answer["error"]
    assert answer["log"].count("Trying again") == 2
    hub.faults = []
    uploads = hub.count("PUT /storage")
    assert "error" not in push(client, run)
    assert hub.count("PUT /storage") == uploads  # the weights were there already


@pytest.mark.parametrize("header", ["1", "date"])
def test_retry_after(client, hub, run, header):
    headers = {"Retry-After": http_date(2.5) if header == "date" else header}
    hub.faults = [Fault("/commit/", 429, headers=headers)]
    answer = push(client, run)
    assert "error" not in answer and answer["seconds"] > 1.0


def test_retry_after_is_not_obeyed_for_ever(client, hub, run):
    hub.faults = [Fault("/commit/", 429, 99, headers={"Retry-After": "3600"})]
    answer = push(client, run, patience={"longest_wait": 1000.0, "deadline": 20.0})
    assert "fewer requests (429)" in answer["error"] and answer["seconds"] < 10


def test_hanging_server(client, hub, run):
    hub.faults = [Fault("/commit/", "hang", 99)]
    answer = push(client, run, patience={"timeout": 0.5, "attempts": 2})
    assert "did not answer in time" in answer["error"] and answer["seconds"] < 10
    hub.faults = [Fault("/commit/", "hang", 1)]
    assert "error" not in push(client, run, patience={"timeout": 0.5})


def test_answer_lost_after_the_commit(client, hub, run):
    """The commit was made, the answer never came: the next try finds nothing to do."""
    hub.faults = [Fault("/commit/", "cut")]
    assert "error" not in push(client, run)
    assert len(hub.repos["ada/one"].commits) == 1


def test_another_commit_at_the_same_time(client, hub, run):
    hub.faults = [Fault("/commit/", 409)]
    assert "error" not in push(client, run)


def test_repository_made_by_somebody_else_in_between(client, hub, run):
    hub.faults = [Fault("GET /api/models/ada/one$", 404, headers={"X-Error-Code": "RepoNotFound"})]
    from hub_server import Repo

    hub.repos["ada/one"] = Repo(private=False)
    answer = push(client, run)
    assert "error" not in answer and hub.count("repos/create") == 1  # answered 409


def test_damaged_on_the_way(client, hub, run):
    hub.change = lambda path, data: data[:-1] + b"?" if path.endswith(".safetensors") else data
    answer = push(client, run)
    assert "adapter_model.safetensors" in answer["error"] and "not those that were sent" in answer["error"]


def test_lost_on_the_way(client, hub, run):
    hub.faults = [Fault("/tree/", 200, body="[]")]
    assert "README.md" in push(client, run)["error"]


@pytest.mark.long
def test_server_that_is_not_there(client, hub, run, tmp_path_factory):
    with Hub() as gone:
        url = gone.url
    lonely = Client(url, tmp_path_factory.mktemp("hf"))
    answer = push(lonely, run)
    lonely.close()
    assert "connection to the Hub failed" in answer["error"]
    assert f"echo-trainer push {run} ada/one" in answer["error"]


# The command


def test_command(client, hub, run):
    answer = client("command", run, "ada/one", "--private", "--base", "org/base", token=WRITE_TOKEN)
    assert answer["status"] == 0 and "Pushed to" in answer["out"] and "(private)" in answer["out"]
    answer = client("command", run, "ada/one", token=READ_TOKEN)
    assert answer["status"] == 1 and "may only read" in answer["err"]
    answer = client("command", run.parent / "nothing", "ada/one", token=WRITE_TOKEN)
    assert answer["status"] == 1 and "is not a folder" in answer["err"]
    answer = client("command", run, "ada/one", "--attempts", "0", token=WRITE_TOKEN)
    assert answer["status"] == 2


def test_whole_model(client, hub, base):
    answer = push(client, base, whole_model=True)
    assert "error" not in answer, answer
    assert {"config.json", "model.safetensors"} <= hub.repos["ada/one"].files.keys()


def test_named_adapter(client, hub, base, tmp_path):
    save_adapter(base, tmp_path / "run" / "mine", target_modules=ALL[:2])
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    push(client, tmp_path / "run")
    assert hub.repos["ada/one"].files.keys() == ADAPTER | {"README.md", "tokenizer.json"}


def test_local_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_local("/a/b") and is_local("./x") and is_local("a/b/c") and is_local("C:\\x") and is_local("here")
    assert not is_local("gpt2") and not is_local("org/name") and not is_local(None)
    assert id_from_cache("/x/models--org--a--b/snapshots/0123") == "org/a--b"
    assert id_from_cache("/x/y") is None
