"""What the model sees: augmentation, repeated augmentation, mixup and CutMix, datasets.

Section 6 and table 9 of "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877). In the paper's ablation (table 8) DeiT-B loses 2.2 points without
RandAugment, 6.0 without mixup and CutMix, 5.3 without repeated augmentation, and diverges without erasing.

    python data.py DIR           draws contact_sheet.png: evaluation view, training views, mixup, CutMix
    python data.py DIR --check   opens every image: numbers, sizes, and those that cannot be read

DIR has train/ and val/ with a folder of images per class, or is demo, cifar10, cifar100, flowers102 or pets.
Loader workers decode, crop, augment and deliver bytes; the device normalises, erases and mixes. A view is a
function of (seed, epoch, image, view), and how it is mixed of (seed, step, position), for any number of
workers, and of processes that compute multiples of 16. Shapes: B views, S x S pixels, K classes.
"""
import argparse
import atexit
import ctypes
import hashlib
import math
import os
import shutil
import signal
import sys
import threading
from functools import lru_cache, partial
from multiprocessing import active_children, forkserver, parent_process, pool, set_forkserver_preload
from pathlib import Path

if __name__ == "__main__":                                   # from here on Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate
from torchvision import datasets, transforms
from torchvision.transforms import v2
from tqdm import tqdm

BICUBIC = Image.Resampling.BICUBIC
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)                                  # ImageNet's mean in bytes, for pixels from outside


def seed_from(*numbers):
    """A 64-bit seed from several integers, none negative: the same for the same, unrelated for any others."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0])


# ---- One image to a view, with RandAugment "rand-m9-mstd0.5-inc1" ---------------------------------

# Functions of the image, the magnitude r in [0, 1], with which they grow, and a random sign s = +1 or -1.
# Posterize keeps no bit at r = 1: black here, an error in Pillow 13.
OPERATIONS = {
    "AutoContrast": lambda image, r, s: ImageOps.autocontrast(image),
    "Equalize": lambda image, r, s: ImageOps.equalize(image),
    "Invert": lambda image, r, s: ImageOps.invert(image),
    "Rotate": lambda image, r, s: image.rotate(s * 30 * r, BICUBIC, fillcolor=FILL),
    "Posterize": lambda image, r, s: image.point([v & -(2 ** (4 + int(4 * r))) for v in range(256)] * 3),
    "Solarize": lambda image, r, s: ImageOps.solarize(image, 256 - int(256 * r)),
    "SolarizeAdd": lambda image, r, s: image.point([v + int(110 * r) * (v < 128) for v in range(256)] * 3),
    "Color": lambda image, r, s: ImageEnhance.Color(image).enhance(1 + s * 0.9 * r),
    "Contrast": lambda image, r, s: ImageEnhance.Contrast(image).enhance(1 + s * 0.9 * r),
    "Brightness": lambda image, r, s: ImageEnhance.Brightness(image).enhance(1 + s * 0.9 * r),
    "Sharpness": lambda image, r, s: ImageEnhance.Sharpness(image).enhance(1 + s * 0.9 * r),
    "ShearX": lambda image, r, s: affine(image, 1, s * 0.3 * r, 0, 0, 1, 0),
    "ShearY": lambda image, r, s: affine(image, 1, 0, 0, s * 0.3 * r, 1, 0),
    "TranslateX": lambda image, r, s: affine(image, 1, 0, s * 0.45 * r * image.width, 0, 1, 0),
    "TranslateY": lambda image, r, s: affine(image, 1, 0, 0, 0, 1, s * 0.45 * r * image.height),
}


def affine(image, *matrix):
    """The output at (x, y) is the input at (a x + b y + c, d x + e y + f); centres of pixels are at 1/2."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=FILL)


class RandAugment:
    """Two operations on an RGB image, drawn with replacement, each with probability 1/2 and a magnitude from
    Normal(9, 0.5) clipped to [0, 10]. (torchvision's has other operations, other strengths and no gate.)"""

    def __init__(self, magnitude=9.0, std=0.5):
        self.magnitude, self.std = magnitude, std

    def __call__(self, image):
        for choice in torch.randint(len(OPERATIONS), (2,)).tolist():
            gate, negate = (torch.rand(2) < 0.5).tolist()
            if gate:
                magnitude = min(10.0, max(0.0, torch.normal(self.magnitude, self.std, ()).item()))
                image = list(OPERATIONS.values())[choice](image, magnitude / 10, -1 if negate else 1)
        return image


def random_resized_crop(image, image_size):
    """A random part, area 8 % to 100 %, aspect 3/4 to 4/3, resized to S x S by torch's bicubic in a quarter
    of Pillow's time. On photographs 0.3 % of values differ by 1 (at most 2) from the Pillow of 2020."""
    box = transforms.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
    part = torch.from_numpy(np.array(transforms.functional.crop(image, *box)))
    part = part[None].permute(0, 3, 1, 2)                           # channels-last, which is resized fastest
    part = F.interpolate(part, (image_size, image_size), mode="bicubic", antialias=True)
    return Image.fromarray(part[0].permute(1, 2, 0).numpy())


def train_transform(image_size, *, rand_augment=9.0):
    """RGB Pillow image to a random uint8 view (3, S, S): crop, flip, RandAugment (0 turns that off). At 32
    pixels or less the crop is S x S out of the image resized to S, with 4 pixels of black around it."""
    crop = [partial(random_resized_crop, image_size=image_size)]
    if image_size <= 32:
        crop = [transforms.Resize(image_size, BICUBIC), transforms.RandomCrop(image_size, padding=4)]
    augment = [RandAugment(rand_augment)] if rand_augment else []
    return transforms.Compose([*crop, transforms.RandomHorizontalFlip(), *augment, transforms.PILToTensor()])


def erasing_box(image_size):
    """(top, left, height, width), area 2 % to 33 %, aspect 0.3 to 1/0.3; None if ten draws do not fit."""
    canvas = torch.empty(3, image_size, image_size)
    *box, _ = transforms.RandomErasing.get_params(canvas, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])
    return None if box[2] == image_size else tuple(box)


def short_side(image_size, crop_ratio=0.875):
    """Pixels of the short side before the centre is cut out; at 32 or less nothing is."""
    return image_size if image_size <= 32 else int(image_size / crop_ratio)


def resize_short_side(image, pixels):
    """Bicubic, aspect kept. Columns, then rows: Pillow's order when the numbers were published, which Pillow
    13 turns round for images more than twice as tall as wide."""
    width, height = (int(pixels * side / min(image.size)) for side in image.size)
    return image.resize((width, image.height), BICUBIC).resize((width, height), BICUBIC)


def eval_transform(image_size, *, crop_ratio=0.875):
    """RGB Pillow image to the uint8 view (3, S, S) that the published numbers were measured on."""
    resize = partial(resize_short_side, pixels=short_side(image_size, crop_ratio))
    return transforms.Compose([resize, transforms.CenterCrop(image_size), transforms.PILToTensor()])


# ---- Repeated augmentation ------------------------------------------------------------------------


class RepeatedAugSampler(Sampler):
    """Each epoch draws a third of the images and takes three views of each (section 6).

    An epoch is a list of views, an image's side by side, cut into steps of one global batch and dealt to the
    ranks in pieces of `batch_size`: each step has the same views on any number of processes, and an image is
    decoded once (officially its views are on different ranks). Yields this rank's batches from `first_step`
    on, as (epoch, position of the first view in it, image indices). Raises ValueError."""

    def __init__(self, size, rank=0, world_size=1, *, batch_size=1, accum_steps=1, repeats=3, epochs=1,
                 first_step=0, seed=0):
        global_batch = world_size * batch_size * accum_steps
        if size < global_batch:
            raise ValueError(f"{size} training images are fewer than one batch of {global_batch}: "
                             f"try --batch-size {2 ** int(math.log2(max(1, size / 8)))}")
        self.size, self.rank, self.world_size, self.batch_size = size, rank, world_size, batch_size
        self.accum_steps, self.repeats, self.epochs, self.seed = accum_steps, repeats, epochs, seed
        self.first_step, self.steps = first_step, size // global_batch
        self.distinct_images = math.ceil(self.steps * global_batch / repeats)

    def __iter__(self):
        for epoch in range(self.first_step // self.steps, self.epochs):
            generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
            views = torch.randperm(self.size, generator=generator).repeat_interleave(self.repeats)
            start = max(0, self.first_step - epoch * self.steps)
            for batch in range(start * self.accum_steps, self.steps * self.accum_steps):
                first = (batch * self.world_size + self.rank) * self.batch_size
                yield epoch, first, views[first:first + self.batch_size].tolist()


class TrainBatches(Dataset):
    """The batch for one (epoch, first, indices) of the sampler, each image decoded once: views (B, 3, S, S)
    uint8, labels (B,), `first`, and what to erase, as (view, top, left, height, width, the noise's seed)."""

    def __init__(self, images, image_size, *, repeats=3, rand_augment=9.0, erasing=0.25, seed=0):
        self.images, self.image_size, self.repeats, self.seed = images, image_size, repeats, seed
        self.erasing, self.transform = erasing, train_transform(image_size, rand_augment=rand_augment)

    def __getitem__(self, request):
        epoch, first, indices = request
        decoded = {index: self.images[index] for index in dict.fromkeys(indices)}
        labels, views, boxes = torch.tensor([decoded[index][1] for index in indices]), [], []
        with torch.random.fork_rng(devices=[]):                     # without workers this is the main process
            for position, index in enumerate(indices, first):
                view = position % self.repeats
                torch.default_generator.manual_seed(seed_from(self.seed, epoch, index, view))
                views.append(self.transform(decoded[index][0]))
                if torch.rand(()) < self.erasing and (box := erasing_box(self.image_size)):
                    boxes.append((position - first, *box, torch.randint(2**62, ()).item()))
        boxes = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 6)
        return default_collate(views), labels, first, boxes         # a worker's: in shared memory


# ---- On the device: normalise, erase, mix ---------------------------------------------------------


@lru_cache
def mean_and_std(device):
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]


def normalize(pixels):
    """uint8 (B, 3, S, S) to float32, with ImageNet's mean and standard deviation."""
    mean, std = mean_and_std(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(std)


def denormalize(images):
    """The other way round, as float32 in [0, 1], to be shown."""
    mean, std = mean_and_std(images.device)
    return (images * std + mean).clamp(0, 1)


def erase(images, boxes):
    """Fills the rectangles (on the CPU, rows as TrainBatches gives them) with standard normal noise in place.
    Seeds torch's generators: the noise belongs to the view, in whichever batch it comes."""
    for n, top, left, height, width, seed in boxes.tolist():
        torch.manual_seed(seed)
        images[n, :, top:top + height, left:left + width].normal_()
    return images


def mix(images, labels, num_classes, *, first=0, repeats=3, num_mixes=4, mixup=0.8, cutmix=1.0):
    """Mixup or CutMix, half of the time each: images (B, 3, S, S) and labels (B,) to mixed images and targets
    (B, K), which sum to 1 and are not smoothed. `mixup` and `cutmix` are the alphas of Beta(alpha, alpha); 0
    leaves one out. `num_mixes` mixes (mode, lambda, box) are drawn from torch's global generator and dealt to
    the views in turn, as the official sampler deals views to processes, which draw one each. `first` is the
    batch's position in the epoch. So with `num_mixes` >= `repeats` each view of an image has its own mix, and
    its own partner (see `partners`). Batches of fewer than 2 `repeats` views are left unmixed."""
    targets = F.one_hot(labels, num_classes).float()
    if not (mixup or cutmix) or len(images) < 2 * repeats:
        return images, targets
    own_pixels, own_share = draw_mixes(num_mixes, images, mixup, cutmix)
    group = torch.arange(first, first + len(images), device=images.device) % num_mixes
    partner = partners(len(images), first, repeats, images.device)
    return (torch.lerp(images[partner], images, own_pixels[group]),     # (B, 3, S, S)
            torch.lerp(targets[partner], targets, own_share[group]))    # (B, K)


def draw_mixes(number, images, mixup, cutmix):
    """How much of an image stays its own, `number` times: of each pixel (number, 1, S, S) and of the target
    (number, 1). torchvision draws modes, lambdas and boxes; its transforms apply one to a whole batch."""
    choices = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    own_pixels = torch.ones(number, 1, *images.shape[-2:], device=images.device)
    own_share = torch.ones(number, 1, device=images.device)
    for pixels, share in zip(own_pixels, own_share):
        drawn = choices[torch.randint(len(choices), ())].make_params([images])
        left, top, right, bottom = drawn.get("box", (0, 0, *images.shape[-2:]))      # mixup: all of the image
        pixels[:, top:bottom, left:right] = drawn.get("lam", 0)
        share.fill_(drawn.get("lam", drawn.get("lam_adjusted")))
    return own_pixels, own_share


def partners(number, first, repeats, device=None):
    """The index (B,) of each view's partner, another image for each view: of 16 views the three of an image
    look 3, 8 and 13 back, and round to the end: at least `repeats`, at most 16 - `repeats`, never at an own
    view. If B is a multiple of 16, they stay within 16 consecutive views: processes may divide it."""
    block = 16 if number % 16 == 0 else number
    position = torch.arange(number, device=device)
    view = (first + position) % repeats
    back = repeats + view * (repeats + 2) % (block - 2 * repeats + 1)
    return position // block * block + (position % block - back) % block


# ---- Datasets: images[i] gives (RGB Pillow image, label), images.classes the names of the labels ----

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")      # for some others Pillow starts programs


class BadImage(RuntimeError):
    """An image that cannot be read; the message is its path and the reason."""


def read_rgb(path):
    """An image as RGB, its EXIF orientation ignored, as for the published numbers. Raises BadImage."""
    try:
        if not os.path.isfile(path):                                # a pipe would be waited for
            raise FileNotFoundError("no such file, or not a regular one")
        with open(path, "rb") as file:
            image = Image.open(file, formats=FORMATS)
            if max(image.size) > 1000 * min(image.size):            # gigabytes, resized by its short side
                raise ValueError(f"{image.width} x {image.height} is too narrow")
            if image.mode.startswith("I;16"):                       # which Pillow's own conversion would clip
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no fixed range: save it with 8 bits")
            return image.convert("RGB")
    except Exception as error:                                      # Pillow raises whatever it meets
        raise BadImage(f"cannot read image {path}: {type(error).__name__}: {error}") from None


def class_folders(root):
    """The names of the class folders, sorted. Raises ValueError if there is none."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise ValueError(f"{root} has {len(list_images(str(root))[0])} images but no class folders: move "
                         f"each to {root}/<class>/ (torchvision's datasets.ImageNet sorts a flat val/)")
    return classes


def list_images(folder):
    """(paths of the images below a class folder, relative to it and sorted; number of other, hidden files).
    Links to a folder above, seen before, or elsewhere in the data set (another class) are not followed."""
    paths, others, seen, data_root = [], 0, set(), os.path.realpath(os.path.dirname(folder))
    for root, folders, files in os.walk(folder, followlinks=True):
        here, parent = os.path.realpath(root), os.path.realpath(os.path.dirname(root))
        is_inside = os.path.islink(root) and os.path.commonpath([data_root, here]) == data_root
        if here in seen or is_inside or os.path.commonpath([parent, here]) == here:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        images = [name for name in files if name[0] != "." and datasets.folder.is_image_file(name)]
        paths += [os.path.join(root[len(folder) + 1:], name) for name in images]
        others += len(files) - len(images)
    return sorted(paths), others


class Folder(Dataset):
    """root/<class>/.../<image>. Paths and labels are tensors, which workers share: a worker costs the same
    for a thousand images and for a million. Raises ValueError for a class without images."""

    def __init__(self, root):
        self.root, self.classes = str(root), class_folders(root)
        found = [list_images(os.path.join(root, name)) for name in self.classes]
        empty = [name for name, (paths, _) in zip(self.classes, found) if not paths]
        if empty:
            raise ValueError(f"{len(empty)} class folder(s) under {root} without images: "
                             f"{', '.join(empty[:5])}; fill or remove them")
        self.ignored = sum(others for _, others in found) + sum(map(os.DirEntry.is_file, os.scandir(root)))
        names = [os.fsencode(path) for paths, _ in found for path in paths]
        self.names = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        self.ends = torch.tensor([0, *map(len, names)]).cumsum(0)
        self.labels = torch.tensor([label for label, (paths, _) in enumerate(found) for _ in paths])

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        name = self.names[self.ends[index]:self.ends[index + 1]].numpy().tobytes()
        return os.path.join(self.root, self.classes[self.labels[index]], os.fsdecode(name))

    def __getitem__(self, index):
        return read_rgb(self.path(index)), int(self.labels[index])


def near(t):                                                        # distance to the nearest integer
    return np.abs(t - np.round(t))


# The demo's classes: where a pattern of period 1 has ink; u runs to the right, v downwards.
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
    """Ten patterns drawn by formula, 4,000 training and 1,000 validation images of 64 x 64 pixels: a bright
    colour on a dark one, both random, at a random scale, shifted, turned a little, with pixel noise."""
    classes, train_size, val_size = list(PATTERNS), 4000, 1000

    def __init__(self, train):
        self.train, self.size = train, self.train_size if train else self.val_size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng, label = np.random.default_rng([int(self.train), index]), index % 10
        angle, period, centre = rng.uniform(-0.2, 0.2), rng.uniform(20, 28), rng.uniform(32, 96, 2)
        x, y = np.meshgrid(*((np.arange(128) - c) / period for c in centre))
        cos, sin = math.cos(angle), math.sin(angle)
        ink = PATTERNS[self.classes[label]](x * cos + y * sin, y * cos - x * sin)
        ink = ink.reshape(64, 2, 64, 2).mean(axis=(1, 3))[:, :, None]     # drawn twice as large: smooth edges
        dark, bright = rng.uniform(0, 90, 3), rng.uniform(165, 255, 3)
        pixels = dark * (1 - ink) + bright * ink + rng.normal(0, 8, (64, 64, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), label


def flowers102(train):
    """The paper's split: 2,040 images to train on (its train and val), 6,149 to test on."""
    splits = ("train", "val") if train else ("test",)
    images = ConcatDataset([datasets.Flowers102("datasets", split, download=True) for split in splits])
    images.classes = images.datasets[0].classes
    return images


NAMED = {
    "demo": Demo,
    "cifar10": lambda train: datasets.CIFAR10("datasets", train, download=True),
    "cifar100": lambda train: datasets.CIFAR100("datasets", train, download=True),
    "flowers102": flowers102,
    "pets": lambda train: datasets.OxfordIIITPet("datasets", "trainval" if train else "test", download=True),
}


def open_split(data, *, train):
    """The training or validation half of `data`: a folder with train/ and val/ (to validate, one of class
    folders will do) or a name in NAMED, downloaded to ./datasets. Raises FileNotFoundError or ValueError."""
    if data in NAMED:
        return NAMED[data](train)
    root, name = Path(data), "train" if train else "val"
    if not data or not root.is_dir():
        raise FileNotFoundError(f"no dataset {str(data)!r}: give a folder with train/ and val/ in it, or "
                                f"one of {', '.join(NAMED)}")
    if (root / name).is_dir():
        root = root / name
    elif train or (root / "train").is_dir():
        found = ", ".join(sorted(os.listdir(root))[:5]) or "nothing"
        raise FileNotFoundError(f"no {name}/ folder in {root} (found: {found}): put class folders of "
                                f"images in {root / name}")
    return Folder(root)


def open_dataset(data):
    """(training images, validation images), of the same two or more classes. Raises ValueError else."""
    train, val = open_split(data, train=True), open_split(data, train=False)
    if only := sorted(set(train.classes) ^ set(val.classes)):
        raise ValueError(f"{len(only)} class(es) of {data} are in train/ or val/ only: {', '.join(only[:5])}")
    if len(train.classes) < 2:
        raise ValueError(f"{data} has one class only ({train.classes[0]}): give each class a folder")
    return train, val


def describe_ignored(images):
    """", 3 other file(s) ignored", or nothing."""
    return f", {images.ignored} other file(s) ignored" if getattr(images, "ignored", 0) else ""


def fingerprint(*splits):
    """Hexadecimal digits that change with the classes, the numbers, and a folder's file names and labels."""
    digest = hashlib.sha256()
    for images in splits:
        digest.update(repr((images.classes, len(images))).encode())
        for tensor in (images.names, images.ends, images.labels) if isinstance(images, Folder) else ():
            digest.update(tensor.numpy())
    return digest.hexdigest()[:16]


class EvalImages(Dataset):
    def __init__(self, images, image_size, crop_ratio=0.875):
        self.images, self.transform = images, eval_transform(image_size, crop_ratio=crop_ratio)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return self.transform(image), label


def eval_loader(images, image_size, *, crop_ratio=0.875, batch_size=64, workers=0, rank=0, world_size=1):
    """Batches of (images uint8, labels). Every image goes to one rank, once; nothing is padded."""
    dataset, sampler = EvalImages(images, image_size, crop_ratio), range(rank, len(images), world_size)
    return DataLoader(dataset, sampler=sampler, batch_size=min(batch_size, len(images)),
                      **worker_options(workers, 3 * min(batch_size, len(images)) * image_size**2))


def train_loader(images, sampler, image_size, *, workers=0, **augmentation):
    """Batches as TrainBatches gives them, and with its arguments, in the order of the sampler."""
    dataset = TrainBatches(images, image_size, repeats=sampler.repeats, seed=sampler.seed, **augmentation)
    batch_bytes = 3 * (sampler.batch_size + 32) * image_size**2     # + 64 by half as many, to validate
    return DataLoader(dataset, sampler=sampler, batch_size=None, **worker_options(workers, batch_bytes))


def contact_sheet(images, image_size, *, rows=8, seed=0, mixup=0.8, cutmix=1.0, **augmentation):
    """A Pillow image, a row per picture: evaluation view, three training views, the first mixed both ways."""
    shown = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
    evaluation = torch.stack([EvalImages(images, image_size)[index][0] for index in shown])
    batches, number = TrainBatches(images, image_size, seed=seed, **augmentation), 3 * len(shown)
    pixels, labels, _, boxes = batches[0, 0, np.repeat(shown, 3).tolist()]
    views, names = erase(normalize(pixels), boxes), [images.classes[label] for label in labels]
    columns = {f"evaluation, {image_size} px": (normalize(evaluation), None)}
    columns |= {f"view {view + 1}": (views[view::3], None) for view in range(3)}
    for name, off in [("mixup", "cutmix")] * bool(mixup) + [("CutMix", "mixup")] * bool(cutmix):
        torch.manual_seed(seed)         # labels 0, 1, 2, ...: the targets' diagonal is each view's own share
        mixed, shares = mix(views, torch.arange(number), number, num_mixes=number,
                            **{"mixup": mixup, "cutmix": cutmix, off: 0})
        pairs = zip(shares.diag()[::3], partners(number, 0, 3)[::3])
        columns[f"view 1, {name}"] = mixed[::3], [f"{t:.2f} + {1 - t:.2f}\n{names[j]}" for t, j in pairs]
    return draw_grid(columns, names[::3])


def draw_grid(columns, names):
    """{title: (normalised images (rows, 3, S, S), captions or None)} as one picture, names at the left."""
    font, gap, cell = ImageFont.load_default(12), 6, max(150, next(iter(columns.values()))[0].shape[-1])
    margin = 16 + round(max(104, *map(font.getlength, "\n".join(names).split("\n"))))
    sheet = Image.new("RGB", (margin + len(columns) * (cell + gap), 24 + len(names) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        draw.text((margin - 8, 24 + row * (cell + gap) + cell // 2), name, "black", font, "rm", align="right")
    for column, (title, (images, captions)) in enumerate(columns.items()):
        left = margin + column * (cell + gap)
        draw.text((left + cell // 2, 12), title, "black", font, anchor="mm")
        for row, (image, caption) in enumerate(zip(images, captions or [""] * len(names))):
            top, picture = 24 + row * (cell + gap), transforms.functional.to_pil_image(denormalize(image))
            sheet.paste(picture.resize((cell, cell), Image.NEAREST), (left, top))
            draw.text((left + 4, top + cell - 3), caption, "white", font, "ld", stroke_width=2, stroke_fill=0)
    return sheet


def check(images, name, image_size):
    """Opens every image; prints their sizes and the bad ones; returns the number of these."""
    def look(index):
        try:
            image, label = images[index]
            return label, min(image.size), None
        except Exception as error:
            return -1, 0, str(error) or repr(error)

    with pool.ThreadPool(usable_cpus()) as threads:                 # Pillow decodes outside Python's lock
        seen = threads.imap(look, range(len(images)), chunksize=64)
        labels, sides, errors = zip(*tqdm(seen, f"check {name}", len(images), unit="image"))
    bad, sides = list(filter(None, errors)), sorted(filter(None, sides)) or [0]
    counts = np.bincount([label for label in labels if label >= 0], minlength=len(images.classes))
    small = sum(side < image_size for side in sides)
    print(f"{name}: {len(images)} images, {len(bad)} unreadable{describe_ignored(images)}; {len(counts)} "
          f"classes of {min(counts)} to {max(counts)} readable ones; short side at least {sides[0]}, "
          f"median {sides[len(sides) // 2]} pixels, below {image_size} in {small}")
    print("".join(f"  {reason}\n" for reason in bad), end="")
    return len(bad)


def main():
    parser = argparse.ArgumentParser(description="Draws what the model sees.", allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"data.py: {message} (--help lists the flags)\n")
    parser.add_argument("data", metavar="DIR", help=f"folder with train/ and val/, or {', '.join(NAMED)}")
    parser.add_argument("--check", action="store_true", help="open every image: sizes, the unreadable")
    parser.add_argument("--image-size", type=int, help="pixels of a view (default: the recipe's)")
    parser.add_argument("--recipe", metavar="NAME", help="one of train.py's (default: the paper's)")
    parser.add_argument("--output", default="contact_sheet.png", help="a PNG; default contact_sheet.png")
    typed = vars(parser.parse_args())
    sys.stdout.reconfigure(errors="backslashreplace")               # file names may have undecodable bytes
    output, is_check = typed.pop("output"), typed.pop("check", False)
    try:
        from train import make_recipe                               # here alone: it imports this module
        recipe = make_recipe(typed | {"model": "regnet_y_16gf"})    # which takes any size
        train, val = open_dataset(recipe.data)
        if is_check:
            sys.exit(any([check(train, "train", recipe.image_size), check(val, "val", recipe.image_size)]))
        drawn = {name: getattr(recipe, name) for name in ("rand_augment", "erasing", "mixup", "cutmix")}
        contact_sheet(train, recipe.image_size, **drawn).save(output, format="PNG")
    except Exception as error:                                      # a folder, an image, a flag: a user's
        sys.exit(f"data.py: {error}")
    print(f"{output}: some of {len(train)} training images, {len(train.classes)} classes")


# ---- Processes and speed: how it runs, not what it computes ---------------------------------------


def usable_cpus():
    """CPUs that this process may use: its affinity, and the quota of its container."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):                                   # no cgroup, or no quota ("max")
        return cpus


def worker_options(workers, batch_bytes=0):
    """DataLoader's options; None: as many workers as suit. They come from a fork server: forking a process
    with threads may deadlock. Raises OSError if their batches do not fit into shared memory."""
    keep_freed_memory()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if workers is None:
        cores = usable_cpus() // processes
        workers = max(1, cores if cores < 3 else cores - 1)         # one is the process's, if it is not half
    if not workers:
        return {"pin_memory": torch.cuda.is_available()}
    free = shutil.disk_usage("/dev/shm").free
    needed = 3 * batch_bytes * workers * processes                  # two wait, one is made
    if needed > free:
        raise OSError(f"the loader's workers need {needed / 2**20:,.0f} MiB of shared memory, /dev/shm has "
                      f"{free / 2**20:,.0f}: --ipc=host or a larger --shm-size in Docker, or fewer --workers")
    atexit.register(kill_workers)                                   # a failed run would wait for them
    set_forkserver_preload(["torchvision.transforms.v2", "torchvision.models", "torch.utils.tensorboard"])
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    os.environ["PYTHONSAFEPATH"] = "1"                              # it runs no code of the current folder
    forkserver.ensure_running()                                     # it inherits that signals are ignored
    del os.environ["PYTHONSAFEPATH"]
    for number, handler in before.items():
        signal.signal(number, handler)
    return {"pin_memory": torch.cuda.is_available(), "num_workers": workers, "persistent_workers": True,
            "multiprocessing_context": "forkserver", "worker_init_fn": start_worker}


def kill_workers():
    for worker in active_children():
        worker.kill()


def start_worker(worker):
    """A worker takes no signals (the run needs it to end its step and save) and ends when the run does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    keep_freed_memory()


def keep_freed_memory():
    """Has glibc keep freed memory: fetching each image's pages again costs a tenth of a loader's time."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):      # another C library has none
        mallopt(-3, 32 * 2**20)                                     # M_MMAP_THRESHOLD: its largest value
        mallopt(-1, 256 * 2**20)                                    # M_TRIM_THRESHOLD


if __name__ == "__main__":
    main()
