"""Conclusions from the doctor's measurements, in words.

The limits and how they were chosen are on docs/results/doctor.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ttalight.doctor.criteria import agreement, mean_entropy, prediction_diversity, stream_correlation
from ttalight.doctor.examination import Examination

__all__ = ["Advice", "Findings", "advise", "conclude", "judge", "summarize"]

#: Median distance of the batch's statistics from the running ones, in nats, from which on there is a shift.
SHIFTED = 0.05
#: Least increase of the predictions' information where the batch's statistics repair a shift.
INFORMATION = 0.01
#: Least share of predictions that a quarter of the batch keeps, for a batch that is large enough.
STABLE = 0.75
#: Correlation of batch and predicted class, see ``stream_correlation``, from which on classes come together.
CORRELATED = 0.1
#: Diversity of the source's predictions below which they are nearly all of few classes.
COLLAPSED = 0.5
#: Diversity of the predictions below which classes are out of balance.
BALANCED = 0.9

Verdict = Literal["no batch statistics", "no shift", "repaired", "not repaired"]


@dataclass
class Findings:
    """Measurements without labels.

    Args:
        images: Number of images.
        batch_size: Size of the batches.
        classes: Number of classes.
        norms: Number of normalisation layers by kind.
        entropy: Mean entropy over ln C by statistics: ``source``, ``batch``, ``prior`` and ``quarter``.
        diversity: Diversity of the predictions, by statistics.
        agreement: Share of predictions that are the source's, by statistics.
        stability: Share of predictions that a quarter of the batch keeps; None where it was not measured.
        correlation: How much the batch says about the predicted class, see ``stream_correlation``.
        distances: Distance from the running statistics by layer, in nats.
    """

    images: int
    batch_size: int
    classes: int
    norms: dict[str, int] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    diversity: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    stability: float | None = None
    correlation: float = 0.0
    distances: dict[str, float] = field(default_factory=dict)

    @property
    def distance(self) -> float:
        """Median distance over the layers, 0 without any."""
        return statistics.median(self.distances.values()) if self.distances else 0.0

    @property
    def information(self) -> dict[str, float]:
        """Diversity of the predictions minus their mean entropy, by statistics: how sure and how varied they are.

        An estimate of the mutual information of images and classes as a share of ln C (A. Krause, P. Perona and
        R. Gomes, "Discriminative Clustering by Regularized Information Maximization", NeurIPS 2010), with the shares of
        predicted classes in the place of the mean prediction.
        """
        return {name: self.diversity[name] - entropy for name, entropy in self.entropy.items()}


@dataclass(frozen=True)
class Advice:
    """Whether a group of methods is safe here, and why.

    Args:
        methods: Their names.
        safe: Whether they are.
        reason: One sentence.
    """

    methods: str
    safe: bool
    reason: str


def summarize(examination: Examination) -> Findings:
    """Return what an examination has measured, once its run is over."""
    sizes = [len(part) for part in examination.logits["source"]]
    logits = {name: torch.cat(parts) for name, parts in examination.logits.items() if parts}
    predictions = {name: value.argmax(dim=1) for name, value in logits.items()}
    source, classes = predictions["source"], logits["source"].shape[1]
    whole = {name: value for name, value in logits.items() if len(value) == len(source)}
    means = {name: float(torch.stack(values).mean()) for name, values in examination.distances.items()}
    stable = "quarter" in whole and "batch" in whole
    return Findings(
        images=len(source),
        batch_size=max(sizes),
        classes=classes,
        norms=examination.norms,
        entropy={name: mean_entropy(value) for name, value in whole.items()},
        diversity={name: prediction_diversity(predictions[name], classes) for name in whole},
        agreement={name: agreement(predictions[name], source) for name in whole},
        stability=agreement(predictions["batch"], predictions["quarter"]) if stable else None,
        correlation=stream_correlation(source, sizes, classes),
        distances=means,
    )


def judge(findings: Findings) -> Verdict:
    """Return whether statistics repair the shift, by the limits of this module."""
    if "batch" not in findings.entropy:
        return "no batch statistics"
    information = findings.information
    if information["batch"] - information["source"] >= INFORMATION:
        return "repaired"
    return "no shift" if findings.distance < SHIFTED else "not repaired"


def conclude(findings: Findings) -> list[str]:
    """Return the conclusions: on statistics, on the batch size, on the order and the balance of classes."""
    kinds = " and ".join(f"{count} {kind}" for kind, count in findings.norms.items()) or "no normalisation layer"
    information = {name: f"{value:.3f}" for name, value in findings.information.items()}
    change = f"information {information.get('source')} with the source's statistics, {information.get('batch')} with "
    distance = f"distance of {findings.distance:.3f} nats (median over layers; a shift begins at {SHIFTED})"
    sentences: dict[Verdict, str] = {
        "no batch statistics": f"Statistics cannot repair a shift here: the network has {kinds}, and no BatchNorm.",
        "no shift": "The running statistics still fit these images, and statistics of the batch would rather cost "
        f"accuracy: {distance}, {change}the batch's (it would have to rise by {INFORMATION}).",
        "repaired": "This shift is one that statistics repair. The predictions become surer or more varied: "
        f"{change}the batch's (limit: a rise of {INFORMATION}), {distance}.",
        "not repaired": f"There is a shift, and statistics do not repair it: {distance}, but {change}the batch's "
        f"(limit: a rise of {INFORMATION}).",
    }
    found = [sentences[judge(findings)]]
    if findings.stability is not None:
        enough = "is large enough" if findings.stability >= STABLE else "is too small"
        found.append(
            f"The batch of {findings.batch_size} images {enough} for its own statistics: a quarter of it keeps "
            f"{findings.stability:.0%} of the predictions (limit: {STABLE:.0%})."
        )
    correlated = findings.correlation >= CORRELATED
    found.append(
        f"Classes {'come together' if correlated else 'are mixed'} in this order of the images: the batch explains "
        f"{findings.correlation:.0%} of the predicted class (limit: {CORRELATED:.0%})."
        + (" The distance of the statistics is then partly due to the classes." if correlated else "")
    )
    source = findings.diversity.get("source", 1.0)
    if judge(findings) == "repaired" and source < COLLAPSED:
        found.append(
            f"With the source's statistics nearly all predictions are of few classes (diversity {source:.2f}). Where "
            "the images are of few classes indeed, statistics of the batch are wrong for them."
        )
    lowest = _best_diversity(findings)
    if lowest < BALANCED:
        found.append(
            f"The predicted classes are out of balance: their diversity is {lowest:.2f} (limit: {BALANCED}). Either "
            "the images are of few classes, or the network has collapsed to few."
        )
    return found


def _best_diversity(findings: Findings) -> float:
    return max(findings.diversity.values())


def advise(findings: Findings) -> list[Advice]:
    """Return which methods are safe on this network and this stream."""
    verdict = judge(findings)
    mixed = findings.correlation < CORRELATED and _best_diversity(findings) >= BALANCED
    large = findings.stability is not None and findings.stability >= STABLE
    if verdict == "no batch statistics":
        return _without_batch_norm(findings, mixed)
    statistics_safe = verdict == "repaired" and large and mixed
    reasons: Sequence[tuple[bool, str]] = (
        (verdict == "repaired", "the statistics of the batch do not help here"),
        (large, "the batch is too small for statistics of its own"),
        (mixed, "the statistics of a batch of few classes reflect these more than the shift"),
    )
    why = next((reason for holds, reason in reasons if not holds), "one domain, mixed classes, a batch that is enough")
    soft = verdict == "repaired" and not statistics_safe
    return [
        Advice("Source", True, "it is the network as it is, and the row to compare with"),
        Advice("PTBN", statistics_safe, why),
        Advice("Tent, ETA, EATA, ROID, NCTTA (BatchNorm)", statistics_safe, f"they start from PTBN: {why}"),
        Advice(
            "AlphaBN",
            statistics_safe or (soft and mixed),
            "it mixes the source's statistics in, more for a small batch",
        ),
        Advice(
            "FIND, EMABN",
            statistics_safe or soft,
            "they keep a part of the source's statistics, which helps where classes come together",
        ),
        Advice("T3A", True, "it changes the classifier only"),
        Advice("LAME with kernel: knn", not mixed, "it corrects the labels of a batch, where classes come together"),
    ]


def _without_batch_norm(findings: Findings, mixed: bool) -> list[Advice]:
    learns = bool(set(findings.norms) & {"GroupNorm", "LayerNorm"})
    reason = (
        "they adapt the weights of GroupNorm and LayerNorm" if learns else "there is no normalisation layer to adapt"
    )
    if learns and not mixed:
        reason = "they learn from their own predictions, which here are of few classes at a time"
    return [
        Advice("Source", True, "it is the network as it is, and the row to compare with"),
        Advice("PTBN, AlphaBN, FIND, EMABN", False, "there is no BatchNorm layer whose statistics they could take"),
        Advice("SAR, DeYO, Tent, EATA", learns and mixed, reason),
        Advice("T3A", True, "it changes the classifier only"),
        Advice("LAME with kernel: knn", not mixed, "it corrects the labels of a batch, where classes come together"),
    ]
