"""The teacher against timm's RegNet of the same weights, and the test of chance by hand."""
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
from torchvision import models

import teacher
from conftest import Malicious, randomize, run_main


@pytest.fixture(scope="module")
def official():
    """A file as the official one is: timm's RegNetY-16GF under `model`."""
    return randomize(timm.create_model("regnety_160"), std=0.05)


@pytest.fixture(scope="module")
def official_file(official, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "regnety_160.pth"
    torch.save({"model": official.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def folded(official_file):
    return teacher.load_teacher(official_file)


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
def test_the_folded_teacher_computes_the_same_function(official, folded, images):
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    reference = official(images)
    assert torch.allclose(folded(images), reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())


def test_the_teacher_is_frozen(folded):
    assert not folded.training and not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize("name", ["regnet_y_400mf", "regnet_x_800mf", "regnet_y_3_2gf"])
def test_the_architecture_is_read_from_the_tensors(name):
    model = models.get_model(name, weights=None, num_classes=10)
    loaded = teacher.load_regnet("file", checkpoint={"model": model.state_dict(), "classes": list("0123456789")})
    assert loaded.size == name
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))


def test_every_regnet_of_torchvision_is_known_by_its_width():
    assert teacher.REGNETS.keys() == set(models.list_models(module=models, include="regnet_*"))
    assert len(set(teacher.REGNETS.values())) == len(teacher.REGNETS)
    for name in ("regnet_x_400mf", "regnet_y_800mf", "regnet_x_16gf"):
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
    with pytest.raises(ValueError, match="knows 1000 classes and the data has 10; train one"):
        teacher.load_teacher("official", num_classes=10)                 # refused before any download


def test_a_teacher_that_names_other_classes_is_refused_with_the_first_of_them(tmp_path):
    state = models.regnet_x_400mf(weights=None, num_classes=3).state_dict()
    torch.save({"model": state, "classes": ["cat", "dog", "owl"]}, tmp_path / "named.pth")
    teacher.load_teacher(tmp_path / "named.pth", num_classes=3, classes=["cat", "dog", "owl"])
    with pytest.raises(ValueError, match="knows 3 classes and the data has 3, 'eel' where the teacher has 'dog'; train one"):
        teacher.load_teacher(tmp_path / "named.pth", num_classes=3, classes=["cat", "eel", "owl"])
    torch.save({"model": state, "classes": 7}, tmp_path / "named.pth")                # no names at all
    with pytest.raises(ValueError, match="knows 3 classes and the data has 2; train one"):
        teacher.load_teacher(tmp_path / "named.pth", num_classes=2, classes=["cat", "eel"])


def score(correct, images):
    return SimpleNamespace(correct1=float(correct), images=float(images), top1=100 * correct / images)     # as Score's


@pytest.mark.parametrize("images, num_classes, least", [
    (100, 4, 38),                    # 25 expected, standard deviation sqrt(100 x 1/4 x 3/4) = 4.33: chance to 37.99
    (15, 3, 11),                     # 5 and sqrt(15 x 1/3 x 2/3) = 1.83: to 10.48
    (50_000, 1000, 72),              # 50 and sqrt(50000 x 0.001 x 0.999) = 7.07: to 71.20
    (2, 2, 2)])                      # to 3.12 of 2, but a teacher that is always right is as good as can be
def test_a_teacher_within_three_deviations_of_chance_is_refused(images, num_classes, least):
    teacher.check_top1(score(least, images), num_classes, "file")
    with pytest.raises(ValueError, match=f"teacher file gets {least - 1} of {images} .* could be chance"):
        teacher.check_top1(score(least - 1, images), num_classes, "file")
    teacher.check_top1(score(0, images), num_classes, "file", any_teacher=True)


def test_a_fresh_classifier_for_other_classes_is_said(capsys):
    state = models.regnet_y_400mf(weights=None, num_classes=7).state_dict()
    assert teacher.load_regnet("file", checkpoint={"model": state}, classes=["a", "b", "c"]).fc.out_features == 3
    assert capsys.readouterr().out == "file: fresh classifier for 3 classes, not the file's 7\n"


def test_weights_that_are_not_finite_are_refused_by_name():
    state = models.regnet_x_400mf(weights=None, num_classes=3).state_dict()
    state["stem.1.running_var"][2] = float("nan")
    with pytest.raises(ValueError, match="file: its stem.1.running_var is not made of finite floating-point numbers"):
        teacher.load_regnet("file", checkpoint={"model": state})


def test_bad_files_are_refused_and_not_executed(tmp_path):
    (tmp_path / "malicious.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="cannot read weights .*malicious.pth: "):
        teacher.load_teacher(tmp_path / "malicious.pth")
    with pytest.raises(ValueError, match="other.pth: no RegNet of torchvision: .* found .'weight'"):
        teacher.load_teacher(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no weights file .*absent.pth.* regnet_y_16gf"):
        teacher.load_teacher(tmp_path / "absent.pth")


@pytest.mark.parametrize("make, whose", [(lambda: timm.create_model("regnetx_004_tv", num_classes=3), "timm"),
                                         (lambda: models.regnet_x_400mf(weights=None, num_classes=3), "torchvision")])
def test_the_command_describes_a_teacher(make, whose, tmp_path, capsys):
    model = make()
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert run_main(teacher, tmp_path / "file.pth") == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'file.pth'}: regnet_x_400mf, 3 classes, {parameters:,} parameters, {whose}'s names\n")


@pytest.mark.parametrize("args, status, message", [
    ([], 2, "the following arguments are required: SOURCE"),
    (["official", "--output", "teacher.pth"], 2, "unrecognized arguments: --output teacher.pth"),
    (["absent.pth"], 1, "no weights file 'absent.pth'"),
    (["RegNet_Y_16GF_Weights.V9"], 1, "torchvision has no weights RegNet_Y_16GF_Weights.V9")])
def test_a_mistake_on_the_command_line_is_one_line(args, status, message, capsys):
    assert run_main(teacher, *args) == status
    printed = capsys.readouterr().err
    assert printed.startswith(f"teacher.py: {message}") and printed.count("\n") == 1
