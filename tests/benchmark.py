"""Ours against timm's DeiT, transformers' and the official way of writing the step: ratios, in one process, in turn.

    python tests/benchmark.py                      about ten minutes on two CPU cores
    python tests/benchmark.py --device cuda        a GPU: full batches, compiled models, share of its limit
    python tests/benchmark.py --only loader --images imagenet          the loaders on your own photographs

Every contestant runs once uncounted, then all of them in turn, round after round. A row gives images/s (medians) and
the median, smallest and largest of the rounds' ratios ours / theirs: above 1 we are faster. Before a model is timed,
its output is compared with timm's. Needs tests/requirements.txt.

Measured with the scripts of commit eac0990 on two CPU cores, one thread, float32: torch 2.15.0, torchvision 0.29.2,
timm 1.0.31, transformers 5.23.0, Pillow 13.0.0; one run, medians of 5 rounds, memory of 3:

                                                            tiny          small         base
    inference, against timm / transformers                  1.07 / 1.06   1.08 / 1.09   1.09 / 1.10
    forward and backward, against timm / transformers       1.09 / 1.09   1.08 / 1.08   1.09 / 1.09
    whole training step, against one the official way       1.11          1.12          1.14
    optimiser and EMA, against the same                     2.9           2.7           3.1
    peak memory of forward and backward, timm's / ours      1.09          1.11          1.08

RegNetY-16GF forward against torchvision's as it is, in runs of its own: 1.13 with 8 images at a time, 1.09 with 2.
Evaluation against the official way: 1.11. Loader against timm's transform, 2 workers, 101 kB JPEGs: 2.24 to 2.42.
"""
import argparse
import contextlib
import copy
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import timm.data
import timm.utils
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import deit
import evaluate
import teacher
import train

BATCH = {"cpu": {"tiny": 8, "small": 4, "base": 2, "teacher": 8},
         "cuda": {"tiny": 1024, "small": 1024, "base": 512, "teacher": 256}}
LOADER_IMAGES = 128                                          # of a round, three views of each
synchronize = {"cpu": lambda: None, "cuda": torch.cuda.synchronize}
pin = {"cpu": lambda tensor: tensor, "cuda": torch.Tensor.pin_memory}


def timed(run, device):
    """Seconds of run()."""
    synchronize[device]()
    start = time.perf_counter()
    run()
    synchronize[device]()
    return time.perf_counter() - start


def race(what, runs, images, args, limit=None):
    """The contestants in turn, each a function that handles that many images. `limit` is in images/s."""
    speeds = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            speeds[name].append(images / timed(run, args.device))
    show(what, {name: found[1:] for name, found in speeds.items()}, limit)             # the first round warms up


def show(what, found, limit=None, is_cost=False):
    """A row for each opponent of the first contestant, and what share of the limit that reaches."""
    (_, ours), *others = found.items()
    share = f"  {np.median(ours) / limit:.0%} of the limit" if limit else ""
    for name, theirs in others:
        ratios = [b / a if is_cost else a / b for a, b in zip(ours, theirs)]
        print(f"{what:<44}{np.median(ours):>12,.2f}{np.median(theirs):>12,.2f}  {name:<26}"
              f"{np.median(ratios):>6.2f}  ({min(ratios):.2f} to {max(ratios):.2f}){share}", flush=True)


def autocast(device, dtype=torch.bfloat16):
    return torch.autocast(device, dtype) if device == "cuda" else contextlib.nullcontext()


def distilled_models(size):
    """Ours, timm's and transformers' distilled DeiT, ours and timm's with the same weights: {name: model}."""
    torch.manual_seed(0)
    ours = deit.create_model(size, distilled=True).eval()
    theirs = timm.create_model(f"deit_{size}_distilled_patch16_224").eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.set_distilled_training(True)                      # in training mode it gives both heads too
    (dim, heads), images = deit.SIZES[size], torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5), "timm's output differs from ours"
    config = transformers.DeiTConfig(hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim,
                                     num_labels=1000)
    return {"ours": ours, "timm": theirs,
            "transformers": transformers.DeiTForImageClassificationWithTeacher(config).eval()}


def infer(model, images, device):
    with torch.inference_mode(), autocast(device):
        model(images)


def learn(model, images, device):
    model.zero_grad()
    with autocast(device):
        output = model(images)
        output = getattr(output, "logits", output)           # transformers' output object
        loss = (sum(output) if isinstance(output, tuple) else output).float().square().mean()
    loss.backward()


def race_models(what, run, models, images, args, limit=None):
    runs = {name: lambda model=model: run(model, images, args.device) for name, model in models.items()}
    race(f"{what}, batch {len(images)}", runs, len(images), args, limit)


def bench_models(args):
    for size in args.sizes:
        models = {name: model.to(args.device) for name, model in distilled_models(size).items()}
        batch, limit = BATCH[args.device][size], args.flops and args.flops / (2 * deit.count_macs(models["ours"]))
        images = torch.randn(batch, 3, 224, 224, device=args.device)
        if args.device == "cuda":
            models = {"ours, compiled": torch.compile(models["ours"])} | models
        race_models(f"{size}: inference", infer, models, images, args, limit)
        for model in models.values():
            model.train()
        race_models(f"{size}: forward and backward", learn, models, images, args, limit and limit / 3)


def bench_memory(args):
    """Peak memory of a forward and backward: of the device, or of a process of its own on the CPU, where it is the
    median of three, since what the allocator keeps is not the same each time."""
    for size in args.sizes:
        found = {"ours": [], "timm": []}
        for name in min(3, args.rounds) * list(found):
            command = [sys.executable, __file__, "--device", args.device, "--peak", name, size]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name].append(float(printed.split()[-1]))
        show(f"{size}: peak memory of it, MiB", found, is_cost=True)


def print_peak(name, size, device):
    model, batch = distilled_models(size)[name].to(device).train(), BATCH[device][size] * (4 if device == "cpu" else 1)
    images = torch.randn(batch, 3, 224, 224, device=device)
    Path("/proc/self/clear_refs").write_text("5")            # Linux: the peak starts anew, from what is resident now
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    learn(model, images, device)
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 2**10 - before
    print((torch.cuda.max_memory_allocated() if device == "cuda" else peak) / 2**20)


def our_teacher(name, device):
    """As train.py has it: frozen, and on a GPU in the run's precision once, not in every step."""
    return teacher.freeze(teacher.create_regnet(name)).to(device, torch.bfloat16 if device == "cuda" else None)


def bench_teacher(args):
    name, batch = "regnet_y_1_6gf" if args.quick else "regnet_y_16gf", BATCH[args.device]["teacher"]
    ours, images = our_teacher(name, args.device), torch.randn(batch, 3, 224, 224, device=args.device)
    models = {"ours": ours, "torchvision, as it is": teacher.create_regnet(name).eval().to(args.device)}
    if args.device == "cuda":
        models = {"ours, compiled": torch.compile(ours)} | models
    limit = args.flops and not args.quick and args.flops / 2 / 15.912e9  # torchvision's multiply-adds
    race_models(f"teacher {name}", infer, models, images, args, limit)


def official_optimizer(model):
    decay, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim == 1 or name in ("cls_token", "pos_embed") else decay).append(parameter)
    return torch.optim.AdamW([{"params": free, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.05}], lr=1e-6)


def bench_optimizer(args):
    """AdamW and the moving average of all weights, once per step."""
    for size in args.sizes:
        model = deit.create_model(size, distilled=True).to(args.device)
        optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05), lr=1e-6, fused=True)
        average = copy.deepcopy(model).requires_grad_(False)
        theirs = timm.create_model(f"deit_{size}_distilled_patch16_224").to(args.device)
        their_optimizer, their_average = official_optimizer(theirs), timm.utils.ModelEmaV2(theirs, decay=0.99996)
        for parameter in [*model.parameters(), *theirs.parameters()]:
            parameter.grad = torch.randn_like(parameter)
        race(f"{size}: optimiser and EMA, steps/s", {
            "ours": lambda: [(optimizer.step(), train.update_average(average, model, 0.99996)) for _ in range(10)],
            "the official way": lambda: [(their_optimizer.step(), their_average.update(theirs)) for _ in range(10)]},
            10, args)


def quiet_meter(run):
    """A meter without a bar that never saves."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        meter = train.Meter(run)
    meter.bar.disable, meter.save_seconds = True, float("inf")
    return meter


def our_steps(size, distilled, compiled, batch, device, folder):
    """n optimiser steps of train.py itself, from uint8 pixels in the host's memory, as a function of n."""
    model = deit.create_model(size, distilled=distilled, drop_path=0.1).to(device)
    teacher_model = our_teacher("regnet_y_16gf", device) if distilled else None
    for module in filter(None, (model, teacher_model) if compiled else ()):
        module.compile()
    boxes = torch.tensor([(position, 40, 40, 60, 90, position) for position in range(0, batch, 4)])
    pixels, labels = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8), torch.randint(1000, (batch,))
    example = pin[device](pixels), pin[device](labels), 0, boxes
    run = train.Run(
        recipe=train.Recipe(model=size, batch_size=batch, distill="hard" if distilled else None, alpha=0.5, lr=1e-6,
                            warmup_epochs=0.0, mix_group=64 if size == "base" else 256, ema=0.99996,
                            precision="bf16" if device == "cuda" else "fp32"),
        world=evaluate.World(torch.device(device), 0, 1, 0, 1), folder=Path(folder), classes=[""] * 1000,
        model=model, ddp_model=model, ema_model=copy.deepcopy(model).requires_grad_(False),
        optimizer=torch.optim.AdamW(train.parameter_groups(model, 0.05), lr=0.0, fused=True),
        scaler=torch.amp.GradScaler(device, enabled=False), teacher=teacher_model, teacher_score=None,
        sampler=data.RepeatedAugSampler(batch, batch_size=batch), loader=None, val_loader=None,
        state={"step": 0, "epoch_sums": None})
    meter = quiet_meter(run)

    def steps(number):
        run.sampler.steps, run.state["step"] = number, 0
        train.train_epoch(run, 0, iter([example] * number), meter)
    return steps


def official_steps(size, distilled, batch, device):
    """The same step as the official code has it: float images from the host, timm's model and mixing, autocast to fp16
    with a scaler, .item() and synchronize in each step, an average updated tensor by tensor."""
    model = timm.create_model(f"deit_{size}{'_distilled' * distilled}_patch16_224", drop_path_rate=0.1).to(device)
    model.train()
    if distilled:
        model.set_distilled_training(True)
    guide = timm.create_model("regnety_160").to(device).eval() if distilled else None
    optimizer, scaler = official_optimizer(model), torch.amp.GradScaler(device, enabled=device == "cuda")
    average = timm.utils.ModelEmaV2(model, decay=0.99996)
    mixing = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    example = pin[device](torch.randn(batch, 3, 224, 224)), pin[device](torch.randint(1000, (batch,)))

    def steps(number):
        for _ in range(number):
            images, targets = mixing(*(tensor.to(device, non_blocking=True) for tensor in example))
            with autocast(device, torch.float16):
                outputs = model(images)
                loss = torch.sum(-targets * F.log_softmax(outputs[0] if distilled else outputs, dim=-1), dim=-1).mean()
                if distilled:
                    with torch.no_grad():
                        answers = guide(images)
                    loss = 0.5 * loss + 0.5 * F.cross_entropy(outputs[1], answers.argmax(dim=1))
            loss.item()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            synchronize[device]()
            average.update(model)
    return steps


def bench_step(args):
    is_cuda = args.device == "cuda"
    for size, distilled in itertools.product(args.sizes, (False, True) if is_cuda else (False,)):
        batch, number = BATCH[args.device][size], 20 if is_cuda else 1
        limit = is_cuda and not distilled and args.flops / (6 * deit.count_macs(deit.create_model(size)))
        with tempfile.TemporaryDirectory() as folder:
            steps = {f"ours{', compiled' * compiled}": our_steps(size, distilled, compiled, batch, args.device, folder)
                     for compiled in ((True, False) if is_cuda else (False,))}
            steps["the official way"] = official_steps(size, distilled, batch, args.device)
            race(f"{size}: whole step{', with teacher' * distilled}, batch {batch}",
                 {name: lambda run=run: run(number) for name, run in steps.items()}, number * batch, args, limit)


def bench_epoch(args):
    """Wall time of epochs so short that what happens between them counts: 2,000 small images, tiny at 64 pixels, batch
    64, with validation. Our loader goes on over all epochs; the opponent is the same, begun anew for each. Not in turn,
    since ours reads ahead: each trains alone, its first epoch uncounted."""
    seconds, world = {}, evaluate.World(torch.device(args.device), 0, 1, 0, 1)

    def begun_anew(run, sampler):
        for epoch in range(run.recipe.epochs):
            sampler.first_step, sampler.epochs = epoch * sampler.steps, epoch + 1
            yield from run.loader

    with tempfile.TemporaryDirectory() as folder:
        draw_images(folder, {"train": 2000, "val": 200}, (96, 80))
        recipe = train.Recipe(data=folder, image_size=64, batch_size=64, mix_group=64, epochs=args.rounds + 1,
                              workers=args.workers)
        for name in ("ours", "a loader begun anew"):
            with contextlib.redirect_stdout(None):
                run = train.build(recipe, world, Path(folder) / name)
            batches, meter = iter(run.loader) if name == "ours" else begun_anew(run, run.sampler), quiet_meter(run)
            seconds[name] = [timed(lambda: (train.train_epoch(run, epoch, batches, meter), train.validate(run)),
                                   args.device) for epoch in range(recipe.epochs)][1:]
    show("tiny, 2,000 images of 64 pixels: s/epoch", seconds, is_cost=True)


def draw_images(folder, numbers, size):
    """{split: number} JPEGs of noise on many scales, four classes; at 500 x 375 as hard to decode as ImageNet's."""
    rng = np.random.default_rng(0)
    for split, n in ((split, n) for split, number in numbers.items() for n in range(number)):
        noise = [rng.integers(0, 256, (size[1] // side, size[0] // side, 3), np.uint8) for side in (80, 20, 5, 1)]
        layers = [np.asarray(PIL.Image.fromarray(layer).resize(size, data.BICUBIC), dtype=float) for layer in noise]
        path = Path(folder) / split / f"class{n % 4}" / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.tensordot((0.5, 0.22, 0.14, 0.14), layers, axes=1).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(path, quality=94)


def timm_loader(root, chosen, how, args, **more):
    """Some of a folder's images by timm's transform; with posterize to 0 bits, which Pillow 13 refuses. The workers are
    started here, before ours: they would inherit what ours ask of the C library."""
    timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = (
        lambda image, bits, **_: image.point(lambda value: value & ~(2 ** (8 - bits) - 1)))
    images = ImageFolder(root, timm.data.create_transform(224, interpolation="bicubic", **how))
    loader = DataLoader(Subset(images, chosen), num_workers=args.workers, persistent_workers=args.workers > 0, **more)
    next(iter(loader))
    return loader


def bench_loader(args):
    """Views of the training set per second. Theirs leave the loader as floats, normalised and erased, ours as bytes:
    the rest is the device's work, which the second row counts too. The third is evaluation, tiny, with its loader."""
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            draw_images(folder, {"train": LOADER_IMAGES, "val": LOADER_IMAGES}, (500, 375))
        root = Path(args.images or folder)
        train_root, val_root = (root / split if (root / split).is_dir() else root for split in ("train", "val"))
        images, val_images = data.Folder(train_root), data.Folder(val_root)
        chosen, val_chosen = (range(0, len(these), max(1, len(these) // LOADER_IMAGES))[:LOADER_IMAGES]
                              for these in (images, val_images))
        how = {"is_training": True, "color_jitter": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25,
               "re_mode": "pixel"}
        their_views = timm_loader(train_root, [index for index in chosen for _ in range(3)], how, args, batch_size=48)
        their_loader = timm_loader(val_root, val_chosen, {"crop_pct": 0.875}, args, batch_size=64)
        sampler = data.RepeatedAugSampler(len(chosen), batch_size=48)
        sampler.steps, sampler.distinct_images = 3 * len(chosen) // 48, len(chosen)
        views = data.train_loader(Subset(images, chosen), sampler, 224, workers=args.workers)
        loader = data.eval_loader(Subset(val_images, val_chosen), 224, workers=args.workers)

        def ours(normalized=False):
            for pixels, _, _, boxes in views:
                pixels = pixels.to(device)
                if normalized:
                    data.erase(data.normalize(pixels), boxes)
            sampler.first_step, sampler.epochs = sampler.first_step + sampler.steps, sampler.epochs + 1  # other views

        def theirs():
            for pixels, _ in their_views:
                pixels.to(device)

        size = np.mean([os.path.getsize(images.path(index)) for index in chosen]) / 1000
        for what, run in ((f"loader, {size:.0f} kB images, views/s", ours), ("and normalised", lambda: ours(True))):
            race(what, {"ours": run, "timm's transform": theirs}, 48 * sampler.steps, args)
        model = deit.create_model("tiny", distilled=True).to(device).eval()
        opponent = timm.create_model("deit_tiny_distilled_patch16_224").to(device).eval()
        race(f"tiny: evaluation, {args.workers} workers", {
            "ours": lambda: evaluate.evaluate(model, loader, device),
            "the official way": lambda: official_evaluation(opponent, their_loader, device)}, len(val_chosen), args)


@torch.no_grad()
def official_evaluation(model, loader, device):
    for pixels, labels in loader:
        output, labels = model(pixels.to(device)), labels.to(device)
        F.cross_entropy(output, labels).item()
        timm.utils.accuracy(output, labels, topk=(1, 5))[0].item()


BENCHES = {"loader": bench_loader, "models": bench_models, "memory": bench_memory, "optimizer": bench_optimizer,
           "step": bench_step, "epoch": bench_epoch, "teacher": bench_teacher}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run (default cpu)")
    add("--quick", action="store_true", help="tiny and two rounds only")
    add("--rounds", type=int, help="default 5, with --quick 2")
    add("--sizes", nargs="+", choices=list(deit.SIZES), help="default all, with --quick tiny")
    add("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES), help="some of the races (default all)")
    add("--images", metavar="DIR", help="photographs for the loaders: class folders, or train/ and val/ with such")
    add("--threads", type=int, default=1, help="of the CPU, for the models (default 1)")
    add("--workers", type=int, default=data.usable_cpus(), help="of the loaders (default: usable CPUs)")
    add("--peak", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        return print_peak(*args.peak, args.device)
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.sizes = args.sizes or (["tiny"] if args.quick else list(deit.SIZES))
    args.flops = None
    if args.device == "cuda":                                # bf16 FLOP/s of a large matrix product, the limit
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        args.flops = 20 * 2 * 8192**3 / min(timed(lambda: [a @ a for _ in range(20)], "cuda") for _ in range(6))
    hardware = (f"{torch.cuda.get_device_name()}, {args.flops / 1e12:.0f} TFLOP/s bf16" if args.flops else
                f"{os.uname().machine}, {args.threads} thread(s) of {data.usable_cpus()} CPUs, float32")
    packages = ", ".join(f"{it.__name__} {it.__version__}" for it in (torch, torchvision, timm, transformers, PIL))
    print(f"{hardware}; {packages}; medians of {args.rounds} rounds, images/s\n")
    print(f"{'':<44}{'ours':>12}{'theirs':>12}  {'who':<26}{'ratio':>6}")
    for name in filter(args.only.__contains__, BENCHES):
        if name != "loader":
            # else it is luck whether memory is fetched from the system anew: tiny's ratios were 0.92 to 1.15
            data.keep_freed_memory()
        BENCHES[name](args)


if __name__ == "__main__":
    main()
