"""Kills a training run with SIGKILL at random moments, again and again, and compares how it ends with one left alone.

    python tests/kill_and_resume.py [--kills 20] [--processes 1] [--workers 1] [--seed 0] [--elastic]

--elastic kills one rank of a run under torchrun --max-restarts, which goes on by itself; otherwise all processes die at
once and train.py --resume is typed.

Prints the step that each kill left saved, and whether it came while the next was being written. Exit status 0 if in the
end last.pth, best.pth and log.jsonl are the same, tensor by tensor and byte by byte.
"""
import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from conftest import ROOT, write_folder


def start(folder, output, epochs, processes, workers, *more, restarts=0):
    """A run in a process group of its own; what it prints goes to <output>.txt."""
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                    f"--max-restarts={restarts}"]
    flags = ["--data", folder, "--image-size", 32, "--batch-size", 16, "--epochs", epochs, "--warmup-epochs", 1, "--ema", 0.9,
             "--workers", workers, "--output", output, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(f"{output}.txt", "w") as printed:
        return subprocess.Popen([*program, str(ROOT / "tests" / "train_with_faults.py"), *map(str, flags)], env=env,
                                start_new_session=True, stdout=printed, stderr=subprocess.STDOUT)


def kill(process):
    """SIGKILL for the process and all that it has started, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_one_rank(torchrun, rng):
    """SIGKILL for one of the processes that torchrun has started; returns its pid."""
    ranks = []
    while not ranks:                                                     # it may be about to restart them
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        with contextlib.suppress(FileNotFoundError):
            ranks = [int(pid) for pid in children if b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
    victim = rng.choice(ranks)
    os.kill(victim, signal.SIGKILL)
    return victim


def compare(a, b, where="last.pth"):
    """The first difference between two loaded checkpoints, or None. Who started the run, where and how may differ."""
    if isinstance(a, dict):
        for key in a.keys() | b.keys():
            if f"{where}.{key}" in ("last.pth.launch", "last.pth.recipe.output", "last.pth.recipe.resume"):
                continue
            if key not in a or key not in b:
                return f"{where}.{key} is in one of them only"
            if difference := compare(a[key], b[key], f"{where}.{key}"):
                return difference
        return None
    if isinstance(a, (list, tuple)):
        return next(filter(None, (compare(x, y, f"{where}[{n}]") for n, (x, y) in enumerate(zip(a, b, strict=True)))), None)
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return None if same else f"{where} differs"


def difference(one, other):
    for name in ("last.pth", "best.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        if found := compare(a, b):
            return f"{name}: {found}"
    return None if (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes() else "log.jsonl differs"


def survive(place, kills, processes, workers, seed, elastic=False):
    """Runs, kills, resumes until it has ended; returns (kills, first difference from a run left alone or None)."""
    folder, last, rng = write_folder(place / "images"), place / "cut" / "last.pth", random.Random(seed)
    printed = place / "cut.txt"
    run = 3 + 2 * kills, processes, workers                              # three steps an epoch, saved at each
    assert start(folder, place / "whole", *run).wait() == 0
    process = start(folder, place / "cut", *run, restarts=kills)
    for kill_number in range(1, kills + 1):
        wait_for_saves(process, last, rng.randint(1, 2))
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            return kill_number - 1, f"it ended too early: {printed.read_text()[-2000:]}"
        writing = last.with_name("last.pth.tmp").exists()
        victim = kill_one_rank(process, rng) if elastic else kill(process)
        step = torch.load(last, weights_only=True)["state"]["step"]
        print(f"kill {kill_number}{f' (process {victim})' if victim else ''}: saved at step {step}"
              f"{', in the middle of writing the next' if writing else ''}", flush=True)
        if not elastic:
            process = start(folder, place / "cut", *run, "--resume")
    if process.wait():
        return kills, f"it failed: {printed.read_text()[-2000:]}"
    return kills, difference(place / "whole", place / "cut")


def wait_for_saves(process, path, number):
    """Until the file has been written that many times."""
    before, seen = path.stat().st_mtime_ns if path.exists() else 0, 0
    while seen < number and process.poll() is None:
        time.sleep(0.002)
        now = path.stat().st_mtime_ns if path.exists() else 0
        seen, before = seen + (now != before), now


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 20), ("processes", 1), ("workers", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--elastic", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        killed, found = survive(Path(place), args.kills, args.processes, args.workers, args.seed, args.elastic)
    print(f"{killed} kills survived, " + (f"but {found}" if found else "nothing lost, every bit the same"))
    sys.exit(found is not None)
