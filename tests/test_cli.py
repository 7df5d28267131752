"""The command line, run as a user runs it, in this process and in others."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ttalight.cli import main
from ttalight.cli.commands import COMMANDS
from ttalight.reporting.figures import can_plot

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DIGITS = ("source", "simclr", "align", "unadapted", "ptbn", "ema_bn", "tent", "cta")
RIVALS = {"rotation_ttt", "ttt_plus_plus", "clust3", "nc_ttt", "rec_ttt", "ttt_flow"}
#: Folders with the training of other methods, and what they have.
BUDGETS = {"cifar10_paper": RIVALS, "cifar10_matched": RIVALS | {"joint", "probe", "masked_ttt"}}
TINY_FIT = [
    "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2",
    "--data.batch_size", "20", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
TINY_ADAPT = [
    "--data.limit", "15", "--data.batch_size", "10", "--data.domains", "[clean,contrast]",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def config(name: str) -> str:
    return str(CONFIGS / "digits" / f"{name}.yaml")


def fit(name: str, *more: str) -> None:
    main(["fit", "--config", config(name), *TINY_FIT, *more])


def adapt(name: str, *more: str) -> None:
    main(["adapt", "--config", config(name), *TINY_ADAPT, *more])


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder in which the tiny twins of the three training stages have been run by the real command."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("work")
        patch.chdir(folder)
        for name in DIGITS[:3]:
            fit(name)
    return folder


@pytest.fixture
def work(stages, tmp_path, monkeypatch):
    """A fresh copy of that folder as the current one."""
    folder = tmp_path / "work"
    shutil.copytree(stages, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; return what it says on stderr."""

    def run(*words: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        assert stop.value.code == code
        return capsys.readouterr().err

    return run


class TestConfigs:
    @pytest.mark.parametrize(
        "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
    )
    def test_every_file_is_parsed(self, path, capsys):
        verb = "adapt" if "adapter" in yaml.safe_load(path.read_text()) else "fit"
        with pytest.raises(SystemExit) as stop:
            main([verb, "--config", str(path), "--print_config"])
        assert stop.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["name"] == f"{path.parent.name}/{path.stem}"

    def test_every_data_folder_has_eight_files(self):
        files = {folder.name: {path.stem for path in folder.iterdir()} for folder in CONFIGS.iterdir()}
        expected = {name: set(DIGITS) for name in files.keys() - BUDGETS.keys() - {"cifar10_vit", "vision_language"}}
        expected["cifar10_lite0"] = {*DIGITS, "cta_consistency"}
        expected["mnist_to_digits"] = {*DIGITS, "cta_consistency"} - {"source", "simclr", "align"}
        expected["cifar10_vit"] = {"masked_autoencoder", "masked_ttt", "masked_ttt_adapt", "masked_ttt_batch"}
        assert {name: files[name] for name in expected} == expected

    @pytest.mark.parametrize("budget", BUDGETS)
    def test_budget_has_every_method(self, budget):
        files = {path.stem: path for path in (CONFIGS / budget).iterdir()}
        trained = {stem for stem in files if not stem.endswith(("_adapt", "_source"))}
        assert BUDGETS[budget] == trained
        assert {f"{stem}_adapt" for stem in trained} <= files.keys()
        for stem in trained:
            assert files[stem].read_text().startswith(f"# budget: {budget.partition('_')[2]}\n")
            fit, adapt = (yaml.safe_load(files[name].read_text()) for name in (stem, f"{stem}_adapt"))
            assert fit["model"]["class_path"] == adapt["model"]["class_path"]
            assert adapt["model"]["init_args"]["weights"] == f"runs/{fit['name']}/checkpoints/last.ckpt"
            whole = (budget, stem) == ("cifar10_paper", "ttt_plus_plus")  # its authors adapt to a whole corruption
            assert adapt["adapter"]["init_args"]["reset"] == ("domain" if whole else "batch")

    def test_the_matched_budget_is_that_of_the_paper(self):
        paper = yaml.safe_load((CONFIGS / "cifar10" / "source.yaml").read_text())
        for stem in BUDGETS["cifar10_matched"]:
            own = yaml.safe_load((CONFIGS / "cifar10_matched" / f"{stem}.yaml").read_text())
            assert (own["data"], own["trainer"]) == (paper["data"], paper["trainer"])
            network = () if stem == "masked_ttt" else ("encoder", "stem")  # its network is a transformer
            for name in ("lr", "final_lr", "warmup_epochs", *network):
                assert own["model"]["init_args"][name] == paper["model"]["init_args"][name]

    @pytest.mark.parametrize("name", DIGITS[3:])
    def test_tiny_twin_runs_and_leaves_its_files(self, name, work, capsys):
        adapt(name)
        run = work / "runs" / "digits" / name
        results = json.loads((run / "results.json").read_text())
        assert results["complete"] is True
        assert [row["name"] for row in results["domains"]] == ["clean", "contrast"]
        assert results["protocol"]["samples"] == 30
        assert len(list(csv.DictReader((run / "domains.csv").open()))) == 2
        assert list(run.glob("events.out.tfevents.*"))
        assert yaml.safe_load((run / "config.yaml").read_text())["name"] == f"digits/{name}"
        out = capsys.readouterr().out
        assert out.index("stream PerDomain") < out.index("contrast")
        assert f"tensorboard --logdir runs/digits/{name}" in out

    def test_control_and_method_share_views_and_forwards(self):
        control, method = (yaml.safe_load(Path(config(name)).read_text()) for name in ("ema_bn", "cta"))
        for key in ("model", "data"):
            assert control[key] == method[key]
        for key in ("steps", "reset"):
            assert control["adapter"]["init_args"][key] == method["adapter"]["init_args"][key]


class TestRuns:
    def test_config_of_a_run_repeats_it(self, work):
        adapt("tent", "--adapter.lr", "0.01")
        main(["adapt", "--config", "runs/digits/tent/config.yaml", "--name", "again"])
        first, again = (json.loads(Path(f"runs/{name}/results.json").read_text()) for name in ("digits/tent", "again"))
        for results in (first, again):
            results["cost"]["images_per_second"] = None
            for row in results["domains"]:
                row["seconds"] = row["images_per_second"] = None
        assert first == again
        assert first["protocol"]["lr"] == 0.01

    def test_an_existing_name_needs_overwrite(self, work, fails):
        adapt("ptbn")
        before = Path("runs/digits/ptbn/results.json").read_bytes()
        message = fails("adapt", "--config", config("ptbn"), *TINY_ADAPT)
        assert "there is a run in runs/digits/ptbn already" in message
        assert "--overwrite" in message
        assert Path("runs/digits/ptbn/results.json").read_bytes() == before
        adapt("ptbn", "--overwrite", "--data.limit", "10")
        assert json.loads(Path("runs/digits/ptbn/results.json").read_text())["protocol"]["samples"] == 20
        assert len(list(Path("runs/digits/ptbn").glob("events.out.tfevents.*"))) == 1

    def test_failed_start_frees_the_run_name(self, work, fails):
        fails("adapt", "--config", config("ptbn"), *TINY_ADAPT, "--data.domains", "[fogg]", code=1)
        adapt("ptbn")
        assert len(list(Path("runs/digits/ptbn").glob("events.out.tfevents.*"))) == 1

    def test_another_adapter_on_the_command_line(self, work):
        adapt("unadapted", "--adapter", "Tent", "--adapter.lr", "5e-4", "--adapter.reset", "never", "--name", "mine")
        results = json.loads(Path("runs/mine/results.json").read_text())
        assert results["method"] == "Tent"
        assert results["protocol"]["lr"] == 5e-4
        assert results["protocol"]["reset"] == "never"

    def test_another_adapter_starts_from_its_own_defaults(self, work):
        Path("ptbn.yaml").write_text("adapter: {class_path: ttalight.adapters.EMABN, init_args: {momentum: 0.2}}")
        for name, words in {
            "named": ["--adapter", "Tent"],
            "equals": ["--adapter=Tent"],
            "over a file": ["--config", "ptbn.yaml", "--adapter.class_path", "Tent"],
        }.items():
            adapt("cta", *words, "--name", name)
            protocol = json.loads(Path(f"runs/{name}/results.json").read_text())["protocol"]
            assert (protocol["steps"], protocol["lr"], protocol["reset"]) == (1, 1e-3, "domain"), name
        adapt("cta", "--adapter", "TestTimeTraining", "--adapter.lr", "1e-5", "--name", "same class")
        protocol = json.loads(Path("runs/same class/results.json").read_text())["protocol"]
        steps = yaml.safe_load(Path(config("cta")).read_text())["adapter"]["init_args"]["steps"]
        assert (protocol["steps"], protocol["lr"]) == (steps, 1e-5)

    def test_another_optimizer_in_a_file(self, work):
        Path("sgd.yaml").write_text(
            "adapter: {class_path: Tent, init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01}}}}"
        )
        adapt("unadapted", "--config", "sgd.yaml", "--name", "sgd")
        protocol = json.loads(Path("runs/sgd/results.json").read_text())["protocol"]
        assert (protocol["optimizer"], protocol["lr"]) == ("SGD", 0.01)

    def test_test_does_not_adapt_and_predict_works(self, work):
        words = ["--config", config("unadapted"), *TINY_ADAPT]
        text = Path(config("unadapted")).read_text()
        Path("plain.yaml").write_text(text[: text.index("adapter:")] + text[text.index("trainer:") :])
        words[1] = "plain.yaml"
        main(["test", *words, "--name", "tested"])
        adapt("unadapted")
        tested, unadapted = (
            json.loads(Path(f"runs/{name}/results.json").read_text())["domains"]
            for name in ("tested", "digits/unadapted")
        )
        assert [row["nll"] for row in tested] == [row["nll"] for row in unadapted]
        main(["predict", *words, "--name", "predicted"])
        main(["validate", *words, "--name", "validated", "--trainer.limit_val_batches", "2"])
        assert json.loads(Path("runs/validated/results.json").read_text())["domains"][0]["samples"] == 20

    def test_tensorboard_has_the_curves(self, work, figures):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        adapt("tent")
        events = EventAccumulator("runs/digits/tent")
        events.Reload()
        tags = set(events.Tags()["scalars"])
        assert {"online/accuracy", "online/entropy", "adapt/loss", "adapt/grad_norm", "adapt/selected"} <= tags
        assert {"domains/clean", "domains/contrast", "results/mean_accuracy"} <= tags
        assert {tag.partition("/")[0] for tag in tags} == {"adapt", "domains", "online", "results"}
        assert [event.step for event in events.Scalars("adapt/loss")] == [1, 2, 3, 4]
        assert events.Tags()["tensors"] == ["results/text_summary"]
        mean = json.loads(Path("runs/digits/tent/results.json").read_text())["mean"]["accuracy"]
        assert [event.value for event in events.Scalars("results/mean_accuracy")] == pytest.approx([mean])
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        settings = HParamsPluginData.FromString(content).session_start_info.hparams
        shown = {name: settings[name].string_value or settings[name].number_value for name in settings}
        assert shown["method"] == "Tent"
        assert (shown["lr"], shown["steps"], shown["reset"]) == (0.001, 1, "domain")
        content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
        (metric,) = HParamsPluginData.FromString(content).experiment.metric_infos
        assert metric.name.tag == "results/mean_accuracy"
        if can_plot():
            assert events.Tags()["images"] == ["domains"]


class TestErrors:
    def test_a_stage_that_has_not_run(self, tmp_path, monkeypatch, fails):
        monkeypatch.chdir(tmp_path)
        message = fails("adapt", "--config", config("tent"), *TINY_ADAPT, code=1)
        assert "ttalight: error: weights: there is no file runs/digits/source/" in message

    def test_arguments_that_exclude_each_other(self, work, fails):
        Path("both.yaml").write_text(
            "adapter: {class_path: Tent, init_args: "
            "{lr: 0.1, optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}}}"
        )
        message = fails("adapt", "--config", config("unadapted"), "--config", "both.yaml", "--name", "both", code=1)
        assert (
            "ttalight: error: give lr (for the published optimizer) or optimizer (with its own lr), not both" in message
        )


class TestCheckpointPath:
    def test_adapt_names_the_right_argument(self, fails):
        message = fails("adapt", "--config", config("cta"), "--ckpt_path", "x.ckpt")
        assert "adapt takes no --ckpt_path" in message
        assert "--model.aligned FILE" in message

    def test_the_file_s_class_does_not_replace_the_user_s(self, work, fails):
        """An aligned checkpoint names AlignmentTask and its hyper-parameters; the configured class stays."""
        words = ["--name", "other", "--ckpt_path", "runs/digits/align/checkpoints/last.ckpt"]
        message = fails("fit", "--config", config("simclr"), *TINY_FIT, *words, code=1)
        assert "written by AlignmentTask, and ckpt_path resumes the same class only" in message

    def test_file_hyper_parameters_do_not_replace_user_s(self, work):
        last = "runs/digits/source/checkpoints/last.ckpt"
        fit("source", "--name", "other", "--ckpt_path", last, "--model.flip", "0.25", "--trainer.max_epochs", "2")
        written = yaml.safe_load(Path("runs/other/config.yaml").read_text())
        assert written["model"]["init_args"]["flip"] == 0.25
        assert written["ckpt_path"] == last
        assert torch.load("runs/other/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1

    def test_last_resumes_the_run(self, work):
        fit("source", "--ckpt_path", "last", "--trainer.max_epochs", "3")
        assert torch.load("runs/digits/source/checkpoints/last.ckpt", weights_only=True)["epoch"] == 2

    def test_last_without_a_file_is_an_error(self, work, fails):
        message = fails("fit", "--config", config("source"), "--name", "fresh", "--ckpt_path", "last")
        assert "there is no checkpoint runs/fresh/checkpoints/last.ckpt to resume from" in message


class TestCommand:
    def test_help_lists_everything(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        out = capsys.readouterr().out
        for name in COMMANDS:
            assert re.search(rf"^  {name} +[A-Z].*\.$", out, re.MULTILINE), name
        assert "Adapt a model to a stream" in out

    def test_help_of_an_adapter(self, capsys):
        with pytest.raises(SystemExit):
            main(["adapt", "--adapter.help", "Tent"])
        out = capsys.readouterr().out
        for option in ("lr", "steps", "reset", "prediction"):
            assert f"--adapter.{option}" in out or f"--adapter.init_args.{option}" in out

    def test_compare(self, work, capsys):
        for name in ("unadapted", "tent"):
            adapt(name)
        capsys.readouterr()
        main(["compare", "runs/digits/unadapted", "runs/digits/tent", "--output", "table"])
        out = capsys.readouterr().out
        assert out.index("stream PerDomain") < out.index("Source") < out.index("Tent")
        assert Path("table/table.md").is_file()

    def test_compare_refuses_another_stream(self, work, fails):
        adapt("unadapted")
        adapt("tent", "--data.limit", "20")
        assert "--different" in fails("compare", "runs/digits/unadapted", "runs/digits/tent")

    def test_compare_in_another_process(self, work):
        done = subprocess.run([sys.executable, "-m", "ttalight", "compare", "nowhere"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("ttalight compare: error: ")
