"""Vision-language tasks that compute text features from class names: towers by name, files, caches, results."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.vision_language import NAMES, tiny_clip, tokenize

from ttalight.adapters import Source, Tent
from ttalight.models import ensemble_text_features
from ttalight.tasks import VisionLanguageTask

open_clip = pytest.importorskip("open_clip")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*runs with its settings for CIFAR", "ignore:.*source", "ignore:.*small"
)
CONFIG = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "layers": 1, "width": 8, "head_width": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture
def model():
    return tiny_clip()


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def named(tmp_path):
    """Register a small architecture, and return its name."""
    (tmp_path / "tiny-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    return "tiny-test"


def make(model, **arguments):
    return VisionLanguageTask(image_tower=model, class_names=NAMES, tokenizer=tokenize, **arguments).double().eval()


class TestTowersInPython:
    def test_logits_are_those_of_the_model(self, model, images):
        task = make(model, templates=["a photo of a {}.", "a drawing of a {}."])
        texts = [[f"a {kind} of a {name}." for name in NAMES] for kind in ("photo", "drawing")]
        rows = ensemble_text_features(torch.stack([model.encode_text(tokenize(each)) for each in texts]))
        features = torch.nn.functional.normalize(model.encode_image(images), dim=1)
        expected = float(model.logit_scale.exp()) * features @ rows.T
        torch.testing.assert_close(task(images), expected, atol=1e-5, rtol=1e-5)
        assert task.class_names == NAMES
        assert task.class_prompts.templates == ["a photo of a {}.", "a drawing of a {}."]

    def test_the_text_tower_is_no_part_of_the_task(self, model, images):
        task = make(model)
        assert all(name.startswith(("encoder.model.visual", "normalize", "classifier")) for name in task.state_dict())
        before = copy.deepcopy(model.state_dict())
        adapted = Tent(lr=0.1).wrap(task)
        adapted(images)
        assert len(adapted.engine.net.parameters) == 12
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert len(moved) == 12
        assert all(name.startswith("visual") for name in moved)
        assert copy.deepcopy(task).class_prompts.tower is task.class_prompts.tower

    def test_some_of_the_classes(self, model):
        task = make(model)
        task._label_space.restrict(task, [3, 1])
        assert task.class_prompts.names == [NAMES[3], NAMES[1]]
        torch.testing.assert_close(task.class_prompts.features().double(), task.classifier.weight)
        task._label_space.restrict(task, None)
        assert task.class_prompts.names == NAMES

    def test_a_cache_of_text_features(self, model, tmp_path, monkeypatch):
        folder = tmp_path / "texts"
        first = make(model, text_cache=str(folder))
        assert [path.name for path in folder.iterdir()] == [f"{first.text_sha256}.pt"]
        other = make(model, text_cache=str(folder), templates="a drawing of a {}.")
        assert len(list(folder.iterdir())) == 2
        monkeypatch.setattr("ttalight.models.class_prompts.encode_class_names", None)
        again = make(model, text_cache=str(folder))
        assert torch.equal(again.classifier.weight, first.classifier.weight)
        assert len({first.text_sha256, again.text_sha256, other.text_sha256}) == 2
        with torch.no_grad():
            model.ln_final.weight.add_(0.1)
        with pytest.raises(TypeError):  # other weights have another file
            make(model, text_cache=str(folder))
        with pytest.raises(ValueError, match=r"text_cache must be a folder, and .*pt is a file"):
            make(model, text_cache=str(next(folder.iterdir())))

    def test_models_of_open_clip_know_their_images(self, model, images):
        model.visual.preprocess_cfg = {"size": 8, "mean": (0.3,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic"}
        task, given = make(model), make(model, mean=(0.1,) * 3, std=(0.5,) * 3)
        assert task.normalize.mean.tolist() == pytest.approx([0.3] * 3)
        assert given.normalize.mean.tolist() == pytest.approx([0.1] * 3)
        larger = torch.nn.functional.pad(images, (2, 2, 2, 2))
        torch.testing.assert_close(task(larger), task(images))  # the centre


class TestTransformers:
    @pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
    def test_models(self, kind):
        transformers = pytest.importorskip("transformers")
        part = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = {**part, "image_size": 8, "patch_size": 4}
        text = {**part, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39, "projection_size": 8}
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=8)
        model = getattr(transformers, f"{kind}Model")(config).eval()
        values = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        task = VisionLanguageTask(image_tower=model, class_names=NAMES, tokenizer=tokenize, **values).eval()
        images = torch.rand(4, 3, 8, 8)
        tokens = tokenize([f"a photo of a {name}." for name in NAMES])
        expected = model(input_ids=tokens, pixel_values=2 * images - 1).logits_per_image
        bias = getattr(model, "logit_bias", torch.zeros(()))
        torch.testing.assert_close(task(images), expected - bias, atol=1e-4, rtol=1e-4)
        assert not any("text" in name for name in task.state_dict())
        with pytest.raises(ValueError, match="do not say how images are normalised: give mean= and std="):
            VisionLanguageTask(image_tower=model, class_names=NAMES, tokenizer=tokenize)


class TestByName:
    def test_weights_from_a_file(self, named, tmp_path):
        torch.manual_seed(0)
        model, path = open_clip.create_model(named, load_weights=False), str(tmp_path / "weights.pt")
        torch.save(model.state_dict(), path)
        task = VisionLanguageTask(encoder=f"open_clip/{named}", pretrained=path, class_names="cifar10").eval()
        images = torch.rand(2, 3, 8, 8)
        tokens = open_clip.get_tokenizer(named)([f"a photo of a {name}." for name in task.class_names])
        mean, std = (torch.tensor(value)[:, None, None] for value in (model.visual.image_mean, model.visual.image_std))
        with torch.no_grad():
            encoded, _, scale = model.eval()((images - mean) / std, tokens)
            expected = scale * encoded @ model.encode_text(tokens, normalize=True).T
        torch.testing.assert_close(task(images), expected, atol=1e-4, rtol=1e-4)
        assert task.source["file"] == path
        assert len(task.source["sha256"]) == 64
        assert task.preprocessing.size == 8
        assert not task.has_random_weights

    def test_results_name_model_and_texts(self, named, make_trainer, make_data, tmp_path):
        hashes = set()
        for templates in ("digits", "a {}."):
            task = VisionLanguageTask(encoder=f"open_clip/{named}", class_names="digits", templates=templates)
            assert task.has_random_weights
            results = make_trainer(tmp_path / templates[:1]).adapt(task, make_data(domains=["clean"]), Source())
            assert results["network"] == "open_clip/tiny-test"
            assert results["protocol"]["text_features"] == task.text_sha256[:16]
            hashes.add(task.text_sha256)
        assert len(hashes) == 2
        assert {"class_names", "templates", "scale"} <= task.hparams.keys()

    @pytest.mark.parametrize(
        ("encoder", "pretrained", "error", "message"),
        [
            ("ViT-B-33", False, ValueError, "no model 'ViT-B-33'; the nearest names are ViT-B-32"),
            ("ViT-B-32", True, ValueError, "a local file of weights or a tag of ViT-B-32, which are openai, laion"),
            ("ViT-B-32", "none.pt", FileNotFoundError, r"no file none\.pt, and it is no tag of ViT-B-32 \(openai"),
        ],
    )
    def test_wrong_names(self, encoder, pretrained, error, message):
        with pytest.raises(error, match=message):
            VisionLanguageTask(encoder=f"open_clip/{encoder}", pretrained=pretrained, class_names="cifar10")

    def test_files_of_other_models(self, named, tmp_path):
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other\.pt has no weights of tiny-test: "):
            VisionLanguageTask(
                encoder=f"open_clip/{named}", pretrained=str(tmp_path / "other.pt"), class_names="cifar10"
            )

    def test_no_connection(self, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("no route")

        monkeypatch.setattr(open_clip, "create_model", fail)
        with pytest.raises(ConnectionError, match=r"weights openai of ViT-B-32 \(no route\): get them from timm/vit"):
            VisionLanguageTask(encoder="open_clip/ViT-B-32", pretrained="openai", class_names="cifar10")
        with pytest.raises(ConnectionError, match=r"cannot make ViT-B-32 without a download \(no route\)"):
            VisionLanguageTask(encoder="open_clip/ViT-B-32", class_names="cifar10")

    def test_without_a_package_of_the_model(self, monkeypatch):
        def fail(*args, **kwargs):
            raise ModuleNotFoundError("No module named 'transformers'")

        monkeypatch.setattr(open_clip, "create_model", fail)
        with pytest.raises(ImportError, match=r"more package for ViT-B-16-SigLIP \(No .*transformers'\): install it"):
            VisionLanguageTask(encoder="open_clip/ViT-B-16-SigLIP", class_names="cifar10")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
        with pytest.raises(ImportError, match=r"encoder='open_clip/ViT-B-32' needs open_clip.*ttalight\[clip\]"):
            VisionLanguageTask(encoder="open_clip/ViT-B-32", class_names="cifar10")
        with pytest.raises(ImportError, match="templates='imagenet' needs open_clip"):
            make(tiny_clip_without_import(), templates="imagenet")


def tiny_clip_without_import():
    model = torch.nn.Module()
    model.encode_image = model.encode_text = lambda value: value
    return model


class TestArguments:
    def test_one_source_of_text_features(self, model):
        for given in ({}, {"text_features": torch.eye(3), "class_names": NAMES}):
            with pytest.raises(ValueError, match="either text_features or class_names"):
                VisionLanguageTask(image_tower=model, **given)

    def test_what_texts_need(self, model):
        for name in ("cifar_resnet8", "ViT-B-32"):
            with pytest.raises(ValueError, match=r"encoded by a text tower, .*encoder='open_clip/ViT-B-32'"):
                VisionLanguageTask(encoder=name, stem="cifar", class_names=NAMES)
        with pytest.raises(ValueError, match="need tokenizer="):
            VisionLanguageTask(image_tower=model, class_names=NAMES)
