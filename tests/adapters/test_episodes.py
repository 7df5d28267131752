"""Episodes of one image, computed side by side: the numbers of one after the other, and what cannot be had."""

from __future__ import annotations

import copy
import functools
import pickle

import lightning
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ttalight.adapters import ETA, MEMO, RPL, SAR, STAG, Tent, TestTimeTraining
from ttalight.adapters.episodes import Episodes
from ttalight.data import DigitsDataModule
from ttalight.losses import entropy
from ttalight.tasks import NCTTT, ClusT3, RotationTTT, SupervisedTask
from ttalight.trainer import Trainer

NETWORKS = {
    "batch_norm": lambda: timm.create_model("cifar_resnet20", num_classes=4),
    "group_norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ),
    "layer_norm": lambda: timm.create_model("test_vit", num_classes=4, img_size=32),
}


def make(network, dtype=torch.float64):
    torch.manual_seed(0)
    net = NETWORKS[network]().to(dtype).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net


def of_size(images, network):
    side = 32 if network == "layer_norm" else 16
    return images[:5, :, :side, :side].contiguous()


@pytest.fixture
def small(images):
    return images[:5, :, :16, :16].contiguous()


@pytest.fixture
def in_pieces(monkeypatch):
    """Three episodes at a time at most: chunks of 3 and 2 of five images."""
    sizes = []
    chunk = Episodes._chunk

    def counted(self, images, batch):
        sizes.append(len(images))
        return chunk(self, images, batch)

    room = Episodes._room
    monkeypatch.setattr(Episodes, "_room", lambda self, image: min(room(self, image), 3))
    monkeypatch.setattr(Episodes, "_chunk", counted)
    return sizes


def one_by_one(adapted, images):
    """Return the logits, and the readings, of batches of one image."""
    logits, readings = [], []
    for image in images.split(1):
        logits.append(adapted(image))
        readings.append(adapted.engine.net.readings)
    return torch.cat(logits), {steps: torch.cat([one[steps] for one in readings]) for steps in readings[0]}


def assert_equal_episodes(method, net, images, tolerance, **kwargs):
    """Compare logits, readings and counts of both ways, and return the engine of that side by side."""
    loop = method(reset="batch", **kwargs).wrap(copy.deepcopy(net))
    before = copy.deepcopy(net.state_dict())
    adapted = method(reset="batch", episode="image", **kwargs).wrap(net)
    for batch in (images, images.flip(0) * 0.5):
        expected, readings = one_by_one(loop, batch)
        found = adapted(batch)
        scale = expected[expected.isfinite()].abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance, equal_nan=True)
        assert adapted.engine.net.readings.keys() == readings.keys()
        for steps, read in readings.items():
            torch.testing.assert_close(adapted.engine.net.readings[steps], read, rtol=tolerance, atol=tolerance * scale)
    ours, theirs = adapted.engine, loop.engine
    assert (ours.updates, ours.skipped) == (theirs.updates, theirs.skipped)
    assert ours.net.forwards * len(images) == pytest.approx(theirs.net.forwards)
    assert ours.backwards * len(images) == pytest.approx(theirs.backwards)
    assert [n.fallbacks for n in ours.net.norms] == [n.fallbacks for n in theirs.net.norms]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return ours


class TestEqualToTheLoop:
    @pytest.mark.parametrize("network", NETWORKS)
    @pytest.mark.parametrize("parameters", ["norm", "all"])
    @pytest.mark.parametrize("steps", [1, 3])
    def test_in_double_precision(self, network, parameters, steps, images, in_pieces):
        settings = {"parameters": parameters, "steps": steps, "prediction": "after", "lr": 1e-3}
        assert_equal_episodes(Tent, make(network), of_size(images, network), 1e-9, **settings)
        assert in_pieces == [3, 2, 3, 2]

    @pytest.mark.parametrize("network", NETWORKS)
    @pytest.mark.parametrize("parameters", ["norm", "all"])
    def test_in_single_precision(self, network, parameters, images):
        sgd = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
        settings = {"parameters": parameters, "steps": 3, "prediction": "after", "optimizer": sgd}
        net = make(network, torch.float32)
        assert_equal_episodes(Tent, net, of_size(images, network).float(), 1e-5, **settings)

    @pytest.mark.parametrize(
        "name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax"]
    )
    @pytest.mark.parametrize("clip_norm", [None, 0.05])
    def test_with_every_optimizer_that_is_taken(self, name, clip_norm, make_net, small):
        optimizer = functools.partial(getattr(torch.optim, name), lr=0.01, weight_decay=0.1)
        settings = {"optimizer": optimizer, "clip_norm": clip_norm, "steps": 3, "prediction": "after"}
        assert_equal_episodes(RPL, make_net(), small, 1e-9, parameters="features", **settings)

    @pytest.mark.parametrize("task", [NCTTT, ClusT3])
    @pytest.mark.parametrize("norm", ["ema", "batch", "source"])
    def test_of_test_time_training(self, task, norm, small, in_pieces):
        torch.manual_seed(0)
        model = task(encoder="cifar_resnet8", image_size=16).double()
        settings = {"steps": 3, "lr": 1e-3, "norm": norm, "read_at": [0, 2]}
        engine = assert_equal_episodes(TestTimeTraining, model, small.clamp(0, 1), 1e-9, **settings)
        if task is NCTTT:
            assert any(layer.fallbacks for layer in engine.net.norms)  # the discriminator's, which sees one value

    def test_against_plain_torch(self, net, small):
        found = Tent(lr=0.01, reset="batch", episode="image", prediction="after", steps=2).wrap(copy.deepcopy(net))(
            small
        )
        for image, logits in zip(small, found, strict=True):
            model = copy.deepcopy(net)
            norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms:
                norm.track_running_stats, norm.training = False, True
                norm.running_mean = norm.running_var = None
            optimizer = torch.optim.Adam([parameter for norm in norms for parameter in norm.parameters()], lr=0.01)
            for _ in range(2):
                optimizer.zero_grad()
                entropy(model(image[None])).backward()
                optimizer.step()
            torch.testing.assert_close(logits, model(image[None])[0].detach(), rtol=1e-9, atol=1e-9)

    def test_an_episode_that_breaks_is_skipped_alone(self, make_net, small, breaks, in_pieces):
        small[1, 0, 0, 0] = 1e6
        engine = assert_equal_episodes(Tent, breaks(make_net()), small, 1e-9, lr=0.01, steps=2, prediction="after")
        assert (engine.updates, engine.skipped) == (2 * (4 + 5), 2)  # the second batch is darker by half

    def test_dense_predictions(self, small):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
        assert_equal_episodes(Tent, dense.eval(), small, 1e-9, lr=0.01, steps=2)

    def test_mixed_precision_changes_little(self, make_net, small):
        net = make_net().float()
        expected = Tent(reset="batch", episode="image").wrap(copy.deepcopy(net))(small.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = Tent(reset="batch", episode="image").wrap(net)(small.float())
        assert logits.dtype == torch.float32
        assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("parameters", ["norm", "all"])
    def test_on_a_gpu(self, parameters, images):
        assert_equal_episodes(Tent, make("batch_norm").cuda(), images.cuda(), 1e-9, parameters=parameters, steps=3)


class TestState:
    @pytest.fixture
    def adapted(self, net):
        return Tent(lr=0.01, reset="batch", episode="image", prediction="after").wrap(net)

    def test_a_release_gives_the_network_back(self, net, small, state_of, same_state):
        before = state_of(net)
        adapted = Tent(lr=0.01, reset="batch", episode="image").wrap(net)
        adapted(small)
        adapted(small[:1])
        adapted.release()
        same_state(net, before)

    def test_nothing_carries_over(self, adapted, small):
        first = adapted(small)
        adapted(small * 0.5)
        adapted.reset()
        assert torch.equal(adapted(small), first)

    def test_copies_and_states_go_on_alike(self, adapted, make_net, small):
        adapted(small)
        copied, unpickled = copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))
        other = Tent(lr=0.01, reset="batch", episode="image", prediction="after").wrap(make_net())
        other.load_state_dict(adapted.state_dict())
        expected = adapted(small * 0.5)
        for wrapped in (copied, unpickled, other):
            assert torch.equal(wrapped(small * 0.5), expected)
        assert other.engine.updates == adapted.engine.updates == 10

    def test_a_trial_leaves_no_trace(self, adapted, small, monkeypatch):
        adapted(small)
        engine = adapted.engine
        assert (engine.updates, engine.net.forwards, engine.backwards, engine.batches) == (5, 2, 1, 1)
        monkeypatch.setattr(Episodes, "_room", lambda *arguments: pytest.fail("a second trial"))
        adapted(small)

    def test_memory_decides_how_many_at_a_time(self, small):
        def room(memory, parameters):
            adapted = Tent(reset="batch", episode="image", episode_memory=memory, parameters=parameters)
            wrapped = adapted.wrap(make("batch_norm"))
            wrapped(small)
            return wrapped.engine.episodes.at_once(small)

        assert room(1000, "norm") // 10 == room(100, "norm") > room(100, "all") >= 2
        with pytest.raises(ValueError, match=r"two episodes at a time on, which take about \d+ MiB, and .* is 5:"):
            room(5, "all")


@pytest.mark.filterwarnings("ignore:.*on_bad_batch")
class TestBadImages:
    @pytest.fixture
    def spoilt(self, small):
        small[[0, 3], :, 2, 2] = torch.tensor([torch.nan, torch.inf]).double()[:, None]
        return small

    @pytest.mark.parametrize("policy", ["skip", "source"])
    def test_are_predicted_alone_and_the_others_adapted_to(self, make_net, small, spoilt, policy):
        settings = {"lr": 0.01, "reset": "batch", "on_bad_batch": policy, "prediction": "after"}
        loop, adapted = Tent(**settings).wrap(make_net()), Tent(episode="image", **settings).wrap(make_net())
        assert torch.equal(adapted(spoilt), one_by_one(loop, spoilt)[0])
        assert (adapted.engine.bad_batches, adapted.engine.updates) == (2, 3)
        assert (adapted.engine.batches, adapted.engine.batch) == (1, 1)
        assert adapted.engine.net.forwards == pytest.approx((3 * 2 + 2) / 5)
        clean = small.nan_to_num(0, 0, 0)
        torch.testing.assert_close(adapted(clean), one_by_one(loop, clean)[0], rtol=1e-9, atol=1e-9)

    def test_stop_the_run_by_default(self, net, spoilt):
        adapted = Tent(reset="batch", episode="image").wrap(net)
        with pytest.raises(ValueError, match="2 of 5 images in batch 0 of visit 0"):
            adapted(spoilt)
        assert adapted.engine.bad_batches == 0


class TestThroughTheTrainer:
    class Module(lightning.LightningModule):
        def __init__(self, net) -> None:
            super().__init__()
            self.net = net
            self.seen = []

        def forward(self, images):
            return self.net(images)

        def test_step(self, batch, batch_idx):
            self.seen.append(self(batch[0]))

    def test_gives_what_wrap_gives(self, make_net, small, tmp_path):
        module = self.Module(make_net())
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Tent(reset="batch", episode="image")],
        )  # fmt: skip
        trainer.test(module, DataLoader(TensorDataset(small, torch.zeros(5)), batch_size=3), verbose=False)
        adapted = Tent(reset="batch", episode="image").wrap(make_net())
        for found, images in zip(module.seen, small.split(3), strict=True):
            assert torch.equal(found, adapted(images))

    def test_results_are_those_of_single_images_and_say_so(self, tmp_path):
        def run(batch_size, **kwargs):
            torch.manual_seed(0)
            folder = tmp_path / str(batch_size)
            folder.mkdir()
            task = SupervisedTask(encoder="cifar_resnet8", num_classes=10)
            data = DigitsDataModule(batch_size=batch_size, domains=["contrast"], limit=12)
            trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
            return trainer.adapt(task, data, Tent(reset="batch", **kwargs))

        alone, together = run(1), run(5, episode="image")
        assert together["protocol"]["episode"] == "image"
        assert "episode" not in alone["protocol"]
        assert together["domains"][0]["nll"] == pytest.approx(alone["domains"][0]["nll"], rel=1e-4)
        assert together["cost"]["forwards_per_batch"] == alone["cost"]["forwards_per_batch"] == 1


class Task(nn.Module):
    """A network with an auxiliary loss."""

    auxiliary_views = 1

    def __init__(self, net: nn.Module, loss) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, images):
        return self.net(images)

    def auxiliary_loss(self, images, generator):
        return self.loss(self.net(images), generator)

    def adaptable_parameters(self):
        return list(self.net.parameters())


class Remembering(Task):
    def episode_state(self):
        return {"queue": torch.zeros(3)}


class TwoStep(nn.Module):
    """A network that looks at values."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images) if images.mean() > 0 else self.net(-images)


def square(logits, generator):
    return logits.square().mean()


def noisy(logits, generator):
    return (logits + torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).square().mean()


class TestRefusals:
    @pytest.mark.parametrize(
        ("method", "arguments", "message"),
        [
            (MEMO, {}, "MEMO cannot run with episode='image', which is for .*: Tent, RPL and TestTimeTraining"),
            (ETA, {"reset": "batch"}, "ETA cannot run .* Use episode='batch' with batches of one image"),
            (SAR, {"reset": "batch"}, "SAR cannot run"),
            (Tent, {}, "needs reset='batch', got reset='domain'"),
            (Tent, {"reset": "batch", "fast": True}, "episode='image' and fast=True are two ways"),
            (Tent, {"reset": "batch", "terms": [STAG()]}, "takes no terms: leave them away"),
            (Tent, {"reset": "batch", "repeat_kept": True}, "takes no repeat_kept: leave it away"),
            (Tent, {"reset": "batch", "episode_memory": 0}, "episode_memory must be at least 1 MiB, got 0"),
            (Tent, {"reset": "batch", "episode": "images"}, "episode must be 'batch' or 'image', got 'images'"),
        ],
    )
    def test_of_arguments(self, method, arguments, message):
        with pytest.raises(ValueError, match=message):
            method(**{"episode": "image", **arguments})

    def test_of_an_optimizer_that_looks_at_more_than_one_number(self, net, small):
        adapted = Tent(reset="batch", episode="image", optimizer=functools.partial(torch.optim.LBFGS, lr=0.1)).wrap(net)
        with pytest.raises(ValueError, match=r"as SGD, Adam, .* do; got LBFGS"):
            adapted(small)

    @pytest.mark.parametrize(
        ("make_task", "message"),
        [
            (lambda net: Task(net, noisy), r"cannot run TestTimeTraining on Task .*random"),
            (lambda net: Remembering(net, square), "TestTimeTraining on Remembering changes tensors besides: queue"),
            (lambda net: RotationTTT(encoder="cifar_resnet8", branch="layer1").double(), "at most 2 views .* passes 4"),
            (
                lambda net: RotationTTT(encoder="cifar_resnet8", branch="layer1", rotation="random", copies=2).double(),
                "on RotationTTT for several images at once .*random",
            ),
        ],
    )
    def test_of_tasks(self, make_task, message, net, small):
        adapted = TestTimeTraining(steps=1, episode="image").wrap(make_task(net))
        with pytest.raises(ValueError, match=message):
            adapted(small.clamp(0, 1))

    def test_of_no_views_that_the_method_does_not_make(self, small):
        torch.manual_seed(0)
        task = RotationTTT(encoder="cifar_resnet8", branch="layer1").double()
        assert_equal_episodes(Tent, task, small, 1e-9)

    def test_of_networks(self, net, small):
        for network, reason in ((TwoStep(net), "data-dependent control flow"), (DictNet(net), "returns a dict")):
            adapted = Tent(reset="batch", episode="image").wrap(network)
            with pytest.raises(ValueError, match=f"{type(network).__name__} for several images at once .*{reason}"):
                adapted(small)
            adapted.release()

    def test_of_a_batch_that_processes_share(self, net):
        with pytest.raises(ValueError, match="episode='image' needs no other images: use shard='domain'"):
            Tent(reset="batch", episode="image").check_batch_shard(net)


class DictNet(TwoStep):
    def forward(self, images):
        return {"logits": self.net(images)}
