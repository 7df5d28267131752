"""The progress bar."""

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
