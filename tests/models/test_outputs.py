"""Logits in the outputs of models, found and replaced."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch

from ttalight.models.outputs import logits_of, map_tensors, possible_classes, with_logits

Pair = namedtuple("Pair", ["logits", "features"])
LOGITS, OTHER, NEW = torch.rand(2, 5), torch.rand(2, 8), torch.zeros(2, 5)


@dataclasses.dataclass(frozen=True)
class Answer:
    logits: torch.Tensor | None
    hidden: torch.Tensor | None = None
    note: str = "seen"


@dataclasses.dataclass
class Heads:
    fine: torch.Tensor
    coarse: torch.Tensor


#: What models return, and how ``output=`` says where the logits are.
STRUCTURES = {
    "tensor": (LOGITS, None),
    "dict": ({"logits": LOGITS, "hidden": OTHER}, None),
    "segmentation": (OrderedDict(out=LOGITS[:, :, None, None], aux=OTHER), None),
    "default dict": (defaultdict(list, {"logits": LOGITS, "hidden": OTHER}), None),
    "read-only": (types.MappingProxyType({"logits": LOGITS, "hidden": OTHER}), None),
    "dataclass": (Answer(LOGITS, OTHER), None),
    "named tuple": (Pair(LOGITS, OTHER), None),
    "tuple of one": ((LOGITS,), None),
    "key": ({"fine": LOGITS, "coarse": OTHER}, "fine"),
    "numbered key": ({0: OTHER, 1: LOGITS}, 1),
    "field": (Heads(LOGITS, OTHER), "fine"),
    "field of a named tuple": (namedtuple("Two", "a b")(OTHER, LOGITS), "b"),
    "attribute": (types.SimpleNamespace(head=LOGITS), "head"),
    "position": ((OTHER, LOGITS), 1),
    "last of a list": ([OTHER, LOGITS], -1),
    "function": ({"heads": [OTHER, {"a": LOGITS}]}, lambda output: output["heads"][1]["a"]),
    "function of a tensor": (LOGITS, lambda output: output),
}


def leaves(output):
    """All tensors of a structure, in order."""
    if isinstance(output, types.SimpleNamespace):
        output = vars(output)
    found = []
    map_tensors(output, found.append)
    return found


@pytest.mark.parametrize("name", STRUCTURES)
def test_logits_are_replaced_where_they_were_found(name):
    output, select = STRUCTURES[name]
    logits = logits_of(output, select)
    assert logits.data_ptr() == LOGITS.data_ptr()
    new = torch.zeros_like(logits)
    changed = with_logits(output, new, select)
    assert type(changed) is type(output)
    assert logits_of(changed, select) is new
    assert [part is logits for part in leaves(output)] == [part is new for part in leaves(changed)]
    assert logits_of(output, select) is logits, "what the model returned stays as it was"


def test_select_function_gets_the_raw_output():
    output = {"a": LOGITS, "b": LOGITS}

    def total(output):
        return output["a"] + output["b"]

    assert torch.equal(logits_of(output, total), 2 * LOGITS)
    assert with_logits(output, NEW, total) is NEW


def test_other_parts_can_be_left_out():
    for output in (Answer(LOGITS, OTHER), {"logits": LOGITS, "hidden": OTHER}, {"logits": LOGITS, "more": [OTHER]}):
        alone = map_tensors(with_logits(output, NEW), lambda part: part if part is NEW else None)
        assert logits_of(alone) is NEW
        assert leaves(alone) == [NEW]
        assert logits_of(with_logits(map_tensors(output, lambda part: None), NEW)) is NEW


@pytest.mark.parametrize(
    ("output", "select", "words"),
    [
        ({"score": LOGITS, "b": 1}, None, r"returned a dict with the keys 'score', 'b'; .* say which .* with output="),
        ({}, None, "a dict with the keys none"),
        ({"logits": [LOGITS, OTHER]}, None, "a dict with the keys 'logits'"),
        ((LOGITS, OTHER), None, r"a tuple of 2 \(a tensor \(2, 5\), a tensor \(2, 8\)\); .* output="),
        (Heads(LOGITS, OTHER), None, "a Heads with the fields fine, coarse"),
        (Answer(None, OTHER), None, "an? Answer with the fields hidden, note"),
        (None, None, "the model returned None"),
        (torch.rand(2, 3, 4), None, r"a tensor of shape \(2, 3, 4\); .* classes in dimension 1"),
        ({"a": "text"}, "a", "output='a' is a str; .* must name such a tensor"),
        (LOGITS, lambda output: [output], "output=<lambda> returned a list of 1"),
    ],
)
def test_a_structure_without_logits(output, select, words):
    with pytest.raises(TypeError, match=words) as error:
        logits_of(output, select)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("output", "select", "words"),
    [
        ({"a": LOGITS}, "b", "output='b' is no part of .* a dict with the keys 'a'"),
        ({"a": LOGITS}, 0, "output=0 is no part of .* a dict with the keys 'a'"),
        ((LOGITS,), 1, "output=1 is no part of .* a tuple of 1"),
        (Heads(LOGITS, OTHER), "c", "output='c' is no part of .* a Heads with the fields fine, coarse"),
        (LOGITS, "logits", r"output='logits' is no part of .* a tensor of shape \(2, 5\)"),
    ],
)
def test_a_part_that_does_not_exist(output, select, words):
    with pytest.raises(ValueError, match=words):
        logits_of(output, select)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 3, 3)])
def test_one_logit_is_refused_with_what_to_do(shape):
    z = torch.rand(shape)
    with pytest.raises(ValueError, match=r"one logit for each image, .* torch.cat\(\(torch.zeros_like\(z\), z\), 1\)"):
        logits_of(z)
    with pytest.raises(ValueError, match="output='b' is one logit"):
        logits_of({"b": z}, "b")
    if len(shape) > 1:
        two = torch.cat((torch.zeros_like(z), z), 1)
        torch.testing.assert_close(logits_of(two).softmax(1)[:, 1:], z.sigmoid())


def test_classes_are_possible_that_any_image_allows():
    logits = torch.zeros(2, 4)
    logits[:, 1] = logits[0, 2] = -torch.inf
    assert possible_classes(logits).tolist() == [True, False, True, True]
    assert possible_classes(logits[:, :, None, None].expand(2, 4, 3, 3)).tolist() == [True, False, True, True]


class TestModelOutput:
    """Objects of transformers: dicts and dataclasses in one, whose fields that are None are no keys."""

    @pytest.fixture
    def output(self):
        outputs = pytest.importorskip("transformers.modeling_outputs")
        return outputs.ImageClassifierOutput(logits=LOGITS, hidden_states=(OTHER, OTHER))

    def test_replaced_logits(self, output):
        for select in (None, "logits", 0, lambda output: output.logits):
            assert logits_of(output, select) is LOGITS
            changed = with_logits(output, NEW, select)
            assert type(changed) is type(output)
            assert changed.logits is NEW
            assert changed["logits"] is NEW
            assert list(changed) == ["logits", "hidden_states"]
            assert changed.hidden_states[0] is OTHER

    def test_logits_alone(self, output):
        emptied = map_tensors(output, lambda part: None)
        assert emptied.logits is None
        assert with_logits(emptied, NEW).logits is NEW
        assert with_logits(emptied, NEW)["logits"] is NEW

    def test_an_output_without_logits(self):
        outputs = pytest.importorskip("transformers.modeling_outputs")
        with pytest.raises(TypeError, match="a BaseModelOutput with the fields last_hidden_state; "):
            logits_of(outputs.BaseModelOutput(last_hidden_state=OTHER))
