"""DeiT: the model, whole, and the loading of every published checkpoint.

Touvron et al., "Training data-efficient image transformers & distillation through attention"
(https://arxiv.org/abs/2012.12877): the vision transformer of section 3 and the distillation token of
section 4.

    python deit.py                                   prints the eight published models

    model = deit.create_model("tiny", distilled=True)             fresh weights
    model = deit.load_model("tiny-distilled")                     published weights: 74.476 % top-1 on
                                                                  ImageNet
    model = deit.load_model("any/checkpoint.pth", image_size=384) position grid resized to 24 x 24

Shapes, at the right margin where they change: B images, N tokens, D channels, H heads, K classes.
"""
import argparse
import hashlib
import math
import os
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

DEPTH, PATCH_SIZE, HEAD_DIM, LAYER_NORM_EPS = 12, 16, 64, 1e-6

#        channels, heads            paper, table 1
SIZES = {
    "tiny": (192, 3),
    "small": (384, 6),
    "base": (768, 12),
}


class Published(NamedTuple):
    """One checkpoint of the official repository, with the accuracies its README gives (ImageNet
    validation, %)."""
    size: str
    distilled: bool
    image_size: int
    top1: float
    top5: float
    file: str

    @property
    def url(self):
        return f"https://dl.fbaipublicfiles.com/deit/{self.file}"


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


# ---------------------------------------------------------------------------------------------------
# The model


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

    def forward(self, x):                                                         # (B, N, D)
        q, k, v = map(self.split_heads, self.qkv(x).chunk(3, dim=2))
        x = F.scaled_dot_product_attention(q, k, v)                               # (B, H, N, 64)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, N, D)

    def attend_from(self, x, queries):                                            # (B, N, D)
        """What `forward` gives for the first `queries` tokens, for little work if those are few.

        With weights K and V, scores q (x K)' = (q K') x', and for attention a, a (x V) = (a x) V: no
        token's key or value is computed. The keys' bias adds one number to all scores of a query, which
        softmax ignores; the values' bias is added at the end, since attention sums to 1.
        """
        (q_weight, *kv_weights), (q_bias, _, v_bias) = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        k_weight, v_weight = (weight.unflatten(0, (self.heads, -1)) for weight in kv_weights)
        q = F.linear(x[:, :queries], q_weight, q_bias).unflatten(2, (self.heads, -1)) * HEAD_DIM**-0.5
        q = torch.einsum("bqhe,hed->bhqd", q, k_weight)                           # (B, H, queries, D)
        attention = torch.einsum("bhqd,bnd->bhqn", q, x).softmax(dim=3)
        attended = torch.einsum("bhqn,bnd->bhqd", attention, x)
        values = torch.einsum("bhqd,hed->bqhe", attended, v_weight).flatten(2) + v_bias
        return self.proj(values)                                                  # (B, queries, D)

    def maps(self, x):
        """The attention of every token to every token, written out: each row sums to 1."""
        q, k, _ = self.qkv(x).split(x.shape[2], dim=2)
        q, k = self.split_heads(q), self.split_heads(k)
        return ((q * HEAD_DIM**-0.5) @ k.transpose(2, 3)).softmax(dim=3)          # (B, H, N, N)


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch dropped per image with
    probability `drop_path`."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x, outputs=None):
        """Computes the first `outputs` tokens only (None: all); every token is still attended to."""
        normed = self.norm1(x)
        attended = self.attn(normed) if outputs is None else self.attn.attend_from(normed, outputs)
        x = x[:, :outputs] + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeiT(nn.Module):
    """The transformer of section 3; `distilled` adds the token and the head of section 4.

    Parameter names and shapes are the official checkpoints'. `image_size` is a multiple of 16 (pixels,
    square); `drop_path` is the rate of the last block, rising linearly from 0 in the first.
    """

    def __init__(self, dim, heads, *, distilled=False, image_size=224, num_classes=1000, drop_path=0.0):
        super().__init__()
        self.distilled, self.image_size, self.num_classes = distilled, image_size, num_classes
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
        """Truncated normal with std 0.02 for every linear layer, token and position; biases 0. LayerNorm
        (1, 0) and the patch projection (uniform within 1/sqrt(768), bias too) keep PyTorch's defaults, as
        the official code does."""
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
            raise ValueError(f"this model takes images of shape (B, 3, {self.image_size}, "
                             f"{self.image_size}), not {tuple(images.shape)}; "
                             "load_model(..., image_size=...) makes one for another size")
        patches = self.patch_embed(images)
        tokens = [token.expand(len(images), -1, -1) for token in self.tokens]
        return torch.cat((*tokens, patches), dim=1) + self.pos_embed              # (B, N, D)

    def features(self, images):
        """The final class token, and distillation token if there is one: (B, 1 or 2, D)."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        # The heads read nothing but these tokens, so the last block computes no others: same
        # output, 8 % fewer FLOPs.
        x = self.blocks[-1](x, len(self.tokens))                                  # (B, 1 or 2, D)
        return self.norm(x)

    def forward_heads(self, images):
        """(class logits, distillation logits), each (B, K), in training and in evaluation
        mode. Distilled models only."""
        if not self.distilled:
            raise ValueError("forward_heads needs a distilled model; this one has only the class head")
        x = self.features(images)
        return self.head(x[:, 0]), self.head_dist(x[:, 1])                        # 2 x (B, K)

    def forward(self, images):
        """Logits (B, K). A distilled model gives the pair of its heads in training mode and
        their mean in evaluation.

        The paper's section 4 adds the two softmaxes; the official code, whose numbers are the published
        ones, averages the logits, and so do we.
        """
        if not self.distilled:
            return self.head(self.features(images)[:, 0])                         # (B, K)
        class_logits, distillation_logits = self.forward_heads(images)
        return ((class_logits, distillation_logits) if self.training else
                (class_logits + distillation_logits) / 2)

    def attention_maps(self, images):
        """(B, depth, H, N, N): how much each token (row) of each block attends to each (column); rows sum
        to 1. Tokens are in the order class, distillation (if distilled), patches row by row."""
        x, maps = self.embed(images), []
        for block in self.blocks:
            maps.append(block.attn.maps(block.norm1(x)))
            x = block(x)
        return torch.stack(maps, dim=1)


def create_model(size, *, distilled=False, image_size=224, num_classes=1000, drop_path=0.0):
    """A DeiT with fresh weights. Raises ValueError for an unknown size or an image size that is no
    multiple of 16."""
    if size not in SIZES:
        raise ValueError(f"unknown model size {size!r}: choose one of {', '.join(SIZES)}")
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        near = max(PATCH_SIZE, round(image_size / PATCH_SIZE) * PATCH_SIZE)
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {PATCH_SIZE}: "
                         f"try {near}")
    return DeiT(*SIZES[size], distilled=distilled, image_size=image_size, num_classes=num_classes,
                drop_path=drop_path)


def count_macs(model):
    """Multiply-accumulates for one image: patches, blocks (attention products included) and heads, counted
    for the architecture as published, that is without the saving in the last block."""
    num_tokens, dim = model.pos_embed.shape[1:]
    num_patches = num_tokens - len(model.tokens)
    blocks = DEPTH * (12 * num_tokens * dim**2 + 2 * num_tokens**2 * dim)
    return num_patches * 3 * PATCH_SIZE**2 * dim + blocks + len(model.tokens) * dim * model.num_classes


# ---------------------------------------------------------------------------------------------------
# Checkpoints: four layouts, one set of names

# What turns other projects' parameter names into the official ones: regular expressions, all
# applied in this order.
MMPRETRAIN_NAMES = {
    r"^backbone\.ln1\.": "norm.", r"^backbone\.layers\.": "blocks.", r"^backbone\.|^head\.layers\.": "",
    r"\.projection\.": ".proj.", r"\.ln([12])\.": r".norm\1.",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.", r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}
HUGGING_FACE_NAMES = {                                           # files on the hub | memory of transformers 5
    r"^(deit|vit)\.(encoder\.layer|layers)\.": "blocks.", r"^(deit|vit)\.(embeddings\.)?": "",
    "^distillation_token$": "dist_token", "^position_embeddings$": "pos_embed",
    r"^patch_embeddings\.projection\.": "patch_embed.proj.",
    r"\.layernorm_before\.": ".norm1.", r"\.layernorm_after\.": ".norm2.", r"^layernorm\.": "norm.",
    r"\.attention\.(attention\.query|q_proj)\.": ".attn.q.",
    r"\.attention\.(attention\.key|k_proj)\.": ".attn.k.",
    r"\.attention\.(attention\.value|v_proj)\.": ".attn.v.",
    r"\.attention\.(output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.", r"\.output\.dense\.": ".mlp.fc2.",
    r"^distillation_classifier\.": "head_dist.", r"^(cls_)?classifier\.": "head.",
}


def rename(state, rules):
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"the weights have two tensors for {name!r}")
        renamed[name] = tensor
    return renamed


def official_names(state):
    """Renames a state dict of any of the four layouts to the official names, joining split
    query, key and value."""
    state = rename(state, {r"^(module\.|_orig_mod\.)+": ""})
    if "backbone.cls_token" in state:
        return rename(state, MMPRETRAIN_NAMES)
    if "deit.embeddings.cls_token" in state or "vit.embeddings.cls_token" in state:
        state = rename(state, HUGGING_FACE_NAMES)
        for name in [name for name in state if ".attn.q." in name]:
            parts = [state.pop(name.replace(".q.", part), None) for part in (".q.", ".k.", ".v.")]
            state[name.replace(".q.", ".qkv.")] = torch.cat([part for part in parts if part is not None])
    return state


def download(url):
    """The file behind an https URL, from torch.hub's cache or fetched into it with a progress bar. A hash
    in its name ("-a1311bcf.pth") is checked; without one the URL itself becomes part of the cached name."""
    name = url.split("?")[0].rsplit("/", 1)[-1]
    hashed = re.search(r"-([0-9a-f]{8,})\.", name)
    if not hashed:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        print(f"downloading {url} to {path}", flush=True)
        torch.hub.download_url_to_file(url, path, hashed and hashed[1])
    return path


def read_checkpoint(source):
    """What a file, an https URL or a published name holds, read without executing anything in it.

    Raises FileNotFoundError for a missing file, OSError for one that cannot be reached, and ValueError for
    one that does not consist of tensors and plain values; each names the source.
    """
    source = path = PUBLISHED[source].url if source in PUBLISHED else str(source)
    try:
        if source.startswith("https://"):
            path = download(source)
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        # the official code keeps its args in the file
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights file {source!r}; a path, an https URL or one of "
                                f"{', '.join(PUBLISHED)} is expected") from None
    except OSError as error:                                             # no network, a folder, no permission
        raise OSError(f"cannot read weights {source!r}: {error}") from None
    except Exception as error:                                  # a damaged file can make torch raise anything
        where = source if path == source else f"{source} (delete {path} to fetch it again)"
        raise ValueError(f"{where} is not a checkpoint of tensors and plain values: {why(error)}") from None


def why(error):
    """The useful part of what torch says of a file that it cannot read."""
    blocked = re.search(r"GLOBAL (\S+)", str(error))
    if blocked:
        return f"it holds a {blocked[1]}, which cannot be read without executing code"
    return (str(error).split("\n")[0][:200] if isinstance(error, RuntimeError) else
            "it is damaged, or of another format")


def read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise OSError("it needs one more package: pip install safetensors") from None
    return load_file(path)


def find_weights(checkpoint, source, *, ema=False):
    """The state dict within a checkpoint, under official names; None if there is no vision
    transformer in it.

    `ema` takes the averaged weights of a training checkpoint instead of the raw ones.
    """
    if not isinstance(checkpoint, dict):
        return None
    wrappers = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    state = next((checkpoint[key] for key in wrappers if isinstance(checkpoint.get(key), dict)), None)
    if ema and state is None:
        raise ValueError(f"{source} holds no averaged (EMA) weights: leave --ema out")
    state = checkpoint if state is None else state
    tensors = {name: value for name, value in state.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    state = official_names(tensors)
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    return state if all(name in state and state[name].ndim == ndim for name, ndim in needed.items()) else None


def fit(state, distilled, model):
    """Makes the weights of a DeiT, `distilled` or not, fit `model`, which may have another image size and
    a distillation token where they have none, or none where they have one.

    The patches' positions are interpolated, bicubic, which keeps the vectors' norm (paper, section 3),
    without corner alignment or antialiasing, as the published 384 models were made. Distillation token,
    its position and its head are left out, or are the model's fresh ones.
    """
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


def describe_keys(checkpoint):
    keys = list(checkpoint) if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
    return ", ".join(map(str, keys[:4])) + (", ..." if len(keys) > 4 else "")


def check_architecture(state, source):
    """(size, distilled, image size, classes) of official weights. Raises ValueError for
    another vision transformer."""
    dim, distilled, patch_size = (state["cls_token"].shape[2], "dist_token" in state,
                                  state["patch_embed.proj.weight"].shape[3])
    size = next((name for name, (width, _) in SIZES.items() if width == dim), None)
    positions, num_tokens = state["pos_embed"].shape[1], 2 if distilled else 1
    side, head = math.isqrt(max(0, positions - num_tokens)), state.get("head.weight")
    problems = {
        f"its width is {dim} (DeiT: 192, 384 or 768)": size is None,
        f"its patches have {patch_size} pixels (DeiT: 16)": patch_size != PATCH_SIZE,
        f"it has {positions} positions, which is no square and {num_tokens}":
            side < 1 or side**2 + num_tokens != positions,
        "it has no classifier (head.weight)": head is None or head.ndim != 2 or not len(head),
        "it has a distillation token but no distillation head": distilled and "head_dist.weight" not in state,
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"{source} is a vision transformer, but no DeiT: {problem}")
    return size, distilled, side * PATCH_SIZE, len(head)


def load_model(source, *, image_size=None, num_classes=None, classes=None, distilled=None, drop_path=0.0,
               ema=False, checkpoint=None):
    """A DeiT from a path, an https URL or a published name; in evaluation mode.

    Size, distilled or not, image size and number of classes come from the tensors; the file may be in the
    official (or timm), mmpretrain, Hugging Face or this project's own layout. Loading is strict.
    `image_size` resizes the position grid; `num_classes`, or the names `classes`, where they differ from
    the file's, give fresh heads, and `distilled`, where it does, a fresh distillation token and head or
    none, and each says so. `checkpoint` is what read_checkpoint(source) gave, if it was read already.
    Raises OSError or ValueError naming the source.
    """
    checkpoint = read_checkpoint(source) if checkpoint is None else checkpoint
    state = find_weights(checkpoint, source, ema=ema)
    if state is None:
        raise ValueError(f"no DeiT in {source}: expected cls_token, pos_embed, "
                         "patch_embed.proj.weight, ... (or mmpretrain's or Hugging Face's names for "
                         f"them), found {describe_keys(checkpoint)}")
    size, was_distilled, file_image_size, file_classes = check_architecture(state, source)
    model = create_model(size, distilled=was_distilled if distilled is None else distilled,
                         drop_path=drop_path, image_size=file_image_size if image_size is None else image_size,
                         num_classes=file_classes if num_classes is None else num_classes)
    state, changes = fit(state, was_distilled, model), []
    if model.distilled != was_distilled:
        changes.append("fresh distillation token and head" if model.distilled else
                       "without its distillation token and head")
    known = checkpoint.get("classes")
    other = classes and isinstance(known, (list, tuple)) and list(known) != list(classes)
    if other or model.num_classes != file_classes:
        changes.append(f"fresh head for {model.num_classes} classes in place of the file's {file_classes}")
        state |= {name: value for name, value in model.state_dict().items() if name.startswith("head")}
    if changes and os.environ.get("RANK", "0") == "0":              # under torchrun once, not per process
        print(f"{source}: {', '.join(changes)}")
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).split("\n")[1:])[:300]
        raise ValueError(f"{source} does not fit DeiT-{size}{' distilled' if was_distilled else ''}: "
                         f"{reason}") from None
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description="Prints the table of the eight published models.")
    parser.parse_args()
    print(f"{'model':<20}{'tokens':>7}{'image':>7}{'parameters':>12}"
          f"{'GMACs':>9}{'top-1':>9}{'top-5':>9}  file")
    for name, published in PUBLISHED.items():
        with torch.device("meta"):                                       # shapes only: nothing is allocated
            model = create_model(published.size, distilled=published.distilled,
                                 image_size=published.image_size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:<20}{model.pos_embed.shape[1]:>7}{published.image_size:>7}{parameters:>12,}"
              f"{count_macs(model) / 1e9:>9.4f}{published.top1:>9.3f}{published.top5:>9.3f}"
              f"  {published.file}")
    print("top-1 and top-5: as published by the authors, ImageNet validation, %")


if __name__ == "__main__":
    main()
