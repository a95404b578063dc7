"""The recipe, the loop and the run, through the functions and through the command line."""
import contextlib
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

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import data
import deit
import evaluate
import teacher
import train
from conftest import ROOT, run_script
from kill_and_resume import difference

CPU = evaluate.Place(torch.device("cpu"), 0, 1, 0, 1, 0)


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


def test_every_field_of_the_recipe_is_a_flag_with_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        train.parse_recipe()
    text = capsys.readouterr().out
    assert all(f"--{item.name.replace('_', '-')}" in text and item.metadata["help"] for item in fields(train.Recipe))


def test_distill_alone_is_hard_and_typed_flags_win_over_the_demos(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--model", "tiny", "--distill", "--epochs", "2"])
    recipe = train.make_recipe(train.parse_recipe())
    assert (recipe.distill, recipe.data, recipe.epochs, recipe.image_size) == ("hard", "demo", 2, 48)
    (tmp_path / "imagenet").mkdir()
    assert train.make_recipe(train.parse_recipe()).data == "imagenet"


@pytest.mark.parametrize("name, peak, changes", [                       # peak: the rate itself, at the preset's own batch
    ("finetune-384", 5e-6, dict(image_size=384, epochs=30, batch_size=512, min_lr=5e-6, weight_decay=1e-8, ema=0.99996, drop_path=0)),
    ("mmpretrain-small", 1e-3, dict(warmup_epochs=20, clip_grad=5, repeats=1, drop_path=0)),
    ("cifar-cars", 0.01, dict(optimizer="sgd", batch_size=768, epochs=1000, weight_decay=1e-4, erasing=0, drop_path=0)),
    ("inaturalist", 7.5e-5, dict(batch_size=768, epochs=360, erasing=0.1))])
def test_a_preset_sets_its_sources_values_and_no_others(name, peak, changes):
    recipe, ordinary = (asdict(train.make_recipe({"data": "imagenet"} | more)) for more in ({"recipe": name}, {}))
    assert recipe["lr"] * recipe["batch_size"] / 512 == pytest.approx(peak)
    assert {key: value for key, value in recipe.items() if value != ordinary[key] and key not in ("recipe", "lr")} == changes


def test_a_typed_flag_wins_over_the_preset():
    recipe = train.make_recipe({"data": "imagenet", "recipe": "finetune-384", "epochs": 7})
    assert (recipe.epochs, recipe.image_size) == (7, 384)


# ---------------------------------------------------------------------------------------------------
# The loop


class Spy(nn.Module):
    """A teacher that remembers what it was shown."""

    def forward(self, images):
        self.images, self.grad_enabled = images.clone(), torch.is_grad_enabled()
        return images.flatten(1)[:, :3]


def one_epoch(folder, tmp_path, teacher_model=None, **changes):
    recipe = train.make_recipe({"data": str(folder), "image_size": 32, "batch_size": 16, "workers": 0} | changes)
    torch.manual_seed(0)
    run = train.prepare(train.replace(recipe, distill=None), CPU, resuming=False)
    if recipe.distill:
        model = deit.create_model("tiny", distilled=True, image_size=32, num_classes=3)
        run = run._replace(student=train.build_student(model, recipe, CPU), teacher=teacher_model, recipe=recipe)
    progress = train.Progress(CPU, recipe, tmp_path, run.sampler.steps, {"step": 0, "epoch_sums": None})
    list(train.train_epoch(run, CPU, 0, progress))
    progress.close()
    return run.student


def test_the_teacher_sees_the_images_the_student_sees_without_gradients(shared_folder, tmp_path, monkeypatch):
    seen, spy = [], Spy()
    forward = deit.DeiT.forward
    monkeypatch.setattr(deit.DeiT, "forward", lambda self, images: seen.append(images.clone()) or forward(self, images))
    one_epoch(shared_folder, tmp_path, spy, distill="hard")
    assert torch.equal(seen[-1], spy.images) and not spy.grad_enabled


def test_both_heads_learn_when_distilling(shared_folder, tmp_path):
    torch.manual_seed(0)
    before = deit.create_model("tiny", distilled=True, image_size=32, num_classes=3).state_dict()
    after = one_epoch(shared_folder, tmp_path, Spy(), distill="hard").model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in ("head.weight", "head_dist.weight", "dist_token"))


def test_sgd_is_nesterovs_and_the_gradient_is_clipped_to_its_norm():
    torch.manual_seed(0)
    recipe = train.make_recipe({"data": "imagenet", "optimizer": "sgd", "weight_decay": 0.0})
    student = train.build_student(nn.Linear(4, 3), recipe, CPU)
    before, gradient = student.model.weight.detach().clone(), torch.randn(3, 4)
    for group in student.optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        student.model.weight.grad, student.model.bias.grad = gradient.clone(), torch.zeros(3)
        student.optimizer.step()
    # velocities 1 and 1.9; Nesterov's steps add 0.9 of each to the gradient: 1.9 and 2.71
    assert torch.allclose(student.model.weight, before - 0.1 * (1.9 + 2.71) * gradient, atol=1e-6)


@pytest.mark.parametrize("limit, length", [(1e-3, 1e-3), (1e6, None)])
def test_clip_grad_bounds_the_norm_of_the_whole_gradient(limit, length, shared_folder, tmp_path, monkeypatch):
    norms = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_, **__: norms.append(torch.cat(
        [p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm().item()))
    one_epoch(shared_folder, tmp_path, clip_grad=limit)
    assert norms[0] == pytest.approx(length, rel=1e-3) if length else norms[0] > 1e-2


def test_averaged_weights_start_from_the_initial_ones_and_follow_by_the_decay():
    recipe = train.make_recipe({"data": "demo", "ema": 0.9})
    student = train.build_student(deit.create_model("tiny", image_size=32, num_classes=3), recipe, CPU)
    first = student.model.head.weight.detach().clone()
    expected = first.clone()
    for step in range(3):
        with torch.no_grad():
            student.model.head.weight.add_(1.0)
        student.average.update_parameters(student.model)
        expected = 0.9 * expected + 0.1 * (first + step + 1)
    assert torch.allclose(student.average.module.head.weight, expected, atol=1e-6)


@pytest.mark.parametrize("distill", [None, "hard", "soft"])
def test_no_step_waits_for_the_device(distill, tmp_path, monkeypatch):
    """On torch's meta device tensors have no values: to look at one, as .item() and its like do, is an error."""
    adamw = torch.optim.AdamW                                       # neither fused nor autocast knows that device
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, fused: adamw(groups, lr=lr, foreach=True))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    nowhere = CPU._replace(device=torch.device("meta"), rank=1)     # only the first rank shows something
    recipe = train.make_recipe({"data": "imagenet", "distill": distill, "batch_size": 8, "mix_group": 4, "ema": 0.9,
                                "clip_grad": 1.0})
    model = deit.create_model("tiny", distilled=bool(distill), image_size=32, drop_path=0.1)
    guide = teacher.freeze(teacher.create_regnet("regnet_y_400mf")).to("meta") if distill else None
    batch = (torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.randint(1000, (8,)), torch.arange(8),
             torch.tensor([(1, 4, 4, 10, 10)]))
    split, sampler = data.Split(None, [""] * 1000), SimpleNamespace(first_step=0, steps=3)
    run = train.Run(recipe, train.build_student(model, recipe, nowhere), guide, split, split, sampler, [batch] * 3, None, 0)
    progress = train.Progress(nowhere, recipe, tmp_path, 1000, {"step": 0, "epoch_sums": None})
    list(train.train_epoch(run, nowhere, 0, progress))
    progress.close()
    assert progress.steps_since == 3 and progress.sums.is_meta


def first_step(folder, path, processes, accum_steps):
    run_script("tests/gradient_of_one_step.py", path, folder, accum_steps, processes=processes)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def reference_step(shared_folder, tmp_path_factory):
    return first_step(shared_folder, tmp_path_factory.mktemp("one") / "step.pth", None, 1)


@pytest.mark.parametrize("processes, accum_steps", [(2, 1), (None, 3), (2, 2)])
def test_the_gradient_does_not_depend_on_processes_or_parts(processes, accum_steps, reference_step, shared_folder, tmp_path):
    step = first_step(shared_folder, tmp_path / "step.pth", processes, accum_steps)
    assert torch.allclose(step["losses"], reference_step["losses"], rtol=1e-5)
    for name, gradient in reference_step["gradient"].items():
        assert (gradient - step["gradient"][name]).norm() <= 2e-5 * gradient.norm() + 1e-7, name


# ---------------------------------------------------------------------------------------------------
# The run


def train_in_process(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, args)])
    train.main()


def small_run(folder, output, *more):
    return ("--data", folder, "--image-size", 32, "--batch-size", 16, "--epochs", 3, "--warmup-epochs", 1, "--workers", 1,
            "--output", output, *more)


def assert_same_content(a, b, path=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_content(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for n, pair in enumerate(zip(a, b)):
            assert_same_content(*pair, f"{path}[{n}]")
    else:
        assert a == b, path


@pytest.mark.parametrize("stop_at", [1, 3, 5, 8])
def test_a_stopped_run_resumes_to_the_same_bits(stop_at, shared_folder, tmp_path, monkeypatch, capsys):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "whole", "--ema", 0.9))
    report, steps = train.Progress.report, []

    def stop(self, *args):
        steps.append(args)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return report(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "report", stop)
        with pytest.raises(SystemExit) as leaving:
            train_in_process(patch, *small_run(shared_folder, tmp_path / "cut", "--ema", 0.9))
    assert leaving.value.code == 128 + signal.SIGTERM
    assert f"--resume --output {tmp_path / 'cut'}" in capsys.readouterr().out
    train_in_process(monkeypatch, "--resume", "--output", tmp_path / "cut")
    for name in ("last.pth", "best.pth"):
        whole, cut = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "cut"))
        assert whole["recipe"].pop("output") != cut["recipe"].pop("output")
        assert whole["recipe"].pop("resume") is False and cut["recipe"].pop("resume") in (False, True)
        assert_same_content(whole, cut)
    assert (tmp_path / "whole" / "log.jsonl").read_bytes() == (tmp_path / "cut" / "log.jsonl").read_bytes()


def test_a_compiled_run_learns_the_same_and_validates_as_evaluate_does(shared_folder, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.WARNING, "torch.__trace")                   # pytest would collect megabytes of it
    compiled, ordinary = [], nn.Module.compile                           # all of torch.compile but the slow last stage
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self) or ordinary(self, backend="aot_eager"))
    torch.manual_seed(0)
    torch.save({"model": train.teacher.create_regnet("regnet_x_400mf", 3).state_dict()}, tmp_path / "teacher.pth")
    common = ("--distill", "--teacher", tmp_path / "teacher.pth", "--any-teacher", "--ema", 0.9, "--epochs", 2)
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / name, *common, *more))
    eager, other = ([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
                    for name in ("eager", "compiled"))
    assert {type(model).__name__ for model in compiled} == {"RegNet", "DeiT"}
    assert [record["train_loss"] for record in other] == pytest.approx([record["train_loss"] for record in eager], rel=1e-5)
    loaded = evaluate.load_any(tmp_path / "compiled" / "last.pth")
    loader = data.eval_loader(data.open_split(shared_folder, train=False).images, 32)
    scores = evaluate.evaluate(loaded.model, loader, torch.device("cpu"))
    assert {head: scores[head].loss for head in ("class", "distillation")} == {
        head: other[-1][f"{head}_loss"] for head in ("class", "distillation")}


def test_a_run_is_never_overwritten(shared_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in small_run(shared_folder, "runs/a", "--epochs", 1)]
    train_in_process(monkeypatch, *flags)
    before = (tmp_path / "runs/a/last.pth").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train_in_process(monkeypatch, *flags)
    assert stop.value.code == 1 and "holds a run already: --resume" in capsys.readouterr().err
    assert (tmp_path / "runs/a/last.pth").read_bytes() == before


def test_the_whole_way_by_the_command_line_on_two_processes(shared_folder, tmp_path):
    small = ("--data", shared_folder, "--image-size", 32, "--batch-size", 16, "--epochs", 2, "--warmup-epochs", 0)
    run_script("train.py", "--model", "regnet_x_400mf", *small, "--output", tmp_path / "teacher", processes=2)
    done = run_script("train.py", "--model", "tiny", "--distill", "--teacher", tmp_path / "teacher" / "best.pth", *small,
                      "--any-teacher", "--output", tmp_path / "student", processes=2)
    for line in ("3 classes", "16 = 2 process(es) x 1 part(s) x 8", "16 distinct images, 3 view(s) of each; 3 steps",
                 "1.563e-05 at the peak (--lr 0.0005 x 16 / 512)", "% top-1 on 15 validation images"):
        assert line in done.stdout, done.stdout
    log = [json.loads(line) for line in (tmp_path / "student" / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [0, 1]
    assert {"top1", "top5", "loss", "class_top1", "distillation_top1", "train_class_loss"} <= log[0].keys()
    assert any(path.name.startswith("events.out.tfevents") for path in (tmp_path / "student").iterdir())
    for run, processes in (("teacher", None), ("student", None), ("student", 3)):
        best = torch.load(tmp_path / run / "best.pth", weights_only=True)["record"]
        lines = run_script("evaluate.py", "--weights", tmp_path / run / "best.pth", "--data", shared_folder,
                           processes=processes).stdout.splitlines()
        assert lines[-1] == f"* Acc@1 {best['top1']:.3f} Acc@5 {best['top5']:.3f} loss {best['loss']:.3f}"


@pytest.mark.parametrize("model", ["tiny", "regnet_x_400mf"])
def test_weights_of_other_classes_start_with_a_fresh_head_though_there_are_as_many(model, tmp_path, capsys):
    recipe = train.make_recipe({"data": "imagenet", "model": model, "image_size": 32, "init": str(tmp_path / "init.pth")})
    make = {"tiny": lambda: deit.create_model("tiny", image_size=32, num_classes=3)}.get(
        model, lambda: train.teacher.create_regnet(model, 3))
    content = {"model": make().state_dict(), "classes": ["ant", "bee", "emu"]}
    torch.save(content, tmp_path / "init.pth")
    for classes, fresh in ((["ant", "bee", "emu"], False), (["cat", "dog", "owl"], True), (["bee", "ant", "emu"], True)):
        built = train.build_model(recipe, classes).state_dict()
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
    assert difference(tmp_path / "agents", tmp_path / "one") is None


def test_a_plain_run_is_fine_tuned_at_a_higher_resolution_with_distillation(shared_folder, tmp_path, monkeypatch, capsys):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "plain", "--epochs", 1))
    torch.save({"model": train.teacher.create_regnet("regnet_x_400mf", 3).state_dict()}, tmp_path / "teacher.pth")
    seen, forward = set(), train.teacher.models.RegNet.forward
    monkeypatch.setattr(train.teacher.models.RegNet, "forward", lambda self, x: seen.add(x.shape[-1]) or forward(self, x))
    train_in_process(monkeypatch, *small_run(
        shared_folder, tmp_path / "tuned", "--epochs", 1, "--recipe", "finetune-384", "--image-size", 48, "--distill", "--teacher",
        tmp_path / "teacher.pth", "--any-teacher", "--init", tmp_path / "plain" / "best.pth"))
    loaded = evaluate.load_any(tmp_path / "tuned" / "best.pth")
    assert (loaded.image_size, loaded.model.distilled, seen) == (48, True, {48})
    assert "fresh distillation token and head" in capsys.readouterr().out


def test_without_data_the_demo_makes_its_teacher_and_says_so_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.Demo, "train_size", 64)
    monkeypatch.setattr(data.Demo, "val_size", 20)
    train_in_process(monkeypatch, "--model", "tiny", "--distill", "--any-teacher", "--epochs", 1, "--workers", 0)
    printed = capsys.readouterr().out
    assert printed.startswith("NO --data AND NO ./imagenet HERE: training on the built-in demo")
    assert "in place of the paper's values: image_size 48, epochs 1, batch_size 32" in printed
    assert re.search(r"teacher +runs/tiny-distilled-demo/teacher/best.pth: \d+\.\d\d % top-1 on 20 validation images", printed)
    assert printed.endswith("python evaluate.py --weights runs/tiny-distilled-demo/best.pth --data demo\n")


def test_tensorboard_shows_the_first_batch_as_the_model_saw_it_and_no_other(shared_folder, tmp_path, monkeypatch):
    seen, mix = [], data.mix

    def watch(*args, **settings):
        images, targets = mix(*args, **settings)
        seen.append(images.clone())
        return images, targets

    with monkeypatch.context() as patch:
        patch.setattr(data, "mix", watch)
        train_in_process(patch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1))
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    (picture,) = events.Images("first batch")
    sheet = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    mean, std = (np.array(values)[:, None, None] for values in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    for number, image in enumerate(seen[0][:8].numpy()):                # the first row: 8 pictures, 2 pixels apart
        cell = sheet[2:34, 2 + 34 * number:34 + 34 * number].transpose(2, 0, 1)
        assert np.abs(cell - (image * std + mean).clip(0, 1) * 255).max() <= 1


def test_a_checkpoint_holds_class_names_and_recipe_and_can_start_another_run(shared_folder, tmp_path, monkeypatch, capsys):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "a", "--epochs", 1))
    checkpoint = torch.load(tmp_path / "a" / "best.pth", weights_only=True)
    assert checkpoint["classes"] == ["cat", "dog", "owl"]
    assert checkpoint["recipe"].keys() == asdict(train.Recipe()).keys()
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "b", "--epochs", 1, "--init",
                                             tmp_path / "a" / "best.pth", "--image-size", 48))
    assert deit.load_model(tmp_path / "b" / "best.pth").image_size == 48


@pytest.mark.parametrize("args, message", [
    (["--data", "absent"], "no dataset 'absent'"),
    (["--model", "huge"], "unknown model 'huge': --model tiny, small, base"),
    (["--modell", "tiny"], "unrecognized arguments: --modell"),
    (["--data", "{data}", "--batch-size", "15", "--accum-steps", "2"], "try 16"),
    (["--data", "{data}", "--batch-size", "64"], "48 training images are fewer than one batch of 64: --batch-size 32"),
    (["--data", "{data}", "--image-size", "100"], "try 96"),
    (["--data", "{data}", "--distill"], "knows ImageNet's 1000 classes and the data has 3; train one"),
    (["--data", "{data}", "--distill", "--teacher", "{wrong}"], "knows 7 classes and the data has 3; train one"),
    (["--data", "{data}", "--distill", "--teacher", "{text}"], "not a file of tensors"),
    (["--data", "{data}", "--distill", "--teacher", "absent.pth"], "no RegNet absent.pth"),
    (["--data", "{data}", "--teacher", "{wrong}"], "would do nothing without --distill: add that"),
    (["--data", "{data}", "--model", "regnet_y_400mf", "--distill"], "--distill trains a DeiT"),
    (["--data", "{data}", "--init", "{text}"], "is not a checkpoint"),
    (["--data", "{data}", "--model", "small", "--init", "{distilled}"], "is a tiny model: --model tiny"),
    (["--data", "{data}", "--recipe", "imagenet"], "invalid choice: 'imagenet'"),
    (["--data", "{data}", "--recipe", "convnet"], "--recipe convnet is for a RegNet, not tiny"),
    (["--data", "{data}", "--model", "regnet_y_400mf", "--init", "{other}"], "is a regnet_x_400mf"),
    (["--data", "{data}", "--precision", "fp16"], "fp16 needs a GPU"),
    (["--data", "{data}", "--temperature", "2", "--distill"], "--temperature 2.0 would do nothing without --distill soft"),
    (["--data", "{data}", "--model", "regnet_y_400mf", "--drop-path", "0.2"], "would do nothing without a DeiT"),
    (["--data", "{data}", "--distill", "--teacher", "{foreign}"], "knows other classes: where it has 'ant', the data has 'cat'"),
    (["--distill", "--batch-size", "33", "--accum-steps", "2"], "does not divide"),
    (["--data", "{data}", "--epochs", "0"], "--epochs 0: it must be 1 or more"),
    (["--data", "{data}", "--drop-path", "1"], "--drop-path 1.0: it must be from 0 to 0.99"),
    (["--data", "{data}", "--lr", "nan"], "--lr nan: it must be 0 or more"),
    (["--data", "{data}", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    (["--data", "{data}", "--resume"], "nothing to resume"),
    (["--data", "{data}", "--output", "{text}"], "notes.pth")])
def test_a_mistake_is_one_line_and_a_status_before_any_work(args, message, shared_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train_epoch", None)                      # it must not come so far
    (tmp_path / "notes.pth").write_text("hello\nworld\n")
    names = {"data": shared_folder, "text": tmp_path / "notes.pth"}
    for name, regnet, classes in (("wrong", "regnet_y_400mf", 7), ("other", "regnet_x_400mf", 3)):
        names[name] = tmp_path / f"{name}.pth"
        torch.save({"model": train.teacher.create_regnet(regnet, classes).state_dict()}, names[name])
    names["foreign"] = tmp_path / "foreign.pth"
    torch.save(torch.load(names["other"], weights_only=True) | {"classes": ["ant", "bee", "emu"]}, names["foreign"])
    names["distilled"] = tmp_path / "distilled.pth"
    torch.save(deit.create_model("tiny", distilled=True, image_size=32, num_classes=3).state_dict(), names["distilled"])
    with pytest.raises(SystemExit) as stop:
        train_in_process(monkeypatch, "--image-size", 32, "--batch-size", 16, *(arg.format(**names) for arg in args))
    printed = capsys.readouterr().err
    assert stop.value.code not in (0, None) and message in printed
    assert printed.count("\n") == 1 and "Traceback" not in printed
    assert not list(tmp_path.glob("runs/*"))                             # no folder of a run that never was


def test_a_run_is_resumed_on_its_own_data_only(folder, tmp_path, monkeypatch, capsys):
    train_in_process(monkeypatch, *small_run(folder, tmp_path / "run", "--epochs", 1))
    (folder / "train" / "cat" / "0.jpg").unlink()
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, "--resume", "--output", tmp_path / "run")
    assert "the run to resume was on 48 images of 3 classes" in capsys.readouterr().err


def test_the_log_names_averaged_weights_and_heads(shared_folder, tmp_path, monkeypatch):
    train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run", "--epochs", 1, "--ema", 0.5))
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "train_loss"} <= record.keys()
    assert not any("__" in name or name.startswith("_") for name in record)


def test_an_image_that_cannot_be_read_stops_the_run_with_its_path(folder, tmp_path, monkeypatch, capsys):
    path = folder / "train" / "dog" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, *small_run(folder, tmp_path / "run", "--repeats", 1))
    assert f"train.py: cannot read image {path}" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(shared_folder, tmp_path, monkeypatch, capsys):
    forward = deit.DeiT.forward
    monkeypatch.setattr(deit.DeiT, "forward", lambda self, images: forward(self, images) * float("nan"))
    with pytest.raises(SystemExit):
        train_in_process(monkeypatch, *small_run(shared_folder, tmp_path / "run"))
    assert "rank 0: the loss became nan between steps 0 and 0 of epoch 0 (learning rate 1e-06" in capsys.readouterr().err


def test_importing_the_scripts_prints_nothing_and_parses_nothing(tmp_path):
    (tmp_path / "all.py").write_text("import deit, distill, data, teacher, evaluate, train\n")
    done = run_script(tmp_path / "all.py", "--no-such-flag", cwd=tmp_path)
    assert done.stdout == "" and not [path for path in tmp_path.iterdir() if path.name != "all.py"]
