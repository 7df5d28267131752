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
    "fit": [*QUIET, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--data.batch_size", "20",
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


def counts(text: str) -> dict[str, str]:
    """Method -> number of runs, of the first table of a printed comparison."""
    header, ruler, *rows = re.search(r"^method .* n .*\n(?:.+\n)+", text, re.MULTILINE)[0].splitlines()
    edge, place = ruler.index(" "), header.split().index("n") - len(header.split())
    return {row[:edge].rstrip(): row.split()[place] for row in rows}


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
    main(["compare", "runs/digits", "--baseline", "Source", "--across-streams", "--output", "table"])
    text = capsys.readouterr().out
    assert counts(text) == {"Source": "2", "Tent": "2"}
    assert "over n stream orders" in text
    assert "stream_hash 2 orders" in text
    assert "interval" in text
    assert Path("table/table.html").is_file()

    for words in own:
        run(words)
    text = capsys.readouterr().out
    assert "averaged over runs whose source weights differ: Tent (2 files)" in " ".join(text.split())
    assert counts(text) == {"Tent": "2"}
    main(["compare", "runs/own"])
    apart = capsys.readouterr().out
    assert "averaged over runs whose source weights differ" not in apart
    assert list(counts(apart).values()) == ["1", "1"]
