"""Exact evaluation: top-1, top-5 and loss of any checkpoint, on any number of processes.

    python evaluate.py --weights deit.pth --data imagenet/val
    python evaluate.py --weights tiny-distilled --data imagenet           74.476 / 91.920, as published
    torchrun --nproc_per_node 4 evaluate.py --weights deit.pth --data imagenet/val

Architecture, heads, image size and classes are read from the file; a RegNet teacher is evaluated the same way. The
protocol is the one behind the published numbers: the short side to int(S / 0.875) pixels, bicubic, the centre S x S,
and for distilled models the mean of the two heads' logits. Numbers are in float32, and counted in integers, so they
do not depend on the number of processes.
"""
import argparse
import contextlib
import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import deit
import teacher

BATCH_SIZE = 64


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
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, data.BadImage):
            reason = str(error).strip().split("\n")[-1]                  # a loader's worker puts its traceback before
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
def evaluate(model, loader, device, *, progress=False):
    """{head: Score} over all images of all ranks' loaders (see data.eval_loader); `mean` is the model's own output.

    Every batch is filled up to the loader's batch size before the model sees it, since the arithmetic of a matrix
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
            sums[head] = sums.get(head, 0) + count(logits[: len(labels)], labels)
    model.train(was_training)
    heads = ("class", "distillation", "mean") if getattr(model, "distilled", False) else ("mean",)
    totals = torch.stack([sums[head] if sums else torch.zeros(5, dtype=torch.int64, device=device) for head in heads])
    if dist.is_initialized():
        dist.all_reduce(totals)
    return {head: Score(*row) for head, row in zip(heads, totals.tolist())}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def load_any(source, *, image_size=None, ema=False):
    """(model, class names or None, image size) of a DeiT or a RegNet: a path, an https URL or a published name."""
    if source == "official" or source in teacher.REGNETS:
        checkpoint = teacher.read_weights(source)
    else:
        checkpoint = deit.read_checkpoint(source)
    classes = checkpoint.get("classes") if isinstance(checkpoint, dict) else None
    if teacher.find_weights(checkpoint):
        trained_at = checkpoint.get("recipe", {}).get("image_size", 224)
        return teacher.load_regnet(checkpoint), classes, image_size or trained_at
    model = deit.load_model(checkpoint, image_size=image_size, ema=ema)
    return model, classes, model.image_size


def check_classes(split, num_classes, names, weights):
    """Raises ValueError unless the model's classes are the folder's."""
    if len(split.classes) != num_classes:
        raise ValueError(f"{weights} knows {num_classes} classes and the data has {len(split.classes)} "
                         f"({', '.join(split.classes[:3])}, ...): give the data it was trained for")
    if names and names != split.classes:
        first = next((a, b) for a, b in zip(names, split.classes) if a != b)
        raise ValueError(f"{weights} was trained on other classes: where it has {first[0]!r}, the data has {first[1]!r}")


def main():
    parser = OneLineParser(description="Top-1, top-5 and loss of a checkpoint.", allow_abbrev=False)
    parser.add_argument("--weights", required=True, metavar="W",
                        help=f"a file, an https URL or a published name: {', '.join(deit.PUBLISHED)}; or a teacher")
    parser.add_argument("--data", required=True, metavar="DIR",
                        help=f"a folder with val/, the val folder itself, or one of {', '.join(data.NAMED)}")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images per process (default {BATCH_SIZE})")
    parser.add_argument("--image-size", type=int, help="evaluate at another size than the file's (pixels)")
    parser.add_argument("--crop-ratio", type=float, default=0.875, help="share of the short side kept (default 0.875)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    parser.add_argument("--workers", type=int, help="loader processes (default: usable CPUs / processes here)")
    args = parser.parse_args()

    with one_line_errors("evaluate.py", OSError, ValueError, data.BadImage):
        if args.batch_size < 1 or not 0 < args.crop_ratio <= 1:
            raise ValueError(f"--batch-size {args.batch_size} and --crop-ratio {args.crop_ratio}: "
                             "the first must be 1 or more, the second above 0 and at most 1")
        place = join_processes()
        workers = usable_cpus() // place.local_world_size if args.workers is None else args.workers
        with one_per_machine_first(place):
            model, names, image_size = load_any(args.weights, image_size=args.image_size, ema=args.ema)
            split = data.open_split(args.data, train=False)
        num_classes = model.num_classes if isinstance(model, deit.DeiT) else model.fc.out_features
        check_classes(split, num_classes, names, args.weights)
        if place.rank == 0:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            print(f"{args.weights}: {parameters:,} parameters, {num_classes} classes, image size {image_size}\n"
                  f"{args.data}: {len(split.images):,} images; short side to {int(image_size / args.crop_ratio)}, bicubic, "
                  f"centre {image_size} x {image_size}")
        loader = data.eval_loader(split.images, image_size, crop_ratio=args.crop_ratio, batch_size=args.batch_size,
                                  workers=workers, rank=place.rank, world_size=place.world_size)
        scores = evaluate(model.to(place.device), loader, place.device, progress=place.rank == 0)
    if place.rank == 0:
        for head, score in scores.items():
            if len(scores) > 1:
                print(f"{head:<13} Acc@1 {score.top1:.3f} Acc@5 {score.top5:.3f} loss {score.loss:.3f}")
        final = scores["mean"]
        print(f"* Acc@1 {final.top1:.3f} Acc@5 {final.top5:.3f} loss {final.loss:.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
