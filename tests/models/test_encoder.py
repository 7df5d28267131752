from __future__ import annotations

import socket

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ttalight.models import create_encoder, preprocessing_of

CIFAR = "cifar_resnet8"


def _state(seed: int, name: str = CIFAR, **kwargs) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).state_dict()


@pytest.mark.parametrize(
    ("name", "stem", "size"),
    [
        ("resnet18", "cifar", 32),
        ("resnet18", "imagenet", 64),
        ("cifar_resnet20", "cifar", 32),
        ("resnet26d", "imagenet", 64),
        ("test_efficientnet", "cifar", 32),
        ("mobilenetv3_small_050", "imagenet", 64),  # a hidden layer in the head: timm's num_features is another number
        ("test_vit", "imagenet", 160),
        ("test_convnext", "imagenet", 64),
    ],
)
def test_puts_out_num_features_pooled_features(name, stem, size):
    encoder = create_encoder(name, stem=stem)
    assert encoder.training
    features = encoder(torch.rand(2, 3, size, size))
    assert features.shape == (2, encoder.num_features)
    assert not any(isinstance(module, nn.Linear) and module.out_features == 1000 for module in encoder.modules())


def test_cifar_stem_keeps_the_resolution():
    encoder = create_encoder("resnet18", stem="cifar").eval()
    assert encoder.conv1.kernel_size == (3, 3)
    assert encoder.conv1.bias is None
    assert encoder.forward_features(torch.rand(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    plain = create_encoder("resnet18", stem="imagenet").eval()
    assert plain.forward_features(torch.rand(1, 3, 32, 32)).shape == (1, 512, 1, 1)


def test_efficientnet_cifar_stem_keeps_weights(tmp_path):
    state = _state(1, "test_efficientnet")
    torch.save(state, tmp_path / "network.pth")
    encoder = create_encoder("test_efficientnet", pretrained=str(tmp_path / "network.pth"), stem="cifar").eval()
    plain = create_encoder("test_efficientnet", pretrained=str(tmp_path / "network.pth"), stem="imagenet").eval()
    assert torch.equal(encoder.conv_stem.weight, state["conv_stem.weight"])
    images = torch.rand(1, 3, 32, 32)
    assert encoder.conv_stem(images).shape[2:] == (32, 32)
    torch.testing.assert_close(encoder.conv_stem(images)[..., ::2, ::2], plain.conv_stem(images))
    assert preprocessing_of(encoder).size is None
    assert preprocessing_of(encoder).mean == preprocessing_of(plain).mean


def test_cifar_stem_initialisation():
    torch.manual_seed(0)
    weight = create_encoder("resnet18").conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert weight.requires_grad


def test_building_keeps_statistics_and_draws():
    torch.manual_seed(3)
    encoder = create_encoder(CIFAR)
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = timm.create_model(CIFAR, num_classes=0)
    assert torch.equal(after, torch.rand(1))
    own = encoder.state_dict()
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())


def test_in_chans():
    assert create_encoder("resnet18", in_chans=1)(torch.rand(2, 1, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loads_a_local_file(tmp_path, suffix):
    state = _state(1)
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = create_encoder(CIFAR, pretrained=str(path)).state_dict()
    assert loaded.keys() == {key for key in state if not key.startswith("linear.")}
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


@pytest.mark.parametrize("outer", ["state_dict", "model"])
def test_unwraps_containers_and_prefixes(tmp_path, outer):
    state = _state(1)
    path = tmp_path / "checkpoint.pt"
    torch.save({outer: {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    loaded = create_encoder(CIFAR, pretrained=str(path)).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


def test_cuts_the_centre_out_of_7x7_kernels_in_a_file(tmp_path):
    state = _state(1, "resnet18")
    path = tmp_path / "resnet18.pth"
    torch.save(state, path)
    cifar = create_encoder("resnet18", pretrained=str(path), stem="cifar")
    assert torch.equal(cifar.conv1.weight, state["conv1.weight"][:, :, 2:5, 2:5])
    assert torch.equal(cifar.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])
    imagenet = create_encoder("resnet18", pretrained=str(path), stem="imagenet")
    assert torch.equal(imagenet.conv1.weight, state["conv1.weight"])


def test_cifar_stem_loads_3x3_kernels_of_a_file(tmp_path):
    encoder = create_encoder("resnet18", stem="cifar")
    path = tmp_path / "small.pth"
    torch.save(encoder.state_dict(), path)
    again = create_encoder("resnet18", pretrained=str(path), stem="cifar")
    assert torch.equal(again.conv1.weight, encoder.conv1.weight)
    with pytest.raises(
        ValueError, match=r"1 of another shape: conv1.weight \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)"
    ):
        create_encoder("resnet18", pretrained=str(path), stem="imagenet")


def test_cuts_the_centre_out_of_downloaded_kernels(monkeypatch):
    torch.manual_seed(5)
    full = timm.create_model("resnet18", num_classes=0)
    kernel = full.conv1.weight.detach().clone()
    asked = {}

    def create(name, **kwargs):
        asked.update(kwargs)
        return full

    monkeypatch.setattr(timm, "create_model", create)
    encoder = create_encoder("resnet18", pretrained=True)
    assert asked["pretrained"] is True
    assert torch.equal(encoder.conv1.weight, kernel[:, :, 2:5, 2:5])


def test_a_failed_download_says_how_to_go_on(monkeypatch):
    def create(name, **kwargs):
        raise socket.gaierror("no route to the hub\nwith details")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(RuntimeError, match=r"no route to the hub.*file instead of true.*pretrained to false") as caught:
        create_encoder("resnet18", pretrained=True)
    assert "with details" not in str(caught.value)


def test_networks_without_public_weights_say_so():
    with pytest.raises(RuntimeError, match=r"cifar_resnet20.*No pretrained weights.*path of the file"):
        create_encoder("cifar_resnet20", pretrained=True)


def test_reports_keys_that_do_not_fit(tmp_path):
    state = _state(1)
    del state["bn1.weight"]
    state["extra.weight"] = torch.zeros(1)
    path = tmp_path / "odd.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"odd.pth.*1 missing: bn1.weight; 1 unexpected: extra.weight"):
        create_encoder(CIFAR, pretrained=str(path))


def test_files_without_batch_counters_load(tmp_path):
    state = {key: value for key, value in _state(1).items() if not key.endswith("num_batches_tracked")}
    path = tmp_path / "old.pth"
    torch.save(state, path)
    encoder = create_encoder(CIFAR, pretrained=str(path))
    assert torch.equal(encoder.layer3[0].conv2.weight, state["layer3.0.conv2.weight"])
    assert encoder.bn1.num_batches_tracked == 0


@pytest.mark.data
def test_loads_real_weight_files(shared_data):
    encoder = create_encoder("cifar_resnet20", pretrained=str(shared_data / "resnet20-12fca82f.th"))
    state = torch.load(shared_data / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(encoder.layer3[2].bn2.running_var, state["module.layer3.2.bn2.running_var"])
    file = shared_data / "efficientnet_lite0_imagenet_timm.pth"
    encoder = create_encoder("tf_efficientnet_lite0", pretrained=str(file), stem="imagenet")
    assert torch.equal(
        encoder.conv_stem.weight, torch.load(file, map_location="cpu", weights_only=True)["conv_stem.weight"]
    )
    assert encoder.num_features == 1280


def test_reports_another_architecture_briefly(tmp_path):
    path = tmp_path / "deep.pth"
    torch.save(_state(1, "cifar_resnet20"), path)
    with pytest.raises(ValueError, match=r"72 unexpected: .*, \.\.\.") as caught:
        create_encoder(CIFAR, pretrained=str(path))
    assert len(str(caught.value)) < 500
    torch.save(_state(1, "resnet18"), path)
    with pytest.raises(ValueError, match="do not fit test_convnext"):
        create_encoder("test_convnext", pretrained=str(path), stem="imagenet")


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.pth.*false for random"):
        create_encoder(CIFAR, pretrained=str(tmp_path / "gone.pth"))
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match=f"{name} is not a file of weights"):
            create_encoder(CIFAR, pretrained=str(tmp_path / name))
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        create_encoder(CIFAR, pretrained=str(tmp_path / "empty.pth"))


class _Evil:
    def __reduce__(self):
        return (print, ("code in a weight file ran",))


def test_never_runs_code_from_a_file(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": _Evil()}, path)
    with pytest.raises(ValueError, match="tensors and plain values only") as caught:
        create_encoder(CIFAR, pretrained=str(path))
    assert "weights_only" not in str(caught.value)  # PyTorch's advice is to turn the protection off
    assert "ran" not in capsys.readouterr().out


def test_unknown_names_list_near_ones():
    with pytest.raises(ValueError, match=r"no network named 'resnet5O'.*resnet50"):
        create_encoder("resnet5O")
    with pytest.raises(ValueError, match=r"no network named 'resnet50.tv_in2k'.*resnet50.tv_in1k"):
        create_encoder("resnet50.tv_in2k")
    with pytest.raises(ValueError, match="list_models"):
        create_encoder("qqqqqqqqq")


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "mobilenetv3_small_050", "resnetv2_50"])
def test_irreplaceable_stems_are_refused(name):
    with pytest.raises(ValueError, match=f'{name} has no ResNet stem.*stem="imagenet"'):
        create_encoder(name, stem="cifar")


def test_deep_stems_are_refused():
    with pytest.raises(ValueError, match=r'several convolutions.*stem="imagenet"'):
        create_encoder("resnet26d")


def test_unknown_stems_are_refused():
    with pytest.raises(ValueError, match="stem must be cifar or imagenet, got 'small'"):
        create_encoder("resnet18", stem="small")


def test_a_file_cut_short_anywhere(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(_state(1), path)
    whole = path.read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"weights.pth is not a file of weights \(\w+: .+must be complete"):
            create_encoder(CIFAR, pretrained=str(path))
