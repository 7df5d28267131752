"""The configurations of docs/data.md are ones that the command line takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ttalight.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
REST = {
    "model": "model: {class_path: SupervisedTask, init_args: {encoder: cifar_resnet8}}\n",
    "data": "data: DigitsDataModule\n",
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"class_path: (\w+)", block)[0])
def test_block(block, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ttalight"])
    rest = "".join(text for section, text in REST.items() if not block.startswith(section))
    (tmp_path / "config.yaml").write_text(block + rest)
    with pytest.raises(SystemExit) as stop:
        main(["adapt", "--config", str(tmp_path / "config.yaml"), "--adapter", "Source", "--print_config"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for name in re.findall(r"class_path: (\w+)", block):
        assert name in printed


def test_there_are_blocks():
    assert len(BLOCKS) == 6
