"""Episodes of one image each, computed side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ttalight.models.network import Network

if TYPE_CHECKING:
    from ttalight.adapters.adapter import GradientAdapter
    from ttalight.adapters.engine import Engine

__all__ = ["Episode", "EpisodeNetwork", "Episodes", "check_episode", "check_views"]

#: What is adapted to together where every batch starts from the source: the ``batch``, or each ``image`` by itself.
Episode = Literal["batch", "image"]
#: Optimizers that move every number by its own gradients alone, so that those of many episodes can share tensors.
_ELEMENTWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax")
#: Beyond these, the passes of one image fill the machine.
_MOST_VIEWS = 2
#: Copies of a free parameter: value, gradient, two of an optimizer's state.
_COPIES = 4
#: Peak of memory over what a pass keeps for its way back; 1.3 to 1.46 were measured.
_PEAK = 1.5
_INSTEAD = "Use episode='batch' with batches of one image, which is the same one after the other"


def check_episode(adapter: GradientAdapter) -> None:
    """Refuse a method, or options, that episodes of one image cannot have.

    Raises:
        ValueError: If that is so.
    """
    name = type(adapter).__name__
    if adapter.episode not in ("batch", "image"):
        raise ValueError(f"episode must be 'batch' or 'image', got {adapter.episode!r}")
    if adapter.episode_memory < 1:
        raise ValueError(f"episode_memory must be at least 1 MiB, got {adapter.episode_memory}")
    if adapter.episode == "batch":
        return
    if not adapter.separable:
        raise ValueError(
            f"{name} cannot run with episode='image', which is for methods whose loss of an image has at most "
            f"{_MOST_VIEWS} views of it, no draws and no memory of other images: Tent, RPL and TestTimeTraining (on "
            f"tasks with such a loss). {_INSTEAD}"
        )
    if adapter.reset != "batch":
        raise ValueError(
            f"episode='image' starts every image from the source and needs reset='batch', got reset={adapter.reset!r}"
        )
    if adapter.terms:
        raise ValueError("episode='image' takes no terms: leave them away, or episode='batch'")
    if adapter.fast:
        raise ValueError("episode='image' and fast=True are two ways to make the same passes: choose one of them")


def check_views(adapter: GradientAdapter, task: nn.Module) -> None:
    """Refuse a task whose passes keep the machine busy with one image.

    Raises:
        ValueError: If that is so.
    """
    views = getattr(task, "auxiliary_views", 1)
    if adapter.episode == "image" and views > _MOST_VIEWS:
        raise ValueError(
            f"episode='image' pays for at most {_MOST_VIEWS} views of an image, and a step on {type(task).__name__} "
            f"passes {views}, which keep the machine busy without that. {_INSTEAD}"
        )


class Episodes:
    """Adapts to each image of a batch from the source, as many images at a time as memory allows.

    The numbers are those of one image after the other, up to rounding; draws are refused. The model stays as it is:
    what an episode changes is in tensors of its own.

    Args:
        engine: The engine whose method, model and counters these are.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._at_once: dict[tuple[Any, ...], int] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images, each adapted to by itself.

        Args:
            images: (B, 3, H, W).

        Raises:
            ValueError: At the first batch, if method, optimizer and model do not allow it.
        """
        chunks = -(-len(images) // self.at_once(images))
        return torch.cat([self._chunk(chunk, len(images)) for chunk in images.tensor_split(chunks)])

    def at_once(self, images: Tensor) -> int:
        """Return how many episodes on images of this kind run at a time; the first question makes a trial.

        Args:
            images: (B, 3, H, W).

        Raises:
            ValueError: See ``__call__``.
        """
        kind = (*images.shape[1:], images.dtype)
        if kind not in self._at_once:
            self._at_once[kind] = self._room(images[:1])
        return self._at_once[kind]

    def _chunk(self, images: Tensor, batch: int) -> Tensor:
        engine, net = self.engine, EpisodeNetwork(self.engine, len(images))
        fallbacks = [norm.fallbacks for norm in net.norms]
        logits = engine.adapter.adapt(net, images).detach()
        for norm, before in zip(net.norms, fallbacks, strict=True):
            norm.fallbacks = before + len(images) * (norm.fallbacks - before)
        engine.updates += net.updates
        engine.skipped += net.skipped
        engine.net.forwards += net.forwards * len(images) / batch
        engine.backwards += net.backwards * len(images) / batch
        engine.last = net.last
        readings = engine.net.readings
        for steps, read in net.readings.items():
            readings[steps] = torch.cat([readings[steps], read]) if steps in readings else read
        return logits

    # -- the first batch

    def _room(self, image: Tensor) -> int:
        """Return how many episodes fit, by what one of them keeps for its way back; nothing of it stays."""
        self._check()
        net = EpisodeNetwork(self.engine, 1)
        fallbacks = [norm.fallbacks for norm in net.norms]
        shared = {tensor.untyped_storage().data_ptr() for tensor in net.module.state_dict().values()}
        kept: dict[int, int] = {}
        sizes = [0]
        go_back = net.backward

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        def backward(*arguments: Any) -> None:
            sizes.append(sum(kept.values()))
            go_back(*arguments)
            kept.clear()

        net.backward = backward
        try:
            with saved_tensors_hooks(note, _as_it_is):
                self.engine.adapter.adapt(net, image)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"episode='image' cannot run {type(self.engine.adapter).__name__} on {type(net.module).__name__} for "
                f"several images at once ({_reason(error)}). {_INSTEAD}"
            ) from error
        for norm, before in zip(net.norms, fallbacks, strict=True):
            norm.fallbacks = before
        free = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters)
        one = (_PEAK * max(sizes) + _COPIES * free) / 2**20
        room = int(net.adapter.episode_memory / one)
        if room < 2:
            raise ValueError(
                f"episode='image' pays from two episodes at a time on, which take about {2 * one:.0f} MiB, and "
                f"episode_memory is {net.adapter.episode_memory}: raise it, or free fewer parameters. {_INSTEAD}"
            )
        return room

    def _check(self) -> None:
        """Refuse what shows only once the method is configured."""
        adapter, net, optimizer = self.engine.adapter, self.engine.net, self.engine.optimizer
        if type(optimizer) not in [getattr(torch.optim, name) for name in _ELEMENTWISE]:
            raise ValueError(
                "episode='image' lets episodes share an optimizer that moves each number by its own gradients, as "
                f"{', '.join(_ELEMENTWISE)} do; got {type(optimizer).__name__}. {_INSTEAD}"
            )
        if adapter.method_state() or net.own:
            raise ValueError(
                f"episode='image' takes weights and statistics apart, and {type(adapter).__name__} on "
                f"{type(net.module).__name__} changes tensors besides: "
                f"{', '.join([*adapter.method_state(), *net.own])}. {_INSTEAD}"
            )


class EpisodeNetwork(Network):
    """A network as the method sees it in several episodes: a pass gives each image weights of its own.

    Free parameters and moving statistics are there once for each episode, stacked along a first dimension. The layers
    themselves, their modes and the precision are those of the engine's network; counters and readings are its own.

    Args:
        engine: The engine; its model is not changed.
        episodes: Number E of images in every pass.
    """

    def __init__(self, engine: Engine, episodes: int) -> None:
        net = engine.net
        vars(self).update(vars(net))
        self.adapter: GradientAdapter = engine.adapter  # type: ignore[assignment]
        self.forwards = self.unclaimed = self.backwards = 0.0
        self.updates = self.skipped = 0
        self.last: dict[str, float] = {}
        self.readings = {}
        names = {id(parameter): name for name, parameter in net.module.named_parameters()}
        self.parameters = [nn.Parameter(_stacked(parameter, episodes)) for parameter in net.parameters]
        self._tensors: dict[str, Tensor] = {
            f"module.{names[id(own)]}": mine for own, mine in zip(net.parameters, self.parameters, strict=True)
        }
        for norm in net.norms:
            if norm.mode == "ema":
                for name in ("running_mean", "running_var")[: len(norm.statistics)]:
                    value = getattr(norm.module, name)
                    self._tensors[f"module.{norm.name}.{name}".replace("..", ".")] = _stacked(value, episodes)
        self._caller = _Caller(net.module)
        self._reduced: tuple[Tensor, Tensor]
        #: Episodes that a step left as they were: they would only ask for the same step again.
        self._ended = [False] * episodes
        self.optimizer = self.adapter.make_optimizer(self.parameters)
        self.run = self._forward
        self.step, self.backward, self.descend = self._step, self._backward, self._descend

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the task's self-supervised loss of each image by itself, (E,)."""
        self._before_pass(getattr(self.module, "auxiliary_views", 1))
        with self.precision():
            losses = self._each(lambda image: self.module.auxiliary_loss(image, generator).mean(), images)  # type: ignore[operator]
        return losses if losses.dtype == torch.float64 else losses.float()

    def _forward(self, images: Tensor) -> Tensor:
        return self._each(self._logits, images)

    def _logits(self, image: Tensor) -> Tensor:
        logits = self.original(image)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"its forward returns a {type(logits).__name__}, and only a tensor of logits can be stacked"
            )
        return logits[0]

    def _each(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return what a function of the model, which takes a batch of one image, gives for each image."""

        def one(tensors: dict[str, Tensor], image: Tensor) -> Any:
            return functional_call(self._caller, tensors, (function, image[None]))

        # The CPU's fused attention knows no stacked images, and would be called for one after the other.
        with sdpa_kernel(SDPBackend.MATH) if images.device.type == "cpu" else nullcontext():
            stacked: Tensor = vmap(one)(self._tensors, images)
        return stacked

    # -- steps, as the engine makes them

    def _step(self, losses: Tensor, weights: Tensor | None = None) -> None:
        self.backward(losses, weights)
        self.descend()

    def _backward(self, losses: Tensor, weights: Tensor | None = None, penalty: Tensor | None = None) -> None:
        assert penalty is None, "separable methods have no penalty"
        if weights is None:
            weights = torch.ones_like(losses)
        losses = losses * weights
        if losses.requires_grad:
            losses.sum().backward(inputs=self.parameters)  # type: ignore[no-untyped-call]
        if all(parameter.grad is None for parameter in self.parameters):
            raise RuntimeError("the loss does not depend on the parameters to adapt")
        self.backwards += self.unclaimed
        self.unclaimed = 0.0
        self._reduced = losses.detach(), (weights != 0).to(losses.dtype)

    def _descend(self, pulled: tuple[Tensor, Tensor] | None = None) -> None:
        """Move each episode whose loss and gradient are finite; one host synchronisation."""
        assert pulled is None, "separable methods pull at no weights"
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        episodes = len(self._ended)
        norms = _norms(gradients)
        losses, kept = self._reduced
        seen = torch.stack([losses, norms.to(losses.dtype), kept])
        rows = list(zip(*seen.tolist(), strict=True))
        self._ended = [
            ended or not (all(value - value == 0 for value in row) and row[2] > 0)
            for ended, row in zip(self._ended, rows, strict=True)
        ]
        self.last = {
            name: sum(values) / episodes
            for name, values in zip(("loss", "grad_norm", "selected"), zip(*rows, strict=True), strict=True)
        }
        self.kept = self.last["selected"]
        if self.adapter.clip_norm is not None:
            scale = (self.adapter.clip_norm / (norms + 1e-6)).clamp(max=1)
            for gradient in gradients:
                gradient.mul_(scale.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1)))
        self._move()
        self.updates += episodes - sum(self._ended)
        self.skipped += sum(self._ended)

    @torch.no_grad()
    def _move(self) -> None:
        ended = [index for index, over in enumerate(self._ended) if over]
        kept = [parameter[ended] for parameter in self.parameters] if ended else []
        self.optimizer.step()
        for parameter, values in zip(self.parameters, kept, strict=False):
            parameter[ended] = values
        self.optimizer.zero_grad()


class _Caller(nn.Module):
    """Calls a function of a module, so that it can be called with other tensors in the place of the module's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        return function(image)


def _stacked(tensor: Tensor, count: int) -> Tensor:
    return tensor.detach().expand(count, *tensor.shape).clone()


def _norms(stacked: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of each episode's part of stacked tensors, taken together: (E,)."""
    vectors = [tensor.reshape(len(tensor), -1) for tensor in stacked if tensor.ndim < 3]  # many and small
    parts = [torch.cat(vectors, 1)] if vectors else []
    parts += [tensor.flatten(1) for tensor in stacked if tensor.ndim >= 3]
    norms: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x, dim=1) for x in parts]), dim=0)
    return norms


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
