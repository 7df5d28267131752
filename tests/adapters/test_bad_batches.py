"""Batches that a network cannot take: what each policy does, for every method, and that no model is spoiled."""

from __future__ import annotations

import warnings

import lightning
import pytest
import timm
import torch
from support.images import with_nan
from support.methods import KINDS, QUICK, methods
from torch import nn

import ttalight
from ttalight.adapters import EMABN, Source, Tent
from ttalight.callbacks import AdaptationCheckpoint, Recorder
from ttalight.data import DigitsDataModule
from ttalight.tasks import SupervisedTask

METHODS = methods(QUICK)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*runs with its settings for CIFAR", "ignore:.*source", "ignore:.*on_bad_batch", "ignore:.*statistics"
)


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(5, 6, 3, 16, 16, generator=generator, dtype=torch.float64)


DAMAGE = {
    "NaN": (with_nan, ValueError, "2 of 6 images in batch 1 of visit 0"),
    "infinite": (lambda x: x.index_fill(0, torch.tensor([2]), float("-inf")), ValueError, "1 of 6 images in batch 1"),
    "bytes": (lambda x: (x * 255).to(torch.uint8), TypeError, r"got torch.uint8: use images.float\(\) / 255"),
}


def check_bad_batch(method, make_net, batches, damage, policies):
    """Later batches are what they would be, but for random draws, which are keyed by the place in the stream."""
    spoil, error, message = DAMAGE[damage]
    clean = method(reset="never").wrap(make_net())
    expected = [clean(batches[0])]
    clean.engine.net.counters.batch += "error" not in policies  # the keys of the draws that follow
    expected += [clean(batch) for batch in batches[2:]]
    for policy in policies:
        dirty = method(reset="never", on_bad_batch=policy).wrap(make_net())
        assert torch.equal(dirty(batches[0]), expected[0])
        if policy == "error":
            with pytest.raises(error, match=message):
                dirty(spoil(batches[1]))
        else:
            logits = dirty(spoil(batches[1]))
            assert torch.isfinite(logits).all()
            assert logits.shape == (6, 4)
            assert dirty.engine.bad_batches == 1
        assert all(map(torch.equal, map(dirty, batches[2:]), expected[1:])), policy


def test_bad_batch_leaves_later_batches_unchanged(method, make_net, batches):
    check_bad_batch(method, make_net, batches, "NaN", ["skip", "source"])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("damage", "policy"), [("NaN", "error"), ("infinite", "error"), ("bytes", "error"), ("bytes", "skip")]
)
def test_every_fault_leaves_later_batches_unchanged(name, make_net, batches, damage, policy):
    check_bad_batch(METHODS[name], make_net, batches, damage, [policy])


def test_first_of_all_comes_a_bad_batch(method, make_net, batches):
    clean, dirty = method(reset="never").wrap(make_net()), method(reset="never", on_bad_batch="skip").wrap(make_net())
    plain = make_net()
    repaired = with_nan(batches[0]).nan_to_num(0, 0, 0)
    torch.testing.assert_close(dirty(with_nan(batches[0])), plain(repaired).detach())
    clean.engine.announce()
    clean.engine.net.counters.batch = 1
    assert torch.equal(clean(batches[1]), dirty(batches[1]))


def test_source_is_the_source_model(method, make_net, batches):
    adapted = method(reset="never", on_bad_batch="source").wrap(make_net())
    for batch in batches[:3]:
        adapted(batch)
    expected = make_net()(with_nan(batches[3]).nan_to_num(0, 0, 0)).detach()
    torch.testing.assert_close(adapted(with_nan(batches[3])), expected, rtol=1e-6, atol=1e-6)


def test_skip_is_the_adapted_model(make_net, batches):
    adapted = Tent(lr=0.1, reset="never", on_bad_batch="skip").wrap(make_net())
    twin = Tent(lr=0.1, reset="never").wrap(make_net())
    for batch in batches[:3]:
        adapted(batch), twin(batch)
    bytes_ = (batches[3] * 255).to(torch.uint8)
    expected = twin(bytes_.double() / 255)  # Tent predicts before it steps
    torch.testing.assert_close(adapted(bytes_), expected)
    assert (adapted(bytes_) - make_net()(bytes_.double() / 255)).abs().max() > 1e-3


def test_skip_reads_statistics_and_updates_none(make_net, batches):
    adapted = EMABN(reset="never", on_bad_batch="skip").wrap(make_net())
    adapted(batches[0])
    before = adapted.state_dict()["tensors"]
    moved = adapted.module.eval()
    adapted(with_nan(batches[1]))
    after = adapted.state_dict()["tensors"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert moved is adapted.module


def test_a_size_that_the_network_does_not_take(batches):
    torch.manual_seed(0)
    batches = torch.nn.functional.interpolate(batches.flatten(0, 1), 32).unflatten(0, (5, 6))
    small = batches[1][..., :12, :12]
    net = timm.create_model("test_vit", num_classes=4, img_size=32).double()
    adapted = Tent(reset="never").wrap(net)
    adapted(batches[0])
    with pytest.raises(ValueError, match=r"of shape \(3, 12, 12\) came after those of \(3, 32, 32\), and the network"):
        adapted(small)
    adapted.release()
    for policy in ("skip", "source"):
        adapted = Tent(reset="never", on_bad_batch=policy).wrap(net)
        adapted(batches[0])
        assert adapted(small).shape == (6, 4)
        assert adapted.engine.bad_batches == 1
        adapted.release()


def test_a_size_that_the_network_takes_is_adapted_to(make_net, batches):
    adapted = Tent(reset="never", on_bad_batch="skip").wrap(make_net())
    twin = Tent(reset="never").wrap(make_net())
    for batch in (batches[0], batches[1][..., :12, :12], batches[2], batches[3][..., :12, :12]):
        assert torch.equal(adapted(batch), twin(batch))
    assert adapted.engine.bad_batches == 0
    assert adapted.engine.updates == 4


ODD = {
    "constant": lambda x: torch.full_like(x, 0.5),
    "black": torch.zeros_like,
    "one class": lambda x: x[:1].expand_as(x).contiguous(),
    "enormous": lambda x: x * 1e200,
    "hardly any": lambda x: x * 1e-300,
    "one image": lambda x: x[:1],
}


def test_the_model_stays_finite(method, make_net, batches):
    adapted = method(reset="never").wrap(make_net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(batches[0])
        for odd, spoil in ODD.items():
            adapted(spoil(batches[1]))
            state = adapted.state_dict()["tensors"]
            for name, value in state.items():
                if value.is_floating_point() and not name.startswith("method."):
                    assert torch.isfinite(value).all(), (odd, name)
            assert all(torch.isfinite(parameter).all() for parameter in adapted.module.parameters())
            assert all(torch.isfinite(buffer).all() for buffer in adapted.module.buffers())
        assert torch.isfinite(adapted(batches[2])).all()


def test_spoiled_model_restores_source_with_warning(make_net, batches):
    adapted, twin = EMABN(reset="never").wrap(make_net()), EMABN(reset="never").wrap(make_net())
    adapted(batches[0])
    adapted(batches[1] * 1e200)  # the variance is infinite
    with pytest.warns(UserWarning, match="EMABN has left weights or statistics that are not finite, before batch 2"):
        logits = adapted(batches[2])
    assert adapted.engine.recoveries == 1
    assert torch.equal(logits, make_net().eval()(batches[2]))  # the source predicts this one batch
    assert torch.equal(adapted(batches[3]), twin(batches[3]))


def test_nothing_recovers_where_nothing_is_wrong(method, make_net, batches):
    adapted = method(reset="never").wrap(make_net())
    for batch in batches:
        adapted(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.state_dict()
    assert adapted.engine.recoveries == 0


@pytest.mark.parametrize("images", [torch.zeros(0, 3, 32, 32), torch.zeros(2, 3, 0, 32)])
def test_no_pixels(net, images):
    with pytest.raises(ValueError, match=r"has no pixels: leave it out of the stream"):
        Tent(on_bad_batch="skip").wrap(net)(images.double())


def test_other_types_are_an_error_always(net, batches):
    with pytest.raises(TypeError, match=r"got torch\.int64: convert them first"):
        Tent(on_bad_batch="skip").wrap(net)(batches[0].long())


def test_protocol_names_the_policy():
    assert "on_bad_batch" not in Tent().protocol()
    assert Tent(on_bad_batch="skip").protocol()["on_bad_batch"] == "skip"


class Dirty(DigitsDataModule):
    """Digits of which the batches named are damaged."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        super().__init__(batch_size=10, domains=["clean", "contrast"], limit=30)
        self.bad = bad
        self.seen = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.start_batch + self.seen in self.bad:
            images[3, 0, 5, 5] = float("nan")
        self.seen += 1
        return images, labels


class Stop(lightning.Callback):
    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 3:
            raise KeyError("stopped")


class TestRuns:
    """Through the trainer, on a task of this package; a bad batch may be the first one."""

    def run(self, folder, adapter, bad, *callbacks, resume=False):
        torch.manual_seed(0)
        trainer = ttalight.Trainer(
            default_root_dir=str(folder), accelerator="cpu", enable_progress_bar=False,
            callbacks=[Recorder(predictions=True), AdaptationCheckpoint(every=1), *callbacks],
        )  # fmt: skip
        task = SupervisedTask(encoder="cifar_resnet8")
        return trainer.adapt(task, Dirty(bad), adapter, resume=str(folder) if resume else None)

    @pytest.mark.parametrize("policy", ["skip", "source"])
    def test_counted_in_the_results(self, policy, tmp_path):
        with pytest.warns(UserWarning, match="1 of 10 images in batch 0 of visit 0"):
            results = self.run(tmp_path, Tent(on_bad_batch=policy), (0, 4))
        assert results["bad_batches"] == 2
        assert results["complete"] is True
        assert results["protocol"]["on_bad_batch"] == policy
        assert all(row["nll"] is not None and row["samples"] == 30 for row in results["domains"])

    def test_the_default_stops(self, tmp_path):
        with pytest.raises(ValueError, match="1 of 10 images in batch 0 of visit 0"):
            self.run(tmp_path, Source(), (0,))

    def test_all_batches_of_a_domain(self, tmp_path):
        results = self.run(tmp_path, EMABN(on_bad_batch="skip", reset="batch", steps=2, read_at=[1]), (3, 4, 5))
        assert results["bad_batches"] == 3
        assert [row["samples"] for row in results["readings"][0]["domains"]] == [30, 30]

    def test_a_resumed_run_counts_on(self, tmp_path):
        whole = self.run(tmp_path / "whole", Tent(on_bad_batch="skip"), (1, 2, 4))
        with pytest.raises(KeyError):
            self.run(tmp_path / "part", Tent(on_bad_batch="skip"), (1, 2, 4), Stop())
        resumed = self.run(tmp_path / "part", Tent(on_bad_batch="skip"), (1, 2, 4), resume=True)
        assert resumed["bad_batches"] == whole["bad_batches"] == 3
        files = [tmp_path / name / "predictions.npz" for name in ("whole", "part")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_network_that_answers_nan_leaves_no_trace(method, make_net, batches, breaks):
    """Images that are finite, answers that are not."""
    spoiled = nn.Sequential(breaks(make_net()))
    adapted = method(reset="never").wrap(spoiled)
    odd = batches[1].clone()
    odd[0] = 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in (batches[0], odd, batches[2]):
            adapted(batch)
        adapted.state_dict()
    adapted_parts = (*adapted.module.parameters(), *adapted.module.buffers())
    assert all(torch.isfinite(tensor).all() for tensor in adapted_parts)
