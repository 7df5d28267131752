"""Effects of adaptation on features: class separation, distance to the source, pictures."""

from ttalight.analysis.clusters import MedianDistance, class_medians, davies_bouldin, median_distance
from ttalight.analysis.collector import FeatureCollector
from ttalight.analysis.features import (
    Features,
    embed,
    read_features,
    source_medians,
    stratified,
    write_features,
)
from ttalight.analysis.geometry import (
    Distance,
    GeometryRow,
    MeanGeometry,
    geometry,
    mean_geometry,
    read_geometry,
    write_geometry,
)
from ttalight.analysis.tsne import Panel, can_embed, feature_panels, tsne, tsne_figure

__all__ = [
    "davies_bouldin",
    "class_medians",
    "median_distance",
    "MedianDistance",
    "Features",
    "embed",
    "source_medians",
    "stratified",
    "read_features",
    "write_features",
    "GeometryRow",
    "MeanGeometry",
    "Distance",
    "geometry",
    "mean_geometry",
    "read_geometry",
    "write_geometry",
    "FeatureCollector",
    "Panel",
    "can_embed",
    "feature_panels",
    "tsne",
    "tsne_figure",
]
