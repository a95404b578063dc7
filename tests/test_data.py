"""What the model sees, against timm, Pillow, definitions and counting."""
import collections
import contextlib
import io
import math
import os
import pickle
import platform
import random
import re
import resource
import subprocess
import sys
import threading
from functools import lru_cache
from io import BytesIO
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment
from torchvision import transforms

import data
import train
from conftest import ROOT, run_main, write_folder

BICUBIC = Image.Resampling.BICUBIC


def photo(width=97, height=61, seed=0):
    """Smooth structure and noise, so that every operation has something to change."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), BICUBIC)
    noisy = np.asarray(coarse, np.int64) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def noise(width, height, levels=256):
    """Unlike any photograph: with two levels every edge overshoots."""
    pixels = np.random.default_rng(0).integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
    return Image.fromarray(pixels.astype(np.uint8))


# ---------------------------------------------------------------------------------------------------
# RandAugment

TIMM_OPERATIONS = dict(zip(data.OPERATIONS, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))


@pytest.mark.parametrize("name", data.OPERATIONS)
def test_randaugment_operation_is_timms_pixel_by_pixel(name, monkeypatch):
    settings = {"interpolation": BICUBIC, "img_mean": data.FILL}
    strongest = 9.7 if name == "Posterize" else 10.0             # at 10 timm's posterize crashes on Pillow 13
    for magnitude in (0.0, 3.3, 7.4, 8.61, 9.0, strongest):
        operation = auto_augment.AugmentOp(TIMM_OPERATIONS[name], prob=1.0, magnitude=magnitude, hparams=settings)
        for sign in (1, -1):
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.9 if sign < 0 else 0.1)
            for seed in range(3):
                image = photo(seed=seed)
                ours = data.OPERATIONS[name](image, magnitude / 10, sign)
                assert ours.tobytes() == operation(image).tobytes(), (magnitude, sign)


def test_randaugment_covers_timms_fifteen_operations_in_order():
    plain = [name.removesuffix("Increasing").removesuffix("Rel") for name in auto_augment._RAND_INCREASING_TRANSFORMS]
    assert list(data.OPERATIONS) == plain and len(plain) == 15


def test_posterize_at_full_strength_is_black():
    assert data.OPERATIONS["Posterize"](photo(), 1.0, 1).getextrema() == 3 * ((0, 0),)


def test_randaugment_draws_operations_gates_magnitudes_and_signs_as_the_recipe(monkeypatch):
    calls = []
    spies = {name: lambda image, r, s, name=name: calls.append((name, r, s)) or image for name in data.OPERATIONS}
    monkeypatch.setattr(data, "OPERATIONS", spies)
    torch.manual_seed(0)
    per_image = []
    for _ in range(6000):
        before = len(calls)
        data.RandAugment()(None)
        per_image.append(len(calls) - before)
    shares = [per_image.count(n) / 6000 for n in range(3)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    names, magnitudes, signs = zip(*calls)
    assert max(abs(n / len(calls) - 1 / 15) for n in collections.Counter(names).values()) < 0.02
    assert np.mean(signs) == pytest.approx(0, abs=0.05)
    magnitudes = 10 * np.array(magnitudes)
    assert magnitudes.max() == 10 and np.mean(magnitudes == 10) == pytest.approx(0.0226, abs=0.01)
    assert np.median(magnitudes) == pytest.approx(9, abs=0.05)
    assert np.quantile(magnitudes, 0.1587) == pytest.approx(8.5, abs=0.05)


# ---------------------------------------------------------------------------------------------------
# Views


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (1, 40), (224, 224), (37, 37), (801, 603)])
@pytest.mark.parametrize("image_size", [224, 384])
def test_evaluation_view_is_the_short_side_resized_and_the_centre_cut(size, image_size):
    image = photo(*size)
    short = int(image_size / 0.875)
    width, height = size
    if width <= height:
        new = (short, int(short * height / width))
    else:
        new = (int(short * width / height), short)
    left, top = round((new[0] - image_size) / 2), round((new[1] - image_size) / 2)
    expected = image.resize(new, BICUBIC).crop((left, top, left + image_size, top + image_size))
    view = data.eval_transform(image_size)(image)
    assert view.dtype == torch.uint8 and torch.equal(view, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def resize_columns(pixels, size):
    """(H, W, 3) bytes to (H, size, 3) by the definition of Pillow's bicubic: a = -1/2, widened by the scale where it
    shrinks, weights in 22 bits, the sum rounded to a byte."""
    width = pixels.shape[1]
    centres = (np.arange(size) + 0.5) * width / size
    distance = np.abs(np.arange(width) + 0.5 - centres[:, None]) / max(1, width / size)
    weights = np.select([distance < 1, distance < 2], [1.5 * distance**3 - 2.5 * distance**2 + 1,
                                                      -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2], 0)
    weights = np.round(weights / weights.sum(axis=1, keepdims=True) * 2**22)
    return ((weights @ pixels.astype(float) + 2**21) // 2**22).clip(0, 255).astype(np.uint8)       # exact in doubles


def resize_as_pillow_did_until_12(image, width, height):
    """Columns first, whatever the shape, as when the numbers were published."""
    return resize_columns(resize_columns(np.asarray(image), width).swapaxes(0, 1), height).swapaxes(0, 1)


@pytest.mark.parametrize("width, height", [(300, 900), (900, 300), (400, 300)])
def test_evaluation_resizes_the_columns_first_as_pillow_did_until_12(width, height):
    image = noise(width, height)
    ours = data.resize_short_side(image, 256)
    assert np.array_equal(np.asarray(ours), resize_as_pillow_did_until_12(image, *ours.size))


def test_small_images_are_evaluated_whole():
    image = photo(32, 32)
    assert torch.equal(data.eval_transform(32)(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_normalizing_bytes_is_the_usual_chain():
    image = photo(64, 64)
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])
    assert torch.equal(data.normalize(transforms.PILToTensor()(image)[None])[0], usual(image))


def test_training_crops_follow_the_recipes_areas(monkeypatch):
    sizes, interpolate = [], F.interpolate

    def watch(crop, *args, **kwargs):
        sizes.append(crop.shape[2:])
        return interpolate(crop, (8, 8), mode="nearest")
    monkeypatch.setattr(data.F, "interpolate", watch)
    torch.manual_seed(0)
    transform, image = data.train_transform(64, rand_augment=0), photo(400, 400)
    for _ in range(2000):
        transform(image)
    heights, widths = np.array(sizes).T
    areas = heights * widths / 160_000
    assert 0.079 <= areas.min() < 0.1 and areas.max() <= 1 and np.mean(areas) == pytest.approx(0.49, abs=0.03)
    assert 0.74 < (widths / heights).min() and (widths / heights).max() < 1.35


@pytest.mark.parametrize("image, image_size", [(photo(500, 375), 224), (photo(256, 256), 224), (noise(64, 64), 48),
                                               (noise(64, 64, levels=2), 48)])
def test_training_crops_are_bicubic_and_at_most_two_levels_off(image, image_size):
    differences = []
    for seed in range(10):
        torch.manual_seed(seed)
        ours = np.asarray(data.random_resized_crop(image, image_size), np.int64)
        torch.manual_seed(seed)                                     # so the same box is drawn
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
        part = image.crop((left, top, left + width, top + height))
        differences.append(np.abs(ours - resize_as_pillow_did_until_12(part, image_size, image_size)))
    assert np.max(differences) <= 2 and np.mean(np.array(differences) > 0) < 0.006


def test_views_of_small_images_are_padded_crops():
    torch.manual_seed(0)
    image, seen = Image.new("RGB", (32, 32), (255, 255, 255)), set()
    for _ in range(300):
        view = data.train_transform(32, rand_augment=0)(image)
        assert view.shape == (3, 32, 32)
        seen.add((int((view[0].amax(1) == 0).sum()), int((view[0].amax(0) == 0).sum())))
    assert max(rows for rows, _ in seen) == 4 and max(columns for _, columns in seen) == 4   # never scaled, 4 at most


def test_erasing_boxes_have_the_recipes_areas_and_aspects():
    torch.manual_seed(0)
    boxes = np.array([box for box in (data.erasing_box(224) for _ in range(3000)) if box])
    assert len(boxes) > 2950
    areas, aspects = boxes[:, 2] * boxes[:, 3] / 224**2, boxes[:, 2] / boxes[:, 3]
    assert areas.min() > 0.018 and areas.max() < 0.34 and areas.mean() == pytest.approx(0.17, abs=0.01)
    assert aspects.min() > 0.28 and aspects.max() < 3.6 and np.median(aspects) == pytest.approx(1, abs=0.1)


def test_erasing_puts_normal_noise_in_the_box_and_nowhere_else():
    images = data.erase(torch.full((3, 3, 64, 64), 7.0), torch.tensor([[1, 4, 8, 40, 50, 0]]))
    erased = images != 7.0
    assert erased[1, :, 4:44, 8:58].all() and erased.sum() == 3 * 40 * 50
    assert abs(images[erased].mean()) < 0.05 and abs(images[erased].std() - 1) < 0.05


# ---------------------------------------------------------------------------------------------------
# Repeated augmentation


@pytest.mark.parametrize("size", [10, 255, 256, 300])
@pytest.mark.parametrize("world_size, batch_size", [(1, 1), (1, 8), (2, 4), (8, 1)])
def test_each_drawn_image_but_the_last_comes_three_times_per_epoch(size, world_size, batch_size):
    ranks = [data.RepeatedAugSampler(size, rank, world_size, batch_size=batch_size) for rank in range(world_size)]
    batches = [[indices for _, _, indices in sampler] for sampler in ranks]
    assert {len(of_rank) for of_rank in batches} == {size // (world_size * batch_size)}
    counts = collections.Counter(index for of_rank in batches for indices in of_rank for index in indices)
    assert sorted(counts.values())[1:] == [3] * (len(counts) - 1) and set(counts) <= set(range(size))


def views_of(request, repeats=3):
    """The (image, view) pairs that a batch asks for."""
    _, first, indices = request
    return [(index, (first + n) % repeats) for n, index in enumerate(indices)]


@pytest.mark.parametrize("global_batch, accum_steps", [(24, 1), (32, 1), (32, 2), (48, 4)])
def test_any_number_of_processes_sees_the_same_views_in_every_step(global_batch, accum_steps):
    def steps(world_size, parts):
        local = global_batch // world_size // parts
        samplers = [data.RepeatedAugSampler(500, rank, world_size, batch_size=local, accum_steps=parts, seed=3)
                    for rank in range(world_size)]
        views = [list(map(views_of, sampler)) for sampler in samplers]
        return [sorted(draw for rank in views for batch in rank[step * parts:(step + 1) * parts] for draw in batch)
                for step in range(samplers[0].steps)]

    reference = steps(1, 1)
    assert all(len(set(step)) == global_batch for step in reference)
    assert steps(2, accum_steps) == steps(4, 1) == reference


def test_imagenet_at_1024_gives_the_published_epoch():
    sampler = data.RepeatedAugSampler(1_281_167, 0, 4, batch_size=256)
    assert (sampler.steps, sampler.distinct_images) == (1251, 427_008)


def test_a_sampler_goes_on_in_the_middle_and_each_epoch_has_its_own_order():
    def batches(first_step):
        return list(data.RepeatedAugSampler(500, 1, 2, batch_size=8, accum_steps=2, epochs=3, first_step=first_step))

    whole = batches(0)
    assert len(whole) == 3 * 15 * 2 and all(batches(step) == whole[2 * step:] for step in (1, 14, 15, 22, 45))
    orders = [[indices for epoch, _, indices in whole if epoch == number] for number in range(3)]
    assert orders[0] != orders[1] != orders[2]


class Counting(torch.utils.data.Dataset):
    """Counts how often each image is read."""

    def __init__(self, number=60):
        self.number, self.reads = number, collections.Counter()

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        self.reads[index] += 1
        return photo(50, 50, seed=index), index % 10


def test_each_image_of_a_batch_is_decoded_once():
    images = Counting()
    request = next(iter(data.RepeatedAugSampler(60, batch_size=30)))
    pixels, labels, _, _ = data.TrainBatches(images, 48)[request]
    assert len(images.reads) == 10 and set(images.reads.values()) == {1}
    assert pixels.shape == (30, 3, 48, 48) and pixels.dtype == torch.uint8
    assert labels.tolist() == [index % 10 for index in request[2]]
    assert len({view.numpy().tobytes() for view in pixels}) == 30        # three different views of each


def test_a_view_depends_on_seed_epoch_image_and_view_only():
    def views(first, indices, epoch=4, seed=5):
        pixels, _, _, boxes = data.TrainBatches(Counting(), 48, seed=seed)[epoch, first, indices]
        return {draw: (pixel.numpy().tobytes(), [box[1:] for box in boxes.tolist() if box[0] == n])
                for n, (draw, pixel) in enumerate(zip(views_of((epoch, first, indices)), pixels))}

    whole = views(0, [index for index in range(20) for _ in range(3)])
    torch.manual_seed(99)
    assert views(2, [7])[7, 2] == whole[7, 2]
    part = views(31, list(range(19, 4, -1)))
    assert part == {draw: whole[draw] for draw in part}
    assert any(box for _, box in whole.values()) and not all(box for _, box in whole.values())
    assert len({pixels for pixels, _ in whole.values()}) == 60
    assert views(2, [7], epoch=5)[7, 2] != whole[7, 2] != views(2, [7], seed=6)[7, 2]


def test_batches_do_not_depend_on_the_workers(shared_folder):
    def batches(workers):
        sampler = data.RepeatedAugSampler(48, batch_size=8, epochs=2, seed=3)
        return data.train_loader(data.open_split(shared_folder, train=True), sampler, 48, workers=workers)

    for ours, reference in zip(batches(2), batches(0), strict=True):
        assert all(torch.equal(*pair) if torch.is_tensor(pair[0]) else pair[0] == pair[1]
                   for pair in zip(ours, reference, strict=True))


class Churning(torch.utils.data.Dataset):
    """Each item allocates and frees 16 MB and is the number of pages that the process had to fetch for it."""

    def __len__(self):
        return 20

    def __getitem__(self, number):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [np.ones(2**21, np.uint8) for _ in range(8)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_workers_keep_their_memory():
    faults = list(torch.utils.data.DataLoader(Churning(), batch_size=None, **data.worker_options(1)))
    assert faults[0] > 1000 and max(faults[-10:]) < 100


@pytest.mark.parametrize("cores, processes, expected", [(1, 1, 1), (2, 1, 2), (8, 1, 7), (8, 4, 2), (2, 4, 1), (64, 4, 15)])
def test_a_process_keeps_one_of_its_cores_unless_it_has_two_or_less(cores, processes, expected, monkeypatch):
    monkeypatch.setattr(data, "usable_cpus", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert data.worker_options(None)["num_workers"] == expected


def test_workers_run_no_code_that_lies_in_the_current_folder(tmp_path):
    """Python itself would import these for the fork server, which is started with -c."""
    for name in ("struct", "selectors", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "elsewhere").mkdir()
    program = tmp_path / "elsewhere" / "main.py"
    program.write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\nimport torch\nimport data\n"
                       "if __name__ == '__main__':\n"
                       "    print(*torch.utils.data.DataLoader([1, 2], **data.worker_options(1)))\n")
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "tensor([1])" in done.stdout, done.stderr
    assert sys.version_info < (3, 11) or not (tmp_path / "executed").exists()


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_refused(monkeypatch):
    """Those that train, and with them half as many that validate, 64 images at a time."""
    needed = 3 * (2 * 8 + 1 * 64) * 3 * 48 * 48 * 4                      # batches of each, views, bytes, processes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    sampler = data.RepeatedAugSampler(60, batch_size=8)
    for free, workers in ((needed, 2), (0, 0)):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        data.train_loader(Counting(), sampler, 48, workers=workers)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match="need 6 MiB of shared memory, /dev/shm has 6: .*--shm-size"):
        data.train_loader(Counting(), sampler, 48, workers=2)


# ---------------------------------------------------------------------------------------------------
# Mixup and CutMix, as the training loop applies them


def feed(loop_batches, recipe, size, num_classes, processes=1, parts=1):
    """What the training loop gives the model in an epoch on `processes`, each computing its share of a batch in
    `parts`: (images, targets) of all views, in the epoch's order. `loop_batches(sampler)` stands for the loader."""
    given, layer = {}, torch.nn.Linear(1, 1)
    meter = SimpleNamespace(next_batch=next, add=lambda *_: None, end_step=lambda *_, **__: 0)
    for rank in range(processes):
        sampler = data.RepeatedAugSampler(size, rank, processes, batch_size=recipe.batch_size // processes // parts,
                                          accum_steps=parts, repeats=recipe.repeats, seed=recipe.seed)
        batches, places = list(loop_batches(sampler)), iter([first for _, first, _ in sampler])
        run = SimpleNamespace(
            recipe=recipe, world=SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=processes),
            classes=range(num_classes), model=layer, ema_model=None, teacher=None, sampler=sampler, state={"step": 0},
            ddp_model=SimpleNamespace(train=lambda: None, no_sync=contextlib.nullcontext),
            optimizer=torch.optim.SGD(layer.parameters()), scaler=torch.amp.GradScaler("cpu", enabled=False))

        def record(model, teacher, images, targets, recipe):
            given[next(places)] = images, targets
            return (layer.weight.sum(),)

        with mock.patch.object(train, "compute_losses", record):
            train.train_epoch(run, 0, iter(batches), meter)
    return [torch.cat(parts) for parts in zip(*(given[first] for first in sorted(given)))]


class MixedView(NamedTuple):
    step: int
    image: int
    partner: int                                                 # the image that was mixed in
    mixture: tuple                                               # mode, lambda and box


@lru_cache
def mixed_views(processes, mix_group):
    """How the loop mixes 3 steps of 1024 views, read off the images and targets that come out: each view of a step has
    a class of its own, and a grey of its own among those it may meet."""
    image_of = []

    def loader(sampler):
        for _, first, indices in sampler:
            places = torch.arange(first, first + len(indices))
            image_of.extend(zip(places.tolist(), indices))
            grey = (places % 251).byte().view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
            yield grey, places % 1024, first, torch.empty(0, 6, dtype=torch.int64)

    recipe = train.Recipe(batch_size=1024, mix_group=mix_group, precision="fp32", accum_steps=1)
    images, targets = feed(loader, recipe, 3 * 1024, 1024, processes)
    greys = data.normalize(torch.arange(251).byte().view(-1, 1, 1, 1).expand(-1, 3, 1, 1))[:, 0]
    image_of, views = dict(image_of), []
    for place in range(3 * 1024):
        step, target, share = place // 1024, targets[place].clone(), targets[place, place % 1024].item()
        target[place % 1024] = 0
        other = 1024 * step + target.argmax().item()
        own_grey, other_grey = greys[place % 251], greys[other % 251]
        own = ((images[place, 0] - other_grey) / (own_grey - other_grey)).double()      # share of each pixel
        assert own.mean().item() == pytest.approx(share, abs=1e-3), "the target is not what is seen"
        is_box = ((own - own.round()).abs() < 1e-3).all()
        assert is_box or own.std() < 1e-3
        mixture = ("CutMix", own.round().bool().numpy().tobytes()) if is_box else ("mixup", share)
        views.append(MixedView(step, image_of[place], image_of[other], mixture))
    return views


layouts = pytest.mark.parametrize("processes", [1, 2, 4, 8, 16], ids=lambda n: f"{n}x{1024 // n}")
groups = pytest.mark.parametrize("mix_group", [256, 64])


@layouts
@groups
def test_the_views_of_an_image_get_three_mixtures_and_three_partners(processes, mix_group):
    by_image = collections.defaultdict(list)
    for view in mixed_views(processes, mix_group):
        by_image[view.image].append(view)
    assert len(by_image) == 1024
    for image, views in by_image.items():
        partners = {view.partner for view in views}
        assert len(views) == len({view.mixture for view in views}) == len(partners) == 3 and image not in partners


@layouts
@groups
def test_a_batch_has_as_many_mixtures_as_the_official_one(processes, mix_group):
    mixtures = [{view.mixture for view in mixed_views(processes, mix_group) if view.step == step} for step in range(3)]
    assert list(map(len, mixtures)) == 3 * [1024 // mix_group]       # one for each of 4 processes, or 16 for base


def test_mixed_batches_have_the_same_bits_on_any_processes_and_parts():
    recipe = train.Recipe(batch_size=128, mix_group=32, precision="fp32")
    images = Counting(256)

    def mixed(processes, parts):
        recipe.accum_steps = parts
        return feed(lambda sampler: data.train_loader(images, sampler, 48), recipe, 256, 10, processes, parts)

    reference = mixed(1, 1)
    assert len(reference[0]) == 256 and not reference[1].bool().sum(dim=1).eq(1).all()
    for layout in ((2, 1), (4, 1), (1, 4), (2, 2)):
        assert all(map(torch.equal, mixed(*layout), reference)), layout


def batch_to_mix(number=8):
    """Each image is of a class of its own."""
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(number)


def shares_and_partners(targets):
    """How much of each target is its own, and whose the rest is."""
    own = targets.diagonal()
    return own, (targets - own.diag()).argmax(dim=1)


@pytest.mark.parametrize("number", range(6, 16))
def test_small_batches_mix_no_image_with_itself(number):
    for first in (0, number, 2 * number):
        torch.manual_seed(0)
        _, targets = data.mix(torch.rand(number, 3, 4, 4), torch.arange(number), number, first=first, cutmix=0)
        shares, partner = shares_and_partners(targets)
        assert (shares < 1).all() and ((first + partner) // 3 != (first + torch.arange(number)) // 3).all()


@pytest.mark.parametrize("number", [1, 5])
def test_fewer_than_two_images_views_are_left_unmixed(number):
    images, labels = batch_to_mix(number)
    mixed, targets = data.mix(images, labels, number)
    assert torch.equal(mixed, images) and torch.equal(targets, torch.eye(number))


def test_mixup_and_cutmix_come_equally_often():
    torch.manual_seed(0)
    kinds, (originals, labels) = collections.Counter(), batch_to_mix()
    for _ in range(100):
        images, targets = data.mix(originals, labels, 8, num_mixes=1, repeats=1)
        _, partner = shares_and_partners(targets)
        kinds["CutMix" if ((images == originals) | (images == originals[partner])).all() else "mixup"] += 1
    assert min(kinds["CutMix"], kinds["mixup"]) > 35


def test_mixup_is_the_weighted_sum_its_targets_say():
    torch.manual_seed(1)
    originals, labels = batch_to_mix()
    images, targets = data.mix(originals, labels, 8, cutmix=0)
    shares, partner = shares_and_partners(targets)
    assert ((0 < shares) & (shares < 1)).all()
    weights = shares[:, None, None, None]
    assert torch.allclose(images, weights * originals + (1 - weights) * originals[partner], atol=1e-5)
    assert torch.allclose(targets, shares[:, None] * torch.eye(8) + (1 - shares[:, None]) * torch.eye(8)[partner])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
def test_mixups_lambdas_follow_beta_of_alpha_and_alpha(alpha):
    torch.manual_seed(0)
    number = 3000
    _, targets = data.mix(torch.zeros(number, 3, 1, 1), torch.arange(number), number, num_mixes=number, mixup=alpha,
                          cutmix=0)
    shares = targets.diagonal()
    assert shares.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_cutmix_pastes_one_box_and_its_targets_are_the_areas():
    originals, labels = batch_to_mix()
    for seed in range(20):
        torch.manual_seed(seed)
        images, targets = data.mix(originals, labels, 8, mixup=0)
        shares, partners = shares_and_partners(targets)
        for image, original, partner, share in zip(images, originals, originals[partners], shares.tolist()):
            pasted = (image != original)[0]
            rows, columns = pasted.any(dim=1).nonzero(), pasted.any(dim=0).nonzero()
            if len(rows):
                height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
                assert pasted.sum() == height * width
                assert torch.equal(image[:, pasted], partner[:, pasted])
            assert share == pytest.approx(1 - pasted.float().mean().item(), abs=1e-6)


def test_without_mixing_targets_are_one_hot():
    images, labels = batch_to_mix()
    mixed, targets = data.mix(images, labels % 5, 5, mixup=0, cutmix=0)
    assert torch.equal(mixed, images) and torch.equal(targets, torch.eye(5)[labels % 5])


# ---------------------------------------------------------------------------------------------------
# Datasets


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_gives_each_image_to_one_rank(world_size, shared_folder):
    images = data.open_split(shared_folder, train=False)
    labels = [labels for rank in range(world_size)
              for _, labels in data.eval_loader(images, 32, batch_size=4, rank=rank, world_size=world_size)]
    assert collections.Counter(torch.cat(labels).tolist()) == {0: 5, 1: 5, 2: 5}


def test_hidden_and_stray_files_are_ignored(folder):
    for stray in ("train/cat/.hidden.jpg", "train/cat/notes.txt", "val/Thumbs.db", "train/README"):
        (folder / stray).write_text("not an image")
    (folder / "val" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "dog" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "dog" / "0.jpg").rename(folder / "train" / "dog" / ".ipynb_checkpoints" / "0.jpg")
    train, val = data.open_dataset(folder)
    assert (len(train), len(val), train.classes) == (47, 15, ["cat", "dog", "owl"])


def test_every_image_keeps_its_path_and_its_label(folder):
    (folder / "train" / "dog" / "deep" / "é\udcff").mkdir(parents=True)          # a name that is no UTF-8, too
    (folder / "train" / "dog" / "0.jpg").rename(folder / "train" / "dog" / "deep" / "é\udcff" / "0.JPEG")
    images = data.open_split(folder, train=True)
    found = {(images.path(n), images.classes[images[n][1]]) for n in range(len(images))}
    files = [path for path in (folder / "train").rglob("*") if path.is_file()]
    assert found == {(str(path), path.relative_to(folder).parts[1]) for path in files}


@pytest.mark.parametrize("target", ["..", ".", "../dog", "../.."])
def test_a_link_to_a_folder_above_or_to_another_class_adds_nothing(target, folder):
    (folder / "train" / "cat" / "link").symlink_to(target)
    assert len(data.open_split(folder, train=True)) == 48


@pytest.mark.parametrize("target", [".", "..", "dog"])
def test_a_class_folder_that_is_such_a_link_is_refused(target, folder):
    (folder / "train" / "copy").symlink_to(target)
    with pytest.raises(ValueError, match="1 class folder.* without images: copy"):
        data.open_split(folder, train=True)


def test_links_to_files_folders_and_the_root_are_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "train" / "cat" / "0.jpg").rename(tmp_path / "elsewhere" / "a.jpg")
    (folder / "train" / "cat" / "0.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    (folder / "train" / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(folder)
    images = data.open_split(tmp_path / "link", train=True)
    assert len(images) == 49
    paths = {images.path(n): label for n, (_, label) in enumerate(images)}
    assert paths[f"{tmp_path}/link/train/cat/0.jpg"] == 0 and paths[f"{tmp_path}/link/train/dog/more/a.jpg"] == 1


def test_an_unreadable_image_is_named(folder):
    path = folder / "train" / "dog" / "3.jpg"
    path.write_bytes(path.read_bytes()[:200])
    images = data.open_split(folder, train=True)
    with pytest.raises(data.BadImage, match=str(path)):
        images[[images.path(n) for n in range(len(images))].index(str(path))]


@pytest.mark.parametrize("name", ["picture.jpg", "picture.eps"])
def test_postscript_is_refused_whatever_its_name_and_runs_no_program(name, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    photo().save(tmp_path / name, "EPS")
    with pytest.raises(data.BadImage, match=name):
        data.read_rgb(tmp_path / name)
    assert not (tmp_path / "started").exists()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    end_a_wait = threading.Thread(target=lambda: (tmp_path / "pipe.jpg").write_bytes(b""), daemon=True)
    end_a_wait.start()
    with pytest.raises(data.BadImage, match="pipe.jpg: .* not a regular one"):
        data.read_rgb(tmp_path / "pipe.jpg")
    reader = os.open(tmp_path / "pipe.jpg", os.O_RDONLY | os.O_NONBLOCK)         # lets the thread end
    end_a_wait.join()
    os.close(reader)


def test_an_image_too_narrow_to_resize_is_refused_by_its_path(tmp_path):
    Image.new("RGB", (1, 65500)).save(tmp_path / "narrow.png")
    with pytest.raises(data.BadImage, match="narrow.png: .*1 x 65500 is too narrow"):
        data.read_rgb(tmp_path / "narrow.png")


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA"])
def test_images_of_any_mode_become_rgb_as_pillow_converts_them(tmp_path, mode):
    image = photo().convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    assert data.read_rgb(path).tobytes() == Image.open(path).convert("RGB").tobytes()


class WithoutTensors(pickle.Pickler):
    """Tensors go to loader workers in shared memory; this is about the rest."""

    def persistent_id(self, value):
        return "tensor" if isinstance(value, torch.Tensor) else None


def test_a_workers_copy_of_a_folder_does_not_grow_with_the_images(tmp_path):
    sizes = []
    for name, number in (("few", 10), ("lot", 1000)):
        for label in ("cat", "dog"):
            (tmp_path / name / label).mkdir(parents=True)
            for n in range(number):
                (tmp_path / name / label / f"{n}.jpg").touch()
        copy = BytesIO()
        WithoutTensors(copy).dump(data.TrainBatches(data.Folder(tmp_path / name), 48))
        sizes.append(copy.tell())
    assert sizes[0] == sizes[1]


def test_the_fingerprint_changes_when_an_image_moves_to_another_class(tmp_path):
    for path in ("cat/1.jpg", "cat/2.jpg", "dog/3.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    before = data.fingerprint(data.Folder(tmp_path))
    assert data.fingerprint(data.Folder(tmp_path)) == before
    (tmp_path / "cat" / "2.jpg").rename(tmp_path / "dog" / "2.jpg")          # the list of names is the same
    assert data.fingerprint(data.Folder(tmp_path)) != before


def test_the_demo_is_deterministic_balanced_and_its_halves_differ():
    train, val = data.open_dataset("demo")
    assert collections.Counter(val[n][1] for n in range(len(val))) == {label: 100 for label in range(10)}
    image, label = train[123]
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert image.tobytes() == data.Demo(train=True)[123][0].tobytes() != val[123][0].tobytes()
    assert len(train.classes) == 10 and 0 <= label < 10


@pytest.mark.parametrize("arrange, message", [
    (lambda root: None, "no dataset"),
    (lambda root: root.mkdir(), r"no train/ folder .*found: nothing"),
    (lambda root: (root / "train" / "a").mkdir(parents=True), r"1 class folder\(s\) under .* without images: a"),
    (lambda root: (write_folder(root), (root / "train" / "empty").mkdir()), "without images: empty"),
    (lambda root: (write_folder(root), (root / "val" / "cat").rename(root / "val" / "car")),
     r"2 class\(es\) of .* are in train/ or val/ only: car, cat"),
    (lambda root: write_folder(root, classes=("cat",)), r"one class only \(cat\)"),
    (lambda root: (write_folder(root), [path.rename(root / "val" / f"{n}.jpg") for n, path in
                                        enumerate(list((root / "val").glob("*/*.jpg")))],
                   [path.rmdir() for path in (root / "val").glob("*/")]), "val has 15 images but no class folders")])
def test_a_folder_that_cannot_be_trained_on_is_explained(tmp_path, arrange, message):
    arrange(tmp_path / "images")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.open_dataset(tmp_path / "images")


# ---------------------------------------------------------------------------------------------------
# The command


def test_the_contact_sheet_has_a_row_per_picture_and_six_columns(shared_folder):
    images = data.open_split(shared_folder, train=True)
    one, three = (data.contact_sheet(images, 96, rows=rows) for rows in (1, 3))
    assert one.width == three.width and three.height - one.height == 2 * (one.height - 24)
    assert math.isclose((one.width - 120) / 6, one.height - 24, abs_tol=1)


def test_the_command_draws_the_contact_sheet(shared_folder, tmp_path, capsys):
    assert run_main(data, shared_folder, "--image-size", 32, "--output", tmp_path / "sheet.png") == 0
    images = data.open_split(shared_folder, train=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), np.asarray(data.contact_sheet(images, 32)))
    assert capsys.readouterr().out == f"{tmp_path / 'sheet.png'}: some of 48 training images, 3 classes\n"


def test_the_contact_sheet_of_a_recipe_is_drawn_with_its_values(shared_folder, tmp_path):
    def drawn(*args):
        assert run_main(data, shared_folder, *args, "--output", tmp_path / "sheet.png") == 0
        return np.asarray(Image.open(tmp_path / "sheet.png"))

    images = data.open_split(shared_folder, train=True)
    plain = data.contact_sheet(images, 32, rand_augment=0.0, erasing=0.0, mixup=0.0, cutmix=0.0)
    assert np.array_equal(drawn("--recipe", "convnet", "--image-size", 32), np.asarray(plain))
    assert plain.width < data.contact_sheet(images, 32).width - 300              # no columns of mixing
    assert drawn("--recipe", "finetune-384").shape[1] > 6 * 384 > drawn().shape[1]       # a size of its own


@pytest.mark.parametrize("column", ["mixup", "CutMix"])
def test_mixed_pictures_say_their_own_share_and_the_others_class(column, monkeypatch):
    class Plain(list):                                       # one brightness for each class
        classes = [f"brightness {200 - 40 * n}" for n in range(5)]

    images = Plain((Image.new("RGB", (64, 64), (200 - 40 * n,) * 3), n) for n in range(5))
    monkeypatch.setattr(data, "draw_grid", lambda columns, names: (columns, names))
    columns, names = data.contact_sheet(images, 48, rand_augment=0.0, erasing=0.0)
    mixed, captions = columns[f"view 1, {column}"]
    assert len({caption.split(" + ")[0] for caption in captions}) > 2
    for picture, name, caption in zip(data.denormalize(mixed), names, captions, strict=True):
        own, share, other = re.fullmatch(r"(\S+) \+ (\S+)\nbrightness (\d+)", caption).groups()
        expected = float(own) * int(name.split()[1]) + float(share) * int(other)
        assert 255 * picture.mean().item() == pytest.approx(expected, abs=2)         # shares have two digits


def test_check_lists_every_unreadable_image_and_fails(folder, capsys):
    assert run_main(data, folder, "--check") == 0
    bad = [folder / "train" / "cat" / "2.jpg", folder / "val" / "owl" / "1.jpg"]
    for path in bad:
        path.write_text("no image")
    capsys.readouterr()
    assert run_main(data, folder, "--check") == 1
    printed = capsys.readouterr().out
    assert [line.split(": ")[0] for line in printed.splitlines() if line.startswith(" ")] == [
        f"  cannot read image {path}" for path in bad]
    assert "train: 48 images, 1 unreadable; 3 classes of 15 to 16 readable ones" in printed
    assert "val: 15 images, 1 unreadable; 3 classes of 4 to 5 readable ones" in printed


def test_check_says_how_large_the_images_are_and_how_many_the_model_would_enlarge(tmp_path, capsys):
    for n, size in enumerate([(40, 90), (64, 64), (300, 70), (80, 500)]):
        for split in ("train", "val"):
            path = tmp_path / split / "ab"[n % 2] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(path)
    assert run_main(data, tmp_path, "--check", "--image-size", 80) == 0
    assert "short side at least 40, median 70 pixels, below 80 in 3\n" in capsys.readouterr().out


def test_check_lists_a_bad_image_whose_name_no_text_can_hold(folder, monkeypatch):
    (folder / "train" / "cat" / os.fsdecode(b"\xe9.jpg")).write_text("no image")
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", printed)
    assert run_main(data, folder, "--check") == 1
    printed.flush()
    assert b"\\udce9.jpg" in printed.buffer.getvalue() and b"val: 15 images, 0 unreadable" in printed.buffer.getvalue()


@pytest.mark.parametrize("args, status, message", [
    ([], 2, "the following arguments are required: DIR"),
    (["demo", "--rows", 3], 2, "unrecognized arguments: --rows 3"),
    (["demo", "--image-size", "large"], 2, "argument --image-size: invalid int value: 'large'"),
    (["demo", "--image-size", 0], 1, "--image-size '0': it must be from 16 to 4096"),
    (["demo", "--recipe", "quick"], 1, "--recipe 'quick': it must be finetune-384, "),
    (["nowhere"], 1, "no dataset 'nowhere'"),
    (["demo", "--image-size", 32, "--output", "absent/sheet.png"], 1, "absent/sheet.png")])
def test_a_mistake_on_the_command_line_is_one_line(args, status, message, capsys):
    assert run_main(data, *args) == status
    printed = capsys.readouterr().err
    assert printed.startswith("data.py: ") and message in printed and printed.count("\n") == 1
