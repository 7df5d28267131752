"""Wrong arguments of adapters, tasks, data modules and streams: one line, before anything is computed from them."""

from __future__ import annotations

import inspect

import pytest
import torch
from lightning import LightningModule
from support.methods import EVERY_CLASS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ttalight import Trainer
from ttalight.adapters import (
    CMF,
    EATA,
    ETA,
    FIND,
    MEMO,
    NCTTA,
    NOTE,
    RMT,
    ROID,
    SANTA,
    SAR,
    SHOT,
    STAG,
    T3A,
    TIPI,
    AdaContrast,
    AlphaBN,
    CoTTA,
    DeYO,
    MoETTA,
    RoTTA,
    Tent,
    TestTimeTraining,
)
from ttalight.data import (
    BatchMixing,
    CIFARDataModule,
    Continual,
    Correlated,
    Cross,
    DigitsDataModule,
    DigitSetsDataModule,
    Gradual,
    ImageFolderDataModule,
    InOut,
    LabelShift,
    PracticalTTA,
    Probed,
    Recurring,
    SingleSample,
)
from ttalight.tasks import NCTTT, BaseTask, ClusT3, JointTask, RotationTTT, SupervisedTask, TTTPlusPlus

WRONG = ("1e-3", float("nan"), [1], True, {}, torch.zeros(2), 1 << 70)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TASK, LOADER = LightningModule(), DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long()))


def adapt(*args, **kwargs):
    return Trainer(logger=False, enable_progress_bar=False).adapt(*args, **kwargs)


@pytest.mark.parametrize("method", EVERY_CLASS.values())
def test_every_number_of_every_method(method):
    owners = [cls for cls in method.__mro__ if "__init__" in vars(cls)]
    parameters = {name: value for cls in owners for name, value in inspect.signature(cls).parameters.items()}
    numbers = [name for name, value in parameters.items() if value.annotation in ("float", "int", "float | None")]
    assert "lr" in numbers or method.__name__ not in ("Tent", "SAR")
    for name in numbers:
        for value in WRONG:
            with pytest.raises((TypeError, ValueError), match=rf"{name} must .*, got") as error:
                method(**{name: value})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T3A(supports=2.5), "T3A: supports must be a whole number, got 2.5, a float"),
        (lambda: T3A(supports=None), "T3A: supports must be a whole number, got None, a NoneType"),
        (lambda: MEMO(joint="no"), "MEMO: joint must be true or false, got 'no', a str"),
        (lambda: STAG(weight="a"), "STAG: weight must be a number, got 'a', a str"),
        (lambda: MoETTA(plain=3), "MoETTA: plain must be a list of whole numbers, got 3, a int"),
        (lambda: TestTimeTraining(read_at="12"), "TestTimeTraining: read_at must be a list of whole numbers, got '12'"),
        (lambda: Gradual(path=None), "Gradual: path must be a list of whole numbers, got None"),
        (lambda: Tent(learning_rate=1), "Tent has no argument learning_rate"),
        (lambda: Tent(clip=1), "Tent has no argument clip; nearest: clip_norm"),
        (lambda: Tent(optimizer="SGD"), r"optimizer must make an optimizer of parameters, .* got a str"),
        (lambda: Tent(terms=STAG()), r"terms must be a list of terms, for example \[STAG\(\)\], got STAG"),
        (lambda: Tent(terms=[STAG]), r"terms must be a list of terms, .* got \[<class"),
        (lambda: Tent(passes="fast"), r"passes must be a way to compute passes, for example FastPass\(\), got 'fast'"),
        (lambda: Tent.preset([1]), r"Tent has settings for .*, got \[1\]"),
        (
            lambda: adapt(nn.Linear(2, 2), LOADER),
            "model must be a LightningModule; .* got a Linear",
        ),
        (lambda: adapt(SupervisedTask, LOADER), "got the class SupervisedTask"),
        (lambda: adapt(TASK, LOADER, Tent), r"adapter must be .*Tent\(\), got the class Tent"),
        (lambda: adapt(TASK, LOADER, "Tent"), r"adapter must be .*Tent\(\), got a str"),
        (
            lambda: adapt(TASK, LOADER, Tent(), resume=3),
            "resume must be the folder of a run, got a int",
        ),
        (lambda: FIND(layers=3), "layers must be 'auto', 'all' or a list of positions, got 3"),
        (lambda: Cross(domains_per_batch=[1]), r"domains_per_batch must be a number, random or null, got \[1\]"),
    ],
)
def test_wrong_kind(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


#: A class, arguments of which one is out of range, and the line.
OUT_OF_RANGE = [
    (Tent, {"lr": 1e-3, "optimizer": torch.optim.SGD}, "not both"),
    (Tent, {"lr": -1.0}, "lr must be at least 0, got -1"),
    (Tent, {"steps": 0}, "steps must be at least 1, got 0"),
    (Tent, {"prediction": "never"}, "prediction must be 'before' or 'after', got 'never'"),
    (Tent, {"reset": "sometimes"}, "reset must be 'domain', 'batch', 'never' or a number"),
    (Tent, {"reset": 0}, "reset must be"),
    (Tent, {"on_bad_batch": "ignore"}, "on_bad_batch must be 'error', 'skip' or 'source', got 'ignore'"),
    (AlphaBN, {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
    (AlphaBN, {"prior": -1}, "prior must"),
    (AlphaBN, {"prior": 8.0, "alpha": 0.3}, "prior .* or alpha .*, not both: got prior=8.0 and alpha=0.3"),
    (FIND, {"alpha": 2}, r"alpha must lie in \[0, 1\], got 2"),
    (FIND, {"layers": "some"}, "layers must be 'auto', 'all' or a list"),
    (FIND, {"others": "batch"}, "others must be 'unified' or 'source'"),
    (ETA, {"margin": 0}, r"margin must be a share of ln C in \(0, 1\], got 0"),
    (ETA, {"margin": 2.76}, r"margin must be .* got 2\.76"),
    (ETA, {"redundancy": 0.0}, r"redundancy must be a cosine in \(0, 1\], got 0\.0"),
    (EATA, {"fisher": "target"}, "fisher must be 'source' or 'stream', got 'target'"),
    (EATA, {"fisher_samples": 0}, "fisher_samples must be at least 1, got 0"),
    (EATA, {"fisher_weight": -1.0}, "fisher_weight must be at least 0, got -1"),
    (SAR, {"margin": 1.5}, r"margin must be a share of ln C in \(0, 1\], got 1\.5"),
    (SAR, {"rho": -0.1}, r"rho must be at least 0, got -0\.1"),
    (SAR, {"recovery": -1.0}, "recovery must be an entropy of at least 0, got -1"),
    (DeYO, {"margin": 0.0}, r"margin must be a share of ln C in \(0, 1\], got 0"),
    (DeYO, {"weight_margin": 7.0}, r"weight_margin must be a share of ln C in \(0, 1\], got 7"),
    (DeYO, {"threshold": 1.0}, r"threshold must be a difference of probabilities in \[-1, 1\), got 1"),
    (DeYO, {"destroy": "blur"}, "destroy must be 'patch', 'pixel' or 'occlusion', got 'blur'"),
    (DeYO, {"patches": 1}, "patches must be at least 2 in a row and a column, got 1"),
    (DeYO, {"occlusion": 0.0}, r"occlusion must be a share of the image's sides in \(0, 1\], got 0"),
    (SHOT, {"pseudo_weight": -0.1}, "pseudo_weight must be at least 0, got -0.1"),
    (SHOT, {"confidence": 1.0}, r"confidence must lie in \[0, 1\), got 1"),
    (TIPI, {"epsilon": 0.0}, "epsilon must be above 0, got 0"),
    (TIPI, {"entropy_weight": -1.0}, "entropy_weight must be at least 0, got -1"),
    (TIPI, {"large_batch": -1}, "large_batch must be at least 0 or None, got -1"),
    (ROID, {"temperature": 0.0}, "temperature must be above 0, got 0"),
    (CMF, {"temperature": 0.0}, "temperature must be above 0, got 0"),
    (ROID, {"source_share": 1.5}, r"source_share must lie in \[0, 1\], got 1.5"),
    (CMF, {"source_share": 1.5}, r"source_share must lie in \[0, 1\], got 1.5"),
    (ROID, {"prior_correction": "bayes"}, "prior_correction must be 'log', 'published' or 'none', got 'bayes'"),
    (CMF, {"prior_correction": "bayes"}, "prior_correction must be 'log', 'published' or 'none', got 'bayes'"),
    (CMF, {"process_variance": 0.0}, "process_variance must be above 0, got 0"),
    (CMF, {"hidden_share": -0.1}, r"hidden_share must lie in \[0, 1\], got -0.1"),
    (CoTTA, {"confidence": 1.5}, r"confidence must lie in \[0, 1\], got 1.5"),
    (CoTTA, {"teacher_momentum": -0.1}, r"teacher_momentum must lie in \[0, 1\], got -0.1"),
    (CoTTA, {"restore": 2.0}, r"restore must lie in \[0, 1\], got 2"),
    (CoTTA, {"views": 0}, "views must be at least 1, got 0"),
    (CoTTA, {"mean": MEAN}, "give mean and std together, got mean=.* and std=None"),
    (RoTTA, {"memory": 0}, "memory must be at least 1, got 0"),
    (RoTTA, {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
    (RoTTA, {"timeliness": -1.0}, "timeliness must be at least 0, got -1"),
    (NOTE, {"k": -1.0}, "k must be at least 0, got -1"),
    (NOTE, {"momentum": 1.5}, r"momentum must lie in \[0, 1\], got 1.5"),
    (SANTA, {"source_samples": 0}, "source_samples must be at least 1, got 0"),
    (SANTA, {"mean": MEAN}, "give mean and std together, got mean=.* and std=None"),
    (RMT, {"teacher_momentum": 1.5}, r"teacher_momentum must lie in \[0, 1\], got 1.5"),
    (RMT, {"replay_weight": -1.0}, "replay_weight must be at least 0, got -1"),
    (RMT, {"warm_up": -1}, "warm_up must be at least 0, got -1"),
    (AdaContrast, {"neighbors": 0}, "neighbors must be at least 1, got 0"),
    (AdaContrast, {"queue": 0}, "queue must be at least 1, got 0"),
    (AdaContrast, {"refine_after": 0}, "refine_after must be at least 1, got 0"),
    (AdaContrast, {"temperature": 0.0}, "temperature must be above 0, got 0"),
    (AdaContrast, {"key_momentum": -0.1}, r"key_momentum must lie in \[0, 1\], got -0.1"),
    (AdaContrast, {"mean": MEAN}, "give mean and std together, got mean=.* and std=None"),
    (MEMO, {"views": 0}, "views must be at least 1, got 0"),
    (MEMO, {"steps": 0}, "steps must be at least 1, got 0"),
    (MEMO, {"prior": -1.0}, "prior must be at least 0, got -1"),
    (MEMO, {"crop": "centre"}, "crop must be 'padded' or 'resized', got 'centre'"),
    (TIPI, {"mean": MEAN}, "give mean and std together, got mean=.* and std=None"),
    (ROID, {"mean": MEAN}, "give mean and std together, got mean=.* and std=None"),
    (CMF, {"mean": MEAN}, "give mean and std together, got mean=.* and std=None"),
    (MEMO, {"mean": MEAN}, "give mean and std together, got mean=.* and std=None"),
    (TIPI, {"mean": MEAN, "std": (0.2, 0.0, 0.2)}, "std must be positive"),
    (ROID, {"mean": MEAN, "std": (0.2, 0.0, 0.2)}, "std must be positive"),
    (CMF, {"mean": MEAN, "std": (0.2, 0.0, 0.2)}, "std must be positive"),
    (MEMO, {"mean": MEAN, "std": (0.2, 0.0, 0.2)}, "std must be positive"),
    (TIPI, {"mean": (0.5,), "std": STD}, "mean must be three finite numbers"),
    (ROID, {"mean": (0.5,), "std": STD}, "mean must be three finite numbers"),
    (CMF, {"mean": (0.5,), "std": STD}, "mean must be three finite numbers"),
    (MEMO, {"mean": (0.5,), "std": STD}, "mean must be three finite numbers"),
    (NCTTA, {"margin": 0.0}, "margin must be a positive share"),
    (NCTTA, {"top_k": 0}, "top_k must be at least 1, got 0"),
    (NCTTA, {"share": 1.5}, r"share must lie in \[0, 1\], got 1.5"),
    (NCTTA, {"scale": -1.0}, "scale, .* must be at least 0, got -1"),
    (MoETTA, {"top": 3, "experts": 2}, "top must lie between 1 and experts, got top=3 and experts=2"),
    (MoETTA, {"frozen": 1}, r"frozen must be a list of indices or a share of the layers in \[0, 1\), got 1"),
    (MoETTA, {"balance": -0.1}, "balance must be at least 0, got -0.1"),
    (MoETTA, {"margin": 0.0}, "margin must be a positive share"),
    (MoETTA, {"parameters": "all"}, "choose layers with frozen and plain, not parameters"),
    (SupervisedTask, {"lr": 1e-7}, "0 < final_lr <= lr, got lr=1e-07"),
    (SupervisedTask, {"warmup_epochs": -1}, "warmup_epochs must be at least 0"),
    (SupervisedTask, {"mean": [0.5, 0.5, 0.5]}, "give both mean and std"),
    (SupervisedTask, {"norm": "layer"}, "norm must be 'batch' or 'instance_aware', got 'layer'"),
    (SupervisedTask, {"encoder": "cifar_resnet9"}, "cifar_resnet8"),
    (ClusT3, {"layers": [1, 4]}, r"layers must be different numbers from 1 to 3, .* got \[1, 4\]"),
    (ClusT3, {"layers": [2, 2]}, r"got \[2, 2\]"),
    (ClusT3, {"layers": []}, r"got \[\]"),
    (ClusT3, {"projectors": 3, "clusters": 1}, "2 clusters and 1 projector at least, got 1 and 3"),
    (ClusT3, {"variant": "view"}, "variant must be 'paper' or 'code', got 'view'"),
    (NCTTT, {"layer": 4}, r"layers must be different numbers from 1 to 3, .* got \[4\]"),
    (NCTTT, {"small_noise": 0.2}, "0 < small_noise < large_noise, got 0.2 and 0.1"),
    (NCTTT, {"small_noise": 0.0}, "0 < small_noise < large_noise"),
    (NCTTT, {"channels": 4, "hidden": 0}, "at least 1, got 4 and 0"),
    (RotationTTT, {"branch": "layer9"}, "cifar_resnet8 has no module 'layer9', it has conv1, bn1"),
    (RotationTTT, {"rotation": "both"}, "rotation must be one of expand, random, got 'both'"),
    (RotationTTT, {"rotation_weight": -1}, "rotation_weight must be at least 0"),
    (RotationTTT, {"copies": 0}, "copies must be at least 1, got 0"),
    (
        RotationTTT,
        {"encoder": "vit_tiny_patch16_224", "stem": "imagenet", "branch": "blocks"},
        "vit_tiny_patch16_224 does more",
    ),
    (TTTPlusPlus, {"supervised": "a", "weights": "b"}, "give supervised .* or weights .*, not both"),
    (TTTPlusPlus, {"contrastive_weight": 2}, r"contrastive_weight must lie in \[0, 1\], got 2"),
    (TTTPlusPlus, {"calibration_images": 1}, "calibration_images at least 2, got 128 and 1"),
    (TTTPlusPlus, {"queue": -1}, "queue must be at least 0"),
    (TTTPlusPlus, {"head_weight": -1.0}, "weight of moment alignment must be at least 0"),
    (JointTask, {"contrastive_weight": -1}, "contrastive_weight must be at least 0, got -1"),
    (CIFARDataModule, {"dataset": "cifar11"}, "dataset must be one of cifar10, cifar100, .*got 'cifar11'"),
    (CIFARDataModule, {"validation": -1}, "validation must be at least 0, got -1"),
    (DigitsDataModule, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    (DigitsDataModule, {"domains": []}, "domains is empty"),
    (DigitsDataModule, {"limit": 0}, "limit must be at least 1, got 0"),
    (ImageFolderDataModule, {"resize": 0}, "resize must be at least 1 pixel, got 0"),
    (ImageFolderDataModule, {"num_workers": -1}, "num_workers must be at least 0, got -1"),
    (DigitSetsDataModule, {"dataset": "emnist"}, "dataset must be mnist, usps or svhn"),
    (DigitSetsDataModule, {"validation": -1}, "validation must be at"),
    (Continual, {"rounds": 0}, "rounds must be at least 1, got 0"),
    (Continual, {"order": "sorted"}, "order must be given or random, got 'sorted'"),
    (Gradual, {"path": []}, r"path must have severities from 1 to 5, got \[\]"),
    (Gradual, {"path": [1, 6]}, r"path must have severities from 1 to 5, got \[1, 6\]"),
    (InOut, {"share": 0}, r"share must lie in \(0, 1\), got 0"),
    (InOut, {"share": 1}, r"share must lie in \(0, 1\), got 1"),
    (Correlated, {"gamma": 0}, "gamma must be greater than 0 and finite, or null .* got 0"),
    (Correlated, {"gamma": float("nan")}, "gamma must be greater than 0 and finite"),
    (Correlated, {"slots": 0}, "slots must be at least 1, got 0"),
    (PracticalTTA, {"gamma": -1}, "gamma must be greater than 0"),
    (PracticalTTA, {"order": "random"}, "order must be published or given, got 'random'"),
    (LabelShift, {"ratio": 0.5}, "ratio must be at least 1 and finite, got 0.5"),
    (LabelShift, {"ratio": float("inf")}, "ratio must be at least 1 and finite, got inf"),
    (LabelShift, {"samples": 0}, "samples must be at least 1, got 0"),
    (SingleSample, {"window": 0}, "window must be at least 1, got 0"),
    (Cross, {"domains_per_batch": 0}, "domains_per_batch must be at least 1, got 0"),
    (Cross, {"domains_per_batch": "all"}, "domains_per_batch must be a number, random or null, got 'all'"),
    (BatchMixing, {"order": "x"}, "order must be interval, interval_shuffled or shuffled, got 'x'"),
    (Recurring, {"cycles": 0}, "cycles must be at least 1, got 0"),
    (Recurring, {"length": 0}, "length must be at least 1, got 0"),
    (Recurring, {"overlap": 1.1}, r"overlap must lie in \[0, 1\], got 1.1"),
    (Probed, {"every": 0}, "every must be at least 1, got 0"),
    (Probed, {"samples": 0}, "samples must be at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    OUT_OF_RANGE,
    ids=[f"{kind.__name__}-{'-'.join(arguments)}" for kind, arguments, _ in OUT_OF_RANGE],
)
def test_out_of_range(kind, arguments, message):
    small = {"encoder": "cifar_resnet8"} if issubclass(kind, BaseTask) else {}
    with pytest.raises(ValueError, match=message):
        kind(**(small | arguments))
