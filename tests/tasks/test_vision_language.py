"""Vision-language models as classifiers: the formula, where text features come from, and adapters on them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.methods import methods
from torch import nn

from ttalight.adapters import LAME, T3A, TDA, DoTA, RetrievalFusion, Source, Tent
from ttalight.cli import main
from ttalight.models import CosineClassifier, encode_class_names, ensemble_text_features
from ttalight.models.label_space import select_classes
from ttalight.tasks import VisionLanguageTask

CLASSES, WIDTH = 5, 6
METHODS = methods()

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*runs with its settings for CIFAR", "ignore:.*source", "ignore:.*small"
)


class TwoTowers(nn.Module):
    """A model with the interface of CLIP's, whose towers have normalisation layers each."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, width),
        )  # fmt: skip
        self.text = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width))

    def encode_image(self, images):
        return self.visual(images)

    def encode_text(self, texts):
        return self.text(texts)


class Returns(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.forward = forward


@pytest.fixture
def model():
    torch.manual_seed(2)
    return TwoTowers().double().eval()


@pytest.fixture
def text():
    return 3 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.fixture
def images():
    return torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def task(model, text):
    return VisionLanguageTask(text, image_tower=model, scale=20.0).double().eval()


def cosine(a, b):
    dot, lengths = math.fsum(x * y for x, y in zip(a, b, strict=True)), [math.hypot(*each) for each in (a, b)]
    return dot / (lengths[0] * lengths[1])


def test_logits_are_scaled_cosines(task, model, text, images):
    logits = task(images)
    features = model.encode_image(images).tolist()
    expected = [[20.0 * cosine(feature, row) for row in text.tolist()] for feature in features]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64))


def test_with_a_projection(model, images):
    torch.manual_seed(0)
    weight, text = torch.randn(3, WIDTH).double(), torch.randn(CLASSES, 3).double()
    task = VisionLanguageTask(text, image_tower=model, projection=weight).double().eval()
    features = (model.encode_image(images) @ weight.T).tolist()
    expected = [[100.0 * cosine(feature, row) for row in text.tolist()] for feature in features]
    torch.testing.assert_close(task(images), torch.tensor(expected, dtype=torch.float64))


def test_a_tower_without_encode_image_is_called(model, text, images, task):
    other = VisionLanguageTask(text, image_tower=model.visual, scale=20.0).double().eval()
    assert torch.equal(other(images), task(images))


def test_weights_have_the_type_of_the_tower(model, text, images):
    task = VisionLanguageTask(text, image_tower=model.float(), projection=torch.eye(WIDTH).double()).eval()
    assert {value.dtype for value in task.parameters()} == {torch.float32}
    assert task(images.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_towers_in_half_precision_take_images_as_they_come(model, text, images, dtype):
    """As the weights that OpenAI publishes; the first parameter of a tower may have another type than its layers."""
    tower = model.visual.to(dtype)
    tower.register_parameter("positions", nn.Parameter(torch.zeros(1)))
    task = VisionLanguageTask(text.float(), image_tower=tower, mean=(0.5,) * 3, std=(0.3,) * 3).eval()
    with torch.no_grad():
        expected = task.classifier(
            nn.functional.normalize(tower(((images.float() - 0.5) / 0.3).to(dtype)).float(), dim=1)
        )
    for given in (images.float(), images.to(dtype).float()):
        torch.testing.assert_close(TDA().wrap(copy.deepcopy(task))(given, adapt=False), expected, rtol=0.05, atol=0.5)
    assert DoTA().wrap(task)(images.float()).isfinite().all()


def test_prompts_are_averaged():
    torch.manual_seed(0)
    features = torch.randn(3, 4, 5, dtype=torch.float64) * 7
    for number, row in enumerate(ensemble_text_features(features).tolist()):
        prompts = features[:, number].tolist()
        units = [[value / math.hypot(*prompt) for value in prompt] for prompt in prompts]
        mean = [math.fsum(values) / 3 for values in zip(*units, strict=True)]
        assert row == pytest.approx([value / math.hypot(*mean) for value in mean])
    with pytest.raises(ValueError, match=r"of shape \(templates, classes, dimension\), got \(4, 5\)"):
        ensemble_text_features(features[0])


def test_class_names_become_text_features(model):
    seen = []

    def tokenize(texts):
        seen.append(texts)
        return torch.tensor([[len(text), text.count("a"), text.count("t"), 1] for text in texts]).double()

    features = encode_class_names(model, tokenize, ["cat", "rat {}"], ["a {}.", "this is {}, a {}"])
    assert seen == [["a cat.", "a rat {}."], ["this is cat, a cat", "this is rat {}, a rat {}"]]
    prompts = torch.stack([model.encode_text(tokenize(texts)) for texts in list(seen)])
    assert torch.equal(features, ensemble_text_features(prompts))
    assert not features.requires_grad
    default = encode_class_names(model, tokenize, ["cat"])
    assert seen[-1] == ["a photo of a cat."]
    assert default.shape == (1, WIDTH)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["a {}"], "lists of one string or more"),
        ("cat", ["a {}"], "lists of one string or more"),
        (["cat"], "a {}", "lists of one string or more"),
        (["cat"], ["a {}", "a cat"], r"each template needs \{\} in the place of a name, got 'a cat'"),
    ],
)
def test_wrong_names_and_templates(names, templates, message, model):
    with pytest.raises(ValueError, match=message):
        encode_class_names(model, list, names, templates)


class TestFiles:
    @pytest.mark.parametrize("named", [False, True])
    def test_hold_text_features(self, named, text, model, images, task, tmp_path):
        path, names = str(tmp_path / "text.pt"), list("abcde")
        torch.save({"features": text, "names": names} if named else text, path)
        read = VisionLanguageTask(path, image_tower=model, scale=20.0).double().eval()
        assert read.class_names == (names if named else None)
        assert torch.equal(read(images), task(images))

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_hold_a_projection(self, wrapped, text, model, images, tmp_path):
        path, linear = str(tmp_path / "projection.pt"), nn.Linear(WIDTH, WIDTH, bias=False).double()
        torch.save(linear.state_dict() if wrapped else linear.weight.data, path)
        read, given = (
            VisionLanguageTask(text, image_tower=model, projection=each).double().eval()
            for each in (path, linear.weight)
        )
        assert torch.equal(read(images), given(images))

    def test_that_are_not_there(self, model, text):
        with pytest.raises(FileNotFoundError, match=r"text_features: there is no file none\.pt"):
            VisionLanguageTask("none.pt", image_tower=model)
        with pytest.raises(FileNotFoundError, match=r"projection: there is no file none\.pt"):
            VisionLanguageTask(text, image_tower=model, projection="none.pt")

    def test_that_could_run_code(self, model, tmp_path):
        torch.save(model, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"text_features: .* was refused"):
            VisionLanguageTask(str(tmp_path / "model.pt"), image_tower=model)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.zeros(3), r"must be a matrix of a row for each .*, got of shape \(3,\)"),
            ({"names": ["a"]}, r"a dict must have features \(C, D\), and names at will, got names"),
            (torch.ones(1, 3), "two classes or more"),
            (torch.eye(3)[:, :2], "no row of zeros"),
            (torch.full((3, 3), torch.nan), "not finite"),
            (torch.ones(3, 3).long(), "must be a matrix"),
            ({"features": torch.ones(3, 3), "names": ["a", "b"]}, "names must be a list of 3 strings"),
            ({"features": torch.ones(2, 3), "names": ["a", 2]}, "names must be a list of 2 strings"),
        ],
    )
    def test_of_something_else(self, content, message, model, tmp_path):
        torch.save(content, tmp_path / "text.pt")
        with pytest.raises(ValueError, match=f"text_features.*{message}"):
            VisionLanguageTask(str(tmp_path / "text.pt"), image_tower=model)


class TestArguments:
    @pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
    def test_scale(self, scale, text, model):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            VisionLanguageTask(text, image_tower=model, scale=scale)

    def test_one_tower(self, text, model):
        for towers in ({}, {"encoder": "cifar_resnet8", "image_tower": model}):
            with pytest.raises(ValueError, match=r"either encoder \(a name of timm's\) or image_tower"):
                VisionLanguageTask(text, **towers)

    def test_towers_of_other_kinds(self, text, images):
        with pytest.raises(
            TypeError, match=r"image_tower must be a module in Python, got str: give the name .* encoder"
        ):
            VisionLanguageTask(text, image_tower="resnet18")
        with pytest.raises(TypeError, match=r"expected a tensor of features from the tower, .*, got list"):
            VisionLanguageTask(text, image_tower=Returns(lambda images: [images])).double()(images)
        with pytest.raises(
            ValueError, match=r"expected features \(B, D\) of the image tower, got shape \(8, 3, 9, 9\)"
        ):
            VisionLanguageTask(text, image_tower=nn.Identity()).double()(images)

    def test_models_of_transformers_need_a_normalisation(self, text, model):
        model.get_image_features = model.encode_image
        with pytest.raises(ValueError, match="do not say how images are normalised: give mean= and std="):
            VisionLanguageTask(text, image_tower=model)

    def test_widths(self, text, model, images):
        with pytest.raises(ValueError, match="tower gives 64 features and the text features have 6: give a projection"):
            VisionLanguageTask(text, encoder="cifar_resnet8", stem="cifar")
        with pytest.raises(ValueError, match="tower gives 64 features and the projection reads 7"):
            VisionLanguageTask(text, encoder="cifar_resnet8", stem="cifar", projection=torch.ones(WIDTH, 7))
        with pytest.raises(ValueError, match=r"projection: \(5, 6\) does not map to text features of dimension 6"):
            VisionLanguageTask(text, image_tower=model, projection=torch.ones(5, 6))
        with pytest.raises(ValueError, match="tower gives 6 features and the text features have 4"):
            VisionLanguageTask(text[:, :4], image_tower=model).double()(images)


class TestAdapters:
    def test_read_unit_vectors_rows_and_scale(self, task, text, images):
        seen = {}

        class Reader(Source):
            def configure(self, net):
                super().configure(net)
                seen["head"] = net.head

            def adapt(self, net, images):
                seen["outputs"] = net(images)
                return seen["outputs"].logits

        logits = Reader().wrap(task)(images)
        weight, bias, scale = seen["head"]
        assert bias is None
        assert scale == 20.0
        torch.testing.assert_close(weight, nn.functional.normalize(text, dim=1))
        torch.testing.assert_close(seen["outputs"].features.norm(dim=1), torch.ones(8, dtype=torch.float64))
        torch.testing.assert_close(scale * seen["outputs"].features @ weight.T, logits)

    @pytest.mark.parametrize("name", METHODS)
    def test_all_run(self, name, task, images):
        adapted = METHODS[name]().wrap(task)
        for batch in (images, images.flip(0) * 0.5):
            logits = adapted(batch)
            assert logits.shape == (8, CLASSES)
            assert logits.isfinite().all()

    def test_the_text_tower_stays(self, task, model, images):
        before = copy.deepcopy(model.state_dict())
        adapted = Tent(lr=0.1).wrap(task)
        adapted(images)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {"visual.1.weight", "visual.1.bias"}

    def test_t3a_weighs_rows_by_scaled_entropies(self, task, images):
        adapted = T3A(supports=2).wrap(task)
        adapted(images)
        weight = task.classifier.weight
        expected = torch.distributions.Categorical(logits=20.0 * weight @ weight.T).entropy()
        kept = adapted.engine.method.method_state()["entropies"]
        assert torch.isclose(kept[:, :, None], expected.detach()).any()

    @pytest.mark.parametrize("method", [LAME, RetrievalFusion, T3A])
    def test_an_image_alone_works(self, method, task, images):
        assert method().wrap(task)(images[:1]).shape == (1, CLASSES)

    def test_exports_predict_the_same(self, task, images):
        adapted = T3A().wrap(task)
        adapted(images)
        assert torch.equal(adapted.export()(images), adapted(images, adapt=False))


def test_some_classes_of_it():
    classifier = CosineClassifier(WIDTH, CLASSES, scale=30.0)
    part = select_classes(classifier, [3, 1])
    features = nn.functional.normalize(torch.randn(4, WIDTH), dim=1)
    torch.testing.assert_close(part(features), classifier(features)[:, [3, 1]])
    assert repr(part) == "CosineClassifier(in_features=6, out_features=2, scale=30)"
    assert part.weight.data_ptr() != classifier.weight.data_ptr()


class TestRuns:
    @pytest.fixture
    def path(self, tmp_path):
        torch.manual_seed(0)
        torch.save({"features": torch.randn(10, 64), "names": list("0123456789")}, tmp_path / "text.pt")
        return str(tmp_path / "text.pt")

    def test_adapt(self, path, make_trainer, make_data, tmp_path):
        task = VisionLanguageTask(path, encoder="cifar_resnet8", stem="cifar")
        results = make_trainer(tmp_path).adapt(task, make_data(domains=["clean"]), T3A())
        assert results["network"] == "cifar_resnet8"
        assert task.normalize.mean.tolist() == pytest.approx(make_data().mean)

    def test_adapt_a_tower_in_python(self, path, make_trainer, make_data, tmp_path):
        torch.manual_seed(0)
        task = VisionLanguageTask(path, image_tower=TwoTowers(64))
        results = make_trainer(tmp_path).adapt(task, make_data(domains=["clean"]), Tent())
        assert results["network"] == "VisionLanguageTask"
        assert not task.has_random_weights

    def test_other_classes_than_the_data(self, make_trainer, make_data, tmp_path):
        task = VisionLanguageTask(torch.randn(7, 64), encoder="cifar_resnet8", stem="cifar")
        message = "DigitsDataModule has 10 classes, VisionLanguageTask was made for 7: give the names or text features"
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path).adapt(task, make_data(domains=["clean"]), Source())

    def test_the_command(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        main(
            [
                "adapt", "--model", "VisionLanguageTask", "--model.text_features", path, "--model.encoder",
                "cifar_resnet8", "--model.stem", "cifar", "--data", "DigitsDataModule", "--data.domains", "[clean]",
                "--data.limit", "10", "--adapter", "T3A", "--name", "vl", "--trainer.enable_progress_bar", "false",
            ]
        )  # fmt: skip
        assert (tmp_path / "runs" / "vl" / "results.json").exists()

    def test_files_hold_plain_values(self, path):
        task = VisionLanguageTask(path, encoder="cifar_resnet8", stem="cifar")
        assert {"text_features", "image_tower", "projection"}.isdisjoint(task.hparams)
        assert task.hparams["scale"] == 100.0
