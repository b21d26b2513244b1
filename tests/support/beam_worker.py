"""What one of two processes does in test_beam_processes.py: a run, and the same run resumed between two generations.

python -m torch.distributed.run --nproc_per_node 2 tests/support/beam_worker.py OUTPUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from beam_cases import G, beam_trainer

SETTINGS = {
    "per_device_train_batch_size": 2 * G,
    "gradient_accumulation_steps": 1,
    "num_iterations": 2,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "ddp_find_unused_parameters": False,
}


def run(output, name, resume=None):
    """Train and write what this process has seen: its prompts in order, its advantages, the weights after."""
    seen = []

    def verifier(prompt, completion, row):
        seen.append([prompt, completion])
        return (len(completion) + row["number"]) % 2 == 0

    trainer = beam_trainer(output / "run", verifier=verifier, **SETTINGS)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    found = {"seen": seen, "advantages": trainer.generated[0]["advantages"].tolist(), "weights": weights.tolist()}
    (output / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    run(place, "whole")
    run(place, "resumed", str(place / "run" / "checkpoint-3"))
    dist.destroy_process_group()
