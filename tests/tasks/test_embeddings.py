"""Saved embeddings in the place of images: the file, the stream, the task, and training of the projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ttalight import Trainer
from ttalight.adapters import TDA, Source, Tent
from ttalight.cli import main
from ttalight.data import Continual, EmbeddingsDataModule, Gradual, save_embeddings
from ttalight.tasks import EmbeddingTask, VisionLanguageTask

CLASSES, WIDTH, COUNT = 10, 6, 24


@pytest.fixture
def content():
    torch.manual_seed(3)
    texts, labels = torch.randn(CLASSES, WIDTH), torch.arange(COUNT) % CLASSES
    return {
        "image_features": texts[labels] + torch.randn(COUNT, WIDTH),
        "labels": labels,
        "domain": torch.arange(COUNT) % 2,
        "domains": [["clean", 0], ["fog", 5]],
        "text_features": texts,
        "names": list("abcdefghij"),
    }


@pytest.fixture
def file(content, tmp_path):
    torch.save(content, tmp_path / "saved.pt")
    return str(tmp_path / "saved.pt")


@pytest.fixture
def trainer(tmp_path):
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path / "run")


class TestData:
    def test_domains_of_the_file(self, file, content):
        data = EmbeddingsDataModule(file, batch_size=5, limit=7)
        data.setup("test")
        features, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
        expected = [2 * sample + domain for sample, domain in zip(data.stream.sample, 7 * [0] + 7 * [1], strict=True)]
        assert sorted(expected[:7]) == [0, 2, 4, 6, 8, 10, 12]
        assert torch.equal(features, content["image_features"][expected])
        assert torch.equal(labels, content["labels"][expected])
        assert [(domain.name, domain.severity) for domain in data.stream.domains] == [("clean", 0), ("fog", 5)]
        assert (data.num_classes, data.domains) == (CLASSES, ("clean", "fog"))

    def test_other_streams(self, file):
        data = EmbeddingsDataModule(file, domains=["fog"], stream=Continual(rounds=2))
        data.setup("test")
        assert [visit.number for visit in data.stream.visits] == [0, 1]
        data = EmbeddingsDataModule(file, domains=["fog"], stream=Gradual())
        with pytest.raises(ValueError, match=r"Gradual asks for fog at 1, fog at 2, .* which .* has not"):
            data.setup("test")

    def test_samples_held_out(self, file, content):
        data = EmbeddingsDataModule(file, validation=4)
        data.setup("fit")
        assert (len(data.train_set), len(data.validation_set)) == (COUNT - 4, 4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"image_features": torch.ones(3)},
                r"image_features must be a matrix \(N, D\), got torch.float32 of shape",
            ),
            ({"labels": torch.ones(3).long()}, "labels must be 24 whole numbers, one for each image"),
            ({"domain": torch.arange(COUNT)}, "domain numbers the 2 domains from 0, got 0 to 23"),
            ({"domains": ["clean", "fog"]}, r"domains must be a list of \[name, severity\]"),
            ({"domains": [["fog", 5], ["fog", 5]]}, "the same name and severity twice"),
        ],
    )
    def test_other_content(self, change, message, content, tmp_path):
        torch.save(content | change, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message):
            EmbeddingsDataModule(str(tmp_path / "other.pt"))

    def test_other_files(self, file, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file of embeddings"):
            EmbeddingsDataModule(str(tmp_path / "none.pt"))
        torch.save(nn.Linear(2, 2), tmp_path / "code.pt")
        with pytest.raises(ValueError, match="no readable file of tensors and plain values"):
            EmbeddingsDataModule(str(tmp_path / "code.pt"))
        with pytest.raises(ValueError, match="has no domain snow: it has clean, fog"):
            EmbeddingsDataModule(file, domains=["snow"])

    def test_without_domains_and_labels(self, content, tmp_path, trainer):
        content = {name: content[name] for name in ("image_features", "text_features")}
        torch.save(content, tmp_path / "bare.pt")
        path = str(tmp_path / "bare.pt")
        results = trainer.adapt(EmbeddingTask(path), EmbeddingsDataModule(path), Source())
        assert [row["name"] for row in results["domains"]] == ["clean"]
        assert results["mean"]["accuracy"] is None


class TestAdaptation:
    def test_is_that_on_images(self, make_data, trainer, tmp_path):
        torch.manual_seed(0)
        tower = nn.Sequential(nn.Conv2d(3, WIDTH, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        task = VisionLanguageTask(torch.randn(CLASSES, WIDTH), image_tower=tower, mean=[0, 0, 0], std=[1, 1, 1])
        data, path = make_data(domains=["clean", "contrast"], limit=20, batch_size=8), str(tmp_path / "saved.pt")
        save_embeddings(task, data, path)
        saved = EmbeddingsDataModule(path, batch_size=8)
        assert saved.embeddings.domains == [("clean", 0), ("contrast", 5)]
        of_images = trainer.adapt(task, data, TDA())
        of_features = trainer.adapt(EmbeddingTask(path), saved, TDA(), overwrite=True)
        for images, features in zip(of_images["domains"], of_features["domains"], strict=True):
            assert features["accuracy"] == images["accuracy"]
            assert features["nll"] == pytest.approx(images["nll"], rel=1e-4)
        assert of_features["protocol"]["embeddings"] == saved.embeddings.sha256
        save_embeddings(task, data, path, split="validation")
        assert torch.equal(EmbeddingsDataModule(path).embeddings.labels, data.load("validation").labels)

    def test_of_norms_says_what_is_missing(self, file, trainer):
        with pytest.raises(ValueError, match="EmbeddingTask has no BatchNorm"):
            trainer.adapt(EmbeddingTask(file), EmbeddingsDataModule(file), Tent())

    def test_of_images_says_what_to_use(self, file, make_data, trainer):
        with pytest.raises(TypeError, match=r"expected saved features \(B, D\), got shape .* VisionLanguageTask"):
            trainer.adapt(EmbeddingTask(file), make_data(domains=["clean"]), Source())

    def test_by_the_command(self, file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words = "adapt --model EmbeddingTask --data EmbeddingsDataModule --adapter TDA --name saved".split()
        main([*words, "--model.text_features", file, "--data.file", file, "--trainer.enable_progress_bar", "false"])
        assert (tmp_path / "runs" / "saved" / "results.json").exists()


class TestTraining:
    def test_loss_is_the_cross_entropy_of_cosines(self, file, content):
        task = EmbeddingTask(file, scale=7.0, features=WIDTH)
        task.log = lambda *args, **kwargs: None
        features, labels = content["image_features"], content["labels"]
        loss = task.training_step((features, labels), 0)
        cosines = F.cosine_similarity(task.projection(features)[:, None], content["text_features"][None], dim=2)
        expected = -(7.0 * cosines).log_softmax(1)[torch.arange(COUNT), labels].mean()
        torch.testing.assert_close(loss, expected)

    def test_trains_the_projection_alone_and_its_file_is_one(self, file, content, tmp_path):
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=30,
            default_root_dir=tmp_path,
        )  # fmt: skip
        task = EmbeddingTask(file, scale=10.0, features=WIDTH, lr=0.05, warmup_epochs=1)
        rows, features = task.classifier.weight.clone(), content["image_features"]
        before = F.cross_entropy(task(features), content["labels"])
        data = EmbeddingsDataModule(file, batch_size=8)
        trainer.fit(task, data)
        assert torch.equal(task.classifier.weight, rows)
        assert F.cross_entropy(task(features), content["labels"]) < before / 3
        trainer.save_checkpoint(tmp_path / "projection.ckpt")
        read = VisionLanguageTask(
            file, image_tower=nn.Identity(), projection=str(tmp_path / "projection.ckpt"), scale=10.0
        )
        torch.testing.assert_close(read.classifier(F.normalize(read.projection(features), dim=1)), task(features))
        assert torch.equal(
            EmbeddingTask(file, projection=str(tmp_path / "projection.ckpt"), scale=10.0)(features), task(features)
        )

    def test_without_a_projection(self, file, trainer):
        with pytest.raises(ValueError, match="there is no projection to train"):
            trainer.fit(EmbeddingTask(file), EmbeddingsDataModule(file))
        for arguments in ({"features": 0}, {"features": 3, "projection": torch.eye(WIDTH)}):
            with pytest.raises(ValueError, match="features"):
                EmbeddingTask(file, **arguments)

    def test_a_bias_of_another_length(self, file):
        torch.save({"weight": torch.eye(WIDTH), "bias": torch.ones(2)}, file + ".projection")
        with pytest.raises(ValueError, match="a bias of 2 numbers does not fit 6 dimensions"):
            EmbeddingTask(file, projection=file + ".projection")
