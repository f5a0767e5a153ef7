# SPDX-License-Identifier: Apache-2.0
"""FastVMT: training-free video motion transfer on Wan 2.1, in one file.

Paper: "FastVMT: Eliminating Redundancy in Video Motion Transfer" (arXiv 2602.05551v2), whose equation, section and
appendix numbers stand below, in its order. The method needs torch and einops only: copy what you need. Under it stands
the run that uses it. Shapes in comments: F latent frames, H×W token grid of a frame, S = H·W, D head dimension, P frame
pairs, N tiles (eq. 7's P), T tokens a tile, M window tokens. Positions and flows are (row, column) in tokens.
"""

import math
from dataclasses import dataclass, field, fields
from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch.utils.checkpoint import checkpoint as recompute


class UserError(ValueError):
    """Something that the user can fix; the message is one line."""


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MotionConfig:
    """The method's numbers; the defaults are the paper's, or one of two that it names. Each is also a flag."""

    block: int = setting(15, "DiT block, counted from 1, whose self-attention Q and K are read (Sec. 4.1)")
    tile: tuple = setting((3, 4), "rows and columns of a tile, in tokens (App. B.1)")
    window: int | None = setting(21, "side l of the search window in tokens; 'none': the whole frame (eq. 3, App. B.1)")
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
    ref_noise: float | str = setting(0.0, "noise level of the reference: 0 (Sec. 3.2), or the step's, 'match' (4.1)")

    def __post_init__(self):
        counts = self.block, *self.tile, self.span, self.inner_steps, self.interval
        if min(counts) < 1 or self.window is not None and self.window < 1 or not 0 <= self.guided_fraction <= 1:
            raise UserError("block, tile, window, span, inner_steps, interval must be ≥ 1, guided_fraction 0 to 1")
        if self.center not in ("soft", "argmax"):
            raise UserError(f"center must be 'soft' or 'argmax', not {self.center!r}")
        if self.ref_noise != "match" and not (isinstance(self.ref_noise, (int, float)) and 0 <= self.ref_noise <= 1):
            raise UserError(f"ref_noise must be a noise level from 0 to 1 or 'match', not {self.ref_noise!r}")


# ---- Sliding-window attention motion flow (Sec. 3.2) -----------------------------------------------------------------


def head_average(x, grid):
    """Mean over heads of q or k (App. B.4): x (F·H·W, heads, D), grid (F, H, W) -> (F, H, W, D), fp32 or better."""
    x = x.mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return rearrange(x, "(f h w) d -> f h w d", f=grid[0], h=grid[1])


def frame_pairs(num_frames, span, device=None):
    """Pairs {(i, j): 1 ≤ j−i ≤ span} (eqs. 3, 5, less i = j, where nothing moves): long (P,), by offset, then by i."""
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
    """Each tile's representative, at its row th//2, column tw//2, clamped to the grid: (F, H, W, D) -> (F, N, D)."""
    (_, H, W, _), (th, tw) = Q.shape, tile
    rows = (torch.arange(0, H, th, device=Q.device) + th // 2).clamp(max=H - 1)
    cols = (torch.arange(0, W, tw, device=Q.device) + tw // 2).clamp(max=W - 1)
    return rearrange(Q[:, rows][:, :, cols], "f a b d -> f (a b) d")


def window_centers(queries, keys, *, tau=1.0, center="soft"):
    """Where each tile's window is centred: queries (P, N, D), keys (P, H, W, D) -> long (P, N, 2).

    "soft": the mean position under the query's attention (eqs. 1-2), rounded; "argmax": that of its best key (eq. 4).
    """
    *_, W, D = keys.shape
    logits = einsum(queries, keys, "p n d, p h w d -> p n h w").flatten(2)
    if center == "argmax":
        return row_column(logits.argmax(-1), W)  # eq. 4's P_block + displacement is the best key's own place
    positions = row_column(torch.arange(logits.shape[-1], device=keys.device), W).to(logits.dtype)  # (S, 2)
    return ((logits * (tau / D**0.5)).softmax(-1) @ positions).round().long()


def window_indices(centers, grid, size):
    """Tokens row·W + column of the l×l windows (eq. 3), shifted, not cropped, to lie in the grid: long (P, N, M)."""
    top = (centers[..., 0] - size[0] // 2).clamp(0, grid[0] - size[0])
    left = (centers[..., 1] - size[1] // 2).clamp(0, grid[1] - size[1])
    rows = top[..., None] + torch.arange(size[0], device=centers.device)  # (P, N, l)
    cols = left[..., None] + torch.arange(size[1], device=centers.device)
    return (rows[..., :, None] * grid[1] + cols[..., None, :]).flatten(-2)


def window_means(K, corners, j, size):
    """Mean key K̄ of windows (App. B.4): K (F, H, W, D), their first tokens (P, N), frames j (P,) -> (P, N, D)."""
    rows, cols = row_column(corners, K.shape[2]).unbind(-1)
    K = rearrange(K, "f h w d -> f d h w")
    # The mean of every possible window by two box filters: cheaper than averaging the P·N windows one by one.
    means = F.avg_pool2d(F.avg_pool2d(K, (size[0], 1), stride=1), (1, size[1]), stride=1)
    return rearrange(means, "f d h w -> f h w d")[j[:, None], rows, cols]


def window_flow(queries, K, pairs, windows, tokens, tau, entropy=False):
    """Flow Δ_ij of each token: the attention-weighted mean position in its tile's window, less its own: (P, N, T, 2).

    queries (F, N, T, D) of frames i, at positions tokens (N, T, 2), K (F, H, W, D) of frames j, pairs (i, j), windows
    (P, N, M). entropy: that of the attention instead, 1 where it is uniform: (P, N, T, 1).
    """
    (i, j), (_, H, W, D) = pairs, K.shape
    # F.embedding gathers rows and, unlike indexing, scatters their many repeated gradients back fast.
    keys = F.embedding(j[:, None, None] * (H * W) + windows, K.flatten(0, 2))  # (P, N, M, D)
    # m before t, so that the gradient of the keys comes out in their own memory order.
    attention = (einsum(keys, queries[i], "p n m d, p n t d -> p n m t") * (tau / D**0.5)).softmax(-2)
    if entropy:
        return -(attention * attention.clamp(min=1e-30).log()).sum(-2)[..., None] / math.log(max(windows.shape[-1], 2))
    # Positions are absolute: window-relative ones would lose the motion of the window itself.
    positions = row_column(windows, W).to(attention.dtype)  # (P, N, M, 2)
    return einsum(attention, positions, "p n m t, p n m c -> p n t c") - tokens


def attention_motion_flow(Q, K, *, span=5, tile=(3, 4), window=21, tau=1.0, center="soft", max_elements=2**25,
                          entropy=False):  # fmt: skip
    """AMF Δ_ij of all frame pairs of the span, searched in one l×l window per tile (Sec. 3.2, eqs. 1-5).

    Q, K: (F, H, W, D), F ≥ 2, head-averaged. Returns flow (P, H, W, 2) in tokens, or of entropy (P, H, W, 1), and
    key_mean K̄ (P, N, D), fp32 or better; pairs in frame_pairs' order, tiles row-major. window=None: the full-frame
    AMF of DiTFlow. No gradient flows through the choice of window. About max_elements keys and logits exist at once.
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
    (tokens,) = tile_tokens(row_column(torch.arange(H * W, device=Q.device), W).view(1, H, W, 2), tile)
    N, T, _ = tokens.shape
    elements_per_pair = N * math.prod(size) * (D + T) + H * W * (D + N)
    chunk = max(1, max_elements // elements_per_pair)
    flows, corners = [], []
    for anchors, targets in zip(i.split(chunk), j.split(chunk)):
        with torch.no_grad():
            centers = window_centers(representatives[anchors], K[targets], tau=tau, center=center)
            windows = window_indices(centers, grid, size)
        corners.append(windows[..., 0])
        flows.append(recompute(window_flow, queries, K, (anchors, targets), windows, tokens, tau, entropy,
                               use_reentrant=False, preserve_rng_state=False))  # fmt: skip
    key_mean = window_means(K, torch.cat(corners), j, size).expand(-1, num_tiles, -1)  # (P, 1, D) if one serves all
    return untile_tokens(torch.cat(flows), tile, grid), key_mean


# ---- Losses and step-skip optimizer (Secs. 3.3 and 3.4) --------------------------------------------------------------


def amf_loss(flow_ref, flow_gen, *, num_frames, span=5, alpha=0.2, weight=None):
    """L_AMF: weighted mean squared distance of two flows (P, H, W, 2), over pairs (eq. 5) and tokens (App. B.1).

    weight (H, W), not the paper's, says how much each token counts. No gradient flows to the reference.
    """
    i, j = frame_pairs(num_frames, span, flow_gen.device)
    distance = (flow_gen - flow_ref.detach()).square().sum(-1)  # (P, H, W)
    distance = distance.mean((1, 2)) if weight is None else (distance * weight).sum((1, 2)) / weight.sum()
    w = 1 - alpha * (j - i - 1).to(distance.dtype) / max(span - 1, 1)  # w_d of eq. 6: 1 at offset 1, 1 − α at s_f
    return (w * distance).mean()


def window_loss(key_mean, *, num_frames, span=5, squared=False):
    """L_window: how much the mean key (P, N, D) of a tile's windows changes between targets (eq. 7); 0 below span 3.

    An anchor i has the targets i+1 … min(i+s_f−1, F−1), one fewer than eq. 3 (B.4). squared: eq. 7's, else B.4's norm.
    """
    by_offset = key_mean.split([num_frames - d for d in range(1, min(span + 1, num_frames))])
    loss = key_mean.new_zeros(())
    for i in range(num_frames):
        path = [means[i] for means in by_offset[: span - 1] if i < len(means)]  # K̄_{i→i+1}, K̄_{i→i+2}, …: (N, D)
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


def optimize_latent(x, objective, *, steps=10, interval=3, lr=(0.003, 0.002)):
    """AdamW on the latent alone with a fresh gradient every `interval`-th step, reused between (eqs. 9-10).

    objective: x -> scalar, called ⌈steps/interval⌉ times. lr: the first and the last, linear between. Returns a new x.
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


def motion_features(dit, x, sigma, context, config, *, checkpoint=False, **options):
    """attention_motion_flow of latents x (1, C, F, h, w) at noise level sigma; options go to it, such as entropy."""
    grid = [length // patch for length, patch in zip(x.shape[2:], dit.patch_size)]
    t = torch.full((1,), 1000 * sigma, device=x.device)
    q, k = dit.qk(x, t, context, config.block, checkpoint=checkpoint)
    options |= {name: getattr(config, name) for name in ("span", "tile", "window", "tau", "center")}
    return attention_motion_flow(head_average(q[0], grid), head_average(k[0], grid), **options)


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
def sample(dit, noise, sigmas, context, negative, *, cfg_scale=5.8, velocity_interval=1, reference=None, null=None,
           config=MotionConfig(), checkpoint=False, callback=lambda step, x, losses: None):  # fmt: skip
    """Euler sampler whose first steps optimise the latent so that its motion becomes the reference's (Algorithm 1).

    dit: callable (x, t, context) -> velocity, with `qk` and `patch_size` as wan_min.DiT. noise (1, C, F, h, w); sigmas
    (steps+1,) down to 0; context, negative, null (1, L, text_dim): target, negative and empty prompt. reference: clean
    latents or None. velocity_interval: after config's guided steps only every such step computes a velocity, others
    reuse it. checkpoint: see DiT.qk. callback follows each step, with guide's losses or None. Returns latents.
    """
    if reference is not None and (null is None or reference.shape != noise.shape or len(noise) > 1):
        raise ValueError("a reference must have the shape of the noise, one clip, and needs null, the empty prompt")
    sigmas, x, guided = sigmas.tolist(), noise.float(), guided_steps(len(sigmas) - 1, config)
    if reference is not None:
        noise, reference = x, reference.float()
        x = match_noise(reference, noise, sigmas[0])
    for step, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
        losses = None
        if step < guided and reference is not None:
            if step == 0 or config.ref_noise == "match":
                level = sigma if config.ref_noise == "match" else config.ref_noise
                flow_ref, _ = motion_features(dit, match_noise(reference, noise, level), level, null, config)
            x, losses = guide(dit, x, sigma, context, flow_ref, config, checkpoint=checkpoint)
        if step < guided or (step - guided) % velocity_interval == 0:
            t = torch.full((1,), 1000 * sigma, device=x.device)
            v = dit(x, t, context)
            if cfg_scale != 1:
                v_negative = dit(x, t, negative)
                v = v_negative + cfg_scale * (v - v_negative)
        x = x + (next_sigma - sigma) * v
        callback(step, x, losses)
    return x


# ---- The run: video in and out ---------------------------------------------------------------------------------------

import argparse
import importlib
import json
import logging
import os
import re
import shutil
import sys
from itertools import islice
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from imageio_ffmpeg import count_frames_and_secs, read_frames
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from tqdm import tqdm

import wan_min

MEASURE_SIGMA = 0.1  # where finished clips are read: nearly clean, and a level that the model was trained on
DEMO = "testsrc2=r=16,loop=-1:1,scroll=h=-1/80:v=-1/80"  # a picture slides right and down
SCALER = "bicubic+accurate_rnd+full_chroma_int"  # ffmpeg's default turns colours a level darker
logging.getLogger("imageio_ffmpeg").setLevel("ERROR")  # it warns of resizing


def open_video(path, options, *filters):
    """imageio's description of a video, and its frames in RGBA."""
    source = DEMO if path == "demo" else os.path.abspath(path)  # neither URL nor option
    options = ["-reinit_filter", "0", *options]  # all get the first frame's size
    filters = ",".join(["scale=iw*sar:ih", *filter(None, filters)])
    try:
        frames = read_frames(source, "rgba", 4, options, ["-map", "0:V:0", "-sws_flags", SCALER, "-vf", filters])
        return next(frames), frames
    except OSError as error:
        cause = re.search(r"(?m)^(?:\[.*\] )?(?!Input)(\S.*(?:rror|nvalid|no streams|No such).*)|\Z", str(error))[1]
        raise UserError(f"cannot read the reference {path} ({cause or 'no frame can be decoded'})") from None


def open_frames(path, fps, start):
    """A video's frames as images, and its own rate."""
    options = ["-f", "lavfi"] if path == "demo" else []
    seek = max(start - 10, 0) if re.search(r"(?i)\.(mp4|mov|mkv|webm)$", str(path)) else 0  # others lack an index
    options += ["-ss", f"{seek:f}"] if seek else []
    about, _ = open_video(path, options)
    codec, pixels, large = about["codec"][:3], about["pix_fmt"], math.prod(about["size"]) > 1024 * 576
    decoders = {"vp8": ["-c:v", "libvpx"], "vp9": ["-c:v", "libvpx-vp9"]}  # they know alpha
    options += decoders.get(codec, [])
    skipped, phase = divmod(start - seek, 1 / fps)
    _, frames = open_video(
        path,
        options,
        pixels.startswith("pal8") and "format=gbrap",  # or its alpha is lost
        large and re.match(r"yuv(?!.*[( ](bt|smpte))", pixels) and "setparams=colorspace=bt709",
        codec == "gif"  # one tick means ten, as in browsers
        and "setpts=if(N\\,PREV_OUTPTS+if(eq(PTS-PREV_INPTS\\,1)\\,10\\,PTS-PREV_INPTS)\\,PTS)",
        "bwdif=send_frame:auto:interlaced",
        f"settb=1/705600000,setpts=round(PTS-{0 if seek else 'STARTPTS'}-{phase}/TB)",  # exact at usual rates
        f"fps={fps}:start_time=0",
        # PQ, HLG: white is 203 cd/m² (BT.2408), and brighter clips
        re.search("smpte2084|arib-std-b67", pixels) and "zscale=npl=203:p=bt709:t=bt709:m=bt709:agamma=0",
    )
    return (Image.frombytes("RGBA", about["size"], frame) for frame in islice(frames, int(skipped), None)), about["fps"]


def open_pictures(path, first):
    """The pictures of a folder."""
    names = [name for name in os.listdir(path) if name[0] != "."]
    names.sort(key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)])
    known = [name for name in names if Path(name).suffix.lower() in Image.registered_extensions()]
    stems = {Path(name).stem for name in known}
    if len(stems) < len(names):
        print(f"{path}: {len(names)} files, {len(known)} pictures for Pillow, {len(stems)} names")
    for name in known[first:]:
        try:
            image = ImageOps.exif_transpose(Image.open(Path(path, name)))
        except OSError as error:
            raise UserError(f"cannot read the reference {path}/{name} ({error})") from None
        yield (image.point(lambda x: x / 256) if image.mode[0] == "I" else image).convert("RGBA")  # 16 bits clip


def read_video(path, num_frames, size, *, fps=16.0, start=0.0, turn=False):
    """At most num_frames frames, cut to 4k+1, from `start` seconds, `fps` a second: fp32 (1, 3, T, H, W) in [-1, 1].

    path: a video, a folder of pictures, one a frame in natural order, or "demo". size is covered, and turned for a
    portrait reference if `turn`. UserError if unreadable or under 5 frames.
    """
    if path == "demo" or os.path.isfile(path):
        images, rate = open_frames(path, fps, start)
    elif os.path.isdir(path):
        images, rate = open_pictures(path, round(start * fps)), fps
    else:
        raise UserError(f"cannot read the reference {path} (not a file or a folder)")
    frames = []
    for image in islice(images, num_frames):
        if not frames and turn and image.height > image.width:
            size = size[::-1]
        frames.append(np.array(ImageOps.fit(image, size[::-1])))
    if len(frames) < 5:
        found = f"{len(frames)} frames from {start:g} s at --fps {fps:g} (own: {rate:g})"
        raise UserError(f"reference {path} has {found}, not 5 or more")
    frames = rearrange(frames[: (len(frames) - 1) // 4 * 4 + 1], "t h w c -> 1 c t h w")
    color, alpha = torch.from_numpy(frames).split([3, 1], dim=1)
    return (color / 127.5 - 1) * (alpha / 255)  # on mid grey


def partial_path(path):
    path = Path(os.path.realpath(path))  # of what a symbolic link leads to
    return path.with_name(f".{path.stem}.partly-written.mp4")


def write_video(path, video, fps, comment=""):
    """Write (1, 3, T, H, W) in [-1, 1] as H.264 mp4, under a temporary name until it is whole."""
    if not torch.stack(video.aminmax()).isfinite().all():
        raise UserError(f"cannot write {path} (the video is not finite)")
    frames = rearrange(video[0], "c t h w -> t h w c")
    frames = [((frame.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy() for frame in frames]
    tags = "setparams=color_primaries=bt709:color_trc=bt709"
    options = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv:flags={SCALER},{tags}", "-crf", "17"]
    options += ["-movflags", "+faststart", "-metadata", f"comment={comment}"]
    part = partial_path(path)
    try:
        imageio.imwrite(
            part, frames, plugin="FFMPEG", fps=fps, codec="libx264", macro_block_size=1, output_params=options
        )
        count_frames_and_secs(part)  # fails where ffmpeg did; imageio is silent
        part.replace(os.path.realpath(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}); is the disk full?") from None
    finally:
        part.unlink(missing_ok=True)


def flow_agreement(flow_ref, flow_gen, moving=0.5):
    """Cosine and error in tokens of flows (P, H, W, 2), where the reference moves by over `moving` (NaN: nowhere)."""
    ref, gen = (flow[flow_ref.norm(dim=-1) > moving] for flow in (flow_ref, flow_gen))
    return F.cosine_similarity(ref, gen, dim=-1).mean().item(), (ref - gen).norm(dim=-1).mean().item()


def compare_video(clips, flows):
    """Named clips side by side, below each its motion as colours, grey at rest: (1, 3, T, 2·z·h + 42, clips·z·w).

    clips: name -> (1, 3, T, h, w) in [-1, 1], drawn z times as large; flows: AMF (F−1, H, W, 2) of offset 1 of each.
    """
    videos = torch.cat([clip.float().cpu() for clip in clips.values()])
    zoom = math.ceil(240 / videos.shape[3])
    videos = repeat(videos, "n c t h w -> n c t (h a) (w b)", a=zoom, b=zoom)
    flows = torch.stack(list(flows)).cpu()
    length = flows.norm(dim=-1, keepdim=True)
    direction, thirds = torch.atan2(flows[..., :1], flows[..., 1:]), torch.tensor([0, 2, 4]) * (math.pi / 3)
    color = (direction - thirds).cos() * (length / length.quantile(0.99).clamp(min=0.5)).clamp(max=1)  # RGB
    motions = F.interpolate(rearrange(color, "n f h w c -> n c f h w"), videos.shape[2:], mode="nearest")
    (n, _, frames, _, width), legend = videos.shape, "motion: red right, green down, cyan left, violet up"
    strip = Image.new("RGB", (n * width, 42))
    for column, name in enumerate(clips):
        ImageDraw.Draw(strip).text((column * width + 6, 3), f"{name}\n{legend}", font=ImageFont.load_default(14))
    strip = repeat(torch.from_numpy(np.array(strip)) / 127.5 - 1, "h w c -> c t h w", t=frames)
    return torch.cat([strip, rearrange([videos, motions], "two n c t h w -> c t (two h) (n w)")], dim=2)[None]


# ---- Command line ----------------------------------------------------------------------------------------------------

PRESETS = {  # settings that people compare; what a setting cannot say is in the README
    "paper": {"ref_noise": "match", "strength": 1.0, "vae_tiles": True},  # Sec. 4.1, where Sec. 3.2 differs
    # The authors' example; its L_AMF sums over the 1560 tokens of 480x832, so that its window loss weighs 1/1560.
    "release": {"ref_noise": "match", "strength": 0.75, "span": 3, "lambda_window": 1 / 1560, "lr": (0.003, 0.0021),
                "fps": 15.0},
    # DiTFlow (arXiv 2412.07776) and its code's guidance_config.yaml.
    "ditflow": {"ref_noise": 0.0, "window": None, "span": 20, "alpha": 0.0, "tau": 2.0, "lambda_window": 0.0,
                "inner_steps": 5, "interval": 1, "lr": (0.002, 0.001)},
}  # fmt: skip


def HxW(text):  # argparse shows these names
    height, width = (round(int(side) / 16) * 16 for side in text.lower().split("x"))
    return max(height, 32), max(width, 32)


def int_or_none(text):
    return None if text == "none" else int(text)


def level_or_match(text):
    return text if text == "match" else float(text)


def build_parser():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

    parser = Parser(prog="fastvmt.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Give a video of the prompt the motion of a reference video.")  # fmt: skip
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction, "default": False}
    add("--ref", help="reference: a video, a folder of pictures, or 'demo' for a made-up clip")
    add("--prompt", help="what the new video shows")
    add("--out", type=Path, default=Path("out.mp4"), help="mp4 to write")
    add("--compare", type=Path, help="also write this mp4: reference and result side by side, the motion of each below")
    add("--plain", **switch, help="show plain generation in --compare too, at the cost of its own steps")
    add("--model", default="1.3B", help="1.3B, 14B, a checkpoint folder, a hub repo id, toy, or tiny (random weights)")
    add("--random-weights", action="store_true", help="random weights for 1.3B or 14B, to study speed and memory")
    add("--preset", choices=PRESETS, help="settings to compare with: the paper's, its release's, DiTFlow's")
    add("--size", type=HxW, help="of the output, HxW; if not given the model's own, turned like the reference")
    add("--frames", type=int, default=81, help="use at most this many frames, rounded down to 4k+1 (Sec. 4.1)")
    add("--fps", type=float, help="frames per second of reference and output; if not given the model's own")
    add("--start", type=float, default=0.0, help="seconds into the reference")
    add("--seed", type=int, default=0, help="of the initial noise, the same on every device")
    add("--no-transfer", action="store_true", help="generate plainly, from pure noise")
    add("--decode", type=Path, help="finish a stopped run: its flags, and the latents that it kept (deleted when done)")
    add("--negative-prompt", default="", help="what to steer away from; if not given the model's own")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    add("--device", default=device, help="torch device")
    add("--dtype", choices=["bf16", "fp32"], help="of the DiT's matmuls; if not given bf16 on a GPU, fp32 on CPU")
    add("--checkpoint", choices=["auto", "on", "off"], default="auto", help="recompute blocks in the backward pass")
    add("--offload", action="store_true", help="keep the blocks' weights in host memory and stream them to the device")
    add("--vae-tiles", **switch, help="encode and decode in tiles of 30x52 latents always (Sec. 4.1)")
    add("--compile", action="store_true", help="compile the DiT's blocks with torch.compile")
    add("--steps", type=int, default=50, help="denoising steps (Sec. 4.1)")
    add("--shift", type=float, default=7.0, help="timestep shift (authors' code; the paper names none)")
    add("--cfg-scale", type=float, default=5.8, help="classifier-free guidance scale (authors' code)")
    add("--velocity-interval", type=int, default=1, help="steps after the guided ones that share one velocity")
    add("--strength", type=float, default=1.0, help="below 1, start from the noised reference (authors' code: 0.75)")
    types = {"window": int_or_none, "ref_noise": level_or_match}
    for f in fields(MotionConfig):
        example, nargs = (f.default[0], 2) if isinstance(f.default, tuple) else (f.default, None)
        value = {"type": types.get(f.name, type(example)), "nargs": nargs, "default": f.default}
        options = {"action": "store_true"} if example is False else value
        add("--" + f.name.replace("_", "-"), help=f.metadata["help"], **options)
    return parser


def parse_arguments(argv, parser=None):
    """The flags, the method's settings and the wan_min.Model; its defaults and a preset's yield to any flag."""
    parser = parser or build_parser()
    args = parser.parse_args(argv)  # what is wrong in itself is told before a model is looked for
    limits = {"frames": (5, 10**4), "fps": (1, 240), "start": (0, 10**6), "seed": (0, 2**63 - 1), "steps": (1, 10**4),
              "shift": (0.001, 1000), "strength": (0.001, 1), "velocity_interval": (1, 10**4)}  # fmt: skip
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {args.device} cannot be used ({str(error).splitlines()[0]})") from None
    full = args.dtype == "fp32" or args.dtype is None and device.type == "cpu"
    source = importlib.import_module("lab.toy") if args.model == "toy" else wan_min
    model = source.open_model(args.model, device, torch.float32 if full else torch.bfloat16, offload=args.offload,
                              random_weights=args.random_weights)  # fmt: skip
    parser.set_defaults(**model.defaults | PRESETS.get(args.preset, {}))
    args = parser.parse_args(argv)
    if args.block > model.blocks:
        raise UserError(f"--block {args.block} is outside the model's 1 to {model.blocks}")
    values = {f.name: getattr(args, f.name) for f in fields(MotionConfig)}
    config = MotionConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    return args, config, model


def check_arguments(args, kept):
    """UserError or OSError for what can be told to be wrong before anything is read or loaded."""
    if args.ref is None or not (args.prompt or "").strip() or len(args.prompt + args.negative_prompt) > 10_000:
        raise UserError("--ref or --prompt is missing, or the prompt is empty or longer than 10,000 characters")
    if args.compile and args.offload:
        raise UserError("--compile and --offload exclude each other")
    outputs = [path for path in (args.out, args.compare) if path]
    distinct = {os.path.realpath(path) for path in (args.ref, *outputs)}
    if len(distinct) < 1 + len(outputs) or any(path.suffix.lower() != ".mp4" for path in outputs):
        raise UserError("--out and --compare must be two file names that end in .mp4, and not the reference")
    for path in (kept, *outputs):
        partial_path(path).touch()  # OSError where it cannot be written
        partial_path(path).unlink()
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder")
    if kept.exists() and not args.decode:
        raise UserError(f"{kept} is what a stopped run kept: --decode it, move it or delete it")
    if shutil.disk_usage(kept.absolute().parent).free < 2**27:
        raise UserError(f"less than 128 MiB are free beside {kept}")


def generate(args, config, dit, noise, contexts, reference):
    """Latents guided by the reference or, without one, plainly made from pure noise; shows its progress."""
    strength, guided = (1.0, 0) if reference is None else (args.strength, guided_steps(args.steps, config))
    sigmas = wan_min.flow_sigmas(args.steps, args.shift, strength)
    if guided:
        print(f"guiding steps 1 to {guided} of {args.steps}, σ {sigmas[0]:.3f} to {sigmas[guided - 1]:.3f}", flush=True)

    def callback(step, x, losses):
        if not torch.isfinite(x).all():
            raise UserError(f"the latent is not finite after step {step + 1} of {args.steps}; try --dtype fp32")
        bar.set_postfix(zip(("loss", "AMF", "window"), [] if losses is None else losses[-1].tolist()))
        bar.update(step + 1 - bar.n)

    with tqdm(total=args.steps, desc="sampling", mininterval=1 if sys.stderr.isatty() else 60) as bar:
        for checkpoint in ("full" if args.offload else args.checkpoint == "on", True):
            try:
                return sample(dit, noise, sigmas, *contexts[:2], cfg_scale=args.cfg_scale, reference=reference,
                              velocity_interval=args.velocity_interval, null=contexts[2], config=config,
                              checkpoint=checkpoint, callback=callback)  # fmt: skip
            except RuntimeError as error:
                if checkpoint or args.checkpoint == "off" or reference is None or not wan_min.out_of_memory(error):
                    raise
            print("out of memory: again with --checkpoint on", flush=True)  # here the failed try's tensors are free


@torch.no_grad()
def run(args, config, model):
    """The main job: everything that can be wrong with the arguments first, then encode, sample, decode, write."""
    kept = args.decode or args.out.parent / f"{args.out.stem}.latents.safetensors"
    check_arguments(args, kept)
    saved, fps = load(kept.read_bytes()) if args.decode else {}, args.fps or model.fps
    progress = partial(tqdm, leave=False, disable=None)
    size, turn = args.size or model.canvases[0], not args.size and model.canvases[0][::-1] in model.canvases
    read = model.demo if args.ref == "demo" and model.demo else read_video
    video = read(args.ref, args.frames, size, fps=fps, start=args.start, turn=turn)
    record = vars(args) | {"ai_generated": True, "program": "FastVMT (fastvmt.py)", "torch": torch.__version__}
    record = json.dumps(record | {"ref": os.path.basename(args.ref)}, default=os.path.basename)
    notices = {
        f"only {video.shape[2]} frames: the reference is shorter than --frames": video.shape[2] < args.frames - 3,
        f"the model was trained on clips of up to {model.max_frames} frames": video.shape[2] > model.max_frames,
        "--size is rows x columns: this is a portrait video": size in model.canvases[1:] and not turn,
    }
    print(*(text for text, holds in notices.items() if holds), "encoding the prompts", sep="\n", flush=True)
    contexts = model.encode_prompts([args.prompt, args.negative_prompt, ""]).split(1)
    print("encoding the reference, {} frames of {}x{} at {:g} fps".format(*video.shape[2:], fps), flush=True)
    codec = model.load_codec(args.vae_tiles)
    reference = codec.encode(video.to(args.device), progress=progress)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(args.seed)).to(args.device)
    if saved and saved.get("result", noise[0]).shape != noise.shape:
        raise UserError(f"{kept} holds no latents of this --ref, --frames and --size")
    print("loading the DiT", flush=True)
    dit = model.load_dit(progress)
    for n in range(model.blocks if args.compile else 0):
        dit.blocks[n].compile()
    results = {name: x.to(args.device) for name, x in saved.items()}
    if not results:
        if args.plain and args.compare and not args.no_transfer:
            results["plain"] = generate(args, config, dit, noise, contexts, None)
        results["result"] = generate(args, config, dit, noise, contexts, None if args.no_transfer else reference)
        save_file({name: x.cpu() for name, x in results.items()}, partial_path(kept))
        partial_path(kept).replace(kept)  # a file that is there is whole
        print(f"latents kept in {kept}; should the rest fail, the same flags and --decode {kept} finish it", flush=True)
    features = partial(motion_features, dit, sigma=MEASURE_SIGMA, context=contexts[2], config=config)
    measured = {name: match_noise(x, noise, MEASURE_SIGMA) for name, x in [("reference", reference), *results.items()]}
    flows = {name: features(x)[0] for name, x in measured.items()}
    entropy = 100 * features(measured["reference"], entropy=True)[0].mean()
    offset_1 = noise.shape[2] // dit.patch_size[0] - 1  # pairs of neighbouring frames, which come first
    del dit, features  # the decoder needs the memory
    clips = {"reference": video, **{name: codec.decode(x, progress=progress) for name, x in results.items()}}
    write_video(args.out, clips["result"], fps, record)
    if args.compare:
        write_video(args.compare, compare_video(clips, [flow[:offset_1] for flow in flows.values()]), fps, record)
    kept.unlink()
    print(f"wrote {args.out}" + (f" and {args.compare}" if args.compare else ""))
    cosine, error = flow_agreement(flows["reference"], flows["result"])
    print(f"flow of the result where the reference moves (nan: nowhere): cosine {cosine:.3f}, error {error:.2f} tokens")
    print(f"entropy of the reference's attention over its windows: {entropy:.0f} % of uniform")
    for name, clip in clips.items() if model.describe_motion else ():
        print(f"motion of the {name}: {model.describe_motion(clip[0].cpu())}")


def explain(error):
    """Exit code and one line for what the user can set right; raises any other error."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, (UserError, wan_min.ModelError, OSError, SafetensorError)):
        return 2, " ".join(str(error).split())
    if wan_min.out_of_memory(error):
        return 1, "out of memory; try in this order: --checkpoint on, --offload, fewer --frames, a smaller --size"
    raise error


def main(argv=None):
    """The command line; returns the exit code."""
    try:
        run(*parse_arguments(argv))
        return 0
    except BrokenPipeError:  # as of `| head`
        os._exit(1)
    except BaseException as error:
        code, text = explain(error)
    print(f"fastvmt: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may not know σ
    sys.exit(main())
