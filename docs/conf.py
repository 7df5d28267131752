"""Configuration of Sphinx: sphinx-build -W --keep-going -b html docs docs/_build"""

import ttalight  # imported before autodoc imports lightning: it makes torchvision importable beside a CPU build of torch

project = "ttalight"
author = copyright = "The ttalight developers"
release = version = ttalight.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # a hook without a docstring of ours does not repeat Lightning's
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"ttalight {release}"
