"""The teacher against timm's and torchvision's models of the same weights."""
import re

import pytest
import timm
import torch
from torchvision import models

import deit
import teacher
from conftest import difference, randomize, run_main

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def official():
    """timm's RegNetY-16GF, whose names the official file has."""
    return randomize(timm.create_model("regnety_160"), std=0.05)


@pytest.fixture(scope="module")
def official_file(official, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "regnety_160.pth"
    torch.save({"model": official.state_dict()}, path)
    return path


def small_regnet():
    return randomize(models.regnet_x_400mf(weights=None, num_classes=3))


def save(tmp_path, content):
    torch.save(content, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


def assert_same_logits(model, reference, tolerance):
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = model(images), reference(images)
    assert expected.abs().max() > 0.5, "the comparison would say nothing"
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_official_file_becomes_torchvisions_regnet_with_equal_logits(official, official_file):
    loaded = teacher.load_any(official_file)
    assert loaded.size == "regnet_y_16gf" and isinstance(loaded.model, models.RegNet)
    assert_same_logits(loaded.model, official, 1e-5)


def test_the_folded_teacher_computes_the_same_function(official, official_file):
    folded = teacher.load_teacher(official_file)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert_same_logits(folded, official, 1e-4)


def test_a_deit_teaches_at_the_students_image_size(tmp_path):
    reference = randomize(
        timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=96))
    path = save(tmp_path, {"model": reference.state_dict(), "classes": CLASSES})
    assert_same_logits(teacher.load_teacher(path, classes=CLASSES, image_size=96), reference, 1e-5)
    larger = teacher.load_teacher(path, classes=CLASSES, image_size=128)
    assert larger(torch.zeros(1, 3, 128, 128)).shape == (1, 3)


def test_the_teacher_is_frozen(tmp_path):
    frozen = teacher.load_teacher(save(tmp_path, small_regnet().state_dict()), classes=CLASSES)
    assert not frozen.training
    assert not any(weight.requires_grad for weight in frozen.parameters())


def test_a_teacher_of_other_classes_is_refused_with_the_remedy(tmp_path):
    state = small_regnet().state_dict()
    unnamed = {"model": state}
    named = {"model": state, "classes": CLASSES}
    for content, classes in ((unnamed, ["cat", "dog"]), (named, ["cat", "dog", "eel"]),
                             (named, ["cat", "owl", "dog"])):
        path = save(tmp_path, content)
        with pytest.raises(ValueError, match=f"the {len(classes)} classes .* python train.py"):
            teacher.load_teacher(path, classes=classes)


def test_an_imagenet_teacher_of_other_classes_is_refused_before_any_download(monkeypatch):
    monkeypatch.setattr(deit, "download", None)              # a call would raise TypeError
    for source in ("official", "regnet_y_400mf", "RegNet_Y_16GF_Weights.IMAGENET1K_V1"):
        with pytest.raises(ValueError, match=f"teacher {source} does not know the 3 classes"):
            teacher.load_teacher(source, classes=CLASSES)


def test_every_regnet_of_torchvision_is_known_by_the_width_of_its_features(monkeypatch):
    def last_width(block_params, **settings):                # in place of a model with weights
        return block_params.widths[-1]

    monkeypatch.setattr(models.regnet, "RegNet", last_width)
    names = models.list_models(module=models, include="regnet_*")
    assert teacher.REGNETS == {name: models.get_model(name, weights=None) for name in names}
    assert len(set(teacher.REGNETS.values())) == len(names)


@pytest.mark.parametrize("name", ["regnet_x_800mf", "regnet_y_400mf"])
def test_the_architecture_is_read_from_the_tensors(name, tmp_path):
    state = models.get_model(name, weights=None, num_classes=3).state_dict()
    loaded = teacher.load_any(save(tmp_path, {"model": state}))
    assert (loaded.size, loaded.num_classes, loaded.classes) == (name, 3, None)
    assert difference(loaded.model.state_dict(), state) is None


def test_a_regnets_image_size_is_that_asked_for_or_of_its_recipe_or_224(tmp_path):
    state = small_regnet().state_dict()
    path = save(tmp_path, {"model": state, "recipe": {"image_size": 160}})
    assert teacher.load_any(path, image_size=96).image_size == 96
    assert teacher.load_any(path).image_size == 160
    assert teacher.load_any(save(tmp_path, {"model": state})).image_size == 224


def test_a_fresh_classifier_is_made_for_other_classes_only_and_said(tmp_path, capsys):
    for model, head in ((small_regnet(), "fc"), (deit.create_model("tiny", num_classes=3), "head")):
        path = save(tmp_path, {"model": model.state_dict(), "classes": CLASSES})
        teacher.load_any(path, classes=CLASSES)
        assert capsys.readouterr().out == ""
        for others in (["cat", "dog"], ["cat", "dog", "eel"]):
            assert teacher.load_any(path, classes=others).num_classes == len(others)
            assert capsys.readouterr().out == (
                f"fresh weights, not from the file: {head}.weight, {head}.bias\n")


def test_names_lead_to_the_documented_files():
    for source, file in (("official", "/regnety_160-a5fe301d.pth"),
                         ("regnet_y_16gf", "/regnet_y_16gf-3e4a00f9.pth"),
                         ("RegNet_Y_16GF_Weights.IMAGENET1K_V1", "/regnet_y_16gf-9e6ed7dd.pth")):
        assert teacher.weights_url(source).endswith(file)
    for absent in ("regnet_y_128gf", "RegNet_Y_16GF_Weights.V9"):
        with pytest.raises(ValueError, match="torchvision has no weights RegNet_Y_1"):
            teacher.weights_url(absent)


def test_a_regnet_that_torchvision_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher.pth: not a RegNet of torchvision: .* width 100"):
        teacher.load_any(save(tmp_path, {"fc.weight": torch.zeros(3, 100)}))


def test_a_damaged_regnet_is_refused_by_name(tmp_path):
    state = small_regnet().state_dict()
    state["stem.1.running_var"][2] = float("nan")
    with pytest.raises(ValueError, match="teacher.pth: its stem.1.running_var is not"):
        teacher.load_any(save(tmp_path, {"model": state}))


def test_the_command_describes_a_teacher(tmp_path, capsys):
    path = save(tmp_path, timm.create_model("regnetx_004_tv", num_classes=3).state_dict())
    assert run_main(teacher, path) == 0
    printed = capsys.readouterr().out
    assert printed == f"{path}: regnet_x_400mf at 224 pixels, 3 classes, names None\n"


def test_an_absent_file_is_one_line(capsys):
    assert run_main(teacher, "absent.pth") == 1
    assert re.fullmatch(r"teacher.py: no weights file 'absent.pth'.*\n", capsys.readouterr().err)
