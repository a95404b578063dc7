"""train.py as it is, with a checkpoint at every step and the faults that the environment asks for. Run by the tests.

    FAULT=nan:RANK:STEP      the loss of that rank becomes nan from that step on
    FAULT=late-nan:RANK:STEP  the same, in that step only, and the loop looks every three seconds as it really does
    FAULT=slow:RANK:STEP     each batch of that rank's validations takes a second
    FAULT=dead:RANK:STEP     that rank is killed
    FAULT=crash:RANK:STEP    that rank raises an exception that no user can cause
    FAULT=stuck:RANK:STEP    that rank sleeps for 13 seconds, and the others wait for 10
    FAULT=crawl:RANK:STEP    each step of that rank takes two seconds, and checkpoints are as rare as they really are
"""
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deit
import evaluate
import train

kind, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
mine = rank == os.environ.get("RANK", "0")
forward, steps = deit.DeiT.forward, []


def faulty_forward(self, images):
    if self.training:
        steps.append(len(steps))
    due = mine and self.training and len(steps) > int(at)
    if mine and kind == "slow" and not self.training:
        time.sleep(1)
    if due and kind in ("stuck", "crawl"):
        time.sleep(13 if kind == "stuck" else 2)
    if due and kind == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    if due and kind == "crash":
        raise AttributeError("a programming error")
    is_nan = due and (kind == "nan" or kind == "late-nan" and len(steps) == int(at) + 1)
    return forward(self, images) * float("nan") if is_nan else forward(self, images)


if kind not in ("crawl", "late-nan"):
    train.LOOK_SECONDS, train.SAVE_SECONDS, train.SAVE_SHARE = -1, -1, float("inf")
if kind == "stuck":
    evaluate.TIMEOUT = timedelta(seconds=10)
if kind != "none":
    deit.DeiT.forward = faulty_forward
if __name__ == "__main__":
    train.main()
