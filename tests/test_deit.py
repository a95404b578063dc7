"""The model against timm, transformers and the published numbers."""
import argparse
import pickle
from unittest import mock

import pytest
import timm
import torch
import transformers

import deit
from conftest import Malicious, difference, randomize, run_main


def timm_model(size, distilled, **settings):
    name = f"deit_{size}{'_distilled' if distilled else ''}_patch16_224"
    return randomize(timm.create_model(name, **settings))


def small_model(**settings):
    return deit.create_model("tiny", image_size=32, num_classes=5, **settings).eval()


def images(size=224):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def save(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def assert_same(logits, reference):
    assert reference.abs().max() > 0.5, "the comparison would say nothing"
    assert (logits - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_gradients_of_both_heads_are_timms_though_the_last_block_is_trimmed():
    reference = timm_model("tiny", True)
    model = deit.create_model("tiny", distilled=True)
    model.load_state_dict(reference.state_dict())
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
        if "norm" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif name.startswith("patch_embed"):
            bound = (3 * 16 * 16) ** -0.5                    # uniform, PyTorch's default
            assert value.abs().max() <= bound, name
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.1), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            assert value.std() == pytest.approx(0.02, rel=0.2) and value.mean().abs() < 3e-3, name


@torch.no_grad()
def test_attention_maps_are_timms_softmaxes():
    reference, seen = timm_model("tiny", True), []
    for block in reference.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    reference(images())

    model = deit.create_model("tiny", distilled=True).eval()
    model.load_state_dict(reference.state_dict())
    maps = model.attention_maps(images())
    assert maps.shape == (2, 12, 3, 198, 198)
    assert torch.allclose(maps, torch.stack(seen, dim=1), atol=1e-5)


@pytest.mark.parametrize("size, message", [(225, "try 240"), (8, "try 16")])
def test_an_image_size_off_the_grid_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        deit.create_model("tiny", image_size=size)


def test_drop_path_rises_linearly_from_zero():
    rates = [block.drop_path.rate for block in small_model(drop_path=0.1).blocks]
    assert rates == pytest.approx([0, *(k / 110 for k in range(1, 11)), 0.1])


def test_drop_path_drops_both_branches_independently_and_whole_for_single_images():
    torch.manual_seed(0)
    block = randomize(deit.Block(64, 1, 0.3)).train()
    x = torch.randn(1000, 3, 64)
    unchanged = (block(x) == x).all(dim=(1, 2)).float().mean()
    assert 0.06 < unchanged < 0.12                           # 0.3 x 0.3, three deviations


def test_surviving_branches_are_divided_by_the_survival_rate_also_in_bfloat16():
    torch.manual_seed(0)
    x = torch.arange(1, 257).to(torch.bfloat16)              # all exact
    branches = deit.DropPath(0.1).train()(x.expand(100, 1, 256))
    survivors = branches[branches.any(dim=2)]
    divided = (x.double() / 0.9).to(torch.bfloat16)          # rounded once
    assert len(survivors) > 50 and (survivors == divided).all()


def test_nothing_is_dropped_in_evaluation_mode_or_at_rate_0():
    x = torch.randn(100, 3, 64)
    assert torch.equal(deit.DropPath(0.5).eval()(x), x)
    assert torch.equal(deit.DropPath(0.0).train()(x), x)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("size, image_size", [*((size, 224) for size in deit.SIZES), ("tiny", 384)])
@torch.no_grad()
def test_official_files_load_by_path_alone_to_timms_logits(tmp_path, size, image_size, distilled):
    reference = timm_model(size, distilled, img_size=image_size)
    flags = argparse.Namespace(lr=1e-3)                      # as the official files hold
    model = deit.load_model(save(tmp_path, {"model": reference.state_dict(), "args": flags}))
    assert (model.size, model.image_size, model.distilled) == (size, image_size, distilled)
    assert_same(model(images(image_size)), reference(images(image_size)))


@torch.no_grad()
def test_mmpretrains_files_load(tmp_path):
    reference = timm_model("tiny", True, img_size=32, num_classes=5)
    renames = {"norm1": "ln1", "norm2": "ln2", "norm.": "ln1.", "embed.proj": "embed.projection",
               "blocks": "layers", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    state = {}
    for name, tensor in reference.state_dict().items():
        for timms, mmpretrains in renames.items():
            name = name.replace(timms, mmpretrains)
        state[("head.layers." if name.startswith("head") else "backbone.") + name] = tensor

    model = deit.load_model(save(tmp_path, {"meta": {}, "state_dict": state}))
    assert_same(model(images(32)), reference(images(32)))


@pytest.mark.parametrize("config, architecture", [
    (transformers.ViTConfig, transformers.ViTForImageClassification),
    (transformers.DeiTConfig, transformers.DeiTForImageClassificationWithTeacher)])
@torch.no_grad()
def test_hugging_face_models_load_from_memory_and_from_files(tmp_path, config, architecture):
    reference = randomize(architecture(config(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6,
        num_labels=10, image_size=64)))
    reference.save_pretrained(tmp_path)                      # safetensors, with the hub's names
    for path in (save(tmp_path, reference.state_dict()), tmp_path / "model.safetensors"):
        assert_same(deit.load_model(path)(images(64)), reference(images(64)).logits)


def test_wrappers_and_prefixes_are_seen_through(tmp_path):
    state = small_model(distilled=True).state_dict()
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    compiled = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    for content in (state, parallel, {"model": compiled}, {"state_dict": compiled}):
        model = deit.load_model(save(tmp_path, content))
        assert (model.distilled, model.num_classes, model.training) == (True, 5, False)
        assert difference(model.state_dict(), state) is None


def test_two_names_that_become_one_are_refused():
    state = {"norm.bias": torch.zeros(3), "module.norm.bias": torch.ones(3)}
    with pytest.raises(ValueError, match="two tensors for 'norm.bias'"):
        deit.find_state_dict(state)


@pytest.mark.parametrize("key", ["averaged_model", "model_ema", "state_dict_ema"])
def test_averaged_weights_are_found_only_when_asked_for(key):
    checkpoint = {"model": {"norm.bias": torch.zeros(3)}, key: {"module.norm.bias": torch.ones(3)}}
    assert torch.equal(deit.find_state_dict(checkpoint)["norm.bias"], torch.zeros(3))
    assert torch.equal(deit.find_state_dict(checkpoint, ema=True)["norm.bias"], torch.ones(3))
    with pytest.raises(ValueError, match="it holds no averaged weights"):
        deit.find_state_dict({"model": checkpoint["model"]}, ema=True)


def test_positions_at_another_size_are_timms_without_antialias():
    state = timm_model("tiny", True).state_dict()
    resized = timm.layers.resample_abs_pos_embed(state["pos_embed"], (24, 24), num_prefix_tokens=2,
                                                 antialias=False)
    larger = deit.model_from_state_dict(state, image_size=384)
    assert torch.allclose(larger.pos_embed, resized, atol=1e-6)
    same = deit.model_from_state_dict(state, image_size=224)
    assert torch.equal(same.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("settings", [{"num_classes": 7}, {"fresh_head": True}])
def test_fresh_heads_are_made_only_when_asked_for_and_said(settings, capsys):
    state = randomize(small_model(distilled=True)).state_dict()
    kept = deit.model_from_state_dict(state, num_classes=5).state_dict()
    assert difference(kept, state) is None and capsys.readouterr().out == ""

    heads = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    fresh = deit.model_from_state_dict(state, **settings).state_dict()
    assert capsys.readouterr().out == f"fresh weights, not from the file: {', '.join(heads)}\n"
    assert not fresh["head.bias"].any() and not fresh["head_dist.bias"].any()
    assert difference(fresh, state, ignored=[f".{name}" for name in heads]) is None


def test_a_plain_model_made_distilled_and_back_is_itself(capsys):
    before = randomize(small_model()).state_dict()
    distilled = deit.model_from_state_dict(before, distilled=True).state_dict()
    assert capsys.readouterr().out == (
        "fresh weights, not from the file: dist_token, head_dist.weight, head_dist.bias\n")
    assert distilled["dist_token"].std() > 0.01
    assert torch.equal(distilled["pos_embed"][:, [0, 2, 3, 4, 5]], before["pos_embed"])

    back = deit.model_from_state_dict(distilled, distilled=False)
    assert difference(back.state_dict(), before) is None


def test_weights_in_half_precision_become_single():
    state = small_model().half().state_dict()
    loaded = deit.model_from_state_dict(state).state_dict()
    assert difference(loaded, {name: tensor.float() for name, tensor in state.items()}) is None


@pytest.mark.parametrize("name, tensor, message", [
    ("blocks.3.attn.qkv.bias", None, "Missing .*blocks.3.attn.qkv.bias"),
    ("extra", torch.zeros(1), "Unexpected .*extra"),
    ("norm.weight", torch.zeros(3), "size mismatch for norm.weight"),
    ("pos_embed", None, "not a DeiT: expected pos_embed, .* found .'cls_token'"),
    ("pos_embed", torch.zeros(1, 7, 192), "size mismatch for pos_embed"),
    ("pos_embed", torch.zeros(1, 5, 1024), "expected a width of 192, 384 or 768, found 1024")])
def test_nothing_is_loaded_loosely(tmp_path, name, tensor, message):
    state = small_model().state_dict()
    state[name] = tensor
    if tensor is None:
        del state[name]
    with pytest.raises(ValueError, match=message) as error:
        deit.load_model(save(tmp_path, state))
    assert str(error.value).startswith(f"{tmp_path / 'weights.pth'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bias", [
    torch.tensor([0.0] * 767 + [float("nan")]), torch.tensor([0.0] * 767 + [float("-inf")]),
    torch.full((768,), 1e300, dtype=torch.float64), torch.zeros(768, dtype=torch.int64)])
def test_weights_that_are_not_finite_floats_are_refused_by_name(tmp_path, bias):
    state = small_model().state_dict() | {"blocks.3.mlp.fc1.bias": bias}
    with pytest.raises(ValueError, match="its blocks.3.mlp.fc1.bias is not made of finite"):
        deit.load_model(save(tmp_path, state))


def test_a_malicious_file_is_not_executed_and_its_code_is_named(tmp_path):
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"model": Malicious()}, protocol=2))
    for path in (tmp_path / "pickle.pth", save(tmp_path, {"model": Malicious()})):
        with pytest.raises(ValueError, match=f"from {path}: .* exec was not an allowed global"):
            deit.read_checkpoint(path)


def test_damage_that_torch_does_not_see_is_found(tmp_path):
    path = save(tmp_path, {"weight": torch.zeros(1000)})
    content = path.read_bytes()

    flipped = bytearray(content)
    flipped[content.index(bytes(100)) + 50] ^= 1             # torch reads it as another number

    a_folder = bytearray(content)                            # torch reads nothing from a folder
    entry = content.index(b"PK\x01\x02", content.rindex(b"/data/0") - 50)
    a_folder[entry + 38] ^= 16                               # its attributes have no checksum

    for damaged in (flipped, a_folder):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="weights.pth: .*it is damaged"):
            deit.read_checkpoint(path)


def test_a_file_that_is_no_checkpoint_or_is_not_there_is_named(tmp_path):
    truncated = save(tmp_path, {"model": torch.zeros(1000)}).read_bytes()[:3000]
    a_list = save(tmp_path, [1, 2, 3]).read_bytes()
    for content in (b"", b"hello\nworld\n", b"PK\x03\x04", truncated, a_list):
        (tmp_path / "notes.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .* from .*notes.pth: [^\n]+$"):
            deit.load_model(tmp_path / "notes.pth")
    for absent in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no weights file '{absent}': .* tiny,"):
            deit.load_model(absent)


@pytest.fixture
def download(tmp_path, monkeypatch):
    """Stands for torch.hub's download of (URL, path, beginning of the hash)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock())
    return torch.hub.download_url_to_file


def test_a_published_name_is_downloaded_once_and_compared_with_its_hash(tmp_path, download):
    state = small_model(distilled=True).state_dict()
    download.side_effect = lambda url, path, hash_prefix: torch.save({"model": state}, path)
    for _ in range(2):
        assert difference(deit.load_model("tiny-distilled").state_dict(), state) is None

    name = "deit_tiny_distilled_patch16_224-b40b3cf7.pth"
    download.assert_called_once_with("https://dl.fbaipublicfiles.com/deit/" + name,
                                     tmp_path / "hub" / "checkpoints" / name, "b40b3cf7")


def test_two_urls_with_one_file_name_are_two_files(download):
    download.side_effect = lambda url, path, hash_prefix: path.write_text(url)
    for url in ("https://example.org/a/model.bin", "https://example.org/b/model.bin"):
        assert deit.download(url).read_text() == url


def test_a_failed_download_is_named(tmp_path, download):
    download.side_effect = RuntimeError("invalid hash value")
    message = f"cannot download https://.*-8de9b5d1.pth to {tmp_path}.*: invalid hash value"
    with pytest.raises(OSError, match=message):
        deit.load_model("base-384")


def test_the_command_prints_the_eight_published_models(capsys):
    assert run_main(deit) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [
        ["tiny", "5,717,416"], ["tiny-distilled", "5,910,800"],
        ["small", "22,050,664"], ["small-distilled", "22,436,432"],
        ["base", "86,567,656"], ["base-distilled", "87,338,192"],
        ["base-384", "86,859,496"], ["base-distilled-384", "87,630,032"]]
    assert rows[3][2:] == ["81.164", "95.376", "deit_small_distilled_patch16_224-649709d9.pth"]
