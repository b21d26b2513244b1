"""A process that pushes on command: one JSON call a line on stdin, one JSON answer a line on stdout.

huggingface_hub reads its settings when it is imported, so pushing to the test Hub needs a process of its own.
"""

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "PYTHONUNBUFFERED": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
_UNSET = ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "HF_HUB_ETAG_TIMEOUT")


class Client:
    """The process, seen from the test."""

    def __init__(self, url: str, home: Path):
        environment = {k: v for k, v in os.environ.items() if k not in _UNSET}
        environment |= SETTINGS | {"HF_ENDPOINT": url, "HF_HOME": str(home)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, function: str, *arguments: object, **options: object) -> dict:
        """Call a function below; returns its answer with "log", "seconds" and, if it raised, "error"."""
        self.process.stdin.write(json.dumps([function, [str(a) for a in arguments], options]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def push(folder: str, repo_id: str, patience: dict | None = None, **options: object) -> dict:
    from dataclasses import asdict

    from echo_trainer.hub.client import Patience
    from echo_trainer.hub.push import push_adapter

    quick = {"attempts": 3, "wait": 0.05, "timeout": 5.0, **(patience or {})}
    return asdict(push_adapter(folder, repo_id, patience=Patience(**quick), **options))


def forget_user() -> dict:
    """Ask the Hub again whose token it is; the library keeps the answer."""
    from echo_trainer.hub.push import hub_api

    hub_api.cache_clear()
    return {}


def command(*arguments: str, token: str | None = None) -> dict:
    from contextlib import redirect_stderr, redirect_stdout

    from echo_trainer import cli

    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.main(["push", *arguments])
    finally:
        os.environ.pop("HF_TOKEN", None)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def logits(base: str, adapter: str, token: str, out: str) -> dict:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, token=token).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(2, 20)[None]).logits, out)
    return {}


def train(folder: str, base: str, token: str, **options: object) -> dict:
    """Train a tiny model, then call `after`: "push_to_hub", "save_model" or nothing."""
    import torch
    from training import echo_trainer
    from transformers import AutoModelForCausalLM

    from echo_trainer.hub.client import Patience
    from echo_trainer.run.pushes import Pushes

    Pushes.patience = Patience(attempts=2, wait=0.05, timeout=5.0)  # also while a trainer is built
    after, arguments, resume = options.pop("after", None), options.pop("arguments", {}), options.pop("resume", None)
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = echo_trainer(folder, model=model, hub_token=token, max_steps=4, **options)
    trainer.train(resume_from_checkpoint=resume)
    if after:
        getattr(trainer, after)(**arguments)
    trainer.model.eval()
    with torch.no_grad():
        torch.save(trainer.model(input_ids=torch.arange(2, 20)[None]).logits, Path(folder, "trained.pt"))
    return {"hub_model_id": trainer.hub_model_id}


def sft(folder: str, base: str, token: str, **options: object) -> dict:
    """`echo-trainer sft` with a push; what it returned."""
    from models import prompt_completion_rows, tiny_tokenizer

    from echo_trainer import cli
    from echo_trainer.hub.client import Patience
    from echo_trainer.run.pushes import Pushes

    Pushes.patience = Patience(attempts=2, wait=0.05, timeout=5.0)
    data = Path(folder, "data")
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("\n".join(json.dumps(row) for row in prompt_completion_rows(16)))
    tiny_tokenizer().save_pretrained(base)
    settings = {
        "model_name_or_path": base, "dataset_name": data, "output_dir": Path(folder, "out"), "max_steps": 4,
        "use_cpu": "true", "bf16": "false", "report_to": "none", "push_to_hub": "true", "hub_token": token,
        "hub_model_id": "ada/one", "save_strategy": "no", "logging_steps": 1, **options,
    }  # fmt: skip
    return {"status": cli.main(["sft", *(str(word) for name, v in settings.items() for word in (f"--{name}", v))])}


def row_options(model: str, offline: bool = False) -> dict:
    """What `echo-trainer evaluate` finds out about the rows of an adapter."""
    from dataclasses import asdict

    from huggingface_hub import constants

    from echo_trainer.evaluation.adapter import row_options

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, offline
    try:
        return asdict(row_options(model))
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch(model: str, name: str) -> dict:
    """Have a file of a repository among those that are kept."""
    from huggingface_hub import hf_hub_download

    return {"path": hf_hub_download(model, name)}


def evaluate(model: str, data: str, base: str, out: str) -> dict:
    """`echo-trainer evaluate` of an adapter on the Hub; what it returned."""
    from echo_trainer.evaluation.adapter import evaluate_adapter

    return evaluate_adapter(model, [data], base=base, mode="nll", output=out)


class Watch:
    """While it is entered, collects the functions that are called in threads that push, as "file:function"."""

    def __init__(self) -> None:
        self.calls: set[str] = set()
        self.threads: set[str] = set()

    def __enter__(self) -> "Watch":
        threading.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)

    def _see(self, frame: Any, event: str, argument: object) -> None:
        name = threading.current_thread().name
        if event == "call" and name.startswith("echo-push"):
            self.threads.add(name)
            self.calls.add(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")


def train_and_look(folder: str, base: str, token: str, **options: object) -> dict:
    """
    Train, and look at what belongs to the whole process, from the thread that trains and into the one that pushes.

    Returns:
        The losses; the steps that ended while a push was on its way; what the training thread saw of the default dtype
        and of the Hub's client; and what was called in the thread that pushes.
    """
    import torch
    from huggingface_hub.utils import _http
    from training import echo_trainer, losses
    from transformers import AutoModelForCausalLM, TrainerCallback

    from echo_trainer.hub.client import Patience
    from echo_trainer.run.pushes import Pushes

    Pushes.patience = Patience(attempts=2, wait=0.05, timeout=5.0)
    dtypes, clients, beside = set(), set(), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            dtypes.add(str(torch.get_default_dtype()))
            clients.add((id(_http._GLOBAL_CLIENT_FACTORY), id(_http._GLOBAL_CLIENT)))
            if any(not job.done() for _, job in trainer.pushes._jobs):
                beside.append(state.global_step)

    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = echo_trainer(folder, model=model, hub_token=token, **{"max_steps": 6, **options})
    trainer.add_callback(Look())
    with Watch() as watch:
        trainer.train()
    return {
        "losses": losses(trainer), "beside": beside, "dtypes": sorted(dtypes), "clients": sorted(clients),
        "threads": sorted(watch.threads), "calls": sorted(watch.calls),
    }  # fmt: skip


def push_and_save(folder: str, base: str, token: str) -> dict:
    """Push in the background, train on and save again while that is on its way."""
    from training import echo_trainer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = echo_trainer(folder, model=model, hub_token=token, max_steps=2, hub_model_id="ada/one")
    trainer.train()
    with Watch() as watch:
        job = trainer.push_to_hub(blocking=False)
        trainer.train()
        trainer.save_model()
        job.result(60)
    return {"calls": sorted(watch.calls)}


def _serve() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.basicConfig()
    for line in sys.stdin:
        function, arguments, options = json.loads(line)
        heard = io.StringIO()
        handler = logging.StreamHandler(heard)
        logger = logging.getLogger("echo_trainer")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        begin = time.monotonic()
        try:
            answer = globals()[function](*arguments, **options)
        except Exception as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        logger.removeHandler(handler)
        answer |= {"log": heard.getvalue(), "seconds": time.monotonic() - begin}
        print(json.dumps(answer, default=str), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
