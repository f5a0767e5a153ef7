"""FastVMT: training-free video motion transfer on Wan 2.1, in one file.

Paper: "FastVMT: Eliminating Redundancy in Video Motion Transfer" (arXiv 2602.05551v2). Equation, section and appendix
numbers below are its. Top to bottom: settings, tiles and windows, attention motion flow (AMF), the two losses, the
step-skip optimizer, the guided sampler. Under them the run that uses these: video in and out, seeing the motion,
command line.

Everything above the sampler is pure tensor code that needs torch and einops only: copy what you need. Shapes in
comments: F latent frames, H×W token grid of a frame, S = H·W, D head dimension, P frame pairs, N tiles (the paper's P),
T tokens a tile, M window tokens. All positions and flows are (row, column) in tokens.
"""

# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import asdict, dataclass, field, fields
from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.utils.checkpoint import checkpoint as recompute

# ---- Settings --------------------------------------------------------------------------------------------------------


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MotionConfig:
    """The method's numbers; the defaults are the paper's. Each field is also a command line flag.

    Raises ValueError for a number that the method cannot work with.
    """

    block: int = setting(15, "DiT block, counted from 1, whose self-attention Q and K are read (Sec. 4.1)")
    tile: tuple = setting((3, 4), "rows and columns of a tile, in tokens (App. B.1)")
    window: int | None = setting(21, "side l of the search window in tokens; None: the whole frame (eq. 3, App. B.1)")
    span: int = setting(5, "temporal span s_f: largest frame distance of a pair (eq. 3, App. B.1)")
    tau: float = setting(1.0, "temperature τ that multiplies the attention logits (eq. 1, App. B.1)")
    center: str = setting("soft", "window centre: 'soft' mean position (eq. 2) or 'argmax' (eq. 4)")
    alpha: float = setting(0.2, "decay α of the pair weights with frame distance (eq. 6)")
    lambda_amf: float = setting(5.0, "weight of the AMF loss (eq. 8)")
    lambda_window: float = setting(1.0, "weight of the corresponding-window loss (eq. 8)")
    squared: bool = setting(False, "square the window loss's norm as in eq. 7, not as in App. B.4")
    guided_fraction: float = setting(0.2, "first part of the denoising steps that is guided (Sec. 4.1)")
    inner_steps: int = setting(10, "optimizer steps J in a guided step (Sec. 4.1)")
    interval: int = setting(3, "compute the gradient every Δ-th inner step, reuse it between (eq. 9, App. B.1)")
    lr: tuple = setting((0.003, 0.002), "first and last learning rate of the inner steps, linear (Sec. 4.1)")
    ref_noise: float | str = setting(
        0.0, "noise level σ at which the reference's features are read: 0, clean (Sec. 3.2), or 'match' (Alg. 1)"
    )

    def __post_init__(self):
        counts = (self.block, *self.tile, self.span, self.inner_steps, self.interval, self.window or 1)
        if self.window == 0 or min(counts) < 1:
            raise ValueError("block, tile, window, span, inner_steps and interval must be at least 1")
        if self.center not in ("soft", "argmax"):
            raise ValueError(f"center must be 'soft' or 'argmax', not {self.center!r}")
        if self.ref_noise != "match" and not (isinstance(self.ref_noise, (int, float)) and 0 <= self.ref_noise <= 1):
            raise ValueError(f"ref_noise must be a noise level from 0 to 1 or 'match', not {self.ref_noise!r}")
        if not 0 <= self.guided_fraction <= 1:
            raise ValueError(f"guided_fraction must be from 0 to 1, not {self.guided_fraction}")

    @property
    def flow_settings(self):
        """The settings that attention_motion_flow takes, by name."""
        return {name: getattr(self, name) for name in ("span", "tile", "window", "tau", "center")}


# ---- Tiles and windows (Sec. 3.2) ------------------------------------------------------------------------------------


def head_average(x, grid):
    """Mean over heads of q or k (App. B.4): x (F·H·W, heads, D), grid (F, H, W) -> (F, H, W, D), fp32 or better."""
    f, h, w = grid
    x = x.mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return rearrange(x, "(f h w) d -> f h w d", f=f, h=h, w=w)


def frame_pairs(num_frames, span, device=None):
    """Pairs {(i, j): 1 ≤ j−i ≤ span} (eqs. 3, 5): two long (P,), ordered by offset j−i, then by anchor i.

    i = j is in eq. 3's window but carries no motion.
    """
    pairs = [(i, i + d) for d in range(1, min(span + 1, num_frames)) for i in range(num_frames - d)]
    return torch.tensor(pairs, device=device).unbind(1)


def row_column(index, width):
    """Flat token index -> position: (...) long -> (..., 2) long."""
    return torch.stack([index // width, index % width], dim=-1)


def tile_tokens(x, tile):
    """(F, H, W, C) -> (F, N, T, C): tokens grouped by tile, tiles row-major; edge tiles are filled up with zeros."""
    (_, H, W, _), (th, tw) = x.shape, tile
    x = F.pad(x, (0, 0, 0, -W % tw, 0, -H % th))
    return rearrange(x, "f (a th) (b tw) c -> f (a b) (th tw) c", th=th, tw=tw)


def untile_tokens(x, tile, grid):
    """Inverse of tile_tokens: (P, N, T, C), grid (H, W) -> (P, H, W, C)."""
    (H, W), (th, tw) = grid, tile
    x = rearrange(x, "p (a b) (th tw) c -> p (a th) (b tw) c", b=math.ceil(W / tw), th=th, tw=tw)
    return x[:, :H, :W]


def tile_queries(Q, tile):
    """The query that represents each tile, at its row th//2 and column tw//2, clamped to the grid (Sec. 3.2).

    (F, H, W, D) -> (F, N, D).
    """
    (_, H, W, _), (th, tw) = Q.shape, tile
    rows = (torch.arange(0, H, th, device=Q.device) + th // 2).clamp(max=H - 1)
    cols = (torch.arange(0, W, tw, device=Q.device) + tw // 2).clamp(max=W - 1)
    return rearrange(Q[:, rows][:, :, cols], "f a b d -> f (a b) d")


def window_centers(queries, keys, *, tau=1.0, center="soft"):
    """Where each tile's window is centred (eqs. 1, 2 and 4): (P, N, D), (P, H, W, D) -> long (P, N, 2).

    center="soft": the mean position under the tile query's attention (eq. 2), rounded to a token; "argmax": the
    position of its best key (eq. 4, whose P_block plus displacement is that position).
    """
    *_, W, D = keys.shape
    logits = einsum(queries, keys, "p n d, p h w d -> p n h w").flatten(2)
    if center == "argmax":
        return row_column(logits.argmax(-1), W)
    positions = row_column(torch.arange(logits.shape[-1], device=keys.device), W).to(logits.dtype)  # (S, 2)
    return ((logits * (tau / D**0.5)).softmax(-1) @ positions).round().long()


def window_origins(centers, grid, size):
    """First row and column of the windows (eq. 3), shifted, not cropped, to lie in the grid: long (P, N, 2)."""
    rows = (centers[..., 0] - size[0] // 2).clamp(0, grid[0] - size[0])
    cols = (centers[..., 1] - size[1] // 2).clamp(0, grid[1] - size[1])
    return torch.stack([rows, cols], dim=-1)


def window_indices(origins, grid, size):
    """Flat token indices row·W + column of the windows at origins (P, N, 2): long (P, N, M), row-major."""
    rows = origins[..., 0, None] + torch.arange(size[0], device=origins.device)  # (P, N, l)
    cols = origins[..., 1, None] + torch.arange(size[1], device=origins.device)
    return (rows[..., :, None] * grid[1] + cols[..., None, :]).flatten(-2)


def window_means(K, origins, j, size):
    """Mean key K̄ of each pair's windows on frame j (App. B.4): (F, H, W, D), (P, N, 2), (P,) -> (P, N, D)."""
    K = rearrange(K, "f h w d -> f d h w")
    # The mean of every possible window by two box filters: cheaper than averaging the P·N windows one by one.
    means = F.avg_pool2d(F.avg_pool2d(K, (size[0], 1), stride=1), (1, size[1]), stride=1)
    return rearrange(means, "f d h w -> f h w d")[j[:, None], origins[..., 0], origins[..., 1]]


# ---- Attention motion flow (Sec. 3.2, eq. 5) -------------------------------------------------------------------------


def window_attention(queries, K, pairs, windows, tau):
    """Attention of each token over its tile's window: (P, N, M, T), a softmax over M.

    queries (F, N, T, D) of frames i, K (F, H, W, D) of frames j, pairs (i, j), windows (P, N, M) as window_indices.
    """
    (i, j), (_, H, W, D) = pairs, K.shape
    # F.embedding gathers rows and, unlike indexing, scatters their many repeated gradients back fast.
    keys = F.embedding(j[:, None, None] * (H * W) + windows, K.flatten(0, 2))  # (P, N, M, D)
    # Window by tile, not tile by window: the gradient of the keys then comes out in their own memory order.
    logits = einsum(keys, queries[i], "p n m d, p n t d -> p n m t")
    return (logits * (tau / D**0.5)).softmax(-2)


def expected_positions(queries, K, pairs, windows, tau):
    """Attention-weighted mean position of each token's match: (P, N, T, 2); arguments as of window_attention.

    Positions are absolute: window-relative ones would lose the motion of the window itself.
    """
    attention = window_attention(queries, K, pairs, windows, tau)
    positions = row_column(windows, K.shape[2]).to(attention.dtype)  # (P, N, M, 2)
    return einsum(attention, positions, "p n m t, p n m c -> p n t c")


def relative_entropy(queries, K, pairs, windows, tau):
    """Entropy of each token's attention over its window, 1 where it is uniform: (P, N, T, 1)."""
    attention = window_attention(queries, K, pairs, windows, tau)
    return torch.special.entr(attention).sum(-2)[..., None] / math.log(max(windows.shape[-1], 2))


def search_windows(read, Q, K, *, span=5, tile=(3, 4), window=21, tau=1.0, center="soft", max_elements=2**25):
    """Place one l×l window per tile and pair (eqs. 1-4), and `read` what each token's attention finds in it.

    Q, K: (F, H, W, D), F ≥ 2, head-averaged. read: expected_positions, or alike with (P, N, T, C). Returns what was
    read (P, H, W, C), and the windows' mean keys K̄ (P, N, D), fp32 or better; pairs in frame_pairs' order, tiles
    row-major. Gradients flow to Q and K, not through the choice of window. Costs P·S·M·D. Pairs are taken in chunks
    and redone in the backward pass, so that about max_elements gathered keys and logits exist at once.
    """
    num_frames, H, W, D = Q.shape
    if num_frames < 2 or span < 1 or window is not None and window < 1:
        raise ValueError("motion needs at least two frames, a span and a window of at least 1")
    Q, K = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (Q, K))  # bf16 loses sub-token accuracy
    grid, num_tiles = (H, W), math.ceil(H / tile[0]) * math.ceil(W / tile[1])
    size = grid if window is None else (min(window, H), min(window, W))
    if size == grid:
        tile = grid  # one window for all tiles, so compute it as one tile
    i, j = frame_pairs(num_frames, span, Q.device)
    queries, representatives = tile_tokens(Q, tile), tile_queries(Q, tile)
    _, N, T, _ = queries.shape
    elements_per_pair = N * math.prod(size) * (D + T) + H * W * (D + N)
    chunk = max(1, max_elements // elements_per_pair)

    found, origins = [], []
    for pairs in zip(i.split(chunk), j.split(chunk)):
        with torch.no_grad():
            centers = window_centers(representatives[pairs[0]], K[pairs[1]], tau=tau, center=center)
            origins.append(window_origins(centers, grid, size))
            windows = window_indices(origins[-1], grid, size)
        found.append(recompute(read, queries, K, pairs, windows, tau, use_reentrant=False, preserve_rng_state=False))
    key_mean = window_means(K, torch.cat(origins), j, size).expand(-1, num_tiles, -1)  # the one window is every tile's
    return untile_tokens(torch.cat(found), tile, grid), key_mean


def attention_motion_flow(Q, K, *, span=5, tile=(3, 4), window=21, tau=1.0, center="soft", max_elements=2**25):
    """AMF Δ_ij of all frame pairs of the span, searched in one l×l window per tile (Sec. 3.2, eqs. 1-5).

    Q, K: (F, H, W, D), F ≥ 2, head-averaged. Returns flow (P, H, W, 2) in tokens and key_mean K̄ (P, N, D): see
    search_windows. window=None, or one that covers the grid, is the full-frame AMF of DiTFlow.
    """
    _, H, W, _ = Q.shape
    target, key_mean = search_windows(expected_positions, Q, K, span=span, tile=tile, window=window, tau=tau,
                                      center=center, max_elements=max_elements)  # fmt: skip
    position = row_column(torch.arange(H * W, device=Q.device), W).view(H, W, 2)
    return target - position, key_mean


# ---- Losses (Sec. 3.3) -----------------------------------------------------------------------------------------------


def offset_weights(offsets, span, alpha=0.2):
    """w_d = 1 − α(d−1)/(s_f−1) for offsets d in 1 … s_f (eq. 6)."""
    return 1 - alpha * (offsets - 1) / max(span - 1, 1)


def amf_loss(flow_ref, flow_gen, *, num_frames, span=5, alpha=0.2, weight=None):
    """L_AMF: weighted mean squared distance of two flows (P, H, W, 2), a mean over pairs and tokens (eq. 5, App. B.1).

    weight (H, W), not the paper's: how much each token counts, to follow the motion of a part of the frame only; a
    token's share is its weight over the sum of weights. No gradient flows to the reference.
    """
    i, j = frame_pairs(num_frames, span, flow_gen.device)
    squared = (flow_gen - flow_ref.detach()).square().sum(-1)  # (P, H, W)
    squared = squared.mean((1, 2)) if weight is None else (squared * weight).sum((1, 2)) / weight.sum()
    return (offset_weights((j - i).to(squared), span, alpha) * squared).mean()


def window_loss(key_mean, *, num_frames, span=5, squared=False):
    """L_window: how much the mean key of a tile's windows changes from target frame to target frame (eq. 7, App. B.4).

    key_mean (P, N, D). An anchor i has the targets i+1 … min(i+s_f−1, F−1), one offset fewer than eq. 3 (B.4); one with
    fewer than two adds 0. The norm is B.4's; squared=True gives eq. 7's.
    """
    lengths = [num_frames - d for d in range(1, min(span + 1, num_frames))]
    by_offset = key_mean.split(lengths)[: span - 1]  # K̄ of pair (i, i+d) is by_offset[d−1][i]
    loss = key_mean.new_zeros(())
    for i in range(num_frames):
        path = [means[i] for means in by_offset if i < len(means)]  # one (N, D) for each target of anchor i
        if len(path) > 1:
            change = torch.stack(path).diff(dim=0)  # (targets−1, N, D)
            norm = change.square().sum(-1) if squared else torch.linalg.vector_norm(change, dim=-1)
            loss = loss + norm.mean()
    return loss / num_frames


def motion_losses(flow_ref, flow_gen, key_mean, *, num_frames, config):
    """L_total = λ_AMF·L_AMF + λ_window·L_window (eq. 8): (total, L_AMF, L_window), scalars."""
    amf = amf_loss(flow_ref, flow_gen, num_frames=num_frames, span=config.span, alpha=config.alpha)
    window = window_loss(key_mean, num_frames=num_frames, span=config.span, squared=config.squared)
    return config.lambda_amf * amf + config.lambda_window * window, amf, window


# ---- Step-skip optimizer (Sec. 3.4) ----------------------------------------------------------------------------------


def optimize_latent(x, objective, *, steps=10, interval=3, lr=(0.003, 0.002)):
    """AdamW on the latent alone with a fresh gradient every `interval`-th step, reused between (eqs. 9-10).

    objective: x -> scalar, called ⌈steps/interval⌉ times. interval=1 recomputes every step, as eq. 9's full AMF mode
    does. lr runs linearly from its first to its last value. Returns a new tensor like x.
    """
    x = x.detach().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([x])  # its default weight decay, 0.01, is kept: the paper names none
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr[0] + (lr[1] - lr[0]) * step / max(steps - 1, 1)
        if step % interval == 0:
            # Eq. 9's surrogate loss x·g_cached has the gradient g_cached, so leaving .grad as it is does the same.
            with torch.enable_grad():
                (x.grad,) = torch.autograd.grad(objective(x), x)
        optimizer.step()
    return x.detach()


# ---- Guided sampler (Algorithm 1) ------------------------------------------------------------------------------------

MEASURE_SIGMA = 0.1  # noise level at which finished clips are read: nearly clean, and not off the model's training data


def match_noise(latents, noise, sigma):
    """Clean latents at noise level sigma of flow matching (Algorithm 1's MatchNoise)."""
    return (1 - sigma) * latents + sigma * noise


def read_attention(dit, x, sigma, context, config, *, checkpoint=False):
    """Head-averaged Q, K (F, H, W, D) of latents x (1, C, F, h, w) at noise level sigma (App. B.4)."""
    grid = [length // patch for length, patch in zip(x.shape[2:], dit.patch_size)]
    t = torch.full((1,), 1000 * sigma, device=x.device)
    q, k = dit.qk(x, t, context, config.block, checkpoint=checkpoint)
    return head_average(q[0], grid), head_average(k[0], grid)


def motion_features(dit, x, sigma, context, config, *, checkpoint=False):
    """AMF (P, H, W, 2) and window key means (P, N, D) of latents x (1, C, F, h, w) at noise level sigma."""
    Q, K = read_attention(dit, x, sigma, context, config, checkpoint=checkpoint)
    return attention_motion_flow(Q, K, **config.flow_settings)


@torch.no_grad()
def reference_flow(dit, reference, noise, sigma, null, config):
    """AMF that a step at noise level sigma is guided by, read with the empty prompt.

    Clean, or at any fixed level, it is the same in every step (Sec. 3.2); "match" follows the step (Algorithm 1).
    """
    level = sigma if config.ref_noise == "match" else config.ref_noise
    return motion_features(dit, match_noise(reference, noise, level), level, null, config)[0]


def guided_steps(num_steps, config):
    """How many of the first denoising steps are guided."""
    return math.ceil(config.guided_fraction * num_steps - 1e-9)  # 0.07·100 is 7.000000000000001


def guide(dit, x, sigma, context, flow_ref, config, *, checkpoint=False):
    """Algorithm 1's Optimization: the new x, and the losses (gradients, 3) of eq. 8: total, AMF, window."""
    losses = []

    def objective(x):
        flow, key_mean = motion_features(dit, x, sigma, context, config, checkpoint=checkpoint)
        loss = motion_losses(flow_ref, flow, key_mean, num_frames=x.shape[2] // dit.patch_size[0], config=config)
        losses.append(torch.stack(loss).detach())
        return loss[0]

    x = optimize_latent(x, objective, steps=config.inner_steps, interval=config.interval, lr=config.lr)
    return x, torch.stack(losses)


@torch.no_grad()
def sample(dit, noise, sigmas, context, negative, *, cfg_scale=5.8, reference=None, null=None,
           config=MotionConfig(), checkpoint=False, callback=None):  # fmt: skip
    """Euler sampler whose first steps optimise the latent so that its motion becomes the reference's (Algorithm 1).

    dit: callable (x, t, context) -> velocity, with `qk(x, t, context, block, checkpoint=...)` and `patch_size` as in
    wan_min.DiT. noise (1, C, F, h, w); sigmas (steps+1,) decreasing to 0; context, negative and null (1, L, text_dim):
    the target, the negative and, needed with a reference, the empty prompt. reference: clean latents like noise, or
    None for plain generation. cfg_scale: the authors' code; the paper names none. checkpoint: see DiT.qk.
    callback(step, x, losses) follows each step, with guide's losses, of unguided steps None. Returns clean latents,
    fp32.
    """
    if reference is not None and (null is None or reference.shape != noise.shape or len(noise) > 1):
        raise ValueError("a reference must have the shape of the noise, one clip, and needs null, the empty prompt")
    sigmas, x, guided = sigmas.tolist(), noise.float(), 0
    if reference is not None:
        noise, reference, guided = x, reference.float(), guided_steps(len(sigmas) - 1, config)
        x = match_noise(reference, noise, sigmas[0])
    for step, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
        losses = None
        if step < guided:
            if step == 0 or config.ref_noise == "match":
                flow_ref = reference_flow(dit, reference, noise, sigma, null, config)
            x, losses = guide(dit, x, sigma, context, flow_ref, config, checkpoint=checkpoint)
        t = torch.full((1,), 1000 * sigma, device=x.device)
        v = dit(x, t, context)
        if cfg_scale != 1:
            v_negative = dit(x, t, negative)
            v = v_negative + cfg_scale * (v - v_negative)
        x = x + (next_sigma - sigma) * v
        if callback:
            callback(step, x, losses)
    return x


# ---- The run that uses it --------------------------------------------------------------------------------------------

import argparse
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import wan_min

# ---- Video in and out ------------------------------------------------------------------------------------------------


SCALER = "bicubic+accurate_rnd+full_chroma_int"  # ffmpeg's default turns colours a level darker


class UserError(ValueError):
    """Something that the user can mend; the message is one line."""


def fit_frame(frame, size):
    """Cover and centre-crop: uint8 array (h, w, 3) -> fp32 (3, H, W) in [-1, 1]."""
    x = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    scale = max(new / old for new, old in zip(size, x.shape[2:]))
    cover = [max(new, round(old * scale)) for new, old in zip(size, x.shape[2:])]
    x = F.interpolate(x, cover, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = ((have - want) // 2 for have, want in zip(cover, size))
    return x[0, :, top : top + size[0], left : left + size[1]] / 127.5 - 1


def read_video(path, num_frames, size, *, fps=16.0, start=0.0, turn=False):
    """The first 4k+1 ≤ num_frames frames of a video file: fp32 (1, 3, T, H, W) in [-1, 1], and frames per second.

    turn: swap the sides of `size` for a portrait video. Raises UserError when the file cannot be read or is too short.
    """
    from imageio_ffmpeg import read_frames

    if not os.path.isfile(path):  # unlike Path.is_file, it never raises
        raise UserError(f"reference {path} does not exist or is no file")
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns of every rotated video
    file = os.path.abspath(path)  # which ffmpeg cannot take for a URL or an option
    try:
        probe = read_frames(file)
        fps = next(probe)["fps"] or 25.0  # 0 where the file names none
        probe.close()
        # A constant rate, also where the file's varies, and square pixels.
        filters = f"setpts=PTS-STARTPTS,fps={fps},scale=iw*sar:ih:flags={SCALER},setsar=1"
        reader = read_frames(file, output_params=["-frames:v", str(num_frames), "-vf", filters])
        width, height = next(reader)["size"]
        size = size[::-1] if turn and height > width else size
        frames = [fit_frame(np.frombuffer(bytearray(frame), np.uint8).reshape(height, width, 3), size)
                  for frame in reader]  # fmt: skip
    except Exception as error:  # ffmpeg's complaints come as many types, and as whole logs
        *_, reason = type(error).__name__, *str(error).splitlines(), *re.findall(r"^\[.+?\] (.+)", str(error), re.M)
        raise UserError(f"reference {path} cannot be read as a video ({reason})") from None
    if len(frames) < 5:
        raise UserError(f"reference {path} has {len(frames)} frames; at least 5 are needed")
    return torch.stack(frames[: (len(frames) - 1) // 4 * 4 + 1], dim=1)[None]


def demo_video(num_frames, size):
    """A clip with known motion: a textured square slides right and down over a gradient; (1, 3, T, H, W) in [-1, 1]."""
    h, w = size
    side = min(h, w) // 3
    rows, cols = torch.linspace(-0.6, 0.6, h)[:, None].expand(h, w), torch.linspace(-0.6, 0.6, w).expand(h, w)
    texture = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    square = F.interpolate(texture[None], (side, side), mode="nearest")[0]
    video = torch.stack([rows, cols, -rows]).repeat(num_frames, 1, 1, 1)  # (T, 3, H, W)
    for n, frame in enumerate(video):
        top, left = (round((0.1 + 0.8 * n / (num_frames - 1)) * (length - side)) for length in size)
        frame[:, top : top + side, left : left + side] = square
    return video.transpose(0, 1)[None]


def partial_path(path):
    return path.absolute().with_name(f".{path.stem}.partly-written.mp4")


def write_video(path, video, fps, comment=""):
    """Write (1, 3, T, H, W) in [-1, 1] as H.264 yuv420p mp4, under a temporary name until it is whole."""
    from imageio_ffmpeg import get_ffmpeg_exe

    path, part = Path(path), partial_path(Path(path))
    pixels = ((video[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)  # (T, H, W, 3)
    _, height, width, _ = pixels.shape
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()
    color = f"-vf scale=out_color_matrix=bt709:out_range=tv:flags={SCALER} -colorspace bt709 -color_range tv".split()
    try:
        # Not through imageio's writer, which takes a failed encode for a success.
        done = subprocess.run([get_ffmpeg_exe(), "-y", "-v", "error", *source, *color, "-c:v", "libx264", "-crf", "17",
                               "-pix_fmt", "yuv420p", "-metadata", f"comment={comment}", str(part)],
                              input=pixels.cpu().numpy().tobytes(), stderr=subprocess.PIPE)  # fmt: skip
        if done.returncode:
            raise UserError(f"ffmpeg could not write {path} ({done.stderr.decode(errors='replace').strip()[-200:]})")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---- Seeing and measuring the motion of a result ---------------------------------------------------------------------


@torch.no_grad()
def measured_flow(dit, latents, noise, null, config):
    """AMF (P, H, W, 2) of finished latents, read with the empty prompt at MEASURE_SIGMA."""
    return motion_features(dit, match_noise(latents, noise, MEASURE_SIGMA), MEASURE_SIGMA, null, config)[0]


@torch.no_grad()
def attention_entropy(dit, latents, noise, null, config):
    """Mean entropy of the window's attention, as a share of uniform attention's: scalar in [0, 1].

    Near 1 the attention hardly tells one key from another, and every flow drifts to the middle of its window.
    """
    Q, K = read_attention(dit, match_noise(latents, noise, MEASURE_SIGMA), MEASURE_SIGMA, null, config)
    return search_windows(relative_entropy, Q, K, **config.flow_settings)[0].mean()


def flow_agreement(flow_ref, flow_gen, moving=0.5):
    """Cosine similarity and end-point error in tokens of two flows (P, H, W, 2), where the reference moves.

    A token moves whose reference flow is longer than `moving` tokens; (nan, nan) where none does.
    """
    ref, gen = (flow[flow_ref.norm(dim=-1) > moving] for flow in (flow_ref, flow_gen))
    return F.cosine_similarity(ref, gen, dim=-1).mean().item(), (ref - gen).norm(dim=-1).mean().item()


def flow_color(flow):
    """RGB in [0, 1] of a flow's direction, (..., 2) -> (..., 3): right red, down green, left cyan, up violet."""
    direction = torch.atan2(flow[..., 0], flow[..., 1])
    thirds = torch.tensor([0, 2, 4], device=flow.device) * (math.pi / 3)  # directions of pure red, green and blue
    return 0.5 + 0.5 * (direction[..., None] - thirds).cos()


def caption(text, width, height=24):
    """A line of white text on black: (3, height, width) in [-1, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).text((6, 3), text, font=ImageFont.load_default(14))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def compare_video(clips, flows, num_frames):
    """Named clips side by side, and under each its own AMF as colours over the dimmed frames, to one common scale.

    clips: name -> (1, 3, T, h, w) in [-1, 1]; flows: list of their (P, H, W, 2) over num_frames latent frames, of which
    the first, to the next latent frame, are shown. Clips under 240 rows are shown n times as large. Returns
    (1, 3, T, 2·n·h + 48, clips·n·w).
    """
    flows = [flow[: num_frames - 1].cpu() for flow in flows]  # those of offset 1 come first
    longest = max(torch.cat(flows).norm(dim=-1).quantile(0.99).item(), 0.5)
    columns = []
    for (name, video), flow in zip(clips.items(), flows):
        _, _, T, h, _ = video.shape
        zoom, group = math.ceil(240 / h), (T - 1) // (num_frames - 1)
        video = video[0].float().cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        colors = torch.cat([flow_color(flow), flow.norm(dim=-1, keepdim=True).clamp(max=longest) / longest], dim=-1)
        colors = F.interpolate(rearrange(colors, "f h w c -> f c h w"), video.shape[2:], mode="nearest")
        # Latent frame n ends at video frame n·group.
        shown = [min((t + group - 1) // group, num_frames - 2) for t in range(T)]
        *color, strength = rearrange(colors[shown], "t c h w -> c t h w")
        gray = video.mean(0) * 0.3 - 0.5
        below = torch.lerp(gray, torch.stack(color) * 2 - 1, strength)
        texts = name, "motion: red right, green down, cyan left, violet up"
        above, between = (caption(text, video.shape[3])[:, None].expand(-1, T, -1, -1) for text in texts)
        columns.append(torch.cat([above, video, between, below], dim=2))
    return torch.cat(columns, dim=3)[None]


# ---- Command line ----------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRESETS = {  # settings that people compare; what a setting cannot say is in the README
    # Sec. 4.1 to the letter: from pure noise, features at matched noise.
    "paper": {"ref_noise": "match", "strength": 1.0},
    # The authors' example. Its L_AMF is a sum over 1560 tokens, which leaves the window loss 1/1560 of its weight.
    "release": {"ref_noise": "match", "strength": 0.75, "span": 3, "lambda_window": 1 / 1560, "lr": (0.003, 0.0021),
                "fps": 15.0},
    # DiTFlow (arXiv 2412.07776) and its code's guidance_config.yaml: the whole frame, all pairs, every gradient.
    "ditflow": {"ref_noise": 0.0, "window": None, "span": 20, "alpha": 0.0, "tau": 2.0, "lambda_window": 0.0,
                "inner_steps": 5, "interval": 1, "lr": (0.002, 0.001)},
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_size(text):
    if not re.fullmatch(r"\d+[xX]\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, such as 480x832")
    return tuple(map(int, text.lower().split("x")))


def int_or_none(text):  # argparse shows this name
    return None if text == "none" else int(text)


def level_or_match(text):
    return text if text == "match" else float(text)


def build_parser():
    parser = Parser(prog="fastvmt.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Give a video of the prompt the motion of a reference video.")  # fmt: skip
    add = parser.add_argument
    add("--ref", help="reference: a video, a folder of pictures, or 'demo' for a made-up clip")
    add("--prompt", help="what the new video shows")
    add("--out", type=Path, default=Path("out.mp4"), help="mp4 to write")
    add("--compare", type=Path, help="also write this mp4: reference and result side by side, the motion of each below")
    add("--plain", action="store_true", help="show plain generation in --compare too, at the cost of its own steps")
    add("--model", default="1.3B", help="1.3B, 14B, a checkpoint folder, a hub repo id, toy, or tiny (random weights)")
    add("--random-weights", action="store_true", help="random weights for 1.3B or 14B, to study speed and memory")
    add("--preset", choices=PRESETS, help="settings to compare with: the paper's, its release's, DiTFlow's")
    add("--size", type=parse_size, help="of the output, HxW; if not given the model's own, turned like the reference")
    add("--frames", type=int, default=81, help="use at most this many frames, rounded down to 4k+1 (Sec. 4.1)")
    add("--fps", type=float, help="frames per second of reference and output; if not given the model's own")
    add("--start", type=float, default=0.0, help="seconds into the reference")
    add("--seed", type=int, default=0, help="of the initial noise, the same on every device")
    add("--no-transfer", action="store_true", help="generate plainly, from pure noise")
    add("--decode", type=Path, help="instead of sampling, decode the latents that an interrupted run left behind")
    add("--negative-prompt", default="", help="what to steer away from; if not given the model's own")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add("--device", default=device, help="torch device")
    add("--dtype", choices=DTYPES, help="of the DiT's matmuls; if not given bf16 on a GPU, fp32 on CPU")
    add("--checkpoint", choices=["auto", "on", "off"], default="auto",
        help="recompute DiT blocks in the backward pass, to save memory; auto: once it has run out")  # fmt: skip
    add("--offload", action="store_true", help="keep the blocks' weights in host memory and stream them to the device")
    add("--compile", action="store_true", help="compile the DiT's blocks with torch.compile")
    add("--steps", type=int, default=50, help="denoising steps (Sec. 4.1)")
    add("--shift", type=float, default=7.0, help="timestep shift (authors' code; the paper names none)")
    add("--cfg-scale", type=float, default=5.8, help="classifier-free guidance scale (authors' code)")
    add("--strength", type=float, default=1.0, help="noise level of the start (Sec. 4.1: 1); less starts from the "
        "noised reference (authors' code: 0.75)")  # fmt: skip
    types = {"window": int_or_none, "ref_noise": level_or_match}
    for f in fields(MotionConfig):
        example, nargs = (f.default[0], 2) if isinstance(f.default, tuple) else (f.default, None)
        options = {"action": "store_true"} if example is False else {
            "type": types.get(f.name, type(example)), "nargs": nargs, "default": f.default}  # fmt: skip
        add("--" + f.name.replace("_", "-"), help=f.metadata["help"], **options)
    return parser


def open_model(args):
    """The wan_min.Model that the flags name; nothing else knows a model by name."""
    source = wan_min
    if args.model == "toy":
        from lab import toy as source
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {args.device} cannot be used ({str(error).splitlines()[0]})") from None
    dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    return source.open_model(args.model, device, dtype, offload=args.offload, random_weights=args.random_weights)


def parse_arguments(argv, parser=None):
    """The flags, and the model they name. It and a preset have defaults of their own, which any flag overrides."""
    parser = parser or build_parser()
    args = parser.parse_args(argv)  # what is wrong is told before a model is looked for
    model = open_model(args)
    parser.set_defaults(**model.defaults | PRESETS.get(args.preset, {}))
    return parser.parse_args(argv), model


def motion_config(args):
    values = {f.name: getattr(args, f.name) for f in fields(MotionConfig)}
    return MotionConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def check_output(path, *others):
    """UserError unless an mp4 can be written at path without harm to the run's other files."""
    taken = os.path.realpath(path) in [os.path.realpath(other) for other in others if other]
    if path.suffix.lower() != ".mp4" or os.path.isdir(path) or taken:
        raise UserError(f"output {path} must be a file name that ends in .mp4, and not the reference or another output")
    try:
        partial_path(path).touch()
        partial_path(path).unlink()
    except OSError as error:
        raise UserError(f"output {path} cannot be written ({error.strerror})") from None


def check_arguments(args, model, config):
    """UserError for what can be told to be wrong before anything is read or loaded."""
    if args.ref is None or not (args.prompt or "").strip():
        raise UserError("--ref or --prompt is missing, or the prompt is empty")
    if args.compile and args.offload:
        raise UserError("--compile and --offload exclude each other")
    if config.block > model.blocks:
        raise UserError(f"--block {config.block} is outside the model's 1 to {model.blocks}")
    limits = {"frames": (5, math.inf), "fps": (1, 240), "start": (0, math.inf), "seed": (0, 2**63 - 1),
              "steps": (1, math.inf), "shift": (0.001, math.inf), "strength": (0.001, 1)}  # fmt: skip
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value} is not between {low} and {high}")
    if args.size and min(args.size) < 32:
        raise UserError("--size needs sides of at least 32")
    check_output(args.out, args.ref, args.compare)
    if args.compare:
        check_output(args.compare, args.ref, args.out)


def read_reference(args, model):
    """The reference as (1, 3, T, H, W) in [-1, 1], at the size, length and rate asked for, or else the model's own."""
    size, frames = args.size or model.canvases[0], (args.frames - 1) // 4 * 4 + 1
    if args.size:
        size = tuple(round(side / 16) * 16 for side in args.size)
    if (size, frames) != (args.size or size, args.frames):
        print(f"rounded to {size[0]}x{size[1]} and {frames} frames (multiples of 16, 4k+1)")
    if args.ref == "demo":
        return (model.demo or demo_video)(frames, size)
    turn = not args.size and size[::-1] in model.canvases
    return read_video(args.ref, frames, size, fps=args.fps or model.fps, start=args.start, turn=turn)


def provenance(args, config):
    """What made a video, as JSON for its metadata; the paper's ethics statement promises such a marking."""
    settings = {name: value for name, value in vars(args).items() if name not in {"out", "compare", *vars(config)}}
    settings |= {name: os.path.basename(settings[name]) for name in ("ref", "model") if os.path.exists(settings[name])}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    record = {"ai_generated": True, "program": "FastVMT motion transfer (fastvmt.py)", "settings": settings,
              "method": asdict(config), "versions": versions}  # fmt: skip
    return json.dumps(record, default=str, ensure_ascii=False)


@contextmanager
def latents_kept(path, out):
    """Remove the latents at path once the video `out` is written; if that fails, say how to finish it."""
    try:
        yield
    except BaseException:
        command = shlex.join(["python", "fastvmt.py", "--decode", str(path), "--out", str(out)])
        print(f"fastvmt: the latents are safe; to finish the video: {command}", file=sys.stderr)
        raise
    path.unlink()


def decode_latents(args):
    """Finish a run whose latents were kept: `--decode LATENTS --out OUT`."""
    from safetensors import SafetensorError, safe_open

    check_output(args.out)
    try:
        with safe_open(args.decode, "pt") as file:
            latents, saved = file.get_tensor("latents"), file.metadata()
        model, fps, record = json.loads(saved["model"]), float(saved["fps"]), saved["record"]
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"latents {args.decode} cannot be read ({error})") from None
    codec = open_model(argparse.Namespace(**vars(args) | model)).load_codec()
    with latents_kept(args.decode, args.out):
        write_video(args.out, codec.decode(latents.to(args.device)), fps, record)


def generate(args, config, dit, noise, contexts, reference):
    """Latents that are guided by the reference or, without one, plainly made from pure noise; shows its progress."""
    from tqdm import tqdm

    context, negative, null = contexts
    guided = guided_steps(args.steps, config) if reference is not None else 0
    sigmas = wan_min.flow_sigmas(args.steps, args.shift, args.strength if reference is not None else 1.0)
    if guided:
        print(f"guiding steps 1 to {guided} of {args.steps}, σ {sigmas[0]:.3f} to {sigmas[guided - 1]:.3f}", flush=True)

    def callback(step, x, losses):
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"the latent is not finite after step {step + 1} of {args.steps}")
        bar.update(step + 1 - bar.n)
        if losses is not None:
            bar.set_postfix_str("loss {:.4g} (AMF {:.4g}, window {:.4g})".format(*losses[-1].tolist()))

    def run(checkpoint):
        return sample(dit, noise, sigmas, context, negative, cfg_scale=args.cfg_scale, reference=reference, null=null,
                      config=config, checkpoint=checkpoint, callback=callback)  # fmt: skip

    with tqdm(total=args.steps, desc="sampling", mininterval=1) as bar:
        try:
            return run(args.offload or args.checkpoint == "on")
        except RuntimeError as error:
            if args.checkpoint != "auto" or not wan_min.out_of_memory(error):
                raise
        print("out of memory: again with --checkpoint on", flush=True)  # here, where the failed run's tensors are free
        return run(True)


@torch.no_grad()
def run(args, model):
    """The main job: everything that can be wrong with the arguments first, then encode, sample, decode, write."""
    from safetensors.torch import save_file
    from tqdm import tqdm

    config = motion_config(args)
    check_arguments(args, model, config)
    video, fps, record = read_reference(args, model), args.fps or model.fps, provenance(args, config)
    progress = partial(tqdm, leave=False, disable=None)  # no bar in a log file

    print("encoding the prompts", flush=True)
    contexts = model.encode_prompts([args.prompt, args.negative_prompt, ""]).split(1)
    print("encoding the reference, {} frames of {}x{} at {:g} fps".format(*video.shape[2:], fps), flush=True)
    codec = model.load_codec()
    reference = codec.encode(video.to(args.device), progress=progress)
    print("loading the DiT", flush=True)
    dit = model.load_dit(progress)
    for block in dit.blocks if args.compile else ():
        block.compile()
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(args.seed)).to(args.device)

    results = {"plain": None} if args.plain else {}
    results["result"] = None if args.no_transfer else reference
    results = {name: generate(args, config, dit, noise, contexts, guide) for name, guide in results.items()}
    kept = args.out.with_suffix(".latents.safetensors")
    opened = json.dumps({name: vars(args)[name] for name in ("model", "random_weights")})
    save_file({"latents": results["result"].cpu()}, kept, {"record": record, "fps": str(fps), "model": opened})
    with latents_kept(kept, args.out):
        flows = [measured_flow(dit, x, noise, contexts[2], config) for x in (reference, *results.values())]
        entropy = attention_entropy(dit, reference, noise, contexts[2], config)
        del dit  # the decoder needs the memory
        clips = {name: codec.decode(x, progress=progress) for name, x in results.items()}
        write_video(args.out, clips["result"], fps, record)
    clips = {"reference": video, **clips}
    if args.compare:
        write_video(args.compare, compare_video(clips, flows, noise.shape[2]), fps, record)
    print(f"wrote {args.out}" + (f" and {args.compare}" if args.compare else ""))
    cosine, error = flow_agreement(flows[0], flows[-1])
    print(f"flow of the result against the reference, where that moves: cosine {cosine:.3f}, error {error:.2f} tokens")
    print(f"entropy of the reference's attention over its windows: {100 * entropy:.0f} % of uniform")
    for name, clip in clips.items() if model.describe_motion else ():
        print(f"motion of the {name}: {model.describe_motion(clip[0].cpu())}")


def explain(error):
    """Exit code and message of an error that the user can do something about; raises any other."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, (UserError, wan_min.ModelError)):
        return 2, str(error)
    if isinstance(error, FloatingPointError):
        return 1, str(error)
    if isinstance(error, MemoryError) or wan_min.out_of_memory(error):
        return 1, "out of memory; try in this order: --checkpoint on, --offload, fewer --frames, a smaller --size"
    raise error


def main(argv=None):
    """The command line; returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
        decode_latents(args) if args.decode else run(*parse_arguments(argv))
        return 0
    except BaseException as error:
        code, text = explain(error)
    print("fastvmt:", " ".join(text.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
