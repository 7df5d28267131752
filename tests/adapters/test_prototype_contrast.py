"""SANTA and RMT: source images, prototypes, projector, warm-up, replay. The formulas are in tests/reference."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from ttalight import Trainer
from ttalight.adapters import PTBN, RMT, SANTA
from ttalight.data import DigitsDataModule
from ttalight.tasks import SupervisedTask

METHODS = [SANTA, partial(RMT, warm_up=12, replay_weight=0.0)]
NO_SOURCE = "found no source images, so .*the rows of the classifier stand in"


@pytest.fixture
def pixels(images):
    return (images - 0.5) / 2


@pytest.fixture
def source(pixels):
    return [(pixels.flip(0), torch.tensor([0, 1, 1, 2, 0, 1]))]


def tensors(adapted):
    return adapted.engine.capture()["tensors"]


@pytest.mark.parametrize("method", METHODS, ids=["SANTA", "RMT"])
class TestSource:
    def test_labels_make_the_prototypes(self, method, make_net, pixels, source):
        adapted = method(source=source).wrap(make_net())
        adapted(pixels)
        net = make_net().train()
        net[8].eval()
        features = net[:9](source[0][0]).detach()
        expected = torch.stack([features[source[0][1] == label].mean(0) for label in range(3)])
        found = tensors(adapted)["method.prototypes"]
        torch.testing.assert_close(found[:3], expected, rtol=1e-9, atol=1e-9)
        assert not found[3].any()  # no image is of the last class

    def test_reads_no_more_than_it_needs(self, method, make_net, pixels, source):
        def batches():
            yield from source
            yield pixels
            pytest.fail("source_samples were there already")

        adapted = method(source=batches(), source_samples=8).wrap(make_net())
        adapted(pixels)
        images = [source[0], pixels[:2]]
        other = method(source=images).wrap(make_net())
        other(pixels)
        assert torch.equal(tensors(adapted)["method.prototypes"], tensors(other)["method.prototypes"])

    def test_a_state_brings_the_prototypes(self, method, make_net, pixels, source):
        adapted = method(source=source, seed=0).wrap(make_net())
        adapted(pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh = method(seed=0).wrap(make_net())
            fresh.load_state_dict(adapted.state_dict())
        for step in range(2):
            assert torch.equal(adapted(pixels[step:4]), fresh(pixels[step:4]))
        for each in (adapted, fresh):
            each.reset()
        assert torch.equal(adapted(pixels), fresh(pixels))

    def test_labels_that_are_no_classes_are_refused(self, method, make_net, pixels):
        source = [(pixels, torch.tensor([0, 1, 2, 3, 4, 0]))]
        with pytest.raises(ValueError, match="must be classes of the network, 0 to 3, got 0 to 4"):
            method(source=source).wrap(make_net())(pixels)

    def test_on_the_digits(self, method, tmp_path):
        task = SupervisedTask(encoder="cifar_resnet8")
        data = DigitsDataModule(batch_size=20, domains=["contrast"], limit=40)
        trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = trainer.adapt(task, data, method(source_samples=50))
        assert not [str(each.message) for each in caught if "found no source" in str(each.message)]
        assert results["protocol"]["prototypes"] == "source"
        assert results["protocol"]["source_samples"] == 50


@pytest.mark.parametrize("method", [SANTA, RMT])
def test_no_source_is_named_once(method, make_net, pixels):
    adapted = method().wrap(make_net())
    with pytest.warns(UserWarning, match=f"{method.__name__} {NO_SOURCE}"):
        adapted(pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(pixels)
    assert adapted.engine.method.protocol()["prototypes"] == "classifier"


@pytest.mark.filterwarnings("ignore:.*source")
class TestSANTA:
    def test_projector_is_drawn_by_the_seed(self, make_net, pixels):
        drawn = []
        for seed in (0, 0, 1):
            adapted = SANTA(seed=seed, lr=0.0).wrap(make_net())
            state = torch.get_rng_state()
            adapted(pixels)
            assert torch.equal(torch.get_rng_state(), state)
            drawn.append(torch.cat([value.detach().flatten() for value in adapted.engine.net.own.values()]))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert len(drawn[0]) == (8 + 1) * 128 + (128 + 1) * 128

    def test_scores_the_clean_images(self, make_net, pixels):
        adapted = SANTA(lr=0.0).wrap(make_net())
        torch.testing.assert_close(adapted(pixels), PTBN().wrap(make_net())(pixels))

    def test_the_anchor_stays_the_source(self, make_net, pixels, monkeypatch):
        monkeypatch.setattr(SANTA, "contrast_weight", 0.0)
        adapted = SANTA(lr=0.05, reset="never").wrap(make_net())
        anchor = PTBN().wrap(make_net())(pixels).log_softmax(1)
        for _ in range(4):
            adapted(pixels)
        adapted.engine.method._augmentation = lambda images, generator: images
        p = adapted(pixels, adapt=False).softmax(1)
        adapted(pixels)
        assert adapted.engine.last["loss"] == pytest.approx(-(p * anchor).sum(1).mean().item(), rel=1e-6)

    @pytest.mark.parametrize("source", [None, torch.zeros(1, 4, 3, 32, 32, dtype=torch.float64)])
    def test_refuses_dense_predictions(self, pixels, source):
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)).double()
        with pytest.raises(ValueError, match=r"SANTA compares .* got logits of shape \(\d, 4, 30, 30\): for dense"):
            SANTA(source=source).wrap(net)(pixels)


class TestRMT:
    def test_a_continued_state_replays_the_same_images(self, make_net, pixels, source):
        method = partial(RMT, seed=0, warm_up=12, reset="never")
        adapted = method(source=iter(source)).wrap(make_net())
        adapted(pixels)
        fresh, without = method(source=source).wrap(make_net()), method().wrap(make_net())
        for other in (fresh, without):
            other.load_state_dict(adapted.state_dict())
        copied = copy.deepcopy(adapted)
        for step in range(2):
            logits = adapted(pixels[step:4])
            assert torch.equal(fresh(pixels[step:4]), logits)
            assert torch.equal(copied(pixels[step:4]), logits)
        with pytest.warns(UserWarning, match=f"RMT {NO_SOURCE}"):
            without(pixels[:4])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            without(pixels[1:4])

    def test_a_warm_up_that_is_interrupted_leaves_no_trace(self, make_net, pixels, source, state_of, same_state):
        net, passes = make_net(), []
        before = state_of(net)
        adapted, other = (RMT(source=source, warm_up=24, seed=0).wrap(each) for each in (net, make_net()))

        def interrupt(module, inputs):
            passes.append(len(inputs[0]))
            if len(passes) == 8:
                raise KeyboardInterrupt

        with net.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
            adapted(pixels)
        assert all(torch.equal(value, before[0][name]) for name, value in net.state_dict().items())
        assert torch.equal(adapted(pixels), other(pixels))
        adapted.release()
        same_state(net, before)

    def test_other_outputs_are_those_of_the_student(self, make_net, pixels, source):
        class Both(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, images):
                logits = self.net(images)
                return {"logits": logits, "doubled": 2 * logits}

        student = PTBN().wrap(make_net())(pixels)
        answer = RMT(source=source, warm_up=0).wrap(Both(make_net()))(pixels)
        torch.testing.assert_close(answer["logits"], 2 * student)
        torch.testing.assert_close(answer["doubled"], 2 * student)
