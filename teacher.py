"""The teacher: a frozen network that labels the images a DeiT learns from.

Section 5.2 of "Training data-efficient image transformers & distillation through
attention" (https://arxiv.org/abs/2012.12877): a convnet teaches a transformer better than
a transformer does (table 2). The paper's is RegNetY-16GF, 82.9 % top-1, 84 M parameters,
trained on ImageNet with DeiT's own augmentation.

    python teacher.py SOURCE                                        describes a teacher
    python train.py --model regnet_y_16gf --recipe convnet --data DIR     makes one for DIR

A run with hard distillation keeps its labels, two bytes a view, and the folder of a run is
the teacher of later ones, which need not ask the network again.

SOURCE is "official" (the paper's), a torchvision RegNet's name (its ImageNet weights,
version 2: regnet_y_16gf, 82.886 %), a file, an https URL, or the folder of a run. Files hold
a RegNet under torchvision's or timm's names, or a DeiT in any layout that deit.py reads.
"""
import argparse
import hashlib
import json
import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.ops import Conv2dNormActivation

import deit

OFFICIAL = "https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth"

# torchvision's RegNets by the width of the features before their classifier. No two have
# the same, so it tells the architecture of a file. (Not regnet_y_128gf, of 645 M parameters.)
REGNETS = {
    "regnet_x_400mf": 400, "regnet_x_800mf": 672, "regnet_x_1_6gf": 912,
    "regnet_x_3_2gf": 1008, "regnet_x_8gf": 1920, "regnet_x_16gf": 2048,
    "regnet_x_32gf": 2520, "regnet_y_400mf": 440, "regnet_y_800mf": 784,
    "regnet_y_1_6gf": 888, "regnet_y_3_2gf": 1512, "regnet_y_8gf": 2016,
    "regnet_y_16gf": 3024, "regnet_y_32gf": 3712,
}


# --------------------------------------------------------------------------------------
# The frozen teacher


def load_teacher(source="official", *, classes=None, image_size=224):
    """The frozen teacher: logits (B, K) of normalized images (B, 3, S, S), at the student's
    image size. Raises OSError or ValueError if it cannot be read or does not know `classes`,
    the names in order (default: ImageNet's)."""
    num_classes = len(classes or range(1000))
    # "official" and RegNets' names mean ImageNet's 1000 classes: for other data they are
    # refused before the download
    if weights_url(source) == source or num_classes == 1000:
        loaded = load_any(source, image_size=image_size)
        names_agree = classes is None or loaded.classes in (None, classes)
        if loaded.num_classes == num_classes and names_agree:
            return freeze(loaded.model)
    raise ValueError(f"teacher {source} does not know the {num_classes} classes of the data, or "
                     "has another order. To train one: python train.py --recipe convnet --data "
                     "DIR --model regnet_y_16gf, or regnet_y_400mf for few images")


def freeze(model):
    """The same function at its fastest: evaluation mode, no gradients, channels last, and
    each batch norm, now constant, folded into the preceding convolution."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv2dNormActivation) and isinstance(module[1], nn.BatchNorm2d):
            module[0] = fuse_conv_bn_eval(module[0], module[1])
            module[1] = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def create_regnet(name, num_classes=1000):
    """A torchvision RegNet with fresh weights."""
    return models.get_model(name, weights=None, num_classes=num_classes)


# --------------------------------------------------------------------------------------
# Kept labels. Everything before the student follows from (seed, epoch, step, part), so the
# hard labels of a run are those of any later run on the same data, seed and parts, whatever
# its model and optimizer. RUN/labels holds epoch-000.npy, ...: uint16 (parts, views of a
# part), for ImageNet 2.6 MB an epoch. made-with.json says all that decides them.


def label_file(run, epoch):
    return Path(run, "labels", f"epoch-{epoch:03}.npy")


def read_made_with(run):
    """What the labels of a run were made with, {name: value}. Raises OSError or ValueError."""
    path = Path(run, "labels", "made-with.json")
    if not path.is_file():
        raise FileNotFoundError(f"{run} keeps no labels of hard distillation. For the weights "
                                f"of a run type {run}/best.pth")
    try:
        return dict(json.loads(path.read_bytes()))
    except Exception as error:                       # it may hold anything
        raise ValueError(f"cannot read {path}: {error}") from error


def read_labels(run, epoch, shape, num_classes):
    """The labels of an epoch: int32 (parts, views of a part). Raises ValueError for a file
    that is missing, damaged or of another run."""
    path = label_file(run, epoch)
    try:
        labels = np.load(path, mmap_mode="r")        # whose header may claim any size
        if labels.dtype != np.uint16 or labels.shape != shape or labels.max() >= num_classes:
            raise ValueError(f"it should be uint16 {shape}, below {num_classes}")
        return torch.from_numpy(labels.astype(np.int32))
    except Exception as error:                       # whatever a damaged file makes numpy raise
        raise ValueError(f"cannot use the labels in {path}: {error}") from error


def identity(source):
    """What identifies a teacher: a name or URL itself; for a file a hash of its tensors; for
    the folder of a run the identity of its teacher."""
    if Path(source).is_dir():
        return read_made_with(source).get("teacher")
    if not Path(source).is_file():
        return source
    digest = hashlib.sha256()
    for tensor in deit.find_state_dict(deit.read_checkpoint(source)).values():
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------
# Loading

# `size` is tiny, small, base or a RegNet's name; `classes` are the names in the file or None.
Loaded = namedtuple("Loaded", "model size image_size num_classes classes")


def load_any(source, *, image_size=None, classes=None, ema=False, **settings):
    """A DeiT or a RegNet from a path, an https URL or a name, in evaluation mode.

    If `classes` differ from the file's, in number or names, the classifier is fresh, and a
    line says so. `settings` are load_model's `distilled` and `drop_path`; they are for a
    DeiT, and a RegNet ignores them. Raises OSError or ValueError naming the source.
    """
    checkpoint = deit.read_checkpoint(weights_url(source))
    names = checkpoint.get("classes")
    if not isinstance(names, list):
        names = None
    if classes:
        settings["num_classes"] = len(classes)
        settings["fresh_head"] = names not in (None, classes)

    with deit.naming(source):
        state = deit.find_state_dict(checkpoint, ema)
        state = {torchvision_name(name): tensor for name, tensor in state.items()}
        if "fc.weight" not in state:
            model = deit.model_from_state_dict(state, image_size=image_size, **settings)
            return Loaded(model, model.size, model.image_size, model.num_classes, names)

        size, model = regnet_from_state_dict(state, **settings)
        if image_size is None:
            image_size = checkpoint.get("recipe", {"image_size": 224})["image_size"]
        return Loaded(model, size, image_size, model.fc.out_features, names)


def regnet_from_state_dict(state, *, num_classes=None, fresh_head=False, **ignored):
    """(name, RegNet) for a state dict under torchvision's names, in evaluation mode."""
    file_classes, width = state["fc.weight"].shape
    names = [name for name, features in REGNETS.items() if features == width]
    if not names:
        raise ValueError(f"not a RegNet of torchvision: none has features of width {width}")
    model = create_regnet(names[0], num_classes or file_classes)
    if fresh_head or model.fc.out_features != file_classes:
        state = deit.replace_parts(state, model.state_dict(), ("fc.",))
    deit.load_strictly(model, state)
    return names[0], model.eval()


def weights_url(source):
    """The URL behind "official" or the name of a RegNet; any other source is returned as it
    is."""
    if source == "official":
        return OFFICIAL
    if source not in REGNETS:
        return source
    return models.get_model_weights(source).IMAGENET1K_V2.url


# What differs in timm's names of a RegNet's parameters, and in torchvision's.
TIMM_NAMES = {
    "stem.conv.": "stem.0.", "stem.bn.": "stem.1.", "head.fc.": "fc.",
    "conv1.conv.": "f.a.0.", "conv1.bn.": "f.a.1.", "conv2.conv.": "f.b.0.",
    "conv2.bn.": "f.b.1.", "se.": "f.se.", "conv3.conv.": "f.c.0.", "conv3.bn.": "f.c.1.",
    "downsample.conv.": "proj.0.", "downsample.bn.": "proj.1.",
}


def torchvision_name(name):
    """The name of a RegNet's parameter in torchvision, also if it is timm's, which counts the
    blocks of a stage from 1 and not from 0."""
    if name.startswith("trunk_output."):
        return name
    for timm, torchvision in TIMM_NAMES.items():
        name = name.replace(timm, torchvision)
    block = re.match(r"s(\d)\.b(\d+)", name)
    if block:
        stage, number = block[1], int(block[2]) - 1
        name = f"trunk_output.block{stage}.block{stage}-{number}{name[block.end():]}"
    return name


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Describes a teacher.")
    parser.add_argument("source", metavar="SOURCE",
                        help="official, a name, a file, a URL or the folder of a run")
    source = parser.parse_args().source
    try:
        if Path(source).is_dir():
            print(f"{source} keeps labels:", json.dumps(read_made_with(source), indent=4))
        else:
            loaded = load_any(source)

            print(f"{source}: {loaded.size} at {loaded.image_size} pixels, "
                  f"{loaded.num_classes} classes, names {loaded.classes}")
    except (OSError, ValueError) as error:
        sys.exit(f"teacher.py: {error}")


if __name__ == "__main__":
    main()
