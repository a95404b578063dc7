"""Exact evaluation: top-1, top-5 and loss of any checkpoint, on any number of processes.

    python evaluate.py --weights deit.pth --data imagenet/val
    python evaluate.py --weights tiny-distilled --data imagenet           74.476 / 91.920, as published
    torchrun --nproc_per_node 4 evaluate.py --weights deit.pth --data imagenet/val
    python evaluate.py --weights tiny --image a.jpg b.png                 the five likeliest classes of each picture
    python evaluate.py --weights tiny --image a.jpg --attention map.png   and where the model looks

Architecture, heads, image size and classes are read from the file; a RegNet teacher is evaluated the same way. The
protocol is the one behind the published numbers: the short side to int(S / 0.875) pixels, bicubic, the centre S x S,
and for distilled models the mean of the two heads' logits. Numbers are in float32, and counted in integers, so they
do not depend on the number of processes.
"""
import argparse
import collections
import contextlib
import math
import os
import re
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

import data
import deit
import teacher

BATCH_SIZE = 64
NOISE = 0.15                                                             # points between decoders and precisions, at most


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Place(NamedTuple):
    """Where this process stands: its device, its rank among all processes and among those of this machine."""
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def join_processes():
    """Joins the process group if torchrun started this process (nccl on GPUs, gloo on CPUs). Raises ValueError if there
    are more processes on this machine than GPUs."""
    rank, world_size, local_rank, local_world_size = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and local_world_size > gpus:
        raise ValueError(f"{local_world_size} processes on a machine with {gpus} GPUs: --nproc_per_node {gpus}")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(minutes=30))
    return Place(device, rank, world_size, local_rank, local_world_size)


@contextlib.contextmanager
def one_per_machine_first(place):
    """Lets the first process of each machine through before the others: it downloads, they find the file."""
    if place.world_size > 1 and place.local_rank > 0:
        dist.barrier()
    yield
    if place.world_size > 1 and place.local_rank == 0:
        dist.barrier()


def usable_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, printed by one process."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n" if os.environ.get("RANK", "0") == "0" else None)


@contextlib.contextmanager
def one_line_errors(program, *mistakes):
    """Turns a mistake in flags, files or data into one line per machine and exit status 1, without a traceback."""
    try:
        yield
    except mistakes as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, data.BadImage):
            time.sleep(10)                                               # the first process says it, unless it has no error
        reason = str(error).strip().split("\n")[-1]                      # a loader's worker puts its traceback before
        print(f"{program}: {reason.removeprefix('data.BadImage: ')}", file=sys.stderr, flush=True)
        sys.exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# Counting


class Score(NamedTuple):
    """Sums over images. The loss is a sum in units of 2^-32, an integer, so that no order of adding changes it."""
    images: int
    correct1: int
    correct5: int
    loss_units: int
    not_finite: int

    @property
    def top1(self):
        """Percent of images whose label has the highest logit."""
        return 100 * self.correct1 / self.images

    @property
    def top5(self):
        return 100 * self.correct5 / self.images

    @property
    def loss(self):
        """Cross-entropy, mean over images. (The official code takes the mean over batches, the last being smaller.)"""
        return float("nan") if self.not_finite else self.loss_units / 2**32 / self.images


def count(logits, labels):
    """The five sums of a Score for one batch, as an int64 tensor."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    losses = F.cross_entropy(logits.float(), labels, reduction="none").double()
    finite = losses.isfinite()
    units = (losses.where(finite, 0) * 2**32).round().long()
    return torch.stack([hits.new_ones(len(labels)).sum(), hits[:, 0].sum(), hits.sum(), units.sum(), (~finite).sum()])


def predict(model, images):
    """{head: logits (B, K)}: class, distillation and mean for a distilled DeiT, mean alone for any other model."""
    if not getattr(model, "distilled", False):
        return {"mean": model(images)}
    class_logits, distillation_logits = model.forward_heads(images)
    return {"class": class_logits, "distillation": distillation_logits, "mean": (class_logits + distillation_logits) / 2}


@torch.no_grad()
def evaluate(model, loader, device, *, columns=None, progress=False):
    """{head: Score} over all images of all ranks' loaders (see data.eval_loader); `mean` is the model's own output.

    `columns` says which logit stands for which label, where the data's classes are a part of the model's or in another
    order; the others are left out. Every batch is filled up to the loader's batch size before the model sees it, since the arithmetic of a matrix
    product may depend on its shape: an image gets the same logits in whichever batch it comes.
    """
    was_training = model.training
    model.eval()
    sums = {}
    for pixels, labels in tqdm(loader, desc="evaluate", unit="batch", disable=not progress, leave=False):
        filler = pixels.new_zeros(loader.batch_size - len(pixels), *pixels.shape[1:])
        images = data.normalize(torch.cat((pixels, filler)).to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        for head, logits in predict(model, images).items():
            logits = logits if columns is None else logits[:, columns]
            sums[head] = sums.get(head, 0) + count(logits[: len(labels)], labels)
    model.train(was_training)
    heads = ("class", "distillation", "mean") if getattr(model, "distilled", False) else ("mean",)
    totals = torch.stack([sums[head] if sums else torch.zeros(5, dtype=torch.int64, device=device) for head in heads])
    if dist.is_initialized():
        dist.all_reduce(totals)
    return {head: Score(*row) for head, row in zip(heads, totals.tolist())}


# ---------------------------------------------------------------------------------------------------------------------
# Weights and classes


class Loaded(NamedTuple):
    """A model in evaluation mode, the size of its images in pixels, its number of classes, and their names if known."""
    model: torch.nn.Module
    image_size: int
    num_classes: int
    classes: list


def load_any(source, *, image_size=None, ema=False):
    """A DeiT or a RegNet from a path, an https URL or a published name."""
    by_teacher = source == "official" or source in teacher.REGNETS
    checkpoint = teacher.read_weights(source) if by_teacher else deit.read_checkpoint(source)
    classes = checkpoint.get("classes") if isinstance(checkpoint, dict) else None
    if teacher.find_weights(checkpoint):
        model = teacher.load_regnet(checkpoint)
        return Loaded(model, image_size or checkpoint.get("recipe", {}).get("image_size", 224), model.fc.out_features, classes)
    model = deit.load_model(checkpoint, image_size=image_size, ema=ema)
    return Loaded(model, model.image_size, model.num_classes, classes)


def are_wordnet_ids(names):
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def match_classes(folder, loaded, reference):
    """For each class folder the model's logit, or None where they are the same in the same order.

    Names stored in the checkpoint decide. Without them ImageNet's thousand are known by number (folders 0 to 999, as
    ImageNet-V2 has them) or, for WordNet ids, from `reference`: the class folders of a complete ImageNet. Raises
    ValueError where the folders cannot be matched, with what to give.
    """
    known = loaded.classes
    if not known and are_wordnet_ids(folder) and reference:
        known = data.class_folders(reference)
        if len(known) != loaded.num_classes:
            raise ValueError(f"--reference {reference} has {len(known)} class folders and the model {loaded.num_classes} "
                             "classes: give a complete train/ or val/")
    if not known and loaded.num_classes == 1000 and all(name.isdigit() and int(name) < 1000 for name in folder):
        known = [str(number) for number in range(1000)]
        folder = [str(int(name)) for name in folder]
    if known and set(folder) <= set(known):
        return None if folder == known else [known.index(name) for name in folder]
    if known:
        strange = [name for name in folder if name not in known]
        raise ValueError(f"the weights are for other classes than the data: {len(strange)} folder(s) unknown to the model, "
                         f"such as {strange[0]!r}; it knows {known[0]!r}, {known[1]!r}, ...")
    if len(folder) != loaded.num_classes:
        remedy = ("for a part of ImageNet add --reference DIR, a folder with all 1000 class folders, to know their order"
                  if are_wordnet_ids(folder) else "give the data it was trained for")
        raise ValueError(f"the model knows {loaded.num_classes} classes and the data has {len(folder)} ({folder[0]}, ...): "
                         f"{remedy}")
    return None


def imagenet_notes(split):
    """What would make the numbers incomparable with published ones: lines to print before a run on 1000 classes."""
    if not isinstance(split.images, data.Folder):
        return []
    notes, counts = [], collections.Counter(split.images.targets)
    if not are_wordnet_ids(split.classes) and not all(name.isdigit() for name in split.classes):
        notes.append(f"class folders are not WordNet ids (n01440764, ...) but {split.classes[0]!r}, ...: ImageNet's order of "
                     "classes is that of the ids, with other names the labels are wrong")
    odd = [label for label in counts if counts[label] != 50]
    if odd:
        hint = "is this the training set? give val/" if len(split.images) > 100_000 else "it is not the validation set"
        notes.append(f"{len(odd)} of {len(split.classes)} classes do not have 50 images ({split.classes[odd[0]]} has "
                     f"{counts[odd[0]]}): {hint}")
    return notes


def verdict(weights, score):
    """How a result compares with the published one; None if the weights are not published or the data is not ImageNet's
    50,000 images."""
    names = [name for name, published in deit.PUBLISHED.items()
             if weights == name or os.path.basename(weights) == published.file]
    if not names or score.images != 50_000:
        return None
    published = deit.PUBLISHED[names[0]]
    differences = score.top1 - published.top1, score.top5 - published.top5
    judgement = "within noise" if max(map(abs, differences)) <= NOISE else "not explained by noise: check your data"
    return (f"published: Acc@1 {published.top1:.3f} Acc@5 {published.top5:.3f}; "
            f"difference {differences[0]:+.3f} {differences[1]:+.3f}: {judgement}")


# ---------------------------------------------------------------------------------------------------------------------
# Single pictures


def class_names(loaded):
    """Names to show for the model's classes: ImageNet's from torchvision, else the checkpoint's, else numbers."""
    if loaded.num_classes == 1000 and (not loaded.classes or are_wordnet_ids(loaded.classes)):
        return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return loaded.classes or [f"class {label}" for label in range(loaded.num_classes)]


def attention_figure(model, images, names):
    """A Pillow image, a row per picture (normalised, (B, 3, S, S)): where its class token, and its distillation token,
    attend to. "last block" is the mean over heads of the last block's attention; "rollout" (Abnar and Zuidema, 2020)
    follows it through all blocks, half of each block's input being the residual. Bright is much, relative to the
    picture's most attended patch."""
    maps = model.attention_maps(images).mean(dim=2)                                                 # (B, depth, N, N)
    rollout = identity = torch.eye(maps.shape[-1], device=images.device)
    for attention in maps.unbind(dim=1):
        rollout = (attention + identity) / 2 @ rollout
    columns, titles = [images], ["picture"]
    for position, token in enumerate(("class", "distillation")[: len(model.tokens)]):
        for name, attention in (("last block", maps[:, -1]), ("rollout", rollout)):
            columns.append(highlight(images, attention[:, position, len(model.tokens):]))           # (B, patches)
            titles.append(f"{token}, {name}")
    return data.draw_grid([column.cpu() for column in columns], titles, names)


def highlight(images, patches):
    """Dims each image where its patches (B, patches) have little weight; normalised in, normalised out."""
    side = math.isqrt(patches.shape[1])
    weight = (patches / patches.amax(dim=1, keepdim=True)).unflatten(1, (1, side, side))
    weight = F.interpolate(weight, size=images.shape[-2:], mode="bilinear")                         # (B, 1, S, S)
    black = data.normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=images.device))
    return black + (images - black) * (0.08 + 0.92 * weight)


@torch.no_grad()
def describe_pictures(loaded, paths, device, crop_ratio, attention):
    """Prints the five likeliest classes of each picture; writes the attention figure if a path for it is given."""
    transform = data.eval_transform(loaded.image_size, crop_ratio=crop_ratio)
    pixels = torch.stack([transform(data.read_rgb(path)) for path in paths])
    images, names = data.normalize(pixels.to(device)), class_names(loaded)
    top = predict(loaded.model, images)["mean"].softmax(dim=1).topk(min(5, loaded.num_classes), dim=1)
    for path, probabilities, labels in zip(paths, top.values.tolist(), top.indices.tolist()):
        print(path)
        for probability, label in zip(probabilities, labels):
            print(f"  {100 * probability:6.2f} %  {names[label]}")
    if attention:
        if not isinstance(loaded.model, deit.DeiT):
            raise ValueError("--attention needs a DeiT; a convnet has no attention to show")
        attention_figure(loaded.model, images, [os.path.basename(path) for path in paths]).save(attention)
        print(f"{attention}: attention of {'class and distillation token' if loaded.model.distilled else 'the class token'}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_flags():
    parser = OneLineParser(description="Top-1, top-5 and loss of a checkpoint; or the classes of single pictures.",
                           allow_abbrev=False)
    parser.add_argument("--weights", required=True, metavar="W",
                        help=f"a file, an https URL or a published name: {', '.join(deit.PUBLISHED)}; or a teacher")
    parser.add_argument("--data", metavar="DIR",
                        help=f"a folder with val/, the val folder itself, or one of {', '.join(data.NAMED)}")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="pictures to name, in place of --data")
    parser.add_argument("--attention", metavar="PNG", help="with --image: draw what the model's tokens attend to")
    parser.add_argument("--reference", metavar="DIR", help="a complete ImageNet train/ or val/: tells which class is which "
                        "when --data has a part of the 1000 (ImageNet-100, Imagenette, ImageNet-A, ImageNet-R)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images per process (default {BATCH_SIZE})")
    parser.add_argument("--image-size", type=int, help="evaluate at another size than the file's (pixels)")
    parser.add_argument("--crop-ratio", type=float, default=0.875, help="share of the short side kept (default 0.875)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    parser.add_argument("--workers", type=int, help="loader processes (default: usable CPUs / processes here)")
    args = parser.parse_args()
    if not args.data and not args.image:
        parser.error("give --data DIR to evaluate on, or --image FILE ... to look at")
    if args.data and args.image or args.attention and not args.image:
        parser.error("--data evaluates; --image names single pictures, with --attention as a figure: one or the other")
    if args.batch_size < 1 or not 0 < args.crop_ratio <= 1 or (args.image_size or 1) < 1 or (args.workers or 0) < 0:
        parser.error("--batch-size and --image-size must be 1 or more, --crop-ratio above 0 and at most 1, --workers 0 or more")
    return args


def score(args, loaded, split, place):
    """Evaluates and prints, on the first process."""
    columns = match_classes(split.classes, loaded, args.reference)
    workers = usable_cpus() // place.local_world_size if args.workers is None else args.workers
    if place.rank == 0:
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        print(f"{args.weights}: {parameters:,} parameters, {loaded.num_classes} classes, image size {loaded.image_size}")
        print(f"{args.data}: {len(split.images):,} images; short side to {int(loaded.image_size / args.crop_ratio)}, bicubic, "
              f"centre {loaded.image_size} x {loaded.image_size}")
        if columns:
            print(f"the data has {len(columns)} of the model's {loaded.num_classes} classes: matched by name, and the "
                  "choice is among these only")
        for note in imagenet_notes(split) if loaded.num_classes == 1000 and not columns else []:
            print(f"note: {note}")
    loader = data.eval_loader(split.images, loaded.image_size, crop_ratio=args.crop_ratio, batch_size=args.batch_size,
                              workers=workers, rank=place.rank, world_size=place.world_size)
    scores = evaluate(loaded.model.to(place.device), loader, place.device, columns=columns, progress=place.rank == 0)
    if place.rank == 0:
        for head in scores if len(scores) > 1 else ():
            print(f"{head:<13} Acc@1 {scores[head].top1:.3f} Acc@5 {scores[head].top5:.3f} loss {scores[head].loss:.3f}")
        if line := verdict(args.weights, scores["mean"]):
            print(line)
        print("* Acc@1 {0.top1:.3f} Acc@5 {0.top5:.3f} loss {0.loss:.3f}".format(scores["mean"]))


def main():
    args = parse_flags()
    with one_line_errors("evaluate.py", OSError, ValueError, data.BadImage):
        place = join_processes()
        with one_per_machine_first(place):                               # it may download the weights or the data
            loaded = load_any(args.weights, image_size=args.image_size, ema=args.ema)
            split = data.open_split(args.data, train=False) if args.data else None
        if args.data:
            score(args, loaded, split, place)
        else:
            loaded.model.to(place.device)
            describe_pictures(loaded, args.image, place.device, args.crop_ratio, args.attention)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
