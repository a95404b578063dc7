"""The teacher: a frozen RegNet that labels the images a DeiT learns from.

Section 5.2 of "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877): a convnet teaches a transformer better than a transformer does. The
paper's is RegNetY-16GF, 82.9 % top-1, 84 M parameters, trained on ImageNet with DeiT's own augmentation.

    python teacher.py SOURCE                           describes a teacher: architecture, classes,
                                                       parameters, names
    python teacher.py SOURCE --output teacher.pth      writes its weights under torchvision's names
    python train.py --model regnet_y_16gf --data DIR   trains one for your own classes, with the one
                                                       training loop

SOURCE is "official" (the paper's), a torchvision RegNet by name (its ImageNet weights, version 2:
regnet_y_16gf, 82.886 %), a torchvision weights entry in full (RegNet_Y_16GF_Weights.IMAGENET1K_V1), a
file or an https URL. Files may use torchvision's names, timm's (as the official one does), or be a
checkpoint of train.py.
"""
import argparse
import hashlib
import os
import re
import sys

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.ops import Conv2dNormActivation

OFFICIAL = "https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth"

# torchvision's RegNets by the width of the features before their classifier, which no two of them share.
REGNETS = {
    "regnet_x_400mf": 400, "regnet_x_800mf": 672, "regnet_x_1_6gf": 912, "regnet_x_3_2gf": 1008,
    "regnet_x_8gf": 1920, "regnet_x_16gf": 2048, "regnet_x_32gf": 2520,
    "regnet_y_400mf": 440, "regnet_y_800mf": 784, "regnet_y_1_6gf": 888, "regnet_y_3_2gf": 1512,
    "regnet_y_8gf": 2016, "regnet_y_16gf": 3024, "regnet_y_32gf": 3712, "regnet_y_128gf": 7392,
}

# timm's names, of which the official file is made, into torchvision's. Blocks count from 1
# there and from 0 here.
TIMM_NAMES = {"conv1.conv": "f.a.0", "conv1.bn": "f.a.1", "conv2.conv": "f.b.0", "conv2.bn": "f.b.1",
              "se.fc1": "f.se.fc1", "se.fc2": "f.se.fc2", "conv3.conv": "f.c.0", "conv3.bn": "f.c.1",
              "downsample.conv": "proj.0", "downsample.bn": "proj.1"}


def torchvision_names(state):
    """Renames the parameters of a timm RegNet; those of a torchvision one are left as they are."""
    def rename(name):
        if match := re.fullmatch(r"s(\d)\.b(\d+)\.(.+)\.(\w+)", name):
            stage, block, part, leaf = match.groups()
            return (f"trunk_output.block{stage}.block{stage}-{int(block) - 1}."
                    f"{TIMM_NAMES.get(part, part)}.{leaf}")
        return re.sub(r"^stem\.conv\.", "stem.0.",
                      re.sub(r"^stem\.bn\.", "stem.1.", re.sub(r"^head\.fc\.", "fc.", name)))

    return {rename(re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)): tensor for name, tensor in state.items()}


def create_regnet(name, num_classes=1000):
    """A torchvision RegNet with fresh weights, channels-last, which convolutions run fastest in. Raises
    ValueError for an unknown name."""
    if name not in REGNETS:
        raise ValueError(f"unknown RegNet {name!r}: choose one of {', '.join(REGNETS)}")
    return models.get_model(name, weights=None, num_classes=num_classes).to(memory_format=torch.channels_last)


def name_of(width):
    """The torchvision RegNet whose features have that width; None if there is none."""
    return next((name for name, known in REGNETS.items() if known == width), None)


def weights_url(source):
    """The address behind "official" or a torchvision name; None if `source` is neither."""
    if source == "official":
        return OFFICIAL
    if source in REGNETS:
        available = models.get_model_weights(source)
        if "IMAGENET1K_V2" not in available.__members__:
            raise ValueError(f"torchvision has no weights of {source} from ImageNet-1k alone; name an "
                             f"entry in full, one of {', '.join(map(str, available))} (mind their licence)")
        return available["IMAGENET1K_V2"].url
    if re.fullmatch(r"RegNet_\w+_Weights\.\w+", source):
        try:
            return models.get_weight(source).url
        except ValueError as error:
            raise ValueError(f"torchvision has no weights {source!r}: {error}") from None
    return None


def read_weights(source):
    """What a teacher's file, URL or name holds, read without executing anything in it. Raises
    FileNotFoundError or ValueError naming the source."""
    url = weights_url(str(source)) or str(source)
    try:
        if url.startswith("https://"):
            name = url.split("?")[0].rsplit("/", 1)[-1]
            hashed = re.search(r"-[0-9a-f]{8,}\.", name)     # else the cached name must tell addresses apart
            name = name if hashed else f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=bool(hashed),
                                                      file_name=name, weights_only=True)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(url, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no RegNet {source}: a path, an https URL, official, or a torchvision "
                                "RegNet such as regnet_y_16gf is expected") from None
    except OSError as error:
        raise OSError(f"cannot read RegNet {source}: {error}; give the path of its file") from None
    except Exception as error:                                  # a damaged file can make torch raise anything
        reason = (str(error).split("\n")[0][:200] if isinstance(error, RuntimeError) else
                  "it is damaged, or of another format")
        raise ValueError(f"{source} is not a file of tensors and plain values: {reason}") from None


def find_weights(checkpoint):
    """The state dict of a RegNet within a checkpoint, under torchvision's names; None if there is none."""
    if not isinstance(checkpoint, dict):
        return None
    state = next((checkpoint[key] for key in ("model", "state_dict")
                  if isinstance(checkpoint.get(key), dict)), checkpoint)
    state = torchvision_names({name: value for name, value in state.items()
                               if isinstance(name, str) and isinstance(value, torch.Tensor)})
    return state if {"stem.0.weight", "fc.weight"} <= state.keys() and state["fc.weight"].ndim == 2 else None


def load_regnet(source, *, num_classes=None, classes=None, checkpoint=None):
    """A RegNet with the weights of `source` (see above), in evaluation mode.

    `num_classes`, or the names `classes`, where they differ from the file's, give a fresh classifier, and
    it says so; `checkpoint` is what read_weights(source) gave, if it was read already. Raises OSError or
    ValueError naming the source.
    """
    checkpoint = read_weights(source) if checkpoint is None else checkpoint
    state = find_weights(checkpoint)
    name = state and name_of(state["fc.weight"].shape[1])
    if name is None:
        keys = (", ".join(map(str, list(checkpoint)[:4])) if isinstance(checkpoint, dict) else
                type(checkpoint).__name__)
        raise ValueError(f"{source} is no RegNet of torchvision: expected stem.0.weight, trunk_output..., "
                         f"fc.weight (or timm's names for them), found {keys}")
    model = create_regnet(name, num_classes or len(state["fc.weight"]))
    known = checkpoint.get("classes")
    other = classes and isinstance(known, (list, tuple)) and list(known) != list(classes)
    if other or model.fc.out_features != len(state["fc.weight"]):
        if os.environ.get("RANK", "0") == "0":                         # under torchrun once, not per process
            print(f"{source}: fresh classifier for {model.fc.out_features} classes in place of the file's "
                  f"{len(state['fc.weight'])}")
        state |= {f"fc.{name}": value for name, value in model.fc.state_dict().items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).split("\n")[1:])[:300]
        raise ValueError(f"{source} does not fit {name}: {reason}") from None
    return model.eval()


def freeze(model):
    """The model in its fastest exact form: evaluation mode, no gradients, channels-last, and
    each batch norm, now constant, written into the convolution before it: the same function
    with fewer passes over memory."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv2dNormActivation) and isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
    return model.to(memory_format=torch.channels_last)


def load_teacher(source="official", num_classes=1000, classes=None):
    """The frozen teacher (see `freeze`): logits (B, K) of images (B, 3, S, S) normalised as the student's.
    Raises ValueError if it does not know `num_classes` classes, or if its file names other `classes` or
    another order."""
    advice = "train one for your classes: python train.py --model regnet_y_16gf --recipe convnet --data DIR"
    if weights_url(str(source)) and num_classes != 1000:                 # known before anything is downloaded
        raise ValueError(f"teacher {source} knows ImageNet's 1000 classes and the data has "
                         f"{num_classes}; {advice}")
    checkpoint = read_weights(source)
    model = load_regnet(source, checkpoint=checkpoint)
    if model.fc.out_features != num_classes:
        raise ValueError(f"teacher {source} knows {model.fc.out_features} classes and the data has "
                         f"{num_classes}; {advice}")
    known = checkpoint.get("classes")
    if classes and isinstance(known, (list, tuple)) and list(known) != list(classes):
        pair = next((a, b) for a, b in zip(known, classes) if a != b)
        raise ValueError(f"teacher {source} knows other classes: where it has {pair[0]!r}, the data has "
                         f"{pair[1]!r}; {advice}")
    return freeze(model)


def main():
    parser = argparse.ArgumentParser(
        description="Describes a teacher, and writes it under torchvision's names.")
    parser.add_argument("source", metavar="SOURCE",
                        help="official, a torchvision RegNet or weights entry, a file or URL")
    parser.add_argument("--output", help="write the weights to this file, under torchvision's names")
    args = parser.parse_args()
    try:
        checkpoint = read_weights(args.source)
        model = load_regnet(args.source, checkpoint=checkpoint)
        state = model.state_dict()
        parts = [checkpoint, *(part for part in checkpoint.values() if isinstance(part, dict))]
        is_timm = any(str(key).endswith("stem.conv.weight") for part in parts for key in part)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{args.source}: {name_of(model.fc.in_features)}, {model.fc.out_features} classes, "
              f"{parameters:,} parameters, {'timm' if is_timm else 'torchvision'}'s names")
        if args.output:
            with open(args.output, "wb") as file:
                torch.save(state, file)
            print(f"{args.output}: {len(state)} tensors under torchvision's names"
                  f"{', without the names of its classes' if checkpoint.get('classes') else ''}")
    except (OSError, ValueError) as error:
        sys.exit(f"teacher.py: {error}")


if __name__ == "__main__":
    main()
