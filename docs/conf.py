"""Configuration of Sphinx: sphinx-build -W --keep-going -b html docs docs/_build"""

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.autosummary import autosummary_toc

import ttalight  # before autodoc imports lightning: it makes torchvision importable beside a CPU build of torch

project = "ttalight"
author = copyright = "The ttalight developers"
release = version = ttalight.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",  # formulas are shown without a network
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # a hook without a docstring of ours does not repeat Lightning's
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # fields of named tuples are documented by their class
python_maximum_signature_line_length = 88

# Pages of classes are made anew: one of a class that is gone would be in no table of contents.
shutil.rmtree(Path(__file__).parent / "api" / "generated", ignore_errors=True)

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = f"ttalight {release}"


def skip_field(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, whose own docstrings say nothing."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def escape_asterisks(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the asterisk of a shape such as (B, *) or of a path such as val/*.png from beginning an emphasis."""
    lines[:] = [re.sub(r"(, |/)\*(?=[).])", r"\1\\*", line) for line in lines]


def leave_out_of_sidebar(app: Sphinx, doctree: nodes.document) -> None:
    """Keep the pages of classes out of the table of contents, which every page shows."""
    for table in list(doctree.findall(autosummary_toc)):
        table.parent.remove(table)


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", leave_out_of_sidebar, priority=100)  # before tables of contents are collected
    app.connect("autodoc-skip-member", skip_field)
    app.connect("autodoc-process-docstring", escape_asterisks)
