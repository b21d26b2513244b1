"""Source and target layers by depth."""

from collections.abc import Sequence
from typing import Final

DEPTH: Final = "depth"
CKA: Final = "cka"
ABOVE: Final = "above"
LOWEST: Final = "lowest"

# Share of the depth at which a 32-layer model has its source layers 24..27 and its target layers 4..7.
SOURCE_DEPTHS = (24 / 32, 28 / 32)
TARGET_DEPTHS = (4 / 32, 8 / 32)


def default_source_layers(depth: int) -> list[int]:
    """Source layers S at about 0.75 to 0.88 of the depth; 24..27 of 32."""
    return _by_depth(depth, SOURCE_DEPTHS)


def default_target_layers(depth: int) -> list[int]:
    """Target layers M at about 0.13 to 0.25 of the depth; 4..7 of 32."""
    return _by_depth(depth, TARGET_DEPTHS)


def resolve_layers(
    sources: list[int] | str | None,
    targets: list[int] | str | None,
    depth: int,
    adapted: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """
    Source and target layers as sorted indices from 0.

    Args:
        sources: as given in the config; None or "depth" chooses by depth, "above" is the layer just above the targets,
            negative indices count from the end.
        targets: likewise; "lowest" is the lowest adapted layer.
        depth: number L of decoder layers.
        adapted: layers that hold LoRA modules; None is all. Targets by depth are among them: those that have the
            depth, or the one nearest to it. Sources by depth lie above the targets, be it just above.

    Raises:
        ValueError: an index lies outside the model, a target is not below every source, or nothing lies above what is
            adapted.
    """
    if depth < 2:
        raise ValueError(
            f"The model has {depth} decoder layer. Echo-LoRA carries states from a deep layer to a shallower one, so "
            f"it needs at least 2."
        )
    named = _absolute("echo_source_layers", sources, depth) if isinstance(sources, list) else None
    if isinstance(targets, list):
        target = _absolute("echo_target_layers", targets, depth)
    else:
        target = _targets(targets, depth, range(depth) if adapted is None else adapted, named)
    source = _sources(sources, depth, max(target)) if named is None else named
    if max(target) >= min(source):
        raise ValueError(
            f"Every target layer must lie below every source layer, and {max(target)} (target) is not below "
            f"{min(source)} (source): echo_source_layers={source}, echo_target_layers={target} of {depth} layers. "
            f"The echo goes from deep to shallow: by default sources {default_source_layers(depth)}, targets "
            f"{default_target_layers(depth)}."
        )
    return source, target


def _targets(word: str | None, depth: int, adapted: Sequence[int], sources: list[int] | None) -> list[int]:
    """Targets by a word, among the adapted layers that a source can lie above; below `sources` where those are set."""
    ceiling = depth - 1 if sources is None else min(sources)
    below = [index for index in sorted(adapted) if index < ceiling]
    if not below:
        raise ValueError(
            f"The echo goes from a deep layer to a shallower one that has an adapter, and of the {depth} layers only "
            f"{sorted(adapted) or 'none'} have one, none of them below layer {ceiling}. Let LoRA adapt a lower one: "
            f"check `layers_to_transform` and `target_modules` of the LoraConfig."
        )
    if word == LOWEST:
        return below[:1]
    wanted = default_target_layers(depth)
    by_depth = [index for index in wanted if index in below]
    return by_depth or [min(below, key=lambda index: abs(index - wanted[0]))]


def _sources(word: list[int] | str | None, depth: int, highest_target: int) -> list[int]:
    """Sources by a word, above the targets."""
    if highest_target >= depth - 1:
        raise ValueError(
            f"`echo_target_layers` names layer {highest_target}, the last of {depth}, and the echo comes from above "
            f"the targets. Name lower layers."
        )
    above = [highest_target + 1]
    if word == ABOVE:
        return above
    return [index for index in default_source_layers(depth) if index > highest_target] or above


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
