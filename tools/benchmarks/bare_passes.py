"""The passes that a method needs, recorded and repeated in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ttalight.adapters import Adapter
from ttalight.engine import Engine


class Pass(NamedTuple):
    """A forward that a method made."""

    images: int
    gradients: bool
    to_pixels: bool
    norm: str


class Auxiliary(NamedTuple):
    """A pass of the task's auxiliary loss."""


class Backward(NamedTuple):
    """A backward through one of the passes of the batch, by its number."""

    index: int


class Step(NamedTuple):
    """A step of the optimizer."""


Event = Pass | Auxiliary | Backward | Step


class Recorder:
    """Notes the passes, backwards and steps of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[Event] = []
        self.passes = 0
        self.run, self.auxiliary = engine.net.run, engine.net.auxiliary_loss
        self.optimizer_step = engine.net.optimizer_step
        self.norm = next((layer for layer in engine.net.norms if layer.is_batch_norm), None)
        engine.net.run = self.forward
        engine.net.auxiliary_loss = self.loss
        engine.net.optimizer_step = self.step

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.run(images)
        norm = "source" if self.norm is None else self.norm.mode
        self.note(Pass(len(images), logits.requires_grad, images.requires_grad, norm), logits)
        return logits

    def loss(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        loss = self.auxiliary(images, generator)
        self.note(Auxiliary(), loss)
        return loss

    def note(self, event: Event, output: torch.Tensor) -> None:
        self.events.append(event)
        if output.requires_grad:
            number = self.passes
            output.register_hook(lambda _: self.events.append(Backward(number)))
        self.passes += 1

    def step(self) -> bool:
        moved = self.optimizer_step()
        if moved:
            self.events.append(Step())
        return moved

    def take(self) -> list[Event]:
        """Return the events since the last time."""
        events, self.events, self.passes = self.events, [], 0
        return events


class Bare:
    """Repeats recorded passes in plain torch."""

    def __init__(self, network: nn.Module, names: list[str], method: Adapter, images: torch.Tensor) -> None:
        self.network = network.requires_grad_(False)
        self.draws = torch.Generator(images.device).manual_seed(0)
        self.norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        self.images = {len(images): images}
        self.optimizer: torch.optim.Optimizer | None = None
        parameters = dict(network.named_parameters())
        if names:
            adapted = [parameters[name].requires_grad_() for name in names]
            self.optimizer = method.make_optimizer(adapted)

    def prepare(self, events: list[Event]) -> None:
        """Have images ready for passes of any size."""
        (images,) = list(self.images.values())[:1]
        for event in events:
            if isinstance(event, Pass) and event.images not in self.images:
                copies = -(-event.images // len(images))
                self.images[event.images] = images.repeat(copies, 1, 1, 1)[: event.images]

    @torch.enable_grad()  # the Trainer evaluates without
    def __call__(self, events: list[Event]) -> None:
        passes: list[tuple[torch.Tensor, torch.Tensor]] = []
        norm = ""
        for event in events:
            if isinstance(event, Pass):
                if event.norm != norm:
                    norm = self.use(event.norm)
                images = self.images[event.images]
                if event.to_pixels:
                    images = images.detach().requires_grad_()
                with torch.set_grad_enabled(event.gradients):
                    passes.append((images, self.network(images)))
            elif isinstance(event, Auxiliary):
                norm = self.use("ema")
                images = next(iter(self.images.values()))
                passes.append((images, self.network.auxiliary_loss(images, self.draws)))
            elif isinstance(event, Backward):
                images, output = passes[event.index]
                loss = output if output.ndim == 0 else mean_entropy(output)
                if images.requires_grad:
                    torch.autograd.grad(loss, images)
                else:
                    loss.backward()
            elif self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def use(self, norm: str) -> str:
        """Set the layers as torch has them: running statistics, those of the batch, or both as in training."""
        for module in self.norms:
            module.training = norm != "source"
            module.track_running_stats = norm in ("source", "ema")
        return norm


def mean_entropy(logits: torch.Tensor) -> torch.Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def adapted_names(network: nn.Module, engine: Engine) -> list[str]:
    """Names of the parameters that the method adapts; of all affines where it brings its own."""
    chosen = list(engine.net.parameters)
    if engine.net.own:
        chosen = engine.net.norm_affines()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(parameter)] for parameter in chosen]
