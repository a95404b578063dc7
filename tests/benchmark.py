"""Ours against timm's DeiT, transformers' and the official way of writing the step: ratios, in one process, in turn.

    python tests/benchmark.py                      about eight minutes on two CPU cores
    python tests/benchmark.py --device cuda        a GPU: full batches, whole compiled steps, share of its limit
    python tests/benchmark.py --quick              tiny only, two rounds: does it run?
    python tests/benchmark.py --only loader teacher

Every contestant runs once uncounted, then all of them in turn, round after round. A row gives images/s (medians) and the
median, smallest and largest of the rounds' ratios ours / theirs: above 1 we are faster. Before a model is timed, its
output is compared with ours. Needs tests/requirements.txt; rows of packages that are not installed are left out.
"""
import argparse
import contextlib
import importlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import deit
import evaluate
import teacher
import train

import timm
import timm.data
import timm.utils

try:
    import transformers
except ImportError:
    transformers = None

BATCH = {"cpu": {"tiny": 8, "small": 4, "base": 2}, "cuda": {"tiny": 1024, "small": 1024, "base": 512}}
TEACHER_BATCH = {"cpu": 8, "cuda": 256}
IMAGE_BYTES = 100_000                                                    # about ImageNet's mean


# ---------------------------------------------------------------------------------------------------
# Racing


def race(contestants, images, rounds, device):
    """{name: [images/s of each round]}, the contestants in turn; each is a function that handles that many images."""
    speeds = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if number:                                                   # the first round warms up
                speeds[name].append(images / (time.perf_counter() - start))
    return speeds


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def show(what, speeds, limit=None):
    """A row for each opponent of the first contestant; `limit` in images/s adds what share of it we reach."""
    ours, *others = speeds
    fastest = statistics.median(speeds[ours])
    share = f"  {fastest / limit:.0%} of the limit" if limit else ""
    if not others:
        print(f"{what:<44}{fastest:>12,.2f}{share}", flush=True)
    for other in others:
        ratios = [a / b for a, b in zip(speeds[ours], speeds[other])]
        print(f"{what:<44}{fastest:>12,.2f}{statistics.median(speeds[other]):>12,.2f}  {other:<26}"
              f"{statistics.median(ratios):>6.2f}  ({min(ratios):.2f} to {max(ratios):.2f}){share}", flush=True)


# ---------------------------------------------------------------------------------------------------
# The model


def distilled_models(size):
    """Ours, timm's and transformers' DeiT with the same weights: {name: (model, its two training outputs' sum)}."""
    torch.manual_seed(0)
    ours = deit.create_model(size, distilled=True).eval()
    theirs = timm.create_model(f"deit_{size}_distilled_patch16_224").eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.set_distilled_training(True)                                  # in training mode it gives both heads too
    models = {"ours": ours, "timm": theirs}
    if transformers:
        dim, heads = deit.SIZES[size]
        config = transformers.DeiTConfig(hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim, num_labels=1000)
        models["transformers"] = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5), "timm's output differs from ours"
    return models


def logits_of(output):
    """One tensor, whatever a model gives: a tensor, the pair of its heads, or transformers' output object."""
    output = getattr(output, "logits", output)
    return sum(output) if isinstance(output, tuple) else output


def bench_models(args):
    for size in args.sizes:
        models = {name: model.to(args.device) for name, model in distilled_models(size).items()}
        batch = BATCH[args.device][size]
        images = torch.randn(batch, 3, 224, 224, device=args.device)

        def infer(model):
            with torch.inference_mode(), autocast(args.device):
                for _ in range(3):
                    model(images)

        def learn(model):
            with autocast(args.device):
                loss = logits_of(model(images)).float().square().mean()
            loss.backward()
            model.zero_grad()

        limit = args.flops and args.flops / (2 * deit.count_macs(models["ours"]))
        show(f"{size}: inference, batch {batch}", race(
            {name: lambda model=model: infer(model) for name, model in models.items()}, 3 * batch, args.rounds, args.device), limit)
        for model in models.values():
            model.train()
        show(f"{size}: forward and backward, batch {batch}", race(
            {name: lambda model=model: learn(model) for name, model in models.items()}, batch, args.rounds, args.device),
            limit and limit / 3)
        if args.device == "cuda":
            compiled = torch.compile(models["ours"].eval())
            show(f"{size}: inference, compiled, batch {batch}", race({"ours": lambda: infer(compiled)}, 3 * batch, args.rounds,
                                                                     args.device), limit)


def autocast(device, dtype=torch.bfloat16):
    return torch.autocast(device, dtype) if device == "cuda" else contextlib.nullcontext()


def bench_memory(args):
    """Peak memory of one forward and backward: of the device, or of a process of its own on the CPU, where it is the
    median of three, since what the allocator keeps is not the same each time."""
    for size in args.sizes:
        peaks = {"ours": [], "timm": []}
        for _ in range(min(3, args.rounds)):
            for name, found in peaks.items():
                command = [sys.executable, __file__, "--device", args.device, "--peak", name, size]
                found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
        ratios = sorted(theirs / ours for ours, theirs in zip(*peaks.values()))
        print(f"{f'{size}: peak memory of it, MiB':<44}{statistics.median(peaks['ours']):>12,.0f}"
              f"{statistics.median(peaks['timm']):>12,.0f}  {'timm':<26}{statistics.median(ratios):>6.2f}"
              f"  ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def peak(name, size, device):
    model = distilled_models(size)[name].to(device).train()
    images = torch.randn(BATCH[device][size] * (4 if device == "cpu" else 1), 3, 224, 224, device=device)
    Path("/proc/self/clear_refs").write_text("5")                        # Linux: the peak starts anew
    before = resident("VmRSS")
    with autocast(device):
        loss = logits_of(model(images)).float().square().mean()
    loss.backward()
    print(torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM") - before)


def resident(field):
    """MiB, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


# ---------------------------------------------------------------------------------------------------
# The teacher


def bench_teacher(args):
    name = "regnet_y_1_6gf" if args.quick else "regnet_y_16gf"
    torch.manual_seed(0)
    plain = teacher.create_regnet(name).to(memory_format=torch.contiguous_format).eval().to(args.device)
    ours = teacher.create_regnet(name).to(args.device)
    ours.load_state_dict(plain.state_dict())
    ours, batch = teacher.freeze(ours), TEACHER_BATCH[args.device]
    images = torch.randn(batch, 3, 224, 224, device=args.device)
    contestants = {"ours": ours, "torchvision, as it is": plain}
    if args.device == "cuda":
        contestants = {"ours, compiled": torch.compile(ours)} | contestants

    def ask(model):
        with torch.no_grad(), autocast(args.device):
            model(images)

    macs = {"regnet_y_16gf": 15.912e9}.get(name)                         # of torchvision's table of weights
    show(f"teacher {name}, batch {batch}", race({name: lambda model=model: ask(model) for name, model in contestants.items()},
                                                batch, args.rounds, args.device), macs and args.flops and args.flops / 2 / macs)


# ---------------------------------------------------------------------------------------------------
# Optimiser and whole step


def bench_optimizer(args):
    """AdamW and the moving average of all weights, once per step."""
    for size in args.sizes:
        place = evaluate.Place(torch.device(args.device), 0, 1, 0, 1, 0)
        student = train.build_student(deit.create_model(size, distilled=True), recipe_of(size, args.device), place)
        theirs = timm.create_model(f"deit_{size}_distilled_patch16_224").to(args.device)
        their_optimizer = official_optimizer(theirs)
        average = timm.utils.ModelEmaV2(theirs, decay=0.99996)
        for parameter in [*student.model.parameters(), *theirs.parameters()]:
            parameter.grad = torch.randn_like(parameter)

        def ours():
            student.optimizer.step()
            student.average.update_parameters(student.model)

        def official():
            their_optimizer.step()
            average.update(theirs)

        speeds = race({"ours": lambda: [ours() for _ in range(10)],
                       "the official way": lambda: [official() for _ in range(10)]}, 10, args.rounds, args.device)
        show(f"{size}: optimiser and EMA, steps/s", speeds)


def recipe_of(size, device, **changes):
    return train.Recipe(model=size, alpha=0.5, mix_group=64 if size == "base" else 256, ema=0.99996,
                        precision="bf16" if device == "cuda" else "fp32", **changes)


def official_optimizer(model):
    decay, spared = [], []
    for name, parameter in model.named_parameters():
        (spared if parameter.ndim == 1 or name in ("cls_token", "pos_embed") else decay).append(parameter)
    return torch.optim.AdamW([{"params": spared, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.05}], lr=1e-6)


def our_steps(size, distilled, compiled, batch, device, folder):
    """n optimiser steps of train.py itself, from uint8 pixels in the host's memory, as a function of n."""
    place = evaluate.Place(torch.device(device), 0, 1, 0, 1, 0)
    recipe = recipe_of(size, device, batch_size=batch, distill="hard" if distilled else None, compile=compiled,
                       warmup_epochs=0.0, lr=1e-6)
    guide = teacher.freeze(teacher.create_regnet("regnet_y_16gf")).to(device) if distilled else None
    student = train.build_student(deit.create_model(size, distilled=distilled, drop_path=0.1), recipe, place)
    if compiled and guide:
        guide.compile()
    indices = torch.arange(batch)
    boxes = torch.tensor([(position, 40, 40, 60, 90) for position in range(0, batch, 4)])
    example = [pinned(torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8), device),
               pinned(torch.randint(1000, (batch,)), device), indices, boxes]
    split = data.Split(None, [""] * 1000)
    state = {"step": 0, "epoch_sums": None}
    progress = train.Progress(place, recipe, Path(folder), 10**6, state)

    def steps(number):
        sampler = SimpleNamespace(first_step=0, steps=number)
        run = train.Run(recipe, student, guide, split, split, sampler, [example] * number, None, 0)
        for _ in train.train_epoch(run, place, 0, progress):
            pass
    return steps


def pinned(tensor, device):
    return tensor.pin_memory() if device == "cuda" else tensor


def official_steps(size, distilled, batch, device):
    """The same step as the official code has it: float images from the host, timm's model and mixing, autocast to fp16
    with a scaler, .item() and synchronize in each step, an average updated tensor by tensor."""
    model = timm.create_model(f"deit_{size}{'_distilled' if distilled else ''}_patch16_224", drop_path_rate=0.1).to(device).train()
    if distilled:
        model.set_distilled_training(True)
    guide = timm.create_model("regnety_160").to(device).eval() if distilled else None
    optimizer, scaler = official_optimizer(model), torch.amp.GradScaler(device, enabled=device == "cuda")
    average = timm.utils.ModelEmaV2(model, decay=0.99996)
    mixing = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    pixels, labels = (pinned(torch.randn(batch, 3, 224, 224), device), pinned(torch.randint(1000, (batch,)), device))

    def steps(number):
        for _ in range(number):
            images, targets = mixing(pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            with autocast(device, torch.float16):
                outputs = model(images)
                class_logits = outputs[0] if distilled else outputs
                loss = torch.sum(-targets * F.log_softmax(class_logits, dim=-1), dim=-1).mean()
                if distilled:
                    with torch.no_grad():
                        answers = guide(images)
                    loss = 0.5 * loss + 0.5 * F.cross_entropy(outputs[1], answers.argmax(dim=1))
            loss.item()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            synchronize(device)
            average.update(model)
    return steps


def bench_step(args):
    for size in args.sizes:
        batch, number = BATCH[args.device][size], 20 if args.device == "cuda" else 1
        for distilled in (False,) if args.device == "cpu" else (False, True):
            with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
                steps = {"ours": our_steps(size, distilled, False, batch, args.device, folder),
                         "the official way": official_steps(size, distilled, batch, args.device)}
                if args.device == "cuda":
                    steps = {"ours, compiled": our_steps(size, distilled, True, batch, args.device, folder)} | steps
                speeds = race({name: lambda run=run: run(number) for name, run in steps.items()}, number * batch, args.rounds,
                              args.device)
            limit = args.flops and not distilled and args.flops / (6 * deit.count_macs(deit.create_model(size)))
            show(f"{size}: whole step{', with teacher' if distilled else ''}, batch {batch}", speeds, limit)


# ---------------------------------------------------------------------------------------------------
# Data


class ThreeTimes(torch.utils.data.Sampler):
    """Each image three times in a row: what timm's loader has to do for repeated augmentation."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 3 * self.size

    def __iter__(self):
        return (index for index in torch.randperm(self.size).tolist() for _ in range(3))


def draw_images(folder, number=64):
    """train/ and val/ of that many 500 x 375 JPEGs of noise on many scales, about as large and as hard to decode as
    ImageNet's."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for n in range(number):
            layers = [np.asarray(Image.fromarray(rng.integers(0, 256, (375 // side, 500 // side, 3), dtype=np.uint8))
                                 .resize((500, 375), Image.Resampling.BICUBIC), dtype=float) for side in (80, 20, 5, 1)]
            pixels = np.tensordot((0.5, 0.22, 0.14, 0.14), layers, axes=1)
            path = Path(folder) / split / f"class{n % 4}" / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path, quality=94)
    return statistics.mean(path.stat().st_size for path in Path(folder).rglob("*.jpg"))


def posterize(image, bits, **_):
    """timm's, but for 0 bits, which Pillow 13 refuses."""
    return image.point(lambda value: value & ~(2 ** (8 - bits) - 1))


def bench_loader(args):
    """Views of the training set per second. Theirs leave the loader as floats, normalised and erased; ours as bytes, and the
    rest is the device's work: on a CPU, where that is not another device, the last row counts it too. Theirs are resized
    by Pillow, ours by torch, or by Pillow for equal pixels (--resize pillow)."""
    timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    theirs = timm.data.create_transform(224, is_training=True, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1",
                                        interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1)
    with tempfile.TemporaryDirectory() as folder:
        size = draw_images(folder)
        train_split, val_split = data.open_dataset(folder)
        number, workers = len(train_split.images), args.workers
        sampler = data.RepeatedAugSampler(number, batch_size=48)
        sampler.steps, sampler.distinct_images = 3 * number // 48, number
        loaders = {resize: data.train_loader(train_split.images, sampler, 224, resize=resize, workers=workers)
                   for resize in ("torch", "pillow")}
        official = DataLoader(torchvision.datasets.ImageFolder(f"{folder}/train", theirs), batch_size=48,
                              sampler=ThreeTimes(number), num_workers=workers, persistent_workers=workers > 0)
        device = torch.device(args.device)

        def consume_ours(resize="torch", normalized=False):
            sampler.set_epoch(sampler.epoch + 1)                         # other views, as theirs are
            for pixels, _, _, boxes in data.to_device(loaders[resize], device):
                if normalized:
                    data.erase(data.normalize(pixels), boxes)

        def consume_theirs():
            for images, _ in official:
                images.to(device)

        rows = {"": consume_ours, ", equal pixels": lambda: consume_ours("pillow"),
                ", normalised": lambda: consume_ours(normalized=True)}
        speeds = race(rows | {"timm's transform": consume_theirs}, 3 * number, args.rounds, args.device)
        for row in rows:
            show(f"loader, {size / 1000:.0f} kB JPEGs, views/s{row}",
                 {"ours": speeds[row], "timm's transform": speeds["timm's transform"]})
        model = deit.create_model("tiny", distilled=True).to(device).eval()
        opponent = timm.create_model("deit_tiny_distilled_patch16_224").to(device).eval()
        ours = data.eval_loader(val_split.images, 224, workers=workers)
        official = DataLoader(torchvision.datasets.ImageFolder(f"{folder}/val", timm.data.create_transform(
            224, interpolation="bicubic", crop_pct=0.875)), batch_size=64, num_workers=workers, persistent_workers=workers > 0)

        @torch.no_grad()
        def evaluate_theirs():
            for images, labels in official:
                output = opponent(images.to(device))
                F.cross_entropy(output, labels.to(device)).item()
                timm.utils.accuracy(output, labels.to(device), topk=(1, 5))[0].item()

        show(f"tiny: evaluation, {workers} workers", race(
            {"ours": lambda: evaluate.evaluate(model, ours, device), "the official way": evaluate_theirs}, len(val_split.images),
            args.rounds, args.device))


# ---------------------------------------------------------------------------------------------------


def measure_flops():
    """bf16 FLOP/s of a large matrix product: the limit that shares are given of."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    speeds = race({"product": lambda: [a @ b for _ in range(20)]}, 20 * 2 * 8192**3, 5, "cuda")
    return statistics.median(speeds["product"])


BENCHES = {"loader": bench_loader, "models": bench_models, "memory": bench_memory, "optimizer": bench_optimizer,
           "step": bench_step, "teacher": bench_teacher}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run (default cpu)")
    parser.add_argument("--quick", action="store_true", help="tiny and two rounds only")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--sizes", nargs="+", choices=list(deit.SIZES), help="default all, with --quick tiny")
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES),
                        help="some of the races; loader has evaluation too (default all)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for the models (default 1)")
    parser.add_argument("--workers", type=int, default=data.usable_cpus(), help="of the loaders (default: usable CPUs)")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        return peak(*args.peak, args.device)
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.sizes = args.sizes or (["tiny"] if args.quick else list(deit.SIZES))
    packages = [f"{name} {importlib.import_module(name).__version__}" for name in ("torch", "torchvision", "timm", "PIL")]
    packages += [f"transformers {transformers.__version__}"] if transformers else []
    args.flops = measure_flops() if args.device == "cuda" else None
    hardware = (f"{torch.cuda.get_device_name()}, {args.flops / 1e12:.0f} TFLOP/s bf16" if args.flops else
                f"{platform.processor() or platform.machine()}, {args.threads} thread(s) of {data.usable_cpus()} CPUs, float32")
    print(f"{hardware}; {', '.join(packages)}; medians of {args.rounds} rounds, images/s\n")
    print(f"{'':<44}{'ours':>12}{'theirs':>12}  {'who':<26}{'ratio':>6}")
    for name, bench in BENCHES.items():
        if name in args.only:
            if name != "loader":
                # Else it is luck whether a call's memory is fetched from the system anew: tiny's ratios were 0.92 to 1.15.
                # It cannot be undone and timm's loader workers would inherit it: so the loader's race comes first.
                data.keep_freed_memory()
            bench(args)


if __name__ == "__main__":
    main()
