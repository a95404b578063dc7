"""What the model sees, against timm, Pillow, torchvision, definitions and counting."""
import collections
import os
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms
from torchvision.datasets import ImageFolder

import data
from conftest import run_main, write_folder

BICUBIC = Image.Resampling.BICUBIC


def photo(width=97, height=61, seed=0):
    """Smooth structure and noise, so that every operation has something to change."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), BICUBIC), np.int64)
    noisy = smooth + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def black_and_white(width, height):
    """Noise unlike any photograph: every edge overshoots."""
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


class Numbered(torch.utils.data.Dataset):
    """Images that are classes of their own. Counts how often each is read."""

    def __init__(self, number):
        self.classes = [f"image {index}" for index in range(number)]
        self.reads = collections.Counter()

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        self.reads[index] += 1
        return photo(50, 50, seed=index), index


# ------------------------------------------------------------------------------------------------
# An image to a view


@pytest.mark.parametrize("width, height", [(97, 61), (61, 97), (64, 64)])
def test_randaugments_operations_are_timms_pixel_by_pixel(width, height, monkeypatch):
    mean = tuple(round(255 * value) for value in timm.data.IMAGENET_DEFAULT_MEAN)
    settings = {"img_mean": mean, "interpolation": BICUBIC}
    recipe = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    names = [each.name.removesuffix("Increasing").removesuffix("Rel") for each in recipe.ops]

    image = photo(width, height)
    assert list(data.operations(image, 0, 1)) == names
    for magnitude in (0, 3.3, 7.4, 8.61, 9, 9.7, 10):
        for sign, drawn in ((1, 0.1), (-1, 0.9)):
            monkeypatch.setattr(random, "random", lambda: drawn)         # timm's draw of the sign
            ours = data.operations(image, magnitude / 10, sign)
            for name, timms in zip(names, recipe.ops):
                timms.prob, timms.magnitude, timms.magnitude_std = 1, magnitude, 0
                if (name, magnitude) == ("Posterize", 10):   # no bits: timm crashes on Pillow 13
                    assert ours[name]().getextrema() == ((0, 0), (0, 0), (0, 0))
                else:
                    assert ours[name]().tobytes() == timms(image).tobytes(), (name, magnitude, sign)


def test_randaugment_draws_operations_gates_magnitudes_and_signs_as_the_recipe(monkeypatch):
    def spy(image, r, s):                                    # its image is a list of what was done
        return {number: lambda number=number: [*image, (number, r, s)] for number in range(15)}

    monkeypatch.setattr(data, "operations", spy)
    torch.manual_seed(0)
    images = [data.RandAugment()([]) for _ in range(6000)]
    lengths = [len(image) for image in images]
    assert [lengths.count(n) / 6000 for n in range(3)] == pytest.approx([1/4, 1/2, 1/4], abs=0.03)

    pairs = [image for image in images if len(image) == 2]
    assert np.mean([a[0] == b[0] for a, b in pairs]) == pytest.approx(1 / 15, abs=0.025)

    numbers, magnitudes, signs = np.array([one for image in images for one in image]).T
    assert np.bincount(numbers.astype(int)) / len(numbers) == pytest.approx(1 / 15, abs=0.02)
    assert np.mean(signs) == pytest.approx(0, abs=0.05)
    assert magnitudes.max() == 1 and np.mean(magnitudes == 1) == pytest.approx(0.0228, abs=0.01)
    assert np.median(magnitudes) == pytest.approx(0.9, abs=0.005)
    assert np.quantile(magnitudes, 0.1587) == pytest.approx(0.85, abs=0.005)     # one deviation below


@pytest.mark.parametrize("magnitude, made", [(4.0, [4.0]), (0.0, [])])
def test_the_loader_augments_with_the_magnitude_that_it_is_given(magnitude, made, monkeypatch):
    asked_for = []
    monkeypatch.setattr(data, "RandAugment", asked_for.append)
    data.train_loader(Numbered(9), data.RepeatedAugSampler(9), 48, rand_augment=magnitude)
    assert asked_for == made


@pytest.mark.parametrize("width, height", [(300, 900), (900, 300)])
def test_evaluation_resizes_the_columns_first_as_pillow_did_until_12(width, height):
    image = black_and_white(width, height)
    ours = data.resize_short_side(image, 256)
    assert min(ours.size) == 256 and max(ours.size) == 3 * 256
    # torch has that order too; the other one differs by up to 28 levels
    torchs = F.interpolate(transforms.PILToTensor()(image)[None], (ours.height, ours.width),
                           mode="bicubic", antialias=True)[0]
    assert (transforms.PILToTensor()(ours).int() - torchs.int()).abs().max() <= 2


def test_images_of_32_pixels_are_evaluated_whole():
    image = photo(32, 32)
    assert torch.equal(data.eval_transform(32)(image), transforms.PILToTensor()(image))


def test_training_views_have_the_recipes_areas_and_aspects_and_half_are_flipped():
    # red tells a pixel's column, green its row
    columns, rows = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = Image.fromarray(np.stack([columns, rows, rows], axis=2))
    torch.manual_seed(0)
    transform = data.train_transform(64, rand_augment=0)
    views = torch.stack([transform(image) for _ in range(2000)]).double()
    widths = (views[:, 0, 32, 61] - views[:, 0, 32, 2]) * 64 / 59        # negative if flipped
    heights = (views[:, 1, 61, 32] - views[:, 1, 2, 32]) * 64 / 59

    assert (widths < 0).double().mean().item() == pytest.approx(0.5, abs=0.04)
    areas, aspects = widths.abs() * heights / 256**2, widths.abs() / heights
    assert areas.min().item() == pytest.approx(0.08, abs=0.006) and 0.95 < areas.max() < 1.03
    assert areas.mean().item() == pytest.approx(0.49, abs=0.03)
    assert aspects.min().item() == pytest.approx(3 / 4, abs=0.03)
    assert aspects.max().item() == pytest.approx(4 / 3, abs=0.05)


@pytest.mark.parametrize("image, size", [(photo(500, 375), 224), (black_and_white(64, 64), 48)])
def test_training_crops_are_pillows_bicubic_and_at_most_two_levels_off(image, size):
    differences = []
    for seed in range(10):
        torch.manual_seed(seed)
        ours = np.asarray(data.random_resized_crop(image, size), np.int64)
        torch.manual_seed(seed)                              # so the same box is drawn
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            image, (0.08, 1), (3 / 4, 4 / 3))
        crop = image.crop((left, top, left + width, top + height))
        columns_first = crop.resize((size, height), BICUBIC).resize((size, size), BICUBIC)
        differences.append(abs(ours - np.asarray(columns_first)))
    assert np.max(differences) <= 2 and np.mean(np.array(differences) > 0) < 0.006


def test_training_views_of_32_pixels_are_padded_by_4_black_pixels_and_never_scaled():
    white = Image.new("RGB", (32, 32), "white")
    torch.manual_seed(0)
    black_rows, black_columns = set(), set()
    for _ in range(300):
        view = data.train_transform(32, rand_augment=0)(white)
        assert view.shape == (3, 32, 32) and set(view.unique().tolist()) <= {0, 255}
        black_rows.add(int((view.amax((0, 2)) == 0).sum()))
        black_columns.add(int((view.amax((0, 1)) == 0).sum()))
    assert black_rows == black_columns == {0, 1, 2, 3, 4}


# ------------------------------------------------------------------------------------------------
# Repeated augmentation and loaders


@pytest.mark.parametrize("num_images, batch_size", [(10, 8), (255, 16), (256, 1)])
def test_each_image_of_an_epoch_but_the_last_comes_three_times(num_images, batch_size):
    views = sum(data.RepeatedAugSampler(num_images, batch_size=batch_size), [])
    assert len(views) == len(set(views)) == num_images // batch_size * batch_size
    assert {(epoch, number) for epoch, _, number in views} == {(0, 0), (0, 1), (0, 2)}
    counts = collections.Counter(image for _, image, _ in views)
    assert set(counts) <= set(range(num_images))
    assert sorted(counts.values())[1:] == [3] * (len(counts) - 1)


def test_any_number_of_processes_and_parts_sees_the_same_views_in_every_step():
    def views_in_turn(processes, parts):
        samplers = [data.RepeatedAugSampler(500, rank, processes, accum_steps=parts, seed=3,
                                            batch_size=48 // processes // parts)
                    for rank in range(processes)]
        assert all((each.steps, len(each)) == (10, 10 * parts) for each in samplers)
        return [view for in_turn in zip(*samplers, strict=True) for part in in_turn for view in part]

    reference = views_in_turn(1, 1)
    for processes, parts in ((2, 1), (3, 1), (2, 2), (1, 4), (16, 1), (4, 3)):
        assert views_in_turn(processes, parts) == reference, (processes, parts)


def test_imagenet_at_a_batch_of_1024_has_1251_steps_as_published():
    sampler = data.RepeatedAugSampler(1_281_167, 3, 4, batch_size=128, accum_steps=2)
    assert (sampler.steps, len(sampler)) == (1251, 2502)


def test_each_epoch_and_seed_has_an_order_of_its_own():
    def images(epoch, seed):
        sampler = data.RepeatedAugSampler(500, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        epochs, images, _ = zip(*sum(sampler, []))
        assert set(epochs) == {epoch}
        return images

    assert images(1, 0) == images(1, 0)
    assert len({images(0, 0), images(1, 0), images(2, 0), images(0, 1), images(1, 1)}) == 5


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="15 training images are fewer than one batch of 16"):
        data.RepeatedAugSampler(15, 0, 2, batch_size=4, accum_steps=2)


def test_each_image_of_a_part_is_decoded_once():
    images = Numbered(60)
    request = next(iter(data.RepeatedAugSampler(60, batch_size=30)))
    pixels, labels = data.TrainBatches(images, 48)[request]
    assert len(images.reads) == 10 and set(images.reads.values()) == {1}
    assert pixels.shape == (30, 3, 48, 48) and pixels.dtype == torch.uint8
    assert labels.tolist() == [image for _, image, _ in request]


def test_a_view_depends_on_seed_epoch_image_and_view_number_only():
    def views(request, seed=5):
        pixels, _ = data.TrainBatches(Numbered(20), 48, seed=seed)[request]
        return dict(zip(request, map(torch.Tensor.tolist, pixels), strict=True))

    whole = views([(4, image, number) for image in range(20) for number in range(3)])
    assert len(set(map(str, whole.values()))) == 60
    torch.manual_seed(99)
    assert views([(4, 7, 2)])[4, 7, 2] == whole[4, 7, 2]
    assert views(list(reversed(whole))) == whole
    assert views([(5, 7, 2)])[5, 7, 2] != whole[4, 7, 2]
    assert views([(4, 7, 2)], seed=6)[4, 7, 2] != whole[4, 7, 2]


def test_workers_deliver_the_batches_that_this_process_would_make():
    images = Numbered(24)
    sampler = data.RepeatedAugSampler(24, 1, 2, batch_size=6, seed=3)
    loader = data.train_loader(images, sampler, 48, workers=2)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        for ours, request in zip(loader, sampler, strict=True):
            pixels, labels = data.TrainBatches(images, 48, seed=3)[request]
            assert torch.equal(ours[0], pixels) and torch.equal(ours[1], labels)


@pytest.mark.parametrize("world_size", [1, 4, 15])
def test_each_image_is_evaluated_by_one_process_and_once(world_size):
    labels = []
    for rank in range(world_size):
        for _, batch in data.eval_loader(Numbered(15), 32, batch_size=4, workers=0, rank=rank,
                                         world_size=world_size):
            labels += batch.tolist()
    assert sorted(labels) == list(range(15))


def test_more_processes_than_images_to_evaluate_are_refused():
    with pytest.raises(ValueError, match="3 images are too few for 4 processes"):
        data.eval_loader(Numbered(3), 32, world_size=4)


def test_a_process_has_workers_for_its_share_of_the_cpus_but_one(monkeypatch):
    for cpus, processes, expected in ((1, 1, 1), (2, 1, 1), (8, 1, 7), (8, 4, 1), (64, 4, 15)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cpus), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert data.eval_loader(Numbered(9), 32).num_workers == expected


def test_a_folder_keeps_what_grows_with_it_in_tensors_which_workers_share(shared_folder):
    images = vars(data.Folder(shared_folder / "train"))
    assert {name for name in images if not torch.is_tensor(images[name])} == {"root", "classes"}


# ------------------------------------------------------------------------------------------------
# On the device: normalize, erase, mix


def test_normalizing_bytes_is_the_usual_chain():
    image = photo(64, 64)
    usual = transforms.Compose([
        transforms.ToTensor(),
        transforms.Normalize(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)])
    ours = data.normalize(transforms.PILToTensor()(image)[None])
    assert ours.dtype == torch.float32 and torch.equal(ours[0], usual(image))


def box_of_each(changed):
    """(top, left, height, width) (4, B) of the one box that is marked in each of (B, S, S)."""
    rows, columns = changed.any(dim=2), changed.any(dim=1)
    assert torch.equal(changed, rows[:, :, None] & columns[:, None, :]), "not one box"
    return torch.stack([rows.int().argmax(dim=1), columns.int().argmax(dim=1),
                        rows.sum(dim=1), columns.sum(dim=1)])


def test_erasing_fills_one_box_of_the_recipes_area_aspect_and_place_with_normal_noise():
    torch.manual_seed(0)
    images = data.erase(torch.full((600, 3, 128, 128), 7.0), 1.0)
    erased = (images != 7).any(dim=1)
    noise = images.transpose(0, 1)[:, erased]                            # (3, all erased pixels)
    assert (noise.mean(dim=1).abs() < 0.01).all()
    assert (torch.cov(noise) - torch.eye(3)).abs().max() < 0.02          # channels are independent

    top, left, height, width = box_of_each(erased).numpy()
    areas, aspects = height * width / 128**2, height / width
    assert areas.min() == pytest.approx(0.02, abs=0.002)
    assert areas.max() == pytest.approx(1 / 3, abs=0.01)
    assert areas.mean() == pytest.approx(0.17, abs=0.01)
    assert aspects.min() == pytest.approx(0.3, abs=0.03)
    assert aspects.max() == pytest.approx(1 / 0.3, abs=0.3)
    assert np.median(aspects) == pytest.approx(1, abs=0.1)
    for place in (top / (128 - height), left / (128 - width)):           # from edge to edge
        quartiles = np.quantile(place, (0, 0.25, 0.5, 0.75, 1))
        assert quartiles == pytest.approx((0, 0.25, 0.5, 0.75, 1), abs=0.06)


def test_a_quarter_of_the_views_is_erased():
    torch.manual_seed(0)
    images = torch.full((4000, 3, 16, 16), 7.0)
    assert data.erase(images) is images                      # in place
    erased = (images != 7).flatten(1).any(dim=1).double()
    assert erased.mean().item() == pytest.approx(0.25, abs=0.02)
    assert (data.erase(torch.full((500, 3, 16, 16), 7.0), 0.0) == 7).all()


def mix_numbers(number, size, **settings):
    """Mixes images of which every pixel is the image's number, its class as well. Returns the
    shares that stay their own (B,), the partners (B,) and which pixels are their own (B, S, S)."""
    numbers = torch.arange(number)
    images = numbers.double().view(-1, 1, 1, 1).repeat(1, 3, size, size)
    images, targets = data.mix(images, numbers, number, **settings)

    shares = targets.diagonal().clone()
    others = targets - shares.diag()
    partners = others.argmax(dim=1)
    assert torch.allclose(others.amax(dim=1), 1 - shares)
    told = shares * numbers + (1 - shares) * partners
    assert torch.allclose(images.mean(dim=(1, 2, 3)), told.double())     # the targets are what is seen
    return shares, partners, images[:, 0] == numbers.view(-1, 1, 1)


@pytest.mark.parametrize("part_size", [1024, 256])
def test_the_views_of_an_image_get_three_mixtures_and_other_images_as_partners(part_size):
    """In a step of 1024 on one process, or on four."""
    mixtures, partners_of = collections.defaultdict(set), collections.defaultdict(set)
    sampler = data.RepeatedAugSampler(1024, batch_size=part_size, accum_steps=1024 // part_size)
    for seed, part in enumerate(sampler):
        torch.manual_seed(seed)
        shares, partners, own = mix_numbers(part_size, 32)
        drawn = [(share, pixels.numpy().tobytes()) for share, pixels in zip(shares.tolist(), own)]
        assert shares.max() < 1 and len(set(drawn)) == 3     # one mode, lambda and box for a third
        for (_, image, _), partner, mixture in zip(part, partners.tolist(), drawn, strict=True):
            partners_of[image].add(part[partner][1])
            mixtures[image].add(mixture)
            assert image not in partners_of[image]

    assert sorted(map(len, mixtures.values())) == [1] + 341 * [3]        # 1024 is 341 x 3 + 1
    assert sum(len(partners) == 3 for partners in partners_of.values()) > 325


def test_mode_lambda_and_partner_of_an_images_views_are_drawn_independently():
    modes, lambdas, neighbors = [], [], []
    torch.manual_seed(0)
    for _ in range(500):
        shares, partners, own = mix_numbers(12, 8)           # 3 views of each of 4 images
        modes.append(own.flatten(1).any(dim=1)[:3].tolist())
        lambdas.append(shares[:3].tolist())
        if shares.max() < 1:
            neighbors.append((partners[:3] // 3).tolist())

    a, b, c = np.array(modes).T
    assert np.mean(modes, axis=0) == pytest.approx(3 * [0.5], abs=0.07)  # mixup, CutMix: half each
    assert [np.mean(a == b), np.mean(b == c), np.mean(a == c)] == pytest.approx(3 * [0.5], abs=0.07)
    assert np.corrcoef(np.array(lambdas).T) == pytest.approx(np.eye(3), abs=0.15)

    a, b, c = np.array(neighbors).T                          # each is one of 3 other images
    assert [np.mean(a == b), np.mean(b == c), np.mean(a == c)] == pytest.approx(3 * [1/3], abs=0.07)
    assert np.bincount(a)[1:] / len(a) == pytest.approx(3 * [1/3], abs=0.07)


def test_mixup_is_the_weighted_sum_that_its_targets_say():
    torch.manual_seed(1)
    originals = torch.randn(8, 3, 16, 16)
    images, targets = data.mix(originals.clone(), torch.arange(8), 8, cutmix=0)      # n is of class n
    assert ((targets > 0).sum(dim=1) == 2).all() and torch.allclose(targets.sum(dim=1), torch.ones(8))
    assert torch.allclose(images, torch.einsum("bk,kchw->bchw", targets, originals), atol=1e-5)


def test_mixups_lambda_follows_beta_of_alpha_and_alpha():
    torch.manual_seed(0)
    labels = torch.arange(2).repeat_interleave(3000)         # n and 3000 + n are a group of two
    _, targets = data.mix(torch.zeros(6000, 3, 1, 1), labels, 2, repeats=3000, mixup=0.2, cutmix=0)
    lambdas = targets[:3000, 0]
    assert lambdas.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert lambdas.var().item() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.06)


def test_cutmix_pastes_one_box_of_its_partner_and_its_targets_are_the_areas():
    torch.manual_seed(0)
    originals = torch.randn(12, 3, 32, 32)
    for _ in range(10):
        images, targets = data.mix(originals.clone(), torch.arange(12), 12, mixup=0)
        shares = targets.diagonal()
        partners = (targets - shares.diag()).argmax(dim=1)
        pasted = (images != originals).any(dim=1)
        assert torch.equal(images, torch.where(pasted[:, None], originals[partners], originals))
        _, _, height, width = box_of_each(pasted)
        assert torch.allclose(shares, 1 - height * width / 32**2)


@pytest.mark.parametrize("number, alphas", [(8, {"mixup": 0, "cutmix": 0}), (3, {})])
def test_without_mixing_or_neighbors_images_stay_and_targets_are_one_hot(number, alphas):
    originals, labels = torch.randn(number, 3, 8, 8), torch.arange(number) % 5
    images, targets = data.mix(originals.clone(), labels, 6, **alphas)
    assert torch.equal(images, originals) and torch.equal(targets, torch.eye(6)[labels])


# ------------------------------------------------------------------------------------------------
# Datasets


def test_a_folders_images_and_labels_are_those_of_torchvisions_image_folder(folder, tmp_path):
    """In folders below the class, with odd names, behind links to files and to class folders."""
    cat, dog = folder / "train" / "cat", folder / "train" / "dog"
    strange = dog / "deep" / os.fsdecode(b"\xe9 not utf-8")
    strange.mkdir(parents=True)
    (dog / "0.jpg").rename(strange / "with a much longer name than the others.JPEG")
    (cat / "0.jpg").rename(tmp_path / "elsewhere.jpg")
    (cat / "0.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (folder / "train" / "owl").rename(tmp_path / "birds")
    (folder / "train" / "owl").symlink_to(tmp_path / "birds")

    def contents(images):
        return sorted((label, image.tobytes()) for image, label in images)

    (tmp_path / "link").symlink_to(folder)
    ours, reference = data.Folder(tmp_path / "link" / "train"), ImageFolder(folder / "train")
    assert ours.classes == reference.classes and len(ours) == len(reference) == 48
    assert contents(ours[n] for n in range(48)) == contents(reference)


def test_hidden_and_system_names_and_other_files_are_skipped(folder):
    image = (folder / "train" / "cat" / "0.jpg").read_bytes()
    for start in (".", "@", "$", "__"):
        for place in ("train", "train/cat", "train/cat/deep"):
            (folder / place / f"{start}folder").mkdir(parents=True)
            (folder / place / f"{start}folder" / "0.jpg").write_bytes(image)
            (folder / place / f"{start}0.jpg").write_bytes(image)
    (folder / "train" / "cat" / "notes.txt").touch()
    (folder / "train" / "README.md").touch()
    images = data.Folder(folder / "train")
    assert (len(images), images.classes) == (48, ["cat", "dog", "owl"])


@pytest.mark.parametrize("target", ["..", "../dog"])
def test_a_link_to_a_folder_inside_a_class_adds_nothing(target, folder):
    (folder / "train" / "cat" / "link").symlink_to(target)
    assert len(data.Folder(folder / "train")) == 48


def test_a_class_folder_that_cannot_be_listed_is_an_error(folder):
    (folder / "train" / "ant").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="ant"):
        data.Folder(folder / "train")


def test_a_picture_that_says_it_is_to_be_turned_is_read_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                         # by 90 degrees
    photo(97, 61).save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_rgb(tmp_path / "turned.jpg").size == (97, 61)


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_pixels_without_a_fixed_range_are_refused(mode, tmp_path):
    Image.new(mode, (4, 4)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=f"deep.tiff: pixels of mode {mode} have no fixed range"):
        data.read_rgb(tmp_path / "deep.tiff")


def test_postscript_is_refused_whatever_its_name_and_runs_no_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    photo().save(tmp_path / "picture.jpg", "EPS")
    with pytest.raises(ValueError, match="picture.jpg: cannot identify image"):
        data.read_rgb(tmp_path / "picture.jpg")
    assert not (tmp_path / "started").exists()


def test_what_is_no_regular_file_is_refused_and_not_waited_for():
    with pytest.raises(ValueError, match=f"{os.devnull}: .* not a regular one"):
        data.read_rgb(os.devnull)


def test_the_demo_is_deterministic_balanced_and_its_halves_differ():
    train, val = data.open_dataset("demo")
    labels = [val[n][1] for n in range(len(val))]
    assert collections.Counter(labels) == {label: 100 for label in range(10)}
    assert len(train.classes) == 10 and len(train) == 4000

    image, _ = train[123]
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert image.tobytes() == data.Demo(train=True)[123][0].tobytes() != val[123][0].tobytes()


def test_the_val_folder_itself_will_do_to_validate_but_not_to_train(folder):
    assert len(data.open_split(folder / "val", train=False)) == 15
    with pytest.raises(FileNotFoundError, match="no folder .*/val/train'"):
        data.open_split(folder / "val", train=True)


def test_a_train_folder_is_no_class_to_validate_on(folder):
    (folder / "val").rename(folder / "test")
    with pytest.raises(FileNotFoundError, match="no folder .*/val'"):
        data.open_split(folder, train=False)


def test_images_that_lie_in_no_class_folder_are_refused(shared_folder):
    with pytest.raises(ValueError, match="cat has no class folders: move each image to"):
        data.Folder(shared_folder / "val" / "cat")


def test_a_class_folder_without_images_is_refused(folder):
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in the class folder .*train/empty"):
        data.open_dataset(folder)


def test_classes_that_differ_in_train_and_val_or_a_single_one_are_refused(folder, tmp_path):
    (folder / "val" / "cat").rename(folder / "val" / "car")
    with pytest.raises(ValueError, match=r"in one of them only: \['car', 'cat'\]"):
        data.open_dataset(folder)
    with pytest.raises(ValueError, match="needs the same two or more class folders"):
        data.open_dataset(write_folder(tmp_path / "single", classes=("cat",)))


# ------------------------------------------------------------------------------------------------
# The command


def pixels_of(image):
    return transforms.PILToTensor()(image).int()


def test_every_picture_of_the_contact_sheet_is_where_it_should_be(monkeypatch):
    # mirrored stands for erased, upside down for mixed
    monkeypatch.setattr(data, "erase", lambda images: images.flip(3))
    monkeypatch.setattr(data, "mix", lambda images, labels, number: (images.flip(2), None))
    images = Numbered(12)
    evaluated = [data.EvalImages(images, 150)[index][0] for index in range(12)]
    sheet = pixels_of(data.contact_sheet(images, 150))
    assert sheet.shape == (3, 24 + 8 * 156, 8 * 156)

    shown = set()
    for top in range(24, 24 + 8 * 156, 156):
        cells = [sheet[:, top:top + 150, left:left + 150] for left in range(156, 8 * 156, 156)]
        index = np.argmin([(view - cells[0]).abs().sum() for view in evaluated])
        shown.add(index)

        views, _ = data.TrainBatches(images, 150)[[(0, index, number) for number in range(3)]]
        expected = [evaluated[index]]
        for view in views:
            expected += [view.flip(2), view.flip(2).flip(1)]
        assert (torch.stack(cells) - torch.stack(expected)).abs().max() <= 1     # normalized and back

        name = Image.new("RGB", (140, 20), "white")
        ImageDraw.Draw(name).text((0, 0), images.classes[index], "black")
        assert torch.equal(sheet[:, top:top + 20, 8:148], pixels_of(name))
    assert len(shown) == 8


def test_the_command_draws_the_contact_sheet(shared_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(data, shared_folder, "--image-size", 32) == 0
    expected = data.contact_sheet(data.open_split(shared_folder, train=True), 32)
    assert np.array_equal(np.asarray(Image.open("contact_sheet.png")), np.asarray(expected))


def test_check_names_every_unreadable_image_and_fails(folder, capsys):
    assert run_main(data, folder, "--check") == 0
    (folder / "train" / "cat" / os.fsdecode(b"\xe9.jpg")).write_text("a name that no text can hold")
    truncated = folder / "val" / "owl" / "1.jpg"
    truncated.write_bytes(truncated.read_bytes()[:200])
    capsys.readouterr()
    assert run_main(data, folder, "--check") == 1
    train, first, val, second = capsys.readouterr().out.splitlines()
    assert train == "train: 49 images, 1 unreadable"
    assert first.startswith(rf"  cannot read image {folder}/train/cat/\udce9.jpg: ")
    assert val == "val: 15 images, 1 unreadable"
    assert second.startswith(f"  cannot read image {truncated}: ")


@pytest.mark.parametrize("args, status, message", [
    ([], 2, "the following arguments are required: DIR"),
    (["demo", "--rows", 3], 2, "unrecognized arguments: --rows 3"),
    (["demo", "--image-size", "large"], 2, "argument --image-size: invalid int value: 'large'"),
    (["demo", "--image-size", 0], 1, "height and width must be > 0"),
    (["nowhere"], 1, "no folder 'nowhere/train': --data takes a folder with train/ and val/"),
])
def test_a_mistake_on_the_command_line_is_one_line(args, status, message, tmp_path, monkeypatch,
                                                   capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(data, *args) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("data.py: ") and message in printed.err
    assert printed.err.count("\n") == 1 and not printed.out and not os.listdir(tmp_path)
