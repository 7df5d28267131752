"""Every method on a vision transformer of transformers, whose output is dict and dataclass in one."""

from __future__ import annotations

import pytest
import torch
from support.methods import BATCH_NORM_ONLY, SETTINGS, methods

from ttalight import adapters

transformers = pytest.importorskip("transformers")

METHODS = methods({**SETTINGS, "MEMO": {"views": 3}, "MoETTA": {}})

pytestmark = pytest.mark.filterwarnings("ignore:.*source")


@pytest.fixture
def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
        initializer_range=0.5,
        output_hidden_states=True,
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture
def batches():
    return torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", METHODS)
def test_the_output_is_that_of_the_model(name, vit, batches):
    expected = vit(batches[0])
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    if name in BATCH_NORM_ONLY:
        with pytest.raises(ValueError, match="BatchNorm"):
            METHODS[name](seed=0).wrap(vit)
        return
    adapted = METHODS[name](seed=0).wrap(vit)
    for batch in batches:
        output = adapted(pixel_values=batch)
        assert type(output) is type(expected)
        assert output.logits.shape == expected.logits.shape
        assert output["logits"] is output.logits
        assert torch.isfinite(output.logits).all()
        assert not output.logits.requires_grad
        assert list(output) == list(expected)
        if name == "MEMO":  # which passes image by image: no pass gave the other parts of the batch
            assert all(part is None for part in output.hidden_states)
        else:
            assert all(part.shape[0] == 4 and not part.requires_grad for part in output.hidden_states)
    assert adapted.engine.skipped == 0
    assert not adapted.engine.net.parameters or adapted.engine.updates
    adapted.release()
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


def test_source_predictions_are_those_of_the_model(vit, batches):
    with torch.no_grad():
        expected = vit(batches[0])
    output = adapters.Source().wrap(vit)(batches[0])
    assert torch.equal(output.logits, expected.logits)
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))
