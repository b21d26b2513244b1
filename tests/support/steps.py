"""Run one Echo-LoRA step on a tiny model without a trainer, and collect its gradients."""

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from echo_trainer.method.depth import resolve_layers
from echo_trainer.method.losses import EchoLoss
from echo_trainer.method.network import EchoNetworks, NetworkForm
from echo_trainer.method.routing import RoutingSchedule
from echo_trainer.passes.echo import ROWS, SUFFIX
from echo_trainer.passes.layers import adapted_layers, decoder_layers, find_sites
from echo_trainer.passes.proof import observe
from echo_trainer.passes.setup import EchoSetup
from echo_trainer.passes.step import echo_step
from echo_trainer.run.collate import EchoCollator
from echo_trainer.run.proof_rows import no_trace


def echo_setup(model, sources=None, targets=None, alive=True, detach=True, **form) -> EchoSetup:
    """Echo parts for an adapted model; `alive` gives P2 values other than zero, so that the echo does something."""
    base = model.get_base_model()
    layers = decoder_layers(base)
    sources, targets = resolve_layers(sources, targets, len(layers), adapted_layers(base))
    sites = find_sites(base, targets)
    width = base.config.get_text_config().hidden_size
    form = NetworkForm(**{"bottleneck": 8, **form})
    networks = EchoNetworks(sites, len(sources), width, form, seed=3).to(base.dtype)
    if alive:
        generator = torch.Generator().manual_seed(5)
        for name, parameter in networks.named_parameters():
            if name.endswith("project_out"):
                parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if name.endswith("scale"):
                parameter.data.fill_(0.5)
            if name.endswith("source_logits"):
                parameter.data = torch.linspace(-1, 1, len(parameter)).to(parameter.dtype)
    setup = EchoSetup(base, networks, sites, sources, detach)
    with no_trace(model):
        observe(setup, torch.tensor([[2, 3, 4], [2, 3, 5]], device=base.device))
    return setup


def padded_collator():
    return DataCollatorForLanguageModeling(pad_token_id=0)


def padding_free_collator():
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def random_examples(n=4, seed=0, turns=1, low=3, high=9, vocabulary=60):
    """Pre-tokenised examples: `turns` times a prompt and an answer, of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(n):
        ids, labels = [], []
        for _ in range(turns):
            for answer in (False, True):
                length = int(torch.randint(2 if answer else low, high, (1,), generator=generator))
                tokens = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
                ids += tokens
                labels += tokens if answer else [-100] * length
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def packed_example(examples):
    """The examples as one packed example."""
    return {
        "input_ids": [token for example in examples for token in example["input_ids"]],
        "labels": [label for example in examples for label in example["labels"]],
        "seq_lengths": [len(example["input_ids"]) for example in examples],
    }


def planned_batch(examples, *, suffix, positions="answer", p=1.0, collator=None, seed=0, step=0):
    """A collated batch and its plan."""
    form = SUFFIX if suffix else ROWS
    echo = EchoCollator(collator or padded_collator(), positions, form=form)
    echo.schedule = RoutingSchedule(seed, p, p, total_steps=10, batch_size=len(examples))
    batch = echo(examples, step=step)
    plan = batch.pop("echo_plan")
    batch.pop("labels")
    return batch, plan


PAPER = EchoLoss(1.0, 2.0, "echo")


def step_gradients(model, setup, batch, plan, terms=PAPER, autocast=False):
    """Output of one step and the gradient of every trainable parameter, LoRA and echo, by name."""
    model.zero_grad()
    setup.networks.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = echo_step(setup, terms, dict(batch), plan)
    output["objective"].backward()
    named = {**dict(model.named_parameters()), **{f"echo.{n}": p for n, p in setup.networks.named_parameters()}}
    return output, {n: p.grad.clone() for n, p in named.items() if p.requires_grad and p.grad is not None}


def assert_same_gradients(left, right, rtol):
    """Equal names, and every gradient equal within `rtol` of the largest gradient of its tensor."""
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        bound = rtol * max(gradient.abs().max().item(), 1e-12)
        difference = (gradient - right[name]).abs().max().item()
        assert difference <= bound, f"{name}: differs by {difference:.3g}, allowed {bound:.3g}"
