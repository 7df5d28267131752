"""Figure 2."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttalight.analysis import Features, davies_bouldin, feature_panels, tsne, tsne_figure
from ttalight.analysis import tsne as module_function
from ttalight.reporting.figures import save_figure


def features(seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 4
    centres = 6 * torch.randn(4, 8, generator=generator)
    values = {
        (place, steps): centres[labels] + torch.randn(40, 8, generator=generator)
        for place in ("encoder", "projector")
        for steps in (0, 20)
    }
    return Features(labels, values)


MODELS = {name: {"clean": features(seed), "impulse_noise": features(seed + 1)} for name, seed in (("Y", 0), ("CTA", 5))}


def test_layout_is_that_of_the_paper():
    rows = feature_panels(MODELS)
    assert [panel.title for panel in rows[2]] == [
        f"{model} {place}\nimpulse_noise, 20 steps" for model in ("Y", "CTA") for place in ("encoder", "projector")
    ]
    assert rows[0][1].features is MODELS["Y"]["clean"].values["projector", 0]
    assert rows[1][2].features is MODELS["CTA"]["impulse_noise"].values["encoder", 0]


def test_a_domain_that_was_not_kept():
    with pytest.raises(ValueError, match="features of Y lack fog, there are clean, impulse_noise"):
        feature_panels(MODELS, target="fog")


def test_neighbours_stay_neighbours():
    pytest.importorskip("sklearn", reason="t-SNE needs the analysis extra")
    own = MODELS["Y"]["clean"]
    places = tsne(own.values["encoder", 0], perplexity=5)
    assert places.shape == (40, 2)
    assert (places.min(), places.max()) == (0.0, 1.0)
    assert np.array_equal(places, tsne(own.values["encoder", 0], perplexity=5))
    assert davies_bouldin(torch.from_numpy(places), own.labels) < 1


def test_figure_shows_the_index_of_features(tmp_path):
    pytest.importorskip("sklearn", reason="t-SNE needs the analysis extra")
    pytest.importorskip("matplotlib", reason="figures need the plots extra")
    rows = [row[:1] for row in feature_panels({"Y": MODELS["Y"]})]
    figure = tsne_figure(rows, images=24, perplexity=5)
    own = rows[1][0]
    assert figure.axes[1].get_title().endswith(f"DBI {davies_bouldin(own.features, own.labels):.2f}")
    assert len(figure.axes[1].collections[0].get_offsets()) == 24
    save_figure(figure, tmp_path, "figure2")
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "figure2.svg").read_bytes()
    assert b"<svg" in first


def test_says_what_to_install(monkeypatch):
    import sys

    module = sys.modules[module_function.__module__]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs scikit-learn.*pip install 'ttalight\[analysis\]'"):
        tsne(torch.randn(40, 3))


def test_perplexity_must_fit():
    pytest.importorskip("sklearn", reason="t-SNE needs the analysis extra")
    with pytest.raises(ValueError, match=r"got 30\.0 for 20: collect more images or lower it"):
        tsne(torch.randn(20, 3))
