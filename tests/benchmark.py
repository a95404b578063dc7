"""Speed of ours against timm's DeiT, transformers' and the official way: ratios, in one process.

    python tests/benchmark.py                              about five minutes on two CPU cores
    python tests/benchmark.py --device cuda --compile      a GPU: full batches, ours compiled
    python tests/benchmark.py --only loader --images imagenet/val --workers 8

Every contestant runs once uncounted, then all of them in turn, round after round. A row gives
images/s (medians) and the median, smallest and largest of the rounds' ratios ours / theirs:
above 1 we are faster. Needs tests/requirements.txt. Measured: see README.
"""
import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import timm
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import deit
import evaluate
import teacher
import train

BATCH = {"cpu": {"tiny": 8, "small": 4, "base": 2, "teacher": 4},
         "cuda": {"tiny": 1024, "small": 1024, "base": 512, "teacher": 256}}
LOADER_IMAGES = 96                       # in each round, with three views of each
EMA = 0.99996


def race(what, ours, opponents, images, args):
    """Times functions that handle so many images, in turn. Prints a row for each opponent."""
    runs = {"ours": ours, **opponents}
    speeds = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            wait_for(args.device)
            start = time.perf_counter()
            run()
            wait_for(args.device)
            speeds[name].append(images / (time.perf_counter() - start))

    mine, *others = np.array(list(speeds.values()))[:, 1:]   # the first round warms up
    for name, theirs in zip(opponents, others):
        ratios = mine / theirs
        print(f"{what:<38}{np.median(mine):>9,.1f}{np.median(theirs):>9,.1f}  {name:<14}"
              f"{np.median(ratios):.2f}  ({ratios.min():.2f} to {ratios.max():.2f})", flush=True)


def wait_for(device):
    if device == "cuda":
        torch.cuda.synchronize()


def autocast(device, dtype=torch.bfloat16):
    return torch.autocast(device, dtype, enabled=device == "cuda")


def inference(model, images):
    with torch.inference_mode(), autocast(images.device.type):
        model(images)


def forward_and_backward(model, images):
    model.zero_grad()
    with autocast(images.device.type):
        output = model(images)                               # transformers': an object
    logits = sum(output) if isinstance(output, tuple) else output.logits
    logits.float().square().mean().backward()


def race_models(size, args):
    """Inference, and forward and backward, of the distilled models: both heads."""
    ours = deit.create_model(size, distilled=True).eval()
    theirs = timm.create_model(f"deit_{size}_distilled_patch16_224").eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(BATCH[args.device][size], 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images[:2]), theirs(images[:2]), atol=1e-5, rtol=0)
    theirs.set_distilled_training(True)

    dim, heads = deit.SIZES[size]
    others = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(
        hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim, num_labels=1000))
    if args.compile:
        ours.compile()

    images = images.to(args.device)
    for what, run in (("inference", inference), ("forward and backward", forward_and_backward)):
        for model in (ours, theirs, others):
            model.to(args.device).train(run is forward_and_backward)
        race(f"{size}: {what}, batch {len(images)}", lambda: run(ours, images),
             {"timm": lambda: run(theirs, images), "transformers": lambda: run(others, images)},
             len(images), args)


class Batches(list):
    """In the place of a loader: (pixels, labels) of 1,000 classes."""
    dataset = SimpleNamespace(images=SimpleNamespace(classes=range(1000)))


def race_training(size, args):
    """Optimizer and moving average alone, then whole steps from the host's memory on."""
    device, is_cuda, batch = args.device, args.device == "cuda", BATCH[args.device][size]
    number = 20 if is_cuda else 1
    labels = torch.randint(1000, (batch,), pin_memory=is_cuda)

    # train.py's; as many repeats as leave two views of each number, to be mixed
    recipe = train.Recipe(model=size, batch_size=batch, repeats=min(3, batch // 2), ema=EMA,
                          precision="bf16" if is_cuda else "fp32")
    pixels = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8, pin_memory=is_cuda)
    loader = Batches([(pixels, labels)] * number)
    ours = deit.create_model(size, drop_path=0.1).to(device)
    average = copy.deepcopy(ours).requires_grad_(False)
    models = {"model": ours, "averaged_model": average}
    optimizer = torch.optim.AdamW(train.parameter_groups(ours, 0.05), lr=1e-6, fused=True)
    world = evaluate.World(1, 1, 0, torch.device(device))    # rank 1 shows no progress bar
    progress = train.Progress(None, recipe, world, number, 0)
    if args.compile:
        ours.compile()

    def our_steps():
        train.train_epoch(0, recipe, world, loader, models, ours, None, optimizer,
                          torch.amp.GradScaler(device, enabled=False), progress)

    # The official way: float images from the host, timm's model and mixing, float16 with a
    # scaler, .item() and synchronize in each step, an average updated tensor by tensor.
    theirs = timm.create_model(f"deit_{size}_patch16_224", drop_path_rate=0.1).to(device).train()
    their_average = timm.utils.ModelEmaV2(theirs, EMA)
    their_optimizer = timm.optim.create_optimizer_v2(theirs, "adamw", 1e-6, 0.05)
    scaler = torch.amp.GradScaler(device, enabled=is_cuda)
    mixing = timm.data.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=1000)
    images = torch.randn(batch, 3, 224, 224, pin_memory=is_cuda)

    def official_steps():
        for _ in range(number):
            mixed, targets = mixing(images.to(device, non_blocking=True),
                                    labels.to(device, non_blocking=True))
            with autocast(device, torch.float16):
                loss = torch.sum(-targets * F.log_softmax(theirs(mixed), dim=-1), dim=-1).mean()
            loss.item()
            their_optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(their_optimizer)
            scaler.update()
            wait_for(device)
            their_average.update(theirs)

    for parameter in (*ours.parameters(), *theirs.parameters()):
        parameter.grad = torch.randn_like(parameter)

    def our_updates():
        for _ in range(5):
            optimizer.step()
            train.update_average(average, ours, EMA)

    def official_updates():
        for _ in range(5):
            their_optimizer.step()
            their_average.update(theirs)

    race(f"{size}: optimizer and EMA, steps/s", our_updates, {"official": official_updates}, 5,
         args)
    race(f"{size}: whole step, batch {batch}", our_steps, {"official": official_steps},
         number * batch, args)


def race_teachers(args):
    """Ours frozen, and on a GPU in float16, as train.py has it; torchvision's as it is."""
    name = "regnet_y_1_6gf" if args.quick else "regnet_y_16gf"
    images = torch.randn(BATCH[args.device]["teacher"], 3, 224, 224, device=args.device)
    half = images.half() if images.is_cuda else images
    theirs = teacher.create_regnet(name).eval().to(args.device)
    ours = teacher.freeze(copy.deepcopy(theirs)).to(half.dtype)
    if args.compile:
        ours.compile()
    race(f"{name}, batch {len(images)}", lambda: ours(half),
         {"torchvision": lambda: inference(theirs, images)}, len(images), args)


def draw_images(folder):
    """JPEGs of noise, coarse and fine, as hard to decode as ImageNet's."""
    rng = np.random.default_rng(0)
    Path(folder, "class").mkdir()
    for n in range(LOADER_IMAGES):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (38, 50, 3), np.uint8))
        pixels = rng.normal(coarse.resize((500, 375)), 9).clip(0, 255)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(f"{folder}/class/{n}.jpg", quality=94)


def posterize(image, bits, **_):
    """timm's, but to 0 bits as well, where Pillow 13 raises an error."""
    return image.point(lambda value: value & ~(2 ** (8 - bits) - 1))


timm.data.auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize


def timm_loader(root, indices, args, batch_size, **how):
    transform = timm.data.create_transform(224, interpolation="bicubic", **how)
    return DataLoader(Subset(ImageFolder(root, transform), indices), batch_size=batch_size,
                      num_workers=args.workers, persistent_workers=args.workers > 0,
                      pin_memory=torch.cuda.is_available())


def race_loaders(root, args):
    """Views of training images, and evaluation. timm's leave the loader as floats, normalized
    and erased, ours as bytes: the rest is the device's work, which the second row counts too."""
    images, device = data.Folder(root), torch.device(args.device)
    chosen = range(0, len(images), max(1, len(images) // LOADER_IMAGES))[:LOADER_IMAGES]
    sampler = data.RepeatedAugSampler(len(chosen), batch_size=48)
    sampler.parts *= 3                                       # all images, not a third of them
    ours = data.train_loader(Subset(images, chosen), sampler, 224, workers=args.workers)
    theirs = timm_loader(root, [index for index in chosen for _ in range(3)], args, 48,
                         is_training=True, color_jitter=0.3, re_prob=0.25, re_mode="pixel",
                         auto_augment="rand-m9-mstd0.5-inc1")

    def take(loader, is_normalized=True):
        sampler.set_epoch(sampler.epoch + 1)                 # other views in each round
        for pixels, _ in loader:
            pixels = pixels.to(device)
            if not is_normalized:
                data.erase(data.normalize(pixels))

    opponents = {"timm": lambda: take(theirs)}
    race("loader, views/s", lambda: take(ours), opponents, 48 * len(sampler), args)
    race("and normalized, erased, views/s", lambda: take(ours, is_normalized=False), opponents,
         48 * len(sampler), args)

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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, races = parser.add_argument, ["loader", "models", "training", "teacher"]
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the models run (cpu)")
    add("--compile", action="store_true", help="torch.compile our models")
    add("--quick", action="store_true", help="one round, tiny alone, a smaller teacher")
    add("--rounds", type=int, help="how many are counted (4)")
    add("--sizes", nargs="+", choices=deit.SIZES, help="of the models (all)")
    add("--only", nargs="+", choices=races, default=races, help="some of the races (all)")
    add("--images", metavar="DIR", help="class folders of photographs, in place of drawn images")
    add("--threads", type=int, default=1, help="of the CPU, for the models (1)")
    add("--workers", type=int, default=2, help="of each loader (2)")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 4)
    args.sizes = args.sizes or (["tiny"] if args.quick else [*deit.SIZES])
    torch.set_num_threads(args.threads)

    versions = [f"{it.__name__} {it.__version__}" for it in (torch, timm, transformers, PIL)]
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} thread(s)"
    print(where, f"{args.workers} workers", f"{args.rounds} round(s)", *versions, sep=", ")
    print(f"\n{'images/s':<38}{'ours':>9}{'theirs':>9}  {'who':<14}ratio")
    if "loader" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            if not args.images:
                draw_images(folder)
            race_loaders(args.images or folder, args)
    for size in args.sizes:
        if "models" in args.only:
            race_models(size, args)
        if "training" in args.only:
            race_training(size, args)
    if "teacher" in args.only:
        race_teachers(args)


if __name__ == "__main__":
    main()
