"""Source and target layers by depth."""

# Share of the depth at which a 32-layer model has its source layers 24..27 and its target layers 4..7.
SOURCE_DEPTHS = (24 / 32, 28 / 32)
TARGET_DEPTHS = (4 / 32, 8 / 32)


def default_source_layers(depth: int) -> list[int]:
    """Source layers S at about 0.75 to 0.88 of the depth; 24..27 of 32."""
    return _by_depth(depth, SOURCE_DEPTHS)


def default_target_layers(depth: int) -> list[int]:
    """Target layers M at about 0.13 to 0.25 of the depth; 4..7 of 32."""
    return _by_depth(depth, TARGET_DEPTHS)


def resolve_layers(sources: list[int] | None, targets: list[int] | None, depth: int) -> tuple[list[int], list[int]]:
    """
    Source and target layers as sorted indices from 0.

    Args:
        sources, targets: as given in the config; None chooses by depth, negative indices count from the end.
        depth: number L of decoder layers.

    Raises:
        ValueError: an index lies outside the model, or a target is not below every source.
    """
    if depth < 2:
        raise ValueError(
            f"The model has {depth} decoder layer. Echo-LoRA carries states from a deep layer to a shallower one, so "
            f"it needs at least 2."
        )
    source = _absolute("echo_source_layers", sources, depth) if sources is not None else default_source_layers(depth)
    target = _absolute("echo_target_layers", targets, depth) if targets is not None else default_target_layers(depth)
    if max(target) >= min(source):
        raise ValueError(
            f"Every target layer must lie below every source layer, and {max(target)} (target) is not below "
            f"{min(source)} (source): echo_source_layers={source}, echo_target_layers={target} of {depth} layers. "
            f"The echo goes from deep to shallow: by default sources {default_source_layers(depth)}, targets "
            f"{default_target_layers(depth)}."
        )
    return source, target


def with_adapters(targets: list[int], sources: list[int], adapted: list[int]) -> list[int]:
    """
    Those of the target layers that hold an adapter, where the depth has chosen them; if none does, the nearest layer
    below every source that does.

    Args:
        targets, sources: from `resolve_layers`.
        adapted: layers with an adapter.
    """
    below = [index for index in adapted if index < min(sources)]
    found = [index for index in targets if index in below]
    return found or sorted(below, key=lambda index: abs(index - targets[0]))[:1] or targets


def _by_depth(depth: int, share: tuple[float, float]) -> list[int]:
    start = min(int(share[0] * depth + 0.5), depth - 1)
    end = max(int(share[1] * depth + 0.5), start + 1)
    return list(range(start, min(end, depth)))


def _absolute(name: str, indices: list[int], depth: int) -> list[int]:
    outside = [index for index in indices if not -depth <= index < depth]
    if outside:
        raise ValueError(
            f"`{name}` names {outside}, outside the model: it has {depth} decoder layers, 0 to {depth - 1} "
            f"(or -{depth} to -1, counted from the end)."
        )
    resolved = sorted({index % depth for index in indices})
    if len(resolved) != len(indices):
        raise ValueError(f"`{name}` = {indices} names the same layer twice in a model of {depth} layers.")
    return resolved
