"""Kills a distilled run at random moments, resumes it, and compares it with one left alone.

    python tests/kill_and_resume.py [--kills 20] [--processes 1] [--seed 0]

After a kill the same command is started again, with --resume. Several processes run under
torchrun --max-restarts: every second kill is of one rank only, and torchrun starts them again.
Exit status 0 if in the end last.pth, best.pth and log.jsonl are the same to the bit.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from conftest import ROOT, difference, load, small_run, write_folder     # finds the scripts
import teacher


def write_inputs(place):
    """Images and an untrained teacher of their three classes."""
    write_folder(place / "images")
    model = teacher.create_regnet("regnet_x_400mf", 3)
    torch.save({"model": model.state_dict()}, place / "teacher.pth")
    return place


def distilled_run(place, output, *more):
    return small_run(place / "images", output, "--ema", 0.9, "--distill", "--any-teacher",
                     "--teacher", place / "teacher.pth", *more)


def start(place, output, epochs, processes):
    """A run in the background; what it prints goes to <output>.txt."""
    command = [ROOT / "train.py", *distilled_run(place, output, "--epochs", epochs, "--resume")]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=1",
                   f"--nproc_per_node={processes}", *command]
    command = [sys.executable, *map(str, command)]
    with open(f"{output}.txt", "a") as printed:
        return subprocess.Popen(command, stdout=printed, stderr=printed)


def finish(process, output):
    assert process.wait(timeout=300) == 0, Path(f"{output}.txt").read_text()[-2000:]


def wait_for_epochs(process, output, number):
    log, deadline = output / "log.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < number:
        alive = process.poll() is None and time.monotonic() < deadline
        assert alive, Path(f"{output}.txt").read_text()[-2000:]
        time.sleep(0.005)


def find_ranks(process):
    """The pids of the processes that torchrun started; none, if it is no torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def kill(process):
    for pid in (process.pid, *find_ranks(process)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def contents(folder):
    return {"last.pth": load(folder / "last.pth"), "best.pth": load(folder / "best.pth"),
            "log.jsonl": (folder / "log.jsonl").read_bytes(),
            "labels": {path.name: path.read_bytes() for path in folder.glob("labels/*")}}


def kill_and_resume(place, alone, cut, epochs, *, processes=1, kills=1, seed=0):
    """A run in the folder `cut`, killed and resumed until it ends. Returns what differs from the
    same run left alone, which is in the folder `alone`, as a text, or None."""
    rng = random.Random(seed)
    seconds = (alone / "last.pth").stat().st_mtime - (alone / "recipe.json").stat().st_mtime

    process, done = start(place, cut, epochs, processes), 0
    try:
        for number in range(1, kills + 1):
            wait_for_epochs(process, cut, done + 2)
            time.sleep(rng.uniform(0, seconds / epochs))     # anywhere in the next epoch

            if processes > 1 and number % 2 == 0:            # torchrun starts all of them again
                os.kill(rng.choice(find_ranks(process)), signal.SIGKILL)
            else:
                kill(process)
            done = len(load(cut / "last.pth")["log"])
            print(f"kill {number}: {done} epochs done", *cut.glob("*.tmp"), flush=True)

            if process.returncode is not None:
                process = start(place, cut, epochs, processes)
        finish(process, cut)
    finally:
        if process.poll() is None:
            kill(process)
    return difference(contents(alone), contents(cut))


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("--kills", 20), ("--processes", 1), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    epochs = 3 * args.kills + 3

    with tempfile.TemporaryDirectory() as temporary:
        place = write_inputs(Path(temporary))
        finish(start(place, place / "alone", epochs, args.processes), place / "alone")
        found = kill_and_resume(place, place / "alone", place / "cut", epochs, seed=args.seed,
                                processes=args.processes, kills=args.kills)
    print(f"{args.kills} kills survived, " + (f"but {found}" if found else "every bit the same"))
    sys.exit(found is not None)


if __name__ == "__main__":
    main()
