# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 text-to-video in one file: DiT, video VAE, UMT5 text encoder, flow-matching schedule, loading.

Source: arXiv 2503.20314; github.com/Wan-Video/Wan2.1, whose checkpoints' parameter names the modules carry. Shapes in
comments: B batch, F latent frames, h, w latent size, S = F·(h/2)·(w/2) tokens, L text tokens, N heads, D head size.
"""

import copy
import html
import inspect
import json
import math
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import nn
from torch.utils import checkpoint as recompute


def out_of_memory(error):
    """Whether an exception says that the memory of the host or of a device is used up."""
    texts = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "unable to find an engine",  # cuBLAS and cuDNN
             "MPS backend out of memory", "Invalid buffer size", "not enough memory: ", "allocate memory")  # fmt: skip
    named = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return named or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def flow_sigmas(steps, shift=7.0, strength=1.0):
    """Noise levels of the flow-matching Euler sampler: (steps+1,) fp32, decreasing, last 0; timestep = 1000·sigma.

    `strength` < 1 starts below pure noise; `shift` > 1 spends more steps at high noise.
    """
    s = torch.linspace(strength, 0, steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


# ---- DiT ----


def rope_table(grid, head_dim, device):
    """Rotations e^{iθ} of the channel pairs of each token of a grid (F, H, W): (S, 1, D/2) complex64."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
    side = 2 * (head_dim // 6)
    dims = head_dim - 2 * side, side, side  # channels for frame, row and column
    positions = torch.cartesian_prod(*(torch.arange(length, dtype=dtype, device=device) for length in grid))  # (S, 3)
    freqs = [10000 ** (-torch.arange(0, dim, 2, dtype=dtype, device=device) / dim) for dim in dims]
    angles = torch.cat([position[:, None] * freq for position, freq in zip(positions.unbind(1), freqs)], dim=1)
    return torch.complex(angles.cos().float(), angles.sin().float())[:, None]


def apply_rope(x, table):
    """Rotate the interleaved channel pairs of x (B, S, N, D) in fp32; returns x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # one pass over memory, real numbers take eight
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """x/rms(x)·weight over the last dimension, in fp32; returns x's dtype."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Self-attention (context = x, with RoPE) or cross-attention; q and k are normalised over all heads together."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def qk(self, x, context, rope=None):
        """x (B, S, dim), context (B, L, dim) -> q (B, S, N, D), k (B, L, N, D), post-norm and post-RoPE."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        k = self.norm_k(self.k(context)).unflatten(-1, (self.num_heads, -1))
        return (q, k) if rope is None else (apply_rope(q, rope), apply_rope(k, rope))

    def forward(self, x, context, rope=None):
        q, k = self.qk(x, context, rope)
        v = self.v(context).unflatten(-1, (self.num_heads, -1))
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, N, S, D)
        return self.o(rearrange(out, "b n s d -> b s (n d)"))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def modulate(x, shift, scale, eps):
    """LayerNorm without weights, then scale and shift, in fp32."""
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale)


class Block(nn.Module):
    """Self-attention, cross-attention and MLP on an fp32 residual stream; matmuls in the dtype of the context."""

    def __init__(self, dim, ffn_dim, num_heads, eps):
        super().__init__()
        self.eps, self.norm3 = eps, nn.LayerNorm(dim, eps)
        self.self_attn, self.cross_attn = Attention(dim, num_heads, eps), Attention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x, modulation, context, rope, only_qk=False):
        """Tokens after this block or, with only_qk, no more than its self-attention's Q and K."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + modulation).split(1, dim=1)  # (B, 1, dim)
        y = modulate(x, shift1, scale1, self.eps).to(context.dtype)
        if only_qk:
            return self.self_attn.qk(y, y, rope)
        x = x.addcmul(self.self_attn(y, y, rope), gate1)
        x = x + self.cross_attn(self.norm3(x).to(context.dtype), context)
        y = modulate(x, shift2, scale2, self.eps).to(context.dtype)
        return x.addcmul(self.ffn(y), gate2)


class Head(nn.Module):
    """Modulated projection of tokens to patches of velocity, in fp32."""

    def __init__(self, dim, out_dim, eps):
        super().__init__()
        self.eps, self.head = eps, nn.Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x, time):
        shift, scale = (self.modulation + time[:, None]).split(1, dim=1)
        return self.head(modulate(x, shift, scale, self.eps))


def keep_self_attention(_, op, *args, **kwargs):
    """Policy of recomputation: only the output of self-attention, most of a block's arithmetic, is stored."""
    attention = "scaled_dot_product" in op.name() and args[0].shape == args[1].shape  # q and k, alike in length
    policy = recompute.CheckpointPolicy
    return policy.MUST_SAVE if attention else policy.PREFER_RECOMPUTE


class DiT(nn.Module):
    """Wan 2.1 diffusion transformer; arguments named as in the checkpoint's config.json, defaults the 1.3B's.

    Use `cast`, not `.to(dtype)`, for bf16: norms, modulation, time embedding and head must stay fp32.
    """

    def __init__(self, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16, text_dim=4096,
                 freq_dim=256, patch_size=(1, 2, 2), eps=1e-6):  # fmt: skip
        super().__init__()
        self.num_heads, self.freq_dim, self.patch_size = num_heads, freq_dim, tuple(patch_size)
        self.patch_embedding = nn.Conv3d(in_dim, dim, self.patch_size, self.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads, eps) for _ in range(num_layers))
        self.head = Head(dim, out_dim * math.prod(self.patch_size), eps)

    def embed(self, x, t, context):
        """Everything before the blocks: tokens (B, S, dim), time (B, dim), and the blocks' three shared arguments."""
        if any(length % patch for length, patch in zip(x.shape[2:], self.patch_size)):
            raise ValueError(f"patches {self.patch_size} do not divide latents {tuple(x.shape[2:])}")
        dtype = self.patch_embedding.weight.dtype
        patches = self.patch_embedding(x.to(dtype))  # (B, dim, F, H, W)
        rope = rope_table(patches.shape[2:], patches.shape[1] // self.num_heads, x.device)
        half = self.freq_dim // 2
        freqs = 10000 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = t.float()[:, None] * freqs  # (B, freq_dim/2)
        time = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1))  # cosines first
        modulation = self.time_projection(time).unflatten(1, (6, -1))  # (B, 6, dim)
        context = self.text_embedding(context.to(dtype))  # (B, L, dim)
        tokens = rearrange(patches.float(), "b c f h w -> b (f h w) c").contiguous()  # else every block copies first
        return tokens, time, (modulation, context, rope)

    def forward(self, x, t, context):
        """Velocity (B, 16, F, h, w) fp32 at latents x (B, 16, F, h, w), t (B,) in [0, 1000], context (B, L, text_dim).

        All of the context is attended to: pad it with zeros to 512 tokens, as the weights were trained. Raises
        ValueError when the patches do not divide x.
        """
        tokens, time, shared = self.embed(x, t, context)
        for block in self.blocks:
            tokens = block(tokens, *shared)
        p, q, r = self.patch_size
        f, h = x.shape[2] // p, x.shape[3] // q
        patches = self.head(tokens, time)
        return rearrange(patches, "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", f=f, h=h, p=p, q=q, r=r)

    def qk(self, x, t, context, block, *, checkpoint=False):
        """Self-attention q, k (B, S, N, D) of the 1-based `block`, post-norm and post-RoPE; nothing later is computed.

        checkpoint: the backward pass recomputes blocks from their input and self-attention's output ("full": input).
        Raises ValueError for a block outside the model.
        """
        if not 1 <= block <= len(self.blocks):
            raise ValueError(f"block {block} is outside the model's 1 to {len(self.blocks)}")
        options = {"use_reentrant": False, "preserve_rng_state": False}
        if checkpoint != "full":
            options["context_fn"] = partial(recompute.create_selective_checkpoint_contexts, keep_self_attention)
        x, _, shared = self.embed(x, t, context)
        for n, layer in enumerate(self.blocks[:block], 1):
            args = x, *shared, n == block
            x = recompute.checkpoint(layer, *args, **options) if checkpoint else layer(*args)
        return x


def offload_blocks(module, device):
    """Leave the weights of the blocks in host memory and copy each block's to the device as it runs.

    Meanwhile a thread copies those of the block that follows, in a backward pass of the one before: two blocks' at most
    are there. Gradients need checkpoint=True: a graph would keep all.
    """
    kind = torch.device(device).type
    stream = torch.cuda.Stream(device) if kind == "cuda" else None
    pin = stream and isinstance(module, DiT)  # pinned memory is kept for good, and a text encoder runs once
    thread, host, copies, last, weights = ThreadPoolExecutor(1), [], {}, 0, None

    def fetch(n):
        with torch.cuda.stream(stream):
            return {name: p.to(device, copy=True) for name, p in host[n].items()}

    def run(n, *args, **kwargs):
        nonlocal last, weights
        if stream:
            torch.cuda.current_stream(device).synchronize()  # until the block before is done with its weights
        copied = copies.pop(n, None)
        copies.clear()
        weights = (copied or thread.submit(fetch, n)).result()
        following, last = (n - 1 if 0 < n < last else n + 1) % len(host), n
        if kind != "mps":  # two threads kill the process there (pytorch issue 197805)
            copies[following] = thread.submit(fetch, following)
        return torch.func.functional_call(shell, weights, args, kwargs)

    for n, block in enumerate(module.blocks):
        host.append({name: p.pin_memory() if pin else p for name, p in block.state_dict().items()})
        block.to("meta").forward = partial(run, n)  # else host memory would hold the weights twice
    shell = copy.deepcopy(module.blocks[0])  # runs with the weights that it is handed,
    del shell.forward  # not as `run`
    for child in set(module.children()) - {module.blocks}:
        child.to(device)
    return module


# ---- Video VAE, causal in time ----
# `cache` is a dict of one streamed pass: module -> the last input frames that its next chunk needs.

LATENT_MEAN, LATENT_STD = torch.tensor([
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
]).view(2, -1, 1, 1, 1)  # fmt: skip


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees the past only: kernel − stride earlier frames, from the cache or zero at the start."""

    def __init__(self, cin, cout, kernel=(3, 3, 3), stride=(1, 1, 1)):
        super().__init__(cin, cout, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.history = kernel[0] - stride[0]

    def forward(self, x, cache):
        if self.history:
            past = cache.get(self)
            x = F.pad(x, (0, 0, 0, 0, self.history, 0)) if past is None else torch.cat([past, x], dim=2)
            self.remember(x, cache)
        return super().forward(x)

    def remember(self, x, cache):
        """Keep of x what the next chunk looks back at; None: that chunk starts from zeros."""
        cache[self] = None if x is None else x[:, :, -self.history :].clone()  # a view would keep all of x alive


class ChannelNorm(nn.Module):
    """Unit-norm channels, scaled by √C·gamma; gamma is (C, 1, 1) for frames and (C, 1, 1, 1) for video."""

    def __init__(self, dim, spatial_dims):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x):
        scale = (x.shape[1] / x.square().sum(1, keepdim=True).clamp(min=1e-24)).sqrt()  # F.normalize, but faster
        return x * scale * self.gamma


class Layers(nn.Sequential):
    """Layers run in order; those that look back in time are handed the cache."""

    def forward(self, x, cache):
        for layer in self:
            x = layer(x, cache) if isinstance(layer, (CausalConv3d, Layers, ResBlock, Resample)) else layer(x)
        return x


class ResBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.residual = Layers(ChannelNorm(cin, 3), nn.SiLU(), CausalConv3d(cin, cout),
                               ChannelNorm(cout, 3), nn.SiLU(), nn.Identity(), CausalConv3d(cout, cout))  # fmt: skip
        self.shortcut = CausalConv3d(cin, cout, (1, 1, 1)) if cin != cout else None

    def forward(self, x, cache):
        return self.residual(x, cache) + (self.shortcut(x, cache) if self.shortcut else x)


def per_frame(layer, x):
    """A layer for images (N, C, h, w) on each frame of x (B, C, T, h, w)."""
    return rearrange(layer(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", b=len(x))


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.to_qkv, self.proj = ChannelNorm(dim, 2), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def attend(self, x):
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "n (three c) h w -> three n 1 (h w) c", three=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=x.shape[2]))

    def forward(self, x):
        return x + per_frame(self.attend, x)


class Resample(nn.Module):
    """Halve (`down`) or double the frame size; with `temporal` the frame rate too, the very first frame excepted."""

    def __init__(self, dim, down, temporal):
        super().__init__()
        self.down, self.time_conv = down, None
        if down:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        else:
            self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim // 2, 3, padding=1))
        if temporal:
            self.time_conv = CausalConv3d(dim, dim if down else 2 * dim, (3, 1, 1), (2 if down else 1, 1, 1))

    def forward(self, x, cache):
        x = per_frame(self.resample, x) if self.down else x
        if self.time_conv in cache:
            x = self.time_conv(x, cache)
            x = x if self.down else rearrange(x, "b (two c) t h w -> b c (t two) h w", two=2)
        elif self.time_conv:
            self.time_conv.remember(x if self.down else None, cache)  # up, what follows it starts from zeros
        return x if self.down else per_frame(self.resample, x)


def stages(blocks, *levels, down):
    """Residual blocks of each level (channels in, channels out, temporal), and its Resample unless temporal is None."""
    layers = []
    for cin, cout, temporal in levels:
        layers += [ResBlock(cin if n == 0 else cout, cout) for n in range(blocks)]
        if temporal is not None:
            layers.append(Resample(cout, down, temporal))
    return Layers(*layers)


def blend_tiles(size, tile, stride, units, device=None):
    """Overlapping tiles of one axis: their slices of input and output, and the output's weights, which sum to 1.

    size, tile and stride are in latents; units are the pixels of a latent in input and output.
    """
    tile, stride, unit = min(tile, size), min(stride, tile), units[1]
    starts = [min(start, size - tile) for start in range(0, size - tile + stride, stride)]  # the last is at the border
    position, ramp = (torch.arange(size * unit, device=device) + 0.5) / unit, max(tile - stride, 1)  # in latents
    weights = torch.ones(len(starts), size * unit, device=device)
    for row, start in zip(weights, starts):
        if start > 0:
            row.clamp_(max=(position - start) / ramp)
        if start + tile < size:
            row.clamp_(max=(start + tile - position) / ramp)
    weights.clamp_(min=0)  # each row is negative outside its own tile
    weights /= weights.sum(0)
    tiles = []
    for row, start in zip(weights, starts):
        source, target = (slice(start * n, (start + tile) * n) for n in units)
        tiles.append(SimpleNamespace(input=source, output=target, weights=row[target]))
    return tiles


class VAE(nn.Module):
    """Wan 2.1 video VAE: 8×8 pixels and 4 frames (the first: 1) to one latent of 16 normalised channels."""

    def __init__(self, dim=96, z_dim=16):
        super().__init__()
        d1, d2, d4 = dim, 2 * dim, 4 * dim
        down = stages(2, (d1, d1, False), (d1, d2, True), (d2, d4, True), (d4, d4, None), down=True)
        up = stages(3, (d4, d4, True), (d2, d4, True), (d2, d2, False), (d1, d1, None), down=False)
        middle = [Layers(ResBlock(d4, d4), FrameAttention(d4), ResBlock(d4, d4)) for _ in range(2)]
        head = [Layers(ChannelNorm(n, 3), nn.SiLU(), CausalConv3d(n, cout)) for n, cout in ((d4, 2 * z_dim), (d1, 3))]
        self.encoder = Layers(OrderedDict(conv1=CausalConv3d(3, d1), downsamples=down, middle=middle[0], head=head[0]))
        self.decoder = Layers(OrderedDict(conv1=CausalConv3d(z_dim, d4), middle=middle[1], upsamples=up, head=head[1]))
        self.conv1, self.conv2 = CausalConv3d(2 * z_dim, 2 * z_dim, (1, 1, 1)), CausalConv3d(z_dim, z_dim, (1, 1, 1))

    def tiled(self, layers, x, out, tile, stride, progress):
        """Add to `out` the blend of layers(chunk of x, cache) over spatial tiles, each streamed over time.

        One of x and out is a video, the other its latents; a chunk is one frame of the latents.
        """
        encodes = x.shape[3] > out.shape[3]
        size, pixels, group = (out.shape[3:], (8, 1), 4) if encodes else (x.shape[3:], (1, 8), 1)
        rows, cols = (blend_tiles(*axis, pixels, x.device) for axis in zip(size, tile or size, stride))
        chunks = x.split([1] + [group] * ((x.shape[2] - 1) // group), dim=2)
        for row, col, chunk in progress(list(product(rows, cols, chunks))):
            if chunk is chunks[0]:
                cache, done = {}, 0
            y = layers(chunk[..., row.input, col.input], cache)
            out[:, :, done : done + y.shape[2], row.output, col.output] += y * row.weights[:, None] * col.weights
            done += y.shape[2]
        return out

    @torch.no_grad()
    def encode(self, video, tile=(30, 52), stride=(15, 26), progress=iter):
        """video (B, 3, T, 8h, 8w) in [-1, 1], T = 4k+1 -> normalised mean latents (B, 16, (T-1)//4+1, h, w).

        tile and stride are in latents; tile=None takes the frame whole.
        """
        b, _, t, h, w = video.shape
        if t % 4 != 1 or h % 8 or w % 8:
            raise ValueError(f"video must have 4k+1 frames and sides that are multiples of 8, not {t} of {h}x{w}")
        out = video.new_zeros(b, self.conv1.out_channels, t // 4 + 1, h // 8, w // 8)
        out = self.tiled(Layers(self.encoder, self.conv1), video, out, tile, stride, progress)
        return (out.chunk(2, dim=1)[0] - LATENT_MEAN.to(out)) / LATENT_STD.to(out)  # the other half is log variances

    @torch.no_grad()
    def decode(self, latents, tile=(30, 52), stride=(15, 26), progress=iter):
        """latents (B, 16, F, h, w) -> video (B, 3, 4F-3, 8h, 8w) in [-1, 1]."""
        b, _, f, h, w = latents.shape
        x = latents * LATENT_STD.to(latents) + LATENT_MEAN.to(latents)
        out = latents.new_zeros(b, 3, 4 * f - 3, 8 * h, 8 * w)
        return self.tiled(Layers(self.conv2, self.decoder), x, out, tile, stride, progress).clamp_(-1, 1)


def make_codec(vae, vae_tiles=False):
    """encode and decode of a VAE: whole frames until memory does not suffice, then, or with vae_tiles, tiles."""
    codec = SimpleNamespace(vae_tiles=vae_tiles)

    def fit(convert, x, progress=iter):
        if not codec.vae_tiles:
            try:
                return convert(x, tile=None, progress=progress)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            codec.vae_tiles = True  # not in the handler: the error holds the first attempt's tensors
            print("out of memory: the VAE goes on in tiles")
        return convert(x, progress=progress)

    codec.encode, codec.decode = partial(fit, vae.encode), partial(fit, vae.decode)
    return codec


# ---- UMT5 text encoder ----


def position_buckets(length, num_buckets, device):
    """Bucket of each relative position key − query: (L, L) long; half per sign, exact near, logarithmic to 128."""
    position = torch.arange(length, device=device)
    relative = position[None] - position[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    distance = relative.abs()
    far = (distance.clamp(min=1) / exact).log() / math.log(128 / exact) * (half - exact)
    bucket = torch.where(distance < exact, distance, exact + far.long()).clamp(max=half - 1)
    return (relative > 0) * half + bucket


class T5Block(nn.Module):
    """Attention without 1/√d scaling, with an additive position bias, and a gated MLP; no biases."""

    def __init__(self, dim, dim_attn, dim_ffn, num_heads, num_buckets):
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.norm1, self.norm2 = RMSNorm(dim, 1e-6), RMSNorm(dim, 1e-6)
        self.attn = nn.ModuleDict({name: linear(dim, dim_attn) for name in "qkv"} | {"o": linear(dim_attn, dim)})
        gate = nn.Sequential(linear(dim, dim_ffn), nn.GELU("tanh"))
        self.ffn = nn.ModuleDict(dict(gate=gate, fc1=linear(dim, dim_ffn), fc2=linear(dim_ffn, dim)))
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding(num_buckets, num_heads)})  # in every layer

    def forward(self, x, mask):
        attn, ffn, table = self.attn, self.ffn, self.pos_embedding["embedding"].weight  # table (buckets, N)
        bias = rearrange(table[position_buckets(x.shape[1], len(table), x.device)], "q k n -> 1 n q k") + mask
        y = self.norm1(x)
        q, k, v = (rearrange(attn[name](y), "b l (n d) -> b n l d", n=table.shape[1]) for name in "qkv")
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(x.dtype), scale=1.0)
        x = x + attn["o"](rearrange(y, "b n l d -> b l (n d)"))
        y = self.norm2(x)
        return x + ffn["fc2"](ffn["fc1"](y) * ffn["gate"](y))


class TextEncoder(nn.Module):
    """UMT5 encoder; the defaults are UMT5-XXL's."""

    def __init__(self, vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24,
                 num_buckets=32):  # fmt: skip
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(T5Block(dim, dim_attn, dim_ffn, num_heads, num_buckets) for _ in range(num_layers))
        self.norm = RMSNorm(dim, 1e-6)

    def forward(self, ids, mask):
        """ids (B, L) long, mask (B, L) 1 = real token -> (B, L, dim)."""
        x = self.token_embedding(ids)
        bias = torch.where(mask == 0, torch.finfo(x.dtype).min, 0.0)
        for block in self.blocks:
            x = block(x, bias[:, None, None])
        return self.norm(x)


# ---- Loading and prompts ----

REPOS = {"1.3B": "Wan-AI/Wan2.1-T2V-1.3B", "14B": "Wan-AI/Wan2.1-T2V-14B"}
VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
PARTS = {DiT: "diffusion_pytorch_model*.safetensors", VAE: VAE_FILE, TextEncoder: TEXT_FILE}
TOKENIZER_FILE, TEXT_LENGTH = "google/umt5-xxl/tokenizer.json", 512
FP32_PARTS = ("time_", "modulation", "norm", "head.")  # DiT parameters kept in fp32, by name

ARCHITECTURES = {  # arguments of DiT and VAE; tiny has random weights only
    "1.3B": ({}, {}),
    "14B": (dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40), {}),
    "tiny": (dict(dim=96, ffn_dim=192, num_heads=4, num_layers=4, text_dim=64, freq_dim=32), dict(dim=8)),
}

NEGATIVE_PROMPT = (  # Wan's own: over-saturated, still, blurred, subtitles, ...
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class ModelError(Exception):
    """A checkpoint that cannot be used, in one line for the user."""


class Model(NamedTuple):
    """What a run needs of a base model; another base model is another such tuple."""

    blocks: int  # DiT blocks
    encode_prompts: Callable  # n prompts -> contexts (n, L, text_dim); loads and frees the text encoder
    load_codec: Callable  # (vae_tiles=False) -> what has encode and decode(x, progress=iter), and vae_tiles: was tiled
    load_dit: Callable  # (progress=iter) -> DiT: velocity by call, `qk`, `patch_size`, `blocks`
    canvases: tuple  # (H, W) in pixels that it was trained at, the default first
    max_frames: int  # of the clips it was trained on
    fps: float  # frames per second of those
    defaults: dict  # its own defaults, by name of the flag
    demo: Callable | None = None  # reads the demo clip, with fastvmt.read_video's arguments; None: that
    multiple: int = 16  # of its sides


def open_model(name, device="cpu", dtype=torch.float32, *, offload=False, random_weights=False):
    """The Wan 2.1 called `name`: a checkpoint folder, a DiT's file, a hub repo id, or one of ARCHITECTURES.

    Cheap: reads headers, or a repo's config.json. dtype is the DiT matmuls'; offload keeps blocks in host memory.
    Raises ModelError.
    """
    if random_weights or name == "tiny":
        if name not in ARCHITECTURES:
            raise ModelError(f"random weights need --model {', '.join(ARCHITECTURES)}, not {name}")
        arguments = dict(zip(PARTS, ARCHITECTURES[name]))
        blocks = arguments[DiT].get("num_layers", 30)
        encode = partial(random_contexts, text_dim=arguments[DiT].get("text_dim", 4096), device=device)

        def load_part(cls, device, progress=iter):
            return random_model(cls, arguments[cls], device, dtype)
    else:
        blocks, fetch = find_checkpoint(name)

        def encode(prompts):
            return encode_prompts(prompts, fetch()[TextEncoder], device, offload)

        def load_part(cls, device, progress=iter):
            return load(cls, fetch()[cls], device, dtype, progress)

    def load_codec(vae_tiles=False):
        return make_codec(load_part(VAE, device), vae_tiles)

    def load_dit(progress=iter):
        dit = load_part(DiT, "cpu" if offload else device, progress)
        return offload_blocks(dit, device) if offload else dit

    size, defaults = (480, 832), {"negative_prompt": NEGATIVE_PROMPT}
    if name == "tiny":
        size, defaults = (64, 112), defaults | dict(frames=33, block=3, window=3)
    return Model(blocks, encode, load_codec, load_dit, (size, size[::-1]), 81, 16.0, defaults)


def cast(dit, dtype, device=None, progress=iter):
    """Cast a DiT's weights in place to dtype, except FP32_PARTS, and move them to the device."""
    for name, p in progress(list(dit.named_parameters())):
        p.data = p.data.to(device, torch.float32 if any(part in name for part in FP32_PARTS) else dtype)
    return dit


def random_model(cls, arguments, device="cpu", dtype=torch.float32, seed=0):
    """A frozen module of random weights that keep activations at unit scale."""
    with torch.device("meta"):
        module = cls(**arguments).requires_grad_(False)
    if cls is DiT:
        cast(module, dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif "norm" in name or name.endswith("gamma"):
            p.fill_(1)
        else:
            fan_in = p.shape[-1] if "modulation" in name else p[0].numel()
            p.normal_(0, fan_in**-0.5, generator=generator)
    return module


def random_contexts(prompts, text_dim, device="cpu"):
    """Stand-ins for encoded prompts, each drawn from its text: (n, 512, text_dim) fp32."""
    generators = [torch.Generator().manual_seed(zlib.crc32(text.encode(errors="replace"))) for text in prompts]
    return torch.stack([torch.randn(TEXT_LENGTH, text_dim, generator=g) for g in generators]).to(device)


def find_checkpoint(name, parts=tuple(PARTS)):
    """Number of blocks of the first part, and a function that returns where each part is, all files checked."""
    if os.path.isdir(name):  # unlike Path.is_dir, it never raises
        first, *_ = [load(cls, name) for cls in parts]
        return len(first.blocks), lambda: dict.fromkeys(parts, name)
    if os.path.isfile(name):
        file = Path(name)
        if file.suffix.lower() != ".safetensors" or re.search(
            r"wan.?2.?2(?!\d)|_noise", file.name, re.I
        ):  # 2.2 has 2.1's tensors
            raise unusable(name, "not a .safetensors file of Wan 2.1")
        blocks, beside = len(load(DiT, name).blocks), (file.parent / TEXT_FILE).exists()
        _, fetch = find_checkpoint(file.parent if beside else REPOS["1.3B"], (TextEncoder, VAE))
        return blocks, lambda: fetch() | {DiT: name}
    repo = REPOS.get(name, name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)", repo):
        raise ModelError(f"unknown model {name!r}: not a path, repo id or one of toy, {', '.join(ARCHITECTURES)}")
    from huggingface_hub import snapshot_download

    def download(*files):
        try:
            return snapshot_download(repo, allow_patterns=files)
        except Exception as error:  # each version of the library has its own
            ways = "check the spelling; accept its terms and `hf auth login`; run it again, it resumes; go online; "
            ways += f"set HF_HOME to a cache; or `hf download {repo} --local-dir DIR`, then --model DIR or a file in it"
            raise ModelError(f"{repo} cannot be fetched ({shorten(str(error), 200)}): {ways}") from None

    config = read_config(download("config.json"))  # from the cache when offline
    if not config:
        raise unusable(repo, "without config.json")
    files = "config.json", TOKENIZER_FILE, *(PARTS[cls] for cls in parts)
    return config.get("num_layers", 30), cache(lambda: find_checkpoint(download(*files), parts)[1]())


def unusable(where, why):
    """ModelError of what cannot be read, with what can be."""
    ways = f"as {REPOS['1.3B']}, its DiT in a .safetensors file or diffusers:DIR; no fp8, LoRA, i2v"
    return ModelError(f"{where} is {why}: only the official layout can be read, {ways}")


def read(path, reader):
    """reader(path); ModelError when it fails."""
    try:
        return reader(str(path))
    except Exception as error:  # each format has its own exceptions
        if out_of_memory(error):
            raise
        raise ModelError(f"{path} is missing or damaged ({shorten(str(error), 200)}): fetch it again") from None


def read_config(folder):
    """config.json of a text-to-video checkpoint's folder, {} where there is none."""
    path = Path(folder) / "config.json"
    config = read(path, lambda _: dict(json.loads(path.read_text()))) if path.exists() else {}
    if config.get("model_type", "t2v") != "t2v":
        raise unusable(path, f"of a {config['model_type']!r} model")
    return config


def dit_files(folder):
    """The DiT's file or, where there is none, its shards, also those that are missing."""
    for file in (folder, folder / PARTS[DiT].replace("*", "")):
        if file.is_file():
            return [file]
    found = re.findall(
        r"^(diffusion_pytorch_model-)\d{5}(-of-(\d{5})\.safetensors)$", "\n".join(os.listdir(folder)), re.M
    )
    names = {f"{start}{n + 1:05}{end}" for start, end, count in found for n in range(int(count))}
    for file in folder.glob(f"snapshots/*/{VAE_FILE}"):
        raise ModelError(f"{folder} is the hub's cache: give --model {file.parent}")
    if not names:
        raise unusable(folder, f"without {PARTS[DiT]}")
    return [folder / name for name in sorted(names)]


def load(cls, folder, device="cpu", dtype=None, progress=iter):
    """A frozen DiT (matmul weights in dtype), VAE (fp32) or TextEncoder of a checkpoint folder; a DiT also of a file.

    By default names and shapes are checked and no weight is read. config.json has the DiT's arguments, and may have
    the others' as `VAE` and `TextEncoder`. Raises ModelError.
    """
    folder, config = Path(folder), read_config(folder)
    files = dit_files(folder) if cls is DiT else [folder / PARTS[cls]]
    reader = load_file if cls is DiT else partial(torch.load, map_location="cpu", mmap=True, weights_only=True)
    found = [read(file, lambda path: dict(reader(path))) for file in files]
    # repackaged files differ in this prefix only
    tensors = {key.removeprefix("model.diffusion_model."): p for part in found for key, p in part.items()}
    if len(tensors) < sum(map(len, found)):
        raise ModelError(f"{folder} holds its DiT twice: keep one set of files")
    if cls is DiT:
        size = "14B" if len(tensors.get("patch_embedding.bias", ())) == 5120 else "1.3B"
        arguments = {name: config[name] for name in config.keys() & inspect.signature(DiT).parameters}
        arguments = arguments or ARCHITECTURES[size][0]
    else:
        arguments = config.get(cls.__name__, {})
    try:
        if any(p.dtype.itemsize == 1 for p in tensors.values()):
            raise unusable(files[0], "in fp8")
        with torch.device("meta"):
            module = cls(**arguments).requires_grad_(False)
        module.load_state_dict(tensors, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise unusable(files[0], f"not Wan 2.1's {cls.__name__} ({shorten(str(error), 300)})") from None
    if cls is DiT and dtype:
        return cast(module, dtype, device, progress)
    return module.to(device, torch.float32 if cls is VAE else None)


def tokenize(prompt, tokenizer):
    """UMT5 ids of a prompt cleaned as by the official code, the end token last; cut to 512 with a notice."""
    import ftfy

    text = " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) >= TEXT_LENGTH:
        print(f"prompt cut to {TEXT_LENGTH} of its {len(ids) + 1} tokens: {text[:30]}...")
    return ids[: TEXT_LENGTH - 1] + [tokenizer.token_to_id("</s>")]


@torch.no_grad()
def encode_prompts(prompts, folder, device="cpu", offload=False):
    """Prompts -> contexts (n, 512, text_dim) fp32, zero past each prompt's length."""
    from tokenizers import Tokenizer

    tokenizer = read(f"{folder}/{TOKENIZER_FILE}", Tokenizer.from_file)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    encoder = load(TextEncoder, folder, "cpu" if offload else device)
    if tokenizer.token_to_id("</s>") is None or tokenizer.get_vocab_size() > len(encoder.token_embedding.weight):
        raise unusable(folder, f"without the {TOKENIZER_FILE} of {TEXT_FILE}")
    encoder = offload_blocks(encoder, device) if offload else encoder
    rows = [torch.tensor(tokenize(prompt, tokenizer), device=device) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    mask = ids >= 0
    context = encoder(ids.clamp(min=0), mask).float() * mask[..., None]
    return F.pad(context, (0, 0, 0, TEXT_LENGTH - ids.shape[1]))
