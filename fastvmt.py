"""FastVMT: training-free video motion transfer on Wan 2.1, in one file.

Paper: "FastVMT: Eliminating Redundancy in Video Motion Transfer" (arXiv 2602.05551v2); equation, section and appendix
numbers below are its. Top to bottom: settings, tiles and windows, attention motion flow (AMF), the two losses, the
step-skip optimizer, the guided sampler; then video in and out, measuring and drawing a result's motion, command line.

Everything above the sampler is pure tensor code that needs torch and einops only: copy what you need. Shapes in
comments: F latent frames, H×W token grid of a frame, S = H·W, D head dimension, P frame pairs, N tiles (the paper's P),
T tokens a tile, M window tokens. All positions and flows are (row, column) in tokens.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import timeit
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.utils.checkpoint import checkpoint as recompute

import wan_min

# ---- Settings --------------------------------------------------------------------------------------------------------


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MotionConfig:
    """The method's numbers; the defaults are the paper's. Each field is also a command line flag."""

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
    ref_noise: str = setting("match", "reference features: at the step's noise 'match' (Alg. 1) or 'clean' (Sec. 3.2)")


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
    rows, cols = ((torch.arange(0, length, side, device=Q.device) + side // 2).clamp(max=length - 1)
                  for side, length in zip(tile, Q.shape[1:3]))  # fmt: skip
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
    if center != "soft":
        raise ValueError(f"center must be 'soft' or 'argmax', not {center!r}")
    positions = row_column(torch.arange(logits.shape[-1], device=keys.device), W).to(logits.dtype)  # (S, 2)
    return ((logits * (tau / D**0.5)).softmax(-1) @ positions).round().long()


def window_origins(centers, grid, size):
    """First row and column of the windows (eq. 3), shifted, not cropped, to lie in the grid: long (P, N, 2)."""
    grid, size = torch.tensor([grid, size], device=centers.device)
    return (centers - size // 2).clamp(min=0).minimum(grid - size)


def window_indices(origins, grid, size):
    """Flat token indices row·W + column of the windows at origins (P, N, 2): long (P, N, M), row-major."""
    rows, cols = (torch.arange(s, device=origins.device) + origins[..., axis, None] for axis, s in enumerate(size))
    return (rows[..., :, None] * grid[1] + cols[..., None, :]).flatten(-2)


def window_means(K, origins, j, size):
    """Mean key K̄ of each pair's windows on frame j (App. B.4): (F, H, W, D), (P, N, 2), (P,) -> (P, N, D)."""
    K = rearrange(K, "f h w d -> f d h w")
    # The mean of every possible window by two box filters: cheaper than averaging the P·N windows one by one.
    means = F.avg_pool2d(F.avg_pool2d(K, (size[0], 1), stride=1), (1, size[1]), stride=1)
    return rearrange(means, "f d h w -> f h w d")[j[:, None], origins[..., 0], origins[..., 1]]


# ---- Attention motion flow (Sec. 3.2, eq. 5) -------------------------------------------------------------------------


def expected_positions(queries, key_rows, i, j, origins, grid, size, tau):
    """Attention-weighted mean key position of each query over its tile's window: (P, N, T, 2).

    queries (F, N, T, D), key_rows (F·S, D), pairs i and j (P,), origins (P, N, 2). Positions are absolute:
    window-relative ones would lose the motion of the window itself.
    """
    H, W = grid
    index = window_indices(origins, grid, size)  # (P, N, M)
    # F.embedding gathers rows and, unlike indexing, scatters their many repeated gradients back fast.
    keys = F.embedding(j[:, None, None] * (H * W) + index, key_rows)  # (P, N, M, D)
    # Window by tile, not tile by window: the gradient of the keys then comes out in their own memory order.
    logits = einsum(keys, queries[i], "p n m d, p n t d -> p n m t") * (tau / queries.shape[-1] ** 0.5)
    return einsum(logits.softmax(-2), row_column(index, W).to(logits.dtype), "p n m t, p n m c -> p n t c")


def attention_motion_flow(Q, K, *, span=5, tile=(3, 4), window=21, tau=1.0, center="soft", max_elements=2**25):
    """AMF Δ_ij of all frame pairs of the span, searched in one l×l window per tile (Sec. 3.2, eqs. 1-5).

    Q, K: (F, H, W, D), F ≥ 2, head-averaged. Returns flow (P, H, W, 2) in tokens and key_mean K̄ (P, N, D), fp32 or
    better; pairs in frame_pairs' order, tiles row-major. window=None, or one that covers the grid, is the full-frame
    AMF of DiTFlow. Gradients flow to Q and K, not through the choice of window. Costs P·S·M·D. Pairs are taken in
    chunks and redone in the backward pass, so that about max_elements gathered keys and logits exist at once.
    """
    num_frames, H, W, D = Q.shape
    if num_frames < 2 or span < 1 or window is not None and window < 1:
        raise ValueError("motion needs at least two frames, a span and a window of at least 1")
    Q, K = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (Q, K))  # bf16 loses sub-token accuracy
    grid, num_tiles = (H, W), math.ceil(H / tile[0]) * math.ceil(W / tile[1])
    size = grid if window is None else (min(window, H), min(window, W))
    if size == grid:
        tile = grid  # all tiles share the one window, so that one big tile computes the same
    i, j = frame_pairs(num_frames, span, Q.device)
    queries, representatives, key_rows = tile_tokens(Q, tile), tile_queries(Q, tile), K.flatten(0, 2)
    _, N, T, _ = queries.shape
    chunk = max(1, max_elements // (N * math.prod(size) * (D + T) + H * W * (D + N)))

    targets, origins = [], []
    for ci, cj in zip(i.split(chunk), j.split(chunk)):
        with torch.no_grad():
            centers = window_centers(representatives[ci], K[cj], tau=tau, center=center)
            origins.append(window_origins(centers, grid, size))
        targets.append(recompute(expected_positions, queries, key_rows, ci, cj, origins[-1], grid, size, tau,
                                 use_reentrant=False, preserve_rng_state=False))  # fmt: skip
    target = untile_tokens(torch.cat(targets), tile, grid)  # (P, H, W, 2)
    position = row_column(torch.arange(H * W, device=Q.device), W).view(H, W, 2)
    return target - position, window_means(K, torch.cat(origins), j, size).expand(-1, num_tiles, -1)


# ---- Losses (Sec. 3.3) -----------------------------------------------------------------------------------------------


def offset_weights(offsets, span, alpha=0.2):
    """w_d = 1 − α(d−1)/(s_f−1) for offsets d in 1 … s_f (eq. 6)."""
    return 1 - alpha * (offsets - 1) / max(span - 1, 1)


def amf_loss(flow_ref, flow_gen, *, num_frames, span=5, alpha=0.2):
    """L_AMF: weighted mean squared distance of two flows (P, H, W, 2), a mean over pairs and tokens (eq. 5, App. B.1).

    No gradient flows to the reference.
    """
    i, j = frame_pairs(num_frames, span, flow_gen.device)
    squared = (flow_gen - flow_ref.detach()).square().sum(-1).mean((1, 2))  # (P,)
    return (offset_weights((j - i).to(squared), span, alpha) * squared).mean()


def window_loss(key_mean, *, num_frames, span=5, squared=False):
    """L_window: how much the mean key of a tile's windows changes from target frame to target frame (eq. 7, App. B.4).

    key_mean (P, N, D). An anchor i has the targets i+1 … min(i+s_f−1, F−1), one offset fewer than eq. 3 (B.4); one with
    fewer than two adds 0. The norm is B.4's; squared=True gives eq. 7's.
    """
    i, j = frame_pairs(num_frames, span, key_mean.device)
    offset = j - i
    pair = torch.nonzero((offset < span - 1) & (j < num_frames - 1)).squeeze(1)  # (i, j) whose (i, j+1) counts too
    following = pair + (num_frames - offset)[pair]  # of (i, j+1), by frame_pairs' order
    change = key_mean[following] - key_mean[pair]
    norm = change.square().sum(-1) if squared else torch.linalg.vector_norm(change, dim=-1)  # (pairs, N)
    changes_of_anchor = (num_frames - 1 - i).clamp(max=span - 1) - 1  # B.4's N_i − 1
    return (norm.mean(1) / changes_of_anchor[pair]).sum() / num_frames


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


def match_noise(latents, noise, sigma):
    """Clean latents at noise level sigma of flow matching (Algorithm 1's MatchNoise)."""
    return (1 - sigma) * latents + sigma * noise


def motion_features(dit, x, sigma, context, config, *, checkpoint=False):
    """AMF (P, H, W, 2) and window key means (P, N, D) of latents x (1, C, F, h, w) at noise level sigma."""
    grid = [length // patch for length, patch in zip(x.shape[2:], dit.patch_size)]
    t = torch.full((1,), 1000 * sigma, device=x.device)
    q, k = dit.qk(x, t, context, config.block, checkpoint=checkpoint)
    return attention_motion_flow(head_average(q[0], grid), head_average(k[0], grid), span=config.span, tile=config.tile,
                                 window=config.window, tau=config.tau, center=config.center)  # fmt: skip


@torch.no_grad()
def noised_flow(dit, latents, noise, null, config, sigma=0.1):
    """AMF (P, H, W, 2) of clean latents, read with the empty prompt at noise level sigma."""
    return motion_features(dit, match_noise(latents, noise, sigma), sigma, null, config)[0]


def guided_steps(num_steps, config):
    """How many of the first denoising steps are guided."""
    return math.ceil(config.guided_fraction * num_steps - 1e-9)  # 0.07·100 is 7.000000000000001


def guide(dit, x, sigma, context, flow_ref, config, *, checkpoint=False):
    """Algorithm 1's Optimization: the new x, and [total, AMF, window] loss of each gradient computed."""
    losses = []

    def objective(x):
        flow, key_mean = motion_features(dit, x, sigma, context, config, checkpoint=checkpoint)
        loss = motion_losses(flow_ref, flow, key_mean, num_frames=x.shape[2] // dit.patch_size[0], config=config)
        losses.append(torch.stack(loss).tolist())
        return loss[0]

    return optimize_latent(x, objective, steps=config.inner_steps, interval=config.interval, lr=config.lr), losses


@torch.no_grad()
def sample(dit, noise, sigmas, context, negative, *, cfg_scale=5.8, reference=None, null=None,
           config=MotionConfig(), checkpoint=False, callback=None):  # fmt: skip
    """Euler sampler whose first steps optimise the latent so that its motion becomes the reference's (Algorithm 1).

    dit: callable (x, t, context) -> velocity, with `qk(x, t, context, block, checkpoint=...)` and `patch_size` as in
    wan_min.DiT. noise (1, C, F, h, w); sigmas (steps+1,) decreasing to 0; context, negative and null (1, L, text_dim):
    the target, the negative and, needed with a reference, the empty prompt. reference: clean latents like noise, or
    None for plain generation. cfg_scale: the authors' code; the paper names none. checkpoint: see DiT.qk.
    callback(step, x, losses) follows each step, with guide's losses. Returns clean latents, fp32. Raises
    FloatingPointError when the latent stops being finite.
    """
    if reference is not None and (null is None or reference.shape != noise.shape):
        raise ValueError("a reference must have the shape of the noise and needs null, the empty prompt's embedding")
    sigmas, x, guided = sigmas.tolist(), noise.float(), 0
    if reference is not None:
        noise, reference, guided = x, reference.float(), guided_steps(len(sigmas) - 1, config)
        x = match_noise(reference, noise, sigmas[0])
    for step, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
        losses = []
        if step < guided:
            if step == 0 or config.ref_noise == "match":
                level = {"match": sigma, "clean": 0.0}[config.ref_noise]
                flow_ref = noised_flow(dit, reference, noise, null, config, level)
            x, losses = guide(dit, x, sigma, context, flow_ref, config, checkpoint=checkpoint)
        t = torch.full((1,), 1000 * sigma, device=x.device)
        v = dit(x, t, context)
        if cfg_scale != 1:
            v_negative = dit(x, t, negative)
            v = v_negative + cfg_scale * (v - v_negative)
        x = x + (next_sigma - sigma) * v
        if not torch.isfinite(x).all():
            raise FloatingPointError(f"the latent is not finite after step {step + 1} of {len(sigmas) - 1}")
        if callback:
            callback(step, x, losses)
    return x


# ---- Video in and out ------------------------------------------------------------------------------------------------


SCALER = "bicubic+accurate_rnd+full_chroma_int"  # ffmpeg's default turns colours a level darker


class UserError(ValueError):
    """Something that the user can mend; the message is one line."""


def run_ffmpeg(task, *arguments, data=b""):
    """Run ffmpeg with `data` as its standard input; its standard output and its log. UserError if it cannot `task`."""
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        command = [get_ffmpeg_exe(), "-y", "-v", "level+info", *map(str, arguments)]
        done = subprocess.run(command, input=data, capture_output=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"ffmpeg cannot be run ({error})") from None
    log = done.stderr.decode(errors="replace")
    if done.returncode:
        reason = re.search(r"\[(?:error|fatal)\] (.+)", log)  # the first is the cause of the others
        raise UserError(f"cannot {task} ({reason[1] if reason else f'ffmpeg ended with {done.returncode}'})")
    return done.stdout, log


def decode_frames(task, source, num_frames, size, fps, turn, skip=0.0, data=b""):
    """At most num_frames frames of ffmpeg's input `source`, from `skip` seconds on: uint8 (T, H, W, 3)."""
    source = [*source, "-map", "0:V:0"]  # the first video stream that is no cover picture
    _, log = run_ffmpeg(task, *source, *"-vf showinfo -frames:v 1 -f null -".split(), data=data)
    shown = r"(?s) fmt:(\w+) .*?sar:(\d+)/(\d+) s:(\d+)x(\d+) .*?color_space:(\S+) .*?color_trc:(\S+)"
    if not (frame := re.search(shown, log)):
        raise UserError(f"cannot {task} (no frame can be decoded)")
    pixels, *numbers, space, transfer = frame.groups()
    sar, per, width, height = map(int, numbers)
    rows, cols = size[::-1] if turn and height > width * (sar / per or 1) else size  # 0: the file does not tell

    if vpx := re.search(r"(?s)Video: vp([89]).*alpha_mode +: 1", log):  # its alpha needs another decoder
        source, pixels = ["-c:v", "libvpx" if vpx[1] == "8" else "libvpx-vp9", *source], "yuva420p"
    alpha = re.match("yuva|rgba|bgra|argb|abgr|gbrap|ya|pal8", pixels)
    gif = "setpts=if(N\\,PREV_OUTPTS+if(eq(PTS-PREV_INPTS\\,1)\\,10\\,PTS-PREV_INPTS)\\,PTS)"
    steps = {  # HDR's white is 203 cd/m² (BT.2408), and what is brighter clips
        f"format={pixels},setparams=colorspace=bt709": space == "unknown" and width * height > 1024 * 576,
        gif: "Input #0, gif" in log,  # a delay of one tick means ten, as in browsers
        "format=gbrap": alpha,
        "bwdif=send_frame:auto:interlaced": True,
        f"setpts=PTS-max(STARTPTS-{skip}/TB\\,0)": True,  # a stream that begins after `skip` is used from its own begin
        f"fps={fps}:start_time={skip}": True,
        "zscale=npl=203:p=bt709:t=bt709:m=bt709:agamma=0": transfer in ("smpte2084", "arib-std-b67"),  # PQ, HLG
        "split[a][b];[a]drawbox=c=gray:t=fill:replace=1[a];[a][b]overlay=format=gbrp": alpha,
        f"scale=w=max({cols}\\,round({rows}*dar)):h=max({rows}\\,round({cols}/dar)):flags={SCALER}": True,
        f"format=rgb24,crop={cols}:{rows}": True,
    }
    filters = ",".join(step for step, wanted in steps.items() if wanted)
    output = ["-vf", filters, "-frames:v", num_frames, "-f", "rawvideo", "-"]
    return np.frombuffer(run_ffmpeg(task, *source, *output, data=data)[0], np.uint8).reshape(-1, rows, cols, 3)


def read_video(path, num_frames, size, *, fps=16.0, start=0.0, turn=False):
    """The first 4k+1 ≤ num_frames frames from `start` seconds, `fps` a second: fp32 (1, 3, T, H, W) in [-1, 1].

    path: a video, or a folder of pictures, one a frame in the order of the numbers in their names. The frames cover
    `size`; turn: with its sides swapped for a portrait video. UserError if unreadable or under 5 frames.
    """
    task = f"read the reference {path}"
    if os.path.isdir(path):
        names = [n for n in os.listdir(path) if re.fullmatch(r"[^.].*\.(png|jpe?g|webp|bmp)", n, re.I | re.S)]
        names.sort(key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)])
        first, frames = round(start * fps), []
        for name in names[first : first + num_frames]:
            data = Path(path, name).read_bytes()  # not by name, whose ending or % ffmpeg may believe
            frames += [*decode_frames(f"{task}/{name}", ["-i", "-"], 1, size, 25, turn, data=data)]
            size, turn = frames[0].shape[:2], False
    else:
        skip = min(start, 10.0)  # decoded for nothing, as ffmpeg may seek to after the key frame that is needed
        source = ["-ss", f"{start - skip:f}", "-i", os.path.abspath(path)]  # absolute: no URL, no option
        frames = decode_frames(task, source, num_frames, size, fps, turn, skip)
    if len(frames) < 5:
        raise UserError(f"reference {path} has {len(frames)} frames from {start:g} s, not 5 or more")
    frames = np.stack(frames[: (len(frames) - 1) // 4 * 4 + 1])
    return rearrange(torch.from_numpy(frames), "t h w c -> 1 c t h w") / 127.5 - 1


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
    """Beside the file that path, maybe a symbolic link, leads to."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.stem}.partly-written.mp4")


def write_video(path, video, fps, comment=""):
    """Write (1, 3, T, H, W) in [-1, 1] as H.264 yuv420p mp4, under a temporary name until it is whole.

    Raises FloatingPointError if the video is not finite, UserError if it cannot be written.
    """
    if not torch.stack(video.aminmax()).isfinite().all():
        raise FloatingPointError(f"{path} is not written, as the video is not finite")
    part, notes = partial_path(path), partial_path(path).with_suffix(".txt")
    frames = [((frame.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8) for frame in video[0].unbind(1)]
    pixels = rearrange(frames, "t c h w -> t h w c").cpu().numpy()
    source = f"-f rawvideo -pix_fmt rgb24 -s {pixels.shape[2]}x{pixels.shape[1]} -r {fps} -i -".split()
    # The scaler sets the matrix; players are told of it by frames' tags or, in older ffmpegs, by the encoder's.
    tags = "setparams=color_primaries=bt709:color_trc=bt709 -color_primaries bt709 -color_trc bt709"
    color = f"-vf scale=out_color_matrix=bt709:out_range=tv:flags={SCALER},{tags} -colorspace bt709 -color_range tv"
    try:
        comment = re.sub(rb"([=;#\\\n])", rb"\\\1", comment.encode(errors="backslashreplace"))
        notes.write_bytes(b";FFMETADATA1\ncomment=" + comment)  # an argument of the command may not be as long
        encode = "-xerror -map_metadata 1 -c:v libx264 -crf 17 -pix_fmt yuv420p -movflags +faststart".split()
        run_ffmpeg(f"write {path}", *source, "-f", "ffmetadata", "-i", notes, *color.split(), *encode, part,
                   data=pixels.tobytes())  # fmt: skip
        part.replace(os.path.realpath(path))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None
    finally:
        for file in (part, notes):
            file.unlink(missing_ok=True)


# ---- Seeing and measuring the motion of a result ---------------------------------------------------------------------


def flow_agreement(flow_ref, flow_gen, moving=0.5):
    """Cosine similarity and end-point error in tokens of two flows (P, H, W, 2), where the reference moves.

    A token moves whose reference flow is longer than `moving` tokens; (nan, nan) where none does.
    """
    ref, gen = (flow[flow_ref.norm(dim=-1) > moving] for flow in (flow_ref, flow_gen))
    return F.cosine_similarity(ref, gen, dim=-1).mean().item(), (ref - gen).norm(dim=-1).mean().item()


def flow_color(flow, scale):
    """Colour wheel: flow (..., 2) -> RGB (..., 3) in [0, 1] of its direction, and its strength (..., 1) in [0, 1].

    Right is red, down yellow-green, left cyan, up violet; the strength is the length over `scale`, at most 1.
    """
    hue = torch.atan2(flow[..., 0], flow[..., 1]) / (2 * math.pi)
    thirds = torch.tensor([0.0, 1 / 3, 2 / 3], device=flow.device)
    distance = ((hue[..., None] - thirds + 0.5) % 1 - 0.5).abs()  # from the hues of red, green and blue
    return (2 - 6 * distance).clamp(0, 1), (flow.norm(dim=-1, keepdim=True) / scale).clamp(max=1)


def compare_video(videos, flows, num_frames):
    """Clips side by side, and under each its own AMF as colours over the dimmed frames, to one common scale.

    videos: list of (1, 3, T, h, w) in [-1, 1]; flows: list of their (P, H, W, 2) over num_frames latent frames, of
    which the first, to the next latent frame, are shown. The wheel in the corner is the legend. Clips under 240 rows
    are shown n times as large. Returns (1, 3, T, 2n·h, clips·n·w).
    """
    zoom = math.ceil(240 / videos[0].shape[3])
    videos = [video.float().cpu().repeat_interleave(zoom, 3).repeat_interleave(zoom, 4) for video in videos]
    _, _, T, h, w = videos[0].shape
    last, stride = num_frames - 2, (T - 1) // (num_frames - 1)
    scale = max(torch.cat([flow[: last + 1].flatten(0, 2) for flow in flows]).norm(dim=-1).quantile(0.99).item(), 0.5)
    # Latent frame t ends at video frame 4t, or, of the toy, at t.
    shown = torch.tensor([min((t + stride - 1) // stride, last) for t in range(T)])
    axis = torch.linspace(-1.2, 1.2, min(h, w) // 4)
    color, strength = flow_color(torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1), 1)
    disc = (axis[:, None] ** 2 + axis**2 <= 1)[..., None]
    wheel = torch.where(disc, color * strength + 1 - strength, 0).permute(2, 0, 1) * 2 - 1
    columns = []
    for video, flow in zip(videos, flows):
        color, strength = (F.interpolate(x.cpu().permute(0, 3, 1, 2), (h, w), mode="nearest")[shown].transpose(0, 1)
                           for x in flow_color(flow[: last + 1], scale))  # fmt: skip
        gray = video[0].mean(0, keepdim=True) * 0.3 - 0.5
        below = gray + strength * (color * 2 - 1 - gray)
        below[:, :, : len(axis), -len(axis) :] = wheel[:, None]
        columns.append(torch.cat([video[0], below], dim=2))
    return torch.cat(columns, dim=3)[None]


def peak_memory(device, reset=False):
    """Peak bytes since the last reset: allocated on a CUDA device, else of the process, on Linux (elsewhere 0)."""
    if torch.device(device).type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):  # TypeError: a sandbox's /proc may not tell the peak
        return 0


def clock(device):
    """Seconds, read once the device has done all that was asked of it."""
    torch.zeros(1, device=device).item()
    return time.perf_counter()


class Meter:
    """A DiT that counts seconds in velocities, block forwards (but not recomputed ones) and block backwards."""

    def __init__(self, dit):
        self.dit, self.patch_size, self.qk, self.counts = dit, dit.patch_size, dit.qk, Counter()
        for block in dit.blocks:
            block.register_forward_hook(self.count)

    def count(self, block, args, out):
        if isinstance(out, torch.Tensor):  # not the Q and K of a block that ends there
            self.counts["forwards"] += 1
            if out.requires_grad:
                out.register_hook(lambda gradient: self.counts.update(["backwards"]))

    def __call__(self, x, t, context):
        start = clock(x.device)
        velocity = self.dit(x, t, context)
        self.counts["seconds"] += clock(x.device) - start
        return velocity


ABLATIONS = {
    "full method": {},
    "w/o sliding window": {"window": None},
    "w/o window loss": {"lambda_window": 0.0},
    "w/o step-skip": {"interval": 1},
    "w/o window and step-skip": {"window": None, "interval": 1},
    "argmax centre": {"center": "argmax"},
    "clean reference": {"ref_noise": "clean"},
    "matched reference": {"ref_noise": "match"},
    "no transfer": {"guided_fraction": 0.0},
}


def ablate(dit, noise, sigmas, contexts, reference, config, rounds=2, cases=(), **options):
    """Table 1 of the paper on this machine: markdown lines of every ablation on the same reference, prompt and seed.

    After a warm-up the rows are run in turn, `rounds` times; each row's times are those of its fastest round.
    cases: of a world whose motion is known, (noise, contexts, reference, function that tells the error of latents);
    they add rows for the other blocks and a last column with the mean and the standard deviation of the errors.
    """
    blocks = {f"block {n}": {"block": n} for n in range(1, len(dit.blocks) + 1) if n != config.block and cases}
    ablations = {name: change for name, change in (ABLATIONS | blocks).items()
                 if not change or replace(config, **change) != config}  # fmt: skip
    meter, device = Meter(dit), noise.device
    rows, (context, _, null) = {name: [] for name in ablations}, contexts
    grid = [length // patch for length, patch in zip(noise.shape[2:], dit.patch_size)]

    def run(noise, sigmas, contexts, reference, config, **more):
        return sample(meter, noise, sigmas, *contexts[:2], reference=reference, null=contexts[2], config=config,
                      **more, **options)  # fmt: skip

    def timed(sigmas, config):
        meter.counts.clear()
        peak_memory(device, reset=True)
        start, gradients = clock(device), []
        latents = run(noise, sigmas, contexts, reference, config,
                      callback=lambda step, x, losses: gradients.extend(losses))  # fmt: skip
        total, denoising = clock(device) - start, meter.counts["seconds"]
        counts = len(gradients), meter.counts["forwards"], meter.counts["backwards"], peak_memory(device) / 2**30
        return (total, total - denoising, denoising), counts, latents

    timed(sigmas[-2:], replace(config, guided_fraction=1.0, inner_steps=1))
    for _ in range(rounds):
        for name, change in ablations.items():
            rows[name].append(timed(sigmas, replace(config, **change)))
    yield "| | total s | guidance s | denoising s | guidance ratio | gradients | block forwards | block backwards | " \
          "peak GiB | L_AMF | flow cosine |" + " motion error, px a frame |" * bool(cases)  # fmt: skip
    yield "|---" + "|--:" * (11 if cases else 10) + "|"
    flow_ref, full = noised_flow(dit, reference, noise, null, config), None
    for name, runs in rows.items():
        (total, guidance, denoising), counts, latents = min(runs, key=lambda run: run[0])
        flow, full = noised_flow(dit, latents, noise, null, config), full or guidance
        loss = amf_loss(flow_ref, flow, num_frames=grid[0], span=config.span, alpha=config.alpha)
        numbers = "{} | {} | {} | {:.2f}".format(*counts)
        changed = replace(config, **ablations[name])
        errors = torch.tensor([error(run(x, sigmas, texts, ref, changed)) for x, texts, ref, error in cases])
        yield (f"| {name} | {total:.1f} | {guidance:.1f} | {denoising:.1f} | {guidance / full:.2f} | {numbers} | "
               f"{loss:.4f} | {flow_agreement(flow_ref, flow)[0]:.3f} |"
               + (f" {errors.mean():.2f} ± {errors.std():.2f} |" if cases else ""))  # fmt: skip

    # Where the guidance's time goes: the method's own part, on Q and K as leaves, and the reference pass.
    t = torch.full((1,), 500.0, device=device)
    QK = torch.stack([head_average(x[0], grid) for x in dit.qk(noise, t, null, config.block)])

    def objective(x):
        flow = attention_motion_flow(*x, span=config.span, tile=config.tile, window=config.window, tau=config.tau,
                                     center=config.center)  # fmt: skip
        return motion_losses(flow_ref, *flow, num_frames=grid[0], config=config)[0]

    def fastest(run):
        return min(timeit.repeat(run, timer=partial(clock, device), repeat=rounds + 1, number=1))

    velocity, features = fastest(lambda: dit(noise, t, context)), fastest(lambda: dit.qk(noise, t, null, config.block))
    method = fastest(lambda: optimize_latent(QK, objective, steps=1))
    percent = 100 * rows["full method"][0][1][0] * method / full
    yield f"\nAMF, losses and optimizer: {method:.2f} s a gradient, {percent:.1f} % of the full method's guidance."
    share = (config.block - 1) / len(dit.blocks)
    yield f"Reference pass: {features / velocity:.3f} of a velocity; (block - 1) / layers is {share:.3f}."


# ---- Command line ----------------------------------------------------------------------------------------------------

# The negative prompt that Wan 2.1 ships with: over-saturated, still, blurred, subtitles, deformed, cluttered, ...
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
PRESETS = {  # a model's own defaults, where they are not the paper's
    "tiny": {"canvas": (64, 112), "frames": 33, "block": 3, "window": 3},
    "small": {"canvas": (320, 480), "frames": 17, "block": 8},
    "toy": {"canvas": (48, 66), "frames": 9, "steps": 25, "shift": 1.0, "cfg_scale": 5.0, "strength": 0.97,
            "negative_prompt": "", "compare": Path("compare.mp4"), "block": 5, "tile": (2, 2), "window": 5, "span": 5,
            "tau": 3.0, "lambda_window": 0.1, "guided_fraction": 0.5, "inner_steps": 15, "lr": (0.006, 0.005),
            "ref_noise": "clean"},
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def number(kind, low, high=math.inf):
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_size(text):
    size = tuple(map(int, text.lower().split("x"))) if re.fullmatch(r"\d+[xX]\d+", text) else (0, 0)
    if min(size) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW with sides of at least 32, such as 480x832")
    return size


def int_or_none(text):  # argparse shows this name
    return None if text == "none" else number(int, 1)(text)


def build_parser(presets):
    parser = Parser(prog="fastvmt.py", description="Give a video of the prompt the motion of a reference video.")

    def add(flag, text, default=None, group=parser, **options):
        shown = presets.get(flag[2:].replace("-", "_"), default)
        text = text if shown is None or shown is False else text + " (default: %(default)s)"
        group.add_argument(flag, help=text, default=shown, **({"action": "store_true"} if shown is False else options))

    add("--ref", "reference video: any file that ffmpeg reads, or 'demo' for a made-up clip")
    add("--prompt", "what the new video shows")
    add("--out", "mp4 to write", Path("out.mp4"), type=Path)
    add("--compare", "also write this mp4: reference and result side by side, the motion of each below", type=Path)
    add("--model", "checkpoint folder, hub repo id, 1.3B, 14B, or tiny (random weights)", "Wan-AI/Wan2.1-T2V-1.3B")
    add("--random-weights", "random weights for 1.3B, 14B, small or tiny, to study speed and memory", False)
    add("--size", "size of the output, HxW (Sec. 4.1: 480x832; here turned for a portrait reference)", type=parse_size)
    add("--frames", "use at most this many frames, rounded down to 4k+1 (Sec. 4.1)", 81, type=number(int, 5))
    add("--fps", "frames per second of the output; the reference's if not given", type=number(float, 1, 240))
    add("--seed", "seed of the initial noise, the same on every device", 0, type=number(int, 0, 2**63 - 1))
    add("--no-transfer", "generate plainly from the same noise", False)
    add("--ablate", "no video, but a table of speed and motion with each part of the method left out", False)
    add("--decode", "instead of sampling, decode the latents that an interrupted run left behind", type=Path)
    add("--negative-prompt", "what to steer away from; Wan's own if not given", type=str)
    group = parser.add_argument_group("machine")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add("--device", "torch device", device, group)
    add("--dtype", "of the DiT's matmuls; bf16 on a GPU and fp32 on CPU if not given", None, group, choices=DTYPES)
    add("--checkpoint", "recompute DiT blocks in the backward pass to save memory; auto: when their activations would "
        "take over 80 %% of the memory that is free", "auto", group, choices=["auto", "on", "off"])  # fmt: skip
    add("--offload", "keep the weights of blocks in host memory and stream them to the device", False, group)
    add("--compile", "compile the DiT's blocks with torch.compile", False, group)
    group = parser.add_argument_group("sampler")
    add("--steps", "denoising steps (Sec. 4.1)", 50, group, type=number(int, 1))
    add("--shift", "timestep shift (authors' code; the paper names none)", 7.0, group, type=number(float, 1e-3))
    add("--cfg-scale", "classifier-free guidance scale (authors' code)", 5.8, group, type=number(float, 0))
    text = "noise level of the start, below 1 mixed with the reference (Sec. 4.1: 1; authors' code: 0.75)"
    add("--strength", text, 1.0, group, type=number(float, 1e-3, 1))
    group = parser.add_argument_group("method")
    special = {"window": {"type": int_or_none}, "guided_fraction": {"type": number(float, 0, 1)},
               "center": {"choices": ["soft", "argmax"]}, "ref_noise": {"choices": ["match", "clean"]}}  # fmt: skip
    for f in fields(MotionConfig):
        example = f.default[0] if isinstance(f.default, tuple) else f.default
        options = special.get(f.name) or {"type": number(type(example), int(isinstance(example, int)))}
        options |= {"nargs": 2} if isinstance(f.default, tuple) else {}
        text = f.metadata["help"].replace("None", "'none'")
        add("--" + f.name.replace("_", "-"), text, f.default, group, **options)
    return parser


def parse_arguments(argv):
    """Two passes, because a model may bring defaults of its own."""
    parser = Parser(add_help=False)
    parser.add_argument("--model")
    known, _ = parser.parse_known_args(argv)
    return build_parser(PRESETS.get(known.model, {})).parse_args(argv)


def motion_config(args):
    values = {f.name: getattr(args, f.name) for f in fields(MotionConfig)}
    return MotionConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def free_memory(device):
    """Bytes that are free on the device; of a CPU, half of what it has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def check_output(path, others=()):
    """UserError unless an mp4 can be written at path without harm to the run's other files."""
    taken = os.path.realpath(path) in [os.path.realpath(other) for other in others if other]
    if path.suffix != ".mp4" or os.path.isdir(path) or taken:
        raise UserError(f"output {path} must be a file name that ends in .mp4, and not the reference or another output")
    try:
        partial_path(path).touch()
        partial_path(path).unlink()
    except OSError as error:
        raise UserError(f"output {path} cannot be written ({error.strerror})") from None


def read_reference(args):
    """The reference as (1, 3, T, H, W) in [-1, 1] and its frame rate, at the size and length asked for."""
    size, frames, toy = PRESETS.get(args.model, {}).get("canvas", (480, 832)), (args.frames - 1) // 4 * 4 + 1, None
    if args.model == "toy":
        toy = load_toy()
        if args.size or frames > toy.FRAMES:
            raise UserError(f"the toy makes at most {toy.FRAMES} frames, all of {size[0]}x{size[1]} (leave out --size)")
    elif args.size:
        size = tuple(round(side / 16) * 16 for side in args.size)
    if (size, frames) != (args.size or size, args.frames):
        print(f"rounded to {size[0]}x{size[1]} and {frames} frames (multiples of 16, 4k+1)")
    fps = args.fps or (8.0 if toy else 16.0)
    if args.ref == "demo":
        return (toy.demo_video()[:, :, :frames], fps) if toy else (demo_video(frames, size), fps)
    return read_video(args.ref, frames, size, fps=fps, turn=not args.size and not toy), fps


def load_toy():
    try:
        from lab import toy
    except ImportError:
        raise UserError("--model toy needs the folder lab/ beside fastvmt.py") from None
    return toy


def load_codec(model, device):
    """What has the VAE's encode and decode: the VAE, or the toy's stand-in."""
    return load_toy() if model == "toy" else wan_min.load(wan_min.VAE, model, device)


def load_dit(model, device, dtype, progress=iter):
    if model == "toy":
        return wan_min.cast(load_toy().load(), dtype).to(device)
    return wan_min.load(wan_min.DiT, model, device, dtype, progress=progress)


def find_model(args):
    if not args.random_weights and args.model not in ("tiny", "small"):
        return "toy" if args.model == "toy" else wan_min.find_model(args.model)
    if args.model not in wan_min.ARCHITECTURES:
        raise UserError(f"--random-weights needs --model {', '.join(wan_min.ARCHITECTURES)}, not {args.model}")
    return args.model


@contextmanager
def phase(name, seconds):
    """Announce and time a part of the run; gives tqdm, whose bar goes when done and is not drawn into a log file."""
    from tqdm import tqdm

    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    yield partial(tqdm, desc=name.split(",")[0], leave=False, disable=None)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start


def prompt_contexts(args, model, device, seconds):
    """Contexts (1, L, text_dim) of the prompt, of the negative prompt and of the empty one."""
    prompts = [args.prompt, NEGATIVE_PROMPT if args.negative_prompt is None else args.negative_prompt, ""]
    if model == "toy":
        toy = load_toy()
        known, unknown = toy.known_words(args.prompt)
        vocabulary = f"the toy does not know {', '.join(unknown)}; it knows {', '.join(toy.WORDS)}"
        if not known:
            raise UserError(vocabulary)
        if unknown:
            print(vocabulary)
        contexts = toy.encode_prompts(prompts).to(device)
    elif args.random_weights:
        contexts = wan_min.random_contexts(3, model, device)
    else:
        with phase("encoding the prompts", seconds):
            contexts = wan_min.encode_prompts(prompts, model, device, offloaded=args.offload)
    return contexts.split(1)


def provenance(args, config):
    """What made a video, as JSON for its metadata; the paper's ethics statement promises such a marking."""
    local = {"out", "compare", "decode"} | vars(config).keys()
    settings = {name: value for name, value in vars(args).items() if name not in local}
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


def run_decode(args):
    """Finish a run whose latents were kept: `--decode LATENTS --out OUT`."""
    from safetensors import SafetensorError, safe_open

    check_output(args.out)
    try:
        with safe_open(args.decode, "pt") as file:
            latents, metadata = file.get_tensor("latents"), file.metadata()
        saved, fps = argparse.Namespace(**json.loads(metadata["record"])["settings"]), float(metadata["fps"])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"latents {args.decode} cannot be read ({error})") from None
    vae = load_codec(find_model(saved), args.device)
    with latents_kept(args.decode, args.out), phase("decoding", {}) as progress:
        write_video(args.out, vae.decode(latents.to(args.device), progress=progress), fps, metadata["record"])
    print(f"wrote {args.out}")


@torch.no_grad()
def run(args):
    """The main job: everything that can be wrong with the arguments first, then encode, sample, decode, write."""
    from safetensors.torch import save_file

    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {args.device} cannot be used ({str(error).splitlines()[0]})") from None
    if args.decode:
        return run_decode(args)
    if args.ref is None or not (args.prompt or "").strip():
        raise UserError("--ref or --prompt is missing, or the prompt is empty")
    if args.compile and args.offload:
        raise UserError("--compile and --offload exclude each other")
    for path, others in ((args.out, (args.ref, args.compare)), (args.compare, (args.ref, args.out))):
        if path and not args.ablate:
            check_output(path, others)
    video, fps = read_reference(args)
    fps, model = args.fps or fps, find_model(args)
    config = motion_config(args)
    toy = load_toy() if model == "toy" else None
    layers = toy.ARCHITECTURE["num_layers"] if toy else wan_min.dit_layers(model)
    if config.block > layers:
        raise UserError(f"--block {config.block} is outside the model's 1 to {layers}")
    if model in wan_min.ARCHITECTURES:
        print(f"{model} with random weights: the picture is noise by design; only the machinery is real")

    seconds, host = {}, "cpu" if args.offload else device
    peak_memory(device, reset=True)
    contexts = prompt_contexts(args, model, device, seconds)
    vae = load_codec(model, device)
    text = f"encoding the reference, {video.shape[2]} frames of {video.shape[3]}x{video.shape[4]} at {fps:g} fps"
    with phase(text, seconds) as progress:
        reference = vae.encode(video.to(device), progress=progress)
    with phase("loading the DiT", seconds) as progress:
        dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" else "bf16")]
        dit = load_dit(model, host, dtype, progress)
        dit = wan_min.offload(dit, device) if args.offload else dit
        for block in dit.blocks if args.compile else ():
            block.compile()
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    sigmas = wan_min.flow_sigmas(args.steps, args.shift, args.strength)
    scarce = wan_min.activation_bytes(dit, noise, config.block) > 0.8 * free_memory(device)
    checkpoint = args.checkpoint == "on" or args.offload or args.checkpoint == "auto" and scarce
    options = {"cfg_scale": args.cfg_scale, "checkpoint": checkpoint}
    if args.ablate:
        cases = toy.held_out_cases(args.seed, noise.device) if toy else ()
        for line in ablate(dit, noise, sigmas, contexts, reference, config, cases=cases, **options):
            print(line, flush=True)
        return

    config = replace(config, guided_fraction=0.0) if args.no_transfer else config
    losses, guided, plain = [], guided_steps(args.steps, config), []

    def callback(step, x, step_losses):
        losses.append(step_losses)
        text = "loss {:.4g} (AMF {:.4g}, window {:.4g})".format(*step_losses[-1]) if step_losses else ""
        steps.set_postfix_str(text)
        steps.update()
        if steps.disable and (step + 1) % max(1, args.steps // 10) == 0:  # in a log file, a line now and then
            print(f"step {step + 1} of {args.steps} {text}", flush=True)

    text = f"sampling, {args.steps} steps, the first {guided} guided"
    with phase(text, seconds) as progress, progress(total=args.steps) as steps:
        latents = sample(dit, noise, sigmas, *contexts[:2], reference=reference, null=contexts[2], config=config,
                         callback=callback, **options)  # fmt: skip
    if toy:  # cheap enough to show what the guidance changed
        with phase("plain generation", seconds):
            sigmas = wan_min.flow_sigmas(args.steps, args.shift)  # from pure noise, whatever the strength
            plain = [sample(dit, noise, sigmas, *contexts[:2], cfg_scale=args.cfg_scale)]
    record, kept = provenance(args, config), args.out.with_suffix(".latents.safetensors")
    save_file({"latents": latents.cpu()}, kept, metadata={"record": record, "fps": str(fps)})
    with latents_kept(kept, args.out), phase("decoding", seconds) as progress:
        flows = [noised_flow(dit, x, noise, contexts[2], config) for x in (reference, *plain, latents)]
        del dit  # the decoder needs the memory
        result = vae.decode(latents, progress=progress)
        write_video(args.out, result, fps, record)
    videos = [video, *map(vae.decode, plain), result]
    if args.compare:
        write_video(args.compare, compare_video(videos, flows, noise.shape[2]), fps, record)
    cosine, error = flow_agreement(flows[0], flows[-1])
    print(f"wrote {args.out}" + (f" and {args.compare}" if args.compare else ""))
    print("seconds: " + ", ".join(f"{name.split(',')[0]} {value:.1f}" for name, value in seconds.items()))
    print(f"gradients: {sum(map(len, losses))} for {guided * config.inner_steps} inner steps; "
          f"peak memory: {peak_memory(device) / 2**30:.2f} GiB")  # fmt: skip
    print(f"flow of the result against the reference, where that moves: cosine {cosine:.3f}, error {error:.2f} tokens")
    if toy:
        moved = [toy.describe_motion(clip[0].cpu()) for clip in videos]
        print("motion asked for: {}; of plain generation: {}; that arrived: {}".format(*moved))


def main(argv=None):
    try:
        run(parse_arguments(argv))
        return 0
    except (UserError, wan_min.ModelError) as error:
        code, text = 2, str(error)
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    except FloatingPointError as error:
        code, text = 1, str(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        code, text = 1, "out of memory; try in this order: --checkpoint on, --offload, fewer --frames, a smaller --size"
    print("fastvmt:", " ".join(text.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
