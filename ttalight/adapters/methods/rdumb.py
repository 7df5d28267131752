"""RDumb: ETA that starts again from the source at regular intervals."""

from __future__ import annotations

from typing import Any, Literal

from ttalight.adapters.methods.eta import ETA

__all__ = ["RDumb"]


class RDumb(ETA):
    """ETA with a reset after every 1000 updates, whatever the stream does.

    The cost is ETA's: one forward and one backward a batch.

    Source: O. Press, S. Schneider, M. Kümmerer, M. Bethge, *RDumb: A simple approach that questions our progress in
    continual test-time adaptation*, NeurIPS 2023, arXiv 2306.05401. The authors count batches; here batches without an
    update, of which no sample counts, leave nothing to reset and are not counted. Their margin E0 is ln(1000) / 2 - 1,
    which is ``margin=0.355``; ETA's 0.4 is the default here. Their reset clears the running mean of predictions, as
    here.

    Args:
        reset: See ``Adapter``; 1000 updates by default.
        kwargs: See ``ETA``.
    """

    def __init__(self, reset: Literal["domain", "batch", "never"] | int = 1000, **kwargs: Any) -> None:
        super().__init__(reset=reset, **kwargs)
