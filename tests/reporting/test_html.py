"""The page, and the plots in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ttalight.reporting.compare import compare
from ttalight.reporting.svg import Point, Series, bar_plot, line_plot, nice_ticks, scatter_plot

VOID = {"meta", "br", "wbr"}


class Balanced(HTMLParser):
    """Every tag that is opened is closed, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def curve(*accuracies, images=50):
    seen = [images * (index + 1) for index in range(len(accuracies))]
    running = [sum(accuracies[: index + 1]) / (index + 1) for index in range(len(accuracies))]
    return {"images": seen, "accuracy": list(accuracies), "running": running}


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def page(runs, tmp_path, **kwargs) -> str:
    compare(runs, output=str(tmp_path / "out"), **kwargs)
    return Path(tmp_path / "out" / "table.html").read_text(encoding="utf-8")


class TestPage:
    def test_stands_alone(self, make_run, tmp_path):
        runs = [
            make_run("tent", "Tent", (0.5, 0.7), extra={"curve": curve(0.4, 0.5, 0.7, 0.7)}),
            make_run("source", "Source", (0.2, 0.3), extra={"curve": curve(0.2, 0.2, 0.3, 0.3)}),
        ]
        text = page(runs, tmp_path, baseline="Source")
        parser = Balanced()
        parser.feed(text)
        assert parser.open == []
        assert not re.search(r"https?://|url\(|@import", text)
        assert text.count("<svg ") == 3
        assert "<h1>Accuracy of 2 methods on stream PerDomain, severity 5</h1>" in text
        assert "<title>Accuracy of 2 methods on stream PerDomain, severity 5: ttalight compare</title>" in text
        assert "<b>70.00</b>" in text
        assert "no interval for Tent" in text

    def test_names_are_text(self, make_run, make_domain, tmp_path):
        rows = [make_domain("<script>", 0.5), make_domain("a&b", 0.6)]
        text = page([make_run("tent", "Tent<b>", domains=rows)], tmp_path)
        assert "<script>" not in text
        assert "&lt;script&gt;" in text
        assert "a&amp;b" in text
        assert "Tent&lt;b&gt;" in text

    def test_panels_compare_with_the_baseline(self, make_run, tmp_path):
        shares = {"Tent": (0.5, 0.7), "Source": (0.2, 0.3), "EATA": (0.6, 0.6)}
        runs = [make_run(name, name, own, extra={"curve": curve(*own)}) for name, own in shares.items()]
        text = page(runs, tmp_path, baseline="Source")
        stream = text[text.index("Accuracy along the stream") : text.index("Accuracy by domain")]
        titles = [re.findall(r"<title>(\w+)</title></polyline>", svg) for svg in stream.split("</svg>")[:-1]]
        assert titles == [["Source", "Tent"], ["Source", "EATA"]]
        assert len(re.findall("<polyline", text)) == 4

    def test_columns_are_explained_and_pinned(self, make_run, make_domain, tmp_path):
        rows = [make_domain("gaussian_noise", 0.5), make_domain("fog", 0.6)]
        runs = [make_run(name, name, domains=rows) for name in ("Tent", "Source")]
        text = page(runs, tmp_path, baseline="Source")
        assert '<th title="gaussian_noise, severity 5">Gauss.</th>' in text
        assert '<th title="gain: mean minus the mean of Source">over Source</th>' in text
        assert '<table class="pinned three"' in text
        assert '<table class="pinned"' in page(runs, tmp_path)

    def test_files_without_a_curve_have_no_plot_of_one(self, make_run, tmp_path):
        text = page([make_run("tent")], tmp_path)
        assert "Accuracy along the stream" not in text
        assert "Accuracy by domain" in text

    def test_values_that_are_not_there(self, make_run, make_domain, tmp_path):
        broken = [make_domain("noise", 0.5), {**make_domain("blur", 0.7), "accuracy": None, "nll": None}]
        for metric in ("accuracy", "nll"):
            text = page([make_run("tent", domains=broken)], tmp_path, metric=metric)
            Balanced().feed(text)
        (bars,) = re.findall(r'<svg role="img" aria-label="nll in nats by domain".*?</svg>', text)
        assert len(parse(bars).findall("rect")) == 1

    def test_a_run_that_lost_everything(self, make_run, make_domain, tmp_path):
        rows = [{**make_domain("noise", 0.5), "accuracy": None}]
        text = page([make_run("tent", domains=rows)], tmp_path)
        assert "<svg" not in text

    def test_long_curves_are_joined_without_losing_images(self, make_run, tmp_path):
        values = [0.2] * 100 + [0.8] * 100
        text = page([make_run("tent", extra={"curve": curve(*values, images=1)})], tmp_path)
        (plot,) = re.findall(r'<svg role="img" aria-label="accuracy in % against images".*?</svg>', text)
        (line,) = parse(plot).findall("polyline")
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert 30 <= len(points) <= 60
        heights = sorted({y for _, y in points})
        assert len(heights) == 2  # 20 % and 80 %, nothing in between but at most one joined stretch
        assert points[-1][0] == max(x for x, _ in points)

    def test_seeds_share_a_line(self, make_run, tmp_path):
        runs = [make_run(f"tent{seed}", seed=seed, extra={"curve": curve(0.2 + 0.2 * seed, 0.6)}) for seed in range(2)]
        text = page(runs, tmp_path).partition("</svg>")[0]
        assert len(re.findall("<polyline", text)) == 1
        (line,) = re.findall(r'<polyline points="([^"]*)"', text)
        first, second = (float(point.split(",")[1]) for point in line.split())
        ticks = {float(t): float(y) for y, t in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)</text>', text)}
        assert first == pytest.approx(ticks[30] - 4, abs=0.2)  # (20 + 40) / 2
        assert second == pytest.approx(ticks[60] - 4, abs=0.2)

    def test_too_many_domains_are_left_to_the_csv(self, make_run, make_domain, tmp_path):
        rows = [make_domain(f"d{index}", 0.5) for index in range(60)]
        text = page([make_run("tent", domains=rows, samples=6000)], tmp_path)
        assert "60 domains, too many to be shown: table.csv (--output) has them" in text
        assert "d59" not in text
        assert "d59" in (tmp_path / "out" / "table.csv").read_text()


class TestPlots:
    @pytest.mark.parametrize(
        ("low", "high"), [(0, 1), (0, 100), (61.2, 63.9), (0, 0.03), (5, 5), (0, 0), (-3, 7), (0, 7_500_000)]
    )
    def test_ticks_are_round_and_hold_the_values(self, low, high):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 9
        steps = {round(b - a, 9) for a, b in pairwise(ticks)}
        assert len(steps) == 1
        assert f"{steps.pop():e}"[:3] in ("1.0", "2.0", "2.5", "5.0")

    def test_lines_are_interrupted_where_there_is_no_value(self):
        svg = parse(line_plot([Series("a", [1, 2, 3, 4], [10.0, 20.0, None, 30.0])], "images", "accuracy"))
        assert len(svg.findall("polyline")) == 2
        first = [tuple(map(float, point.split(","))) for point in svg.find("polyline").get("points").split()]
        assert first[1][0] > first[0][0]
        assert first[1][1] < first[0][1]  # more is higher up

    def test_length_of_a_bar_is_its_value(self):
        bars = Series("a", (), [50.0, 100.0, None], [5.0, None, None])
        svg = parse(bar_plot(bars, ["x", "y", "z"], "accuracy", [100.0, None, 50.0]))
        first, second = svg.findall("rect")
        half, whole = float(first.get("width")), float(second.get("width"))
        assert half == pytest.approx(whole / 2, abs=0.2)
        assert [bar.find("title").text for bar in (first, second)] == ["x, a: 50.00 ± 5.00", "y, a: 100.00"]
        assert {"50.0", "100.0"} <= {text.text for text in svg.findall("text")}
        assert len([line for line in svg.findall("line") if line.get("class") == "whisker"]) == 1
        left = float(first.get("x"))
        marks = [float(line.get("x1")) - left for line in svg.findall("line") if line.get("class") == "reference"]
        assert marks == pytest.approx([whole, half], abs=0.2)

    def test_plots_share_an_axis(self):
        small = parse(bar_plot(Series("a", (), [10.0]), ["x"], "accuracy", values=[100.0]))
        large = parse(bar_plot(Series("b", (), [100.0]), ["x"], "accuracy", values=[100.0]))
        lengths = [float(svg.find("rect").get("width")) for svg in (small, large)]
        assert lengths[0] == pytest.approx(lengths[1] / 10, abs=0.2)

    def test_speed_is_logarithmic(self):
        points = [Point("slow", 10, 50, 0), Point("fast", 1000, 60, 1), Point("middle", 100, 55, 2)]
        svg = parse(scatter_plot(points, "images/s", "accuracy"))
        slow, fast, middle = (float(circle.get("cx")) for circle in svg.findall("circle"))
        assert middle == pytest.approx((slow + fast) / 2, abs=0.2)
        assert {"10", "100", "1,000", "slow", "fast", "middle"} <= {text.text for text in svg.findall("text")}

    def test_labels_of_equal_points_stand_apart(self):
        points = [Point(f"method {index}", 100, 50, index) for index in range(40)]
        svg = parse(scatter_plot(points, "images/s", "accuracy"))
        heights = sorted(float(text.get("y")) for text in svg.findall("text") if text.text.startswith("method"))
        assert len(heights) == 40
        assert min(right - left for left, right in pairwise(heights)) >= 14.9
        assert 0 < heights[0] < heights[-1] < float(svg.get("height"))
