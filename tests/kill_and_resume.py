"""Kills a training run with SIGKILL at random moments, again and again, and compares how it ends with one left alone.

    python tests/kill_and_resume.py [--kills 20] [--processes 1] [--workers 1] [--seed 0] [--elastic]

The command is the same each time, with --resume. With --elastic one rank of a run under torchrun --max-restarts is
killed, and torchrun repeats the command; otherwise all processes die at once, and it is started again.

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

from conftest import ROOT, difference_of_runs, write_folder


def start(folder, output, epochs, processes, workers, *more, restarts=0):
    """A run in a process group of its own; what it prints goes to <output>.txt."""
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                    f"--max-restarts={restarts}"]
    flags = ["--data", folder, "--image-size", 32, "--batch-size", 16, "--epochs", epochs, "--warmup-epochs", 1,
             "--ema", 0.9, "--workers", workers, "--output", output, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(f"{output}.txt", "w") as printed:
        return subprocess.Popen([*program, str(ROOT / "tests" / "train_with_faults.py"), *map(str, flags)], env=env,
                                start_new_session=True, stdout=printed, stderr=subprocess.STDOUT)


def family(process):
    """The pids of the process and of all that it has started: torchrun's are in process groups of their own."""
    pids = [process.pid]
    for pid in pids:                                                     # it grows
        with contextlib.suppress(FileNotFoundError):
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return pids


def signal_all(process, number):
    for pid in family(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(process):
    """SIGKILL for all of its processes at once."""
    signal_all(process, signal.SIGKILL)
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


def survive(place, kills, processes, workers, seed, elastic=False):
    """Runs, kills, resumes until it has ended; returns (kills, first difference from a run left alone or None)."""
    folder, last, rng = write_folder(place / "images"), place / "cut" / "last.pth", random.Random(seed)
    printed = place / "cut.txt"
    run = 3 + 2 * kills, processes, workers                              # three steps an epoch, saved at each
    assert start(folder, place / "whole", *run).wait() == 0, (place / "whole.txt").read_text()[-2000:]
    process = start(folder, place / "cut", *run, "--resume", restarts=kills)
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
    return kills, difference_of_runs(place / "whole", place / "cut")


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
