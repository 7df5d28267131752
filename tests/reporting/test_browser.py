"""The page of ``compare`` in a real browser: at the width of a laptop and of a phone."""

from __future__ import annotations

import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ttalight.reporting import summarize
from ttalight.reporting.compare import compare

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1400,1000",
]  # fmt: skip
WIDTHS = (1280, 390)
DOMAINS = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog "
    "brightness contrast elastic_transform pixelate jpeg_compression"
).split()

#: Looks at each frame: what is wider than it, which texts of a figure overlap or are cut off, which cells stay in view.
SCRIPT = """
const near = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
const frames = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, width = frame.clientWidth, overlaps = [], cut = [];
  const figures = [...page.querySelectorAll("svg")];
  for (const svg of figures) {
    const outer = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    for (const [text, box] of texts)
      if (box.left < outer.left - 1 || box.right > outer.right + 1 || box.top < outer.top - 1) cut.push(text);
    texts.forEach(([text, box], index) => {
      for (const [other, place] of texts.slice(index + 1)) if (near(box, place)) overlaps.push([text, other]);
    });
  }
  const wide = page.querySelector(".wide"), row = wide.querySelector("tbody tr:last-child");
  wide.scrollLeft = 1e6;
  const pinned = [...row.cells].slice(0, 3).map(cell => cell.getBoundingClientRect());
  return {
    width, page: page.documentElement.scrollWidth, figures: figures.length, overlaps, cut,
    widest: Math.max(...figures.map(svg => svg.getBoundingClientRect().right)),
    letters: Math.min(...[...page.querySelectorAll("svg text, td")].map(text => text.getBoundingClientRect().height)),
    pinned: pinned.map(box => [box.left, box.right]), scrolled: wide.scrollLeft,
  };
});
const found = document.createElement("pre");
found.id = "found";
found.textContent = JSON.stringify(frames);
document.body.append(found);
"""


@pytest.fixture
def page(make_run, make_domain, tmp_path) -> str:
    """A comparison with all figures: close methods, a long label, orders of the stream, readings."""
    runs = []
    methods = {"Source": 0.0, "PTBN": 0.2, "Tent": 0.201, "EATA": 0.2, "TestTimeTraining": 0.21, "T3A": 0.04}
    for (method, gain), order in itertools.product(methods.items(), range(2)):
        accuracies = [0.4 + gain + index / 40 + order / 100 for index in range(15)]
        rows = [make_domain(name, value) for name, value in zip(DOMAINS, accuracies, strict=True)]
        rows = [{**row, "start": 100 * index} for index, row in enumerate(rows)]
        images = [100 * (index + 1) for index in range(15)]
        running = [sum(accuracies[: index + 1]) / (index + 1) for index in range(15)]
        extra = {"curve": {"images": images, "accuracy": accuracies, "running": running}}
        if gain > 0.2:
            extra["readings"] = [{"steps": step, "domains": rows, "mean": summarize(rows)[0]} for step in (0, 1, 5)]
        lr = 0.1 if method == "Tent" else 0.001
        settings = {"seed": order, "samples": 1500, "steps": 10, "lr": lr}
        runs.append(make_run(f"{method}-{order}", method, domains=rows, extra=extra, **settings))
    runs.append(make_run("a_run_with_a_very_long_name/of-another-one", "Tent", domains=rows, samples=1500, steps=3))
    compare(runs, baseline="Source", output=str(tmp_path))
    return (tmp_path / "table.html").read_text(encoding="utf-8")


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_fits_a_laptop_and_a_phone(page, tmp_path):
    frames = "".join(
        f'<iframe srcdoc="{html.escape(page)}" style="border: 0; width: {width}px; height: 800px"></iframe>'
        for width in WIDTHS
    )
    file = Path(tmp_path, "frames.html")
    file.write_text(f"<meta charset='utf-8'>{frames}<script>addEventListener('load', () => {{{SCRIPT}}})</script>")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(BROWSER), *QUIET, profile, "--virtual-time-budget=10000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-1000:]
    laptop, phone = json.loads(html.unescape(found[1]))
    for frame, width in ((laptop, 1280), (phone, 390)):
        assert frame["width"] == width
        assert frame["figures"] == 14
        assert frame["page"] <= width
        assert frame["widest"] <= width
        assert frame["overlaps"] == []
        assert frame["cut"] == []
        assert frame["letters"] >= 10
        label, mean, gain = frame["pinned"]
        assert 0 <= label[0] < label[1] <= mean[0] + 1
        assert mean[1] <= gain[0] + 1
        assert gain[1] < 0.75 * width
    assert phone["scrolled"] > 0
