"""A run cannot be lost, fooled or silently wrong: kills, full disks, damaged files, nan."""
import os
import resource
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch

import data
import evaluate
import teacher
import train
from conftest import ROOT, load, run_main, small_run, write_folder
from kill_and_resume import distilled_run, finish, kill_and_resume, start, write_inputs

EPOCHS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole_run(place):
    """The folder of a distilled run that was left alone."""
    assert run_main(train, *distilled_run(place, place / "run", "--epochs", EPOCHS)) == 0
    return place / "run"


def assert_saved(folder, epochs):
    """last.pth is whole, of that many epochs, and its weights are finite."""
    last = load(folder / "last.pth")
    assert len(last["log"]) == epochs
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


# ---------------------------------------------------------------------------------------
# Kills


def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(place, whole_run, tmp_path):
    assert kill_and_resume(place, whole_run, tmp_path / "run", EPOCHS, seed=1) is None


def test_three_processes_survive_a_kill_of_all_and_of_one_rank_to_the_same_bits(place, tmp_path):
    """Three: the sum of two does not depend on their order. The second kill is of one rank."""
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    finish(start(place, alone, 9, processes=3), alone)
    assert kill_and_resume(place, alone, cut, 9, processes=3, kills=2, seed=2) is None


def test_ctrl_c_says_from_where_resume_goes_on(shared_folder, tmp_path, monkeypatch, capsys):
    def ctrl_c(progress, epoch, step, lr):
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Progress, "end_step", ctrl_c)
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 2)) == 1
    assert "--resume goes on after the last epoch in log.jsonl\n" in capsys.readouterr().err
    assert_saved(tmp_path / "run", 1)


def test_a_run_that_stopped_before_its_first_save_is_resumed_from_the_start(
        folder, tmp_path, capsys):
    """By a validation image that cannot be read, which it meets before the first epoch."""
    path = folder / "val" / "dog" / "3.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    flags = small_run(folder, tmp_path / "run", "--resume")
    assert run_main(train, *flags) == 1
    assert f"train.py: cannot read image {path}" in capsys.readouterr().err

    path.write_bytes(whole)
    assert run_main(train, *flags) == 0
    assert_saved(tmp_path / "run", 1)


# ---------------------------------------------------------------------------------------
# What a run goes on with


def test_a_resumed_run_keeps_its_recipe_where_nothing_is_typed(whole_run, monkeypatch):
    def note_recipe(recipe, checkpoint, *_):
        recipes.append(recipe)
        return checkpoint["log"]

    recipes = []
    monkeypatch.setattr(train, "train", note_recipe)
    assert run_main(train, "--resume", "--output", whole_run) == 0
    assert run_main(train, "--resume", "--output", whole_run, "--compile") == 0
    saved = train.Recipe(**load(whole_run / "last.pth")["recipe"])
    assert recipes == [saved, train.replace(saved, compile=True)]


@pytest.mark.parametrize("flags", [("--lr", "5e-5"), ("--recipe", "transfer")])
def test_a_flag_or_preset_that_contradicts_the_run_is_named(flags, whole_run, capsys):
    assert run_main(train, "--resume", "--output", whole_run, *flags) == 1
    assert "--lr 5e-05 contradicts the run" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_images_and_labels_only(folder, whole_run, capsys):
    (folder / "train" / "cat" / "0.jpg").rename(folder / "train" / "dog" / "new.jpg")
    assert run_main(train, "--resume", "--output", whole_run, "--data", folder) == 1
    assert "were made with files " in capsys.readouterr().err


def test_a_run_that_keeps_no_labels_goes_on_without_an_image_and_says_so(
        folder, tmp_path, capsys):
    flags = small_run(folder, tmp_path / "run")
    assert run_main(train, *flags) == 0
    (folder / "train" / "cat" / "0.jpg").unlink()
    assert run_main(train, *flags, "--resume") == 0
    assert "train/ has changed since the run began" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused_in_one_line(whole_run, tmp_path, capsys):
    content = bytearray((whole_run / "last.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.pth").write_bytes(content)
    assert run_main(train, "--resume", "--output", tmp_path) == 1
    printed = capsys.readouterr().err
    message = "train.py: cannot read tensors and plain values from "
    assert printed.startswith(f"{message}{tmp_path}/last.pth: ") and printed.count("\n") == 1


# ---------------------------------------------------------------------------------------
# Two runs in one folder; processes that disagree


def test_a_run_is_named_after_the_data_as_typed_and_not_after_the_target_of_a_link(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ILSVRC2012").mkdir()
    (tmp_path / "imagenet").symlink_to("ILSVRC2012")
    (tmp_path / "runs/tiny-imagenet/earlier").mkdir(parents=True)
    assert run_main(train) == 1
    assert "runs/tiny-imagenet is not empty" in capsys.readouterr().err


def test_a_second_run_does_not_start_in_a_folder(shared_folder, whole_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole_run.iterdir()}
    assert run_main(train, *small_run(shared_folder, whole_run)) == 1
    assert f"train.py: {whole_run} is not empty: --resume" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole_run.iterdir()} == before


def test_of_two_runs_that_find_a_folder_empty_the_second_is_refused(shared_folder, tmp_path):
    recipe = train.Recipe(data=str(shared_folder), image_size=32, batch_size=24, epochs=1,
                          workers=0, precision="fp32")
    first, second = (train.find_run(tmp_path, recipe, {}, resume=False) for _ in range(2))
    world = evaluate.World(0, 1, 0, torch.device("cpu"))
    train.train(*first, world, tmp_path)
    with pytest.raises(FileExistsError, match="recipe.json"):
        train.train(*second, world, tmp_path)
    assert_saved(tmp_path, 1)


def test_best_weights_without_a_run_to_resume_are_not_overwritten(
        shared_folder, tmp_path, capsys):
    (tmp_path / "best.pth").write_bytes(b"the best")
    assert run_main(train, *small_run(shared_folder, tmp_path, "--resume")) == 1
    assert "a best.pth, but no last.pth to resume from" in capsys.readouterr().err
    assert (tmp_path / "best.pth").read_bytes() == b"the best"


def run_ranks(*commands):
    """Runs python with these arguments as the two processes of a run, each on a machine of its
    own. Both have to fail. Returns what they print to stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        env = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    env |= os.environ | {"WORLD_SIZE": "2"}
    ranks = [subprocess.Popen([sys.executable, *map(str, command)], env=env | {"RANK": rank},
                              cwd=ROOT, stderr=subprocess.PIPE, text=True)
             for rank, command in zip("01", commands)]
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert all(rank.returncode for rank in ranks), errors
    return errors


def test_processes_of_other_files_and_epochs_are_refused_before_the_first_step(
        place, whole_run, tmp_path):
    fresh = distilled_run(place, tmp_path / "run", "--epochs", EPOCHS)
    others = write_folder(tmp_path / "others", train=17)
    resumed = ("--resume", "--output", whole_run, "--data", others)
    errors = run_ranks(["train.py", *fresh], ["train.py", *resumed])

    files, other_files = (data.fingerprint(data.open_split(folder, train=True))
                          for folder in (place / "images", others))
    assert "the processes differ: [('epochs done, precision, hashes of train/" in errors[0]
    assert f"0, 'fp32', '{files}'" in errors[0]
    assert f"{EPOCHS}, 'fp32', '{other_files}'" in errors[0]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.parametrize("batch_size, message", [
    (24, "train.py: the loss became nan by step 1 of epoch 0"),      # the second step of two
    (48, "train.py: the validation loss is not finite")])            # after the only step
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
        batch_size, message, shared_folder, tmp_path, capsys):
    flags = small_run(shared_folder, tmp_path / "run", "--batch-size", batch_size)
    assert run_main(train, *flags, "--lr", 1e38, "--warmup-epochs", 0) == 1
    assert message in capsys.readouterr().err
    assert_saved(tmp_path / "run", 0)


def test_a_loss_that_is_nan_on_one_rank_stops_all_before_anything_is_saved(
        shared_folder, tmp_path):
    faulty = ("import train; train.Progress.add = "
              "lambda self, losses: self.sums.fill_(float('nan')); train.main()")
    flags = small_run(shared_folder, tmp_path / "run")
    errors = run_ranks(["train.py", *flags], ["-c", faulty, *flags])
    assert "the loss became nan" in errors[1] and "the loss became nan" not in errors[0]
    assert_saved(tmp_path / "run", 0)


def test_under_fp16_a_gradient_that_overflows_is_skipped_and_is_no_divergence(
        shared_folder, tmp_path, monkeypatch):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**18)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    flags = small_run(shared_folder, tmp_path / "run", "--epochs", 2, "--precision", "fp16")
    assert run_main(train, *flags) == 0
    last = load(tmp_path / "run" / "last.pth")
    steps = last["optimizer"]["state"][0]["step"].item()
    assert 0 < steps < 4                                     # some of four were skipped
    assert last["scaler"]["scale"] == 2.0**18 / 2 ** (4 - steps)     # and halved the scale


# ---------------------------------------------------------------------------------------
# Files and teachers


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_of_the_epoch_before(
        shared_folder, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress, epoch, step, lr):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20 if epoch else limits[0], limits[1]))

    monkeypatch.setattr(train.Progress, "end_step", fill)
    try:
        assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 2)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "train.py: [Errno 27] File too large\n" in capsys.readouterr().err
    assert_saved(tmp_path / "run", 1)
    assert load(tmp_path / "run" / "best.pth")["record"]["epoch"] == 0


def test_a_decompression_bomb_is_refused(tmp_path):
    (tmp_path / "bomb.ppm").write_bytes(b"P6 60000 60000 255\n")
    with pytest.raises(ValueError, match="bomb.ppm: .*decompression bomb"):
        data.read_rgb(tmp_path / "bomb.ppm")


def test_a_teacher_that_always_names_the_largest_class_is_refused(tmp_path, capsys):
    """It gets 80 % of the images right."""
    images = write_folder(tmp_path / "images", train=8, val=24)
    for name in ("dog", "owl"):
        for number in range(3, 24):
            (images / "val" / name / f"{number}.jpg").unlink()

    model = teacher.create_regnet("regnet_x_400mf", 3)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([1.0, 0.0, 0.0])       # cat
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")

    flags = ("--distill", "--teacher", tmp_path / "teacher.pth")
    assert run_main(train, *small_run(images, tmp_path / "run", *flags)) == 1
    assert "could be chance" in capsys.readouterr().err and not (tmp_path / "run").exists()
