"""Scales of the runs, what the methods are called, and what their passes cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ttalight.data.corruptions import COMMON

Config = dict[str, Any]

#: Data set of a table, by number; the others take any.
TABLE_DATA = {2: "cifar10", 4: "cifar100", 5: "tiny_imagenet", 6: "cifar10"}
#: Training images, classes, side in pixels.
DATA = {"cifar10": (50000, 10, 32), "cifar100": (50000, 100, 32), "tiny_imagenet": (100000, 200, 64),
        "digits": (1000, 10, 32)}  # fmt: skip
#: Passes of one training image, on networks that all else is small beside: a forward counts 1, forward and backward 3.
#: ReC-TTT's has two encoders, the frozen one on two images, and a decoder on four times the batch. TTTFlow's has a flow
#: on maps of 512 channels, which costs twice the network.
TRAINING = {"SupervisedTask": 3.0, "ContrastiveTask": 6.0, "AlignmentTask": 6.0, "JointTask": 9.0, "ProbeTask": 1.0,
            "TTTPlusPlus": 6.0, "RotationTTT": 15.0, "ClusT3": 3.0, "NCTTT": 3.0, "ReCTTT": 20.0,
            "MaskedAutoencoderTask": 1.0, "MaskedTTT": 2.5,
            "TTTFlow": 7.0}  # fmt: skip
#: Passes of one image in one step of adaptation, of TTT-MAE for each mask. ReC-TTT's frozen decoder has no gradients of
#: weights.
ADAPTING = {"CrossTaskTTT": 6.0, "ProbeTask": 6.0, "JointTask": 6.0, "TTTPlusPlus": 9.0, "RotationTTT": 12.0,
            "ClusT3": 3.0, "NCTTT": 3.0, "ReCTTT": 16.0, "MaskedTTT": 1.0,
            "TTTFlow": 7.0}  # fmt: skip
#: What comes to both on a ResNet-20, as measured on a CPU: beside its thin maps ClusT3's assignments to clusters, 150
#: for each position, are the larger part, and NC-TTT's noise is not small. TTTFlow's flow is small there.
BESIDE = {"ClusT3": (12.0, 10.0), "NCTTT": (1.0, 0.0), "TTTFlow": (-4.8, -3.5)}
#: Label in tables -> files of the method in cifar10_matched and cifar10_paper.
METHODS = {"TTT": "rotation_ttt", "TTT++": "ttt_plus_plus", "ClusT3": "clust3", "NC-TTT": "nc_ttt",
           "ReC-TTT": "rec_ttt", "TTT-MAE": "masked_ttt", "CTA-C": "probe", "CTA": "cta", "Y": "joint",
           "CTA-unfrozen": "cta_unfrozen", "CTA-twins": "cta_twins",
           "TTTFlow": "ttt_flow"}  # fmt: skip
#: Variants of CTA that its paper mentions without a table: what they change in self-supervised stage and alignment.
VARIANTS: dict[str, tuple[Config, Config]] = {
    "CTA-unfrozen": ({}, {"freeze_teacher": False}),
    "CTA-twins": ({"objective": "barlow_twins"}, {}),
}
#: Methods of the paper's tables.
IN_TABLE = {2: ("TTT++", "ClusT3", "NC-TTT", "ReC-TTT", "CTA-C", "CTA"), 4: ("ClusT3", "NC-TTT", "ReC-TTT", "CTA"),
            5: ("ClusT3", "NC-TTT", "ReC-TTT", "CTA")}  # fmt: skip
_WEAKER_STEPS: Config = {
    "model": {"encoder_weight": 5.0, "head_weight": 20.0},
    "adapter": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0e-4, "momentum": 0.9}}},
}
#: Arguments that the authors of a method set otherwise on other data than CIFAR-10: data -> configuration -> section of
#: the configuration -> arguments. TTT++ on CIFAR-100 has a queue of 1792 beside the batch of 256, 2048 together.
OTHER_DATA: dict[str, dict[str, Config]] = {
    "cifar100": {
        "cifar10_matched/ttt_plus_plus_adapt": _WEAKER_STEPS,
        "cifar10_paper/ttt_plus_plus": {"model": {"calibration_images": 2048}},
        "cifar10_paper/ttt_plus_plus_adapt": {**_WEAKER_STEPS, "model": {**_WEAKER_STEPS["model"], "queue": 1792}},
    },
    "tiny_imagenet": {
        "cifar10_paper/clust3": {
            "model": {
                "scheduler": {
                    "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
                    "init_args": {"T_max": 350},
                },
            },
        },
    },
}


@dataclass(frozen=True)
class Recipe:
    """Scale of the runs.

    ``folder`` has network, trainer and stages, the folder named as the data set if None; ``model``, ``trainer``,
    ``adapt_data`` and ``adapter`` are put into every configuration that knows them.
    """

    temperatures: tuple[float, ...]
    folder: str | None = None
    epochs: int | None = None
    #: Epochs of the other methods' source training, if not those of their configurations.
    rival_epochs: int | None = None
    domains: tuple[str, ...] = COMMON
    limit: int | None = None
    model: Config = field(default_factory=dict)
    adapt_data: Config = field(default_factory=dict)
    trainer: Config = field(default_factory=dict)
    adapter: Config = field(default_factory=dict)
    #: Class -> passes that come to ``TRAINING`` and ``ADAPTING`` on the recipe's network.
    beside: dict[str, tuple[float, float]] = field(default_factory=dict)
    shared_start: bool = False
    #: Methods whose adaptation is repeated with other seeds; all if None.
    repeated: tuple[str, ...] | None = None
    seeds: int = 3
    training_images: int | None = None
    #: Network of TTT-MAE, which masks the patches of a transformer.
    transformer: str = "cifar_vit4"
    measured: int = 10000
    source_images: int = 10000
    about: str = ""


RECIPES = {
    "paper": Recipe(
        (0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
        transformer="cifar_vit8",
        about="the paper's: ResNet-50, schedules of Table 3",
    ),
    "small": Recipe(
        (0.05, 0.25, 0.5),
        folder="cifar10_small",
        epochs=12,
        limit=500,
        model={"encoder": "cifar_resnet20", "lr": 1.0e-3, "channels_last": True, "decoder_blocks": [1, 1, 1]},
        adapt_data={"generate": True},
        trainer={"accelerator": "cpu", "precision": "bf16-mixed", "limit_val_batches": 0},
        beside=BESIDE,
        shared_start=True,
        repeated=("CTA", "CTA-C", "Y"),
        training_images=25000,
        measured=500,
        source_images=5000,
        about="ResNet-20, 25,000 training images, 12 epochs a stage, 500 images of each corruption",
    ),
    "lite0": Recipe(
        (0.5,),
        folder="cifar10_lite0",
        rival_epochs=20,
        limit=2000,
        model={"encoder": "tf_efficientnet_lite0", "channels_last": True, "warmup_epochs": 1},
        adapt_data={"generate": True},
        trainer={"accelerator": "cpu", "precision": "32-true"},
        repeated=("CTA", "CTA-C", "Y"),
        training_images=45000,
        measured=2000,
        source_images=5000,
        about="EfficientNet-Lite0 from ImageNet weights, 45,000 training images, 2,000 images of each corruption",
    ),
    "demo": Recipe(
        (0.25, 0.5),
        folder="digits",
        epochs=2,
        domains=("contrast", "pixelate"),
        limit=60,
        model={"encoder": "cifar_resnet8", "lr": 2.0e-3, "decoder_blocks": [1, 1, 1], "flip": 0.0, "image_size": 32,
               "warmup_epochs": 0},
        trainer={"accelerator": "cpu", "precision": "32-true", "limit_val_batches": 0, "log_every_n_steps": 10},
        adapter={"steps": 2, "read_at": [0, 1]},
        beside=BESIDE,
        shared_start=True,
        repeated=("CTA",),
        seeds=2,
        measured=60,
        source_images=200,
        about="the embedded digits, to see that everything works",
    ),
}  # fmt: skip
