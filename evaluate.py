"""Exact evaluation: top-1, top-5 and loss of any checkpoint, on any number of processes.

    python evaluate.py --weights deit.pth --data imagenet/val
    python evaluate.py --weights tiny-distilled --data imagenet           74.476 / 91.920, as published
    torchrun --nproc_per_node 4 evaluate.py --weights deit.pth --data imagenet/val --teacher official
    python evaluate.py --weights tiny --image a.jpg --attention map.png   likeliest classes; where it looks

Architecture, heads, image size and classes are read from the file. The protocol is that of the published
numbers: short side to int(S / 0.875) pixels, bicubic, centre S x S, for distilled models the mean of the
heads' logits, float32. Every image is counted once. Shapes: B images, K classes.
"""
import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import signal
import sys
import time
from collections import namedtuple
from datetime import timedelta

if __name__ == "__main__":                                   # from here on Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

import data
import deit
import teacher

TIMEOUT = timedelta(minutes=30)                              # how long a process waits for the others


class Score(namedtuple("Score", "images correct1 correct5 loss_sum agreed decisions")):
    """Sums over the images of all processes, whole numbers but for the loss; `agreed` are decisions that are
    the teacher's, too. `decisions` (N,) are those on this process's images only, in order."""
    # accuracies and agreement in %; the loss is a mean over images (officially over batches)
    top1 = property(lambda self: 100 * self.correct1 / self.images)
    top5 = property(lambda self: 100 * self.correct5 / self.images)
    agreement = property(lambda self: 100 * self.agreed / self.images)
    loss = property(lambda self: self.loss_sum / self.images)


def judge(logits, labels):
    """Rows (4, B) of logits (B, K): decision, is it right, is one of the first five, loss; in float64."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices                     # (B, 5), best first
    hits = top == labels[:, None]
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return torch.stack([row.double() for row in (top[:, 0], hits[:, 0], hits.any(dim=1), losses)])


def predict(model, images):
    """{head: logits (B, K)}: class, distillation and mean for a distilled DeiT, mean alone for others."""
    if not getattr(model, "distilled", False):
        return {"mean": model(images)}
    one, other = model.forward_heads(images)
    return {"class": one, "distillation": other, "mean": (one + other) / 2}


@torch.no_grad()
def evaluate(model, loader, device, *, columns=None, teacher_score=None, progress=False):
    """{head: Score} over the images of all processes; `mean` is the model's own output. `columns` gives the
    model's class for each of the data's, if these are fewer or in another order: it chooses among them. In
    training as in this script: batches filled up to one size, nothing compiled, cuDNN without timing."""
    was_training, benchmark = model.training, torch.backends.cudnn.benchmark
    model.eval()
    torch.backends.cudnn.benchmark = False
    names = ("class", "distillation", "mean") if getattr(model, "distilled", False) else ("mean",)
    rows = {name: [torch.zeros(4, 0, dtype=torch.float64, device=device)] for name in names}
    for pixels, labels in tqdm(loader, desc="evaluate", unit="batch", disable=not progress, leave=False):
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (pixels, labels))
        images = F.pad(data.normalize(images), (0, 0, 0, 0, 0, 0, 0, loader.batch_size - len(images)))
        with torch.compiler.set_stance("force_eager"):
            heads = predict(model, images)
        for name, logits in heads.items():
            logits = logits[: len(labels)] if columns is None else logits[: len(labels), columns]
            rows[name].append(judge(logits, labels))
    model.train(was_training)
    torch.backends.cudnn.benchmark = benchmark
    scores = {}
    for name, parts in rows.items():
        decisions, *counted = torch.cat(parts, dim=1)                             # four of (N,)
        agreed = decisions == teacher_score.decisions if teacher_score else decisions * math.nan
        sums = torch.stack([row.double().sum() for row in (torch.ones_like(decisions), *counted, agreed)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        scores[name] = Score(*sums.tolist(), decisions)
    return scores


def agreement_table(scores):
    """Lines of table 4 (there: fractions that differ): in %, how often labels and each two Scores agree."""
    votes = torch.stack([score.decisions for score in scores.values()])           # (V, N)
    alike = (votes[:, None] == votes).sum(dim=2)                                  # (V, V)
    if dist.is_initialized():
        dist.all_reduce(alike)
    lines = ["".join(f"{name:>14}" for name in ("agreement, %", "labels", *scores))]
    for (name, score), row in zip(scores.items(), alike.tolist()):
        shares = score.top1, *(100 * count / score.images for count in row)
        lines.append(f"{name:>14}" + "".join(f"{share:14.3f}" for share in shares))
    return lines


# ---- Weights and classes --------------------------------------------------------------------------


def load_any(source, *, image_size=None, ema=False):
    """A DeiT or a RegNet from a path, an https URL or a name, in evaluation mode, with its image_size,
    num_classes and, if the file has them, the names of its classes. Raises OSError or ValueError."""
    checkpoint = deit.read_checkpoint(teacher.weights_url(source) or source)
    if teacher.find_regnet(checkpoint):
        model = teacher.load_regnet(source, ema=ema, checkpoint=checkpoint)
        with deit.naming(source):
            model.image_size = image_size or int(checkpoint.get("recipe", {"image_size": 224})["image_size"])
    else:
        model = deit.load_model(source, image_size=image_size, ema=ema, checkpoint=checkpoint)
    classes = checkpoint.get("classes")
    model.classes = classes if [type(name) for name in classes or ()] == [str] * model.num_classes else None
    return model


def class_indices(folders, model, reference=None):
    """The model's class for each class folder; None if they are the same, in order. Names decide, the
    checkpoint's or `reference`'s; then numbers (ImageNet-V2's); then the order. Raises ValueError."""
    known = model.classes or (data.class_folders(reference) if reference else None)
    if known and len(known) != model.num_classes:
        raise ValueError(f"--reference {reference} has {len(known)} class folders and the model "
                         f"{model.num_classes} classes: give a complete train/ or val/")
    if known and set(folders) <= set(known):
        return None if folders == known else list(map(dict(zip(known, range(len(known)))).get, folders))
    if all(map(str.isdecimal, folders)) and sorted(map(int, folders)) == list(range(model.num_classes)):
        return list(map(int, folders))
    if known:
        strange = [name for name in folders if name not in known]
        raise ValueError(f"the weights are for other classes: {len(strange)} of {len(folders)} folder(s) are "
                         f"unknown, such as {strange[0]!r}; the model knows {known[0]!r}, {known[-1]!r}, ...")
    if len(folders) != model.num_classes:
        raise ValueError(f"the model knows {model.num_classes} classes and the data has {len(folders)} "
                         f"({folders[0]}, ...): for part of ImageNet add --reference DIR, a complete val/")
    return None


def evaluate_folder(model, teachers, loader, device, say):
    """Evaluates and says how it went: agreement, a line per head, and the model's own output last."""
    scores, *theirs = (evaluate(each, loader, device, columns=each.columns, progress=say is print)
                       for each in (model, *teachers))
    voters = {f"teacher {number}": score["mean"] for number, score in enumerate(theirs, 1)}
    voters |= scores if len(scores) > 1 else {"model": scores["mean"]}
    for name, score in voters.items():
        if not math.isfinite(score.loss):
            raise FloatingPointError(f"the output ({name}) is not finite: are the weights damaged?")
    if teachers:
        say("\n".join(agreement_table(voters)))
    for name, score in scores.items() if len(scores) > 1 else ():
        say(f"{name:<13} Acc@1 {score.top1:.3f} Acc@5 {score.top5:.3f} loss {score.loss:.3f}")
    say("* Acc@1 {0.top1:.3f} Acc@5 {0.top5:.3f} loss {0.loss:.3f}".format(scores["mean"]))


# ---- Single pictures ------------------------------------------------------------------------------


def class_names(model):
    """Names to show: ImageNet's from torchvision, else the checkpoint's, else numbers."""
    if model.num_classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in model.classes or ()):
        return ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return model.classes or [f"class {label}" for label in range(model.num_classes)]


def attention_columns(model, images):
    """{title: (pictures, captions)}: where the tokens of normalised images (B, 3, S, S) attend to, mean over
    heads, in the last block, and through all by rollout (Abnar and Zuidema, 2020: half of an output is its
    input). Grey turns yellow from the least attended patch to the most; captions are these two's shares."""
    maps = model.attention_maps(images).mean(dim=2)                               # (B, depth, N, N)
    rollout = identity = torch.eye(maps.shape[-1], device=images.device)
    for attention in maps.unbind(dim=1):
        rollout = (attention + identity) / 2 @ rollout
    grey, yellow = data.denormalize(images).mean(dim=1, keepdim=True), torch.tensor([1.0, 0.85, 0.0])
    columns = {"picture": (images, None)}
    for position, token in enumerate(("class", "distillation")[: len(model.tokens)]):
        for name, attention in (("last block", maps[:, -1]), ("rollout", rollout)):
            patches = attention[:, position, len(model.tokens):]                  # (B, patches)
            least, most = patches.aminmax(dim=1, keepdim=True)
            weight = 0.8 * (patches - least) / (most - least).clamp(min=1e-12)
            weight = weight.unflatten(1, (1, -1, images.shape[-1] // deit.PATCH_SIZE))
            weight = F.interpolate(weight, size=images.shape[-2:], mode="bilinear")        # (B, 1, S, S)
            pictures = data.normalize(255 * ((1 - weight) * grey + weight * yellow.to(images).view(3, 1, 1)))
            columns[f"{token}, {name}"] = pictures, [f"{p.min():.2%} to {p.max():.2%}" for p in patches]
    return columns


@torch.no_grad()
def describe_pictures(model, paths, device, crop_ratio, attention=None):
    """Prints the five likeliest classes of each picture; draws the figure if `attention` is a path for it."""
    transform, names = data.eval_transform(model.image_size, crop_ratio=crop_ratio), class_names(model)
    images, rows = torch.stack([transform(data.read_rgb(path)) for path in paths]), []
    images = data.normalize(images.to(device))
    for path, probabilities in zip(paths, predict(model, images)["mean"].softmax(dim=1)):
        values, labels = probabilities.topk(min(5, len(names)))
        shown = [f"{100 * value:6.2f} %  {names[label]}" for value, label in zip(values, labels)]
        print(path, *shown, sep="\n  ")
        rows.append(f"{os.path.basename(path)}\n{shown[0].strip()}")
    if attention:
        data.draw_grid(attention_columns(model, images), rows).save(attention, format="PNG")
        print(f"{attention}: what the tokens attend to, with the shares of the greyest and yellowest patch")


# ---- Processes, mistakes, command line ------------------------------------------------------------


# Where this process stands among all processes, and (local_) among those of its machine.
World = namedtuple("World", "device rank world_size local_rank local_world_size")


def init_processes():
    """The World of this process, which joins torchrun's process group if there is one. Raises ValueError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    numbers = [os.environ[name] for name in names if name in os.environ] or ["0", "1", "0", "1"]
    if len(numbers) < 4 or not all(map(str.isdecimal, numbers)) or int(numbers[0]) >= int(numbers[1]):
        raise ValueError(f"{', '.join(names)} are {', '.join(numbers)}: unset them, or start with torchrun, "
                         "which sets all four")
    rank, world_size, local_rank, local_world_size = map(int, numbers)
    sys.stdout.reconfigure(errors="backslashreplace")        # file names may have undecodable bytes
    torch.backends.cudnn.allow_tf32 = False                  # float32 is to mean float32 in convolutions too
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and local_world_size > gpus:
        raise ValueError(f"{local_world_size} processes, {gpus} GPUs on the machine: --nproc_per_node {gpus}")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    torch.cuda.set_device(local_rank if gpus else -1)        # -1 does nothing
    if "TORCHELASTIC_RUN_ID" in os.environ:                  # if torchrun is killed, this one saves and ends
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)           # PR_SET_PDEATHSIG
    if "RANK" in os.environ:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun's store keeps the addresses of processes of earlier attempts (pytorch issue 135712)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=TIMEOUT)
    return World(device, rank, world_size, local_rank, local_world_size)


@contextlib.contextmanager
def local_rank_zero_first(world):
    """Lets the first process of each machine through before the others: it downloads, they find the file."""
    if world.world_size > 1 and world.local_rank > 0:
        dist.barrier()
    yield
    if world.world_size > 1 and world.local_rank == 0:
        dist.barrier()


@contextlib.contextmanager
def one_line_errors(program, *kinds):
    """An exception of these kinds, or of a lost process, becomes one line and exit status 1, no traceback.
    The first process of each machine prints it, and torchrun's summary shows the first of all."""
    try:
        yield
    except Exception as error:
        lost = re.search(r"DataLoader worker \(pid.*|Connection \w+ by peer|out of memory|can't allocate",
                         str(error)) if isinstance(error, (RuntimeError, ConnectionError)) else None
        if not (isinstance(error, kinds) or lost):
            raise
        *_, line = str(error).strip().split("\n")            # a loader's worker puts its traceback before
        message = re.sub(r"^(data\.)?\w+(Error|Image): ", "", line)
        if lost:                                             # a process, or memory
            message = f"{lost[0]} (memory short? smaller --batch-size, more --accum-steps, fewer --workers)"
        if not isinstance(error, (OSError, ValueError, RuntimeError, ArithmeticError)):
            message = f"{type(error).__name__}: {message}"
        data.kill_workers()
        if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):      # torchrun's
            with contextlib.suppress(OSError), open(error_file, "w") as file:
                json.dump({"message": f"{program}: {message}", "timestamp": int(time.time())}, file)
        sys.exit(1 if error_file and os.environ.get("LOCAL_RANK", "0") != "0" else f"{program}: {message}")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n"
                  if os.environ.get("LOCAL_RANK", "0") == "0" else None)


def parse_flags():
    parser = OneLineParser(description="Accuracy of a checkpoint or classes of pictures.", allow_abbrev=False)
    add = parser.add_argument
    add("--weights", required=True, metavar="W", help=f"file, URL, {', '.join(deit.PUBLISHED)} or a teacher")
    add("--data", metavar="DIR", help=f"a folder with val/, val/ itself, or {', '.join(data.NAMED)}")
    add("--image", nargs="+", metavar="FILE", help="pictures to name, in place of --data")
    add("--attention", metavar="PNG", help="with --image: draw what the model's tokens attend to")
    add("--reference", metavar="DIR", help="a whole ImageNet train/ or val/, to name the classes of a part")
    add("--teacher", nargs="+", default=[], metavar="T", help="models to compare decisions with (table 4)")
    add("--batch-size", type=int, default=64, help="per process (default 64)")
    add("--image-size", type=int, help="evaluate at another size than the file's (pixels)")
    add("--crop-ratio", type=float, default=0.875, help="share that is kept (default 0.875)")
    add("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    add("--workers", type=int, help="loader processes (default by its share of CPUs)")
    args = parser.parse_args()
    limits = {"batch_size": (1, 2**16), "image_size": (1, 4096), "crop_ratio": (0.1, 1), "workers": (0, 256)}
    for name, (low, high) in limits.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            parser.error(f"--{name} {value}: it must be from {low:g} to {high:g}".replace("_", "-"))
    if "" in (*vars(args).values(), *(args.image or ()), *args.teacher):
        parser.error("the value of a flag is empty (an unset variable?): give it, or leave the flag out")
    if bool(args.data) == bool(args.image):
        parser.error("give --data DIR to evaluate on, or --image FILE ... to look at: one of them")
    if args.attention and not args.image or (args.teacher or args.reference) and not args.data:
        parser.error("--teacher and --reference go with --data, --attention with --image")
    return args


def main():
    args = parse_flags()
    with one_line_errors("evaluate.py", Exception):
        world = init_processes()
        say, device = print if world.rank == 0 else lambda line: None, world.device
        with local_rank_zero_first(world):                   # it may download the weights or the data
            model = load_any(args.weights, image_size=args.image_size, ema=args.ema).to(device)
            images = data.open_split(args.data, train=False) if args.data else None
            teachers = [teacher.freeze(load_any(source, image_size=model.image_size)).to(device)
                        for source in args.teacher]
        if args.attention and not isinstance(model, deit.DeiT):
            raise ValueError("--attention needs a DeiT: a convnet has no attention to show")
        if args.data:
            size = model.image_size                          # for the teachers, too
            for source, each in zip((args.weights, *args.teacher), (model, *teachers)):
                with deit.naming(source):
                    each.columns = class_indices(images.classes, each, args.reference)
                parameters = sum(parameter.numel() for parameter in each.parameters())
                say(f"{source}: {parameters:,} parameters, {each.num_classes} classes, image size {size}")
            say(f"{args.data}: {len(images):,} images{data.describe_ignored(images)}; short side to "
                f"{data.short_side(size, args.crop_ratio)}, bicubic, centre {size} x {size}")
            if model.columns:
                say(f"classes: {len(model.columns)} of {model.num_classes}, matched by name")
            elif not model.classes:
                say(f"classes in the folders' order: {images.classes[0]} is 0, {images.classes[-1]} the last")
            for name, row in deit.PUBLISHED.items():
                if args.weights == name or os.path.basename(args.weights) == row.file:
                    say(f"published: Acc@1 {row.top1:.3f} Acc@5 {row.top5:.3f}, {row.image_size} pixels")
            loader = data.eval_loader(images, size, crop_ratio=args.crop_ratio, batch_size=args.batch_size,
                                      workers=args.workers, rank=world.rank, world_size=world.world_size)
    with one_line_errors("evaluate.py", OSError, data.BadImage, FloatingPointError):
        if args.data:
            evaluate_folder(model, teachers, loader, device, say)
        elif world.rank == 0:
            describe_pictures(model, args.image, device, args.crop_ratio, args.attention)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))   # from here on in order: workers run
    main()
