"""train.py as it is, with a checkpoint at every step and the faults that the environment asks for. Run by the tests.

    FAULT=nan:RANK:STEP      the loss of that rank becomes nan from that step on
    FAULT=slow:RANK:STEP     each batch of that rank's validations takes a second
    FAULT=stuck:RANK:STEP    that rank sleeps for 18 seconds, and the others wait for 10
"""
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deit
import evaluate
import train

train.CHECKPOINT_MINUTES = 0
kind, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
mine = rank == os.environ.get("RANK", "0")
forward, steps = deit.DeiT.forward, []


def faulty_forward(self, images):
    if self.training:
        steps.append(len(steps))
    due = mine and self.training and len(steps) > int(at)
    if mine and kind == "slow" and not self.training:
        time.sleep(1)
    if due and kind == "stuck":
        time.sleep(18)
    return forward(self, images) * float("nan") if due and kind == "nan" else forward(self, images)


if kind == "stuck":
    evaluate.TIMEOUT = timedelta(seconds=10)
if kind != "none":
    deit.DeiT.forward = faulty_forward
if __name__ == "__main__":
    train.main()
