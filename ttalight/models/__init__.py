"""Encoders, normalisation and how adapters see any network."""

from ttalight.models.cifar.cifar_preact_resnet import CifarPreActResNet
from ttalight.models.cifar.cifar_resnet import CifarResNet
from ttalight.models.cifar.cifar_resnet_gn import CifarResNetGN
from ttalight.models.cifar.cifar_resnext import CifarResNeXt
from ttalight.models.cifar.cifar_vit import CifarViT
from ttalight.models.cifar.cifar_wide_resnet import CifarWideResNet
from ttalight.models.class_prompts import ClassPrompts
from ttalight.models.cosine_classifier import CosineClassifier
from ttalight.models.crop import CenterCrop
from ttalight.models.encoder import create_encoder
from ttalight.models.image_tower import ImageTower
from ttalight.models.network import Head, Network, Outputs
from ttalight.models.norm import NormLayer, NormMode, find_norms
from ttalight.models.normalize import Normalize
from ttalight.models.preprocessing import Preprocessing, preprocessing_of
from ttalight.models.prompts import encode_class_names, ensemble_text_features
from ttalight.models.text_tower import TextTower

__all__ = [
    "CenterCrop",
    "CifarPreActResNet",
    "CifarResNeXt",
    "CifarResNet",
    "CifarResNetGN",
    "CifarViT",
    "CifarWideResNet",
    "ClassPrompts",
    "CosineClassifier",
    "Head",
    "ImageTower",
    "Network",
    "NormLayer",
    "NormMode",
    "Normalize",
    "Outputs",
    "Preprocessing",
    "TextTower",
    "create_encoder",
    "encode_class_names",
    "ensemble_text_features",
    "find_norms",
    "preprocessing_of",
]
