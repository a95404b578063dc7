"""The teacher: a frozen RegNet that labels the images a DeiT learns from.

Section 5.2 of "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877): a convnet teaches a transformer better than a transformer does. The
paper's is RegNetY-16GF, 82.9 % top-1, 84 M parameters, trained on ImageNet with DeiT's own augmentation.

    python teacher.py SOURCE                           describes a teacher: architecture, classes, names
    python train.py --model regnet_y_16gf --recipe convnet --data DIR      trains one for your own classes

SOURCE is "official" (the paper's), a torchvision RegNet by name (its ImageNet weights, version 2:
regnet_y_16gf, 82.886 %), a torchvision weights entry (RegNet_Y_16GF_Weights.IMAGENET1K_V1), a file or an
https URL. Files may use torchvision's names, timm's (as the official one), or be checkpoints of train.py.
"""
import argparse
import itertools
import os
import re
import signal
import sys

if __name__ == "__main__":                                   # from here on Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.ops import Conv2dNormActivation

import deit

OFFICIAL = "https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth"

# torchvision's RegNets by the width of the features before their classifier, which no two of them share.
REGNETS = {
    "regnet_x_400mf": 400, "regnet_x_800mf": 672, "regnet_x_1_6gf": 912, "regnet_x_3_2gf": 1008,
    "regnet_x_8gf": 1920, "regnet_x_16gf": 2048, "regnet_x_32gf": 2520,
    "regnet_y_400mf": 440, "regnet_y_800mf": 784, "regnet_y_1_6gf": 888, "regnet_y_3_2gf": 1512,
    "regnet_y_8gf": 2016, "regnet_y_16gf": 3024, "regnet_y_32gf": 3712, "regnet_y_128gf": 7392,
}

# Parts of a block, in timm's names and in torchvision's.
BLOCK_NAMES = {"conv1.conv": "f.a.0", "conv1.bn": "f.a.1", "conv2.conv": "f.b.0", "conv2.bn": "f.b.1",
               "se.fc1": "f.se.fc1", "se.fc2": "f.se.fc2", "conv3.conv": "f.c.0", "conv3.bn": "f.c.1",
               "downsample.conv": "proj.0", "downsample.bn": "proj.1"}
OTHER_NAMES = {"stem.conv.": "stem.0.", "stem.bn.": "stem.1.", "head.fc.": "fc."}

# How one is trained: ours, not from the paper. In train.py's fields, with its rates for a batch of 512.
CROPS_AND_FLIPS = {"repeats": 1, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "rand_augment": 0.0}
CONVNET = CROPS_AND_FLIPS | {"optimizer": "sgd", "weight_decay": 5e-5, "batch_size": 256}
PRESETS = {
    "convnet": ({**CONVNET, "lr": 0.2, "epochs": 100},
                "ours, not from the paper: a teacher from scratch, --model regnet_y_16gf"),
    "convnet-transfer": ({**CONVNET, "lr": 0.02, "epochs": 30},
                         "ours, not from the paper: a teacher that starts from --init official"),
}
DEMO = {"data": "demo", "model": "regnet_y_400mf", "epochs": 4, "batch_size": 16, "resume": True,
        "lr": 1e-3 * 512 / 16, "warmup_epochs": 0.3, "label_smoothing": 0.0} | CROPS_AND_FLIPS


def freeze(model):
    """The model in its fastest exact form: evaluation mode, no gradients, channels-last, and each batch norm,
    now constant, written into the convolution before it."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv2dNormActivation) and isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
    return model.to(memory_format=torch.channels_last)


def load_teacher(source="official", num_classes=1000, classes=None):
    """The frozen teacher: logits (B, K) of images (B, 3, S, S) normalised as the student's. Raises OSError or
    ValueError if it cannot be read, does not know `num_classes` classes, or names other `classes`."""
    checkpoint, known = {}, 1000
    if not weights_url(source) or num_classes == known:      # else it is clear before anything is downloaded
        checkpoint = read_weights(source)
        model = load_regnet(source, checkpoint=checkpoint)
        known = model.fc.out_features
    names_differ = deit.other_classes(checkpoint, classes)
    if known != num_classes or names_differ:
        pairs = itertools.zip_longest(checkpoint["classes"], classes) if names_differ else ()
        first = next((f", {new!r} where the teacher has {old!r}" for old, new in pairs if old != new), "")
        raise ValueError(f"teacher {source} knows {known} classes and the data has {num_classes}{first}; "
                         "train one for your classes: python train.py --recipe convnet --data DIR --model "
                         "regnet_y_16gf, for few images regnet_y_400mf")
    return freeze(model)


def could_be_chance(top1, num_images, num_classes):
    """Whether an accuracy in % is at most three standard deviations above guessing, and not 100."""
    deviation = ((num_classes - 1) / num_images) ** 0.5 / num_classes
    return top1 / 100 <= 1 / num_classes + 3 * deviation and top1 < 100


def check_top1(score, num_classes, source, any_teacher=False):
    """Raises ValueError, unless `any_teacher`, for a Score that could be chance."""
    if not any_teacher and could_be_chance(score.top1, score.images, num_classes):
        raise ValueError(f"teacher {source} gets {score.correct1:.0f} of {score.images:.0f} validation "
                         "images right, which could be chance: its classes are others, or in another order, "
                         "or it was trained at another size, or not enough; --any-teacher to go on")


def create_regnet(name, num_classes=1000):
    """A torchvision RegNet with fresh weights, channels-last. Raises ValueError for an unknown name."""
    if name not in REGNETS:
        raise ValueError(f"unknown RegNet {name!r}: choose one of {', '.join(REGNETS)}")
    model = models.get_model(name, weights=None, num_classes=num_classes)
    model.size, model.num_classes = name, num_classes
    return model.to(memory_format=torch.channels_last)


def weights_url(source):
    """The address behind "official" or a name of torchvision's; None for anything else. Raises ValueError for
    weights that do not exist."""
    if source == "official":
        return OFFICIAL
    if source in REGNETS:
        available = models.get_model_weights(source)
        if "IMAGENET1K_V2" not in available.__members__:
            raise ValueError(f"torchvision has no weights of {source} from ImageNet-1k alone; name an "
                             f"entry in full, one of {', '.join(map(str, available))} (mind their licence)")
        return available["IMAGENET1K_V2"].url
    if re.match(r"RegNet_\w+_Weights\.", str(source)):
        with deit.naming(f"torchvision has no weights {source}"):
            return models.get_weight(source).url


def read_weights(source):
    """What the file, URL or name holds. Raises OSError or ValueError naming it."""
    return deit.read_checkpoint(weights_url(source) or source, ("official", "a name such as regnet_y_16gf"))


def torchvision_names(state):
    """The parameters of a RegNet under torchvision's names; timm counts blocks from 1, torchvision from 0."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
        if match := re.fullmatch(r"s(\d)\.b(\d+)\.(.+)\.(\w+)", name):
            stage, block, part, leaf = match.groups()
            prefix = f"trunk_output.block{stage}.block{stage}-{int(block) - 1}"
            name = f"{prefix}.{BLOCK_NAMES.get(part, part)}.{leaf}"
        for theirs, ours in OTHER_NAMES.items():
            name = ours + name[len(theirs):] if name.startswith(theirs) else name
        renamed[name] = tensor
    return renamed


def find_regnet(checkpoint, ema=False):
    """The state dict of a RegNet in what a file holds, under torchvision's names; None if there is none."""
    state = torchvision_names(deit.find_state_dict(checkpoint, ema))
    return state if {"stem.0.weight", "fc.weight"} <= state.keys() else None


def load_regnet(source, *, classes=None, ema=False, checkpoint=None):
    """A RegNet with the weights of `source`, in evaluation mode; with a fresh classifier, which is said, if
    the names `classes` differ from the file's. Raises OSError or ValueError naming the source."""
    checkpoint = read_weights(source) if checkpoint is None else checkpoint
    with deit.naming(source):
        state = find_regnet(checkpoint, ema)
        width = state and state["fc.weight"].shape[1]
        name = next((name for name, known in REGNETS.items() if known == width), None)
        if name is None:
            raise ValueError(f"no {'averaged weights of a ' * ema}RegNet of torchvision: expected "
                             "stem.0.weight, trunk_output..., fc.weight (or timm's names for them), found "
                             f"{str(list(checkpoint))[:90]}")
        known = len(state["fc.weight"])
        model = create_regnet(name, len(classes) if classes else known)
        fresh = model.fc.out_features != known or deit.other_classes(checkpoint, classes)
        if fresh:
            state |= {f"fc.{key}": value for key, value in model.fc.state_dict().items()}
        deit.load_strictly(model, state)
    if fresh and os.environ.get("RANK", "0") == "0":
        print(f"{source}: fresh classifier for {len(classes)} classes, not the file's {known}")
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description="Describes a teacher.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"teacher.py: {message} (--help lists the flags)\n")
    parser.add_argument("source", metavar="SOURCE",
                        help="official, a torchvision RegNet or weights entry, a file or URL")
    source = parser.parse_args().source
    try:
        checkpoint = read_weights(source)
        model = load_regnet(source, checkpoint=checkpoint)
    except (OSError, ValueError) as error:
        sys.exit(f"teacher.py: {error}")
    names = deit.find_state_dict(checkpoint)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{source}: {model.size}, {model.fc.out_features} classes, {parameters:,} parameters, "
          f"{'timm' if any('stem.conv.' in name for name in names) else 'torchvision'}'s names")


if __name__ == "__main__":
    main()
