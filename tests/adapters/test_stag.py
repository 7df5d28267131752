"""STAG as a term: its zeros, its options, dense outputs, and how it joins a method's loss."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from ttalight.adapters import MEMO, NCTTA, STAG, Tent, TestTimeTraining
from ttalight.cli import main
from ttalight.models import Head, Outputs


@pytest.fixture
def draws():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def head(draws):
    return Head(
        torch.randn(5, 7, dtype=torch.float64, generator=draws), torch.randn(5, dtype=torch.float64, generator=draws)
    )


def outputs_of(features, head):
    logits = head.scale * features @ head.weight.T
    return Outputs(logits if head.bias is None else logits + head.bias, features)


def entropy_gradients(features, head):
    """By autograd, sample by sample."""
    gradients = []
    for z in features:
        z = z.detach().clone().requires_grad_()
        logits = head.scale * head.weight @ z + (0 if head.bias is None else head.bias)
        p = logits.softmax(0)
        gradients.append(torch.autograd.grad(-(p * p.log()).sum(), z)[0])
    return torch.stack(gradients)


@pytest.mark.parametrize("batch", [3, 12])  # fewer and more predictions than classes
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_against_autograd(head, draws, batch, scale):
    head = head._replace(scale=scale)
    features = torch.randn(batch, 7, dtype=torch.float64, generator=draws)
    outputs = outputs_of(features, head)
    anchors = entropy_gradients(head.weight * scale, Head(head.weight, None, scale))
    own = STAG()(outputs, head, None)
    for i, g in enumerate(entropy_gradients(features, head)):
        a = anchors[outputs.logits[i].argmax()]
        assert own[i].item() == pytest.approx(1 - float(g @ a / (g.norm() * a.norm())), abs=1e-10)


def test_is_zero_on_the_rows_themselves(head):
    head = head._replace(bias=None)
    outputs = outputs_of(head.weight, head)
    assert outputs.logits.argmax(1).tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(STAG()(outputs, head, None), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)


def test_does_not_change_when_all_logits_move(head, draws):
    outputs = outputs_of(torch.randn(4, 7, dtype=torch.float64, generator=draws), head)
    moved = Outputs(outputs.logits + 123.0, outputs.features)
    torch.testing.assert_close(STAG()(moved, head, None), STAG()(outputs, head, None), rtol=1e-9, atol=1e-12)


def test_saturated_predictions_are_left_out(head, draws):
    features = torch.randn(3, 7, generator=draws)
    head = Head(head.weight.float(), head.bias.float())
    features = (features * torch.tensor([1.0, 1e3, 1e4])[:, None]).requires_grad_()
    values = STAG()(outputs_of(features, head), head, None)
    values.sum().backward()
    assert values[0] > 0
    assert values[1:].tolist() == [0, 0]
    assert features.grad.isfinite().all()
    assert not features.grad[1:].any()


def test_dense_outputs_count_per_pixel(head, draws):
    features = torch.randn(2, 7, 3, 4, dtype=torch.float64, generator=draws)
    logits = torch.einsum("bdhw,cd->bchw", features, head.weight) + head.bias[:, None, None]
    own = STAG()(Outputs(logits, features), head, None)
    pixels = Outputs(logits.movedim(1, -1).reshape(-1, 5), features.movedim(1, -1).reshape(-1, 7))
    expected = STAG()(pixels, head, None)
    torch.testing.assert_close(own, expected.view(2, 12).mean(1))


def test_resized_logits_count_per_pixel(head, draws):
    features = torch.randn(2, 7, 3, 4, dtype=torch.float64, generator=draws)
    logits = torch.randn(2, 5, 6, 8, dtype=torch.float64, generator=draws)
    assert STAG()(Outputs(logits, features), head, None).shape == (2,)


def test_one_class_has_no_entropy(draws):
    head = Head(torch.randn(1, 7, generator=draws), None)
    with pytest.raises(ValueError, match="two classes or more"):
        STAG()(outputs_of(torch.randn(3, 7, generator=draws), head), head, None)


class TestInAMethod:
    def test_costs_no_pass_and_moves_other_weights(self, make_net, images):
        plain, termed = Tent(lr=0.05).wrap(make_net()), Tent(lr=0.05, terms=[STAG(1.0)]).wrap(make_net())
        assert torch.equal(plain(images), termed(images))
        assert (termed.engine.net.forwards, termed.engine.backwards) == (1, 1)
        assert not torch.equal(plain(images), termed(images))

    def test_gradient_is_that_of_the_sum(self, net, images):
        adapted = Tent(lr=0.0, terms=[STAG(0.7)]).wrap(net)
        logits = adapted(images)
        network = adapted.engine.net
        outputs = network(images, norm="batch")
        p = logits.softmax(1)
        expected = -(p * p.log()).sum(1) + 0.7 * STAG()(outputs, network.head, None)
        assert adapted.engine.last["loss"] == pytest.approx(expected.mean().item(), rel=1e-9)

    @pytest.mark.parametrize("reweight", [False, True])
    def test_weights_of_the_method(self, make_net, images, reweight):
        images = images * torch.tensor([0.2, 0.5, 1, 1.5, 2, 3], dtype=images.dtype).view(-1, 1, 1, 1)
        nets = [make_net(classes=5) for _ in range(2)]
        for net in nets:
            net[-1].weight.data *= 20
        term = STAG(0.5, reweight=reweight)
        plain = NCTTA(margin=0.3, lr=0.0).wrap(nets[0])
        termed = NCTTA(margin=0.3, lr=0.0, terms=[term]).wrap(nets[1])
        plain(images)
        termed(images)
        network, method = termed.engine.net, termed.engine.method
        with torch.no_grad():
            outputs = network(images, norm="batch")
            weights = method.weigh(network, images, outputs)
            values = 0.5 * term(outputs, network.head, None) * (weights if reweight else weights != 0)
        assert 0 < (weights != 0).sum() < len(images)
        expected = plain.engine.last["loss"] + (values.sum() / (weights != 0).sum()).item()
        assert termed.engine.last["loss"] == pytest.approx(expected, rel=1e-9)

    def test_per_pixel_on_a_convolutional_head(self, images):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)).double()
        adapted = Tent(terms=[STAG(0.7)], lr=0.0).wrap(net)
        logits = adapted(images)
        p = logits.softmax(1)
        values = STAG()(adapted.engine.net(images, norm="batch"), adapted.engine.net.head, None)
        expected = -(p * p.log()).sum(1).mean((1, 2)) + 0.7 * values
        assert adapted.engine.last["loss"] == pytest.approx(expected.mean().item(), rel=1e-9)

    @pytest.mark.parametrize("joint", [False, True])
    def test_memo_averages_it_over_views(self, make_net, joint):
        images = torch.rand(1 + joint, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        adapted = MEMO(views=5, lr=0.0, joint=joint, terms=[STAG(0.7)]).wrap(make_net())
        network, seen = adapted.engine.net, []
        network.run = lambda views: seen.append(views) or network.original(views)
        adapted(images)
        views = seen[0].view(5, len(images), 3, 16, 16)
        losses = []
        with torch.no_grad():
            outputs = network(views.flatten(0, 1))
            values = STAG()(outputs, network.head, None).view(5, -1)
            for image in range(len(images)):
                mean = outputs.logits.softmax(1).view(5, len(images), -1)[:, image].mean(0)
                losses.append(-(mean * mean.log()).sum() + 0.7 * values[:, image].mean())
        assert adapted.engine.last["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)

    @pytest.mark.parametrize("norm", ["ema", "batch"])
    def test_test_time_training_reuses_the_prediction_pass(self, make_net, images, norm):
        class Task(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = make_net()

            def forward(self, images):
                return self.net(images)

            def adaptable_parameters(self):
                return list(self.net[:6].parameters())

            def auxiliary_loss(self, images, generator):
                return self.net(images.flip(3)).square().mean()

        plain = TestTimeTraining(steps=1, lr=0.0, norm=norm).wrap(Task())
        termed = TestTimeTraining(steps=1, lr=0.0, norm=norm, terms=[STAG(0.7)]).wrap(Task())
        assert torch.equal(plain(images), termed(images))  # without a step all is the same: no statistics moved
        network = termed.engine.net
        assert (network.forwards, termed.engine.backwards) == (3, 2)
        with torch.no_grad():
            outputs = network(images, norm="batch" if norm == "batch" else "source")
            expected = plain.engine.last["loss"] + 0.7 * STAG()(outputs, network.head, None).mean().item()
        assert termed.engine.last["loss"] == pytest.approx(expected, rel=1e-9)

    def test_clip_norm_bounds_the_step(self, make_net, images):
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
        free, clipped = (
            Tent(optimizer=sgd, clip_norm=norm, terms=[STAG(5.0)]).wrap(make_net()) for norm in (None, 1e-3)
        )
        moved = []
        for adapted in (free, clipped):
            adapted(images)
            network = adapted.engine.net
            moved.append([p.detach() - s for p, s in zip(network.parameters, network.source, strict=True)])
        lengths = [torch.cat([m.flatten() for m in moves]).norm().item() for moves in moved]
        assert lengths[0] == pytest.approx(free.engine.last["grad_norm"])
        assert clipped.engine.last["grad_norm"] == pytest.approx(lengths[0])  # as it was before the cut
        assert lengths[1] == pytest.approx(1e-3, rel=1e-2)
        for one, other in zip(*moved, strict=True):
            torch.testing.assert_close(other / lengths[1], one / lengths[0], rtol=1e-6, atol=1e-9)

    def test_clip_norm_must_be_positive(self):
        with pytest.raises(ValueError, match="clip_norm must be positive, or None for no limit, got 0"):
            Tent(clip_norm=0.0)

    def test_is_in_the_protocol(self):
        assert not {"terms", "clip_norm"} & Tent().protocol().keys()
        protocol = Tent(terms=[STAG(0.5)], clip_norm=1.0).protocol()
        assert protocol["clip_norm"] == 1.0
        assert protocol["terms"] == ["STAG(weight=0.5, reweight=False)"]

    def test_copies_with_its_method(self, make_net, images):
        adapted = Tent(lr=0.05, terms=[STAG()]).wrap(make_net())
        adapted(images)
        twin = copy.deepcopy(adapted)
        assert torch.equal(twin(images), adapted(images))


class TestCommandLine:
    """Terms and the two methods that they were written beside, by their bare names in YAML."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ttalight"])

    def words(self, adapter):
        config = {
            "name": "run",
            "model": {"class_path": "SupervisedTask", "init_args": {"encoder": "cifar_resnet8"}},
            "data": {
                "class_path": "DigitsDataModule",
                "init_args": {"batch_size": 10, "domains": ["clean"], "limit": 20},
            },
            "adapter": adapter,
            "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        }
        Path("run.yaml").write_text(yaml.safe_dump(config))
        return ["adapt", "--config", "run.yaml"]

    def test_runs_and_repeats_from_the_written_config(self):
        term = {"class_path": "STAG", "init_args": {"weight": 0.5, "reweight": True}}
        adapter = {"class_path": "NCTTA", "init_args": {"terms": [term], "clip_norm": 1.0, "margin": 1.0}}
        main(self.words(adapter))
        results = json.loads(Path("runs/run/results.json").read_text())
        assert results["method"] == "NCTTA"
        assert results["protocol"]["terms"] == ["STAG(weight=0.5, reweight=True)"]
        assert results["cost"]["forwards_per_batch"] == results["cost"]["backwards_per_batch"] == 1
        main(["adapt", "--config", "runs/run/config.yaml", "--name", "again"])
        again = json.loads(Path("runs/again/results.json").read_text())
        assert again["protocol"] == results["protocol"]
        assert [row["nll"] for row in again["domains"]] == [row["nll"] for row in results["domains"]]

    @pytest.mark.parametrize(("frozen", "parsed"), [("0.3", 0.3), ("[0,2]", [0, 2]), (None, [0])])
    def test_is_parsed_for_other_methods(self, capsys, frozen, parsed):
        words = self.words({"class_path": "MoETTA", "init_args": {"terms": [{"class_path": "STAG"}]}})
        more = [] if frozen is None else ["--adapter.frozen", frozen]
        with pytest.raises(SystemExit) as stop:
            main([*words, *more, "--print_config"])
        assert stop.value.code == 0
        arguments = yaml.safe_load(capsys.readouterr().out)["adapter"]["init_args"]
        assert arguments["frozen"] == parsed
        assert arguments["terms"][0]["class_path"] == "ttalight.adapters.STAG"
        assert arguments["terms"][0]["init_args"]["weight"] == 0.3

    def test_moetta_runs_on_a_task(self):
        main(self.words({"class_path": "MoETTA", "init_args": {"experts": 3, "terms": [{"class_path": "STAG"}]}}))
        results = json.loads(Path("runs/run/results.json").read_text())
        assert results["protocol"]["experts"] == 3
        assert results["cost"]["adapted_parameters"] > 0
