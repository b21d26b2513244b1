"""No code of unknown origin is run, no token is written, nothing is written outside the folder of the run."""

import io
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import lora_config, prompt_completion_rows, tiny_model, tiny_tokenizer
from training import SETTINGS, echo_trainer

from echo_trainer import EchoSFTConfig, EchoSFTTrainer
from echo_trainer.manifest import MANIFEST, write_manifest

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_pickles_in_a_checkpoint_are_not_run(tmp_path, name, form):
    out, mark = tmp_path / "out", tmp_path / "bomb"
    echo_trainer(out, max_steps=2, save_strategy="steps", save_steps=2).train()
    bomb = io.BytesIO()
    pickle.dump(Bomb(mark), bomb) if form == "pickle" else torch.save(Bomb(mark), bomb)
    checkpoint = out / "checkpoint-2"
    (checkpoint / name).write_bytes(bomb.getvalue())
    facts = {k: v for k, v in json.loads((checkpoint / MANIFEST).read_text()).items() if k not in ("files", "format")}
    write_manifest(checkpoint, facts)  # whoever puts it there can also list it
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported|unpickl"):
        echo_trainer(out, max_steps=4).train(resume_from_checkpoint=True)
    assert not mark.exists()


def tokens_of(config, pipe):
    """What a process that was given a config sees of its tokens, and what it would write of them."""
    saved = io.BytesIO()
    torch.save(config, saved)
    pipe.send([config.hub_token, TOKEN.encode() in saved.getvalue() + pickle.dumps(config)])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_spawned_process_gets_the_token_and_no_file_does(tmp_path, method):
    config = EchoSFTConfig(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=tokens_of, args=(config, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == [TOKEN, False]
    process.join()
    saved = io.BytesIO()
    torch.save(config, saved)
    assert TOKEN.encode() not in saved.getvalue() + pickle.dumps(config) and config.hub_token == TOKEN


def test_an_adapter_in_a_pickle_is_not_resumed_from(tmp_path):
    out, mark = tmp_path / "out", tmp_path / "bomb"
    echo_trainer(out, max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = out / "checkpoint-2"
    (checkpoint / "adapter_model.safetensors").unlink()
    (checkpoint / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    facts = {k: v for k, v in json.loads((checkpoint / MANIFEST).read_text()).items() if k not in ("files", "format")}
    write_manifest(checkpoint, facts)
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported|unpickl"):
        echo_trainer(out, max_steps=4).train(resume_from_checkpoint=True)
    assert not mark.exists()


def test_no_token_in_any_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    trainer = echo_trainer(tmp_path, save_strategy="steps", save_steps=3, hub_token=TOKEN)
    trainer.train()
    trainer.save_model()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15
    for path in written:
        content = path.read_bytes()
        assert TOKEN.encode() not in content, path
        assert TOKEN.encode("utf-16-le") not in content, path
    assert TOKEN not in json.dumps(trainer.args.to_dict()) and TOKEN not in str(trainer.args)


def test_code_of_a_model_is_not_run_unless_asked(tmp_path):
    base, mark = tmp_path / "base", tmp_path / "ran"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        EchoSFTTrainer(
            model=str(base),
            args=EchoSFTConfig(output_dir=str(tmp_path / "out"), **SETTINGS),
            train_dataset=Dataset.from_list(prompt_completion_rows(4)),
            peft_config=lora_config(),
        )
    assert not mark.exists()


def test_a_run_writes_into_its_folder_only(tmp_path, monkeypatch):
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir(), home.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    trainer = echo_trainer(
        work / "out", save_strategy="steps", save_steps=3, run_name="../../x", hub_model_id="../../evil"
    )
    trainer.train()
    trainer.save_model()
    assert os.listdir(work) == ["out"] and not os.listdir(home)
    assert sorted(os.listdir(tmp_path)) == ["home", "work"]
