"""The base of the methods that update on a memory of the stream instead of the batch."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

from torch import Tensor, nn

from ttalight.adapters.components.balanced_memory import BalancedMemory, check_call
from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.self_training import SelfTrainingAdapter, check_selection
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Network
from ttalight.models.norm import NormLayer

__all__ = ["MemoryAdapter"]


class MemoryAdapter(SelfTrainingAdapter):
    """Predicts a batch, inserts it in a class-balanced memory, and updates on the memory after every N images.

    A method defines the loss of each image (``losses``), which images stay (``values``, ``score`` and ``class_limit``,
    see ``BalancedMemory``), and how BatchNorm layers with running statistics normalise (``normalize``): in mode ``ema``
    for the passes of an update, in mode ``source`` for predictions.

    Args:
        memory: Images N that the memory holds, and new ones from one update to the next; at least 1.
        kwargs: See ``SelfTrainingAdapter``. ``steps`` is the number of steps in each update.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network predicts pixel by pixel; later,
            if images have another size than those in the memory.
        TypeError: In ``wrap``, if a BatchNorm layer carries a forward of its own; if the network is called with other
            tensors than the images.
    """

    def __init__(self, memory: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if memory < 1:
            raise InputError(f"memory must be at least 1, got {memory}")
        self.memory = memory

    # -- hooks for subclasses

    #: Classes of BatchNorm layers with a forward of their own that ``normalize`` may stand in for.
    known_layers: tuple[type[nn.Module], ...] = ()

    @abstractmethod
    def normalize(self, layer: NormLayer, x: Tensor) -> Tensor:
        """Return the input of a BatchNorm layer, (B, C, *), normalised."""

    @abstractmethod
    def values(self, net: AdaptiveNetwork, logits: Tensor) -> Tensor:
        """Return the value that each image of the batch has in the memory, (B,), by its logits, (B, C)."""

    def score(self, values: Tensor, ages: Tensor) -> Tensor:
        """Return scores by values and ages, (M,) each; within a class the lowest stay."""
        return values

    def class_limit(self, net: AdaptiveNetwork) -> int | None:
        """Return the most images of a class, None for no limit."""
        return None

    # -- the batch

    def check(self, net: Network) -> None:
        """Check that there are parameters to adapt, and that the normalisation of BatchNorm layers can be replaced."""
        check_selection(net, self.parameters)
        for layer in net.norms:
            if not isinstance(layer.module, self.known_layers):
                layer.check()
            if layer.is_batch_norm:
                layer.check_replaceable(self.known_layers)

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters and the normalisation, and begin with an empty memory."""
        net.set_trainable(net.select(self.parameters))
        #: BatchNorm layers with running statistics.
        self._layers = [layer for layer in net.norms if layer.is_batch_norm and layer.statistics]
        for layer in self._layers:
            layer.replace(partial(self.normalize, layer), self.known_layers)
        self._memory = BalancedMemory(net, self.memory, self.score, self.class_limit(net))

    def method_state(self) -> dict[str, Tensor]:
        """Return the running statistics and the memory."""
        values = [value for layer in self._layers for value in layer.statistics]
        return {f"statistics.{number}": value for number, value in enumerate(values)} | self._memory.state()

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch, insert it in the memory, and update each time that this is due."""
        name, step = type(self).__name__, 0
        check_call(net, name)
        logits = self.predict(net, images)
        check_image_predictions(logits, name, "keeps images by their predicted class", without="a memory")
        for kept in self._memory.fill(net, images, logits.argmax(1), self.values(net, logits)):
            for _ in range(self.steps):
                self.update(net, kept, step)
                step += 1
        return logits if self.prediction == "before" else self.predict(net, images)

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step on images of the memory, and return the logits that its loss was made from.

        Args:
            net: The network.
            images: (K, 3, H, W).
            step: Number of the step within the batch, from 0.
        """
        outputs = net(images, norm="ema", batches=self.share(net, images))
        weights = self.weigh(net, images, outputs)
        self.backward(net, self.losses(net, images, outputs), weights, outputs)
        self.optimizer_step(net)
        return outputs.logits

    def share(self, net: AdaptiveNetwork, images: Tensor) -> float:
        """Return the number of images as a share of the batch, for the cost of their passes."""
        assert net.images is not None, "there is a batch while an adapter adapts"
        return len(images) / len(net.images)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {"memory": self.memory}
