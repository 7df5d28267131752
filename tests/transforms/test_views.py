from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as oracle

from ttalight.transforms import (
    RandomCropFlip,
    RandomResizedCropFlip,
    SimCLRViews,
    ViewParameters,
    blur_kernel_size,
    draw_mask,
    draw_offsets,
    padded_crop,
    simclr,
)

JITTER = (oracle.adjust_brightness, oracle.adjust_contrast, oracle.adjust_saturation, oracle.adjust_hue)
MODULES = [
    pytest.param(SimCLRViews(size=24, blur=0.5), id="SimCLRViews"),
    pytest.param(RandomResizedCropFlip(size=24), id="RandomResizedCropFlip"),
    pytest.param(RandomCropFlip(), id="RandomCropFlip"),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle_view(image: torch.Tensor, p: ViewParameters, n: int, size: int) -> torch.Tensor:
    view = oracle.resized_crop(image, *p.boxes[n].tolist(), size=[size, size], antialias=True)
    if p.flip[n]:
        view = oracle.horizontal_flip(view)
    if p.jitter.applied[n]:
        for operation in p.jitter.order[n].tolist():
            view = JITTER[operation](view, p.jitter[operation][n].item())
    if p.grey[n]:
        view = oracle.rgb_to_grayscale(view, num_output_channels=3)
    if p.blurred[n]:
        kernel = blur_kernel_size(size)
        view = oracle.gaussian_blur(view, [kernel, kernel], [p.sigmas[n].item()] * 2)
    return view


@pytest.mark.parametrize(("height", "width", "size", "batch"), [(32, 32, 32, 20), (30, 40, 48, 20), (256, 250, 224, 1)])
def test_views_equal_torchvision(height, width, size, batch):
    module = SimCLRViews(size=size, blur=0.5)
    images = torch.rand(batch, 3, height, width, generator=seeded())
    parameters = module.draw(2 * batch, height, width, seeded(1))
    made = module(images, seeded(1))
    expected = torch.stack([oracle_view(images[n % batch], parameters, n, size) for n in range(2 * batch)])
    assert made.shape == (2 * batch, 3, size, size)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert torch.equal(module.render(images, parameters), made)


def test_large_batch_in_parts_is_unchanged(monkeypatch):
    images = torch.rand(21, 3, 16, 16, generator=seeded())
    module = SimCLRViews(blur=0.3)
    whole = module(images, seeded(1), views=3)
    calls = []
    render = simclr._render
    monkeypatch.setattr(simclr, "_CACHED_VALUES", 1)
    monkeypatch.setattr(simclr, "_render", lambda part, *rest: calls.append(len(part)) or render(part, *rest))
    assert torch.equal(module(images, seeded(1), views=3), whole)
    assert calls == [8, 8, 5]


def test_views_are_view_major_with_own_draws():
    levels = torch.linspace(0.1, 0.9, 5)
    images = levels[:, None, None, None].expand(5, 3, 12, 18)
    plain = SimCLRViews(jitter_probability=0.0, grayscale=0.0)
    made = plain(images, seeded(), views=3)
    assert made.shape == (15, 3, 12, 12)
    torch.testing.assert_close(made.mean(dim=(1, 2, 3)), levels.repeat(3), rtol=0, atol=1e-6)
    noise = torch.rand(1, 3, 16, 16, generator=seeded()).expand(4, -1, -1, -1)
    assert len(SimCLRViews()(noise, seeded()).flatten(1).unique(dim=0)) == 8


def test_with_everything_off_views_are_the_images():
    off = SimCLRViews(scale=(1, 1), ratio=(1, 1), flip=0, jitter_probability=0, grayscale=0)
    images = torch.rand(4, 3, 20, 20, generator=seeded())
    assert torch.equal(off(images), images.repeat(2, 1, 1, 1))
    drawn = off.draw(8, 20, 20)
    assert drawn[1:] == (None,) * 5
    assert torch.equal(
        SimCLRViews(scale=(1, 1), ratio=(1, 1), flip=1, jitter=(0, 0, 0, 0), grayscale=0)(images, views=1),
        images.flip(3),
    )
    assert torch.equal(RandomCropFlip(padding=0, flip=0)(images), images)
    assert torch.equal(RandomResizedCropFlip(scale=(1, 1), ratio=(1, 1), flip=0)(images), images)


def test_chances_are_the_configured_ones():
    drawn = SimCLRViews(flip=0.3, jitter_probability=0.7, grayscale=0.1, blur=0.4).draw(10_000, 32, 32, seeded())
    for mask, chance in ((drawn.flip, 0.3), (drawn.jitter.applied, 0.7), (drawn.grey, 0.1), (drawn.blurred, 0.4)):
        assert abs(float(mask.float().mean()) - chance) < 4 * (chance * (1 - chance) / 10_000) ** 0.5
    together = (drawn.flip & drawn.jitter.applied).float().mean()
    assert abs(float(together) - 0.21) < 0.017
    assert 0.1 <= float(drawn.sigmas.min()) < 0.11
    assert 1.99 < float(drawn.sigmas.max()) <= 2.0


def test_grey_images_stay_grey():
    digits = torch.rand(16, 1, 28, 28, generator=seeded()).expand(-1, 3, -1, -1)
    made = SimCLRViews(size=32, jitter_probability=1.0)(digits, seeded())
    torch.testing.assert_close(made, made[:, :1].expand_as(made), rtol=0, atol=1e-6)
    assert bool(made.isfinite().all())


def test_random_crop_flip_is_its_parts():
    images = torch.rand(12, 3, 9, 11, generator=seeded())
    generator = seeded(1)
    offsets = draw_offsets(12, 4, generator)
    expected = padded_crop(images, offsets, 4, draw_mask(12, 0.5, generator, "cpu"))
    assert torch.equal(RandomCropFlip()(images, seeded(1)), expected)


@pytest.mark.parametrize("module", MODULES)
def test_draws_come_from_the_generator_alone(module):
    images = torch.rand(6, 3, 32, 28, generator=seeded())
    before = torch.get_rng_state()
    generator = seeded(1)
    first, second = module(images, generator), module(images, generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(module(images, seeded(1)), first)
    assert not torch.equal(first, second)
    # What one image gets does not depend on what the others show.
    others = images.clone()
    others[1:] = torch.rand(5, 3, 32, 28, generator=seeded(2))
    assert torch.equal(module(others, seeded(1))[0], first[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        third = module(images)
        torch.manual_seed(5)
        assert torch.equal(module(images), third)


class OneDevice(TorchDispatchMode):
    """Refuses tensors that are not on the meta device: a constant made on the host would have to be copied."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        others = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor) and not x.is_meta]
        assert not others, f"{func} works on the host"
        return made


@pytest.mark.parametrize("module", MODULES)
def test_no_value_is_read_and_no_shape_depends_on_one(module):
    images = torch.empty(6, 3, 32, 28, device="meta")
    with OneDevice():
        made = module(images)
    assert made.device.type == "meta"


@pytest.mark.parametrize("module", MODULES)
def test_a_generator_of_another_device_draws_there(module):
    generator = seeded()
    assert module(torch.empty(6, 3, 32, 28, device="meta"), generator).device.type == "meta"
    assert not torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize("module", MODULES)
def test_compiles_into_one_graph(module):
    images = torch.rand(6, 3, 32, 28, generator=seeded())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = module(images)
        torch.manual_seed(0)
        made = torch.compile(module, fullgraph=True, backend="eager")(images)
    torch._dynamo.reset()
    assert torch.equal(made, expected)


def test_rendering_compiles_with_a_generator(monkeypatch):
    images = torch.rand(20, 3, 32, 32, generator=seeded())
    module = SimCLRViews()
    expected = module(images, seeded(1))
    parameters = module.draw(40, 32, 32, seeded(1))
    gathers = []

    def count_gathers(graph, _):
        gathers.append(sum("embedding_bag" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(simclr, "_CACHED_VALUES", 1)
    made = torch.compile(module.render, fullgraph=True, backend=count_gathers)(images, parameters)
    torch._dynamo.reset()
    assert torch.equal(made, expected)
    assert gathers == [2]


@pytest.mark.parametrize("module", MODULES)
def test_precision(module):
    images = torch.rand(4, 3, 32, 28, generator=seeded())
    expected = module(images, seeded(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(images, seeded(1)), expected)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        made = module(images.to(dtype), seeded(1))
        assert made.dtype == dtype
        assert torch.equal(
            made, module(images.to(dtype).to(torch.promote_types(dtype, torch.float32)), seeded(1)).to(dtype)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("module", MODULES)
def test_cuda_equals_cpu_without_synchronising(module):
    images = torch.rand(6, 3, 32, 28, generator=seeded())
    there = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(there, torch.Generator("cuda").manual_seed(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(module(there, seeded(1)).cpu(), module(images, seeded(1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", MODULES)
def test_wrong_images(module):
    images = torch.rand(2, 3, 32, 32)
    with pytest.raises(TypeError, match=r"got torch.uint8: use images.float\(\) / 255"):
        module((images * 255).byte())
    with pytest.raises(ValueError, match=r"got shape \(3, 32, 32\): add the batch dimension with images\[None\]"):
        module(images[0])
    with pytest.raises(ValueError, match=r"with 1 channels: repeat the grey channel"):
        module(images[:, :1])
    with pytest.raises(ValueError, match=r"H, W >= 1; got shape \(2, 3, 0, 32\)"):
        module(images[:, :, :0])
    assert len(module(images[:0])) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"size must be a whole number >= 1; got 0"),
        ({"size": 2.5}, r"size must be a whole number >= 1; got 2.5"),
        ({"scale": (0.0, 1.0)}, r"scale must be two finite numbers with 0 < low <= high <= 1; got \(0.0, 1.0\)"),
        ({"scale": [0.5, 1.5]}, r"scale must be .*; got \[0.5, 1.5\]"),
        ({"scale": 0.2}, r"scale must be .*; got 0.2"),
        ({"ratio": (4 / 3, 3 / 4)}, r"ratio must be two finite numbers"),
        ({"ratio": (1.0, float("inf"))}, r"ratio must be two finite numbers"),
        ({"flip": 1.1}, r"flip must be a probability in \[0, 1\]; got 1.1"),
        ({"jitter": (0.4, 0.4, 0.4)}, r"jitter must be four numbers"),
        ({"jitter": (-0.4, 0.4, 0.4, 0.1)}, r"jitter must be four numbers"),
        ({"jitter_probability": -1}, r"jitter_probability must be a probability"),
        ({"grayscale": float("nan")}, r"grayscale must be a probability"),
        ({"blur": 2}, r"blur must be a probability"),
        ({"blur_sigma": (2.0, 0.1)}, r"blur_sigma must be two finite numbers"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimCLRViews(**arguments)


def test_lists_become_tuples():
    module = SimCLRViews(scale=[0.3, 1], ratio=[1, 2], jitter=[0, 0, 0, 0.1], blur_sigma=[0.5, 1])
    assert (module.scale, module.ratio, module.blur_sigma) == ((0.3, 1.0), (1.0, 2.0), (0.5, 1.0))
    assert module.jitter == (0.0, 0.0, 0.0, 0.1)
    assert RandomResizedCropFlip(scale=[0.3, 1]).scale == (0.3, 1.0)
    assert not module.state_dict()
    with pytest.raises(ValueError, match=r"views must be a whole number >= 1; got 0"):
        module(torch.rand(1, 3, 8, 8), views=0)
    with pytest.raises(ValueError, match=r"boxes must be \(N, 4\) with N a multiple of the 2 images"):
        module.render(torch.rand(2, 3, 8, 8), module.draw(3, 8, 8))
    assert [blur_kernel_size(size) for size in (8, 32, 64, 224)] == [3, 3, 7, 23]
