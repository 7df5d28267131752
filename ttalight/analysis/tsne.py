"""Features in two dimensions by t-SNE; needs scikit-learn and matplotlib, which the ``analysis`` extra brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ttalight.analysis.clusters import davies_bouldin
from ttalight.analysis.features import Features, stratified
from ttalight.errors import InputError, MissingPackageError
from ttalight.reporting.figures import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Panel", "can_embed", "feature_panels", "tsne", "tsne_figure"]


@dataclass(frozen=True)
class Panel:
    """One set of features to show.

    Args:
        title: What they are.
        features: (N, D).
        labels: Classes, (N,).
    """

    title: str
    features: Tensor
    labels: Tensor


def can_embed() -> bool:
    """Return whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


def tsne(features: Tensor, perplexity: float = 30.0, seed: int = 0) -> npt.NDArray[np.float64]:
    """Return the places of features in the plane, (N, 2), each axis scaled to [0, 1].

    L. van der Maaten and G. Hinton, *Visualizing Data using t-SNE*, JMLR 2008, as scikit-learn has it: Barnes-Hut, from
    principal components. Seconds for 2,000 images, minutes for 10,000.

    Args:
        features: (N, D).
        perplexity: Effective number of neighbours, below N.
        seed: Seed of the optimisation.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are too few features for the perplexity.
    """
    if not can_embed():
        raise MissingPackageError("t-SNE needs scikit-learn, which is not installed: pip install 'ttalight[analysis]'")
    if not 0 < perplexity < len(features):
        raise InputError(
            f"perplexity must be above 0 and below the number of features, got {perplexity} for {len(features)}: "
            "collect more images or lower it"
        )
    from sklearn.manifold import TSNE

    method = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    places: npt.NDArray[np.float64] = method.fit_transform(features.double().numpy()).astype(np.float64)
    low, high = places.min(axis=0), places.max(axis=0)
    scaled: npt.NDArray[np.float64] = (places - low) / np.where(high > low, high - low, 1.0)
    return scaled


def feature_panels(
    models: Mapping[str, Mapping[str, Features]], source: str = "clean", target: str = "impulse_noise"
) -> list[list[Panel]]:
    """Lay out Figure 2 of CTA's paper: a row for the source, the target without and with adaptation.

    S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*, arXiv 2507.05221. A column for each
    model and place.

    Args:
        models: Name of a model -> domain -> features, as ``read_features`` returns them.
        source: Domain without corruption.
        target: Domain with it.

    Returns:
        Three rows of panels.

    Raises:
        ValueError: If a model lacks one of the domains.
    """
    rows: list[list[Panel]] = [[], [], []]
    for model, domains in models.items():
        missing = [name for name in (source, target) if name not in domains]
        if missing:
            raise InputError(
                f"the features of {model} lack {', '.join(missing)}, there are {', '.join(domains) or 'none'}: name "
                "the domains by the FeatureCollector's keep"
            )
        values = domains[target].values
        for place in dict.fromkeys(place for place, _ in values):
            last = max(steps for other, steps in values if other == place)
            shown = ((source, 0), (target, 0), (target, last))
            for row, (domain, steps) in zip(rows, shown, strict=True):
                own = domains[domain]
                title = f"{model} {place}\n{domain}, {steps} steps"
                row.append(Panel(title, own.values[place, steps], own.labels))
    return rows


def tsne_figure(
    panels: Sequence[Sequence[Panel]], images: int = 2000, perplexity: float = 30.0, seed: int = 0
) -> Figure:
    """Return a grid of t-SNE panels, coloured by true label, with the Davies-Bouldin index of the features themselves.

    Args:
        panels: Rows of panels.
        images: Most images of a panel, the same number of each class as far as there are so many.
        perplexity: See ``tsne``.
        seed: Seed of the choice of images and of t-SNE.

    Raises:
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = max(len(row) for row in panels)
    figure = Figure(figsize=(2.8 * columns, 3.1 * len(panels)), layout="constrained")
    grid: Any = figure.subplots(len(panels), columns, squeeze=False)
    for line, row in zip(grid, panels, strict=True):
        for axes, panel in zip(line, row, strict=False):
            chosen = stratified(panel.labels, images, seed)
            places = tsne(panel.features[chosen], perplexity, seed)
            axes.scatter(*places.T, c=panel.labels[chosen].numpy() % 20, cmap="tab20", vmin=0, vmax=19, s=4, alpha=0.5)
            axes.set_title(f"{panel.title}\nDBI {davies_bouldin(panel.features, panel.labels):.2f}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in line[len(row) :]:
            axes.set_visible(False)
    return figure
