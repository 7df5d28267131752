"""One rank of the tests of several processes: python processes.py RANK PORT FOLDER GROUP."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

import ttalight  # isort: skip  (first: it makes torchvision importable)
import lightning
import torch
from torch import Tensor, nn

from ttalight import adapters, tasks
from ttalight.adapters import Adapter, Tent, TestTimeTraining
from ttalight.callbacks import Recorder
from ttalight.data import Continual, DigitsDataModule, Probed, SingleSample
from ttalight.models import Normalize

RANKS = 2
DOMAINS = ["clean", "contrast", "gaussian_noise"]


class Encoder(nn.Sequential):
    """Two BatchNorm layers in front of the features.

    Convolutions have no bias: in front of a BatchNorm layer its gradient is zero but for rounding, which Adam divides
    by its own size.
    """

    def __init__(self, width: int = 6) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)


class Module(lightning.LightningModule):
    """A small network in double precision, with a contrastive loss."""

    auxiliary_views = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.normalize = Normalize()
        self.encoder = Encoder()
        self.classifier = nn.Linear(8, 10)
        nn.init.normal_(self.classifier.weight)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(self.normalize(images)))

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand((2, *images.shape), generator=generator, dtype=torch.float64)
        first, second = self.encoder((self.normalize(images) + 0.3 * noise).flatten(0, 1)).chunk(2)
        return ttalight.losses.contrastive_loss(first, second, 0.5) if len(images) > 1 else 0 * first.sum()

    def adaptable_parameters(self):
        return list(self.encoder.parameters())

    def auxiliary_encoders(self):
        return [self.encoder]


class Unequal(DigitsDataModule):
    """Domains of different sizes."""

    def load_domains(self):
        found = super().load_domains()
        sizes = [17, 8, 13, 14]
        return [
            (domain, ttalight.data.ImageArrays(images.images[:size], images.labels[:size]))
            for (domain, images), size in zip(found, sizes, strict=False)
        ]


class Saved(lightning.Callback):
    """Keeps what adaptation has changed by the end."""

    def __init__(self) -> None:
        self.state = None

    def on_test_batch_end(self, trainer, pl_module, *_):
        adapter = next(callback for callback in trainer.callbacks if isinstance(callback, Adapter))
        self.state = adapter.state_dict()


GRADIENT = {"lr": 0.05, "reset": "never"}
BY_BATCH = {
    "Source": adapters.Source,
    "PTBN": adapters.PTBN,
    "AlphaBN": adapters.AlphaBN,
    "AlphaBN, constant": lambda: adapters.AlphaBN(alpha=0.3),
    "Tent": lambda: Tent(**GRADIENT),
    "Tent, after, two steps": lambda: Tent(prediction="after", steps=2, clip_norm=0.5, **GRADIENT),
    "Tent with STAG": lambda: Tent(terms=[adapters.STAG()], clip_norm=1.0, **GRADIENT),
    "Tent, reset by domain": lambda: Tent(lr=0.05),
    "ETA": lambda: adapters.ETA(margin=0.9, redundancy=0.999, **GRADIENT),
    "EATA": lambda: adapters.EATA(margin=0.9, redundancy=0.999, fisher_samples=10, **GRADIENT),
    "EATA on the stream": lambda: adapters.EATA(
        margin=0.9, redundancy=0.999, fisher="stream", fisher_samples=12, **GRADIENT
    ),
    "SAR": lambda: adapters.SAR(margin=0.8, parameters="norm", recovery=1.3, **GRADIENT),
    "SHOT": lambda: adapters.SHOT(confidence=0.4, **GRADIENT),
    "NCTTA": lambda: adapters.NCTTA(margin=0.8, **GRADIENT),
    "DeYO": lambda: adapters.DeYO(margin=0.9, threshold=-0.5, parameters="norm", **GRADIENT),
    "TestTimeTraining": lambda: TestTimeTraining(steps=2, lr=0.05, reset="never"),
    "TestTimeTraining with STAG": lambda: TestTimeTraining(steps=2, lr=0.05, reset="never", terms=[adapters.STAG()]),
    "TestTimeTraining, batch": lambda: TestTimeTraining(steps=2, lr=0.05, norm="batch", read_at=[1]),
}
#: Even, ragged and nearly empty batches, and one that fewer processes than images see.
SIZES = (8, 5, 1, 8, 7)

BY_DOMAIN = {
    "Tent": (lambda: Tent(lr=0.05), None, {}),
    "FIND": (adapters.FIND, None, {}),
    "DeYO": (lambda: adapters.DeYO(margin=0.9, threshold=-0.5, parameters="norm", lr=0.05), None, {}),
    "EATA": (lambda: adapters.EATA(margin=0.9, redundancy=0.999, fisher_samples=30, lr=0.05), None, {}),
    "probes": (lambda: TestTimeTraining(steps=1, lr=0.05, reset="domain"), lambda: Probed(samples=12), {}),
    "one by one": (lambda: Tent(lr=0.05), lambda: SingleSample(window=4), {"limit": 10}),
    "episodes": (lambda: TestTimeTraining(steps=2, lr=0.05, read_at=[1]), Continual, {}),
    "episodes with probes": (
        lambda: TestTimeTraining(steps=1, lr=0.05), lambda: Probed(Continual(), every=20, samples=12), {},
    ),
    "fewer domains than ranks": (lambda: Tent(lr=0.05), None, {"domains": ["contrast"]}),
    "limited": (lambda: Tent(lr=0.05), None, {"limit_test_batches": 5}),
}  # fmt: skip


def run(
    folder: Path,
    adapter,
    shard,
    devices,
    order=None,
    data=DigitsDataModule,
    limit_test_batches=None,
    callback=None,
    **options,
):
    """Adapt, and return results and adapted state."""
    saved = Saved()
    callbacks = [Recorder(predictions=True), saved, *([callback] if callback else [])]
    trainer = ttalight.Trainer(
        default_root_dir=str(folder), accelerator="cpu", devices=devices, precision="64-true", logger=False,
        strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, limit_test_batches=limit_test_batches,
    )  # fmt: skip
    options = {"batch_size": 8, "domains": DOMAINS, "limit": 40} | options
    stream = data(stream=order() if order else None, **options)
    results = trainer.adapt(Module(), stream, adapter, shard=shard, overwrite=True)
    return {"results": results, "state": saved.state}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(size, 3, 28, 28, generator=generator, dtype=torch.float64) for size in SIZES]


def method_by_batch(name: str, devices: int) -> dict:
    """Adapt a plain network to batches that processes share."""
    adapter = BY_BATCH[name]()
    if isinstance(adapter, adapters.EATA):
        adapter.source = [images[:6] for images in batches()[::3]]
    adapted = adapter.wrap(Module())
    engine = adapter.engine
    if devices > 1:
        engine.net.shard_batches()
    logits = [adapted(images) for images in batches()]
    last = {"last": engine.last, "updates": engine.updates, "recoveries": engine.recoveries}
    return {"logits": logits, "tensors": engine.capture()["tensors"], **last}


def by_batch(folder: Path, devices: int) -> dict:
    sizes = {"batch_size": 8, "data": Unequal, "domains": DOMAINS}
    runs = {
        "run of Tent": run(folder / "Tent", Tent(lr=0.05), "batch", devices, **sizes),
        "run of TTT": run(folder / "TTT", TestTimeTraining(steps=2, lr=0.05, reset=3), "batch", devices, **sizes),
    }
    return runs | {name: method_by_batch(name, devices) for name in BY_BATCH}


def by_domain(folder: Path, devices: int) -> dict:
    return {
        name: run(folder / name, make(), "domain", devices, order, Unequal, **options)
        for name, (make, order, options) in BY_DOMAIN.items()
    }


class Views(nn.Module):
    """Two views of each image that nothing is drawn for."""

    size = None

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return torch.cat((images, images.flip(3)))


#: Adam would divide gradients that are zero but for rounding by their own size.
TRAINED = {
    "encoder": "cifar_resnet8", "warmup_epochs": 0, "optimizer": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
}  # fmt: skip


class Fixed(tasks.AlignmentTask):
    """Alignment from models that nobody has trained."""

    def __init__(self, **kwargs) -> None:
        torch.manual_seed(0)
        super().__init__(**TRAINED, **kwargs)
        self.views, self._complete = Views(), True
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(0.5)


def weights_after_fit(folder: Path, devices: int, task, **options) -> dict:
    lightning.seed_everything(5)
    trainer = ttalight.Trainer(
        default_root_dir=str(folder), accelerator="cpu", devices=devices, logger=False,
        strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=1, limit_train_batches=3, limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(task, datamodule=DigitsDataModule(batch_size=16 // devices, limit=16))
    return {name: value.clone() for name, value in task.state_dict().items()}


def fits(folder: Path, devices: int) -> dict:
    torch.manual_seed(0)
    plain = tasks.SupervisedTask(crop="none", flip=0.0, **TRAINED)
    done = {"supervised": weights_after_fit(folder / "supervised", devices, plain)}
    done["alignment"] = weights_after_fit(folder / "alignment", devices, Fixed())
    flow = tasks.TTTFlow(crop="none", flip=0.0, flow_steps=2, hidden=4, **TRAINED)
    flow._started = True
    done["flow"] = weights_after_fit(folder / "flow", devices, flow)
    done["local negatives"] = weights_after_fit(folder / "local", devices, Fixed(negatives="local"))
    done["own statistics"] = weights_after_fit(folder / "own", devices, Fixed(), sync_batchnorm=False)
    return done


class Dies(lightning.Callback):
    """Fails on the second process, in the second of its domains."""

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        stream, share = trainer.datamodule.stream, trainer.datamodule.share
        if trainer.global_rank == 1 and stream.begins_visit(batch_idx) and batch_idx != share[0]:
            raise KeyError("the second process has died")


def death(folder: Path, devices: int) -> dict:
    four = [*DOMAINS, "brightness"]
    return run(folder / "death", Tent(lr=0.05), "domain", devices, data=Unequal, domains=four, callback=Dies())


GROUPS = {"death": death, "batch": by_batch, "domain": by_domain, "fit": fits}


def main(rank: int, port: str, folder: Path, group: str) -> None:
    torch.set_num_threads(1)
    if group != "death":
        warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(600, exit=True)  # a hang shows where
    torch.save(GROUPS[group](folder / "together", RANKS), folder / f"{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    os.environ |= {"LOCAL_RANK": sys.argv[1], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    try:
        main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Tearing down gloo beside a DistributedDataParallel can deadlock: its thread and the interpreter's wait mutually.
    os._exit(0)
