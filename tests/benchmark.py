"""Speed of ours against timm's DeiT, transformers' and the official way: ratios, in one process.

    python tests/benchmark.py                              some minutes on two CPU cores
    python tests/benchmark.py --device cuda --compile      a GPU: full batches, ours compiled
    python tests/benchmark.py --only loader --images imagenet/val --workers 8

After an uncounted round all run in turn, round after round. A row gives the medians of images/s
and the median, smallest and largest of the rounds' ratios ours / theirs.

Measured on two CPU cores (one thread, two loader workers, medians of 4 rounds, drawn images about
as large as ImageNet's; torch 2.14.1, torchvision 0.29.1, timm 1.0.31, Pillow 13.0.0), for tiny,
small, base: against timm inference 1.08, 1.06, 1.07, forward and backward 1.07, 1.07, 1.06, loader
1.99, with erasing and normalization 1.47; against the official way a training step 1.08, 1.10,
1.10, evaluation 1.09; a distilled step from kept labels against one that asks 4.7, 2.1, 1.3.
"""
import argparse
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import timm.optim
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from conftest import write_folder        # with the path to the scripts
import data
import deit
import evaluate
import teacher
import train

BATCH = {"cpu": {"tiny": 8, "small": 4, "base": 2, "teacher": 4},
         "cuda": {"tiny": 1024, "small": 1024, "base": 512, "teacher": 256}}
LOADER_IMAGES = 96                       # in each round, with three views of each


def race(what, ours, opponents, images, args):
    """Times functions that handle so many images, in turn. Prints a row for each opponent."""
    runs = {"ours": ours, **opponents}
    speeds = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            speeds[name].append(images / (time.perf_counter() - start))

    mine, *others = np.array(list(speeds.values()))[:, 1:]   # the first round warms up
    for name, theirs in zip(opponents, others):
        ratios = mine / theirs
        print(f"{what:<38}{np.median(mine):>9,.1f}{np.median(theirs):>9,.1f}  {name:<14}"
              f"{np.median(ratios):.2f}  ({ratios.min():.2f} to {ratios.max():.2f})", flush=True)


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def autocast(device, dtype=torch.bfloat16):
    return torch.autocast(device, dtype, enabled=device == "cuda")


def inference(model, images):
    with torch.inference_mode(), autocast(images.device.type):
        model(images)


def forward_and_backward(model, images):
    model.zero_grad()
    with autocast(images.device.type):
        output = model(images)                               # transformers' [0]: the heads' mean
    (output[0] + output[1]).float().square().mean().backward()


def race_models(size, args):
    """Inference, and forward and backward, of the distilled models: both heads."""
    ours = deit.create_model(size, distilled=True).eval()
    theirs = timm.create_model(f"deit_{size}_distilled_patch16_224").eval()
    images = torch.randn(BATCH[args.device][size], 3, 224, 224, device=args.device)
    theirs.set_distilled_training(True)

    dim, heads = deit.SIZES[size]
    others = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(
        hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim, num_labels=1000))
    if args.compile:
        ours.compile()

    for what, run in (("inference", inference), ("forward and backward", forward_and_backward)):
        for model in (ours, theirs, others):
            model.to(args.device).train(run is forward_and_backward)
        race(f"{size}: {what}, batch {len(images)}", lambda: run(ours, images),
             {"timm": lambda: run(theirs, images), "transformers": lambda: run(others, images)},
             len(images), args)


class Batches(list):                     # in the place of a loader, of 1,000 classes
    dataset = argparse.Namespace(images=argparse.Namespace(classes=range(1000)))


def our_training(size, args, teacher_model=None, **settings):
    """A function that trains for some steps by train_epoch, and how many images that takes."""
    device, is_cuda, batch = args.device, args.device == "cuda", BATCH[args.device][size]
    number = 20 if is_cuda else 1
    labels = torch.randint(1000, (batch,), pin_memory=is_cuda)
    pixels = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8, pin_memory=is_cuda)
    loader = Batches([(pixels, labels)] * number)

    # as many repeats as leave two views of each number, to be mixed
    recipe = train.Recipe(model=size, batch_size=batch, repeats=min(3, batch // 2),
                          precision="bf16" if is_cuda else "fp32", **settings)
    model = deit.create_model(size, distilled=bool(recipe.distill), drop_path=0.1).to(device)
    models = {"model": model, "averaged_model": copy.deepcopy(model).requires_grad_(False)}
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05), lr=1e-6, fused=True)
    teacher_labels = torch.zeros(number + 1, batch, dtype=torch.int32, device=device)
    world = evaluate.World(1, 1, 0, torch.device(device))    # rank 1 shows no progress bar
    progress = train.Progress(None, recipe, world, number, 0)
    if args.compile:
        model.compile()

    def steps():
        train.train_epoch(0, recipe, world, loader, models, model, teacher_model, teacher_labels,
                          optimizer, torch.amp.GradScaler(device, enabled=False), progress)

    return steps, number * batch


def race_training(size, args):
    """Whole steps: from bytes, or the official floats, in the host's memory to new weights."""
    device, is_cuda, batch = args.device, args.device == "cuda", BATCH[args.device][size]
    our_steps, images_in_all = our_training(size, args, ema=0.99996)
    number = images_in_all // batch
    labels = torch.randint(1000, (batch,), pin_memory=is_cuda)

    # The official way: timm's model and mixing, float16 with a scaler, .item() and synchronize
    # in each step, an average updated tensor by tensor.
    theirs = timm.create_model(f"deit_{size}_patch16_224", drop_path_rate=0.1).to(device).train()
    their_average = timm.utils.ModelEmaV2(theirs, 0.99996)
    their_optimizer = timm.optim.create_optimizer_v2(theirs, "adamw", 1e-6, 0.05)
    scaler = torch.amp.GradScaler(device, enabled=is_cuda)
    mixing = timm.data.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=1000)
    images = torch.randn(batch, 3, 224, 224, pin_memory=is_cuda)

    def official_steps():
        for _ in range(number):
            mixed, targets = mixing(images.to(device, non_blocking=True),
                                    labels.to(device, non_blocking=True))
            with autocast(device, torch.float16):
                loss = F.cross_entropy(theirs(mixed), targets)
            loss.item()
            their_optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(their_optimizer)
            scaler.update()
            wait()
            their_average.update(theirs)

    race(f"{size}: whole step, batch {batch}", our_steps, {"official": official_steps},
         number * batch, args)


def race_teachers(args):
    """Ours frozen, and on a GPU in float16, as train.py has it; torchvision's as it is."""
    images = torch.randn(BATCH[args.device]["teacher"], 3, 224, 224, device=args.device)
    half = images.half() if images.is_cuda else images
    theirs = teacher.create_regnet("regnet_y_16gf").eval().to(args.device)
    ours = teacher.freeze(copy.deepcopy(theirs)).to(half.dtype)
    if args.compile:
        ours.compile()
    race(f"regnet_y_16gf, batch {len(images)}", lambda: ours(half),
         {"torchvision": lambda: inference(theirs, images)}, len(images), args)

    # distilled steps from the labels that an earlier run kept, and as that run made them
    for size in deit.SIZES:
        read, images_in_all = our_training(size, args, distill="hard")
        ask, _ = our_training(size, args, teacher_model=ours, distill="hard")
        race(f"{size}: whole step from kept labels", read, {"teacher asked": ask}, images_in_all,
             args)


def timm_loader(root, indices, args, batch_size, **how):
    transform = timm.data.create_transform(224, interpolation="bicubic", **how)
    images = Subset(ImageFolder(root, transform), indices)
    return data.make_loader(images, None, batch_size, args.workers)


def race_loaders(root, args):
    """Training views, and evaluation. timm's loader normalizes and erases, our device does."""
    images, device = data.Folder(root), torch.device(args.device)
    chosen = range(0, len(images), max(1, len(images) // LOADER_IMAGES))[:LOADER_IMAGES]
    sampler = data.RepeatedAugSampler(len(chosen), batch_size=48)
    sampler.parts *= 3                                       # all images, not a third of them
    ours = data.train_loader(Subset(images, chosen), sampler, 224, workers=args.workers)
    theirs = timm_loader(root, [index for index in chosen for _ in range(3)], args, 48,
                         is_training=True, color_jitter=0.3, re_prob=0.25, re_mode="pixel",
                         # at most 9, since 10 is an error on Pillow 13
                         auto_augment="rand-m9-mmax9-mstd0.5-inc1")

    def take(loader, is_normalized=True):
        for pixels, _ in loader:
            pixels = pixels.to(device)
            if not is_normalized:
                data.erase(data.normalize(pixels))

    timms, views = {"timm": lambda: take(theirs)}, 48 * len(sampler)
    race("loader, views/s", lambda: take(ours), timms, views, args)
    race("and normalized, erased", lambda: take(ours, is_normalized=False), timms, views, args)

    model = deit.create_model("tiny", distilled=True).to(device)
    their_model = timm.create_model("deit_tiny_distilled_patch16_224").to(device).eval()
    loader = data.eval_loader(Subset(images, chosen), 224, workers=args.workers)
    their_loader = timm_loader(root, chosen, args, 64, crop_pct=0.875)

    @torch.no_grad()
    def official():
        for pixels, labels in their_loader:
            output, labels = their_model(pixels.to(device)), labels.to(device)
            F.cross_entropy(output, labels).item()
            timm.utils.accuracy(output, labels, topk=(1, 5))[0].item()

    race("tiny: evaluation of a folder", lambda: evaluate.evaluate(model, loader, device),
         {"official": official}, len(chosen), args)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, races = parser.add_argument, ["loader", "models", "training", "teacher"]
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run (cpu)")
    add("--compile", action="store_true", help="torch.compile our models")
    add("--only", nargs="+", choices=races, default=races, help="some of the races (all)")
    add("--rounds", type=int, default=4, help="how many are counted (4)")
    add("--images", metavar="DIR", help="class folders of photographs, in place of drawn images")
    add("--workers", type=int, default=2, help="of each loader (2)")
    args = parser.parse_args()
    torch.set_num_threads(1)

    versions = [f"{it.__name__} {it.__version__}" for it in (torch, timm, transformers, PIL)]
    where = torch.cuda.get_device_name() if args.device == "cuda" else "one thread"
    print(where, f"{args.workers} workers", f"{args.rounds} round(s)", *versions, sep=", ")
    print(f"\n{'images/s':<38}{'ours':>9}{'theirs':>9}  {'who':<14}ratio")
    if "loader" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            # about as slow to decode as ImageNet's
            drawn = write_folder(Path(folder, "drawn"), ("class",), LOADER_IMAGES, 0, (560, 420))
            race_loaders(args.images or drawn / "train", args)
    for size in deit.SIZES:
        if "models" in args.only:
            race_models(size, args)
        if "training" in args.only:
            race_training(size, args)
    if "teacher" in args.only:
        race_teachers(args)


if __name__ == "__main__":
    main()
