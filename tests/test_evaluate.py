"""Evaluation against timm and numpy, on any number of processes."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torchvision import models

import data
import deit
import evaluate
from conftest import randomize, run_main, run_script
from evaluate import Score, World, find_class_indices, one_line_errors
from teacher import Loaded

AT_48 = "--image-size", 48, "--crop-ratio", 0.5


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
    """14 pictures of 14 shapes in 7 classes; files of timm's distilled DeiT-tiny at 96 pixels and
    of a plain one to teach it, which has the classes in reverse; {output: logits} by timm."""
    root, rng = tmp_path_factory.mktemp("timm"), np.random.default_rng(0)
    paths = [root / "val" / "abcdefg"[n // 2] / f"{n}.png" for n in range(14)]
    for n, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(rng.uniform(0, 255, 3), 60, (90 + 9 * n, 210 - 7 * n, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    plain, distilled = [
        randomize(timm.create_model(name, num_classes=7, img_size=96), std=0.15)
        for name in ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")]
    torch.save({"model": plain.state_dict(), "classes": list("gfedcba")}, root / "teacher.pth")
    torch.save({"model": distilled.state_dict()}, root / "deit.pth")

    images = torch.stack([timm_transform(96)(Image.open(path)) for path in paths])
    with torch.no_grad():
        teachers, mean = plain(images).flip(1), distilled(images)
        distilled.set_distilled_training(True)               # in training mode: both heads
        of_class, of_distillation = distilled.train()(images)
    outputs = {"teacher.pth mean": teachers, "deit.pth class": of_class,
               "deit.pth distillation": of_distillation, "deit.pth mean": mean}
    return SimpleNamespace(root=root, weights=root / "deit.pth", paths=paths, outputs=outputs,
                           labels=[n // 2 for n in range(14)])


@pytest.fixture
def printed_by(capsys):
    """Runs evaluate.py in this process and returns the lines it prints."""
    def run(*args):
        status = run_main(evaluate, *args, "--workers", 0)
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out.splitlines()
    return run


MEAN_AND_STD = "ImageNet's mean and standard deviation"


# in batches of 4 each process has 14, 7 + 7 or 5 + 5 + 4 of the images
@pytest.mark.parametrize("processes, batches", [(1, 4), (2, 2), (3, 2)])
def test_scores_and_agreements_equal_timms_on_any_number_of_processes(
        processes, batches, from_timm):
    done = run_script(
        "evaluate.py", "--weights", from_timm.weights, "--data", from_timm.root,
        "--teacher", from_timm.root / "teacher.pth", "--batch-size", 4, "--workers", 1,
        processes=processes)

    expected = [
        f"14 images, short side to 109, bicubic, center 96 x 96, {MEAN_AND_STD}",
        f"{from_timm.root}/teacher.pth: tiny, scored among 7 of its 7 classes, matched by name",
        f"{from_timm.weights}: tiny, scored among 7 of its 7 classes, in the folders' order"]
    decisions = [logits.argmax(dim=1).numpy() for logits in from_timm.outputs.values()]
    for (name, logits), own in zip(from_timm.outputs.items(), decisions):
        shares = " ".join(f"{100 * np.mean(own == others):.3f}" for others in decisions)
        expected.append(f"{from_timm.root}/{name}: {scores_of(logits, from_timm.labels)}, "
                        f"agreement with each {shares}")
    expected.append(f"* {scores_of(from_timm.outputs['deit.pth mean'], from_timm.labels)}")
    assert done.stdout.splitlines() == expected
    assert f"| {batches}/{batches} [" in done.stderr         # the progress of the first process


def logits_at_48(from_timm):
    images = [timm_transform(48, 0.5)(Image.open(path)) for path in from_timm.paths]
    with torch.no_grad():
        return deit.load_model(from_timm.weights, image_size=48)(torch.stack(images))


def test_another_image_size_and_crop_ratio_are_used(from_timm, printed_by):
    lines = printed_by("--weights", from_timm.weights, "--data", from_timm.root,
                       "--teacher", from_timm.root / "teacher.pth", *AT_48)
    assert lines[0].startswith("14 images, short side to 96, bicubic, center 48 x 48, ")
    assert lines[-1] == f"* {scores_of(logits_at_48(from_timm), from_timm.labels)}"


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK"])
def test_what_the_model_sees_is_timms_evaluation_transform_of_any_picture(mode, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "picture.tiff"
    for width, height in ((1, 40), (500, 333), (333, 500), (224, 224), (1000, 37)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        seen = data.normalize(data.eval_transform(224)(data.read_rgb(path))[None])[0]
        expected = timm_transform(224)(Image.open(path).convert("RGB"))
        assert torch.equal(seen, expected), (width, height)


def test_a_model_in_training_mode_is_evaluated_in_evaluation_mode():
    pixels = torch.randperm(240).byte().view(20, 3, 2, 2)    # no two are equally likely
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout())
    score = evaluate.evaluate(model, [(pixels, torch.zeros(20).long())], "cpu")["mean"]
    assert score.decisions.tolist() == data.normalize(pixels).flatten(1).argmax(dim=1).tolist()


def test_chance_is_to_name_the_most_frequent_class_of_all_processes(monkeypatch):
    """Here of class 1, 20 + 40 of 100 images, plus three standard deviations of a binomial."""
    monkeypatch.setattr(evaluate, "all_reduce", lambda own: own + torch.tensor([10, 40, 0, 0]))
    labels = torch.tensor(25 * [0] + 20 * [1] + 5 * [2], dtype=torch.float64)
    score = Score(100, 0.0, 0.0, 0.0, 0.0, None, labels)
    assert evaluate.chance_level(score, 4) == pytest.approx(60 + 3 * (100 * 0.6 * 0.4) ** 0.5)


def knowing(classes, number=None):
    return Loaded(None, "tiny", 224, number or len(classes), classes)


WORDNET_IDS = [f"n{number:08}" for number in range(1000)]
NUMBERS = sorted(map(str, range(1000)))                      # "0", "1", "10", "100", ...


@pytest.mark.parametrize("folders, loaded, expected, how", [
    (["dog", "elk"], knowing(["cat", "dog", "elk"]), [1, 2], "matched by name"),
    (["0", "1", "10"], knowing(["0", "1", "10"]), [0, 1, 2], "matched by name"),
    (NUMBERS, knowing(WORDNET_IDS), [*map(int, NUMBERS)], "matched by number"),
    (NUMBERS, knowing(None, 1000), [*map(int, NUMBERS)], "matched by number"),
    (WORDNET_IDS, knowing(None, 1000), [*range(1000)], "in the folders' order"),
    (["0", "1", "10"], knowing(None, 3), [0, 1, 2], "in the folders' order")])
def test_folders_are_classes_by_name_then_by_imagenets_numbers_then_in_order(
        folders, loaded, expected, how):
    assert find_class_indices(folders, loaded) == (expected, how)


@pytest.mark.parametrize("folders, loaded", [
    (["cat", "dog", "pig"], knowing(["cat", "dog", "owl"])),
    (["0", "1", "2"], knowing(["cat", "dog", "owl"])),
    (["cat", "dog"], knowing(["cat", "dog", "owl"], 1000)),  # of a reference that is no whole one
    (NUMBERS, knowing(None, 10)),
    (sorted(map(str, range(1, 1001))), knowing(None, 1000)),
    (["1", "2", "102"], knowing(None, 1000))])
def test_classes_that_do_not_fit_are_refused(folders, loaded):
    message = f"the model's {loaded.num_classes} classes are not those of the data"
    with pytest.raises(ValueError, match=message):
        find_class_indices(folders, loaded)


def test_a_part_of_the_classes_is_scored_among_themselves(from_timm, tmp_path, printed_by):
    for name in ("b", "g"):
        shutil.copytree(from_timm.root / "val" / name, tmp_path / "val" / name)
    lines = printed_by("--weights", from_timm.weights, "--data", tmp_path,
                       "--reference", from_timm.root / "val")
    logits = from_timm.outputs["deit.pth mean"][[2, 3, 12, 13]]
    of_all = 100 * (logits.argmax(dim=1) == torch.tensor([1, 1, 6, 6])).double().mean()
    assert lines[-1] == (f"* {scores_of(logits[:, [1, 6]], [0, 0, 1, 1])} "
                         f"(among all its classes Acc@1 {of_all:.3f})")
    assert "scored among 2 of its 7 classes, matched by name" in lines[1]


def test_pictures_get_their_five_likeliest_classes(from_timm, printed_by):
    paths = [from_timm.paths[9], from_timm.paths[0]]
    probabilities = logits_at_48(from_timm)[[9, 0]].double().softmax(dim=1)
    expected = []
    for path, row in zip(paths, probabilities.tolist()):
        best = sorted(zip(row, range(7)), reverse=True)[:5]
        expected.append(str(path))
        expected += [f"  {100 * share:6.2f}%  class {label}" for share, label in best]
    assert printed_by("--weights", from_timm.weights, "--image", *paths, *AT_48) == expected


def test_averaged_weights_of_three_classes_name_these_three(from_timm, tmp_path, printed_by):
    state = deit.create_model("tiny", image_size=32, num_classes=3).state_dict()
    weights = tmp_path / "last.pth"
    torch.save({"averaged_model": state, "classes": ["cat", "dog", "owl"]}, weights)
    lines = printed_by("--weights", weights, "--ema", "--image", from_timm.paths[0])
    assert sorted(line.split()[-1] for line in lines[1:]) == ["cat", "dog", "owl"]


def test_a_file_name_that_is_not_utf8_is_shown(from_timm, tmp_path, printed_by):
    picture = shutil.copy(from_timm.paths[0], tmp_path / "caf\udce9.png")
    lines = printed_by("--weights", from_timm.weights, "--image", picture)
    assert lines[0].endswith("caf\\udce9.png")


def test_imagenets_classes_get_torchvisions_names():
    names = models.ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    assert evaluate.class_names(knowing(None, 1000)) == names
    assert evaluate.class_names(knowing(["n01440764", *names[1:]])) == names


@pytest.mark.parametrize("args, message", [
    (["--weights", "absent.pth"], "no weights file 'absent.pth'"),
    (["--data", "demo"], "the model's 7 classes are not those of the data"),
    (["--crop-ratio", "0"], "--crop-ratio is from 0.1 to 1"),
    (["--batch-size", "many"], "invalid int value: 'many'"),
    (["--ema"], "it holds no averaged weights"),
    (["--image", "absent.jpg"], "give --data DIR to evaluate on or --image FILE")])
def test_a_mistake_on_the_command_line_is_one_line_and_status_1(args, message, from_timm, capsys):
    right = ["--weights", from_timm.weights, "--data", from_timm.root]
    assert run_main(evaluate, *right, *args) == 1            # of the same flag the last counts
    printed = capsys.readouterr().err
    assert printed.startswith("evaluate.py: ") and message in printed
    assert printed.count("\n") == 1


def test_an_output_that_is_not_finite_has_no_accuracy(from_timm, tmp_path, capsys):
    state = torch.load(from_timm.weights, weights_only=True)["model"]
    large = {name: 1e30 * tensor for name, tensor in state.items()}      # the logits overflow
    torch.save({"model": large}, tmp_path / "large.pth")
    args = "--weights", tmp_path / "large.pth", "--data", from_timm.root, "--workers", 0
    assert run_main(evaluate, *args) == 1
    printed = capsys.readouterr()
    assert "Acc@1" not in printed.out
    assert f"evaluate.py: {tmp_path / 'large.pth'}: its output is not finite" in printed.err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes differ"), one_line_errors("evaluate.py"):
        raise RuntimeError("shapes differ")


def test_an_image_that_a_worker_cannot_read_is_one_line(from_timm, tmp_path, capsys):
    shutil.copytree(from_timm.root / "val", tmp_path / "val")
    path = tmp_path / "val" / "a" / "0.png"
    path.write_text("not an image")
    args = "--weights", from_timm.weights, "--data", tmp_path, "--workers", 1
    assert run_main(evaluate, *args) == 1
    printed = capsys.readouterr().err
    assert f"evaluate.py: cannot read image {path}: " in printed and "Traceback" not in printed


def test_a_later_process_is_silent_and_torchruns_summary_has_its_line(tmp_path, monkeypatch):
    file = str(tmp_path / "error.json")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
    with pytest.raises(SystemExit) as end, one_line_errors("evaluate.py"):
        raise ValueError("it is 'wrong'")
    assert end.value.code == 1                               # a text would be printed
    summary = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=file)
    assert summary.message == "evaluate.py: it is 'wrong'"


def test_a_folder_of_pictures_is_named_without_those_that_cannot_be_read(
        from_timm, tmp_path, printed_by, capsys):
    for n, name in ((0, "a.png"), (9, "c.png")):
        shutil.copy(from_timm.paths[n], tmp_path / name)
    (tmp_path / "b.png").write_bytes(from_timm.paths[1].read_bytes()[:200])
    assert run_main(evaluate, "--weights", from_timm.weights, "--image", tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.err == "evaluate.py: not all pictures could be read\n"
    lines = printed.out.splitlines()
    one, other = (printed_by("--weights", from_timm.weights, "--image", tmp_path / name)
                  for name in ("a.png", "c.png"))
    assert lines[:6] == one and lines[7:] == other
    assert lines[6].startswith(f"cannot read image {tmp_path / 'b.png'}: ")


def test_processes_with_other_images_are_refused(monkeypatch):
    def gather(of_all, mine):
        of_all[:] = [mine, "other files"]

    monkeypatch.setattr(evaluate.dist, "all_gather_object", gather)
    world = World(rank=0, size=2, local_rank=0, device="cpu")
    evaluate.compare_processes(world, "other files")
    with pytest.raises(ValueError, match=r"the processes differ: \['mine', 'other files'\]"):
        evaluate.compare_processes(world, "mine")


def test_srun_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="srun started several processes"):
        evaluate.init_processes()


@pytest.mark.parametrize("given, missing", [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_torchruns_environment_is_refused(given, missing, monkeypatch):
    monkeypatch.setenv(given, "1")
    with pytest.raises(ValueError, match=missing):
        evaluate.init_processes()


def test_one_process_of_each_machine_goes_first(monkeypatch):
    order = []
    monkeypatch.setattr(evaluate.dist, "barrier", lambda: order.append("barrier"))
    for local_rank in (0, 1):
        world = World(rank=2 + local_rank, size=4, local_rank=local_rank, device="cpu")
        with evaluate.local_rank_zero_first(world):
            order.append(f"process {local_rank} downloads")
    assert order == ["process 0 downloads", "barrier", "barrier", "process 1 downloads"]
