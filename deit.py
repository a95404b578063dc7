"""DeiT: the model, whole, and the loading of every published checkpoint.

Sections 3 and 4 of "Training data-efficient image transformers & distillation through
attention" (https://arxiv.org/abs/2012.12877): the vision transformer and its
distillation token.

    python deit.py                                     the eight published models
    model = deit.create_model("tiny", distilled=True)  fresh weights
    model = deit.load_model("tiny-distilled")          published: 74.476 % on ImageNet
    model = deit.load_model("a.pth", image_size=384)   positions resized to 24 x 24

Shapes, at the right margin where they change:
B images, N tokens, D channels, H heads, K classes, S pixels.
"""
import argparse
import contextlib
import hashlib
import math
import re
import zipfile
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

DEPTH = 12
PATCH_SIZE = 16
HEAD_DIM = 64
LAYER_NORM_EPS = 1e-6
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}     # D, H: table 1


# --------------------------------------------------------------------------------------
# The model


class PatchEmbed(nn.Module):
    """Cuts the image into 16 x 16 patches, row by row, and projects each to D channels."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, images):                                       # (B, 3, S, S)
        return self.proj(images).flatten(2).transpose(1, 2)          # (B, patches, D)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k' / sqrt(64)) v: equation 1."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x):                                        # (B, N, D)
        qkv = self.qkv(x).unflatten(2, (3, self.heads, HEAD_DIM))    # (B, N, 3, H, 64)
        return qkv.permute(2, 0, 3, 1, 4)                            # (3, B, H, N, 64)

    def forward(self, x, num_queries=None):                          # (B, N, D)
        """Attends to all N tokens, from the first `num_queries` of them (default: all)."""
        q, k, v = self.split_heads(x)
        x = F.scaled_dot_product_attention(q[:, :, :num_queries], k, v)
        return self.proj(x.transpose(1, 2).flatten(2))               # (B, queries, D)

    def maps(self, x):                                               # (B, N, D)
        """The softmax of equation 1 on its own: row = query, each row sums to 1."""
        q, k, _ = self.split_heads(x)
        return ((q * HEAD_DIM**-0.5) @ k.transpose(2, 3)).softmax(dim=3)   # (B, H, N, N)


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a branch for each image with probability `rate`.

    Surviving branches are divided by 1 - rate. torchvision's StochasticDepth rounds
    1 / (1 - rate) to bfloat16 first, which is off by up to 0.31 % in a whole block.
    """

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):                                            # (B, N, D)
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.rate
        return x / (1 - self.rate) * keep


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = MLP(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, num_outputs=None):                          # (B, N, D)
        """Updates the first `num_outputs` tokens only (default: all)."""
        x = x[:, :num_outputs] + self.drop_path(self.attn(self.norm1(x), num_outputs))
        return x + self.drop_path(self.mlp(self.norm2(x)))           # (B, outputs, D)


class DeiT(nn.Module):
    """The transformer of section 3, with fresh weights; `distilled` adds the token and the
    head of section 4. Parameter names and shapes are those of the official checkpoints.

    `size` is tiny, small or base; `image_size` is in pixels; `drop_path` is the rate of the
    last block, which rises linearly from 0 in the first. Raises ValueError for an image
    size that is not a multiple of 16.
    """

    def __init__(self, size, *, distilled=False, image_size=224, num_classes=1000,
                 drop_path=0.0):
        super().__init__()
        if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
            raise ValueError(f"image size {image_size} is not a multiple of 16 pixels: try "
                             f"{(image_size // PATCH_SIZE + 1) * PATCH_SIZE}")

        self.size = size
        self.distilled = distilled
        self.image_size = image_size
        self.num_classes = num_classes

        dim, heads = SIZES[size]
        num_patches = (image_size // PATCH_SIZE) ** 2
        num_tokens = num_patches + (2 if distilled else 1)
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim))

        rates = [drop_path * i / (DEPTH - 1) for i in range(DEPTH)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

        self.head = nn.Linear(dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(dim, num_classes)
        self.init_weights()

    def init_weights(self):
        """Truncated normal, std 0.02; biases 0. As officially, layer norms and the patch
        projection keep PyTorch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for parameter in (*self.prefix_tokens, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def prefix_tokens(self):
        """The learned tokens before the patches: [class], or [class, distillation]."""
        if self.distilled:
            return [self.cls_token, self.dist_token]
        return [self.cls_token]

    def embed(self, images):                                         # (B, 3, S, S)
        patches = self.patch_embed(images)                           # (B, patches, D)
        tokens = [token.expand(images.shape[0], -1, -1) for token in self.prefix_tokens]
        x = torch.cat([*tokens, patches], dim=1)                     # (B, N, D)
        return x + self.pos_embed

    def features(self, images):
        """The final class token, and distillation token if there is one: (B, 1 or 2, D)."""
        x = self.embed(images)                                       # (B, N, D)
        for block in self.blocks[:-1]:
            x = block(x)

        # the heads read the prefix tokens only, so the last block updates no others:
        # 6 % fewer multiply-adds
        x = self.blocks[-1](x, num_outputs=len(self.prefix_tokens))
        return self.norm(x)                                          # (B, 1 or 2, D)

    def forward_heads(self, images):
        """(class logits, distillation logits) in either mode. Distilled models only."""
        x = self.features(images)
        return self.head(x[:, 0]), self.head_dist(x[:, 1])           # (B, K) each

    def forward(self, images):
        """Logits (B, K). A distilled model returns the pair of its heads in training mode
        and their mean in evaluation mode.

        The paper's text adds the two softmaxes; the official code, and so the published
        accuracies, average the logits.
        """
        if not self.distilled:
            return self.head(self.features(images)[:, 0])            # (B, K)
        class_logits, distillation_logits = self.forward_heads(images)
        if self.training:
            return class_logits, distillation_logits
        return (class_logits + distillation_logits) / 2              # (B, K)

    def attention_maps(self, images):
        """How much each token (row) attends to each other (column), in every block:
        (B, depth, H, N, N). Tokens in order: class, distillation if any, patches by row."""
        x = self.embed(images)
        maps = []
        for block in self.blocks:
            maps.append(block.attn.maps(block.norm1(x)))             # (B, H, N, N)
            x = block(x)
        return torch.stack(maps, dim=1)


create_model = DeiT                      # the name that goes with load_model


# --------------------------------------------------------------------------------------
# Published checkpoints (section 5; the authors' accuracies on ImageNet's validation set, %)

URL = "https://dl.fbaipublicfiles.com/deit/"

Published = namedtuple("Published", "size distilled image_size top1 top5 file")
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


def load_model(source, **settings):
    """A DeiT from a path, an https URL or a published name, in evaluation mode.

    Size, distilled or not, image size and classes come from the tensors, which may have the
    official (or timm's), mmpretrain's, Hugging Face's or this project's names. Loading is
    strict. The `settings` image_size, num_classes, distilled and drop_path are create_model's.
    What is asked for and differs from the file is adapted: positions are resized, heads or
    the distillation token and head are fresh (a line names them) or dropped. Raises OSError
    or ValueError naming the source.
    """
    checkpoint = read_checkpoint(source)
    with naming(source):
        return model_from_state_dict(find_state_dict(checkpoint), **settings)


def model_from_state_dict(state, *, image_size=None, num_classes=None, distilled=None,
                          drop_path=0.0, fresh_head=False):
    """load_model for a state dict under the official names; `fresh_head` replaces the heads
    even if their number of classes is right."""
    size, was_distilled, file_image_size, file_classes = infer_architecture(state)
    if not file_classes and not num_classes:
        raise ValueError("it has no classification head: give num_classes, or use it as --init")
    if distilled is None:
        distilled = was_distilled
    model = DeiT(size, distilled=distilled, image_size=image_size or file_image_size,
                 num_classes=num_classes or file_classes, drop_path=drop_path)
    fresh = model.state_dict()

    # positions: of the class token, of the distillation token if any, of a grid of patches
    tokens, grid = state["pos_embed"].tensor_split([2 if was_distilled else 1], dim=1)
    grid = resize_positions(grid, model.image_size // PATCH_SIZE)
    if distilled != was_distilled:
        of_dist_token = fresh["pos_embed"][:, 1:len(model.prefix_tokens)]
        tokens = torch.cat([tokens[:, :1], of_dist_token], dim=1)
        state = replace_parts(state, fresh, ("dist_token", "head_dist."))
    state = {**state, "pos_embed": torch.cat([tokens, grid], dim=1)}

    if fresh_head or model.num_classes != file_classes:
        state = replace_parts(state, fresh, ("head.", "head_dist."))
    load_strictly(model, state)
    return model.eval()


def infer_architecture(state):
    """(size, distilled, image size, number of classes) of a state dict under the official
    names. Raises ValueError if it is not a DeiT's."""
    if not {"pos_embed", "patch_embed.proj.weight"} <= state.keys():
        raise ValueError("not a DeiT: expected pos_embed, patch_embed.proj.weight, ..., or "
                         "mmpretrain's or Hugging Face's names for them; found "
                         f"{list(state)[:3]}")
    if "blocks.0.gamma_1" in state:
        raise ValueError("a DeiT III, whose blocks differ (LayerScale)")

    distilled = "dist_token" in state
    _, num_positions, dim = state["pos_embed"].shape
    side = math.isqrt(num_positions - (2 if distilled else 1))
    for size, (width, _) in SIZES.items():
        if width == dim:
            return size, distilled, side * PATCH_SIZE, len(state.get("head.weight", ()))
    raise ValueError(f"not a DeiT: expected a width of 192, 384 or 768, found {dim}")


def resize_positions(grid, new_side):                                # (1, patches, D)
    """Bicubic, which keeps the vectors' norm (section 3), and without antialiasing, as the
    published 384-pixel models were made. The identity when the size does not change."""
    side = math.isqrt(grid.shape[1])
    if side == new_side:
        return grid
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)       # (1, D, side, side)
    grid = F.interpolate(grid.float(), size=(new_side, new_side), mode="bicubic",
                         align_corners=False)
    return grid.flatten(2).transpose(1, 2)                           # (1, new patches, D)


def replace_parts(state, fresh, prefixes):
    """`state` with the entries that begin with one of `prefixes` taken from `fresh`, and a
    line that names them."""
    kept = {name: value for name, value in state.items() if not name.startswith(prefixes)}
    new = {name: value for name, value in fresh.items() if name.startswith(prefixes)}
    if new:
        print(f"fresh weights, not from the file: {', '.join(new)}")
    return kept | new


# --------------------------------------------------------------------------------------
# Four layouts, one set of names

# Keys under which a checkpoint may hold averaged weights. (Ours is averaged_model since timm
# would open model_ema in preference to model.)
AVERAGED = ("state_dict_ema", "model_ema", "averaged_model")

# Regular expressions that turn the names of other projects into the official ones. They
# are applied in this order, each to the result of those before.
RENAMES = [
    # wrappers: DistributedDataParallel, torch.compile, FSDP
    (r"\b(module|_orig_mod|_fsdp_wrapped_module)\.", ""),

    # mmpretrain
    (r"^ln1\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"^head\.layers\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),

    # Hugging Face: encoder.layer and attention.attention.query in files, layers and
    # attention.q_proj in the memory of transformers 5
    (r"^(deit|vit)\.(encoder\.layer|layers)\.", "blocks."),
    (r"^(deit|vit)\.(embeddings\.)?", ""),
    (r"^patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^distillation_token$", "dist_token"),
    (r"^position_embeddings$", "pos_embed"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"^(cls_)?classifier\.", "head."),
]


def official_names(state):
    """A state dict of any of the four layouts under the official names. What stands before
    cls_token, like "model." in Lightning's files, is taken off all names."""
    prefix = ""
    for name in state:
        if name.endswith("cls_token"):
            prefix = re.sub(r"((deit|vit)\.embeddings\.)?cls_token$", "", name)
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"it has two tensors for {name!r}")
        renamed[name] = tensor

    # Hugging Face keeps query, key and value apart
    for name in list(renamed):
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if ".attn.q." in name and renamed.keys() >= set(parts):
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return renamed


def find_state_dict(checkpoint, ema=False):
    """The tensors of a checkpoint's model under the official names, wherever they are; with
    `ema`, those of averaged weights. Raises ValueError if there are several models or, with
    `ema`, none."""
    found = [state for key, state in nested_tensors(checkpoint) if (key in AVERAGED) == ema]
    if ema and not found:
        raise ValueError("it holds no averaged weights")
    models = [state for state in found
              if any(name.endswith(("cls_token", "fc.weight")) for name in state)]
    if len(models) > 1:
        raise ValueError(f"it holds {len(models)} models: save the one you want to a file of "
                         "its own")
    return official_names(max(models or found, key=len, default={}))


def nested_tensors(content, key=""):
    """(key, {name: tensor}) of each nested dict that holds tensors."""
    tensors = {str(name): value for name, value in content.items()
               if isinstance(value, torch.Tensor)}
    if tensors:
        yield key, tensors
    for name, value in content.items():
        if isinstance(value, dict):
            yield from nested_tensors(value, name)


def load_strictly(model, state):
    """Raises RuntimeError for names or shapes other than the model's, ValueError for values
    that are not finite, or not floating-point where the model's are."""
    model.load_state_dict(state, strict=True)
    for name, tensor in model.state_dict().items():
        has_right_type = state[name].dtype == tensor.dtype or state[name].is_floating_point()
        if not has_right_type or not tensor.isfinite().all():
            raise ValueError(f"its {name} is not made of finite floating-point numbers")


# --------------------------------------------------------------------------------------
# Reading untrusted files


def read_checkpoint(source):
    """The dict that a file, an https URL or a published name holds: tensors and plain
    values, read without executing anything. Raises OSError for a file that is not there or
    cannot be downloaded, ValueError for one that is damaged or holds anything else."""
    if source in PUBLISHED:
        source = URL + PUBLISHED[source].file
    is_url = str(source).startswith("https://")
    path = download(source) if is_url else Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights file {str(source)!r}: give a file (of a run its best.pth), an https URL "
            "(of Hugging Face https://huggingface.co/NAME/resolve/main/model.safetensors) or one "
            f"of {', '.join(PUBLISHED)}")
    try:
        return dict(read_file(path))
    except Exception as error:           # whatever a damaged file makes torch or zipfile raise
        # torch's message is a page that also advises to execute the file; what counts stands
        # between "WeightsUnpickler error: " and "Please" or "Check the documentation"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = re.sub(r".*error: |Please.*|Check the doc.*", "", reason)
        if "global" in reason or "TorchScript" in reason:
            reason += RESAVE.format(path)
        elif is_url:
            path.unlink()                # damaged: the next try downloads it again
        raise ValueError(f"cannot read tensors and plain values from {path}: {reason}") from error


# what a user may do with a file that holds more than tensors and plain values
RESAVE = ("""If you trust it: python -c "import torch; c = torch.load('{}', 'cpu', """
          """weights_only=False); c = c.state_dict() if hasattr(c, 'state_dict') else c; """
          """torch.save(c.get('state_dict', c.get('model', c)), 'weights.pth')\"""")


def read_file(path):
    with open(path, "rb") as file:
        start = file.read(20)
    if start.startswith((b"version https://git", b"<", b"{")):
        raise ValueError("it is a text file: a Git LFS pointer (git lfs pull fetches the weights), "
                         "an HTML page or a JSON index")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file      # a package that only such files need
        return load_file(path)

    # torch compares no checksums, and skips an entry that is marked as a folder
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() or any(entry.external_attr & 16 for entry in archive.filelist):
                raise ValueError("it is damaged: a checksum or an entry is wrong")

    # the official files hold the flags of their run
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def download(url):
    """The path of the file behind an https URL, in torch.hub's cache. A hash in its name
    ("-a1311bcf.pth") is checked; without one, the cached name begins with the URL's."""
    name = url.split("?")[0].rsplit("/", 1)[-1]
    hash_in_name = re.search(r"-([0-9a-f]{8,})\.", name)
    if hash_in_name is None:
        name = hashlib.sha256(url.encode()).hexdigest()[:8] + "-" + name
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_in_name and hash_in_name[1])
        except (OSError, RuntimeError) as error:         # RuntimeError: another hash
            raise OSError(f"cannot download {url} to {path}: {error}") from error
    return path


@contextlib.contextmanager
def naming(source):
    """Turns an error about a file's tensors into one line that names the file."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())[:300]}") from error


def main():
    print("published, in %       top-1    top-5  file")
    for name, row in PUBLISHED.items():
        print(f"{name:<18}{row.top1:>9.3f}{row.top5:>9.3f}  {row.file}")


if __name__ == "__main__":
    main()
