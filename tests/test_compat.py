"""The import of torchvision beside a torch that its compiled part does not fit, and beside one that it does."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

HEALTHY = "version = 'healthy'\nloaded = __import__('builtins').__dict__.setdefault('loads', []).append(1)\n"
BROKEN = textwrap.dedent("""
    import torch
    import torchvision.half
    from torchvision import whole
    __import__('builtins').__dict__.setdefault('loads', []).append(1)
    for name in ({names}):
        @torch.library.register_fake(f"torchvision::{{name}}")
        def fake(dets, scores, iou_threshold):
            return dets
    version = 'repaired'
""")
PROGRAM = textwrap.dedent("""
    import builtins, logging, sys
    logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
    import importlib.util
    spec = importlib.util.spec_from_file_location("compat", sys.argv[1])
    compat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compat)
    compat.mend_torchvision()
    assert not {'torch', 'torchvision'} & sys.modules.keys()
    import torchvision
    print(torchvision.version, len(builtins.loads), compat._library is None)
    for name in ("half", "whole"):
        assert getattr(torchvision, name, None) is sys.modules.get(f"torchvision.{name}")
""")


@pytest.fixture
def run(tmp_path):
    """Import a made-up torchvision through the package's shim in another process."""

    def import_it(source: str):
        from ttalight import compat

        folder = tmp_path / "torchvision"
        folder.mkdir()
        (folder / "__init__.py").write_text(source)
        (folder / "half.py").write_text("")
        (folder / "whole.py").write_text("")
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, compat.__file__], capture_output=True, text=True,
            env={"PYTHONPATH": str(tmp_path), "PATH": ""}, check=False,
        )  # fmt: skip

    return import_it


def test_a_healthy_pair_is_untouched(run):
    done = run(HEALTHY)
    assert done.stdout.split() == ["healthy", "1", "True"]
    assert "compiled part" not in done.stderr


ONE_ALONE = pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 lets an operator be registered once")


@pytest.mark.parametrize(("names", "loads"), [("'nms',", "2"), pytest.param("'nms', 'qnms'", "3", marks=ONE_ALONE)])
def test_missing_operators_are_declared(run, names, loads):
    done = run(BROKEN.format(names=names))
    assert done.stdout.split() == ["repaired", loads, "False"], done.stderr
    assert done.stderr.count("torchvision's compiled part does not load beside torch") == 1
    assert "DEBUG" in done.stderr


@ONE_ALONE
def test_it_gives_up_after_a_few(run):
    done = run(BROKEN.format(names="'a', 'b', 'c', 'd', 'e'"))
    assert done.returncode != 0
    assert "operator torchvision::d does not exist" in done.stderr


def test_another_error_is_not_swallowed(run):
    done = run("raise RuntimeError('no such library')")
    assert done.returncode != 0
    assert "no such library" in done.stderr


def test_the_installed_pair_imports():
    import torchvision

    assert torchvision.transforms.functional.hflip is not None
