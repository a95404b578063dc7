"""Kills a run at random moments with SIGKILL, resumes it, and compares it with a run left alone.

    python tests/kill_and_resume.py [--kills 20] [--processes 1] [--seed 0]

After a kill the same command is started again, with --resume. Several processes run under
torchrun --max-restarts: every second kill is of one rank only, and torchrun starts them again.

Prints how many epochs each kill left, and the file that it left unfinished. Exit status 0 if in the
end last.pth, best.pth and log.jsonl are the same, tensor by tensor and byte by byte.
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

from conftest import ROOT, difference_of_runs, write_folder


def write_images(root):
    """Two batches of 12 to train on, and two images for each of three processes to validate on."""
    return write_folder(root, train=8, val=2)


def small_run(images, output, *more):
    return ("--data", images, "--image-size", 32, "--batch-size", 12, "--warmup-epochs", 1,
            "--ema", 0.9, "--precision", "fp32", "--workers", 0, "--output", output, *more)


def start(images, output, epochs, processes):
    """A run in the background; what it prints goes to <output>.txt."""
    program, workers = [sys.executable], 1
    if processes > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                    "--max-restarts=1"]
        workers = 0
    flags = small_run(images, output, "--epochs", epochs, "--workers", workers, "--resume")
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(f"{output}.txt", "a") as printed:
        return subprocess.Popen(map(str, [*program, ROOT / "train.py", *flags]), env=env,
                                stdout=printed, stderr=printed)


def finish(process, output):
    assert process.wait(timeout=300) == 0, Path(f"{output}.txt").read_text()[-2000:]


def wait_for_saves(process, output, number):
    """Until last.pth has been replaced that many times."""
    def last_written():
        return last.stat().st_mtime_ns if last.exists() else None

    last, deadline = output / "last.pth", time.monotonic() + 120
    for _ in range(number):
        before = last_written()
        while last_written() == before:
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, Path(f"{output}.txt").read_text()[-2000:]
            time.sleep(0.005)


def children(process):
    """The pids of torchrun's ranks, or of the workers of a process's loaders."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def kill(process, ranks=()):
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def kill_and_resume(images, alone, cut, epochs, *, processes=1, kills=1, seed=0):
    """A run in the folder `cut`, killed and resumed until it ends; `alone` is the same, left alone.
    Returns the pids of the loaders' workers that lost their process."""
    rng = random.Random(seed)
    seconds = (alone / "last.pth").stat().st_mtime - (alone / "recipe.json").stat().st_mtime
    orphans = []

    process = start(images, cut, epochs, processes)
    try:
        for number in range(1, kills + 1):
            wait_for_saves(process, cut, 2)                  # the first is before the first step
            time.sleep(rng.uniform(0, seconds / epochs))     # anywhere in the next epoch

            if processes == 1:
                orphans += children(process)
                kill(process)
            elif number % 2:
                kill(process, children(process))
            else:
                os.kill(rng.choice(children(process)), signal.SIGKILL)
            done = len(torch.load(cut / "last.pth", weights_only=True)["log"])
            unfinished = [path.name for path in cut.glob("*.tmp")]
            print(f"kill {number}: {done} epochs done", *unfinished, flush=True)

            if process.returncode is not None:               # else torchrun starts them again
                process = start(images, cut, epochs, processes)
        finish(process, cut)
    finally:
        if process.poll() is None:
            kill(process, children(process))
    return orphans


def main():
    parser = argparse.ArgumentParser(description="Kills a run again and again, and resumes it.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    epochs = 3 * args.kills + 3

    with tempfile.TemporaryDirectory() as place:
        alone, cut = Path(place, "alone"), Path(place, "cut")
        images = write_images(Path(place, "images"))
        finish(start(images, alone, epochs, args.processes), alone)
        kill_and_resume(images, alone, cut, epochs, processes=args.processes, kills=args.kills,
                        seed=args.seed)
        found = difference_of_runs(alone, cut)
    print(f"{args.kills} kills survived, " + (f"but {found}" if found else "every bit the same"))
    sys.exit(found is not None)


if __name__ == "__main__":
    main()
