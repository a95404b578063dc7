"""The recipe of DeiT, and the loop that applies it.

Section 6 and table 9 of "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877). Published results of this recipe on ImageNet (top-1, 300 epochs):
tiny 72.2, small 79.8, base 81.8; with --distill 74.5, 81.2, 83.4.

    torchrun --nproc_per_node 4 train.py --model tiny --distill --data imagenet    four GPUs
    python train.py --model tiny --distill                   no data: the built-in demo
    python train.py --model regnet_y_16gf --data DIR         a teacher for your own classes
    python train.py --model base --init base --recipe finetune-384        another recipe, with its source
    python train.py --resume --output runs/NAME              goes on with an interrupted run

A run is one folder: last.pth (to resume), best.pth (to use), log.jsonl (an object per epoch),
TensorBoard events. The batch size is that of all processes together: any number of them sees the same
images at the same rate.
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import deit
import distill
import teacher
from evaluate import (BATCH_SIZE, OneLineParser, decisions, evaluate, join_processes, one_line_errors,
                      one_per_machine_first)

LOG_EVERY = 20                                                           # steps between two looks at the loss
CHECKPOINT_MINUTES = 30                                              # between two checkpoints within an epoch


# ---------------------------------------------------------------------------------------------------
# The recipe. Defaults are the paper's (table 9); the command line is made from this class.


def flag(default, help, low=-math.inf, high=math.inf):
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class Recipe:
    model: str = flag("tiny", "tiny, small, base, or a torchvision RegNet (to make a teacher)")
    distill: str = flag(None, "learn from a teacher as well; hard (equation 3) or soft (equation 2)")
    data: str = flag(None, f"folder with train/ and val/, or {', '.join(data.NAMED)}; default ./imagenet, else demo")
    teacher: str = flag("official", "the paper's RegNetY-16GF, a torchvision RegNet's name, a file or a URL")
    any_teacher: bool = flag(False, "accept a teacher no better than chance on the validation images")
    init: str = flag(None, "weights to start from: a file, a URL or a name, such as base or official (RegNets)")
    recipe: str = flag(None, "another set of values than the paper's for ImageNet; typed flags win over it")
    image_size: int = flag(224, "pixels, a multiple of 16", 1)
    epochs: int = flag(300, "an epoch is as many views as there are images (1000 in the paper's long runs)", 1)
    batch_size: int = flag(1024, "images per optimiser step, over all processes", 1)
    accum_steps: int = flag(1, "parts in which each process computes its share of a batch", 1)
    optimizer: str = flag("adamw", "adamw, or sgd with Nesterov momentum 0.9")
    lr: float = flag(5e-4, "peak learning rate for a batch of 512; scaled by batch / 512", 0)
    min_lr: float = flag(1e-5, "where the cosine ends; not scaled, as in the official code", 0)
    warmup_lr: float = flag(1e-6, "where the warm-up starts; not scaled", 0)
    warmup_epochs: float = flag(5.0, "linear warm-up", 0)
    weight_decay: float = flag(0.05, "the optimiser's; not for biases, norms, class token and positions", 0)
    clip_grad: float = flag(0.0, "largest norm of the gradient; 0 (as in the paper) leaves it as it is", 0)
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising from 0 in the first", 0, 0.99)
    label_smoothing: float = flag(0.1, "share of each target spread over all classes", 0, 1)
    resize: str = flag("torch", "what resizes training crops: torch is faster, pillow gives timm's pixels")
    rand_augment: float = flag(9.0, "magnitude 0 to 10, mean of Normal(m, 0.5); 0 turns RandAugment off", 0, 10)
    erasing: float = flag(0.25, "probability of erasing a rectangle of a view", 0, 1)
    repeats: int = flag(3, "views of each drawn image in an epoch; 1 turns repeated augmentation off", 1)
    mixup: float = flag(0.8, "alpha of Beta(alpha, alpha); 0 turns it off", 0)
    cutmix: float = flag(1.0, "alpha of Beta(alpha, alpha); 0 turns it off", 0)
    mix_group: int = flag(
        None, "images that share one lambda, at most; default as the official runs: 64 base, 256 others", 2)
    alpha: float = flag(None, "weight of the distillation term; default the paper's: 0.5 hard, 0.1 soft", 0, 1)
    temperature: float = flag(3.0, "softens both models' logits in soft distillation", 1e-3)
    ema: float = flag(0.0, "decay per step of averaged weights, such as 0.99996; 0 keeps none (the paper's "
                           "default)", 0, 1 - 1e-9)
    precision: str = flag("auto", "bf16, fp16 or fp32; auto is bf16 on GPUs that have it, else fp32")
    compile: bool = flag(False, "torch.compile the model and the teacher")
    workers: int = flag(None, "loader processes per process; default usable CPUs / processes here", 0)
    seed: int = flag(0, "everything random follows from it", 0, 2**63 - 1)
    output: str = flag(None, "the run's folder; default runs/<model>-<data> or runs/<model>-distilled-<data>")
    resume: bool = flag(False, "go on with the run in --output")


class Preset(NamedTuple):
    """Values for another purpose than ImageNet from scratch, and who says so."""
    values: dict
    source: str


CROPS_AND_FLIPS = {"repeats": 1, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "rand_augment": 0.0}

# Rates are for a batch of 512 here: the sources' where they say "before scaling", else converted.
PRESETS = {
    "finetune-384": Preset(
        {"image_size": 384, "epochs": 30, "batch_size": 512, "lr": 5e-6, "min_lr": 5e-6, "weight_decay": 1e-8,
         "drop_path": 0.0, "ema": 0.99996},
        "official command for base, 82.89 %, where no path is dropped; with --distill it is our choice"),
    "mmpretrain-small": Preset(
        {"warmup_epochs": 20.0, "clip_grad": 5.0, "repeats": 1, "drop_path": 0.0},
        "mmpretrain's plain models: tiny 74.50 %, small 80.69 %"),
    "cifar-cars": Preset(
        {"optimizer": "sgd", "lr": 0.01 * 512 / 768, "weight_decay": 1e-4, "batch_size": 768, "epochs": 1000,
         "erasing": 0.0, "drop_path": 0.0},
        "facebookresearch/deit, issues 45 and 175 (0.01 taken as the rate at 768): CIFAR and Cars"),
    "inaturalist": Preset(
        {"lr": 7.5e-5 * 512 / 768, "batch_size": 768, "epochs": 360, "erasing": 0.1},
        "facebookresearch/deit, issues 105 and 141, for base"),
    "transfer": Preset(
        {"lr": 5e-5, "min_lr": 1e-6, "batch_size": 256, "epochs": 100, "erasing": 0.0},
        "ours, not from the paper: Flowers, Pets or a few thousand images of your own, with --init"),
    "convnet": Preset(
        CROPS_AND_FLIPS | {"optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-5, "batch_size": 256, "epochs": 100},
        "ours, not from the paper: a teacher from scratch, --model regnet_y_16gf"),
    "convnet-transfer": Preset(
        CROPS_AND_FLIPS | {"optimizer": "sgd", "lr": 0.02, "weight_decay": 5e-5, "batch_size": 256, "epochs": 30},
        "ours, not from the paper: a teacher that starts from --init official"),
}

# What the built-in demo changes: 48 pixels and minutes instead of 224 and days. The rest is the paper's.
DEMO = {"data": "demo", "image_size": 48, "epochs": 10, "batch_size": 32, "lr": 1e-3 * 512 / 32,
        "warmup_epochs": 0.5}
# And for the demo's teacher, a small convnet that learns the patterns in four epochs, without
# the heavy augmentation.
DEMO_TEACHER = {"model": "regnet_y_400mf", "epochs": 4, "batch_size": 16, "lr": 1e-3 * 512 / 16,
                "warmup_epochs": 0.3, "label_smoothing": 0.0} | CROPS_AND_FLIPS


def option(name):
    return f"--{name.replace('_', '-')}"


def listing(values):
    return ", ".join(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in values.items())


CHOICES = {"distill": ("hard", "soft"), "precision": ("auto", "bf16", "fp16", "fp32"),
           "optimizer": ("adamw", "sgd"), "resize": ("torch", "pillow"), "recipe": tuple(PRESETS)}


def parse_recipe():
    """The flags that were typed, as a dict."""
    presets = "\n".join(f"  {name}: {preset.source}\n      {listing(preset.values)}"
                        for name, preset in PRESETS.items())
    parser = OneLineParser(description="Trains a DeiT, or a RegNet to teach one.", allow_abbrev=False,
                           epilog=f"recipes (rates at a batch of 512):\n{presets}",
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           argument_default=argparse.SUPPRESS)
    for item in fields(Recipe):
        how = ({"action": "store_true"} if item.type is bool else
               {"choices": CHOICES[item.name]} if item.name in CHOICES else
               {"type": item.type, "metavar": item.type.__name__.upper()})
        if item.name == "distill":                                   # alone it means hard
            how |= {"nargs": "?", "const": "hard"}
        shown = "" if item.default is None or item.default is False else f" (default {item.default})"
        parser.add_argument(option(item.name), help=item.metadata["help"] + shown, **how)
    return vars(parser.parse_args())


def make_recipe(typed):
    """The paper's values, changed by the demo's where that is the data, by the preset's, by what was
    typed. Raises ValueError for values that make no sense, before anything is read."""
    preset = PRESETS[typed["recipe"]].values if typed.get("recipe") else {}
    choice = {"data": "imagenet" if Path("imagenet").is_dir() else "demo"} | preset | typed
    if choice["data"] == "demo":
        choice = DEMO | choice
    recipe = Recipe(**choice)
    is_deit = recipe.model in deit.SIZES
    if not is_deit and recipe.model not in teacher.REGNETS:
        raise ValueError(f"unknown model {recipe.model!r}: --model {', '.join(deit.SIZES)}, or a RegNet "
                         "such as regnet_y_16gf to make a teacher")
    if recipe.distill and not is_deit:
        raise ValueError(f"--distill trains a DeiT, not {recipe.model}: leave it out to make a teacher")
    if recipe.recipe and recipe.recipe.startswith("convnet") == is_deit:
        raise ValueError(f"--recipe {recipe.recipe} is for {'a RegNet' if is_deit else 'a DeiT'}, "
                         f"not {recipe.model}")
    needs = {} if recipe.distill else dict.fromkeys(("teacher", "any_teacher", "alpha"), "--distill")
    needs |= {} if recipe.distill == "soft" else {"temperature": "--distill soft"}
    needs |= {} if is_deit else {"drop_path": "a DeiT"}
    for name, need in needs.items():
        if name in typed and not recipe.resume:
            raise ValueError(f"{option(name)} {typed[name]} would do nothing without {need}: add that, or "
                             "leave it out")
    for item in fields(Recipe):
        value, (low, high) = getattr(recipe, item.name), (item.metadata["low"], item.metadata["high"])
        if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
            bounds = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more, and finite"
            raise ValueError(f"{option(item.name)} {value}: it must be {bounds}")
    if is_deit and recipe.image_size % deit.PATCH_SIZE:
        deit.create_model(recipe.model, image_size=recipe.image_size)   # raises, with the size to use instead
    recipe.alpha = recipe.alpha if recipe.alpha is not None else 0.1 if recipe.distill == "soft" else 0.5
    recipe.mix_group = recipe.mix_group or (64 if recipe.model == "base" else 256)
    return recipe


def learning_rate(recipe, epoch):
    """The rate at a fractional epoch: linear warm-up, then a cosine counted from epoch 0 (not from the end
    of the warm-up), as timm has it. The official code uses each value one epoch late, and a constant
    within each epoch."""
    peak = recipe.lr * recipe.batch_size / 512
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr + (peak - recipe.warmup_lr) * epoch / recipe.warmup_epochs
    return recipe.min_lr + (peak - recipe.min_lr) * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2


def parameter_groups(model, weight_decay):
    """Two groups for the optimiser. Vectors, class token and positions do not decay; the distillation
    token does, as in the official code, where that is on purpose (facebookresearch/deit, issue 48)."""
    groups = {0.0: [], weight_decay: []}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or name in ("cls_token", "pos_embed")
        groups[0.0 if spared else weight_decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


# ---------------------------------------------------------------------------------------------------
# The loop


class Student(NamedTuple):
    """What is trained: the model, the same model joined over processes, its average or None,
    and what moves it."""
    model: nn.Module
    joined: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


class Run(NamedTuple):
    """A run ready to go: what learns, from whom, on what."""
    recipe: Recipe
    student: Student
    teacher: nn.Module
    train_split: data.Split
    val_split: data.Split
    sampler: data.RepeatedAugSampler
    loader: torch.utils.data.DataLoader
    val_loader: torch.utils.data.DataLoader
    workers: int


def train_epoch(run, place, epoch, progress):
    """One epoch, or what the sampler left of it. Yields the number of steps done whenever it
    is time to save."""
    recipe, student, sampler = run.recipe, run.student, run.sampler
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)            # fp32: None
    # iter() draws from torch's generator: before the first step seeds it
    batches = data.to_device(iter(run.loader), place.device)
    student.joined.train()
    for step in range(sampler.first_step, sampler.steps):
        lr = learning_rate(recipe, epoch + step / sampler.steps)
        for group in student.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(data.seed_from(recipe.seed, epoch * sampler.steps + step, place.rank))
        for part in range(recipe.accum_steps):
            pixels, labels, indices, boxes = progress.wait_for(batches)
            images = data.erase(data.normalize(pixels), boxes)
            images, targets = data.mix(images, labels, indices, len(run.train_split.classes),
                                       mixup=recipe.mixup, cutmix=recipe.cutmix, group=recipe.mix_group)
            progress.see_images(images)
            with gradients_joined(student, part == recipe.accum_steps - 1):
                with torch.autocast(place.device.type, dtype, enabled=dtype is not None):
                    teacher_logits = ask(run.teacher, images)
                    terms = objective(student.joined(images), targets, teacher_logits, recipe)
                student.scaler.scale(terms[0] / recipe.accum_steps).backward()
            progress.add(terms)
        student.scaler.unscale_(student.optimizer)
        norm = progress.see_gradient(student.model)
        if recipe.clip_grad:
            nn.utils.clip_grads_with_norm_(student.model.parameters(), recipe.clip_grad, norm)
        student.scaler.step(student.optimizer)
        student.scaler.update()
        student.optimizer.zero_grad()
        if student.average:
            student.average.update_parameters(student.model)
        if progress.report(epoch, step, lr, student.scaler):
            yield step + 1


def ask(teacher_model, images):
    with torch.no_grad():
        return teacher_model(images) if teacher_model else None


def objective(outputs, targets, teacher_logits, recipe):
    """(loss,) without a teacher; (loss, class term, distillation term) with one."""
    if teacher_logits is None:
        return (F.cross_entropy(outputs, targets, label_smoothing=recipe.label_smoothing),)
    return distill.distillation_loss(*outputs, targets, teacher_logits, kind=recipe.distill,
                                     alpha=recipe.alpha, temperature=recipe.temperature,
                                     label_smoothing=recipe.label_smoothing)


def gradients_joined(student, last):
    """Gradients are averaged over the processes in the last part of a step only."""
    return contextlib.nullcontext() if last or student.joined is student.model else student.joined.no_sync()


def run_epochs(run, place, folder, state):
    """Trains, validates and saves, from where `state` is to the end."""
    recipe, student, sampler = run.recipe, run.student, run.sampler
    progress = Progress(place, recipe, folder, sampler.steps, state)

    def save_run(step):
        if not math.isfinite(nn.utils.get_total_norm(student.model.parameters())):
            progress.end_diverged(f"a weight is not finite after step {step}")
        state.update(step=step, epoch_sums=progress.epoch_sums.tolist())
        if place.rank == 0:
            save_last(run, state, folder)
            progress.saved = time.monotonic()
        if progress.stopping:
            leave(progress, folder)

    if not state["step"]:
        save_run(0)                                              # from now on the folder holds a run
    opinions = None                                              # the teacher's, asked for once
    for epoch in range(len(state["log"]), recipe.epochs):        # the log has a record per validated epoch
        start = epoch * sampler.steps
        sampler.set_epoch(epoch, first_step=state["step"] - start)
        for step in train_epoch(run, place, epoch, progress):
            save_run(start + step)
        save_run(start + sampler.steps)                          # validation takes time in which much can happen
        if run.teacher and opinions is None:
            opinions = decisions(run.teacher, run.val_loader, place.device)
        terms = {f"train_{name}": total / sampler.steps
                 for name, total in zip(progress.terms, progress.epoch_sums.tolist())}
        # nothing in it depends on the machine's speed, so equal runs have equal logs
        record = {"epoch": epoch, "step": start + sampler.steps,
                  "lr": learning_rate(recipe, epoch + (sampler.steps - 1) / sampler.steps)}
        record |= terms | validate(student, run.val_loader, place, opinions)
        progress.end_epoch(record)
        state["log"].append(record)
        if place.rank == 0:
            if record["top1"] > state["best"]:
                save(weights_of(run) | {"record": record}, folder / "best.pth")
            save_log(state["log"], folder)
        state["best"] = max(state["best"], record["top1"])
        save_run(start + sampler.steps)
    progress.close()


# ---------------------------------------------------------------------------------------------------
# Watching it


class Progress:
    """Sums the loss terms on the device, and now and then brings them to the host.

    Now and then is every LOG_EVERY steps on a GPU, where looking at a number makes the host wait, and
    every step on a CPU. In the same exchange the ranks agree whether to stop (any got a signal) or to save
    (the first finds it is time).
    """

    def __init__(self, place, recipe, folder, steps, state):
        self.place, self.recipe, self.folder, self.steps = place, recipe, folder, steps
        self.every = 1 if place.device.type == "cpu" else LOG_EVERY
        self.terms = ("loss", "class_loss", "distillation_loss") if recipe.distill else ("loss",)
        self.sums, self.norm = (torch.zeros(len(self.terms), device=place.device),
                                torch.zeros((), device=place.device))
        self.epoch_sums = torch.tensor(state["epoch_sums"] or [0.0] * len(self.terms), dtype=torch.float64)
        self.signal, self.stopping = 0, False
        self.saved = self.since = time.monotonic()
        self.waited, self.steps_since = 0.0, 0
        self.display = Display(recipe, folder, steps, state["step"]) if place.rank == 0 else None
        self.handlers = {number: signal.signal(number, self.on_signal)
                         for number in (signal.SIGTERM, signal.SIGINT)}

    def on_signal(self, number, frame):
        self.signal = number

    def wait_for(self, batches):
        asked = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - asked
        return batch

    def see_images(self, images):
        if self.display and not self.display.shown:
            self.display.first_batch(images)

    def add(self, terms):
        self.sums += torch.stack(terms).detach() / self.recipe.accum_steps

    def see_gradient(self, model):
        """The gradient's norm; keeps the largest since the last report, and nan wins."""
        norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()
                                        if parameter.grad is not None])
        self.norm = torch.maximum(self.norm, norm)
        return norm

    def report(self, epoch, step, lr, scaler):
        """True if it is time to save. Ends the run, on all ranks, if a loss or gradient of
        any is not finite."""
        self.steps_since += 1
        if (step + 1) % self.every and step + 1 < self.steps:
            return False
        due = self.place.rank == 0 and time.monotonic() - self.saved > 60 * CHECKPOINT_MINUTES
        own = torch.cat((self.sums, self.norm[None], self.sums.new_tensor([self.signal > 0, due])))
        ranks = [own.clone() for _ in range(self.place.world_size)]
        if self.place.world_size > 1:
            dist.all_gather(ranks, own)
        table = torch.stack(ranks).double().cpu()                                 # (ranks, terms + 3)
        sums, (norm, stop, due) = table[:, :-3].mean(dim=0), table[:, -3:].amax(dim=0).tolist()
        self.check_finite(epoch, step, lr, table[:, 0].tolist(), norm, scaler)
        self.epoch_sums += sums
        if self.display:
            count, seconds = self.steps_since, time.monotonic() - self.since
            means = dict(zip(self.terms, (sums / count).tolist()))
            self.display.steps(epoch, step + 1, count, means | {
                "lr": lr, "gradient_norm": norm, "data_wait_share": self.waited / seconds,
                "images_per_second": self.recipe.batch_size * count / seconds})
        self.sums.zero_()
        self.norm.zero_()
        self.since, self.waited, self.steps_since = time.monotonic(), 0.0, 0
        self.stopping = stop > 0
        # the end of an epoch is saved in any case
        return (self.stopping or due > 0) and step + 1 < self.steps

    def check_finite(self, epoch, step, lr, losses, norm, scaler):
        """Ends the run if the loss of any rank, or the gradient, is not finite."""
        lost = [(rank, loss) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        # under fp16 a step with an overflow is skipped and the loss scale halved: as it should, down to 1
        if not lost and (math.isfinite(norm) or scaler.is_enabled() and scaler.get_scale() >= 1):
            return
        what = "rank {}: the loss became {}".format(*lost[0]) if lost else "the gradient is not finite"
        scale = f", loss scale {scaler.get_scale():g}" if scaler.is_enabled() else ""
        self.end_diverged(f"{what} between steps {step + 1 - self.steps_since} and {step} of epoch {epoch} "
                          f"(learning rate {lr:.3g}, gradient norm {norm:.3g}{scale})")

    def end_diverged(self, what):
        """Ends the run on all ranks together, and the first says why."""
        if self.display:
            self.display.bar.close()
            print(f"train.py: {what}; {self.folder / 'last.pth'} is from before it. Try a lower --lr, or "
                  "--precision fp32", file=sys.stderr, flush=True)
        if self.place.world_size > 1:
            dist.barrier()
        sys.exit(1)

    def end_epoch(self, record):
        if self.display:
            self.display.epoch(record)
        self.epoch_sums.zero_()
        self.since = time.monotonic()

    def close(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.display:
            self.display.close()


class Display:
    """What the first rank shows: the bar and TensorBoard."""

    def __init__(self, recipe, folder, steps, step):
        self.epoch_steps, self.folder, self.shown = steps, folder, False
        self.bar = tqdm(initial=step, total=recipe.epochs * steps, unit="step", smoothing=0.05,
                        mininterval=0.1 if sys.stderr.isatty() else 30)  # a log file gets a line now and then
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, method, *arguments):
        """Calls a method of TensorBoard's writer; if that fails, the run goes on without it."""
        try:
            if self.writer:
                getattr(self.writer, method)(*arguments)
        except OSError as error:
            self.writer = None
            self.bar.write(f"note     no more TensorBoard events in {self.folder}: {error}")

    def chart(self, group, values, step):
        for name, value in values.items():
            self.write("add_scalar", f"{group}/{name}", value, step)

    def first_batch(self, images):
        """A contact sheet of the run's first batch, as the model sees it."""
        mean, std = data.mean_and_std(images.device)
        sheet = torchvision.utils.make_grid((images[:64] * std + mean).clamp(0, 1).cpu(), nrow=8)
        self.write("add_image", "first batch", sheet, self.bar.n)
        self.shown = True

    def steps(self, epoch, step, count, values):
        self.chart("train", values, epoch * self.epoch_steps + step)
        self.bar.set_description_str(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str("loss {loss:.3f}, lr {lr:.2e}, {images_per_second:.0f} images/s, waiting for "
                                 "data {data_wait_share:.0%}".format(**values), refresh=False)
        self.bar.update(count)

    def epoch(self, record):
        self.chart("epoch", {name: value for name, value in record.items()
                             if name not in ("epoch", "step", "lr")}, record["step"])
        also = [f"{head} {record[f'{head}_top1']:.2f}" for head in ("class", "distillation", "ema")
                if f"{head}_top1" in record]
        also += [f"agreement with the teacher {record['agreement']:.2f}"] if "agreement" in record else []
        self.bar.write("epoch {epoch:>3}  loss {train_loss:.4f}  top-1 {top1:.2f}  top-5 {top5:.2f}".format(**record)
                       + (f"  ({', '.join(also)})" if also else ""))

    def close(self):
        self.bar.close()
        self.write("close")


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def write_whole(path, write):
    """Writes a file whole or not at all: `write` fills one beside it, which is flushed to the disk and
    then renamed. Raises OSError that names the file."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                       # torch reports a full disk as RuntimeError
        beside.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "the disk is full, or a limit reached"
        raise OSError(f"cannot write {path} ({reason}): make room, then go on with --resume") from None


def save(content, path):
    """Writes a checkpoint: plain values and tensors only."""
    write_whole(path, lambda file: torch.save(content, file))


def weights_of(run):
    """What evaluate.py and --init need: both checkpoints of a run hold it."""
    average = run.student.average.module.state_dict() if run.student.average else None
    return {"model": run.student.model.state_dict(), "model_ema": average, "classes": run.train_split.classes,
            "recipe": asdict(run.recipe)}


def save_last(run, state, folder):
    optimizer, scaler = run.student.optimizer.state_dict(), run.student.scaler.state_dict()
    save(weights_of(run) | {"optimizer": optimizer, "scaler": scaler, "state": state, "launch": launch()},
         folder / "last.pth")


def launch():
    """The same for all attempts of one torchrun: its run id, or without one the process that it is."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else str(os.getppid())


def save_log(records, folder):
    """Writes the whole log anew: after a resume it holds each epoch once."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_whole(folder / "log.jsonl", lambda file: file.write(text.encode()))


def restore(student, checkpoint, folder):
    """Puts the weights, the average and the optimiser back as they were saved. Raises ValueError if they
    are not this run's."""
    try:
        student.model.load_state_dict(checkpoint["model"])
        if student.average:
            student.average.module.load_state_dict(checkpoint["model_ema"])
        student.optimizer.load_state_dict(checkpoint["optimizer"])
        student.scaler.load_state_dict(checkpoint["scaler"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{folder / 'last.pth'} does not fit this run: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------------------
# A run


def build_model(recipe, classes):
    """The model with fresh weights, or those of --init. Raises ValueError where these are of another kind."""
    torch.manual_seed(recipe.seed)
    if recipe.model in deit.SIZES:
        shape = {"distilled": bool(recipe.distill), "image_size": recipe.image_size,
                 "num_classes": len(classes), "drop_path": recipe.drop_path}
        if not recipe.init:
            return deit.create_model(recipe.model, **shape)
        model = deit.load_model(recipe.init, classes=classes, **shape)
        found = next(size for size, (dim, _) in deit.SIZES.items() if dim == model.pos_embed.shape[2])
    else:
        if not recipe.init:
            return teacher.create_regnet(recipe.model, len(classes))
        model = teacher.load_regnet(recipe.init, num_classes=len(classes), classes=classes)
        found = teacher.name_of(model.fc.in_features)
    if found != recipe.model:
        raise ValueError(f"--init {recipe.init} is a {found} model: --model {found}")
    return model


def build_student(model, recipe, place):
    """Everything that is trained, on its device, the same on every rank."""
    model, average, joined = model.to(place.device), None, model
    if recipe.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
        average.n_averaged.fill_(1)                                      # it starts from the initial weights
    groups = parameter_groups(model, recipe.weight_decay)
    optimizer = (torch.optim.AdamW(groups, lr=0.0, fused=True) if recipe.optimizer == "adamw" else
                 torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=True))
    scaler = torch.amp.GradScaler(place.device.type, enabled=recipe.precision == "fp16")
    if recipe.compile:
        model.compile()
    if place.world_size > 1:
        devices = [place.device] if place.device.type == "cuda" else None
        joined = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return Student(model, joined, average, optimizer, scaler)


def choose_precision(precision, place):
    """Turns auto into a precision that the device has. Raises ValueError for one that it has not."""
    on_gpu = place.device.type == "cuda"
    if precision == "auto":
        return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "fp16" and not on_gpu:
        raise ValueError("--precision fp16 needs a GPU: use fp32 or bf16 here")
    return precision


def split_batch(recipe, place):
    """Images that a process computes at a time. Raises ValueError if the batch does not divide."""
    parts = place.world_size * recipe.accum_steps
    if recipe.batch_size % parts:
        raise ValueError(f"--batch-size {recipe.batch_size} does not divide by "
                         f"{place.world_size} process(es) x {recipe.accum_steps} part(s): "
                         f"try {max(1, round(recipe.batch_size / parts)) * parts}")
    if recipe.model in teacher.REGNETS and recipe.batch_size < 2 * parts:
        raise ValueError(f"--batch-size {recipe.batch_size} in {parts} part(s): batch norm needs 2 images or "
                         f"more in each, --batch-size {2 * parts}")
    return recipe.batch_size // parts


def check_teacher(score, num_classes, source, image_size):
    """Raises ValueError if the score could be chance's: less than three standard deviations above it."""
    chance = 1 / num_classes
    expected = score.images * chance + 3 * math.sqrt(score.images * chance * (1 - chance))
    if score.correct1 <= expected and score.correct1 < score.images:
        raise ValueError(f"teacher {source} gets {score.correct1} of {score.images} validation images "
                         f"right at {image_size} pixels, which could be chance: its classes are others, or "
                         "in another order, or it was trained at another size, or not enough; --any-teacher "
                         "to go on")


def check_room(run, folder):
    """Raises OSError if the folder cannot be written to, or has no room for the run's two checkpoints."""
    (folder / "last.pth.tmp").touch()
    (folder / "last.pth.tmp").unlink()
    weights = sum(tensor.nbytes for tensor in run.student.model.state_dict().values())
    # last.pth with its moments and its successor beside it, and best.pth
    needed = weights * (10 if run.student.average else 7) - sum(
        path.stat().st_size for path in folder.glob("*.pth"))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has room for {free / 2**20:,.0f} MiB and the run needs "
                      f"{needed / 2**20:,.0f} MiB: make room, or --output elsewhere")


def notes(recipe):
    """Where a full training leaves what is known to work: published evidence, one line each."""
    lines = []
    if recipe.model == "base" and not recipe.init and not recipe.recipe and recipe.data != "demo":
        if recipe.batch_size != 1024:
            lines.append(f"a total batch of {recipe.batch_size}: on ImageNet users got 78.8 % with 512 and "
                         "78.57 % with 480, where 1024 gives 81.8 % (facebookresearch/deit, issues 40 "
                         "and 63)")
        if recipe.warmup_epochs != 5:
            lines.append(f"{recipe.warmup_epochs:g} warm-up epochs: on ImageNet a user got 79.2 % with 10, "
                         "where 5 give 81.8 % (facebookresearch/deit, issues 40 and 63)")
    if recipe.recipe not in (None, "mmpretrain-small", "convnet") and not recipe.init:
        lines.append(f"--recipe {recipe.recipe} is meant to go with --init")
    if recipe.warmup_epochs > recipe.epochs:
        lines.append(f"the warm-up of {recipe.warmup_epochs:g} epochs is longer than the run: the rate "
                     "never reaches its peak")
    if recipe.min_lr > recipe.lr * recipe.batch_size / 512:
        lines.append(f"the learning rate ends at --min-lr {recipe.min_lr:g}, above its peak: --min-lr "
                     f"{recipe.lr * recipe.batch_size / 512:.3g} or less keeps it below")
    return lines


def banner(run, place, folder, teacher_score, remarks):
    """What is about to happen, in a few lines to check before leaving it alone."""
    recipe, sampler, preset = run.recipe, run.sampler, PRESETS.get(run.recipe.recipe)
    numbers = {name for name, value in asdict(Recipe()).items() if type(value) in (int, float)}
    changed = {name: value for name, value in asdict(recipe).items() if value != getattr(Recipe, name)
               and name in numbers - {"seed", "accum_steps"} | {"optimizer"}}
    parameters = sum(parameter.numel() for parameter in run.student.model.parameters())
    where = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "CPU"
    lines = {
        "run": folder,
        "data": f"{recipe.data}: {len(run.train_split.images):,} training and "
                f"{len(run.val_split.images):,} validation images, {len(run.train_split.classes):,} classes"
                f"{data.describe_ignored(run.train_split, run.val_split)}",
        "recipe": preset and f"{recipe.recipe}: {preset.source}",
        "changed": changed and f"in place of the paper's values: {listing(changed)}",
        "epoch": f"{sampler.distinct_images:,} distinct images, {recipe.repeats} view(s) of each; "
                 f"{sampler.steps:,} steps, {recipe.epochs * sampler.steps:,} in {recipe.epochs} epochs",
        "batch": f"{recipe.batch_size:,} = {place.world_size} process(es) x {recipe.accum_steps} part(s) x "
                 f"{sampler.batch_size}",
        "rate": f"{recipe.lr * recipe.batch_size / 512:.4g} at the peak (--lr {recipe.lr:.4g} x "
                f"{recipe.batch_size} / 512), {recipe.warmup_epochs:g} epoch(s) of warm-up",
        "model": f"{recipe.model}{', distilled' if recipe.distill else ''}, {recipe.image_size} pixels, "
                 f"{parameters:,} parameters",
        "teacher": teacher_score and (
            f"{recipe.teacher}: {teacher_score.top1:.2f} % top-1 on {teacher_score.images} "
            f"validation images; {recipe.distill} distillation, alpha {recipe.alpha:g}"),
        "device": f"{where}, {recipe.precision}{', compiled' if recipe.compile else ''}, "
                  f"{run.workers} worker(s) per process, torch {torch.__version__}, "
                  f"torchvision {torchvision.__version__}",
    }
    lines = [f"{name:<9}{line}" for name, line in lines.items() if line]
    return "\n".join(lines + [f"note     {line}" for line in remarks])


def validate(student, loader, place, opinions):
    """What log.jsonl says of the raw weights, and with ema_ before it of the averaged ones: top1, top5 and
    loss of each head, and with `opinions`, the teacher's decisions, how often it agrees."""
    record = {}
    for prefix, model in {"": student.model, "ema_": student.average and student.average.module}.items():
        if model is None:
            continue
        for buffer in model.buffers() if dist.is_initialized() else ():
            dist.broadcast(buffer, 0)                                # batch statistics are the first rank's
        for head, score in evaluate(model, loader, place.device, opinions=opinions).items():
            head = "" if head == "mean" else f"{head}_"
            for name in ("top1", "top5", "loss") + (() if opinions is None else ("agreement",)):
                record[f"{prefix}{head}{name}"] = getattr(score, name)
    return record


def prepare(recipe, place, resuming):
    """Builds the run, all but its teacher. Raises ValueError or OSError, in seconds, for whatever would
    stop it later."""
    recipe = replace(recipe, precision=choose_precision(recipe.precision, place))
    torch.backends.cudnn.benchmark = True                      # for the teacher: all batches have one shape
    workers = data.usable_cpus() // place.local_world_size if recipe.workers is None else recipe.workers
    local_batch = split_batch(recipe, place)
    with one_per_machine_first(place):                               # it may download data or --init
        train_split, val_split = data.open_dataset(recipe.data)
        sampler = data.RepeatedAugSampler(
            len(train_split.images), place.rank, place.world_size, batch_size=local_batch,
            accum_steps=recipe.accum_steps, repeats=recipe.repeats, seed=recipe.seed)
        model = build_model(replace(recipe, init=None) if resuming else recipe, train_split.classes)
    student = build_student(model, recipe, place)
    loader = data.train_loader(train_split.images, sampler, recipe.image_size, workers=workers,
                               rand_augment=recipe.rand_augment, erasing=recipe.erasing, resize=recipe.resize,
                               seed=recipe.seed)
    val_loader = data.eval_loader(val_split.images, recipe.image_size, batch_size=BATCH_SIZE, workers=workers,
                                  rank=place.rank, world_size=place.world_size)
    return Run(recipe, student, None, train_split, val_split, sampler, loader, val_loader, workers)


def with_teacher(run, place):
    """The run with its frozen teacher, and the teacher's Score on a few validation images. Raises
    ValueError if it could be no teacher for these classes."""
    recipe, classes = run.recipe, run.train_split.classes
    with one_per_machine_first(place):                               # it may download the teacher
        model = teacher.load_teacher(recipe.teacher, len(classes), classes).to(place.device)
    if recipe.compile:
        model.compile()
    # 256 validation images or so, spread over all classes: a random head or foreign classes show at once
    number = len(run.val_split.images)
    some = torch.utils.data.Subset(run.val_split.images, range(0, number, max(1, number // 256)))
    loader = data.eval_loader(some, recipe.image_size, batch_size=BATCH_SIZE, workers=run.workers,
                              rank=place.rank, world_size=place.world_size)
    score = evaluate(model, loader, place.device)["mean"]
    if not recipe.any_teacher:
        check_teacher(score, len(classes), recipe.teacher, recipe.image_size)
    return run._replace(teacher=model), score


def make_demo_teacher(recipe, place, folder):
    """Trains the demo's teacher by the same loop, or goes on with it; returns its file."""
    changes = {name: getattr(recipe, name) for name in ("seed", "workers", "precision")}
    changes["output"] = str(run_folder(recipe))              # the run to resume, if it is stopped in here
    changes["batch_size"] = math.ceil(DEMO_TEACHER["batch_size"] / place.world_size) * place.world_size
    if place.rank == 0:
        print("first a teacher for the demo's classes:", flush=True)
    checkpoint = read_last(folder)
    train(saved_recipe({}, checkpoint) if checkpoint else
          make_recipe(DEMO_TEACHER | changes | {"data": "demo"}), place, folder, checkpoint)
    if place.rank == 0:
        print("\nthen the student:", flush=True)
    return str(folder / "best.pth")


@contextlib.contextmanager
def held(folder):
    """Makes the folder and keeps it for this run until it ends. Raises ValueError if another process
    trains in it. A run that could not start leaves no folder that was not there."""
    was_there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OSError(f"cannot make the folder --output {folder}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}: wait for it, stop it, or choose "
                         "another --output") from None
    except OSError:                                                  # a file system without locks
        pass
    try:
        yield
    finally:
        with contextlib.suppress(OSError):                           # if it is empty, nothing was started
            was_there or folder.rmdir()
        os.close(handle)


def check_same_data(checkpoint, run):
    """Raises ValueError unless the checkpoint is of the run's data."""
    classes, images = checkpoint["classes"], checkpoint["state"]["images"]
    if classes != run.train_split.classes or images != len(run.train_split.images):
        raise ValueError(f"the run to resume was on {images:,} images of {len(classes)} classes, and "
                         f"{run.recipe.data} now has {len(run.train_split.images):,} of "
                         f"{len(run.train_split.classes)}, or other names: give the same data")


def check_same_step(step, place):
    """Raises ValueError unless all processes have read the same checkpoint."""
    steps = [step] * place.world_size
    if place.world_size > 1:
        dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ValueError("the processes see different checkpoints: --output must be a folder that all "
                         "machines share")


def resume_notes(run, checkpoint, place):
    """What is not as it was when the checkpoint was written, though all else is."""
    recipe, before = run.recipe, checkpoint["recipe"]
    changes = [f"{name} {getattr(recipe, name)} in place of {before[name]}" for name in ("data", "teacher")
               if getattr(recipe, name) != before[name]]
    parts, parts_before = place.world_size * recipe.accum_steps, checkpoint["state"]["parts"]
    changes += [f"batches in {parts} part(s) in place of {parts_before}"] if parts != parts_before else []
    return [f"resumed with {', '.join(changes)}: not bit for bit what it would have become"] if changes else []


def train(recipe, place, folder, checkpoint=None):
    """Trains into the folder, from a checkpoint of the same run on if there is one; returns
    the state at the end."""
    with contextlib.ExitStack() as stack:
        with one_line_errors("train.py", OSError, ValueError, data.BadImage):
            run = prepare(recipe, place, resuming=bool(checkpoint))
            # steps done, records of whole epochs, best top-1, loss terms summed since the last of them;
            # images and parts of a batch only to be compared on resume
            state = {"step": 0, "log": [], "best": -1.0, "epoch_sums": None,
                     "images": len(run.train_split.images), "parts": place.world_size * recipe.accum_steps}
            remarks = notes(run.recipe)
            if checkpoint:
                check_same_data(checkpoint, run)
                restore(run.student, checkpoint, folder)
                remarks += [f"resumed after step {checkpoint['state']['step']:,}"]
                remarks += resume_notes(run, checkpoint, place)
                state = checkpoint["state"] | {"parts": state["parts"]}
            check_same_step(state["step"], place)
            if place.rank == 0:
                stack.enter_context(held(folder))
                check_room(run, folder)
            score = None
            if recipe.distill:
                if recipe.data == "demo" and recipe.teacher == "official":
                    if place.rank == 0 and not checkpoint:
                        save_last(run, state, folder)                # there is a run to resume from now on
                    path = make_demo_teacher(run.recipe, place, folder / "teacher")
                    run = run._replace(recipe=replace(run.recipe, teacher=path))
                run, score = with_teacher(run, place)
        if place.rank == 0:
            print(banner(run, place, folder, score, remarks), flush=True)
        run_epochs(run, place, folder, state)
        return state


def leave(progress, folder):
    """Ends a run that got SIGTERM or SIGINT, after it was saved; every rank comes here in the same step."""
    progress.close()
    if progress.place.rank == 0:
        print(f"stopped by a signal, saved in {folder / 'last.pth'}; to go on: the same command with "
              f"--resume --output {shlex.quote(str(run_folder(progress.recipe)))}", flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(128 + (progress.signal or signal.SIGTERM))


# ---------------------------------------------------------------------------------------------------
# Command line


def run_folder(recipe):
    """--output, or runs/<model>-<data>."""
    name = f"{recipe.model}{'-distilled' if recipe.distill else ''}-{Path(recipe.data).resolve().name}"
    return Path(recipe.output or f"runs/{name}")


def read_last(folder):
    """The folder's last.pth, or None if there is none. Raises ValueError for a file that is damaged or
    something else."""
    path = folder / "last.pth"
    if not path.exists():
        return None
    checkpoint = deit.read_checkpoint(path)
    parts = [checkpoint.get(name) for name in ("model", "optimizer", "scaler", "state", "recipe")
             ] if isinstance(checkpoint, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not {
            "step", "log", "best", "epoch_sums", "images", "parts"} <= checkpoint["state"].keys() or not {
            "model", "data"} <= checkpoint["recipe"].keys():
        raise ValueError(f"{path} is not a training checkpoint of this program")
    if zipfile.ZipFile(path).testzip():                             # torch reads no checksums
        raise ValueError(f"{path} is damaged: its checksum is wrong; start anew with another --output")
    return checkpoint


def saved_recipe(typed, checkpoint):
    """The recipe of the run to go on with. Raises ValueError if a typed flag would change
    what it computes."""
    free = ("resume", "output", "data", "teacher", "any_teacher", "workers", "accum_steps", "compile")
    saved = {item.name: checkpoint["recipe"].get(item.name, item.default) for item in fields(Recipe)}
    for name, value in typed.items():
        if name not in free and value not in (saved[name], "auto"):      # auto: as it was chosen then
            raise ValueError(f"{option(name)} {value}, but the run to resume has "
                             f"{saved[name]}: leave the flag out, or start a new run with another --output")
    return Recipe(**saved | {name: typed[name] for name in free if name in typed})


def find_run(typed, recipe, folder, restarts):
    """(recipe, checkpoint or None) to go on with. Raises ValueError if the folder holds a run and none is
    to be resumed, or the other way round; one that torchrun restarts goes on with its own."""
    checkpoint = read_last(folder)
    own = restarts and checkpoint and checkpoint.get("launch") == launch()
    if checkpoint and not recipe.resume and not own:
        raise ValueError(f"{folder} holds a run already: --resume goes on with it, another "
                         "--output starts a new one")
    if recipe.resume and not checkpoint:
        raise ValueError(f"nothing to resume: no {folder / 'last.pth'}; leave --resume out to start")
    return saved_recipe(typed, checkpoint) if checkpoint else recipe, checkpoint


def main():
    typed = parse_recipe()
    with one_line_errors("train.py", OSError, ValueError):
        recipe = make_recipe(typed)
        place, folder = join_processes(), run_folder(recipe)
        recipe, checkpoint = find_run(typed, recipe, folder, place.restarts)
    if place.rank == 0 and recipe.data == "demo" and "data" not in typed and not checkpoint:
        print("NO --data AND NO ./imagenet HERE: training on the built-in demo, ten kinds of "
              "patterns drawn on the fly.\n"
              "For your own images: --data DIR, a folder with train/ and val/.", flush=True)
    try:
        # no ValueError here: once the run is under way one is a bug, and shall keep its traceback
        with one_line_errors("train.py", OSError, data.BadImage):
            state = train(recipe, place, folder, checkpoint)
    except KeyboardInterrupt:                                        # before the run handles it
        sys.exit(128 + signal.SIGINT)
    if place.rank == 0:
        last, best = state["log"][-1], max(state["log"], key=lambda record: record["top1"])
        print(f"done: top-1 {last['top1']:.2f}, top-5 {last['top5']:.2f} after {recipe.epochs} epochs; "
              f"best top-1 {best['top1']:.2f} in epoch {best['epoch']}\n"
              f"python evaluate.py --weights {shlex.quote(str(folder / 'best.pth'))} "
              f"--data {shlex.quote(recipe.data)}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
