"""Plans of ``ttalight reproduce``: configurations, and the time that runs take."""

from __future__ import annotations

import json

import pytest
import yaml

from ttalight.cli import main as ttalight_main
from ttalight.reproduce.command import main
from ttalight.reproduce.configurations import configs_folder
from ttalight.reproduce.estimate import probe
from ttalight.reproduce.plan import Planner
from ttalight.reproduce.recipes import DATA, IN_TABLE, OTHER_DATA


class TestPlans:
    @pytest.mark.parametrize("table", range(1, 7))
    @pytest.mark.parametrize(("recipe", "data"), [("paper", "cifar10"), ("small", "cifar100"), ("demo", "digits")])
    def test_what_a_job_reads_comes_before_it(self, plan_of, table, recipe, data):
        seen: set[str] = set()
        for job in plan_of(table, recipe, data).jobs:
            assert set(job.reads) <= seen
            for other in job.reads:
                assert f"runs/x/{other}" in json.dumps(job.config)
            seen.add(job.name)

    def test_table_1_has_an_alignment_for_each_temperature(self, plan_of):
        plan = plan_of(1)
        aligned = [job for job in plan.jobs if job.config["model"]["class_path"] == "AlignmentTask"]
        assert [job.config["model"]["init_args"]["temperature"] for job in aligned] == [
            0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
        ]  # fmt: skip
        assert len({job.config["model"]["init_args"]["supervised"] for job in aligned}) == 1

    def test_small_recipe_is_as_described(self, plan_of):
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

    def test_lite0_recipe_starts_from_the_given_file(self, plan_of):
        plan = plan_of(2, "lite0", pretrained="lite0.pth")
        jobs = {job.name: job.config for job in plan.jobs if job.verb == "fit"}
        assert all(config["data"]["init_args"]["validation"] == 5000 for config in jobs.values())
        assert all(config["trainer"]["precision"] == "32-true" for config in jobs.values())
        starts = {name: config["model"]["init_args"].get("pretrained") for name, config in jobs.items()}
        assert {name for name, start in starts.items() if start != "lite0.pth"} == {"align", "probe"}
        epochs = {name: config["trainer"]["max_epochs"] for name, config in jobs.items()}
        assert epochs == dict.fromkeys(jobs, 20) | {"source": 8, "simclr": 5, "align": 4}

    def test_control_and_method_share_views_and_images(self, plan_of):
        jobs = {job.name: job.config for job in plan_of(2).jobs}
        control, method = jobs["align_emabn_1"], jobs["cta_adapt_1"]
        assert control["model"] == method["model"]
        assert control["data"] == method["data"]
        assert control["seed_everything"] == method["seed_everything"] == 1
        for key in ("steps", "reset", "read_at"):
            assert control["adapter"]["init_args"][key] == method["adapter"]["init_args"][key]

    def test_variants_of_cta_change_one_stage_each(self, plan_of):
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

    def test_budget_of_the_authors(self, plan_of):
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

    @pytest.mark.parametrize(("recipe", "budget"), [("paper", "matched"), ("paper", "paper"), ("small", "matched")])
    def test_a_flow_is_trained_on_a_supervised_stage(self, plan_of, recipe, budget):
        own, start = ("_paper", "ttt_flow_source_paper") if budget == "paper" else ("", "source")
        plan = plan_of(2, recipe, budget=budget, methods=("TTTFlow",))
        job = next(job for job in plan.jobs if job.name == f"ttt_flow{own}")
        assert job.reads == (start,)
        assert job.config["model"]["init_args"]["supervised"] == f"runs/x/{start}/checkpoints/last.ckpt"
        assert plan.rows[-1].jobs[0] == f"ttt_flow{own}_adapt_0"
        assert job.passes > 0

    def test_masked_autoencoder_has_a_transformer(self, plan_of):
        plan = plan_of(2, "small", methods=("TTT-MAE",))
        jobs = {job.name: job for job in plan.jobs}
        names = ("masked_ttt_source", "masked_ttt", "masked_ttt_adapt_0")
        first, second, adapted = (jobs[name].config["model"]["init_args"] for name in names)
        assert (first["encoder"], second["encoder"], adapted["encoder"]) == ("cifar_vit4",) * 3
        assert second["autoencoder"] == f"runs/x/{names[0]}/checkpoints/last.ckpt"
        assert jobs[names[2]].passes > 20 * 128 * 500 * 16
        with pytest.raises(ValueError, match="TTT-MAE are for images of 32 pixels, tiny_imagenet has others"):
            plan_of(5, data="tiny_imagenet", methods=("TTT-MAE",))

    def test_budgets_share_equal_runs_only(self, plan_of):
        jobs: dict[str, object] = {}
        for budget in ("matched", "paper"):
            for job in plan_of(2, budget=budget, methods=("TTT", "TTT-MAE", *IN_TABLE[2], "Y", "TTTFlow")).jobs:
                assert jobs.setdefault(job.name, job.config) == job.config

    @pytest.mark.parametrize("budget", ["matched", "paper"])
    def test_settings_of_other_data(self, plan_of, budget):
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

    def test_other_data_have_configurations(self):
        for data, files in OTHER_DATA.items():
            assert data in DATA
            for name, sections in files.items():
                config = yaml.safe_load((configs_folder() / f"{name}.yaml").read_text())
                assert sections.keys() <= config.keys()

    def test_other_data_change_classes_and_data_alone(self, plan_of):
        first, other = (plan_of(4, data=data).jobs for data in ("cifar10", "tiny_imagenet"))
        for one, two in zip(first, other, strict=True):
            if one.verb == "export":
                continue
            assert two.config["model"]["init_args"].get("num_classes", 200) == 200
            assert two.config["data"]["class_path"] == "TinyImageNetDataModule"
            assert two.config["trainer"] == one.config["trainer"]
            assert two.config["data"]["init_args"]["batch_size"] == one.config["data"]["init_args"]["batch_size"]

    @pytest.mark.parametrize("name", ["nc_ttt", "ttt_plus_plus_paper_adapt_0", "cta_adapt_0"])
    def test_configurations_are_parsed(self, plan_of, name, tmp_path, capsys):
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

    def test_estimates_of_methods(self, plan_of):
        passes = {job.name: job.passes for job in plan_of(2, "small").jobs}
        assert passes["clust3"] == 5 * passes["source"]  # 150 assignments a position beside maps of 16 channels
        assert 10 < passes["clust3_adapt_0"] / passes["source_tent_0"] * 3 / 20 < 15
        assert passes["align_emabn_1"] < passes["cta_adapt_1"] / 2  # forwards alone
        larger = {job.name: job.passes for job in plan_of(2).jobs}
        assert larger["clust3"] == larger["nc_ttt"] == larger["source"]
        assert larger["rec_ttt_adapt_0"] / 2 > larger["nc_ttt_adapt_0"]  # ten steps, more passes than twenty

    def test_probe_is_a_rate(self, plan_of):
        assert probe(plan_of(1, "demo", "digits"), seconds=0.1) > 1


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
