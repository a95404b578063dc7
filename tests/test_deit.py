"""The model against timm, transformers and the published numbers."""
import argparse
import os
import pathlib
import pickle
import re
import subprocess
import sys
from unittest import mock

import pytest
import timm
import torch
import transformers

import deit
from conftest import ROOT, Malicious, difference, randomize, run_main


def timm_model(size="tiny", distilled=True, **settings):
    name = f"deit_{size}{'_distilled' if distilled else ''}_patch16_224"
    return randomize(timm.create_model(name, **settings))


def small_model(**settings):
    return deit.create_model("tiny", image_size=32, num_classes=5, **settings)


def images(size=224):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def save(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def assert_same(logits, reference):
    assert reference.abs().max() > 0.5, "the comparison would say nothing"
    assert (logits - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("size, image_size", [
    ("tiny", 224), ("small", 224), ("base", 224), ("tiny", 384)])
@torch.no_grad()
def test_official_files_load_to_timms_logits(tmp_path, size, image_size, distilled):
    reference = timm_model(size, distilled, img_size=image_size)
    flags = argparse.Namespace(lr=1e-3)                      # as the official files hold
    path = save(tmp_path, {"model": reference.state_dict(), "args": flags})
    model = deit.load_model(path, drop_path=0.5)             # nothing is dropped in evaluation
    assert (model.size, model.image_size, model.distilled) == (size, image_size, distilled)
    assert_same(model(images(image_size)), reference(images(image_size)))


def test_gradients_of_both_heads_are_timms_though_the_last_block_is_trimmed():
    reference = timm_model()
    model = deit.model_from_state_dict(reference.state_dict())
    reference.set_distilled_training(True)
    for net in (model.train(), reference.train()):
        class_logits, distillation_logits = net(images())
        (class_logits.logsumexp(1) + 2 * distillation_logits.logsumexp(1)).sum().backward()

    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - theirs[name].grad).norm()
        assert error < 1e-4 * theirs[name].grad.norm().clamp(min=1e-3), name


def test_initial_weights_follow_the_official_rules():
    torch.manual_seed(0)
    for name, value in deit.create_model("small", distilled=True).state_dict().items():
        if name.startswith("patch_embed"):                   # uniform, PyTorch's default
            assert value.abs().max() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.05), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert value.std() == pytest.approx(0.02, rel=0.2) and value.mean().abs() < 3e-3, name


@pytest.mark.parametrize("size, message", [(225, "try 240"), (0, "try 16")])
def test_an_image_size_off_the_grid_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        deit.create_model("tiny", image_size=size)


def test_an_exported_model_takes_any_number_of_images():
    model = small_model(distilled=True).eval()
    dynamic = ({0: torch.export.Dim("images")},)
    exported = torch.export.export(model, (images(32),), dynamic_shapes=dynamic).module()
    five = torch.cat([images(32), images(32), images(32)[:1]])
    assert torch.allclose(exported(five), model(five), atol=1e-6)


def test_drop_path_rises_linearly_from_zero():
    model = deit.model_from_state_dict(small_model().state_dict(), drop_path=0.1)
    rates = [block.drop_path.rate for block in model.blocks]
    assert rates == pytest.approx([0, *(k / 110 for k in range(1, 11)), 0.1])


def test_drop_path_drops_both_branches_independently_and_whole_for_single_images():
    torch.manual_seed(0)
    block = randomize(deit.Block(64, 1, 0.3)).train()
    x = torch.randn(1000, 3, 64)
    unchanged = (block(x) == x).all(dim=(1, 2)).float().mean()
    assert 0.06 < unchanged < 0.12                           # 0.3 x 0.3, three deviations


def test_surviving_branches_are_divided_by_the_survival_rate_also_in_bfloat16():
    x = torch.arange(1, 257).to(torch.bfloat16)              # all exact
    branches = deit.DropPath(0.1).train()(x.expand(100, 1, 256))
    survivors = branches[branches.any(dim=2)]
    divided = (x.double() / 0.9).to(torch.bfloat16)          # rounded once
    assert len(survivors) > 50 and (survivors == divided).all()


def test_mmpretrains_files_load(tmp_path):
    expected = small_model(distilled=True).state_dict()
    renames = {"norm1": "ln1", "norm2": "ln2", "norm.": "ln1.", "embed.proj": "embed.projection",
               "blocks": "layers", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    state = {}
    for name, tensor in expected.items():
        for officials, mmpretrains in renames.items():
            name = name.replace(officials, mmpretrains)
        state[("head.layers." if name.startswith("head") else "backbone.") + name] = tensor

    model = deit.load_model(save(tmp_path, {"meta": {}, "state_dict": state}))
    assert difference(model.state_dict(), expected) is None


@pytest.mark.parametrize("architecture", [
    transformers.ViTForImageClassification, transformers.DeiTForImageClassificationWithTeacher])
@torch.no_grad()
def test_hugging_face_models_load_to_their_logits_and_attention(tmp_path, architecture):
    reference = randomize(architecture(architecture.config_class(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6,
        num_labels=10, image_size=64, attn_implementation="eager")))
    reference.save_pretrained(tmp_path)                      # safetensors, with the hub's names
    expected = reference(images(64), output_attentions=True)
    maps = torch.stack(expected.attentions, dim=1)
    for path in (save(tmp_path, reference.state_dict()), tmp_path / "model.safetensors"):
        model = deit.load_model(path)
        assert_same(model(images(64)), expected.logits)
        assert torch.allclose(model.attention_maps(images(64)), maps, atol=1e-5)


@pytest.mark.parametrize("key", ["averaged_model", "model_ema", "state_dict_ema"])
def test_averaged_weights_are_found_only_when_asked_for(key):
    checkpoint = {"model": {"norm.bias": torch.zeros(3)}, key: {"norm.bias": torch.ones(3)}}
    assert torch.equal(deit.find_state_dict(checkpoint)["norm.bias"], torch.zeros(3))
    assert torch.equal(deit.find_state_dict(checkpoint, ema=True)["norm.bias"], torch.ones(3))


@pytest.mark.parametrize("prefix", ["model.", "student.module.backbone."])
def test_a_model_is_found_wherever_it_is_and_whatever_stands_before_its_names(prefix, tmp_path):
    state = randomize(small_model()).state_dict()
    named = {prefix + name: tensor for name, tensor in state.items()}
    optimizer = {"state": {0: {"step": 1}}}
    content = {"epoch": 3, "network": {"weights": named}, "optimizer": optimizer}
    assert difference(deit.load_model(save(tmp_path, content)).state_dict(), state) is None


def test_of_several_models_none_is_chosen(tmp_path):
    state = small_model().state_dict()
    with pytest.raises(ValueError, match="weights.pth: it holds 2 models: save the one"):
        deit.load_model(save(tmp_path, {"a": {"model": state}, "b": {"model": state}}))


def test_a_backbone_without_a_head_gets_a_fresh_one_if_the_classes_are_known(tmp_path):
    state = randomize(small_model()).state_dict()
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    path = save(tmp_path, backbone)
    loaded = deit.load_model(path, num_classes=7)
    assert difference(loaded.state_dict() | {"head.weight": 0, "head.bias": 0},
                      backbone | {"head.weight": 0, "head.bias": 0}) is None
    with pytest.raises(ValueError, match="weights.pth: it has no classification head"):
        deit.load_model(path)


def test_positions_at_another_size_are_timms_without_antialias():
    state = timm_model().state_dict()
    resized = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], (24, 24), num_prefix_tokens=2, antialias=False)
    larger = deit.model_from_state_dict(state, image_size=384)
    assert torch.allclose(larger.pos_embed, resized, atol=1e-6)


@pytest.mark.parametrize("settings", [{"num_classes": 7}, {"fresh_head": True}])
def test_fresh_heads_are_said_and_everything_else_is_kept(settings, capsys):
    state = randomize(small_model(distilled=True)).state_dict()
    fresh = deit.model_from_state_dict(state, **settings).state_dict()
    heads = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert capsys.readouterr().out == f"fresh weights, not from the file: {', '.join(heads)}\n"
    assert not fresh["head.bias"].any() and not fresh["head_dist.bias"].any()
    assert difference(fresh, state, ignored=[f".{name}" for name in heads]) is None


def test_a_plain_model_made_distilled_and_back_is_itself(capsys):
    before = randomize(small_model()).state_dict()
    distilled = deit.model_from_state_dict(before, distilled=True).state_dict()
    assert torch.equal(distilled["pos_embed"][:, [0, 2, 3, 4, 5]], before["pos_embed"])

    back = deit.model_from_state_dict(distilled, distilled=False, num_classes=5)
    assert difference(back.state_dict(), before) is None
    assert capsys.readouterr().out == (                      # once: on the way back none is fresh
        "fresh weights, not from the file: dist_token, head_dist.weight, head_dist.bias\n")


def test_weights_in_half_precision_are_loaded_into_single():
    model = deit.model_from_state_dict(small_model().half().state_dict())
    assert model.head.weight.dtype == torch.float32


@pytest.mark.parametrize("name, tensor, message", [
    ("norm.bias", None, "Missing .*norm.bias"),
    ("pos_embed", None, "not a DeiT: expected pos_embed, .* found .'cls_token'"),
    ("pos_embed", torch.zeros(1, 5, 1024), "expected a width of 192, 384 or 768, found 1024"),
    ("module._orig_mod.norm.bias", torch.zeros(192), "two tensors for 'norm.bias'"),
    ("blocks.0.gamma_1", torch.zeros(192), "a DeiT III"),
    ("norm.bias", torch.full((192,), -torch.inf), "norm.bias is not made of"),
    ("norm.bias", torch.full((192,), 1e39, dtype=torch.float64), "norm.bias is not made of"),
    ("norm.bias", torch.zeros(192, dtype=torch.int64), "norm.bias is not made of")])
def test_what_is_not_exactly_a_deit_is_refused_in_one_line(tmp_path, name, tensor, message):
    path = save(tmp_path, small_model().state_dict() | {name: tensor})
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}[^\n]*$"):
        deit.load_model(path)


def test_a_malicious_file_is_not_executed_and_its_code_is_named(tmp_path):
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"model": Malicious()}, protocol=2))
    for path in (tmp_path / "pickle.pth", save(tmp_path, {"model": Malicious()})):
        with pytest.raises(ValueError, match="exec was not an allowed global by default. If you"):
            deit.read_checkpoint(path)


@pytest.mark.parametrize("content", [
    small_model(), {"state_dict": small_model().state_dict(), "where": pathlib.Path("a")}])
def test_the_line_that_saves_a_trusted_file_again_makes_it_readable(content, tmp_path):
    path = save(tmp_path, content)
    with pytest.raises(ValueError, match="If you trust it: python -c") as refused:
        deit.load_model(path)
    (line,) = re.findall(r"python -c (\".*\")", str(refused.value))
    subprocess.run(f"{sys.executable} -c {line}", shell=True, check=True, cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert deit.load_model(tmp_path / "weights.pth").num_classes == 5


@pytest.mark.parametrize("start", ["version https://git-lfs", "<!DOCTYPE html>", '{"weight_map'])
def test_a_text_in_place_of_weights_is_said_to_be_one(start, tmp_path):
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_text(start)
        with pytest.raises(ValueError, match=f"{name}: .*a Git LFS pointer .*, an HTML page"):
            deit.read_checkpoint(tmp_path / name)


def test_damage_that_torch_does_not_see_is_found(tmp_path):
    path = save(tmp_path, {"weight": torch.zeros(1000)})
    content = path.read_bytes()
    a_zero = content.index(bytes(100)) + 50                  # torch reads it as another number
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    for position, bit in ((a_zero, 1), (entry + 38, 16)):    # of a "folder" torch reads nothing
        damaged = bytearray(content)
        damaged[position] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="weights.pth: .*it is damaged"):
            deit.read_checkpoint(path)


def test_a_file_that_is_no_checkpoint_or_is_not_there_is_named(tmp_path):
    a_list, a_text = save(tmp_path, [1, 2, 3]), tmp_path / "notes.pth"
    a_text.write_text("hello\nworld\n")
    for path in (a_list, a_text):
        with pytest.raises(ValueError, match=rf"cannot read .* from {path}: [^\n]+$"):
            deit.read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no weights file 'absent.pth': .* tiny,"):
        deit.read_checkpoint("absent.pth")


@pytest.fixture
def download(tmp_path, monkeypatch):
    """Stands for torch.hub's download of (URL, path, beginning of the hash)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save_url = mock.Mock(side_effect=lambda url, path, _: torch.save({"url": url}, path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", save_url)
    return save_url


def test_a_published_name_is_downloaded_once_and_compared_with_its_hash(tmp_path, download):
    name = "deit_tiny_distilled_patch16_224-b40b3cf7.pth"
    url = f"https://dl.fbaipublicfiles.com/deit/{name}"
    for _ in range(2):
        assert deit.read_checkpoint("tiny-distilled") == {"url": url}
    download.assert_called_once_with(url, tmp_path / "hub" / "checkpoints" / name, "b40b3cf7")


def test_two_urls_with_one_file_name_are_two_files(download):
    for url in ("https://example.org/a/model.bin", "https://example.org/b/model.bin"):
        assert deit.read_checkpoint(url) == {"url": url}


def test_a_download_that_cannot_be_read_does_not_stay(download, tmp_path):
    download.side_effect = lambda url, path, hash_prefix: path.write_text("<html>")
    with pytest.raises(ValueError, match="an HTML page"):
        deit.read_checkpoint("https://example.org/model.pth")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_failed_download_is_named(tmp_path, download):
    download.side_effect = RuntimeError("invalid hash value")
    with pytest.raises(OSError, match=f"cannot download https:.* to {tmp_path}.*: invalid hash"):
        deit.read_checkpoint("base-384")


def test_the_command_prints_the_eight_published_models(capsys):
    assert run_main(deit) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[3] == ["small-distilled", "81.164", "95.376",
                       "deit_small_distilled_patch16_224-649709d9.pth"]

    sizes = []
    for row in deit.PUBLISHED.values():
        with torch.device("meta"):
            model = deit.create_model(row.size, distilled=row.distilled,
                                      image_size=row.image_size)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes == [5_717_416, 5_910_800, 22_050_664, 22_436_432, 86_567_656, 87_338_192,
                     86_859_496, 87_630_032]
