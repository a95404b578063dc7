"""What the model sees, against timm, Pillow and counting."""
import collections
import math
import platform
import random
import resource
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from timm.data import auto_augment
from torchvision import transforms

import data
import deit
from conftest import write_folder


def photo(width=97, height=61, seed=0):
    """Smooth structure and noise, so that every operation has something to change."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int64) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------
# RandAugment

TIMM_OPERATIONS = dict(zip(data.OPERATIONS, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))


@pytest.mark.parametrize("name", data.OPERATIONS)
def test_randaugment_operation_is_timms_pixel_by_pixel(name, monkeypatch):
    settings = {"interpolation": Image.Resampling.BICUBIC, "img_mean": data.FILL}
    for magnitude in (0.0, 3.3, 7.4, 8.61, 9.0, 9.7):                    # at 10 timm's posterize crashes on Pillow 13
        operation = auto_augment.AugmentOp(TIMM_OPERATIONS[name], prob=1.0, magnitude=magnitude, hparams=settings)
        for sign in (1, -1):
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.9 if sign < 0 else 0.1)
            for seed in range(3):
                image = photo(seed=seed)
                ours = data.OPERATIONS[name](image, magnitude / 10, sign)
                assert ours.tobytes() == operation(image).tobytes(), (magnitude, sign)


def test_sliding_rows_and_columns_is_pillows_affine_transform_to_the_pixel():
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(60 * [(97, 61), (48, 48), (224, 224), (1, 9), (9, 1)]):
        image = photo(width, height, seed=number) if number % 2 else Image.fromarray(
            rng.choice(np.array([0, 255], np.uint8), (height, width, 3)))               # overshoots everywhere
        slope, offset = rng.uniform(-0.4, 0.4) * rng.integers(2), rng.uniform(-1.2, 1.2) * width * rng.integers(2)
        along, down = (1, slope, offset, 0, 1, 0), (1, 0, 0, slope, 1, offset)
        for ours, matrix in ((data.slide, along), (data.slide_down, down)):
            usual = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=data.FILL)
            assert ours(image, slope, offset).tobytes() == usual.tobytes(), (ours.__name__, image.size, slope, offset)


@pytest.mark.parametrize("size", [(97, 61), (224, 224), (48, 3), (3, 3), (2, 9), (9, 1)])
def test_sharpening_is_pillows_to_the_pixel(size):
    for seed in range(10):
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
        for factor in (0.1, 0.55, 1.0, 1.45, 1.9):
            assert data.sharpen(image, factor).tobytes() == ImageEnhance.Sharpness(image).enhance(factor).tobytes()


def test_randaugment_covers_timms_fifteen_operations_in_order():
    plain = [name.removesuffix("Increasing").removesuffix("Rel") for name in auto_augment._RAND_INCREASING_TRANSFORMS]
    assert list(data.OPERATIONS) == plain and len(plain) == 15


@pytest.mark.parametrize("bits, kept", [(0, 0), (1, 128), (2, 192), (4, 240)])
def test_posterize_keeps_the_highest_bits_and_zero_bits_are_black(bits, kept):
    image = photo()
    assert np.array_equal(np.asarray(data.posterize(image, bits)), np.asarray(image) & kept)


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
    expected = image.resize(new, Image.Resampling.BICUBIC).crop((left, top, left + image_size, top + image_size))
    view = data.eval_transform(image_size)(image)
    assert view.dtype == torch.uint8 and torch.equal(view, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def shrink_columns(pixels, size):
    """(H, W, 3) bytes to (H, size, 3) by the definition of Pillow's bicubic: a = -1/2, widened by the scale, weights in
    22 bits, the sum rounded to a byte."""
    width = pixels.shape[1]
    centres = (np.arange(size) + 0.5) * width / size
    distance = np.abs(np.arange(width) + 0.5 - centres[:, None]) / (width / size)
    weights = np.select([distance < 1, distance < 2], [1.5 * distance**3 - 2.5 * distance**2 + 1,
                                                      -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2], 0)
    weights = np.round(weights / weights.sum(axis=1, keepdims=True) * 2**22).astype(np.int64)
    return ((np.einsum("sw,hwc->hsc", weights, pixels.astype(np.int64)) + 2**21) >> 22).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("width, height", [(300, 900), (900, 300), (400, 300)])
def test_evaluation_resizes_the_columns_first_whatever_the_shape_as_pillow_did_until_12(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = np.asarray(data.resize_short_side(Image.fromarray(pixels), 256))
    columns = shrink_columns(pixels, ours.shape[1])
    assert np.array_equal(ours, shrink_columns(columns.swapaxes(0, 1), ours.shape[0]).swapaxes(0, 1))


def test_small_images_are_evaluated_whole():
    image = photo(32, 32)
    assert torch.equal(data.eval_transform(32)(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_normalizing_bytes_is_the_usual_chain():
    image = photo(64, 64)
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])
    assert torch.equal(data.normalize(transforms.PILToTensor()(image)[None])[0], usual(image))


def test_training_crops_follow_the_recipes_areas_and_are_bicubic(monkeypatch):
    boxes, interpolate = [], torch.nn.functional.interpolate

    def watch(crop, size, mode, antialias):
        boxes.append((*crop.shape[2:], mode, antialias))
        return interpolate(crop, size, mode="nearest")
    monkeypatch.setattr(data.F, "interpolate", watch)
    torch.manual_seed(0)
    transform, pixels = data.train_transform(64, rand_augment=0), data.pixels_of(photo(400, 400))
    for _ in range(2000):
        transform(pixels)
    heights, widths, modes, antialias = (np.array(column) for column in zip(*boxes))
    areas = heights * widths / 160_000
    assert 0.079 <= areas.min() < 0.1 and areas.max() <= 1 and np.mean(areas) == pytest.approx(0.49, abs=0.03)
    assert 0.74 < (widths / heights).min() and (widths / heights).max() < 1.35
    assert set(modes) == {"bicubic"} and antialias.all()


@pytest.mark.parametrize("size, image_size, noise", [((500, 375), 224, False), ((256, 256), 224, False), ((64, 64), 48, True)])
def test_training_crops_are_pillows_but_for_a_tenth_of_a_level_on_average(size, image_size, noise):
    image, differences = photo(*size), []
    if noise:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    usual = transforms.RandomResizedCrop(image_size, interpolation=transforms.InterpolationMode.BICUBIC)
    for seed in range(60):
        torch.manual_seed(seed)
        ours = data.random_resized_crop(data.pixels_of(image), image_size)[0].int()
        torch.manual_seed(seed)                                     # so the same box is drawn
        differences.append((ours - transforms.functional.pil_to_tensor(usual(image)).int()).abs().float())
    differences = torch.stack(differences)
    assert 0.01 < differences.mean() < 0.1 and (differences > 1).float().mean() < (0.01 if noise else 0.0002)


@pytest.mark.parametrize("size, image_size", [((500, 375), 224), ((64, 64), 48)])
def test_training_crops_are_pillows_to_the_pixel_if_asked_for(size, image_size):
    image, transform = photo(*size), data.train_transform(image_size, rand_augment=0, resize="pillow")
    for seed in range(20):
        torch.manual_seed(seed)
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
        usual = image.crop((left, top, left + width, top + height)).resize((image_size, image_size), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            usual = usual.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        torch.manual_seed(seed)
        assert np.array_equal(transform(image).permute(1, 2, 0).numpy(), np.asarray(usual))


def test_who_resizes_moves_the_gradient_a_fiftieth_of_what_another_draw_of_the_views_does():
    torch.manual_seed(0)
    model, demo = deit.create_model("tiny", num_classes=10, image_size=48), data.Demo(train=True)
    draws = [(index, view) for view in range(3) for index in range(16)]

    def gradient(resize, seed):
        pixels, labels, *_ = data.TrainBatches(demo, 48, resize=resize, seed=seed)[0, draws]
        model.zero_grad()
        F.cross_entropy(model(data.normalize(pixels)), labels).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    ours, pillows, another = gradient("torch", 0), gradient("pillow", 0), gradient("pillow", 1)
    assert 0 < (ours - pillows).norm() < (another - pillows).norm() / 50


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
    torch.manual_seed(0)
    images = data.erase(torch.full((3, 3, 64, 64), 7.0), torch.tensor([[1, 4, 8, 40, 50]]))
    erased = images != 7.0
    assert erased[1, :, 4:44, 8:58].all() and erased.sum() == 3 * 40 * 50
    assert abs(images[erased].mean()) < 0.05 and abs(images[erased].std() - 1) < 0.05


# ---------------------------------------------------------------------------------------------------
# Repeated augmentation


@pytest.mark.parametrize("size", [10, 255, 256, 300])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_each_drawn_image_comes_three_times_per_epoch_over_all_ranks(size, world_size):
    samplers = [data.RepeatedAugSampler(size, rank, world_size) for rank in range(world_size)]
    per_rank = [list(sampler) for sampler in samplers]
    counts = collections.Counter(index for indices in per_rank for index in indices)
    assert counts and set(counts.values()) == {3} and set(counts) <= set(range(size))
    assert [len(indices) for indices in per_rank] == [len(sampler) for sampler in samplers] == [len(per_rank[0])] * world_size
    samplers[0].set_epoch(1)
    assert list(samplers[0]) != per_rank[0]


@pytest.mark.parametrize("global_batch, accum_steps", [(24, 1), (32, 1), (32, 2), (48, 4)])
def test_any_number_of_processes_sees_the_same_views_in_every_step(global_batch, accum_steps):
    def steps(world_size, parts):
        local = global_batch // world_size // parts
        samplers = [data.RepeatedAugSampler(500, rank, world_size, batch_size=local, accum_steps=parts, seed=3)
                    for rank in range(world_size)]
        views = [[draws for _, draws in sampler.batches()] for sampler in samplers]
        return [sorted(draw for rank in views for batch in rank[step * parts:(step + 1) * parts] for draw in batch)
                for step in range(samplers[0].steps)]

    reference = steps(1, 1)
    assert all(len(set(step)) == global_batch for step in reference)
    assert steps(2, accum_steps) == steps(4, 1) == reference


def test_imagenet_at_1024_gives_the_published_epoch():
    sampler = data.RepeatedAugSampler(1_281_167, 0, 4, batch_size=256)
    assert (sampler.steps, sampler.distinct_images, len(sampler)) == (1251, 427_008, 1251 * 256)


@pytest.mark.parametrize("batch_size", [8, 64, 85, 130, 192, 256, 1024])
@pytest.mark.parametrize("group", [64, 256])
def test_no_image_is_mixed_with_itself(batch_size, group, monkeypatch):
    mixed = []
    monkeypatch.setattr(data.v2.MixUp, "__call__", lambda self, images, labels: mixed.append(images) or (images, labels))
    sampler = data.RepeatedAugSampler(4000, batch_size=batch_size)
    for _, (_, draws) in zip(range(6), sampler.batches()):
        ids = torch.tensor([index for index, _ in draws])
        mixed.clear()
        data.mix(ids, ids, ids, 10, cutmix=0, group=group)
        assert sum(map(len, mixed)) == batch_size, "a group was left unmixed"
        assert all((part != part.roll(1)).all() and len(part) <= group for part in mixed)


def test_a_batch_of_one_images_views_is_left_unmixed():
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([4, 4])
    mixed, targets = data.mix(images, labels, torch.tensor([9, 9]), 5)
    assert torch.equal(mixed, images) and torch.equal(targets, F.one_hot(labels, 5).float())


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
    sampler = data.RepeatedAugSampler(60, batch_size=30)
    request = next(sampler.batches())
    pixels, labels, indices, _ = data.TrainBatches(images, 48)[request]
    assert len(images.reads) == 10 and set(images.reads.values()) == {1}
    assert pixels.shape == (30, 3, 48, 48) and pixels.dtype == torch.uint8
    assert torch.equal(labels, indices % 10)
    assert torch.equal(indices[:10], indices[10:20]) and torch.equal(indices[:10], indices[20:])
    assert not torch.equal(pixels[:10], pixels[10:20])                   # three different views


def test_a_view_depends_on_seed_epoch_image_and_view_only():
    def views(draws, epoch=4, seed=5):
        pixels, _, _, boxes = data.TrainBatches(Counting(), 48, seed=seed)[epoch, draws]
        return {draw: (pixel.numpy().tobytes(), [box[1:] for box in boxes.tolist() if box[0] == n])
                for n, (draw, pixel) in enumerate(zip(draws, pixels))}

    whole = views([(index, view) for view in range(3) for index in range(20)])
    torch.manual_seed(99)
    assert views([(7, 2)])[7, 2] == whole[7, 2]
    part = views([(index, view) for index in range(19, 4, -1) for view in (2, 1)])
    assert part == {draw: whole[draw] for draw in part}
    assert any(box for _, box in whole.values()) and not all(box for _, box in whole.values())
    assert len({pixels for pixels, _ in whole.values()}) == 60
    assert views([(7, 2)], epoch=5)[7, 2] != whole[7, 2] != views([(7, 2)], seed=6)[7, 2]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_workers(workers, shared_folder):
    def batches(workers):
        split = data.open_split(shared_folder, train=True)
        sampler = data.RepeatedAugSampler(48, batch_size=8)
        loader = data.train_loader(split.images, sampler, 48, workers=workers)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            yield from loader

    for ours, reference in zip(batches(workers), batches(0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


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


def test_an_epoch_can_start_in_the_middle():
    sampler = data.RepeatedAugSampler(500, 1, 2, batch_size=8, accum_steps=2)
    whole = list(sampler.batches())
    sampler.set_epoch(0, first_step=5)
    assert list(sampler.batches()) == whole[10:] and len(data.Batches(sampler)) == len(whole) - 10


# ---------------------------------------------------------------------------------------------------
# Mixup and CutMix


def batch_to_mix(number=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 3, 64, 64, generator=generator), torch.arange(number) % 5, torch.arange(number)


def test_mixed_targets_sum_to_one_and_both_kinds_come():
    torch.manual_seed(0)
    kinds = collections.Counter()
    for _ in range(60):
        images, targets = data.mix(*batch_to_mix(), 5)
        assert torch.allclose(targets.sum(dim=1), torch.ones(8))
        original = batch_to_mix()[0]
        kinds["cutmix" if ((images == original) | (images == original.roll(1, 0))).all() else "mixup"] += 1
    assert min(kinds.values()) > 15


def test_mixup_is_the_weighted_sum_its_targets_say():
    torch.manual_seed(1)
    original, labels, indices = batch_to_mix()
    images, targets = data.mix(original, labels, indices, 5, cutmix=0)
    share = targets[0, labels[0]].item()
    assert 0 < share < 1
    assert torch.allclose(images, share * original + (1 - share) * original.roll(1, 0), atol=1e-5)
    expected = share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(labels.roll(1), 5)
    assert torch.allclose(targets, expected.float(), atol=1e-6)


def test_cutmix_pastes_one_box_and_its_targets_are_the_areas():
    for seed in range(20):
        torch.manual_seed(seed)
        original, labels, indices = batch_to_mix()
        images, targets = data.mix(original, labels, indices, 5, mixup=0)
        pasted = (images != original)[:, 0]
        assert (pasted == pasted[0]).all()
        rows, columns = pasted[0].any(dim=1).nonzero(), pasted[0].any(dim=0).nonzero()
        if len(rows):
            height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
            assert pasted[0].sum() == height * width
            assert torch.equal(images[0][:, pasted[0]], original[-1][:, pasted[0]])
        assert targets[0, labels[0]].item() == pytest.approx(1 - pasted[0].float().mean().item(), abs=1e-6)


def test_every_group_draws_its_own_lambda():
    torch.manual_seed(0)
    images, labels, indices = batch_to_mix(32)
    _, targets = data.mix(images, labels, indices, 5, cutmix=0, group=8)
    assert len({round(share, 4) for share in targets.amax(dim=1).tolist()}) == 4
    _, targets = data.mix(images, labels, indices, 5, cutmix=0, group=32)
    assert len({round(share, 4) for share in targets.amax(dim=1).tolist()}) == 1


def test_without_mixing_targets_are_one_hot():
    images, labels, indices = batch_to_mix()
    mixed, targets = data.mix(images, labels, indices, 5, mixup=0, cutmix=0)
    assert torch.equal(mixed, images) and torch.equal(targets, F.one_hot(labels, 5).float())


# ---------------------------------------------------------------------------------------------------
# Datasets


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_gives_each_image_to_one_rank(world_size, shared_folder):
    split = data.open_split(shared_folder, train=False)
    labels = [labels for rank in range(world_size)
              for _, labels in data.eval_loader(split.images, 32, batch_size=4, rank=rank, world_size=world_size)]
    assert collections.Counter(torch.cat(labels).tolist()) == {0: 5, 1: 5, 2: 5}


def test_hidden_and_stray_files_are_ignored(folder):
    for stray in ("train/cat/.hidden.jpg", "train/cat/notes.txt", "val/Thumbs.db", "train/README"):
        (folder / stray).write_text("not an image")
    (folder / "val" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "dog" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "dog" / "0.jpg").rename(folder / "train" / "dog" / ".ipynb_checkpoints" / "0.jpg")
    train, val = data.open_dataset(folder)
    assert (len(train.images), len(val.images), train.classes) == (47, 15, ["cat", "dog", "owl"])


def test_an_unreadable_image_is_named(folder):
    path = folder / "train" / "dog" / "3.jpg"
    path.write_bytes(path.read_bytes()[:200])
    images = data.open_split(folder, train=True).images
    with pytest.raises(data.BadImage, match=str(path)):
        images[[sample for sample, _ in images.samples].index(str(path))]


def test_check_lists_every_unreadable_image(folder, capsys):
    (folder / "val" / "owl" / "1.jpg").write_text("no image")
    assert data.check(data.open_split(folder, train=False), "val", workers=1) == 1
    assert str(folder / "val" / "owl" / "1.jpg") in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA"])
def test_images_of_any_mode_become_rgb_as_pillow_converts_them(tmp_path, mode):
    image = photo().convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    assert data.read_rgb(path).tobytes() == Image.open(path).convert("RGB").tobytes()


def test_the_demo_is_deterministic_balanced_and_its_halves_differ():
    train, val = data.open_dataset("demo")
    assert collections.Counter(val.images[n][1] for n in range(len(val.images))) == {label: 100 for label in range(10)}
    image, label = train.images[123]
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert image.tobytes() == data.Demo(train=True)[123][0].tobytes() != val.images[123][0].tobytes()
    assert len(train.classes) == 10 and 0 <= label < 10


def test_the_contact_sheet_has_a_row_per_picture_and_six_columns(shared_folder):
    split = data.open_split(shared_folder, train=True)
    one, three = (data.contact_sheet(split, 96, rows=rows) for rows in (1, 3))
    assert one.width == three.width and three.height - one.height == 2 * (one.height - 24)
    assert math.isclose((one.width - 120) / 6, one.height - 24, abs_tol=1)


@pytest.mark.parametrize("args, message", [
    (["--output", "sheet.psd"], "--output sheet.psd: give the name of a .png"),
    (["--rows", "0"], "--rows, --image-size and --workers must be 1 or more"),
    (["--seed", str(2**63)], "--seed from 0 to 2^63 - 1"),
    (["--output", "absent/sheet.png"], "--output absent/sheet.png: give the name of a .png, .jpg or .webp in a folder")])
def test_a_mistake_on_the_command_line_is_one_line(args, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", "demo", "--image-size", "32", *args])
    with pytest.raises(SystemExit) as stopped:
        data.main()
    assert message in stopped.value.code and "\n" not in stopped.value.code


@pytest.mark.parametrize("arrange, message", [
    (lambda root: None, "no dataset"),
    (lambda root: root.mkdir(), r"no train/ folder .*found: nothing"),
    (lambda root: (root / "train" / "a").mkdir(parents=True), r"1 class folder\(s\) under .* without images: a"),
    (lambda root: (write_folder(root), (root / "train" / "empty").mkdir()), "without images: empty"),
    (lambda root: (write_folder(root), (root / "val" / "cat").rename(root / "val" / "car")),
     r"1 only in train/ \(cat\), 1 only in val/ \(car\)"),
    (lambda root: (write_folder(root), [path.rename(root / "val" / f"{n}.jpg") for n, path in
                                        enumerate(list((root / "val").glob("*/*.jpg")))],
                   [path.rmdir() for path in (root / "val").glob("*/")]), "val has 15 images but no class folders")])
def test_a_folder_that_cannot_be_trained_on_is_explained(tmp_path, arrange, message):
    arrange(tmp_path / "images")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.open_dataset(tmp_path / "images")
