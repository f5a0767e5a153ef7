# SPDX-License-Identifier: Apache-2.0
"""FastVMT: training-free video motion transfer on Wan 2.1, in one file.

Equations, sections and appendices are those of "FastVMT: Eliminating Redundancy in Video Motion Transfer" (arXiv
2602.05551v2). Its Algorithm 1, top down:

    sample: for each σ of the schedule
        in the first fifth of the steps, guide:
            reference = features(reference latents, empty prompt), once or, matched, at each σ
            x = optimize_latent(x, losses(reference, features(x, prompt)))
        x = step(velocity, x, σ, next σ)
    features = motion_features: Q and K of one DiT block → head_average → attention_motion_flow:
        frame_pairs, tile_queries → window_centers → window_indices → window_flow
    losses = motion_losses: 5·amf_loss + 1·window_loss
    step = euler_step

To change it, hand `sample` other features, losses or step (lab/changes.py). The method needs torch and einops only; the
run stands below it. Shapes: F latent frames, H×W tokens a frame, S = H·W, D head size, P frame pairs, N tiles (eq. 7's
P), T tokens a tile, M tokens a window. Positions are (row, column) in tokens.
"""

import math
import os
import signal
import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out
    sys.modules["fastvmt"] = sys.modules["__main__"]  # the lab imports it
    # Until all is imported; no exception, as that would be shown.
    interrupt = signal.signal(signal.SIGINT, lambda *_: os._exit(print("fastvmt: interrupted", file=sys.stderr) or 130))

import torch
from einops import einsum, rearrange, repeat
from torch.nn.functional import avg_pool2d, embedding, pad
from torch.utils.checkpoint import checkpoint as recompute


class UserError(ValueError):
    """Something that the user can fix, in one line."""


def check_limits(values, **limits):
    """UserError unless each named value, or each in it, is from low to high and of their type, or one of the others."""
    for name, (low, high, *others) in limits.items():
        value = values[name]
        for x in value if isinstance(value, (tuple, list)) else [value]:
            within = isinstance(x, (int, type(high))) and low <= x <= high  # NaN is within none
            if not within and x not in others:
                allowed = " or ".join([f"from {low} to {high}", *map(repr, others)])
                raise UserError(f"{name} must be {type(high).__name__} {allowed}, not {x!r}")


@dataclass(frozen=True)
class MotionConfig:
    """The method's numbers, each also a flag; the defaults are the paper's, or one of two that it names."""

    block: int = 15  # DiT block, counted from 1, whose Q and K are read (Sec. 4.1)
    tile: tuple = (3, 4)  # rows and columns of a tile, in tokens (App. B.1)
    window: int | None = 21  # side l of the search window in tokens; 'none': the whole frame (eq. 3, App. B.1)
    span: int = 5  # temporal span s_f: largest frame distance of a pair (eq. 3, App. B.1)
    tau: float = 1.0  # temperature τ, which multiplies the logits (eq. 1, App. B.1)
    center: str = "soft"  # window centre: 'soft' mean position (eq. 2) or 'argmax' (eq. 4)
    alpha: float = 0.2  # decay α of the pair weights with frame distance (eq. 6)
    lambda_amf: float = 5.0  # weight of the AMF loss (eq. 8)
    lambda_window: float = 1.0  # weight of the window loss (eq. 8)
    squared: bool = False  # square the window loss's norm (eq. 7, not App. B.4)
    guided_fraction: float = 0.2  # first part of the denoising steps that is guided (Sec. 4.1)
    inner_steps: int = 10  # optimizer steps J in a guided step (Sec. 4.1)
    interval: int = 3  # compute the gradient every Δ-th inner step, reuse it then (eq. 9, App. B.1)
    lr: tuple = (0.003, 0.002)  # first and last learning rate, linear (Sec. 4.1)
    ref_noise: float | str = 0.0  # noise level of the reference: 0 (Sec. 3.2), or the step's, 'match' (4.1)
    coarse: float = 0.0  # first part of the guided steps that is read on pooled latents (not the paper's)

    def __post_init__(self):
        count, number, part = (1, 10**4), (-1e9, 1e9), (0.0, 1.0)
        check_limits(vars(self), block=count, tile=count, window=(*count, None), span=count, inner_steps=count,
                     interval=count, tau=number, alpha=number, lambda_amf=number, lambda_window=number,
                     guided_fraction=part, lr=(0.0, 1e9), ref_noise=(*part, "match"), coarse=part)  # fmt: skip
        if self.center not in ("soft", "argmax"):
            raise UserError(f"center must be 'soft' or 'argmax', not {self.center!r}")


# ---- Sliding-window attention motion flow (Sec. 3.2) ----


def head_average(x, grid):
    """Mean over heads of q or k (App. B.4): x (F·H·W, heads, D), grid (F, H, W) -> (F, H, W, D), fp32 or better."""
    x = x.mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))  # (F·H·W, D)
    return rearrange(x, "(f h w) d -> f h w d", f=grid[0], h=grid[1])


def list_pairs(num_frames, span):
    """Pairs (i, j), 1 ≤ j−i ≤ span, by offset (eqs. 3, 5; at i = j nothing moves)."""
    return [(i, i + d) for d in range(1, min(span + 1, num_frames)) for i in range(num_frames - d)]


def frame_pairs(num_frames, span, device=None):
    """list_pairs as tensors: anchors i, targets j, both long (P,)."""
    return torch.tensor(list_pairs(num_frames, span), device=device).unbind(1)


def row_column(index, width):
    """Flat token index -> position: (...) long -> (..., 2) long."""
    return torch.stack([index // width, index % width], dim=-1)


def tile_tokens(x, tile):
    """Tokens by tile, row-major, edge tiles padded with zeros: (F, H, W, C) -> (F, N, T, C)."""
    _, H, W, _ = x.shape
    th, tw = tile
    x = pad(x, (0, 0, 0, -W % tw, 0, -H % th))
    return rearrange(x, "f (a th) (b tw) c -> f (a b) (th tw) c", th=th, tw=tw)


def untile_tokens(x, tile, grid):
    """Inverse of tile_tokens: (P, N, T, C), grid (H, W) -> (P, H, W, C)."""
    H, W = grid
    th, tw = tile
    x = rearrange(x, "p (a b) (th tw) c -> p (a th) (b tw) c", b=math.ceil(W / tw), th=th, tw=tw)
    return x[:, :H, :W]


def tile_queries(Q, tile):
    """Each tile's query at row th//2, column tw//2, clamped to the grid: (F, H, W, D) -> (F, N, D)."""
    _, H, W, _ = Q.shape
    th, tw = tile
    rows = (torch.arange(0, H, th, device=Q.device) + th // 2).clamp(max=H - 1)
    cols = (torch.arange(0, W, tw, device=Q.device) + tw // 2).clamp(max=W - 1)
    return Q[:, rows][:, :, cols].flatten(1, 2)


def window_size(window, grid):
    """Rows and columns of an l×l window, at most the grid's; None: the grid's."""
    return grid if window is None else (min(window, grid[0]), min(window, grid[1]))


def window_centers(queries, keys, *, tau=1.0, center="soft"):
    """Centres of the tiles' windows: queries (P, N, D), keys (P, H, W, D) -> long (P, N, 2).

    "soft": the mean position under the query's attention (eqs. 1-2); "argmax": that of its best key (eq. 4).
    """
    *_, W, D = keys.shape
    logits = einsum(queries, keys, "p n d, p h w d -> p n h w").flatten(2)  # (P, N, S)
    if center == "argmax":
        return row_column(logits.argmax(-1), W)  # eq. 4's P_block + displacement is the best key's own place
    positions = row_column(torch.arange(logits.shape[-1], device=keys.device), W).to(logits.dtype)  # (S, 2)
    attention = (logits * (tau / D**0.5)).softmax(-1)  # (P, N, S)
    return (attention @ positions).round().long()


def window_indices(centers, grid, size):
    """Tokens row·W + column of the l×l windows (eq. 3), shifted, not cropped, to fit the grid: long (P, N, M)."""
    top = (centers[..., 0] - size[0] // 2).clamp(0, grid[0] - size[0])  # (P, N)
    left = (centers[..., 1] - size[1] // 2).clamp(0, grid[1] - size[1])  # (P, N)
    rows = top[..., None] + torch.arange(size[0], device=centers.device)  # (P, N, l)
    cols = left[..., None] + torch.arange(size[1], device=centers.device)  # (P, N, l)
    return (rows[..., :, None] * grid[1] + cols[..., None, :]).flatten(-2)


def window_attention(queries, K, anchors, targets, windows, tau):
    """Attention (P, N, M, T) of queries (F, N, T, D) of frames i (P,) over windows (P, N, M) of frames j (P,) of K.

    K (F, H, W, D). Returns the windows' keys (P, N, M, D), too.
    """
    _, H, W, D = K.shape
    # embedding, unlike indexing, scatters the many repeated gradients back fast.
    keys = embedding(targets[:, None, None] * (H * W) + windows, K.flatten(0, 2))  # (P, N, M, D)
    # m before t: the gradient of the keys comes out in their own memory order.
    logits = einsum(keys, queries[anchors], "p n m d, p n t d -> p n m t")
    return (logits * (tau / D**0.5)).softmax(-2), keys


def window_flow(queries, K, anchors, targets, windows, tokens, tau):
    """Flow Δ_ij (P, N, T, 2), the mean position under attention minus that of tokens (N, T, 2), and K̄ (P, N, D)."""
    attention, keys = window_attention(queries, K, anchors, targets, windows, tau)
    # Absolute positions: window-relative ones would lose the motion of the window itself.
    positions = row_column(windows, K.shape[2]).to(attention.dtype)  # (P, N, M, 2)
    return einsum(attention, positions, "p n m t, p n m c -> p n t c") - tokens, keys.mean(-2)


def frame_flow(Q, K, anchors, targets, tau):
    """Flow Δ_ij by attention over whole frames, as in DiTFlow: Q, K (F, H, W, D) -> (P, H, W, 2)."""
    _, H, W, D = K.shape
    queries = (Q[anchors] * (tau / D**0.5)).flatten(1, 2)  # (P, S, D)
    attention = (queries @ K[targets].flatten(1, 2).mT).softmax(-1)  # (P, S, S)
    positions = row_column(torch.arange(H * W, device=K.device), W).to(K.dtype)  # (S, 2)
    return (attention @ positions - positions).unflatten(1, (H, W))


def attention_motion_flow(Q, K, *, span=5, tile=(3, 4), window=21, tau=1.0, center="soft", max_logits=2**23):
    """AMF Δ_ij of all frame pairs of the span, searched in one l×l window per tile (Sec. 3.2, eqs. 1-5).

    Q, K: (F, H, W, D), head-averaged. Returns flow (P, H, W, 2) in tokens and key_mean K̄ (P, N, D), in frame_pairs'
    order, fp32 or better, also under autocast. window=None: the full-frame AMF of DiTFlow. No gradient flows through
    the choice of window. max_logits bounds what is held at once. Raises ValueError.
    """
    num_frames, H, W, _ = Q.shape
    if K.shape != Q.shape or num_frames < 2:
        raise ValueError("Q and K must have one shape and at least two frames")
    if span < 1 or window is not None and window < 1 or center not in ("soft", "argmax"):
        raise ValueError("span and window must be at least 1, center 'soft' or 'argmax'")
    Q, K = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (Q, K))  # bf16 loses sub-token accuracy
    size = window_size(window, (H, W))
    anchors, targets = frame_pairs(num_frames, span, Q.device)  # (P,) each
    chunk = max(1, max_logits // (H * W * math.prod(size)))  # pairs; each has a logit per token and window token
    pairs = list(zip(anchors.split(chunk), targets.split(chunk)))  # of (chunk,)
    autocast = torch.amp.is_autocast_available(Q.device.type)
    with torch.autocast(Q.device.type, enabled=False) if autocast else nullcontext():
        if size == (H, W):
            flow = torch.cat([frame_flow(Q, K, i, j, tau) for i, j in pairs])  # (P, H, W, 2)
            num_tiles = math.ceil(H / tile[0]) * math.ceil(W / tile[1])
            return flow, repeat(K.mean((1, 2))[targets], "p d -> p n d", n=num_tiles)  # (P, N, D)
        queries = tile_tokens(Q, tile)  # (F, N, T, D)
        representatives = tile_queries(Q, tile)  # (F, N, D)
        positions = row_column(torch.arange(H * W, device=Q.device), W).view(1, H, W, 2)  # (1, H, W, 2)
        tokens = tile_tokens(positions, tile)[0]  # (N, T, 2)
        readings = []
        for i, j in pairs:
            with torch.no_grad():
                centers = window_centers(representatives[i], K[j], tau=tau, center=center)  # (chunk, N, 2)
                windows = window_indices(centers, (H, W), size)  # (chunk, N, M)
            readings.append(recompute(window_flow, queries, K, i, j, windows, tokens, tau, use_reentrant=False,
                                      preserve_rng_state=False))  # fmt: skip
        flow, key_mean = map(torch.cat, zip(*readings))  # (P, N, T, 2), (P, N, D)
        return untile_tokens(flow, tile, (H, W)), key_mean  # flow (P, H, W, 2)


# ---- Losses and step-skip optimizer (Secs. 3.3 and 3.4) ----


def amf_loss(flow_ref, flow_gen, *, num_frames, span=5, alpha=0.2, weight=None):
    """L_AMF: weighted mean squared distance of two flows (P, H, W, 2), over pairs (eq. 5) and tokens (App. B.1).

    weight (H, W) or (P, H, W), not the paper's: how much each token counts.
    """
    anchors, targets = frame_pairs(num_frames, span, flow_gen.device)  # (P,) each
    distance = (flow_gen - flow_ref.detach()).square().sum(-1)  # (P, H, W)
    decay = 1 - alpha * (targets - anchors - 1).to(distance.dtype) / max(span - 1, 1)  # w_d of eq. 6: 1 … 1 − α
    distance = decay[:, None, None] * distance  # (P, H, W)
    if weight is None:
        return distance.mean()
    weight = weight.expand_as(distance)  # (P, H, W)
    return (distance * weight).sum() / weight.sum()


def window_loss(key_mean, *, num_frames, span=5, squared=False):
    """L_window: how much the mean key (P, N, D) of a tile's windows changes between targets (eq. 7).

    An anchor i has the targets i+1 … min(i+s_f−1, F−1), one fewer than eq. 3 (B.4). squared: eq. 7's, else B.4's norm.
    """
    pairs = list_pairs(num_frames, span)
    loss = key_mean.new_zeros(())
    for anchor in range(num_frames):
        path = [p for p, (i, j) in enumerate(pairs) if i == anchor and j - i < span]
        if len(path) > 1:
            change = key_mean[path].diff(dim=0)  # K̄_{i→i+2} − K̄_{i→i+1}, …: (targets−1, N, D)
            norm = change.square().sum(-1) if squared else torch.linalg.vector_norm(change, dim=-1)  # (targets−1, N)
            loss = loss + norm.mean()
    return loss / num_frames


def motion_losses(reference, generated, *, num_frames, config, weight=None):
    """L_total = λ_AMF·L_AMF + λ_window·L_window (eq. 8), L_AMF and L_window of two readings of motion_features."""
    flow_ref, _ = reference
    flow_gen, key_mean = generated
    amf = amf_loss(flow_ref, flow_gen, num_frames=num_frames, span=config.span, alpha=config.alpha, weight=weight)
    window = window_loss(key_mean, num_frames=num_frames, span=config.span, squared=config.squared)
    return config.lambda_amf * amf + config.lambda_window * window, amf, window


def optimize_latent(x, objective, *, steps=10, interval=3, lr=(0.003, 0.002)):
    """AdamW on the latent alone with a fresh gradient every `interval`-th step, reused between (eqs. 9-10).

    objective: x -> scalar, called ⌈steps/interval⌉ times. lr: first and last, linear in between. Returns a new x, fp32
    or better: bf16 never moves a third of it. Raises RuntimeError under torch.inference_mode.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([x])  # with the default weight decay, 0.01: the paper names none
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr[0] + (lr[1] - lr[0]) * step / max(steps - 1, 1)
        if step % interval == 0:
            # Else .grad stays: it is the gradient of eq. 9's surrogate loss x·g_cached.
            with torch.enable_grad():
                (x.grad,) = torch.autograd.grad(objective(x), x)
        optimizer.step()
    return x.detach()


# ---- Guided sampler (Algorithm 1) ----


def match_noise(latents, noise, sigma):
    """Clean latents at noise level sigma (Algorithm 1's MatchNoise)."""
    return (1 - sigma) * latents + sigma * noise


def pool_latents(x, sigma, patch):
    """Latents (1, C, F, h, w) at sigma pooled by 2, cropped to whole tokens, and the noise level σ′ that they have."""
    x = avg_pool2d(x[0], 2)[None]  # (1, C, F, h/2, w/2)
    h, w = (side // length * length for side, length in zip(x.shape[3:], patch[1:]))
    scale = (1 - sigma) + sigma / 2  # the mean of four leaves half of the noise
    return x[..., :h, :w] / scale, sigma / 2 / scale


def read_qk(dit, x, sigma, context, block, **options):
    """Head-averaged Q, K (F, H, W, D) of a block; x (1, C, F, h, w) is at noise level sigma. options: of DiT.qk."""
    grid = [length // patch for length, patch in zip(x.shape[2:], dit.patch_size)]
    t = torch.full((1,), 1000 * sigma, device=x.device)  # (1,)
    q, k = dit.qk(x, t, context, block, **options)  # (1, F·H·W, heads, D) each
    return head_average(q[0], grid), head_average(k[0], grid)


def motion_features(dit, x, sigma, context, config, **options):
    """attention_motion_flow of latents, which motion_losses compares; arguments as of read_qk."""
    Q, K = read_qk(dit, x, sigma, context, config.block, **options)
    return attention_motion_flow(Q, K, span=config.span, tile=config.tile, window=config.window, tau=config.tau,
                                 center=config.center)  # fmt: skip


def euler_step(velocity, x, sigma, next_sigma):
    """Latents at next_sigma from those at sigma; velocity(x, sigma) has CFG inside."""
    return x + (next_sigma - sigma) * velocity(x, sigma)


def guided_steps(num_steps, config):
    """How many of the first denoising steps are guided."""
    return math.ceil(config.guided_fraction * num_steps - 1e-9)  # 0.07·100 is 7.000000000000001


def coarse_steps(guided, config):
    """How many of the first guided steps are read on pooled latents."""
    return round(config.coarse * guided)


def guide(x, sigma, reference, read, losses, config, num_frames):
    """Algorithm 1's Optimization: x, moved towards the reference's reading, and losses (gradients, scalars)."""
    history = []

    def objective(x):
        scalars = losses(reference, read(x, sigma), num_frames=num_frames, config=config)
        history.append(torch.stack(scalars).detach())
        return scalars[0]

    x = optimize_latent(x, objective, steps=config.inner_steps, interval=config.interval, lr=config.lr)
    return x, torch.stack(history)


@torch.no_grad()
def sample(dit, noise, sigmas, context, negative, *, cfg_scale=5.8, reference=None, null=None, config=MotionConfig(),
           features=motion_features, losses=motion_losses, step=euler_step, checkpoint=False,
           callback=lambda number, x, history, clean: None):  # fmt: skip
    """Sample latents; the first steps also optimise them until their motion is the reference's (Algorithm 1).

    dit: as wan_min.DiT, callable and with qk and patch_size. noise (1, C, F, h, w); sigmas (steps+1,) down to 0;
    context, negative, null (1, L, text_dim): target, negative and empty prompt. reference: clean latents or None.
    features, losses, step: called as the defaults; losses returns a tuple of scalars and the first is minimised.
    Guidance moves x between steps: a multistep step that gets another x than it returned must drop its earlier
    velocities. checkpoint: see DiT.qk. callback(number, x, history, clean) follows each step: history is guide's
    losses, clean the clip that shows through x.
    """
    if reference is not None and (null is None or reference.shape != noise.shape or len(noise) > 1):
        raise ValueError("a reference needs the noise's shape, a single clip, and null, the empty prompt")
    sigmas = sigmas.tolist()
    noise = noise.float()
    guided = 0 if reference is None else guided_steps(len(sigmas) - 1, config)
    coarse = coarse_steps(guided, config)
    x = noise if reference is None else match_noise(reference.float(), noise, sigmas[0])  # (1, C, F, h, w)

    def read(number, x, sigma, context, **options):
        if number < coarse:
            x, sigma = pool_latents(x, sigma, dit.patch_size)
        return features(dit, x, sigma, context, config, **options)

    def velocity(x, sigma):
        t = torch.full((1,), 1000 * sigma, device=x.device)
        v = dit(x, t, context)  # (1, C, F, h, w)
        if cfg_scale == 1:
            return v
        v_negative = dit(x, t, negative)
        return v_negative + cfg_scale * (v - v_negative)

    for number, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
        history = None
        if number < guided:
            if number in (0, coarse) or config.ref_noise == "match":
                level = sigma if config.ref_noise == "match" else config.ref_noise
                reading = read(number, match_noise(reference.float(), noise, level), level, null)
            read_result = partial(read, number, context=context, checkpoint=checkpoint)
            x, history = guide(x, sigma, reading, read_result, losses, config, x.shape[2] // dit.patch_size[0])
        before, x = x, step(velocity, x, sigma, next_sigma)
        clean = before + (x - before) * (sigma / (sigma - next_sigma or 1))  # x − σ·v, by the step's own v
        callback(number, x, history, clean)
    return x


# ---- The run: video in and out ----

import argparse
import importlib
import inspect
import json
import logging
import re
import tempfile
from collections import deque
from itertools import islice
from pathlib import Path
from textwrap import shorten

import numpy as np
from filelock import FileLock, Timeout
from imageio.v3 import imwrite
from imageio_ffmpeg import count_frames_and_secs, read_frames
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm import tqdm

import wan_min

DEMO = "testsrc2=r=16,loop=-1:1,scroll=h=-1/80:v=-1/80"  # a picture slides right and down
SCALER = "bicubic+accurate_rnd+full_chroma_int"  # ffmpeg's default turns colours a level darker
logging.getLogger("imageio_ffmpeg").setLevel("ERROR")  # it warns when a video changes its size


def open_video(path, options, filters):
    """A video's description, and its frames as RGBA bytes."""
    source = DEMO if path == "demo" else os.path.abspath(path)  # else a name may be read as a URL
    inputs = ["-reinit_filter", "0", *options]  # or time starts anew where the size changes
    # An AVIF's animation is the stream with a language; that of its alpha is stream 3.
    streams = ["0:V:m:language", "-map", "-0:3"] if source.lower().endswith(".avif") else ["0:V:0"]
    filters = ",".join(["scale=iw*sar:ih", *filter(None, filters)])
    outputs = ["-map", *streams, "-sws_flags", SCALER, "-vf", filters]
    try:
        frames = read_frames(source, "rgba", 4, inputs, outputs)
        return next(frames), frames
    except OSError as error:
        # The first line of the log that names a cause.
        cause = re.search(r"(?m)^(?:\[.*\] )?(?!Input)(\S.*(?:rror|nvalid|no streams|No such).*)|\Z", str(error))[1]
        raise UserError(f"cannot read {path} ({cause or 'no frame can be decoded'})") from None


def decode_frames(path, size, fps, start, turn):
    """A video's own rate, and its frames at fps, covering the size: iterator of RGBA (H, W, 4)."""
    seek = max(start - 10, 0) if re.search(r"(?i)\.(mp4|mov|mkv|webm)$", str(path)) else 0  # others may lack an index
    options = ["-f", "lavfi"] if path == "demo" else []
    options += ["-ss", f"{seek:f}"] if seek else []
    about, _ = open_video(path, options, [])
    width, height = about["size"]
    rows, cols = size[::-1] if turn and height > width else size
    codec = about["codec"][:3]
    options += {"vp8": ["-c:v", "libvpx"], "vp9": ["-c:v", "libvpx-vp9"]}.get(codec, [])  # those decode alpha
    skipped, phase = divmod(start - seek, 1 / fps)
    pixels = about["pix_fmt"]
    untagged = re.match(r"yuv(?!.*[( ](bt|smpte))", pixels)
    hdr = re.search("smpte2084|arib-std-b67", pixels)  # PQ, HLG
    filters = [
        pixels.startswith("pal8") and "format=gbrap",  # or its alpha is lost
        untagged and width * height > 1024 * 576 and "setparams=colorspace=bt709",
        # A delay of one tick means ten, as in browsers.
        codec == "gif" and "setpts=if(N\\,PREV_OUTPTS+if(eq(PTS-PREV_INPTS\\,1)\\,10\\,PTS-PREV_INPTS)\\,PTS)",
        "bwdif=send_frame:auto:interlaced",
        f"settb=1/705600000,setpts=round(PTS-{0 if seek else 'STARTPTS'}-{phase}/TB)",  # exact at the usual rates
        f"fps={fps}:start_time=0",
        hdr and "zscale=npl=203:p=bt709:t=bt709:m=bt709:agamma=0",  # white is 203 cd/m² (BT.2408), brighter clips
        f"scale=max({cols}\\,round({rows}*a)):max({rows}\\,round({cols}/a)),format=rgba,crop={cols}:{rows}",
    ]
    _, frames = open_video(path, options, filters)
    frames = islice(frames, int(skipped), None)
    return about["fps"], (np.frombuffer(frame, np.uint8).reshape(rows, cols, 4) for frame in frames)


def open_picture(file):
    """A Pillow image, upright, of at most 8 bits a channel. Raises UserError."""
    try:
        image = ImageOps.exif_transpose(Image.open(file))
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read {file} ({error})") from None
    return image.point(lambda x: x / 256) if image.mode[0] == "I" else image  # convert() would clip 16 bits


def read_pictures(path, size, fps, start, turn):
    """The same frames of a folder's pictures, one a frame."""
    files, others = [], []
    for file in Path(path).glob("[!.]*"):
        (files if file.suffix.lower() in Image.registered_extensions() else others).append(file)
    if others:
        print(f"skipped in {path}: {len(others)} files that Pillow does not read, as {others[0].name}")
    if len({file.stem for file in files}) < len(files):
        print(f"some files in {path} differ in their ending only: each is read as a frame")
    files.sort(key=lambda file: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", file.name)])
    for n, file in enumerate(files[round(start * fps) :]):
        image = open_picture(file)
        size = size[::-1] if n == 0 and turn and image.height > image.width else size
        yield np.array(ImageOps.fit(image.convert("RGBA"), size[::-1]))


def read_video(path, num_frames, size, *, fps=16.0, start=0.0, turn=False):
    """At most num_frames frames, cut to 4k+1, from `start` seconds, `fps` a second: fp32 (1, 3, T, H, W) in [-1, 1].

    path: a video, a folder of pictures in natural order, or "demo". size is covered, and turned for a portrait
    reference if `turn`. Raises UserError, also for under 5 frames.
    """
    if path == "demo" or os.path.isfile(path):
        rate, frames = decode_frames(path, size, fps, start, turn)
    elif os.path.isdir(path):
        rate, frames = fps, read_pictures(path, size, fps, start, turn)
    else:
        raise UserError(f"cannot read {path} (not a file or a folder)")
    frames = list(islice(frames, num_frames))
    if len(frames) < 5:
        count = f"{len(frames)} frames from {start:g} s at --fps {fps:g}, fewer than 5"
        raise UserError(f"{path} has {count}" + f"; its own rate is {rate:g}" * (rate != fps))
    frames = torch.from_numpy(np.stack(frames[: (len(frames) - 1) // 4 * 4 + 1]))
    color, alpha = rearrange(frames, "t h w c -> 1 c t h w").split([3, 1], dim=1)
    return (color / 127.5 - 1) * (alpha / 255)  # on mid grey


def scratch(path):
    """A hidden folder, on the disk of a file or of what a symbolic link leads to, for what is not whole yet."""
    return tempfile.TemporaryDirectory(prefix=".fastvmt-", dir=os.path.dirname(os.path.realpath(path)))


@contextmanager
def claimed(path):
    """Keep other runs off a name, at most until this process ends. Raises UserError where another has it."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run has {path}: give another --out, or wait") from None
    except (OSError, NotImplementedError):
        pass  # some disks have no locks
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows the release unlinks it
            os.unlink(lock.lock_file)
        lock.release()


def write_video(path, video, fps, comment=""):
    """Write (1, 3, T, H, W) in [-1, 1] as H.264 mp4, the whole or nothing. Raises UserError."""
    frames = rearrange(video[0], "c t h w -> t h w c")
    frames = [((frame.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy() for frame in frames]
    color = f"scale=out_color_matrix=bt709:out_range=tv:flags={SCALER},setparams=color_primaries=bt709:color_trc=bt709"
    try:
        with scratch(path) as folder:
            part, text = Path(folder, "video.mp4"), Path(folder, "comment")
            text.write_bytes(os.fsencode(f"comment={comment}"))  # it may be too long for a command line
            options = ["-vf", color, "-crf", "17", "-movflags", "+faststart", "-/metadata", str(text)]
            imwrite(part, frames, plugin="FFMPEG", fps=fps, macro_block_size=1, output_params=options)
            count_frames_and_secs(part)  # fails where ffmpeg did; imageio is silent
            part.replace(os.path.realpath(path))
    except (OSError, RuntimeError) as error:
        reason = f"{str(error).splitlines()[0]}); is the disk full, or ffmpeg older than 7?"
        raise UserError(f"cannot write {path} ({reason}") from None


def keep_latents(latents, *paths):
    """Save latents under the first of the paths that takes them, the whole or nothing. Returns that, or None."""
    data = save({"result": latents.cpu()})
    for path in paths:
        try:
            with scratch(path) as folder:
                part = Path(folder, "latents")
                part.write_bytes(data)
                part.replace(path)
            print(f"latents kept in {path}; if decoding fails, the same flags and --decode {path} finish it")
            return path
        except OSError as error:
            print(f"cannot write {path}, {len(data)} bytes ({error.strerror})")


# ---- Command line ----

PRESETS = {
    "paper": dict(ref_noise="match", vae_tiles=True),  # Sec. 4.1, where Sec. 3.2 differs
    # The authors' example, whose L_AMF sums over the 1560 tokens of 480x832.
    "release": dict(ref_noise="match", strength=0.75, span=3, alpha=1 / 7, lambda_window=1 / 1560, lr=(0.003, 0.0021),
                    fps=15.0, vae_tiles=True),
    "fast": dict(coarse=0.5, interval=20, velocity_interval=3),  # chosen on lab/toy.py
}  # fmt: skip


def HxW(text):  # argparse shows these names
    height, width = map(int, text.lower().split("x"))
    return height, width


def number_or_word(text):
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return None if text == "none" else text


def build_parser(required=False):
    parser = argparse.ArgumentParser("fastvmt.py", "%(prog)s [flags]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.description = "Give a video of the prompt the motion of a reference video."

    def error(message):
        raise UserError(re.sub(r"(--\S+)(: .* one argument)", r"\1\2, or \1=… if that begins with a dash", message))

    def add(name, default, text, **options):
        if default is False:
            options.setdefault("action", "store_true")
        elif isinstance(default, (int, float, tuple)):
            options["type"] = number_or_word
        if isinstance(default, tuple):
            options["nargs"] = len(default) or "*"
        group.add_argument(name, default=default, help=text.replace("%", "%%"), **options)

    parser.error = error
    group = parser.add_argument_group("in and out")
    add("--ref", None, "reference: a video, a folder of pictures, or 'demo'", required=required)
    add("--prompt", None, "what the new video shows", required=required)
    add("--out", Path("out.mp4"), "mp4 to write", type=Path)
    add("--preview", False, "show the result so far in OUT.preview.gif")
    add("--mask", None, "white where the reference's motion counts: a picture, or like --ref", type=Path)
    add("--no-transfer", False, "generate plainly, from pure noise")
    add("--decode", None, "latents that a stopped run kept; its flags finish it, and delete them", type=Path)

    group = parser.add_argument_group("model and memory")
    add("--model", "1.3B", "1.3B, 14B, a folder, a DiT's file, a hub repo id, diffusers:ID, toy, or tiny (random)")
    add("--lora", None, "LoRA file, for a diffusers: model", type=Path)
    add("--preset", None, "settings of the paper, of its release, or for speed", choices=PRESETS)
    add("--checkpoint", "auto", "recompute blocks in the backward pass", choices=["auto", "on", "off"])
    add("--offload", False, "stream the weights from host memory")
    add("--vae-tiles", False, "for the VAE, of 30x52 latents", action=argparse.BooleanOptionalAction)
    add("--compile", False, "torch.compile the DiT's blocks; not with --offload")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add("--device", device, "torch device")
    add("--dtype", None, "of the DiT; else bf16 on a GPU, fp32 on CPU", choices=["bf16", "fp32"])

    group = parser.add_argument_group("the method")
    texts = dict(re.findall(r"(?m)^ +(\w+): .*?  # (.*)$", inspect.getsource(MotionConfig)))  # its comments
    for f in fields(MotionConfig):
        add("--" + f.name.replace("_", "-"), f.default, texts.get(f.name, ""))

    group = parser.add_argument_group("clip and sampling")
    add("--size", None, "rows x columns, in 16s or the model's; else its own, turned as the reference", type=HxW)
    add("--frames", 81, "at most, rounded down to 4k+1 (Sec. 4.1)")
    add("--fps", None, "of reference and result; else the model's own", type=number_or_word)
    add("--start", 0.0, "seconds into the reference")
    add("--seed", 0, "of the initial noise, the same on every device")
    add("--negative-prompt", "", "what to avoid; else the model's own")
    add("--steps", 50, "denoising steps (Sec. 4.1)")
    add("--shift", 7.0, "timestep shift (authors' code)")
    add("--cfg-scale", 5.8, "classifier-free guidance scale (authors' code)")
    add("--velocity-interval", 1, "compute every n-th after the guided steps, and extrapolate")
    add("--strength", 1.0, "below 1: start from the noised reference")
    return parser


def parse_arguments(argv, parser=None, **options):
    """Flags, MotionConfig and wan_min.Model. Flags override the preset, the preset the model's defaults."""
    parser = parser or build_parser()

    def parse():
        args = parser.parse_args(argv)
        check_limits(vars(args), size=(32, 10**4, None), frames=(5, 10**4), fps=(1.0, 240.0, None), start=(0.0, 1e6),
                     seed=(0, 2**63 - 1), steps=(1, 10**4), shift=(0.001, 1000.0), cfg_scale=(-1e9, 1e9),
                     velocity_interval=(1, 10**4), strength=(0.001, 1.0))  # fmt: skip
        settings = {f.name: getattr(args, f.name) for f in fields(MotionConfig)}
        return args, MotionConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()})

    args, _ = parse()  # what is wrong in itself is reported before a model is looked for
    try:
        probe = torch.ones(1, device=args.device)
        probe.item()  # "meta" has none
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device {args.device} cannot be used ({shorten(str(error), 200)})") from None
    full = args.dtype == "fp32" or args.dtype is None and probe.is_cpu
    dtype = torch.float32 if full else torch.bfloat16
    source = "lab.toy" if args.model == "toy" else "wan_min"
    if args.model.startswith("diffusers:"):
        source, options["lora"] = "lab.diffusers_model", args.lora
    elif args.lora:
        raise UserError("--lora is for diffusers: models")
    model = importlib.import_module(source).open_model(args.model, probe.device, dtype, offload=args.offload, **options)
    parser.set_defaults(**model.defaults | PRESETS.get(args.preset, {}))
    args, config = parse()
    check_limits(vars(args), block=(1, model.blocks))
    return args, config, model


def canvas(args, model):
    """Rows and columns of the result, and whether a portrait reference turns them."""
    if args.size:
        unit = 1 if args.size in model.canvases else model.multiple
        return tuple(round(side / unit) * unit for side in args.size), False
    return model.canvases[0], model.canvases[0][::-1] in model.canvases


def check_arguments(args, kept):
    """UserError or OSError for what is wrong before anything is loaded."""
    if not args.prompt.strip() or len(args.prompt + args.negative_prompt) > 10_000:
        raise UserError("the prompt is empty or, with the negative one, over 10,000 characters")
    if args.compile and args.offload:
        raise UserError("--compile and --offload exclude each other")
    same = os.path.exists(args.ref) and os.path.exists(args.out) and os.path.samefile(args.ref, args.out)
    if args.out.suffix.lower() != ".mp4" or same:
        raise UserError("--out must end in .mp4, and not be the reference")
    for path in (kept, args.out):
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder")
        try:
            with scratch(path) as folder:
                Path(folder, path.name).touch()
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror})") from None


def reuse_velocities(step, computed):
    """Wrap a step: of each next one computed says whether it computes velocities; the others extend their line."""
    computed = iter(computed)
    known = deque(maxlen=2)  # (σ, velocity)

    def reusing(velocity, x, sigma, next_sigma):
        fresh = next(computed)

        def kept(x, sigma):
            if fresh:
                known.append((sigma, velocity(x, sigma)))
            (first, v), (last, w) = known[0], known[-1]
            ahead = (sigma - last) / (last - first) if first != last else 0
            return w + ahead * (w - v)

        return step(kept, x, sigma, next_sigma)

    return reusing


def generate(args, config, dit, noise, contexts, reference, step=euler_step, watch=None, **seams):
    """Latents, guided if there is a reference; watch(clean) follows each guided and every fifth step."""
    sigmas = wan_min.flow_sigmas(args.steps, args.shift, 1.0 if reference is None else args.strength)
    guided = guided_steps(args.steps, config)
    computed = [n < guided or (n - guided) % args.velocity_interval == 0 for n in range(args.steps)]
    costs = [fresh * (1 if args.cfg_scale == 1 else 2) for fresh in computed]  # of each step, in passes of the DiT
    told = f"{args.steps} steps, {sum(costs)} passes"
    if guided and reference is not None:
        gradients = math.ceil(config.inner_steps / config.interval)
        told += f"; 1 to {guided} guided, σ {sigmas[0]:.3f} to {sigmas[guided - 1]:.3f}"
        told += f", gradients: {guided * gradients}"
        # A gradient takes a GPU 3 times as long as its blocks, a coarse one a seventh of that.
        cost = 3 * gradients * config.block / len(dit.blocks)
        for n in range(guided):
            costs[n] += cost / 7 if n < coarse_steps(guided, config) else cost
    print(told)

    def attempt(checkpoint):
        return sample(dit, noise, sigmas, *contexts[:2], cfg_scale=args.cfg_scale, reference=reference,
                      null=contexts[2], config=config, checkpoint=checkpoint, callback=callback,
                      step=reuse_velocities(step, computed), **seams)  # fmt: skip

    def callback(number, x, history, clean):
        if not torch.isfinite(x).all():
            raise UserError(f"the latent is not finite after step {number + 1} of {args.steps}; try --dtype fp32")
        loss = {} if history is None else {"loss": history[-1, 0].item()}
        bar.set_postfix({"step": f"{number + 1}/{args.steps}"} | loss, refresh=False)
        bar.update(sum(costs[: number + 1]) - bar.n)
        if watch and (loss or number % 5 == 4):
            watch(clean)

    checkpoint = "full" if args.offload else args.checkpoint == "on"
    with tqdm(total=sum(costs), desc="sampling", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
              mininterval=1 if sys.stderr.isatty() else 60) as bar:  # fmt: skip
        try:
            return attempt(checkpoint)
        except RuntimeError as error:
            if checkpoint or args.checkpoint == "off" or reference is None or not wan_min.out_of_memory(error):
                raise
        print("out of memory: again with --checkpoint on")  # the failed attempt's tensors are freed
        return attempt(True)


@torch.no_grad()
def run(args, config, model, **seams):
    """From reference to written video; seams: features, losses and step of `sample`."""
    kept = args.decode or args.out.parent / f"{args.out.stem}.latents.safetensors"
    check_arguments(args, kept)
    with claimed(args.out), claimed(kept):
        transfer(args, config, model, kept, **seams)


def transfer(args, config, model, kept, **seams):
    """What run does once its names are its own."""
    if kept.exists() and not args.decode:
        raise UserError(f"{kept} is what a stopped run kept: --decode, move or delete it")
    size, turn = canvas(args, model)
    fps = args.fps or model.fps
    read = args.ref == "demo" and model.demo or read_video
    video = read(args.ref, args.frames, size, fps=fps, start=args.start, turn=turn)  # (1, 3, T, H, W)
    frames = video.shape[2]
    extras = (args.mask or args.preview) and not args.decode
    prepare = importlib.import_module("lab.extras").prepare(args, video, fps) if extras else lambda reference: {}
    if frames < args.frames - 3:
        print(f"only {frames} frames: the reference is shorter than --frames")
    if frames > model.max_frames:
        print(f"the model was trained on clips of up to {model.max_frames} frames")
    if args.size and args.size != size:
        print("--size is rounded to {}x{}".format(*size))
    if size == model.canvases[0][::-1]:
        print("--size is rows x columns: this is a portrait video")
    if not args.decode:
        print("encoding the prompts")
        contexts = model.encode_prompts([args.prompt, args.negative_prompt, ""]).split(1)
    print("encoding the reference, {} frames of {}x{} at {:g} fps".format(*video.shape[2:], fps))
    codec = model.load_codec(args.vae_tiles)
    progress = partial(tqdm, leave=False, disable=None)
    reference = codec.encode(video.to(args.device), progress=progress)
    if args.decode:
        latents = load(kept.read_bytes()).get("result", reference[0]).to(reference)
        if latents.shape != reference.shape:
            raise UserError(f"{kept} holds no latents of this --ref, --frames and --size")
    else:
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(args.seed)).to(args.device)
        print("loading the DiT")
        dit = model.load_dit(progress)
        for block in dit.blocks if args.compile else ():
            block.compile()
        seams = prepare(reference) | seams
        latents = generate(args, config, dit, noise, contexts, None if args.no_transfer else reference, **seams)
        del dit  # the decoder needs the memory
        kept = keep_latents(latents, kept, Path(tempfile.gettempdir(), f"{os.getpid()}.latents.safetensors"))
    result = codec.decode(latents, progress=progress)
    record = vars(args) | dict(program="FastVMT", torch=torch.__version__, vae_tiles=codec.vae_tiles, ai_generated=True)
    record["ref"] = os.path.basename(args.ref)
    write_video(args.out, result, fps, json.dumps(record, default=os.path.basename))
    if kept:
        kept.unlink()
    print(f"wrote {args.out}")


def explain(error):
    """Exit code and one line for what the user can fix; raises any other error."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, (UserError, wan_min.ModelError, OSError, SafetensorError, ModuleNotFoundError)):
        return 2, " ".join(str(error).split())
    if wan_min.out_of_memory(error):
        return 1, "out of memory; try in turn --checkpoint on, --offload, --coarse 1, fewer --frames, less --size"
    raise error


def main(argv=None, **seams):
    """The command line; seams as of `run`. Returns the exit code."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # a windowed Python has none
    try:
        run(*parse_arguments(argv, build_parser(required=True)), **seams)
        return 0
    except BrokenPipeError:  # as of `| head`
        return 1
    except BaseException as error:
        code, text = explain(error)
        print(f"fastvmt: {text}", file=sys.stderr)
        return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace", line_buffering=True)  # a console may not know σ
    code = 130
    with suppress(KeyboardInterrupt):  # the second one
        code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
