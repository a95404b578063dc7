"""A run cannot be lost, fooled or silently wrong: kills, full disks, damaged files, nan, bombs."""
import contextlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import deit
import teacher
import train
from conftest import ROOT, run_main, run_script
from kill_and_resume import family, kill, signal_all, start, survive, wait_for_saves
from test_train import small_run


@contextlib.contextmanager
def running(*args):
    """A run in the background, of which nothing is left in the end."""
    process = start(*args)
    try:
        yield process
    finally:
        kill(process)


def saved_state(folder):
    return torch.load(folder / "last.pth", weights_only=True)["state"]


# ---------------------------------------------------------------------------------------------------
# Kills and signals


def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(tmp_path):
    assert survive(tmp_path, 1, 1, 2, seed=2) == (1, None)


def test_torchrun_restarts_a_run_whose_rank_was_killed_to_the_same_bits(tmp_path):
    assert survive(tmp_path, 1, 2, 1, seed=3, elastic=True) == (1, None)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_leaves_no_process_behind(processes, shared_folder, tmp_path):
    process = start(shared_folder, tmp_path / "run", 1000, processes, 2)
    wait_for_saves(process, tmp_path / "run" / "last.pth", 2)
    pids = family(process)
    os.kill(process.pid, signal.SIGKILL)                                 # and not its workers, or torchrun's ranks
    process.wait()
    deadline = time.monotonic() + 60
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert len(pids) >= 2 + processes


def test_a_signal_after_the_last_step_is_obeyed_when_all_is_saved(shared_folder, tmp_path, monkeypatch):
    validate, before = train.validate, signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(train, "validate", lambda run: (os.kill(os.getpid(), signal.SIGINT), validate(run))[1])
    with pytest.raises(KeyboardInterrupt):
        run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    signal.signal(signal.SIGINT, before)
    assert len(saved_state(tmp_path / "run")["log"]) == 1


def test_a_killed_loader_worker_is_told_in_one_line(shared_folder, tmp_path, monkeypatch, capsys):
    message = "DataLoader worker (pid(s) 7) exited unexpectedly"        # torch's RuntimeError

    def next_batch(self, batches):
        raise RuntimeError(message)

    monkeypatch.setattr(train.Meter, "next_batch", next_batch)
    assert run_main(train, *small_run(shared_folder, tmp_path / "run")) == 1
    assert f"\ntrain.py: {message} (memory short? " in f"\n{capsys.readouterr().err}"


def test_a_rank_whose_peer_fails_has_no_traceback(folder, tmp_path):
    """The one that met the bad image tells it, and torchrun's summary shows that."""
    path = folder / "train" / "cat" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])
    done = run_script("train.py", *small_run(folder, tmp_path / "run", "--repeats", 1), processes=2, check=False)
    assert done.returncode != 0 and f"train.py: cannot read image {path}" in done.stderr
    assert f'File "{ROOT / "train.py"}"' not in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["data.py", "evaluate.py", "teacher.py", "train.py"])
def test_ctrl_c_while_torch_is_imported_leaves_without_a_word(script):
    process = subprocess.Popen([sys.executable, ROOT / script, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)
    assert process.returncode == 130 and printed == (b"", b"")


def test_sigterm_to_all_processes_at_once_saves_and_leaves(shared_folder, tmp_path):
    with running(shared_folder, tmp_path / "run", 50, 2, 1) as process:
        wait_for_saves(process, tmp_path / "run" / "last.pth", 2)
        signal_all(process, signal.SIGTERM)                              # loader workers too, as on a cluster
        assert process.wait(timeout=100) != 0
    printed = (tmp_path / "run.txt").read_text()
    assert "stopped by a signal, saved in" in printed and "DataLoader worker" not in printed, printed


def test_sigterm_is_answered_within_a_few_steps_however_slow_they_are(shared_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "crawl:0:0")
    with running(shared_folder, tmp_path / "run", 50, 1, 1) as process:
        wait_for_saves(process, tmp_path / "run" / "last.pth", 1)        # at the start: the next is due in minutes
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 128 + signal.SIGTERM, (tmp_path / "run.txt").read_text()
    assert 1 <= saved_state(tmp_path / "run")["step"] <= 2


def test_sigterm_during_validation_leaves_the_loaders_alive_to_end_it(shared_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "slow:0:0")                              # each batch of the validation takes a second
    with running(shared_folder, tmp_path / "run", 50, 1, 1) as process:
        wait_for_saves(process, tmp_path / "run" / "last.pth", 4)        # the start and three steps: now it validates
        signal_all(process, signal.SIGTERM)
        assert process.wait(timeout=100) == 128 + signal.SIGTERM, (tmp_path / "run.txt").read_text()
    state = saved_state(tmp_path / "run")
    assert (state["step"], len(state["log"])) == (4, 1)                  # validated, and one step further


@pytest.mark.parametrize("fault, processes", [("crash:0:4", 1), ("dead:1:4", 2), ("stuck:1:4", 2)])
def test_a_process_that_fails_dies_or_is_stuck_ends_the_run(fault, processes, shared_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", fault)
    with running(shared_folder, tmp_path / "run", 50, processes, 1) as process:
        assert process.wait(timeout=100) > 0, (tmp_path / "run.txt").read_text()
    assert saved_state(tmp_path / "run")["step"] == 4
    assert "crash" not in fault or "AttributeError: a programming error" in (tmp_path / "run.txt").read_text()


def test_a_checkpoint_is_due_after_ten_minutes_and_costs_a_hundredth_of_the_time(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    meter = SimpleNamespace(saved=now, save_seconds=2.0)
    due = {}
    for after in (150.0, 250.0, 590.0, 610.0):
        now = 1000.0 + after
        due[after] = [train.Meter.is_save_due(meter, seconds) for seconds in (0, train.SAVE_SECONDS)]
    assert due == {150.0: [False, False], 250.0: [True, False], 590.0: [True, False], 610.0: [True, True]}
    meter.save_seconds = 10.0                                            # of 610 it would be a sixtieth
    assert not train.Meter.is_save_due(meter, train.SAVE_SECONDS)


def test_a_second_run_in_a_folder_is_refused_before_it_has_read_or_written(shared_folder, tmp_path, monkeypatch):
    folder, done = tmp_path / "run", []

    def content():
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}

    def second_run(*_):
        before = content()
        done.append(run_script("train.py", *small_run(shared_folder, folder, "--resume", "--lr", 1.0), check=False))
        assert content() == before
        raise SystemExit(3)

    monkeypatch.setattr(train, "train_epoch", second_run)                # while the first one trains
    assert run_main(train, *small_run(shared_folder, folder)) == 3
    assert done[0].returncode == 1 and done[0].stdout == ""              # had it read, it would have named --lr
    assert done[0].stderr.startswith(f"train.py: another process trains in {folder}: stop it")


# ---------------------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.parametrize("fault, steps, saved", [("nan:1:4", "1 and 1", {4}), ("late-nan:1:4", "0 and 2", {0, 3})])
def test_nan_on_one_rank_stops_all_and_one_line_says_on_which(fault, steps, saved, shared_folder, tmp_path, monkeypatch):
    """Also if the look comes when the gradient has taken it to the other rank."""
    monkeypatch.setenv("FAULT", fault)
    flags = small_run(shared_folder, tmp_path / "run")
    done = run_script("tests/train_with_faults.py", *flags, processes=2, check=False)
    printed, _ = done.stderr.split("FAILED", 1)                          # torchrun's summary repeats it
    lines = [line for line in printed.splitlines() if "train.py: rank" in line]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert lines[0].split("train.py: ")[1].startswith(f"rank 1: the loss became nan between steps {steps} of epoch 1")
    assert saved_state(tmp_path / "run")["step"] in saved


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
    forward = deit.DeiT.forward
    monkeypatch.setattr(train, "LOOK_SECONDS", -1)
    monkeypatch.setattr(deit.DeiT, "forward", lambda self, images: Overflowing.apply(forward(self, images)))
    return lambda times: setattr(Overflowing, "times", times)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(shared_folder, tmp_path, capsys, overflow):
    overflow(1)
    assert run_main(train, *small_run(shared_folder, tmp_path / "run")) == 1
    assert "a gradient or weight is not finite between steps 0 and 0" in capsys.readouterr().err
    assert saved_state(tmp_path / "run")["step"] == 0


def in_fp16(monkeypatch):
    """As on a GPU; on a CPU it is refused for being slow."""
    monkeypatch.setattr(train, "settle", lambda recipe, world: replace(recipe, precision="fp16"))


def test_under_fp16_an_overflow_is_skipped_and_is_no_divergence(shared_folder, tmp_path, monkeypatch, overflow):
    in_fp16(monkeypatch)
    overflow(1)
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 2)) == 0
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert last["scaler"]["scale"] == 2**15 and last["optimizer"]["state"][0]["step"] == 5


def test_under_fp16_a_loss_scale_below_1_is_divergence(shared_folder, tmp_path, monkeypatch, capsys, overflow):
    in_fp16(monkeypatch)
    overflow(1000)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=4.0))
    assert run_main(train, *small_run(shared_folder, tmp_path / "run")) == 1
    assert "a gradient or weight is not finite between steps 2 and 2 of epoch 0" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_saved(shared_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learning_rate", lambda *_: 1e38)
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--batch-size", 48)) == 1
    assert "a gradient or weight is not finite between steps 0 and 0 of epoch 0" in capsys.readouterr().err
    last = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert last["state"]["step"] == 0 and all(tensor.isfinite().all() for tensor in last["model"].values())


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.pth"
    train.atomic_write(path, lambda file: torch.save({"weights": torch.arange(1000.0)}, file))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*last.pth"):
            train.atomic_write(path, lambda file: torch.save({"weights": torch.arange(100_000.0)}, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")       # TensorBoard's thread
def test_a_run_whose_folder_is_deleted_says_so_in_one_line(shared_folder, tmp_path, monkeypatch, capsys):
    end_step = train.Meter.end_step

    def delete(meter, *args, **kwargs):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return end_step(meter, *args, **kwargs)

    monkeypatch.setattr(train.Meter, "end_step", delete)
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 2)) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and "No such file or directory" in printed.splitlines()[-1], printed


def test_a_run_whose_folder_is_another_runs_by_now_leaves_it_alone(shared_folder, tmp_path, monkeypatch, capsys):
    train_epoch, folder = train.train_epoch, tmp_path / "run"

    def replace_folder(*args):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "last.pth").write_text("of another run")
        train_epoch(*args)

    monkeypatch.setattr(train, "train_epoch", replace_folder)
    assert run_main(train, *small_run(shared_folder, folder, "--epochs", 1)) == 1
    assert f"train.py: {folder} was deleted while this run trained in it\n" in capsys.readouterr().err
    assert (folder / "last.pth").read_text() == "of another run" and not (folder / "best.pth").exists()


def test_best_weights_without_a_run_to_resume_are_not_overwritten(finished_run, tmp_path, capsys):
    folder = tmp_path / "kept"
    folder.mkdir()
    shutil.copy(finished_run[0].with_name("best.pth"), folder)
    flags = [folder if flag == finished_run[0].parent else flag for flag in finished_run[1]]
    assert run_main(train, *flags) == 1
    assert f"{folder} holds best.pth of a run, but no last.pth" in capsys.readouterr().err


def test_a_full_disk_under_tensorboard_ends_the_run_in_one_line(shared_folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.SummaryWriter, "add_scalar", full)
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 1)) == 1
    assert "train.py: [Errno 28] No space left on device\n" in capsys.readouterr().err
    assert saved_state(tmp_path / "run")["step"] == 0


@pytest.fixture(scope="module")
def finished_run(shared_folder, tmp_path_factory):
    """(its last.pth, the flags to resume it)"""
    flags = small_run(shared_folder, tmp_path_factory.mktemp("finished") / "run", "--epochs", 1, "--workers", 0)
    assert run_main(train, *flags) == 0
    return train.Path(flags[flags.index("--output") + 1]) / "last.pth", (*flags, "--resume")


@pytest.fixture
def damaged(finished_run):
    """The same, to be damaged: it is repaired afterwards."""
    whole = finished_run[0].read_bytes()
    yield finished_run
    finished_run[0].write_bytes(whole)


def test_a_flipped_byte_in_a_checkpoint_is_found(damaged, capsys):
    path, flags = damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run_main(train, *flags) == 1
    assert f"{path}: it is damaged: a checksum is wrong" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_named_and_refused(damaged, capsys):
    path, flags = damaged
    whole = path.read_bytes()
    for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        assert run_main(train, *flags) == 1
        printed = capsys.readouterr().err
        assert str(path) in printed and printed.count("\n") == 1, printed


@pytest.mark.parametrize("change", [{"state": {}}, {"state": None}, {"recipe": {}}, {"recipe": None}, {"model": None},
                                    {"optimizer": {}}, None])
def test_a_last_pth_that_lacks_a_part_is_named_and_refused_in_one_line(change, damaged, capsys):
    path, flags = damaged
    torch.save({"model": {}} if change is None else torch.load(path, weights_only=True) | change, path)
    assert run_main(train, *flags) == 1
    printed = capsys.readouterr().err
    assert str(path) in printed and printed.count("\n") == 1, printed


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


def changed_optimizer(last, change):
    """The checkpoint with another state of the optimiser's first parameter."""
    state = last["optimizer"]["state"]
    return {"optimizer": last["optimizer"] | {"state": state | {0: change(state[0])}}}


EDITS = {                                                                # what an editor might do to a checkpoint
    "a recipe's value out of bounds": lambda last: {"recipe": last["recipe"] | {"epochs": -3}},
    "text for a number": lambda last: {"recipe": last["recipe"] | {"lr": "5e-4"}},
    "a number for a switch": lambda last: {"recipe": last["recipe"] | {"compile": 1}},
    "another model's name": lambda last: {"recipe": last["recipe"] | {"model": "huge"}},
    "a field that there is not": lambda last: {"recipe": last["recipe"] | {"colour": "red"}},
    "a preset that there is not": lambda last: {"recipe": last["recipe"] | {"recipe": "none"}},
    "a step that is none": lambda last: {"state": last["state"] | {"step": 3.0}},
    "a step of another epoch": lambda last: {"state": last["state"] | {"step": 100}},
    "epochs beyond the last": lambda last: {"state": last["state"] | {"step": 6, "log": 2 * last["state"]["log"]}},
    "an accuracy that is none": lambda last: {"state": last["state"] | {"log": [{"top1": float("nan")}]}},
    "moments that are no numbers": lambda last: changed_optimizer(last, lambda one: one | {
        "exp_avg": one["exp_avg"] * float("nan")}),
    "a value that there always is": lambda last: {"recipe": last["recipe"] | {"mix_group": None}},
    "text for a step": lambda last: {"state": last["state"] | {"step": "3"}},
    "a log without accuracies": lambda last: {"state": last["state"] | {"log": [{"epoch": 0}]}},
    "text for an accuracy": lambda last: {"state": last["state"] | {"log": [{"top1": "high"}]}},
    "sums that are none": lambda last: {"state": last["state"] | {"epoch_sums": [["a", "b"]]}},
    "sums of some losses": lambda last: {"state": last["state"] | {"epoch_sums": [[1.0], []]}},
    "no moments": lambda last: {"optimizer": last["optimizer"] | {"state": {}}},
    "moments of another shape": lambda last: changed_optimizer(last, lambda one: one | {"exp_avg": torch.zeros(7)}),
    "one moment missing": lambda last: changed_optimizer(last, lambda one: without(one, "exp_avg_sq")),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_last_pth_is_named_and_refused_in_one_line(edit, damaged, capsys):
    path, flags = damaged
    last = torch.load(path, weights_only=True)
    torch.save(last | EDITS[edit](last), path)
    assert run_main(train, *flags) == 1
    printed = capsys.readouterr().err
    assert str(path.parent) in printed and printed.count("\n") == 1, printed


def test_a_run_goes_on_with_the_weight_decay_of_its_recipe(damaged, monkeypatch):
    """Whatever the optimiser's groups in the file say."""
    path, flags = damaged
    last, groups = torch.load(path, weights_only=True), []
    for group in last["optimizer"]["param_groups"]:
        group["weight_decay"] = 7.0
    torch.save(last, path)
    monkeypatch.setattr(train, "train", lambda run, meter: groups.extend(run.optimizer.param_groups))
    assert run_main(train, *flags) == 0
    assert [group["weight_decay"] for group in groups] == [0.0, train.Recipe().weight_decay]


def test_a_flag_that_would_change_a_resumed_run_is_refused(finished_run, capsys):
    assert run_main(train, *finished_run[1], "--lr", 1.0) == 1
    assert "--lr 1.0, but the run to resume has 0.0005" in capsys.readouterr().err


def test_a_run_is_resumed_without_the_weights_it_began_with_and_says_what_differs(shared_folder, tmp_path, capsys):
    torch.save(deit.create_model("tiny", image_size=32, num_classes=3).state_dict(), tmp_path / "init.pth")
    flags = small_run(shared_folder, tmp_path / "run", "--init", tmp_path / "init.pth", "--epochs", 1)
    assert run_main(train, *flags) == 0
    (tmp_path / "init.pth").unlink()
    capsys.readouterr()
    assert run_main(train, *flags, "--resume", "--accum-steps", 2) == 0
    assert "not bit for bit what it would have become, with accum_steps 2 in place of 1" in capsys.readouterr().out


def test_a_teacher_no_better_than_chance_is_refused(shared_folder, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save({"model": teacher.create_regnet("regnet_x_400mf", 3).state_dict()}, tmp_path / "teacher.pth")
    flags = small_run(shared_folder, tmp_path / "run", "--distill", "--teacher", tmp_path / "teacher.pth")
    assert run_main(train, *flags) == 1
    assert "which could be chance" in capsys.readouterr().err and not (tmp_path / "run" / "last.pth").exists()


def test_nothing_of_the_environment_reaches_the_run_folder(shared_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "c0ffee-c0ffee")
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 1)) == 0
    assert all(b"c0ffee" not in path.read_bytes() for path in (tmp_path / "run").iterdir())
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert all(isinstance(value, (int, float)) for value in record.values())


# ---------------------------------------------------------------------------------------------------
# Images


def test_a_decompression_bomb_is_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    chunks = header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(data.BadImage, match="bomb.png: DecompressionBombError"):
        data.read_rgb(tmp_path / "bomb.png")


@pytest.mark.parametrize("content", [
    b"", b"\xff\xd8\xff\xe0", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM" + 60 * b"\x00", b"text"])
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
    exif[0x0112] = 6                                                     # by 90 degrees: not applied, as published
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_rgb(tmp_path / "turned.jpg").size == (30, 20)
