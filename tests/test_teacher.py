"""The teacher against timm's and torchvision's models of the same weights."""
import pytest
import timm
import torch
from torchvision import models

import deit
import teacher
from conftest import randomize, run_main

CLASSES = ["cat", "dog", "owl"]


def save(folder, content):
    torch.save(content, folder / "teacher.pth")
    return folder / "teacher.pth"


def small_regnet():
    return randomize(models.regnet_x_400mf(weights=None, num_classes=3)).state_dict()


def test_the_official_file_becomes_a_folded_regnet_with_timms_logits(tmp_path):
    reference = randomize(timm.create_model("regnety_160"), std=0.05)    # has the official names
    folded = teacher.load_teacher(save(tmp_path, {"model": reference.state_dict()}))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())

    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = folded(images), reference(images)
    assert expected.abs().max() > 0.5, "the comparison would say nothing"
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_teacher_is_frozen(tmp_path):
    frozen = teacher.load_teacher(save(tmp_path, small_regnet()), classes=CLASSES)
    assert not frozen.training
    assert not any(weight.requires_grad for weight in frozen.parameters())


def test_a_deit_teaches_at_the_students_image_size(tmp_path):
    model = deit.create_model("tiny", distilled=True, num_classes=3)     # for 224 pixels
    path = save(tmp_path, {"model": model.state_dict(), "classes": CLASSES})
    smaller = teacher.load_teacher(path, classes=CLASSES, image_size=96)
    assert smaller(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


@pytest.mark.parametrize("known, classes", [
    (None, ["cat", "dog"]), (CLASSES, ["cat", "dog", "eel"]), (CLASSES, ["cat", "owl", "dog"])])
def test_a_teacher_of_other_classes_is_refused_with_the_remedy(known, classes, tmp_path):
    path = save(tmp_path, {"model": small_regnet(), "classes": known})
    with pytest.raises(ValueError, match=f"the {len(classes)} classes .* python train.py"):
        teacher.load_teacher(path, classes=classes)


def test_an_imagenet_teacher_of_other_classes_is_refused_before_any_download(monkeypatch):
    monkeypatch.setattr(deit, "download", None)              # a call would raise TypeError
    with pytest.raises(ValueError, match="teacher official does not know the 3 classes"):
        teacher.load_teacher("official", classes=CLASSES)


def test_every_regnet_of_torchvision_is_known_by_the_width_of_its_features(monkeypatch):
    def last_width(block_params, **settings):                # in place of a model with weights
        return block_params.widths[-1]

    monkeypatch.setattr(models.regnet, "RegNet", last_width)
    names = models.list_models(module=models, include="regnet_*", exclude="*_128gf")
    assert teacher.REGNETS == {name: models.get_model(name, weights=None) for name in names}
    assert len(set(teacher.REGNETS.values())) == len(names)


def test_a_regnets_image_size_is_that_asked_for_or_of_its_recipe(tmp_path):
    path = save(tmp_path, {"model": small_regnet(), "recipe": {"image_size": 160}})
    assert teacher.load_any(path, image_size=96).image_size == 96
    assert teacher.load_any(path).image_size == 160


@pytest.mark.parametrize("classes", [["cat", "dog"], ["cat", "dog", "eel"]])
def test_a_fresh_classifier_is_made_for_other_classes_only_and_said(classes, tmp_path, capsys):
    path = save(tmp_path, {"model": small_regnet(), "classes": CLASSES})
    teacher.load_any(path, classes=CLASSES)
    assert capsys.readouterr().out == ""
    assert teacher.load_any(path, classes=classes).num_classes == len(classes)
    assert capsys.readouterr().out == "fresh weights, not from the file: fc.weight, fc.bias\n"


def test_names_lead_to_the_documented_files():
    for source, file in (("official", "/regnety_160-a5fe301d.pth"),
                         ("regnet_y_16gf", "/regnet_y_16gf-3e4a00f9.pth"),
                         ("of_my_own.pth", "of_my_own.pth")):
        assert teacher.weights_url(source).endswith(file)


@pytest.mark.parametrize("name, tensor, message", [
    ("fc.weight", torch.zeros(3, 100), "not a RegNet of torchvision: none .* width 100"),
    ("stem.1.running_var", torch.full((32,), torch.nan), "its stem.1.running_var is not")])
def test_what_is_not_exactly_a_regnet_is_refused_by_name(name, tensor, message, tmp_path):
    path = save(tmp_path, small_regnet() | {name: tensor})
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        teacher.load_any(path)


def test_the_command_describes_a_teacher(tmp_path, capsys):
    path = save(tmp_path, timm.create_model("regnetx_004_tv", num_classes=3).state_dict())
    assert run_main(teacher, path) == 0
    printed = capsys.readouterr().out
    assert printed == f"{path}: regnet_x_400mf at 224 pixels, 3 classes, names None\n"


def test_an_absent_file_is_one_line(capsys):
    assert run_main(teacher, "absent.pth") == 1
    assert capsys.readouterr().err.startswith("teacher.py: no weights file 'absent.pth'")
