"""The recipe, the loop and the run, through the functions and through the command line."""
import contextlib
import copy
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, fields
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import deit
import evaluate
import teacher
import train
from conftest import ROOT, difference_of_runs, run_main, run_script, write_folder
from gradient_of_one_step import BATCH, PixelTeacher

CPU = evaluate.World(torch.device("cpu"), 0, 1, 0, 1)


def small_run(folder, output, *more):
    return ("--data", folder, "--image-size", 32, "--batch-size", 16, "--epochs", 3, "--warmup-epochs", 1,
            "--workers", 1, "--output", output, *more)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(path, folder):
    """{head: loss} of a checkpoint on the validation images, as evaluate.py computes them."""
    loader = data.eval_loader(data.open_split(folder, train=False), 32)
    scores = evaluate.evaluate(evaluate.load_any(path), loader, torch.device("cpu"))
    return {head: score.loss for head, score in scores.items()}


@pytest.fixture(scope="module")
def regnet_file(tmp_path_factory):
    """An untrained RegNet of three classes."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(0)
    torch.save({"model": teacher.create_regnet("regnet_x_400mf", 3).state_dict()}, path)
    return path


# ---------------------------------------------------------------------------------------------------
# The recipe


def test_defaults_are_the_papers_table_9():
    recipe = train.make_recipe({"data": "imagenet"})
    expected = dict(epochs=300, batch_size=1024, lr=0.0005, weight_decay=0.05, warmup_epochs=5, label_smoothing=0.1,
                    drop_path=0.1, repeats=3, rand_augment=9, mixup=0.8, cutmix=1.0, erasing=0.25, image_size=224,
                    min_lr=1e-5, warmup_lr=1e-6, alpha=0.5, ema=0, mix_group=256)
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert train.make_recipe({"data": "imagenet", "model": "base"}).mix_group == 64
    assert train.make_recipe({"data": "imagenet", "distill": "soft"}).alpha == 0.1


@pytest.mark.parametrize("epoch, rate", [
    (0, 1e-6), (1, 2.008e-4), (2.5, 5.005e-4), (4, 8.002e-4), (5, 9.993216e-4), (6, 9.990232e-4), (49, 9.362508e-4),
    (99, 7.569755e-4), (149, 5.101835e-4), (150, 5.05e-4), (199, 2.620026e-4), (298, 1.010856e-5), (300, 1e-5)])
def test_the_learning_rate_is_timms_without_the_delay_of_an_epoch(epoch, rate):
    assert train.learning_rate(train.make_recipe({"data": "imagenet"}), epoch) == pytest.approx(rate, rel=2e-6)


def test_the_learning_rate_scales_with_the_global_batch_and_its_ends_do_not():
    recipe = train.make_recipe({"data": "imagenet", "batch_size": 256})
    assert [train.learning_rate(recipe, epoch) for epoch in (0, 300)] == pytest.approx([1e-6, 1e-5])
    assert train.learning_rate(recipe, 2.5) == pytest.approx((1e-6 + 2.5e-4) / 2)


def test_the_rate_never_rises_above_its_peak_though_the_end_of_the_cosine_is_higher():
    recipe = train.make_recipe({"data": "imagenet", "model": "base", "recipe": "finetune-384", "batch_size": 32})
    rates = [train.learning_rate(recipe, step / 10) for step in range(10 * recipe.epochs + 1)]
    assert recipe.min_lr > 5e-6 * 32 / 512 and max(rates) == pytest.approx(5e-6 * 32 / 512)
    assert rates[50:] == pytest.approx([5e-6 * 32 / 512] * 251)          # from the end of the warm-up on


@pytest.mark.parametrize("size, distilled, spared, decayed", [
    ("tiny", False, (102, 69_544), (50, 5_647_872)), ("tiny", True, (103, 70_736), (52, 5_840_064)),
    ("base", True, (103, 276_944), (52, 87_061_248))])
def test_decay_groups_are_the_official_ones(size, distilled, spared, decayed):
    with torch.device("meta"):
        model = deit.create_model(size, distilled=distilled)
    groups = {group["weight_decay"]: group["params"] for group in train.parameter_groups(model, 0.05)}
    assert {decay: (len(params), sum(p.numel() for p in params)) for decay, params in groups.items()} == {
        0.0: spared, 0.05: decayed}
    assert not distilled or any(parameter is model.dist_token for parameter in groups[0.05])


def test_every_field_of_the_recipe_is_a_flag_with_help(capsys):
    assert run_main(train, "--help") == 0
    text = capsys.readouterr().out
    assert all(train.option(item.name) in text and item.metadata["help"] for item in fields(train.Recipe))


def test_distill_alone_is_hard_and_typed_flags_win_over_the_demos(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--model", "tiny", "--distill", "--epochs", "2"])
    recipe = train.make_recipe(train.parse_flags())
    assert (recipe.distill, recipe.data, recipe.epochs, recipe.image_size) == ("hard", "demo", 2, 48)
    (tmp_path / "imagenet").mkdir()
    assert train.make_recipe(train.parse_flags()).data == "imagenet"


@pytest.mark.parametrize("name, peak, changes", [                        # peak: the rate at the preset's own batch
    ("finetune-384", 5e-6, dict(image_size=384, epochs=30, batch_size=512, min_lr=5e-6, weight_decay=1e-8, ema=0.99996,
                                drop_path=0, mix_group=32)),
    ("mmpretrain-small", 1e-3, dict(warmup_epochs=20, clip_grad=5, repeats=1, drop_path=0)),
    ("cifar-cars", 0.01, dict(optimizer="sgd", batch_size=768, epochs=1000, weight_decay=1e-4, erasing=0, drop_path=0)),
    ("inaturalist", 7.5e-5, dict(batch_size=768, epochs=360, erasing=0.1))])
def test_a_preset_sets_its_sources_values_and_no_others(name, peak, changes):
    recipe, ordinary = (asdict(train.make_recipe({"data": "imagenet"} | more)) for more in ({"recipe": name}, {}))
    assert recipe["lr"] * recipe["batch_size"] / 512 == pytest.approx(peak)
    assert {key: value for key, value in recipe.items()
            if value != ordinary[key] and key not in ("recipe", "lr")} == changes


def test_a_typed_flag_wins_over_the_preset():
    recipe = train.make_recipe({"data": "imagenet", "recipe": "finetune-384", "epochs": 7})
    assert (recipe.epochs, recipe.image_size) == (7, 384)


# ---------------------------------------------------------------------------------------------------
# The loop


def build_run(folder, output, teacher_model=None, **changes):
    """A run as train.py builds it, in this process, with `teacher_model` in the place of the one it would load."""
    recipe = train.make_recipe({"data": str(folder), "image_size": 32, "batch_size": 16, "workers": 0} | changes)
    with mock.patch.object(teacher, "load_teacher", lambda *_: teacher_model):
        return train.build(recipe, CPU, output)


def train_one_epoch(run):
    meter = train.Meter(run)
    train.train_epoch(run, 0, iter(run.loader), meter)
    meter.close()


def test_three_distilled_steps_are_those_of_a_plain_loop(shared_folder, tmp_path):
    run = build_run(shared_folder, tmp_path / "run", PixelTeacher(), distill="hard", any_teacher=True, accum_steps=2,
                    drop_path=0.3, erasing=0.5, lr=0.032, warmup_epochs=1.0, mix_group=4, seed=5)
    model, decisions = copy.deepcopy(run.model).train(), set()
    groups = {0.0: [], 0.05: []}
    for name, value in model.named_parameters():
        groups[0.0 if value.ndim <= 1 or name in ("cls_token", "pos_embed") else 0.05].append(value)
    optimizer = torch.optim.AdamW([{"params": values, "weight_decay": decay} for decay, values in groups.items()],
                                  fused=True)    # like ours to the bit: a key's bias has no gradient but rounding
    batches = iter(run.loader)
    for step, rate in enumerate((1e-6, 1e-6 + (1e-3 - 1e-6) / 3, 1e-6 + (1e-3 - 1e-6) * 2 / 3)):
        for part in range(2):
            pixels, labels, first, boxes = next(batches)
            images = data.erase(data.normalize(pixels), boxes)
            torch.manual_seed(data.seed_from(5, 0, step))
            images, targets = data.mix(images, labels, 3, first=first, repeats=3, num_mixes=4, mixup=0.8, cutmix=1.0)
            torch.manual_seed(data.seed_from(5, 0, step, part, 0))
            class_logits, distillation_logits = model(images)
            decisions |= set((decided := images[:, :, 16, 16].argmax(dim=1)).tolist())
            loss = (F.cross_entropy(class_logits, targets, label_smoothing=0.1) / 2
                    + F.cross_entropy(distillation_logits, decided) / 2)
            (loss / 2).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    train_one_epoch(run)
    assert run.state["step"] == 3 and len(decisions) > 1
    for name, value in model.named_parameters():
        assert (value - run.model.get_parameter(name)).norm() <= 1e-6 * value.norm(), name


def test_the_teacher_sees_the_images_the_student_sees_without_gradients(shared_folder, tmp_path, monkeypatch):
    class Spy(PixelTeacher):
        def forward(self, images):
            self.images, self.grad_enabled = images.clone(), torch.is_grad_enabled()
            return super().forward(images)

    seen, spy, forward = [], Spy(), deit.DeiT.forward
    run = build_run(shared_folder, tmp_path / "run", spy, distill="soft", any_teacher=True)
    monkeypatch.setattr(deit.DeiT, "forward", lambda self, images: seen.append(images.clone()) or forward(self, images))
    train_one_epoch(run)
    assert torch.equal(seen[-1], spy.images) and not spy.grad_enabled


def test_a_model_learns_the_training_images_by_heart(shared_folder, tmp_path):
    run = build_run(shared_folder, tmp_path / "run", epochs=8, lr=0.032, warmup_epochs=1.0, repeats=1, rand_augment=0.0,
                    erasing=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0, label_smoothing=0.0)
    train.train(run, train.Meter(run))
    loader = data.eval_loader(data.open_split(shared_folder, train=True), 32)
    score = evaluate.evaluate(run.model, loader, CPU.device)["mean"]
    assert (score.images, score.correct1) == (48, 48)


def test_sgd_is_nesterovs(shared_folder, tmp_path):
    run = build_run(shared_folder, tmp_path / "run", optimizer="sgd", weight_decay=0.0)
    weight = run.model.head.weight
    before, gradient = weight.detach().clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for group in run.optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        weight.grad = gradient.clone()
        run.optimizer.step()
    # velocities 1 and 1.9; Nesterov's steps add 0.9 of each to the gradient: 1.9 and 2.71
    assert torch.allclose(weight, before - 0.1 * (1.9 + 2.71) * gradient, atol=1e-6)


@pytest.mark.parametrize("limit, length", [(1e-3, 1e-3), (1e6, None)])
def test_clip_grad_bounds_the_norm_of_the_whole_gradient(limit, length, shared_folder, tmp_path, monkeypatch):
    norms = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_, **__: norms.append(torch.cat(
        [p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm().item()))
    train_one_epoch(build_run(shared_folder, tmp_path / "run", clip_grad=limit))
    assert norms[0] == pytest.approx(length, rel=1e-3) if length else norms[0] > 1e-2


def test_averaged_weights_and_statistics_follow_by_the_decay():
    model = nn.BatchNorm1d(4)
    average = copy.deepcopy(model)
    expected = {"weight": model.weight.detach().clone(), "running_var": model.running_var.clone()}
    for step in range(3):
        with torch.no_grad():
            model.weight.add_(1.0)
            model.running_var.mul_(2.0)
        train.update_average(average, model, 0.9)
        expected = {name: 0.9 * old + 0.1 * getattr(model, name) for name, old in expected.items()}
    assert all(torch.allclose(getattr(average, name), value, atol=1e-6) for name, value in expected.items())


class NoBlockingCopy(TorchDispatchMode):
    """Refuses a copy from the CPU to another device that the host would wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if function.overloadpacket == torch.ops.aten.copy_ else args[0]
            target = args[0].device if function.overloadpacket == torch.ops.aten.copy_ else kwargs.get("device")
            is_free = kwargs.get("non_blocking") or args[2:3] == (True,) or source.device.type != "cpu"
            assert is_free or target in (None, source.device), f"{function} of {tuple(source.shape)} waits"
        return function(*args, **kwargs)


@pytest.mark.parametrize("distill", [None, "hard", "soft"])
def test_no_step_waits_for_the_device(distill, tmp_path, monkeypatch):
    """On torch's meta device tensors have no values: to look at one, as .item() and its like do, is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())    # does not know that device
    looks = []
    monkeypatch.setattr(train, "LOOK_SECONDS", 600)
    monkeypatch.setattr(train.Meter, "exchange", lambda self, *_: looks.append(self.steps))      # at the epoch's end
    monkeypatch.setattr(train, "SummaryWriter", lambda *_, **__: None)   # it gets a picture of the first batch, once
    nowhere = CPU._replace(device=torch.device("meta"))
    recipe = train.make_recipe({"data": "imagenet", "distill": distill, "batch_size": 8, "mix_group": 4, "ema": 0.9,
                                "clip_grad": 1.0, "precision": "fp32", "accum_steps": 2})
    with torch.device("meta"):
        model = deit.create_model("tiny", distilled=bool(distill), image_size=32, drop_path=0.1)
    guide = teacher.freeze(teacher.create_regnet("regnet_y_400mf")).to("meta") if distill else None
    batch = (torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.randint(1000, (8,)), 0,
             torch.tensor([(1, 4, 4, 10, 10, 7)]))
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05), lr=0.0, foreach=True)     # not fused there
    run = train.Run(recipe, nowhere, tmp_path, [""] * 1000, model, model, copy.deepcopy(model).requires_grad_(False),
                    optimizer, torch.amp.GradScaler("cpu", enabled=False), guide, None, SimpleNamespace(steps=3), None,
                    None, {"step": 0, "log": [], "epoch_sums": None})
    meter = train.Meter(run)
    data.mean_and_std(nowhere.device)                                    # once in a run, and not in every step
    with NoBlockingCopy():
        train.train_epoch(run, 0, iter([batch] * 6), meter)
    meter.close()
    assert looks == [3] and meter.sums.is_meta and run.state["step"] == 3


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("large") / "images", train=BATCH // 3)


def first_step(folder, path, processes, accum_steps):
    run_script("tests/gradient_of_one_step.py", path, folder, accum_steps, processes=processes)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def reference_step(large_folder, tmp_path_factory):
    return first_step(large_folder, tmp_path_factory.mktemp("one") / "step.pth", None, 1)


@pytest.mark.parametrize("processes, accum_steps", [(2, 1), (None, 3), (2, 2)])
def test_the_gradient_does_not_depend_on_processes_or_parts(processes, accum_steps, reference_step, large_folder,
                                                            tmp_path):
    step = first_step(large_folder, tmp_path / "step.pth", processes, accum_steps)
    assert torch.allclose(step["losses"], reference_step["losses"], rtol=1e-5)
    for name, gradient in reference_step["gradient"].items():
        assert (gradient - step["gradient"][name]).norm() <= 2e-5 * gradient.norm() + 1e-7, name


# ---------------------------------------------------------------------------------------------------
# The run


def distilled_run(folder, output, regnet_file):
    return small_run(folder, output, "--ema", 0.9, "--distill", "--teacher", regnet_file, "--any-teacher")


@pytest.fixture(scope="module")
def whole_run(shared_folder, regnet_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_main(train, *distilled_run(shared_folder, folder, regnet_file)) == 0
    return folder


@pytest.mark.parametrize("stop_at", [1, 3, 5, 8])                        # of 9 steps, 3 in an epoch
def test_a_stopped_run_resumes_to_the_same_bits(stop_at, whole_run, shared_folder, regnet_file, tmp_path, monkeypatch,
                                                capsys):
    end_step, flags = train.Meter.end_step, distilled_run(shared_folder, tmp_path / "cut", regnet_file)

    def stop(self, *args, **settings):
        if self.run.state["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return end_step(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(train.Meter, "end_step", stop)
        assert run_main(train, *flags) == 128 + signal.SIGTERM
    assert "the same command with --resume goes on" in capsys.readouterr().out
    assert torch.load(tmp_path / "cut" / "last.pth", weights_only=True)["state"]["step"] == stop_at
    assert run_main(train, *flags, "--resume") == 0
    assert difference_of_runs(whole_run, tmp_path / "cut") is None


def test_the_best_weights_are_those_of_the_best_epoch(shared_folder, tmp_path, monkeypatch):
    validate, top1 = train.validate, iter((50.0, 90.0, 10.0))
    monkeypatch.setattr(train, "validate", lambda run: validate(run) | {"top1": next(top1)})
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--lr", 0.032)) == 0
    log = read_log(tmp_path / "run")
    losses = [losses_of(tmp_path / "run" / name, shared_folder)["mean"] for name in ("best.pth", "last.pth")]
    assert losses == [log[1]["loss"], log[2]["loss"]] and len({record["loss"] for record in log}) == 3


def test_a_compiled_run_learns_the_same_and_validates_as_evaluate_does(shared_folder, whole_run, regnet_file, tmp_path,
                                                                       monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "torch.__trace")                   # pytest would collect megabytes of it
    compiled, ordinary = [], nn.Module.compile                           # all of torch.compile but the slow last stage
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self) or ordinary(self, backend="aot_eager"))
    assert run_main(train, *distilled_run(shared_folder, tmp_path / "run", regnet_file), "--compile") == 0
    log, losses_before = read_log(tmp_path / "run"), [record["train_loss"] for record in read_log(whole_run)]
    assert {type(model).__name__ for model in compiled} == {"RegNet", "DeiT"}
    assert [record["train_loss"] for record in log] == pytest.approx(losses_before, rel=1e-5)
    losses = losses_of(tmp_path / "run" / "last.pth", shared_folder)
    assert all(losses[head] == log[-1][f"{head}_loss"] for head in ("class", "distillation"))


def test_a_run_is_never_overwritten(shared_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = small_run(shared_folder, "runs/a", "--epochs", 1)
    assert run_main(train, *flags) == 0
    before = (tmp_path / "runs/a/last.pth").read_bytes()
    assert run_main(train, *flags) == 1 and "holds a run already: --resume" in capsys.readouterr().err
    assert (tmp_path / "runs/a/last.pth").read_bytes() == before


def test_resume_starts_a_run_where_there_is_none_and_leaves_a_finished_one(shared_folder, tmp_path, capsys):
    flags = small_run(shared_folder, tmp_path / "run", "--epochs", 1, "--resume")
    assert run_main(train, *flags) == 0
    before = (tmp_path / "run" / "best.pth").read_bytes()
    assert run_main(train, *flags) == 0 and "from step 3 on" in capsys.readouterr().out
    assert (tmp_path / "run" / "best.pth").read_bytes() == before and len(read_log(tmp_path / "run")) == 1


def test_a_run_goes_on_with_its_own_recipe_where_nothing_else_is_typed(shared_folder, tmp_path, capsys):
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 1)) == 0
    capsys.readouterr()
    assert run_main(train, "--resume", "--output", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "demo" not in printed and printed.endswith(f"--data {shared_folder}\n")


@pytest.mark.parametrize("warmup, is_said", [(2, False), (3, True)])
def test_a_warm_up_longer_than_the_run_is_said(warmup, is_said, shared_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda run, meter: run.state["log"].append({"top1": 0.0, "epoch": 0}))
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 2, "--warmup-epochs", warmup)) == 0
    printed = capsys.readouterr().out
    assert ("at the peak, which so long a warm-up does not reach\n" in printed) == is_said and "at the peak" in printed


def test_the_whole_way_by_the_command_line_on_two_processes(shared_folder, tmp_path, capsys):
    small = ("--data", shared_folder, "--image-size", 32, "--batch-size", 16, "--epochs", 2, "--warmup-epochs", 0)
    run_script("train.py", "--model", "regnet_x_400mf", *small, "--epochs", 1, "--output", tmp_path / "teacher",
               processes=2)
    done = run_script("train.py", "--distill", "--teacher", tmp_path / "teacher" / "best.pth", "--any-teacher", *small,
                      "--output", tmp_path / "student", processes=2)
    for line in ("48 training, 15 validation images, 3 classes", "16 views = 2 process(es) x 1 part(s) x 8",
                 "2 of 3 steps, 0 views left over; in each 3 view(s) of 16 images", "learning rate 1.563e-05 at the peak",
                 "% top-1 in validation; hard distillation, alpha 0.5"):
        assert line in done.stdout, done.stdout
    log = read_log(tmp_path / "student")
    assert [record["epoch"] for record in log] == [0, 1]
    assert (done.stdout + done.stderr).count("epoch   1: train_loss") == 1         # by one process
    assert {"top1", "top5", "loss", "class_top1", "distillation_top1", "train_class_loss"} <= log[0].keys()
    assert any(path.name.startswith("events.out.tfevents") for path in (tmp_path / "student").iterdir())
    for run in ("teacher", "student"):                                   # in one process here, and with three there
        best, flags = tmp_path / run / "best.pth", ("--weights", tmp_path / run / "best.pth", "--data", shared_folder)
        assert run == "student" or run_main(evaluate, *flags, "--workers", 0) == 0
        printed = capsys.readouterr().out if run == "teacher" else run_script("evaluate.py", *flags, processes=3).stdout
        record = torch.load(best, weights_only=True)["record"]
        assert printed.splitlines()[-1] == "* Acc@1 {top1:.3f} Acc@5 {top5:.3f} loss {loss:.3f}".format(**record)


@pytest.mark.parametrize("model", ["tiny", "regnet_x_400mf"])
def test_weights_of_other_classes_start_with_a_fresh_head_though_there_are_as_many(model, tmp_path, capsys):
    recipe = train.make_recipe({"data": "imagenet", "model": model, "image_size": 32,
                                "init": str(tmp_path / "init.pth")})
    make = {"tiny": lambda: deit.create_model("tiny", image_size=32, num_classes=3)}.get(
        model, lambda: teacher.create_regnet(model, 3))
    content = {"model": make().state_dict(), "classes": ["ant", "bee", "emu"]}
    torch.save(content, tmp_path / "init.pth")
    for classes, fresh in (("ant bee emu", False), ("cat dog owl", True), ("bee ant emu", True)):
        built = train.build_model(recipe, classes.split()).state_dict()
        same = {name for name, tensor in content["model"].items() if torch.equal(tensor, built[name])}
        head = "head.weight" if model == "tiny" else "fc.weight"         # biases are zero in both
        assert content["model"].keys() - same == ({head} if fresh else set())
        assert ("fresh" in capsys.readouterr().out) == fresh


def test_two_torchrun_agents_are_one_run(shared_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [str(flag) for flag in small_run(shared_folder, tmp_path / "agents", "--epochs", 1)]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=localhost:{port}", str(ROOT / "train.py"), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agents = [subprocess.Popen(agent, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=200) for process in agents] == [0, 0]
    run_script("train.py", *small_run(shared_folder, tmp_path / "one", "--epochs", 1), processes=2)
    assert difference_of_runs(tmp_path / "agents", tmp_path / "one") is None


def test_a_plain_run_is_fine_tuned_at_a_higher_resolution_with_distillation(shared_folder, regnet_file, tmp_path,
                                                                            monkeypatch, capsys):
    assert run_main(train, *small_run(shared_folder, tmp_path / "plain", "--epochs", 1)) == 0
    seen, forward = set(), teacher.models.RegNet.forward
    monkeypatch.setattr(teacher.models.RegNet, "forward", lambda self, x: seen.add(x.shape[-1]) or forward(self, x))
    assert run_main(train, *small_run(
        shared_folder, tmp_path / "tuned", "--epochs", 1, "--recipe", "finetune-384", "--image-size", 48, "--distill",
        "--teacher", regnet_file, "--any-teacher", "--init", tmp_path / "plain" / "best.pth")) == 0
    model = evaluate.load_any(tmp_path / "tuned" / "best.pth")
    assert (model.image_size, model.distilled, seen) == (48, True, {48})
    assert "fresh distillation token and head" in capsys.readouterr().out


def test_without_data_the_demo_makes_its_teacher_and_says_so_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.Demo, "train_size", 64)
    monkeypatch.setattr(data.Demo, "val_size", 20)
    assert run_main(train, "--model", "tiny", "--distill", "--any-teacher", "--epochs", 1, "--workers", 0) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NO --data AND NO ./imagenet HERE: training on the built-in demo")
    assert "in place of the paper's values: image_size 48, epochs 1, batch_size 32" in printed
    pattern = r"teacher +runs/tiny-distilled-demo/teacher/best.pth: \d+\.\d\d % top-1 in validation; hard"
    assert re.search(pattern, printed)
    command = "python evaluate.py --weights runs/tiny-distilled-demo/best.pth --data demo --teacher " \
              "runs/tiny-distilled-demo/teacher/best.pth\n"
    assert printed.endswith(command)
    assert run_main(evaluate, *command.split()[2:], "--workers", 0) == 0
    assert "agreement, %        labels     teacher 1         class  distillation          mean" in capsys.readouterr().out


def test_tensorboard_shows_the_first_batch_as_the_model_saw_it_and_no_other(shared_folder, tmp_path, monkeypatch):
    seen, mix = [], data.mix

    def watch(*args, **settings):
        images, targets = mix(*args, **settings)
        seen.append(images.clone())
        return images, targets

    with monkeypatch.context() as patch:
        patch.setattr(data, "mix", watch)
        assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 1)) == 0
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    (picture,) = events.Images("first batch")
    sheet = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    mean, std = (np.array(values)[:, None, None] for values in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    for number, image in enumerate(seen[0][:8].numpy()):                # the first row: 8 pictures, 2 pixels apart
        cell = sheet[2:34, 2 + 34 * number:34 + 34 * number].transpose(2, 0, 1)
        assert np.abs(cell - (image * std + mean).clip(0, 1) * 255).max() < 1.01


@pytest.mark.parametrize("accuracy, is_said", [(20.0, True), (100.0, False)])
def test_a_run_that_ends_at_chance_says_what_to_try(accuracy, is_said, shared_folder, tmp_path, monkeypatch, capsys):
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda run: validate(run) | {"top1": accuracy})
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 1)) == 0
    done, *advice, command = capsys.readouterr().out.split("done: ")[1].splitlines()
    assert done.startswith(f"top-1 {accuracy:.2f} after 1 epochs") and command.startswith("python evaluate.py")
    assert [line.startswith("the best could be chance; may help: --init") for line in advice] == [True] * is_said


def test_a_checkpoint_holds_class_names_and_recipe_and_can_start_another_run(shared_folder, tmp_path):
    assert run_main(train, *small_run(shared_folder, tmp_path / "a", "--epochs", 1)) == 0
    checkpoint = torch.load(tmp_path / "a" / "best.pth", weights_only=True)
    assert checkpoint["classes"] == ["cat", "dog", "owl"]
    assert checkpoint["recipe"].keys() == asdict(train.Recipe()).keys()
    assert run_main(train, *small_run(shared_folder, tmp_path / "b", "--epochs", 1, "--init",
                                      tmp_path / "a" / "best.pth", "--image-size", 48)) == 0
    assert deit.load_model(tmp_path / "b" / "best.pth").image_size == 48


# ---------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("args, message", [
    (["--data", "absent"], "no dataset 'absent'"),
    (["--model", "huge"], "--model 'huge': it must be tiny, small, base"),
    (["--modell", "tiny"], "unrecognized arguments: --modell"),
    (["--data", "{data}", "--batch-size", "15", "--accum-steps", "2"], "try 16"),
    (["--data", "{data}", "--batch-size", "64"], "48 training images are fewer than one batch of 64: try --batch-size 4"),
    (["--data", "{data}", "--image-size", "100"], "try 96"),
    (["--data", "{data}", "--distill"], "knows 1000 classes and the data has 3; train one"),
    (["--data", "{data}", "--distill", "--teacher", "{wrong}"], "knows 7 classes and the data has 3; train one"),
    (["--data", "{data}", "--distill", "--teacher", "{text}"], "notes.pth"),
    (["--data", "{data}", "--distill", "--teacher", "absent.pth"], "no weights file 'absent.pth'"),
    (["--data", "{data}", "--teacher", "{wrong}"], "would do nothing"),
    (["--data", "{data}", "--model", "regnet_y_400mf", "--distill"], "--distill hard would do nothing"),
    (["--data", "{data}", "--init", "{text}"], "cannot read weights {text}"),
    (["--data", "{data}", "--model", "small", "--init", "{distilled}"], "is a tiny model: --model tiny"),
    (["--data", "{data}", "--recipe", "imagenet"], "--recipe 'imagenet': it must be finetune-384,"),
    (["--data", "{data}", "--model", "regnet_y_400mf", "--init", "{other}"], "is a regnet_x_400mf model"),
    (["--data", "{data}", "--precision", "fp16"], "fp16 needs a GPU"),
    (["--data", "{data}", "--temperature", "2", "--distill"], "2.0 would do nothing"),
    (["--data", "{data}", "--model", "regnet_y_400mf", "--drop-path", "0.2"], "would do nothing"),
    (["--data", "{data}", "--distill", "--teacher", "{foreign}"], "and the data has 3, 'cat' where the teacher has 'ant'; train one"),
    (["--distill", "--batch-size", "33", "--accum-steps", "2"], "--batch-size 33 is no multiple of"),
    (["--data", "{data}", "--epochs", "0"], "--epochs '0': it must be from 1 to 1e+06"),
    (["--data", "{data}", "--epochs", "9" * 400], "--epochs '99999999999999999999': it must be from 1"),
    (["--data", "{data}", "--workers", "10000"], "--workers '10000': it must be from 0 to 256"),
    (["--data", "{data}", "--repeats", "1000000000"], "--repeats '1000000000': it must be from 1 to 8"),
    (["--data", "{data}", "--drop-path", "1"], "--drop-path '1.0': it must be from 0 to 0.99"),
    (["--data", "{data}", "--lr", "nan"], "--lr 'nan': it must be from 0 to 1e+06"),
    (["--data", "{data}", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--data", ""], "--data '': it must be given, or left out"),
    (["--data", "{data}", "--init", ""], "--init '': it must be given, or left out"),
    (["--data", "{data}", "--output", ""], "--output '': it must be given, or left out"),
    (["--data", "{data}", "--distill", "--teacher", ""], "--teacher '': it must be given, or left out"),
    (["--data", "{data}", "--output", "{text}"], "notes.pth")])
def test_a_mistake_is_one_line_and_a_status_before_any_work(args, message, shared_folder, tmp_path, monkeypatch,
                                                            capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", None)                            # it must not come so far
    (tmp_path / "notes.pth").write_text("hello\nworld\n")
    names = {"data": shared_folder, "text": tmp_path / "notes.pth"}
    for name, regnet, classes in (("wrong", "regnet_y_400mf", 7), ("other", "regnet_x_400mf", 3)):
        names[name] = tmp_path / f"{name}.pth"
        torch.save({"model": teacher.create_regnet(regnet, classes).state_dict()}, names[name])
    names["foreign"] = tmp_path / "foreign.pth"
    torch.save(torch.load(names["other"], weights_only=True) | {"classes": ["ant", "bee", "emu"]}, names["foreign"])
    names["distilled"] = tmp_path / "distilled.pth"
    torch.save(deit.create_model("tiny", distilled=True, image_size=32, num_classes=3).state_dict(), names["distilled"])
    status = run_main(train, "--image-size", 32, "--batch-size", 16, *(arg.format(**names) for arg in args))
    printed = capsys.readouterr().err
    assert status and message.format(**names) in printed
    assert printed.count("\n") == 1 and printed.startswith("train.py: ")
    files = {path.name for path in tmp_path.glob("runs/**/*") if path.is_file()}
    assert files <= {".lock"}                                            # no run that never was


def test_torchruns_summary_shows_the_message_which_is_printed_once(tmp_path):
    done = run_script("train.py", "--data", "absent", cwd=tmp_path, processes=2, check=False)
    message = "train.py: no dataset 'absent'"
    printed, summary = done.stderr.split("train.py FAILED", 1)
    assert done.returncode != 0 and message in summary
    assert printed.count(message) == 1 and f'{ROOT / "train.py"}", line' not in done.stderr, done.stderr


def test_any_failure_of_the_set_up_is_one_line_and_the_loops_keep_a_traceback(shared_folder, tmp_path, monkeypatch,
                                                                              capsys):
    def fail(*_):
        return {}["a programming error"]

    with monkeypatch.context() as patch:
        patch.setattr(data, "open_dataset", fail)
        assert run_main(train, *small_run(shared_folder, tmp_path / "run")) == 1
    assert capsys.readouterr().err == "train.py: KeyError: 'a programming error'\n"
    monkeypatch.setattr(train, "train_epoch", fail)
    with pytest.raises(KeyError):
        run_main(train, *small_run(shared_folder, tmp_path / "run", "--workers", 0))


@pytest.mark.parametrize("change", ["one image less", "one image moved to another class"])
def test_a_run_is_resumed_on_its_own_images_and_labels_only(change, folder, tmp_path, capsys):
    assert run_main(train, *small_run(folder, tmp_path / "run", "--epochs", 1)) == 0
    image = folder / "train" / "cat" / "0.jpg"
    image.rename(tmp_path / "0.jpg" if "less" in change else folder / "train" / "dog" / "new.jpg")
    assert run_main(train, *small_run(folder, tmp_path / "run", "--epochs", 1, "--resume")) == 1
    assert f"that run was on other images or labels than {folder} has now" in capsys.readouterr().err


def test_the_runs_folder_tells_its_recipe_and_tensorboard_groups_training_and_validation(shared_folder, tmp_path):
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 1, "--lr", 0.001)) == 0
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe == torch.load(tmp_path / "run" / "last.pth", weights_only=True)["recipe"] and recipe["lr"] == 0.001
    events, (record,) = EventAccumulator(str(tmp_path / "run")).Reload(), read_log(tmp_path / "run")
    shown = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert {tag.split("/")[0] for tag in shown} == {"train", "val"}
    for tag, name in (("val/top1", "top1"), ("val/loss", "loss"), ("train/epoch_loss", "train_loss"),
                      ("train/lr", "lr")):
        assert shown[tag] == pytest.approx(record[name])


def test_the_log_names_averaged_weights_and_heads(shared_folder, tmp_path):
    assert run_main(train, *small_run(shared_folder, tmp_path / "run", "--epochs", 1, "--ema", 0.5)) == 0
    (record,) = read_log(tmp_path / "run")
    assert {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "train_loss"} <= record.keys()
    assert not any("__" in name or name.startswith("_") for name in record)


def test_an_image_that_cannot_be_read_stops_the_run_with_its_path(folder, tmp_path, capsys):
    path = folder / "train" / "dog" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert run_main(train, *small_run(folder, tmp_path / "run", "--repeats", 1)) == 1
    assert f"train.py: cannot read image {path}" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(shared_folder, tmp_path, monkeypatch, capsys):
    forward = deit.DeiT.forward
    monkeypatch.setattr(deit.DeiT, "forward", lambda self, images: forward(self, images) * float("nan"))
    monkeypatch.setattr(train, "LOOK_SECONDS", -1)
    assert run_main(train, *small_run(shared_folder, tmp_path / "run")) == 1
    message = "rank 0: the loss became nan between steps 0 and 0 of epoch 0 (learning rate 1e-06"
    assert message in capsys.readouterr().err


def test_importing_the_scripts_prints_nothing_and_parses_nothing(tmp_path):
    (tmp_path / "all.py").write_text("import deit, distill, data, teacher, evaluate, train\n")
    done = run_script(tmp_path / "all.py", "--no-such-flag", cwd=tmp_path)
    assert done.stdout == "" and not [path for path in tmp_path.iterdir() if path.name != "all.py"]
