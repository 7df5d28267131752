"""``ttalight reproduce``: plans, states, tables."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ttalight.cli import main as ttalight_main
from ttalight.reporting.figures import can_plot
from ttalight.reproduce import command as command_module
from ttalight.reproduce import tables
from ttalight.reproduce.command import main
from ttalight.reproduce.configurations import configs_folder
from ttalight.reproduce.differences import differences
from ttalight.reproduce.estimate import probe
from ttalight.reproduce.jobs import execute, state
from ttalight.reproduce.plan import Job, Planner
from ttalight.reproduce.recipes import DATA, IN_TABLE, OTHER_DATA

QUIET = ["--trainer.enable_progress_bar", "false"]
TINY_FIT = [*QUIET, "--trainer.enable_model_summary", "false", "--trainer.limit_train_batches", "2"]
RATE = ["--images-per-second", "1000"]


@pytest.fixture(scope="module")
def command():
    """Runs the words in this process, on two training batches; keeps them."""

    class Command:
        def __init__(self) -> None:
            self.words: list[list[str]] = []

        def __call__(self, words: list[str]) -> int:
            self.words.append(words)
            try:
                ttalight_main([*words, *(TINY_FIT if words[0] == "fit" else QUIET)])
            except SystemExit as stop:
                return int(stop.code or 0)
            return 0

    return Command()


@pytest.fixture(scope="module")
def demo(command, tmp_path_factory):
    """The folder in which Table 1 and 6 of the demo have been made, and the table's own function."""
    folder = tmp_path_factory.mktemp("reproduce")

    def make(*words: str) -> None:
        main([*words, "--recipe", "demo", "--output", str(folder), *RATE], command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ttalight"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        make("--table", "1")
        make("--table", "6")
        yield folder / "demo" / "digits", make


def plan_of(table, recipe="paper", data="cifar10", **kwargs):
    return Planner(recipe, data, "runs/x", **kwargs).plan(table)


class TestPlans:
    @pytest.mark.parametrize("table", range(1, 7))
    @pytest.mark.parametrize(("recipe", "data"), [("paper", "cifar10"), ("small", "cifar100"), ("demo", "digits")])
    def test_what_a_job_reads_comes_before_it(self, table, recipe, data):
        seen: set[str] = set()
        for job in plan_of(table, recipe, data).jobs:
            assert set(job.reads) <= seen
            for other in job.reads:
                assert f"runs/x/{other}" in json.dumps(job.config)
            seen.add(job.name)

    def test_table_1_has_an_alignment_for_each_temperature(self):
        plan = plan_of(1)
        aligned = [job for job in plan.jobs if job.config["model"]["class_path"] == "AlignmentTask"]
        assert [job.config["model"]["init_args"]["temperature"] for job in aligned] == [
            0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
        ]  # fmt: skip
        assert len({job.config["model"]["init_args"]["supervised"] for job in aligned}) == 1

    def test_small_recipe_is_as_described(self):
        plan = plan_of(2, "small")
        for job in plan.jobs:
            if job.verb == "fit":
                assert job.config["trainer"]["max_epochs"] == 12
                assert job.config["data"]["init_args"]["validation"] == 25000
                assert job.config["model"]["init_args"]["encoder"] == "cifar_resnet20"
            elif job.verb == "adapt":
                data = job.config["data"]["init_args"]
                assert (data["limit"], len(data["domains"]), data["generate"]) == (500, 16, True)
        seeds = {row.label: len(row.jobs) for row in plan.rows}
        assert (seeds["CTA"], seeds["CTA-C"], seeds["aligned, EMABN"], seeds["ClusT3"]) == (3, 3, 3, 1)
        starts = {job.name: job.config["model"]["init_args"] for job in plan.jobs if job.verb == "fit"}
        assert (
            starts["rec_ttt"]["supervised"]
            == starts["ttt_plus_plus"]["supervised"]
            == ("runs/x/source/checkpoints/last.ckpt")
        )
        assert starts["clust3"]["pretrained"] == starts["nc_ttt"]["pretrained"] == "runs/x/encoder.pt"

    def test_lite0_recipe_trains_its_stages_from_the_given_file(self):
        plan = plan_of(2, "lite0", pretrained="lite0.pth")
        jobs = {job.name: job.config for job in plan.jobs if job.verb == "fit"}
        assert all(config["data"]["init_args"]["validation"] == 5000 for config in jobs.values())
        assert all(config["trainer"]["precision"] == "32-true" for config in jobs.values())
        starts = {name: config["model"]["init_args"].get("pretrained") for name, config in jobs.items()}
        assert {name for name, start in starts.items() if start != "lite0.pth"} == {"align", "probe"}
        epochs = {name: config["trainer"]["max_epochs"] for name, config in jobs.items()}
        assert epochs == dict.fromkeys(jobs, 20) | {"source": 10, "simclr": 10}

    def test_control_and_method_share_views_and_images(self):
        jobs = {job.name: job.config for job in plan_of(2).jobs}
        control, method = jobs["align_emabn_1"], jobs["cta_adapt_1"]
        assert control["model"] == method["model"]
        assert control["data"] == method["data"]
        assert control["seed_everything"] == method["seed_everything"] == 1
        for key in ("steps", "reset", "read_at"):
            assert control["adapter"]["init_args"][key] == method["adapter"]["init_args"][key]

    def test_variants_of_cta_change_one_stage_each(self):
        plain, plan = plan_of(2), plan_of(2, methods=("CTA", "CTA-unfrozen", "CTA-twins"))
        jobs = {job.name: job.config["model"]["init_args"] for job in plan.jobs}
        assert {job.name for job in plain.jobs if job.name in ("source", "simclr", "align")} <= jobs.keys()
        assert jobs["cta_unfrozen_align"] == jobs["align"] | {"freeze_teacher": False}
        assert jobs["simclr_barlow_twins"] == jobs["simclr"] | {"objective": "barlow_twins"}
        start = {"self_supervised": "runs/x/simclr_barlow_twins/checkpoints/last.ckpt"}
        assert jobs["cta_twins_align"] == jobs["align"] | start
        for name in ("cta_unfrozen", "cta_twins"):
            aligned = {"aligned": f"runs/x/{name}_align/checkpoints/last.ckpt"}
            assert jobs[f"{name}_adapt_1"] == jobs[f"{name}_align_emabn_1"] == jobs["cta_adapt_1"] | aligned
        assert [row.label for row in plan.rows][-4:] == [
            "CTA-unfrozen", "CTA-unfrozen, EMABN", "CTA-twins", "CTA-twins, EMABN",
        ]  # fmt: skip
        passes = {job.name: job.passes for job in plan.jobs}
        assert passes["cta_unfrozen_align"] == 1.5 * passes["align"]

    def test_budget_of_the_authors(self):
        jobs = {job.name: job.config for job in plan_of(2, budget="paper").jobs}
        assert jobs["clust3_paper"]["trainer"]["max_epochs"] == 350
        assert jobs["clust3_paper"]["data"]["init_args"]["batch_size"] == 128
        start = jobs["ttt_plus_plus_paper"]["model"]["init_args"]["supervised"]
        assert start.startswith("runs/x/ttt_plus_plus_source_paper/")
        assert jobs["probe"]["trainer"]["max_epochs"] == 50
        adapted = jobs["ttt_plus_plus_paper_adapt_0"]
        assert adapted["data"]["init_args"]["batch_size"] == 256
        assert adapted["model"]["init_args"]["queue"] == 1280
        assert (adapted["adapter"]["init_args"]["steps"], adapted["adapter"]["init_args"]["reset"]) == (1, "domain")
        assert jobs["ttt_plus_plus_paper"]["model"]["init_args"]["calibration_images"] == 256 + 1280

    def test_budgets_share_no_run_whose_configuration_differs(self):
        jobs: dict[str, object] = {}
        for budget in ("matched", "paper"):
            for job in plan_of(2, budget=budget, methods=("TTT", *IN_TABLE[2], "Y")).jobs:
                assert jobs.setdefault(job.name, job.config) == job.config

    @pytest.mark.parametrize("budget", ["matched", "paper"])
    def test_settings_of_other_data(self, budget):
        own = "" if budget == "matched" else "_paper"
        jobs = {job.name: job.config for job in plan_of(4, data="cifar100", methods=("TTT++",), budget=budget).jobs}
        adapted = jobs[f"ttt_plus_plus{own}_adapt_0"]
        task, optimizer = adapted["model"]["init_args"], adapted["adapter"]["init_args"]["optimizer"]
        assert (task["encoder_weight"], task["head_weight"], optimizer["init_args"]["lr"]) == (5.0, 20.0, 1.0e-4)
        if budget == "paper":
            together = jobs["ttt_plus_plus_paper"]["model"]["init_args"]["calibration_images"]
            assert adapted["data"]["init_args"]["batch_size"] + task["queue"] == together == 2048
        tiny = {job.name: job.config for job in plan_of(5, data="tiny_imagenet", budget=budget).jobs}
        trained = tiny[f"clust3{own}"]
        if budget == "paper":
            scheduler = trained["model"]["init_args"]["scheduler"]
            assert scheduler["class_path"].endswith("CosineAnnealingLR")
            assert scheduler["init_args"]["T_max"] == trained["trainer"]["max_epochs"]
        else:
            assert "scheduler" not in trained["model"]["init_args"]

    def test_every_setting_of_other_data_has_its_configuration(self):
        for data, files in OTHER_DATA.items():
            assert data in DATA
            for name, sections in files.items():
                config = yaml.safe_load((configs_folder() / f"{name}.yaml").read_text())
                assert sections.keys() <= config.keys()

    def test_other_data_change_classes_and_data_alone(self):
        first, other = (plan_of(4, data=data).jobs for data in ("cifar10", "tiny_imagenet"))
        for one, two in zip(first, other, strict=True):
            if one.verb == "export":
                continue
            assert two.config["model"]["init_args"].get("num_classes", 200) == 200
            assert two.config["data"]["class_path"] == "TinyImageNetDataModule"
            assert two.config["trainer"] == one.config["trainer"]
            assert two.config["data"]["init_args"]["batch_size"] == one.config["data"]["init_args"]["batch_size"]

    @pytest.mark.parametrize("name", ["nc_ttt", "ttt_plus_plus_paper_adapt_0", "cta_adapt_0"])
    def test_configurations_are_parsed(self, name, tmp_path, capsys):
        table, data, budget = (5, "tiny_imagenet", "matched") if name == "nc_ttt" else (2, "cifar10", "paper")
        job = next(job for job in plan_of(table, data=data, budget=budget).jobs if job.name == name)
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job.config))
        with pytest.raises(SystemExit) as stop:
            ttalight_main([job.verb, "--config", str(path), "--print_config"])
        assert stop.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["default_root_dir"] == f"runs/x/{name}"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"recipe": "small", "data": "digits"}, "the digits are the data of the recipe demo"),
            (
                {"recipe": "small", "data": "cifar10", "budget": "paper"},
                "the budget paper, .* belongs to the recipe paper",
            ),
            ({"recipe": "demo", "data": "digits", "budget": "paper"}, "belongs to the recipe paper: demo has a number"),
            ({"recipe": "paper", "data": "cifar10", "methods": ("CTAA",)}, "CTAA unknown, there are TTT, "),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Planner(root="x", **arguments)


class TestEstimate:
    def test_dry_run_counts_views_and_runs_nothing(self, tmp_path, capsys):
        words = ["--table", "1", "--recipe", "small", "--output", str(tmp_path / "runs"), "--dry-run"]
        main([*words, "--images-per-second", "25000"])
        out = capsys.readouterr().out
        assert not (tmp_path / "runs").exists()
        lines = {line.split()[3]: line.split()[4:6] for line in out.splitlines() if line.startswith("to do")}
        assert lines["source"] == ["12", "s"]  # 25,000 images, 12 epochs
        assert lines["simclr"] == ["24", "s"]
        assert "9 runs, about 1.8 min at 25,000 images/s" in out

    def test_estimates_of_methods(self):
        passes = {job.name: job.passes for job in plan_of(2, "small").jobs}
        assert passes["clust3"] == 5 * passes["source"]  # 150 assignments a position beside maps of 16 channels
        assert 10 < passes["clust3_adapt_0"] / passes["source_tent_0"] * 3 / 20 < 15
        assert passes["align_emabn_1"] < passes["cta_adapt_1"] / 2  # forwards alone
        larger = {job.name: job.passes for job in plan_of(2).jobs}
        assert larger["clust3"] == larger["nc_ttt"] == larger["source"]
        assert larger["rec_ttt_adapt_0"] / 2 > larger["nc_ttt_adapt_0"]  # ten steps, more passes than twenty

    def test_probe_is_a_rate(self):
        assert probe(plan_of(1, "demo", "digits"), seconds=0.1) > 1


@pytest.mark.slow
class TestRuns:
    def test_table_1(self, demo):
        text = (demo[0] / "table1.md").read_text()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert [line.split("|")[1].strip() for line in lines[2:]] == ["supervised", "aligned, τ 0.25", "aligned, τ 0.5"]
        rows = json.loads((demo[0] / "align_0.25_source_0" / "results.json").read_text())["domains"]
        clean, corrupted = 100 * rows[0]["accuracy"], 100 * sum(row["accuracy"] for row in rows[1:]) / 2
        assert lines[3].split("|")[2].strip() == f"{clean:.2f}"
        assert lines[3].split("|")[4].strip() == f"{corrupted:.2f}"
        assert "network cifar_resnet8 here, resnet50 there" in text
        assert "not finished" not in text

    def test_the_page_has_every_table_and_figure(self, demo):
        page = (demo[0] / "report.html").read_text()
        assert "<h2>Table 1, digits</h2>" in page
        assert "<h2>Table 6, digits</h2>" in page
        line = next(
            line for line in (demo[0] / "table1.md").read_text().splitlines() if line.startswith("| supervised")
        )
        assert "".join(f"<td>{cell}</td>" for cell in line[2:-2].split(" | ")) in page
        drawn = sorted(path.stem for path in demo[0].glob("*.svg"))
        assert page.count("<svg") == len(drawn)
        if can_plot():
            assert "table1" in drawn
            assert (demo[0] / "table1.png").exists()
            assert "Table 1: accuracy against the temperature" in page
        assert not re.search(r"(src|href)=\"(?!#)|@import|<script", page)

    def test_table_6_and_its_figure(self, demo):
        text = (demo[0] / "table6.md").read_text()
        geometry = json.loads((demo[0] / "joint_adapt_0" / "geometry.json").read_text())["mean"]
        first = next(row for row in geometry if (row["place"], row["steps"]) == ("projector", 0))
        assert f"| Y projector | {first['davies_bouldin']:.2f} | 5.64 |" in text
        assert "| distance to supervised | CTA projector |" in text
        if (demo[0] / "figure2.png").exists():
            assert (demo[0] / "figure2.svg").exists()

    def test_a_finished_table_runs_nothing(self, demo, command):
        before = len(command.words)
        demo[1]("--table", "1")
        assert len(command.words) == before

    def test_table_2_shares_what_is_there(self, demo, command):
        root, make = demo
        before = len(command.words)
        make("--table", "2", "--methods", "CTA", "--report")
        assert len(command.words) == before
        assert "| CTA |" in (root / "table2.md").read_text()
        assert "not finished: source_ptbn_0" in (root / "table2.md").read_text()
        make("--table", "2", "--methods", "CTA")
        new = [Path(words[2]).stem for words in command.words[before:]]
        assert new == ["source_ptbn_0", "source_tent_0", "align_ptbn_0", "align_emabn_0", "align_emabn_1"]
        text = (root / "table2.md").read_text()
        line = next(line for line in text.splitlines() if line.startswith("| CTA |"))
        assert "±" in line
        assert "oracle" not in text
        make("--table", "2", "--methods", "CTA", "--report", "--oracle")
        assert "| CTA (oracle: best steps by test accuracy) |" in (root / "table2.md").read_text()

    def test_states(self, demo, tmp_path):
        root, _ = demo
        plan = {job.name: job for job in Planner("demo", "digits", root).plan(1).jobs}
        assert state(plan["source"], root) == "done"
        longer = plan["source"].config["trainer"] | {"max_epochs": 5}
        job = Job("source", "fit", plan["source"].config | {"trainer": longer}, 0.0)
        with pytest.raises(ValueError, match="was run with another configuration than this plan"):
            state(job, root)
        (root / "plans" / "source.yaml").write_text(yaml.safe_dump(job.config))
        assert state(job, root) == "unfinished"
        (root / "plans" / "source.yaml").write_text(yaml.safe_dump(plan["source"].config, sort_keys=False))
        assert state(plan["source"], tmp_path) == "to do"

    def test_a_run_that_started_from_a_file_that_changed_is_repeated(self, demo, tmp_path):
        root = tmp_path / "digits"
        shutil.copytree(demo[0], root)
        for path in (root / "plans").glob("*.yaml"):
            path.write_text(path.read_text().replace(str(demo[0]), str(root)))
        jobs = {job.name: job for table in (1, 6) for job in Planner("demo", "digits", root).plan(table).jobs}
        assert {state(job, root) for job in jobs.values()} == {"done"}

        source = root / "source" / "checkpoints" / "last.ckpt"
        content = torch.load(source)
        content["state_dict"]["classifier.bias"] += 1
        torch.save(content, source)
        states = {name: state(job, root) for name, job in jobs.items()}
        assert {name for name, found in states.items() if found == "outdated"} == {
            "source_source_0", "align_0.25", "align", "encoder.pt", "cta_adapt_0", "cta_adapt_1",
        }  # fmt: skip
        assert {found for found in states.values() if found != "outdated"} == {"done"}

        execute(jobs["encoder.pt"], root, None)
        assert state(jobs["encoder.pt"], root) == "done"
        assert state(jobs["joint"], root) == "done"  # the encoder was the same
        (root / "encoder.pt").write_bytes(b"another")
        assert state(jobs["joint"], root) == "outdated"
        seen = []
        with pytest.raises(RuntimeError, match="stopped with code 7"):
            execute(jobs["align"], root, lambda words: seen.append(words) or 7)
        assert seen[0][-1] == "--overwrite"
        assert state(jobs["align"], root) == "to do"  # not done: the old run is out of the way

    def test_after_damage_the_checkpoint_before_is_resumed(self, demo, tmp_path):
        job = next(job for job in Planner("demo", "digits", tmp_path).plan(1).jobs if job.name == "source")
        folder = tmp_path / "source" / "checkpoints"
        shutil.copytree(demo[0] / "source" / "checkpoints", folder)
        last, previous = folder / "last.ckpt", folder / "previous.ckpt"
        assert state(job, tmp_path) == "done"
        assert previous.is_file()
        last.write_bytes(last.read_bytes()[:1000])
        assert state(job, tmp_path) == "unfinished"
        last.unlink()
        assert state(job, tmp_path) == "unfinished"
        seen = []
        with pytest.raises(RuntimeError, match="stopped with code 7"):
            execute(job, tmp_path, lambda words: seen.append(words) or 7)
        assert seen[0][-2:] == ["--ckpt_path", "last"]
        previous.write_bytes(b"")
        with pytest.raises(ValueError, match=r"source has no whole checkpoint: take .*source away"):
            state(job, tmp_path)

    def test_a_stopped_adaptation_is_resumed(self, demo, tmp_path):
        job = next(job for job in Planner("demo", "digits", tmp_path).plan(1).jobs if job.verb == "adapt")
        run = tmp_path / job.name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("")
        seen = []
        with pytest.raises(RuntimeError, match="stopped with code 7: the same command resumes it"):
            execute(job, tmp_path, lambda words: seen.append(words) or 7)
        assert seen[0][-2:] == ["--resume", str(run)]


def test_fit_only_leaves_the_adaptation_out(tmp_path):
    seen = []
    words = ["--table", "2", "--methods", "CTA", "--recipe", "lite0", "--fit-only", "--output", str(tmp_path), *RATE]
    main(words, lambda words: seen.append(words) or 0)
    assert [(words[0], Path(words[2]).stem) for words in seen] == [
        ("fit", "source"),
        ("fit", "simclr"),
        ("fit", "align"),
    ]


def test_table_3_needs_no_run_and_agrees_with_the_paper(tmp_path, capsys):
    main(["--table", "3", "--output", str(tmp_path)])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 8
    for setting, *cells in lines:
        training, supervised, simclr, alignment, here = (cell.strip() for cell in cells)
        assert alignment == here
        assert training == simclr
        assert setting.strip() == "temperature" or supervised == training


def test_published_numbers_of_table_2_have_their_rows():
    plan = plan_of(2)
    means = {row.label: tables._published(plan, row) for row in plan.rows}
    assert means["CTA-C"][1] == pytest.approx(82.94)
    assert sum(means["CTA-C"][0].values()) / 15 == pytest.approx(82.94, abs=0.006)
    assert [label for label, found in means.items() if found is None] == [
        "PTBN", "Tent", "aligned, PTBN", "aligned, EMABN",
    ]  # fmt: skip


class TestNotes:
    def test_differences_of_the_small_recipe_are_those_of_its_configurations(self):
        text = "\n".join(differences(plan_of(2, "small")))
        for found in (
            "network cifar_resnet20 here, resnet50 there;",
            "crops padded here, resized there (source)",
            "learning rate 0.001 here, 0.0005 there in training",
            "temperature 0.1 here, 0.01 there (simclr)",
            "precision bf16-mixed here, 32-true there at test time",
            "images of a corruption 500 here, 10000 there at test time",
            "learning rate at test time 0.0001 here, 1e-06 there (probe_adapt, cta_adapt)",
            "start 12 epochs of the supervised stage here, ImageNet there (ttt_plus_plus, clust3, nc_ttt, rec_ttt)",
            "runs 1 here, 3 there (TTT++, ClusT3, NC-TTT, ReC-TTT)",
        ):
            assert found in text
        for alike in ("warmup", "final_lr", "crop scale", "validation", "channels_last"):
            assert alike not in text

    @pytest.mark.parametrize(("table", "data"), [(2, "cifar10"), (5, "tiny_imagenet")])
    def test_the_recipe_paper_names_what_is_known_to_differ(self, table, data):
        text = "\n".join(differences(plan_of(table, data=data, budget="paper")))
        assert "differs from the recipe paper" not in text
        assert ("TTT++ has batches of 256, steps 1 and reset domain; the published run passes" in text) == (table == 2)
        assert "ReC-TTT has steps 10; the published number is the best of several by test accuracy" in text
        assert "NC-TTT projects to 128 channels" in text
        assert "precision of training (bf16-mixed), precision at test time (32-true), optimizer at test time" in text

    def test_generated_corruptions_are_a_difference(self):
        text = "\n".join(differences(plan_of(1, generate=True)))
        assert "in corrupted images made from clean ones here, published files there at test time\n" in text

    def test_controls_are_the_rows_that_no_method_has(self):
        notes = list(tables._notes(plan_of(2, methods=("TTT", "CTA", "CTA-unfrozen")), set()))
        controls = next(note for note in notes if note.startswith("controls: "))
        assert controls.startswith(
            "controls: PTBN; Tent; aligned, PTBN; aligned, EMABN; CTA-unfrozen, EMABN. EMABN has"
        )
        assert "no published numbers: TTT, CTA-unfrozen" in notes


def test_budgets_have_tables_of_their_own(tmp_path):
    for budget in ("matched", "paper"):
        main(["--table", "2", "--budget", budget, "--report", "--output", str(tmp_path)])
    root = tmp_path / "paper" / "cifar10"
    assert (root / "table2.md").read_text().startswith("# Table 2, cifar10\n")
    assert (root / "table2_paper.md").read_text().startswith("# Table 2, cifar10, budget paper\n")
    page = (root / "report.html").read_text()
    assert page.index("<h2>Table 2, cifar10</h2>") < page.index("<h2>Table 2, cifar10, budget paper</h2>")


class TestConfigurations:
    def test_those_in_the_package_come_first(self, tmp_path):
        package = tmp_path / "ttalight"
        package.mkdir()
        with pytest.raises(FileNotFoundError, match=f"there is no folder configs in {package} or beside it; install"):
            configs_folder(package)
        for place in (tmp_path, package):
            (place / "configs" / "cifar10_matched").mkdir(parents=True)
            assert configs_folder(package) == place / "configs"

    def test_this_package_has_them(self):
        assert (configs_folder() / "digits" / "source.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--table", "7"], 2, "table: expected one of 1, 2, 3, 4, 5, 6; got 7"),
        (["--table", "1", "--images-per-second", "0"], 2, "--images-per-second must be positive, got 0.0"),
        (["--table", "4", "--data", "cifar10"], 1, "Table 4 is of cifar100: leave --data out, got cifar10"),
        (["--table", "2", "--methods", "CTAA"], 1, "--methods: CTAA unknown, there are TTT, TTT++, ClusT3, "),
    ],
)
def test_an_error_is_one_line(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ttalight_main(["reproduce", *words])
    assert stop.value.code == code
    found = capsys.readouterr().err
    assert found.startswith(f"ttalight: error: {message}")
    assert found.count("\n") == 1


def test_a_run_that_fails_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command_module, "_subprocess", lambda words: 3)
    with pytest.raises(SystemExit) as stop:
        ttalight_main(["reproduce", "--table", "1", "--recipe", "demo", "--output", str(tmp_path), *RATE])
    assert stop.value.code == 1
    assert capsys.readouterr().err == ("ttalight: error: fit source stopped with code 3: the same command resumes it\n")
