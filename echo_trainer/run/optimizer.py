"""The echo networks' place in the optimizer."""

from torch.nn import Parameter
from torch.optim import Optimizer


def take_in(optimizer: Optimizer, parameters: list[Parameter], new_rate: float | None, rate: float | None) -> None:
    """
    Make sure that the parameters are trained.

    Args:
        optimizer: the trainer's.
        parameters: of the echo networks.
        new_rate: their learning rate where the optimizer was made just now; they get groups of their own. None leaves
            them where they are.
        rate: their learning rate where the optimizer does not know them, since the caller made it before there were
            any; None takes that of the first group.
    """
    if new_rate is not None:
        _give_own_rate(optimizer, {id(p) for p in parameters}, new_rate)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    forgotten = [p for p in parameters if id(p) not in known]
    if forgotten:
        optimizer.add_param_group({"params": forgotten, "lr": rate or optimizer.param_groups[0]["lr"]})


def _give_own_rate(optimizer: Optimizer, chosen: set[int], rate: float) -> None:
    """Move the chosen parameters of an optimizer that has not stepped yet into groups with learning rate `rate`."""
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in chosen]
        if not moved:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        options = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
        optimizer.add_param_group({**options, "params": moved, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
