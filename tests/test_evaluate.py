"""Evaluation against an independent loop, on any number of processes."""
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
    assert any("15 images; short side to 32, bicubic, centre 32 x 32" in line for line in outputs[0])
    assert outputs[0][-2].split()[1:] == outputs[0][-1].split()[1:]


def test_the_val_folder_itself_gives_the_same(weights, shared_folder):
    outputs = [run_script("evaluate.py", "--weights", weights, "--data", path).stdout.splitlines()[-4:]
               for path in (shared_folder, shared_folder / "val")]
    assert outputs[0] == outputs[1]


class Constant(torch.nn.Module):
    """Logits that are easy to follow: the first ten red pixels."""

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


def test_agreement_counts_each_heads_decisions_that_are_the_teachers(shared_folder, capsys, monkeypatch, tmp_path):
    torch.manual_seed(0)
    student = evaluate.deit.create_model("tiny", distilled=True, image_size=32, num_classes=3).eval()
    guide = evaluate.teacher.create_regnet("regnet_x_400mf", 3).train()
    images = torch.stack([evaluate.data.eval_transform(32)(image) for image, _ in data.open_split(shared_folder, train=False).images])
    images = data.normalize(images)
    with torch.no_grad():
        guide(images)                                                    # batch statistics that tell the images apart
        student.head.weight.mul_(100)
        student.head_dist.weight.mul_(100)
        decided = guide.eval()(images).argmax(dim=1)
        own = [logits.argmax(dim=1) for logits in student.forward_heads(images)]
    expected = [100 * (head == decided).double().mean().item() for head in own]
    torch.save(student.state_dict(), tmp_path / "student.pth")
    torch.save(guide.state_dict(), tmp_path / "teacher.pth")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--weights", str(tmp_path / "student.pth"), "--data", str(shared_folder),
                                     "--workers", "0", "--teacher", str(tmp_path / "teacher.pth")])
    evaluate.main()
    printed = capsys.readouterr().out
    assert 0 < expected[0] < 100 or 0 < expected[1] < 100
    for head, value in zip(("class", "distillation"), expected):
        assert re.search(rf"^{head} .* agreement with the teacher {value:.3f}$", printed, re.MULTILINE), printed


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
    (["--weights", "{weights}", "--data", "demo"], "the weights are for other classes than the data: 10 of 10 folder(s) unknown"),
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
    assert status == 1 and "1 of 3 folder(s) unknown to the model, such as 'pig'; it knows 'cat'" in printed


# ---------------------------------------------------------------------------------------------------
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
    with pytest.raises(ValueError, match="has 1 class folders .*: give a complete"):
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


@pytest.mark.parametrize("top1, images, size, expected", [
    (74.40, 50_000, 224, "difference -0.076 +0.000: within noise"), (60.0, 50_000, 224, "check your data"),
    (74.4, 49_999, 224, "not comparable, these are 49,999 images"), (74.4, 50_000, 384, "not comparable, published at 224")])
def test_published_weights_are_compared_with_what_was_published(top1, images, size, expected):
    score = evaluate.Score(images, round(top1 * images / 100), round(0.9192 * images), 0, 0)
    for weights in ("tiny-distilled", "some/where/deit_tiny_distilled_patch16_224-b40b3cf7.pth"):
        assert expected in evaluate.verdict(weights, size, 0.875, score)
    assert evaluate.verdict("mine.pth", size, 0.875, score) is None


def test_a_folder_that_is_not_the_validation_set_is_noted(shared_folder):
    split = data.open_split(shared_folder, train=False)
    notes = evaluate.imagenet_notes(split, imagenet_model())
    assert "not WordNet ids (n01440764, ...) but 'cat'" in notes[0]
    assert "3 of 3 classes do not have 50 images (cat has 5): it is not the whole validation set" in notes[1]
    assert len(evaluate.imagenet_notes(split, imagenet_model(split.classes))) == 1       # matched by name: no first note


@pytest.mark.parametrize("folder, message", [
    (WORDNET_IDS + ["misc"], "1 folder\\(s\\) are not WordNet ids, such as 'misc': move them away"),
    (WORDNET_IDS[1:], "class folders are missing"), (["1", "2", "102"], "give the data the model was trained for"),
    (WORDNET_IDS + ["n09999999"], "more than ImageNet-1k")])
def test_missing_and_extra_class_folders_are_told_apart(folder, message):
    with pytest.raises(ValueError, match=message):
        evaluate.match_classes(sorted(folder), imagenet_model())


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory):
    """A published file's name on random weights, and 1,000 class folders of one 8 x 8 picture."""
    place = tmp_path_factory.mktemp("imagenet")
    torch.manual_seed(0)
    weights = place / "deit_tiny_patch16_224-a1311bcf.pth"
    model, average = (deit.create_model("tiny", image_size=32).state_dict() for _ in range(2))
    torch.save({"model": model, "model_ema": average}, weights)
    for name in WORDNET_IDS:
        (place / "val" / name).mkdir(parents=True)
        pixels = np.random.default_rng(int(name[1:])).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "val" / name / "1.png")
    return weights, place / "val"


def run_in_process(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, args)])
    evaluate.main()
    return capsys.readouterr().out.splitlines()


def test_every_flag_of_evaluate_does_what_it_says(imagenet_like, tmp_path, monkeypatch, capsys):
    weights, val = imagenet_like
    (tmp_path / "val").mkdir()
    for name in WORDNET_IDS[5:25]:
        (tmp_path / "val" / name).symlink_to(val / name)
    whole = run_in_process(monkeypatch, capsys, "--weights", weights, "--data", val, "--workers", 0)
    assert any(line.startswith("note: 1000 of 1000 classes do not have 50 images") for line in whole)
    assert whole[-2].startswith("published: Acc@1 72.202 Acc@5 91.124; difference -") and "1,000 images" in whole[-2]
    part = run_in_process(monkeypatch, capsys, "--weights", weights, "--data", tmp_path, "--reference", val, "--workers", 0)
    assert any("the data has 20 of the model's 1000 classes" in line for line in part)
    averaged = run_in_process(monkeypatch, capsys, "--weights", weights, "--data", val, "--workers", 0, "--ema")
    assert averaged[-1] != whole[-1]
    larger = [run_in_process(monkeypatch, capsys, "--weights", weights, "--data", tmp_path, "--reference", val, "--workers", 0,
                             "--image-size", 48, "--crop-ratio", ratio) for ratio in (0.875, 0.5)]
    assert "short side to 54" in larger[0][1] and "short side to 96" in larger[1][1] and larger[0][-1] != larger[1][-1]


def test_whole_folder_numbers_equal_an_independent_loops_where_the_picture_is_cut(tmp_path):
    reference = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, img_size=96).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    chain = timm.data.create_transform(96, is_training=False, crop_pct=0.875, interpolation="bicubic")
    rng, hits, losses = np.random.default_rng(0), [], []
    for n in range(10):
        path = tmp_path / "val" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90 + 9 * n, 170 - 7 * n, 3), dtype=np.uint8)).save(path)
        with torch.no_grad():
            logits = reference(chain(Image.open(path).convert("RGB"))[None])
        hits.append(int(logits.argmax()) == n % 2)
        losses.append(F.cross_entropy(logits, torch.tensor([n % 2])).item())
    output = run_script("evaluate.py", "--weights", tmp_path / "timm.pth", "--data", tmp_path, "--workers", 1, processes=2).stdout
    assert output.splitlines()[-1] == f"* Acc@1 {100 * np.mean(hits):.3f} Acc@5 100.000 loss {np.mean(losses):.3f}"


def test_one_process_per_machine_goes_first(monkeypatch):
    order = []
    monkeypatch.setattr(evaluate.dist, "barrier", lambda: order.append("barrier"))
    for local_rank in (0, 1):
        order.append(f"process {local_rank}")
        with evaluate.one_per_machine_first(evaluate.Place(torch.device("cpu"), local_rank, 2, local_rank, 2, 0)):
            order.append("download")
    assert order == ["process 0", "download", "barrier", "process 1", "barrier", "download"]


def test_averaged_weights_of_a_regnet_are_evaluated_when_asked_for(tmp_path):
    states = [evaluate.teacher.create_regnet("regnet_x_400mf", 3).state_dict() for _ in range(2)]
    torch.save({"model": states[0], "model_ema": states[1]}, tmp_path / "teacher.pth")
    for ema, state in zip((False, True), states):
        assert torch.equal(evaluate.load_any(str(tmp_path / "teacher.pth"), ema=ema).model.fc.weight, state["fc.weight"])


# ---------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("size", [(1, 40), (500, 333), (333, 500), (224, 224), (1000, 37)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA"])
def test_what_the_model_sees_is_timms_evaluation_transform_of_any_picture(size, mode, tmp_path):
    rng = np.random.default_rng(0)
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
        columns = evaluate.attention_columns(model, images)
        maps = model.attention_maps(images).double().numpy()
    for n in range(2):
        rollout = np.eye(6)
        for block in maps[n]:
            mixed = 0.5 * sum(block) / 3 + 0.5 * np.eye(6)
            rollout = (mixed / mixed.sum(axis=1, keepdims=True)) @ rollout
        expected = [maps[n, -1].mean(0)[0, 2:], rollout[0, 2:], maps[n, -1].mean(0)[1, 2:], rollout[1, 2:]]
        assert all(np.allclose(ours[n], theirs, atol=1e-5) for ours, theirs in zip(shown, expected, strict=True))
    assert list(columns) == ["picture", "class, last block", "class, rollout", "distillation, last block", "distillation, rollout"]


def test_the_figure_is_yellow_where_the_attention_is_and_grey_where_it_is_least():
    images = data.normalize(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    patches = torch.tensor([[0.1] * 10 + [0.9] + [0.1] * 5])             # row 2, column 2 of 4 x 4
    mean, std = data.mean_and_std(torch.device("cpu"))
    red, _, blue = (evaluate.highlight(images, patches)[0] * std + mean).unbind()
    row, column = divmod(int((red - blue).argmax()), 64)
    assert (row // 16, column // 16) == (2, 2) and (red - blue)[row, column] > 0.6
    assert torch.allclose(red[:24, :24], blue[:24, :24], atol=1e-6)


def test_the_attention_figure_is_written_by_the_command_line(weights, shared_folder, tmp_path):
    paths = [shared_folder / "val" / "cat" / "0.jpg", shared_folder / "val" / "dog" / "0.jpg"]
    done = run_script("evaluate.py", "--weights", weights, "--image", *paths, "--attention", tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").width > 5 * 150 and "class and distillation token" in done.stdout
