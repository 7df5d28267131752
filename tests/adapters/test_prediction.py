"""Predictions without adaptation: what they are, and that they change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from support.methods import CLASSES, methods
from support.networks import small_net
from support.tasks import DrawingTask
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from ttalight.adapters import EATA, MEMO, PTBN, ROID, T3A, TIPI, Adapter, Tent, TestTimeTraining

#: One step an image and few views, which are enough here. DPE predicts before its prototypes of texts follow an image.
METHODS = methods(MEMO={"views": 2}, CoTTA={"confidence": 0.0}, DPE={"threshold": 0.0})
METHODS |= {"Test-time training": lambda **more: TestTimeTraining(steps=2, lr=1e-2, **more)}

pytestmark = pytest.mark.filterwarnings("ignore:.*runs with its settings for CIFAR", "ignore:.*source")


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def make(name):
    """Return what makes an adapted network of the method."""
    network = (lambda: DrawingTask(small_net())) if name == "Test-time training" else small_net

    def make(**more):
        settings = {"reset": "never", **more}
        return METHODS[name](**settings).wrap(network())

    return make


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(count, 3, 16, 16, generator=generator, dtype=torch.float64) for count in (6, 6, 3, 1)]


#: Methods that learn from the images of a batch one after another, by other sums than for an image alone.
IN_ORDER = ("TDA", "BoostAdapter", "DPE", "OnZeta", "ECALP", "DMN", "BCA")


def everything(adapted):
    """Return all that a prediction could change, copied."""
    engine = adapted.engine
    return copy.deepcopy(
        {
            "module": dict(adapted.module.state_dict()),
            "flags": [(value.requires_grad, value.grad) for value in adapted.module.parameters()],
            "training": [module.training for module in adapted.module.modules()],
            "state": engine.capture(),
            "draws": [torch.get_rng_state(), engine.net.generator.get_state()],
            "sizes": engine.admission.sizes,
            "rest": (engine.net.last, engine.net.readings, engine.net.guard.moved, engine._boundary),
        }
    )


def check_same(first, second):
    (ours, shape), (theirs, other_shape) = tree_flatten(first), tree_flatten(second)
    assert shape == other_shape
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def test_every_method_is_here():
    assert CLASSES.keys() <= METHODS.keys()


@pytest.mark.parametrize("reset", ["never", "batch"])
def test_changes_nothing(make, batches, reset):
    adapted, other = make(reset=reset), make(reset=reset)
    for batch in batches:
        before = everything(adapted)
        first, second = (adapted(batches[-2], adapt=False) for _ in range(2))
        assert torch.equal(first, second)
        assert not first.requires_grad
        check_same(everything(adapted), before)
        assert torch.equal(adapted(batch), other(batch))


def test_before_the_first_batch_leaves_a_method_that_is_not_configured(make, batches):
    adapted, other = make(), make()
    adapted(batches[0], adapt=False)
    assert adapted.engine.state is None
    assert adapted.engine.admission.sizes == []
    check_same(everything(adapted), everything(other))
    with pytest.raises(RuntimeError, match="being adapted already"):
        PTBN().wrap(adapted.module)


def test_is_what_the_step_predicts(name, make, batches):
    """Before the step where a method scores that, after it where it scores that one."""
    adapted = make()
    adapted(batches[0])
    batch = batches[1][:1] if name in ("MEMO", *IN_ORDER) else batches[1]
    before = adapted(batch, adapt=False)
    logits = adapted(batch)
    adapted.engine.net.counters.batch -= 1  # the draws of the step
    after = adapted(batch, adapt=False)
    expected = before if adapted.engine.method.prediction == "before" else after
    if name in IN_ORDER:
        torch.testing.assert_close(logits, expected)
    else:
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("prediction", ["before", "after"])
@pytest.mark.parametrize("cls", [Tent, TIPI, ROID])
def test_is_what_the_step_predicts_whatever_is_scored(cls, prediction, batches):
    adapted = cls(prediction=prediction, reset="never").wrap(small_net())
    adapted(batches[0])
    before, logits, after = (adapted(batches[1], adapt=adapt) for adapt in (False, True, False))
    assert torch.equal(logits, before if prediction == "before" else after)
    assert not torch.equal(before, after)


def test_of_a_step_that_moves_is_another_one(batches):
    adapted = Tent(lr=0.1).wrap(small_net())
    before = adapted(batches[0], adapt=False)
    adapted(batches[1])
    assert not torch.equal(adapted(batches[0], adapt=False), before)


def test_is_of_the_source_where_a_reset_is_due(batches):
    for reset in ("batch", 1):
        adapted = Tent(lr=0.1, reset=reset).wrap(small_net())
        source = adapted(batches[1], adapt=False)
        adapted(batches[0])
        weights = [value.clone() for value in adapted.module.parameters()]
        assert torch.equal(adapted(batches[1], adapt=False), source)
        assert all(map(torch.equal, weights, adapted.module.parameters()))
    adapted = Tent(lr=0.1, reset="domain").wrap(small_net())
    adapted(batches[0])
    assert not torch.equal(adapted(batches[1], adapt=False), source)
    adapted.engine.announce()
    assert torch.equal(adapted(batches[1], adapt=False), source)


def test_of_t3a_is_by_the_present_supports(batches):
    adapted = T3A(supports=3).wrap(small_net())
    adapted(batches[0])
    method, net = adapted.engine.method, adapted.module
    with torch.no_grad():
        features = net[:8](batches[1])
    sums = F.normalize(method._features, dim=2).sum(1)
    assert torch.equal(adapted(batches[1], adapt=False), features @ F.normalize(sums, dim=1).T)


def test_of_memo_is_each_image_by_itself(batches):
    adapted = MEMO(views=2).wrap(small_net())
    one_by_one = torch.cat([adapted(image[None], adapt=False) for image in batches[0]])
    torch.testing.assert_close(adapted(batches[0], adapt=False), one_by_one, rtol=1e-12, atol=1e-12)
    together = MEMO(views=2, joint=True).wrap(small_net())(batches[0], adapt=False)
    assert (together - one_by_one).abs().max() > 1e-5


def test_of_memo_is_one_image_where_a_layer_carries_its_forward(batches):
    net = small_net()
    net[1].forward = net[1].forward
    adapted, ordinary = (MEMO(views=2).wrap(network) for network in (net, small_net()))
    image = batches[0][:1]
    torch.testing.assert_close(adapted(image, adapt=False), ordinary(image, adapt=False))
    with pytest.raises(TypeError, match="predict one image a batch"):
        adapted(batches[0], adapt=False)


def test_measures_nothing_for_later_batches(batches):
    read = []

    def source():
        read.append(True)
        return iter(batches)

    class Images:
        __iter__ = staticmethod(source)

    adapted = EATA(source=Images()).wrap(small_net())
    adapted(batches[0], adapt=False)
    assert not read
    adapted(batches[0])
    assert read


class Careless(Adapter):
    """Changes its state in a prediction, and leaves statistics that move in force."""

    def configure(self, net):
        net.set_norm_mode("ema")
        self._count = torch.zeros(())

    def method_state(self):
        return {"count": self._count}

    def adapt(self, net, images):
        return self.predict(net, images)

    def predict(self, net, images):
        self._count += 1
        torch.rand(3)
        return super().predict(net, images)


def test_undoes_what_a_method_changes(batches):
    adapted = Careless().wrap(small_net())
    adapted(batches[0])
    before = everything(adapted)
    adapted(batches[1], adapt=False)
    check_same(everything(adapted), before)


@pytest.mark.parametrize("policy", ["error", "skip", "source"])
def test_of_a_bad_batch_follows_the_policy_and_counts_nothing(policy, batches):
    adapted = Tent(lr=0.1, on_bad_batch=policy).wrap(small_net())
    adapted(batches[0])
    before = everything(adapted)
    bad = batches[1].clone()
    bad[0, 0, 0, 0] = torch.nan
    if policy == "error":
        with pytest.raises(ValueError, match="1 of 6 images"):
            adapted(bad, adapt=False)
    else:
        logits = adapted(bad, adapt=False)
        repaired = bad.nan_to_num()
        expected = small_net()(repaired) if policy == "source" else adapted(repaired, adapt=False)
        assert torch.equal(logits, expected)
    check_same(everything(adapted), before)


def test_of_a_spoiled_model_is_the_source_and_the_next_batch_recovers(batches):
    adapted = Tent(lr=0.1).wrap(small_net())
    adapted(batches[0])
    adapted.engine.net.parameters[0].data.fill_(torch.nan)
    adapted.engine.net.guard.moved = True
    assert torch.equal(adapted(batches[1], adapt=False), small_net()(batches[1]))
    with pytest.warns(UserWarning, match="continues from the source"):
        adapted(batches[1])
    assert adapted.engine.recoveries == 1


def test_that_fails_changes_nothing(batches):
    adapted = Tent(lr=0.1).wrap(small_net())
    with pytest.raises(RuntimeError):
        adapted(batches[0][:, :2], adapt=False)
    adapted(batches[0])
    before = everything(adapted)
    with pytest.raises(RuntimeError):
        adapted(batches[0][:, :2], adapt=False)
    check_same(everything(adapted), before)


def test_keeps_the_structure_of_the_output(batches):
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, images, scale=1.0):
            logits = self.net(images) * scale
            return {"logits": logits, "doubled": 2 * logits}

    adapted = Tent().wrap(Answers())
    answer = adapted(batches[0], adapt=False, scale=3.0)
    assert torch.equal(answer["doubled"], 2 * answer["logits"])
    torch.testing.assert_close(answer["logits"], 3 * adapted(batches[0], adapt=False)["logits"])
