"""train.py as it is, with a checkpoint at every step and the faults that the environment asks for. Run by the tests.

    FAULT=nan:RANK:STEP      the loss of that rank becomes nan from that step on
    FAULT=kill:RANK:STEP     that rank kills itself with SIGKILL at that step, unless torchrun has restarted it
    FAULT=kill:*:STEP        every rank does
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deit
import train

train.CHECKPOINT_MINUTES = 0
kind, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
mine = rank in ("*", os.environ.get("RANK", "0"))
restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
forward, steps = deit.DeiT.forward, []


def faulty_forward(self, images):
    if self.training:
        steps.append(len(steps))
    due = mine and len(steps) > int(at) and not restarted
    if kind == "kill" and due:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "nan" and due and self.training:
        return forward(self, images) * float("nan")
    return forward(self, images)


if kind != "none":
    deit.DeiT.forward = faulty_forward
if __name__ == "__main__":
    train.main()
