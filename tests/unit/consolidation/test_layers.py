"""Which layers are measured, and which take what was measured of others."""

from types import SimpleNamespace

import pytest

from moemerge.consolidation.layers import factor_lenders


@pytest.mark.parametrize(
    ("stacks", "lenders"),
    [
        ({"decoder": [0, 1, 2, 3, 4]}, {0: 0, 1: 0, 2: 2, 3: 2, 4: 4}),
        ({"decoder": [7]}, {7: 7}),
        ({"encoder": [1, 3, 5], "decoder": [13, 15]}, {1: 1, 3: 1, 5: 5, 13: 13, 15: 13}),
    ],
)
def test_every_second_layer_of_a_stack_takes_the_factors_of_the_one_before(stacks, lenders):
    layers = [SimpleNamespace(stack=stack, index=index) for stack, own in stacks.items() for index in own]
    assert factor_lenders(layers) == lenders
