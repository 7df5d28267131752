from __future__ import annotations

import pytest
import torch
from torch import nn

from ttalight.models.label_space import select_classes


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_the_classes(bias):
    whole = nn.Linear(5, 9, bias=bias).double().eval()
    features = torch.randn(4, 5, dtype=torch.float64)
    part = select_classes(whole, (7, 0, 3))
    torch.testing.assert_close(part(features), whole(features)[:, [7, 0, 3]])
    assert not part.training
    part.weight.data.zero_()
    assert whole.weight.abs().min() > 0  # a copy


def test_frozen_classifiers_stay_frozen():
    whole = nn.Linear(2, 4).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in select_classes(whole, [1]).parameters())


@pytest.mark.parametrize("classes", [(), (0, 0), (-1, 2), (1, 4)])
def test_refuses_what_are_no_classes(classes):
    with pytest.raises(ValueError, match="different numbers from 0 to 3"):
        select_classes(nn.Linear(2, 4), classes)
