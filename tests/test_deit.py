"""The model against timm, transformers and the published numbers."""
import argparse
import pickle
import sys
from pathlib import PurePosixPath

import pytest
import timm
import torch
import transformers

import deit
from conftest import Malicious, randomize, run_main

TIMM_NAMES = {(size, distilled): f"deit_{size}_{'distilled_' * distilled}patch16_224"
              for size in deit.SIZES for distilled in (False, True)}
PARAMETERS = {("tiny", False): 5_717_416, ("tiny", True): 5_910_800, ("small", False): 22_050_664,
              ("small", True): 22_436_432, ("base", False): 86_567_656, ("base", True): 87_338_192}
every_model = pytest.mark.parametrize("size, distilled", TIMM_NAMES)


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
    assert rates == pytest.approx(
        [0, .00909, .01818, .02727, .03636, .04545, .05455, .06364, .07273, .08182, .09091, .1], abs=1e-5)


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
def test_a_file_for_384_pixels_is_seen_to_be_one_and_gives_timms_logits(tmp_path, distilled):
    reference = timm_model("tiny", distilled, img_size=384)
    model = deit.load_model(save(tmp_path, {"model": reference.state_dict()}))
    assert (model.image_size, model.pos_embed.shape[1]) == (384, 578 if distilled else 577)
    assert_same(model(images(384, 1)), reference(images(384, 1)))


@every_model
@torch.no_grad()
def test_official_files_load_by_their_name_alone_and_give_timms_logits(tmp_path, size, distilled):
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


def test_safetensors_without_its_package_names_both(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.safetensors: .* safetensors\.torch"):
        deit.load_model(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_mmpretrain_names_load(tmp_path, distilled):
    reference = timm_model("tiny", distilled)
    names = [("patch_embed.proj", "patch_embed.projection"), ("norm1", "ln1"), ("norm2", "ln2"),
             ("blocks.", "layers."), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")]
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
    same = deit.load_model("file", checkpoint={"model": dict(state)}, image_size=224)
    assert torch.equal(same.pos_embed, state["pos_embed"])


def test_a_fresh_head_is_made_only_when_asked_for_and_said(capsys):
    state = timm_model("tiny", True).state_dict()
    assert deit.load_model("file", checkpoint=dict(state)).num_classes == 1000 and capsys.readouterr().out == ""
    model = deit.load_model("file", checkpoint=dict(state), num_classes=7)
    assert model.head.out_features == model.head_dist.out_features == 7
    assert capsys.readouterr().out == "file: fresh head for 7 classes; the file's 1000 differ\n"
    named = deit.load_model("file", checkpoint={"model": state, "classes": list("abc")}, classes=list("abd"))
    assert named.num_classes == 3 and "fresh head for 3 classes" in capsys.readouterr().out


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


def put(**tensors):
    return lambda state: state.update(tensors)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("blocks.3.attn.qkv.bias"), "blocks.3.attn.qkv.bias"),
    (put(extra=torch.zeros(1)), "extra"),
    (put(**{"norm.weight": torch.zeros(3)}), "norm.weight"),
    (put(**{"module.norm.weight": torch.zeros(192)}), "two tensors for 'norm.weight'"),
    (put(dist_token=torch.zeros(1, 1, 192), pos_embed=torch.zeros(1, 198, 192)), "head_dist.weight"),
    (put(**{"patch_embed.proj.weight": torch.zeros(192, 3, 8, 8)}), "patch_embed.proj.weight"),
    (lambda state: state.pop("head.weight"), "no DeiT, .* and a classifier, head.weight"),
    (put(pos_embed=torch.zeros(1, 190, 192)), r"no DeiT, .* a square and 1 positions \(this: 190\)"),
    (put(cls_token=torch.zeros(1, 1, 1024)), r"no DeiT, which has a width of 192, 384 or 768 \(this: 1024\)"),
    (put(pos_embed=torch.zeros(1, 197)), "pos_embed"),
    (put(cls_token=torch.zeros(192)), "weights.pth: "),
    (lambda state: state.pop("pos_embed"), "no DeiT: expected cls_token, pos_embed, .* found .'cls_token'")])
def test_nothing_is_loaded_loosely(change, message):
    state = deit.create_model("tiny").state_dict()
    change(state)
    with pytest.raises(ValueError, match=message) as error:
        deit.load_model("weights.pth", checkpoint=state)
    assert str(error.value).startswith("weights.pth: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [lambda bias: bias.index_fill(0, torch.tensor(5), float("nan")),
                                    lambda bias: bias.index_fill(0, torch.tensor(5), float("-inf")),
                                    torch.Tensor.int, torch.Tensor.bool, lambda bias: bias.to(torch.complex64),
                                    lambda bias: bias.to("meta"), lambda bias: bias.to(torch.float8_e4m3fn),
                                    lambda bias: bias.double() * 0 + 1e300])
def test_weights_that_are_not_finite_floats_are_refused_by_name(change):
    state = deit.create_model("tiny", image_size=32).state_dict()
    state["blocks.3.mlp.fc1.bias"] = change(state["blocks.3.mlp.fc1.bias"])
    with pytest.raises(ValueError, match="weights.pth: its blocks.3.mlp.fc1.bias is not made of finite floating-point"):
        deit.load_model("weights.pth", checkpoint=state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_single(dtype):
    state = {name: tensor.to(dtype) for name, tensor in deit.create_model("tiny", image_size=32).state_dict().items()}
    loaded = deit.load_model("file", checkpoint=state).state_dict()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in loaded.items())


@torch.no_grad()
def test_a_published_name_is_its_file_in_torch_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    reference = timm_model("tiny", True)
    name = "deit_tiny_distilled_patch16_224-b40b3cf7.pth"
    torch.save({"model": reference.state_dict()}, tmp_path / "hub" / "checkpoints" / name)
    assert_same(deit.load_model("tiny-distilled")(images()), reference(images()))


def test_two_urls_with_one_file_name_are_two_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix: open(path, "w").write(url))
    paths = [deit.download(f"https://example.org/{name}/pytorch_model.bin") for name in ("a", "b", "a")]
    assert paths[0] == paths[2] != paths[1] and [open(path).read()[20:21] for path in paths] == ["a", "b", "a"]


def test_a_download_is_checked_against_the_hash_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def download(url, path, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0123")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match="cannot download https://.*-8de9b5d1.pth to .*/checkpoints: invalid hash value"):
        deit.load_model("base-384")
    assert asked == [("https://dl.fbaipublicfiles.com/deit/deit_base_patch16_384-8de9b5d1.pth", "8de9b5d1")]


def test_a_malicious_file_is_refused_and_not_executed(tmp_path):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    for path in (tmp_path / "weights.pth", save(tmp_path, {"model": Malicious()})):
        with pytest.raises(ValueError, match="cannot read weights .*weights.pth: "):
            deit.load_model(path)


def test_what_blocks_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read weights .*weights.pth: .* pathlib.PurePosixPath"):
        deit.load_model(save(tmp_path, {"model": {}, "when": PurePosixPath("x")}))


def test_an_entry_that_torch_would_take_for_a_folder_and_not_read_is_found(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(deit.create_model("tiny", image_size=32, num_classes=3).state_dict(), path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02", content.rindex(b"/data/2") - 50)       # in the archive's directory
    content[entry + 38] ^= 0x10                                                  # its attributes, which no sum covers
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pth: it is damaged"):
        deit.load_model(path)


def test_a_flipped_byte_is_found(tmp_path):
    path = save(tmp_path, {"model": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[content.index(bytes(100)) + 50] ^= 1                         # torch reads it as another number
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read weights .*weights.pth: it is damaged: a checksum is wrong"):
        deit.read_checkpoint(path)


@pytest.mark.parametrize("content, message", [
    ({"conv.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, "found .'conv.weight', 'fc.weight'"),
    ([1, 2, 3], "weights.pth: no DeiT: expected"), (5, "weights.pth: ")])
def test_a_file_without_a_deit_is_named_with_what_it_holds(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        deit.load_model(save(tmp_path, content))


def test_a_file_that_is_no_checkpoint_or_is_not_there_is_named(tmp_path):
    cut = save(tmp_path, {"model": torch.zeros(1000)}).read_bytes()[:3000]
    for content in (b"", b"hello\nworld\n", b"PK\x03\x04", cut):
        (tmp_path / "notes.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read weights .*notes.pth: [^\n]+$"):
            deit.load_model(tmp_path / "notes.pth")
    for absent in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no weights file '{absent}': .* tiny-distilled"):
            deit.load_model(absent)


# ---------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_the_eight_published_models(capsys):
    assert run_main(deit) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert len(rows) == 8
    for row in rows:
        size, distilled, large = row[0].split("-")[0], "distilled" in row[0], "384" in row[0]
        tokens = (576 if large else 196) + (2 if distilled else 1)
        added = (576 - 196) * deit.SIZES[size][0] if large else 0             # more positions
        assert [int(cell.replace(",", "")) for cell in row[1:4]] == [
            tokens, 384 if large else 224, PARAMETERS[size, distilled] + added]
    assert rows[3][4:] == ["4.6241", "81.164", "95.376", "deit_small_distilled_patch16_224-649709d9.pth"]


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    assert run_main(deit, "--weights", "tiny") == 2
    assert capsys.readouterr().err == "deit.py: unrecognized arguments: --weights tiny\n"
