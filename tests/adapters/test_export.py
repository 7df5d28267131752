"""Networks that are taken away: ordinary modules that predict what the adapted network predicts."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from support.methods import methods
from support.networks import small_net
from support.tasks import DrawingTask
from torch import nn

from ttalight.adapters import (
    BCA,
    DMN,
    ECALP,
    EMABN,
    FIND,
    LAME,
    MEMO,
    NOTE,
    OGA,
    PTBN,
    RMT,
    ROID,
    T3A,
    TDA,
    TIPI,
    ZERO,
    Adapter,
    AlphaBN,
    BoostAdapter,
    DoTA,
    MoETTA,
    OnZeta,
    RetrievalFusion,
    Source,
    StatA,
    Tent,
    TTAug,
)
from ttalight.adapters import TestTimeTraining as TTT

METHODS = methods(MEMO={"views": 2})
#: What else a method can normalise or predict with.
METHODS |= {
    "TIPI before": lambda **more: TIPI(prediction="before", **more),
    "TIPI running": lambda **more: TIPI(large_batch=None, **more),
    "AlphaBN constant": lambda **more: AlphaBN(alpha=0.3, **more),
    "MEMO joint": lambda **more: MEMO(views=2, joint=True, **more),
    "T3A batch": lambda **more: T3A(norm="batch", **more),
    "ROID published": lambda **more: ROID(prior_correction="published", **more),
    "Test-time training": lambda **more: TTT(steps=2, lr=1e-2, **more),
    "Test-time training batch": lambda **more: TTT(steps=2, norm="batch", **more),
}
for without_network in (
    "BCA", "BoostAdapter", "DMN", "DPE", "DoTA", "ECALP", "LAME", "MTA", "OGA", "OnZeta", "RetrievalFusion", "StatA",
    "TDA", "TPS", "TTAug", "VTE", "ZERO",
):  # fmt: skip
    del METHODS[without_network]

pytestmark = pytest.mark.filterwarnings("ignore:.*runs with its settings for CIFAR", "ignore:.*source")


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(count, 3, 16, 16, generator=generator, dtype=torch.float64) for count in (6, 6, 3, 1, 70)]


@pytest.fixture(params=METHODS)
def adapted(request, batches):
    net = DrawingTask(small_net()) if request.param.startswith("Test-time") else small_net()
    adapted = METHODS[request.param](reset="never").wrap(net)
    for batch in batches[:2]:
        adapted(batch)
    return adapted


def equal(first, second):
    assert torch.equal(first, second), (first - second).abs().max()


def test_predicts_what_the_adapted_network_predicts(adapted, batches):
    module = adapted.export()
    for batch in batches:
        equal(module(batch).detach(), adapted(batch, adapt=False))
    assert type(module) is type(adapted.module)
    assert not any(part.training for part in module.modules())
    before = module(batches[0]).detach()
    adapted(batches[0])  # what was exported stays
    equal(module(batches[0]).detach(), before)
    adapted.release()
    equal(module(batches[0]).detach(), before)


def test_copies_and_files_predict_the_same(adapted, batches):
    module = adapted.export()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for other in copies:
        equal(other(batches[2]), module(batches[2]))
    assert all(isinstance(value, torch.Tensor) for value in module.state_dict().values())


def test_state_dict_is_complete(adapted, batches):
    first = adapted.export()
    adapted.reset()
    for value in adapted.module.parameters():
        value.data.mul_(0.5)
    adapted(batches[2])
    second = adapted.export()
    second.load_state_dict(first.state_dict())
    for batch in batches:
        equal(second(batch), first(batch))


def test_torch_export_gives_the_same_numbers(adapted, batches):
    module = adapted.export()
    if adapted.engine.method.__class__ is RMT and torch.__version__ < (2, 7):
        pytest.skip("torch 2.6 does not trace the sum of two networks")
    torch.compiler.reset()  # torch 2.6 counts the exports of other tests
    program = torch.export.export(module, (batches[0],))
    torch.testing.assert_close(program.module()(batches[0]), module(batches[0]), rtol=1e-12, atol=1e-12)


def test_may_be_unpickled_by_another_process(batches, tmp_path):
    adapted = AlphaBN().wrap(small_net())
    adapted(batches[0])
    torch.save((adapted.export(), batches[2]), tmp_path / "exported.pt")
    load = f"net, x = torch.load({str(tmp_path / 'exported.pt')!r}, weights_only=False)"
    code = f"import torch; {load}; print(net(x).tolist())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert eval(run.stdout) == adapted(batches[2], adapt=False).tolist()


def test_onnx_gives_the_same_numbers(batches, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    adapted = Tent().wrap(small_net())
    adapted(batches[0])
    torch.onnx.export(adapted.export(), (batches[0],), str(tmp_path / "net.onnx"), dynamo=True)
    session = reference.ReferenceEvaluator(str(tmp_path / "net.onnx"))
    (logits,) = session.run(None, {session.input_names[0]: batches[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), adapted(batches[0], adapt=False))


# -- what is exported


def test_other_networks(network, images, logits_in):
    for adapter in (Tent(lr=0.1), MoETTA(lr=0.1)):
        adapted = adapter.wrap(network)
        adapted(images)
        module, expected = adapted.export(), adapted(images[:3], adapt=False)
        answer = module(images[:3])
        assert type(answer) is type(expected)
        equal(logits_in(answer), logits_in(expected))
        if isinstance(answer, dict):
            equal(answer["doubled"], expected["doubled"])
        adapted.release()


def test_running_statistics_stay_those_of_ordinary_layers(batches):
    adapted = EMABN().wrap(small_net())
    adapted(batches[0])
    module, fresh = adapted.export(), small_net()
    assert {type(part) for part in module.modules()} == {type(part) for part in fresh.modules()}
    fresh.load_state_dict(module.state_dict())
    equal(fresh(batches[1]), adapted(batches[1], adapt=False))


def test_other_statistics_are_not_loaded_as_running_ones(batches):
    adapted = Tent().wrap(small_net())
    adapted(batches[0])
    with pytest.raises(RuntimeError, match="source_mean"):
        small_net().load_state_dict(adapted.export().state_dict())


def test_where_a_reset_is_due_it_is_the_source(batches):
    adapted = Tent(lr=0.1, reset="batch").wrap(small_net())
    adapted(batches[0])
    weights = [value.detach().clone() for value in adapted.module.parameters()]
    module = adapted.export()
    assert all(map(torch.equal, module.parameters(), small_net().parameters()))
    equal(module(batches[1]), adapted(batches[1], adapt=False))
    assert all(map(torch.equal, weights, adapted.module.parameters()))


def test_hooks_references_and_flags_stay(batches):
    net = small_net().train()
    net[0].weight.requires_grad_(False)
    norm = net[1]
    norm.register_forward_hook(double)
    net.also = [norm]
    adapted = Tent().wrap(net)
    adapted(batches[0])
    module = adapted.export()
    equal(module(batches[1]), adapted(batches[1], adapt=False))
    assert module.also[0] is module[1]
    assert [value.requires_grad for value in module.parameters()] == [False] + [True] * 9
    assert "eps=1e-05" in repr(module[1])


def double(module, inputs, output):
    return 2 * output


def test_parametrized_weights_and_layers_without_running_statistics(batches):
    net = small_net()
    nn.utils.parametrize.register_parametrization(net[1], "weight", Half())
    net[4] = nn.BatchNorm2d(6, track_running_stats=False).double()
    for adapter in (Tent(lr=0.1), AlphaBN()):
        adapted = adapter.wrap(net)
        adapted(batches[0])
        equal(adapted.export()(batches[1]), adapted(batches[1], adapt=False))
        folded = adapted.export(statistics_from=batches[1])
        torch.testing.assert_close(folded(batches[1]), adapted(batches[1], adapt=False), rtol=1e-9, atol=1e-9)
        assert type(folded[1]) is nn.BatchNorm2d
        adapted.release()


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("cls", [Tent, PTBN, AlphaBN])
def test_one_value_a_channel(cls, images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double().eval()
    adapted = cls().wrap(net)
    adapted(images)
    equal(adapted.export()(images[:1]), adapted(images[:1], adapt=False))


class TestClassifier:
    def test_of_t3a_keeps_what_the_network_masks(self, batches):
        class Masking(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = small_net(classes=6)

            def forward(self, images):
                return self.net(images).index_fill(1, torch.tensor([2]), -torch.inf)

        inside = small_net(classes=6)
        with torch.no_grad():
            inside[8].bias[2] = -torch.inf
        for net in (Masking(), inside):
            adapted = T3A().wrap(net)
            adapted(batches[0])
            torch.testing.assert_close(adapted.export()(batches[1]), adapted(batches[1], adapt=False))

    def test_of_t3a_is_behind_the_same_choice_of_rows(self, batches):
        class Restricted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = small_net(classes=6)

            def forward(self, images):
                return self.net(images)[:, [4, 0, 3]]

        adapted = T3A().wrap(Restricted())
        adapted(batches[0])
        equal(adapted.export()(batches[1]), adapted(batches[1], adapt=False))

    def test_of_t3a_may_be_a_convolution(self, batches):
        net = small_net()
        net = nn.Sequential(*net[:7], nn.Conv2d(6, 4, 1).double(), nn.Flatten())
        adapted = T3A().wrap(net)
        adapted(batches[0])
        torch.testing.assert_close(adapted.export()(batches[1]), adapted(batches[1], adapt=False))


# -- folded statistics


@pytest.mark.parametrize("make", [Tent, AlphaBN, lambda: T3A(norm="batch"), TIPI, ROID])
def test_folded_statistics_are_those_of_ordinary_layers(make, batches):
    adapted = make().wrap(small_net())
    adapted(batches[0])
    folded = adapted.export(statistics_from=batches[4])
    torch.testing.assert_close(folded(batches[4]), adapted(batches[4], adapt=False), rtol=1e-9, atol=1e-9)
    assert {type(part) for part in folded.modules()} == {type(part) for part in small_net().modules()}
    if not isinstance(adapted.engine.method, (ROID, T3A)):
        fresh = small_net()
        fresh.load_state_dict(folded.state_dict())
        equal(fresh(batches[0]), folded(batches[0]))
        torch.testing.assert_close(folded(batches[0])[:1], folded(batches[0][:1]), rtol=1e-9, atol=1e-9)


# -- refusals


class Own(Adapter):
    def configure(self, net):
        net.set_norm_mode("batch")

    def adapt(self, net, images):
        return self.predict(net, images)

    def predict(self, net, images):
        return 2 * net(images).logits


class Replacing(Adapter):
    def configure(self, net):
        net.norms[0].replace(lambda x: 2 * x)

    def adapt(self, net, images):
        return net(images).logits


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LAME(), "no network to export"),
        (RetrievalFusion(), "no network to export"),
        (TDA(), "no network to export"),
        (BoostAdapter(), "no network to export"),
        (DoTA(), "no network to export"),
        (OnZeta(), "no network to export"),
        (ECALP(), "no network to export"),
        (StatA(), "no network to export"),
        (DMN(), "no network to export"),
        (OGA(), "no network to export"),
        (BCA(), "no network to export"),
        (TTAug(), "no network to export"),
        (ZERO(views=2), "no network to export"),
        (Own(), "define export"),
        (Replacing(), "layer 1 is normalised by a function of the method"),
    ],
)
def test_predictions_that_are_no_networks_are_refused(adapter, message, batches):
    adapted = adapter.wrap(small_net())
    adapted(batches[0])
    with pytest.raises(TypeError, match=message):
        adapted.export()


@pytest.mark.parametrize("adapter", [FIND(), MEMO(views=2), NOTE(), RMT()])
def test_statistics_that_images_do_not_share_are_not_folded(adapter, batches):
    adapted = adapter.wrap(small_net())
    adapted(batches[0])
    with pytest.raises(TypeError, match="cannot be folded"):
        adapted.export(statistics_from=batches[0])


def test_a_layer_with_a_forward_of_its_own_is_refused(batches):
    net = small_net()
    net[1].forward = net[1].forward
    adapted = Tent().wrap(net)
    adapted(batches[0])
    with pytest.raises(TypeError, match="layer 1 carries a forward of its own"):
        adapted.export()


def test_before_the_first_batch_there_is_nothing(batches):
    adapted, other = Tent().wrap(small_net()), Tent().wrap(small_net())
    with pytest.raises(RuntimeError, match="adapt to a batch"):
        adapted.export()
    other(batches[0])
    adapted.load_state_dict(other.state_dict())
    equal(adapted.export()(batches[1]), other.export()(batches[1]))


def test_source_is_the_network_itself(batches):
    adapted = Source().wrap(small_net())
    adapted(batches[0])
    equal(adapted.export()(batches[1]), small_net()(batches[1]))
