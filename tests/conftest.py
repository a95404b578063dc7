"""Shared by the tests: a small image folder, and programs run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    done = subprocess.run([*start, str(ROOT / script), *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
