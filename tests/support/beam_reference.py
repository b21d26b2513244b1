"""Beam GRPO written with loops: one row, one token, one forward at a time. Nothing here is shared with the package."""

import math

import torch


@torch.no_grad()
def _next_log_probabilities(model, ids):
    """Log-probabilities of the token after `ids`, by a forward of the whole text."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return torch.log_softmax(logits.double(), dim=-1).tolist()


def beam_search(model, prompt, width, longest, ends):
    """
    The `width` best completions of a prompt, by summed log-probability, best first.

    Args:
        model: in evaluation mode.
        prompt: token ids.
        width: G.
        longest: tokens of a completion.
        ends: ids that end one.

    Returns:
        (token ids, summed log-probability) of each.
    """
    running, finished = [((), 0.0)], []
    for step in range(longest):
        candidates = []
        for tokens, total in running:
            for token, value in enumerate(_next_log_probabilities(model, [*prompt, *tokens])):
                candidates.append(((*tokens, token), total + value))
        candidates.sort(key=lambda pair: -pair[1])
        # An end counts where it is among the `width` best ways to go on; what comes after it would never be looked at.
        finished += [pair for pair in candidates[:width] if pair[0][-1] in ends]
        running = [pair for pair in candidates if pair[0][-1] not in ends][:width]
        finished.sort(key=lambda pair: -pair[1])
        finished = finished[:width]
        last = step == longest - 1
        if not last and len(finished) == width and running[0][1] <= finished[-1][1]:
            break
        if last:
            finished = sorted(finished + running, key=lambda pair: -pair[1])[:width]
    return finished


def reward(kind, right, rank, width, decay=None, wrong=0.1):
    """As the issue of the method's source writes them."""
    decay = width if decay is None else decay
    if kind == "rank":
        return math.exp(-rank / decay) if right else -wrong
    if kind == "simple":
        return 1.0 if right else -wrong
    return math.exp(rank / decay) if right else -wrong * math.exp(-rank / decay)


def group(kind, rights, zero_sum=False, **options):
    """Rewards of a group; all alike teach nothing."""
    if all(rights) or not any(rights):
        return [1.0 if right else 0.0 for right in rights]
    rewards = [reward(kind, right, i, len(rights), **options) for i, right in enumerate(rights)]
    if zero_sum:
        gains = sum(value for value in rewards if value > 0)
        costs = sum(value for value in rewards if value < 0)
        rewards = [value if value > 0 else -value / costs * gains for value in rewards]
    return rewards


def advantages(rewards):
    """Rewards minus their mean."""
    mean = sum(rewards) / len(rewards)
    return [value - mean for value in rewards]


def token_log_probabilities(model, prompt, completion):
    """log pi(token) of each token of a completion, with gradients; one forward, without padding."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    found = []
    for place, token in enumerate(completion):
        found.append(torch.log_softmax(logits[len(prompt) + place - 1], dim=-1)[token])
    return found


def loss(rows, beta, epsilon=0.2):
    """
    The loss of a micro-batch: the mean over its completion tokens.

    Args:
        rows: of each its advantage, and new, old and reference log-probabilities of its tokens.
        beta: weight of the KL divergence.
        epsilon: of the clipping.
    """
    total, tokens = 0.0, 0
    for advantage, new, old, reference in rows:
        for now, before, start in zip(new, old, reference, strict=True):
            ratio = torch.exp(now - before)
            clipped = min(max(float(ratio), 1 - epsilon), 1 + epsilon)
            gain = min(float(ratio) * advantage, clipped * advantage)
            # The gradient goes through the ratio where that is the smaller one, and nowhere else.
            part = ratio * advantage if float(ratio) * advantage == gain else torch.tensor(gain)
            divergence = torch.exp(start - now) - (start - now) - 1
            total = total - part + beta * divergence
            tokens += 1
    return total / tokens
