"""Checks what a checkpoint of Lightning's holds beside weights before loops, callbacks and optimizers take it over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy

from ttalight.callbacks.search import callbacks_of
from ttalight.errors import InputError
from ttalight.files.difference import Between, difference, known
from ttalight.files.optimizer_state import adopted_state, optimizer_fault

__all__ = ["ResumedCheckpoint"]

_LOOPS = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}
#: Lightning's note that a checkpoint is of an older version, whose loops had fewer entries.
_OLDER = "legacy_pytorch-lightning_version"


class ResumedCheckpoint(Callback):
    """Refuses a checkpoint that cannot be of this trainer, in one line. ``Trainer`` adds it.

    Counters of loops are numbers, states of optimizers and schedulers have the form of those here, and a
    ``ModelCheckpoint`` names files of its own folder only, since it removes them.
    """

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check loops and callbacks, and remember the rest until there are optimizers."""
        assert trainer.state.fn is not None
        name = _LOOPS[trainer.state.fn.value]
        form = {name: _counts(getattr(trainer, name).state_dict())}
        loops = checkpoint.get("loops")
        if loops is not None or name == _LOOPS["fit"]:
            fault = difference(known(form, loops) if _OLDER in checkpoint else form, loops, "loops")
            _refuse(fault)
            checkpoint["loops"] = known(loops, form)
        for callback in callbacks_of(trainer):
            state = checkpoint["callbacks"].get(callback.state_key)
            _refuse(None if state is None else difference(dict, state, f"callbacks.{type(callback).__name__}"))
            if isinstance(callback, ModelCheckpoint) and state:
                _refuse(_path_fault(callback, state))
        self._checkpoint = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check optimizers and schedulers."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        states: Any = checkpoint.get("lr_schedulers")
        _refuse(difference([dict] * len(schedulers), states, "lr_schedulers", whole=True))
        for index, (own, seen) in enumerate(zip(schedulers, states, strict=True)):
            _refuse(difference(known(own, seen), seen, f"lr_schedulers[{index}]"))
        checkpoint["lr_schedulers"] = [known(seen, own) for own, seen in zip(schedulers, states, strict=True)]
        if type(trainer.strategy).load_optimizer_state_dict is not Strategy.load_optimizer_state_dict:
            return  # it has states in a form of its own
        states = checkpoint.get("optimizer_states")
        _refuse(difference([dict] * len(trainer.optimizers), states, "optimizer_states", whole=True))
        for optimizer, state in zip(trainer.optimizers, states, strict=True):
            _refuse(optimizer_fault(optimizer, state))
        checkpoint["optimizer_states"] = [
            adopted_state(optimizer, state) for optimizer, state in zip(trainer.optimizers, states, strict=True)
        ]


def _refuse(fault: str | None) -> None:
    if fault is not None:
        raise InputError(
            f"ckpt_path: the checkpoint does not fit this run ({fault}): name another one, or start from its weights "
            "with the task's own argument"
        )


def _counts(value: Any) -> Any:
    """Return the form of a loop's state: its integers are counts."""
    if isinstance(value, dict):
        return {name: _counts(part) for name, part in value.items()}
    return Between(0, 2**62) if type(value) is int else value


def _path_fault(callback: ModelCheckpoint, state: dict[str, Any]) -> str | None:
    """Return which path in the state of a callback leads out of its folder."""
    form = {"best_model_path": str, "last_model_path": str, "kth_best_model_path": str, "best_k_models": dict}
    fault = difference(known(form, state), state, "callbacks.ModelCheckpoint")
    if fault is not None:
        return fault
    paths = [state[name] for name in form if name in state and name != "best_k_models"]
    odd = [path for path in [*paths, *state.get("best_k_models", {})] if ".." in Path(str(path)).parts]
    return f"callbacks.ModelCheckpoint names the file {odd[0]!r:.60}" if odd else None
