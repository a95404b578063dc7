"""What the model sees: datasets, augmentation, repeated augmentation, mixup and cutmix.

Section 6 and table 9 of "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877). In the paper's ablation (table 8) DeiT-B loses 2.2 points without
RandAugment, 6.0 without mixup and CutMix, 5.3 without repeated augmentation, and diverges without
erasing.

    python data.py DIR           draws contact_sheet.png: evaluation view, three training views, mixup, cutmix
    python data.py DIR --check   opens every image and lists those that cannot be read

DIR holds train/ and val/ with one folder of images per class, or is a name: demo, cifar10, cifar100,
flowers102, pets.

Workers deliver bytes: uint8 images (B, 3, S, S). Normalising, erasing and mixing happen on the device.
Every draw of a view is a function of (seed, epoch, image, view) and of nothing else, so any batch can be
made again alone.
"""
import argparse
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import threading
from functools import lru_cache, partial
from multiprocessing import forkserver
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate
from torchvision import datasets, transforms
from torchvision.transforms import v2
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seed_from(*numbers):
    """One 64-bit seed from several integers, none negative: the same for the same numbers,
    unrelated for any others."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------------------------------------------
# RandAugment, as "rand-m9-mstd0.5-inc1": the table of operations

FILL = (124, 116, 104)                                              # ImageNet's mean, for pixels from outside


def slide(image, slope, offset):
    """Shears and moves along the rows: output pixel (x, y) samples the input at (x + slope y + offset, y).

    The pixels of Pillow's transform(AFFINE, BICUBIC), in half its time: no row has to be interpolated with
    its neighbours. A cubic with a = -1 through four pixels of the row, in doubles; coordinates are those of
    pixel centres, edge pixels repeat, and what lies outside is FILL. Pixels are moved as whole 32-bit words
    (red, green, blue and the byte that Pillow keeps beside them) and computed with as four bytes.
    """
    (width, height), fill = image.size, np.array([*FILL, 255], np.uint8).view(np.uint32)
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    rows = np.arange(height)[:, None]
    differing = rows if slope else rows[:1]                         # a mere move is the same in all rows
    position = np.arange(width) + 0.5 + slope * (differing + 0.5) + offset
    inside = (position >= 0) & (position < width)
    if not inside.any():
        return Image.new("RGB", image.size, FILL)
    seen = slice(inside.any(axis=0).argmax(), width - inside.any(axis=0)[::-1].argmax())
    position = position[:, seen] - 0.5
    along = np.arange(position.shape[1])
    start = np.floor(position[:, :1]).astype(np.int64)              # each next pixel starts one further on
    t = np.repeat(position - (start + along), 4, axis=1)            # 0 to 1, once per byte of a pixel
    columns = (start + np.arange(-1, len(along) + 2)).clip(0, width - 1)
    taps = pixels.take(columns + width * rows).view(np.uint8).astype(np.int16)
    p0, p1, p2, p3 = (taps[:, 4 * tap:4 * (tap + len(along))] for tap in range(4))
    first, last = p0 - p1, p2 - p3
    values = t * -(first + last)                # (((-p0 + p1 - p2 + p3) t + 2 p0 - 2 p1 + p2 - p3) t
    values += 2 * first + last                  #   + p2 - p0) t + p1, in Pillow's order: from the inside out
    values *= t
    values += p2 - p0
    values *= t
    values += p1
    moved = np.full((height, width), fill)
    moved[:, seen] = values.astype(np.int16).clip(0, 255).astype(np.uint8).view(np.uint32)
    return Image.frombytes("RGB", image.size, np.where(inside, moved, fill), "raw", "RGBX")


def slide_down(image, slope, offset):
    """The same along the columns: samples at (x, y + slope x + offset)."""
    turn = Image.Transpose.TRANSPOSE
    return slide(image.transpose(turn), slope, offset).transpose(turn)


def posterize(image, bits):
    """Keeps the highest bits of each channel. Written out since 0 bits, which is black, is an
    error in Pillow 13."""
    return image.point([value & ~(2 ** (8 - bits) - 1) for value in range(256)] * 3)


def solarize_add(image, amount):
    return image.point([min(255, value + amount) if value < 128 else value for value in range(256)] * 3)


def sharpen(image, factor):
    """The pixels of Pillow's ImageEnhance.Sharpness, in a third of its time: blends the image, with weight
    `factor`, and itself smoothed by (1 1 1, 1 5 1, 1 1 1) / 13. The border is not smoothed."""
    pixels = np.array(image)
    inner = pixels[1:-1, 1:-1]
    rows = pixels[:-2].astype(np.uint16) + pixels[1:-1] + pixels[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * inner.astype(np.uint16)
    inner[...] = (2 * sums + 13) // 26                              # to the nearest: 13 is odd, so none is half-way
    return Image.blend(Image.fromarray(pixels), image, factor)


# Each operation gets the image, the magnitude r in [0, 1], and a random sign s = +1 or -1.
# All grow stronger with r.
OPERATIONS = {
    "AutoContrast": lambda image, r, s: ImageOps.autocontrast(image),
    "Equalize": lambda image, r, s: ImageOps.equalize(image),
    "Invert": lambda image, r, s: ImageOps.invert(image),
    "Rotate": lambda image, r, s: image.rotate(s * 30 * r, Image.Resampling.BICUBIC, fillcolor=FILL),
    "Posterize": lambda image, r, s: posterize(image, 4 - int(4 * r)),
    "Solarize": lambda image, r, s: ImageOps.solarize(image, 256 - int(256 * r)),
    "SolarizeAdd": lambda image, r, s: solarize_add(image, int(110 * r)),
    "Color": lambda image, r, s: ImageEnhance.Color(image).enhance(1 + s * 0.9 * r),
    "Contrast": lambda image, r, s: ImageEnhance.Contrast(image).enhance(1 + s * 0.9 * r),
    "Brightness": lambda image, r, s: ImageEnhance.Brightness(image).enhance(1 + s * 0.9 * r),
    "Sharpness": lambda image, r, s: sharpen(image, 1 + s * 0.9 * r),
    "ShearX": lambda image, r, s: slide(image, s * 0.3 * r, 0),
    "ShearY": lambda image, r, s: slide_down(image, s * 0.3 * r, 0),
    "TranslateX": lambda image, r, s: slide(image, 0, s * 0.45 * r * image.width),
    "TranslateY": lambda image, r, s: slide_down(image, 0, s * 0.45 * r * image.height),
}


class RandAugment:
    """Two operations drawn with replacement from the fifteen, each applied with probability 1/2 and a
    magnitude from Normal(9, 0.5), clipped to [0, 10]. Takes and gives an RGB Pillow image; draws from
    torch's global generator.

    torchvision's transform of the same name is another augmentation: other operations, no
    gate, other strengths.
    """

    def __init__(self, magnitude=9.0, std=0.5):
        self.magnitude, self.std = magnitude, std

    def __call__(self, image):
        for choice in torch.randint(len(OPERATIONS), (2,)).tolist():
            gate, negate = (torch.rand(2) < 0.5).tolist()
            if gate:
                magnitude = min(10.0, max(0.0, torch.normal(self.magnitude, self.std, ()).item()))
                image = list(OPERATIONS.values())[choice](image, magnitude / 10, -1 if negate else 1)
        return image


# ---------------------------------------------------------------------------------------------------
# One image to uint8 pixels


def pixels_of(image):
    """RGB Pillow image, or what this made of one, to uint8 (1, 3, H, W): channels last, as
    torch resizes fastest."""
    if isinstance(image, torch.Tensor):
        return image
    return torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)


def pillow_of(pixels):
    return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


def random_resized_crop(pixels, image_size):
    """A random part, area 8 % to 100 %, aspect 3/4 to 4/3, resized to (1, 3, S, S).

    By torch's bicubic, in a quarter of Pillow's time. Torch's weights have 16 bits, Pillow's 22, and Pillow
    13 takes the rows before the columns for some shapes, which shows where a value leaves 0..255 between
    the two. In images like photographs 3 to 6 values in a hundred differ by 1 and hardly any by more; the
    harder the edges, the more (in black and white noise we saw 15 in a hundred by more than 1, up to 30).
    Evaluation is left to Pillow.
    """
    top, left, height, width = transforms.RandomResizedCrop.get_params(pixels, (0.08, 1), (3 / 4, 4 / 3))
    part = pixels[..., top:top + height, left:left + width]
    return F.interpolate(part, (image_size, image_size), mode="bicubic", antialias=True)


def train_transform(image_size, *, rand_augment=9.0, resize="torch"):
    """RGB Pillow image, or its `pixels_of`, to a random uint8 view (3, S, S): crop, flip, RandAugment (0
    turns that off). With resize="pillow", for an image only, the crop is the installed Pillow's to the
    pixel, as timm's and the official code's are, and takes four times as long (see `random_resized_crop`).
    Raises ValueError for another `resize`.

    At 32 pixels or less the crop is the one for small images: S x S out of the image padded
    by 4 pixels of black.
    """
    if resize not in ("torch", "pillow"):
        raise ValueError(f"resize={resize!r}: it must be torch or pillow")
    bicubic, by_torch = v2.InterpolationMode.BICUBIC, resize == "torch"
    if image_size <= 32:
        crop = [v2.Resize(image_size, bicubic), v2.RandomCrop(image_size, padding=4)]
    elif by_torch:
        crop = [partial(random_resized_crop, image_size=image_size)]
    else:
        crop = [transforms.RandomResizedCrop(image_size, (0.08, 1), (3 / 4, 4 / 3), bicubic)]
    crop.append(transforms.RandomHorizontalFlip())
    augment = [RandAugment(rand_augment)] if rand_augment else []
    return transforms.Compose([*([pixels_of, *crop, pillow_of] if by_torch else crop), *augment,
                               transforms.PILToTensor()])


def short_side(image_size, crop_ratio=0.875):
    """Pixels to which the short side is resized before the centre is cut out; at 32 or less
    nothing is cut off."""
    return image_size if image_size <= 32 else int(image_size / crop_ratio)


def resize_short_side(image, pixels):
    """Bicubic, aspect kept. Columns, then rows: Pillow's order when the numbers were published, which Pillow
    13 turns round for images more than twice as tall as wide (in noise every third value is another)."""
    width, height = image.size
    size = ((pixels, int(pixels * height / width)) if width <= height else
            (int(pixels * width / height), pixels))
    return image.resize((size[0], height), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)


def eval_transform(image_size, *, crop_ratio=0.875):
    """RGB Pillow image to the uint8 view (3, S, S) of the published numbers: short side to int(S / 0.875),
    bicubic, then the centre."""
    resize = partial(resize_short_side, pixels=short_side(image_size, crop_ratio))
    return transforms.Compose([resize, transforms.CenterCrop(image_size), transforms.PILToTensor()])


def erasing_box(image_size):
    """(top, left, height, width) of the rectangle to erase, area 2 % to 33 % of the image, aspect 0.3 to
    1/0.3; None in the rare case that ten draws give none that fits."""
    canvas = torch.empty(3, image_size, image_size)
    top, left, height, width, _ = transforms.RandomErasing.get_params(
        canvas, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])
    return None if height == image_size else (top, left, height, width)


# ---------------------------------------------------------------------------------------------------
# Repeated augmentation


class RepeatedAugSampler(Sampler):
    """Each epoch draws a third of the images and takes three views of each (repeated
    augmentation, section 6).

    Rank `rank` of `world_size` gets `batch_size` samples at a time. The epoch is one list of views, those
    of an image next to each other; global batch after global batch is cut from it and dealt to the ranks
    in pieces. So 1, 2 or 8 processes with the same global batch see the same views in every step, and the
    views of an image share a local batch. (The official sampler gives them to different ranks; without
    torchrun it silently repeats nothing.)

    An epoch has size // global batch optimiser steps, rounded to a number in which every drawn image gets
    all its views (ImageNet at 1024: 1,251 steps, 427,008 images). Iterating gives this rank's image
    indices; `batches` gives them batch by batch, with their views. `repeats=1` is plain shuffling. Raises
    ValueError if there is not one global batch.
    """

    def __init__(self, size, rank=0, world_size=1, *, batch_size=1, accum_steps=1, repeats=3, seed=0):
        global_batch = world_size * batch_size * accum_steps
        if size < global_batch:
            raise ValueError(f"{size} training images are fewer than one batch of {global_batch}: "
                             f"--batch-size {2 ** int(math.log2(max(1, size)))} or less")
        self.size, self.rank, self.world_size, self.batch_size = size, rank, world_size, batch_size
        self.accum_steps, self.repeats, self.seed = accum_steps, repeats, seed
        whole = repeats // math.gcd(repeats, global_batch)          # steps after which no image is cut in two
        self.steps = max(whole, size // global_batch // whole * whole)
        self.distinct_images = self.steps * global_batch // repeats
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        """Chooses the epoch's order; `first_step` leaves out the steps that an interrupted
        run has done already."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self):
        return (self.steps - self.first_step) * self.accum_steps * self.batch_size

    def __iter__(self):
        for _, draws in self.batches():
            yield from (index for index, _ in draws)

    def batches(self):
        """Yields (epoch, [(index, view), ...]) per batch of this rank, all first views before
        all second ones."""
        generator = torch.Generator().manual_seed(seed_from(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)[: self.distinct_images].tolist()
        for batch in range(self.first_step * self.accum_steps, self.steps * self.accum_steps):
            start = (batch * self.world_size + self.rank) * self.batch_size
            draws = [(order[p // self.repeats], p % self.repeats)
                     for p in range(start, start + self.batch_size)]
            # stable: within a view, in the epoch's order
            yield self.epoch, sorted(draws, key=lambda draw: draw[1])


class Batches(Sampler):
    """What the DataLoader iterates: the sampler's batches."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler) // self.sampler.batch_size

    def __iter__(self):
        return self.sampler.batches()


class TrainBatches(Dataset):
    """Turns one entry of `RepeatedAugSampler.batches` into a batch, reading and decoding each image once.

    Gives images (B, 3, S, S) uint8, labels (B,), the image indices (B,), and the rectangles to erase, one
    row each: (position in the batch, top, left, height, width).
    """

    def __init__(self, images, image_size, *, rand_augment=9.0, erasing=0.25, resize="torch", seed=0):
        self.images, self.image_size, self.erasing, self.seed = images, image_size, erasing, seed
        self.transform = train_transform(image_size, rand_augment=rand_augment, resize=resize)
        self.by_torch = resize == "torch"

    def __getitem__(self, request):
        epoch, draws = request
        decoded = {}
        for index in dict(draws):
            image, label = self.images[index]
            decoded[index] = pixels_of(image) if self.by_torch else image, label
        views, boxes = [], []
        with torch.random.fork_rng(devices=[]):                     # with no workers this is the main process
            for position, (index, view) in enumerate(draws):
                torch.default_generator.manual_seed(seed_from(self.seed, epoch, index, view))
                views.append(self.transform(decoded[index][0]))
                if torch.rand(()) < self.erasing and (box := erasing_box(self.image_size)):
                    boxes.append((position, *box))
        indices = torch.tensor([index for index, _ in draws])
        labels = torch.tensor([decoded[index][1] for index, _ in draws])
        boxes = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 5)
        return default_collate(views), labels, indices, boxes       # in a worker straight into shared memory


def usable_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def worker_options(workers):
    """DataLoader's options for its workers. They come from a fork server and stay: to fork the training
    process itself, full of threads, once per epoch is to deadlock sooner or later."""
    if not workers:
        return {"pin_memory": torch.cuda.is_available()}
    multiprocessing.set_forkserver_preload(["torchvision.transforms.v2", "torchvision.models",
                                            "torch.utils.tensorboard"])
    # signals to the whole process group are not for the server either: it inherits that they are ignored
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGTERM, before)
    return {"pin_memory": torch.cuda.is_available(), "num_workers": workers, "persistent_workers": True,
            "multiprocessing_context": "forkserver", "worker_init_fn": start_worker}


def start_worker(worker):
    live_and_die_with_the_run()
    keep_freed_memory()


def keep_freed_memory():
    """Asks glibc, where that is the C library, to hold on to what is freed: images come and go, and to fetch
    every page of theirs from the system again costs a worker a tenth of its time."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 32 * 2**20)                                     # M_MMAP_THRESHOLD: its largest value
        mallopt(-1, 256 * 2**20)                                    # M_TRIM_THRESHOLD


def live_and_die_with_the_run():
    """Ctrl-C and Slurm signal every process at once, but the run needs a few batches more to end its step
    and save: a worker ignores SIGINT and obeys SIGTERM 20 seconds late. If the run was killed, so is the
    worker: its own parent, the fork server, would keep it for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(20))
    run = multiprocessing.parent_process()
    threading.Thread(target=lambda: (run.join(), os._exit(1)), daemon=True).start()


def train_loader(images, sampler, image_size, *, workers=0, **augmentation):
    """Batches as TrainBatches gives them, and with its arguments, in the order of `sampler` (call its
    set_epoch before each epoch)."""
    dataset = TrainBatches(images, image_size, **augmentation)
    return DataLoader(dataset, sampler=Batches(sampler), batch_size=None, **worker_options(workers))


# ---------------------------------------------------------------------------------------------------
# Evaluation


class EvalImages(Dataset):
    """Images (3, S, S) uint8 as `eval_transform` cuts them, with their labels."""

    def __init__(self, images, image_size, crop_ratio):
        self.images, self.transform = images, eval_transform(image_size, crop_ratio=crop_ratio)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return self.transform(image), label


def eval_loader(images, image_size, *, crop_ratio=0.875, batch_size=64, workers=0, rank=0, world_size=1):
    """Batches of (images uint8, labels). Every image goes to one rank, once; nothing is padded."""
    return DataLoader(EvalImages(images, image_size, crop_ratio), batch_size=batch_size,
                      sampler=range(rank, len(images), world_size), **worker_options(workers))


# ---------------------------------------------------------------------------------------------------
# On the device: normalise, erase, mix


def to_device(batches, device):
    """The batches of a train_loader, with pixels and labels on the device. On a GPU each is copied on a
    stream of its own, while the step before it computes."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for pixels, labels, *rest in batches:
        with torch.cuda.stream(stream):                             # does nothing if there is none
            pixels, labels = (tensor.to(device, non_blocking=True) for tensor in (pixels, labels))
        if stream:
            torch.cuda.current_stream(device).wait_stream(stream)
            for tensor in (pixels, labels):                         # not to be freed before they are read
                tensor.record_stream(torch.cuda.current_stream(device))
        yield pixels, labels, *rest


@lru_cache
def mean_and_std(device):
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]


def normalize(pixels):
    """uint8 (B, 3, S, S) to float32, with ImageNet's mean and standard deviation."""
    mean, std = mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


def erase(images, boxes):
    """Fills each rectangle of `boxes` (on the CPU, rows as TrainBatches gives them) with standard normal
    noise, in place."""
    for position, top, left, height, width in boxes.tolist():
        images[position, :, top:top + height, left:left + width].normal_()
    return images


def mix(images, labels, indices, num_classes, *, mixup=0.8, cutmix=1.0, group=256):
    """Mixup or CutMix, each for half of the batches: the images and their targets (B, K),
    which sum to 1, unsmoothed.

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha); 0 leaves that one out. Every `group` images
    or fewer share one choice, lambda and box, as in one process of the official runs. Each image is mixed
    with its neighbour, which by the layout of the batch is another image; where it is not (a batch of few
    images), the group stays as it is. What comes back is in the order of the groups.
    """
    choices = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    choices += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    groups = math.ceil(len(images) / group) if choices else 1
    mixed = []
    for first in range(groups):                               # a group: every groups-th image from `first` on
        part, part_labels, numbers = (tensor[first::groups] for tensor in (images, labels, indices))
        if choices and (numbers != numbers.roll(1)).all():
            mixed.append(choices[torch.randint(len(choices), ())](part, part_labels))
        else:
            mixed.append((part, F.one_hot(part_labels, num_classes).float()))
    return mixed[0] if groups == 1 else tuple(map(torch.cat, zip(*mixed)))


# ---------------------------------------------------------------------------------------------------
# Datasets: anything that gives (RGB Pillow image, label)


class Split(NamedTuple):
    """One half of a dataset: `images[i]` gives (RGB Pillow image, label); `classes[label]` is its name."""
    images: Dataset
    classes: list


class BadImage(RuntimeError):
    """An image that cannot be read; the message is its path and the reason."""


def read_rgb(path):
    """Opens any image Pillow knows, as RGB, without regard to EXIF orientation, as the
    published numbers did."""
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            if image.mode.startswith("I;16"):                       # which Pillow's own conversion would clip
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no fixed range: save it with 8 bits")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:                                    # Pillow raises anything from struct to zlib
        raise BadImage(f"cannot read image {path}: {type(error).__name__}: {error}") from None


def is_image(path):
    name = os.path.basename(path)
    return not name.startswith(".") and name.lower().endswith(datasets.folder.IMG_EXTENSIONS)


def class_folders(directory):
    """The names of the class folders, sorted. Raises ValueError if there is none."""
    entries = [entry for entry in os.scandir(directory) if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        loose = sum(is_image(entry.name) for entry in entries)
        raise ValueError(f"{directory} has {loose} images but no class folders: move each image into a "
                         f"folder named for its class, {directory}/<class>/<image> (for ImageNet's flat "
                         "val/, torchvision's datasets.ImageNet or the usual valprep script sorts them)")
    return classes


class Folder(datasets.ImageFolder):
    """torchvision's ImageFolder without hidden files and folders, and with errors that say what to do."""

    def __init__(self, root):
        self.folder, self.ignored = root, 0
        super().__init__(root, loader=read_rgb, is_valid_file=self.is_wanted, allow_empty=True)
        empty = sorted(set(range(len(self.classes))) - set(self.targets))
        if empty:
            names = ", ".join(self.classes[label] for label in empty[:5])
            raise ValueError(f"{len(empty)} class folder(s) under {root} without images: {names}; "
                             "fill or remove them")

    def is_wanted(self, path):
        hidden = any(part.startswith(".") for part in os.path.relpath(path, self.folder).split(os.sep))
        wanted = is_image(path) and not hidden
        self.ignored += not wanted
        return wanted

    def find_classes(self, directory):
        classes = class_folders(directory)
        # loose beside the class folders
        self.ignored += sum(is_image(entry.name) for entry in os.scandir(directory))
        return classes, {name: label for label, name in enumerate(classes)}


def near(t):
    """Distance of each number to the nearest integer, 0 to 1/2."""
    return np.abs(t - np.round(t))


# The demo's classes: where a pattern of period 1 has ink, as a function of coordinates u to the
# right and v downwards.
PATTERNS = {
    "bricks": lambda u, v: np.minimum(near(v), 2 * near(u / 2 + np.floor(v) / 2)) > 0.08,
    "checkerboard": lambda u, v: np.floor(u) % 2 == np.floor(v) % 2,
    "columns": lambda u, v: near(u) < 0.25,
    "crosses": lambda u, v: (np.minimum(near(u), near(v)) < 0.08) & (np.maximum(near(u), near(v)) < 0.3),
    "dots": lambda u, v: np.hypot(near(u), near(v)) < 0.3,
    "grid": lambda u, v: np.minimum(near(u), near(v)) < 0.06,
    "holes": lambda u, v: np.hypot(near(u), near(v)) > 0.3,
    "rings": lambda u, v: near(np.hypot(u, v)) < 0.22,
    "rows": lambda u, v: near(v) < 0.25,
    "zigzags": lambda u, v: near(v + near(u)) < 0.17,
}


class Demo(Dataset):
    """Ten patterns drawn by formula: 4,000 training and 1,000 validation images of 64 x 64 pixels,
    deterministic, no files.

    A bright colour on a dark one, both random, at a random scale, shifted, turned a little,
    with pixel noise.
    """
    classes, train_size, val_size = list(PATTERNS), 4000, 1000

    def __init__(self, train):
        self.train, self.size = train, self.train_size if train else self.val_size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng, label = np.random.default_rng([int(self.train), index]), index % 10
        angle, period, centre = rng.uniform(-0.2, 0.2), rng.uniform(20, 28), rng.uniform(32, 96, 2)
        x, y = np.meshgrid(*((np.arange(128) - c) / period for c in centre))
        cos, sin = math.cos(angle), math.sin(angle)
        ink = PATTERNS[self.classes[label]](x * cos + y * sin, y * cos - x * sin)
        # drawn at twice the size, for smooth edges
        ink = ink.reshape(64, 2, 64, 2).mean(axis=(1, 3))[:, :, None]
        dark, bright = rng.uniform(0, 90, 3), rng.uniform(165, 255, 3)
        pixels = dark * (1 - ink) + bright * ink + rng.normal(0, 8, (64, 64, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), label


def flowers102(root, train):
    """The paper's split: 2,040 images to train on (its train and val), 6,149 to test on."""
    parts = [datasets.Flowers102(root, split, download=True)
             for split in (("train", "val") if train else ("test",))]
    images = ConcatDataset(parts)
    images.classes = parts[0].classes
    return images


NAMED = {
    "demo": lambda root, train: Demo(train),
    "cifar10": lambda root, train: datasets.CIFAR10(root, train=train, download=True),
    "cifar100": lambda root, train: datasets.CIFAR100(root, train=train, download=True),
    "flowers102": flowers102,
    "pets": lambda root, train: datasets.OxfordIIITPet(root, "trainval" if train else "test", download=True),
}


def open_split(data, *, train):
    """The training or validation half of `data`: a folder with train/ and val/, or a name in NAMED, which
    torchvision downloads to ./datasets. For validation a folder of class folders will do too. Raises
    FileNotFoundError or ValueError that name the folder and the remedy."""
    if data in NAMED:
        images = NAMED[data]("datasets", train)
        return Split(images, images.classes)
    root, name = Path(data), "train" if train else "val"
    if not root.is_dir():
        raise FileNotFoundError(f"no dataset {str(data)!r}: give a folder with train/ and val/ in it, or "
                                f"one of {', '.join(NAMED)}")
    if (root / name).is_dir():
        root = root / name
    elif train or (root / "train").is_dir():
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"no {name}/ folder in {root} (found: {found}): put class folders of "
                                f"images in {root / name}")
    folder = Folder(root)
    return Split(folder, folder.classes)


def describe_ignored(*splits):
    """", 3 other files ignored", or nothing."""
    ignored = sum(getattr(split.images, "ignored", 0) for split in splits)
    return f", {ignored} other file(s) ignored" if ignored else ""


def open_dataset(data):
    """(training split, validation split), of the same classes. Raises ValueError where those differ."""
    train, val = open_split(data, train=True), open_split(data, train=False)
    if train.classes != val.classes:
        only = {"train/": sorted(set(train.classes) - set(val.classes)),
                "val/": sorted(set(val.classes) - set(train.classes))}
        parts = [f"{len(names)} only in {side} ({', '.join(names[:3])})"
                 for side, names in only.items() if names]
        raise ValueError(f"train/ and val/ of {data} have different classes: {', '.join(parts)}; "
                         "they must be the same")
    if len(train.classes) < 2:
        raise ValueError(f"{data} has one class only ({train.classes[0]}): give each class a folder of its "
                         "own in train/ and val/")
    return train, val


# ---------------------------------------------------------------------------------------------------
# The contact sheet


def contact_sheet(split, image_size, *, rows=8, seed=0):
    """A Pillow image: one row per picture, from left to right the evaluation view, three
    training views as they reach the model before mixing, then the first view mixed with a
    neighbouring row by mixup and by cutmix."""
    spread = torch.randperm(len(split.images), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
    evaluation = torch.stack([eval_transform(image_size)(split.images[index][0]) for index in spread])
    rows, draws = len(spread), [(index, view) for view in range(3) for index in spread]
    pixels, labels, indices, boxes = TrainBatches(split.images, image_size, seed=seed)[0, draws]
    torch.manual_seed(seed)
    views = erase(normalize(pixels), boxes)
    mixed = []
    for only in ({"cutmix": 0}, {"mixup": 0}):                   # groups of two: several lambdas on one sheet
        pairs = [mix(*part, len(split.classes), group=2, **only)[0]
                 for part in zip(views[:rows].split(2), labels[:rows].split(2), indices[:rows].split(2))]
        mixed.append(torch.cat(pairs))
    columns = [normalize(evaluation), *views.split(rows), *mixed]
    titles = ["evaluation", "view 1", "view 2", "view 3", "mixup", "cutmix"]
    return draw_grid(columns, titles, [split.classes[label] for label in labels[:rows]])


def draw_grid(columns, titles, names):
    """Columns of normalised images (rows, 3, S, S) as one picture with titles above and class
    names at the left."""
    mean, std = mean_and_std(torch.device("cpu"))
    side, gap, margin = columns[0].shape[-1], 6, 120
    cell = max(side, 150)                                              # room for the titles over small images
    sheet = Image.new("RGB", (margin + len(columns) * (cell + gap), 24 + len(names) * (cell + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, name in enumerate(names):
        name = name if len(name) <= 15 else f"..{name[-13:]}"            # the end tells file names apart
        draw.text((margin - 8, 24 + row * (cell + gap) + cell // 2), name, "black", font, anchor="rm")
    for column, (images, title) in enumerate(zip(columns, titles)):
        left = margin + column * (cell + gap)
        draw.text((left + cell // 2, 12), title, "black", font, anchor="mm")
        for row, image in enumerate(images):
            pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST),
                        (left, 24 + row * (cell + gap)))
    return sheet


def check(split, name, workers):
    """Opens every image; prints the bad ones and returns their number."""
    def problem(index):
        try:
            split.images[index]
        except Exception as error:
            return str(error)

    with ThreadPool(workers) as pool:                               # Pillow decodes outside Python's lock
        reasons = pool.imap(problem, range(len(split.images)), chunksize=64)
        bad = [reason for reason in tqdm(reasons, f"check {name}", len(split.images), unit="image") if reason]
    print(f"{name}: {len(split.images)} images, {len(split.classes)} classes{describe_ignored(split)}, "
          f"{len(bad)} unreadable", *bad, sep="\n  ")
    return len(bad)


def main():
    parser = argparse.ArgumentParser(
        description="Draws a contact sheet of what the model will see, or checks every image.")
    parser.add_argument("data", metavar="DIR",
                        help=f"folder with train/ and val/, or one of {', '.join(NAMED)}")
    parser.add_argument("--check", action="store_true",
                        help="open every image and list those that cannot be read")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of a view (default 224)")
    parser.add_argument("--rows", type=int, default=8, help="pictures on the sheet (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other views (default 0)")
    parser.add_argument("--workers", type=int, default=usable_cpus(),
                        help="threads for --check (default: usable CPUs)")
    parser.add_argument("--output", default="contact_sheet.png",
                        help="where the sheet goes (default contact_sheet.png)")
    args = parser.parse_args()
    folder, suffix = Path(args.output).parent, Path(args.output).suffix.lower()
    if min(args.rows, args.image_size, args.workers) < 1 or not 0 <= args.seed < 2**63:
        sys.exit("data.py: --rows, --image-size and --workers must be 1 or more, --seed from 0 to 2^63 - 1")
    if suffix not in (".png", ".jpg", ".jpeg", ".webp") or not folder.is_dir():
        sys.exit(f"data.py: --output {args.output}: give the name of a .png, .jpg or .webp in a folder that exists")
    try:
        train, val = open_dataset(args.data)
        if args.check:
            sys.exit(1 if check(train, "train", args.workers) + check(val, "val", args.workers) else 0)
        contact_sheet(train, args.image_size, rows=args.rows, seed=args.seed).save(args.output)
    except (OSError, ValueError, BadImage) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped")
    print(f"{args.output}: {min(args.rows, len(train.images))} of {len(train.images)} training images, "
          f"{len(train.classes)} classes")


if __name__ == "__main__":
    main()
