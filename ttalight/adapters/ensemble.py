"""An ensemble of adapted networks: each adapts by itself, and their predictions are merged."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttalight.adapters.wrapper import AdaptedNetwork
from ttalight.engine.schedule import load_states, states_of
from ttalight.errors import InputError, InputTypeError, UsageError
from ttalight.losses.entropy import log_probabilities
from ttalight.models.outputs import Select, logits_of

__all__ = ["AdaptedEnsemble", "MergedNetworks", "merge_logits"]

#: Merges the class probabilities of the members, or their logits.
Merge = Literal["probabilities", "logits"]


class AdaptedEnsemble:
    """Networks that adapt independently to each batch, and whose predictions are merged.

    A call with images adapts every member to them and returns one prediction. Members can be networks of several
    architectures, or of one architecture with other weights, or copies of one network with other methods or seeds. None
    sees another's prediction or gradient, so each is what it would be alone, bit for bit. A batch costs the sum of what
    the members cost.

    A batch is a transaction. If a member fails, or the predictions do not fit together, those that have adapted to the
    batch are restored. What stays of such a batch is what members have reported to monitors, and its logits and time in
    their reports.

    Calls are serialised by a lock. Copies (``copy.deepcopy``, ``pickle``) hold networks of their own.

    Source: the mean of class probabilities is that of B. Lakshminarayanan, A. Pritzel, C. Blundell, *Simple and
    Scalable Predictive Uncertainty Estimation using Deep Ensembles*, NeurIPS 2017, arXiv 1612.01474. F. Lyu, Z. Chen,
    J. Jiang, L. Li, X. Tang, X. He, X. Liu, *Exploring Test-time Scaling via Prediction Merging on Large-Scale
    Recommendation*, arXiv 2512.07650, merge predictions of several models to scale the compute at test time. Theirs do
    not adapt.

    Args:
        members: What ``Adapter.wrap`` returned, one for each member, all of networks of their own.
        merge: ``probabilities`` returns the logarithm of the mean of the members' class probabilities, ``logits`` the
            mean of their logits, in which a member with large logits outweighs the others.

    Raises:
        ValueError: If there are no members, one is listed twice, or ``merge`` is another word.
        TypeError: If a member is no adapted network.
        RuntimeError: If a member was released.
    """

    def __init__(self, members: Iterable[AdaptedNetwork], merge: Merge = "probabilities") -> None:
        #: The members.
        self.members = _checked(members)
        if merge not in ("probabilities", "logits"):
            raise InputError(f"merge must be 'probabilities' or 'logits', got {merge!r}")
        self.merge = merge
        self._lock = threading.RLock()

    def __call__(self, images: Tensor | None = None, *args: Any, adapt: bool = True, **kwargs: Any) -> Tensor:
        """Adapt all members to a batch and return the merged prediction.

        Args:
            images: (B, 3, H, W), as the networks expect them; see ``AdaptedNetwork``.
            args: Further arguments of the networks.
            adapt: False predicts with the present states and changes nothing.
            kwargs: Further keyword arguments of the networks.

        Returns:
            Log-probabilities or logits, see ``merge``, (B, C) or (B, C, H, W).

        Raises:
            ValueError: If the members return predictions of several shapes.
        """
        with self._lock:
            before = [_BeforeBatch(member) for member in self.members]
            try:
                outputs = [member(images, *args, adapt=adapt, **kwargs) for member in self.members]
                selects = [member.engine.net.output for member in self.members]
                return merge_logits(list(map(_logits, outputs, selects)), self.merge)
            except BaseException:
                for earlier in before:
                    earlier.restore()
                raise

    @property
    def forwards(self) -> float:
        """Forwards of all members so far, in whole batches."""
        return float(sum(member.engine.net.forwards for member in self.members))

    @property
    def backwards(self) -> float:
        """Backwards of all members so far, in whole batches."""
        return float(sum(member.engine.backwards for member in self.members))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of all networks, with their present values."""
        return (parameter for member in self.members for parameter in member.parameters())

    def freeze(self) -> AdaptedEnsemble:
        """Let calls predict with the present states and change nothing, and return ``self``."""
        for member in self.members:
            member.freeze()
        return self

    def unfreeze(self) -> AdaptedEnsemble:
        """Let calls adapt again, and return ``self``."""
        for member in self.members:
            member.unfreeze()
        return self

    def train(self, mode: bool = True) -> AdaptedEnsemble:
        """Set the training mode that the networks have after ``release()``. They always adapt in eval mode."""
        for member in self.members:
            member.train(mode)
        return self

    def eval(self) -> AdaptedEnsemble:
        """Return ``train(False)``. This does not stop the adaptation: use ``freeze()`` for that."""
        return self.train(False)

    def export(self, statistics_from: Tensor | None = None) -> MergedNetworks:
        """Return an ordinary module, in eval mode, that predicts what ``self(images, adapt=False)`` returns.

        Args:
            statistics_from: See ``AdaptedNetwork.export``.

        Raises:
            RuntimeError: Before the first batch.
            TypeError: If the prediction of a member is not that of a network, or its statistics cannot be folded.
        """
        with self._lock:
            networks = [member.export(statistics_from) for member in self.members]
            return MergedNetworks(networks, self.merge, [member.engine.net.output for member in self.members]).eval()

    def reset(self) -> None:
        """Restore the source weights of all members and begin a new domain."""
        with self._lock:
            for member in self.members:
                member.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that adaptation has changed."""
        with self._lock:
            return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict()`` returned, of this ensemble or an equal one.

        Raises:
            ValueError: If the state does not fit. Nothing has changed then.
        """
        states = state.get("members") if isinstance(state, dict) else None
        if not isinstance(states, list) or len(states) != len(self.members):
            seen = f"one of {len(states)} members" if isinstance(states, list) else "no state of an ensemble"
            raise InputError(f"the state is {seen}, and the ensemble has {len(self.members)} members")
        with self._lock:
            before = self.state_dict()["members"]
            for number, (member, own) in enumerate(zip(self.members, states, strict=True)):
                try:
                    member.load_state_dict(own)
                except BaseException:
                    for earlier, kept in zip(self.members[:number], before, strict=False):
                        earlier.load_state_dict(kept)
                    raise

    def to(self, device: torch.device | str) -> AdaptedEnsemble:
        """Move all networks and all adaptation state to a device."""
        with self._lock:
            for member in self.members:
                member.to(device)
        return self

    def release(self) -> list[nn.Module]:
        """Stop adapting and return the networks as they were before ``wrap``."""
        with self._lock:
            return [member.release() for member in self.members]

    def __enter__(self) -> AdaptedEnsemble:
        return self

    def __exit__(self, *error: object) -> None:
        for member in self.members:
            member.__exit__(*error)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.members, self.merge)

    def __repr__(self) -> str:
        members = "".join(f"\n  {member!r}," for member in self.members)
        return f"{type(self).__name__}([{members}\n], merge={self.merge!r})"


class MergedNetworks(nn.Module):
    """Ordinary networks whose predictions are merged, as ``AdaptedEnsemble.export`` returns them.

    Args:
        networks: The networks.
        merge: See ``AdaptedEnsemble``.
        outputs: Where the logits are in what each network returns; see ``Adapter``.
    """

    def __init__(self, networks: Sequence[nn.Module], merge: Merge, outputs: Sequence[Select]) -> None:
        super().__init__()
        self.networks, self.merge, self.outputs = nn.ModuleList(networks), merge, list(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Return the merged prediction of images, (B, 3, H, W)."""
        outputs = [network(images) for network in self.networks]
        return merge_logits(list(map(logits_of, outputs, self.outputs)), self.merge)


def merge_logits(logits: Sequence[Tensor], merge: Merge = "probabilities") -> Tensor:
    """Return the logarithm of the mean of class probabilities, or the mean of logits.

    A class that all predictions mask with minus infinity is minus infinity in the result.

    Args:
        logits: One tensor for each prediction, all (B, C) or all (B, C, ...).
        merge: ``probabilities`` or ``logits``.

    Returns:
        Of the shape of one prediction. With ``probabilities`` float32 or float64.

    Raises:
        ValueError: If they are of several shapes.
    """
    shapes = {tuple(each.shape): None for each in logits}
    if len(shapes) > 1:
        raise InputError(
            f"the members return logits of the shapes {', '.join(map(str, shapes))}: an ensemble needs one shape, and "
            "the same classes in the same order"
        )
    if merge == "logits":
        return torch.stack(list(logits)).mean(0)
    return torch.stack(list(map(log_probabilities, logits))).logsumexp(0) - math.log(len(logits))


class _BeforeBatch:
    """The place of a member in its stream, with which its last batch can be undone. Tensors are the engine's copies."""

    def __init__(self, member: AdaptedNetwork) -> None:
        engine, net = member.engine, member.engine.net
        counts = replace(net.counters), net.forwards, net.backwards, net.last, net.guard.moved, engine._boundary
        self._member, self._state = member, engine.state
        self._before = (*counts, net.readings, list(engine.admission.sizes))
        self._draws = [generator.get_state() for generator in engine._generators]
        self._schedules, self._window = states_of(engine.schedules), copy.copy(member._window)

    def restore(self) -> None:
        """Restore the member, where it has adapted to a batch since."""
        engine = self._member.engine
        if engine.net.counters == self._before[0]:
            return
        engine._undo(self._state, self._before, self._draws)
        load_states(engine.schedules, self._schedules)
        self._member._window = self._window


def _checked(members: Iterable[AdaptedNetwork]) -> tuple[AdaptedNetwork, ...]:
    """Return the members, where they are adapted networks, each listed once and not released."""
    if isinstance(members, AdaptedNetwork) or not isinstance(members, Iterable):
        raise InputTypeError(f"members must be a list of adapted networks, got {type(members).__name__}")
    members = tuple(members)
    if not members:
        raise InputError("an ensemble needs at least one member, for example [Tent().wrap(network)]")
    for member in members:
        if not isinstance(member, AdaptedNetwork):
            raise InputTypeError(
                f"a member must be an adapted network, for example Tent().wrap(network), got {type(member).__name__}"
            )
        try:
            _ = member.engine
        except UsageError:
            raise UsageError("a member was released: wrap its network again") from None
    if len(set(map(id, members))) < len(members):
        raise InputError("two members share a network: wrap a copy of it, copy.deepcopy(network), for each of them")
    return members


def _logits(output: Any, select: Select) -> Tensor:
    """Return the logits in what a member returned; a tensor is the logits, even where a function computed them."""
    return output if isinstance(output, Tensor) else logits_of(output, select)
