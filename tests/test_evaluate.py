"""Evaluation against an independent loop, on any number of processes."""
import math
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import models, transforms

import data
import deit
import evaluate
from conftest import run_script


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A distilled DeiT-tiny of 3 classes at 32 pixels, whose logits spread."""
    torch.manual_seed(0)
    model = deit.create_model("tiny", distilled=True, image_size=32, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("weights") / "deit.pth"
    torch.save({"model": model.state_dict(), "classes": ["cat", "dog", "owl"]}, path)
    return path


def independent_numbers(model, folder):
    """Top-1, top-5 and mean loss, one image at a time, with transforms put together by hand."""
    chain = transforms.Compose([transforms.Resize(32, Image.Resampling.BICUBIC), transforms.CenterCrop(32),
                                transforms.ToTensor(), transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])
    hits, losses = [], []
    for label, name in enumerate(("cat", "dog", "owl")):
        for path in (folder / "val" / name).iterdir():
            with torch.no_grad():
                logits = model(chain(Image.open(path).convert("RGB"))[None])
            hits.append(int(logits.argmax()) == label)
            losses.append(F.cross_entropy(logits, torch.tensor([label])).item())
    return 100 * np.mean(hits), np.mean(losses)


def test_numbers_equal_an_independent_loops_on_one_two_and_three_processes(weights, shared_folder):
    top1, loss = independent_numbers(deit.load_model(weights), shared_folder)
    outputs = [run_script("evaluate.py", "--weights", weights, "--data", shared_folder, "--batch-size", 4, "--workers", 1,
                          processes=processes).stdout.splitlines() for processes in (None, 2, 3)]
    assert outputs[0] == outputs[1] == outputs[2]                        # 15 images: 8 + 7, and 5 + 5 + 5
    assert outputs[0][-1] == f"* Acc@1 {top1:.3f} Acc@5 100.000 loss {loss:.3f}"
    assert [line.split()[0] for line in outputs[0][-4:-1]] == ["class", "distillation", "mean"]
    assert any("15 images; short side to 36" in line for line in outputs[0])
    assert outputs[0][-2].split()[1:] == outputs[0][-1].split()[1:]


def test_the_val_folder_itself_gives_the_same(weights, shared_folder):
    outputs = [run_script("evaluate.py", "--weights", weights, "--data", path).stdout.splitlines()[-4:]
               for path in (shared_folder, shared_folder / "val")]
    assert outputs[0] == outputs[1]


class Constant(torch.nn.Module):
    """Logits that make each score easy to count: the class in the red channel's first pixel, undecided by `margin`."""

    def forward(self, images):
        return images[:, 0, 0, :10].contiguous()


def test_counting_is_exact_for_batches_that_do_not_divide():
    pixels = torch.randint(0, 256, (23, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(23) % 10
    logits = data.normalize(pixels)[:, 0, 0, :10]
    order = logits.argsort(dim=1, descending=True)
    for batch_size in (1, 4, 23, 64):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels, labels), batch_size=batch_size)
        score = evaluate.evaluate(Constant(), loader, torch.device("cpu"))["mean"]
        assert score.images == 23
        assert score.correct1 == (order[:, 0] == labels).sum()
        assert score.correct5 == (order[:, :5] == labels[:, None]).sum()
        assert score.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-6)


def test_a_loss_that_is_not_finite_is_nan():
    score = evaluate.Score(*evaluate.count(torch.tensor([[0.0, float("nan")], [1.0, 2.0]]), torch.tensor([1, 1])).tolist())
    assert np.isnan(score.loss) and score.images == 2


def test_a_teacher_is_evaluated_like_any_other_model(shared_folder, tmp_path):
    model = evaluate.teacher.create_regnet("regnet_x_400mf", 3)
    torch.save({"model": model.state_dict(), "recipe": {"image_size": 48}}, tmp_path / "teacher.pth")
    lines = run_script("evaluate.py", "--weights", tmp_path / "teacher.pth", "--data", shared_folder).stdout.splitlines()
    assert "image size 48" in lines[0] and re.fullmatch(r"\* Acc@1 \d+\.\d{3} Acc@5 100\.000 loss \d+\.\d{3}", lines[-1])


def evaluate_in_process(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.err


@pytest.mark.parametrize("args, message", [
    (["--weights", "{weights}", "--data", "absent"], "no dataset 'absent'"),
    (["--weights", "{weights}", "--data", "demo"], "the weights are for other classes than the data: 10 folder(s) unknown"),
    (["--weights", "{text}", "--data", "{data}"], "is not a checkpoint"),
    (["--weights", "absent.pth", "--data", "{data}"], "no weights file 'absent.pth'"),
    (["--weights", "{weights}", "--data", "{data}", "--image-size", "33"], "try 32"),
    (["--weights", "{weights}", "--data", "{data}", "--crop-ratio", "0"], "--crop-ratio above 0 and at most 1"),
    (["--weights", "{weights}", "--data", "{data}", "--modle", "tiny"], "unrecognized arguments: --modle"),
    (["--weights", "{weights}", "--image", "absent.jpg"], "cannot read image absent.jpg"),
    (["--weights", "{weights}", "--data", "{data}", "--attention", "map.png"], "one or the other"),
    (["--weights", "{weights}"], "give --data DIR to evaluate on, or --image FILE")])
def test_a_mistake_is_one_line_and_a_status(args, message, weights, shared_folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "notes.pth"
    text.write_text("hello\nworld\n")
    args = [arg.format(weights=weights, data=shared_folder, text=text) for arg in args]
    status, printed = evaluate_in_process(monkeypatch, capsys, *args)
    assert status not in (0, None) and message in printed
    assert printed.count("\n") == 1 and "Traceback" not in printed


def test_other_class_names_are_refused(weights, tmp_path, monkeypatch, capsys):
    for name in ("cat", "dog", "pig"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name / "1.png")
    status, printed = evaluate_in_process(monkeypatch, capsys, "--weights", weights, "--data", tmp_path)
    assert status == 1 and "1 folder(s) unknown to the model, such as 'pig'; it knows 'cat'" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Parts of ImageNet, and what is published


def imagenet_model(classes=None):
    return evaluate.Loaded(None, 224, 1000, classes)


WORDNET_IDS = [f"n{number:08d}" for number in range(10, 1010)]


def test_a_part_of_imagenet_is_matched_by_the_ids_of_a_reference_folder(tmp_path):
    for name in WORDNET_IDS:
        (tmp_path / name).mkdir()
    part = [WORDNET_IDS[7], WORDNET_IDS[300], WORDNET_IDS[999]]
    assert evaluate.match_classes(part, imagenet_model(), str(tmp_path)) == [7, 300, 999]
    assert evaluate.match_classes(part, imagenet_model(WORDNET_IDS), None) == [7, 300, 999]
    assert evaluate.match_classes(WORDNET_IDS, imagenet_model(), None) is None
    with pytest.raises(ValueError, match="add --reference DIR"):
        evaluate.match_classes(part, imagenet_model(), None)


def test_numbered_folders_are_imagenets_labels_in_their_own_order():
    folders = sorted(str(number) for number in range(1000))              # as ImageNet-V2: "0", "1", "10", "100", ...
    assert evaluate.match_classes(folders, imagenet_model(), None)[:4] == [0, 1, 10, 100]


def test_an_incomplete_reference_is_refused(tmp_path):
    (tmp_path / WORDNET_IDS[0]).mkdir()
    with pytest.raises(ValueError, match="has 1 class folders and the model 1000"):
        evaluate.match_classes(WORDNET_IDS[:5], imagenet_model(), str(tmp_path))


def test_matched_classes_are_scored_among_themselves():
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, columns = torch.arange(12) % 3, [8, 2, 5]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels, labels), batch_size=5)
    score = evaluate.evaluate(Constant(), loader, torch.device("cpu"), columns=columns)["mean"]
    logits = torch.stack([data.normalize(pixels)[:, 0, 0, column] for column in columns], dim=1)
    assert score.correct1 == (logits.argmax(dim=1) == labels).sum()
    assert score.loss == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)


def test_a_part_of_the_classes_is_evaluated_by_the_command_line(weights, shared_folder, tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("dog", "owl"):
        (tmp_path / "val" / name).symlink_to(shared_folder / "val" / name)
    output = run_script("evaluate.py", "--weights", weights, "--data", tmp_path).stdout
    assert "the data has 2 of the model's 3 classes: matched by name" in output and "10 images" in output


@pytest.mark.parametrize("top1, images, expected", [
    (74.40, 50_000, "difference -0.076 +0.000: within noise"), (60.0, 50_000, "check your data"), (74.4, 49_999, None)])
def test_published_weights_are_compared_with_what_was_published(top1, images, expected):
    score = evaluate.Score(images, round(top1 * images / 100), round(0.9192 * images), 0, 0)
    for weights in ("tiny-distilled", "some/where/deit_tiny_distilled_patch16_224-b40b3cf7.pth"):
        line = evaluate.verdict(weights, score)
        assert line is None if expected is None else expected in line
    assert evaluate.verdict("mine.pth", score) is None


def test_a_folder_that_is_not_the_validation_set_is_noted(shared_folder):
    notes = evaluate.imagenet_notes(data.open_split(shared_folder, train=False))
    assert "not WordNet ids (n01440764, ...) but 'cat'" in notes[0]
    assert "3 of 3 classes do not have 50 images (cat has 5): it is not the validation set" in notes[1]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("size", [(1, 40), (500, 333), (333, 500), (224, 224), (1000, 37)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "I;16"])
def test_what_the_model_sees_is_timms_evaluation_transform_of_any_picture(size, mode, tmp_path):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    image.save(path)
    chain = timm.data.create_transform(224, is_training=False, crop_pct=0.875, interpolation="bicubic")
    expected = chain(Image.open(path).convert("RGB"))
    assert torch.equal(data.normalize(data.eval_transform(224)(data.read_rgb(path))[None])[0], expected)


def test_pictures_get_their_five_likeliest_classes(weights, shared_folder):
    path = shared_folder / "val" / "owl" / "2.jpg"
    lines = run_script("evaluate.py", "--weights", weights, "--image", path).stdout.splitlines()
    image = data.normalize(data.eval_transform(32)(Image.open(path))[None])
    with torch.no_grad():
        probabilities = deit.load_model(weights)(image).softmax(dim=1)[0]
    expected = sorted(zip(probabilities.tolist(), ("cat", "dog", "owl")), reverse=True)
    assert lines == [str(path)] + [f"  {100 * probability:6.2f} %  {name}" for probability, name in expected]


def test_imagenet_models_get_torchvisions_names():
    names = evaluate.class_names(imagenet_model())
    assert len(names) == 1000 and names[0] == "tench" and names == models.ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    assert evaluate.class_names(imagenet_model(WORDNET_IDS)) == names
    assert evaluate.class_names(evaluate.Loaded(None, 32, 2, ["a", "b"])) == ["a", "b"]


def test_rollout_and_last_block_are_what_the_figure_shows(weights, monkeypatch):
    model, shown = deit.load_model(weights), []
    monkeypatch.setattr(evaluate, "highlight", lambda images, patches: shown.append(patches) or images)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        figure = evaluate.attention_figure(model, images, ["one", "two"])
        maps = model.attention_maps(images).double().numpy()
    for n in range(2):
        rollout = np.eye(6)
        for block in maps[n]:
            mixed = 0.5 * sum(block) / 3 + 0.5 * np.eye(6)
            rollout = (mixed / mixed.sum(axis=1, keepdims=True)) @ rollout
        expected = [maps[n, -1].mean(0)[0, 2:], rollout[0, 2:], maps[n, -1].mean(0)[1, 2:], rollout[1, 2:]]
        assert all(np.allclose(ours[n], theirs, atol=1e-5) for ours, theirs in zip(shown, expected, strict=True))
    assert figure.width > figure.height > 300


def test_the_figure_is_brightest_where_the_attention_is():
    images = data.normalize(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    patches = torch.tensor([[0.1] * 10 + [0.9] + [0.1] * 5])              # row 2, column 2 of 4 x 4
    brightness = evaluate.highlight(images, patches)[0].mean(dim=0)
    row, column = divmod(int(brightness.argmax()), 64)
    assert (row // 16, column // 16) == (2, 2)
    assert math.isclose(brightness.max(), images.mean(), rel_tol=0.1)  # between two patches' centres


def test_the_attention_figure_is_written_by_the_command_line(weights, shared_folder, tmp_path):
    paths = [shared_folder / "val" / "cat" / "0.jpg", shared_folder / "val" / "dog" / "0.jpg"]
    done = run_script("evaluate.py", "--weights", weights, "--image", *paths, "--attention", tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").width > 5 * 150 and "class and distillation token" in done.stdout
