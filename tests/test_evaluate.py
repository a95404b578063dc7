"""Evaluation against timm and numpy, on any number of processes."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torchvision import models

import data
import deit
import evaluate
from conftest import randomize, run_main, run_script
from evaluate import Score, World, find_class_indices, one_line_errors
from teacher import Loaded

CPU = torch.device("cpu")


def scores_of(logits, labels):
    """What is printed for logits (B, K): top-1, top-5 and mean loss, calculated by numpy."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    of_labels = logits[np.arange(len(labels)), labels]
    better = (logits > of_labels[:, None]).sum(axis=1)
    top1, top5 = 100 * np.mean(better < 1), 100 * np.mean(better < 5)
    loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - of_labels)
    return f"Acc@1 {top1:.3f} Acc@5 {top5:.3f} loss {loss:.3f}"


def timm_transform(size, ratio=0.875):
    return timm.data.create_transform(size, crop_pct=ratio, interpolation="bicubic")


@pytest.fixture(scope="module")
def from_timm(tmp_path_factory):
    """14 pictures of as many shapes, in 7 classes; random weights of timm's distilled DeiT-tiny at
    96 pixels, and of a plain one to teach it, which has the classes in reverse; {output: logits}
    by timm's models and transform."""
    root, paths = tmp_path_factory.mktemp("timm"), []
    rng = np.random.default_rng(0)
    for n in range(14):
        path = root / "val" / "abcdefg"[n // 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(rng.uniform(0, 255, 3), 60, (90 + 9 * n, 210 - 7 * n, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        paths.append(path)

    plain, distilled = [
        randomize(timm.create_model(name, num_classes=7, img_size=96), std=0.15)
        for name in ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")]
    torch.save({"model": plain.state_dict(), "classes": list("gfedcba")}, root / "teacher.pth")
    torch.save({"model": distilled.state_dict()}, root / "deit.pth")

    images = torch.stack([timm_transform(96)(Image.open(path)) for path in paths])
    with torch.no_grad():
        outputs = {"teacher.pth mean": plain(images).flip(1)}
        mean = distilled(images)
        distilled.set_distilled_training(True)               # in training mode it gives both heads
        of_class, of_distillation = distilled.train()(images)
    outputs |= {"deit.pth class": of_class, "deit.pth distillation": of_distillation,
                "deit.pth mean": mean}
    return SimpleNamespace(root=root, weights=root / "deit.pth", paths=paths, outputs=outputs,
                           labels=[n // 2 for n in range(14)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A distilled DeiT-tiny at 32 pixels, which knows the names of shared_folder's classes."""
    model = randomize(deit.create_model("tiny", distilled=True, image_size=32, num_classes=3))
    path = tmp_path_factory.mktemp("weights") / "deit.pth"
    torch.save({"model": model.state_dict(), "classes": ["cat", "dog", "owl"]}, path)
    return path


@pytest.fixture
def printed_by(capsys):
    """Runs evaluate.py in this process and returns the lines it prints."""
    def run(*args):
        status = run_main(evaluate, *args, "--workers", 0)
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out.splitlines()
    return run


# ---------------------------------------------------------------------------------------
# The numbers


# in batches of 4 each process has 14, 7 + 7 or 5 + 5 + 4 of the images
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_scores_and_agreements_equal_timms_on_any_number_of_processes(
        processes, from_timm, printed_by):
    args = ("--weights", from_timm.weights, "--data", from_timm.root, "--batch-size", 4,
            "--teacher", from_timm.root / "teacher.pth")
    if processes == 1:
        lines = printed_by(*args)
    else:
        done = run_script("evaluate.py", *args, "--workers", 1, processes=processes)
        lines = done.stdout.splitlines()

    expected = ["14 images, short side to 109, bicubic, center 96 x 96",
                f"{from_timm.root}/teacher.pth: tiny, folder g is its class 0",
                f"{from_timm.weights}: tiny, folder g is its class 6"]
    decisions = [logits.argmax(dim=1).numpy() for logits in from_timm.outputs.values()]
    for (name, logits), own in zip(from_timm.outputs.items(), decisions):
        shares = " ".join(f"{100 * np.mean(own == others):.3f}" for others in decisions)
        expected.append(f"{from_timm.root}/{name}: {scores_of(logits, from_timm.labels)}, "
                        f"agreement with each {shares}")
    expected.append(f"* {scores_of(from_timm.outputs['deit.pth mean'], from_timm.labels)}")
    assert lines == expected


def test_the_val_folder_itself_gives_the_same(from_timm, printed_by):
    one, other = [printed_by("--weights", from_timm.weights, "--data", folder)
                  for folder in (from_timm.root, from_timm.root / "val")]
    assert one == other


def test_another_image_size_and_crop_ratio_are_used(from_timm, printed_by):
    images = [timm_transform(48, 0.5)(Image.open(path)) for path in from_timm.paths]
    with torch.no_grad():
        logits = deit.load_model(from_timm.weights, image_size=48)(torch.stack(images))
    lines = printed_by("--weights", from_timm.weights, "--data", from_timm.root,
                       "--image-size", 48, "--crop-ratio", 0.5)
    assert lines[0] == "14 images, short side to 96, bicubic, center 48 x 48"
    assert lines[-1] == f"* {scores_of(logits, from_timm.labels)}"


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK"])
def test_what_the_model_sees_is_timms_evaluation_transform_of_any_picture(mode, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "picture.tiff"
    for width, height in ((1, 40), (500, 333), (333, 500), (224, 224), (1000, 37)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        seen = data.normalize(data.eval_transform(224)(data.read_rgb(path))[None])[0]
        expected = timm_transform(224)(Image.open(path).convert("RGB"))
        assert torch.equal(seen, expected), (width, height)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_counting_is_exact_for_batches_that_do_not_divide(batch_size):
    order = torch.rand(23, 12, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    pixels = (20 * order).byte().view(23, 3, 2, 2)           # 12 different values in each image
    labels = torch.arange(23) % 12
    batches = zip(pixels.split(batch_size), labels.split(batch_size))

    # in training mode, which would drop half of the logits
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout())
    score = evaluate.evaluate(model, batches, CPU)["mean"]
    assert score.images == 23
    assert (f"Acc@1 {score.top1:.3f} Acc@5 {score.top5:.3f} loss {score.loss:.3f}"
            == scores_of(data.normalize(pixels).flatten(1), labels))


def test_chance_is_to_name_the_most_frequent_class_of_all_processes(monkeypatch):
    """Here of class 1, 20 + 40 of 100 images, plus three standard deviations of a binomial."""
    monkeypatch.setattr(evaluate, "all_reduce", lambda own: own + torch.tensor([10, 40, 0, 0]))
    labels = torch.tensor(25 * [0] + 20 * [1] + 5 * [2], dtype=torch.float64)
    score = Score(100, 0.0, 0.0, 0.0, None, labels)
    assert evaluate.chance_level(score, 4) == pytest.approx(60 + 3 * (100 * 0.6 * 0.4) ** 0.5)


# ---------------------------------------------------------------------------------------
# Weights and classes


def test_averaged_weights_are_evaluated_if_asked_for(weights, shared_folder, tmp_path, printed_by):
    state = torch.load(weights, weights_only=True)["model"]
    fresh = deit.create_model("tiny", image_size=32, num_classes=3).state_dict()
    torch.save({"model": fresh, "averaged_model": state}, tmp_path / "last.pth")
    one = printed_by("--weights", weights, "--data", shared_folder)
    other = printed_by("--weights", tmp_path / "last.pth", "--data", shared_folder, "--ema")
    assert one[-1] == other[-1]


WORDNET_IDS = [f"n{number:08d}" for number in range(1440764, 1441764)]
PART = [WORDNET_IDS[7], WORDNET_IDS[300], WORDNET_IDS[999]]
NUMBERS = sorted(str(number) for number in range(1000))      # as ImageNet-V2: 0, 1, 10, 100, ...


def knowing(classes, number=None):
    return Loaded(None, "tiny", 224, number or len(classes), classes)


@pytest.mark.parametrize("folders, loaded, expected", [
    (PART, knowing(WORDNET_IDS), [7, 300, 999]),
    (["cat", "dog"], knowing(["owl", "dog", "cat"]), [2, 1]),
    (NUMBERS, knowing(NUMBERS), list(range(1000))),          # trained on numbered folders
    (NUMBERS, knowing(WORDNET_IDS), [int(name) for name in NUMBERS]),
    (NUMBERS, knowing(None, 1000), [int(name) for name in NUMBERS]),
    (["cat", "dog", "owl"], knowing(None, 3), [0, 1, 2])])
def test_folders_are_classes_by_name_then_by_number_then_in_order(folders, loaded, expected):
    assert find_class_indices(folders, loaded) == expected


def test_a_part_of_imagenet_is_matched_by_the_names_of_a_whole_reference(tmp_path):
    for name in ("cat", "dog", "elk", "owl"):
        (tmp_path / name).mkdir()
    assert find_class_indices(["dog", "owl"], knowing(None, 4), tmp_path) == [1, 3]

    (tmp_path / "elk").rmdir()
    with pytest.raises(ValueError, match="add --reference DIR, a whole val/"):
        find_class_indices(["dog", "owl"], knowing(None, 4), tmp_path)


@pytest.mark.parametrize("folders, loaded", [
    (["cat", "dog", "pig"], knowing(["cat", "dog", "owl"])),
    ([*WORDNET_IDS, "misc"], knowing(WORDNET_IDS)),
    (["1", "2", "102"], knowing(None, 1000))])
def test_classes_that_do_not_fit_are_refused(folders, loaded):
    message = f"the model's {loaded.num_classes} classes are others than the data's"
    with pytest.raises(ValueError, match=message):
        find_class_indices(folders, loaded)


def test_a_part_of_the_classes_is_scored_among_themselves(from_timm, tmp_path, printed_by):
    for name in ("b", "g"):
        shutil.copytree(from_timm.root / "val" / name, tmp_path / "val" / name)
    lines = printed_by("--weights", from_timm.weights, "--data", tmp_path,
                       "--reference", from_timm.root / "val")
    logits = from_timm.outputs["deit.pth mean"][[2, 3, 12, 13]][:, [1, 6]]
    assert lines[-1] == f"* {scores_of(logits, [0, 0, 1, 1])}"


# ---------------------------------------------------------------------------------------
# Single pictures


def test_pictures_get_their_five_likeliest_classes(from_timm, printed_by):
    paths = [from_timm.paths[9], from_timm.paths[0]]
    probabilities = from_timm.outputs["deit.pth mean"][[9, 0]].double().softmax(dim=1)
    expected = []
    for path, row in zip(paths, probabilities.tolist()):
        best = sorted(zip(row, range(7)), reverse=True)[:5]
        expected += [str(path), *(f"  {100 * share:6.2f}%  class {label}" for share, label in best)]
    assert printed_by("--weights", from_timm.weights, "--image", *paths) == expected


def test_a_file_name_that_is_not_utf8_is_shown(weights, shared_folder, tmp_path, printed_by):
    picture = tmp_path / "caf\udce9.jpg"
    shutil.copy(shared_folder / "val" / "cat" / "0.jpg", picture)
    assert printed_by("--weights", weights, "--image", picture)[0].endswith("caf\\udce9.jpg")


def test_imagenet_models_get_torchvisions_names_and_others_those_in_the_checkpoint():
    names = models.ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    assert names[0] == "tench"
    assert evaluate.class_names(knowing(None, 1000)) == names
    assert evaluate.class_names(knowing(WORDNET_IDS)) == names
    assert evaluate.class_names(knowing(["a", "b"])) == ["a", "b"]


# ---------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("args, message", [
    (["--data", "absent"], "no folder 'absent/val'"),
    (["--data", "demo"], "the model's 3 classes are others than the data's"),
    (["--weights", "absent.pth"], "no weights file 'absent.pth'"),
    (["--weights", __file__], "cannot read tensors and plain values"),     # it is a text
    (["--image-size", "33"], "try 48"),
    (["--crop-ratio", "0"], "--crop-ratio is from 0.1 to 1"),
    (["--batch-size", "many"], "invalid int value: 'many'"),
    (["--modle", "tiny"], "unrecognized arguments: --modle"),
    (["--ema"], "deit.pth: "),                               # it holds no averaged weights
    (["--image", "absent.jpg"], "give --data DIR to evaluate on or --image FILE")])
def test_a_mistake_on_the_command_line_is_one_line_and_status_1(
        args, message, weights, shared_folder, capsys):
    right = ["--weights", weights, "--data", shared_folder]
    assert run_main(evaluate, *right, *args) == 1            # of a flag given twice the last counts
    printed = capsys.readouterr().err
    assert printed.startswith("evaluate.py: ") and message in printed
    assert printed.count("\n") == 1


def test_an_output_that_is_not_finite_has_no_accuracy(weights, shared_folder, tmp_path, capsys):
    checkpoint = torch.load(weights, weights_only=True)
    for tensor in checkpoint["model"].values():
        tensor *= 1e30                                       # finite, but the logits overflow
    torch.save(checkpoint, tmp_path / "large.pth")
    args = "--weights", tmp_path / "large.pth", "--data", shared_folder, "--workers", 0
    assert run_main(evaluate, *args) == 1
    printed = capsys.readouterr()
    assert "Acc@1" not in printed.out
    assert f"evaluate.py: {tmp_path / 'large.pth'}: its output is not finite" in printed.err


def exit_code(error):
    """What the program ends with: Python prints a text and makes it status 1."""
    with pytest.raises(SystemExit) as end, one_line_errors("evaluate.py"):
        raise error
    return end.value.code


@pytest.mark.parametrize("error", [
    FileNotFoundError(2, "No such file or directory", "a.pth"), ValueError("wrong"),
    FloatingPointError("the loss is nan")])
def test_a_users_mistake_becomes_one_line(error):
    assert exit_code(error) == f"evaluate.py: {error}"


@pytest.mark.parametrize("bug", [KeyError("name"), RuntimeError("shapes differ")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)), one_line_errors("evaluate.py"):
        raise bug


def test_of_a_loader_workers_error_the_last_line_is_shown():
    try:
        data.read_rgb("absent.jpg")
    except ValueError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")      # by the worker
    with pytest.raises(ValueError, match="Traceback") as received:
        sent.reraise()
    line = "evaluate.py: cannot read image absent.jpg: no such file, or not a regular one"
    assert exit_code(received.value) == line


def test_a_later_process_is_silent_and_torchruns_summary_has_its_line(tmp_path, monkeypatch):
    file = str(tmp_path / "error.json")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
    assert exit_code(ValueError("it is 'wrong'")) == 1
    summary = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=file)
    assert summary.message == "evaluate.py: it is 'wrong'"


@pytest.mark.parametrize("given, missing", [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_torchruns_environment_is_refused(given, missing, monkeypatch):
    monkeypatch.setenv(given, "1")
    monkeypatch.delenv(missing, raising=False)
    with pytest.raises(ValueError, match=missing):
        evaluate.init_processes()


def test_one_process_of_each_machine_goes_first(monkeypatch):
    order = []
    monkeypatch.setattr(evaluate.dist, "barrier", lambda: order.append("barrier"))
    for local_rank in (0, 1):
        world = World(rank=2 + local_rank, size=4, local_rank=local_rank, device=CPU)
        with evaluate.local_rank_zero_first(world):
            order.append(f"process {local_rank} downloads")
    assert order == ["process 0 downloads", "barrier", "barrier", "process 1 downloads"]
