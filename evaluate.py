"""Exact evaluation: top-1, top-5 and loss of any checkpoint, on any number of processes.

    python evaluate.py --weights deit.pth --data imagenet/val
    python evaluate.py --weights tiny-distilled --data imagenet           74.476 / 91.920, as published
    torchrun --nproc_per_node 4 evaluate.py --weights deit.pth --data imagenet/val
    python evaluate.py --weights tiny --image a.jpg b.png                 the five likeliest classes
                                                                          of each picture
    python evaluate.py --weights tiny --image a.jpg --attention map.png   and where the model looks

Architecture, heads, image size and classes are read from the file; a RegNet teacher is evaluated the
same way. The protocol is the one behind the published numbers: the short side to int(S / 0.875) pixels,
bicubic, the centre S x S, and for distilled models the mean of the two heads' logits. Numbers are in
float32, and counted in integers, so they do not depend on the number of processes.
"""
import argparse
import collections
import contextlib
import itertools
import math
import multiprocessing
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
# points: at 224 the same weights differ by up to 0.146 top-5 between official and timm's published tables
NOISE = 0.15
TIMEOUT = timedelta(minutes=30)                                  # how long a process waits for the others


# ---------------------------------------------------------------------------------------------------
# Processes


class Place(NamedTuple):
    """Where this process stands: its device, its rank among all processes and among those of this machine,
    and how often torchrun has restarted them."""
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int


def join_processes():
    """Joins the process group if torchrun started this process (nccl on GPUs, gloo on CPUs). Raises
    ValueError if there are more processes on this machine than GPUs."""
    rank, world_size, local_rank, local_world_size, restarts = (
        int(os.environ.get(name, default)) for name, default in (
            ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1),
            ("TORCHELASTIC_RESTART_COUNT", 0)))
    torch.backends.cudnn.allow_tf32 = False                   # float32 is to mean float32 in convolutions too
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and local_world_size > gpus:
        raise ValueError(f"{local_world_size} processes on a machine with {gpus} GPUs: "
                         f"--nproc_per_node {gpus}")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        restarts = join_group("cpu:gloo,cuda:nccl" if gpus else "gloo", rank, world_size, restarts)
    return Place(device, rank, world_size, local_rank, local_world_size, restarts)


def join_group(backend, rank, world_size, restarts):
    """Joins the group and returns how often torchrun has restarted it: the machines count differently."""
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if restarts and machines > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise OSError("torchrun --max-restarts on several machines needs "
                      "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")
    store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if machines == 1:
        # torchrun keeps its store over restarts and in it the addresses of processes that are gone
        # (pytorch/pytorch, issue 135712): each attempt gets names of its own
        store = dist.PrefixStore(f"attempt {restarts}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    most = torch.tensor(restarts)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


@contextlib.contextmanager
def one_per_machine_first(place):
    """Lets the first process of each machine through before the others: it downloads, they find the file."""
    if place.world_size > 1 and place.local_rank > 0:
        dist.barrier()
    yield
    if place.world_size > 1 and place.local_rank == 0:
        dist.barrier()


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, printed by one process."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n"
                  if os.environ.get("RANK", "0") == "0" else None)


@contextlib.contextmanager
def one_line_errors(program, *mistakes):
    """Turns a mistake in flags, files or data into one line per machine and exit status 1, without a
    traceback; and so for a process that finds the others gone."""
    try:
        yield
    except mistakes as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, data.BadImage):
            time.sleep(10)                                 # the first process says it, unless it has no error
        reason = str(error).strip().split("\n")[-1]              # a loader's worker puts its traceback before
        print(f"{program}: {reason.removeprefix('data.BadImage: ')}", file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():            # they would take their time to be told
            worker.kill()
        sys.exit(1)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            print(f"{program}: {str(error).splitlines()[0][:150]} The machine may be out of memory: "
                  "fewer --workers", file=sys.stderr, flush=True)
            os._exit(1)
        if not dist.is_initialized() or not re.search("connection|peer|timed out|timeout", str(error),
                                                      re.IGNORECASE):
            raise
        time.sleep(2)                                                    # let the one that failed speak first
        print(f"{program}: rank {dist.get_rank()} leaves, another process is gone or stuck: "
              f"{str(error).splitlines()[0][:150]}", file=sys.stderr, flush=True)
        os._exit(1)                                              # a broken process group cannot be taken down


# ---------------------------------------------------------------------------------------------------
# Counting


class Score(NamedTuple):
    """Sums over images. The loss is a sum in units of 2^-32, an integer, so that no order of adding
    changes it; `agreed` counts the decisions that are also the teacher's."""
    images: int
    correct1: int
    correct5: int
    loss_units: int
    not_finite: int
    agreed: int = 0

    @property
    def top1(self):
        """Percent of images whose label has the highest logit."""
        return 100 * self.correct1 / self.images

    @property
    def top5(self):
        return 100 * self.correct5 / self.images

    @property
    def agreement(self):
        """Percent of images decided as the teacher decides them: 100 minus the paper's table 4."""
        return 100 * self.agreed / self.images

    @property
    def loss(self):
        """Cross-entropy, mean over images. (The official code takes the mean over batches,
        the last being smaller.)"""
        return float("nan") if self.not_finite else self.loss_units / 2**32 / self.images


def count(logits, labels, opinions=None):
    """The sums of a Score for one batch, as an int64 tensor."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = top == labels[:, None]
    losses = F.cross_entropy(logits.float(), labels, reduction="none").double()
    finite = losses.isfinite()
    units = (losses.where(finite, 0) * 2**32).round().long()
    return torch.stack([hits.new_ones(len(labels)).sum(), hits[:, 0].sum(), hits.sum(), units.sum(),
                        (~finite).sum(),
                        hits.new_zeros(()) if opinions is None else (top[:, 0] == opinions).sum()])


def predict(model, images):
    """{head: logits (B, K)}: class, distillation and mean for a distilled DeiT, mean alone
    for any other model."""
    if not getattr(model, "distilled", False):
        return {"mean": model(images)}
    class_logits, distillation_logits = model.forward_heads(images)
    return {"class": class_logits, "distillation": distillation_logits,
            "mean": (class_logits + distillation_logits) / 2}


@torch.no_grad()
def predictions(model, loader, device, columns=None, progress=False):
    """Yields ({head: logits}, labels) of each batch.

    Every batch is filled up to the loader's batch size before the model sees it, since the arithmetic of a
    matrix product may depend on its shape: an image gets the same logits in whichever batch it comes. A
    compiled model runs uncompiled, for the same numbers as this script gives.
    """
    was_training = model.training
    model.eval()
    for pixels, labels in tqdm(loader, desc="evaluate", unit="batch", disable=not progress, leave=False):
        filler = pixels.new_zeros(loader.batch_size - len(pixels), *pixels.shape[1:])
        images = data.normalize(torch.cat((pixels, filler)).to(device, non_blocking=True))
        with torch.compiler.set_stance("force_eager"):
            heads = predict(model, images)
        yield ({head: logits[: len(labels)] if columns is None else logits[: len(labels), columns]
                for head, logits in heads.items()}, labels.to(device, non_blocking=True))
    model.train(was_training)


def decisions(model, loader, device, columns=None):
    """The model's class for each image of this process's loader, in order."""
    return torch.cat([logits["mean"].argmax(dim=1) for logits, _ in predictions(model, loader, device, columns)]
                     or [torch.zeros(0, dtype=torch.int64, device=device)])


@torch.no_grad()
def evaluate(model, loader, device, *, columns=None, opinions=None, progress=False):
    """{head: Score} over all images of all ranks' loaders (see data.eval_loader); `mean` is
    the model's own output.

    `columns` gives the model's class for each of the data's, where those are a part of the
    model's or in another order; the model's other classes then do not take part. `opinions`
    are a teacher's decisions to compare with.
    """
    names = ("class", "distillation", "mean") if getattr(model, "distilled", False) else ("mean",)
    sums = torch.zeros(len(names), len(Score._fields), dtype=torch.int64, device=device)
    theirs = itertools.repeat(None) if opinions is None else opinions.split(loader.batch_size)
    for (heads, labels), decided in zip(predictions(model, loader, device, columns, progress), theirs):
        sums += torch.stack([count(heads[name], labels, decided) for name in names])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return {name: Score(*row) for name, row in zip(names, sums.tolist())}


# ---------------------------------------------------------------------------------------------------
# Weights and classes


class Loaded(NamedTuple):
    """A model in evaluation mode, the size of its images in pixels, its number of classes,
    and their names if known."""
    model: torch.nn.Module
    image_size: int
    num_classes: int
    classes: list


def load_any(source, *, image_size=None, ema=False):
    """A DeiT or a RegNet from a path, an https URL or a published name. Raises OSError or
    ValueError naming it."""
    source = str(source)
    checkpoint = teacher.read_weights(source) if teacher.weights_url(source) else deit.read_checkpoint(source)
    content = checkpoint if isinstance(checkpoint, dict) else {}
    if teacher.find_weights(checkpoint):
        if ema and not content.get("model_ema"):
            raise ValueError(f"{source} holds no averaged (EMA) weights: leave --ema out")
        model = teacher.load_regnet(
            source, checkpoint=content | {"model": content["model_ema"]} if ema else content)
        recipe = content.get("recipe")
        image_size = image_size or (recipe.get("image_size", 224) if isinstance(recipe, dict) else 224)
        num_classes = model.fc.out_features
    else:
        model = deit.load_model(source, checkpoint=checkpoint, image_size=image_size, ema=ema)
        image_size, num_classes = model.image_size, model.num_classes
    classes = content.get("classes")
    named = (isinstance(classes, list) and len(classes) == num_classes
             and all(isinstance(name, str) for name in classes))
    return Loaded(model, image_size, num_classes, classes if named else None)


def are_wordnet_ids(names):
    return all(re.fullmatch(r"n\d{8}", name, re.ASCII) for name in names)


def match_classes(folder, loaded, reference=None):
    """For each class folder the model's class, or None where they are the same in the same order.

    Names stored in the checkpoint decide. ImageNet's thousand are also known by number (folders 0 to 999,
    as ImageNet-V2 has them) and, for WordNet ids, from `reference`: the class folders of a complete
    ImageNet. Raises ValueError where the folders cannot be matched, with what to give.
    """
    known = loaded.classes
    imagenet = loaded.num_classes == 1000 and (not known or are_wordnet_ids(known))
    if reference and not known:
        known = data.class_folders(reference)
        if len(known) != loaded.num_classes or not are_wordnet_ids(known):
            raise ValueError(f"--reference {reference} has {len(known)} class folders ({known[0]}, ...): "
                             "give a complete train/ or val/ with the WordNet ids of the model's "
                             f"{loaded.num_classes} classes")
    if imagenet and all(re.fullmatch(r"\d{1,4}", name, re.ASCII) for name in folder) and (
            sorted(map(int, folder)) == list(range(1000))):
        return [int(name) for name in folder]
    if known:
        strange = [name for name in folder if name not in known]
        if strange:
            raise ValueError(f"the weights are for other classes than the data: {len(strange)} of "
                             f"{len(folder)} folder(s) unknown to the model, such as {strange[0]!r}; "
                             f"it knows {', '.join(map(repr, known[:2]))}, ...")
        return None if folder == known else [known.index(name) for name in folder]
    if len(folder) != loaded.num_classes:
        raise ValueError(f"the model knows {loaded.num_classes} classes and the data has {len(folder)}: "
                         f"{missing_advice(folder)}")
    return None


def missing_advice(folder):
    """What to do about a number of class folders that is not the model's."""
    others = [name for name in folder if not are_wordnet_ids([name])]
    if 2 * len(others) > len(folder) or not folder:
        return f"its folders are {folder[0]}, ...; give the data the model was trained for"
    if others:
        return f"{len(others)} folder(s) are not WordNet ids, such as {others[0]!r}: move them away"
    if len(folder) > 1000:
        return "this is more than ImageNet-1k: give its 1000 classes"
    return ("class folders are missing; if this is meant as a part of ImageNet, add --reference DIR, "
            "a folder with all 1000 class folders, to know their order")


def imagenet_notes(split, loaded):
    """What would make the numbers incomparable with published ones: lines to print before a
    run on 1000 classes."""
    if not isinstance(split.images, data.Folder):
        return []
    notes, counts = [], collections.Counter(split.images.targets)
    named = are_wordnet_ids(split.classes) or all(name.isdigit() for name in split.classes)
    if not named and not loaded.classes:
        notes.append(f"class folders are not WordNet ids (n01440764, ...) but {split.classes[0]!r}, ...: "
                     "ImageNet's order of classes is that of the ids, with other names the labels are wrong")
    odd = [label for label in counts if counts[label] != 50]
    if odd:
        hint = ("as many as the training set's; give val/, or rename the two if train/ and val/ are swapped"
                if len(split.images) > 100_000 else "it is not the whole validation set")
        notes.append(f"{len(odd)} of {len(split.classes)} classes do not have 50 images "
                     f"({split.classes[odd[0]]} has {counts[odd[0]]}): {hint}")
    return notes


def verdict(weights, image_size, crop_ratio, score):
    """How a result compares with the published one; None if the weights (by name or file
    name) are not published."""
    published = next((known for name, known in deit.PUBLISHED.items()
                      if weights == name or os.path.basename(weights) == known.file), None)
    if published is None:
        return None
    differences = score.top1 - published.top1, score.top5 - published.top5
    judgement = (f"not comparable, these are {score.images:,} images and not 50,000"
                 if score.images != 50_000 else
                 f"not comparable, published at {published.image_size} pixels and crop ratio 0.875"
                 if (image_size, crop_ratio) != (published.image_size, 0.875) else
                 "within noise" if max(map(abs, differences)) <= NOISE else
                 "not explained by noise: check your data")
    return (f"published: Acc@1 {published.top1:.3f} Acc@5 {published.top5:.3f}; "
            f"difference {differences[0]:+.3f} {differences[1]:+.3f}: {judgement}")


# ---------------------------------------------------------------------------------------------------
# Single pictures


def class_names(loaded):
    """Names to show for the model's classes: ImageNet's from torchvision, else the
    checkpoint's, else numbers."""
    if loaded.num_classes == 1000 and (not loaded.classes or are_wordnet_ids(loaded.classes)):
        return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return loaded.classes or [f"class {label}" for label in range(loaded.num_classes)]


def attention_columns(model, images):
    """{title: pictures}: where the class token, and the distillation token, of normalised
    images (B, 3, S, S) attend to.

    "last block" is the mean over heads of the last block's attention; "rollout" (Abnar and Zuidema, 2020)
    follows it through all blocks, half of each block's output being its input.
    """
    maps = model.attention_maps(images).mean(dim=2)                               # (B, depth, N, N)
    rollout = identity = torch.eye(maps.shape[-1], device=images.device)
    for attention in maps.unbind(dim=1):
        rollout = (attention + identity) / 2 @ rollout
    columns = {"picture": images}
    for position, token in enumerate(("class", "distillation")[: len(model.tokens)]):
        for name, attention in (("last block", maps[:, -1]), ("rollout", rollout)):
            patches = attention[:, position, len(model.tokens):]                  # (B, patches)
            columns[f"{token}, {name}"] = highlight(images, patches)
    return columns


def highlight(images, patches):
    """The images in grey, the more yellow the more attention (B, patches) there is: from the least
    attended patch, none, to the most. Normalised in, normalised out."""
    side, (mean, std) = math.isqrt(patches.shape[1]), data.mean_and_std(images.device)
    weight = patches - patches.amin(dim=1, keepdim=True)
    weight = (weight / weight.amax(dim=1, keepdim=True).clamp(min=1e-12)).unflatten(1, (1, side, side))
    weight = 0.8 * F.interpolate(weight, size=images.shape[-2:], mode="bilinear")  # (B, 1, S, S)
    grey = (images * std + mean).mean(dim=1, keepdim=True)
    yellow = torch.tensor([1.0, 0.85, 0.0], device=images.device).view(3, 1, 1)
    return ((1 - weight) * grey + weight * yellow - mean) / std


@torch.no_grad()
def describe_pictures(loaded, paths, device, crop_ratio, attention):
    """Prints the five likeliest classes of each picture; writes the attention figure if a
    path for it is given."""
    if attention and not isinstance(loaded.model, deit.DeiT):
        raise ValueError("--attention needs a DeiT; a convnet has no attention to show")
    transform, names = data.eval_transform(loaded.image_size, crop_ratio=crop_ratio), class_names(loaded)
    figures = []
    for path in paths:
        image = data.normalize(transform(data.read_rgb(path))[None].to(device))
        probabilities = predict(loaded.model, image)["mean"].softmax(dim=1)[0]
        values, labels = probabilities.topk(min(5, loaded.num_classes))
        print(path, *(f"  {100 * value:6.2f} %  {names[label]}" for value, label in zip(values, labels)), sep="\n")
        if attention:
            figures.append({title: pictures.cpu()
                            for title, pictures in attention_columns(loaded.model, image).items()})
    if attention:
        columns = [torch.cat([figure[title] for figure in figures]) for title in figures[0]]
        data.draw_grid(columns, list(figures[0]),
                       [os.path.basename(path) for path in paths]).save(attention, format="PNG")
        print(f"{attention}: attention of "
              f"{'class and distillation token' if loaded.model.distilled else 'the class token'}")


# ---------------------------------------------------------------------------------------------------
# Command line


def parse_flags():
    parser = OneLineParser(
        description="Top-1, top-5 and loss of a checkpoint; or the classes of single pictures.",
        allow_abbrev=False)
    parser.add_argument("--weights", required=True, metavar="W",
                        help=f"a file, an https URL or a published name: {', '.join(deit.PUBLISHED)}; "
                        "or a teacher")
    parser.add_argument("--data", metavar="DIR",
                        help=f"a folder with val/, the val folder itself, or one of {', '.join(data.NAMED)}")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="pictures to name, in place of --data")
    parser.add_argument("--attention", metavar="PNG",
                        help="with --image: draw what the model's tokens attend to")
    parser.add_argument("--reference", metavar="DIR",
                        help="a complete ImageNet train/ or val/: tells which class is which when --data "
                        "has a part of the 1000 (ImageNet-100, Imagenette, ImageNet-A, ImageNet-R)")
    parser.add_argument("--teacher", metavar="T",
                        help="with --data: how often each head decides as this RegNet does (paper, table 4); "
                        "official, a torchvision RegNet's name, a file or a URL")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE,
                        help=f"images per process (default {BATCH_SIZE})")
    parser.add_argument("--image-size", type=int, help="evaluate at another size than the file's (pixels)")
    parser.add_argument("--crop-ratio", type=float, default=0.875,
                        help="share of the short side kept (default 0.875)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    parser.add_argument("--workers", type=int,
                        help="loader processes (default: usable CPUs / processes here)")
    args = parser.parse_args()
    if not args.data and not args.image:
        parser.error("give --data DIR to evaluate on, or --image FILE ... to look at")
    if args.data and args.image or args.attention and not args.image or args.teacher and not args.data:
        parser.error("--data evaluates, with --teacher against its decisions; --image names single pictures, "
                     "with --attention as a figure: one or the other")
    if (args.batch_size < 1 or args.image_size is not None and args.image_size < 1
            or (args.workers or 0) < 0 or not 0 < args.crop_ratio <= 1):
        parser.error("--batch-size and --image-size must be 1 or more, --crop-ratio above 0 and at most "
                     "1, --workers 0 or more")
    if args.attention and not os.path.isdir(os.path.dirname(args.attention) or "."):
        parser.error(f"--attention {args.attention}: there is no such folder")
    return args


def evaluate_folder(weights, loaded, data_name, split, place, *, columns, guide, crop_ratio, batch_size, workers):
    """Evaluates, against the decisions of the teacher `guide` if there is one, and prints what and how it
    went, on the first process. `columns` as match_classes gives them."""
    say = print if place.rank == 0 else lambda line: None
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    say(f"{weights}: {parameters:,} parameters, {loaded.num_classes} classes, image size {loaded.image_size}")
    say(f"{data_name}: {len(split.images):,} images{data.describe_ignored(split)}; short side to "
        f"{data.short_side(loaded.image_size, crop_ratio)}, bicubic, centre {loaded.image_size} x "
        f"{loaded.image_size}")
    if columns and len(columns) < loaded.num_classes:
        say(f"the data has {len(columns)} of the model's {loaded.num_classes} classes: matched by name, and "
            "the choice is among these only")
    elif columns:
        say("the data has the model's classes in another order: matched by name")
    for note in imagenet_notes(split, loaded) if loaded.num_classes == len(split.classes) == 1000 else []:
        say(f"note: {note}")
    loader = data.eval_loader(split.images, loaded.image_size, crop_ratio=crop_ratio, batch_size=batch_size,
                              workers=workers, rank=place.rank, world_size=place.world_size)
    opinions = decisions(guide.to(place.device), loader, place.device, columns) if guide else None
    scores = evaluate(loaded.model.to(place.device), loader, place.device, columns=columns,
                      opinions=opinions, progress=place.rank == 0)
    for head in scores if len(scores) > 1 or guide else ():
        agreement = f" agreement with the teacher {scores[head].agreement:.3f}" if guide else ""
        say(f"{head:<13} Acc@1 {scores[head].top1:.3f} Acc@5 {scores[head].top5:.3f} "
            f"loss {scores[head].loss:.3f}{agreement}")
    if line := verdict(weights, loaded.image_size, crop_ratio, scores["mean"]):
        say(line)
    say("* Acc@1 {0.top1:.3f} Acc@5 {0.top5:.3f} loss {0.loss:.3f}".format(scores["mean"]))


def main():
    args = parse_flags()
    with one_line_errors("evaluate.py", OSError, ValueError, data.BadImage):
        place = join_processes()
        with one_per_machine_first(place):                           # it may download the weights or the data
            loaded = load_any(args.weights, image_size=args.image_size, ema=args.ema)
            split = data.open_split(args.data, train=False) if args.data else None
            guide = (teacher.load_teacher(args.teacher, loaded.num_classes, loaded.classes)
                     if args.teacher else None)
        if args.data:
            workers = data.usable_cpus() // place.local_world_size if args.workers is None else args.workers
            evaluate_folder(args.weights, loaded, args.data, split, place, guide=guide, workers=workers,
                            columns=match_classes(split.classes, loaded, args.reference),
                            crop_ratio=args.crop_ratio, batch_size=args.batch_size)
        elif place.rank == 0:
            loaded.model.to(place.device)
            describe_pictures(loaded, args.image, place.device, args.crop_ratio, args.attention)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
