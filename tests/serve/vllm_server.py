"""A vLLM server in its own environment and process, and the requests that the tests make."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class Server:
    """Requests to a running server; prompts and completions are token ids."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else {"text": text}

    def load(self, name: str, folder: Path) -> str | None:
        """Load an adapter; returns what the server says when it refuses."""
        try:
            self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except urllib.error.HTTPError as error:
            return error.read().decode()
        return None

    def complete(self, model: str, prompt: list[int], length: int) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        body = {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0, "logprobs": 1,
                "ignore_eos": True, "return_tokens_as_token_ids": True}  # fmt: skip
        found = self.post("/v1/completions", body)["choices"][0]["logprobs"]
        return [int(token.removeprefix("token_id:")) for token in found["tokens"]], found["token_logprobs"]


@contextmanager
def serve(model: Path, log: Path, *options: str, environment: dict[str, str] | None = None):
    """Start ``vllm`` on ``model``, wait until it answers, and stop it in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "base", "--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    environment = os.environ | SETTINGS | (environment or {})
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(process, port, log)
            yield Server(port)
        finally:
            os.killpg(process.pid, 15)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def _wait(process: subprocess.Popen, port: int, log: Path, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM did not start:\n{log.read_text()[-6000:]}")


def load_peft(base: Path, adapter: Path | None) -> torch.nn.Module:
    """The base in float32, with the adapter if one is given."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


@torch.no_grad()
def complete_with(model: torch.nn.Module, prompt: list[int], length: int) -> tuple[list[int], list[float]]:
    """What `Server.complete` returns, computed here, without a cache."""
    ids, found = list(prompt), []
    for _ in range(length):
        scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(scores.argmax().item())
        found.append(scores.max().item())
    return ids[len(prompt) :], found
