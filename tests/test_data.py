"""What the model sees, against timm, Pillow, torchvision, definitions and counting."""
import collections
import os

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets, transforms

import data
from conftest import difference, run_main, write_folder

BICUBIC = Image.Resampling.BICUBIC


def photo(width=97, height=61):
    """Smooth structure and noise, so that every operation has something to change."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    pixels = rng.normal(coarse.resize((width, height), BICUBIC), 12).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def pixels_of(image):
    return transforms.PILToTensor()(image).int()


@pytest.fixture
def images(shared_folder):
    """48 training images of 3 classes."""
    return data.Folder(shared_folder / "train")


# ---------------------------------------------------------------------------------------
# An image to a view


def test_randaugments_operations_are_timms_pixel_by_pixel(monkeypatch):
    mean = tuple(round(255 * value) for value in timm.data.IMAGENET_DEFAULT_MEAN)
    recipe = timm.data.auto_augment.rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": mean, "interpolation": BICUBIC})
    names = [each.name.removesuffix("Increasing").removesuffix("Rel") for each in recipe.ops]

    image = photo()
    assert list(data.operations(image, 0, 1)) == names
    for magnitude in (0, 3.3, 7.4, 8.61, 9, 9.7, 10):
        for sign, drawn in ((1, 0.1), (-1, 0.9)):
            monkeypatch.setattr("random.random", lambda: drawn)      # timm's draw of the sign
            ours = data.operations(image, magnitude / 10, sign)
            for name, timms in zip(names, recipe.ops):
                timms.prob, timms.magnitude, timms.magnitude_std = 1, magnitude, 0
                if (name, magnitude) == ("Posterize", 10):   # no bits: timm crashes on Pillow 13
                    assert not pixels_of(ours[name]()).any()
                else:
                    assert ours[name]().tobytes() == timms(image).tobytes(), (name, magnitude)


def test_randaugment_draws_operations_gates_magnitudes_and_signs_as_the_recipe(monkeypatch):
    def spy(image, r, s):                                # its image is a list of what was done
        return {number: lambda number=number: [*image, (number, r, s)] for number in range(15)}

    monkeypatch.setattr(data, "operations", spy)
    torch.manual_seed(0)
    images = [data.RandAugment()([]) for _ in range(6000)]
    lengths = np.bincount([len(image) for image in images])
    assert lengths / 6000 == pytest.approx([1/4, 1/2, 1/4], abs=0.03)

    pairs = [image for image in images if len(image) == 2]
    assert np.mean([a[0] == b[0] for a, b in pairs]) == pytest.approx(1 / 15, abs=0.025)

    numbers, magnitudes, signs = np.array([one for image in images for one in image]).T
    assert np.bincount(numbers.astype(int)) / len(numbers) == pytest.approx(15 * [1/15], abs=0.02)
    assert np.mean(signs) == pytest.approx(0, abs=0.05)
    assert magnitudes.max() == 1 and np.mean(magnitudes == 1) == pytest.approx(0.0228, abs=0.01)
    assert np.quantile(magnitudes, (0.1587, 0.5)) == pytest.approx((0.85, 0.9), abs=0.005)


def test_the_loader_augments_with_the_magnitude_that_it_is_given():
    loader = data.train_loader(range(9), data.RepeatedAugSampler(9), 48, rand_augment=4.0)
    assert loader.dataset.transform.transforms[2].magnitude == 4.0


def test_evaluation_resizes_the_columns_first_as_pillow_did_until_12():
    image = photo(300, 900).point(lambda value: 255 * (value > 99))      # every edge overshoots
    pixels = pixels_of(image).byte()[None]                   # torch has that order, too
    torchs = F.interpolate(pixels, (768, 256), mode="bicubic", antialias=True)[0]
    assert (pixels_of(data.resize_short_side(image, 256)) - torchs.int()).abs().max() <= 2


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
    assert (areas.min(), areas.mean(), areas.max()) == pytest.approx((0.08, 0.49, 0.99), abs=0.03)
    assert aspects.aminmax() == pytest.approx((3 / 4, 4 / 3), abs=0.05)


def test_training_crops_are_pillows_bicubic_and_at_most_two_levels_off():
    image = photo(500, 375)
    for seed in range(10):
        torch.manual_seed(seed)
        ours = pixels_of(data.random_resized_crop(image, 224))
        torch.manual_seed(seed)                              # so the same box is drawn
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            image, (0.08, 1), (3 / 4, 4 / 3))
        crop = image.crop((left, top, left + width, top + height))
        columns_first = crop.resize((224, height), BICUBIC).resize((224, 224), BICUBIC)
        off = (ours - pixels_of(columns_first)).abs()
        assert off.max() <= 2 and (off > 0).double().mean() < 0.01


def test_training_views_of_32_pixels_are_padded_by_4_black_pixels_and_never_scaled():
    white = Image.new("RGB", (32, 32), "white")
    transform = data.train_transform(32, rand_augment=0)
    torch.manual_seed(0)
    views = torch.stack([transform(white) for _ in range(300)])      # (300, 3, 32, 32)
    assert views.unique().tolist() == [0, 255]
    black_rows = (views.amax(dim=(1, 3)) == 0).sum(dim=1)
    black_columns = (views.amax(dim=(1, 2)) == 0).sum(dim=1)
    assert black_rows.unique().tolist() == black_columns.unique().tolist() == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------
# Repeated augmentation and loaders


def test_each_image_of_an_epoch_but_the_last_comes_three_times():
    (views,) = data.RepeatedAugSampler(8, batch_size=8)
    assert len(set(views)) == 8
    assert {(epoch, number) for epoch, _, number in views} == {(0, 0), (0, 1), (0, 2)}
    images = collections.Counter(image for _, image, _ in views)
    assert set(images) < set(range(8)) and sorted(images.values()) == [2, 3, 3]


def test_any_number_of_processes_and_parts_sees_the_same_views_in_every_step():
    def views_in_turn(processes, parts):
        samplers = [data.RepeatedAugSampler(500, rank, processes, accum_steps=parts, seed=3,
                                            batch_size=48 // processes // parts)
                    for rank in range(processes)]
        assert all((each.steps, len(each)) == (10, 10 * parts) for each in samplers)
        in_turn = sum(zip(*samplers, strict=True), ())       # all ranks' first parts, second, ...
        return sum(in_turn, [])

    reference = views_in_turn(1, 1)
    for processes, parts in ((3, 1), (1, 4), (16, 1), (4, 3)):
        assert views_in_turn(processes, parts) == reference, (processes, parts)


def test_each_epoch_and_seed_has_an_order_of_its_own():
    orders = set()
    for epoch, seed in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0)):
        sampler = data.RepeatedAugSampler(500, batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        epochs, images, _ = zip(*sum(sampler, []))
        assert set(epochs) == {epoch}
        orders.add(images)
    assert len(orders) == 4


def test_fewer_images_than_a_batch_or_than_processes_are_refused():
    with pytest.raises(ValueError, match="15 training images are fewer than one batch of 16"):
        data.RepeatedAugSampler(15, 0, 2, batch_size=4, accum_steps=2)
    with pytest.raises(ValueError, match="3 images are too few for 4 processes"):
        data.eval_loader(range(3), 32, world_size=4)


def test_each_image_of_a_part_is_decoded_once(images, monkeypatch):
    reads = []
    monkeypatch.setattr(data, "read_rgb", lambda path: reads.append(path) or photo())
    request = next(iter(data.RepeatedAugSampler(48, batch_size=30)))
    _, labels = data.TrainBatches(images, 48)[request]
    assert len(reads) == len(set(reads)) == 10
    assert labels.tolist() == [images.labels[image] for _, image, _ in request]


def test_a_view_depends_on_seed_epoch_image_and_view_number_only(images):
    def views(request, seed=5):
        pixels, _ = data.TrainBatches(images, 48, seed=seed)[request]
        return dict(zip(request, map(torch.Tensor.tolist, pixels), strict=True))

    whole = views([(4, image, number) for image in range(20) for number in range(3)])
    assert len(set(map(str, whole.values()))) > 50       # of 60, of which some are black
    torch.manual_seed(99)
    assert views([(4, 7, 2)])[4, 7, 2] == whole[4, 7, 2]
    assert views(list(reversed(whole))) == whole
    assert views([(5, 7, 2)])[5, 7, 2] != whole[4, 7, 2]
    assert views([(4, 7, 2)], seed=6)[4, 7, 2] != whole[4, 7, 2]


def test_workers_deliver_the_batches_that_this_process_would_make(images):
    sampler = data.RepeatedAugSampler(24, 1, 2, batch_size=6, seed=3)
    loader = data.train_loader(images, sampler, 48, workers=2)
    sampler.set_epoch(1)
    for batch, request in zip(loader, sampler, strict=True):
        assert difference(batch, data.TrainBatches(images, 48, seed=3)[request]) is None


@pytest.mark.parametrize("size, ratio", [(48, 0.875), (32, 1.0)])
def test_each_process_evaluates_its_share_as_timm_but_32_pixels_whole(size, ratio, images):
    (batch,) = data.eval_loader(images, size, workers=0, rank=1, world_size=48)
    picture, label = images[1]
    expected = timm.data.create_transform(size, crop_pct=ratio, interpolation="bicubic")(picture)
    assert torch.equal(data.normalize(batch[0])[0], expected) and batch[1].tolist() == [label]


def test_a_process_has_workers_for_its_share_of_the_cpus_but_one(monkeypatch):
    for cpus, processes, expected in ((1, 1, 1), (8, 1, 7), (64, 4, 15)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cpus), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert data.eval_loader(range(9), 32).num_workers == expected


# ---------------------------------------------------------------------------------------
# On the device: erase, mix


def test_a_quarter_of_the_views_has_a_box_of_the_recipes_erased():
    torch.manual_seed(0)
    images = data.erase(torch.full((2400, 3, 64, 64), 7.0))
    erased = (images != 7).any(dim=1)
    noise = images.transpose(0, 1)[:, erased]                # (3, all erased pixels)
    assert (noise.mean(dim=1).abs() < 0.01).all()
    assert (torch.cov(noise) - torch.eye(3)).abs().max() < 0.02      # channels are independent

    boxes = erased[erased.any(dim=(1, 2))]
    assert len(boxes) / len(images) == pytest.approx(0.25, abs=0.03)
    rows, columns = boxes.any(dim=2), boxes.any(dim=1)
    assert torch.equal(boxes, rows[:, :, None] & columns[:, None, :])
    height, width = rows.sum(dim=1).numpy(), columns.sum(dim=1).numpy()
    areas, aspects = height * width / 64**2, height / width
    assert (areas.min(), areas.mean(), areas.max()) == pytest.approx((0.02, 0.17, 0.33), rel=0.1)
    assert np.quantile(aspects, (0, 0.5, 1)) == pytest.approx((0.3, 1, 1 / 0.3), rel=0.1)

    top, left = rows.int().argmax(dim=1).numpy(), columns.int().argmax(dim=1).numpy()
    for place in (top / (64 - height), left / (64 - width)):         # from edge to edge
        assert np.quantile(place, (0, 0.5, 1)) == pytest.approx((0, 0.5, 1), abs=0.06)


def test_an_images_views_are_mixed_independently_and_with_other_images():
    """3 views of each of 4 images; every pixel is the view's number, which is its class, too."""
    numbers = torch.arange(12)
    pixels = numbers.double().view(12, 1, 1, 1).repeat(1, 3, 8, 8)
    modes, lambdas, neighbors = [], [], []
    torch.manual_seed(0)
    for _ in range(500):
        images, targets = data.mix(pixels.clone(), numbers, 12)
        told = (targets @ numbers.float()).double()          # by the targets: it is what is seen
        assert torch.allclose(images.mean(dim=(1, 2, 3)), told)

        shares = targets.diagonal()
        assert torch.equal(shares, shares[:3].repeat(4))     # one draw for each view number
        lambdas.append(shares[:3].tolist())
        modes.append((images == pixels).flatten(1).any(dim=1)[:3].tolist())
        if shares.max() < 1:
            partners = (targets - shares.diag()).argmax(dim=1)
            neighbors.append((partners[:3] // 3 - 1).tolist())

    of_eight = np.dot(modes, (4, 2, 1))                      # each view's: mixup or CutMix
    assert np.bincount(of_eight) / len(modes) == pytest.approx(1 / 8, abs=0.05)
    assert np.corrcoef(np.array(lambdas).T) == pytest.approx(np.eye(3), abs=0.15)
    of_27 = np.dot(neighbors, (9, 3, 1))                     # each view's: one of 3 other images
    assert np.bincount(of_27) / len(neighbors) == pytest.approx(1 / 27, abs=0.03)


def test_mixups_lambda_follows_beta_of_alpha_and_alpha():
    torch.manual_seed(0)
    labels = torch.arange(2).repeat_interleave(3000)         # n and 3000 + n are a group of two
    images = torch.zeros(6000, 3, 1, 1)
    _, targets = data.mix(images, labels, 2, repeats=3000, mixup=0.2, cutmix=0)
    lambdas = targets[:3000, 0]
    assert lambdas.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert lambdas.var().item() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.06)


def test_parts_of_fewer_views_than_repeats_are_not_mixed():
    for number in (1, 2):
        images = torch.randn(number, 3, 8, 8)
        mixed, targets = data.mix(images.clone(), torch.arange(number), 3)
        assert torch.equal(mixed, images) and torch.equal(targets, torch.eye(3)[:number])


def test_without_mixing_images_stay_and_targets_are_one_hot():
    originals, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    images, targets = data.mix(originals.clone(), labels, 6, mixup=0, cutmix=0)
    assert torch.equal(images, originals) and torch.equal(targets, torch.eye(6)[labels])


# ---------------------------------------------------------------------------------------
# Datasets and the command


def test_a_folders_images_and_labels_are_those_of_torchvisions_image_folder(folder, tmp_path):
    train = folder / "train"
    strange = train / "dog" / "deep" / os.fsdecode(b"\xe9 not utf-8")
    strange.mkdir(parents=True)
    (train / "dog" / "0.jpg").rename(strange / "with a much longer name than the others.JPEG")
    for name in ("cat/0.jpg", "owl"):
        elsewhere = (train / name).rename(tmp_path / f"elsewhere {name[:3]}.jpg")
        (train / name).symlink_to(elsewhere)

    def contents(images):
        return sorted((label, image.tobytes()) for image, label in images)

    ours, reference = data.Folder(train), datasets.ImageFolder(train)
    assert ours.classes == reference.classes and len(ours) == len(reference) == 48
    assert contents(ours[n] for n in range(48)) == contents(reference)
    assert torch.is_tensor(ours.paths) and torch.is_tensor(ours.labels)      # which workers share
    assert ours.paths.tolist() == sorted(ours.paths.tolist())


def test_hidden_and_system_names_other_files_and_linked_folders_add_no_images(folder):
    cat = folder / "train" / "cat"
    for start in (".", "@", "$", "__"):
        for place in (cat.parent, cat):
            (place / f"{start}folder").mkdir()
            (place / f"{start}folder" / "0.jpg").symlink_to(cat / "0.jpg")
            (place / f"{start}0.jpg").symlink_to(cat / "0.jpg")
    (cat / "notes.txt").touch()
    (cat / "link").symlink_to("../dog")
    images = data.Folder(cat.parent)
    assert (len(images), images.classes) == (48, ["cat", "dog", "owl"])


def test_a_picture_that_says_it_is_to_be_turned_is_read_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                         # by 90 degrees
    photo(97, 61).save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_rgb(tmp_path / "turned.jpg").size == (97, 61)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_pixels_without_a_fixed_range_are_refused(mode, tmp_path):
    Image.new(mode, (4, 4)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=f"deep.tiff: pixels of mode {mode} have no fixed range"):
        data.read_rgb(tmp_path / "deep.tiff")


def test_postscript_for_which_pillow_runs_a_program_is_refused_whatever_its_name(tmp_path):
    photo().save(tmp_path / "picture.jpg", "EPS")
    with pytest.raises(ValueError, match="picture.jpg: cannot identify image"):
        data.read_rgb(tmp_path / "picture.jpg")


def test_what_is_no_regular_file_is_refused_and_not_waited_for():
    with pytest.raises(ValueError, match=f"{os.devnull}: .* not a regular one"):
        data.read_rgb(os.devnull)


@pytest.mark.parametrize("ending", ["jfif", "jpe", "JPEG", "gif"])
def test_images_are_known_by_any_of_their_endings(ending, folder):
    path = folder / "train" / "cat" / "0.jpg"
    path.rename(path.with_suffix(f".{ending}"))
    assert len(data.Folder(folder / "train")) == 48


def test_an_avif_file_is_named_as_such_whatever_its_ending(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x20ftypavif" + bytes(100))
    with pytest.raises(ValueError, match="a.jpg: it is an AVIF or HEIC file"):
        data.read_rgb(tmp_path / "a.jpg")


def test_the_demo_is_deterministic_balanced_and_its_halves_differ():
    train, val = data.open_dataset("demo")
    labels = collections.Counter(val[n][1] for n in range(len(val)))
    assert labels == {label: 100 for label in range(10)}
    assert len(train.classes) == 10 and len(train) == 4000
    image, again, other = train[123][0], data.Demo(train=True)[123][0], val[123][0]
    assert image.tobytes() == again.tobytes() != other.tobytes()


def test_the_val_folder_itself_will_do_to_validate_and_nothing_else_will(folder):
    assert len(data.open_split(folder / "val", train=False)) == 15
    with pytest.raises(FileNotFoundError, match="no folder .*/val/train'"):
        data.open_split(folder / "val", train=True)
    (folder / "val").rename(folder / "test")
    with pytest.raises(FileNotFoundError, match="no folder .*/val'"):
        data.open_split(folder, train=False)


def test_classes_without_images_without_a_listing_or_none_at_all_are_refused(folder):
    with pytest.raises(ValueError, match="cat has no class folders: move each image to"):
        data.Folder(folder / "train" / "cat")
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in the class folder .*train/empty"):
        data.Folder(folder / "train")
    (folder / "train" / "ant").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="ant"):
        data.Folder(folder / "train")


def test_classes_that_differ_in_train_and_val_or_a_single_one_are_refused(folder, tmp_path):
    (folder / "val" / "cat").rename(folder / "val" / "c\xe4t")
    with pytest.raises(ValueError, match=r"train/ only: \['cat'\]; val/ only: \['c\\xe4t'\]"):
        data.open_dataset(folder)
    with pytest.raises(ValueError, match="needs the same two or more class folders"):
        data.open_dataset(write_folder(tmp_path / "single", classes=("cat",)))


def test_the_contact_sheet_has_each_picture_in_its_row(images, tmp_path, monkeypatch):
    # mirrored stands for erased, upside down for mixed
    monkeypatch.setattr(data, "erase", lambda images: images.flip(3))
    monkeypatch.setattr(data, "mix", lambda images, labels, number: (images.flip(2), None))
    monkeypatch.chdir(tmp_path)
    assert run_main(data, os.path.dirname(images.root), "--image-size", 48) == 0
    sheet = pixels_of(Image.open("contact_sheet.png"))

    shown = np.random.default_rng(0).permutation(48)[:8]
    for row, index in enumerate(shown):
        views, _ = data.TrainBatches(images, 48)[[(0, index, view) for view in range(3)]]
        expected = [data.EvalImages(images, 48)[index][0], *views.flip(3).flip(2)]
        cells = sheet[:, 2 + 50 * row:][:, :48, 2:].split(50, dim=2)
        for cell, picture in zip(cells, expected, strict=True):
            # make_grid scales the three channels alike, so colors are up to 20 levels off
            assert (cell[:, :, :48] - picture).abs().max() <= 20


def test_check_names_every_unreadable_image_and_fails(folder, capsys):
    assert run_main(data, folder, "--check") == 0
    (folder / "train" / "cat" / os.fsdecode(b"\xe9.jpg")).write_text("no image")
    truncated = folder / "val" / "owl" / "1.jpg"
    truncated.write_bytes(truncated.read_bytes()[:200])
    (folder / "val" / "owl" / "2.HEIC").touch()
    capsys.readouterr()
    assert run_main(data, folder, "--check") == 1
    train, first, _, none, val, second, counts, endings = capsys.readouterr().out.splitlines()
    assert (train, val) == ("train: 49 images, 1 unreadable", "val: 15 images, 1 unreadable")
    assert first.startswith(rf"  cannot read image {folder}/train/cat/\udce9.jpg: ")
    assert second.startswith(f"  cannot read image {truncated}: ")
    assert counts == ("  images per class: {'cat': 5, 'dog': 5, 'owl': 4}; "
                      "the largest class has 33.3%")
    assert none.endswith("endings set()") and endings.endswith("endings {'.heic'}")


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    assert run_main(data, "nowhere") == 1
    assert run_main(data) == 2
    of_data, of_usage = capsys.readouterr().err.splitlines()
    assert of_data.startswith("data.py: no folder 'nowhere/train' (rename one")
    assert of_usage == "data.py: error: the following arguments are required: DIR"
