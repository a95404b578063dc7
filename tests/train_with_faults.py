"""train.py with a fault in its second process. Run by test_safety.py, under torchrun.

    FAULT=nan            its loss is nan in the fourth step
    FAULT="--data DIR"   it was started with these flags, which differ from the first one's
"""
import itertools
import os
import sys

import train

fault = os.environ["FAULT"]
compute_losses = train.compute_losses
steps = itertools.count(1)


def nan_in_step_4(*args):
    losses = compute_losses(*args)
    return [loss * float("nan") for loss in losses] if next(steps) == 4 else losses


if os.environ["RANK"] == "1":
    if fault == "nan":
        train.compute_losses = nan_in_step_4
    else:
        sys.argv += fault.split()
train.main()
