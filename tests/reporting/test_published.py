"""Published numbers and the runs they fit."""

from __future__ import annotations

import statistics

import pytest

from ttalight.cli import main
from ttalight.data.corruptions import COMMON
from ttalight.reporting.compare import compare
from ttalight.reporting.published import published_rows
from ttalight.reporting.published.rows import FIELDS

CTA = {"network": "resnet50", "model": "CrossTaskTTT"}


@pytest.fixture
def make_cifar(make_run, make_domain):
    """Write a run on CIFAR-10-C; keys of the result file that tests of comparing do not have are added."""

    def write(name, method, accuracies, network="resnet50", model="SupervisedTask", data="cifar10", **protocol):
        rows = [make_domain(domain, value, samples=10000) for domain, value in accuracies.items()]
        settings = {"samples": 10000 * len(rows), "data": data, **protocol}
        return make_run(name, method, domains=rows, extra={"network": network, "model": model}, **settings)

    return write


def found(text: str) -> str:
    return " ".join(text.split("published beside measured:")[1].split())


class TestRows:
    def test_every_row_is_in_range_with_a_source(self):
        rows = published_rows()
        assert len(rows) > 100
        for row in rows:
            assert 0 < row.mean < 1
            assert row.source.count("arXiv") == 1
            assert row.protocol.keys() <= set(FIELDS)
            assert row.protocol["network"]
            assert set(row.accuracy) <= set(COMMON)

    def test_printed_means_are_those_of_the_printed_values(self):
        """Every table with values rounds its mean to one or two digits."""
        rows = [row for row in published_rows() if row.accuracy]
        assert len(rows) >= 19
        for row in rows:
            assert len(row.accuracy) == len(row.domains) == 15
            assert statistics.fmean(row.accuracy.values()) == pytest.approx(row.mean, abs=0.00051), row

    def test_some_numbers_of_the_papers(self):
        (cta,) = [row for row in published_rows() if row.label == "CTA" and "cifar10" in row.data]
        assert (cta.mean, cta.accuracy["jpeg_compression"], cta.protocol["steps"]) == (0.8742, 0.8181, 20)
        tent = [row for row in published_rows() if row.label == "tent" and row.protocol["network"] == "cifar_wrn28_10"]
        assert tent[0].accuracy["gaussian_noise"] == pytest.approx(1 - 0.248)

    def test_unadapted_row_has_no_method_settings(self):
        assert not any("reset" in row.protocol for row in published_rows() if row.method == "Source")

    def test_no_row_is_there_twice(self):
        keys = [(row.label, row.source, tuple(row.data), str(row.protocol)) for row in published_rows()]
        assert len(set(keys)) == len(keys)


class TestMatch:
    def test_names_every_field_that_differs(self, make_cifar):
        settings = dict(reset="batch", prediction="after", batch_size=64, steps=10, lr=1e-6, norm="ema")
        run = make_cifar("cta", "TestTimeTraining", dict.fromkeys(COMMON, 0.5), **CTA, **settings)
        text = found(compare([run], published=True))
        assert "TestTimeTraining against CTA, Barbeau et al. 2025" in text
        assert "arXiv 2507.05221, Table 2: differs in batch_size 64 here, 128 there; steps 10 here, 20 there;" in text
        assert "not stated: optimizer, norm, seeds" in text
        assert "87.42" in text
        assert "50.00" in text

    def test_says_if_nothing_differs(self, make_cifar):
        settings = dict(reset="batch", prediction="after", batch_size=128, steps=20, lr=1e-6, norm="ema")
        run = make_cifar("cta", "TestTimeTraining", dict.fromkeys(COMMON, 0.5), **CTA, **settings)
        assert "Table 2: does not differ in what is stated; not stated:" in found(compare([run], published=True))

    def test_mean_over_the_domains_of_both(self, make_cifar):
        run = make_cifar("cta", "TestTimeTraining", {"gaussian_noise": 0.5, "fog": 0.6, "clean": 0.9}, **CTA)
        text = found(compare([run], published=True))
        assert "domains 3 (2 of the published) here, 15 there" in text
        assert "TestTimeTraining 55.00 50.00 60.00" in text
        assert "87.01" in text  # of 83.09 and 90.93
        assert "87.42" not in text

    def test_errors(self, make_cifar):
        run = make_cifar("cta", "TestTimeTraining", dict.fromkeys(COMMON, 0.9), **CTA)
        text = found(compare([run], metric="error", published=True))
        assert text.startswith("error in %")
        assert "12.58" in text

    def test_nearest_protocols_come_first(self, make_cifar):
        run = make_cifar(
            "tent", "Tent", dict.fromkeys(COMMON, 0.8), network="cifar_wrn28_10", stream="Mixed", reset="never",
            batch_size=200,
        )  # fmt: skip
        text = found(compare([run], published=True))
        assert text.index("mixed domains, CIFAR-10-C") < text.index("continual, CIFAR-10-C")
        assert text.count("Tent against") == 3

    @pytest.mark.parametrize("replaced", [{"data": "cifar100"}, {"data": "DigitsDataModule"}, {"method": "Nobody"}])
    def test_other_data_or_methods_do_not_fit(self, make_cifar, replaced):
        settings = {"method": "TestTimeTraining", **CTA, **replaced}
        run = make_cifar("run", accuracies={"fog": 0.5}, **settings)
        text = compare([run], published=True)
        if replaced == {"data": "cifar100"}:
            assert "Table 4" in found(text)
            assert "87.42" not in text
        else:
            assert f"nothing published that fits: {settings['method']}" in text
            assert "published beside measured" not in text

    def test_the_aligned_model_is_not_the_supervised_one(self, make_cifar):
        aligned = make_cifar("aligned", "Source", dict.fromkeys(COMMON, 0.7), model="CrossTaskTTT")
        assert "71.73" in found(compare([aligned], published=True))
        assert "65.99" not in found(compare([aligned], published=True))

    def test_a_mean_over_other_domains_does_not_fit(self, make_cifar):
        run = make_cifar("tps", "TPS", {"imagenet_r": 0.6}, data="ImageNetDataModule", model="VisionLanguageTask")
        text = found(compare([run], published=True))
        assert "natural shifts (read in" in text
        assert "domains 1 (1 of the published) here, 4 there" in text
        assert "27.43" not in text

    def test_a_file_that_does_not_name_its_data(self, make_run):
        text = compare([make_run("tent")], published=True)
        assert "nothing published that fits: Tent" in text


def test_command_writes_them_to_all_files(make_cifar, tmp_path, capsys):
    run = make_cifar("cta", "TestTimeTraining", dict.fromkeys(COMMON, 0.5), **CTA)
    main(["compare", run, "--published", "--output", str(tmp_path / "out")])
    for text in (
        capsys.readouterr().out,
        (tmp_path / "out" / "table.md").read_text("utf-8"),
        (tmp_path / "out" / "table.html").read_text("utf-8"),
    ):
        assert "87.42" in text
        assert "differs in batch_size 64 here, 128 there" in " ".join(text.split())
