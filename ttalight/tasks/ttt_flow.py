"""TTTFlow: test-time training by the likelihood of feature maps under a normalising flow."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.adapters import Adapter, TestTimeTraining
from ttalight.errors import InputError
from ttalight.losses import flow_likelihood_loss
from ttalight.models.flow import FeatureFlow
from ttalight.models.maps import select_stages
from ttalight.tasks.map_task import MapTask

__all__ = ["TTTFlow"]


class TTTFlow(MapTask):
    """A flow on the maps of a trained classifier; at test time maps must be as likely as the source's.

    The classifier is trained first, as a ``SupervisedTask``. Then it is frozen, in eval mode, and a normalising flow
    learns the density of one stage's maps by maximum likelihood, on augmented source images without their labels. At
    test time the flow is frozen, and the encoder up to the stage adapts to make the maps of the batch likely. Layers
    behind the stage keep weights and statistics of the source, as in the authors' code.

    Source: D. Osowiechi et al., *TTTFlow: Unsupervised Test-Time Training with Normalizing Flow*, WACV 2023, arXiv
    2210.11389. The authors train the classifier by SGD at 0.1 with momentum 0.9 and weight decay 5e-4, a tenth of the
    rate after 150 and 250 epochs, and the flow for 100 epochs of batches of 128 by the same optimizer with a cosine;
    without ``optimizer`` and ``scheduler`` the schedule is ``BaseTask``'s. Differences from their code: a step of the
    flow is Glow's, with a 1x1 convolution, and the networks of the couplings are smaller; shift and scale of the
    ``ActNorm`` layers are set on the first training batch alone, where theirs are set again on the first batch of test
    time; the optimizer starts again with each batch.

    Args:
        supervised: The classifier to train a flow on: a file or ``true``, as ``weights`` of ``SupervisedTask``.
        layer: Number of the stage whose maps are read, from 1 on.
        flow_steps: Steps of the flow; the authors' has three couplings.
        hidden: Channels inside the networks of the couplings; as many as the stage has by default.
        weights: Checkpoint of this task, to adapt; not together with ``supervised``.
        kwargs: See ``SupervisedTask`` and ``BaseTask``; crops are ``padded`` here.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit; when training starts, if there is no
            classifier to train a flow on.
        FileNotFoundError: If a file does not exist.
    """

    def __init__(
        self,
        supervised: bool | str | None = None,
        layer: int = 2,
        flow_steps: int = 3,
        hidden: int | None = None,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(weights=weights, **kwargs)
        if supervised and weights is not None:
            raise InputError("give supervised (a classifier to train a flow on) or weights (a trained flow), not both")
        self.stages = select_stages(self.encoder, [layer])
        channels = self.stages[0].channels
        if supervised:
            expected = {name: self.hparams[name] for name in ("encoder", "stem", "num_classes", "norm")}
            self.load_classifier(supervised, expected, "supervised")
        self.flow = FeatureFlow(channels, flow_steps, channels if hidden is None else hidden)
        self.load_trained(weights, "layer", "flow_steps", "hidden", "norm")
        self.encoder.requires_grad_(False)
        self.classifier.requires_grad_(False)
        self.train()  # the trainer takes the modes as it finds them
        self._started = bool(supervised) or weights is not None
        self._initialize = False

    def train(self, mode: bool = True) -> TTTFlow:
        """Set the mode; encoder and classifier stay in eval mode."""
        super().train(mode)
        self.encoder.eval()
        self.classifier.eval()
        return self

    def setup(self, stage: str) -> None:
        """Make sure that there is a classifier to train a flow on."""
        super().setup(stage)
        if stage == "fit" and not self._started:
            raise InputError(
                "the flow is trained on the maps of a classifier: give supervised= (checkpoint of a SupervisedTask)"
            )

    def on_train_start(self) -> None:
        """Note whether the flow is still to be initialised; one that was resumed or loaded is not."""
        super().on_train_start()
        self._initialize = not bool(self.flow.initialized)

    def training_losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the negative log-likelihood of the frozen encoder's maps; labels are not read."""
        with torch.no_grad():
            maps = self._maps(images)
        if self._initialize:
            # Of the maps of all processes, since all must begin with the same flow.
            gathered = self.all_gather(maps)
            assert isinstance(gathered, Tensor)
            self.flow.initialize(gathered.reshape(-1, *maps.shape[1:]))
            self._initialize = False
        return {"auxiliary": flow_likelihood_loss(*self.flow(maps)).mean()}

    def _maps(self, images: Tensor) -> Tensor:
        return self.encode_with_maps(images)[1][self.stages[0].number]

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the negative log-likelihood of the maps per dimension, (B,); nothing is drawn.

        Args:
            images: (B, 3, H, W) in [0, 1].
            generator: Not used.
        """
        return flow_likelihood_loss(*self.flow(self._maps(images)))

    def adaptation_modes(self) -> list[nn.Module]:
        """Return the modules up to the stage; those behind it keep the source's statistics."""
        free = {id(parameter) for parameter in self.adaptable_parameters()}
        return [
            module
            for module in self.encoder.modules()
            if any(id(parameter) in free for parameter in module.parameters(recurse=False))
        ]

    def default_adapter(self) -> Adapter:
        """Return the authors' test-time training: SGD at 1e-3, momentum 0.9, weight decay 5e-4, 10 steps."""
        return TestTimeTraining(steps=10, optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4))
