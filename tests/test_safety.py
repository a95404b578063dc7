"""A run cannot be lost, fooled or silently wrong: kills, full disks, damaged files, nan, bombs."""
import resource
import shutil
import struct
import time
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch

import data
import evaluate
import teacher
import train
from conftest import difference_of_runs, run_main, run_script, write_folder
from kill_and_resume import finish, kill_and_resume, small_run, start, write_images

EPOCHS = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def whole_run(images, tmp_path_factory):
    """The folder of a run left alone, on the CPU as the runs in processes of their own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert run_main(train, *small_run(images, folder, "--epochs", EPOCHS, "--workers", 1)) == 0
    return folder


def read_last(folder):
    return torch.load(folder / "last.pth", weights_only=True)


def assert_saved(folder, epochs):
    """last.pth is whole, of that many epochs, and its weights are finite."""
    last = read_last(folder)
    assert len(last["log"]) == epochs
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


def at_epoch(number, act, monkeypatch):
    """From that fractional epoch on, a run calls `act` in each step."""
    learning_rate = train.learning_rate

    def act_or_not(recipe, epoch):
        if epoch >= number:
            act()
        return learning_rate(recipe, epoch)

    monkeypatch.setattr(train, "learning_rate", act_or_not)


# ---------------------------------------------------------------------------------------
# Kills


@pytest.fixture(scope="module")
def killed_run(images, whole_run, tmp_path_factory):
    """(the folder of a run killed and resumed, the loaders' workers that lost their process)"""
    folder = tmp_path_factory.mktemp("killed") / "run"
    return folder, kill_and_resume(images, whole_run, folder, EPOCHS, seed=1)


def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(whole_run, killed_run):
    assert difference_of_runs(whole_run, killed_run[0]) is None


def test_a_killed_run_leaves_no_process_behind(killed_run):
    """Within some seconds: torch's workers look whether they are alone."""
    def is_running(pid):
        command = Path(f"/proc/{pid}/cmdline")               # empty, if it has ended
        return command.exists() and command.read_bytes()

    _, workers = killed_run
    assert len(workers) == 2                                 # of training and of validation
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.1)


def test_three_processes_survive_a_kill_of_all_and_of_one_rank_to_the_same_bits(images, tmp_path):
    """Three, since the sum of two does not depend on their order. torchrun restarts the second."""
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    finish(start(images, alone, 9, processes=3), alone)
    kill_and_resume(images, alone, cut, 9, processes=3, kills=2, seed=2)
    assert difference_of_runs(alone, cut) is None


def test_ctrl_c_says_from_where_resume_goes_on(images, tmp_path, monkeypatch, capsys):
    def ctrl_c():
        raise KeyboardInterrupt

    at_epoch(1.5, ctrl_c, monkeypatch)
    assert run_main(train, *small_run(images, tmp_path / "run", "--epochs", 2)) == 1
    assert "--resume goes on after the last epoch in log.jsonl\n" in capsys.readouterr().err
    assert_saved(tmp_path / "run", 1)
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 1


def test_resume_starts_a_run_that_was_killed_before_its_first_save(images, tmp_path, monkeypatch):
    def end_here(*_):
        raise SystemExit(9)

    flags = small_run(images, tmp_path / "run", "--epochs", 1, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", end_here)
        assert run_main(train, *flags) == 9
    assert run_main(train, *flags) == 0
    assert_saved(tmp_path / "run", 1)


# ---------------------------------------------------------------------------------------
# Two runs in a folder, processes of two minds


def test_a_second_run_does_not_start_in_a_folder(images, whole_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole_run.iterdir()}
    assert run_main(train, *small_run(images, whole_run)) == 1
    message = f"train.py: {whole_run} is not empty: --resume goes on with the run in it"
    assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole_run.iterdir()} == before


def test_of_two_runs_that_find_a_folder_empty_the_second_is_refused(images, tmp_path):
    folder = tmp_path / "run"
    recipe = train.Recipe(data=str(images), image_size=32, batch_size=12, epochs=1, workers=0,
                          precision="fp32")
    first, second = (train.find_run(folder, recipe, {}, resume=False) for _ in range(2))
    world = evaluate.World(0, 1, 0, torch.device("cpu"))
    train.train(*first, world, folder)
    with pytest.raises(FileExistsError, match="recipe.json"):
        train.train(*second, world, folder)
    assert_saved(folder, 1)


def test_best_weights_without_a_run_to_resume_are_not_overwritten(
        images, whole_run, tmp_path, capsys):
    folder = tmp_path / "kept"
    folder.mkdir()
    shutil.copy(whole_run / "best.pth", folder)
    assert run_main(train, *small_run(images, folder, "--epochs", 1, "--resume")) == 1
    assert "a best.pth, but no last.pth to resume from" in capsys.readouterr().err
    assert (folder / "best.pth").read_bytes() == (whole_run / "best.pth").read_bytes()


def train_files(images):
    return data.fingerprint(data.open_split(images, train=True))


def test_processes_of_other_files_and_epochs_are_refused_before_the_first_step(
        images, whole_run, tmp_path, monkeypatch):
    others = write_folder(tmp_path / "others", train=9, val=2)
    monkeypatch.setenv("FAULT", f"--data {others} --output {whole_run}")
    flags = small_run(images, tmp_path / "run", "--epochs", EPOCHS, "--resume")
    done = run_script("tests/train_with_faults.py", *flags, processes=2, check=False)

    of_both = [(True, 0, train_files(images)), (False, EPOCHS, train_files(others))]
    message = f"the processes differ in (no last.pth, epochs done, training files): {of_both}"
    assert message in done.stderr
    assert done.returncode != 0 and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.parametrize("batch_size, message", [
    (12, "train.py: the loss became nan by step 1 of epoch 0"),      # the second step of two
    (24, "train.py: the validation loss is not finite")])            # after the only step
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
        batch_size, message, images, tmp_path, capsys):
    flags = ("--epochs", 1, "--batch-size", batch_size, "--lr", 1e38, "--warmup-epochs", 0)
    assert run_main(train, *small_run(images, tmp_path / "run", *flags)) == 1
    assert message in capsys.readouterr().err
    assert_saved(tmp_path / "run", 0)


def test_a_loss_that_is_nan_on_one_rank_stops_all_before_anything_is_saved(
        images, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "nan")
    flags = small_run(images, tmp_path / "run", "--epochs", 3)
    done = run_script("tests/train_with_faults.py", *flags, processes=2, check=False)
    assert done.returncode != 0 and "the loss became nan by step 1 of epoch 1" in done.stderr
    assert_saved(tmp_path / "run", 1)


def test_under_fp16_a_gradient_that_overflows_is_skipped_and_is_no_divergence(
        images, tmp_path, monkeypatch):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**18)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    flags = small_run(images, tmp_path / "run", "--epochs", 2, "--precision", "fp16")
    assert run_main(train, *flags) == 0
    last = read_last(tmp_path / "run")
    steps = last["optimizer"]["state"][0]["step"].item()
    assert 0 < steps < 4                                     # some of four were skipped
    assert last["scaler"]["scale"] == 2.0**18 / 2 ** (4 - steps)     # and halved the scale


# ---------------------------------------------------------------------------------------
# Files


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_of_the_epoch_before(
        images, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, limits[1]))
    at_epoch(1, fill, monkeypatch)
    try:
        assert run_main(train, *small_run(images, tmp_path / "run", "--epochs", 2)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "train.py: [Errno 27] File too large\n" in capsys.readouterr().err
    assert_saved(tmp_path / "run", 1)
    best = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    assert best["record"]["epoch"] == 0


@pytest.mark.parametrize("damage", ["a flipped bit", "empty", "half", "without its last byte"])
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, images, whole_run, tmp_path, capsys):
    content = bytearray((whole_run / "last.pth").read_bytes())
    half = len(content) // 2
    if damage == "a flipped bit":
        content[half] ^= 1
    else:
        del content[{"empty": 0, "half": half, "without its last byte": -1}[damage]:]
    path = tmp_path / "last.pth"
    path.write_bytes(content)

    assert run_main(train, *small_run(images, tmp_path, "--resume")) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"train.py: cannot read tensors and plain values from {path}: ")
    assert printed.count("\n") == 1


def test_nothing_of_the_environment_reaches_the_run_folder(images, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "c0ffee-c0ffee")
    assert run_main(train, *small_run(images, tmp_path / "run", "--epochs", 1)) == 0
    assert all(b"c0ffee" not in path.read_bytes() for path in (tmp_path / "run").iterdir())


def test_a_decompression_bomb_is_refused(tmp_path):
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    chunks = header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(ValueError, match="bomb.png: .*decompression bomb"):
        data.read_rgb(tmp_path / "bomb.png")


# ---------------------------------------------------------------------------------------
# Teachers


@pytest.mark.parametrize("number", [24, 3])
def test_a_teacher_that_always_names_the_largest_class_is_refused(number, tmp_path, capsys):
    """Of three classes of 24 images each, and of an uneven set, of which it gets 80 % right."""
    images = write_folder(tmp_path / "images", train=4, val=24)
    for name in ("dog", "owl"):
        for path in sorted((images / "val" / name).iterdir())[number:]:
            path.unlink()

    model = teacher.create_regnet("regnet_x_400mf", 3)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([1.0, 0.0, 0.0])       # cat
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")

    flags = ("--epochs", 1, "--distill", "--teacher", tmp_path / "teacher.pth")
    assert run_main(train, *small_run(images, tmp_path / "run", *flags)) == 1
    assert "could be chance" in capsys.readouterr().err and not (tmp_path / "run").exists()
