"""Evaluation against an independent loop, on any number of processes."""
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

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
    (["--weights", "{weights}", "--data", "demo"], "knows 3 classes and the data has 10"),
    (["--weights", "{text}", "--data", "{data}"], "is not a checkpoint"),
    (["--weights", "absent.pth", "--data", "{data}"], "no weights file 'absent.pth'"),
    (["--weights", "{weights}", "--data", "{data}", "--image-size", "33"], "try 32"),
    (["--weights", "{weights}", "--data", "{data}", "--crop-ratio", "0"], "--crop-ratio 0.0"),
    (["--weights", "{weights}", "--data", "{data}", "--modle", "tiny"], "unrecognized arguments: --modle"),
    (["--weights", "{weights}"], "required: --data")])
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
    assert status == 1 and "where it has 'owl', the data has 'pig'" in printed
