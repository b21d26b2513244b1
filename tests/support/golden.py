"""Four small runs whose numbers are kept: what a refactoring must not change.

    python tests/support/golden.py     writes tests/data/golden.json

The objective of every step, routes, and digests of the final adapter and the echo networks, on one thread. Bits depend
on the versions and on the instruction set of the CPU, so both are kept beside them. Where a column has to change for a
good reason, make that one anew, and say when and why in tests/data/README.md.
"""

import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from models import lora_config
from paths import DATA
from safetensors.torch import load_file
from training import DATA_FORMS, echo_trainer

from echo_trainer.method.routing import RoutingSchedule

RESULTS = DATA / "golden.json"
RANK = lora_config().r
RUNS = {
    "padded": ("padded", {}),
    "packed": ("packed", {}),
    "multi-turn": ("multi-turn", {"echo_aggregation": "weighted", "echo_positions": "predicting"}),
    "dora": ("padded", {"lora": lora_config(init_lora_weights=True, use_dora=True), "echo_teacher": "mutual"}),
}


def environment() -> dict[str, str]:
    """What the bits depend on."""
    names = ("torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "datasets")
    return {**{name: version(name) for name in names}, "cpu": torch.backends.cpu.get_cpu_capability()}


def run(name: str) -> dict:
    """The numbers of a run."""
    form, more = RUNS[name]
    settings, rows = DATA_FORMS[form]
    settings = {"lora": lora_config(init_lora_weights=True, lora_dropout=0.1), **settings, **more}
    routes, draw, threads = {}, RoutingSchedule.draw, torch.get_num_threads()

    def drawn(self, step, micro_batch, rows, documents):
        routed = draw(self, step, micro_batch, rows, documents)
        for place in zip(self.position(step, micro_batch, rows), documents, routed, strict=True):
            position, document, found = map(int, place)
            routes[f"{position}.{document}"] = found
        return routed

    with tempfile.TemporaryDirectory() as folder:
        RoutingSchedule.draw = drawn
        torch.set_num_threads(1)
        try:
            trainer = echo_trainer(
                folder,
                rows=rows(),
                max_steps=6,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                **settings,
            )
            trainer.train()
            trainer.save_model()
        finally:
            RoutingSchedule.draw = draw
            torch.set_num_threads(threads)
        saved = load_file(Path(folder, "adapter_model.safetensors"))
    for name, value in saved.items():
        if "lora_A" in name:
            value[RANK:] = 0  # new ranks of the portable form, which were not trained
    return {
        "objective": [entry["echo/objective"] for entry in trainer.state.log_history if "echo/objective" in entry],
        "routes": routes,
        "adapter": digest(saved),
        "adapter_norm": float(sum(x.double().square().sum() for x in saved.values()).sqrt()),
        "echo_networks": digest(dict(trainer.echo_networks.named_parameters())),
    }


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of names and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    found = {"environment": environment(), "runs": {name: run(name) for name in RUNS}}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
