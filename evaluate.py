"""Exact evaluation: top-1, top-5 and loss of any checkpoint, on any number of processes.

    python evaluate.py --weights deit.pth --data imagenet/val
    python evaluate.py --weights tiny-distilled --data imagenet     published: 74.476 / 91.920
    torchrun --nproc_per_node 4 evaluate.py --weights deit.pth --data imagenet/val
    python evaluate.py --weights tiny --image a.jpg b.png      the five likeliest classes

Architecture, heads, image size and classes are read from the file. The protocol is that of
the published numbers: short side to int(S / 0.875) pixels, bicubic, center S x S; for
distilled models the mean of the two heads' logits; float32. Every image is counted once.
Shapes: B images, K classes, S pixels.
"""
import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

import data
import deit
from teacher import load_any

# --------------------------------------------------------------------------------------
# Scores

# Of the images of all processes: their number, top-1 and top-5 in %, top-1 among all classes
# of the model (of which the data may have a part), and the mean loss (officially a mean over
# batches). Of this process's own: decisions and labels (N,).
Score = namedtuple("Score", "images top1 top5 top1_of_all loss decisions labels")


def predict(model, images):
    """{head: logits (B, K)}; "mean" is the model's own output."""
    if not getattr(model, "distilled", False):
        return {"mean": model(images)}
    class_logits, distillation_logits = model.forward_heads(images)
    return {"class": class_logits, "distillation": distillation_logits,
            "mean": (class_logits + distillation_logits) / 2}


@torch.no_grad()
def evaluate(model, loader, device, *, class_indices=slice(None)):
    """{head: Score} over the images of all processes, each of which has at least one.

    `class_indices[i]` is the model's class for class i of the data, if the data has fewer
    classes or another order; predictions are restricted to these. Leaves the model in
    evaluation mode.
    """
    model.eval()
    judged = {}
    for pixels, labels in loader:
        images = data.normalize(pixels.to(device, non_blocking=True))   # (B, 3, S, S)
        labels = labels.to(device, non_blocking=True)                   # (B,)
        for head, logits in predict(model, images).items():
            judged.setdefault(head, []).append(judge(logits, labels, class_indices))

    scores = {}
    for head, batches in judged.items():
        rows = torch.cat(batches, dim=1)                                # (6, own images)
        decisions, labels, *counted = rows.unbind()
        sums = torch.stack([torch.ones_like(labels), *counted]).sum(dim=1)
        number, *hits, loss = all_reduce(sums).tolist()
        percents = [100 * hit / number for hit in hits]
        scores[head] = Score(number, *percents, loss / number, decisions, labels)
    return scores


def judge(logits, labels, class_indices):
    """Rows (6, B) of logits (B, K), in float64: decision; label; whether the decision is
    right, whether one of the first five is, whether the decision among all K is; loss."""
    answers = torch.arange(logits.shape[1], device=logits.device)[class_indices][labels]
    allowed = logits[:, class_indices]
    best = allowed.topk(min(5, allowed.shape[1]), dim=1).indices        # (B, 5), best first
    hits = best == labels[:, None]                                      # (B, 5)
    losses = F.cross_entropy(allowed.float(), labels, reduction="none")     # (B,)

    rows = (best[:, 0], labels, hits[:, 0], hits.any(dim=1), logits.argmax(dim=1) == answers,
            losses)
    return torch.stack([row.double() for row in rows])


def all_reduce(sums):
    """Sums a tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def agreement(score, other):
    """In % of the images, how often two Scores have the same decision. (Table 4 of the paper
    has the share that differs.)"""
    agreed = all_reduce((score.decisions == other.decisions).sum())
    return 100 * agreed.item() / score.images


def chance_level(score, num_classes):
    """Top-1 in % that is still chance: that of always naming the most frequent class, plus
    three standard deviations."""
    counts = all_reduce(torch.bincount(score.labels.long(), minlength=num_classes))
    share = counts.max().item() / score.images
    return 100 * (share + 3 * (share * (1 - share) / score.images) ** 0.5)


# --------------------------------------------------------------------------------------
# A folder of images


def find_class_indices(folders, loaded, reference=None):
    """(the model's class for each class folder, how it was found). By name, if the checkpoint
    or else the folders of `reference` name all its classes. Otherwise ImageNet's 1,000
    folders are taken by WordNet id or by number (ImageNet-V2), and those of any other model
    in the order that torchvision gives them. Raises ValueError."""
    known = loaded.classes
    if reference and not known:
        known = data.class_folders(reference)
    if known and len(known) == loaded.num_classes and set(folders) <= set(known):
        return [known.index(name) for name in folders], "matched by name"
    if loaded.num_classes == 1000 and set(folders) == set(map(str, range(1000))):
        return [int(name) for name in folders], "matched by number"

    is_wordnet = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    is_ordered = is_wordnet or loaded.num_classes != 1000
    if is_ordered and not known and len(folders) == loaded.num_classes:
        return list(range(len(folders))), "in the folders' order"
    raise ValueError(f"the model's {loaded.num_classes} classes are not those of the data "
                     f"({folders[:3]}, ...), or the checkpoint does not name them: for a part of "
                     "ImageNet add --reference DIR, a whole val/")


def evaluate_folder(args, world):
    """Prints what is evaluated and how; a line per head, with its agreement with each line's
    (table 4); last, the model's own accuracy. Raises FloatingPointError for an output that
    is not finite."""
    with local_rank_zero_first(world):                       # which may download
        images = data.open_split(args.data, train=False)
        model = load_any(args.weights, image_size=args.image_size, ema=args.ema)
        size = model.image_size
        teachers = [load_any(source, image_size=size) for source in args.teacher]
    loader = data.eval_loader(
        images, size, crop_ratio=args.crop_ratio, batch_size=args.batch_size,
        workers=args.workers, rank=world.rank, world_size=world.size)
    compare_processes(world, data.fingerprint(images))
    lines = [f"{len(images)} images, short side to {data.short_side(size, args.crop_ratio)}, "
             f"bicubic, center {size} x {size}, ImageNet's mean and standard deviation"]

    scores = []
    for source, loaded in zip([*args.teacher, args.weights], [*teachers, model]):
        with deit.naming(source):
            indices, how = find_class_indices(images.classes, loaded, args.reference)
        lines.append(f"{source}: {loaded.size}, scored among {len(indices)} of its "
                     f"{loaded.num_classes} classes, {how}")

        of_heads = evaluate(
            loaded.model.to(world.device), tqdm(loader, disable=world.rank > 0),
            world.device, class_indices=indices)
        for head, score in of_heads.items():
            if not math.isfinite(score.loss):
                raise FloatingPointError(f"{source}: its output is not finite")
            line = f"Acc@1 {score.top1:.3f} Acc@5 {score.top5:.3f} loss {score.loss:.3f}"
            if len(indices) < loaded.num_classes:
                line += f" (among all its classes Acc@1 {score.top1_of_all:.3f})"
            scores.append((f"{source} {head}", score, line))

    for name, score, line in scores:             # the last is the model's own output
        if len(scores) > 1:
            shares = [f"{agreement(score, other):.3f}" for _, other, _ in scores]
            lines.append(f"{name}: {line}, agreement with each {' '.join(shares)}")
    if world.rank == 0:
        print(*lines, f"* {line}", sep="\n")


# --------------------------------------------------------------------------------------
# Single pictures


def class_names(loaded):
    """Names to show: ImageNet's from torchvision, else the checkpoint's, else numbers."""
    names = loaded.classes or [f"class {label}" for label in range(loaded.num_classes)]
    if loaded.num_classes == 1000 and names[0] in ("class 0", "n01440764"):
        return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return names


@torch.no_grad()
def name_pictures(args, device):
    """Prints the five likeliest classes of each picture, one picture at a time, or why it
    cannot be read: then it ends with ValueError. A folder stands for all that is in it."""
    loaded = load_any(args.weights, image_size=args.image_size, ema=args.ema)
    model, names = loaded.model.to(device), class_names(loaded)
    transform = data.eval_transform(loaded.image_size, crop_ratio=args.crop_ratio)
    paths = []
    for path in map(Path, args.image):
        paths += sorted(path.glob("*")) or [path]

    failed = False
    for path in paths:
        try:
            picture = data.read_rgb(path)
        except ValueError as error:
            print(error)
            failed = True
            continue

        image = data.normalize(transform(picture)[None].to(device))
        probabilities = predict(model, image)["mean"][0].softmax(dim=0)     # (K,)
        print(path)
        for value, label in zip(*probabilities.topk(min(5, len(names)))):
            print(f"  {value:7.2%}  {names[label]}")
    if failed:
        raise ValueError("not all pictures could be read")


# --------------------------------------------------------------------------------------
# Processes and mistakes; train.py uses these as well

World = namedtuple("World", "rank size local_rank device")


def init_processes():
    """The World of this process, which joins torchrun's process group if there is one.
    Raises ValueError if the environment or the GPUs are not enough."""
    sys.stdout.reconfigure(errors="backslashreplace")    # file names may not be UTF-8
    torch.backends.cudnn.allow_tf32 = False              # keep float32 exact: no TF32

    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise ValueError("srun started several processes that do not know of each other: let it "
                         "start one torchrun on each machine, as in README")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU: use a smaller "
                             "--nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)

    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():       # not under torchrun
        return World(0, 1, 0, device)
    store, rank, size = next(dist.rendezvous("env://"))
    # After a restart, torchrun's store still holds the addresses of the dead processes
    # (pytorch issue 135712). On several machines README sets an environment variable.
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # the others may have to wait for a slow disk or a download
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store,
                            rank=rank, world_size=size, timeout=timedelta(minutes=30))
    return World(rank, size, local_rank, device)


def compare_processes(world, facts):
    """Raises ValueError unless the facts are the same in all processes."""
    of_all = [None] * world.size
    if world.size > 1:
        dist.all_gather_object(of_all, facts)
    if len(set(of_all)) > 1:
        raise ValueError(f"the processes differ: {of_all}. All need the same files in --data and "
                         "the same kind of GPU, and in training --output on a shared disk")


@contextlib.contextmanager
def local_rank_zero_first(world):
    """Lets the first process of each machine through before the others: it downloads, they
    find the file."""
    if world.size > 1 and world.local_rank > 0:
        dist.barrier()
    yield
    if world.size > 1 and world.local_rank == 0:
        dist.barrier()


@contextlib.contextmanager
def one_line_errors(program):
    """A user's mistake (OSError, ValueError, FloatingPointError) becomes one line, from the
    first process of each machine and in torchrun's summary, and exit status 1. Any other
    exception is a bug and keeps its traceback. (A bug that raises one of the three looks
    like a mistake.)"""
    try:
        yield
    except (OSError, ValueError, FloatingPointError) as error:
        # a loader's worker sends a traceback, whose last line is the message
        *_, line = str(error).strip().split("\n")
        message = f"{program}: " + re.sub(r"^\w+Error: ", "", line)
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if error_file:
            Path(error_file).write_text(json.dumps({"message": message}))
        sys.exit(message if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags; for several processes use torchrun)")


def parse_flags():
    parser = Parser(description="Accuracy of a checkpoint, or the classes of pictures.")
    add = parser.add_argument
    add("--weights", required=True,
        help="a file, a URL, a published name (tiny, base-distilled-384), or a teacher")
    add("--data", help="a folder with val/, or val/ itself, or a name as in data.py")
    add("--image", nargs="+", help="pictures to name, or folders of them")
    add("--teacher", nargs="+", default=[],
        help="models to compare decisions with, as in table 4")

    add("--reference", help="a whole ImageNet val/, to name the classes of a part")
    add("--ema", action="store_true", help="the averaged weights of a checkpoint")
    add("--batch-size", type=int, default=64, help="images per process (64)")
    add("--image-size", type=int, help="pixels (the file's)")
    add("--crop-ratio", type=float, default=0.875, help="share that is kept (0.875)")
    add("--workers", type=int, help="loader processes (by the share of the CPUs)")

    args = parser.parse_args()
    if bool(args.data) == bool(args.image) or not 0.1 <= args.crop_ratio <= 1:
        parser.error("give --data DIR to evaluate on or --image FILE ... to look at; "
                     "--crop-ratio is from 0.1 to 1")
    return args


def main():
    with one_line_errors("evaluate.py"):
        args = parse_flags()
        world = init_processes()
        if args.data:
            evaluate_folder(args, world)
        elif world.rank == 0:
            name_pictures(args, world.device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
