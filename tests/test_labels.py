"""Kept labels: a run that reads them is the run that asked, or is refused."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import teacher
import train
from conftest import Malicious, difference, run_main


def flags(images, output, source, *more):
    """Two epochs of three steps of two parts; a repeated flag takes its last value."""
    return ("--data", images, "--image-size", 32, "--batch-size", 16, "--accum-steps", 2,
            "--epochs", 2, "--warmup-epochs", 1, "--workers", 0, "--precision", "fp32",
            "--distill", "--teacher", source, "--output", output, *more)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """An untrained RegNet of three classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "teacher.pth"
    torch.save({"model": teacher.create_regnet("regnet_x_400mf", 3).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def asked(shared_folder, network, tmp_path_factory):
    """The folder of a run that asked the network."""
    run = tmp_path_factory.mktemp("asked") / "run"
    assert run_main(train, *flags(shared_folder, run, network, "--any-teacher")) == 0
    return run


@pytest.fixture
def kept(asked, tmp_path):
    """A copy of its labels, to be changed."""
    shutil.copytree(asked / "labels", tmp_path / "kept" / "labels")
    return tmp_path / "kept"


def change_made_with(run, **changes):
    path = run / "labels" / "made-with.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def last_weights(run):
    return torch.load(run / "last.pth", weights_only=True)["model"]


# ---------------------------------------------------------------------------------------
# The same run


def test_the_labels_are_the_teachers_decisions_on_the_erased_and_mixed_views(
        asked, network, shared_folder):
    model = teacher.load_teacher(network, classes=["cat", "dog", "owl"], image_size=32)
    images = data.open_split(shared_folder, train=True)
    sampler = data.RepeatedAugSampler(48, batch_size=8, accum_steps=2)
    sampler.set_epoch(1)

    decisions = []
    for number, (pixels, labels) in enumerate(data.train_loader(images, sampler, 32, workers=0)):
        torch.manual_seed(data.seed_from(0, 1, number // 2, number % 2))
        views = data.erase(data.normalize(pixels))
        views, _ = data.mix(views, labels, 3)
        with torch.no_grad():
            decisions.append(model(views).argmax(dim=1).tolist())

    labels = np.load(asked / "labels" / "epoch-001.npy")
    assert labels.tolist() == decisions and labels.dtype == np.uint16
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("other", [
    (), ("--model", "small", "--alpha", 0.3), ("--lr", 0.01, "--drop-path", 0.3, "--ema", 0.9)])
def test_a_run_from_labels_ends_with_the_bits_of_the_run_that_asks(
        other, asked, network, shared_folder, tmp_path, monkeypatch):
    """Also of another model, rate or loss than the run that kept them."""
    asking, reading = tmp_path / "asking", tmp_path / "reading"
    assert run_main(train, *flags(shared_folder, asking, network, "--any-teacher", *other)) == 0
    monkeypatch.setattr(teacher, "load_teacher", None)       # a call would raise TypeError
    assert run_main(train, *flags(shared_folder, reading, asked, *other)) == 0

    assert difference(last_weights(asking), last_weights(reading)) is None
    assert "agreement" not in (reading / "log.jsonl").read_text()
    assert not (reading / "labels").exists()


def test_a_run_from_labels_stopped_in_mid_epoch_resumes_to_the_same_bits(
        asked, shared_folder, tmp_path, monkeypatch):
    def stop(self, epoch, step, lr):
        if (epoch, step) == (1, 1):
            raise KeyboardInterrupt

    cut = flags(shared_folder, tmp_path / "cut", asked)
    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "end_step", stop)
        assert run_main(train, *cut) == 1
    assert run_main(train, *cut, "--resume") == 0
    assert difference(last_weights(asked), last_weights(tmp_path / "cut")) is None


def test_the_runs_say_where_labels_come_from_and_go(asked, shared_folder, tmp_path, capsys):
    assert run_main(train, *flags(shared_folder, tmp_path / "run", asked)) == 0
    assert f"labels kept by {asked}, 2 epochs\n" in capsys.readouterr().out

    assert run_main(teacher, asked) == 0
    printed = capsys.readouterr().out
    for line in ('"epochs": 2', '"views": 48', '"num_classes": 3', '"torch": "'):
        assert line in printed


# ---------------------------------------------------------------------------------------
# Another run


def test_each_value_that_the_labels_were_made_with_is_compared(kept):
    made_with = teacher.read_made_with(kept)
    epochs = made_with.pop("epochs")
    train.check_kept_labels(kept, made_with, epochs)
    assert {"seed", "batch_size", "part_size", "files", "device", "torch"} < made_with.keys()
    for name in made_with:
        with pytest.raises(ValueError, match=f"with {name} .*, and this run has another"):
            train.check_kept_labels(kept, made_with | {name: "another"}, epochs)


def resize_images(images):
    for path in images.glob("train/*/*.jpg"):
        Image.open(path).resize((20, 20)).save(path)


def test_other_flags_or_other_pixels_under_the_same_names_are_refused(
        asked, folder, tmp_path, capsys):
    run = tmp_path / "run"
    for more, message in ((("--seed", 1), "seed 0, and this run has 1"),
                          (("--accum-steps", 1), "part_size 8, and this run has 16"),
                          (("--epochs", 3), "keeps the labels of 2 of 3 epochs: type --epochs")):
        assert run_main(train, *flags(folder, run, asked, *more)) == 1
        assert message in capsys.readouterr().err

    resize_images(folder)
    assert run_main(train, *flags(folder, run, asked)) == 1
    assert "were made with pixels_of_first_part" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("source, message", [
    ("network", "run were made with teacher"), ("labels", "the run to resume has teacher")])
def test_a_run_is_not_resumed_with_another_teacher(
        source, message, kept, network, shared_folder, tmp_path, capsys):
    teachers = {"network": tmp_path / "teacher.pth", "labels": kept}
    shutil.copy(network, teachers["network"])
    resumed = flags(shared_folder, tmp_path / "run", teachers[source], "--any-teacher",
                    "--resume")
    assert run_main(train, *resumed) == 0

    torch.manual_seed(1)
    state = teacher.create_regnet("regnet_x_400mf", 3).state_dict()
    torch.save({"model": state}, teachers["network"])
    change_made_with(kept, teacher=teacher.identity(teachers["network"]))
    assert run_main(train, *resumed) == 1
    assert message in capsys.readouterr().err


def test_a_run_is_not_resumed_over_labels_of_another(
        kept, network, shared_folder, tmp_path, capsys):
    started = flags(shared_folder, tmp_path / "run", network, "--any-teacher")
    assert run_main(train, *started) == 0
    change_made_with(kept, teacher="another")
    shutil.rmtree(tmp_path / "run" / "labels")
    (kept / "labels").rename(tmp_path / "run" / "labels")
    assert run_main(train, *started, "--resume") == 1
    assert "run were made with teacher another, and this run has" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[1, 2]", "5", "null"])
def test_a_damaged_description_of_labels_is_named(content, kept, capsys):
    path = kept / "labels" / "made-with.json"
    path.write_text(content)
    assert run_main(teacher, kept) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"teacher.py: cannot read {path}: ") and printed.count("\n") == 1


def test_a_run_that_keeps_no_labels_offers_its_weights(shared_folder, tmp_path, capsys):
    (tmp_path / "convnet").mkdir()
    assert run_main(train, *flags(shared_folder, tmp_path / "run", tmp_path / "convnet")) == 1
    assert f"of a run type {tmp_path / 'convnet'}/best.pth" in capsys.readouterr().err


def test_more_classes_than_two_bytes_hold_are_refused():
    images = SimpleNamespace(classes=range(70_000))
    loader = SimpleNamespace(dataset=SimpleNamespace(images=images),
                             sampler=data.RepeatedAugSampler(9))
    with pytest.raises(ValueError, match="70000 classes are too many for hard distillation"):
        train.what_decides(train.Recipe(distill="hard"), loader, "", torch.device("cpu"))


@pytest.mark.parametrize("content", [
    np.zeros((6, 8), np.int64), np.zeros((6, 7), np.uint16), np.full((6, 8), 3, np.uint16),
    np.array([Malicious()]), None, "truncated"])
def test_a_file_that_does_not_hold_an_epochs_labels_is_never_read_as_labels(content, kept):
    path = teacher.label_file(kept, 0)
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_bytes(path.read_bytes()[:-1])
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=f"cannot use the labels in {path}: [^\n]+$"):
        teacher.read_labels(kept, 0, (6, 8), 3)
    assert teacher.read_labels(kept, 1, (6, 8), 3).shape == (6, 8)
