"""Let torchvision be imported even where its compiled part does not fit the installed torch.

A CPU build of torch beside a CUDA build of torchvision is a common pair: ``import torchvision`` then dies with
``RuntimeError: operator torchvision::nms does not exist``, and so does everything that imports it (torchmetrics,
lightning, timm). Nothing in this package calls those operators, so declaring their schema is enough. That is done while
torchvision is imported, whoever imports it first: ``import ttalight`` imports neither torch nor torchvision.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["mend_torchvision"]

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_ATTEMPTS = 4
_library: Any = None  # the declarations live as long as this object


def mend_torchvision() -> None:
    """Have torchvision mended when it is first imported; a healthy pair of torch and torchvision is left untouched.

    An import that fails for any other reason, or still fails after a few declarations, raises what torchvision raised.
    """
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchvision as it is found without this class, and has its code run until no operator is missing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            loader: Any = spec.loader
            loader.exec_module = partial(_run, loader.exec_module)  # of this one import
        return spec


def _run(execute: Any, module: ModuleType) -> None:
    """Run the code of torchvision, declaring operators that its compiled part failed to bring."""
    for attempt in range(_ATTEMPTS):
        try:
            execute(module)
        except RuntimeError as error:
            missing = _MISSING.fullmatch(str(error))
            if missing is None or attempt == _ATTEMPTS - 1:
                raise
            _declare(missing[1])
            _drop_submodules(module)
        else:
            if attempt:
                logging.getLogger(__name__).debug(
                    "torchvision's compiled part does not load beside torch %s; its operators are declared but empty",
                    sys.modules["torch"].__version__,
                )
            return


def _declare(operator: str) -> None:
    global _library
    import torch

    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _drop_submodules(module: ModuleType) -> None:
    """Drop what an import that failed has imported, so that the next one runs all of it."""
    for name in [name for name in sys.modules if name.startswith(f"{module.__name__}.")]:
        del sys.modules[name]
        vars(module).pop(name.split(".")[1], None)
