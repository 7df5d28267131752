"""FOA on vision transformers of timm and torchvision: errors, states, what is left behind, and tasks."""

from __future__ import annotations

import copy
import pickle
import sys

import lightning
import pytest
import timm
import torch
from support.networks import small_net
from support.transformers import timm_vit, torchvision_vit
from torch import nn

pytest.importorskip("cmaes", reason="needs the extra: pip install ttalight[forward-only]")

from ttalight.adapters import FOA, FastPass, RecomputedBlocks, Tent
from ttalight.adapters.components.prompted_transformer import PromptedTransformer
from ttalight.adapters.methods.foa import SourceTokens, candidate_fitness, shifted_logits
from ttalight.data import DigitsDataModule
from ttalight.tasks import SupervisedTask

NETWORKS = {"timm": timm_vit, "torchvision": torchvision_vit}


class InPart(nn.Module):
    """A transformer without a classifier inside another module, whose output is a dict."""

    def __init__(self, **settings):
        super().__init__()
        self.encoder = timm_vit(0, **settings)
        self.classifier = nn.Linear(6, 4).double()

    def forward(self, images):
        features = self.encoder(images)
        return {"logits": self.classifier(features), "features": features}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return [images, images.flip(0) * 0.5, images[:3] + 0.3, images[:1]]


@pytest.fixture
def make(batches):
    def make(**more):
        settings = {"population": 6, "source": [batches[0] - 0.2], "reset": "never", "seed": 0}
        return FOA(**{**settings, **more})

    return make


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


def hooks_of(net):
    return [
        hook
        for part in net.modules()
        for name, hooks in vars(part).items()
        if name.endswith("hooks") and hooks
        for hook in hooks
    ]


@torch.no_grad()
def predictions(net, images):
    return net(images)


class TestChecks:
    @pytest.mark.parametrize(
        ("make_net", "message"),
        [
            (small_net, "Sequential has no VisionTransformer of timm or torchvision, and this method works on the"),
            (lambda: nn.ModuleList([timm_vit(), torchvision_vit()]), "ModuleList has 2 VisionTransformers of timm"),
            (lambda: timm_vit(class_token=False, global_pool="avg"), "has no class token, or blocks without a norm1"),
            (
                lambda: timm_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
                "has no class token, or blocks without a norm1",
            ),
        ],
    )
    def test_networks_without_a_class_token_are_refused(self, make, make_net, message):
        with pytest.raises(ValueError, match=message):
            make().wrap(make_net())

    def test_a_missing_package_is_named(self, make, monkeypatch):
        monkeypatch.setitem(sys.modules, "cmaes", None)
        with pytest.raises(ImportError, match=r"FOA needs cmaes.*: pip install 'ttalight\[forward-only\]'"):
            make().wrap(timm_vit())

    @pytest.mark.parametrize(
        ("setting", "value", "message"),
        [
            ("prompts", 0, "prompts must be at least 1, got 0"),
            ("population", 3, "population must be at least 4, got 3"),
            ("source_samples", 1, "source_samples must be at least 2, got 1"),
            ("sigma", 0.0, "sigma must be positive, got 0.0"),
            ("fitness_weight", -1.0, "fitness_weight must be at least 0, got -1.0"),
            ("shift", -1.0, "shift must be at least 0, got -1.0"),
            ("momentum", 0.0, r"momentum must lie in \(0, 1\], got 0.0"),
        ],
    )
    def test_arguments_out_of_range(self, setting, value, message):
        with pytest.raises(ValueError, match=message):
            FOA(**{setting: value})

    def test_source_images_are_two_and_finite(self, make, batches):
        with pytest.raises(ValueError, match="source gave 1 image"):
            make(source=[batches[3]]).wrap(timm_vit())(batches[0])
        with pytest.raises(ValueError, match="class tokens of the source images are not finite"):
            make(source=[batches[0] * torch.inf]).wrap(timm_vit())(batches[0])

    def test_maps_of_predictions_are_refused(self, make, batches):
        class Maps(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder, self.classifier = timm_vit(0), nn.Conv2d(6, 4, 1).double()

            def forward(self, images):
                return self.classifier(self.encoder(images)[:, :, None, None].expand(-1, -1, 2, 2))

        with pytest.raises(ValueError, match=r"FOA reads the class token of each image and takes one prediction"):
            make().wrap(Maps())(batches[0])

    def test_no_network_is_exported(self, make, batches):
        adapted = make().wrap(timm_vit())
        adapted(batches[0])
        with pytest.raises(TypeError, match="no network to export"):
            adapted.export()


class TestStates:
    def test_a_state_continues_bit_for_bit(self, make, network, batches):
        whole = make().wrap(network())
        expected = [whole(batch) for batch in batches]
        first, second, fresh = (make().wrap(network()) for _ in range(3))
        assert all(torch.equal(first(batch), logits) for batch, logits in zip(batches[:2], expected, strict=False))
        state = pickle.loads(pickle.dumps(first.state_dict()))
        second(batches[3])
        for continued in (second, fresh):
            continued.load_state_dict(state)
            for batch, logits in zip(batches[2:], expected[2:], strict=True):
                assert torch.equal(continued(batch), logits)
            states = (adapted.state_dict()["tensors"] for adapted in (continued, whole))
            torch.testing.assert_close(*states, rtol=0, atol=0)

    def test_a_saved_state_has_the_source(self, make, batches):
        first = make().wrap(timm_vit())
        first(batches[0])
        fresh = make(source=None).wrap(timm_vit())
        fresh.load_state_dict(first.state_dict())  # without a warning of missing images
        assert torch.equal(fresh(batches[1]), first(batches[1]))

    def test_a_reset_starts_again_bit_for_bit(self, make, network, batches):
        adapted = make().wrap(network())
        first = [adapted(batch) for batch in batches]
        adapted.reset()
        adapted.engine.net.counters.visit, adapted.engine.net.counters.batch = 0, 0  # the draws of the first time
        assert all(torch.equal(adapted(batch), logits) for batch, logits in zip(batches, first, strict=True))

    def test_a_release_gives_the_network_back(self, make, network, batches):
        net = network()
        net.train()
        before = copy.deepcopy(net)
        adapted = make().wrap(net)
        for batch in batches:
            adapted(batch)
            assert not hooks_of(net)
        adapted.release()
        assert all(torch.equal(value, before.state_dict()[name]) for name, value in net.state_dict().items())
        assert [type(part) for part in net.modules()] == [type(part) for part in before.modules()]
        assert all(part.training for part in net.modules())
        assert not hooks_of(net)
        assert torch.equal(predictions(net.eval(), batches[0]), predictions(before.eval(), batches[0]))

    def test_copies(self, make, network, batches):
        net = network()
        adapted = make().wrap(net)
        adapted(batches[0])
        plain, other = copy.deepcopy(net), copy.deepcopy(adapted)
        assert torch.equal(predictions(plain, batches[0]), predictions(network(), batches[0]))
        assert torch.equal(other(batches[1]), adapted(batches[1]))

    def test_a_batch_that_an_exception_ends_leaves_no_trace(self, make, batches):
        net = timm_vit()
        adapted, other = make().wrap(net), make().wrap(timm_vit())
        for batch in batches[:2]:
            adapted(batch)
            other(batch)
        passes = iter(range(3))

        def fail(*_):
            if next(passes) == 2:
                raise KeyboardInterrupt

        hook = net.blocks[1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            adapted(batches[2])
        hook.remove()
        assert not hooks_of(net)
        assert torch.equal(adapted(batches[2]), other(batches[2]))

    def test_another_seed_draws_others(self, make, batches):
        first, second = (make(seed=seed).wrap(timm_vit())(batches[0]) for seed in (0, 1))
        assert not torch.equal(first, second)


class TestPredictions:
    def test_before_the_first_batch_they_are_the_networks(self, make, network, batches):
        adapted = make().wrap(network())
        expected = predictions(network(), batches[0])
        assert torch.equal(adapted(batches[0], adapt=False), expected)
        adapted(batches[0])
        adapted.reset()
        assert torch.equal(adapted(batches[0], adapt=False), expected)

    def test_without_adapting_they_change_nothing(self, make, batches):
        adapted, other = make().wrap(timm_vit()), make().wrap(timm_vit())
        for batch in batches:
            first, second = (adapted(batches[1], adapt=False) for _ in range(2))
            assert torch.equal(first, second)
            assert torch.equal(adapted(batch), other(batch))

    def test_passes_are_counted(self, make, batches):
        adapted = make(population=5).wrap(timm_vit())
        adapted(batches[0])
        assert adapted.engine.net.forwards == 1 + 5  # one batch of source images
        adapted(batches[1])
        assert adapted.engine.net.forwards == 1 + 2 * 5
        assert adapted.engine.backwards == 0
        assert FOA().population == 28

    def test_without_source_images_the_entropy_is_all(self, make, batches):
        adapted = make(source=None).wrap(timm_vit())
        with pytest.warns(UserWarning, match="FOA found no source images, so its fitness is the entropy alone, and it"):
            adapted(batches[0])
        assert adapted.engine.method.protocol()["source_samples"] is None
        other = make(fitness_weight=0.0, shift=0.0).wrap(timm_vit())
        other(batches[0])
        assert other.engine.method.protocol()["source_samples"] == 32
        assert torch.equal(adapted(batches[1]), other(batches[1]))

    def test_the_fitness_falls(self, make, batches):
        adapted, images = make(population=10).wrap(timm_vit()), batches[0]
        method, seen = adapted.engine.method, []
        for _ in range(30):
            adapted(images)
            source, net = method._source, adapted.engine.net
            with method._transformer.prompted(method._best) as tokens:
                logits, _, values = method._pass(net, images, tokens)
            seen.append(float(candidate_fitness(logits, values, source, 0.4)))
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] < seen[0]

    def test_candidates_that_are_not_finite_are_the_worst(self, make, batches):
        net = timm_vit()
        adapted, spoilt = make().wrap(net), [1]
        adapted(batches[0])
        passes = []

        def spoil(module, inputs, output):
            passes.append(1)
            return output * torch.nan if len(passes) in spoilt else output

        hook = net.head.register_forward_hook(spoil)
        assert torch.isfinite(adapted(batches[1])).all()
        assert int(adapted.engine.method._evolution.generation) == 2
        spoilt[:] = range(len(passes) + 1, len(passes) + 7)
        assert torch.isfinite(adapted(batches[2])).all()
        assert int(adapted.engine.method._evolution.generation) == 2  # nothing was learned from that batch
        hook.remove()

    def test_bad_batches_are_predicted_alone(self, make, batches):
        adapted = make(on_bad_batch="skip").wrap(timm_vit())
        adapted(batches[0])
        before = adapted.state_dict()["tensors"]
        broken = batches[1].clone()
        broken[0, 0, 0, 0] = torch.nan
        with pytest.warns(UserWarning, match="NaN or infinite pixels"):
            assert torch.isfinite(adapted(broken)).all()
        torch.testing.assert_close(adapted.state_dict()["tensors"], before, rtol=0, atol=0)

    @pytest.mark.parametrize("passes", [FastPass, RecomputedBlocks])
    @pytest.mark.filterwarnings("ignore:FastPass changes nothing")
    def test_ways_to_compute_passes(self, make, batches, passes):
        adapted, other = make(passes=passes()).wrap(timm_vit()), make().wrap(timm_vit())
        for batch in batches:
            torch.testing.assert_close(adapted(batch), other(batch), rtol=1e-6, atol=1e-8)

    def test_a_compiled_network(self, make, batches):
        compiled = torch.compile(timm_vit(), backend="eager")
        with torch.no_grad():
            compiled(batches[0])
        adapted, other = make().wrap(compiled), make().wrap(timm_vit())
        for batch in batches:
            torch.testing.assert_close(adapted(batch), other(batch), rtol=1e-8, atol=1e-8)

    def test_mixed_precision_is_finite(self, make, batches):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapted = make(source=[batches[0].float()]).wrap(timm_vit().float())
            for batch in batches:
                logits = adapted(batch.float())
                assert torch.isfinite(logits).all()
        assert {value.dtype for value in adapted.module.state_dict().values()} == {torch.float32}


class TestNetworks:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"global_pool": "avg"},
            {"global_pool": "map"},
            {"reg_tokens": 2},
            {"pre_norm": True},
            {"dynamic_img_size": True},
        ],
        ids=str,
    )
    def test_prompts_stand_behind_the_class_token_and_are_not_pooled(self, make, batches, settings):
        net, prompts = timm_vit(**settings), torch.randn(2, 6).double()
        tokens, seen = 4 + net.num_prefix_tokens, []
        hooks = [
            part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape)) for part in net.blocks[1:]
        ]
        with torch.no_grad(), PromptedTransformer(net).prompted(prompts) as kept:
            assert net.forward_features(batches[0]).shape == (6, tokens, 6)
        assert seen == [(6, tokens + 2, 6)] * 2
        assert kept.take().shape == (6, 3 * 6)
        for hook in hooks:
            hook.remove()
        adapted = make().wrap(net)
        for batch in batches:
            assert torch.isfinite(adapted(batch)).all()

    def test_a_pass_without_prompts_is_the_networks(self, network, batches):
        net = network()
        with torch.no_grad():
            expected = net(batches[0])
            with PromptedTransformer(net).prompted():
                assert torch.equal(net(batches[0]), expected)

    def test_a_hidden_layer_in_the_head(self, make, batches):
        adapted = make().wrap(torchvision_vit(representation_size=7))
        for batch in batches:
            assert torch.isfinite(adapted(batch)).all()
        assert adapted.engine.method.method_state()["source.features"].shape == (7,)

    def test_as_a_part_with_a_classifier_of_its_own(self, make, batches):
        adapted = make().wrap(InPart())
        for batch in batches:
            output = adapted(batch)
            assert output["logits"].shape == (len(batch), 4)
            assert output["features"].shape == (len(batch), 6)

    def test_in_a_task(self, make):
        images = torch.rand(3, 3, 160, 160, generator=torch.Generator().manual_seed(2))
        task = SupervisedTask(encoder="test_vit", stem="imagenet", num_classes=4).eval()
        adapted = make(source=[images * 0.5]).wrap(task)
        assert adapted(images).shape == (3, 4)
        assert adapted(images).shape == (3, 4)

    def test_another_method_afterwards(self, make, batches):
        net = timm_vit()
        with make().wrap(net) as adapted:
            adapted(batches[0])
        with Tent(lr=0.01).wrap(net) as adapted:
            assert torch.isfinite(adapted(batches[0])).all()


def test_in_a_lightning_run_the_validation_set_is_the_source(make, tmp_path):
    class Plain(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = timm_vit(10, img_size=32, patch_size=16).float()

        def forward(self, images):
            return self.net(images)

        def test_step(self, batch, batch_idx):
            self.log("mean", self(batch[0]).mean())

    method = make(source=None, source_samples=8)
    data = DigitsDataModule(batch_size=10, domains=["clean"], limit=20)
    trainer = lightning.Trainer(
        accelerator="cpu", callbacks=[method], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    model = Plain()
    trainer.test(model, data, verbose=False)
    state = method.state_dict()
    assert state["counters"]["batches"] == 2
    assert bool(state["tensors"]["method.source.measured"])
    assert not hooks_of(model.net)


def test_fitness_grows_with_the_batch():
    generator = torch.Generator().manual_seed(0)
    logits, tokens = (torch.randn(8, size, generator=generator, dtype=torch.float64) for size in (5, 12))
    source = SourceTokens(tokens[0], tokens[0, :6])
    source.measure(torch.randn(9, 12, generator=generator).double(), torch.randn(9, 6, generator=generator).double())
    entropies = candidate_fitness(logits, tokens, source, 0.0)
    once = candidate_fitness(logits, tokens, source, 0.4) - entropies
    means = (tokens.mean(0) - source.mean).square().sum()
    stds = (tokens.std(0) - source.std).square().sum()
    torch.testing.assert_close(once, 0.4 * 8 / 64 * (means + stds))
    alone = candidate_fitness(logits[:1], tokens[:1], source, 0.4)  # of one image the mean alone counts
    expected = candidate_fitness(logits[:1], tokens[:1], source, 0.0)
    torch.testing.assert_close(alone, expected + 0.4 / 64 * (tokens[0] - source.mean).square().sum())


def test_the_shift_is_that_of_features():
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(size, 6, generator=generator, dtype=torch.float64) for size in (3, 4))
    bias, shift = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (4, 6))
    linear = nn.functional.linear
    expected = linear(features + shift, weight, bias)
    torch.testing.assert_close(shifted_logits(linear(features, weight, bias), shift, weight), expected)
    masked = linear(features, weight, bias).masked_fill(torch.tensor([True, False, False, False]), -torch.inf)
    assert torch.isneginf(shifted_logits(masked, shift, weight)[:, 0]).all()
