"""Source and target layers by depth, by word and by number, with adapters on all layers and on a part of them."""

import pytest

from echo_trainer.method.depth import resolve_layers

ALL = None


@pytest.mark.parametrize(
    ("given", "depth", "adapted", "expected"),
    [
        # by depth, as a 32-layer model has them
        ((None, None), 32, ALL, ([24, 25, 26, 27], [4, 5, 6, 7])),
        ((None, None), 8, ALL, ([6], [1])),
        ((None, "depth"), 5, ALL, ([4], [1])),
        ((None, None), 2, ALL, ([1], [0])),
        # the upper part only: the nearest adapted layer; sources as ever, or just above
        ((None, None), 8, [4, 5, 6, 7], ([6], [4])),
        ((None, None), 30, range(20, 30), ([23, 24, 25], [20])),
        ((None, None), 32, range(30, 32), ([31], [30])),
        ((None, None), 32, range(24, 32), ([25, 26, 27], [24])),
        (([3], None), 8, [0, 2, 5, 7], ([3], [0])),
        # what has the usual depth and an adapter
        ((None, None), 32, [0, 1, 5, 9, 31], ([24, 25, 26, 27], [5])),
        # words
        (("above", "lowest"), 8, [4, 5, 6, 7], ([5], [4])),
        (("above", "lowest"), 30, range(20, 30), ([21], [20])),
        (("above", "lowest"), 8, ALL, ([1], [0])),
        (("above", None), 32, ALL, ([8], [4, 5, 6, 7])),
        (("depth", "lowest"), 8, [6, 7], ([7], [6])),
        # numbers
        (([-1], [-4, 2]), 8, ALL, ([7], [2, 4])),
        (("above", [2, 3]), 8, ALL, ([4], [2, 3])),
        ((None, [26]), 32, ALL, ([27], [26])),
        ((None, [30]), 32, ALL, ([31], [30])),
    ],
)
def test_layers(given, depth, adapted, expected):
    assert resolve_layers(*given, depth, adapted) == expected


@pytest.mark.parametrize(
    ("given", "depth", "adapted", "message"),
    [
        ((None, None), 8, [7], "only \\[7\\] have one"),
        ((None, "lowest"), 8, [7], "Let LoRA adapt a lower one"),
        ((None, None), 8, [], "only none have one"),
        (("above", [7]), 8, ALL, "the last of 8"),
        ((None, [7]), 8, ALL, "the last of 8"),
        (([3], None), 8, [4, 5, 6, 7], "none of them below layer 3"),
        (([8], [0]), 8, ALL, "outside the model"),
    ],
)
def test_layers_that_cannot_be(given, depth, adapted, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(*given, depth, adapted)
