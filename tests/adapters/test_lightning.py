"""Adapters as callbacks: on any module, in every evaluation loop, and when things go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ttalight
from ttalight.adapters import EMABN, PTBN, Source, Tent

METHODS = [Source, PTBN, EMABN, Tent]


class Plain(lightning.LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[torch.Tensor] = []

    def forward(self, images):
        return self.net(images)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        images, labels = batch
        logits = self(images)
        assert torch.equal(self(images), logits)  # a second call with the same tensor does not adapt again
        self.seen.append(logits)
        self.log("accuracy", (logits.argmax(1) == labels).double().mean())

    def validation_step(self, batch, batch_idx):
        self.seen.append(self(batch[0]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def loader(images):
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    return DataLoader(TensorDataset(images, labels), batch_size=4)  # batches of 4 and 2


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks, **kwargs):
        return lightning.Trainer(
            accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False, max_epochs=1,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **kwargs,
        )  # fmt: skip

    return make


@pytest.fixture
def expected(make_net, loader):
    """Logits of the method through wrap()."""

    def run(method, **kwargs):
        adapted = method(**kwargs).wrap(make_net())
        return [adapted(images) for images, _ in loader]

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", ["test", "validate", "predict"])
def test_every_loop_gives_what_wrap_gives(method, loop, net, loader, trainer, expected, state_of, same_state):
    module = Plain(net)
    before = state_of(net)
    predictions = getattr(trainer(method()), loop)(module, loader)
    predictions = predictions if loop == "predict" else module.seen
    assert all(map(torch.equal, predictions, expected(method)))
    same_state(net, before)
    assert "forward" not in vars(module)


def test_the_adapted_weights_stay_with_the_adapter(net, loader, trainer):
    adapter = Tent(lr=0.1)
    source = net[1].weight.detach().clone()
    trainer(adapter).test(Plain(net), loader)
    adapted = adapter.state_dict()["tensors"]["net.1.weight"]
    assert torch.equal(net[1].weight, source)
    assert not torch.equal(adapted, source)


def test_a_second_run_starts_from_the_source(net, loader, trainer):
    module, adapter = Plain(net), Tent(lr=0.1)
    trainer(adapter).test(module, loader)
    trainer(adapter).test(module, loader)
    assert all(map(torch.equal, module.seen[:2], module.seen[2:]))


def test_a_loaded_state_is_where_the_next_run_starts(net, loader, trainer):
    module, adapter, other = Plain(net), Tent(lr=0.1), Tent(lr=0.1, reset="never")
    run = trainer(adapter)
    run.test(module, loader)
    other.load_state_dict(adapter.state_dict())
    trainer(other).test(module, loader)
    adapted = Tent(lr=0.1).wrap(net)
    for images, _ in [*loader, *loader]:
        logits = adapted(images)
    assert torch.equal(module.seen[-1], logits)


def test_inert_inside_fit(make_net, loader, trainer):
    plain, watched = Plain(make_net(dropout=0.0)), Plain(make_net(dropout=0.0))
    trainer().fit(plain, loader, loader)
    trainer(Tent(lr=1.0)).fit(watched, loader, loader)
    assert all(map(torch.equal, plain.state_dict().values(), watched.state_dict().values()))
    assert all(map(torch.equal, plain.seen, watched.seen))


def test_labels_cannot_reach_an_adapter(net, images, trainer):
    module = Plain(net)
    for labels in (torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 1, 0, 2, 2])):
        trainer(Tent(lr=0.1)).test(module, DataLoader(TensorDataset(images, labels), batch_size=4))
    assert all(map(torch.equal, module.seen[:2], module.seen[2:]))


def test_gradients_need_no_flag(net, loader, trainer):
    adapter = Tent(lr=0.1)
    run = trainer(adapter, inference_mode=True)
    run.test(Plain(net), loader)
    assert adapter.state_dict()["counters"]["updates"] == 2
    assert run.test_loop.inference_mode is True  # given back


@pytest.mark.parametrize("compiled", ["module", "submodule"])
def test_compiled_modules_move_as_eager_ones(compiled, net, loader, trainer, expected):
    module = Plain(net)
    if compiled == "module":
        model = torch.compile(module, backend="aot_eager")
    else:
        model = module
        net.compile(backend="aot_eager")
    trainer(Tent(lr=0.1)).test(model, loader)
    for logits, wanted in zip(module.seen, expected(Tent, lr=0.1), strict=True):
        torch.testing.assert_close(logits, wanted, rtol=1e-8, atol=1e-8)


def test_mixed_precision_is_of_passes_only(net, images, trainer):
    seen = []
    net.float()[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loader = DataLoader(TensorDataset(images.float(), torch.zeros(6, dtype=torch.int64)), batch_size=4)
    module = Plain(net)
    adapter = Tent(lr=0.1)
    trainer(adapter, precision="bf16-mixed").test(module, loader)
    assert set(seen) == {torch.bfloat16}
    assert {logits.dtype for logits in module.seen} == {torch.float32}
    assert adapter.state_dict()["counters"]["updates"] == 2


def test_several_loaders_are_domains(net, loader, trainer):
    module = Plain(net)
    trainer(Tent(lr=0.1)).test(module, [loader, loader])
    assert all(map(torch.equal, module.seen[:2], module.seen[2:]))
    module.seen.clear()
    trainer(Tent(lr=0.1, reset="never")).test(module, [loader, loader])
    assert not torch.equal(module.seen[0], module.seen[2])


class TestErrors:
    def test_a_step_that_bypasses_forward(self, net, loader, trainer, state_of, same_state):
        class Bypass(Plain):
            def test_step(self, batch, batch_idx):
                self.net(batch[0])

        before = state_of(net)
        with pytest.raises(
            RuntimeError, match=r"Tent was never reached: the step of Bypass does not call\s+self\(images\)"
        ):
            trainer(Tent()).test(Bypass(net), loader)
        same_state(net, before)

    def test_the_default_predict_step(self, net, loader, trainer):
        class Default(Plain):
            predict_step = lightning.LightningModule.predict_step

        with pytest.raises(TypeError, match=r"was given a list.*write predict_step"):
            trainer(PTBN()).predict(Default(net), loader)

    def test_two_adapters(self, net, loader, trainer):
        with pytest.raises(ValueError, match="exactly one adapter, got 2 among the callbacks: Tent, PTBN"):
            trainer(Tent(), PTBN()).test(Plain(net), loader)

    def test_a_model_without_logits(self, net, loader, trainer):
        class Pair(Plain):
            def forward(self, images):
                return self.net(images), 0

        with pytest.raises(
            TypeError, match=r"the model returned a tuple of 2 .*; adaptation reads logits of shape \(B, C\)"
        ):
            trainer(Tent()).test(Pair(net), loader)

    @pytest.mark.parametrize("where", ["test_step", "network"])
    def test_an_exception_leaves_the_model_as_it_was(self, where, net, loader, trainer, state_of, same_state):
        class Failing(Plain):
            def test_step(self, batch, batch_idx):
                self(batch[0])
                if batch_idx == 1 and where == "test_step":
                    raise KeyError("boom")

        calls = []

        def fail(*args):
            calls.append(args)
            if where == "network" and len(calls) == 2:
                raise KeyError("boom")

        before = state_of(net)
        handle = net[3].register_forward_hook(fail)
        module = Failing(net)
        with pytest.raises(KeyError, match="boom"):
            trainer(Tent(lr=0.1)).test(module, loader)
        handle.remove()
        same_state(net, before)
        assert "forward" not in vars(module)


@pytest.mark.slow
def test_sigint_leaves_the_model_as_it_was(tmp_path):
    script = textwrap.dedent("""
        import ttalight, lightning, torch, time, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have switched it off
        from torch import nn
        from torch.utils.data import DataLoader, TensorDataset
        from ttalight.adapters import Tent

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            def forward(self, x):
                return self.net(x)
            def test_step(self, batch, i):
                self(batch[0])
                print("step", flush=True)
                time.sleep(0.1)

        module = Module()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        loader = DataLoader(TensorDataset(torch.rand(400, 3, 8, 8)), batch_size=2)
        trainer = lightning.Trainer(accelerator="cpu", logger=False, callbacks=Tent(lr=0.1), enable_checkpointing=False,
                                    enable_progress_bar=False)
        try:
            trainer.test(module, loader)
        except (KeyboardInterrupt, SystemExit):
            pass
        same = all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        clean = "forward" not in vars(module) and "forward" not in vars(module.net[1])
        print("restored", same, clean, flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "step\n" and lines.count(line) == 3:
            process.send_signal(signal.SIGINT)
    assert "restored True True\n" in lines
    assert lines.count("step\n") < 100


def test_the_package_names_its_version():
    assert ttalight.__version__.count(".") == 2
