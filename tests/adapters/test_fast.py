"""The option ``fast``: other ways to make the same passes, and the way back where there is none."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import lightning
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ttalight.adapters import EATA, EMABN, SAR, T3A, DeYO, Tent
from ttalight.models.passes.fast_pass import FastPass
from ttalight.reporting import read_results
from ttalight.trainer import Trainer

METHODS = {
    "Tent": lambda images, **kwargs: Tent(lr=0.01, **kwargs),
    "EATA": lambda images, **kwargs: EATA(lr=0.01, margin=1.0, redundancy=1.0, source=[images], **kwargs),
    "SAR": lambda images, **kwargs: SAR(lr=0.01, margin=1.0, recovery=0.0, **kwargs),
    "DeYO": lambda images, **kwargs: DeYO(lr=0.01, margin=1.0, weight_margin=1.0, threshold=-0.9, **kwargs),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def compiled(monkeypatch):
    """Let the compiled way win; tracing alone is what a test of the adapters needs, and takes no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(FastPass, "_seconds", lambda self, way, images: 1.0 + (way != "torch.compile"))


def fail(*args, **kwargs):
    raise RuntimeError("no compiler here\nand more lines")


class TestCompiled:
    def test_networks_of_one_class_keep_their_own_features(self, compiled, make_net, images):
        Tent(passes=FastPass()).wrap(make_net())(images)  # needs none
        own, fast = T3A().wrap(make_net()), T3A(passes=FastPass()).wrap(make_net())
        for batch in (images, images * 0.5):
            torch.testing.assert_close(fast(batch), own(batch), rtol=1e-8, atol=1e-8)
        assert fast.engine.net.run.chosen == ["torch.compile"]

    def test_gives_the_numbers_of_eager_passes(self, compiled, method, make_net, images):
        own, fast = method(images).wrap(make_net()), method(images, passes=FastPass()).wrap(make_net())
        for batch in (images, images.flip(0) * 0.5, images[:3], images + 0.1):
            torch.testing.assert_close(fast(batch), own(batch), rtol=1e-8, atol=1e-8)
        assert set(fast.engine.net.run.chosen) == {"torch.compile"}
        assert fast.engine.updates == own.engine.updates > 0
        assert fast.engine.net.forwards == own.engine.net.forwards

    def test_masked_classes_are_not_compared(self, compiled, make_net, images):
        class Masked(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = make_net()

            def forward(self, images):
                return self.net(images) + torch.tensor([0.0, 0.0, 0.0, -torch.inf])

        own, fast = Tent(lr=0.01).wrap(Masked()), Tent(lr=0.01, passes=FastPass()).wrap(Masked())
        for batch in (images, images * 0.5):
            torch.testing.assert_close(fast(batch), own(batch), rtol=1e-8, atol=1e-8)
        assert set(fast.engine.net.run.chosen) == {"torch.compile"}

    def test_resets_continues_and_releases(self, compiled, method, make_net, images, state_of, same_state):
        net = make_net()
        before = state_of(net)
        fast = method(images, passes=FastPass()).wrap(net)
        first = fast(images)
        fast.reset()
        fast.engine.net.counters.visit, fast.engine.net.counters.batch = 0, 0  # the draws of the first time
        assert torch.equal(fast(images), first)
        own = method(images).wrap(make_net())
        own.load_state_dict(fast.state_dict())
        torch.testing.assert_close(own(images), fast(images), rtol=1e-8, atol=1e-8)
        fast.release()
        same_state(net, before)

    def test_copies_adapt_on_their_own(self, compiled, make_net, images):
        fast = Tent(lr=0.01, passes=FastPass()).wrap(make_net())
        fast(images)
        copied, unpickled = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
        expected = fast(images)
        assert torch.equal(copied(images), expected)
        assert torch.equal(unpickled(images), expected)

    def test_a_trial_moves_no_statistics(self, compiled, make_net, images):
        own, fast = EMABN().wrap(make_net()), EMABN(passes=FastPass()).wrap(make_net())
        for batch in (images, images * 0.5):
            torch.testing.assert_close(fast(batch), own(batch), rtol=1e-8, atol=1e-8)
        for mine, theirs in zip(fast.module.buffers(), own.module.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)

    def test_batch_of_another_size_runs_uncompiled(self, compiled, make_net, images, monkeypatch):
        fast = Tent(passes=FastPass()).wrap(make_net())
        fast(images)
        traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        fast.module[0].stride = (2, 2)  # what was traced does not fit any more
        own = Tent().wrap(make_net())
        own.module[0].stride = (2, 2)
        own.load_state_dict(fast.state_dict())
        torch.testing.assert_close(fast(images), own(images), rtol=1e-8, atol=1e-8)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced


@pytest.mark.slow
def test_with_the_compiler_of_this_machine(make_net, images, monkeypatch):
    monkeypatch.setattr(FastPass, "_seconds", lambda self, way, images: 1.0 + (way != "torch.compile"))
    own, fast = Tent(lr=0.01).wrap(make_net().float()), Tent(lr=0.01, passes=FastPass()).wrap(make_net().float())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in (images.float(), images.flip(0).float() * 0.5):
            torch.testing.assert_close(fast(batch), own(batch), rtol=1e-4, atol=1e-4)
    if any("torch.compile fails" in str(warning.message) for warning in caught):
        pytest.skip("no compiler that torch.compile can use")
    assert fast.engine.net.run.chosen == ["torch.compile"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(method, make_net, images):
    images = images.float().cuda()
    policies = (None, FastPass())
    own, fast = (method(images, passes=policy).wrap(make_net().float().cuda()) for policy in policies)
    for batch in (images, images.flip(0) * 0.5):
        torch.testing.assert_close(fast(batch), own(batch), rtol=1e-3, atol=1e-3)


class TestChannelsLast:
    @pytest.fixture(autouse=True)
    def _channels_last_wins(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", fail)
        monkeypatch.setattr(FastPass, "_seconds", lambda self, way, images: 1.0 + (way != "channels_last"))

    def test_gives_the_numbers_of_the_default_layout(self, method, make_net, images):
        own, fast = method(images).wrap(make_net()), method(images, passes=FastPass()).wrap(make_net())
        for batch in (images, images.flip(0) * 0.5, images[:3], images + 0.1):
            torch.testing.assert_close(fast(batch), own(batch), rtol=1e-8, atol=1e-8)
        assert set(fast.engine.net.run.chosen) == {"channels_last"}
        assert fast.engine.updates == own.engine.updates > 0
        assert not any(norm.exact for norm in fast.engine.net.norms)

    def test_sums_statistics_exactly(self, make_net, images):
        """Torch's own sums of this layout cost digits."""
        fast = Tent(passes=FastPass()).wrap(make_net())
        fast(images)
        norms, seen = fast.engine.net.norms, []
        fast.module[0].register_forward_pre_hook(lambda *_: seen.append([norm.exact for norm in norms]))
        fast(images)
        assert seen == [[True, True]]


class TestFallback:
    @pytest.fixture(autouse=True)
    def _own_is_fastest(self, monkeypatch):
        monkeypatch.setattr(FastPass, "_seconds", lambda self, way, images: 1.0 + (way != "own"))

    def run(self, make_net, images):
        own, fast = Tent(lr=0.01).wrap(make_net()), Tent(lr=0.01, passes=FastPass()).wrap(make_net())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in (images, images * 0.5, images[:1]):
                assert torch.equal(fast(batch), own(batch))
        assert set(fast.engine.net.run.chosen) == {"own"}
        (warning,) = [str(one.message) for one in caught if "FastPass changes nothing" in str(one.message)]
        return warning

    def test_where_compiling_fails(self, make_net, images, monkeypatch):
        monkeypatch.setattr(torch, "compile", fail)
        assert "torch.compile fails (RuntimeError: no compiler here); channels_last is no faster" in self.run(
            make_net, images
        )

    def test_where_numbers_differ(self, make_net, images, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda forward, **kwargs: lambda images: 1.001 * forward(images))
        assert "torch.compile gives other logits (by 1e-03" in self.run(make_net, images)

    def test_where_gradients_differ(self, make_net, images, monkeypatch):
        def halve(forward, **kwargs):
            def way(images):
                logits = forward(images)
                return (logits + logits.detach()) / 2

            return way

        monkeypatch.setattr(torch, "compile", halve)
        assert "torch.compile gives other gradients (by 5e-01" in self.run(make_net, images)


class Dropped(torch.nn.Module):
    """Draws random numbers in every pass, and offsets its logits."""

    def __init__(self, net, offset=0.0):
        super().__init__()
        self.net, self.offset = net.float(), offset

    def forward(self, images):
        logits = torch.nn.functional.dropout(self.net(images), 0.1)
        return logits + torch.tensor(self.offset, dtype=torch.bfloat16 if torch.is_autocast_enabled("cpu") else None)


class TestPrecision:
    @pytest.fixture(autouse=True)
    def _bfloat16_wins(self, monkeypatch):
        monkeypatch.setattr(FastPass, "_seconds", lambda self, way, images: 1.0 + (way != "bf16 own"))

    def run(self, make_net, images, offset=0.0, **options):
        torch.manual_seed(0)
        adapted = Tent(lr=0.01, passes=FastPass(compile=False, **options)).wrap(Dropped(make_net(), offset))
        logits = [adapted(batch) for batch in (images.float(), images.flip(0).float() * 0.5)]
        return adapted, logits

    def expect(self, make_net, images, offset=0.0, bf16=False):
        torch.manual_seed(0)
        adapted = Tent(lr=0.01).wrap(Dropped(make_net(), offset))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return [adapted(batch) for batch in (images.float(), images.flip(0).float() * 0.5)]

    @pytest.mark.parametrize("precision", ["auto", "bf16-mixed"])
    def test_gives_the_numbers_of_autocast(self, make_net, images, precision):
        adapted, logits = self.run(make_net, images, precision=precision)
        assert set(adapted.engine.net.run.chosen) == {"bf16 own"}
        for mine, theirs in zip(logits, self.expect(make_net, images, bf16=True), strict=True):
            assert torch.equal(mine, theirs)
        assert adapted.report().passes == "bf16 own"

    def test_a_trial_leaves_no_trace_where_predictions_differ(self, make_net, images):
        with pytest.warns(UserWarning, match="predicts .* of 6 images differently"):
            adapted, logits = self.run(make_net, images, offset=1000.0, precision="auto")
        drawn = torch.get_rng_state()
        assert set(adapted.engine.net.run.chosen) == {"own"}
        for mine, theirs in zip(logits, self.expect(make_net, images, offset=1000.0), strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(torch.get_rng_state(), drawn)

    def test_a_little_faster_is_not_enough(self, make_net, images, monkeypatch):
        monkeypatch.setattr(FastPass, "_seconds", lambda self, way, images: 0.9 if way == "bf16 own" else 1.0)
        adapted, _ = self.run(make_net, images, precision="auto")
        assert set(adapted.engine.net.run.chosen) == {"own"}

    def test_a_restored_state_has_its_ways(self, make_net, images, monkeypatch):
        adapted, _ = self.run(make_net, images, precision="auto")
        state = adapted.state_dict()
        torch.manual_seed(0)
        expected = adapted(images.float())
        monkeypatch.setattr(FastPass, "_fastest", fail)
        other = Tent(lr=0.01, passes=FastPass("auto", compile=False)).wrap(Dropped(make_net()))
        other.load_state_dict(state)
        torch.manual_seed(0)
        assert torch.equal(other(images.float()), expected)
        assert other.state_dict()["ways"] == state["ways"]
        state["ways"] = {"images": ["own", 3]}
        with pytest.raises(ValueError, match="ways"):
            other.load_state_dict(state)

    def test_results_say_what_was_chosen(self, make_net, images, tmp_path):
        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = make_net().float()

            def forward(self, images):
                return self.net(images)

            def test_step(self, batch, batch_idx):
                self(batch[0])

        trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
        loader = torch.utils.data.DataLoader([(image, 0) for image in images.float()], batch_size=3)
        policy = FastPass("auto", compile=False, agreement=0.5)
        results = trainer.adapt(Module(), adapter=Tent(passes=policy), dataloaders=loader)
        assert results["protocol"]["passes"] == "FastPass(precision='auto', compile=False, agreement=0.5)"
        ((kind, way),) = read_results(tmp_path)["passes"].items()
        assert (
            kind == f"images of {'x'.join(map(str, images.shape[1:]))}, float32 on cpu, gradients, norm layers 2 batch"
        )
        assert way.startswith("bf16 own: ")
        assert way in str(results)

    @pytest.mark.parametrize("arguments", [{"precision": "16"}, {"agreement": 0.0}, {"agreement": 1.5}])
    def test_arguments_out_of_range(self, arguments):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            FastPass(**arguments)


class ConvolutionGradients(TorchDispatchMode):
    """Notes which gradients each convolution computes: of its input, weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


def test_convolutions_compute_no_gradients_of_weights(method, make_net, images):
    adapted = method(images).wrap(make_net())
    with ConvolutionGradients() as seen:
        adapted(images)
    assert seen.masks
    assert set(seen.masks) == {(True, False, False)}  # nor does the first one that of the images: it is not there
    free = [parameter for parameter in adapted.module.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in free} == {id(parameter) for parameter in adapted.engine.net.parameters}
    assert all(parameter.grad is None for parameter in adapted.module.parameters())
