"""The model against timm, transformers and the published numbers."""
import argparse
import pathlib
import pickle
import sys

import pytest
import timm
import torch
import transformers

import deit

TIMM_NAMES = {(size, distilled): f"deit_{size}_{'distilled_' * distilled}patch16_224"
              for size in deit.SIZES for distilled in (False, True)}
PARAMETERS = {("tiny", False): 5_717_416, ("tiny", True): 5_910_800, ("small", False): 22_050_664,
              ("small", True): 22_436_432, ("base", False): 86_567_656, ("base", True): 87_338_192}
every_model = pytest.mark.parametrize("size, distilled", TIMM_NAMES)


def randomize(model):
    """Weights far enough from the initial ones that every parameter matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.06 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def timm_model(size, distilled, **kwargs):
    return randomize(timm.create_model(TIMM_NAMES[size, distilled], **kwargs))


def images(size=224, number=2):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_same(logits, reference, tolerance=1e-5):
    assert reference.abs().max() > 0.5, "the comparison would say nothing"
    assert (logits - reference).abs().max() <= tolerance * reference.abs().max()


@every_model
def test_parameter_count_is_the_published_one(size, distilled):
    with torch.device("meta"):
        model = deit.create_model(size, distilled=distilled)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size, distilled]


@every_model
def test_parameter_names_and_shapes_are_timms(size, distilled):
    with torch.device("meta"):
        ours, theirs = deit.create_model(size, distilled=distilled), timm.create_model(TIMM_NAMES[size, distilled])
    assert len(ours.state_dict()) == (155 if distilled else 152)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}


@every_model
@torch.no_grad()
def test_logits_are_timms(size, distilled):
    reference = timm_model(size, distilled)
    model = deit.create_model(size, distilled=distilled).eval()
    model.load_state_dict(reference.state_dict())
    assert_same(model(images()), reference(images()))


def test_gradients_are_timms_though_the_last_block_is_trimmed():
    reference = timm_model("tiny", True)
    model = deit.create_model("tiny", distilled=True)
    model.load_state_dict(reference.state_dict())
    reference.set_distilled_training(True)
    for net in (model.train(), reference.train()):
        class_logits, distillation_logits = net(images())
        (class_logits.logsumexp(1) + 2 * distillation_logits.logsumexp(1)).sum().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm().clamp(min=1e-3)
        assert difference < 1e-4, name


def test_training_gives_the_pair_and_evaluation_its_mean():
    model = randomize(deit.create_model("tiny", distilled=True, image_size=32, num_classes=7))
    heads = model.forward_heads(images(32))
    pair = model.train()(images(32))
    assert isinstance(pair, tuple) and [logits.shape for logits in pair] == [(2, 7), (2, 7)]
    assert all(torch.equal(a, b) for a, b in zip(pair, heads))           # drop-path is 0: the mode changes nothing else
    assert torch.equal(model.eval()(images(32)), (heads[0] + heads[1]) / 2)


def test_initial_weights_follow_the_official_rules():
    torch.manual_seed(0)
    model = deit.create_model("small", distilled=True)
    for name, value in model.state_dict().items():
        if "norm" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif name.startswith("patch_embed"):
            bound = (3 * 16 * 16) ** -0.5
            assert value.abs().max() <= bound and abs(value.std() / (bound / 3**0.5) - 1) < 0.1, name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            assert abs(value.std() / 0.02 - 1) < 0.2 and abs(value.mean()) < 3e-3, name


def test_drop_path_rises_linearly_from_zero():
    rates = [block.drop_path.p for block in deit.create_model("tiny", drop_path=0.1).blocks]
    assert rates == pytest.approx([0, .00909, .01818, .02727, .03636, .04545, .05455, .06364, .07273, .08182, .09091, .1],
                                  abs=1e-5)


def test_drop_path_drops_whole_branches_of_single_images():
    torch.manual_seed(0)
    block = randomize(deit.Block(64, 1, 0.5)).train()
    x = torch.randn(400, 3, 64)
    unchanged = (block(x) == x).all(dim=(1, 2))
    assert 0.18 < unchanged.float().mean() < 0.32                        # both branches dropped: a quarter


@pytest.mark.parametrize("name, gmacs", [("tiny", 1.2537), ("tiny-distilled", 1.2610), ("small", 4.5989),
                                         ("small-distilled", 4.6241), ("base", 17.5638), ("base-distilled", 17.6568),
                                         ("base-384", 55.4844), ("base-distilled-384", 55.5913)])
def test_macs_of_the_eight_models(name, gmacs):
    published = deit.PUBLISHED[name]
    with torch.device("meta"):
        model = deit.create_model(published.size, distilled=published.distilled, image_size=published.image_size)
    assert round(deit.count_macs(model) / 1e9, 4) == gmacs


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
    assert torch.allclose(maps.sum(dim=-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(maps, torch.stack(seen, dim=1), atol=1e-5)


@pytest.mark.parametrize("size, message", [(225, "try 224"), (8, "try 16"), (100, "try 96")])
def test_an_image_size_off_the_grid_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        deit.create_model("tiny", image_size=size)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\), not \(1, 3, 48, 48\)"):
        deit.create_model("tiny", image_size=32)(torch.zeros(1, 3, 48, 48))


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def save(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_base_at_384_is_timms(tmp_path, distilled):
    reference = randomize(timm.create_model(f"deit_base_{'distilled_' * distilled}patch16_384"))
    model = deit.load_model(save(tmp_path, {"model": reference.state_dict()}))
    assert (model.image_size, model.pos_embed.shape[1]) == (384, 578 if distilled else 577)
    assert_same(model(images(384, 1)), reference(images(384, 1)))


@every_model
@torch.no_grad()
def test_official_files_load_with_nothing_but_their_name(tmp_path, size, distilled):
    reference = timm_model(size, distilled)
    path = save(tmp_path, {"model": reference.state_dict(), "args": argparse.Namespace(lr=1e-3), "epoch": 299})
    assert_same(deit.load_model(path)(images()), reference(images()))


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {f"module.{n}": t for n, t in state.items()},
                                  lambda state: {"state_dict": {f"_orig_mod.{n}": t for n, t in state.items()}}])
@torch.no_grad()
def test_wrappers_and_prefixes_are_seen_through(tmp_path, wrap):
    reference = timm_model("tiny", True, num_classes=5)
    model = deit.load_model(save(tmp_path, wrap(reference.state_dict())))
    assert (model.distilled, model.num_classes, model.training) == (True, 5, False)
    assert_same(model(images()), reference(images()), 2e-5)


def hugging_face(distilled):
    config = dict(hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, num_labels=10,
                  image_size=64)
    if distilled:
        return randomize(transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**config)))
    return randomize(transformers.ViTForImageClassification(transformers.ViTConfig(**config)))


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_hugging_face_models_load_from_memory_names(tmp_path, distilled):
    reference = hugging_face(distilled)
    model = deit.load_model(save(tmp_path, reference.state_dict()))
    assert (model.distilled, model.image_size) == (distilled, 64)
    assert_same(model(images(64)), reference(images(64)).logits)


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_hugging_face_models_load_from_their_saved_files(tmp_path, distilled):
    reference = hugging_face(distilled)
    reference.save_pretrained(tmp_path)                                  # the names of the hub, as safetensors
    assert_same(deit.load_model(tmp_path / "model.safetensors")(images(64)), reference(images(64)).logits)


def test_safetensors_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="model.safetensors': it needs one more package: pip install safetensors"):
        deit.load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_mmpretrain_names_load(tmp_path, distilled):
    reference = timm_model("tiny", distilled)
    names = [("patch_embed.proj", "patch_embed.projection"), ("norm1", "ln1"), ("norm2", "ln2"), ("blocks.", "layers."),
             ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")]
    state = {}
    for name, tensor in reference.state_dict().items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        if name.startswith("head"):
            state[f"head.layers.{name}"] = tensor
        else:
            state["backbone." + (name.replace("norm.", "ln1.") if name.startswith("norm.") else name)] = tensor
    assert_same(deit.load_model(save(tmp_path, {"meta": {}, "state_dict": state}))(images()), reference(images()))


@torch.no_grad()
def test_positions_at_another_size_are_timms_without_antialias():
    reference = timm_model("tiny", True)
    state = reference.state_dict()
    resized = timm.layers.resample_abs_pos_embed(state["pos_embed"], (24, 24), num_prefix_tokens=2, antialias=False)
    model = deit.load_model("file", checkpoint={"model": dict(state)}, image_size=384)
    assert torch.allclose(model.pos_embed, resized, atol=1e-6)
    assert torch.equal(deit.load_model("file", checkpoint={"model": dict(state)}, image_size=224).pos_embed, state["pos_embed"])


def test_a_fresh_head_is_made_only_when_asked_for_and_said(capsys):
    state = timm_model("tiny", True).state_dict()
    assert deit.load_model("file", checkpoint=dict(state)).num_classes == 1000 and capsys.readouterr().out == ""
    model = deit.load_model("file", checkpoint=dict(state), num_classes=7)
    assert model.head.out_features == model.head_dist.out_features == 7
    assert "fresh head for 7 classes in place of the file's 1000" in capsys.readouterr().out


def test_a_plain_model_made_distilled_and_back_is_itself(capsys):
    plain = deit.create_model("tiny", image_size=32, num_classes=5).eval()
    distilled = deit.load_model("file", checkpoint=plain.state_dict(), distilled=True)
    assert "fresh distillation token and head" in capsys.readouterr().out
    fresh = {"dist_token", "head_dist.weight", "head_dist.bias"}
    state, before = distilled.state_dict(), plain.state_dict()
    assert state.keys() - before.keys() == fresh and state["dist_token"].std() > 0.01
    assert torch.equal(state["pos_embed"][:, [0, 2, 3, 4, 5]], before["pos_embed"])
    assert all(torch.equal(state[name], before[name]) for name in before.keys() - {"pos_embed"})
    back = deit.load_model("file", checkpoint=state, distilled=False)
    assert "without its distillation token and head" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(back(images), plain(images))


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("blocks.3.attn.qkv.bias"), "blocks.3.attn.qkv.bias"),
    (lambda state: state.update(extra=torch.zeros(1)), "extra"),
    (lambda state: state.update({"norm.weight": torch.zeros(3)}), "norm.weight"),
    (lambda state: state.pop("head.weight"), "no DeiT: it has no classifier"),
    (lambda state: state.update({"module.norm.weight": torch.zeros(192)}), "two tensors for 'norm.weight'"),
    (lambda state: state.update(pos_embed=torch.zeros(1, 190, 192)), "190 positions, which is no square and 1"),
    (lambda state: state.update(dist_token=torch.zeros(1, 1, 192), pos_embed=torch.zeros(1, 198, 192)), "no distillation head"),
    (lambda state: state.update(pos_embed=torch.zeros(1, 197)), "found cls_token"),
    (lambda state: state.pop("pos_embed"), "found cls_token")])
def test_nothing_is_loaded_loosely(change, message):
    state = dict(timm_model("tiny", False).state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        deit.load_model("file", checkpoint=state)


@torch.no_grad()
def test_a_published_name_is_its_file_in_torch_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    reference = timm_model("tiny", True)
    torch.save({"model": reference.state_dict()}, tmp_path / "hub" / "checkpoints" / deit.PUBLISHED["tiny-distilled"].file)
    assert_same(deit.load_model("tiny-distilled")(images()), reference(images()))


def test_two_urls_with_one_file_name_are_two_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix: open(path, "w").write(url))
    paths = [deit.download(f"https://example.org/{name}/pytorch_model.bin") for name in ("a", "b", "a")]
    assert paths[0] == paths[2] != paths[1] and [open(path).read()[20:21] for path in paths] == ["a", "b", "a"]


def test_what_blocks_a_file_is_named(tmp_path):
    torch.save({"model": {}, "when": pathlib.PurePosixPath("x")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth is not a checkpoint .*: it holds a pathlib\S*PurePosixPath, which"):
        deit.load_model(tmp_path / "weights.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no DeiT in .*list.pth: .* found list"):
        deit.load_model(tmp_path / "list.pth")


def test_a_download_is_checked_against_the_hash_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def download(url, path, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0123")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match="https://.* is not a checkpoint .* invalid hash value"):
        deit.load_model("base-384")
    assert asked == [("https://dl.fbaipublicfiles.com/deit/deit_base_patch16_384-8de9b5d1.pth", "8de9b5d1")]


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_malicious_file_is_refused_and_not_executed(tmp_path):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    for path in (tmp_path / "weights.pth", save(tmp_path, {"model": Malicious()})):
        with pytest.raises(ValueError, match="not a checkpoint"):
            deit.load_model(path)


def test_a_file_without_a_deit_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match="found conv.weight, fc.weight"):
        deit.load_model(save(tmp_path, {"conv.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="not a checkpoint"):
        deit.load_model(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="tiny-distilled"):
        deit.load_model(tmp_path / "absent.pth")
