"""The echo networks' place in the optimizer, whoever made it."""

from typing import Any

from torch.nn import Parameter


def give_own_rate(optimizer: Any, parameters: list[Parameter], rate: float) -> None:
    """
    Move parameters of an optimizer that has not stepped yet into groups of their own.

    Args:
        optimizer: made just now.
        parameters: of the echo networks.
        rate: their learning rate; everything else stays as in the group they were in.
    """
    chosen = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in chosen]
        if not moved:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        options = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
        optimizer.add_param_group({**options, "params": moved, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def take_in(optimizer: Any, scheduler: Any, parameters: list[Parameter], rate: float | None) -> None:
    """
    Make sure that the parameters are trained, also by an optimizer of the caller, who knows nothing of them.

    Must run before an engine is given the optimizer.

    Args:
        optimizer: the trainer's.
        scheduler: one that the caller has made for it; None where the trainer makes it later.
        parameters: of the echo networks.
        rate: `echo_learning_rate`; None takes that of the optimizer's first group.

    Raises:
        ValueError: `rate` is set, and the scheduler has counted the groups; or the groups hold what only the caller
            knows.
    """
    if not hasattr(optimizer, "param_groups"):  # DeepSpeed makes the optimizer, of the parameters in this list
        known = {id(p) for p in optimizer.params}
        optimizer.params = [*optimizer.params, *(p for p in parameters if id(p) not in known)]
        return
    forgotten = unknown_to(optimizer, parameters)
    if not forgotten:
        return
    of_each = sorted({name for group in optimizer.param_groups for name in _of_each(group)})
    if of_each:
        raise ValueError(
            f"The groups of the optimizer ({type(optimizer).__name__}) hold {of_each}, which say something of each "
            f"parameter, and nobody says it of those of the echo networks. Override `create_optimizer` and make it of "
            f"trainer.echo_networks.named_parameters() as well, or switch the echo off with echo_p_start=0 and "
            f"echo_p_end=0."
        )
    if scheduler is None:
        optimizer.add_param_group({"params": forgotten, "lr": rate or optimizer.param_groups[0]["lr"]})
        return
    if rate is not None:
        raise ValueError(
            f"`echo_learning_rate={rate!r}` needs a parameter group of its own, and the {type(scheduler).__name__} "
            f"given with `optimizers=(optimizer, scheduler)` has counted the groups already. Leave echo_learning_rate "
            f"out (the echo networks then join the optimizer's first group), or give optimizers=(optimizer, None) and "
            f"name the schedule by `lr_scheduler_type`."
        )
    optimizer.param_groups[0]["params"].extend(forgotten)


def _of_each(group: dict[str, Any]) -> list[str]:
    """What a group holds of each of its parameters (LoRA-FA of PEFT: their names and scalings)."""
    n = len(group["params"])
    return [name for name, value in group.items() if name != "params" and isinstance(value, list) and len(value) == n]


def unknown_to(optimizer: Any, parameters: list[Parameter]) -> list[Parameter]:
    """Those of the parameters that are in no group of the optimizer."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in parameters if id(p) not in known]
