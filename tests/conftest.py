"""Shared by the tests: small images and runs, scripts as a user runs them, comparisons."""
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

# one thread, since two tests run at a time, and no GPU: also for the processes that tests start
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_folder(root, classes=("cat", "dog", "owl"), train=16, val=5, size=(40, 36)):
    """root/{train,val}/<class>/<n>.jpg: noise around a color that tells the class."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for n in range(number):
                pixels = rng.normal(40 + 80 * label, 30, (*size[::-1], 3)).clip(0, 255)
                path = root / split / name / f"{n}.jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """For tests that only read it: 3 classes, 48 training and 15 validation images."""
    return write_folder(tmp_path_factory.mktemp("shared") / "images")


def run_script(script, *args, processes):
    """Runs a script by torchrun with that many processes, and returns the finished torchrun."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, "-m", *torchrun, ROOT / script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_main(module, *args):
    """Calls a script's main in this process and returns its status; its message is on stderr."""
    argv = [f"{module.__name__}.py", *map(str, args)]
    with pytest.raises(SystemExit) as stop, mock.patch.object(sys, "argv", argv):
        sys.exit(module.main())
    if not isinstance(stop.value.code, str):
        return stop.value.code or 0
    print(stop.value.code, file=sys.stderr)
    return 1


def small_run(images, output, *more):
    """Flags of train.py for 2 steps an epoch; of a flag that is given twice the last counts."""
    return ("--data", images, "--image-size", 32, "--batch-size", 24, "--epochs", 1,
            "--warmup-epochs", 1, "--workers", 0, "--output", output, *more)


def load(path):
    return torch.load(path, weights_only=True)


def randomize(model, std=0.06):
    """In evaluation mode, with weights so large that every parameter and buffer matters."""
    generator = torch.Generator().manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        in_norm = "norm" in name or "bn" in name
        if name.endswith("running_var") or in_norm and name.endswith("weight"):
            value.data.copy_(1 + 0.2 * torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.data.copy_(std * torch.randn(value.shape, generator=generator))
    return model.eval()


class Malicious:
    """Pickled, it is code that ends the program."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def difference(a, b, where="", ignored=()):
    """The first difference between two nests of values, as a text; None if there is none."""
    if where in ignored:
        return None
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where} has other keys: {a.keys() ^ b.keys()}"
        found = (difference(a[key], b[key], f"{where}.{key}", ignored) for key in a)
        return next(filter(None, found), None)
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return None if same else f"{where} differs"
