"""Evaluation against an independent loop, on any number of processes."""
import io
import json
import os
import re
import shutil
from itertools import product
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

import data
import deit
import evaluate
import teacher
from conftest import randomize, run_main, run_script

CPU = torch.device("cpu")
CLASSES = list("abcdefg")
HEADS = ("class", "distillation", "mean")


def scores_of(logits, labels):
    """What is printed for logits (B, K): top-1, top-5 and mean loss, calculated by numpy."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    better = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return f"Acc@1 {100 * np.mean(better < 1):.3f} Acc@5 {100 * np.mean(better < 5):.3f} loss {np.mean(losses):.3f}"


def lines_of(heads, labels):
    """The last four lines of an evaluation: a line per head, and the model's own output."""
    lines = [f"{name:<13} {scores_of(logits, labels)}" for name, logits in zip(HEADS, heads, strict=True)]
    return [*lines, f"* {scores_of(heads[-1], labels)}"]


@pytest.fixture(scope="module")
def from_timm(tmp_path_factory):
    """Random weights of timm's distilled DeiT-tiny for 7 classes at 96 pixels, without names of classes; 14 pictures
    of as many shapes, of which the centre is cut out; and what timm's model and transform make of them."""
    root = tmp_path_factory.mktemp("timm")
    reference = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, img_size=96)
    torch.save({"model": randomize(reference, std=0.15).state_dict()}, root / "deit.pth")
    chain = timm.data.create_transform(96, is_training=False, crop_pct=0.875, interpolation="bicubic")
    rng, pictures = np.random.default_rng(0), []
    for n in range(14):
        path = root / "val" / CLASSES[n // 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(rng.uniform(0, 255, 3), 60, (90 + 9 * n, 210 - 7 * n, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        pictures.append(chain(Image.open(path)))
    images, labels = torch.stack(pictures), [n // 2 for n in range(14)]
    reference.set_distilled_training(True)
    with torch.no_grad():                                    # in training mode it gives both heads; nothing is random
        heads = reference.train()(images)
    return SimpleNamespace(root=root, weights=root / "deit.pth", images=images, labels=labels,
                           heads=(*heads, sum(heads) / 2))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A distilled DeiT-tiny of 3 classes at 32 pixels, which knows the names of shared_folder's classes."""
    model = randomize(deit.create_model("tiny", distilled=True, image_size=32, num_classes=3))
    path = tmp_path_factory.mktemp("weights") / "deit.pth"
    torch.save({"model": model.state_dict(), "classes": ["cat", "dog", "owl"]}, path)
    return path


@pytest.fixture
def printed_by(capsys):
    """Runs evaluate.py in this process, without loader workers, and returns the lines it prints."""
    def run(*args):
        assert run_main(evaluate, *args, "--workers", 0) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()
    return run


def part_of(source, root, classes):
    """root/val with some of source's class folders."""
    for name in classes:
        shutil.copytree(source / name, root / "val" / name)
    return root


# ---------------------------------------------------------------------------------------------------
# The numbers


# 14 images in batches of 4: 14, 7 + 7 or 5 + 5 + 4 for each process
@pytest.mark.parametrize("processes, workers", [(None, 0), (2, 1), (3, 0)])
def test_numbers_equal_timms_on_any_number_of_processes(processes, workers, from_timm):
    done = run_script("evaluate.py", "--weights", from_timm.weights, "--data", from_timm.root, "--batch-size", 4,
                      "--workers", workers, processes=processes)
    lines = done.stdout.splitlines()
    assert lines[-4:] == lines_of(from_timm.heads, from_timm.labels)
    assert [line for line in lines if "14 images; short side to 109, bicubic, centre 96 x 96" in line] == lines[1:2]


def test_a_rank_without_images_counts_none(weights, shared_folder, tmp_path, printed_by):
    for name in ("dog", "owl"):
        (tmp_path / "val" / name).mkdir(parents=True)
        shutil.copy(shared_folder / "val" / name / "0.jpg", tmp_path / "val" / name)
    guide = randomize(teacher.create_regnet("regnet_x_400mf", 3))
    torch.save({"model": guide.state_dict(), "classes": ["cat", "dog", "owl"]}, tmp_path / "teacher.pth")
    args = "--weights", weights, "--data", tmp_path, "--teacher", tmp_path / "teacher.pth"
    done = run_script("evaluate.py", *args, "--workers", 0, processes=3)
    assert done.stdout.splitlines() == printed_by(*args)


def test_the_val_folder_itself_gives_the_same(from_timm, printed_by):
    one, other = (printed_by("--weights", from_timm.weights, "--data", path)
                  for path in (from_timm.root, from_timm.root / "val"))
    assert one[-4:] == other[-4:]


@pytest.mark.parametrize("ratio", [0.875, 0.5])
def test_another_image_size_and_crop_are_used(ratio, from_timm, printed_by):
    chain = timm.data.create_transform(48, is_training=False, crop_pct=ratio, interpolation="bicubic")
    images = torch.stack([chain(image) for image, _ in data.Folder(from_timm.root / "val")])
    with torch.no_grad():
        logits = deit.load_model(from_timm.weights, image_size=48)(images)
    lines = printed_by("--weights", from_timm.weights, "--data", from_timm.root, "--image-size", 48, "--crop-ratio",
                       ratio)
    assert lines[-1] == f"* {scores_of(logits, from_timm.labels)}"


class Spy(torch.nn.Module):
    """Logits that are easy to follow, the first ten red pixels; keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.batches, self.benchmark = [], []

    def forward(self, images):
        self.batches.append(len(images))
        self.benchmark.append(torch.backends.cudnn.benchmark)
        return images[:, 0, 0, :10].contiguous()


def random_loader(number, batch_size):
    pixels = torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(number) % 10
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=batch_size)
    return loader, data.normalize(pixels)[:, 0, 0, :10], labels


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
def test_counting_is_exact_for_batches_that_do_not_divide(batch_size):
    loader, logits, labels = random_loader(23, batch_size)
    score = evaluate.evaluate(Spy(), loader, CPU)["mean"]
    order = logits.argsort(dim=1, descending=True)
    assert (score.images, score.correct1, score.correct5) == (
        23, (order[:, 0] == labels).sum(), (order[:, :5] == labels[:, None]).sum())
    assert score.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-6)


def test_the_model_sees_batches_of_one_size():
    model = Spy()
    evaluate.evaluate(model, random_loader(11, 4)[0], CPU)
    assert model.batches == [4, 4, 4]


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_does_not_choose_by_timing_and_may_again_afterwards(before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    model = Spy().train(before)
    evaluate.evaluate(model, random_loader(11, 4)[0], CPU)
    assert not any(model.benchmark)
    assert (torch.backends.cudnn.benchmark, model.training) == (before, before)


def regnet_for(images):
    """A small RegNet of 7 classes with fresh weights that tells the images apart: with their batch statistics, and a
    bias that takes away what they have in common."""
    torch.manual_seed(1)
    model = teacher.create_regnet("regnet_x_400mf", 7).train()
    with torch.no_grad():
        model(images)
        model.fc.bias -= model.eval()(images).mean(dim=0)
    return model


@pytest.mark.parametrize("processes", [None, 2, 3])
def test_with_a_teacher_the_agreement_of_every_pair_is_shown_as_in_table_4(processes, from_timm, tmp_path):
    guide = regnet_for(from_timm.images)
    torch.save(guide.state_dict(), tmp_path / "teacher.pth")
    done = run_script("evaluate.py", "--weights", from_timm.weights, "--data", from_timm.root, "--teacher",
                      tmp_path / "teacher.pth", "--batch-size", 4, "--workers", 0, processes=processes)
    with torch.no_grad():
        decided = [logits.argmax(dim=1).numpy() for logits in (guide(from_timm.images), *from_timm.heads)]
    columns = [np.array(from_timm.labels), *decided]
    lines = [line.replace("teacher 1", "teacher").split() for line in done.stdout.splitlines()[-9:-4]]
    assert lines[0] == ["agreement,", "%", "labels", "teacher", *HEADS]
    expected = [[f"{100 * np.mean(one == other):.3f}" for other in columns] for one in decided]
    assert lines[1:] == [[name, *row] for name, row in zip(("teacher", *HEADS), expected)]
    assert len({row[1] for row in expected}) == 4            # so that one head's for another's would be noticed


def test_models_of_another_order_of_classes_and_size_are_compared_with_a_plain_one(shared_folder, tmp_path, printed_by):
    plain = randomize(deit.create_model("tiny", image_size=32, num_classes=3))
    other = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    turned = {"head.weight": other["head.weight"][[2, 0, 1]], "head.bias": other["head.bias"][[2, 0, 1]]}
    torch.save({"model": plain.state_dict(), "classes": ["cat", "dog", "owl"]}, tmp_path / "one.pth")
    torch.save({"model": other | turned, "classes": ["owl", "cat", "dog"]}, tmp_path / "other.pth")
    large = randomize(deit.create_model("tiny", image_size=64, num_classes=3))
    torch.save({"model": large.state_dict(), "classes": ["cat", "dog", "owl"]}, tmp_path / "large.pth")
    lines = printed_by("--weights", tmp_path / "one.pth", "--data", shared_folder, "--teacher", tmp_path / "other.pth",
                       tmp_path / "large.pth")
    alone = printed_by("--weights", tmp_path / "large.pth", "--image-size", 32, "--data", shared_folder)[-1]
    rows = {line[:14].strip(): line[14:].split() for line in lines[-5:-1]}
    assert rows["teacher 1"] == rows["model"] and rows["model"][1] == rows["model"][3] == "100.000"
    assert rows["model"][0] == lines[-1].split()[2] and rows["teacher 2"][0] == alone.split()[2]
    assert rows["teacher 2"][1] == rows["model"][2] != "100.000"


def test_a_teacher_of_other_classes_is_refused_by_name(weights, shared_folder, tmp_path, capsys):
    torch.save({"model": randomize(deit.create_model("tiny", image_size=32, num_classes=2)).state_dict(),
                "classes": ["cat", "fox"]}, tmp_path / "fox.pth")
    status, line = refused(capsys, "--weights", weights, "--data", shared_folder, "--teacher", tmp_path / "fox.pth")
    assert status == 1 and f"{tmp_path / 'fox.pth'}: the weights are for other classes: 2 of 3" in line


def test_a_loss_that_is_not_finite_is_nan():
    class Broken(Spy):
        def forward(self, images):
            return super().forward(images) * torch.tensor([1.0] * 9 + [float("nan")])

    score = evaluate.evaluate(Broken(), random_loader(11, 4)[0], CPU)["mean"]
    assert np.isnan(score.loss) and score.images == 11


def test_one_process_per_machine_goes_first(monkeypatch):
    order = []
    monkeypatch.setattr(evaluate.dist, "barrier", lambda: order.append("barrier"))
    for local_rank in (0, 1):
        order.append(f"process {local_rank}")
        with evaluate.local_rank_zero_first(evaluate.World(CPU, local_rank, 2, local_rank, 2)):
            order.append("download")
    assert order == ["process 0", "download", "barrier", "process 1", "barrier", "download"]


# ---------------------------------------------------------------------------------------------------
# Weights and classes


def test_a_teacher_is_evaluated_at_the_size_it_was_trained_at(from_timm, tmp_path, printed_by):
    model = regnet_for(from_timm.images)
    torch.save({"model": model.state_dict(), "recipe": {"image_size": 96}}, tmp_path / "teacher.pth")
    with torch.no_grad():
        logits = model(from_timm.images)
    lines = printed_by("--weights", tmp_path / "teacher.pth", "--data", from_timm.root)
    assert lines[-1] == f"* {scores_of(logits, from_timm.labels)}"


@pytest.mark.parametrize("create, parameter", [
    (lambda: deit.create_model("tiny", image_size=32, num_classes=3), "head.weight"),
    (lambda: teacher.create_regnet("regnet_x_400mf", 3), "fc.weight")])
def test_averaged_weights_are_evaluated_when_asked_for(create, parameter, tmp_path):
    states = [create().state_dict() for _ in range(2)]
    torch.save({"model": states[0], "averaged_model": states[1]}, tmp_path / "last.pth")
    for ema, state in zip((False, True), states):
        loaded = evaluate.load_any(str(tmp_path / "last.pth"), ema=ema)
        assert torch.equal(loaded.state_dict()[parameter], state[parameter])


def test_published_weights_are_shown_with_what_was_published(from_timm, tmp_path, printed_by, monkeypatch):
    path = shutil.copy(from_timm.weights, tmp_path / "deit_tiny_distilled_patch16_224-b40b3cf7.pth")
    monkeypatch.setitem(deit.URLS, "tiny-distilled", str(path))
    for source, lines in ((path, 1), ("tiny-distilled", 1), (from_timm.weights, 0)):
        printed = printed_by("--weights", source, "--data", from_timm.root)
        assert sum(line.startswith("published: Acc@1 74.476 Acc@5 91.920") for line in printed) == lines


def known(classes, number=1000):
    return SimpleNamespace(num_classes=number, classes=classes)


WORDNET_IDS = [f"n{number:08d}" for number in range(10, 1010)]
PART = [WORDNET_IDS[7], WORDNET_IDS[300], WORDNET_IDS[999]]


def test_a_part_of_imagenet_is_matched_by_the_ids_of_a_reference_folder(tmp_path):
    for name in WORDNET_IDS:
        (tmp_path / name).mkdir()
    assert evaluate.class_indices(PART, known(None), tmp_path) == [7, 300, 999]


def test_a_part_of_the_classes_is_matched_by_the_names_in_the_checkpoint():
    assert evaluate.class_indices(PART, known(WORDNET_IDS)) == [7, 300, 999]
    assert evaluate.class_indices(WORDNET_IDS, known(WORDNET_IDS)) is None


def test_numbered_folders_are_labels_in_the_order_of_the_numbers():
    folders = sorted(str(number) for number in range(1000))              # as ImageNet-V2: "0", "1", "10", "100", ...
    expected = [int(name) for name in folders]
    assert evaluate.class_indices(folders, known(None)) == expected
    assert evaluate.class_indices(folders, known(WORDNET_IDS)) == expected


def test_a_checkpoint_trained_on_numbered_folders_keeps_their_order():
    folders = sorted(str(number) for number in range(12))                # "0", "1", "10", "11", "2", ...
    assert evaluate.class_indices(folders, known(folders, 12)) is None


@pytest.mark.parametrize("folders, model, message", [
    (["cat", "dog", "pig"], known(["cat", "dog", "owl"], 3), r"other classes: 1 of 3 folder\(s\).*unknown.*'pig'"),
    (WORDNET_IDS + ["misc"], known(WORDNET_IDS), r"1 of 1001 folder\(s\).*'misc'"),
    (PART, known(None), r"knows 1000 classes and the data has 3 .*add --reference DIR"),
    (["1", "2", "102"], known(None), "knows 1000 classes and the data has 3")])
def test_classes_that_do_not_fit_are_refused(folders, model, message):
    with pytest.raises(ValueError, match=message):
        evaluate.class_indices(folders, model)


def test_an_incomplete_reference_is_refused(tmp_path):
    (tmp_path / WORDNET_IDS[0]).mkdir()
    with pytest.raises(ValueError, match="has 1 class folders .*: give a complete"):
        evaluate.class_indices(WORDNET_IDS[:5], known(None), tmp_path)


def test_matched_classes_are_scored_among_themselves(from_timm, tmp_path, printed_by):
    part = part_of(from_timm.root / "val", tmp_path, "bg")
    lines = printed_by("--weights", from_timm.weights, "--data", part, "--reference", from_timm.root / "val")
    heads = [head[[2, 3, 12, 13]][:, [1, 6]] for head in from_timm.heads]
    assert lines[-4:] == lines_of(heads, [0, 0, 1, 1])


# ---------------------------------------------------------------------------------------------------
# Mistakes


def refused(capsys, *args):
    """The exit status, and the line that is all that is printed."""
    status = run_main(evaluate, *args)
    captured = capsys.readouterr()
    assert status and re.fullmatch("evaluate.py: .*\n", captured.err), captured.err
    return status, captured.err


@pytest.mark.parametrize("args, message", [
    (["--weights", "{weights}", "--data", "absent"], "no dataset 'absent'"),
    (["--weights", "{weights}", "--data", "demo"], "the weights are for other classes"),
    (["--weights", "{text}", "--data", "{data}"], "cannot read weights"),
    (["--weights", "absent.pth", "--data", "{data}"], "no weights file 'absent.pth'"),
    (["--weights", "{weights}", "--data", "{data}", "--image-size", "33"], "try 32"),
    (["--weights", "{weights}", "--data", "{data}", "--crop-ratio", "0"], "0: it must be from 0.1 to 1"),
    (["--weights", "{weights}", "--data", "{data}", "--batch-size", "many"], "invalid int value: 'many'"),
    (["--weights", "{weights}", "--data", "{data}", "--modle", "tiny"], "unrecognized arguments: --modle"),
    (["--weights", "{weights}", "--data", "{data}", "--ema"], "no averaged weights"),
    (["--weights", "{weights}", "--image", "absent.jpg"], "cannot read image absent.jpg"),
    (["--weights", "{weights}", "--data", "{data}", "--attention", "map.png"], "--attention with --image"),
    (["--weights", "{weights}", "--image", "{jpg}", "--attention", "absent/map.png"], "absent/map.png"),
    (["--weights", "{weights}"], "give --data DIR to evaluate on, or --image FILE")])
def test_a_mistake_is_one_line_and_a_status(args, message, weights, shared_folder, tmp_path, capsys):
    text = tmp_path / "notes.pth"
    text.write_text("hello\nworld\n")
    jpg = shared_folder / "val" / "cat" / "0.jpg"
    args = [arg.format(weights=weights, data=shared_folder, text=text, jpg=jpg) for arg in args]
    assert message in refused(capsys, *args)[1]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def put_in_a_nan(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["norm.bias"][7] = float("nan")
    torch.save(checkpoint, path)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, put_in_a_nan])
def test_damaged_weights_are_refused_with_status_1(damage, weights, shared_folder, tmp_path, capsys):
    path = tmp_path / "damaged.pth"
    damage(shutil.copy(weights, path))
    status, line = refused(capsys, "--weights", path, "--data", shared_folder)
    assert status == 1 and str(path) in line


@pytest.mark.parametrize("model, other, culprit", [("large", "weights", "class"), ("weights", "large", "teacher 1")])
def test_finite_weights_whose_output_is_not_finite_have_no_accuracy(model, other, culprit, weights, shared_folder,
                                                                    tmp_path, capsys):
    checkpoint = torch.load(weights, weights_only=True)
    checkpoint["model"] = {name: 1e30 * tensor for name, tensor in checkpoint["model"].items()}
    torch.save(checkpoint, tmp_path / "large.pth")
    paths = {"weights": weights, "large": tmp_path / "large.pth"}
    assert run_main(evaluate, "--weights", paths[model], "--teacher", paths[other], "--data", shared_folder,
                    "--workers", 0) == 1
    printed = capsys.readouterr()
    assert printed.err.endswith(f"evaluate.py: the output ({culprit}) is not finite: are the weights damaged?\n")
    assert "Acc@1" not in printed.out


@pytest.mark.parametrize("change, message", [({"recipe": {}}, "KeyError: 'image_size'"),
                                             ({"recipe": {"image_size": "big"}}, "invalid literal for int")])
def test_a_teacher_file_with_an_edited_recipe_is_named(change, message, shared_folder, tmp_path, capsys):
    torch.save({"model": teacher.create_regnet("regnet_x_400mf", 3).state_dict()} | change, tmp_path / "regnet.pth")
    assert f"{tmp_path / 'regnet.pth'}: {message}" in refused(capsys, "--weights", tmp_path / "regnet.pth", "--data",
                                                              shared_folder)[1]


def test_a_file_name_that_is_no_utf8_is_shown(weights, shared_folder, tmp_path):
    picture = tmp_path / "caf\udce9.jpg"
    shutil.copy(shared_folder / "val" / "cat" / "0.jpg", picture)
    with mock.patch.dict(os.environ, PYTHONIOENCODING="utf-8:strict"):
        done = run_script("evaluate.py", "--weights", weights, "--image", picture)
    assert "caf\\udce9.jpg" in done.stdout and " %  " in done.stdout


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize("environment", [
    {"RANK": "abc", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    {"RANK": "-1", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2"}, {"RANK": "0"}, {"LOCAL_RANK": "1"}])
def test_an_impossible_environment_is_one_line(environment, weights, shared_folder, monkeypatch, capsys):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, line = refused(capsys, "--weights", weights, "--data", shared_folder)
    assert status == 1 and all(name in line for name in environment)


@pytest.mark.parametrize("flag", ["--weights", "--data", "--reference", "--teacher"])
def test_a_flag_whose_value_is_empty_is_refused(flag, weights, shared_folder, capsys):
    status, line = refused(capsys, "--weights", weights, "--data", shared_folder, flag, "")
    assert status == 2 and "empty" in line


def test_torchruns_error_file_gets_the_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    _, line = refused(capsys, "--weights", "absent.pth", "--data", "demo")
    assert json.loads((tmp_path / "error.json").read_text())["message"] == line.strip()


def test_torchrun_shows_what_only_the_second_process_ran_into(weights, shared_folder, tmp_path):
    root = part_of(shared_folder / "val", tmp_path, ["cat", "dog", "owl"])
    (root / "val" / "cat" / "1.jpg").write_text("not a picture")         # the second image is the second process's
    done = run_script("evaluate.py", "--weights", weights, "--data", root, "--workers", 1, processes=2, check=False)
    message = f"evaluate.py: cannot read image {root / 'val' / 'cat' / '1.jpg'}"
    assert done.returncode == 1 and done.stderr.count(message) == 1, done.stderr
    assert "DataLoader worker" not in done.stderr


# ---------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA"])
def test_what_the_model_sees_is_timms_evaluation_transform_of_any_picture(mode, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    chain = timm.data.create_transform(224, is_training=False, crop_pct=0.875, interpolation="bicubic")
    for width, height in ((1, 40), (500, 333), (333, 500), (224, 224), (1000, 37)):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(path)
        seen = data.normalize(data.eval_transform(224)(data.read_rgb(path))[None])[0]
        assert torch.equal(seen, chain(Image.open(path).convert("RGB"))), (width, height)


def test_pictures_get_their_five_likeliest_classes(from_timm, printed_by):
    order = [9, 0]
    paths = [from_timm.root / "val" / CLASSES[n // 2] / f"{n}.png" for n in order]
    probabilities = from_timm.heads[-1][order].double().softmax(dim=1)
    expected = []
    for path, row in zip(paths, probabilities.tolist()):
        best = sorted(zip(row, range(7)), reverse=True)[:5]
        expected += [str(path), *(f"  {100 * probability:6.2f} %  class {label}" for probability, label in best)]
    assert printed_by("--weights", from_timm.weights, "--image", *paths) == expected


def test_imagenet_models_get_torchvisions_names():
    names = models.ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    assert names[0] == "tench"
    assert evaluate.class_names(known(None)) == evaluate.class_names(known(WORDNET_IDS)) == names


def test_other_models_get_the_names_in_the_checkpoint():
    assert evaluate.class_names(known(["a", "b"], 2)) == ["a", "b"]


def test_rollout_and_last_block_are_what_the_figure_shows(weights):
    model = deit.load_model(weights)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        columns = evaluate.attention_columns(model, images)
        maps = model.attention_maps(images).double().numpy()
    for n in range(2):
        rollout = np.eye(6)
        for block in maps[n]:
            mixed = 0.5 * sum(block) / 3 + 0.5 * np.eye(6)
            rollout = (mixed / mixed.sum(axis=1, keepdims=True)) @ rollout
        expected = [maps[n, -1].mean(0)[0, 2:], rollout[0, 2:], maps[n, -1].mean(0)[1, 2:], rollout[1, 2:]]
        _, *shown = columns.values()
        for (pictures, captions), shares in zip(shown, expected, strict=True):
            red, _, blue = data.denormalize(pictures[n])     # of 2 x 2 patches each has a corner to itself
            corners = (red - blue)[::31, ::31].flatten().numpy()
            assert np.allclose(corners, 0.8 * (shares - shares.min()) / np.ptp(shares), atol=1e-3)
            assert captions[n] == f"{shares.min():.2%} to {shares.max():.2%}"
    assert list(columns) == ["picture"] + [f"{token}, {name}" for token, name in product(
        ("class", "distillation"), ("last block", "rollout"))]


def test_the_figure_is_yellow_where_the_attention_is_and_grey_where_it_is_least():
    images = data.normalize(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    maps = torch.full((1, 1, 1, 17, 17), 0.1)
    maps[..., 0, 11] = 0.9                                   # of the class token to row 2, column 2 of 4 x 4
    model = SimpleNamespace(tokens=["class"], attention_maps=lambda images: maps)
    pictures, _ = evaluate.attention_columns(model, images)["class, last block"]
    red, _, blue = data.denormalize(pictures)[0].unbind()
    row, column = divmod(int((red - blue).argmax()), 64)
    assert (row // 16, column // 16) == (2, 2) and (red - blue)[row, column] > 0.6
    assert torch.allclose(red[:24, :24], blue[:24, :24], atol=1e-6)


def test_the_attention_figure_is_written_by_the_command_line(weights, shared_folder, tmp_path, printed_by):
    paths = [shared_folder / "val" / "cat" / "0.jpg", shared_folder / "val" / "dog" / "0.jpg"]
    lines = printed_by("--weights", weights, "--image", *paths, "--attention", tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").width > 5 * 150 and "attend to" in lines[-1]


def test_the_figure_has_the_name_and_the_prediction_beside_each_picture(weights, shared_folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "draw_grid", lambda columns, rows: drawn.append(rows) or Image.new("RGB", (1, 1)))
    path = shared_folder / "val" / "cat" / "0.jpg"
    model = evaluate.load_any(weights)
    evaluate.describe_pictures(model, [path], CPU, 0.875, io.BytesIO())
    with torch.no_grad():
        shares = model(data.normalize(data.eval_transform(32)(data.read_rgb(path))[None])).softmax(dim=1)[0]
    assert drawn == [[f"0.jpg\n{100 * shares.max():.2f} %  {model.classes[shares.argmax()]}"]]


def test_a_convnet_has_no_attention_to_show(shared_folder, tmp_path, capsys):
    torch.save(teacher.create_regnet("regnet_x_400mf", 3).state_dict(), tmp_path / "teacher.pth")
    picture = shared_folder / "val" / "cat" / "0.jpg"
    status, line = refused(capsys, "--weights", tmp_path / "teacher.pth", "--image", picture, "--attention", "map.png")
    assert status == 1 and "--attention needs a DeiT" in line
