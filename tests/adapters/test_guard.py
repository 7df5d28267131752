"""The look at what is not finite: in the first read of a step, or once in several batches."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import pytest
import torch
from torch import nn

import ttalight
from ttalight import adapters
from ttalight.adapters import CMF, EMABN, ETA, ROID, SAR, Adapter, DeYO, Tent, TestTimeTraining
from ttalight.adapters.parameter_vector import ParameterVector
from ttalight.data import DigitsDataModule
from ttalight.tasks import SupervisedTask

BASES = (adapters.GradientAdapter, adapters.SelfTrainingAdapter, TestTimeTraining)
OPEN = {
    "ETA": {"margin": 1.0, "redundancy": 0.99995},
    "EATA": {"margin": 1.0, "redundancy": 0.99995, "fisher": "stream", "fisher_samples": 8},
    "NCTTA": {"margin": 1.0},
    "MEMO": {"views": 3},
}
PATIENT = {
    name: functools.partial(value, **OPEN.get(name, {}))
    for name in adapters.__all__
    if isinstance(value := getattr(adapters, name), type)
    and issubclass(value, Adapter)
    and value not in (Adapter, *BASES)
    and not value.decides_on_host
    and name != "RDumb"  # counts updates until its reset
}

pytestmark = pytest.mark.filterwarnings("ignore:.*runs with its settings for CIFAR", "ignore:.*source")


@pytest.fixture(params=PATIENT)
def method(request):
    return PATIENT[request.param]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(7, 6, 3, 16, 16, generator=generator, dtype=torch.float64)


def with_nan(images):
    return images.index_fill(0, torch.tensor([1, 4]), float("nan"))


def weights_of(adapted):
    return torch.cat([value.flatten() for value in adapted.engine.net.parameters])


def window(method, every=3, **settings):
    return method(reset="never", guard_every=every, on_bad_batch="skip", **settings)


class TestInTheFirstRead:
    def test_an_error_that_bad_pixels_caused_is_the_bad_batch(self, make_net, batches):
        class Sorts(Tent):
            def adapt(self, net, images):
                if not images.isfinite().all():
                    raise torch.linalg.LinAlgError("no convergence")
                return super().adapt(net, images)

        adapted = Sorts(reset="never").wrap(make_net())
        adapted(batches[0])
        with pytest.raises(ValueError, match="2 of 6 images in batch 1 of visit 0"):
            adapted(with_nan(batches[1]))

    def test_any_other_error_stays(self, make_net, batches):
        class Fails(Tent):
            def adapt(self, net, images):
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            Fails().wrap(make_net())(batches[0])

    def test_a_spoiled_model_is_found_and_the_batch_adapted_to(self, make_net, batches):
        adapted, twin = (Tent(lr=0.05, reset="never").wrap(make_net()) for _ in range(2))
        adapted(batches[0]), twin(batches[0])
        with torch.no_grad():
            adapted.engine.net.parameters[0].fill_(float("nan"))
        twin.engine.recover()
        with pytest.warns(UserWarning, match="has left weights or statistics that are not finite, before batch 1"):
            logits = adapted(batches[1])
        assert torch.equal(logits, twin(batches[1]))
        assert torch.equal(weights_of(adapted), weights_of(twin))
        assert (adapted.engine.net.forwards, adapted.engine.backwards) == (2, 2)

    def test_weights_that_no_step_moved_are_not_looked_at_again(self, make_net, batches):
        """But those that some step of the batch has moved are, and the method's own state always is."""

        class Bright(Tent):
            def weigh(self, net, images, outputs):
                return (images.mean((1, 2, 3)) > 0.3).to(images.dtype)

        adapted = Bright(reset="never").wrap(make_net())
        guard = adapted.engine.bad.guard
        adapted(batches[0])
        assert guard.stayed is False
        adapted(batches[1] * 0.1)
        assert guard.stayed is True
        assert len(guard._questions(batches[2], touched=True)) == 1
        adapted(batches[2])
        assert len(guard._questions(batches[2], touched=True)) == 2

    def test_pixels_too_large_for_a_sum_are_adapted_to(self, make_net):
        net = nn.Sequential(nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3))
        images = torch.rand(4, 3, 2, 2) + 1
        images[0] *= 1e38
        adapted = Tent(reset="never").wrap(net)
        for _ in range(2):
            assert adapted(images).shape == (4, 3)
        assert (adapted.engine.updates + adapted.engine.skipped, adapted.engine.bad_batches) == (2, 0)

    @pytest.mark.parametrize("method", [EMABN, PATIENT["ETA"], adapters.T3A])
    def test_much_state_is_not_copied_but_looked_at_before(self, make_net, batches, monkeypatch, method):
        monkeypatch.setattr("ttalight.adapters.guard._MOST", 0)
        clean = method(reset="never").wrap(make_net())
        dirty = method(reset="never", on_bad_batch="skip").wrap(make_net())
        for images in batches[:2]:
            assert torch.equal(clean(images), dirty(images))
        assert torch.isfinite(dirty(with_nan(batches[2]))).all()
        assert dirty.engine.bad_batches == 1
        clean.engine.batch += 1
        assert torch.equal(clean(batches[3]), dirty(batches[3]))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda adapted: pickle.loads(pickle.dumps(adapted))])
    def test_a_copy_guards_its_own_tensors(self, make_net, batches, copied):
        for method in (EMABN, PATIENT["ETA"], adapters.T3A):
            clean = method(reset="never", on_bad_batch="skip").wrap(make_net())
            clean(batches[0]), clean(batches[1])
            dirty = copied(clean)
            dirty(with_nan(batches[2]))
            clean.engine.batch += 1
            assert torch.equal(dirty(batches[3]), clean(batches[3]))
        adapted = Tent(reset="never").wrap(make_net())
        adapted(batches[0])
        dirty = copied(adapted)
        with torch.no_grad():
            dirty.engine.net.parameters[0].fill_(float("nan"))
        with pytest.warns(UserWarning, match="has left weights or statistics that are not finite"):
            assert torch.isfinite(dirty(batches[1])).all()


class TestInAWindow:
    def test_gives_what_a_look_at_every_batch_gives(self, method, make_net, batches):
        usual, patient = method(reset="never").wrap(make_net()), window(method).wrap(make_net())
        for images in batches:
            torch.testing.assert_close(patient(images), usual(images), rtol=1e-9, atol=1e-9)
        patient.state_dict()  # looks at the last window
        usual, patient = usual.engine, patient.engine
        assert (patient.updates, patient.skipped) == (usual.updates, usual.skipped)
        assert usual.updates > 0 or not usual.net.parameters
        for one, other in zip(patient.live.values(), usual.live.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)

    def test_waits_once_a_window(self, method, make_net, batches, waits):
        settings = {"fisher": "source", "source": batches[:1]} if method.func is adapters.EATA else {}
        patient = window(method, **settings).wrap(make_net())
        for images in batches[:3]:  # configured, and a window full
            patient(images)
        counts = []
        for images in batches[3:6]:
            before = len(waits.read)
            with waits:
                patient(images)
            counts.append(len(waits.read) - before)
        assert counts == [0, 0, 1], waits.read
        assert not waits.masked

    @pytest.mark.parametrize("first", ["kept", "left out"])
    def test_a_step_that_keeps_no_sample_moves_nothing(self, make_net, batches, first):
        """Nor by momentum, nor its counter."""

        class Bright(Tent):
            def weigh(self, net, images, outputs):
                return (images.mean((1, 2, 3)) > 0.3).to(images.dtype)

        usual, patient = Bright(lr=0.05, reset="never").wrap(make_net()), window(Bright, lr=0.05).wrap(make_net())
        some = batches[1].clone()
        some[:3] *= 0.1
        for images in (
            batches[0] * (1 if first == "kept" else 0.1),
            batches[0] * 0.1,
            some,
            batches[2] * 0.1,
            batches[3],
        ):
            torch.testing.assert_close(patient(images), usual(images), rtol=1e-9, atol=1e-9)
        patient.state_dict()
        assert usual.engine.skipped == patient.engine.skipped >= 2
        assert usual.engine.updates == patient.engine.updates >= 2
        torch.testing.assert_close(weights_of(patient), weights_of(usual), rtol=1e-9, atol=1e-12)

    def test_a_bad_batch_moves_no_weight_and_is_named(self, make_net, batches):
        clean, dirty = Tent(lr=0.05, reset="never").wrap(make_net()), window(Tent, lr=0.05).wrap(make_net())
        for images in batches[:3]:
            clean(images), dirty(images)
        dirty(batches[3]), dirty(with_nan(batches[4]))
        with pytest.warns(UserWarning, match=r"batches 3 of visit 0 to 5 of visit 0 .* pixels: 4 of visit 0\. .* not"):
            dirty(batches[5])
        clean(batches[3]), clean(batches[5])
        torch.testing.assert_close(weights_of(dirty), weights_of(clean), rtol=1e-9, atol=1e-12)
        engine = dirty.engine
        assert (engine.updates, engine.skipped, engine.bad_batches) == (5, 1, 1)
        assert engine.last.keys() == {"loss", "grad_norm", "selected"}

    def test_a_spoiled_model_is_taken_back(self, make_net, batches):
        clean, dirty = EMABN(reset="never").wrap(make_net()), window(EMABN).wrap(make_net())
        for images in batches[:3]:
            clean(images), dirty(images)
        dirty(batches[3]), dirty(with_nan(batches[4]))
        with pytest.warns(UserWarning, match="pixels: 4 of visit 0. The model goes on from what it was before the fir"):
            dirty(batches[5])
        assert torch.equal(dirty(batches[6]), clean(batches[6]))

    def test_a_spoiled_optimizer_begins_anew(self, make_net, batches):
        sgd = functools.partial(torch.optim.RMSprop, lr=1e-3)  # which moves no vector, and so whatever comes
        dirty = window(Tent, every=2, optimizer=sgd).wrap(make_net())
        for images in batches[:2]:
            dirty(images)
        before = weights_of(dirty).detach().clone()
        dirty(batches[2])
        with pytest.warns(UserWarning, match="pixels: 3 of visit 0. The model goes on"):
            dirty(with_nan(batches[3]))
        assert torch.equal(weights_of(dirty), before)
        assert not dirty.engine.optimizer.state
        assert (dirty.engine.updates, dirty.engine.skipped) == (2, 2)
        assert torch.isfinite(dirty(batches[4])).all()

    def test_the_first_batch_is_looked_at_before_anything_is_made_of_it(self, make_net, batches):
        dirty = window(Tent).wrap(make_net())
        with pytest.warns(UserWarning, match="on_bad_batch"):
            assert torch.isfinite(dirty(with_nan(batches[0]))).all()
        assert dirty.engine.bad_batches == 1

    def test_a_boundary_and_a_state_close_a_window(self, make_net, batches):
        usual, patient = (Tent(lr=0.05, guard_every=every, on_bad_batch="skip").wrap(make_net()) for every in (1, 100))
        for images in batches[:2]:
            usual(images), patient(images)
        assert patient.state_dict()["counters"]["updates"] == 2
        for adapted in (usual, patient):
            adapted(batches[2])
            adapted.engine.announce()
            adapted(batches[3])
        assert patient.engine.updates == 3
        patient.reset()
        assert patient.engine.updates == 4
        patient(batches[4])
        patient(with_nan(batches[5]))
        with pytest.warns(UserWarning, match="batches 0 of visit 2 to 1 of visit 2"):
            patient.release()

    def test_a_state_from_the_middle_continues(self, make_net, batches):
        whole, first, second = (window(Tent, lr=0.05).wrap(make_net()) for _ in range(3))
        expected = [whole(images) for images in batches]
        for images in batches[:4]:
            first(images)
        second(batches[6])
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for images, logits in zip(batches[4:], expected[4:], strict=True):
            torch.testing.assert_close(second(images), logits, rtol=1e-9, atol=1e-9)
        eager = Tent(lr=0.05, reset="never").wrap(make_net())
        eager.load_state_dict(first.state_dict())
        torch.testing.assert_close(eager(batches[4]), expected[4], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(eager(batches[5]), expected[5], rtol=1e-9, atol=1e-9)

    def test_a_run(self, tmp_path):
        results = []
        for every in (1, 4):
            torch.manual_seed(0)
            task = SupervisedTask(encoder="cifar_resnet8", num_classes=10)
            trainer = ttalight.Trainer(
                default_root_dir=tmp_path / str(every), accelerator="cpu", logger=False, enable_progress_bar=False
            )
            data = DigitsDataModule(domains=["gaussian_noise", "contrast"], limit=64, batch_size=16)
            trainer.adapt(task, data, Tent(lr=0.01, guard_every=every, on_bad_batch="skip"))
            results.append(json.loads((tmp_path / str(every) / "results.json").read_text()))
        usual, patient = results
        assert patient["protocol"]["guard_every"] == 4
        assert "guard_every" not in usual["protocol"]
        assert [row["accuracy"] for row in patient["domains"]] == [row["accuracy"] for row in usual["domains"]]
        assert patient["mean"]["nll"] == pytest.approx(usual["mean"]["nll"], rel=1e-4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("method", "settings", "message"),
        [
            (SAR, {}, "waits for the device once in so many batches: SAR decides on the host in every step"),
            (DeYO, {}, "DeYO decides on the host"),
            (ROID, {}, "ROID decides on the host"),
            (CMF, {}, "CMF decides on the host"),
            (Tent, {"reset": 5}, "reset=5 counts updates in every step"),
            (ETA, {"repeat_kept": True}, "repeat_kept=True counts the kept samples"),
            (Tent, {"reset": "batch", "episode": "image"}, "episode='image' looks at every step"),
            (Tent, {"on_bad_batch": "error"}, "neither stop before it nor .* needs on_bad_batch='skip', got 'error'"),
        ],
    )
    def test_of_what_needs_the_host(self, make_net, method, settings, message):
        with pytest.raises(ValueError, match=message):
            method(**{"guard_every": 8, "on_bad_batch": "skip", **settings}).wrap(make_net())

    def test_of_no_batch(self):
        with pytest.raises(ValueError, match="guard_every must be at least 1, got 0"):
            Tent(guard_every=0)

    def test_of_filters_on_what_moves_as_no_vector(self, make_net, batches):
        adapted = window(ETA, optimizer=functools.partial(torch.optim.RMSprop, lr=1e-3)).wrap(make_net())
        with pytest.raises(ValueError, match=r"needs SGD, Adam or AdamW in their .* leave guard_every at 1"):
            adapted(batches[0])


OPTIMIZERS = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.1),
    "Adam, decay": functools.partial(torch.optim.Adam, lr=0.1, weight_decay=0.1, betas=(0.5, 0.9)),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "SGD": functools.partial(torch.optim.SGD, lr=0.1),
    "SGD, momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_that_may_not_be_moves_as_if_it_had_not_been(name, dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3,), (2, 2))]
    gradients = torch.randn(6, 7, generator=generator, dtype=dtype)
    moved = []
    for conditional in (False, True):
        parameters = [nn.Parameter(value.clone()) for value in values]
        vector = ParameterVector(parameters)
        optimizer = OPTIMIZERS[name]([vector.values])
        for number, gradient in enumerate(gradients):
            skipped = number in (0, 3)
            if conditional:
                # A gradient of a step that may not be can be anything.
                given = gradient * torch.nan if number == 3 else gradient
                vector.step(optimizer, given, when=torch.tensor(not skipped))
            elif not skipped:
                vector.step(optimizer, gradient)
        moved.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    assert not torch.allclose(moved[0], torch.cat([value.flatten() for value in values]), atol=1e-2)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=1e-7)
