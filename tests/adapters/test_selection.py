"""Parameters that adapt."""

from __future__ import annotations

import copy

import pytest
import torch

from ttalight.adapters import SHOT, Tent

AFFINES = ["1.weight", "1.bias", "4.weight", "4.bias"]
#: Of the two convolutions with a normalisation layer each and the classifier.
SELECTIONS = {
    "norm": AFFINES,
    "norm_before_last_block": AFFINES,  # of two layers without blocks; test_depth.py has networks with blocks
    "features": ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias"],
    "all": [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
        "4.weight",
        "4.bias",
        "9.weight",
        "9.bias",
    ],
}
CASES = [
    *SELECTIONS.items(),
    (lambda name, parameter: name.endswith("bias"), [name for name in SELECTIONS["all"] if name.endswith("bias")]),
    (lambda name, parameter: parameter.ndim == 4, ["0.weight", "3.weight"]),
]


@pytest.mark.parametrize(("selection", "expected"), CASES)
def test_exactly_these_move(net, images, selection, expected):
    source = copy.deepcopy(net.state_dict())
    adapted = Tent(lr=0.01, parameters=selection).wrap(net)
    for scale in (1.0, 0.5):  # the bias in front of a BatchNorm layer moves by rounding alone, if at all
        adapted(images * scale)
    free = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert free == expected
    assert [id(parameter) for parameter in adapted.engine.net.parameters] == [
        id(parameter) for name, parameter in net.named_parameters() if name in expected
    ]
    moved = [name for name, value in net.state_dict().items() if not torch.equal(value, source[name])]
    assert set(moved) <= set(expected)
    assert set(moved) >= {name for name in expected if name not in ("0.bias", "3.bias")}


def test_a_method_has_its_own_choice(net, images):
    adapted = SHOT(lr=0.01).wrap(net)
    adapted(images)
    assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == SELECTIONS["features"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (lambda name, parameter: False, "there is no parameter to adapt: the selection is empty"),
        (
            "norms",
            "parameters must be 'norm', 'norm_before_last_block', 'features', 'all' or a function .* got 'norms'",
        ),
    ],
)
def test_says_what_is_wrong(net, images, selection, message):
    with pytest.raises(ValueError, match=message):
        Tent(parameters=selection).wrap(net)(images)
