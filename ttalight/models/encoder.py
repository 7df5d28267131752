"""Encoders: timm's networks without their classifier, with a stem that fits the size of the images."""

from __future__ import annotations

import difflib
import pickle
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import load_file
from timm.models import EfficientNet, ResNet
from torch import Tensor, nn

from ttalight.errors import InputError, MissingFileError, UsageError
from ttalight.files.tensors import load_tensors

# What registers the networks for 32-pixel images with timm.
from ttalight.models.cifar import cifar_preact_resnet, cifar_resnet, cifar_resnet_gn, cifar_resnext, cifar_wide_resnet  # noqa: F401
from ttalight.models.cifar.cifar_network import CifarNetwork
from ttalight.models.cifar.cifar_vit import CifarViT
from ttalight.models.depthwise import with_fast_depthwise
from ttalight.models.weight_files import PublicWeights, classifier_names, numbers_allowed, public_weights

__all__ = ["create_encoder", "download_weights", "with_normalisation"]


def create_encoder(
    name: str,
    *,
    pretrained: bool | str = False,
    stem: Literal["cifar", "imagenet"] = "cifar",
    in_chans: int = 3,
) -> nn.Module:
    """Build a timm network that maps images (B, in_chans, H, W) to pooled features (B, num_features).

    With ``stem="cifar"`` a ResNet of timm starts with a 3x3 convolution of stride 1 and no max-pooling in place of
    the 7x7 convolution of stride 2 and the pooling, so that 32- and 64-pixel images keep their resolution up to the
    first stage (as in the public code of ClusT3, ReC-TTT and TTT++). Pretrained 7x7 kernels are cut to their 3x3
    centre. The first convolution of timm's ``EfficientNet`` class (EfficientNet, EfficientNet-Lite, MobileNetV2 and
    MNASNet) gets a stride of 1 and keeps its weights. The cifar_* networks have that stem already: cifar_resnet8, 14,
    20, 32, 44, 56 and 110, cifar_resnet26_gn, cifar_preact_resnet18, cifar_wrn28_10, cifar_wrn40_2,
    cifar_resnext29_4x32d and the transformers cifar_vit4 and cifar_vit8.

    Depthwise convolutions are ``DepthwiseConv2d``, whose weight gradient is fast on small maps on the CPU.

    ``num_features`` of the result is what the encoder puts out. For networks with a hidden layer in their head
    (MobileNetV3 and others) timm gives that attribute another meaning, the channels before the head.

    Args:
        name: Name of a timm network, such as "resnet50", "resnet50.tv_in1k" or "cifar_resnet20".
        pretrained: False for random weights, True for those that timm downloads, or the path of a local weight file
            (.pth, .pt, .safetensors): a state dict, or a dict with one under "state_dict", "model", "net" or "last".
            The names of public files of the cifar_* networks and of ResNets for 32-pixel images are understood;
            prefixes "module." and classifier weights are dropped. Files are read without running code
            (``weights_only=True``).
        stem: "cifar" or "imagenet" (the network as timm has it).
        in_chans: Channels of the images.

    Returns:
        The encoder, in training mode. Its ``pretrained_cfg`` holds the mean and std that pretrained weights expect:
        the one in a file itself, else that of timm for the network.

    Raises:
        ValueError: If there is no such network, it has no stem to be replaced, or a weight file is unreadable or does
            not fit; the message lists the keys.
        FileNotFoundError: If there is no such weight file.
        RuntimeError: If timm cannot get pretrained weights.
    """
    if stem not in ("cifar", "imagenet"):
        raise InputError(f"stem must be cifar or imagenet, got {stem!r}")
    file = None if isinstance(pretrained, bool) else Path(pretrained).expanduser()
    if file is not None and not file.is_file():
        raise MissingFileError(
            f"pretrained: there is no file {pretrained}. Give the path of a local weight file, true to let timm "
            "download weights, or false for random ones"
        )
    encoder = _from_timm(name, download=pretrained is True, in_chans=in_chans, num_classes=0)
    if stem == "cifar" and not isinstance(encoder, (CifarNetwork, CifarViT)):
        _replace_stem(encoder, name, keep_weights=pretrained is True)
    if file is not None:
        _load_file(encoder, name, file)
    return with_fast_depthwise(_with_measured_features(encoder, name, in_chans))


def download_weights(name: str) -> dict[str, Tensor]:
    """Return the pretrained weights that timm downloads for a network, those of its classifier included.

    Args:
        name: Name of a timm network, such as "resnet50.tv_in1k".

    Raises:
        ValueError: If there is no such network.
        RuntimeError: If timm cannot get the weights.
    """
    return _from_timm(name, download=True).state_dict()


def _from_timm(name: str, *, download: bool, **kwargs: Any) -> nn.Module:
    architecture, _, tag = name.partition(".")
    tags = timm.list_models(f"{architecture}.*", pretrained=True) if timm.is_model(architecture) else []
    if not timm.is_model(architecture) or (tag and name not in tags):
        known = tags or timm.list_models()
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() has all names"
        raise InputError(f"timm {timm.__version__} has no network named {name!r}; {hint}")
    try:
        encoder: nn.Module = timm.create_model(name, pretrained=download, **kwargs)
    except Exception as error:  # the hub's, the network's and timm's own errors share no base class
        if not download:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"timm could not get pretrained weights for {name!r} ({type(error).__name__}: {reason}). Download them "
            "elsewhere and give the path of the file instead of true, or set pretrained to false for random ones"
        ) from error
    return encoder


def _replace_stem(encoder: nn.Module, name: str, *, keep_weights: bool) -> None:
    if isinstance(encoder, EfficientNet):
        encoder.conv_stem.stride = (1, 1)
    else:
        _replace_resnet_stem(encoder, name, keep_weights=keep_weights)
    # The size that timm knows of is that of the network with its own stem.
    encoder.pretrained_cfg = {key: value for key, value in _config(encoder).items() if key != "input_size"}  # type: ignore[assignment]


def _replace_resnet_stem(encoder: nn.Module, name: str, *, keep_weights: bool) -> None:
    conv = getattr(encoder, "conv1", None)
    if not isinstance(encoder, ResNet) or not isinstance(conv, nn.Conv2d):
        reason = (
            "a stem of several convolutions" if isinstance(encoder, ResNet) else "no ResNet stem (7x7 and max-pooling)"
        )
        raise InputError(
            f'{name} has {reason} that stem="cifar" could replace: use stem="imagenet", or a plain ResNet (resnet18, '
            "resnet50), an EfficientNet or cifar_*"
        )
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False).to(conv.weight)
    with torch.no_grad():
        if keep_weights:
            small.weight.copy_(_centre(conv.weight))
        else:
            nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    encoder.set_submodule("conv1", small)
    encoder.set_submodule("maxpool", nn.Identity())


def _centre(kernel: Tensor) -> Tensor:
    margin = (kernel.shape[-1] - 3) // 2
    return kernel[:, :, margin : margin + 3, margin : margin + 3]


def _load_file(encoder: nn.Module, name: str, path: Path) -> None:
    own = encoder.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}  # old files have none
    file = _read(path, encoder)
    found = counters | _without_classifier(file.weights, encoder)
    stem, own_stem = found.get("conv1.weight"), own.get("conv1.weight")
    if stem is not None and own_stem is not None and stem.shape[2:] == (7, 7) and own_stem.shape[2:] == (3, 3):
        found["conv1.weight"] = _centre(stem)
    faults = {
        "missing": [key for key in own if key not in found],
        "unexpected": [key for key in found if key not in own],
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in found and found[key].shape != own[key].shape
        ],
    }
    if any(faults.values()):
        listing = "; ".join(f"{len(keys)} {kind}: {_few(keys)}" for kind, keys in faults.items() if keys)
        raise InputError(
            f"pretrained: the weights in {path} do not fit {name} ({listing}). Is it the same architecture, with the "
            "same stem and in_chans?"
        )
    encoder.load_state_dict(found)
    with_normalisation(encoder, file)


def with_normalisation(encoder: nn.Module, file: PublicWeights) -> None:
    """Set an encoder's ``pretrained_cfg`` to what the weights loaded into it expect, where their file names it."""
    if file.mean is not None:
        encoder.pretrained_cfg = {**_config(encoder), "mean": file.mean, "std": file.std}  # type: ignore[assignment]


def _read(path: Path, encoder: nn.Module) -> PublicWeights:
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with numbers_allowed():
                content = load_tensors(path)
    except Exception as error:  # what archive, unpickler and tensors say of damage has no common base class
        said = [line for line in str(error).splitlines() if line and not line.startswith("Check the documentation")]
        # Of code in a file PyTorch speaks last; before it comes the advice to turn the protection off.
        reason = (
            said[-1 if isinstance(error, pickle.UnpicklingError) else 0].strip()[:200] if said else "no reason given"
        )
        raise InputError(
            f"pretrained: {path} is not a file of weights ({type(error).__name__}: {reason}). It must be complete and "
            "hold tensors and plain values only"
        ) from error
    try:
        return public_weights(content, encoder)
    except ValueError as error:
        raise InputError(f"pretrained: {path} holds no state dict ({error})") from error


def _without_classifier(weights: dict[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    names = classifier_names(encoder)
    own = encoder.state_dict()
    return {
        key: value
        for key, value in weights.items()
        if key in own or not any(key.startswith(f"{classifier}.") for classifier in names)
    }


def _with_measured_features(encoder: nn.Module, name: str, in_chans: int) -> nn.Module:
    # ResNets, and networks whose stem was replaced, take any size, so a small image is enough to tell.
    size = (32, 32) if isinstance(encoder, ResNet) else _config(encoder).get("input_size", (3, 32, 32))[1:]
    weight = next(encoder.parameters())
    with torch.no_grad():
        features = encoder.eval()(weight.new_zeros(1, in_chans, *size))
    if not isinstance(features, Tensor) or features.ndim != 2:
        seen = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            f"{name} puts out {seen} for one image, expected pooled features (1, D): choose another network"
        )
    if getattr(encoder, "num_features", None) != features.shape[1]:
        encoder.num_features = features.shape[1]  # type: ignore[assignment]  # torch's stub knows tensors and modules only
    return encoder.train()


def _config(encoder: nn.Module) -> dict[str, Any]:
    config: Any = encoder.pretrained_cfg
    return dict(config)


def _few(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
