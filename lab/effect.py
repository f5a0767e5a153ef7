# SPDX-License-Identifier: Apache-2.0
"""How well the method moves the toy, on clips that it was not trained on: the README's table and its figure.

python -m lab.effect            # errors of plain and guided results
python -m lab.effect --masks    # a sprite and its background move differently, and only one of them counts
"""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont

import fastvmt
from lab import extras, toy

GIF_WIDTH, GIF_BYTES = 270, 3_000_000  # of a column; of the file, at most

# ---- What a clip shows -----------------------------------------------------------------------------------------------


def measure_palette(video):
    """The palette whose two colours are nearest to the pixels of a clip (3, F, H, W)."""
    pixels = ((video + 1) / 2).flatten(1).T[toy.sprite_weights(video).flatten() < 0.1]
    error = {}
    for palette in toy.PALETTES:
        distance = torch.cdist(pixels, torch.tensor([toy.COLORS[name] for name in palette.split("-")]))
        unused = distance.argmin(1).bincount(minlength=2).min() < 0.1 * len(pixels)
        error[palette] = distance.amin(1).square().mean() + unused
    return min(error, key=error.get)


def texture_features(video, palette):
    """What tells textures apart, from the spectrum of a clip (3, F, H, W) of this palette: (features,).

    Log mean wave number, its spread, how much the directions of the waves agree modulo 180 and 90 degrees; share of the
    second colour.
    """
    colors = torch.tensor([toy.COLORS[name] for name in palette.split("-")])
    axis = colors[1] - colors[0]
    centered = (video + 1) / 2 - colors.mean(0)[:, None, None, None]
    field = torch.einsum("cfhw,c->fhw", centered, 2 * axis / axis.square().sum())
    ground = 1 - toy.sprite_weights(video)
    field = field.clamp(-1, 1) * ground
    window = torch.hann_window(field.shape[1], False)[:, None] * torch.hann_window(field.shape[2], False)
    n = 2 * field.shape[1]
    power = torch.fft.fft2((field - field.mean((1, 2), keepdim=True)) * window, s=(n, n)).abs().square()
    ky, kx = torch.fft.fftfreq(n)[:, None], torch.fft.fftfreq(n)
    k, angle = torch.hypot(ky, kx).clamp(min=1e-3), torch.atan2(ky, kx)
    power = power * ((k > 0.02) & (k < 0.2))
    power = power / power.sum((1, 2), keepdim=True)
    log_k = (power * k.log()).sum((1, 2))
    spread = (power * (k.log() - log_k[:, None, None]).square()).sum((1, 2))
    turns = [(power * torch.exp(1j * n * angle)).sum((1, 2)) for n in (2, 4)]
    share = ((field > 0) * ground).sum((1, 2)) / ground.sum((1, 2))
    return torch.stack([log_k, spread.log(), turns[0].abs(), turns[1].abs(), share]).mean(1)


def texture_classes(count=480, seed=1, size=toy.SIZE):
    """Normal distribution of the features of every (scale, texture), from clips of the world.

    All have one covariance: with each its own, what is unlike any clip would be called by the most varied texture.
    """
    g, features = torch.Generator().manual_seed(seed), {}
    for _ in range(count):
        scene = toy.draw_scene(g, size=size)
        row = texture_features(toy.render(scene, g, size=size), scene["palette"])
        features.setdefault((scene["scale"], scene["texture"]), []).append(row)
    stacked = {name: torch.stack(rows) for name, rows in features.items()}
    covariance = torch.stack([x.T.cov() for x in stacked.values()]).mean(0)
    return {name: torch.distributions.MultivariateNormal(x.mean(0), covariance) for name, x in stacked.items()}


def shows(video, prompt, classes):
    """Whether a clip (3, F, H, W) has the palette, the texture and, or not, the sprite of the prompt."""
    scale, palette, texture = prompt.split(",")[0].split()
    palette_found = measure_palette(video)
    features = texture_features(video, palette_found).nan_to_num()  # one colour alone has no waves
    found = max(classes, key=lambda name: classes[name].log_prob(features))
    sprite = toy.measure_sprite(video) is not None
    return (palette_found, found, sprite) == (palette, (scale, texture), "," in prompt)


# ---- Measuring and drawing -------------------------------------------------------------------------------------------


def run(dit, args, config, noise, contexts, reference, **seams):
    """Clip (3, F, H, W) of one run; what it says is no line of a table."""
    with redirect_stdout(sys.stderr):
        return toy.decode(fastvmt.generate(args, config, dit, noise, contexts, reference, **seams))[0]


def generate(dit, seed, camera, args, config):
    """Reference video, its scene, the prompt, and [plain, guided] results of one held-out clip; both from one noise."""
    video, scene, prompt = toy.held_out_of_kind(seed, camera, args.size)
    noise, contexts, reference = toy.prepare(video, prompt, seed)
    results = [run(dit, args, config, noise, contexts, guide) for guide in (None, reference)]
    return video, scene, prompt, results


def component_error(video, scene, camera):
    """Error of what moves in this kind of clip: pan or sprite velocity in pixels, zoom in %, rotation in degrees."""
    if camera == "still":
        return toy.sprite_error(video, scene).item()
    error = toy.measure_camera(video) - torch.tensor(scene["camera"])
    return {"pan": error[:2].norm(), "zoom": 100 * error[2].abs(), "rotation": error[3].abs().rad2deg()}[camera].item()


def table(dit, args, config, clips, first):
    """Markdown lines: mean error, and its spread over clips, of plain and guided results."""
    classes, right = texture_classes(size=args.size), []
    yield "| motion | clips | plain | guided | guided/plain |"
    yield "|---|--:|--:|--:|--:|"
    names = {"pan": "pan, px", "zoom": "zoom, %", "rotation": "rotation, degrees", "still": "sprite, px"}
    for n, (camera, name) in enumerate(names.items()):
        errors = []
        for seed in range(first + n * clips, first + (n + 1) * clips):
            _, scene, prompt, results = generate(dit, seed, camera, args, config)
            errors.append([component_error(result, scene, camera) for result in results])
            right.append([shows(result, prompt, classes) for result in results])
        errors = torch.tensor(errors)
        plain, guided = errors.mean(0)
        cells = " | ".join(f"{m:.2f} ± {s:.2f}" for m, s in zip(errors.mean(0), errors.std(0)))
        yield f"| {name} | {clips} | {cells} | {guided / plain:.2f} |"
    plain, guided = torch.tensor(right).T
    kept = (plain & guided).sum().item()
    yield f"\nPrompt right: plain {plain.sum()} of {len(right)}, and of these {kept} guided; guided {guided.sum()}."


def masks(dit, args, config, clips, first):
    """Markdown lines: errors of what moves behind a sprite and of the sprite, by what the mask shows of the reference.

    Mean ± standard error over clips in px a frame, in brackets the paired difference to no mask.
    """
    errors = {name: [] for name in ("plain", "no mask", "the sprite's motion", "the background's motion")}
    for seed in range(first, first + clips):
        video, scene, prompt = toy.held_out(seed, "pan", True, args.size)
        noise, contexts, reference = toy.prepare(video, prompt, seed)
        sprite = toy.sprite_weights(video)[None]  # (1, F, H, W)
        seams = [{"losses": extras.mask_losses(mask, reference)} for mask in (sprite, 1 - sprite)]
        for name, guide, seam in zip(errors, (None, *[reference] * 3), ({}, {}, *seams)):
            result = run(dit, args, config, noise, contexts, guide, **seam)
            errors[name].append([component_error(result, scene, camera) for camera in ("pan", "still")])
    yield f"| {clips} clips | background, px a frame | sprite, px a frame |\n|---|--:|--:|"
    base = torch.tensor(errors["no mask"])  # (clips, 2)
    for name, values in errors.items():
        x = torch.tensor(values)  # (clips, 2)
        change = x - base
        cells = (f"{mean:.2f} ± {error:.2f} ({more:+.2f} ± {spread:.2f})" for mean, error, more, spread in zip(
            x.mean(0), x.std(0) / clips**0.5, change.mean(0), change.std(0) / clips**0.5))  # fmt: skip
        yield f"| {name} | {' | '.join(cells)} |"


def caption(texts, frames):
    """A black strip with texts side by side, for frames (T, H, W, 3) in bytes: (T, 24, W, 3)."""
    strip = Image.new("RGB", (frames.shape[2], 24))
    for column, text in enumerate(texts):
        place = column * strip.width // len(texts) + 6, 3
        ImageDraw.Draw(strip).text(place, text, font=ImageFont.load_default(14))
    return repeat(np.array(strip), "h w c -> t h w c", t=len(frames))


def to_bytes(videos):
    """Videos (1, 3, T, H, W) in [-1, 1], side by side: frames (T, H, W, 3) in bytes."""
    video = rearrange(list(videos), "n 1 c t h w -> t h (n w) c")
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def figure(dit, args, config, path, first):
    """GIF with a row for each kind of motion, of the clip with the next seed: reference, plain and guided result."""
    rows = []
    for n, camera in enumerate(("pan", "zoom", "rotation", "still")):
        video, _, prompt, results = generate(dit, first + n, camera, args, config)
        clips = [F.pad(F.interpolate(clip, scale_factor=4), (4, 4, 4, 4))[None] for clip in (video, *results)]
        frames = to_bytes(clips)
        rows += [frames, caption([f'"{prompt}"'], frames)]
    header = caption(["reference", "without FastVMT", "with FastVMT"], rows[0])
    iio.imwrite(path, np.concatenate([header, *rows], axis=1), duration=125, loop=0)


def write_gif(path, clips, fps):
    """Clips {caption: (1, 3, T, H, W)} side by side, with as many of their frames as GIF_BYTES hold."""
    frames = to_bytes(clips.values())
    frames = np.concatenate([caption(list(clips), frames), frames], axis=1)
    every, data = max(1, len(frames) // 27), bytes(GIF_BYTES + 1)
    while len(data) > GIF_BYTES:
        data = iio.imwrite("<bytes>", frames[::every], extension=".gif", duration=1000 * every / fps, loop=0)
        every *= 2
    path.write_bytes(data)


if __name__ == "__main__":
    text = "How well the method moves the toy, on the CPU. Settings of the method and of sampling: fastvmt's flags."
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--clips", type=int, default=16, help="of each kind of motion")
    parser.add_argument("--first", type=int, default=93000, help="seed of the first clip")
    parser.add_argument("--masks", action="store_true", help="instead: with masks of a sprite and of its background")
    parser.add_argument("--figure", type=Path, help="write this animation instead of the table")
    options, rest = parser.parse_known_args()
    args, config, model = fastvmt.parse_arguments(["--model", "toy", *rest])
    if args.model != "toy":
        parser.error("its clips are the toy's")
    if args.size not in model.canvases:
        parser.error(toy.WRONG_SIZE)
    dit = toy.load()
    if options.figure:
        figure(dit, args, config, options.figure, options.first)
    else:
        lines = masks if options.masks else table
        for line in lines(dit, args, config, options.clips, options.first):
            print(line, flush=True)
