"""The recipe of DeiT, and the loop that applies it.

Section 6 and table 9 of "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877). Published top-1 on ImageNet after 300 epochs: tiny 72.2, small 79.8, base
81.8; with --distill 74.5, 81.2, 83.4. The paper's base took 53 hours on 8 V100.

    torchrun --nproc_per_node 4 train.py --model tiny --distill --data imagenet      four GPUs
    python train.py --model tiny --distill                             no data: the built-in demo, in minutes

A run is one folder: last.pth (with --resume the same command goes on from it), best.pth (to use), log.jsonl
(an object per epoch), recipe.json, TensorBoard events.
"""
import argparse
import contextlib
import copy
import fcntl
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

if __name__ == "__main__":                                   # from here on Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import deit
import distill
import teacher
from evaluate import OneLineParser, evaluate, init_processes, local_rank_zero_first, one_line_errors

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
LOOK, SAVE, STOP = 1, 2, 3                                   # what is due after a step: 3 includes 2 and 1


# ---- The recipe. Defaults are the paper's (table 9); the command line is made from this class. ----


def flag(default, help, *allowed):                           # allowed: least and largest number, or words
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass
class Recipe:
    model: str = flag("tiny", "tiny, small, base or a torchvision RegNet", *deit.SIZES, *teacher.REGNETS)
    distill: str = flag(None, "learn from a teacher as well: hard (equation 3) or soft (2)", "hard", "soft")
    data: str = flag("imagenet", f"folder with train/ and val/, or {', '.join(data.NAMED)}; if none, demo")
    teacher: str = flag("official", "the paper's RegNetY-16GF, a torchvision RegNet's name, a file or a URL")
    any_teacher: bool = flag(False, "accept a teacher no better than chance on the validation images")
    init: str = flag(None, "weights to start from: file, URL, name (base, ...; a RegNet's, or official)")
    recipe: str = flag(None, "another set of values than the paper's for ImageNet; typed flags win over it")
    image_size: int = flag(224, "pixels, a multiple of 16", 16, 4096)
    epochs: int = flag(300, "an epoch is as many views as there are images (long runs: 1000)", 1, 10**6)
    batch_size: int = flag(1024, "images per optimiser step, over all processes", 1, 10**6)
    accum_steps: int = flag(1, "parts in which each process computes its share of a batch", 1, 10**4)
    optimizer: str = flag("adamw", "adamw, or sgd with Nesterov momentum 0.9", "adamw", "sgd")
    lr: float = flag(5e-4, "peak learning rate for a batch of 512; scaled by batch / 512", 0, 1e6)
    min_lr: float = flag(1e-5, "where the cosine ends; not scaled, as officially, nor above the peak", 0, 1e6)
    warmup_lr: float = flag(1e-6, "where the warm-up starts; not scaled, nor above the peak", 0, 1e6)
    warmup_epochs: float = flag(5.0, "linear warm-up", 0, 1e6)
    weight_decay: float = flag(0.05, "not for biases, norms, class token and positions", 0, 100)
    clip_grad: float = flag(0.0, "largest norm of the gradient; 0, as in the paper, is any", 0, 1e6)
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising from 0 in the first", 0, 0.99)
    label_smoothing: float = flag(0.1, "share of each target spread over all classes", 0, 1)
    rand_augment: float = flag(9.0, "magnitude, mean of Normal(m, 0.5); 0 turns RandAugment off", 0, 10)
    erasing: float = flag(0.25, "probability of erasing a rectangle of a view", 0, 1)
    repeats: int = flag(3, "views of each drawn image in an epoch; 1: no repeated augmentation", 1, 8)
    mixup: float = flag(0.8, "alpha of Beta(alpha, alpha); 0 turns it off", 0, 1e3)
    cutmix: float = flag(1.0, "alpha of Beta(alpha, alpha); 0 turns it off", 0, 1e3)
    mix_group: int = flag(256, "views that share a lambda, as officially; base 64", 1, 1e6)
    alpha: float = flag(0.5, "weight of the distillation term, as in the paper; soft 0.1", 0, 1)
    temperature: float = flag(3.0, "softens both models' logits in soft distillation", 1e-3, 1e3)
    ema: float = flag(0.0, "decay per step of averaged weights, such as 0.99996; 0 keeps none", 0, 0.9999999)
    precision: str = flag("auto", "bf16 (CPUs: AMX), fp16, fp32; auto: bf16 if GPU has it", "auto", *AUTOCAST)
    compile: bool = flag(False, "torch.compile the model and the teacher")
    workers: int = flag(None, "loader processes per process; default by its share of the CPUs", 0, 256)
    seed: int = flag(0, "everything random follows from it", 0, 2**63 - 1)
    output: str = flag(None, "the run's folder; default runs/<model>[-distilled]-<data>")
    resume: bool = flag(False, "go on with the run in --output, if there is one")
    peak = property(lambda recipe: recipe.lr * recipe.batch_size / 512)          # the linear scaling rule

    def __post_init__(self):
        """Raises ValueError for what is not allowed, whether typed, of a preset, or read from last.pth."""
        for item in fields(self):
            value, kind = getattr(self, item.name), item.type
            allowed = tuple(PRESETS) if item.name == "recipe" else item.metadata["allowed"]
            if value is None and item.default is None:
                continue
            if kind is str and allowed:
                is_fine, wanted = value in allowed, ", ".join(allowed)
            elif allowed:
                is_fine = type(value) in (int, kind) and allowed[0] <= value <= allowed[1]
                is_fine = is_fine and not 0 < value < 1e-30      # as a float32 it could be 0
                wanted = "from {:g} to {:g}".format(*allowed)
            else:
                is_fine, wanted = type(value) is kind and value != "", "given, or left out (is it unset?)"
            if not is_fine:
                raise ValueError(f"{option(item.name)} {str(value)[:20]!r}: it must be {wanted}")
        if self.model in deit.SIZES and self.image_size % deit.PATCH_SIZE:
            deit.create_model(self.model, image_size=self.image_size)    # raises, with the size to use


def learning_rate(recipe, epoch):
    """The rate at a fractional epoch: linear warm-up, then a cosine counted from epoch 0 (not from the end of
    the warm-up), as in timm. The official code uses each value one epoch late, and for a whole epoch."""
    start, end = min(recipe.warmup_lr, recipe.peak), min(recipe.min_lr, recipe.peak)
    if epoch < recipe.warmup_epochs:
        return start + (recipe.peak - start) * epoch / recipe.warmup_epochs
    return end + (recipe.peak - end) * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2


def parameter_groups(model, weight_decay):
    """Two groups for the optimiser. Vectors, class token and positions do not decay; the distillation token
    does, as in the official code, where that is on purpose (facebookresearch/deit, issue 48)."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        is_exempt = parameter.ndim <= 1 or name in ("cls_token", "pos_embed")
        (no_decay if is_exempt else decay).append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


# ---- The loop -------------------------------------------------------------------------------------


# All of a run. In one process ddp_model is the model; state is what changes: step, log, epoch_sums.
Run = namedtuple("Run", "recipe world folder classes model ddp_model ema_model optimizer scaler teacher "
                 "teacher_score sampler loader val_loader state")


def compute_losses(model, teacher_model, images, targets, recipe):
    """(loss,), or with a teacher (loss, class term, distillation term): equations 2 and 3."""
    if teacher_model is None:
        return (F.cross_entropy(model(images), targets, label_smoothing=recipe.label_smoothing),)
    with torch.no_grad():
        teacher_logits = teacher_model(images)
    class_logits, distillation_logits = model(images)
    return distill.distillation_loss(class_logits, distillation_logits, targets, teacher_logits,
                                     kind=recipe.distill, alpha=recipe.alpha, temperature=recipe.temperature,
                                     label_smoothing=recipe.label_smoothing)


def train_epoch(run, epoch, batches, meter):
    """An epoch, from the step on that run.state has reached."""
    recipe, world, sampler, optimizer, scaler = run.recipe, run.world, run.sampler, run.optimizer, run.scaler
    dtype = AUTOCAST[recipe.precision]
    # one for mix_group views, officially those of a process, and at least one for each view of an image
    num_mixes = max(recipe.repeats, round(recipe.batch_size / recipe.mix_group))
    run.ddp_model.train()
    torch.backends.cudnn.benchmark = True                    # all batches have one shape
    for step in range(run.state["step"] - epoch * sampler.steps, sampler.steps):
        lr = learning_rate(recipe, epoch + step / sampler.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro_step in range(recipe.accum_steps):
            pixels, labels, first, boxes = meter.next_batch(batches)
            images = data.erase(data.normalize(pixels), boxes)
            torch.manual_seed(data.seed_from(recipe.seed, epoch, step))                      # all ranks alike
            images, targets = data.mix(images, labels, len(run.classes), first=first, repeats=recipe.repeats,
                                       num_mixes=num_mixes, mixup=recipe.mixup, cutmix=recipe.cutmix)
            torch.manual_seed(data.seed_from(recipe.seed, epoch, step, micro_step, world.rank))    # drop-path
            # processes average gradients in the last part only (as no_sync does; idle without DDP)
            run.ddp_model.require_backward_grad_sync = micro_step == recipe.accum_steps - 1
            with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
                losses = compute_losses(run.ddp_model, run.teacher, images, targets, recipe)
            scaler.scale(losses[0] / recipe.accum_steps).backward()
            meter.add(losses, images)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if run.ema_model:
            update_average(run.ema_model, run.model, recipe.ema)
        run.state["step"] += 1
        due = meter.end_step(norm, is_last=step == sampler.steps - 1)
        if due >= LOOK:
            meter.exchange(epoch, step, lr)                  # here alone, and to save, the host waits
        if due >= SAVE:
            save(run, meter)
        if due == STOP:
            stop(run, meter)


@torch.no_grad()
def update_average(ema_model, model, decay):
    """ema <- decay ema + (1 - decay) model, in one pass; batch norm's counters, which nobody reads, stay."""
    averaged, current = ([tensor for tensor in (*module.parameters(), *module.buffers())
                          if tensor.is_floating_point()] for module in (ema_model, model))
    torch._foreach_lerp_(averaged, current, 1 - decay)


def validate(run):
    """The log's scores: top1, top5, loss and agreement of each head; with ema_ before of averaged weights."""
    record, names = {}, ("top1", "top5", "loss") + (("agreement",) if run.teacher else ())
    models = {"": run.model, "ema_": run.ema_model} if run.ema_model else {"": run.model}
    for prefix, model in models.items():
        for buffer in model.buffers() if run.world.world_size > 1 else ():
            dist.broadcast(buffer, 0)                        # batch statistics are the first rank's
        scores = evaluate(model, run.val_loader, run.world.device, teacher_score=run.teacher_score)
        for head, score in scores.items():
            head = "" if head == "mean" else f"{head}_"
            record |= {f"{prefix}{head}{name}": getattr(score, name) for name in names}
    return record


def train(run, meter):
    """Trains, validates and saves, from where the run's state is to the end."""
    state, steps = run.state, run.sampler.steps
    handlers = {number: signal.signal(number, meter.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if not state["step"]:
            save(run, meter)                                 # from now on the folder holds a run
        batches = iter(run.loader)
        for epoch in range(len(state["log"]), run.recipe.epochs):    # the log has a record for each
            train_epoch(run, epoch, batches, meter)
            lr, means = learning_rate(run.recipe, epoch + 1 - 1 / steps), (meter.shown / steps).tolist()
            record = {"epoch": epoch, "step": state["step"], "lr": lr}       # no times: logs can be equal
            record |= {f"train_{name}": mean for name, mean in zip(meter.loss_names, means)} | validate(run)
            state["log"].append(record)
            state["epoch_sums"] = None
            meter.end_epoch(record)
            save_epoch(run, meter)
        for number, handler in handlers.items():             # not after an error: it has to be said first
            signal.signal(number, handler)
    finally:
        meter.close()
        data.kill_workers()
    if meter.signal:                                         # it came after the last step
        signal.raise_signal(meter.signal)


def stop(run, meter):
    """Ends a run that got a signal and was saved, on all ranks together."""
    meter.close()
    if run.world.rank == 0:
        print(f"stopped by a signal, saved in {run.folder}; the same command with --resume goes on")
    if run.world.world_size > 1:
        dist.barrier()
    sys.exit(128 + (meter.signal or signal.SIGTERM))


# ---- The meter ------------------------------------------------------------------------------------

LOOK_SECONDS = 3                                             # between two looks at the device
SAVE_SECONDS, SAVE_SHARE = 600, 0.01                         # between checkpoints; their share of the time


class Meter:
    """Sums what the loop reports on the device, and shows it where the host looks every few seconds."""

    def __init__(self, run):
        self.run, state, world = run, run.state, run.world
        self.loss_names = ("loss", "class_loss", "distillation_loss") if run.recipe.distill else ("loss",)
        # in float64 and in order: an epoch's sums do not depend on when the host looks; a row per rank
        before = torch.tensor(state["epoch_sums"] or [0.0] * len(self.loss_names), dtype=torch.float64)
        before = before.view(-1, len(self.loss_names))
        own = before[world.rank] if len(before) == world.world_size else before.mean(dim=0)
        self.sums, self.norm = own.to(world.device), torch.zeros((), device=world.device)
        self.finite_steps = torch.zeros((), device=world.device)
        self.saved, self.save_seconds, self.signal, self.is_first_batch = time.monotonic(), 0.0, 0, True
        self.writer = SummaryWriter(run.folder, purge_step=state["step"] + 1) if world.rank == 0 else None
        if self.writer:
            (run.folder / "recipe.json").write_text(json.dumps(asdict(run.recipe), indent=4) + "\n")
            self.folder_fd = os.open(run.folder, os.O_RDONLY)
        self.bar = tqdm(initial=state["step"], total=run.recipe.epochs * run.sampler.steps, unit="step",
                        smoothing=0, disable=world.rank > 0,     # remaining time by the mean of all steps
                        mininterval=0.1 if sys.stderr.isatty() else 30)      # a log file: a line now and then
        self.restart(before.mean(dim=0))

    def restart(self, shown):
        self.looked, self.waited, self.steps, self.shown = time.monotonic(), 0.0, 0, shown

    def on_signal(self, number, frame):
        self.signal = number
        if self.writer:
            os.write(2, b"\ntrain.py: stopping after this step, and saving it\n")

    def next_batch(self, batches):
        """The next batch, on the device. Waiting for it counts if the device has nothing else to do."""
        is_cuda, asked = self.run.world.device.type == "cuda", time.monotonic()
        is_idle = not is_cuda or torch.cuda.current_stream().query()
        pixels, labels, *rest = next(batches)
        self.waited += is_idle * (time.monotonic() - asked)
        return *(tensor.to(self.run.world.device, non_blocking=True) for tensor in (pixels, labels)), *rest

    def add(self, losses, images):
        self.sums += torch.stack(losses).detach() / self.run.recipe.accum_steps
        self.finite_steps += self.sums[0].isfinite()
        if self.is_first_batch and self.writer:              # as the model sees it
            sheet = torchvision.utils.make_grid(data.denormalize(images[:64]).cpu(), nrow=8)
            self.writer.add_image("first batch", sheet, self.run.state["step"])
        self.is_first_batch = False

    def is_save_due(self, seconds):
        return time.monotonic() - self.saved > max(seconds, self.save_seconds / SAVE_SHARE)

    def end_step(self, norm, is_last):
        """What is due after this step, agreed among the processes' CPUs: no device is asked."""
        self.norm = torch.maximum(self.norm, norm)           # nan wins
        self.steps += 1
        is_look = is_last or time.monotonic() - self.looked > LOOK_SECONDS
        is_save = self.run.world.rank == 0 and self.is_save_due(SAVE_SECONDS)
        due = torch.tensor(max(LOOK * is_look, SAVE * is_save, STOP * (self.signal > 0)))
        if self.run.world.world_size > 1:
            dist.all_reduce(due, dist.ReduceOp.MAX)
        return int(due)

    def exchange(self, epoch, step, lr):
        """Waits for the device, shows means over ranks. Raises FloatingPointError for what is not finite."""
        run, weights = self.run, nn.utils.get_total_norm(self.run.model.parameters())
        own = torch.cat((self.sums, torch.stack((self.finite_steps, self.norm, weights))))
        ranks = [own.clone() for _ in range(run.world.world_size)]
        if len(ranks) > 1:
            dist.all_gather(ranks, own)
        table = torch.stack(ranks).cpu()                                            # (ranks, losses + 3)
        sums, (finite_steps, norms, weights) = table[:, :-3], table[:, -3:].T
        run.state["epoch_sums"], norm, bad = sums.tolist(), norms.max().item(), None
        # fp16: a step with an overflow is left out and the loss scale halved, as it should be, down to 1
        is_skipped = run.scaler.is_enabled() and run.scaler.get_scale() >= 1
        if not sums.isfinite().all():
            first = int(finite_steps.argmin())               # a step later the gradient takes it to all
            bad = f"rank {first}: the loss became {sums[first, 0]:g}"
        elif not weights.isfinite().all() or not math.isfinite(norm) and not is_skipped:
            bad = "a gradient or weight is not finite"
        if bad:
            raise FloatingPointError(
                f"{bad} between steps {step + 1 - self.steps} and {step} of epoch {epoch} (learning rate "
                f"{lr:.3g}, gradient norm {norm:.3g}); {run.folder / 'last.pth'} is from before it. Try a "
                "lower --lr, or --precision fp32")
        seconds, sums = time.monotonic() - self.looked, sums.mean(dim=0)
        values = dict(zip(self.loss_names, ((sums - self.shown) / self.steps).tolist())) | {
            "lr": lr, "gradient_norm": norm, "data_wait_share": self.waited / seconds,
            "images_per_second": run.recipe.batch_size * self.steps / seconds}
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(f"train/{name}", value, run.state["step"])
        self.bar.set_postfix_str("epoch {}, loss {loss:.3f}, lr {lr:.2e}, {images_per_second:.0f} images/s, "
                                 "{data_wait_share:.0%} waiting for data".format(epoch, **values), False)
        self.bar.update(self.steps)
        self.norm.zero_()
        self.restart(sums)

    def end_epoch(self, record):
        """Shows a record of the log, and starts the next epoch's sums."""
        scores = {name: value for name, value in record.items() if name not in ("epoch", "step", "lr")}
        for name, value in scores.items() if self.writer else ():
            self.writer.add_scalar(f"val/{name}".replace("val/train_", "train/epoch_"), value, record["step"])
        shown = (f"{name} {value:.2f}" for name, value in scores.items()
                 if name.endswith(("train_loss", "top1", "top5", "agreement")))
        if self.writer:                                      # a disabled bar would write all the same
            self.bar.write(f"epoch {record['epoch']:>3}: {', '.join(shown)}")
        self.restart(torch.zeros_like(self.shown))
        self.sums.zero_()

    def close(self):
        self.bar.close()
        if self.writer:
            self.writer.close()


# ---- Checkpoints ----------------------------------------------------------------------------------


def atomic_write(path, write):
    """Writes a file whole or not at all: one beside it, flushed to the disk, is renamed. Raises OSError."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                 # torch reports a full disk as RuntimeError
        beside.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "the disk is full, or a limit reached"
        raise OSError(f"cannot write {path} ({reason}); --resume goes on from what is saved") from None


def weights(run):
    """What evaluate.py and --init need. (timm would prefer averaged weights, were they named model_ema.)"""
    models = {"model": run.model, "averaged_model": run.ema_model}
    states = {name: model.state_dict() for name, model in models.items() if model}
    return states | {"classes": run.classes, "recipe": asdict(run.recipe), "processes": run.world.world_size}


def save(run, meter):
    """Writes last.pth, and before it best.pth if that is waiting. Plain values and tensors only."""
    start, best = time.monotonic(), run.state.pop("best", None)
    if run.world.rank == 0:
        if not os.fstat(meter.folder_fd).st_nlink:           # and another one of this name is another run's
            raise OSError(f"{run.folder} was deleted while this run trained in it")
        if best:
            atomic_write(run.folder / "best.pth", lambda file: torch.save(best, file))
        last = weights(run) | {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
                               "state": run.state}
        atomic_write(run.folder / "last.pth", lambda file: torch.save(last, file))
    meter.saved = time.monotonic()
    meter.save_seconds = meter.saved - start


def save_epoch(run, meter):
    """Writes the log, and keeps the weights of the best epoch until they are written with a checkpoint."""
    log = run.state["log"]
    if run.world.rank == 0:
        lines = "".join(json.dumps(record) + "\n" for record in log)         # after a resume each epoch once
        atomic_write(run.folder / "log.jsonl", lambda file: file.write(lines.encode()))
        if max(log, key=lambda record: record["top1"]) is log[-1]:
            run.state["best"] = copy.deepcopy(weights(run)) | {"record": log[-1]}
    if meter.is_save_due(0) or len(log) == run.recipe.epochs:
        save(run, meter)


def lock(folder):
    """Makes the folder and locks it until the file returned is closed. Raises ValueError if it is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process trains in {folder}: stop it, or choose another --output") from None
    except OSError:                                          # a file system without locks
        pass
    return file


def find_run(typed, recipe, folder):
    """(the run's recipe, its checkpoint or None). Raises ValueError if it cannot go on, or not so."""
    path = folder / "last.pth"
    free = ("resume", "output", "data", "teacher", "any_teacher", "workers", "accum_steps", "compile")
    if not path.exists():
        if (folder / "best.pth").exists():
            raise ValueError(f"{folder} holds best.pth of a run, but no last.pth to resume: another --output")
        return recipe, None
    if not recipe.resume:
        raise ValueError(f"{folder} holds a run already: --resume goes on with it, another --output starts")
    checkpoint = deit.read_checkpoint(path)
    with deit.naming(f"{path} is not a training checkpoint of this program"):
        missing = {"step", "log", "epoch_sums", "data"} - checkpoint["state"].keys()
        missing |= {item.name for item in fields(Recipe)} - checkpoint["recipe"].keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        saved = asdict(Recipe(**checkpoint["recipe"]))
    for name, value in typed.items():
        if name not in free and value != saved[name] and (name, value) != ("precision", "auto"):
            raise ValueError(f"{option(name)} {value}, but the run to resume has {saved[name]}: leave it "
                             "out, or start a new run with another --output")
    return Recipe(**saved | {name: typed[name] for name in free if name in typed}), checkpoint


def restore(run, checkpoint):
    """Puts back what was saved; returns in words what else differs. Raises ValueError for another run's."""
    state, optimizer, log = run.state, run.optimizer, run.state["log"]
    with deit.naming(run.folder / "last.pth"):
        if state["data"] != data.fingerprint(run.loader.dataset.images, run.val_loader.dataset.images):
            raise ValueError(f"that run was on other images or labels than {run.recipe.data} has now")
        deit.load_strictly(run.model, checkpoint["model"])
        if run.ema_model:
            deit.load_strictly(run.ema_model, checkpoint["averaged_model"])
        run.scaler.load_state_dict(checkpoint["scaler"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
        for parameter in run.model.parameters() if state["step"] else ():
            shape, moments = parameter.shape, optimizer.state[parameter].items()
            expected = {"adamw": {"step": (), "exp_avg": shape, "exp_avg_sq": shape},
                        "sgd": {"momentum_buffer": shape}}[run.recipe.optimizer]
            if {name: value.shape for name, value in moments if value.isfinite().all()} != expected:
                raise ValueError("the state of the optimiser is missing, damaged, or of another model")
        steps_done = state["step"] - len(log) * run.sampler.steps        # of the epoch that the log lacks
        is_log = len(log) <= run.recipe.epochs and all(0 <= record["top1"] <= 100 for record in log)
        if type(steps_done) is not int or not 0 <= steps_done <= run.sampler.steps or not is_log:
            raise ValueError("its step and its log contradict each other")
        now = asdict(run.recipe) | {"processes": run.world.world_size}
        before = checkpoint["recipe"] | {"processes": checkpoint["processes"]}
        return [f"{name} {now[name]} in place of {before[name]}" for name in (
            "processes", "accum_steps", "data", "teacher", "compile") if now[name] != before[name]]


# ---- Presets and flags ----------------------------------------------------------------------------

# Other purposes than ImageNet from scratch: values, and who says so. Rates are for a batch of 512 here: the
# sources' where they say "before scaling", else converted. DEMO is what the demo changes, to take minutes.
PRESETS = {
    "finetune-384": ({"image_size": 384, "epochs": 30, "batch_size": 512, "lr": 5e-6, "min_lr": 5e-6,
                      "weight_decay": 1e-8, "drop_path": 0.0, "ema": 0.99996, "mix_group": 32},
                     "official command for base, 82.89 %; no path is dropped there; with --distill ours"),
    "mmpretrain-small": ({"warmup_epochs": 20.0, "clip_grad": 5.0, "repeats": 1, "drop_path": 0.0},
                         "mmpretrain's tiny 74.50 %, small 80.69 % (there: later cosine, one-colour boxes)"),
    "cifar-cars": ({"optimizer": "sgd", "lr": 0.01 * 512 / 768, "weight_decay": 1e-4, "batch_size": 768,
                    "epochs": 1000, "erasing": 0.0, "drop_path": 0.0},
                   "facebookresearch/deit, issues 45 and 175 (0.01 taken as the rate at 768): CIFAR, Cars"),
    "inaturalist": ({"lr": 7.5e-5 * 512 / 768, "batch_size": 768, "epochs": 360, "erasing": 0.1},
                    "facebookresearch/deit, issues 105 and 141, for base"),
    "transfer": ({"lr": 5e-5, "min_lr": 1e-6, "batch_size": 256, "epochs": 100, "erasing": 0.0},
                 "ours, not from the paper: Flowers, Pets or a few thousand images of your own, with --init"),
} | teacher.PRESETS

DEMO = {"image_size": 48, "epochs": 10, "batch_size": 32, "lr": 1e-3 * 512 / 32, "warmup_epochs": 0.5}


def option(name):
    return f"--{name.replace('_', '-')}"


def listing(values):
    return ", ".join(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in values.items())


def parse_flags():
    presets = "\n".join(f"  {name}: {source}\n      {listing(values)}"
                        for name, (values, source) in PRESETS.items())
    parser = OneLineParser(description="Trains a DeiT, or a RegNet to teach one.", allow_abbrev=False,
                           epilog=f"recipes (rates at a batch of 512):\n{presets}",
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           argument_default=argparse.SUPPRESS)
    for item in fields(Recipe):
        how = {"action": "store_true"} if item.type is bool else {"type": item.type}
        if item.name == "distill":                           # alone it means hard
            how |= {"nargs": "?", "const": "hard"}
        shown = "" if item.default is None or item.default is False else f" (default {item.default})"
        parser.add_argument(option(item.name), help=item.metadata["help"] + shown, **how)
    return vars(parser.parse_args())


def make_recipe(typed):
    """The paper's values, changed by the demo's, the preset's, and what was typed. Raises ValueError."""
    preset, _ = PRESETS.get(typed.get("recipe"), ({}, None))
    choice = {"data": "imagenet" if Path("imagenet").is_dir() else "demo",
              "alpha": 0.1 if typed.get("distill") == "soft" else 0.5,
              "mix_group": 64 if typed.get("model") == "base" else 256} | preset | typed
    recipe = Recipe(**DEMO | choice if choice["data"] == "demo" else choice)
    is_deit = recipe.model in deit.SIZES
    used = {"distill": is_deit, "teacher": recipe.distill, "any_teacher": recipe.distill,
            "alpha": recipe.distill, "temperature": recipe.distill == "soft", "drop_path": is_deit}
    for name in used.keys() & typed.keys():
        if not used[name]:
            raise ValueError(f"{option(name)} {typed[name]} would do nothing: --distill and --drop-path "
                             "are for a DeiT, --temperature for --distill soft, the others for --distill")
    return recipe


# ---- Setting up -----------------------------------------------------------------------------------


def settle(recipe, world):
    """The recipe with a precision that the device has. Raises ValueError, also for an odd batch."""
    if recipe.precision == "auto":
        has_bf16 = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        recipe = replace(recipe, precision="bf16" if has_bf16 else "fp32")
    if recipe.precision == "fp16" and world.device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU: use fp32 or bf16 here")
    parts = world.world_size * recipe.accum_steps
    least = parts * (2 if recipe.model in teacher.REGNETS else 1)            # batch norm needs two
    if recipe.batch_size % parts or recipe.batch_size < least:
        near = max(least, round(recipe.batch_size / parts) * parts)
        raise ValueError(f"--batch-size {recipe.batch_size} is no multiple of {parts}, processes times "
                         f"--accum-steps, or leaves a RegNet one image: try {near}")
    return recipe


def build_model(recipe, classes):
    """The model with fresh weights, or those of --init. Raises ValueError where these are of another kind."""
    torch.manual_seed(recipe.seed)
    shape = {"distilled": bool(recipe.distill), "image_size": recipe.image_size, "num_classes": len(classes),
             "drop_path": recipe.drop_path}
    if recipe.model in deit.SIZES and recipe.init:
        model = deit.load_model(recipe.init, classes=classes, **shape)
    elif recipe.model in deit.SIZES:
        model = deit.create_model(recipe.model, **shape)
    elif recipe.init:
        model = teacher.load_regnet(recipe.init, classes=classes)
    else:
        model = teacher.create_regnet(recipe.model, len(classes))
    if model.size != recipe.model:
        raise ValueError(f"--init {recipe.init} is a {model.size} model: --model {model.size}")
    return model


def build(recipe, world, folder, checkpoint=None):
    """A Run ready to train, from the run's checkpoint if it has one; says what it will be."""
    device, teacher_model, teacher_score = world.device, None, None
    recipe = settle(recipe, world)
    batch_size = recipe.batch_size // (world.world_size * recipe.accum_steps)
    with local_rank_zero_first(world):                       # it may download data, --init or the teacher
        images, val_images = data.open_dataset(recipe.data)
        classes = images.classes
        model = build_model(replace(recipe, init=None) if checkpoint else recipe, classes).to(device)
        if device.type == "cuda":                            # RegNets: 3 times channels-last, by timm's table
            model.to(memory_format=torch.contiguous_format)
        if recipe.distill:
            teacher_model = teacher.load_teacher(recipe.teacher, len(classes), classes).to(device)
    state = checkpoint["state"] if checkpoint else {
        "step": 0, "log": [], "epoch_sums": None, "data": data.fingerprint(images, val_images)}
    sampler = data.RepeatedAugSampler(
        len(images), world.rank, world.world_size, batch_size=batch_size, accum_steps=recipe.accum_steps,
        repeats=recipe.repeats, epochs=recipe.epochs, first_step=state["step"], seed=recipe.seed)
    loader = data.train_loader(images, sampler, recipe.image_size, workers=recipe.workers,
                               rand_augment=recipe.rand_augment, erasing=recipe.erasing)
    val_loader = data.eval_loader(val_images, recipe.image_size, rank=world.rank,
                                  world_size=world.world_size, workers=(loader.num_workers + 1) // 2)
    if teacher_model:
        teacher_score = evaluate(teacher_model, val_loader, device)["mean"]
        teacher.check_top1(teacher_score, len(classes), recipe.teacher, recipe.any_teacher)
        teacher_model.to(AUTOCAST[recipe.precision])         # once, and not in every step
    ema_model = copy.deepcopy(model).requires_grad_(False) if recipe.ema else None
    for module in filter(None, (model, teacher_model)) if recipe.compile else ():
        module.compile()
    ddp_model = DDP(model, gradient_as_bucket_view=True) if world.world_size > 1 else model
    groups, is_fp16 = parameter_groups(model, recipe.weight_decay), recipe.precision == "fp16"
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    if recipe.optimizer == "sgd":                            # fused keeps the inf of a step fp16 leaves out
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=not is_fp16)
    scaler = torch.amp.GradScaler(device.type, enabled=is_fp16)
    run = Run(recipe, world, folder, classes, model, ddp_model, ema_model, optimizer, scaler, teacher_model,
              teacher_score, sampler, loader, val_loader, state)
    changes = restore(run, checkpoint) if checkpoint else []
    if world.rank == 0:
        print(summary(run, changes), flush=True)
    return run


def summary(run, changes):
    """What is about to happen, in a few lines to check before leaving it alone."""
    recipe, sampler, images, paper = run.recipe, run.sampler, run.loader.dataset.images, asdict(Recipe())
    changed = {name: value for name, value in asdict(recipe).items() if value != paper[name] and (
        name == "optimizer" or type(paper[name]) in (int, float) and name != "seed")}
    device = torch.cuda.get_device_name() if run.world.device.type == "cuda" else "CPU"
    is_unmixed = (recipe.mixup or recipe.cutmix) and sampler.batch_size < 2 * recipe.repeats
    is_slow = device != "CPU" and recipe.precision == "fp32"
    lines = {
        "run": f"{run.folder}, from step {run.state['step']:,} on",
        "resumed": changes and f"not bit for bit what it would have become, with {', '.join(changes)}",
        "data": f"{recipe.data}: {len(images):,} training, {len(run.val_loader.dataset):,} validation "
                f"images, {len(run.classes):,} classes{data.describe_ignored(images)}",
        "recipe": recipe.recipe and f"{recipe.recipe}: {PRESETS[recipe.recipe][1]}",
        "changed": changed and f"in place of the paper's values: {listing(changed)}",
        "epochs": f"{recipe.epochs} of {sampler.steps:,} steps, {len(images) % recipe.batch_size:,} views "
                  f"left over; in each {recipe.repeats} view(s) of {sampler.distinct_images:,} images",
        "step": f"{recipe.batch_size:,} views = {run.world.world_size} process(es) x {recipe.accum_steps} "
                f"part(s) x {sampler.batch_size}; learning rate {recipe.peak:.4g} at the peak"
                f"{', which so long a warm-up does not reach' * (recipe.warmup_epochs > recipe.epochs)}",
        "mixing": is_unmixed and f"none: it needs {2 * recipe.repeats} views at a time",
        "model": f"{recipe.model}{' distilled' * bool(recipe.distill)}, {recipe.image_size} pixels, "
                 f"{sum(p.numel() for p in run.model.parameters()):,} parameters",
        "teacher": run.teacher and f"{recipe.teacher}: {run.teacher_score.top1:.2f} % top-1 in validation; "
                                   f"{recipe.distill} distillation, alpha {recipe.alpha:g}",
        "device": f"{device}, {recipe.precision}{' (fp16 is several times faster)' * is_slow}, "
                  f"{run.loader.num_workers} worker(s), torch {torch.__version__}",
    }
    return "\n".join(f"{name:<9}{line}" for name, line in lines.items() if line)


# ---- Command line ---------------------------------------------------------------------------------


def build_and_train(recipe, checkpoint, world, folder):
    with one_line_errors("train.py", Exception):
        run = build(recipe, world, folder, checkpoint)
        with deit.naming(folder):
            meter = Meter(run)                               # TensorBoard's first file
    (checkpoint or {}).clear()                               # it is as large as three models
    with one_line_errors("train.py", OSError, data.BadImage, FloatingPointError):
        train(run, meter)
    return run


def main():
    typed = parse_flags()
    threading.excepthook = lambda _: None                    # TensorBoard's: add_scalar raises it again
    with contextlib.ExitStack() as stack:
        with one_line_errors("train.py", Exception):
            recipe = make_recipe(typed)
            name = f"{recipe.model}{'-distilled' * bool(recipe.distill)}-{Path(recipe.data).resolve().name}"
            world, folder = init_processes(), Path(recipe.output or f"runs/{name}")
            if world.rank == 0:
                stack.enter_context(lock(folder))            # before anything in it is looked at
            if world.world_size > 1:
                dist.barrier()
            recipe, checkpoint = find_run(typed, recipe, folder)
            settle(recipe, world)                            # raises, before the demo trains a teacher
        if world.rank == 0 and recipe.data == "demo" and "data" not in typed:
            print("NO --data AND NO ./imagenet HERE: training on the built-in demo; yours: --data DIR")
        if recipe.distill and recipe.data == "demo" and recipe.teacher == "official":
            values = teacher.DEMO | {
                name: getattr(recipe, name) for name in ("image_size", "seed", "workers", "precision")}
            values["batch_size"] = max(2, math.ceil(16 / world.world_size)) * world.world_size
            with one_line_errors("train.py", Exception):
                teacher_run = find_run({}, make_recipe(values), folder / "teacher")
            build_and_train(*teacher_run, world, folder / "teacher")
            recipe = replace(recipe, teacher=str(folder / "teacher" / "best.pth"))
        run = build_and_train(recipe, checkpoint, world, folder)
    if world.rank == 0:
        best, last = max(run.state["log"], key=lambda record: record["top1"]), run.state["log"][-1]
        command = ["python", "evaluate.py", "--weights", str(folder / "best.pth"), "--data", recipe.data]
        command += ["--teacher", recipe.teacher] * bool(recipe.distill)
        is_chance = teacher.could_be_chance(best["top1"], len(run.val_loader.dataset), len(run.classes))
        advice = ["the best could be chance; may help: --init, more --epochs, a smaller --batch-size, fewer "
                  "--warmup-epochs, another --lr, --rand-augment 0 --erasing 0"] * is_chance
        print(f"done: top-1 {last['top1']:.2f} after {recipe.epochs} epochs, best {best['top1']:.2f} in "
              f"epoch {best['epoch']}", *advice, shlex.join(command), sep="\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))   # from here on in order: workers run
    main()
