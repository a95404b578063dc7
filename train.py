"""The recipe of DeiT, and the loop that applies it.

Section 6 and table 9 of "Training data-efficient image transformers & distillation through
attention" (https://arxiv.org/abs/2012.12877). Top-1 on ImageNet after 300 epochs, in the
paper: tiny 72.2, small 79.8, base 81.8; with --distill 74.5, 81.2, 83.4. Its base took 53
hours on 8 V100.

    torchrun --nproc_per_node 4 train.py --model tiny --distill       ImageNet in ./imagenet
    python train.py --model tiny --distill       no data: the built-in demo, a few minutes

A run is one folder: last.pth (to resume), best.pth (to use), log.jsonl (an object per
epoch), recipe.json, labels/ (the teacher's, for later runs), TensorBoard events. The same
command with --resume goes on after the last whole epoch, on a CPU to the same bits.
"""
import argparse
import copy
import hashlib
import io
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import deit
import distill
import evaluate
import teacher

# --------------------------------------------------------------------------------------
# The recipe. Defaults are the paper's (table 9). The command line is made from this class:
# a field's type reads what is typed.


def flag(default, help, choices=None, alone=None):
    """A field. Typed without a value it means `alone`, if that is given."""
    nargs = "?" if alone else None
    return field(default=default, metadata={
        "help": f"{help} ({default})", "choices": choices, "nargs": nargs, "const": alone})


def switch(text):
    """A flag that takes no value: whatever is typed after it is a mistake."""
    raise ValueError


def positive_int(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def zero_or_more(text):
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def from_0_to_1(text):
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


@dataclass
class Recipe:
    # what is trained, on what
    model: str = flag("tiny", "tiny, small, base or a torchvision RegNet",
                      [*deit.SIZES, *teacher.REGNETS])
    data: str = flag("imagenet", "a folder with train/ and val/, demo or cifar10; "
                     "where there is no ./imagenet, demo")
    image_size: positive_int = flag(224, "pixels, a multiple of 16")
    init: str = flag(None, "weights to start from: a file, URL or name")

    # distillation: equations 2 and 3
    distill: str = flag(None, "learn from a teacher: hard or soft",
                        ["hard", "soft"], alone="hard")
    teacher: str = flag("official", "file, URL or name; official: RegNetY-16GF; a run's "
                        "folder: the labels it kept")
    any_teacher: switch = flag(False, "even one no better than chance", alone=True)
    alpha: from_0_to_1 = flag(0.5, "weight of the distillation term; of soft 0.1")
    temperature: zero_or_more = flag(3.0, "softens the logits in soft distillation; above 0")

    # optimization
    epochs: positive_int = flag(300, "an epoch is as many views as there are images")
    batch_size: positive_int = flag(1024, "images per step, of all processes and parts")
    accum_steps: positive_int = flag(1, "parts of a step that each process computes")
    optimizer: str = flag("adamw", "adamw, or sgd with Nesterov momentum 0.9",
                          ["adamw", "sgd"])
    lr: zero_or_more = flag(5e-4, "peak rate for a batch of 512; scales with the batch")
    min_lr: zero_or_more = flag(1e-5, "where the cosine ends; not scaled")
    warmup_lr: zero_or_more = flag(1e-6, "where the warm-up starts; not scaled either")
    warmup_epochs: zero_or_more = flag(5.0, "linear warm-up")
    weight_decay: zero_or_more = flag(0.05, "of tensors of 2 and more dimensions")
    clip_grad: zero_or_more = flag(0.0, "largest norm of the gradient; 0: any")
    ema: from_0_to_1 = flag(0.0, "decay of averaged weights (0.99996); 0: none")

    # regularization and augmentation
    drop_path: from_0_to_1 = flag(0.1, "stochastic depth, rate of the last block; below 1")
    label_smoothing: from_0_to_1 = flag(0.1, "share spread over all classes")
    repeats: positive_int = flag(3, "views of an image; 1: no repeated augmentation")
    rand_augment: zero_or_more = flag(9.0, "magnitude of RandAugment, up to 10; 0: off")
    erasing: from_0_to_1 = flag(0.25, "probability of erasing a rectangle of a view")
    mixup: zero_or_more = flag(0.8, "alpha of Beta(alpha, alpha); 0 turns it off")
    cutmix: zero_or_more = flag(1.0, "alpha of Beta(alpha, alpha); 0 turns it off")

    # how it is computed
    precision: str = flag(None, "None: bf16 if the GPU has it, else fp32",
                          ["bf16", "fp16", "fp32"])
    compile: switch = flag(False, "torch.compile the model and the teacher", alone=True)
    workers: int = flag(None, "loader processes; None: by the share of the CPUs")
    seed: int = flag(0, "everything random follows from it")


def learning_rate(recipe, epoch):
    """The rate at a fractional epoch: linear warm-up, then a cosine. As in timm, the cosine is
    counted from epoch 0 and not from the end of the warm-up. The official code uses each
    value one epoch late, and for a whole epoch."""
    peak = recipe.lr * recipe.batch_size / 512                       # linear scaling rule
    if epoch < recipe.warmup_epochs:
        start = min(recipe.warmup_lr, peak)
        return start + (peak - start) * epoch / recipe.warmup_epochs
    end = min(recipe.min_lr, peak)
    return end + (peak - end) * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2


def parameter_groups(model, weight_decay):
    """Two groups for the optimizer. Vectors, class token and positions do not decay. The
    distillation token does: as in the official code, where that is on purpose
    (facebookresearch/deit, issue 48)."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or name in ("cls_token", "pos_embed"):
            no_decay.append(parameter)
        else:
            decay.append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0},
            {"params": decay, "weight_decay": weight_decay}]


# --------------------------------------------------------------------------------------
# An epoch


def train_epoch(epoch, recipe, world, loader, models, ddp_model, teacher_model,
                teacher_labels, optimizer, scaler, progress):
    """All steps of an epoch. `ddp_model` is models["model"], compiled and wrapped in DDP if
    the run asks for it. In hard distillation the teacher fills `teacher_labels` (parts, views
    of a part) here; if `teacher_model` is None, an earlier run filled them."""
    steps = len(loader) // recipe.accum_steps
    num_classes = len(loader.dataset.images.classes)
    batches = iter(loader)
    ddp_model.train()

    for step in range(steps):
        # 1. the rate of this step
        lr = learning_rate(recipe, epoch + step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. forward and backward, in accum_steps parts
        for micro_step in range(recipe.accum_steps):
            pixels, labels = next(batches)
            pixels = pixels.to(world.device, non_blocking=True)
            labels = labels.to(world.device, non_blocking=True)

            # One seeding for all that is drawn from here on (erasing, mixing, drop-path).
            # It depends on the part's number within the step, so 1 process x 4 parts, 2 x 2
            # and 4 x 1 draw the same numbers.
            part = micro_step * world.size + world.rank
            torch.manual_seed(data.seed_from(recipe.seed, epoch, step, part))
            images = data.erase(data.normalize(pixels), recipe.erasing)
            images, targets = data.mix(
                images, labels, num_classes, repeats=recipe.repeats, mixup=recipe.mixup,
                cutmix=recipe.cutmix)

            # processes average their gradients in the last part only, as with no_sync()
            if world.size > 1:
                is_last = micro_step == recipe.accum_steps - 1
                ddp_model.require_backward_grad_sync = is_last

            # the teacher's output for exactly these images: computed now, or kept by an
            # earlier run
            teacher_output = None
            if teacher_model is not None:
                teacher_output = ask_teacher(teacher_model, images)
            if recipe.distill == "hard":
                row = step * recipe.accum_steps * world.size + part
                if teacher_model is not None:
                    teacher_labels[row] = teacher_output.argmax(dim=1)
                teacher_output = teacher_labels[row].long()

            losses = compute_losses(ddp_model, images, targets, teacher_output, recipe)
            scaler.scale(losses[0] / recipe.accum_steps).backward()
            progress.add(losses)

        # 3. the update
        if recipe.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(ddp_model.parameters(), recipe.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if recipe.ema:
            update_average(models["averaged_model"], models["model"], recipe.ema)

        progress.end_step(epoch, step, lr)


@torch.no_grad()
def ask_teacher(teacher_model, images):
    """Logits (B, K) of exactly the images that the student sees. On a GPU the teacher computes
    in float16: of 3,840 labels (on a CPU) none differed from float32's, in bfloat16 0.9 %
    did."""
    logits = teacher_model(images.half() if images.is_cuda else images)
    return logits.to(images.dtype)


def compute_losses(model, images, targets, teacher_output, recipe):
    """[loss], or with a teacher [loss, class term, distillation term]: equations 2 and 3.
    `teacher_output` is its labels (B,) or logits (B, K), or None. The losses are computed
    outside autocast in the images' float32, since CUDA's autocast would leave them in
    bfloat16."""
    with autocast(images, recipe):
        logits = model(images)
    if teacher_output is None:
        return [F.cross_entropy(logits.to(images.dtype), targets,
                                label_smoothing=recipe.label_smoothing)]

    class_logits, distillation_logits = [of_head.to(images.dtype) for of_head in logits]
    return distill.distillation_loss(
        class_logits, distillation_logits, targets, teacher_output, kind=recipe.distill,
        alpha=recipe.alpha, temperature=recipe.temperature,
        label_smoothing=recipe.label_smoothing)


def autocast(images, recipe):
    """Matrix products in the recipe's precision; weights and sums stay float32."""
    dtype = torch.float16 if recipe.precision == "fp16" else torch.bfloat16
    return torch.autocast(images.device.type, dtype, enabled=recipe.precision != "fp32")


@torch.no_grad()
def update_average(ema_model, model, decay):
    """ema <- decay ema + (1 - decay) model, in one pass. Integer buffers (batch norm's
    counters) are not averaged. torch's AveragedModel waits for the device in each step."""
    def floats(module):
        return [tensor for tensor in (*module.parameters(), *module.buffers())
                if tensor.is_floating_point()]

    torch._foreach_lerp_(floats(ema_model), floats(model), 1 - decay)


# --------------------------------------------------------------------------------------
# Progress

LOOK_SECONDS = 3                     # between two looks at the device


class Progress:
    """Sums the losses on the device. Every few seconds each process reads its own sums, the
    only time that it waits for the device: it shows them and stops if they are not finite."""

    def __init__(self, folder, recipe, world, steps, epochs_done):
        self.accum_steps = recipe.accum_steps
        self.steps = steps
        # in float64, so it does not matter when they are read
        terms = 3 if recipe.distill else 1
        self.sums = torch.zeros(terms, dtype=torch.float64, device=world.device)
        self.looked = time.monotonic()

        self.bar = tqdm(total=recipe.epochs * steps, initial=epochs_done * steps,
                        unit=" images", unit_scale=recipe.batch_size,
                        disable=world.rank > 0, mininterval=LOOK_SECONDS)
        self.writer = None
        if world.rank == 0:
            self.writer = SummaryWriter(folder, purge_step=epochs_done * steps + 1)

    def add(self, losses):
        self.sums += torch.stack(losses).detach()

    def end_step(self, epoch, step, lr):
        """Every few seconds, reads and shows the sums. Raises FloatingPointError for a loss
        that is not finite."""
        self.bar.update()
        if time.monotonic() - self.looked < LOOK_SECONDS and step + 1 < self.steps:
            return
        self.looked = time.monotonic()
        loss = self.sums[0].item() / (step + 1) / self.accum_steps
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} by step {step} of epoch {epoch}, of which nothing is "
                "saved. Try a lower --lr, or --precision fp32")

        self.bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}, lr {lr:.2e}",
                                 refresh=False)
        self.show({"running_loss": loss, "lr": lr}, epoch * self.steps + step + 1)

    def end_epoch(self, world):
        """{name: mean of the epoch over all processes}; resets the sums."""
        parts = self.steps * self.accum_steps * world.size
        means = evaluate.all_reduce(self.sums) / parts
        self.sums.zero_()
        # without a teacher there is one sum, and so only the first name
        return dict(zip(("train_loss", "train_class_loss", "train_distillation_loss"),
                        means.tolist()))

    def show(self, values, step):
        """In TensorBoard, of the first process."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)


# --------------------------------------------------------------------------------------
# The run


def train(recipe, checkpoint, world, folder):
    """Trains to the recipe's last epoch, from the start or from a last.pth. Returns the log,
    a dict for each epoch. Raises OSError, ValueError or FloatingPointError."""
    log = checkpoint["log"] if checkpoint else []

    # data
    part_size, rest = divmod(recipe.batch_size, world.size * recipe.accum_steps)
    if rest:
        raise ValueError(f"--batch-size {recipe.batch_size} must be a multiple of the "
                         "processes x --accum-steps")
    with evaluate.local_rank_zero_first(world):              # which may download
        images, val_images = data.open_dataset(recipe.data)
    files = data.fingerprint(images)
    evaluate.compare_processes(
        world, ("epochs done, precision, hashes of train/ and val/:", len(log),
                recipe.precision, files, data.fingerprint(val_images)))

    sampler = data.RepeatedAugSampler(
        len(images), world.rank, world.size, batch_size=part_size,
        accum_steps=recipe.accum_steps, repeats=recipe.repeats, seed=recipe.seed)
    loader = data.train_loader(images, sampler, recipe.image_size,
                               rand_augment=recipe.rand_augment, workers=recipe.workers)
    val_loader = data.eval_loader(val_images, recipe.image_size, workers=recipe.workers,
                                  rank=world.rank, world_size=world.size)

    # model
    with evaluate.local_rank_zero_first(world):
        model = build_model(recipe, images.classes, checkpoint)
    models = {"model": model.to(world.device)}
    if recipe.ema:
        models["averaged_model"] = copy.deepcopy(model).requires_grad_(False)
    ddp_model = torch.compile(model) if recipe.compile else model
    if world.size > 1:
        ddp_model = DDP(ddp_model, gradient_as_bucket_view=True)
        prepare_buckets(ddp_model, part_size, recipe, world)

    # teacher: a network to ask, or the labels that an earlier run kept
    teacher_model, teacher_score = None, None
    reads_labels = recipe.distill == "hard" and Path(recipe.teacher).is_dir()
    if recipe.distill and not reads_labels:
        teacher_model, teacher_score = load_and_score_teacher(
            recipe, images.classes, val_loader, world)
    made_with = what_decides(recipe, loader, files, world.device)
    if reads_labels:
        check_kept_labels(recipe.teacher, made_with, recipe.epochs)
    elif recipe.distill == "hard" and log:
        check_kept_labels(folder, made_with, len(log))       # its own so far

    # optimizer
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")

    # what a checkpoint holds, and a resumed run loads
    facts = {"recipe": asdict(recipe), "classes": images.classes, "files": files, **made_with}
    stateful = models | {"optimizer": optimizer, "scaler": scaler}
    if checkpoint:
        if log:
            require_same(checkpoint, {"classes": images.classes, **made_with},
                         "the run to resume has")
        for name, each in stateful.items():
            each.load_state_dict(checkpoint[name])
    elif world.rank == 0:
        # mode "x" fails if another run has begun in the folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "recipe.json", "x") as file:
            json.dump(facts["recipe"], file, indent=4)
    if world.rank == 0:
        print(f"{recipe}\n{world.size} process(es) x {recipe.accum_steps} part(s) x {part_size} "
              "views a step")
        if teacher_score:
            print(f"the teacher's top-1 in validation: {teacher_score.top1:.2f} %")
        if reads_labels:
            print(f"labels kept by {recipe.teacher}, {recipe.epochs} epochs")

        # an unreadable image may have been removed
        if checkpoint and checkpoint["files"] != files:
            print("train/ has changed since the run began: it goes on with what is there")
    progress = Progress(folder, recipe, world, sampler.steps, len(log))
    if not checkpoint:
        # what cannot be read or written is met before an epoch is spent on it
        validate(models, val_loader, teacher_score, world)
        save(folder, models, stateful, facts, log, world)

    # the epochs
    torch.backends.cudnn.benchmark = True                    # all parts have one shape
    for epoch in range(len(log), recipe.epochs):
        sampler.set_epoch(epoch)
        shape = sampler.parts * world.size, part_size
        teacher_labels = torch.zeros(shape, dtype=torch.int32)
        if reads_labels:
            teacher_labels = teacher.read_labels(recipe.teacher, epoch, shape,
                                                 len(images.classes))
        teacher_labels = teacher_labels.to(world.device)
        train_epoch(epoch, recipe, world, loader, models, ddp_model, teacher_model,
                    teacher_labels, optimizer, scaler, progress)

        record = {"epoch": epoch, **progress.end_epoch(world),
                  **validate(models, val_loader, teacher_score, world)}
        log.append(record)
        if recipe.distill == "hard" and not reads_labels:
            keep_labels(folder, epoch, teacher_labels, made_with, world)
        save(folder, models, stateful, facts, log, world)
        progress.show(record, (epoch + 1) * sampler.steps)
        if world.rank == 0:
            progress.writer.flush()
            progress.bar.write(f"epoch {epoch}: top-1 {record['top1']:.2f}")
    return log


def load_and_score_teacher(recipe, classes, val_loader, world):
    """(the frozen teacher, its validation Score). Raises OSError, or ValueError if it could
    be guessing."""
    with evaluate.local_rank_zero_first(world):
        model = teacher.load_teacher(recipe.teacher, classes=classes,
                                     image_size=recipe.image_size)
    score = evaluate.evaluate(model.to(world.device), val_loader, world.device)["mean"]

    # A fresh classifier, or one of other classes, would teach noise for days. Of a few
    # images chance may reach 100 %: a teacher that is always right passes.
    chance = evaluate.chance_level(score, len(classes))
    if score.top1 <= min(chance, 99) and not recipe.any_teacher:
        raise ValueError(f"the teacher's top-1 of {score.top1:.2f} % could be chance, which "
                         f"is up to {chance:.2f} %. Are its classes in another order, or its "
                         "images of another size? --any-teacher goes on")
    if world.device.type == "cuda":
        model.half()
    if recipe.compile:
        model = torch.compile(model)
    return model, score


def what_decides(recipe, loader, files, device):
    """{name: value} of what must be the same when a run goes on: the size of a part; with
    hard distillation what decides the views, their mixes and so the teacher's labels (up to
    the rounding of --compile). Raises OSError or ValueError."""
    images = loader.dataset.images
    sampler = copy.copy(loader.sampler)
    same = {"part_size": sampler.batch_size}
    if recipe.distill != "hard":
        return same
    if len(images.classes) > 65_535:
        raise ValueError(f"{len(images.classes)} classes are too many for hard distillation, "
                         "whose labels are kept in two bytes: use --distill soft")

    # the bytes of the epoch's first part tell an edited data.py, or resized images
    sampler.rank = 0
    pixels, _ = loader.dataset[next(iter(sampler))]

    names = ("image_size", "seed", "batch_size", "repeats", "rand_augment", "erasing", "mixup",
             "cutmix")

    return {
        **{name: getattr(recipe, name) for name in names},
        **same,
        "files": files,
        "views": sampler.steps * recipe.batch_size,
        "num_classes": len(images.classes),
        # what computed them
        "device": device.type,
        "teacher": teacher.identity(recipe.teacher),
        "torch": torch.version.__version__,
        "torchvision": torchvision.__version__,
        "Pillow": PIL.__version__,
        "pixels_of_first_part": hashlib.sha256(pixels.numpy()).hexdigest(),
    }


def check_kept_labels(run, made_with, epochs):
    """Raises OSError or ValueError unless the folder of a run has labels for this many epochs,
    all made with these values."""
    theirs = teacher.read_made_with(run)
    require_same(theirs, made_with, f"the labels of {run} were made with")
    kept = sum(teacher.label_file(run, epoch).is_file() for epoch in range(epochs))
    if kept < epochs:
        raise ValueError(f"{run} keeps the labels of {kept} of {epochs} epochs: type --epochs "
                         f"{kept}, or resume it first")


def require_same(theirs, mine, what):
    """Raises ValueError naming the first value that differs."""
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{what} {name} {theirs.get(name)}, and this run has {value}. The flags, the "
                "files in --data, the teacher, the versions, the kind of device and processes x "
                "--accum-steps have to agree")


def validate(models, val_loader, teacher_score, world):
    """The log's scores: top1, top5, loss and agreement with the teacher for each head, with
    the prefix ema_ for the averaged weights. Raises FloatingPointError."""
    record = {}
    for key, model in models.items():
        # batch norm's statistics are the first rank's
        for buffer in model.buffers():
            if world.size > 1:
                dist.broadcast(buffer, 0)

        for head, score in evaluate.evaluate(model, val_loader, world.device).items():
            name = "" if head == "mean" else f"{head}_"
            if key == "averaged_model":
                name = f"ema_{name}"
            record |= {f"{name}top1": score.top1, f"{name}top5": score.top5,
                       f"{name}loss": score.loss}
            if teacher_score:
                record[f"{name}agreement"] = evaluate.agreement(score, teacher_score)
    if not math.isfinite(sum(record.values())):
        raise FloatingPointError("the validation loss is not finite; of this epoch nothing "
                                 "is saved. Try a lower --lr")
    return record


def prepare_buckets(ddp_model, part_size, recipe, world):
    """An idle forward and backward in evaluation mode. DDP rebuilds its buckets after its
    first backward, and three or more processes then add in another order: without this, a
    resumed run would differ in the last bits from one never interrupted."""
    size = recipe.image_size
    images = torch.zeros(part_size, 3, size, size, device=world.device)
    with autocast(images, recipe):
        logits = ddp_model.eval()(images)        # of two heads the mean: both take part
    logits.sum().backward()
    ddp_model.zero_grad()


def build_model(recipe, classes, checkpoint):
    """The model with fresh weights or those of --init, which a resumed run does not need.
    Raises OSError or ValueError."""
    torch.manual_seed(recipe.seed)
    settings = {"distilled": bool(recipe.distill), "image_size": recipe.image_size,
                "drop_path": recipe.drop_path}
    if recipe.init is not None and checkpoint is None:
        loaded = teacher.load_any(recipe.init, classes=classes, **settings)
        if loaded.size != recipe.model:
            raise ValueError(f"--init is a {loaded.size} model: use --model "
                             f"{loaded.size}")
        return loaded.model
    if recipe.model in deit.SIZES:
        return deit.create_model(recipe.model, num_classes=len(classes), **settings)
    return teacher.create_regnet(recipe.model, len(classes))


# --------------------------------------------------------------------------------------
# What a run writes and reads


def save(folder, models, stateful, facts, log, world):
    """Writes best.pth after the best epoch, log.jsonl, and last.pth, which completes the
    epoch, at the end."""
    if world.rank > 0:
        return
    states = {name: each.state_dict() for name, each in stateful.items()}
    if log and max(log, key=lambda record: record["top1"]) is log[-1]:
        weights = {name: states[name] for name in models}
        write_whole(folder / "best.pth", to_bytes({**weights, **facts, "record": log[-1]}))
    lines = [json.dumps(record) + "\n" for record in log]
    write_whole(folder / "log.jsonl", "".join(lines).encode())
    write_whole(folder / "last.pth", to_bytes({**states, **facts, "log": log}))


def to_bytes(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getbuffer()


def write_whole(path, content):
    """Writes a file whole or not at all: beside it, flushed to the disk, then renamed."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def keep_labels(folder, epoch, teacher_labels, made_with, world):
    """Writes the teacher's labels of an epoch, two bytes a view."""
    # each process has filled the rows of its own parts; the others are 0
    evaluate.all_reduce(teacher_labels)
    if world.rank == 0:
        buffer = io.BytesIO()
        np.save(buffer, teacher_labels.cpu().numpy().astype(np.uint16))
        path = teacher.label_file(folder, epoch)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, buffer.getbuffer())
        content = json.dumps({"epochs": epoch + 1, **made_with}, indent=4)
        write_whole(path.with_name("made-with.json"), content.encode())


# Flags that may differ in a resumed run. In hard distillation the teacher's weights are still
# compared, in soft distillation they are not.
FREE = ("data", "teacher", "any_teacher", "workers", "accum_steps", "compile")


def find_run(folder, recipe, typed, resume):
    """(recipe, last.pth or None) of the run in the folder, or of a new one. A resumed run
    keeps its recipe; of one that was stopped before its first save, recipe.json is removed.
    Raises ValueError if the run must not go on, or not with what was typed."""
    if not resume and any(folder.glob("*")):
        raise ValueError(f"{folder} is not empty: --resume goes on with the run in it, "
                         "another --output starts a new one")
    if not (folder / "last.pth").exists():
        if (folder / "best.pth").exists():
            raise ValueError("there is a best.pth, but no last.pth to resume from: choose "
                             "another --output")
        (folder / "recipe.json").unlink(missing_ok=True)
        return recipe, None

    checkpoint = deit.read_checkpoint(folder / "last.pth")
    saved = checkpoint["recipe"]
    for name, value in typed.items():
        if name not in FREE and value != saved[name]:
            raise ValueError(f"{option(name)} {value} contradicts the run in {folder}, "
                             f"which has {saved[name]}: leave it out, or choose another "
                             "--output")
        saved[name] = value
    return Recipe(**saved), checkpoint


# --------------------------------------------------------------------------------------
# Presets and flags

# Other purposes than ImageNet from scratch. lr is for a batch of 512 here as well.
#
# Other published recipes, as flags, with their published top-1. We have not run them.
# Tiny and small without distillation, 74.5 and 80.7 % (mmpretrain):
#   --warmup-epochs 20 --clip-grad 5 --repeats 1 --drop-path 0
# CIFAR-10, CIFAR-100, Stanford Cars, 99.1, 90.8, 92.1 % (facebookresearch/deit, issue 45):
#   --model base --init base --optimizer sgd --lr 0.0067 --weight-decay 1e-4
#   --batch-size 768 --epochs 1000 --erasing 0 --drop-path 0
# iNaturalist 2018 and 2019, 73.2 and 77.7 % (facebookresearch/deit, issue 105):
#   --model base --init base --lr 5e-5 --batch-size 768 --epochs 360 --erasing 0.1
PRESETS = {
    # official command for base, 82.89 % published: lr 5e-6 at 512, no path dropped, EMA on;
    # with --model base --init base
    "finetune-384": {"image_size": 384, "epochs": 30, "batch_size": 512, "lr": 5e-6,
                     "min_lr": 5e-6, "weight_decay": 1e-8, "drop_path": 0.0, "ema": 0.99996},
    # ours: a teacher from scratch, or from ImageNet's with --init official --lr 0.02
    "convnet": {"optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-5, "batch_size": 256,
                "epochs": 100, "repeats": 1, "rand_augment": 0.0, "erasing": 0.0, "mixup": 0.0,
                "cutmix": 0.0},
    # ours: --init with a few thousand images of your own
    "transfer": {"lr": 5e-5, "min_lr": 1e-6, "batch_size": 256, "epochs": 100,
                 "erasing": 0.0},
}
# The built-in demo: minutes on two CPU cores, and the teacher that it trains for itself.
DEMO = {"image_size": 48, "epochs": 5, "batch_size": 64, "lr": 0.004,
        "warmup_epochs": 0.5}
DEMO_TEACHER = {**PRESETS["convnet"], "model": "regnet_y_400mf", "data": "demo",
                "epochs": 3, "warmup_epochs": 0.3}


def option(name):
    return "--" + name.replace("_", "-")


def parse_flags():
    """(output, resume, fields of the recipe that were typed or are the preset's)"""
    parser = evaluate.Parser(description="Trains a DeiT, or a RegNet to teach one.")
    parser.add_argument("--output", help="the run's folder (runs/MODEL-DATA)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in it")
    parser.add_argument("--recipe", choices=PRESETS, help="values for other purposes")
    for item in fields(Recipe):
        parser.add_argument(option(item.name), type=item.type, default=argparse.SUPPRESS,
                            metavar=item.name.upper(), **item.metadata)
    typed = vars(parser.parse_args())
    preset = PRESETS.get(typed.pop("recipe"), {})
    return typed.pop("output"), typed.pop("resume"), preset | typed


def make_recipe(typed):
    """The paper's values, changed by the demo's and by what was typed."""
    values = {"data": "imagenet" if Path("imagenet").is_dir() else "demo"} | typed
    if typed.get("distill") == "soft":
        values = {"alpha": 0.1} | values
    if values["data"] == "demo":
        values = DEMO | values
    return Recipe(**values)


def choose_precision(recipe):
    """The recipe with a precision: bfloat16 if the GPU has it."""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(recipe, precision=recipe.precision or ("bf16" if has_bf16 else "fp32"))


def train_demo_teacher(recipe, world, folder):
    """The recipe with a teacher of its own for the demo, trained or resumed on the spot."""
    if not recipe.distill or recipe.data != "demo" or recipe.teacher != "official":
        return recipe
    same = {name: getattr(recipe, name) for name in ("image_size", "batch_size", "seed", "workers")}
    fresh = choose_precision(make_recipe(DEMO_TEACHER | same))
    train(*find_run(folder, fresh, same, resume=True), world, folder)
    return replace(recipe, teacher=str(folder / "best.pth"))


def main():
    with evaluate.one_line_errors("train.py"):
        output, resume, typed = parse_flags()
        world = evaluate.init_processes()
        recipe = choose_precision(make_recipe(typed))
        name = recipe.model + ("-distilled" if recipe.distill else "")
        folder = Path(output or f"runs/{name}-{Path(recipe.data).absolute().name}")
        recipe, checkpoint = find_run(folder, recipe, typed, resume)
        if "teacher" in typed and not recipe.distill:
            raise ValueError("--teacher does nothing without --distill")
        if recipe.distill and recipe.model in teacher.REGNETS:
            raise ValueError("--distill is for a DeiT: a RegNet has no distillation token")

        if world.rank == 0 and recipe.data == "demo" and "data" not in typed:
            print("NO --data AND NO ./imagenet HERE: training on the built-in demo")
        try:
            recipe = train_demo_teacher(recipe, world, folder / "teacher")
            log = train(recipe, checkpoint, world, folder)

        except KeyboardInterrupt:
            raise SystemExit("train.py: stopped. --resume goes on after the last epoch in "
                             "log.jsonl")
        if world.rank == 0:
            best = max(record["top1"] for record in log)
            print(f"best top-1: {best:.2f} %, of {folder}/best.pth")
            if teacher.label_file(folder, recipe.epochs - 1).is_file():
                print("The next student can read this run's labels: repeat your flags with "
                      f"another --model, --output and --teacher {folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
