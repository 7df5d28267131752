"""PTBN, EMABN, AlphaBN, T3A, LAME and FIND against slow references written from their formulas."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from support.networks import small_net
from torch import nn

from ttalight.adapters import EMABN, FIND, LAME, PTBN, T3A, AlphaBN
from ttalight.adapters.methods.find import same_group
from ttalight.adapters.methods.lame import laplacian_adjusted


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(9, 3, 12, 12, generator=generator, dtype=torch.float64)
    base[:4] *= 3
    return [base, base.flip(0) * 0.3 + 1, base[:1], base[2:5]]


def normalized(net, images, statistics):
    """Run the network with means and variances, (B, C) or (C,), that a function makes for each BatchNorm layer."""
    x = images
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            mean, var = statistics(module, x)
            mean, var = (value.expand(len(x), -1)[:, :, None, None] for value in (mean, var))
            x = (x - mean) / (var + module.eps).sqrt()
            x = x * module.weight[:, None, None] + module.bias[:, None, None]
        else:
            x = module(x)
    return x


def moments(x):
    """Mean and biased variance of each channel, by loops, and the number of values."""
    means, variances = [], []
    for channel in x.transpose(0, 1):
        values = channel.flatten().tolist()
        means.append(math.fsum(values) / len(values))
        variances.append(math.fsum((value - means[-1]) ** 2 for value in values) / len(values))
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64), len(values)


class TestPTBN:
    def test_against_loops(self):
        net = small_net()
        adapted = PTBN().wrap(copy.deepcopy(net))
        for images in batches():
            expected = normalized(net, images, lambda layer, x: moments(x)[:2])
            torch.testing.assert_close(adapted(images), expected.detach())
        state = adapted.module.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert adapted.engine.net.forwards == len(batches())


class TestEMABN:
    @pytest.mark.parametrize(("steps", "momentum"), [(1, 0.1), (3, 0.4), (2, 1.0)])
    def test_against_loops(self, steps, momentum):
        reference = small_net()
        adapted = EMABN(steps=steps, momentum=momentum, reset="never").wrap(small_net())

        def move(layer, x):
            mean, var, count = moments(x)
            layer.running_mean.mul_(1 - momentum).add_(momentum * mean)
            layer.running_var.mul_(1 - momentum).add_(momentum * var * count / (count - 1))
            return mean, var

        for images in batches():
            with torch.no_grad():
                for _ in range(steps):
                    normalized(reference, images, move)
                expected = normalized(reference, images, lambda layer, x: (layer.running_mean, layer.running_var))
            torch.testing.assert_close(adapted(images), expected)
            for name, value in adapted.module.state_dict().items():
                if "num_batches" not in name:
                    torch.testing.assert_close(value, reference.state_dict()[name], msg=name)


class TestAlphaBN:
    @pytest.mark.parametrize(("arguments", "share"), [({"prior": 5.0}, None), ({"alpha": 0.3}, 0.3)])
    def test_mixes_means_and_variances(self, arguments, share):
        net = small_net()
        adapted = AlphaBN(**arguments).wrap(copy.deepcopy(net))
        for images in batches():
            a = len(images) / (len(images) + 5.0) if share is None else share

            def mixed(layer, x, a=a):
                pixels = x.transpose(0, 1).flatten(1)
                var = ((pixels - pixels.mean(1, keepdim=True)) ** 2).mean(1)
                return (1 - a) * layer.running_mean + a * pixels.mean(1), (1 - a) * layer.running_var + a * var

            torch.testing.assert_close(adapted(images), normalized(net, images, mixed).detach())

    def test_between_the_source_and_the_batch(self):
        net, images = small_net(), batches()[0]
        torch.testing.assert_close(AlphaBN(alpha=0.0).wrap(copy.deepcopy(net))(images), net(images).detach())
        batch = PTBN().wrap(copy.deepcopy(net))(images)
        torch.testing.assert_close(AlphaBN(alpha=1.0).wrap(copy.deepcopy(net))(images), batch)
        torch.testing.assert_close(AlphaBN(prior=0).wrap(net)(images), batch)

    def test_fused_layers_keep_their_activation(self):
        net = timm.create_model("tf_efficientnet_lite0", num_classes=4).double().eval()
        images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(AlphaBN(alpha=0.0).wrap(copy.deepcopy(net))(images), net(images).detach())


class TestT3A:
    @pytest.mark.parametrize("supports", [1, 3, 50])
    def test_against_lists(self, supports):
        net = small_net()
        features, head = net[:-1], net[-1]
        adapted = T3A(supports=supports).wrap(copy.deepcopy(net))
        kept = []  # (feature, class, entropy)

        def insert(vectors):
            for vector, logits in zip(vectors, head(vectors), strict=True):
                p = logits.softmax(0)
                kept.append((vector, int(p.argmax()), float(-(p * p.log()).sum())))

        with torch.no_grad():
            insert(head.weight)
            for images in batches():
                insert(features(images))
                rows = []
                for label in range(4):
                    mine = sorted((entry for entry in kept if entry[1] == label), key=lambda entry: entry[2])[:supports]
                    total = sum((vector / vector.norm() for vector, _, _ in mine), torch.zeros(6).double())
                    rows.append(total / total.norm().clamp_min(1e-12))
                torch.testing.assert_close(adapted(images), features(images) @ torch.stack(rows).T)

    def test_reset_and_state(self):
        adapted, other = T3A(supports=2).wrap(small_net()), T3A(supports=2).wrap(small_net())
        first = adapted(batches()[0])
        adapted(batches()[1])
        state = adapted.engine.capture()
        last = adapted(batches()[3])
        other(batches()[2])
        other.engine.restore(state)
        assert torch.equal(other(batches()[3]), last)
        adapted.reset()
        assert torch.equal(adapted(batches()[0]), first)

    def test_batch_statistics_on_request(self):
        images = batches()[0]
        assert not torch.equal(T3A(norm="batch").wrap(small_net())(images), T3A().wrap(small_net())(images))


def nearest(features, k):
    distances = [[float((a - b).norm()) for b in features] for a in features]
    return distances, [sorted(range(len(features)), key=lambda j: row[j])[:k] for row in distances]


def authors_labels(probabilities, weights, floor, stops):
    """Run the authors' loop in Python floats: labels of all images, the early stop of their code on request."""
    unary = [[-math.log(p + floor) for p in row] for row in probabilities]
    classes, before = range(len(unary[0])), math.inf
    y = probabilities
    for step in range(100):
        pairwise = [[sum(w * row[c] for w, row in zip(near, y, strict=True)) for c in classes] for near in weights]
        exponents = [[q - u for q, u in zip(*rows, strict=True)] for rows in zip(pairwise, unary, strict=True)]
        powers = [[math.exp(e - max(row)) for e in row] for row in exponents]
        y = [[value / sum(row) for value in row] for row in powers]
        energy = sum(
            v * (u - q + math.log(max(v, 1e-20)))
            for rows in zip(y, unary, pairwise, strict=True)
            for v, u, q in zip(*rows, strict=True)
        )
        if stops and step > 1 and abs(energy - before) <= 1e-8 * abs(before):
            break
        before = energy
    return [row.index(max(row)) for row in y]


class TestLAME:
    @pytest.mark.parametrize("kernel", ["rbf", "knn", "linear"])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_against_loops(self, kernel, symmetric):
        net = small_net()
        adapted = LAME(kernel=kernel, symmetric=symmetric, neighbors=3).wrap(copy.deepcopy(net))
        for images in batches():
            with torch.no_grad():
                vectors = [v / v.norm() for v in net[:-1](images)]
                p = net(images).softmax(1)
            n = len(images)
            distances, order = nearest(vectors, n)
            weights = torch.zeros(n, n, dtype=torch.float64)
            width = sum(row[order[i][min(3, n) - 1]] for i, row in enumerate(distances)) / n
            for i in range(n):
                for j in range(n):
                    if kernel == "linear":
                        weights[i, j] = vectors[i] @ vectors[j]
                    elif kernel == "rbf":
                        weights[i, j] = math.exp(-(distances[i][j] ** 2) / (2 * width**2)) if n > 1 else 1.0
                    else:
                        weights[i, j] = float(j in order[i][1:4])
            if symmetric:
                weights = (weights + weights.T) / 2
            y = p
            for _ in range(100):
                y = ((p + 1e-10).log() + weights @ y).softmax(1)
            torch.testing.assert_close(adapted(images), y.log())

    def test_floor_changes_labels_and_early_stop_does_not(self):
        """The authors add 1e-10 to probabilities, and stop when their objective changes by less than 1e-8 of itself."""
        net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False)).double()
        with torch.no_grad():
            net[1].weight.copy_(torch.tensor([[0.0, 0, 0], [0, 4000, 0], [0, 0, 4000]]))
        images = 0.01 * torch.randn(40, 3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        # Features are much alike, and some predictions so sure that neighbours overrule them by the floor alone.
        images += torch.tensor([1.0, 0.01, 0.0], dtype=torch.float64).view(3, 1, 1)
        with torch.no_grad():
            probabilities = net(images).softmax(1).clamp_min(1e-300).tolist()
        vectors = nn.functional.normalize(images.flatten(1), dim=1)
        weights = (vectors @ vectors.T).tolist()
        cases = [(1e-10, True), (1e-10, False), (0.0, False)]
        stopped, floored, plain = (authors_labels(probabilities, weights, *case) for case in cases)
        assert stopped == floored != plain
        assert LAME(kernel="linear").wrap(net)(images).argmax(1).tolist() == floored

    def test_neighbours_agree(self):
        """Images of one kind get one label, where the network alone wavers."""
        logits = torch.tensor([[0.4, 0.0], [0.3, 0.0], [-0.1, 0.0]], dtype=torch.float64)
        adjusted = laplacian_adjusted(logits.log_softmax(1), torch.ones(3, 3, dtype=torch.float64), 100)
        assert adjusted.argmax(1).tolist() == [0, 0, 0]
        torch.testing.assert_close(adjusted.exp().sum(1), torch.ones(3, dtype=torch.float64))


def groups_by_union(means):
    parent = list(range(len(means)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i, a in enumerate(means):
        others = [j for j in range(len(means)) if j != i]
        if others:
            best = max(others, key=lambda j: (a @ means[j] / (a.norm() * means[j].norm())).item())
            parent[root(i)] = root(best)
    return [root(i) for i in range(len(means))]


class TestFIND:
    def test_against_loops(self):
        net = small_net()
        adapted = FIND(layers="all", alpha=0.7).wrap(copy.deepcopy(net))

        def of_groups(layer, x):
            roots = groups_by_union(x.mean((2, 3)))
            means, variances = [], []
            for i in range(len(x)):
                pixels = torch.cat([x[j].flatten(1) for j in range(len(x)) if roots[j] == roots[i]], 1)
                mean = pixels.mean(1)
                means.append(0.7 * layer.running_mean + 0.3 * mean)
                variances.append(0.7 * layer.running_var + 0.3 * ((pixels - mean[:, None]) ** 2).mean(1))
            return torch.stack(means), torch.stack(variances)

        for images in batches():
            torch.testing.assert_close(adapted(images), normalized(net, images, of_groups).detach())

    def test_groups_are_the_connected_components(self):
        for seed in range(20):
            means = torch.randn(2 + 3 * seed, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            roots = groups_by_union(means)
            expected = [[a == b for b in roots] for a in roots]
            assert same_group(means).tolist() == expected
        assert same_group(torch.randn(2, 5)).all()

    def test_kinds_are_told_apart(self):
        directions = torch.eye(8, dtype=torch.float64)[:2].repeat_interleave(10, 0)
        together = same_group(directions + 0.01 * torch.randn(20, 8, dtype=torch.float64))
        assert not together[:10, 10:].any()

    def test_one_image_is_its_own_group(self):
        net, image = small_net(), batches()[2]

        def instance(layer, x):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            return 0.8 * layer.running_mean + 0.2 * mean, 0.8 * layer.running_var + 0.2 * var

        expected = normalized(net, image, instance).detach()
        torch.testing.assert_close(FIND().wrap(net)(image), expected)

    @pytest.mark.parametrize("others", ["unified", "source"])
    def test_layers_that_do_not_divide(self, others):
        net = small_net()
        adapted = FIND(layers=[], others=others, alpha=0.6).wrap(copy.deepcopy(net))

        def whole(layer, x):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if others == "source":
                mean, var = layer.running_mean, layer.running_var
            return 0.6 * layer.running_mean + 0.4 * mean, 0.6 * layer.running_var + 0.4 * var

        for images in batches():
            torch.testing.assert_close(adapted(images), normalized(net, images, whole).detach())

    def test_the_choice_is_made_once_and_is_state(self):
        adapted = FIND().wrap(small_net())
        adapted(batches()[0])
        divides = adapted.engine.capture()["tensors"]["method.divides"]
        assert divides.any()
        assert not divides.all()
        second = adapted(batches()[1])
        other = FIND().wrap(small_net())
        other.engine.restore(adapted.engine.capture())
        assert torch.equal(other(batches()[1]), second)
        assert adapted.engine.net.forwards == 3  # one more to choose

    def test_release_gives_the_network_back(self):
        net, images = small_net(), batches()[0]
        before = net(images)
        adapted = FIND().wrap(net)
        assert not torch.equal(adapted(images), before)
        adapted.release()
        assert torch.equal(net(images), before)

    def test_fused_layers_keep_their_activation(self):
        net = timm.create_model("tf_efficientnet_lite0", num_classes=4).double().eval()
        images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(FIND(alpha=1.0).wrap(copy.deepcopy(net))(images), net(images).detach())

    def test_names_positions_that_do_not_exist(self):
        with pytest.raises(ValueError, match=r"layers names positions \[2\], .* BatchNorm layers 0 to 1"):
            FIND(layers=[0, 2]).wrap(small_net())(batches()[0])

    def test_refuses_networks_without_batch_norm(self):
        with pytest.raises(ValueError, match="has no BatchNorm layer"):
            FIND().wrap(timm.create_model("test_vit", num_classes=4, img_size=32))(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("method", [AlphaBN, T3A, LAME, FIND])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_any_number_of_classes(method, classes):
    adapted = method().wrap(small_net(classes))
    for images in batches():
        logits = adapted(images)
        assert logits.shape == (len(images), classes)
        assert torch.isfinite(logits).all()
