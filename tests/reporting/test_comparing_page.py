"""The loops of the page on comparing, expanded by a real shell, and ``compare`` on what they leave behind."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ttalight.cli import main

ROOT = Path(__file__).resolve().parents[2]
LOOPS = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / "comparing.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
QUIET = ["--trainer.enable_progress_bar", "false"]
TINY = {
    "fit": [*QUIET, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1",
            "--trainer.limit_val_batches", "0", "--trainer.enable_model_summary", "false"],
    "adapt": [*QUIET, "--data.limit", "20", "--data.domains", "[clean, contrast]"],
    "compare": [],
}  # fmt: skip


def expanded(loop: str) -> list[list[str]]:
    """The command lines that a shell makes of a loop."""
    script = 'ttalight() { for word in "$@"; do printf "%q " "$word"; done; echo; }\n' + loop
    done = subprocess.run([shutil.which("bash") or "bash", "-euc", script], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def run(words: list[str]) -> None:
    main([*words, *TINY[words[0]]])


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_loops(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    run(["fit", "--config", "configs/digits/source.yaml"])
    seeds, own = map(expanded, LOOPS)
    assert len(seeds) == 4
    for words in seeds:
        run(words)
    capsys.readouterr()
    main(["compare", "runs/digits", "--baseline", "Source", "--output", "table"])
    text = capsys.readouterr().out
    assert re.search(r"^Tent +2 ", text, re.MULTILINE)
    assert re.search(r"^Source +2 ", text, re.MULTILINE)
    assert "interval" in text
    assert Path("table/table.html").is_file()

    for words in own:
        run(words)
    text = capsys.readouterr().out
    assert "averaged over runs whose source weights differ: Tent (2 files)" in " ".join(text.split())
    assert re.search(r"^Tent +2 ", text, re.MULTILINE)
    main(["compare", "runs/own"])
    apart = capsys.readouterr().out
    assert "averaged over runs whose source weights differ" not in apart
    assert len(re.findall(r"^Tent \(.*\) +1 ", apart, re.MULTILINE)) == 2
