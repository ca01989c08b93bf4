"""HDM, the Home-made Diffusion Model, in one file: text in, image out, 343M parameters.

    text  -> frozen language model's states -------+
    image -> frozen VAE latent -> + noise -> XUT --+-> flow velocity -> MSE to train, an Euler step to sample

train.py, sample.py and prepare.py are the programs; what a person must understand to know the method is here,
in this order: configuration; parts; positions and RoPE; attention; AdaLN and the block; TREAD; XUT; flow
matching; the training example, and the way to its loss; the optimizer step; samplers; VAE, and its training;
text encoder and captions; weights in and out; adapters; and, not the method, errors, settings, devices,
ranks, images and files.

Where XUT differs from a plain DiT:
  1. text tokens are part of the sequence, [image | text]; there is no text cross-attention;
  2. the blocks form a U, and the decoder reads the encoder through cross-attention, not by concatenation;
  3. one AdaLN for all blocks (three MLPs), not one for each block;
  4. every sub-layer restarts the residual stream from its modulated input (residual="normed");
  5. RoPE over two axes with learned frequencies; a crop keeps the positions that it had in the whole image;
  6. in training a random half of the image tokens skips the U (TREAD).

Paper: arXiv 2509.06068 (HDM). Where paper and published weights disagree both are options of XUTConfig, and
the defaults are the weights'. Attribute names of XUT and VAE are the published files' names: keep them.

Letters, in every shape comment:
  B batch, N image tokens, T text tokens, S = N + T the sequence, R image tokens that TREAD keeps, D width,
  H heads, K head size, C latent channels, h w latent height and width (pixels without a VAE), p patch size.
Time runs from t = 0 (data) to t = 1 (pure noise).
"""
import atexit
import bisect
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import typing
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageOps, PngImagePlugin
from torch.utils.checkpoint import checkpoint

# ---- Configuration ---------------------------------------------------------------------------------------

# Types of settings, each with its least and its largest value. The least above 0 is a normal number: training
# flushes denormals.
Whole = Annotated[int, 0, math.inf]
Count = Annotated[int, 1, math.inf]
Positive = Annotated[float, sys.float_info.min, math.inf]
NotNegative = Annotated[float, 0, math.inf]
Fraction = Annotated[float, 0, math.nextafter(1, 0)]            # from 0, below 1
PositiveFraction = Annotated[float, sys.float_info.min, 1]               # above 0, up to 1


class UserError(Exception):
    """A mistake that its user can mend: shown as one line `error: ...` with exit code 2, no traceback."""


def check_bounds(settings, prefix="--"):
    """Refuses a value of a dataclass of settings that is outside the bounds of its type."""
    for name, kind in typing.get_type_hints(type(settings), include_extras=True).items():
        if type(None) in typing.get_args(kind):              # Count | None: the first has the bounds
            kind = typing.get_args(kind)[0]
        value = getattr(settings, name)
        if value is None or not hasattr(kind, "__metadata__"):
            continue
        least, most = kind.__metadata__
        if least <= value <= most:
            continue
        low = "above 0" if least == sys.float_info.min else f"{least} or more"
        high = {math.inf: "", math.nextafter(1, 0): ", below 1"}.get(most, f", at most {most}")
        raise UserError(f"{prefix}{name}={value}: must be {low}{high}")


@dataclass(frozen=True)
class XUTConfig:
    dim: Count = 1024          # D, the width of every token
    ctx_dim: Count = 1024      # width of the text encoder's states
    heads: Count = 16          # H; heads * head_dim = dim
    head_dim: Count = 64       # K, a multiple of 4: RoPE rotates K/2 pairs, half of them for each axis
    mlp_dim: Count = 3072      # inner width of the SwiGLU
    depth: Count = 4           # levels of the U
    enc_blocks: Count = 1      # blocks in each encoder level
    dec_blocks: Count = 3      # blocks in each decoder level; the first of them cross-attends
    pre_blocks: Whole = 1      # blocks before the TREAD region: all tokens pass
    post_blocks: Whole = 3     # blocks after it: all tokens pass
    patch_size: Count = 2      # p, latent cells on a token's side
    in_channels: Count = 4     # C, channels of the latent (3 for pixels)
    aspect_cond: bool = True   # feed ln(width / height); the published runs have it from the 768 stage on
    skips: str = "last"        # "last": every decoder level reads the deepest encoder level (the weights);
                               # "mirror": level i reads encoder level depth-1-i (paper's figure);
                               # "none": the decoder reads none, a plain transformer
    residual: str = "normed"   # "normed": x = m + (1+gate) f(m), m the modulated norm of x (the weights);
                               # "raw": x = x + (1+gate) f(m), the textbook's pre-norm
    pos: str = "long_side"     # "long_side": the longer side spans [-1, 1] (the weights);
                               # "unit_area": the two half-ranges multiply to 1 (paper's text)
    prediction: str = "velocity"   # what the last layer gives: "velocity" (the weights); "data", of which the
                               # velocity is made (arXiv 2511.13720): a narrow model need not carry the noise

    def __post_init__(self):
        check_bounds(self, prefix="")
        if self.heads * self.head_dim != self.dim:
            raise UserError(f"dim={self.dim} is not heads={self.heads} times head_dim={self.head_dim}")
        if self.head_dim % 4:
            raise UserError(f"head_dim={self.head_dim}: a multiple of 4 (RoPE turns pairs, for two axes)")
        choices = dict(skips=("last", "mirror", "none"), residual=("normed", "raw"),
                       pos=("long_side", "unit_area"), prediction=("velocity", "data"))
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)}: one of {', '.join(known)}")


PRESETS = {  # the paper's family, with its text encoders and parameter counts
    "small": XUTConfig(dim=896, ctx_dim=640, heads=14, dec_blocks=2),           # Gemma3-270M, 237,290,128
    "base": XUTConfig(),                                                        # Qwen3-0.6B, 343,176,208
    "large": XUTConfig(dim=1280, ctx_dim=1152, heads=10, head_dim=128, mlp_dim=4096), # Gemma3-1B, 555,628,816
}


# ---- Parts -----------------------------------------------------------------------------------------------

def adapted_weight(layer):
    """The layer's weight; with an adapter (below) plus its change, in float32: autocast rounds the sum."""
    adapter = getattr(layer, "adapter", None)
    return layer.weight if adapter is None else layer.weight.float() + adapter()


class Linear(nn.Linear):
    """nn.Linear, whose weight an adapter may change."""

    def forward(self, x):
        return F.linear(x, adapted_weight(self), self.bias)


class PreNorm(nn.Module):
    """RMSNorm with a weight; one level down, as the published name is `attn_pre_norm.norm.weight`."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x):                                # under autocast x may be 16 bit, not the weight
        with torch.autocast("cuda", enabled=False):          # which would give a 16-bit x back in float32
            return F.rms_norm(x, x.shape[-1:], adapted_weight(self.norm).to(x.dtype), self.norm.eps)


class SwiGLU(nn.Module):
    """w3(silu(a) * b), a and b the halves of w12(x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim, mlp_dim):
        super().__init__()
        self.w12 = Linear(dim, 2 * mlp_dim)
        self.w3 = Linear(mlp_dim, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


def time_frequencies(dim, device=None):
    """(1, D/2) float32: exp(-ln(10000) i / (D/2))."""
    half = dim // 2
    return torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=device) / half)[None]


class TimeEmbedding(nn.Module):
    """t (B,) in [0, 1] -> (B, 1, D)."""

    def __init__(self, dim, init=True):
        super().__init__()
        # In the published files, so in ours, but not read below: half precision rounds it, and 1000 t times
        # that error turns the angles by up to 0.24 rad.
        self.register_buffer("freqs", time_frequencies(dim) if init else torch.empty(1, dim // 2))
        self.proj = nn.Sequential(nn.Linear(dim, dim), nn.Mish())

    def forward(self, t):
        freqs = time_frequencies(2 * self.freqs.shape[1], t.device)
        angle = 1000.0 * t.float()[:, None] * freqs                               # (B, D/2), always float32
        emb = torch.cat([angle.cos(), angle.sin()], dim=-1)                       # (B, D)
        return self.proj(emb.to(self.proj[0].weight.dtype))[:, None]              # (B, 1, D)


class PatchIn(nn.Module):
    """(B, C, h, w) -> (B, N, D), tokens row by row."""

    def __init__(self, in_channels, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        x = F.conv2d(x, adapted_weight(self.proj), self.proj.bias, self.proj.stride)
        return x.flatten(2).transpose(1, 2)


class PatchOut(nn.Module):
    """(B, N, D) -> (B, C, h, w); a token's features are ordered (row in patch, column in patch, channel)."""

    def __init__(self, dim, out_channels, patch_size):
        super().__init__()
        self.proj = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.patch_size = patch_size

    def forward(self, x, height, width):
        p = self.patch_size
        x = self.proj(x).unflatten(-1, (p, p, -1))                                # (B, N, p, p, C)
        x = x.unflatten(1, (height // p, width // p))                             # (B, h/p, w/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)            # (B, C, h, w)


# ---- Positions and RoPE ----------------------------------------------------------------------------------

def half_ranges(height, width, convention):
    """How far the positions of a whole height x width image reach from 0, as (y, x)."""
    if convention == "long_side":
        return height / max(height, width), width / max(height, width)
    return math.sqrt(height / width), math.sqrt(width / height)                       # "unit_area"


def cell_centers(half, length, start, cells, patch=1):
    """Positions on an axis of this length over [-half, half]: of cells of size patch, from start on."""
    return -half + (start + patch * (torch.arange(cells, dtype=torch.float64) + 0.5)) * 2 * half / length


def scaled_sides(width, height, size):
    """An image's sides once the short one is size; the long one is floored (HDM's shifted square crop)."""
    return width * size // min(width, height), height * size // min(width, height)


def crop_positions(height, width, top, left, size, patch, convention="long_side"):
    """((size//patch)**2, 2) float32, order (y, x): where a square crop's tokens lie in the whole image.

    All lengths are in one unit (pixels online, latent cells for a cached latent). Offsets need not be
    multiples of the patch: positions are continuous (HDM's shifted square crop).
    """
    half_y, half_x = half_ranges(height, width, convention)
    y = cell_centers(half_y, height, top, size // patch, patch)
    x = cell_centers(half_x, width, left, size // patch, patch)
    return torch.cartesian_prod(y, x).float()


def grid_positions(rows, cols, convention="long_side"):
    """(rows*cols, 2) float32, order (y, x), row by row: the cell centers of a whole image of rows x cols."""
    half_y, half_x = half_ranges(rows, cols, convention)
    y = cell_centers(half_y, rows, 0, rows)
    x = cell_centers(half_x, cols, 0, cols)
    return torch.cartesian_prod(y, x).float()


class Rotate(torch.autograd.Function):
    """Turns the feature pairs (j, j + K/2) of x (B, S, H, K) by angle (B, S, H, K/2); cos, sin: of it.

    Autograd by itself would keep x; the gradients need the result alone, which attention keeps anyway.
    """

    @staticmethod
    def forward(ctx, x, angle, cos, sin):
        a, b = x.float().chunk(2, dim=-1)
        out = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        if out.dtype != x.dtype:                             # torch 2.11 compiles an idle .to to zeros
            out = out.to(x.dtype)
        ctx.save_for_backward(out, cos, sin)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, cos, sin = ctx.saved_tensors
        a, b = out.float().chunk(2, dim=-1)
        da, db = grad.float().chunk(2, dim=-1)
        dx = torch.cat([da * cos + db * sin, db * cos - da * sin], dim=-1).to(grad.dtype)
        return dx, (db * a - da * b).sum_to_size(cos.shape), None, None               # (B or 1, S, H, K/2)


class RoPE(nn.Module):
    """Rotary positions with one learned frequency for each head and pair (RoFormer, arXiv 2104.09864); pairs
    belong to y and x by turns.

    The paper says that half of each head is rotated; the published weights rotate all of it, and so do we.
    """

    def __init__(self, heads, head_dim):
        super().__init__()
        self.freqs = nn.Parameter(torch.empty(heads, head_dim // 4, 2))               # log space

    def forward(self, pos, *inputs):
        """pos (B or 1, S, 2); each of inputs (B, S, H, K) turned; angles are float32 whatever its type."""
        freqs = self.freqs.float().exp()                                              # (H, K/4, 2)
        angle = pos.float()[:, :, None, None] * freqs                                 # (B, S, H, K/4, 2)
        angle = angle.flatten(-2)                                                     # y and x alternate
        cos, sin = angle.detach().cos(), angle.detach().sin()
        return [Rotate.apply(x, angle, cos, sin) for x in inputs]


class RotaryLinear(Linear):
    """A projection whose first `turned` outputs (q, k or both) are reordered in each head for Rotate.

    The published weights rotate neighbors, outputs 2j and 2j + 1; Rotate takes j and j + K/2, which on a CPU
    takes less than half the time. So 2j goes to j, and 2j + 1 to j + K/2. Scores do not change, as q and k
    are reordered alike.
    """

    def __init__(self, dim, out, turned, head_dim):
        super().__init__(dim, out, bias=False)
        self.turned, self.head_dim = turned, head_dim

    def forward(self, x):
        turned, rest = adapted_weight(self).split([self.turned, len(self.weight) - self.turned])
        turned = turned.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return F.linear(x, torch.cat([turned, rest]))


# ---- Attention -------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """What self- and cross-attention share: positions, scaled dot product, output."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.out = Linear(config.dim, config.dim)
        self.rope = RoPE(config.heads, config.head_dim)

    def attend(self, q, k, v, pos, mask):
        """q, k, v (B, S, D), pos (B or 1, S, 2) of both, mask (B, 1, 1, S) of keys or None -> (B, S, D)"""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))           # (B, S, H, K)
        q, k = self.rope(pos, q, k)              # in the projections' layout: RoPE reads and writes in order
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                              # (B, H, S, K)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    def __init__(self, config):
        super().__init__(config)
        self.qkv = RotaryLinear(config.dim, 3 * config.dim, 2 * config.dim, config.head_dim)

    def forward(self, x, pos, mask):
        return self.attend(*self.qkv(x).chunk(3, dim=-1), pos, mask)


class CrossAttention(Attention):
    """XUT's skip connection: the decoder's stream asks, an encoder level's raw output answers."""

    def __init__(self, config):
        super().__init__(config)
        self.q = RotaryLinear(config.dim, config.dim, config.dim, config.head_dim)
        self.kv = RotaryLinear(config.dim, 2 * config.dim, config.dim, config.head_dim)

    def forward(self, x, skip, pos, mask):
        return self.attend(self.q(x), *self.kv(skip).chunk(2, dim=-1), pos, mask)


# ---- Shared AdaLN and the block --------------------------------------------------------------------------

class SharedAdaLN(nn.Sequential):
    """The time embedding (B, 1, D) -> 1 + scale, shift, 1 + gate, each (B, 1, D), for all blocks of XUT."""

    def __init__(self, dim):
        mlp = nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, 3 * dim)
        super().__init__(nn.LayerNorm(dim, eps=1e-5), *mlp)
        nn.init.zeros_(self[3].weight)                       # zero: so start scale, shift and gate
        nn.init.zeros_(self[3].bias)

    def forward(self, emb):
        scale, shift, gate = super().forward(emb).chunk(3, dim=-1)
        return 1 + scale, shift, 1 + gate                    # the ones are added here, not in every block


class Block(nn.Module):
    """Self-attention, [cross-attention to a skip], SwiGLU; each modulated by the shared AdaLN."""

    def __init__(self, config, cross=False):
        super().__init__()
        self.residual = config.residual
        self.cross = cross
        self.checkpointing = False                           # True: computed again in backward: less memory
        self.attn = SelfAttention(config)
        self.attn_pre_norm = PreNorm(config.dim)
        if cross:
            self.xattn = CrossAttention(config)
            self.xattn_pre_norm = PreNorm(config.dim)
        self.mlp = SwiGLU(config.dim, config.mlp_dim)
        self.mlp_pre_norm = PreNorm(config.dim)

    def sublayer(self, x, norm, mod, f, *inputs):
        scale1, shift, gate1 = mod
        m = torch.addcmul(shift, norm(x), scale1)            # shift + norm(x) * (1 + scale)
        # "normed" looks like a bug (x itself is dropped, only m goes on), and the published weights need it
        # exactly so: change it and a downloaded model gives noise.
        if self.residual == "normed":
            x = m
        return torch.addcmul(x, gate1, f(m, *inputs))

    def forward(self, x, pos, mods, mask=None, skip=None):
        """x, skip (B, S, D); pos (B or 1, S, 2); mods: the AdaLNs' outputs; mask (B, 1, 1, S) or None."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, pos, mods, mask, skip, use_reentrant=False)
        return self.compute(x, pos, mods, mask, skip)

    def compute(self, x, pos, mods, mask, skip):
        attn_mod, xattn_mod, mlp_mod = mods
        x = self.sublayer(x, self.attn_pre_norm, attn_mod, self.attn, pos, mask)
        if self.cross:
            x = self.sublayer(x, self.xattn_pre_norm, xattn_mod, self.xattn, skip, pos, mask)
        return self.sublayer(x, self.mlp_pre_norm, mlp_mod, self.mlp)


# ---- TREAD: a random part of the image tokens takes a road around the U (arXiv 2501.04765) ---------------

def pick_tokens(batch, n, rate, generator=None):
    """(B, R) sorted int64: for each image a fresh uniform choice of R = n - floor(n * rate) tokens to keep.

    rate is in [0, 1): 0 keeps all n, 0.5 sends half of them around. The generator, if any, is a CPU one.
    """
    if not 0 <= rate < 1:
        raise UserError(f"tread_rate={rate}: a share of the tokens in [0, 1)")
    kept = n - math.floor(n * rate)
    return torch.rand(batch, n, generator=generator).argsort(dim=1)[:, :kept].sort(dim=1).values


def take_tokens(x, keep):
    """(B, N, D), (B, R) -> (B, R, D)"""
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


def put_back_tokens(x, keep, kept):
    """x (B, N, D) with its tokens at keep (B, R) replaced by kept (B, R, D), the others unchanged."""
    return x.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), kept.to(x.dtype))


# ---- XUT -------------------------------------------------------------------------------------------------

class Stack(nn.Module):
    def __init__(self, config, count):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(count))

    def forward(self, x, pos, mods, mask):
        for block in self.blocks:
            x = block(x, pos, mods, mask)
        return x


class Backbone(nn.Module):
    """The U: encoder levels, then decoder levels, whose first block reads an encoder level's output."""

    def __init__(self, config):
        super().__init__()
        self.skips = config.skips
        self.enc_blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.enc_blocks.append(nn.ModuleList(Block(config) for _ in range(config.enc_blocks)))
        self.dec_blocks = nn.ModuleList()
        for _ in range(config.depth):
            level = nn.ModuleList([Block(config, cross=self.skips != "none")])
            level.extend(Block(config) for _ in range(config.dec_blocks - 1))
            self.dec_blocks.append(level)

    def forward(self, x, pos, mods, mask):
        outputs = []
        for level in self.enc_blocks:
            for block in level:
                x = block(x, pos, mods, mask)
            outputs.append(x)
        for first, *others in self.dec_blocks:
            # The paper's figure takes an output off the list ("mirror"). The published code never did, and
            # the published weights were trained that way. With skips="none" no block reads it.
            skip = outputs.pop() if self.skips == "mirror" else outputs[-1]
            x = first(x, pos, mods, mask, skip)
            for block in others:
                x = block(x, pos, mods, mask)
        return x


def join_text(pos, T, ctx_mask):
    """pos (B or 1, N, 2), ctx_mask (B, T) -> those of [image | text]: (B or 1, S, 2), (B, 1, 1, S) or None.

    Text sits at (0, 0), where RoPE turns nothing: its order comes from the language model.
    """
    all_pos = F.pad(pos, (0, 0, 0, T))
    if ctx_mask is None:
        return all_pos, None
    return all_pos, F.pad(ctx_mask.bool(), (pos.shape[1], 0), value=True)[:, None, None]


class XUT(nn.Module):
    """The model. init False: without the initial weights, where others are loaded at once."""

    def __init__(self, config, init=True):
        super().__init__()
        self.config = config
        D = config.dim
        self.in_patch = PatchIn(config.in_channels, D, config.patch_size)
        self.ctx_proj = nn.Linear(config.ctx_dim, D)
        self.time_emb = TimeEmbedding(D, init)
        if config.aspect_cond:
            self.addon_info_embs_proj = nn.Sequential(nn.Linear(1, D), nn.Mish(), nn.Linear(D, D))
        self.shared_adaln_attn = SharedAdaLN(D)
        if config.skips != "none":
            self.shared_adaln_xattn = SharedAdaLN(D)
        self.shared_adaln_ffw = SharedAdaLN(D)
        self.prev_tread_trns = Stack(config, config.pre_blocks)
        self.backbone = Backbone(config)
        self.post_tread_trns = Stack(config, config.post_blocks)
        self.out_patch = PatchOut(D, config.in_channels, config.patch_size)
        if init:
            self.init_weights()

    def checkpoint_blocks(self, on):
        """Whether the backward pass computes blocks again in place of keeping what they computed."""
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointing = on

    def init_weights(self):
        """PyTorch's defaults, except what follows, and what SharedAdaLN sets."""
        if self.config.aspect_cond:                          # zero: the aspect input starts without effect
            nn.init.zeros_(self.addon_info_embs_proj[2].weight)
            nn.init.zeros_(self.addon_info_embs_proj[2].bias)
        for module in self.modules():
            if isinstance(module, RoPE):                     # from a half to 2.5 turns per unit of position
                steps = torch.linspace(math.log(math.pi), math.log(5 * math.pi), module.freqs.shape[1])
                module.freqs.data.copy_(steps[None, :, None].expand_as(module.freqs))
        nn.init.normal_(self.out_patch.proj.weight, std=1 / self.config.dim ** 2)

    def forward(self, x, t, ctx, aspect=None, pos=None, keep=None, ctx_mask=None):
        """The flow velocity (B, C, h, w) = noise - data that XUT sees in x, in x's own type.

        x (B, C, h, w) the noisy latent, h and w multiples of p; t (B,); ctx (B, T, ctx_dim).
        aspect (B,): ln(width / height) of the whole image; None: of x.
        pos (B or 1, N, 2) or (N, 2): each token's (y, x) in the whole image; None: x's own grid.
        keep (B, R): the image tokens that go through the U; None: all.
        ctx_mask (B, T) bool: False tokens are seen by nothing; None: all are real.
        """
        B, _, h, w = x.shape
        dtype = self.in_patch.proj.weight.dtype
        if aspect is None:
            aspect = torch.full((B,), math.log(w / h), device=x.device)
        if pos is None:
            pos = grid_positions(h // self.config.patch_size, w // self.config.patch_size, self.config.pos)
        pos = pos.to(x.device, torch.float32).reshape(-1, *pos.shape[-2:])        # (B or 1, N, 2)
        cond = self.time_emb(t)                                                   # (B, 1, D)
        if self.config.aspect_cond:
            cond = cond + self.addon_info_embs_proj(aspect.to(dtype)[:, None])[:, None]
        xattn_mod = self.shared_adaln_xattn(cond) if self.config.skips != "none" else None
        mods = self.shared_adaln_attn(cond), xattn_mod, self.shared_adaln_ffw(cond)

        image = self.in_patch(x.to(dtype))                                        # (B, N, D)
        text = self.ctx_proj(ctx.to(dtype))                                       # (B, T, D)
        N, T = image.shape[1], text.shape[1]
        z = torch.cat([image, text], dim=1)                                       # (B, S, D)
        all_pos, all_mask = join_text(pos, T, ctx_mask)
        z = self.prev_tread_trns(z, all_pos, mods, all_mask)
        if keep is None:
            z = self.backbone(z, all_pos, mods, all_mask)
        else:
            R = keep.shape[1]
            image, text = z.split([N, T], dim=1)
            part = torch.cat([take_tokens(image, keep), text], dim=1)             # (B, R + T, D)
            part_pos, part_mask = join_text(take_tokens(pos.expand(B, -1, -1), keep), T, ctx_mask)
            part, text = self.backbone(part, part_pos, mods, part_mask).split([R, T], dim=1)
            z = torch.cat([put_back_tokens(image, keep, part), text], dim=1)      # (B, S, D)
        z = self.post_tread_trns(z, all_pos, mods, all_mask)
        out = self.out_patch(z[:, :N], h, w).to(x.dtype)                          # (B, C, h, w)
        if self.config.prediction == "data":                 # x = t noise + (1 - t) data: v = (x - data) / t
            out = (x - out) / t.clamp(min=0.05).to(x.dtype)[:, None, None, None]
        return out


# ---- Flow matching (arXiv 2210.02747): x_t = t noise + (1 - t) x0, velocity v = noise - x0 ---------------

def shift_time(t, shift):
    """t' = s t / (1 + (s - 1) t): s > 1 moves times toward noise, 1 leaves them (SD3, arXiv 2403.03206).

    Large smooth areas survive much noise, so the layout of an image is decided at a t' near 1.
    """
    return shift * t / (1 + (shift - 1) * t)


def draw_time(n, s, generator=None):
    """(n,) training times: shift_time(sigmoid(N(0, 1)), t_shift); s: ExampleSettings."""
    return shift_time(torch.sigmoid(torch.randn(n, generator=generator)), s.t_shift)


def flow_loss(model, x0, ctx, t, noise, aspect=None, pos=None, keep=None, ctx_mask=None, s=None,
              reduction="mean"):
    """Mean squared error of the velocity over everything; reduction="none": one loss for each image, (B,).

    x0 and noise (B, C, h, w), clean latents and N(0, 1); t (B,) in [0, 1]; s: the run's ExampleSettings, for
    a fork's own terms: here nothing reads them; the rest as in XUT.forward.
    """
    at = t[:, None, None, None].to(x0.dtype)
    v = model(at * noise + (1 - at) * x0, t, ctx, aspect=aspect, pos=pos, keep=keep, ctx_mask=ctx_mask)
    loss = (v - (noise - x0)).float().square().mean(dim=(1, 2, 3))                    # (B,)
    return loss if reduction == "none" else loss.mean()


# ---- The training example, and the way from a batch to its loss ------------------------------------------

@dataclass
class ExampleSettings:
    """What a training example is made by."""
    image_size: Count = 256        # side of the square crop in pixels: an image's short side is scaled to it
    text_length: Count = 256       # tokens that captions are cut to
    text_lengths: Annotated[int, 1, 4] = 4     # and padded to the next of so many equal steps
    mask_padding: bool = False     # False: pads are ordinary tokens, as published; True: nothing sees them
    cache_text: bool = False       # encode each caption once, before the first step, then free the device of
                                   # the text encoder: an image has one caption then, the first, all its tags
    caption_dropout: Fraction = 0.1   # share of captions replaced by an empty one, for guidance
    tag_dropout: Fraction = 0.25      # share of a caption's shuffled tags (after |||) that are left out
    group_dropout: Fraction = 0.3     # share of its groups of tags that are left out
    tag_separator: str = "$$"      # ",": captions are lists of tags, all shuffled unless there is a |||
    spaces: bool = False           # underscores in captions become spaces, not in ^_^
    tread_rate: Fraction = 0.5        # share of image tokens that go around the U
    t_shift: Positive = 1.0        # > 1 moves training and sampling times toward noise; 1: published
    vae_chunk: Whole = 0           # images that the VAE takes at a time; 0: as many as take 2 GB


def choices_of(key):
    """-> a training example's random.Random, a seed for its torch.Generator, and a chance in [0, 1): where it
    is below caption_dropout, the caption is empty."""
    rng = random.Random(key)
    seed = rng.getrandbits(63)
    return rng, seed, rng.random()


def training_example(image, caption, sides, key, s, config, factor=None, latent=False, training=True):
    """One image's part of a batch, as a dict. All that is random in it is a function of `key` (a text), drawn
    on the CPU: the number of workers or GPUs changes nothing, and resuming needs no generator.

    image: (3, height, width) uint8, the short side s.image_size pixels long; or, latent, its moments from the
    VAE, (C or 2 C, height, width), the sides in latent cells. sides: the whole image's width and height in
    pixels, scaled like it. caption: as draw_caption takes it. s: ExampleSettings. factor: pixels on the side
    of a latent cell; None: there is no VAE.
    training False: a held-out image. Center crop, all tags, no dropout, no TREAD, and a time that no setting
    moves (the published distribution), so that held-out losses of runs can be compared.

    -> caption, a text; crop, its left, top and size in pixels or, latent, in cells; pixels (3, size, size)
    or moments (C or 2 C, size, size); t () in [0, 1]; aspect () = ln(width / height); pos (N, 2) in the whole
    image; noise (C, h, w); with a VAE vae_noise (C, h, w); with TREAD keep (R,); seed, for vae_inputs.
    """
    rng, seed, chance = choices_of(key)
    generator = torch.Generator().manual_seed(seed)
    if training and chance < s.caption_dropout:
        text = ""
    else:
        text = draw_caption(caption, rng if training else None, s)

    # Shifted square crop: it starts at any pixel, or at any cell of a latent, along the long side.
    cell = 1 if factor is None else factor                   # pixels
    cells = s.image_size // cell                             # h = w
    if latent:                                               # sizes of the crop and of a token, in cells
        size, patch = cells, config.patch_size
    else:                                                    # ... in pixels
        size, patch = s.image_size, config.patch_size * cell
    height, width = image.shape[1:]
    if training:
        left, top = rng.randint(0, width - size), rng.randint(0, height - size)
    else:
        left, top = (width - size) // 2, (height - size) // 2
    crop = image[:, top:top + size, left:left + size]

    if training:
        t = draw_time(1, s, generator)[0]
    else:
        t = torch.sigmoid(torch.randn(1, generator=generator))[0]
    shape = config.in_channels, cells, cells                 # (C, h, w)
    example = dict(caption=text, crop=(left, top, size), seed=seed, t=t,
                   aspect=torch.tensor(math.log(sides[0] / sides[1])),
                   pos=crop_positions(height, width, top, left, size, patch, config.pos),     # (N, 2)
                   noise=torch.randn(shape, generator=generator))
    example["moments" if latent else "pixels"] = crop
    if factor is not None:                                   # for a draw from the VAE's posterior
        example["vae_noise"] = torch.randn(shape, generator=generator)
    if training and s.tread_rate > 0:
        example["keep"] = pick_tokens(1, len(example["pos"]), s.tread_rate, generator)[0]     # (R,)
    return example


def padded_lengths(s):
    """The numbers of tokens that a micro-batch's texts are padded to: all shapes that XUT will meet."""
    steps = range(1, s.text_lengths + 1)
    return sorted({math.ceil(s.text_length * step / s.text_lengths) for step in steps})


def padded_length(tokens, s):
    """The least of padded_lengths that holds so many tokens."""
    lengths = padded_lengths(s)
    return lengths[bisect.bisect_left(lengths, tokens)]


def vae_chunk(s):
    """How many images the VAE takes at a time, unless told: its first level, of 128 channels, then has at
    most 2 ** 30 numbers, 2 GB in 16 bits. CUDA's kernels count to 2 ** 31."""
    return s.vae_chunk or max(1, 2 ** 30 // (128 * s.image_size ** 2))


def images_of(batch, device):
    """A batch's pixels -> images (B, 3, X, X) in [-1, 1], float32, on the device."""
    return to_device(batch["pixels"], device).float() / 127.5 - 1


def clean_latents(batch, vae, s):
    """-> x0 (B, C, h, w): pixels; or, with a VAE, draws from its posterior, whose moments are in the batch or
    encoded here."""
    if "moments" in batch:                                   # cached: the mean alone, or mean and logvar
        mean, *logvar = batch["moments"].float().split(vae.latent_channels, dim=1)
        if not logvar:
            return vae.latents(mean)
        return vae.latents(mean, logvar[0], batch["vae_noise"])
    images = images_of(batch, batch["pixels"].device)                                 # (B, 3, X, X)
    if vae is None:
        return images
    chunk = vae_chunk(s)
    chunks = zip(images.split(chunk), batch["vae_noise"].split(chunk))
    return torch.cat([vae.encode(part, noise) for part, noise in chunks])


def first_tokens(lengths, T):
    """-> (B, T) bool: True on the first lengths[i] tokens of text i."""
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def text_states(captions, te, s):
    """-> ctx (B, T, ctx_dim), and ctx_mask (B, T) bool of the tokens that XUT may see, or None: all of them.

    Each caption has a length of its own, the least of padded_lengths(s) that holds it. Pads up to there are
    ordinary tokens, as published, or with mask_padding masked. T is the largest of these lengths in the
    batch. The pads that shorter captions get beyond their own length are always masked, so that it makes no
    difference to a caption which others are in its batch.
    """
    ids = te.tokenize(captions, s.text_length)
    own = [padded_length(len(row), s) for row in ids]
    T = max(own)
    ctx, is_token = te.encode(ids, T)
    if s.mask_padding:
        return ctx, is_token
    if min(own) == T:
        return ctx, None
    return ctx, first_tokens(own, T)


def loss_inputs(batch, vae, te, s, device, mark=None):
    """A batch of training examples -> the arguments of flow_loss, through the frozen encoders. The host waits
    for nothing. mark: called with the name of each part when it is done, "vae" and "text"."""
    tensors = {name: to_device(value, device) for name, value in batch.items() if torch.is_tensor(value)}
    inputs = {name: tensors[name] for name in ("pos", "t", "noise", "keep", "aspect") if name in tensors}
    inputs["s"] = s
    inputs["x0"] = clean_latents(tensors, vae, s)
    if mark is not None:
        mark("vae")
    inputs["ctx"], mask = text_states(batch["caption"], te, s)
    if mask is not None:
        mask = to_device(mask, device)
    inputs["ctx_mask"] = mask
    if mark is not None:
        mark("text")
    return inputs


def blank_inputs(config, batch, side, T, tread_rate=0.0, masked=False, device="cpu"):
    """flow_loss's arguments of training, all zero: for latents of side x side cells and T text tokens."""
    N = (side // config.patch_size) ** 2
    shape = batch, config.in_channels, side, side
    keep = mask = None
    with torch.device(device):
        if tread_rate > 0:
            keep = torch.zeros(batch, N - math.floor(N * tread_rate), dtype=torch.int64)
        if masked:
            mask = torch.ones(batch, T, dtype=torch.bool)
        return dict(x0=torch.zeros(shape), noise=torch.zeros(shape), t=torch.zeros(batch),
                    s=ExampleSettings(), ctx=torch.zeros(batch, T, config.ctx_dim), ctx_mask=mask,
                    aspect=torch.zeros(batch), pos=torch.zeros(batch, N, 2), keep=keep)


# ---- The optimizer step ----------------------------------------------------------------------------------

def lr_at(seen, s, warmup, end):
    """The lr, before the division by fan-in, of the step after `seen` images: linear warm-up over `warmup`
    images, then constant, or a cosine to 1 % of the peak at `end` images."""
    if seen < warmup:
        steps = warmup / s.global_batch
        return s.lr * min(seen / s.global_batch + 1, steps) / steps
    if s.schedule == "constant":
        return s.lr
    part = min(1, (seen - warmup) / max(1, end - warmup))
    return s.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * part)) / 2)


def parameter_groups(model):
    """The muP-style rule of HDM (cf. arXiv 2203.03466): each tensor's lr is lr / fan_in; a VAE's is lr,
    by which all others are trained and fine-tuned.

    One group of the optimizer for each distinct fan-in (seven for the base model), not for each tensor.
    Two consequences of the published rule that look like mistakes, and are kept: the aspect input's first
    weight has fan-in 1, so it takes the whole lr; norms and biases are divided by their length as well.
    """
    groups = {}
    for weight in learned(model):
        fan_in = len(weight) if weight.dim() == 1 else math.prod(weight.shape[1:])
        if isinstance(model, VAE):
            fan_in = 1
        group = groups.setdefault(fan_in, dict(params=[], fan_in=fan_in))
        group["params"].append(weight)
    return list(groups.values())


def learned(model):
    """The parameters that learn: all, or with adapters theirs."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def count_learned(model):
    return sum(weight.numel() for weight in learned(model))


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


class OptimizerStep:
    """What follows the backward passes of a step: clip, skip a step that is not finite, update, average.

    An optimizer is a subclass with make and state_bytes, such as AdamW below; --optimizer takes its name in
    lower case. Resume, --plan and the size of checkpoints follow.
    """
    state_bytes: int               # bytes of state for each parameter
    skips_steps = True             # by found_inf, as below; False: the host waits for each step's verdict

    def make(self, groups):
        """parameter_groups -> a torch.optim.Optimizer. A step sets each group's lr."""
        raise NotImplementedError

    def __init__(self, model, s, kind, dtype):
        """model: what learns of it in float32; s: train.py's settings; kind: "cpu", "cuda", "mps"; dtype:
        autocast's."""
        self.model, self.s, self.kind = model, s, kind
        self.inner = self.make(parameter_groups(model))
        self.scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
        self.average = model
        if s.ema:                                            # frozen weights are shared, not copied
            frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
            self.average = copy.deepcopy(model, frozen).eval().requires_grad_(False)
        device = next(model.parameters()).device
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)               # steps: all, in a row

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, lr, step, finite):
        """One step with the gradients that were summed up; step: how many were before it; finite: whether
        the losses were, a bool tensor. -> the gradient's global norm before clipping; whether it was done."""
        for group in self.inner.param_groups:
            group["lr"] = lr / group["fan_in"] if self.s.lr_by_fan_in else lr
        self.scaler.unscale_(self.inner)
        largest = self.s.clip if self.s.clip > 0 else math.inf
        norm = torch.nn.utils.clip_grad_norm_(learned(self.model), largest)
        finite = finite & norm.isfinite()
        self.update(finite)
        self.inner.zero_grad(set_to_none=True)
        failed = ~finite
        self.skipped = torch.stack([self.skipped[0] + failed, (self.skipped[1] + 1) * failed])
        if self.s.ema:
            self.update_average(step)
        return norm, finite

    def update(self, finite):
        """The optimizer's own step, where finite.

        torch's GradScaler has a private contract with its fused optimizers: an attribute found_inf, a float
        tensor on the device, makes them skip the step. The scaler sets it in float16 alone; here it is set in
        every type, so that the host need not wait to know. Not tried on MPS, where the host asks.
        """
        if self.skips_steps and self.kind != "mps":
            self.inner.found_inf = 1 - finite.float()
            self.scaler.step(self.inner)
        elif finite:
            self.scaler.step(self.inner)
        self.scaler.update()

    def update_average(self, step):
        decay = min(self.s.ema, (1 + step) / (10 + step))    # soon forgets the initial weights
        averages, weights = [], []
        for average, weight in zip(self.average.parameters(), self.model.parameters()):
            if weight.requires_grad:
                averages.append(average)
                weights.append(weight.data)
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def checkpoint_gb(self):
        """Of weights, average and state, on a disk."""
        copies = 2 if self.s.ema else 1
        return 1e-9 * count_learned(self.model) * (4 * copies + self.state_bytes)

    def state_dict(self):
        return dict(optimizer=self.inner.state_dict(), scaler=self.scaler.state_dict(), bad=self.skipped)

    def load_state_dict(self, state):
        """state: of state_dict, among other things. The groups' settings, such as betas, stay those of s."""
        groups = self.inner.param_groups
        settings = [{name: group[name] for name in group if name not in ("params", "lr")} for group in groups]
        self.inner.load_state_dict(state["optimizer"])
        for group, own in zip(self.inner.param_groups, settings):
            group.update(own)
        if state["scaler"]:                                  # empty: the run was not in float16
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["bad"].to(self.skipped.device)


class AdamW(OptimizerStep):
    state_bytes = 8                # two moments in float32

    def make(self, groups):
        s = self.s
        return torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), weight_decay=s.weight_decay, fused=True)


@contextlib.contextmanager
def full_float32():
    """Matrix products of float32 inside are not TF32's, of 10 bits, whatever the program has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_float32()                    # the steps amplify small eigenvalues of x @ x.mT: in TF32 those are noise
def orthogonal(matrices, steps=5):
    """(..., m, n) -> about U V^T of each one's singular value decomposition U S V^T, by Newton-Schulz steps
    with the polynomial of Muon: singular values become 0.7 to 1.2, or less if below 1/500 of the norm.

    A step is x = factor @ x, with a polynomial of x @ x.mT as the factor. All factors commute, so they and
    x @ x.mT are computed without x: square products of the shorter side, and one last product with x.
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    gram = x @ x.mT
    one = torch.eye(gram.shape[-1], device=x.device)

    def factor_of(gram):
        return 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
    product = factor = factor_of(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = factor_of(gram)
        product = factor @ product
    x = product @ x
    return x.mT if is_tall else x


class MuonAndAdamW(torch.optim.AdamW):
    """AdamW; but Muon for the groups that have a momentum, whose tensors are matrices."""

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self.step_matrices(group)

    def step_matrices(self, group):
        alike = {}                                           # {shape: matrices}: made orthogonal at once
        for weight in group["params"]:
            if weight.grad is not None:
                alike.setdefault(weight.shape, []).append(weight)
        for shape, weights in alike.items():
            directions = []
            for weight in weights:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                    state["step"] = torch.tensor(0.0)        # not read, but AdamW loads no state without
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                directions.append(weight.grad.lerp(state["momentum"], group["momentum"]))     # Nesterov's
            size = 0.2 * math.sqrt(max(shape))
            for weight, direction in zip(weights, orthogonal(torch.stack(directions))):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-group["lr"] * size)


class Muon(OptimizerStep):
    """Muon (Jordan et al., 2024) for the matrices of XUT's blocks, AdamW for all else.

    A matrix's step is its momentum made orthogonal, 0.2 in root mean square over its numbers (less where the
    rank is low): about AdamW's (arXiv 2502.16982). So lr means the same, and is divided by fan-in alike.
    """
    state_bytes = 8                # at most: matrices have one moment
    skips_steps = False

    def make(self, groups):
        s = self.s
        blocks = [module for module in self.model.modules() if isinstance(module, Block)]
        matrices = {weight for block in blocks for weight in block.parameters() if weight.dim() == 2}
        parts = []
        for group in groups:
            by_muon = [weight for weight in group["params"] if weight in matrices]
            by_adamw = [weight for weight in group["params"] if weight not in matrices]
            if by_muon:
                parts.append(dict(group, params=by_muon, momentum=0.95))
            if by_adamw:
                parts.append(dict(group, params=by_adamw))
        return MuonAndAdamW(parts, betas=(s.beta1, s.beta2), weight_decay=s.weight_decay, fused=True)


class AdamW8bit(AdamW):
    """AdamW with its moments in 8 bit (arXiv 2110.02861), by bitsandbytes."""
    state_bytes = 2
    skips_steps = False            # it knows no found_inf

    def make(self, groups):
        import bitsandbytes
        s = self.s
        return bitsandbytes.optim.AdamW8bit(groups, betas=(s.beta1, s.beta2), weight_decay=s.weight_decay)


def optimizers(base=OptimizerStep):
    """{name for --optimizer: class}, all subclasses of base and theirs."""
    classes = {}
    for cls in base.__subclasses__():
        classes[cls.__name__.lower()] = cls
        classes |= optimizers(cls)
    return classes


# ---- Samplers: functions of v(x, t), x and the times; Guidance makes v from the model --------------------

def sampling_times(steps, shift=1.0):
    """(steps + 1,) float32 times from 1 to 0; with shift 1 in equal steps."""
    times = shift_time(torch.linspace(1, 0, steps + 1), shift)
    times[0] = 1                                             # rounded it can be above: no guidance there
    return times


def euler(v, x, times):
    """Integrate dx/dt = v from times[0] to times[-1]: first order, exact where v is constant on the path."""
    for t, following in zip(times[:-1].tolist(), times[1:].tolist()):
        x = x + (following - t) * v(x, t)
    return x


def heun(v, x, times):
    """Second order, two evaluations of v a step (cf. EDM, arXiv 2206.00364); a step that ends at t = 0 is
    Euler's, with one: training never saw t = 0."""
    for t, following in zip(times[:-1].tolist(), times[1:].tolist()):
        slope = v(x, t)
        if following > 0:
            slope = (slope + v(x + (following - t) * slope, following)) / 2
        x = x + (following - t) * slope
    return x


def dpmpp_2m(v, x, times):
    """DPM-Solver++(2M) (arXiv 2211.01095) for flows: second order, one evaluation of v a step.

    Between two times the data that v points to, x0 = x - t v, is taken for linear in ln((1 - t) / t). That is
    infinite at t = 1 and t = 0: steps that touch an end take x0 for constant, which is Euler's step.
    """
    def log_snr(t):
        if 0 < t < 1:
            return math.log((1 - t) / t)
        return math.copysign(math.inf, 0.5 - t)

    x0_before = step_before = None
    for t, following in zip(times[:-1].tolist(), times[1:].tolist()):
        x0 = x - t * v(x, t)
        step = log_snr(following) - log_snr(t)
        ahead = x0
        if x0_before is not None and following > 0:          # in the middle of the step
            ahead = x0 + step / (2 * step_before) * (x0 - x0_before)
        x = following / t * x + (1 - following / t) * ahead
        x0_before, step_before = x0, step
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
euler.title, heun.title, dpmpp_2m.title = "Euler", "Heun", "DPM++ 2M"      # AUTOMATIC1111's names, if any


def stack_texts(states, masks=None):
    """Texts (B, T, ctx_dim) of any lengths T -> one batch of them all, and its mask: padding is False."""
    if masks is None:
        masks = [None] * len(states)
    T = max(x.shape[1] for x in states)
    if all(mask is None and x.shape[1] == T for x, mask in zip(states, masks)):
        return torch.cat(states), None                       # attention is faster without a mask
    padded, padded_masks = [], []
    for x, mask in zip(states, masks):
        if mask is None:
            mask = torch.ones(x.shape[:2], device=x.device)
        pads = T - x.shape[1]
        padded.append(F.pad(x, (0, 0, 0, pads)))
        padded_masks.append(F.pad(mask.bool(), (0, pads)))
    return torch.cat(padded), torch.cat(padded_masks)


@dataclass
class Guidance:
    """v(x, t) for the samplers, of the model by classifier-free guidance: v_u + cfg (v_c - v_u), v_c by the
    prompt and v_u by the negative one (arXiv 2207.12598)."""
    model: nn.Module
    ctx: torch.Tensor                        # (B, T, ctx_dim), the prompts' text states
    uncond: torch.Tensor | None = None       # (B, any T, ctx_dim), the negative prompts'; cfg 1 needs none
    cfg: float = 3.0                         # 1: the prompt's v_c alone
    ctx_mask: torch.Tensor | None = None     # (B, T) bool, False on padding; None: all is real
    uncond_mask: torch.Tensor | None = None
    aspect: torch.Tensor | None = None       # this and pos as in XUT.forward
    pos: torch.Tensor | None = None
    picks: typing.Callable | None = None     # asked at each time: the tokens, (B, R) or None: all, that TREAD
                                             # keeps in v_c and in v_u: a weaker self is a negative, too
    interval: tuple = (0.0, 1.0)             # of the t with guidance, others take v_c (arXiv 2404.07724)
    rescale: float = 0.0                     # how far the result takes v_c's std (arXiv 2305.08891): 0 .. 1
    one_pass: bool = True                    # v_c and v_u as one batch of 2B, if it has room, else as two:
                                             # less memory, same result

    def __call__(self, x, t):
        keep, uncond_keep = self.picks() if self.picks is not None else (None, None)
        if self.cfg == 1 or not self.interval[0] <= t <= self.interval[1]:
            return self.velocity(x, t, self.ctx, self.ctx_mask, keep)
        if self.uncond is None:
            raise ValueError(f"cfg={self.cfg} needs uncond, the text states of the negative prompt")
        v_c, v_u = self.both_velocities(x, t, keep, uncond_keep)
        v = v_u + self.cfg * (v_c - v_u)
        if self.rescale == 0:
            return v
        ratio = v_c.std(dim=(1, 2, 3), keepdim=True) / v.std(dim=(1, 2, 3), keepdim=True)
        return v * (self.rescale * ratio + 1 - self.rescale)

    def velocity(self, x, t, ctx, mask, keep):
        t = x.new_full((len(x),), t)
        return self.model(x, t, ctx, aspect=self.aspect, pos=self.pos, keep=keep, ctx_mask=mask)

    def both_velocities(self, x, t, keep, uncond_keep):
        """-> v_c, v_u."""
        if self.one_pass and keep is None and uncond_keep is None:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self.velocities_in_one_pass(x, t)
            self.one_pass = False                            # later steps need as much: they do not try again
        v_c = self.velocity(x, t, self.ctx, self.ctx_mask, keep)
        v_u = self.velocity(x, t, self.uncond, self.uncond_mask, uncond_keep)
        return v_c, v_u

    def velocities_in_one_pass(self, x, t):
        ctx, mask = self.both_texts
        aspect, pos = self.aspect, self.pos
        if aspect is not None:
            aspect = aspect.repeat(2)
        if pos is not None and pos.dim() == 3 and len(pos) > 1:     # each image's own, not one grid for all
            pos = pos.repeat(2, 1, 1)
        t = x.new_full((2 * len(x),), t)
        return self.model(x.repeat(2, 1, 1, 1), t, ctx, aspect=aspect, pos=pos, ctx_mask=mask).chunk(2)

    @functools.cached_property
    def both_texts(self):                                    # the same at every step
        return stack_texts([self.ctx, self.uncond], [self.ctx_mask, self.uncond_mask])


@torch.no_grad()
def sample(model, ctx, uncond=None, *, noise, steps=24, t_shift=1.0, **guidance):
    """noise (B, C, h, w) -> x0 of the same shape: Euler from t = 1 to 0; guidance: fields of Guidance."""
    return euler(Guidance(model, ctx, uncond, **guidance), noise, sampling_times(steps, t_shift))


# ---- VAE: the SDXL AutoencoderKL architecture in the diffusers layout (Rombach et al., arXiv 2112.10752) -

# Two functions, for large images, stand at the section's end: norm_silu_conv(norm, conv, x) is
# conv(silu(norm(x))), and in_strips(f, x) is f(x), both with less memory.

class ResnetBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (by a 1x1 conv only where the widths differ)."""

    def __init__(self, width_in, width_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x):
        y = norm_silu_conv(self.norm1, self.conv1, x)
        y = norm_silu_conv(self.norm2, self.conv2, y)
        return y + self.conv_shortcut(x)


class PixelAttention(nn.Module):
    """One head over all channels, every pixel attends to every pixel."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)                             # (B, h*w, width)
        q, k, v = self.to_q(y)[:, None], self.to_k(y)[:, None], self.to_v(y)[:, None]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]    # without that one head it would make h*w x h*w
        return x + self.to_out[0](y).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, width, groups, attention):
        super().__init__()
        self.attentions = nn.ModuleList()
        if attention:
            self.attentions.append(PixelAttention(width, groups))
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))

    def forward(self, x):
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))             # right and bottom: not symmetric, or it shifts


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return in_strips(self.compute, x)

    def compute(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VAELevel(nn.Module):
    """The ResNets of one resolution, then a change of resolution except on the last level."""

    def __init__(self, width_in, width_out, layers, groups, downsample=False, upsample=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(width_in, width_out, groups)])
        self.resnets.extend(ResnetBlock(width_out, width_out, groups) for _ in range(layers - 1))
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(width_out)])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(width_out)])

    def forward(self, x):
        for module in self.children():
            for layer in module:
                x = layer(x)
        return x


class VAEEncoder(nn.Module):
    def __init__(self, widths, layers, latent_channels, groups, attention):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            self.down_blocks.append(VAELevel(before, width, layers, groups, downsample=i < len(widths) - 1))
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, self.mid_block(x))


class VAEDecoder(nn.Module):
    def __init__(self, widths, layers, latent_channels, groups, attention):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            self.up_blocks.append(VAELevel(before, width, layers + 1, groups, upsample=i < len(widths) - 1))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class VAE(nn.Module):
    """Images (B, 3, height, width) in [-1, 1] <-> latents (B, C, height/8, width/8); frozen, unless trained.

    The arguments are those of diffusers' AutoencoderKL. SD3's and FLUX's have 16 channels and no quant convs.
    Latents are normalized here and nowhere else: (z - latents_mean) / latents_std for each channel where the
    VAE has these numbers (EQ-SDXL-VAE: in its config.json), else (z - shift_factor) * scaling_factor. The
    defaults leave latents as they are.
    """

    def __init__(self, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                 norm_num_groups=32, latents_mean=None, latents_std=None, scaling_factor=1.0,
                 shift_factor=0.0, use_quant_conv=True, use_post_quant_conv=True,
                 mid_block_add_attention=True):
        super().__init__()
        widths = tuple(block_out_channels)
        if any(width % norm_num_groups for width in widths):
            raise UserError(f"VAE widths {widths}: not all multiples of norm_num_groups={norm_num_groups}")
        shape = widths, layers_per_block, latent_channels, norm_num_groups, mid_block_add_attention
        self.encoder, self.decoder = VAEEncoder(*shape), VAEDecoder(*shape)
        self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
        if use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        if use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.latent_channels = latent_channels
        self.factor = 2 ** (len(widths) - 1)                 # pixels on the side of a latent cell
        self.normalization = dict(scaling_factor=scaling_factor, shift_factor=shift_factor)     # as given
        self.set_statistics(latents_mean or [shift_factor] * latent_channels,
                            latents_std or [1 / scaling_factor] * latent_channels,
                            are_given=bool(latents_mean or latents_std))
        self.eval().requires_grad_(False)

    def set_statistics(self, mean, std, are_given=True):
        """The normalization, C numbers each; are_given: as latents_mean and latents_std."""
        # Python numbers, not buffers: half() must not round them, and they are no parameters of the file's.
        self.mean, self.std = tuple(mean), tuple(std)
        if not (len(self.mean) == len(self.std) == self.latent_channels and math.isfinite(sum(self.mean))
                and all(std > 0 for std in self.std)):
            raise UserError(f"VAE: latents_mean and latents_std must be {self.latent_channels} numbers each")
        if are_given:
            self.normalization = dict(latents_mean=self.mean, latents_std=self.std, scaling_factor=1.0)

    def diffusers_config(self):
        """The settings by which diffusers' AutoencoderKL, and load_vae, read these weights."""
        levels = self.encoder.down_blocks
        return dict(_class_name="AutoencoderKL", in_channels=3, out_channels=3, act_fn="silu",
                    down_block_types=["DownEncoderBlock2D"] * len(levels),
                    up_block_types=["UpDecoderBlock2D"] * len(levels),
                    block_out_channels=[level.resnets[0].conv2.out_channels for level in levels],
                    layers_per_block=len(levels[0].resnets), latent_channels=self.latent_channels,
                    norm_num_groups=self.encoder.conv_norm_out.num_groups,
                    use_quant_conv=isinstance(self.quant_conv, nn.Conv2d),
                    use_post_quant_conv=isinstance(self.post_quant_conv, nn.Conv2d),
                    mid_block_add_attention=len(self.encoder.mid_block.attentions) > 0, **self.normalization)

    def forward(self, images, noise, change):
        """For training: images, noise (B, C, h, w) -> mean and logvar of the posterior, and what a draw from
        it is decoded to after `change`, a function of latents that are not normalized."""
        mean, logvar = self.posterior(images)
        return mean, logvar, self.reconstruct(change(mean + torch.exp(logvar / 2) * noise))

    def posterior(self, images):
        """moments, with gradients."""
        out = self.quant_conv(self.encoder(images))
        mean, logvar = out.float().contiguous().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, z):
        """decode, with gradients, of latents that are not normalized."""
        return self.decoder(self.post_quant_conv(z)).float().contiguous()

    def statistics(self, z):
        return (to_device(torch.tensor(numbers, dtype=z.dtype).view(1, -1, 1, 1), z.device)
                for numbers in (self.mean, self.std))

    @torch.no_grad()
    def moments(self, images):
        """-> mean and logvar of the posterior, (B, C, h, w) each, float32, not normalized."""
        weight = self.encoder.conv_in.weight
        with torch.autocast(weight.device.type, enabled=False):                       # float16 overflows here
            return self.posterior(images.to(weight.dtype))

    def encode(self, images, noise=None):
        """-> normalized latents, float32: the posterior's mean, or with noise (B, C, h, w) a draw from it."""
        return self.latents(*self.moments(images), noise)

    def latents(self, z, logvar=None, noise=None):
        """The moments, (B, C, h, w) each -> normalized latents: of the mean z, or with noise of the draw
        z + exp(logvar / 2) * noise."""
        if noise is not None:
            z = z + torch.exp(logvar / 2) * to_device(noise, z.device)
        mean, std = self.statistics(z)
        return (z - mean) / std

    @torch.no_grad()
    def decode(self, latents):
        """Normalized latents -> images, float32, not clamped."""
        mean, std = self.statistics(latents)
        weight = self.decoder.conv_in.weight
        with torch.autocast(weight.device.type, enabled=False):
            return self.reconstruct((latents * std + mean).to(weight.dtype))

    def decode_each(self, latents, name="an image"):
        """decode for little memory: image by image, and again in float32 what is not finite, with a warning
        that names it. A latent that is not finite is its caller's to report."""
        images = []
        for z in latents.split(1):
            image = self.decode(z)
            if z.isfinite().all() and not image.isfinite().all():
                image = self.decode_again(z, image, name)
            images.append(image)
        return torch.cat(images)

    def decode_again(self, z, image, name):
        """The image of z in float32, where it is not finite in 16 bits."""
        problem = f"{name}: the VAE's image is not finite in"
        dtype = self.decoder.conv_in.weight.dtype
        if dtype == torch.float32:
            warn(f"{problem} float32")
            return image
        warn(f"{problem} {str(dtype)[6:]}: decoded again in float32")
        with in_float32(self):
            image = self.decode(z)
        if not image.isfinite().all():
            warn(f"{problem} float32 either")
        return image


STRIP = 2 ** 25                # numbers; larger activations, of a single image, are computed in strips


def in_strips(f, x):
    """f(x), f a 3x3 convolution and what is done to each cell before it, on one image x (1, C, h, w).

    Where x is large what f keeps inside is larger: f takes strips of rows, with one row more above and below,
    which the convolution reads. The numbers are the same.
    """
    if len(x) > 1 or x.numel() <= STRIP:
        return f(x)
    height = x.shape[2]
    rows = max(8, STRIP // (x.shape[1] * x.shape[3]))
    out = None
    for top in range(0, height, rows):
        above = min(top, 1)                                  # rows more: the first strip has none above
        strip = x[:, :, max(top - 1, 0):top + rows + 1]
        y = f(strip)
        scale = y.shape[2] // strip.shape[2]                 # 2 where f begins with an upsampling
        if out is None:
            interleaved = y.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if interleaved else torch.contiguous_format
            shape = *y.shape[:2], scale * height, y.shape[3]
            out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=layout)
        out[:, :, scale * top:scale * (top + rows)] = y[:, :, scale * above:scale * (above + rows)]
    return out


def norm_silu_conv(norm, conv, x):
    """conv(silu(norm(x))), in strips where x is large; the group norm's statistics are those of all of x."""
    if len(x) > 1 or x.numel() <= STRIP:                     # batches of training are faster at once
        return conv(F.silu(norm(x)))
    means, variances = [], []
    for group in x.chunk(norm.num_groups, 1):
        variance, mean = torch.var_mean(group.float(), (1, 2, 3), correction=0)
        means.append(mean.expand(group.shape[1]))            # one for each channel
        variances.append(variance.expand(group.shape[1]))
    mean = torch.cat(means)[:, None, None]                                            # (C, 1, 1)
    variance = torch.cat(variances)[:, None, None]
    scale = norm.weight[:, None, None] / (variance + norm.eps).sqrt()
    shift = norm.bias[:, None, None] - mean * scale

    def of_strip(strip):
        return conv(F.silu(torch.addcmul(shift, strip, scale).to(x.dtype)))
    return in_strips(of_strip, x)


# ---- Training a VAE: EQ-VAE (arXiv 2502.09509) -----------------------------------------------------------

# The latent of an image that is scaled and turned should be the image's latent, so changed: then latents are
# smoother, and easier to learn for a diffusion model. They are not normalized in this section.

@dataclass
class VAESettings:
    """How --train=vae trains."""
    vae_widths: str = ""           # channels of the levels of a new VAE, as 32,64,64; "": --vae is trained on
    vae_channels: Count = 4        # C of a new VAE
    equivariance: Annotated[float, 0, 1] = 0.5  # share of micro-batches whose latents are scaled and turned
    kl: NotNegative = 1e-6         # weight of the KL divergence, summed up over an image
    lpips: NotNegative = 0.0       # weight of LPIPS, for sharper images: pip install lpips; not tried


def new_vae(s):
    """A VAE with random weights."""
    try:
        widths = [int(width) for width in s.vae_widths.split(",")]
    except ValueError as error:
        raise UserError(f"--vae_widths={s.vae_widths}: whole numbers are needed, as in 32,64,64") from error
    if min(widths) < 1:
        raise UserError(f"--vae_widths={s.vae_widths}: each must be 1 or more")
    return VAE(widths, latent_channels=s.vae_channels, norm_num_groups=math.gcd(32, *widths))


def change_view(x, scale, turns, cell=1):
    """Latents, or images whose cells are `cell` pixels (B, C, h, w) -> scaled, to whole cells, and turned to
    the left by turns x 90 degrees: both as training scales images, bicubic and antialiased."""
    size = [cell * max(1, round(scale * side / cell)) for side in x.shape[2:]]
    if size != list(x.shape[2:]):
        where = "cpu" if x.device.type == "mps" else x.device          # MPS has no backward pass of it
        x = F.interpolate(x.float().to(where), size, mode="bicubic", antialias=True).to(x.device)
    return torch.rot90(x, turns, (2, 3))


VIEWS = "plain", "smaller", "equivariant"      # what is done in a micro-batch


def draw_view(seed, equivariance):
    """-> a micro-batch's view, as an index of VIEWS, scale and turns. With the probability `equivariance` its
    latents are scaled by {8..31}/32 and turned; of the others a quarter has smaller images."""
    rng = random.Random(seed)
    scale, turns = rng.randint(8, 31) / 32, rng.randint(1, 3)
    if rng.random() < equivariance:
        return 2, scale, turns
    if rng.random() < 0.25:
        return 1, scale, 0
    return 0, 1.0, 0


def vae_inputs(batch, factor, s, device):
    """A batch of training examples -> the arguments of vae_loss; factor: pixels on the side of a cell.

    The view is by the first example's seed, as sizes must agree; the number of workers or GPUs moves nothing.
    """
    images = images_of(batch, device)                                                 # (B, 3, X, X)
    noise = to_device(batch["vae_noise"], device)                                     # (B, C, h, w)
    view, scale, turns = draw_view(batch["seed"][0].item(), s.equivariance)
    if view == 1:
        images = change_view(images, scale, 0, factor)
        noise = noise[:, :, :images.shape[2] // factor, :images.shape[3] // factor]
        scale = 1.0
    return dict(images=images, noise=noise, view=view, scale=scale, turns=turns, factor=factor)


def vae_loss(network, images, noise, view, scale, turns, factor, s):
    """One loss for each image, (B,): what changed latents decode to is compared with the images, changed in
    the same way. No term compares latents. network: a VAE, or DDP of one; s: VAESettings."""
    mean, logvar, decoded = network(images, noise, lambda z: change_view(z, scale, turns))
    target = change_view(images, scale, turns, factor)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))         # to N(0, 1), (B,)
    loss = (decoded - target).abs().mean(dim=(1, 2, 3)) + s.kl * kl / images[0].numel()
    if s.lpips > 0:
        loss = loss + s.lpips * load_lpips(images.device)(decoded, target).flatten()
    return loss


@functools.cache
def load_lpips(device):
    import lpips  # optional; its weights come from the network
    return lpips.LPIPS(net="vgg").eval().requires_grad_(False).to(device)


@torch.no_grad()
def vae_sums(vae, images):
    """Images (B, 3, X, X) -> {name: sum over them}, for vae_measures: they add up over batches."""
    z, _ = vae.moments(images)
    with torch.autocast(z.device.type, enabled=False):
        decoded = vae.reconstruct(z)                         # decode would round by a save's mean and std
    error = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)        # (B,)
    half = change_view(z, 0.5, 0) - vae.moments(change_view(images, 0.5, 0, vae.factor))[0]
    turned = change_view(z, 1, 1) - vae.moments(change_view(images, 1, 1))[0]
    inside = z - z.mean(dim=(2, 3), keepdim=True)
    energy = torch.fft.fft2(inside, norm="ortho").abs().square()                      # (B, C, h, w)
    y, x = (torch.fft.fftfreq(side, device=z.device).abs() for side in z.shape[2:])   # 1/2: the highest
    upper = energy * (torch.maximum(y[:, None], x) >= 0.25)
    sums = dict(val_loss=(decoded - images).abs(), psnr=10 * torch.log10(4 / error)[:, None, None, None],
                scale_error=half.square(), turn_error=turned.square(), energy=energy, upper_half=upper)
    return {name: values.cpu().double().mean(dim=(1, 2, 3)).sum().item() for name, values in sums.items()}


def vae_measures(sums, n):
    """vae_sums of n images -> {name: number}.

    val_loss: L1 of the plain reconstruction; psnr, in dB. scale_error, turn_error: mean square of the
    difference between the latent of an image of half the size, or turned by 90 degrees, and its latent so
    changed, in variances of the latents inside an image; 0: equivariant. upper_half: share of that variance
    at frequencies that a latent of half the side cannot hold; white noise has 3/4.
    """
    measures = dict(val_loss=sums["val_loss"] / n, psnr=sums["psnr"] / n)
    for name in ("scale_error", "turn_error", "upper_half"):
        measures[name] = sums[name] / sums["energy"]
    return measures


def normalize_latents(vae, batches, device):
    """Sets the VAE's mean and std to those of draws of its posterior for batches of training examples."""
    first = second = count = 0
    for batch in batches:
        mean, logvar = (part.cpu().double() for part in vae.moments(images_of(batch, device)))
        first = first + mean.sum(dim=(0, 2, 3))                                       # (C,)
        second = second + (mean.square() + logvar.exp()).sum(dim=(0, 2, 3))
        count += mean[:, 0].numel()
    mean = first / count
    vae.set_statistics(mean.tolist(), (second / count - mean.square()).sqrt().tolist())


def save_vae(vae, folder):
    """Writes a VAE in the diffusers layout into a new folder."""
    from safetensors.torch import save_file
    folder.mkdir()
    weights = {name: value.detach().cpu().contiguous() for name, value in vae.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(vae.diffusers_config(), indent=1))


# ---- Text encoder and captions ---------------------------------------------------------------------------

def text_class(config):
    """transformers' class that loads a config's model: where there is one that is its encoder alone (T5)."""
    import transformers  # takes seconds, and not all commands need it
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def text_part(model):
    """The part of a model that reads text: the encoder of two halves, the language model beside others."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def load_tokenizer(path):
    import transformers
    beside = Path(path).with_name("tokenizer")               # as diffusers has it
    if beside.is_dir() and not any(Path(path).glob("tokenizer*")):
        path = beside
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if len(tokenizer) <= 1:                                  # what transformers makes where there is none
        raise ValueError("its tokenizer is missing")
    return tokenizer


def load_language_model(path, dtype):
    import transformers
    kind = text_class(transformers.AutoConfig.from_pretrained(path))
    model, info = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]       # not read
    if missing:
        raise ValueError(f"without {missing[0]} it would run on random weights")
    return text_part(model)


def attention_window(config):
    """How many tokens a language model's attention looks back, the least over its layers."""
    names = "sliding_window", "attention_chunk_size", "attention_window_size", "local_attention"
    windows = [getattr(config, name, None) for name in names]                         # None and 0: no limit
    return min([window for window in windows if window], default=math.inf)


class TextEncoder:
    """A frozen Hugging Face language model: its last hidden state, after the final norm, is what XUT reads.

    path_or_hub_id goes to AutoTokenizer and AutoModel (no head): any will do whose states do not depend on
    padding, which is measured. Texts are cut at max_length tokens. dtype None: 16 bit on CUDA, else float32.
    """

    def __init__(self, path_or_hub_id, max_length=256, device="cpu", dtype=None):
        import transformers
        transformers.utils.logging.disable_progress_bar()
        if dtype is None:
            dtype = pick_dtype("auto", device)
        if looks_local(path_or_hub_id) and not os.path.isdir(path_or_hub_id):
            raise UserError(f"text encoder {path_or_hub_id}: no such folder")
        with naming(path_or_hub_id, "no language model and tokenizer to be had for --text_encoder"):
            self.tokenizer = load_tokenizer(path_or_hub_id)
            model = load_language_model(path_or_hub_id, dtype)
            self.model = model.to(device).eval().requires_grad_(False)
        config = self.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", max_length)
        if 0 < longest < max_length:
            raise UserError(f"text_length={max_length}: {path_or_hub_id} reads at most {longest} tokens")
        config.use_cache = False
        self.device = self.model.device                      # the states'
        self.known = {}                                      # by remember, {tokens: their states on the CPU}
        self.max_length, self.dim, self.window = max_length, config.hidden_size, attention_window(config)
        with naming(path_or_hub_id, "cannot be run as a text encoder"):
            self.pad_id = self.find_pad()
            self.causal = self.measure()

    def find_pad(self):
        """-> the id of a token to pad with; which one makes no difference."""
        known = len(self.model.get_input_embeddings().weight)
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < known:          # some have neither, or one that the model lacks
                return token
        return 0

    def __call__(self, prompts):
        """list of B strings -> states (B, T, ctx_dim), mask (B, T) bool, True on real tokens.

        T is the longest of the batch. An empty prompt is one pad token that counts as real: XUT never sees
        zero tokens. Padding is on the right, so real states do not depend on T.
        """
        ids = self.tokenize(prompts, self.max_length)
        return self.encode(ids, max(map(len, ids)))

    def tokenize(self, prompts, limit):
        """-> a list of B lists of 1 to limit tokens."""
        limit = min(self.max_length, limit)
        ids = self.tokenizer(list(prompts), truncation=True, max_length=limit)["input_ids"]
        return [row or [self.pad_id] for row in ids]

    def encode(self, ids, T):
        """What tokenize gives -> states and mask of T tokens each, as above."""
        known = [self.known.get(tuple(row)) for row in ids]
        if any(states is None for states in known):
            states, mask = self.run_model(ids, T, self.causal)
            return to_device(states, self.device), to_device(mask, self.device)
        ctx = torch.zeros(len(ids), T, self.dim, dtype=self.model.dtype)
        for i, states in enumerate(known):
            n = min(T, len(states))                          # beyond its own length nothing sees a caption
            ctx[i, :n] = states[:n]
        mask = first_tokens(list(map(len, ids)), T)
        return to_device(ctx, self.device), to_device(mask, self.device)

    def remember(self, captions, s):
        """Encodes captions now, each padded to its own length (as text_states has it; s: ExampleSettings),
        and keeps the states in the CPU's memory. The model moves there, too, and encodes others slowly."""
        captions = list(captions)
        rows = set()
        for start in range(0, len(captions), 10_000):        # a tokenizer's own lists are large
            some = captions[start:start + 10_000]
            rows.update(map(tuple, self.tokenize(some, s.text_length)))
        rows = sorted(rows)
        of_length = {T: [] for T in padded_lengths(s)}
        for row in rows:
            of_length[padded_length(len(row), s)].append(row)
        tokens = sum(T * len(alike) for T, alike in of_length.items())
        gb = 1e-9 * tokens * self.dim * self.model.dtype.itemsize
        print(f"captions: {len(rows):,} are encoded once, {gb:.3f} GB of states", flush=True)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))   # of this machine: each keeps its own
        if gb * ranks > 0.5 * memory_gb():
            raise UserError(f"--cache_text: {ranks} x {gb:.0f} GB of text states are more than half of this "
                            f"machine's memory; leave it out, or lower --text_length")
        for T, alike in of_length.items():
            for start in range(0, len(alike), 32):
                batch = alike[start:start + 32]
                states, _ = self.run_model(batch, T, self.causal)
                self.known |= zip(batch, states.cpu())
        self.model.to("cpu")

    @torch.no_grad()
    def run_model(self, ids, T, causal):
        """encode; causal: whether the model may be given a causal mask that is made here."""
        tokens = torch.full((len(ids), T), self.pad_id)
        for i, row in enumerate(ids):
            tokens[i, :len(row)] = torch.tensor(row)
        mask = first_tokens(list(map(len, ids)), T)
        tokens, mask = to_device(tokens, self.model.device), to_device(mask, self.model.device)
        padded = min(map(len, ids)) < T
        if causal and T <= self.window and (padded or mask.is_cuda):
            attention_mask = self.causal_mask(mask)          # without one CUDA's host would wait
        elif padded:
            attention_mask = mask.long()
        else:
            attention_mask = None
        with torch.autocast(self.model.device.type, enabled=False):                   # it has its own type
            states = self.model(input_ids=tokens, attention_mask=attention_mask)
        return states.last_hidden_state, mask

    def causal_mask(self, mask):
        """(B, T) bool -> (B, 1, T, T), added to the scores. Of a (B, T) mask transformers would ask on the
        host whether it pads, without a mask whether positions begin anew, and wait for the answer."""
        B, T = mask.shape
        causal = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
        scores = torch.zeros(B, 1, T, T, dtype=self.model.dtype, device=mask.device)
        return scores.masked_fill_(~(causal & mask[:, None, None]), torch.finfo(scores.dtype).min)

    def measure(self):
        """-> whether, on a short text, causal_mask does what the (B, T) mask does; an encoder where not even
        that one keeps padding out of the states is refused."""
        n = max(2, min(8, self.max_length // 2))
        row = (self.tokenize(["a large red circle above a small blue square"], n)[0] * n)[:n]
        alone = self.run_model([row], n, causal=False)[0].float()

        def change(causal):                                  # by n pads, relative
            padded = self.run_model([row], 2 * n, causal)[0][:, :n].float()
            return ((padded - alone).norm() / alone.norm()).item()

        limit, tolerance = 0.2, 0.01                         # rounding alone: 0.02 in bfloat16 (28 layers)
        if self.model.dtype == torch.float32:
            limit, tolerance = 1e-3, 1e-4                    # ... 1e-6
        by_transformers = change(causal=False)
        if not by_transformers <= limit:                     # nan is not
            raise UserError(f"its states depend on padding, or are not finite in {str(self.model.dtype)[6:]}")
        if 2 * n > self.window:
            return False
        try:
            by_ours = change(causal=True)
        except Exception:                                    # some take no such mask
            return False
        return by_ours <= 2 * by_transformers + tolerance


OR, BESIDE = "\x1e", "\x1d"    # between alternative captions; around them, where there is a sidecar


def draw_caption(text, rng, s):
    """One of a record's captions by the grammar (parse_caption), with the run's settings s; rng None, or
    s.cache_text: the first one, with all its tags."""
    if s.cache_text:
        rng = None
    before, captions, after = text.split(BESIDE) if BESIDE in text else ("", text, "")
    captions = captions.split(OR)
    caption = captions[0] if rng is None else rng.choice(captions)
    caption = parse_caption(caption, rng, tag_dropout=s.tag_dropout, group_dropout=s.group_dropout,
                            separator=s.tag_separator, spaces=s.spaces)
    if not before and not after:
        return caption
    whole = ", ".join(part for part in (before, caption, after) if part)
    return parse_caption(whole, separator=s.tag_separator, spaces=s.spaces)


def parse_caption(text, rng=None, *, tag_dropout=0.25, group_dropout=0.3, separator="$$", spaces=False):
    """A caption in the grammar of HDM's data -> the line that the text encoder reads.

    A line that was made here stays as it is (with rng None), and a sentence is such a line. Captions, prompts
    and negative prompts all pass here, so that the same text always makes the same tokens.

        a cat $$ indoors ||| red $$ fur %% tail ||| photo       the grammar: kept ||| tags, in groups ||| kept
        a cat, indoors, red, fur, tail, photo                   with rng None: all, in order
        a cat, indoors, tail, fur, photo                        with rng, for example

    Before the first `|||` and after the second everything is kept, in order. Between them groups are split at
    `%%` and tags at the separator; with rng (a random.Random) a group is dropped with probability
    group_dropout, a tag with tag_dropout, and the groups are shuffled, and the tags inside each.
    With another separator than `$$`, which separates as well, a text without `|||` is a list of tags. Runs of
    spaces become one, `\\(` and `\\)` lose their backslashes. spaces: underscores become spaces, but not in
    words without two letters in a row: ^_^.
    """
    text = " ".join(re.sub(r"\\+([()])", r"\1", text).split())
    separator = separator.strip() or "$$"
    between_tags = between_kept = r"\$\$"
    if separator != "$$":
        between_tags += "|" + re.escape(separator)
        between_kept = between_tags + "|%%"                  # else a line made here would not stay as it is
        if "|||" not in text:                                # a list of tags has no groups to drop
            text = "|||" + text
            group_dropout = 0.0
    head, _, rest = text.partition("|||")
    middle, _, tail = rest.partition("|||")
    groups = [re.split(between_tags, group) for group in middle.split("%%")]
    if rng is not None:
        groups = drop_and_shuffle(groups, rng, tag_dropout, group_dropout)
    tags = re.split(between_kept, head)
    for group in groups:
        tags += group
    tags += re.split(between_kept, tail.replace("|||", "$$"))
    if spaces:
        tags = [underscores_to_spaces(tag) for tag in tags]
    return ", ".join(" ".join(tag.split()) for tag in tags if tag.strip())


def drop_and_shuffle(groups, rng, tag_dropout, group_dropout):
    """Groups, each a list of tags, without what is dropped: the groups shuffled, and the tags in each."""
    kept = []
    for group in [group for group in groups if rng.random() >= group_dropout]:
        kept.append([tag for tag in group if rng.random() >= tag_dropout])
    shuffled = list(kept)
    rng.shuffle(shuffled)
    for group in kept:                                       # in their first order: seeds depend on it
        rng.shuffle(group)
    return shuffled


def underscores_to_spaces(tag):
    """Only in words that have two letters in a row: not in ^_^."""
    return re.sub(r"\S*[^\W\d_]{2}\S*", lambda word: word[0].replace("_", " "), tag)


# ---- Weights in and out ----------------------------------------------------------------------------------

TEXT_ENCODER = "Qwen/Qwen3-0.6B"         # the released model's text encoder, which is not in its file
EQ_VAE = "KBlueLeaf/EQ-SDXL-VAE"         # the released model's VAE, for files without one


def fetch(name, filename, what):
    """Path of a file in the folder `name`, or of one from the hub repository `name` (or its local cache)."""
    if looks_local(name):
        if not (Path(name) / filename).is_file():
            raise UserError(f"{what} {name}: no {filename} there")
        return Path(name) / filename
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()            # it would report each of its tries
    with naming(name, f"no such {what} here, and as a hub id its {filename} is neither cached nor to be had"):
        return Path(huggingface_hub.hf_hub_download(name, filename))


class Inert:
    """What a pickled file's classes become: anything may be done to one, and nothing happens."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(Inert)                         # cls may be an Inert: a class within a class

    def nothing(self, *args, **kwargs):
        return self
    __call__ = __getattr__ = __setitem__ = nothing


class InertUnpickler(pickle._Unpickler):
    """Unpickles tensors in simple containers; nothing else that the file names is imported, or can run.

    pickle._Unpickler is private: it is the module's unpickler in Python, with a table of opcodes, in which
    BUILD is replaced. The public one, in C, has no such table. A Python without it cannot import this file.
    """
    KNOWN = {("collections", "OrderedDict"): OrderedDict,
             ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
             ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter}

    def find_class(self, module, name):
        return self.KNOWN.get((module, name), Inert)

    def load_build(self):
        """The opcode that sets an object's attributes: here it sets none."""
        self.stack.pop()
    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


class InertPickle:
    """In torch.load the place of the module pickle, of which it uses two names."""
    Unpickler = InertUnpickler

    @staticmethod
    def load(file, **settings):
        return InertUnpickler(file, **settings).load()


def read_pickle(path, zipped):
    """What torch.save wrote, with Inerts in place of unknown objects.

    weights_only=True would refuse unknown classes. Without it torch.load unpickles by InertUnpickler alone,
    except for two kinds of files: it unpacks a tar, and TorchScript runs a zip that holds constants.pkl. Both
    are refused first, by the readers that torch.load itself uses (torch's is private): to any other reader a
    hostile file could look harmless.
    """
    if tarfile.is_tarfile(path):
        raise ValueError("a tar archive, which is not read")
    if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError("TorchScript, a program, which is not run")
    mapped = zipped and path.suffix != ".safetensors"        # torch.load would go by such a name
    with open(path, "rb") as file:
        return torch.load(path if mapped else file, map_location="cpu", weights_only=False, mmap=mapped,
                          pickle_module=InertPickle)


def read_tensors(path):
    """-> {name: tensor as stored}, {metadata} of a safetensors file, shards by index.json, a pickle.

    All but old pickles are mapped, not read: they take no memory of the process's own.
    """
    path = Path(path)
    with naming(path, "not a complete file of weights"):
        with open(path, "rb") as file:
            head = file.read(9)
        if re.search(r"\.index(\.\w+)?\.json$", path.name):
            return read_shards(path), {}
        zipped, pickled = head[:2] == b"PK", head[:1] == b"\x80"
        if head[8:] == b"{" or not (zipped or pickled):      # a safetensors file's first 8 bytes are a length
            return read_safetensors(path)
        return named_tensors(read_pickle(path, zipped)), {}


def shard_files(index):
    """The files that an index.json of shards names, beside it, in the order of their names."""
    names = set(json.loads(read_text(index))["weight_map"].values())
    return [index.with_name(name) for name in sorted(names)]


def read_shards(index):
    tensors = {}
    for file in shard_files(index):
        tensors |= read_tensors(file)[0]
    return tensors


def read_safetensors(path):
    import safetensors
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def tensors_of(content):
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def named_tensors(content):
    """{name: tensor} of a pickle's dict: its own, and those of state dicts in it, such as an EMA copy. Where
    there are several their names go in front of their tensors' names, but for Lightning's state_dict."""
    tensors = tensors_of(content)
    dicts = [name for name, value in content.items() if isinstance(value, dict) and tensors_of(value)]
    for name in dicts:
        prefix = "" if name == "state_dict" or len(dicts) == 1 else f"{name}."
        for key, tensor in tensors_of(content[name]).items():
            tensors[prefix + key] = tensor
    if not tensors:
        raise ValueError("no tensors by name, neither under state_dict nor directly")
    return tensors


def part_of(tensors, prefix):
    return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}


def is_finite(value):
    """True of finite floats; isfinite would make copies, and loading has no memory for them."""
    return value.is_floating_point() and (not value.numel() or all(map(math.isfinite, value.aminmax())))


def misfits(module, tensors):
    """What keeps these tensors from being the module's weights: a list of texts, one for each kind."""
    want = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    other_shapes = [name for name in want if name in have and have[name] != want[name]]
    kinds = {"missing": [name for name in want if name not in have],
             "unexpected": [name for name in have if name not in want],
             "of another shape": [f"{name} {have[name]}, not {want[name]}" for name in other_shapes],
             "not of finite floats": [name for name, value in tensors.items() if not is_finite(value)]}
    texts = []
    for kind, names in kinds.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            texts.append(f"{len(names)} {kind}: {', '.join(names[:3])}{more}")
    return texts


def load_strict(build, tensors, path, device, dtype):
    """build() filled with exactly these tensors; a file that does not fit is refused, naming why."""
    with torch.device("meta"):                               # no memory: the weights will come
        module = build()
    wrong = misfits(module, tensors)
    if wrong:
        raise UserError(f"{path} does not fit {type(module).__name__}: {'; '.join(wrong)}")
    weights = {}
    for name, value in tensors.items():
        if name == "time_emb.freqs":                         # by formula: the file's may be rounded to fp16
            weights[name] = time_frequencies(2 * value.shape[1]).to(device)
        elif name.endswith("rope.freqs"):                    # in bf16 they alone turn far tokens by 0.2 rad
            weights[name] = value.to(device, torch.float32)
        else:
            weights[name] = value.to(device, dtype)
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval()


def old_vae_names(tensors):
    """The attention's names and shapes in older VAE files, 1x1 convolutions -> today's, linear layers."""
    renamed = dict(tensors)
    for old, new in dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items():
        for name in tensors:
            if f"attentions.0.{old}." in name:
                value = renamed.pop(name)
                renamed[name.replace(f".{old}.", f".{new}.")] = value.squeeze() if value.dim() > 1 else value
    return renamed


def vae_from_tensors(tensors, path, device, dtype, **statistics):
    """A VAE, its architecture read from names and shapes; statistics: VAE's normalization arguments."""
    inner = part_of(tensors, "vae.")
    if inner:
        for name, key in dict(latents_mean="vae_mean", latents_std="vae_std").items():
            if key in tensors:
                statistics[name] = tensors[key].flatten().tolist()                    # of (1, C, 1, 1)
        tensors = inner
    tensors = old_vae_names(tensors)
    bias, widths, layers = "encoder.down_blocks.{}.resnets.{}.conv1.bias", [], 0
    while bias.format(len(widths), 0) in tensors:
        widths.append(tensors[bias.format(len(widths), 0)].numel())
    while bias.format(0, layers) in tensors:
        layers += 1
    if not widths or "decoder.conv_in.weight" not in tensors:
        raise UserError(f"{path}: not a VAE in the diffusers layout (encoder.down_blocks, decoder.conv_in)")
    if dtype == torch.float16:                               # SDXL-type VAEs overflow in it: black
        dtype = torch.bfloat16 if pick_dtype("auto", device) == torch.bfloat16 else torch.float32

    def build():
        return VAE(widths, layers, tensors["decoder.conv_in.weight"].shape[1], **statistics,
                   use_quant_conv="quant_conv.bias" in tensors,
                   use_post_quant_conv="post_quant_conv.bias" in tensors,
                   mid_block_add_attention="decoder.mid_block.attentions.0.to_q.weight" in tensors)
    with naming(path, "not a VAE"):
        vae = load_strict(build, tensors, path, device, dtype)
    if statistics.keys() <= {"norm_num_groups"}:
        print(f"vae {path}: no latents_mean, latents_std or scaling_factor: its latents are used as they are")
    return vae.to(memory_format=torch.channels_last)         # what 16-bit convolutions are fast in


def vae_config(file):
    """A VAE's config.json -> VAE's arguments in it; a VAE of another class or other blocks is refused."""
    supported = dict(_class_name="AutoencoderKL", down_block_types="DownEncoderBlock2D",
                     up_block_types="UpDecoderBlock2D", act_fn="silu")
    names = ("norm_num_groups", "latents_mean", "latents_std", "scaling_factor", "shift_factor")
    with naming(file, "not a json file of settings"):
        config = json.loads(read_text(file))
        for name, value in supported.items():
            values = config.get(name, value)                 # of blocks: a list
            if not isinstance(values, list):
                values = [values]
            others = ", ".join(sorted({str(other) for other in values if other != value}))
            if others:
                raise UserError(f"{file}: a VAE with {name} {others}: only {value} is read")
        return {name: config[name] for name in names if config.get(name) is not None}


def load_vae(path_or_hub_id, device="cpu", dtype=torch.float32, tensors=None):
    """A VAE in the diffusers layout: a folder or hub repository with config.json and safetensors, a folder
    that holds one as vae/, or a file (with a config.json beside it, where its latents are normalized)."""
    path, stem = Path(path_or_hub_id), "diffusion_pytorch_model"
    if path.is_file():
        if tensors is None:
            tensors, _ = read_tensors(path)
        config_file, statistics = path.with_name("config.json"), {}
        if config_file.is_file() and not part_of(tensors, "vae."):                    # else it is a model's
            statistics = vae_config(config_file)
        return vae_from_tensors(tensors, path, device, dtype, **statistics)
    name = str(path / "vae") if (path / "vae").is_dir() else path_or_hub_id
    config_file = fetch(name, "config.json", "vae")
    statistics = vae_config(config_file)
    weights = weights_in(config_file.parent, stem) or fetch(name, stem + ".safetensors", "vae")
    return vae_from_tensors(read_tensors(weights)[0], weights, device, dtype, **statistics)


def weights_in(folder, stem):
    """folder/stem.safetensors, or the index of its shards, or .bin, or a variant in 16 bits, or None."""
    for variant in ("", ".fp16", ".bf16"):
        for kind in (".safetensors", ".bin"):
            for end in (variant + kind, f"{kind}.index{variant}.json", f"{variant}{kind}.index.json"):
                if Path(folder, stem + end).is_file():
                    return Path(folder, stem + end)
    return None


def open_modes(path):
    """Give path, and all in it, the modes of the umask: safetensors writes for a file's owner alone."""
    mask = os.umask(0)                                       # it can only be read by setting it
    os.umask(mask)
    for one in (Path(path), *Path(path).rglob("*")):
        mode = 0o777 if one.is_dir() else 0o666
        with contextlib.suppress(OSError):                   # a disk without modes
            special = one.stat().st_mode & 0o7000            # such as setgid, of a group's folders
            one.chmod(special | mode & ~mask)


def list_checkpoints(out_dir):
    """The complete checkpoints of a run, oldest first (a checkpoint gets its name when it is complete)."""
    return sorted(path for path in Path(out_dir).glob("ckpt_*") if re.fullmatch(r"ckpt_\d{8}", path.name))


def save_model(path, tensors, settings):
    """Write tensors with the settings (as from sample.load_model) in the safetensors header."""
    from safetensors.torch import save_file
    settings = dict(settings, config=dataclasses.asdict(settings["config"]))
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path,
              metadata={"format": "pt", "hdm": json.dumps(settings)})
    open_modes(path)


# ---- Adapters: small learned changes of frozen weights ---------------------------------------------------

@dataclass
class AdapterSettings:
    """What of a model learns."""
    adapter: str = ""              # lora, lokr: small changes of frozen weights; "": all weights
    rank: Count = 16               # lora's inner width
    factor: Count = 4              # lokr's: the most rows and columns of the smaller of two factors
    train_norms: bool = False      # with an adapter: the norms of the blocks learn, too


def adapter_delta(parts, shape):
    """What an adapter adds to a tensor of this shape, such as (out, in) or (out, in, p, p), in float32.

    parts: {name: tensor} as in files. r is the inner width; a missing alpha counts as r.
        LoRA (arXiv 2106.09685)   lora_up @ lora_down * alpha / r
        LoKr (arXiv 2309.14859)   kron(lokr_w1, lokr_w2); of which one or both may be a product of two, w1_a
                                  and w1_b: then * alpha / r
        LoHa (arXiv 2108.06098)   (hada_w1_a @ hada_w1_b) * (hada_w2_a @ hada_w2_b) * alpha / r
        a full change             diff or diff_b; a norm's: w_norm or b_norm
    """
    parts = {name: value.float() for name, value in parts.items()}

    def product(name, other):                                # of a convolution: (out, r) @ (r, in * p * p)
        return parts[name].flatten(1) @ parts[other].flatten(1)

    inner = None                                             # a part of r rows
    if "lora_up" in parts:
        inner = parts["lora_down"]
        delta = product("lora_up", "lora_down")
    elif "hada_w1_a" in parts:
        inner = parts["hada_w1_b"]
        delta = product("hada_w1_a", "hada_w1_b") * product("hada_w2_a", "hada_w2_b")
    elif any(name.startswith("lokr") for name in parts):
        factors = []
        for name in ("lokr_w1", "lokr_w2"):
            if name in parts:
                factors.append(parts[name].flatten(1))
            else:
                factors.append(product(f"{name}_a", f"{name}_b"))
                inner = parts[f"{name}_b"]
        delta = torch.kron(*factors)
    else:
        delta, = (value for name, value in parts.items() if name != "alpha")
    if inner is not None and "alpha" in parts:
        delta = delta * (parts["alpha"] / len(inner))
    if len(delta) != shape[0] or delta.numel() != math.prod(shape):
        raise UserError(f"changes a tensor of {tuple(delta.shape)}, not {tuple(shape)}")
    return delta.view(shape)


def adapter_shapes(kind, shape, s):
    """{part: its shape} of an adapter that can be learned; the first part begins at zero."""
    if kind == "norm":
        return {"w_norm": shape}
    out, width, *cells = shape
    if kind == "lora":
        return {"lora_up": (out, s.rank, *[1] * len(cells)), "lora_down": (s.rank, width, *cells)}
    rows, columns = largest_divisor(out, s.factor), largest_divisor(width, s.factor)
    return {"lokr_w2": (out // rows, width // columns, *cells), "lokr_w1": (rows, columns)}


def largest_divisor(n, most):
    return max(divisor for divisor in range(1, most + 1) if n % divisor == 0)


class Adapter(nn.Module):
    """The learned change of one weight, zero at first; kind: lora, lokr or norm.

    Each part's lr is lr / its own fan-in (parameter_groups): lora_down's is the layer's, lora_up's the rank,
    those of LoKr's factors their columns. So a step of any part changes the layer's output by about lr,
    whatever its width or rank, as a step of the full weight does. alpha is r: the scale is 1.
    """

    def __init__(self, kind, weight, s):
        super().__init__()
        self.shape = weight.shape
        self.parts = nn.ParameterDict()
        for name, shape in adapter_shapes(kind, weight.shape, s).items():
            part = torch.zeros(shape)
            if len(self.parts) > 0:
                nn.init.kaiming_uniform_(part, a=math.sqrt(5))                        # as of nn.Linear
            self.parts[name] = nn.Parameter(part.to(weight.device))

    def forward(self):
        parts = dict(self.parts.items())
        with torch.autocast(next(iter(parts.values())).device.type, enabled=False):
            return adapter_delta(parts, self.shape)


def add_adapters(model, s, dtype):
    """Freezes XUT, in dtype but for RoPE's frequencies, and gives it adapters: the blocks' projections, the
    patches' convolution and, with s.train_norms, the blocks' norms. s: AdapterSettings."""
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        if not name.endswith("rope.freqs"):                  # as in load_strict
            weight.data = weight.data.to(dtype)
    for module in list(model.modules()):
        if isinstance(module, (Linear, nn.Conv2d)):
            module.adapter = Adapter(s.adapter, module.weight, s)
        elif isinstance(module, PreNorm) and s.train_norms:
            module.norm.adapter = Adapter("norm", module.norm.weight, s)


def checkpoint_tensors(model):
    """{name: tensor} of what a checkpoint holds, not copied: all weights; or those of adapters alone, by the
    names that other programs read, lora_unet_LAYER.PART, where _ stands for the dots in LAYER."""
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            name = "lora_unet_" + path.removesuffix(".adapter").replace(".", "_")
            for part, value in module.parts.items():
                suffix = ".weight" if part.startswith("lora") else ""
                tensors[f"{name}.{part}{suffix}"] = value.detach()
            if "w_norm" not in module.parts:
                tensors[f"{name}.alpha"] = torch.tensor(float(len(module.parts.get("lora_down", [0]))))
    return tensors or model.state_dict()


@torch.no_grad()
def load_checkpoint_tensors(model, tensors):
    """Fills checkpoint_tensors(model) with these."""
    own = checkpoint_tensors(model)
    for name in own:
        own[name].copy_(tensors[name])


@torch.no_grad()
def merge_adapter(model, adapter, strength=1.0):
    """Adds an adapter, {name of a weight: {part: tensor}}, to the model's weights; 0 changes no bit of them.

    The rows are those of the published files, which RotaryLinear turns when it runs: nothing is reordered.
    """
    weights = dict(model.named_parameters())
    for name, parts in adapter.items():
        weight = weights[name]
        with naming(name, "does not fit its adapter"):
            on_device = {part: value.to(weight.device) for part, value in parts.items()}
            delta = adapter_delta(on_device, weight.shape)
        if strength != 0:                                    # not in place: the weight's file may be mapped
            weight.data = (weight.float() + strength * delta).to(weight.dtype)


# ==== Not the method: errors, settings, devices, ranks, images, files =====================================

# ---- Errors and warnings ---------------------------------------------------------------------------------

def warn(line):
    """A warning of any process: of all but the first stdout is closed (start_ranks)."""
    stream = sys.stdout if os.environ.get("RANK", "0") == "0" else sys.stderr
    print(f"warning: {line}", file=stream, flush=True)


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def naming(path, what):
    """What the block raises becomes one line that names the path: what is broken can raise anything. Out of
    memory says nothing about the path, and stays what it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and str(path) in str(error) or is_out_of_memory(error):
            raise
        raise UserError(f"{path}: {what} ({first_line(error)})") from error


def run_main(main):
    """Ends the process with the code that main(sys.argv[1:]) returns (None: 0). A UserError becomes one line
    and exit code 2, other errors keep their traceback."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        code = main(sys.argv[1:])
        if is_distributed():
            torch.distributed.destroy_process_group()
            atexit._run_exitfuncs()                          # such as wandb's
            sys.stdout.flush()
            os._exit(code or 0)                              # gloo's threads abort a usual exit now and then
        sys.exit(code)
    except (Exception, KeyboardInterrupt) as error:
        exit_after(error)


def exit_after(error):
    """Prints the error that is being handled, and ends the process."""
    code, text = 1, traceback.format_exc()
    if isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted"
    elif type(error) is ModuleNotFoundError:                 # an optional one, imported where it is asked for
        code, text = 2, f"error: {missing_module(error)}"
    elif isinstance(error, UserError):                       # of a loader process: at the end of a traceback
        code, text = 2, f"error: {str(error).rpartition('UserError: ')[2].strip()}"
    elif is_out_of_memory(error):
        code, text = 2, "error: out of memory: a lower --batch_size, a smaller image or --dtype=bfloat16"
    if is_first_to_fail():
        print(text, file=sys.stderr, flush=True)
    if hasattr(signal, "SIGCHLD"):                           # torch's handler would raise as loaders die
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in torch.multiprocessing.active_children():
        worker.kill()                                        # they do not listen to a gentle end
    if is_distributed():
        os._exit(code)                                       # a usual exit would wait for the others
    sys.exit(code)


def is_out_of_memory(error):
    """Whether a device's or the CPU's allocator raised it, by their words."""
    words = "out of memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, RuntimeError) and words


def is_first_to_fail():
    """Of several ranks the first to fail prints its error: the others then fail because it is gone."""
    if not is_distributed():
        return True
    key = "failed" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return torch.distributed.distributed_c10d._get_default_store().add(key, 1) == 1


PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "cv2": "opencv-python", "sklearn": "scikit-learn",
            "skimage": "scikit-image", "google.protobuf": "protobuf", "dateutil": "python-dateutil",
            "attr": "attrs", "bs4": "beautifulsoup4", "dotenv": "python-dotenv"}    # module: its package


def missing_module(error):
    """-> the line of a ModuleNotFoundError; it names a package only where installing one is the mend."""
    name = error.name or ""
    top = name.partition(".")[0]
    ours = top in ("hdm", "prepare", "sample", "train")
    if not name or ours or top in sys.stdlib_module_names:   # the last: Python was built without it
        return str(error)
    if sys.modules.get(top) is not None and name not in PACKAGES:
        return f"{error}; {top} is installed, but has no such part: another version may have it"
    return f"{error}: pip install {PACKAGES.get(name) or PACKAGES.get(top, top)}"


class Output:
    """A stream whose errors end no run: what its encoding cannot hold is escaped, a failed write is dropped.

    The encoding may be ASCII or cp1252, the reader of a pipe gone, a terminal closed, a disk full, or there
    is no stream (None), as under pythonw.
    """

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None else stream
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


# ---- Settings: command line and config files -------------------------------------------------------------

def setting_types(classes):
    """{name: type} over all fields of some dataclasses: settings are flat, a name means one thing."""
    types = {}
    for cls in classes:
        for name, kind in typing.get_type_hints(cls).items():
            assert name not in types, f"setting {name} stands in two dataclasses"
            options = typing.get_args(kind)
            types[name] = options[0] if type(None) in options else kind          # int | None: set by an int
    return types


def setting_value(where, value, kind):
    """value (a flag's text, or a config file's object) in its setting's type; an error quotes where."""
    text = isinstance(value, str)
    if kind in (bool, bool | str) and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in (str, bool | str) and text:
        return value
    if kind == list[str]:
        return [value] if text else list(value)
    if kind in (int, float) and not isinstance(value, bool):
        for parse in (int, float):                           # int first: exact, however long
            with contextlib.suppress(ValueError):
                number = parse(str(value))
                if abs(number) < 2 ** 63 and number == kind(number):                  # nan and inf are not
                    return kind(number)
    expected = {int: "a whole number", float: "a finite number", bool: "true or false"}
    raise UserError(f"{where}: {expected.get(kind, 'text')} is needed")


def parse_args(argv, classes, positionals=(), doc="", aliases=MappingProxyType({})):
    """Command line -> (positional words, {name: typed value} of the settings that were given).

    The settings are the fields of these dataclasses, flat: `--key=value`, `--key value`, booleans also bare.
    A `list[str]` may be given several times, a `bool | str` is True when bare. A last positional that ends in
    `...` takes one word or more. aliases: {other flag: setting}. --help prints the settings' source.
    """
    if "--help" in argv or "-h" in argv:
        print_help(doc, classes)
        sys.exit(0)
    types = setting_types(classes)
    words, values, rest = [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") and flag not in aliases:
            words.append(word)
            continue
        name = aliases.get(flag, flag[2:])
        check_name(word, name, types)
        kind = types[name]
        if not equals:
            value = next_value(word, kind, rest)
        value = setting_value(f"--{name}={value}", value, kind)
        if kind == list[str]:
            value = values.get(name, []) + value
        values[name] = value
    one_or_more = len(words) > 0 and bool(positionals) and positionals[-1].endswith("...")
    if len(words) != len(positionals) and not one_or_more:
        raise UserError(f"{' '.join(positionals) or 'nothing'} expected beside the --settings, got "
                        f"{' '.join(words) or 'nothing'} (quotes make one text of several words); see --help")
    return words, values


def next_value(word, kind, rest):
    """The value of a flag without `=`: True where it is bare, else the next word, which is taken off rest."""
    following = rest[0] if rest else "--"
    is_flag = re.match(r"--(\w+(=|$)|$)", following)         # not any text with dashes
    if kind is bool and following.lower() not in ("true", "false"):
        return True
    if kind == bool | str and (is_flag or following.endswith(".py")):
        return True
    if is_flag:
        raise UserError(f"{word}: a value is needed, as in {word}=VALUE")
    return rest.pop(0)


def print_help(doc, classes):
    """The program's docstring and the source of its settings, with the values of constants."""
    print(doc.strip() + "\n\nSettings, as --name=value. Whole and NotNegative are from 0, Count from 1, "
          "Positive above 0, Fraction from 0 and below 1, PositiveFraction above 0 and up to 1.\n")
    for cls in classes:
        fields = inspect.getsource(cls).split("\n    def ")[0].splitlines()[2:]
        for line in filter(str.strip, fields):
            constant = re.search(r" = (hdm\.)?([A-Z_]+)\b", line)
            if constant:
                module = sys.modules[__name__ if constant[1] else cls.__module__]
                line = line.replace(constant[0], f" = {getattr(module, constant[2])!r}")
            print(line)
        print()


def read_config(path, classes):
    """A config file, plain Python `name = value` lines -> {name: typed value}. A name that begins
    with _ is not a setting."""
    if not os.path.isfile(path):
        raise UserError(f"config {path}: no such file")
    names, types = {}, setting_types(classes)
    try:
        exec(compile(read_text(path), path, "exec"), names)
    except Exception as error:                               # whatever the file's own lines raise
        raise UserError(f"config {path}: {type(error).__name__}: {first_line(error)}") from error
    values = {}
    for name, value in names.items():
        if not name.startswith("_") and not inspect.ismodule(value):
            where = f"{path}: {name} = {value!r}"
            check_name(where, name, types)
            values[name] = setting_value(where, value, types[name])
    return values


def check_name(where, name, known, what="option"):
    """Refuses a name that is not known, and suggests a near one, or ours for what other programs call so."""
    if name in known:
        return

    def letters(word):
        return re.sub("[-_]", "", word).lower()

    hint = f"Known: {', '.join(known)}."
    alike = {letters(one): one for one in known if abs(len(letters(one)) - len(letters(name))) <= 2}
    near = difflib.get_close_matches(letters(name), alike, n=1, cutoff=0.75)          # 0.75: siez for size
    if near:
        hint = f"Did you mean {alike[near[0]]!r}?"
    for ours, text in NEIGHBORS.items():
        words, _, note = text.partition(":")
        if ours in known and letters(name) in [letters(word) for word in words.split()]:
            hint = f"Did you mean {ours!r}?"
            if note:
                hint += f" ({note.strip()})"
    raise UserError(f"{where}: no {what} named {name!r}. {hint}")


# What settings are called by diffusers' scripts, kohya's, AUTOMATIC1111 and their like; after a colon, how
# ours differ. Each program suggests its own settings alone.
NEIGHBORS = dict(
    lr="learning_rate learn_rate unet_lr base_lr", schedule="lr_scheduler lr_schedule",
    warmup="lr_warmup_steps warmup_steps learning_rate_warmup_steps warmup_iters",
    clip="max_grad_norm gradient_clip gradient_clip_val gradient_clipping grad_clip",
    weight_decay="adam_weight_decay wd", beta1="adam_beta1", beta2="adam_beta2",
    ema="use_ema ema_decay: the decay, a number",
    epochs="num_train_epochs max_train_epochs train_epochs max_epochs num_epochs",
    images="max_train_steps num_train_steps train_steps total_steps: steps x global_batch, the length of run "
           "and schedule; max_steps stops early and leaves the schedule as it is",
    batch_size="train_batch_size", checkpointing="gradient_checkpointing",
    global_batch="gradient_accumulation_steps accumulate_grad_batches grad_accum total_batch_size: images of "
                 "one optimizer step, batch_size x processes x accumulation",
    dtype="mixed_precision precision fp16 bf16 train_dtype torch_dtype: float32, bfloat16 or float16",
    compile="torch_compile", log="report_to log_with", vae_chunk="vae_batch_size",
    workers="num_workers dataloader_num_workers max_data_loader_n_workers",
    data="train_data_dir instance_data_dir data_dir dataset_name dataset", image_size="resolution",
    text_length="max_token_length max_sequence_length", latents="cache_latents cache_latents_to_disk",
    vae="vae_path pretrained_vae_model_name_or_path",
    out_dir="output_dir save_dir logging_dir workspace_dir output_model_destination",
    out="output_dir outdir output save_dir", resume="resume_from_checkpoint",
    init_from="pretrained_model_name_or_path pretrained_model pretrained_model_path model_path "
              "base_model_name",
    ckpt="pretrained_model_name_or_path model model_path model_id ckpt_path checkpoint",
    log_every="logging_steps log_interval",
    save_every="checkpointing_steps checkpoint_step_interval save_every_n_steps save_steps save_interval: in "
               "steps",
    keep_ckpts="checkpoints_total_limit checkpoints_rolling_limit save_total_limit",
    eval_every="eval_steps eval_interval: in steps",
    sample_every="validation_steps validation_epochs sample_every_n_steps: in steps",
    preview_prompts="validation_prompt validation_prompts sample_prompts num_validation_images: a file",
    caption_dropout="caption_dropout_rate caption_dropout_probability proportion_empty_prompts",
    tag_dropout="caption_tag_dropout_rate", tag_separator="caption_separator",
    t_shift="shift flow_shift discrete_flow_shift flow_schedule_shift timestep_shift",
    caption="caption_column text_column", negative_prompt="negative neg_prompt n_prompt",
    num_images="num_images_per_prompt n_samples batch_count n_iter num_samples", height="H",
    width="resolution W", steps="num_inference_steps sampling_steps ddim_steps num_steps",
    cfg="guidance_scale cfg_scale guidance scale",
    cfg_rescale="guidance_rescale", sampler="sampler_name scheduler",
    strength="denoising_strength denoise", init_image="init_img init_images image input_image",
    mask="mask_image",
    prompts="from_file prompt_file", file_type="output_format", ui="webui gradio listen port")


def without(*names):
    """-> a function of settings: whether all of these are off; always True where none is named."""
    return lambda settings: not any(getattr(settings, name) for name in names)


def warn_idle(given, calls, rules):
    """Warns of each setting that was given, {name: value}, and has no effect in any of calls, objects of all
    settings; rules: [(names, whether they have none in a call, why)]."""
    for names, is_idle, why in rules:
        for name in names.split():
            value = given.get(name, "")
            if isinstance(value, list):                      # each was a flag of its own
                value = f" --{name}=".join(value)
            if value != "" and value is not False and all(is_idle(call) for call in calls):
                print(f"warning: --{name}={value} has no effect {why}")


# ---- Devices ---------------------------------------------------------------------------------------------

def to_device(x, device):
    """x.to(device), for which CUDA's host does not wait (on MPS memory that is freed meanwhile could be)."""
    if "cuda" not in str(device):
        return x.to(device)
    if x.device.type == "cpu":
        x = x.pin_memory()                                   # of other memory the host waits for the copy
    return x.to(device, non_blocking=True)


@contextlib.contextmanager
def in_float32(module):
    """In the block the module works in float32, without autocast; then it has the very weights it had."""
    def cast(weight, dtype):
        with torch.inference_mode(weight.is_inference()):    # ordinary weights stay such: they can be trained
            weight.data = weight.data.to(dtype)

    narrow = [(weight, weight.dtype) for weight in module.parameters() if weight.dtype != torch.float32]
    try:
        for weight, _ in narrow:
            cast(weight, torch.float32)
        with torch.autocast(next(module.parameters()).device.type, enabled=False):
            yield
    finally:
        for weight, dtype in narrow:
            cast(weight, dtype)


def pick_device(name):
    """"auto": CUDA, else MPS, else the CPU; any other name must be there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device={name}: one of auto, cpu, mps, cuda, cuda:N")
    if not there[name.split(":")[0]]:
        raise UserError(f"--device={name}: torch {torch.__version__} finds none; use --device=cpu, or a "
                        f"torch that is built for it")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 0))   # torchrun's, on this machine; 0: without it
    if name.startswith("cuda:") and processes:
        raise UserError(f"--device={name}: torchrun gives each process its own GPU, of those that "
                        f"CUDA_VISIBLE_DEVICES names")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise UserError(f"--device={name}: this machine has {torch.cuda.device_count()} GPUs, from cuda:0 on")
    if name == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"--nproc_per_node={processes}: this machine has {torch.cuda.device_count()} GPUs")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)                          # memory, events and dtypes are then this one's
    return name


def pick_dtype(name, device):
    """"auto": on CUDA bfloat16 where the device has it, else float16; elsewhere float32."""
    known = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
    if name in known:
        return known[name]
    if name != "auto":
        raise UserError(f"--dtype={name}: one of auto, {', '.join(known)}")
    if "cuda" not in str(device):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def memory_gb():
    """This machine's memory; where its system does not say, infinite."""
    try:
        return 1e-9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):            # Windows
        return math.inf


class SharedCPU:
    """Takes fewer CPU threads while other programs use the same cores, where that is faster.

    OpenMP's threads spin while they wait for each other. Where one of them shares its core, all spin through
    the time that it does not get: beside two busy programs on two cores README's demo falls from 120 images/s
    to 3 to 30; one thread keeps 60. The sign is that this process gets fewer cores than it has threads.
    OMP_NUM_THREADS fixes their number, and so does compiled code, which is made for one.
    """

    def __init__(self):
        self.fixed = "OMP_NUM_THREADS" in os.environ
        self.most = None                         # threads at the first choice
        self.before = 0.0                        # seconds that one piece of work took with all of them
        self.pause, self.next_try = 20.0, 0.0    # seconds until all are tried again; when (time.monotonic)
        self.count, self.wall, self.cpu = 0, 0.0, 0.0        # since the last choice: pieces, their seconds
        self.reported = False

    @contextlib.contextmanager
    def work(self, device):
        """Around a piece of work on the device, each of about the same size, that waits for nothing else."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.count += 1
        if str(device) == "cpu" and self.wall > 2 and not self.fixed:
            self.choose(self.wall / self.count, self.cpu / self.wall, time.monotonic())
            self.count, self.wall, self.cpu = 0, 0.0, 0.0

    def choose(self, seconds, cores, now):
        """seconds: of one piece; cores: how many this process had on average; now: time.monotonic()."""
        threads = torch.get_num_threads()
        if self.most is None:
            self.most = threads
        if threads < self.most:
            if seconds >= self.before or now >= self.next_try:
                torch.set_num_threads(self.most)
            elif not self.reported:
                self.reported = True
                print(f"cpu: other programs use it: {threads} of {self.most} threads while that is faster; "
                      f"OMP_NUM_THREADS={self.most} keeps all (other numbers round differently)", flush=True)
        elif cores > 0.8 * threads:
            self.pause = 20.0
        elif now >= self.next_try:
            self.before, self.next_try = seconds, now + self.pause
            self.pause = min(2 * self.pause, 320.0)
            torch.set_num_threads(max(1, int(cores)))


SHARED_CPU = SharedCPU()       # one, as the number of threads is one for the process


# ---- Ranks: the processes of torchrun --------------------------------------------------------------------

def start_ranks():
    """-> rank, ranks. Under torchrun joins its processes, each on its own GPU; else 0, 1."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    backend = "gloo"                                         # for CPU tensors: objects, --device=cpu
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():           # Windows has none
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    # Ranks wait while one indexes, downloads or encodes: hours.
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=24))
    if torch.distributed.get_rank() > 0:
        sys.stdout = Output(None)                            # one process speaks
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather(thing):
    """What all processes of torchrun bring, in their order; each waits here for the others."""
    things = [thing]
    if is_distributed():
        things *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(things, thing)
    return things


def of_this_rank(things):
    """This process's part of a list, of n processes the first's is things[0], things[n], ..."""
    if not is_distributed():
        return things
    return things[torch.distributed.get_rank()::torch.distributed.get_world_size()]


# ---- Images ----------------------------------------------------------------------------------------------

# What else is written in a PNG costs no image: Pillow's own limits are 1 MB and 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28, 2 ** 29


def load_image(source, side=None):
    """An upright RGB image from a path or a stream, in sRGB by its color profile; a broken profile, or EXIF,
    is ignored; what is transparent becomes white.

    side: its short side is scaled to this length. A JPEG is then decoded in a half, a quarter or an eighth of
    its size, several times as fast, as long as that leaves the short side twice as long as asked for.
    """
    with Image.open(source) as file:
        (width, height), box, transform = file.size, None, color_transform(file)
        if side is not None:
            draft = file.draft(None, (2 * side, 2 * side))
            if draft:
                box = draft[1]                               # what the image fills: 187.5 of 188 pixels
        image, mode = file, transform.input_mode if transform else "RGB"
        if image.mode.startswith("I"):                       # 16-bit gray: convert would clip it to white
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        if image.mode not in (mode, "RGB") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        if image.mode != mode:
            image = image.convert(mode)
        if side is not None:
            image = image.resize(scaled_sides(width, height, side), Image.BICUBIC, box)      # antialiased
        if transform:                                        # of few pixels: it costs as much as decoding
            image = transform.apply(image)
        image.load()
        image.info = file.info                               # with its EXIF rotation
        image.info.pop("icc_profile", None)
        with contextlib.suppress(Exception):                 # a broken EXIF turns nothing
            image = ImageOps.exif_transpose(image)
        return image


def color_transform(image):
    """profile_transform of an open image; None where it has no profile."""
    return profile_transform(image.info["icc_profile"], image.mode) if "icc_profile" in image.info else None


@functools.lru_cache(maxsize=64)
def profile_transform(profile, mode):
    """An embedded color profile (bytes), the image's mode -> ImageCms's transform to sRGB; None where that
    changes no color by more than 2 of 255; False where the profile is broken or of other channels."""
    channels = "RGB"
    if mode == "CMYK":
        channels = "CMYK"
    elif mode[0] in "1LI":
        channels = "L"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        own = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        if (own, channels) != ("RGB", "L") and own != channels:
            return False
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), own, "RGB")
    except (ImageCms.PyCMSError, OSError, KeyError, TypeError, ValueError):
        return False
    cube = bytes(itertools.chain.from_iterable(itertools.product(range(0, 256, 51), repeat=3)))
    probe = Image.frombytes("RGB", (216, 1), cube).convert(own)
    changes = ImageChops.difference(transform.apply(probe), probe.convert("RGB")).getextrema()
    return transform if max(most for _, most in changes) > 2 else None


def check_size(height, width, config, vae):
    """Refuse an image that the model cannot do, naming the nearest that it can."""
    step = config.patch_size * (vae.factor if vae is not None else 1)
    if height < step or width < step or height % step or width % step:
        near_w, near_h = (max(step, round(side / step) * step) for side in (width, height))
        raise UserError(f"{width}x{height}: width and height must be multiples of {step} (patch x VAE "
                        f"factor), such as {near_w}x{near_h}")


def image_grid(images, columns, scale=1, gap=2, column_labels=(), row_labels=()):
    """Images (height, width, 3) uint8 of any sizes -> one PIL image, row by row, each enlarged; with labels
    of the columns above and of the rows to the left, where they are given."""
    letter = 7                                               # pixels
    height = max(image.shape[0] for image in images) * scale + gap
    widths = [image.shape[1] * scale + gap for image in images]
    width = max(widths + [letter * len(label) for label in column_labels])
    left = letter * max([len(label) for label in row_labels], default=0) + gap
    top = gap
    if column_labels:
        top += 2 * letter
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (left + columns * width, top + rows * height), "white")
    for i, image in enumerate(images):
        tile = ImageOps.scale(Image.fromarray(image), scale, Image.NEAREST)
        sheet.paste(tile, (left + i % columns * width, top + i // columns * height))
    for i, label in enumerate(column_labels):
        ImageDraw.Draw(sheet).text((left + i * width, 1), label, "black")
    for i, label in enumerate(row_labels):
        ImageDraw.Draw(sheet).text((gap, top + i * height), label, "black")
    return sheet


# ---- Files -----------------------------------------------------------------------------------------------

def looks_local(name):
    """True for a path, even of something missing; False for what looks like a hub id (Qwen/Qwen3-0.6B)."""
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name))
    return os.path.exists(name) or os.path.isdir(os.path.dirname(name)) or not hub_id


def read_text(path):
    """A person's text file: UTF-8, with a byte order mark or without. Its lines end at \\n and \\r\\n alone:
    split("\\n") and strip them; splitlines would end them at eight other characters, too."""
    return Path(path).read_bytes().decode("utf-8-sig")


def make_folder(path, flag):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be a folder to write in ({error.strerror})") from error


@contextlib.contextmanager
def scratch_folder(parent, prefix):
    """A temporary folder in parent; first, those that killed processes left there are deleted."""
    from filelock import FileLock, Timeout
    for old in Path(parent).iterdir():
        if old.name.startswith(prefix) and (old / "lock").is_file():
            with contextlib.suppress(Timeout, OSError, NotImplementedError):
                with FileLock(old / "lock", timeout=0):      # free when its process ends, however it ends
                    shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):       # a disk without locks: none is deleted
            stack.enter_context(FileLock(Path(folder, "lock"), timeout=0))
        yield Path(folder)
