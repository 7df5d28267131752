"""The progress display."""

from __future__ import annotations

import re

from ttalight import Trainer
from ttalight.adapters import Source
from ttalight.callbacks import Progress
from ttalight.data import DigitsDataModule
from ttalight.tasks import SupervisedTask


def test_shows_domain_and_running_accuracy(tmp_path, capsys):
    data = DigitsDataModule(batch_size=10, domains=["clean", "contrast"], limit=20)
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu", callbacks=Progress(refresh_rate=1))
    results = trainer.adapt(SupervisedTask(encoder="cifar_resnet8"), datamodule=data, adapter=Source())
    out = capsys.readouterr()
    shown = re.findall(r"(\d)/4 [^\r\n]*domain=(\w+), accuracy=([\d.]+)", out.out + out.err)
    assert [domain for _, domain, _ in dict.fromkeys(shown)] == ["clean", "clean", "contrast", "contrast"]
    assert shown[-1] == ("4", "contrast", f"{results['domains'][1]['accuracy']:.3f}")


def test_fit_is_one_bar_on_a_terminal_and_one_line_in_a_file(tmp_path, capsys):
    texts = {}
    for kind, rate in (("bar", 1), ("line", None)):
        options = {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 2, "log_every_n_steps": 1}
        trainer = Trainer(default_root_dir=str(tmp_path / kind), accelerator="cpu", enable_model_summary=False,
                          callbacks=Progress(rate), **options)  # fmt: skip
        trainer.fit(SupervisedTask(encoder="cifar_resnet8"), datamodule=DigitsDataModule(batch_size=10))
        texts[kind] = capsys.readouterr().out
    bars = texts["bar"].split("\r")
    assert "\n" not in texts["bar"].strip()
    assert "Validation" not in texts["bar"]
    assert re.search(r"epoch 2/2: 100%.* 6/6 .*train/loss=.*val/accuracy=", bars[-1])
    assert re.fullmatch(r"\S+/line: 2 epochs, 0:\d\d, train/loss [\d.]+, val/accuracy [\d.]+\n", texts["line"])


def test_an_evaluation_is_one_line_in_a_file(tmp_path, capsys):
    data = DigitsDataModule(batch_size=10, limit=20)
    trainer = Trainer(default_root_dir=str(tmp_path / "one"), accelerator="cpu")
    results = trainer.adapt(SupervisedTask(encoder="cifar_resnet8"), datamodule=data, adapter=Source())
    accuracy = results["overall"]["accuracy"]
    assert re.fullmatch(rf"\S+/one: 2 batches, 0:\d\d, accuracy {accuracy:.3f}\n", capsys.readouterr().out)
