"""A run cannot be lost, fooled or silently wrong: kills, full disks, damaged files, nan, bombs."""
import json
import os
import resource
import signal
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from conftest import run_script
from kill_and_resume import start, survive, wait_for_saves
from test_train import small_run, train_in_process


def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(tmp_path):
    assert survive(tmp_path, 1, 1, 2, seed=2) == (1, None)


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_it_ends_with_the_same_bits(tmp_path):
    assert survive(tmp_path, 1, 2, 1, seed=3, elastic=True) == (1, None)


def test_a_killed_run_leaves_no_process_behind(shared_folder, tmp_path):
    process = start(shared_folder, tmp_path / "run", 50, 1, 2)
    wait_for_saves(process, tmp_path / "run" / "last.pth", 1)
    os.kill(process.pid, signal.SIGKILL)                                 # and not its loader workers
    process.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_all_processes_at_once_saves_and_leaves(processes, shared_folder, tmp_path):
    process = start(shared_folder, tmp_path / "run", 50, processes, 1)  # loader workers get the signal too, as on a cluster
    wait_for_saves(process, tmp_path / "run" / "last.pth", 2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=100) != 0
    printed = (tmp_path / "run.txt").read_text()
    assert "stopped by a signal, saved in" in printed and "DataLoader worker" not in printed, printed


def test_sigterm_during_validation_leaves_the_loaders_alive_to_end_it(shared_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "slow:0:0")                              # each batch of the validation takes a second
    process = start(shared_folder, tmp_path / "run", 50, 1, 1)
    wait_for_saves(process, tmp_path / "run" / "last.pth", 4)            # at the start, after three steps, validation follows
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=100) == 128 + signal.SIGTERM, (tmp_path / "run.txt").read_text()
    state = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["state"]
    assert (state["step"], len(state["log"])) == (4, 1)                  # validated, and one step further, where it stops


def run_with_fault(monkeypatch, fault, *args):
    monkeypatch.setenv("FAULT", fault)
    return run_script("tests/train_with_faults.py", *args, processes=2, check=False)


def test_nan_on_one_rank_stops_all_and_one_line_says_on_which(shared_folder, tmp_path, monkeypatch):
    done = run_with_fault(monkeypatch, "nan:1:4", *small_run(shared_folder, tmp_path / "run"))
    lines = [line for line in done.stderr.splitlines() if "train.py: rank" in line]
    assert done.returncode != 0 and len(lines) == 1
    assert lines[0].split("train.py: ")[1].startswith("rank 1: the loss became nan between steps 1 and 1 of epoch 1")
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["state"]["step"] == 4


def test_a_stuck_rank_ends_the_run_with_a_message_instead_of_hanging_for_ever(shared_folder, tmp_path, monkeypatch):
    done = run_with_fault(monkeypatch, "stuck:1:4", *small_run(shared_folder, tmp_path / "run"))
    assert done.returncode != 0 and "train.py: rank 0 leaves, another process is gone or stuck" in done.stderr, done.stderr
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["state"]["step"] == 4


class Overflowing(torch.autograd.Function):
    """The identity, whose gradient overflows for as long as there are `times` left."""
    times = 0

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        Overflowing.times -= 1
        return gradient * (float("inf") if Overflowing.times >= 0 else 1)


@pytest.fixture
def overflow(monkeypatch):
    forward = train.deit.DeiT.forward
    monkeypatch.setattr(train.deit.DeiT, "forward", lambda self, images: Overflowing.apply(forward(self, images)))
    return lambda times: setattr(Overflowing, "times", times)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(shared_folder, tmp_path, monkeypatch, capsys, overflow):
    overflow(1)
    with pytest.raises(SystemExit) as stop:
        train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run"))
    assert stop.value.code == 1 and torch.load(tmp_path / "run" / "last.pth", weights_only=True)["state"]["step"] == 0
    assert "the gradient is not finite between steps 0 and 0" in capsys.readouterr().err


def in_fp16(monkeypatch):
    """As on a GPU; on a CPU it is refused for being slow."""
    monkeypatch.setattr(train, "choose_precision", lambda precision, place: "fp16")


def test_under_fp16_an_overflow_is_skipped_and_is_no_divergence(shared_folder, tmp_path, monkeypatch, overflow):
    in_fp16(monkeypatch)
    overflow(1)
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 2))
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert last["scaler"]["scale"] == 2**15 and last["optimizer"]["state"][0]["step"] == 5


def test_under_fp16_a_loss_scale_below_1_is_divergence(shared_folder, tmp_path, monkeypatch, capsys, overflow):
    in_fp16(monkeypatch)
    overflow(1000)
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 7))
    assert "the gradient is not finite between steps 1 and 1 of epoch 5" in capsys.readouterr().err


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    train.save({"weights": torch.arange(1000.0)}, tmp_path / "last.pth")
    before, limits = (tmp_path / "last.pth").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*last.pth"):
            train.save({"weights": torch.arange(100_000.0)}, tmp_path / "last.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_a_folder_without_room_is_refused_before_the_start(shared_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: train.shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run"))
    assert "has room for 1 MiB and the run needs 147 MiB: make room" in capsys.readouterr().err


def test_a_resumed_run_needs_no_room_for_the_files_it_has(shared_folder, tmp_path, monkeypatch):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: train.shutil._ntuple_diskusage(2**30, 2**30, 70 * 2**20))
    train_in_process(monkeypatch, "--resume", "--output", tmp_path / "run")


def test_two_processes_do_not_train_in_one_folder(shared_folder, tmp_path, monkeypatch, capsys):
    process = start(shared_folder, tmp_path / "run", 50, 1, 0)
    wait_for_saves(process, tmp_path / "run" / "last.pth", 1)
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, "--resume", "--output", tmp_path / "run")
    assert "another process is training in" in capsys.readouterr().err
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_restart_by_torchrun_goes_on_with_its_own_run_only(shared_folder, tmp_path, monkeypatch):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    recipe = train.make_recipe({"data": str(shared_folder), "output": str(tmp_path / "run")})
    assert train.find_run({}, recipe, tmp_path / "run", restarts=1)[1]["state"]["step"] == 3
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")
    with pytest.raises(ValueError, match="holds a run already"):
        train.find_run({}, recipe, tmp_path / "run", restarts=1)


def test_weights_that_are_not_finite_are_never_saved(shared_folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--lr", 1e38, "--warmup-epochs", 0,
                                                 "--batch-size", 48))
    assert "a weight is not finite after step 1" in capsys.readouterr().err
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert last["state"]["step"] == 0 and all(tensor.isfinite().all() for tensor in last["model"].values())


def test_a_full_disk_under_tensorboard_does_not_stop_the_run(shared_folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.SummaryWriter, "add_scalar", full)
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    assert "no more TensorBoard events" in capsys.readouterr().out and (tmp_path / "run" / "best.pth").exists()


def test_a_flipped_byte_in_a_checkpoint_is_found(shared_folder, tmp_path, monkeypatch, capsys):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    path = tmp_path / "run" / "last.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, "--resume", "--output", tmp_path / "run")
    assert "is damaged: its checksum is wrong" in capsys.readouterr().err


def test_a_run_is_resumed_without_the_weights_it_started_from_and_says_what_else_differs(shared_folder, tmp_path, monkeypatch, capsys):
    small = train.deit.create_model("tiny", image_size=32, num_classes=3)
    torch.save(small.state_dict(), tmp_path / "init.pth")
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--init", tmp_path / "init.pth", "--epochs", 1))
    (tmp_path / "init.pth").unlink()
    capsys.readouterr()
    train_in_process(monkeypatch, "--resume", "--output", tmp_path / "run", "--accum-steps", 2)
    assert "resumed with batches in 2 part(s) in place of 1" in capsys.readouterr().out


def test_a_truncated_checkpoint_is_named_and_refused(shared_folder, tmp_path, monkeypatch, capsys):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    path = tmp_path / "run" / "last.pth"
    whole, _ = path.read_bytes(), capsys.readouterr()
    for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(SystemExit):
            train_in_process(monkeypatch, "--resume", "--output", tmp_path / "run")
        printed = capsys.readouterr().err
        assert str(path) in printed and printed.count("\n") == 1, printed
    torch.save({"model": {}}, path)
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, "--resume", "--output", tmp_path / "run")
    assert "is not a training checkpoint of this program" in capsys.readouterr().err


def test_a_flag_that_would_change_a_resumed_run_is_refused(shared_folder, tmp_path, monkeypatch, capsys):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, "--resume", "--output", tmp_path / "run", "--lr", 1.0)
    assert "--lr 1.0, but the run to resume has 0.0005" in capsys.readouterr().err


def test_a_teacher_no_better_than_chance_is_refused(shared_folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    torch.save({"model": train.teacher.create_regnet("regnet_x_400mf", 3).state_dict()}, tmp_path / "teacher.pth")
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--distill", "--teacher",
                                                 tmp_path / "teacher.pth"))
    assert "which could be chance" in capsys.readouterr().err and not (tmp_path / "run" / "last.pth").exists()


def test_departures_from_the_recipe_that_cost_others_accuracy_are_noted():
    assert train.notes(train.make_recipe({"data": "imagenet", "model": "base"})) == []
    lines = train.notes(train.make_recipe({"data": "imagenet", "model": "base", "batch_size": 512, "warmup_epochs": 10.0}))
    assert "78.8 % with 512" in lines[0] and "79.2 % with 10" in lines[1]


def test_a_decompression_bomb_is_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(data.BadImage, match="bomb.png: DecompressionBombError"):
        data.read_rgb(tmp_path / "bomb.png")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM" + 60 * b"\x00", b"text"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(data.BadImage, match="bad.jpg"):
        data.read_rgb(tmp_path / "bad.jpg")


def test_16_bits_become_8_and_pixels_without_a_range_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(data.read_rgb(tmp_path / "deep.png"))[..., 1], ramp // 256)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(data.BadImage, match="float.tiff.* mode F have no fixed range"):
        data.read_rgb(tmp_path / "float.tiff")


def test_a_png_named_jpg_and_a_rotated_jpeg_are_read(tmp_path):
    image = Image.linear_gradient("L").convert("RGB").resize((30, 20))
    image.save(tmp_path / "really.jpg", format="PNG")
    assert data.read_rgb(tmp_path / "really.jpg").tobytes() == image.tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # turned by 90 degrees: not applied, as published
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_rgb(tmp_path / "turned.jpg").size == (30, 20)


def test_ignored_files_are_counted(folder, capsys):
    for name in ("notes.txt", ".hidden.jpg"):
        (folder / "val" / "cat" / name).write_text("")
    split = data.open_split(folder, train=False)
    assert data.describe_ignored(split) == ", 2 other file(s) ignored"


def test_nothing_of_the_environment_reaches_the_run_folder(shared_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "c0ffee-c0ffee")
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    assert all(b"c0ffee" not in path.read_bytes() for path in (tmp_path / "run").iterdir())
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert all(isinstance(value, (int, float)) for value in record.values())


def test_a_failed_start_leaves_a_folder_that_was_there_and_removes_its_own(shared_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with pytest.raises(SystemExit):
            train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / name, "--distill", "--teacher", "absent.pth"))
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"state": {}}, {"state": None}, {"recipe": {}}, {"model": None}])
def test_a_last_pth_that_lacks_a_part_is_refused_in_one_line(change, shared_folder, tmp_path, monkeypatch, capsys):
    part = dict.fromkeys(("step", "log", "best", "epoch_sums", "images", "parts"))
    whole = {"model": {}, "optimizer": {}, "scaler": {}, "state": part, "recipe": {"model": "tiny", "data": "demo"}}
    torch.save(whole | change, tmp_path / "last.pth")
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, "--resume", "--output", tmp_path)
    error = capsys.readouterr().err
    assert "is not a training checkpoint of this program" in error and error.count("\n") == 1
