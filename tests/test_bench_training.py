"""The bench of training: what it compares with does what the tasks do, and its table is whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "benchmarks"
MODULES = ("training", "measuring", "random_images", "training_rivals")
STAGES = ("supervised", "simclr", "alignment")


@pytest.fixture(scope="module")
def bench():
    """The tool as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import training

        patch.setattr(training, "quiet", lambda threads: None)  # logs and warnings are other tests' too
        yield training
    for name in MODULES:
        sys.modules.pop(name)


def setting(bench, stage, **changes):
    rest = {"rounds": 2, "turn": 2, "workers": 0, "threads": 1, "images": 48, "root": None, "device": "cpu"}
    given = bench.Setting(stage, "cifar_resnet8", 8, "bf16-mixed", "yes", "no", **rest)
    return given._replace(**changes)


class Seen:
    """Notes what an encoder is shown while weights learn, and how often it goes backward."""

    def __init__(self, encoder):
        self.inputs, self.backwards = [], 0
        encoder.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        if not output.requires_grad:
            return
        (images,) = inputs
        in_order = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        self.inputs.append((tuple(images.shape), in_order, output.dtype))
        output.register_hook(lambda _: setattr(self, "backwards", self.backwards + 1))


@pytest.mark.parametrize("channels_last", ["no", "yes"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("stage", STAGES)
def test_all_ways_show_the_network_the_same(bench, stage, precision, channels_last):
    given = setting(bench, stage, precision=precision, channels_last=channels_last)
    task, data = bench.make_task(given), bench.make_data(given)
    bare, usual = bench.Bare(given, task), bench.Usual(given, task, data)
    seen = [Seen(task.encoder), Seen(bare.network[0]), Seen(usual.network[0])]
    bench.fit(given, task, 2, datamodule=data)
    bare(), bare(), usual()
    views = 8 if stage == "supervised" else 16
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    for each in seen:
        assert each.inputs == [((views, 3, 32, 32), channels_last == "yes", dtype)] * 2
        assert each.backwards == 2


@pytest.mark.parametrize("stage", STAGES)
def test_the_rivals_learn_as_many_weights(bench, stage):
    given = setting(bench, stage)
    task = bench.make_task(given)
    bare = bench.Bare(given, task)
    before = [parameter.clone() for parameter in bare.network.parameters()]
    bare()
    moved = [
        parameter for parameter, old in zip(bare.network.parameters(), before, strict=True) if (parameter != old).any()
    ]
    learned = [parameter for parameter in task.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, moved)) == sum(map(torch.numel, learned))


def test_every_way_is_timed_as_often_as_it_is_said(bench):
    times = bench.time_stage(setting(bench, "alignment", precision="32-true"))  # bfloat16 is slow on many processors
    assert {name: len(values) for name, values in times.items()} == {"ours": 4, "start": 1, "bare": 4, "usual": 2}
    assert all(value > 0 for values in times.values() for value in values)
    assert times["start"][0] > min(times["bare"]) / 4  # the teacher's pass over all images


def test_the_usual_pipeline_counts_its_workers_time(bench):
    task, data = bench.make_task(setting(bench, "simclr")), bench.make_data(setting(bench, "simclr"))
    taken = {}
    for workers, threads in ((1, 1), (1, 2), (0, 1)):
        given = setting(bench, "simclr", workers=workers, threads=threads)
        taken[workers, threads] = bench.Usual(given, task, data)()
    assert taken.pop((1, 1)) > 0.001  # 32 views
    assert set(taken.values()) == {0.0}  # wall time has it, or the process itself


def test_pictures_are_those_of_the_data(bench):
    data = bench.make_data(setting(bench, "alignment"))
    pictures = bench.Usual(
        setting(bench, "alignment"), bench.make_task(setting(bench, "alignment")), data
    ).loader.dataset
    (first, second, clean), labels, _ = pictures.__getitems__([3, 5])
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    torch.testing.assert_close(clean * std + mean, data.train_set.images[[3, 5]] / 255)
    assert labels.tolist() == data.train_set.labels[[3, 5]].tolist()
    assert first.shape == second.shape == clean.shape
    assert not torch.equal(first, second)


def test_the_table_and_the_line_of_lightning(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "fresh", lambda function, *arguments: function(*arguments))
    words = "--stages supervised --networks cifar_resnet8 --batches 4 --rounds 2 --turn 1 --workers 0 --images 16"
    monkeypatch.setattr(sys, "argv", ["training.py", *words.split()])
    bench.main()
    printed = capsys.readouterr().out.splitlines()
    head, _, cells = ([cell.strip() for cell in line[1:-1].split("|")] for line in printed if line.startswith("|"))
    row = dict(zip(head, cells, strict=True))
    assert (row["stage"], row["batch"], row["n"]) == ("supervised", "4", "2, 2")
    low, high = sorted((float(row["images/s"].replace(",", "")), float(row["bare images/s"].replace(",", ""))))
    ratio = float(row["speed against bare (middle half)"].split()[0])
    assert low / high / 2 < ratio < 2 * high / low
    assert "Lightning's own cost a step" in printed[-1]
    assert printed[-1].endswith("n = 2")


def test_too_few_images_are_an_error(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--images", "256"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "4352 images for one epoch, got 256" in capsys.readouterr().err


def test_memory_is_that_of_the_device(bench, monkeypatch):
    devices = []
    monkeypatch.setattr(bench, "peak", lambda device: devices.append(device) or 0.0)
    bench.memory(setting(bench, "supervised"), "bare")
    assert devices == ["cpu", "cpu"]
