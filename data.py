"""What the model sees: augmentation, repeated augmentation, mixup and CutMix, datasets.

Section 6 and table 9 of "Training data-efficient image transformers & distillation through
attention" (https://arxiv.org/abs/2012.12877). In the paper's ablation (table 8) DeiT-B
loses 2.2 points without RandAugment, 5.3 without repeated augmentation, 6.0 without mixup
and CutMix, and diverges without erasing.

    python data.py DIR           draws contact_sheet.png: the paper's augmentation
    python data.py DIR --check   opens every image and names the unreadable ones

DIR has train/ and val/ with a folder of images per class, or is one of the names demo and
cifar10.

The loader's workers decode, crop, augment and deliver bytes. The device normalizes, erases
and mixes. A view depends only on (seed, epoch, image, view number), and not on the worker
that makes it. Shapes: B views, S pixels, K classes.
"""
import argparse
import hashlib
import os
import sys
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import datasets, transforms
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

BICUBIC = Image.Resampling.BICUBIC
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILL = (124, 116, 104)               # the mean in bytes, for pixels from outside the image


def seed_from(*numbers):
    """A 64-bit seed from non-negative integers. Zeros at the end do not change it."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# --------------------------------------------------------------------------------------
# RandAugment "rand-m9-mstd0.5-inc1": the operations of timm, pixel by pixel


def operations(image, r, s):
    """{name: function} of an RGB Pillow image, at magnitude r in [0, 1] (larger is stronger)
    and with a sign s, +1 or -1, where there are two directions."""
    def affine(*matrix):         # output (x, y) is input (a x + b y + c, d x + e y + f)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, BICUBIC,
                               fillcolor=FILL)

    factor = 1 + s * 0.9 * r     # 1 leaves the image as it is
    shear = s * 0.3 * r
    shift = s * 0.45 * r
    # Posterize keeps 4 bits at r = 0 and none at r = 1: black. There Pillow 13 raises an
    # error, in about one image of 660.
    mask = 256 - 2 ** (4 + int(4 * r))
    added = int(110 * r)

    return {
        # the first three have no magnitude
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),

        "Rotate": lambda: image.rotate(s * 30 * r, BICUBIC, fillcolor=FILL),
        "Posterize": lambda: image.point(lambda value: value & mask),
        "Solarize": lambda: ImageOps.solarize(image, 256 - int(256 * r)),
        "SolarizeAdd": lambda: image.point(lambda value: value + added if value < 128 else value),

        "Color": lambda: ImageEnhance.Color(image).enhance(factor),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),

        "ShearX": lambda: affine(1, shear, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, shear, 1, 0),
        "TranslateX": lambda: affine(1, 0, shift * image.width, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, shift * image.height),
    }


class RandAugment:
    """Two operations on an RGB image, drawn with replacement; each is applied with
    probability 1/2 and a magnitude from Normal(9, 0.5), clipped to [0, 10].

    torchvision's RandAugment has other operations, other strengths and no probability.
    """

    def __init__(self, magnitude=9.0):
        self.magnitude = magnitude

    def __call__(self, image):
        for choice in torch.randint(15, (2,)):               # two of the fifteen operations
            if torch.rand(()) < 0.5:
                continue
            magnitude = torch.normal(self.magnitude, 0.5, ()).clamp(0, 10).item()
            sign = 1 if torch.rand(()) < 0.5 else -1
            apply = list(operations(image, magnitude / 10, sign).values())[choice]
            image = apply()
        return image


# --------------------------------------------------------------------------------------
# An image to a view


def random_resized_crop(image, image_size):
    """A random part of the image, area 8 % to 100 %, aspect 3/4 to 4/3, resized to S x S.

    The resizing is torch's bicubic, in a quarter of Pillow's time: on photographs 0.3 % of
    the values differ by 1 (at most 2) from the Pillow of the paper's time.
    """
    box = transforms.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
    crop = np.array(transforms.functional.crop(image, *box))            # (height, width, 3)
    crop = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)             # channels last: faster
    crop = F.interpolate(crop, (image_size, image_size), mode="bicubic", antialias=True)
    return Image.fromarray(crop[0].permute(1, 2, 0).numpy())


def train_transform(image_size, *, rand_augment=9.0):
    """RGB Pillow image to a random uint8 view (3, S, S): crop, flip, RandAugment of that
    magnitude (0 turns it off). At 32 pixels or less, as officially, there is no zoom: the
    image is resized to S, padded with 4 black pixels and cropped to S x S."""
    if image_size <= 32:
        steps = [transforms.Resize(image_size, BICUBIC),
                 transforms.RandomCrop(image_size, padding=4)]
    else:
        steps = [partial(random_resized_crop, image_size=image_size)]

    steps.append(transforms.RandomHorizontalFlip())
    if rand_augment:
        steps.append(RandAugment(rand_augment))
    return transforms.Compose([*steps, transforms.PILToTensor()])


def short_side(image_size, crop_ratio=0.875):
    """Short side after resizing, before the center crop. At 32 pixels or less, as
    officially, there is no crop."""
    return image_size if image_size <= 32 else int(image_size / crop_ratio)


def resize_short_side(image, pixels):
    """Bicubic, aspect kept. First horizontally, then vertically: the order Pillow used when
    the numbers were published; Pillow 13 reverses it for images more than twice as tall as
    wide."""
    width = int(pixels * image.width / min(image.size))
    height = int(pixels * image.height / min(image.size))
    return image.resize((width, image.height), BICUBIC).resize((width, height), BICUBIC)


def eval_transform(image_size, *, crop_ratio=0.875):
    """RGB Pillow image to the uint8 view (3, S, S) used for the published numbers."""
    return transforms.Compose([
        partial(resize_short_side, pixels=short_side(image_size, crop_ratio)),
        transforms.CenterCrop(image_size),
        transforms.PILToTensor(),
    ])


# --------------------------------------------------------------------------------------
# Repeated augmentation


class RepeatedAugSampler(Sampler):
    """In each epoch a third of the images, and `repeats` = 3 views of each (section 6).

    The epoch is one list of views, those of an image side by side, cut into parts of
    `batch_size` views. The ranks take the parts in turn, `accum_steps` parts for each step,
    so every step sees the same views on any number of processes. Officially the views of
    an image are on different ranks; here they share a part and the image is decoded once.

    Yields this rank's parts as lists of (epoch, image, view number). Raises ValueError if
    the images do not fill one step.
    """

    def __init__(self, num_images, rank=0, world_size=1, *, batch_size=1, accum_steps=1,
                 repeats=3, seed=0):
        global_batch = batch_size * world_size * accum_steps
        if num_images < global_batch:
            raise ValueError(f"{num_images} training images are fewer than one batch of "
                             f"{global_batch}: use a smaller --batch-size")
        self.num_images = num_images
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.repeats = repeats

        self.seed = seed
        self.epoch = 0
        self.steps = num_images // global_batch
        self.parts = self.steps * accum_steps                # of each rank in an epoch

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.parts

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_from(self.seed, self.epoch))
        images = torch.randperm(self.num_images, generator=generator).tolist()
        for part in range(self.rank, self.parts * self.world_size, self.world_size):
            views = range(part * self.batch_size, (part + 1) * self.batch_size)
            yield [(self.epoch, images[v // self.repeats], v % self.repeats) for v in views]


class TrainBatches(Dataset):
    """The part for a list of (epoch, image, view number), as the sampler gives them: views
    (B, 3, S, S) in uint8 and labels (B,). Each view has a seed of its own."""

    def __init__(self, images, image_size, *, rand_augment=9.0, seed=0):
        self.images = images
        self.transform = train_transform(image_size, rand_augment=rand_augment)
        self.seed = seed

    def __getitem__(self, request):
        views, labels = [], []
        decoded = None
        for epoch, index, view in request:
            if index != decoded:                             # an image's views are neighbors
                image, label = self.images[index]
                decoded = index
            # of the CPU's generator alone: torch.manual_seed asks for the GPUs each time
            torch.default_generator.manual_seed(seed_from(self.seed, epoch, index, view))
            views.append(self.transform(image))
            labels.append(label)
        return default_collate(views), torch.tensor(labels)


# --------------------------------------------------------------------------------------
# On the device: normalize, erase, mix


def normalize(pixels):
    """uint8 (B, 3, S, S) to float32 with ImageNet's mean and standard deviation."""
    images = pixels.float().div_(255)    # in place: on a CPU three times faster than / 255
    for channel, mean, std in zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD):
        channel.sub_(mean).div_(std)
    return images


def erase(images, probability=0.25):
    """Fills, with that probability, one rectangle of each image with standard normal noise,
    in place: area 2 % to 33 %, aspect 0.3 to 1/0.3 (table 9)."""
    for image in images:                                                # (3, S, S)
        if torch.rand(()) < probability:
            # value=[0.0], since with None it would draw the noise as well, on the CPU
            top, left, height, width, _ = transforms.RandomErasing.get_params(
                image, (0.02, 1 / 3), (0.3, 1 / 0.3), value=[0.0])
            if height < image.shape[1]:                      # else ten draws did not fit
                image[:, top:top + height, left:left + width].normal_()
    return images


def mix(images, labels, num_classes, *, repeats=3, mixup=0.8, cutmix=1.0):
    """Mixup or CutMix, half of the time each: images (B, 3, S, S), changed in place, and
    labels (B,) to (images, targets (B, K)). Targets sum to 1 and are not smoothed.

    `mixup` and `cutmix` are the alphas of Beta(alpha, alpha); 0 leaves one out. There is
    one draw of mode, lambda and box for each view number: images[0::repeats],
    images[1::repeats], ... are shuffled and each is mixed with its neighbor. So the views
    of an image get independent draws and partners and never meet each other. Officially
    they sit on different GPUs, each of which draws for its batch. A group of one view
    stays as it is.
    """
    targets = F.one_hot(labels, num_classes).float()                    # (B, K)
    kinds = [kind(alpha=alpha, num_classes=num_classes)
             for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    if not kinds:
        return images, targets

    for view in range(min(repeats, len(images))):
        group = torch.arange(view, len(images), repeats, device=images.device)
        group = group[torch.randperm(len(group), device=images.device)]
        if len(group) > 1:
            kind = kinds[torch.randint(len(kinds), ())]
            images[group], targets[group] = kind(images[group], labels[group])
    return images, targets


# --------------------------------------------------------------------------------------
# Folders of images. images[i] is (RGB Pillow image, label), images.classes the names.

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif",
           ".tiff", ".webp", ".gif")
SKIPPED = (".", "@", "$", "__")      # how the names of hidden and system folders begin


def read_rgb(path):
    """An image as RGB. Its EXIF orientation is ignored, as for the published numbers.
    Raises ValueError naming the path."""
    try:
        if not os.path.isfile(path):                         # a pipe would wait for a writer
            raise FileNotFoundError("no such file, or not a regular one")
        with open(path, "rb") as file:
            if b"ftyp" in file.read(12):
                raise ValueError("it is an AVIF or HEIC file, whatever its name: save it "
                                 "as JPEG")
            # other formats (EPS) make Pillow run external programs
            image = Image.open(file, formats=FORMATS)
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"pixels of mode {image.mode} have no fixed range: save it with 8 bits, "
                    "for instance Image.fromarray((a / a.max() * 255).astype('uint8'))")
            return image.convert("RGB")
    except Exception as error:                               # Pillow raises whatever it meets
        raise ValueError(f"cannot read image {path}: {error} (to train, replace or remove it)"
                         ) from error


def class_folders(root):
    """The names of the class folders, sorted. Raises ValueError if there is none."""
    # not is_file() rather than is_dir(): a broken link is then an error and not skipped
    classes = sorted(entry.name for entry in os.scandir(root)
                     if not entry.is_file() and not entry.name.startswith(SKIPPED))
    if not classes:
        raise ValueError(
            f"{root} has no class folders: move each image to {root}/<class>/. For ImageNet's "
            "flat val/ see README's questions")
    return classes


class Folder(Dataset):
    """root/<class>/.../<image>. Links to files and class folders are followed, links to
    folders inside a class are not. Raises ValueError for a class without images, OSError for
    a folder that cannot be listed.

    torchvision's ImageFolder follows links in circles, counts thumbnails in system folders
    and keeps a list of tuples, of which every worker gets a copy: 300 MB for ImageNet. Here
    paths and labels are tensors, which the workers share.
    """

    def __init__(self, root):
        self.root = str(Path(root))
        self.classes = class_folders(root)
        self.ignored = set()                                 # endings of other files than images
        paths, labels = [], []
        for label, name in enumerate(self.classes):
            files = list_files(self.root, name)
            # as bytes, since a name may not be valid UTF-8
            found = [os.fsencode(file) for file in files
                     if file.lower().endswith(ENDINGS)]
            others = {Path(file).suffix.lower() for file in files} - set(ENDINGS)
            if not found:
                raise ValueError(
                    f"no images in the class folder {root}/{name}: add some or remove it. Images "
                    f"end in {ENDINGS}, its files in {others}")

            self.ignored |= others
            paths += sorted(found)
            labels += [label] * len(found)

        # a row of bytes for each path, relative to the root and filled up with zeros
        self.labels = torch.tensor(labels)
        self.paths = torch.from_numpy(np.array(paths)[:, None].view(np.uint8))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        path = os.fsdecode(self.paths[index].numpy().tobytes().rstrip(b"\0"))
        return read_rgb(os.path.join(self.root, path)), int(self.labels[index])


def list_files(top, name):
    """The paths of the files in the class folder top/name, relative to top."""
    def fail(error):                                         # os.walk would skip the folder
        raise error

    paths = []
    for root, folders, files in os.walk(os.path.join(top, name), onerror=fail):
        folders[:] = [folder for folder in folders if not folder.startswith(SKIPPED)]
        paths += [os.path.join(root[len(top) + 1:], file) for file in files
                  if not file.startswith(SKIPPED)]
    return paths


# --------------------------------------------------------------------------------------
# Datasets by name


def patterns(u, v):
    """{class: where there is ink}; u and v are the distances (0 to 1/2), across and down, to
    the nearest grid line, in units of their spacing."""
    return {
        "bars": v < 0.08,
        "blocks": np.maximum(u, v) > 0.1,
        "checkerboard": (u < 0.25) == (v < 0.25),
        "columns": u < 0.25,
        "diagonals": abs(u - v) < 0.1,
        "dots": np.hypot(u, v) < 0.3,
        "grid": np.minimum(u, v) < 0.06,
        "posts": u < 0.08,
        "rings": abs(np.hypot(u, v) - 0.3) < 0.08,
        "rows": v < 0.25,
    }


class Demo(Dataset):
    """Ten patterns drawn by formula, 4,000 training and 1,000 validation images of 64 x 64
    pixels: a bright color on a dark one, shifted and scaled."""

    classes = list(patterns(0, 0))
    train_size = 4000
    val_size = 1000

    def __init__(self, train):
        self.train = train

    def __len__(self):
        return self.train_size if self.train else self.val_size

    def __getitem__(self, index):
        rng = np.random.default_rng([int(self.train), index])
        label = index % len(self.classes)
        period = rng.uniform(10, 14)
        u, v = (np.arange(64) - rng.uniform(0, 64, (2, 1))) / period
        distances = np.meshgrid(abs(u - u.round()), abs(v - v.round()))
        ink = patterns(*distances)[self.classes[label]][:, :, None]

        dark, bright = rng.uniform(0, 90, 3), rng.uniform(165, 255, 3)
        pixels = dark + (bright - dark) * ink
        return Image.fromarray(pixels.astype(np.uint8)), label


NAMED = {
    "demo": Demo,
    "cifar10": partial(datasets.CIFAR10, "datasets", download=True),
}


def open_split(source, *, train):
    """The training or validation images of `source`: a folder with train/ and val/ (to
    validate, the val folder itself will do) or a name in NAMED, which is downloaded to
    ./datasets. Raises FileNotFoundError or ValueError."""
    if source in NAMED:
        return NAMED[source](train=train)
    root, split = Path(source), Path(source, "train" if train else "val")
    if split.is_dir():
        return Folder(split)
    if train or not root.is_dir() or (root / "train").is_dir():
        raise FileNotFoundError(
            f"no folder {str(split)!r} (rename one of another name): --data takes a "
            "folder with train/ and val/, which hold class folders of images, or "
            f"{', '.join(NAMED)}")
    return Folder(root)


def open_dataset(source):
    """(training images, validation images), of the same two or more classes. Raises
    FileNotFoundError or ValueError."""
    train_images = open_split(source, train=True)
    val_images = open_split(source, train=False)
    train_classes, val_classes = set(train_images.classes), set(val_images.classes)
    if train_classes != val_classes or len(train_classes) < 2:
        # ascii shows how names that look alike differ
        raise ValueError(
            f"{source} needs the same two or more class folders in train/ and val/; train/ "
            f"only: {ascii(sorted(train_classes - val_classes)[:5])}; val/ only: "
            f"{ascii(sorted(val_classes - train_classes)[:5])}")
    return train_images, val_images


def fingerprint(images):
    """A hash of the class names, the number of images and, for folders, their paths."""
    digest = hashlib.sha256(repr((images.classes, len(images))).encode())
    if isinstance(images, Folder):
        digest.update(images.paths.numpy())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------
# Loaders


class EvalImages(Dataset):
    """(uint8 view (3, S, S), label) of each image, as eval_transform makes it."""

    def __init__(self, images, image_size, crop_ratio=0.875):
        self.images = images
        self.transform = eval_transform(image_size, crop_ratio=crop_ratio)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return self.transform(image), label


def train_loader(images, sampler, image_size, *, rand_augment=9.0, workers=None):
    """This rank's parts in the order of the sampler: views (B, 3, S, S) in uint8, labels."""
    batches = TrainBatches(images, image_size, rand_augment=rand_augment, seed=sampler.seed)
    return make_loader(batches, sampler, None, workers)


def eval_loader(images, image_size, *, crop_ratio=0.875, batch_size=64, workers=None, rank=0,
                world_size=1):
    """Batches of (views (B, 3, S, S) in uint8, labels (B,)). Every image goes to one rank,
    once; nothing is padded. Raises ValueError if a rank would get none."""
    if len(images) < world_size:
        raise ValueError(f"{len(images)} images are too few for {world_size} processes")
    dataset = EvalImages(images, image_size, crop_ratio)
    share = range(rank, len(images), world_size)
    return make_loader(dataset, share, batch_size, workers)


def make_loader(dataset, sampler, batch_size, workers):
    """torch's DataLoader. By default each loader has as many workers as this process's share
    of the CPUs, less one for the process itself."""
    if workers is None:
        cpus = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):                 # what Slurm or taskset allow
            cpus = len(os.sched_getaffinity(0))
        workers = max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
    return DataLoader(dataset, sampler=sampler, batch_size=batch_size, num_workers=workers,
                      persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


# --------------------------------------------------------------------------------------
# Pictures of what the model sees, and the check of a folder


def contact_sheet(images, image_size):
    """Pixels (3, height, width) in [0, 1]: a row per picture with its evaluation view and three
    training views, which have the paper's augmentation, mixup and CutMix included."""
    shown = np.random.default_rng(0).permutation(len(images))[:8]
    evaluation = [EvalImages(images, image_size)[index][0] for index in shown]
    request = [(0, index, view) for index in shown for view in range(3)]
    pixels, labels = TrainBatches(images, image_size)[request]
    views, _ = mix(erase(normalize(pixels)), labels, len(images.classes))

    columns = [normalize(torch.stack(evaluation))[:, None], views.unflatten(0, (-1, 3))]
    cells = torch.cat(columns, dim=1).flatten(0, 1)
    return make_grid(cells, nrow=4, normalize=True, value_range=(-2.1, 2.6))


def check(images, name):
    """Opens every image; prints the unreadable ones, what was ignored and the number of images
    of each class. Returns the number of unreadable images."""
    def look(index):
        try:
            return images.classes[images[index][1]]
        except ValueError as error:
            return error

    with ThreadPool() as threads:                            # Pillow decodes in parallel
        found = Counter(tqdm(threads.imap(look, range(len(images))), name, len(images)))
    bad = [error for error in found if isinstance(error, ValueError)]
    counts = found - Counter(bad)
    print(f"{name}: {len(images)} images, {len(bad)} unreadable", *bad, sep="\n  ")

    largest = max(counts.values(), default=0) / len(images)
    print(f"  images per class: {dict(counts)}; the largest class has {largest:.1%}")
    print(f"  other file(s) ignored, with the endings {getattr(images, 'ignored', 'none')}")
    return len(bad)


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=(
        "Draws contact_sheet.png, the paper's augmentation; with --check, opens every image."))
    parser.add_argument("data", metavar="DIR", help="train/ and val/, demo or cifar10")
    parser.add_argument("--check", action="store_true", help="name the unreadable files")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (224)")
    args = parser.parse_args()

    sys.stdout.reconfigure(errors="backslashreplace")        # file names may not be UTF-8
    try:
        train_images, val_images = open_dataset(args.data)
        if args.check:
            sys.exit(check(train_images, "train") + check(val_images, "val") > 0)
        save_image(contact_sheet(train_images, args.image_size), "contact_sheet.png")
        print("contact_sheet.png: a row per picture, its evaluation view and three to train on")
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
