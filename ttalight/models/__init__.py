"""Encoders, normalisation and how adapters see any network."""

from ttalight.models.cifar_resnet import CifarResNet
from ttalight.models.crop import CenterCrop
from ttalight.models.encoder import create_encoder
from ttalight.models.network import Head, Network, Outputs
from ttalight.models.norm import NormLayer, NormMode, find_norms
from ttalight.models.normalize import Normalize

__all__ = [
    "CenterCrop",
    "CifarResNet",
    "Head",
    "Network",
    "NormLayer",
    "NormMode",
    "Normalize",
    "Outputs",
    "create_encoder",
    "find_norms",
]
