"""A memory of images with about as many of each predicted class, which methods update on instead of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.models.outputs import map_tensors

__all__ = ["BalancedMemory", "check_call", "select_balanced"]


class BalancedMemory:
    """Keeps N images of a stream, balanced over predicted classes, in tensors of fixed size.

    An image has a class, a value and an age, the number of images since it arrived, itself included. A score is made of
    value and age, and within a class the images of the lowest scores are kept: see ``select_balanced``. After every N
    new images the memory is due for an update.

    New images are inserted N at a time, with their scores as they are when the last of these has arrived. With a
    ``limit`` this is the memory of RoTTA (CSTU), whose authors insert one image after another. The content is the same
    where scores do not depend on the age and N is a multiple of the number of classes, and for any scores if the images
    come one at a time. Otherwise it differs in three points. Scores that change with the age can order two images
    differently when the first and when the last of N has arrived. Where the memory is full and the class of a new image
    is not, the authors compare it with the highest score in the largest classes and drop it if its own is higher; here
    it always takes the place of the highest score, unless its own class is a largest one. And a class that is one of
    several largest ones gives way to its own new image; the authors take the highest score of all of them.

    Without a limit and with uniform random numbers as scores it is NOTE's prediction-balanced reservoir (PBRS): the
    images of a class are a uniform sample of all that were predicted to be of that class, and the classes that have
    more of them than they keep differ by one image at most. The authors draw places to replace, one image after
    another.

    Args:
        net: The network, in ``configure``: with images, or with the state that follows.
        size: Number N of images.
        score: Makes scores, (M,), of values and ages, (M,) each; ages are counted from 0 for the image that has just
            arrived. Images whose score is not finite are not kept.
        limit: Most images of a class; no limit by default.

    Raises:
        ValueError: If neither images nor a state tell the size of an image.
    """

    def __init__(
        self, net: AdaptiveNetwork, size: int, score: Callable[[Tensor, Tensor], Tensor], limit: int | None = None
    ) -> None:
        images = net.saved.get("method.memory.images") if net.images is None else net.images
        if not isinstance(images, Tensor) or images.ndim < 2:
            raise InputError("there are no images in the memory of the state")
        self.size, self.score, self.limit = size, score, size if limit is None else limit
        #: The images, those that there are in front: (N, 3, H, W).
        self.images = torch.zeros(size, *images.shape[1:], dtype=images.dtype, device=net.device)
        precision = torch.promote_types(images.dtype, torch.float32)
        #: Class, value and age of each image, (N, 3), 0 where there is none. Numbers of one type, so that a batch is
        #: undone with few operations.
        self.entries = torch.zeros(size, 3, dtype=precision, device=net.device)
        #: Number of images since the memory was last due.
        self.pending = torch.zeros((), dtype=precision, device=net.device)

    def state(self) -> dict[str, Tensor]:
        """Return images, entries and count by name, as part of a method's state."""
        return {"memory.images": self.images, "memory.entries": self.entries, "memory.pending": self.pending}

    @property
    def ages(self) -> Tensor:
        """Ages of the images, (N,), at least 1; 0 where there is none."""
        return self.entries[:, 2]

    def count(self) -> Tensor:
        """Return the number of images that there are, a scalar."""
        return (self.ages > 0).sum()

    def fill(self, net: AdaptiveNetwork, images: Tensor, classes: Tensor, values: Tensor) -> Iterator[Tensor]:
        """Insert images, and give those in the memory each time that it is due.

        How many images the memory is short of an update is read with the first checks of the batch; until it is full,
        the number of its images is read once for each update.

        Args:
            net: The network.
            images: (B, 3, H, W).
            classes: Predicted classes, (B,).
            values: (B,).

        Yields:
            (K, 3, H, W), K at most N, as a view that changes with the next ones. ``ages`` begins with theirs.
        """
        if images.shape[1:] != self.images.shape[1:]:
            raise InputError(
                f"the memory holds images of shape {tuple(self.images.shape[1:])} and got {tuple(images.shape[1:])}: "
                "scale all images of the stream to one size, or wrap the network for each size"
            )
        pending, count = map(int, net.guard.read([self.pending, self.count()]))
        begin, missing = 0, self.size - pending % self.size
        while begin < len(images):
            part = slice(begin, begin + missing)
            self.insert(images[part], classes[part], values[part])
            missing -= min(missing, len(images) - begin)
            begin = part.stop
            self.pending.fill_((self.size - missing) % self.size)
            if missing == 0:
                missing, count = self.size, self.size if count == self.size else int(self.count())
                yield self.images[:count]

    @torch.no_grad()
    def insert(self, images: Tensor, classes: Tensor, values: Tensor) -> None:
        """Insert images, in the order of their arrival. No host synchronisation; see ``fill`` for the arguments."""
        entries, count = self.entries, len(images)
        ages = torch.where(self.ages > 0, self.ages + count, 0)
        new = torch.arange(count, 0, -1, dtype=entries.dtype, device=entries.device)
        classes = torch.cat([entries[:, 0], classes.to(entries.dtype)])
        values = torch.cat([entries[:, 1], values.to(entries.dtype)])
        ages = torch.cat([ages, new])
        scores = torch.where(ages > 0, self.score(values, ages - 1), torch.inf)
        keep, kept = select_balanced(classes, scores, self.size, self.limit)
        chosen = torch.stack([classes, values, ages], 1).index_select(0, keep)
        entries.copy_(torch.where(kept[:, None], chosen, 0))
        self.images.copy_(torch.cat([self.images, images.to(self.images.dtype)]).index_select(0, keep))


def select_balanced(classes: Tensor, scores: Tensor, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Choose the images that a balanced memory keeps: the first by rank within their class, and then by score.

    The rank of an image is the number of images of its class with lower scores; of equal scores the first one is
    lower. So the largest classes lose their highest scores first. If scores stay what they are, images that were left
    out once would never be chosen later: to insert a stream in parts gives what to insert it at once gives.

    Args:
        classes: (M,).
        scores: (M,). What is not finite is not chosen.
        size: Most images, at most M.
        limit: Most images of a class.

    Returns:
        Places of the chosen, int64 (``size``,), and which of them are chosen, boolean (``size``,): where there are
        fewer, other places follow.
    """
    scores, order = torch.where(scores.isfinite(), scores, torch.inf).sort(stable=True)
    classes = classes[order]
    ranks = (classes[:, None] == classes).tril(-1).sum(1)
    ranks = torch.where(scores.isfinite() & (ranks < limit), ranks, len(ranks))
    ranks, places = ranks.sort(stable=True)
    return order[places[:size]], ranks[:size] < len(ranks)


def check_call(net: AdaptiveNetwork, method: str) -> None:
    """Check that the network is called with images and no other tensors, which a memory would not have of its images.

    Args:
        net: The network.
        method: Name of the method.

    Raises:
        TypeError: If there are others.
    """
    tensors: list[Tensor] = []
    map_tensors(() if net.call is None else (net.call.args, net.call.kwargs), tensors.append)
    if tensors:
        raise InputTypeError(
            f"{method} passes images of earlier calls again, and has none of the other tensors of these calls: pass "
            "images alone, or use a method without a memory"
        )
