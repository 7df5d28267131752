"""Names of the classes of public sets, and prompt templates, as CLIP's authors publish them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ttalight.errors import InputError, MissingPackageError

__all__ = ["class_names_of", "import_open_clip", "templates_of"]

_CLASS_NAMES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ),
    "digits": "0 1 2 3 4 5 6 7 8 9",
}
_KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_SIZES = ("small ", "big ")
_TEMPLATES = {
    "cifar": [
        template
        for word in ("a", "the")
        for template in (
            *(f"a {kind}photo of {word} {{}}." for kind in _KINDS),
            *(f"a photo of {word} {size}{{}}." for size in _SIZES),
        )
    ],
    "digits": ['a photo of the number: "{}".'],
}


def class_names_of(given: str | Sequence[str]) -> list[str]:
    """Return the names of classes, C strings.

    Args:
        given: The names; or ``cifar10``, ``cifar100``, ``digits`` or ``imagenet`` for those of a set in the order of
            its labels. ImageNet's are those that CLIP's authors chose, and come with open_clip.

    Raises:
        ValueError: If there is no such set, or the names are fewer than two, or one is no string or has no letter.
        ImportError: If open_clip is needed and not installed.
    """
    if isinstance(given, str):
        if given == "imagenet":
            return list(import_open_clip("class_names='imagenet'").IMAGENET_CLASSNAMES)
        if given not in _CLASS_NAMES:
            sets = ", ".join([*_CLASS_NAMES, "imagenet"])
            raise InputError(f"class_names must be a list of names, or one of {sets}, got {given!r}")
        return [name.replace("_", " ") for name in _CLASS_NAMES[given].split()]
    if not isinstance(given, (list, tuple)) or {*map(type, given)} != {str} or len(given) < 2:
        raise InputError(f"class_names must be a list of two or more strings, or the name of a set, got {given!r:.80}")
    if blank := [number for number, name in enumerate(given) if not name.strip()]:
        raise InputError(f"class_names: class {blank[0]} (counted from 0) has no name, got {given[blank[0]]!r}")
    if twice := [name for name, count in Counter(given).items() if count > 1]:
        warnings.warn(
            f"class_names has {twice[0]!r} more than once: the classes have equal text features, so the first of them "
            "is predicted for all. Give them names that differ",
            stacklevel=2,
        )
    return list(given)


def templates_of(given: str | Sequence[str]) -> list[str]:
    """Return prompt templates, with ``{}`` in the place of a class name.

    Args:
        given: The templates, or one of them; or ``cifar`` (18), ``imagenet`` (80, which come with open_clip) or
            ``digits`` (one) for those that CLIP's authors average over.

    Raises:
        ValueError: If there are none, or one has no place for a name.
        ImportError: If open_clip is needed and not installed.
    """
    if given == "imagenet":
        return [template("{}") for template in import_open_clip("templates='imagenet'").OPENAI_IMAGENET_TEMPLATES]
    if isinstance(given, str):
        given = _TEMPLATES.get(given, [given])
    if not isinstance(given, (list, tuple)) or not given or {*map(type, given)} != {str}:
        raise InputError(f"templates must be a list of one string or more, or the name of a list, got {given!r:.80}")
    if without := [template for template in given if "{}" not in template]:
        raise InputError(
            f"each template needs {{}} in the place of a name, got {without[0]!r}; lists are cifar, imagenet and digits"
        )
    return list(given)


def import_open_clip(reason: str) -> Any:
    """Return the package open_clip.

    Args:
        reason: The argument that needs it, for the message.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import open_clip
    except ImportError:
        raise MissingPackageError(
            f"{reason} needs open_clip, which is not installed: pip install 'ttalight[clip]'"
        ) from None
    return open_clip
