# SPDX-License-Identifier: Apache-2.0
"""Made clips: references whose motion is known, for any model, and how far a result is from that motion.

Textures of the toy's world at the model's own canvas and length. A result's camera is measured from its pixels alone.
"""

import math

import torch
import torch.nn.functional as F

import fastvmt
from lab import toy

MOTIONS = {  # from the first frame to the last: pan down and right in picture heights, log zoom, turn in radians
    "moves-right": (0.0, 0.4, 0.0, 0.0), "zooms-in": (0.0, 0.0, math.log(1.75), 0.0),
    "moves-up": (-0.4, 0.0, 0.0, 0.0), "turns-left": (0.0, 0.0, 0.0, 0.7),
    "moves-left": (0.0, -0.4, 0.0, 0.0), "zooms-out": (0.0, 0.0, -math.log(1.75), 0.0),
    "moves-down": (0.4, 0.0, 0.0, 0.0), "turns-right": (0.0, 0.0, 0.0, -0.7),
}  # fmt: skip
PROMPTS = (  # nothing in them moves by itself, and there is something to see everywhere
    "A market hall seen from above, stalls full of fruit and vegetables under striped awnings, no people, daylight",
    "An old library, tall shelves of colourful books up to the ceiling, ladders and desks, warm light",
    "A mountainside of grey rocks and patches of moss and flowers on a clear day, sharp detail",
    "An old town from the air, red tiled roofs, chimneys and narrow lanes, morning sun",
    "A workshop wall covered with hand tools, boxes of screws and coils of wire, photograph",
    "A quilt of many patterned pieces of cloth, laid out flat, seen from above, soft light",
    "A forest floor with fallen leaves in autumn colours, pine cones and roots, seen from above",
    "A shop window of a pottery, rows of painted plates, bowls and vases, photograph",
)


def scale(size):
    """How many times as large as the toy's large canvas another is."""
    return max(1, min(size) // min(toy.LARGE))


def motion_and_prompt(n, is_toy=False):
    """Motion and prompt of the n-th clip; the toy knows its own words only."""
    scene = toy.draw_scene(torch.Generator().manual_seed(1000 + n), "still", False)
    return list(MOTIONS)[n % len(MOTIONS)], toy.describe(scene) if is_toy else PROMPTS[n % len(PROMPTS)]


def make_scene(motion, seed, size, frames):
    """A scene of the toy's world, without stripes, along which nothing can be told from its neighbours."""
    g, (down, right, zoom, turn) = torch.Generator().manual_seed(seed), MOTIONS[motion]
    scene = {name: toy.choose(words, g) for name, words in (
        ("scale", list(toy.SCALES)), ("palette", toy.PALETTES), ("texture", ("blobs", "checks")))}  # fmt: skip
    whole = down * size[0], right * size[0], zoom, turn
    least = 1 + math.ceil(0.4 * size[0] / scale(size) / 5)  # faster pans than 5 are not looked for
    if frames < least:
        raise fastvmt.UserError(f"made clips of this size need --frames {least} at least")
    return scene | {"camera": tuple(x / (frames - 1) for x in whole),
                    "wavelength": toy.SCALES[scene["scale"]] * scale(size)}  # fmt: skip


def render(scene, seed, size, frames):
    """Video (1, 3, F, H, W) of a scene, frame by frame: many large ones at once would take gigabytes."""
    parts = [(slice(n, n + 1), slice(None), slice(None)) for n in range(frames)]
    pictures = [toy.render(scene, torch.Generator().manual_seed(seed), part, size, frames) for part in parts]
    return torch.cat(pictures, dim=1)[None]


def measure(video):
    """Camera motion (4,) of a clip (3, F, H, W), in its own pixels and frames, from fewer and smaller ones."""
    times, every = scale(video.shape[2:]), max(1, (video.shape[1] - 1) // 16)
    # Of overlapping squares: noise pulls what is measured towards half pixels, where interpolation averages it.
    small = F.avg_pool2d(video[:, ::every].float(), 2 * times, times).cpu()
    camera = toy.measure_camera(small, torch.ones(small.shape[1:]))  # no sprites: real scenes have warm colours
    return camera * torch.tensor([times, times, 1, 1]) / every


def error_columns(video, scene):
    """{column: value} of how far a clip (3, F, H, W) is from moving as a scene does."""
    true, size = torch.tensor(scene["camera"]), video.shape[2:]
    error = toy.mean_speed(measure(video) - true, size)
    return {"motion error, px a frame": error.item(),
            "motion error, %": (100 * error / toy.mean_speed(true, size)).item()}  # fmt: skip
