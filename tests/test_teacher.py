"""The teacher against timm's RegNet of the same weights."""
import pickle

import pytest
import timm
import torch
from torchvision import models

import teacher


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                around = 0.0 if name.endswith(("bias", "running_mean")) else 1.0
                value.copy_(around + 0.2 * torch.rand(value.shape, generator=generator))
            elif name.endswith(("fc.weight",)):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def official():
    """A file as the official one is: timm's RegNetY-16GF under `model`."""
    return randomize(timm.create_model("regnety_160"))


@pytest.fixture(scope="module")
def official_file(official, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "regnety_160.pth"
    torch.save({"model": official.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_official_file_becomes_torchvisions_regnet_with_equal_logits(official, official_file, images):
    model = teacher.load_regnet(official_file)
    assert model.state_dict().keys() == models.regnet_y_16gf(weights=None).state_dict().keys()
    reference = official(images)
    assert reference.abs().max() > 0.5
    assert torch.allclose(model(images), reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


@torch.no_grad()
def test_the_folded_teacher_computes_the_same_function(official, official_file, images):
    folded = teacher.load_teacher(official_file)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    reference = official(images)
    assert torch.allclose(folded(images), reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())


def test_the_teacher_is_frozen(official_file):
    model = teacher.load_teacher(official_file)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["regnet_y_400mf", "regnet_x_800mf", "regnet_y_3_2gf"])
def test_the_architecture_is_read_from_the_tensors(name):
    model = models.get_model(name, weights=None, num_classes=10)
    loaded = teacher.load_regnet("file", checkpoint={"model": model.state_dict(), "classes": list("0123456789")})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_every_regnet_of_torchvision_is_known_by_its_width():
    assert teacher.REGNETS.keys() == set(models.list_models(module=models, include="regnet_*"))
    assert len(set(teacher.REGNETS.values())) == len(teacher.REGNETS)
    for name in ("regnet_y_400mf", "regnet_x_16gf", "regnet_y_16gf"):
        assert models.get_model(name, weights=None).fc.in_features == teacher.REGNETS[name]


def test_names_lead_to_the_documented_files():
    assert teacher.weights_url("official") == "https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth"
    assert teacher.weights_url("regnet_y_16gf").endswith("regnet_y_16gf-3e4a00f9.pth")
    assert teacher.weights_url("RegNet_Y_16GF_Weights.IMAGENET1K_V1").endswith("regnet_y_16gf-9e6ed7dd.pth")
    assert teacher.weights_url("some/file.pth") is None
    with pytest.raises(ValueError, match="SWAG"):
        teacher.weights_url("regnet_y_128gf")


def test_a_teacher_of_other_classes_is_refused_with_the_remedy(tmp_path):
    torch.save(models.regnet_y_400mf(weights=None, num_classes=7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(ValueError, match="knows 7 classes and the data has 10; train one"):
        teacher.load_teacher(tmp_path / "seven.pth", num_classes=10)
    with pytest.raises(ValueError, match="knows ImageNet's 1000 classes and the data has 10; train one"):
        teacher.load_teacher("official", num_classes=10)                 # refused before any download


def test_a_fresh_classifier_is_said(capsys):
    state = models.regnet_y_400mf(weights=None, num_classes=7).state_dict()
    assert teacher.load_regnet("file", checkpoint={"model": state}, num_classes=3).fc.out_features == 3
    assert "fresh classifier for 3 classes in place of the file's 7" in capsys.readouterr().out


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_two_urls_with_one_file_name_are_two_teachers(tmp_path, monkeypatch):
    def fetch(url, path, hash_prefix=None, progress=True):
        torch.save({"from": url}, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert [teacher.read_weights(f"https://{host}/best.pth")["from"] for host in "ab"] == ["https://a/best.pth", "https://b/best.pth"]


def test_bad_files_are_refused_and_not_executed(tmp_path):
    (tmp_path / "malicious.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a file of tensors"):
        teacher.load_teacher(tmp_path / "malicious.pth")
    with pytest.raises(ValueError, match="no RegNet of torchvision: .* found weight"):
        teacher.load_teacher(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no RegNet"):
        teacher.load_teacher(tmp_path / "absent.pth")
