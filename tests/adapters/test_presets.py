"""Published settings, applied by ``preset``."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from support.methods import EVERY_CLASS
from torch import nn

from ttalight.adapters import MEMO, SAR, DeYO, GradientAdapter, Tent

METHODS = {name: cls for name, cls in EVERY_CLASS.items() if issubclass(cls, GradientAdapter) and cls.published}
PRESETS = [(name, benchmark) for name, method in METHODS.items() for benchmark in method.published]

#: Optimizer, rate at 16 images a batch, momentum and Nesterov as public code has them.
ADAM = ("Adam", 1e-3, 0, False)
PLAIN = ("SGD", 2.5e-4, 0.9, False)
NESTEROV = ("SGD", 2.5e-4, 0.9, True)
PUBLIC = {
    **{("Tent", "cifar"): ADAM, ("Tent", "imagenet"): PLAIN},
    **{("RPL", "cifar"): ADAM, ("RPL", "imagenet"): ("SGD", 5e-4, 0.9, True)},
    **{(name, cifar): ADAM for name in ("ETA", "EATA", "RDumb") for cifar in ("cifar", "cifar100")},
    **{(name, "imagenet"): PLAIN for name in ("ETA", "EATA", "RDumb", "TIPI", "SAR", "DeYO")},
    **{(name, "cifar"): PLAIN for name in ("SAR", "DeYO")},
    **{(name, "imagenet_below_32"): ("SGD", 2.5e-4 / 2, 0.9, False) for name in ("SAR", "DeYO")},
    **{(name, "imagenet_vit"): ("SGD", 1e-3 / 4, 0.9, False) for name in ("SAR", "DeYO")},
    ("DeYO", "imagenet_wild"): PLAIN,
    **{("DeYO", name): ("SGD", 5 * 2.5e-4, 0.9, False) for name in ("waterbirds", "colored_mnist")},
    **{(name, "cifar"): ADAM for name in ("TIPI", "ROID", "CMF")},
    **{(name, "imagenet"): NESTEROV for name in ("ROID", "CMF")},
    **{(name, "cifar"): ("SGD", 1e-3, 0.9, True) for name in ("SHOT", "NCTTA")},
    **{("MoETTA", name): ("SGD", 1e-3, 0.9, False) for name in ("cifar", "imagenet")},
    **{("MEMO", "cifar"): ("SGD", 5e-3, 0, False), ("MEMO", "imagenet"): ("SGD", 2.5e-4, 0, False)},
    **{("CoTTA", name): ADAM for name in ("cifar", "cifar100")},
    ("CoTTA", "cityscapes"): ("Adam", 6e-5 / 8, 0, False),
    **{("RoTTA", name): ADAM for name in ("cifar", "imagenet")},
    **{("NOTE", name): ("Adam", 1e-4, 0, False) for name in ("cifar", "imagenet")},
    **{(name, "cifar"): ADAM for name in ("SANTA", "RMT")},
    **{(name, "imagenet"): ("SGD", 0.01, 0.9, True) for name in ("CoTTA", "SANTA", "RMT")},
    **{("AdaContrast", name): ("SGD", 2e-4, 0.9, True) for name in ("cifar", "imagenet")},
    ("ActMAD", "cifar"): ("SGD", 0.01, 0.9, True),
    ("ActMAD", "cifar100"): ("SGD", 1e-3, 0.9, True),
    ("ActMAD", "imagenet"): NESTEROV,
    **{("BATCLIP", "cifar"): ("AdamW", 1e-3, 0, False), ("BATCLIP", "imagenet"): ("AdamW", 5e-4, 0, False)},
    **{(name, "cifar"): ADAM for name in ("CLIPArTT", "WATT")},
    ("TestTimeTraining", "cifar"): ("Adam", 1e-6, 0, False),
}


def optimizer_of(method):
    return method.make_optimizer([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize(("name", "benchmark"), PRESETS)
def test_optimizers_are_those_of_public_code(name, benchmark):
    given = {"batch_size": 16} if "lr_per_image" in METHODS[name].published[benchmark] else {}
    optimizer = optimizer_of(METHODS[name].preset(benchmark, **given))
    (group,) = optimizer.param_groups
    kind, lr, momentum, nesterov = PUBLIC[name, benchmark]
    assert type(optimizer).__name__ == kind
    assert group["lr"] == pytest.approx(lr)
    assert (group.get("momentum", 0), group.get("nesterov", False)) == (momentum, nesterov)
    assert group["weight_decay"] == {"AdaContrast": 1e-4, "ActMAD": 5e-4, "BATCLIP": 0.01}.get(name, 0)


@pytest.mark.parametrize(("name", "benchmark"), PRESETS)
def test_every_published_setting_is_applied(name, benchmark):
    settings = METHODS[name].published[benchmark]
    method = METHODS[name].preset(benchmark, **({} if "lr" in settings else {"batch_size": 16}))
    optimizer = optimizer_of(method)
    assert type(optimizer).__name__ == settings["optimizer"]
    assert optimizer.param_groups[0]["lr"] == settings.get("lr", settings.get("lr_per_image", 0) * 16)
    for option in ("momentum", "nesterov", "weight_decay"):
        assert optimizer.param_groups[0].get(option, 0) == settings.get(option, 0)
    optional = ("optimizer", "lr", "lr_per_image", "momentum", "nesterov", "weight_decay", "batch_size")
    arguments = {name: value for name, value in settings.items() if name not in optional}
    assert arguments.items() <= vars(method).items()


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_the_settings_for_cifar(name):
    default, preset = optimizer_of(METHODS[name]()), optimizer_of(METHODS[name].preset("cifar"))
    assert type(default) is type(preset)
    assert default.defaults == preset.defaults


def test_overrides():
    assert optimizer_of(Tent.preset("imagenet", lr=0.5)).param_groups[0]["momentum"] == 0.9
    assert optimizer_of(Tent.preset("imagenet", lr=0.5)).param_groups[0]["lr"] == 0.5
    assert MEMO.preset("imagenet", views=8).views == 8
    assert isinstance(
        optimizer_of(Tent.preset("imagenet", optimizer=partial(torch.optim.RMSprop, lr=1.0))), torch.optim.RMSprop
    )
    assert optimizer_of(SAR.preset("imagenet_vit", batch_size=32)).param_groups[0]["lr"] == pytest.approx(5e-4)


def test_messages():
    with pytest.raises(ValueError, match="Tent has settings for cifar, imagenet, got 'imagnet'"):
        Tent.preset("imagnet")
    with pytest.raises(ValueError, match="published for each image: give batch_size="):
        DeYO.preset("imagenet_below_32")


@pytest.mark.filterwarnings("error")
def test_presets_do_not_warn_on_many_classes(make_net, images):
    adapted = Tent.preset("imagenet").wrap(make_net(classes=200))
    assert adapted(images.repeat(2, 1, 1, 1)).shape == (12, 200)


def test_settings_take_part_in_copies(make_net, images):

    adapted = Tent.preset("imagenet").wrap(make_net())
    adapted(images)
    assert isinstance(copy.deepcopy(adapted).engine.net.optimizer, torch.optim.SGD)
