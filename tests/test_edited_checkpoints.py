"""A checkpoint that was edited: resuming ends in one line and loses nothing, or gives the right result."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import re
import shutil
from pathlib import Path

import lightning
import pytest
import torch

from ttalight.callbacks.adaptation_files import list_checkpoints
from ttalight.cli import main
from ttalight.reporting import read_results

WORDS = """adapt --model SupervisedTask --model.encoder cifar_resnet8 --data DigitsDataModule --data.limit 12
    --data.batch_size 4 --data.domains [clean,contrast] --adapter Tent --adapter.lr 0.01 --predictions true
    --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false
    --trainer.callbacks+=AdaptationCheckpoint --trainer.callbacks.every 4""".split()
RESUME = ["adapt", "--resume", "run", "--trainer.callbacks", "null"]

pytestmark = pytest.mark.filterwarnings("ignore:.*statistics", "ignore:.*continues from the one before")


class Stop(lightning.Callback):
    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 4:
            raise KeyError("stopped")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run that stopped after five of six batches, its last checkpoint and its whole results."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("ttalight.trainer.Progress", Stop)
        words = [*WORDS, "--trainer.default_root_dir", "run"]
        words[words.index("--trainer.enable_progress_bar") + 1] = "true"
        with pytest.raises(KeyError, match="stopped"):
            main(words)
        shutil.copytree("run", "whole")
        shutil.copytree("run", "kept")
        patch.undo()
    batches, path = list_checkpoints(folder / "kept")[0]
    assert batches == 4
    return folder, torch.load(path, weights_only=True)


@pytest.fixture
def work(stopped, monkeypatch):
    monkeypatch.chdir(stopped[0])


def places(value, path=()):
    """Yield the path of every part, of many like parts the first."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    alike = path[-1:] in (("tensors",), ("state",)) or isinstance(value, list)
    for key, part in items[:1] if alike else items:
        yield (*path, key)
        if isinstance(part, (dict, list, tuple)):
            yield from places(part, (*path, key))


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = {"a": value}
    return value


GONE = object()
WRONG = (
    GONE, None, "odd", -1, 10**5000, float("nan"), True, [], [1], {}, {"foreign": 1}, nested(300), torch.zeros(3, 2),
    torch.full((), float("nan")), b"x",
)  # fmt: skip


def edited(content, path, value):
    changed = copy.deepcopy(content)
    owner = changed
    for key in path[:-1]:
        owner[key] = list(owner[key]) if isinstance(owner[key], tuple) else owner[key]
        owner = owner[key]
    if value is GONE:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return changed


def put(content):
    """Make the checkpoint the only one of a run that stopped, with a digest that fits."""
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree("kept", "run")
    for path in Path("run/adaptation").iterdir():
        path.unlink()
    file = io.BytesIO()
    torch.save(content, file)
    digest = hashlib.sha256(file.getvalue()).hexdigest()[:16]
    Path(f"run/adaptation/batch-4-{digest}.ckpt").write_bytes(file.getvalue())


def files():
    return {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def resume(capsys):
    """Return the exit code and what was said; a traceback is an error of the test."""
    capsys.readouterr()
    before, code = files(), 0
    try:
        main(RESUME)
    except SystemExit as stop:
        code = stop.code
    if code == 0:
        assert read_results("run")["complete"] is True
        return ""
    said = capsys.readouterr().err.splitlines()
    assert (code, len(said)) == (1, 1)
    assert said[0].startswith("ttalight: error: the ")
    assert files() == before
    return said[0]


def numbers():
    results = json.loads(Path("run/results.json").read_text())
    return [{**row, "seconds": 0, "images_per_second": 0} for row in results["domains"]], results["curve"]


def test_every_part_replaced_by_wrong_ones(work, stopped, capsys):
    whole, draw = stopped[1], random.Random(0)
    put(whole)
    assert resume(capsys) == ""
    expected = numbers()
    refused = 0
    edits = [(path, value) for path in places(whole) for value in WRONG]
    for path, value in draw.sample(edits, 16):
        put(edited(whole, path, value))
        said = resume(capsys)
        if said:
            refused += 1
        elif path[-1] not in ("_seconds",):
            assert numbers() == expected, path
    assert refused > 10


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), True, "is not one of this version of the package"),
        (("batches",), 3, r"batches is 3, expected 4 to 4\) lacks what a run needs"),
        (("identity",), "[" * 9000, "does not say which run it is of"),
        (("adapter", "counters", "visit"), -2, r"does not fit Tent on SupervisedTask: counters\.visit is -2"),
        (("adapter", "counters", "attach"), 1, ""),
        (("adapter", "facts", "possible"), torch.zeros(3), "its facts are not a classifier and its classes"),
        (("adapter", "size"), [10**40], "size\\[0\\] is 1000"),
        (("adapter", "before_probe"), {}, "before_probe lacks tensors"),
        (("adapter", "tensors", "encoder.bn1.weight"), torch.full((16,), torch.nan), "has values that are not finite"),
        (("adapter", "optimizer", "state", 0, "exp_avg"), torch.zeros(3), r"0\.exp_avg has shape \(3,\), expected"),
        (("adapter", "optimizer", "state", 0, "step"), torch.tensor(-1.0), "step has values that no step leaves there"),
        (("adapter", "optimizer", "state", 99), {}, "optimizer.state has the unknown 99"),
        (("adapter", "optimizer", "param_groups", 0, "lr"), float("nan"), "lr is nan, expected 0 to 1e"),
        (("adapter", "optimizer", "param_groups", 0, "amsgrad"), True, ""),
        (("recorder", "measurement", "counts", "_images"), 8, r"counts\._images is 8, expected 16 to 16"),
        (("recorder", "measurement", "metrics", "closed", 7), {}, "metrics.closed has the unknown 7"),
        (("recorder", "measurement", "metrics", "closed", 0, "accuracy"), 7.0, "accuracy is 7.0, expected 0 to 1"),
        (("recorder", "measurement", "metrics", "open", 1, "hits"), torch.full((10,), 9), "hits that no predictions"),
        (("recorder", "measurement", "curve", "images"), [4], "curve.images has 1 entries, expected 4"),
        (("recorder", "predictions", "parts"), ".predictions.npz.1.parts", "predictions of the run to resume"),
        (("recorder", "predictions", "parts"), "../kept", "predictions.parts is '../kept'"),
        (("recorder", "predictions", "count"), 8, "predictions.count is 8, expected 16 to 16"),
        (("events", "0"), {"foreign": 5}, ""),
        (("events", "0"), {}, ""),
        (("random", "cpu"), torch.zeros(5056, dtype=torch.uint8), "random.cpu is no state of a generator"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_line_says_what_is_wrong(path, value, message, work, stopped, capsys):
    put(edited(stopped[1], path, value))
    said = resume(capsys)
    assert bool(said) == bool(message), said
    assert re.search(message, said)


FIT = """fit --model SupervisedTask --model.encoder cifar_resnet8 --data DigitsDataModule --data.limit 4
    --data.batch_size 4 --trainer.accelerator cpu --trainer.enable_progress_bar false
    --trainer.enable_model_summary false --trainer.limit_val_batches 0 --trainer.limit_train_batches 2""".split()
MODEL_CHECKPOINT = (
    "ModelCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of one epoch, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "kept"])
    return folder, torch.load(folder / "kept/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("pytorch-lightning_version",), "abc", r"cannot be resumed from \(InvalidVersion: "),
        (("pytorch-lightning_version",), GONE, "lacks pytorch-lightning_version"),
        (("callbacks",), [], "callbacks is of type list, expected dict"),
        (("callbacks", MODEL_CHECKPOINT), "odd", "callbacks.ModelCheckpoint is of type str, expected dict"),
        (("callbacks", MODEL_CHECKPOINT, "best_model_path"), "run/checkpoints/../../kept", "names the file 'run/"),
        (("loops",), None, "loops is of type NoneType, expected dict"),
        (("loops", "fit_loop", "epoch_progress"), GONE, "loops.fit_loop lacks epoch_progress"),
        (("loops", "fit_loop", "epoch_progress", "current", "processed"), "odd", "processed is of type str"),
        (("loops", "fit_loop", "epoch_progress", "total", "state_dict"), 1, ""),
        (("loops", "test_loop"), 5, ""),
        (("optimizer_states",), [], "optimizer_states has 0 entries, expected 1"),
        (("optimizer_states",), GONE, "optimizer_states is of type NoneType, expected list"),
        (("optimizer_states", 0, "state", 0), None, "optimizer.state.0 is of type NoneType, expected dict"),
        (("optimizer_states", 0, "param_groups", 0, "amsgrad"), True, ""),
        (("lr_schedulers", 0, "last_epoch"), "odd", r"lr_schedulers\[0\].last_epoch is of type str, expected int"),
        (("lr_schedulers", 0, "step"), 1, ""),
        (("hyper_parameters", "encoder"), torch.zeros(3), "is of another architecture"),
        (("ttalight", "task"), torch.zeros(3), "its task is of type Tensor, expected str"),
        (("state_dict", "classifier.bias"), torch.zeros(10, dtype=torch.complex64), "of another type: classifier.bias"),
    ],
    ids=lambda value: ".".join(map(str, value))[-50:] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_training_goes_on_from_an_edited_checkpoint(path, value, message, trained, capsys, monkeypatch):
    monkeypatch.chdir(trained[0])
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree("kept", "run")
    torch.save(edited(trained[1], path, value), "run/checkpoints/last.ckpt")
    capsys.readouterr()
    before, code = files(), 0
    try:
        main([*FIT, "--trainer.max_epochs", "2", "--trainer.default_root_dir", "run", "--ckpt_path", "last"])
    except SystemExit as stop:
        code = stop.code
    if not message:
        assert code == 0
        assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
        return
    said = capsys.readouterr().err.splitlines()
    assert (code, len(said)) == (1, 1)
    assert said[0].startswith("ttalight: error: ")
    assert re.search(message, said[0]), said[0]
    assert files() == before
