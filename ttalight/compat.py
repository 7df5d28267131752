"""Import torchvision even where its compiled part does not fit the installed torch.

A CPU build of torch beside a CUDA build of torchvision is a common pair: ``import torchvision`` then dies with
``RuntimeError: operator torchvision::nms does not exist``, and so does everything that imports it (torchmetrics,
lightning, timm). Nothing in this package calls those operators, so declaring their schema is enough.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys

import torch

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_ATTEMPTS = 4
_library: torch.library.Library | None = None  # the declarations live as long as this object


def import_torchvision() -> None:
    """Import torchvision, declaring operators that its compiled part failed to bring.

    A healthy pair of torch and torchvision is left untouched.

    Raises:
        RuntimeError: If torchvision fails for any other reason, or still fails after a few declarations.
    """
    global _library
    for attempt in range(_ATTEMPTS):
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = _MISSING.fullmatch(str(error))
            if missing is None or attempt == _ATTEMPTS - 1:
                raise
            if _library is None:
                _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            schema = f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _library.define(schema)  # type: ignore[no-untyped-call]
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            if attempt:
                logging.getLogger(__name__).debug(
                    "torchvision's compiled part does not load beside torch %s; its operators are declared but empty",
                    torch.__version__,
                )
            return
