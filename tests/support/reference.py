"""Echo-LoRA's loss, written a second time: straight from the method, one sample at a time, with loops.

It shares nothing with the package but the parameters of the echo networks: no plan, no chunks, no caches.
Each sample runs alone, without padding. Deep states come from `output_hidden_states`; the echo is added by replacing
the forward of the LoRA modules; losses are loops over positions and sums over the vocabulary.
"""

import torch


def layer_norm(z):
    return (z - z.mean()) / torch.sqrt(z.var(unbiased=False) + 1e-5)


def delta(network, z):
    """lambda * (g * e) for one module and one echo vector; lambda * e where there is no gate."""
    e = network.project_out @ torch.tanh(network.project_in @ layer_norm(z))
    if network.gate_out is None:
        return network.scale * e
    g = torch.sigmoid(network.gate_out @ torch.tanh(network.gate_in @ layer_norm(z)) + network.gate_bias)
    return network.scale * g * e


def spans(labels):
    """Answer spans [(first, last), ...] that follow at least one prompt token."""
    found, start = [], None
    for t, label in enumerate([*labels, -100]):
        if label != -100 and start is None:
            start = t
        if label == -100 and start is not None:
            if start > 0:
                found.append((start, t - 1))
            start = None
    return found


def log_probabilities(logits):
    return logits - logits.max() - torch.log(torch.exp(logits - logits.max()).sum())


def cross_entropy(logits, labels):
    """Sum over the positions that predict an answer token."""
    total = torch.zeros((), dtype=logits.dtype)
    for t in range(len(labels) - 1):
        if labels[t + 1] != -100:
            total = total - log_probabilities(logits[t])[labels[t + 1]]
    return total


def kl(teacher, student, labels, tau):
    """tau^2 KL(teacher || student) over the positions that predict an answer token."""
    total = torch.zeros((), dtype=student.dtype)
    for t in range(len(labels) - 1):
        if labels[t + 1] != -100:
            log_p = log_probabilities(teacher[t].detach() / tau)
            log_q = log_probabilities(student[t] / tau)
            total = total + tau**2 * (torch.exp(log_p) * (log_p - log_q)).sum()
    return total


def logits_and_states(model, ids):
    """Logits (T, V) and the outputs (T, d) of all layers. transformers normalises the last of `hidden_states`."""
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    last = []
    layers = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    handle = layers[-1].register_forward_hook(lambda module, args, out: last.append(out[0]))
    model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return output.logits[0], [states[0] for states in output.hidden_states[1:-1]] + last


def echo_logits(model, sites, networks, ids, echoes, positions, key):
    """Logits of the echo-augmented model: at `positions[t]` the echo of that number is added."""
    originals = {}
    for site in sites:
        originals[site.module] = site.module.forward
        network = networks[key(site)]

        def forward(x, *args, module=site.module, network=network, **kwargs):
            out = originals[module](x, *args, **kwargs)
            rows = list(out.reshape(-1, out.shape[-1]))
            for t, number in positions.items():
                rows[t] = rows[t] + delta(network, echoes[number]).to(out.dtype)
            return torch.stack(rows).view_as(out)

        site.module.forward = forward
    try:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for site in sites:
            del site.module.forward


def loss(model, setup, samples, routed, key, *, kd_weight, tau, teacher, predicting, detach=True, reduction="sum"):
    """
    Sum over samples of w [CE_plain + r (CE_echo + lambda KD)], not divided by N; w = 1, or 1 / (1 + r) for "mean".

    samples: list of (ids, labels), unpadded documents.
    """
    total = 0.0
    for (ids, labels), r in zip(samples, routed, strict=True):
        plain, states = logits_and_states(model, ids)
        segments = spans(labels)
        if not r or not segments:
            total = total + cross_entropy(plain, labels)
            continue
        w = 1 / 2 if reduction == "mean" else 1
        total = total + w * cross_entropy(plain, labels)
        echoes, positions = [], {}
        for number, (first, last) in enumerate(segments):
            boundary = [states[s][first - 1] for s in setup.source_layers]
            boundary = [state.detach() for state in boundary] if detach else boundary
            echoes.append(sum(boundary) / len(boundary))
            for t in range(first - 1 if predicting else first, last + 1):
                positions[t] = number
        echo = echo_logits(model, setup.sites, setup.networks.networks, ids, echoes, positions, key)
        total = total + w * cross_entropy(echo, labels)
        if teacher in ("echo", "mutual"):
            total = total + w * kd_weight * kl(echo, plain, labels, tau)
        if teacher in ("plain", "mutual"):
            total = total + w * kd_weight * kl(plain, echo, labels, tau)
    return total
