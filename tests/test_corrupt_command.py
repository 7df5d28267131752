"""``ttalight corrupt``: what it writes, how it continues after an interruption, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

import ttalight
import ttalight.cli.corrupt as corrupt_command
from ttalight.cli import main
from ttalight.data import CorruptedDataModule, CorruptedFolder, DigitsDataModule
from ttalight.data.corruptions import COMMON, EXTRA, corrupt
from ttalight.data.layout import write_npy

FEW = ["--corruptions", "fog", "shot_noise", "contrast", "--severities", "5", "2"]


def run(folder, *words, limit=40):
    main(["corrupt", "--data", "DigitsDataModule", "--data.limit", str(limit), "--output", str(folder), *words])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; return the one line it says on stderr."""

    def fail(*words, code=2, **arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*words, **arguments)
        assert stop.value.code == code
        return capsys.readouterr().err.splitlines()[-1]

    return fail


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A set that was written without an interruption."""
    folder = tmp_path_factory.mktemp("sets") / "finished"
    run(folder, *FEW)
    return folder


class TestWritten:
    def test_layout(self, finished):
        assert sorted(contents(finished)) == [
            "contrast.npy", "corruptions.json", "fog.npy", "labels.npy", "shot_noise.npy",
        ]  # fmt: skip
        clean = DigitsDataModule().load("test")
        labels = np.load(finished / "labels.npy")
        assert labels.tolist() == clean.labels[:40].tolist() * 2
        for name in ("fog", "shot_noise", "contrast"):
            images = np.load(finished / f"{name}.npy")
            assert images.shape == (80, 32, 32, 3)
            for block, severity in enumerate((5, 2)):
                expected = corrupt(clean.images, name, severity)[:40].permute(0, 2, 3, 1).numpy()
                assert np.array_equal(images[40 * block : 40 * (block + 1)], expected)

    def test_settings(self, finished):
        settings = json.loads((finished / "corruptions.json").read_text())
        clean = DigitsDataModule().load("test")
        digest = hashlib.sha256(clean.labels[:40].numpy().tobytes() + clean.images[:40].numpy().tobytes()).hexdigest()
        assert settings == {
            "ttalight": ttalight.__version__,
            "source": {"data": "DigitsDataModule", "shape": [40, 3, 32, 32], "sha256": digest},
            "split": "test",
            "samples": 40,
            "seed": 0,
            "table": "cifar",
            "severities": [5, 2],
            "images_per_chunk": 1000,
            "frost": "procedural",
            "corruptions": ["fog", "shot_noise", "contrast"],
        }

    def test_files_are_those_of_numpy(self, tmp_path):
        array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(6, 2, 2)
        np.save(tmp_path / "numpy.npy", array)
        write_npy(tmp_path / "parts.npy", array.shape, np.uint8, [array[:2], array[2:5], array[5:]])
        assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()

    def test_the_layout_s_reader_reads_it(self, finished):
        part = CorruptedFolder(finished).read("shot_noise", 2, 10, limit=25)
        expected = corrupt(DigitsDataModule().load("test").images, "shot_noise", 2)[:25]
        assert torch.equal(part.images, expected)

    @pytest.mark.parametrize(("words", "names"), [([], COMMON), (["--corruptions", "all"], COMMON + EXTRA)])
    def test_fifteen_or_all(self, tmp_path, words, names):
        run(tmp_path / "set", "--severities", "1", *words, limit=2)
        assert json.loads((tmp_path / "set" / "corruptions.json").read_text())["corruptions"] == list(names)
        assert len(list((tmp_path / "set").glob("*.npy"))) == len(names) + 1

    def test_options(self, tmp_path):
        words = ["--corruptions", "gaussian_noise", "--severities", "3"]
        run(tmp_path / "set", *words, "--seed", "5", "--table", "imagenet", "--split", "validation", limit=9)
        clean = DigitsDataModule().load("validation")
        expected = corrupt(clean.images, "gaussian_noise", 3, seed=5, table="imagenet")[:9]
        images = np.load(tmp_path / "set" / "gaussian_noise.npy")
        assert np.array_equal(images, expected.permute(0, 2, 3, 1).numpy())
        assert np.load(tmp_path / "set" / "labels.npy").tolist() == clean.labels[:9].tolist()

    def test_shows_progress(self, tmp_path, capsys):
        run(tmp_path / "set", *FEW)
        output = capsys.readouterr()
        assert "240/240" in output.err
        assert "contrast" in output.err
        assert output.out == f"Corrupted images: {tmp_path}/set\n"


class TestInterruption:
    @pytest.mark.parametrize("stop", [0, 3, 5])
    def test_resumes_with_the_unfinished_corruption(self, finished, tmp_path, monkeypatch, fails, stop, capsys):
        """Two chunks a corruption, so that 5 stops in the middle of the third."""
        corrupted = []
        real = corrupt_command.corrupt_chunk

        def chunk(images, name, *arguments, **keywords):
            if len(images) == 1:  # only trying
                return real(images, name, *arguments, **keywords)
            if len(corrupted) == stop:
                raise KeyboardInterrupt
            corrupted.append(name)
            return real(images, name, *arguments, **keywords)

        monkeypatch.setattr(corrupt_command, "corrupt_chunk", chunk)
        message = fails(tmp_path / "set", *FEW, code=130)
        assert message == "ttalight corrupt: interrupted; the same command continues from here"
        done = {path.stem for path in (tmp_path / "set").glob("*.npy")} - {"labels"}
        assert done == set(["fog", "shot_noise", "contrast"][: stop // 2])
        stop = -1
        corrupted.clear()
        run(tmp_path / "set", *FEW)
        assert done.isdisjoint(corrupted)
        assert contents(tmp_path / "set") == contents(finished)

    def test_a_killed_process_loses_no_finished_file(self, finished, tmp_path):
        """The process ends without any cleaning up when it is about to give the second corruption its name."""
        words = ["corrupt", "--data", "DigitsDataModule", "--data.limit", "40", "--output", "set", *FEW]
        program = (
            "import os, torch; from ttalight.cli import main; torch.set_num_threads(1); replace = os.replace\n"
            "def stop(source, target):\n"
            "    if str(target).endswith('shot_noise.npy'): os._exit(9)\n"
            "    replace(source, target)\n"
            "os.replace = stop\n"
            f"main({words!r})\n"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
        assert done.returncode == 9
        left = contents(tmp_path / "set")
        assert sorted(left) == ["corruptions.json", "fog.npy", "labels.npy", "shot_noise.npy.part"]
        before = (tmp_path / "set" / "fog.npy").stat().st_mtime_ns
        run(tmp_path / "set", *FEW)
        assert (tmp_path / "set" / "fog.npy").stat().st_mtime_ns == before
        assert contents(tmp_path / "set") == contents(finished)

    def test_full_disk(self, tmp_path, monkeypatch, fails):
        def full(path, *arguments):
            if path.name == "shot_noise.npy":
                raise OSError(28, "No space left on device")
            write_npy(path, *arguments)

        monkeypatch.setattr(corrupt_command, "write_npy", full)
        message = fails(tmp_path / "set", *FEW)
        assert "cannot write shot_noise.npy ([Errno 28] No space left on device)" in message
        assert "the same command continues with this one" in message

    def test_more_corruptions_can_be_added(self, finished, tmp_path):
        run(tmp_path / "set", "--corruptions", "shot_noise", "--severities", "5", "2")
        run(tmp_path / "set", *FEW)
        theirs, ours = contents(finished), contents(tmp_path / "set")
        assert json.loads(ours.pop("corruptions.json"))["corruptions"] == ["shot_noise", "fog", "contrast"]
        theirs.pop("corruptions.json")
        assert ours == theirs


class TestRefusals:
    def test_complete(self, finished, fails):
        before = contents(finished)
        message = fails(finished, *FEW)
        assert message.startswith(f"ttalight corrupt: error: {finished} is complete: give another --output")
        assert message.endswith("replace it with --overwrite")
        assert contents(finished) == before

    @pytest.mark.parametrize(
        ("words", "limit", "message"),
        [
            (["--seed", "1"], 40, "seed is 0 there and 1 here"),
            (["--severities", "5"], 40, "severities is [5, 2] there and [5] here"),
            (["--table", "tiny_imagenet"], 40, "table is 'cifar' there and 'tiny_imagenet' here"),
            (["--split", "train"], 40, "split is 'test' there and 'train' here"),
            ([], 39, "samples is 40 there and 39 here"),
        ],
    )
    def test_other_settings(self, finished, fails, words, limit, message):
        before = contents(finished)
        found = fails(finished, *FEW, "--corruptions", "fog", "snow", *words, limit=limit)
        assert "was made with other settings (" in found
        assert message in found
        assert contents(finished) == before

    def test_files_of_others(self, tmp_path, fails):
        np.save(tmp_path / "fog.npy", np.zeros(3))
        message = fails(tmp_path, *FEW)
        assert f"{tmp_path} has fog.npy but no corruptions.json, so it was not made by this command" in message
        assert np.load(tmp_path / "fog.npy").tolist() == [0, 0, 0]

    def test_overwrite_replaces_the_set_and_nothing_else(self, finished, tmp_path):
        folder = tmp_path / "set"
        run(folder, "--corruptions", "fog", "snow", "--severities", "1", "--seed", "7", limit=3)
        (folder / "mine.npy").write_bytes(b"mine")
        (folder / "snow.npy.part").write_bytes(b"of a run that was killed")
        run(folder, *FEW, "--overwrite")
        assert (folder / "mine.npy").read_bytes() == b"mine"
        (folder / "mine.npy").unlink()
        assert contents(folder) == contents(finished)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--corruptions", "fgo"], "there is no corruption 'fgo': did you mean fog"),
            (["--severities", "6"], "severity must be an integer from 1 (mild) to 5 (strong), not 6"),
            (["--severities", "1", "1"], "severities must differ, got 1 1"),
            (["--frost_dir", "nowhere", "--corruptions", "frost"], "in frost_dir 'nowhere'"),
        ],
    )
    def test_arguments(self, tmp_path, fails, words, message):
        found = fails(tmp_path / "set", *words)
        assert found.startswith("ttalight corrupt: error: ")
        assert message in found
        assert not (tmp_path / "set").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--nothing"], "nothing"),
            (["--data", "DigitDataModule"], "there is no class DigitDataModule; nearest: DigitsDataModule"),
        ],
    )
    def test_words_that_the_parser_refuses(self, tmp_path, fails, words, message):
        found = fails(tmp_path / "set", *words)
        assert found.startswith("ttalight: error: ")
        assert message in found
        assert not (tmp_path / "set").exists()

    def test_missing_data(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(
                [
                    "corrupt",
                    "--data",
                    "CIFARDataModule",
                    "--data.root",
                    str(tmp_path),
                    "--output",
                    str(tmp_path / "set"),
                ]
            )
        assert f"no test_batch in {tmp_path}/cifar-10-batches-py" in capsys.readouterr().err
        assert not (tmp_path / "set").exists()


def test_a_written_set_is_the_generated_one(tmp_path, monkeypatch):
    """CIFARDataModule's images through the command and CorruptedDataModule, and made in memory, several chunks."""
    monkeypatch.setattr(CorruptedDataModule, "corruption_chunk", 16)
    monkeypatch.setattr("ttalight.data.CIFARDataModule.corruption_chunk", 16)
    root = tmp_path / "data"
    (root / CIFAR10.base_folder).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3072), dtype=np.uint8)
    content = pickle.dumps({"data": pixels, "labels": (np.arange(40) % 10).tolist()})
    (root / CIFAR10.base_folder / "test_batch").write_bytes(content)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashlib.md5(content).hexdigest()]])
    names = ["--corruptions", "gaussian_noise", "frost", "snow", "--seed", "3"]
    main(["corrupt", "--data", "CIFARDataModule", "--data.root", str(root), "--output", str(tmp_path / "set"), *names])
    shared = {"domains": ["gaussian_noise", "frost", "snow"], "severity": 4, "seed": 3, "limit": 21}
    read = CorruptedDataModule(root=str(tmp_path / "set"), **shared)
    made = CorruptedDataModule(root=str(root), generate=True, **shared)
    for data in (read, made):
        data.setup("test")
    assert read.stream.hash == made.stream.hash
    assert [domain.name for domain in read.stream.domains] == ["gaussian_noise", "frost_procedural", "snow"]
    for there, here in zip(read.test_dataloader(), made.test_dataloader(), strict=True):
        assert torch.equal(there[0], here[0])
        assert torch.equal(there[1], here[1])


@pytest.mark.data
def test_real_test_set(shared_data, tmp_path):
    """The real CIFAR-10 test images, two corruptions at all severities: the public files' shape, and growing damage."""
    shutil.unpack_archive(shared_data / "cifar-10-test.tar.xz", tmp_path)
    output = tmp_path / "CIFAR-10-C"
    main([
        "corrupt", "--data", "CIFARDataModule", "--data.root", str(tmp_path), "--output", str(output),
        "--corruptions", "gaussian_noise", "contrast",
    ])  # fmt: skip
    noise = np.load(output / "gaussian_noise.npy", mmap_mode="r")
    assert noise.shape == (50_000, 32, 32, 3)
    assert np.bincount(np.load(output / "labels.npy")).tolist() == [5000] * 10
    data = CorruptedDataModule(root=str(tmp_path), domains=["clean", "gaussian_noise", "contrast"], severity=1)
    data.setup("test")
    clean = data._stream_set.domains[0].images.permute(0, 2, 3, 1).numpy()
    errors = [
        np.sqrt(np.mean((clean[:1000].astype(float) - noise[start : start + 1000]) ** 2))
        for start in range(0, 50_000, 10_000)
    ]
    assert errors == pytest.approx([10, 15, 20, 22, 25], rel=0.05)
