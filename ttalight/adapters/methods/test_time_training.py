"""Test-time training: a task's self-supervised loss, minimised on the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ttalight.adapters.components.intermediate_predictions import (
    check_readings,
    pass_for_prediction,
    steps_with_readings,
)
from ttalight.adapters.gradient import GradientAdapter
from ttalight.adapters.methods.ema_bn import check_momentum, move_statistics
from ttalight.adapters.term import add_terms
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.models.network import Network

__all__ = ["TestTimeTraining"]


class TestTimeTraining(GradientAdapter):
    """Minimises the auxiliary loss of a task on each batch, then predicts the batch.

    Serves every task with ``auxiliary_loss(images, generator)`` and ``adaptable_parameters()``. While adapting, the
    layers named by the task's ``adaptation_modes()`` (all BatchNorm layers by default) run on batch statistics; the
    rest of the network stays in eval mode. The published protocol of this line of work is episodic: for every batch
    the source weights, statistics and optimizer are restored, N steps taken on the batch and the un-augmented batch
    predicted after the last one. N passes of the auxiliary loss, N backwards and one forward a batch. Plug-in terms are
    made from one more forward of the un-augmented batch in each step, with the statistics of the prediction.

    Defaults are CTA's: S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*, arXiv
    2507.05221: 20 steps at 1e-6 on batches of 128. The paper names no optimizer; Adam is what its comparison methods
    use. It does not say either whether weights are restored for every batch; ``reset="domain"`` is the other reading.

    Args:
        steps: Gradient steps N for each batch; 0 with ``norm="ema"`` is the source model.
        lr: Learning rate of Adam; 1e-6 by default.
        norm: BatchNorm statistics at prediction: ``ema`` (running statistics that moved along while adapting),
            ``batch`` (of the predicted batch) or ``source``.
        momentum: Weight of a batch when running statistics are updated.
        reset: See ``Adapter``.
        read_at: Numbers of steps after which the results have predictions too, for accuracy against iterations from
            one run; needs ``reset="batch"``.
        kwargs: See ``GradientAdapter`` and ``Adapter``.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: At the first batch, if the module has no auxiliary loss.
    """

    shards_batches = True

    __test__ = False  # the name begins like that of a test
    prediction = "after"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-6, "batch_size": 128, "steps": 20}
    }

    def __init__(
        self,
        steps: int = 20,
        lr: float | None = None,
        norm: Literal["ema", "batch", "source"] = "ema",
        momentum: float = 0.1,
        reset: Literal["domain", "batch", "never"] | int = "batch",
        read_at: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, steps=steps, reset=reset, **kwargs)
        if norm not in ("ema", "batch", "source"):
            raise InputError(f"norm must be 'ema', 'batch' or 'source', got {norm!r}")
        self.norm = norm
        self.prediction_norm = "batch" if norm == "batch" else "source"
        self.momentum = check_momentum(momentum)
        self.read_at = check_readings(read_at, steps, reset)
        self._episode: dict[str, Tensor] = {}

    def check_batch_shard(self, module: nn.Module) -> None:
        """Make sure that the task says which modules its images go through."""
        super().check_batch_shard(module)
        if not hasattr(module, "auxiliary_encoders"):
            raise InputTypeError(
                f"the auxiliary loss of {type(module).__name__} cannot be shared among processes batch by batch: it "
                "has no auxiliary_encoders(), the modules that its images go through one by one. Use shard='domain'"
            )

    def check(self, net: Network) -> None:
        """Check that the module is a task with an auxiliary loss.

        Raises:
            TypeError: If it is not.
        """
        task: Any = net.module
        missing = [name for name in ("auxiliary_loss", "adaptable_parameters") if not hasattr(task, name)]
        if missing:
            raise InputTypeError(
                f"{type(task).__name__} has no {' and no '.join(missing)}: test-time training needs a task that was "
                "trained with a self-supervised loss, such as CrossTaskTTT; for any other model use a TTA method"
            )
        net.check_trainable(list(task.adaptable_parameters()))

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the parameters that the task lets adapt."""
        task: Any = net.module
        net.set_trainable(task.adaptable_parameters())
        move_statistics(net, self.norm, self.momentum)
        self._episode = task.episode_state() if hasattr(task, "episode_state") else {}

    def method_state(self) -> dict[str, Tensor]:
        """Return the task's queues and buffers that belong to an episode."""
        return self._episode

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Step on the auxiliary loss of fresh views, then predict the images."""
        for step in steps_with_readings(net, images, self.steps, self.read_at, self.norm):
            losses = net.auxiliary_loss(images, net.draws(step))
            if self.terms:
                losses = add_terms(losses, self.terms, net, pass_for_prediction(net, images, self.norm))
            net.step(losses)
        return self.predict(net, images)
