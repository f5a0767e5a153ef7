# SPDX-License-Identifier: Apache-2.0
"""What --mask and --preview of a run do: a mask says whose motion counts, a preview shows what the run has so far."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch.nn.functional import adaptive_avg_pool3d, pad
from tqdm import tqdm

import fastvmt

HEIGHT = 240  # of a preview in pixels, about


def prepare(args, video, fps):
    """Checks the flags, and returns a function of the reference's latents -> generate's `losses` and `watch`.

    video: the reference (1, 3, T, H, W). Raises UserError.
    """
    if args.mask and args.no_transfer:
        raise fastvmt.UserError("--mask and --no-transfer exclude each other")
    mask = read_mask(args.mask, video, fps, args.start) if args.mask else None

    def seams(reference):
        losses = {"losses": mask_losses(mask, reference)} if args.mask else {}
        path = args.out.with_suffix(".preview.gif")
        return losses | ({"watch": open_preview(path, reference, video, fps)} if args.preview else {})

    return seams


def pool_frames(video, shape):
    """A video (C, T, H, W) as latents of a shape (F, h, w) see it: a causal VAE's first latent frame is one frame."""
    frames = (video.shape[1] - 1) // (shape[0] - 1)  # of a latent frame
    first = video[:, :1].expand(-1, shape[0] * frames - video.shape[1], -1, -1)
    return adaptive_avg_pool3d(torch.cat([first, video], dim=1), shape)


# ---- Mask ------------------------------------------------------------------------------------------------------------


def read_mask(path, video, fps, start):
    """The light of a mask, for a reference (1, 3, T, H, W): fp32 (1, T, H, W) in [0, 1]; what is transparent is black.

    path: a picture, for all frames, or a video or folder that is read like the reference. Raises UserError.
    """
    frames, *size = video.shape[2:]
    try:
        still = getattr(Image.open(path), "n_frames", 1) == 1
    except (OSError, Image.DecompressionBombError):
        still = False
    if still:
        image = fastvmt.open_picture(path).convert("RGBA")
        found = [np.array(ImageOps.fit(image, size[::-1]))] * frames
    elif os.path.isdir(path):
        found = fastvmt.read_pictures(path, size, fps, start, False)
    else:
        _, found = fastvmt.decode_frames(path, size, fps, start, False)
    found = list(islice(found, frames))
    if len(found) < frames:
        raise fastvmt.UserError(f"the mask {path} has {len(found)} frames, the reference {frames}")
    color, alpha = torch.from_numpy(np.stack(found)).split([3, 1], dim=-1)
    return (color.float().mean(-1) * alpha[..., 0] / 255**2)[None]


def mask_losses(mask, reference):
    """fastvmt.motion_losses whose L_AMF weighs each token of an anchor's frame by the mask (1, T, H, W) there.

    reference: the latents (1, C, F, h, w).
    """
    mask = pool_frames(mask, reference.shape[2:]).to(reference)  # (1, F, h, w)
    if not mask[:, :-1].any():  # the last frame is no anchor
        raise fastvmt.UserError("the mask is black: no motion counts")

    def losses(reading, generated, *, num_frames, config):
        flow, _ = generated
        anchors, _ = fastvmt.frame_pairs(num_frames, config.span, flow.device)  # (P,)
        weight = adaptive_avg_pool3d(mask, (num_frames, *flow.shape[1:3]))[0, anchors]  # (P, H, W)
        return fastvmt.motion_losses(reading, generated, num_frames=num_frames, config=config, weight=weight)

    return losses


# ---- Preview ---------------------------------------------------------------------------------------------------------


def fit_colors(latents, video):
    """Map (C + 1, 3) from latents (1, C, F, h, w), and 1, to the colours of their video (1, 3, T, H, W).

    By least squares, so it needs no constants of a model. What colours the video lacks it can only guess; a little
    ridge keeps that from becoming noise.
    """
    colors = rearrange(pool_frames(video[0].float(), latents.shape[2:]).cpu(), "c f h w -> (f h w) c").double()
    columns = latent_columns(latents).flatten(0, 2).double()
    ridge = 1e-3 * len(columns) * torch.eye(columns.shape[1], dtype=torch.float64)
    return torch.linalg.solve(columns.mT @ columns + ridge, columns.mT @ colors).float()


def latent_columns(latents):
    """Latents (1, C, F, h, w) -> (F, h, w, C + 1) fp32 on the CPU, the last all 1."""
    return pad(rearrange(latents.float().cpu(), "1 c f h w -> f h w c"), (0, 1), value=1.0)


def write_gif(path, frames, duration):
    """Write frames (F, h, w, 3) in [-1, 1] as an endless GIF, the whole or nothing. duration: milliseconds a frame."""
    images = [Image.fromarray(frame) for frame in ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()]
    factor = max(1, round(HEIGHT / images[0].height))
    images = [image.resize((factor * image.width, factor * image.height)) for image in images]
    with fastvmt.scratch(path) as folder:
        part = Path(folder, "preview.gif")
        images[0].save(part, save_all=True, append_images=images[1:], duration=duration, loop=0)
        part.replace(path)


def open_preview(path, reference, video, fps):
    """A function of latents that shows them in a file; reference: the latents of the video (1, 3, T, H, W)."""
    colors = fit_colors(reference, video)
    duration = round(1000 * video.shape[2] / fps / reference.shape[2])
    failed = []

    def watch(clean):
        try:
            write_gif(path, latent_columns(clean) @ colors, duration)
        except OSError as error:  # the run goes on
            if not failed:
                tqdm.write(f"no preview in {path} ({error.strerror or error})")
            failed.append(error)

    return watch
