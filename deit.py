"""DeiT: the model, whole, and the loading of every published checkpoint.

Sections 3 and 4 of "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877): the vision transformer, and its distillation token.

    python deit.py                                                  prints the eight published models
    model = deit.create_model("tiny", distilled=True)               fresh weights
    model = deit.load_model("tiny-distilled")                       published: 74.476 % top-1 on ImageNet
    model = deit.load_model("any/checkpoint.pth", image_size=384)   position grid resized to 24 x 24

Shapes, at the right margin where they change: B images, N tokens, D channels, H heads, K classes.
"""
import argparse
import contextlib
import hashlib
import math
import os
import re
import warnings
import zipfile
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

DEPTH, PATCH_SIZE, HEAD_DIM, LAYER_NORM_EPS = 12, 16, 64, 1e-6
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}         # channels, heads: table 1

Published = namedtuple("Published", "size distilled image_size top1 top5 file")    # ImageNet validation, %
PUBLISHED = {
    "tiny": Published("tiny", False, 224, 72.202, 91.124, "deit_tiny_patch16_224-a1311bcf.pth"),
    "tiny-distilled": Published("tiny", True, 224, 74.476, 91.920, "deit_tiny_distilled_patch16_224-b40b3cf7.pth"),
    "small": Published("small", False, 224, 79.854, 94.968, "deit_small_patch16_224-cd65a155.pth"),
    "small-distilled": Published("small", True, 224, 81.164, 95.376, "deit_small_distilled_patch16_224-649709d9.pth"),
    "base": Published("base", False, 224, 81.846, 95.594, "deit_base_patch16_224-b5f2ef4d.pth"),
    "base-distilled": Published("base", True, 224, 83.372, 96.482, "deit_base_distilled_patch16_224-df68dfff.pth"),
    "base-384": Published("base", False, 384, 82.890, 96.222, "deit_base_patch16_384-8de9b5d1.pth"),
    "base-distilled-384": Published("base", True, 384, 85.224, 97.186, "deit_base_distilled_patch16_384-d0272ac0.pth"),
}
URLS = {name: f"https://dl.fbaipublicfiles.com/deit/{model.file}" for name, model in PUBLISHED.items()}


# ---- The model ------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Cuts the image into 16 x 16 patches, row by row, and projects each to D channels."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, images):                                                    # (B, 3, S, S)
        return self.proj(images).flatten(2).transpose(1, 2)                       # (B, patches, D)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k' / sqrt(64)) v: the paper's equation 1."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)                   # (B, H, N, 64)

    def forward(self, x, num_queries=None):                                       # (B, N, D)
        """Attention to all N tokens, of the first `num_queries` (None: of all)."""
        if num_queries is None:
            q, k, v = self.qkv(x).chunk(3, dim=2)
        else:
            dim, weight, bias = x.shape[2], self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, :num_queries], weight[:dim], bias[:dim])
            k, v = F.linear(x, weight[dim:], bias[dim:]).chunk(2, dim=2)
        x = F.scaled_dot_product_attention(*map(self.split_heads, (q, k, v)))     # (B, H, queries, 64)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, queries, D)

    def maps(self, x):
        """The attention of every token to every token, written out: each row sums to 1."""
        q, k, _ = map(self.split_heads, self.qkv(x).chunk(3, dim=2))
        return ((q * HEAD_DIM**-0.5) @ k.transpose(2, 3)).softmax(dim=3)          # (B, H, N, N)


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `drop_path` drops a branch, per image."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x, num_outputs=None):
        """Computes the first `num_outputs` tokens only (None: all); every token is still attended to."""
        x = x[:, :num_outputs] + self.drop_path(self.attn(self.norm1(x), num_outputs))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeiT(nn.Module):
    """The transformer of section 3; `distilled` adds the token and the head of section 4. Parameter names and
    shapes are the official checkpoints'. `image_size` is in pixels; `drop_path` is the rate of the last
    block, rising linearly from 0 in the first."""

    def __init__(self, size, *, distilled=False, image_size=224, num_classes=1000, drop_path=0.0):
        super().__init__()
        dim, heads = SIZES[size]
        self.size, self.distilled = size, distilled
        self.image_size, self.num_classes = image_size, num_classes
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, dim))
        num_positions = (image_size // PATCH_SIZE) ** 2 + (2 if distilled else 1)
        self.pos_embed = nn.Parameter(torch.empty(1, num_positions, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (DEPTH - 1)) for i in range(DEPTH))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(dim, num_classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Truncated normal, std 0.02; biases 0. Norms and patches keep PyTorch's defaults, as officially."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (*self.tokens, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)

    @property
    def tokens(self):
        """The learned tokens that stand before the patches: class, and distillation if there is one."""
        return (self.cls_token, self.dist_token) if self.distilled else (self.cls_token,)

    def embed(self, images):                                                      # (B, 3, S, S)
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"this model takes images (B, 3, {self.image_size}, {self.image_size}), not "
                             f"{tuple(images.shape)}; load_model(..., image_size=...) adapts it")
        patches = self.patch_embed(images)
        tokens = [token.expand(len(images), -1, -1) for token in self.tokens]
        return torch.cat((*tokens, patches), dim=1) + self.pos_embed              # (B, N, D)

    def features(self, images):
        """The final class token, and distillation token if there is one: (B, 1 or 2, D)."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        # the heads read these tokens only, so the last block computes no others: 7 % fewer multiply-adds
        return self.norm(self.blocks[-1](x, len(self.tokens)))                    # (B, 1 or 2, D)

    def forward_heads(self, images):
        """(class logits, distillation logits), each (B, K), in either mode. Distilled models only."""
        x = self.features(images)
        return self.head(x[:, 0]), self.head_dist(x[:, 1])                        # 2 x (B, K)

    def forward(self, images):
        """Logits (B, K). A distilled model gives the pair of its heads in training, their mean in evaluation.
        (The paper adds their softmaxes; the official code, and so the published numbers, average logits.)"""
        if not self.distilled:
            return self.head(self.features(images)[:, 0])                         # (B, K)
        class_logits, distillation_logits = self.forward_heads(images)
        if self.training:
            return class_logits, distillation_logits
        return (class_logits + distillation_logits) / 2

    def attention_maps(self, images):
        """(B, depth, H, N, N): how much each token (row) attends to each (column) in each block; rows sum to
        1. Tokens are in order class, distillation (if distilled), patches row by row."""
        x, maps = self.embed(images), []
        for block in self.blocks:
            maps.append(block.attn.maps(block.norm1(x)))
            x = block(x)
        return torch.stack(maps, dim=1)


def create_model(size, *, distilled=False, image_size=224, num_classes=1000, drop_path=0.0):
    """A DeiT with fresh weights. Raises ValueError for a size, or an image size, that it cannot have."""
    if size not in SIZES:
        raise ValueError(f"unknown model size {size!r}: choose one of {', '.join(SIZES)}")
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        near = max(1, round(image_size / PATCH_SIZE)) * PATCH_SIZE
        raise ValueError(f"image size {image_size} is not a multiple of the patches' 16 pixels: try {near}")
    return DeiT(size, distilled=distilled, image_size=image_size, num_classes=num_classes,
                drop_path=drop_path)


def count_macs(model):
    """Multiply-adds for one image, attention products and heads included, of the last block all tokens."""
    num_tokens, dim = model.pos_embed.shape[1:]
    num_patches = num_tokens - len(model.tokens)
    blocks = DEPTH * (12 * num_tokens * dim**2 + 2 * num_tokens**2 * dim)
    return num_patches * 3 * PATCH_SIZE**2 * dim + blocks + len(model.tokens) * dim * model.num_classes


# ---- Checkpoints: four layouts, one set of names --------------------------------------------------

NAMES = {  # what turns other projects' parameter names into the official ones, in this order
    r"^(module\.|_orig_mod\.)+": "",                             # wrappers of the model
    r"^backbone\.ln1\.": "norm.", r"^backbone\.layers\.": "blocks.",              # mmpretrain
    r"^backbone\.|^head\.layers\.": "", r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"\.ln([12])\.": r".norm\1.", r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.", r"\.ffn\.layers\.1\.": ".mlp.fc2.",
    r"^(deit|vit)\.(encoder\.layer|layers)\.": "blocks.",         # Hugging Face: files on the hub | memory
    r"^(deit|vit)\.(embeddings\.)?": "", r"^patch_embeddings\.projection\.": "patch_embed.proj.",
    "^distillation_token$": "dist_token", "^position_embeddings$": "pos_embed",
    r"\.layernorm_before\.": ".norm1.", r"\.layernorm_after\.": ".norm2.", r"^layernorm\.": "norm.",
    r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.": r".attn.\2.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.", r"\.output\.dense\.": ".mlp.fc2.",
    r"^distillation_classifier\.": "head_dist.", r"^(cls_)?classifier\.": "head.",
}


def adapt_state_dict(state):
    """A state dict of any of the four layouts under the official names."""
    adapted = {}
    for name, tensor in state.items():
        for pattern, replacement in NAMES.items():
            name = re.sub(pattern, replacement, name)
        if name in adapted:
            raise ValueError(f"it has two tensors for {name!r}")
        adapted[name] = tensor
    for name in [name for name in adapted if ".attn.q." in name]:         # query, key, value: one layer here
        parts = [adapted.pop(name.replace(".q.", part), torch.empty(0)) for part in (".q.", ".k.", ".v.")]
        adapted[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return adapted


def find_state_dict(checkpoint, ema=False):
    """The state dict in what a file holds, empty if there is none; with `ema` that of averaged weights."""
    if not isinstance(checkpoint, dict):
        return {}
    wrappers = ("averaged_model", "model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    bare = {} if ema else checkpoint
    state = next((checkpoint[key] for key in wrappers if isinstance(checkpoint.get(key), dict)), bare)
    return {name: value for name, value in state.items()
            if isinstance(name, str) and isinstance(value, torch.Tensor)}


def infer_architecture(state):
    """(size, distilled, image size, number of classes). Raises ValueError for another vision transformer."""
    dim, positions = state["cls_token"].shape[2], state["pos_embed"].shape[1]
    size = next((name for name, (width, _) in SIZES.items() if width == dim), None)
    num_tokens = 2 if "dist_token" in state else 1
    side = math.isqrt(max(positions - num_tokens, 0))
    if size is None or not 0 < side <= 256 or side**2 + num_tokens != positions or "head.weight" not in state:
        raise ValueError(f"no DeiT, which has a width of 192, 384 or 768 (this: {dim}), a square and "
                         f"{num_tokens} positions (this: {positions}), and a classifier, head.weight")
    return size, num_tokens == 2, side * PATCH_SIZE, len(state["head.weight"])


def adapt_to_model(state, distilled, model):
    """Makes the weights of a DeiT, `distilled` or not, fit `model`, which may have another image size, or the
    distillation token that they lack, or lack theirs. Positions are interpolated, bicubic, which keeps the
    vectors' norm (section 3), without antialiasing, as the published 384 models were made."""
    fresh, num_tokens, parts = model.state_dict(), 2 if distilled else 1, ("dist_token", "head_dist.")
    tokens, grid = state["pos_embed"][:, :num_tokens], state["pos_embed"][:, num_tokens:]
    side, new_side = math.isqrt(grid.shape[1]), model.image_size // PATCH_SIZE
    if side != new_side:
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()        # (1, D, side, side)
        grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
        grid = grid.flatten(2).transpose(1, 2).to(tokens.dtype)                   # (1, patches, D)
    if distilled != model.distilled:
        tokens = torch.cat((tokens[:, :1], fresh["pos_embed"][:, 1:len(model.tokens)]), dim=1)
        state = {name: value for name, value in state.items() if not name.startswith(parts)}
        state |= {name: value for name, value in fresh.items() if name.startswith(parts)}
    return state | {"pos_embed": torch.cat((tokens, grid), dim=1)}


def load_model(source, *, image_size=None, num_classes=None, classes=None, distilled=None, drop_path=0.0,
               ema=False, checkpoint=None):
    """A DeiT from a path, an https URL or a published name; in evaluation mode.

    Size, distilled or not, image size and classes come from the tensors, in the official (or timm's),
    mmpretrain's, Hugging Face's or this project's layout; loading is strict. `image_size` resizes the grid of
    positions; other `num_classes` or `classes` (names) than the file's give fresh heads; another `distilled`
    a new distillation token and head, or none; each is said. `checkpoint`: what read_checkpoint(source) gave.
    Raises FileNotFoundError or ValueError."""
    checkpoint = read_checkpoint(source) if checkpoint is None else checkpoint
    with naming(source):
        state = adapt_state_dict(find_state_dict(checkpoint, ema))
        if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= state.keys():
            raise ValueError(f"no {'averaged weights of a ' * ema}DeiT: expected cls_token, pos_embed, "
                             "patch_embed.proj.weight, ... (or mmpretrain's or Hugging Face's names for "
                             f"them), found {str(list(checkpoint))[:90]}")
        size, was_distilled, file_image_size, file_classes = infer_architecture(state)
        model = create_model(size, distilled=was_distilled if distilled is None else distilled,
                             image_size=image_size or file_image_size, drop_path=drop_path,
                             num_classes=num_classes or len(classes or ()) or file_classes)
        state, changes = adapt_to_model(state, was_distilled, model), []
        if model.distilled != was_distilled:
            changes.append(("fresh" if model.distilled else "without its") + " distillation token and head")
        if model.num_classes != file_classes or other_classes(checkpoint, classes):
            changes.append(f"fresh head for {model.num_classes} classes; the file's {file_classes} differ")
            state |= {name: value for name, value in model.state_dict().items() if name.startswith("head")}
        load_strictly(model, state)
    if changes and os.environ.get("RANK", "0") == "0":              # under torchrun once, not per process
        print(f"{source}: {', '.join(changes)}")
    return model.eval()


# ---- Files that may be anything -------------------------------------------------------------------


@contextlib.contextmanager
def naming(source):
    """Whatever a file makes torch or Python raise in here becomes a ValueError of one line that names it."""
    try:
        yield
    except Exception as error:
        text = re.sub(r"(?s)Weights only load.*?(error:|\n\n)|(Please|Check the doc).*", "", str(error))
        kind = "" if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
        raise ValueError(f"{source}: {kind}{' '.join(text.split())[:300]}") from None


def download(url):
    """The path of the file behind an https URL, in torch.hub's cache. A hash in its name ("-a1311bcf.pth")
    is checked; without one the URL becomes part of the cached name."""
    name = url.split("?")[0].rsplit("/", 1)[-1]
    hashed = re.search(r"-([0-9a-f]{8,})\.", name)
    if not hashed:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, path, hashed and hashed[1])
    return path


def read_checkpoint(source, names=tuple(PUBLISHED)):
    """What a file, an https URL or a published name holds, read without executing anything in it. Raises
    FileNotFoundError, or ValueError for what is damaged or not made of tensors and plain values."""
    path = URLS.get(str(source), str(source))
    if path.startswith("https://"):
        with naming(f"cannot download {path} to {torch.hub.get_dir()}/checkpoints"):
            path = download(path)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"no weights file {path!r}: give a path, a URL or {', '.join(names)}")
    with naming(f"cannot read weights {path}"):
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file                          # only such files need it
            return load_file(path)
        archive = zipfile.is_zipfile(path) and zipfile.ZipFile(path)     # torch does not look; skips folders
        if archive and (archive.testzip() or any(entry.external_attr & 0x10 for entry in archive.infolist())):
            raise ValueError("it is damaged: a checksum is wrong, or an entry")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(record=True):
            return torch.load(path, map_location="cpu", weights_only=True)


def load_strictly(model, state):
    """Raises RuntimeError for other names or shapes, ValueError for values that are not finite floats."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    strange = [name for name, tensor in state.items() if tensor.is_meta or not (
        tensor.dtype in floats or name.endswith("num_batches_tracked"))]         # batch norm's
    if not strange:
        model.load_state_dict(state, strict=True)
        strange = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if strange:
        raise ValueError(f"its {strange[0]} is not made of finite floating-point numbers")


def other_classes(checkpoint, classes):
    """Whether the file names its classes, and not these."""
    known = checkpoint.get("classes")
    return bool(classes) and isinstance(known, (list, tuple)) and list(known) != list(classes)


def main():
    parser = argparse.ArgumentParser(description="Prints the table of the eight published models.")
    parser.error = lambda message: parser.exit(2, f"deit.py: {message}\n")
    parser.parse_args()
    print(f"{'model':<20} tokens  image  parameters    GMACs    top-1    top-5  file")
    for name, (size, distilled, image_size, top1, top5, file) in PUBLISHED.items():
        with torch.device("meta"):                                       # shapes only: nothing is allocated
            model = create_model(size, distilled=distilled, image_size=image_size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:<20}{model.pos_embed.shape[1]:>7}{image_size:>7}{parameters:>12,}"
              f"{count_macs(model) / 1e9:>9.4f}{top1:>9.3f}{top5:>9.3f}  {file}")
    print("top-1 and top-5: as published by the authors, ImageNet validation, %")


if __name__ == "__main__":
    main()
