"""Shared by the tests: a small image folder, programs run as a user runs them, random weights, comparisons."""
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)                                     # two tests run at a time, see pytest.ini
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_folder(root, classes=("cat", "dog", "owl"), train=16, val=5, size=(40, 36)):
    """root/train/<class>/<n>.jpg and root/val/<class>/<n>.jpg: noise around a colour that tells the class."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for n in range(number):
                pixels = rng.normal(40 + 80 * label, 30, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{n}.jpg")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """For tests that only read it: 3 classes, 48 training and 15 validation images."""
    return write_folder(tmp_path_factory.mktemp("shared") / "images")


def run_script(script, *args, processes=None, cwd=ROOT, check=True):
    """Runs a script by python, or by torchrun with that many processes, and returns the finished process."""
    start = [sys.executable] if processes is None else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, str(ROOT / script), *map(str, args)], cwd=cwd, env=env, capture_output=True,
                          text=True, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_main(module, *args):
    """Calls a script's main in this process, and returns its exit status; an exit message goes to stderr."""
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, args)]):
        try:
            module.main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
                return 1
            return stop.code or 0
    return 0


def randomize(model, std=0.06):
    """Weights far enough from the initial ones that every parameter and buffer matters; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var") or ("norm" in name or "bn" in name) and name.endswith("weight"):
                value.copy_(1 + 0.2 * torch.rand(value.shape, generator=generator))
            elif value.is_floating_point():
                value.copy_(std * torch.randn(value.shape, generator=generator))
    return model.eval()


class Malicious:
    """Pickled, it is code that ends the program."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def difference(a, b, where="", ignored=()):
    """The first difference between two checkpoints or other nests of values, as a text; None if there is none."""
    if where in ignored:
        return None
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            if key not in a or key not in b:
                return f"{where}.{key} is in one of them only"
            if found := difference(a[key], b[key], f"{where}.{key}", ignored):
                return found
        return None
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        found = (difference(x, y, f"{where}[{n}]", ignored) for n, (x, y) in enumerate(zip(a, b)))
        return f"{where} has another length" if len(a) != len(b) else next(filter(None, found), None)
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return None if same else f"{where} differs"


def difference_of_runs(one, other):
    """The first difference between two finished runs' files. Where they are and how they were started may differ."""
    for name in ("last.pth", "best.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        if found := difference(a, b, name, (f"{name}.recipe.output", f"{name}.recipe.resume")):
            return found
    return None if (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes() else "log.jsonl differs"
