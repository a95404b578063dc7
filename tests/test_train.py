"""The recipe, the loop and the run, through the functions and through the command line."""
import contextlib
import copy
import json
import logging
import shutil
from dataclasses import asdict

import pytest
import timm.scheduler
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import deit
import distill
import evaluate
import teacher
import train
from conftest import load, run_main, run_script, small_run

CPU = evaluate.World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
OTHER_RANK = CPU._replace(rank=1)                            # shows no progress, writes nothing


def train_here(folder, output, **changes):
    """A run in this process, of one epoch of 3 steps by default. Returns its log."""
    values = {"data": str(folder), "image_size": 32, "batch_size": 16, "epochs": 1,
              "warmup_epochs": 1.0, "precision": "fp32", "workers": 0}
    return train.train(train.make_recipe(values | changes), None, CPU, output)


def losses(record):
    """Of an epoch. Accuracies would jump by a whole image where rounding decides."""
    return {name: value for name, value in record.items() if "loss" in name}


class PixelTeacher(nn.Module):
    """Knows three classes by the color of one pixel: a rule that depends on nothing else."""

    def forward(self, images):
        return images[:, :, 16, 16]


@pytest.fixture
def pixel_teacher(monkeypatch):
    monkeypatch.setattr(teacher, "load_teacher", lambda *_, **__: PixelTeacher())


# ---------------------------------------------------------------------------------------
# The recipe


def test_defaults_are_the_papers_table_9():
    recipe = train.make_recipe({"data": "imagenet"})
    expected = dict(
        epochs=300, batch_size=1024, lr=0.0005, weight_decay=0.05, warmup_epochs=5,
        label_smoothing=0.1, drop_path=0.1, repeats=3, rand_augment=9, mixup=0.8, cutmix=1.0,
        erasing=0.25, image_size=224, min_lr=1e-5, warmup_lr=1e-6, alpha=0.5, ema=0, clip_grad=0)
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert train.make_recipe({"data": "imagenet", "distill": "soft"}).alpha == 0.1


def test_the_learning_rate_is_timms_with_a_peak_that_scales_with_the_batch():
    recipe = train.make_recipe({"data": "imagenet", "batch_size": 256})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.5e-4)
    timms = timm.scheduler.CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5,
                                             warmup_lr_init=1e-6)
    for epoch in (0, 1, 2.5, 4, 5, 6, 49.5, 150, 299, 299.9):
        timms.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        assert train.learning_rate(recipe, epoch) == pytest.approx(expected)


def test_the_rate_never_rises_above_its_peak():
    recipe = train.Recipe(lr=5e-6, batch_size=32, warmup_lr=1e-6, min_lr=5e-6)
    rates = [train.learning_rate(recipe, epoch) for epoch in range(300)]
    assert rates == pytest.approx([5e-6 * 32 / 512] * 300)


def test_decay_groups_are_the_official_ones():
    with torch.device("meta"):
        model = deit.create_model("base", distilled=True)
    groups = {group["weight_decay"]: group["params"]
              for group in train.parameter_groups(model, 0.05)}
    counts = {decay: (len(params), sum(parameter.numel() for parameter in params))
              for decay, params in groups.items()}
    assert counts == {0.0: (103, 276_944), 0.05: (52, 87_061_248)}
    assert any(parameter is model.dist_token for parameter in groups[0.05])


def typed_recipe(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    _, _, typed = train.parse_flags()
    return train.make_recipe(typed)


def test_distill_alone_is_hard_and_without_imagenet_it_is_on_the_demo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = typed_recipe(monkeypatch, "--distill", "--epochs", "2")
    assert (recipe.distill, recipe.data, recipe.epochs) == ("hard", "demo", 2)
    assert recipe.image_size == train.DEMO["image_size"]
    (tmp_path / "imagenet").mkdir()
    assert typed_recipe(monkeypatch, "--distill").data == "imagenet"


# finetune-384 is the official command for 384 pixels; the other two are ours
@pytest.mark.parametrize("name, changes", [
    ("finetune-384", dict(image_size=384, epochs=30, batch_size=512, lr=5e-6, min_lr=5e-6,
                          weight_decay=1e-8, drop_path=0, ema=0.99996)),
    ("convnet", dict(optimizer="sgd", lr=0.2, weight_decay=5e-5, batch_size=256, epochs=100,
                     repeats=1, rand_augment=0, erasing=0, mixup=0, cutmix=0)),
    ("transfer", dict(lr=5e-5, min_lr=1e-6, batch_size=256, epochs=100, erasing=0))])
def test_a_preset_changes_these_values_and_no_others(name, changes, monkeypatch):
    ordinary = asdict(typed_recipe(monkeypatch, "--data", "imagenet"))
    recipe = asdict(typed_recipe(monkeypatch, "--data", "imagenet", "--recipe", name))
    assert {key: value for key, value in recipe.items() if value != ordinary[key]} == changes


def test_a_typed_flag_wins_over_the_preset(monkeypatch):
    recipe = typed_recipe(monkeypatch, "--epochs", "7", "--recipe", "finetune-384")
    assert (recipe.epochs, recipe.image_size) == (7, 384)


@pytest.mark.parametrize("read, refused", [
    (train.positive_int, ("0", "1.5")),
    (train.zero_or_more, ("-1", "nan", "inf")),
    (train.from_0_to_1, ("-1", "nan", "1.1"))])
def test_values_out_of_range_are_refused(read, refused):
    for text in refused:
        with pytest.raises(ValueError):
            read(text)


# ---------------------------------------------------------------------------------------
# The loop


def test_distilled_steps_are_those_of_a_plain_loop(shared_folder, tmp_path, pixel_teacher):
    log = train_here(
        shared_folder, tmp_path / "run", distill="hard", any_teacher=True, alpha=0.3, epochs=2,
        batch_size=24, accum_steps=2, warmup_epochs=2.0, lr=0.032, ema=0.9, weight_decay=0.1,
        label_smoothing=0.2, drop_path=0.3, rand_augment=5.0, erasing=0.5, repeats=2, mixup=0.5,
        cutmix=0.7, seed=5)
    last = load(tmp_path / "run" / "last.pth")

    torch.manual_seed(5)
    model = deit.create_model("tiny", distilled=True, image_size=32, num_classes=3, drop_path=0.3)
    model.train()
    average = copy.deepcopy(model.state_dict())
    groups = {0.0: [], 0.1: []}
    for name, value in model.named_parameters():
        decay = 0.0 if value.ndim <= 1 or name in ("cls_token", "pos_embed") else 0.1
        groups[decay].append(value)
    # fused like ours, to the bit: the gradient of a key's bias is nothing but rounding
    optimizer = torch.optim.AdamW([{"params": values, "weight_decay": decay}
                                   for decay, values in groups.items()], fused=True)

    images = data.open_split(shared_folder, train=True)
    sampler = data.RepeatedAugSampler(48, batch_size=12, accum_steps=2, repeats=2, seed=5)
    loader = data.train_loader(images, sampler, 32, rand_augment=5.0, workers=0)
    decided, losses = set(), []
    for epoch, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if step == 0:
            sampler.set_epoch(epoch)
            batches = iter(loader)
        for part in range(2):
            pixels, labels = next(batches)
            torch.manual_seed(data.seed_from(5, epoch, step, part))
            images = data.erase(data.normalize(pixels), 0.5)
            images, targets = data.mix(images, labels, 3, repeats=2, mixup=0.5, cutmix=0.7)
            class_logits, distillation_logits = model(images)
            decisions = images[:, :, 16, 16].argmax(dim=1)
            loss = (0.7 * F.cross_entropy(class_logits, targets, label_smoothing=0.2)
                    + 0.3 * F.cross_entropy(distillation_logits, decisions))
            (loss / 2).backward()
            decided |= set(decisions.tolist())
            losses.append(loss.item())

        for group in optimizer.param_groups:                 # two epochs of warm-up to 0.0015
            group["lr"] = 1e-6 + (0.0015 - 1e-6) * (2 * epoch + step) / 4
        optimizer.step()
        optimizer.zero_grad()
        for name, value in model.state_dict().items():
            average[name] = 0.9 * average[name] + 0.1 * value

    assert len(decided) > 1                                  # the teacher makes a difference
    means = [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    assert [record["train_loss"] for record in log] == pytest.approx(means)
    for name, value in model.state_dict().items():
        assert (value - last["model"][name]).norm() <= 1e-6 * value.norm(), name
        assert (average[name] - last["averaged_model"][name]).norm() <= 1e-6 * value.norm(), name


def test_the_soft_loss_is_that_of_a_teacher_that_computes_no_gradients():
    logits, with_gradients = torch.rand(2, 4, 3), []

    def teacher_model(images):
        with_gradients.append(torch.is_grad_enabled())
        return logits[1]

    recipe = train.Recipe(distill="soft", temperature=2.0, precision="fp32")
    labels = torch.tensor([0, 1, 2, 0])
    teacher_logits = train.ask_teacher(teacher_model, logits)
    _, _, term = train.compute_losses(lambda _: (logits[0], logits[0]), logits, labels,
                                      teacher_logits, recipe)
    assert term == distill.soft_distillation(*logits, 2.0)
    assert with_gradients == [False]


def test_without_a_teacher_the_loss_is_the_smoothed_cross_entropy():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    recipe = train.Recipe(label_smoothing=0.3, precision="fp32")
    (loss,) = train.compute_losses(lambda _: logits, logits, torch.tensor([2]), None, recipe)
    expected = -(logits.log_softmax(dim=1) @ torch.tensor([0.1, 0.1, 0.8]))
    assert loss.item() == pytest.approx(expected.item())


def test_a_model_learns_to_tell_three_colors(shared_folder, tmp_path):
    log = train_here(shared_folder, tmp_path / "run", epochs=8, lr=0.016, drop_path=0.0,
                     label_smoothing=0.0, repeats=1, rand_augment=0.0, erasing=0.0, mixup=0.0,
                     cutmix=0.0)
    assert len(log) == 8 and log[-1]["top1"] == 100


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clip_grad_bounds_the_norm_of_the_whole_gradient(precision, shared_folder, tmp_path):
    train_here(shared_folder, tmp_path, clip_grad=1e-3, precision=precision, batch_size=48,
               optimizer="sgd", lr=100 * 512 / 48, weight_decay=0.0, warmup_epochs=0.0)
    end = load(tmp_path / "last.pth")["model"]
    torch.manual_seed(0)
    start = deit.create_model("tiny", image_size=32, num_classes=3).state_dict()
    displacement = torch.cat([(end[name] - start[name]).flatten() for name in start])
    expected = 1.9 * 100 * 1e-3                              # 1.9: Nesterov's
    assert displacement.norm().item() == pytest.approx(expected, rel=0.01)


def test_averaged_statistics_follow_by_the_decay():
    model = nn.BatchNorm1d(4)
    average = copy.deepcopy(model)
    model.running_var.fill_(2.0)
    model.num_batches_tracked.fill_(7)
    train.update_average(average, model, 0.9)
    assert torch.allclose(average.running_var, torch.full((4,), 1.1))
    assert average.num_batches_tracked == 0


class NoBlockingCopy(TorchDispatchMode):
    """Refuses a copy from the CPU to another device that the CPU would wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            assert kwargs.get("non_blocking") or not kwargs.get("device"), "this copy waits"
        return function(*args, **kwargs)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_no_step_waits_for_the_device(kind, monkeypatch):
    """On torch's meta device tensors have no values: to look at one is an error."""
    monkeypatch.setattr(train, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "LOOK_SECONDS", 600)          # of 99 steps none is the last
    recipe = train.Recipe(distill=kind, batch_size=16, accum_steps=2, ema=0.9, clip_grad=1.0)
    nowhere = OTHER_RANK._replace(device=torch.device("meta"))
    sampler = data.RepeatedAugSampler(32, batch_size=8, accum_steps=2)
    loader = data.train_loader(data.Demo(train=True), sampler, 32, workers=0)
    with nowhere.device:
        model = deit.create_model("tiny", distilled=True, image_size=32, num_classes=10)
        teacher_model = deit.create_model("tiny", image_size=32, num_classes=10)
        teacher_labels = torch.zeros(5, 8, dtype=torch.int32)
    models = {"model": model, "averaged_model": copy.deepcopy(model).requires_grad_(False)}
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05), foreach=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    progress = train.Progress(None, recipe, nowhere, 99, 0)
    with NoBlockingCopy():
        train.train_epoch(0, recipe, nowhere, loader, models, model, teacher_model,
                          teacher_labels, optimizer, scaler, progress)
    assert progress.sums.is_meta


def test_the_sums_of_the_losses_do_not_depend_on_when_they_are_looked_at(monkeypatch):
    def note(progress, values, step):
        shown.append(values["running_loss"])

    recipe, means, shown = train.Recipe(distill="hard", accum_steps=2), [], []
    monkeypatch.setattr(train.Progress, "show", note)
    losses = torch.rand(50, 2, 3, generator=torch.Generator().manual_seed(0))
    for seconds in (-1, 600):
        monkeypatch.setattr(train, "LOOK_SECONDS", seconds)
        progress = train.Progress(None, recipe, OTHER_RANK, 50, 0)
        for step in range(50):
            for part in range(2):
                progress.add(list(losses[step, part]))
            progress.end_step(0, step, 0.1)
        means.append(progress.end_epoch(CPU))
    assert means[0] == means[1]
    expected = losses.double().mean(dim=(0, 1)).tolist()
    assert list(means[0].values()) == pytest.approx(expected, rel=1e-12)
    assert shown[-1] == pytest.approx(expected[0])           # after the last step


# ---------------------------------------------------------------------------------------
# Several processes


@pytest.fixture(scope="module")
def taught(shared_folder, tmp_path_factory):
    """A teacher and the student that it taught, trained by two processes each."""
    folder = tmp_path_factory.mktemp("taught")
    flags = small_run(shared_folder, folder / "teacher", "--recipe", "convnet")
    run_script("train.py", *flags, "--model", "regnet_x_400mf", "--workers", 1, processes=2)
    done = run_script("train.py", *student_flags(shared_folder, folder, "2x2", 2), processes=2)
    assert (done.stdout + done.stderr).count("epoch 1: top-1 ") == 1     # by one process
    return folder


def student_flags(images, folder, name, accum_steps):
    """Two epochs of one step of 48 views. The step of SGD without decay is the gradient."""
    return small_run(images, folder / name, "--batch-size", 48, "--epochs", 2, "--ema", 0.9,
                     "--distill", "--teacher", folder / "teacher" / "best.pth", "--any-teacher",
                     "--drop-path", 0.3, "--erasing", 0.5, "--optimizer", "sgd",
                     "--weight-decay", 0, "--warmup-epochs", 0, "--lr", 1,
                     "--accum-steps", accum_steps)


@pytest.fixture(scope="module")
def in_one_process(taught, shared_folder):
    assert run_main(train, *student_flags(shared_folder, taught, "1x4", 4)) == 0
    return taught / "1x4"


def assert_equal_up_to_rounding(run, other):
    """The losses and how far each weight moved, with mixing, erasing and dropped paths."""
    run, other = load(run / "last.pth"), load(other / "last.pth")
    for record, expected in zip(run["log"], other["log"], strict=True):
        assert losses(record) == pytest.approx(losses(expected), rel=1e-5)

    torch.manual_seed(0)
    start = deit.create_model("tiny", distilled=True, image_size=32, num_classes=3).state_dict()
    for name, value in start.items():
        end, other_end = run["model"][name], other["model"][name]
        assert (end - other_end).norm() <= 1e-4 * (other_end - value).norm() + 1e-7, name


def test_two_processes_of_two_parts_compute_what_one_of_four_parts_does(taught, in_one_process):
    assert_equal_up_to_rounding(taught / "2x2", in_one_process)


def test_four_processes_compute_what_one_of_four_parts_does(
        taught, in_one_process, shared_folder):
    run_script("train.py", *student_flags(shared_folder, taught, "4x1", 1), processes=4)
    assert_equal_up_to_rounding(taught / "4x1", in_one_process)


def test_processes_gather_the_labels_that_one_process_keeps(taught, in_one_process):
    for epoch in range(2):
        gathered, kept = (teacher.label_file(run, epoch).read_bytes()
                          for run in (taught / "2x2", in_one_process))
        assert gathered == kept


def test_evaluation_gives_what_two_processes_noted_of_a_convnets_best_epoch(
        taught, shared_folder, capsys):
    best = taught / "teacher" / "best.pth"
    assert run_main(evaluate, "--weights", best, "--data", shared_folder, "--workers", 0) == 0
    record = load(best)["record"]
    expected = "* Acc@1 {top1:.3f} Acc@5 {top5:.3f} loss {loss:.3f}".format(**record)
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_a_convnet_is_trained_by_nesterovs_momentum_and_its_preset(taught):
    groups = load(taught / "teacher" / "last.pth")["optimizer"]["param_groups"]
    assert [(group["momentum"], group["nesterov"]) for group in groups] == [(0.9, True)] * 2
    assert [group["weight_decay"] for group in groups] == [0, 5e-5]


def test_a_run_goes_on_in_other_processes_if_they_compute_parts_of_the_same_size(
        taught, tmp_path, capsys):
    run = shutil.copytree(taught / "2x2", tmp_path / "run")
    flags = "--resume", "--output", run, "--accum-steps"
    assert run_main(train, *flags, 2) == 1
    assert "part_size" in capsys.readouterr().err
    assert run_main(train, *flags, 4) == 0


# ---------------------------------------------------------------------------------------
# The run


def test_the_runs_folder_tells_its_recipe_and_its_log_which_tensorboard_shows(taught):
    last = load(taught / "2x2" / "last.pth")
    assert json.loads((taught / "2x2" / "recipe.json").read_text()) == last["recipe"]
    assert last["recipe"].keys() == asdict(train.Recipe()).keys()
    assert last["classes"] == ["cat", "dog", "owl"]

    log = [json.loads(line) for line in (taught / "2x2" / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [0, 1] and last["log"] == log
    scores = {f"{head}{score}" for head in ("", "class_", "distillation_", "ema_", "ema_class_")
              for score in ("top1", "top5", "loss", "agreement")}
    losses = {"train_loss", "train_class_loss", "train_distillation_loss"}
    assert scores | losses <= log[0].keys()
    assert log[0]["train_loss"] == pytest.approx(
        (log[0]["train_class_loss"] + log[0]["train_distillation_loss"]) / 2)

    events = EventAccumulator(str(taught / "2x2")).Reload()
    for name in log[0]:
        shown = [(point.step, point.value) for point in events.Scalars(name)]
        assert shown == [(1, pytest.approx(log[0][name])), (2, pytest.approx(log[1][name]))], name


def test_a_compiled_run_learns_the_same(shared_folder, tmp_path, pixel_teacher, monkeypatch,
                                        caplog):
    caplog.set_level(logging.WARNING, "torch.__trace")       # pytest would collect megabytes
    compiled, compile = [], torch.compile

    def all_but_the_slow_last_stage(model):
        compiled.append(type(model))
        return compile(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", all_but_the_slow_last_stage)
    settings = dict(distill="hard", any_teacher=True, ema=0.9, lr=0.032)
    (record,) = train_here(shared_folder, tmp_path / "compiled", compile=True, **settings)
    assert compiled == [deit.DeiT, PixelTeacher]
    (expected,) = train_here(shared_folder, tmp_path / "ordinary", **settings)
    assert losses(record) == pytest.approx(losses(expected), rel=1e-4)


def test_the_best_weights_are_those_of_the_best_epoch(shared_folder, tmp_path, monkeypatch):
    validate, top1 = train.validate, iter((0.0, 50.0, 90.0, 10.0))       # 0: before the start
    monkeypatch.setattr(train, "validate", lambda *args: validate(*args) | {"top1": next(top1)})
    log = train_here(shared_folder, tmp_path / "run", epochs=3, lr=0.032)
    assert len({record["loss"] for record in log}) == 3

    loader = data.eval_loader(data.open_split(shared_folder, train=False), 32)
    for name, epoch in (("best.pth", 1), ("last.pth", 2)):
        model = deit.load_model(tmp_path / "run" / name)
        score = evaluate.evaluate(model, loader, CPU.device)["mean"]
        assert score.loss == log[epoch]["loss"], name


def test_a_plain_run_is_fine_tuned_at_a_higher_resolution_with_distillation(
        shared_folder, tmp_path, monkeypatch, capsys):
    def load_teacher(source, *, classes, image_size):
        asked.append((source, classes, image_size))
        return PixelTeacher()

    asked = []
    monkeypatch.setattr(teacher, "load_teacher", load_teacher)
    train_here(shared_folder, tmp_path / "plain")
    train_here(shared_folder, tmp_path / "tuned", image_size=48, distill="hard", any_teacher=True,
               teacher="convnet.pth", init=str(tmp_path / "plain" / "best.pth"))
    assert asked == [("convnet.pth", ["cat", "dog", "owl"], 48)]
    model = deit.load_model(tmp_path / "tuned" / "best.pth")
    assert (model.image_size, model.distilled) == (48, True)
    assert "fresh weights, not from the file: dist_token, head_dist" in capsys.readouterr().out


def test_init_weights_of_other_classes_get_a_fresh_head_and_are_not_needed_to_resume(
        tmp_path, capsys):
    path = tmp_path / "init.pth"
    state = deit.create_model("tiny", image_size=32, num_classes=3).state_dict()
    torch.save({"model": state, "classes": ["ant", "bee", "emu"]}, path)
    recipe = train.Recipe(image_size=32, init=str(path))
    train.build_model(recipe, ["bee", "ant", "emu"], None)
    assert "fresh weights, not from the file: head.weight" in capsys.readouterr().out

    path.unlink()
    train.build_model(recipe, ["bee", "ant", "emu"], {"log": []})


def test_without_data_the_demo_makes_its_teacher_and_says_so_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.Demo, "train_size", 64)
    monkeypatch.setattr(data.Demo, "val_size", 20)
    flags = ("--distill", "--any-teacher", "--image-size", 32, "--epochs", 1, "--workers", 0)
    assert run_main(train, *flags) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NO --data AND NO ./imagenet HERE: training on the built-in demo")
    path = "runs/tiny-distilled-demo/teacher/best.pth"
    recipe = load(path)["recipe"]
    assert (recipe["model"], recipe["image_size"]) == ("regnet_y_400mf", 32)
    assert load("runs/tiny-distilled-demo/last.pth")["recipe"]["teacher"] == path


@pytest.mark.parametrize("flags, message", [
    ("--epochs 0", "argument --epochs: invalid positive_int value: '0'"),
    ("--compile False", "argument --compile: invalid switch value: 'False'"),
    ("--batch-size 15 --accum-steps 2", "--batch-size 15 must be a multiple of"),
    ("--distill --teacher ants.pth", "teacher ants.pth does not know the 3 classes of the data"),
    ("--teacher ants.pth", "--teacher does nothing without --distill"),
    ("--model regnet_y_400mf --distill", "--distill is for a DeiT"),
    ("--init ants.pth", "--init is a regnet_x_400mf model: use --model regnet_x_400mf")])
def test_a_mistake_is_one_line_and_a_status_before_any_work(
        flags, message, shared_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = teacher.create_regnet("regnet_x_400mf", 3).state_dict()
    torch.save({"model": state, "classes": ["ant", "bee", "emu"]}, "ants.pth")
    assert run_main(train, *small_run(shared_folder, "run"), *flags.split()) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"train.py: {message}") and printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ants.pth"]    # no run that never was
