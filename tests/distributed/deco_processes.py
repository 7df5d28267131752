"""One rank of the tests of DeCoHook: python deco_processes.py RANK PORT FOLDER."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import traceback
import warnings
from pathlib import Path

import ttalight  # isort: skip  (first: it makes torchvision importable)
import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ttalight.callbacks import Termination
from ttalight.callbacks.search import get_callback
from ttalight.distributed import deco
from ttalight.distributed.slow_links import Setting

RANKS, LR, STEPS, BATCH = 2, 0.1, 8, 3


def images() -> Tensor:
    return torch.randn(RANKS * STEPS * BATCH, 5, generator=torch.Generator().manual_seed(1))


def loader() -> DataLoader:
    """Batches of this rank, in their order."""
    return DataLoader(TensorDataset(images()[int(os.environ.get("LOCAL_RANK", 0)) :: RANKS]), batch_size=BATCH)


class Module(lightning.LightningModule):
    """A regression of two layers, or a linear function whose gradients do not depend on its weights."""

    def __init__(self, linear: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = linear
        self.net = nn.Linear(5, 7) if linear else nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))

    def loss(self, x: Tensor) -> Tensor:
        return self.net(x).mean() if self.linear else (self.net(x) - x[:, :4]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def fit(folder: Path, hook=None, *others, epochs: int = 1, ckpt_path=None, linear: bool = False, **options) -> Tensor:
    """Return all weights after a fit in two processes; several buckets of gradients each step."""
    lightning.seed_everything(0, verbose=False)
    module = Module(linear)
    trainer = ttalight.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=RANKS, strategy=DDPStrategy(bucket_cap_mb=1e-4),
        logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=epochs,
        use_distributed_sampler=False, callbacks=[hook, *others] if hook else None, **options,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return weights_of(module)


def weights_of(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def gradient(module: Module, rank: int, step: int) -> Tensor:
    """Return the gradient of a rank's batch."""
    module.zero_grad()
    module.loss(images()[rank::RANKS][step * BATCH : (step + 1) * BATCH]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def refusal(folder: Path, hook, **options) -> str:
    try:
        fit(folder, hook, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def changed_settings(folder: Path) -> dict:
    """A fit whose setting changes with each choice."""
    settings = [Setting(0.2, 3), Setting(1.0, 1), Setting(1.0, 0), Setting(0.1, 2)]
    deco.choose_setting = lambda *args, **kwargs: settings.pop(0)
    hook = deco.DeCoHook(every=6)
    weights = fit(folder, hook, epochs=3, linear=True, enable_checkpointing=False)
    left = hook.state_dict()
    return {"weights": weights, "left": left}


class Signal(lightning.Callback):
    """SIGTERM to the second process in the fourth batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps = trainer.global_step
        if trainer.global_rank == 1 and batch_idx == 3:
            get_callback(trainer, Termination).received = True


def steps_until_signal(folder: Path) -> int:
    signal = Signal()
    with contextlib.suppress(SIGTERMException):
        fit(folder, deco.DeCoHook(ratio=0.1, delay=2), signal)
    return signal.steps + 1


def main(folder: Path) -> dict:
    hook = deco.DeCoHook
    done = {"plain": fit(folder / "plain"), "whole": fit(folder / "whole", hook(ratio=1, delay=0))}
    done["compressed"] = fit(folder / "compressed", hook(ratio=0.3, delay=2), enable_checkpointing=False)
    done["delayed"] = fit(folder / "delayed", hook(ratio=1, delay=2), enable_checkpointing=False)
    done["uninterrupted"] = fit(folder / "uninterrupted", hook(ratio=0.1, delay=2), epochs=2)
    fit(folder / "resumed", hook(ratio=0.1, delay=2))
    done["resumed"] = fit(folder / "resumed", hook(ratio=0.1, delay=2), epochs=2, ckpt_path="last")
    path = folder / "resumed" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["DeCoHook"]["in_flight"][0]["indices"][1][0] = 74
    torch.distributed.barrier()
    torch.save(checkpoint, folder / f"other-{os.environ['LOCAL_RANK']}.ckpt")
    torch.distributed.barrier()
    done["other model"] = refusal(folder / "refused", hook(ratio=0.1, delay=2), ckpt_path=folder / "other-0.ckpt")
    done["ratio"] = refusal(folder / "refused", hook(ratio=0.5, delay=2))
    done["steps until signal"] = steps_until_signal(folder / "signal")
    done["changed"] = changed_settings(folder / "changed")
    return done


if __name__ == "__main__":
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(300, exit=True)  # a hang shows where
    try:
        torch.save(main(folder), folder / f"{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Tearing down gloo beside a DistributedDataParallel can deadlock: its thread and the interpreter's wait mutually.
    os._exit(0)
