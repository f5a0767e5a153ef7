# SPDX-License-Identifier: Apache-2.0
"""The paper's figures that are claims about the method, with their numbers.

python -m lab.figures --model toy --out figures/                     # all three
python -m lab.figures --model toy --only map --clips 32 --out figures/
python -m lab.figures --model 1.3B --checkpoint on --ref clip.mp4 --prompt "a red fox" --out figures/

window.png (Fig. 5): a flow with and without window. skip.png (Figs. 2b, 3): how alike inner gradients are, and where
reused ones lead. map.png (Fig. 9, Table 2): which block, noise level and τ read a reference's flow. The toy's true flow
is known; of a real clip OpenCV's DIS optical flow of its pixels stands for it, between neighbouring latent frames.
Needs matplotlib 3.7 or newer, and opencv-python for a real clip; --coarse is ignored.
Shapes: J inner steps; F latent frames, H×W tokens, P frame pairs. Flows are (row, column) in tokens.
"""

import importlib
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastvmt
import wan_min
from lab import changes, effect, rivals, table1, toy, train

KINDS = {"pan": "pan", "look-alikes": "look-alikes", "rotation": "rotation", "sprite": "still"}  # of the toy's clips
INTERVALS = (1, 2, 3, 4, 5)  # Δ
LEVELS = (0.0, 0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0)  # σ
TAUS = (1, 3, 10)


class Clip(NamedTuple):
    video: torch.Tensor  # (3, T, h, w)
    scene: dict | None  # of the toy's world
    reference: torch.Tensor  # clean latents
    noise: torch.Tensor
    contexts: tuple  # of the target, the negative and the empty prompt

    def at(self, sigma):
        return fastvmt.match_noise(self.reference.float(), self.noise, sigma)


def make_clips(args, model):
    """{kind: clips}: the toy's, or one of --ref."""
    size, turn = fastvmt.canvas(args, model)
    codec = model.load_codec(args.vae_tiles)

    def make(video, scene, prompt, seed):
        contexts = model.encode_prompts([prompt, args.negative_prompt, ""]).split(1)
        reference = codec.encode(video[None].to(args.device))
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed)).to(args.device)
        return Clip(video, scene, reference, noise, contexts)

    if args.model == "toy":
        seeds = range(args.seed, args.seed + args.clips)
        return {kind: [make(*toy.held_out_of_kind(seed, moves, size), seed) for seed in seeds]
                for kind, moves in KINDS.items()}  # fmt: skip
    read = args.ref == "demo" and model.demo or fastvmt.read_video
    video = read(args.ref, args.frames, size, fps=args.fps or model.fps, start=args.start, turn=turn)
    return {Path(args.ref).name: [make(video[0], None, args.prompt or "", args.seed)]}


# ---- What a clip's flow is ----


def true_flow(scene, i, j, size=toy.SIZE):
    """Flow (P, H, W, 2) of frame pairs i, j of a toy's scene, and where (P, H, W) the match's centre is in view."""
    points, known = train.token_points(scene, [slice(None)] * 3, size)  # (F, H, W, F, 2)
    _, H, W, *_ = points.shape
    points = points[i, :, :, j]  # (P, H, W, 2)
    inside = ((points > -0.01) & (points < torch.tensor([H - 0.99, W - 0.99]))).all(-1)  # as far as an AMF can point
    return points - fastvmt.row_column(torch.arange(H * W), W).view(H, W, 2), known[i, :, :, j] & inside


def pixel_flow(first, second, grid):
    """Flow (H, W, 2) from a picture (3, h, w) to another by OpenCV's DIS, and where (H, W) it counts.

    That is where the way back from its end leads to within half a token.
    """
    import cv2

    frames = effect.to_bytes([torch.stack([first, second], 1)[None]])  # (2, h, w, 3)
    a, b = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames)
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    there, back = search.calc(a, b, None), search.calc(b, a, None)  # (h, w, 2), as (x, y) in pixels
    y, x = np.indices(a.shape, np.float32)
    off = there + cv2.remap(back, x + there[..., 0], y + there[..., 1], cv2.INTER_LINEAR)
    side = a.shape[0] / grid[0]  # of a token
    flow, near = (cv2.resize(z, grid[::-1], interpolation=cv2.INTER_AREA)
                  for z in (there / side, np.float32(np.hypot(*off.transpose(2, 0, 1)) < side / 2)))  # fmt: skip
    return torch.from_numpy(flow).flip(-1), torch.from_numpy(near) > 0.5


def picture(clip, frame):
    """Number of the picture in the middle of those that a latent frame covers."""
    ratio = (clip.video.shape[1] - 1) // (clip.reference.shape[2] - 1)  # Wan's first frame covers one, the others four
    return max(ratio * frame - (ratio - 1) // 2, 0)


def clip_flow(clip, i, j, grid):
    """True flow (P, H, W, 2) of pairs i, j, or that of the pixels, and where (P, H, W) it is known."""
    if clip.scene:
        return true_flow(clip.scene, i, j, clip.video.shape[2:])
    frames = ([clip.video[:, picture(clip, n)] for n in pair] for pair in zip(i.tolist(), j.tolist()))
    flow, known = zip(*(pixel_flow(*pair, grid) for pair in frames))
    return torch.stack(flow), torch.stack(known)


# ---- Figures: each returns its numbers as Markdown, and the picture ----


def new_figure(rows, columns, width, height):
    """A figure, and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def texts_of(values):
    """Cells of a table of values by clip (columns, clips)."""
    return [table1.mean_and_error(x.tolist()) for x in values]


def inner_steps(x, *args):
    """Latents (J+1, n) before and after each inner step of fastvmt.guide, and gradients (J, n); arguments as its.

    What any optimizer does meanwhile would be noted, too.
    """
    latents, gradients = [x.flatten().cpu()], []

    def note(optimizer, *_):
        (moved,) = optimizer.param_groups[0]["params"]
        latents.append(moved.detach().flatten().cpu().clone())
        gradients.append(moved.grad.flatten().cpu().clone())

    hook = register_optimizer_step_post_hook(note)
    try:
        fastvmt.guide(x, *args)
    finally:
        hook.remove()
    return torch.stack(latents), torch.stack(gradients)


def cosines(gradients):
    """(J, n) -> (J, J)"""
    unit = F.normalize(gradients, dim=1)
    return unit @ unit.mT


def principal(points):
    """Coordinates (..., 2) of points (..., n) along their first two principal directions from the origin.

    Also the share of the points' squared lengths that each direction holds (2,).
    """
    flat = points.flatten(0, -2)
    values, vectors = torch.linalg.eigh(flat @ flat.mT)
    values, vectors = values.flip(0)[:2].clamp(min=0), vectors.flip(1)[:, :2]
    return (vectors * values.sqrt()).unflatten(0, points.shape[:-1]), values / flat.square().sum()


def read_steps(dit, clip, args, config, sigmas, shown):
    """Gradients' cosines (J, J) and trajectories (Δ, J+1, n) of the shown ones of a run's guided steps."""
    target, negative, null = clip.contexts
    checkpoint = "full" if args.offload else args.checkpoint == "on"
    starts = [clip.at(sigmas[0].item())]  # what each step begins with
    fastvmt.sample(dit, clip.noise, sigmas, target, negative, cfg_scale=args.cfg_scale, reference=clip.reference,
                   null=null, config=config, checkpoint=checkpoint,
                   callback=lambda number, x, *_: starts.append(x))  # fmt: skip
    for number in shown:
        sigma = sigmas[number].item()
        level = sigma if config.ref_noise == "match" else config.ref_noise
        with torch.no_grad():
            reading = fastvmt.motion_features(dit, clip.at(level), level, null, config)
        read = partial(fastvmt.motion_features, dit, context=target, config=config, checkpoint=checkpoint)
        walks = []
        for interval in INTERVALS:
            settings = replace(config, interval=interval)
            frames = rivals.token_grid(dit, clip.noise)[0]
            walk, gradients = inner_steps(starts[number], sigma, reading, read, fastvmt.motion_losses, settings, frames)
            walks.append(walk)
            if interval == 1:
                alike = cosines(gradients)
        yield alike, torch.stack(walks)


def skip(dit, clips, args, config):
    """Figs. 2b and 3, of pans: the first, the middle and the last guided step."""
    guided = fastvmt.guided_steps(args.steps, config)
    if not guided:
        raise fastvmt.UserError("no step is guided: give another --guided-fraction")
    config = replace(config, guided_fraction=1.0, coarse=0.0)
    sigmas = wan_min.flow_sigmas(args.steps, args.shift, args.strength)[:guided]
    shown = sorted({0, guided // 2, guided - 1})
    lags = range(1, min(5, config.inner_steps))
    panels = {f"step {number + 1}, σ {sigmas[number]:.3f}": [] for number in shown}
    numbers = {name: [] for name in panels}
    for clip in next(iter(clips.values())):
        for name, (alike, walks) in zip(panels, read_steps(dit, clip, args, config, sigmas, shown)):
            start, ends = walks[0, 0], walks[:, -1]
            away = (ends[1:] - ends[0]).norm(dim=1) / (ends[0] - start).norm()
            numbers[name].append(torch.tensor([*(alike.diagonal(lag).mean() for lag in lags), *away]))
            panels[name] = panels[name] or [alike, *principal(walks - start)]
    head = [f"cosine, {lag} apart" for lag in lags] + [f"Δ {n} ends off Δ 1" for n in INTERVALS[1:]]
    rows = {name: texts_of(torch.stack(values, 1)) for name, values in numbers.items()}
    return "\n".join(table1.markdown("guided step", head, rows)), draw_skip(panels)


def draw_skip(panels):
    """panels {name: cosines (J, J), trajectories (Δ, J+1, 2) along two directions, the share (2,) that these hold}."""
    figure, axes = new_figure(2, len(panels), 3.3 * len(panels) + 1, 6.5)
    for (above, below), (name, (alike, walks, shares)) in zip(axes.T, panels.items()):
        last = len(alike) + 0.5
        image = above.imshow(alike.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", extent=(0.5, last, last, 0.5))
        above.locator_params(integer=True)
        above.set(title=name, xlabel="inner step", ylabel="inner step")
        for interval, walk in zip(INTERVALS, walks):
            below.plot(*walk.T, marker=".", label=f"Δ = {interval}")
        below.set(xlabel=f"direction 1 ({shares[0]:.0%})", ylabel=f"direction 2 ({shares[1]:.0%})")
        below.set_aspect("equal", "datalim")
    below.legend()
    figure.colorbar(image, ax=axes[0], label="cosine of gradients")
    return figure


def flow_colors(flow, longest):
    """RGB (..., 3) of a flow (..., 2): its direction as hue, its length as saturation."""
    from matplotlib.colors import hsv_to_rgb

    hue = torch.atan2(*flow.unbind(-1)) / (2 * math.pi) % 1
    saturation = (flow.norm(dim=-1) / longest).clamp(max=1)
    return hsv_to_rgb(torch.stack([hue, saturation, torch.ones_like(hue)], -1).numpy())


@torch.no_grad()
def window(dit, clips, args, config):
    """Fig. 5, of look-alikes: the flow between two frames in the middle, the toy's as far apart as the span.

    Drawn is the clip whose flow is worst without window.
    """
    sigma = 0.0 if config.ref_noise == "match" else config.ref_noise
    errors, drawn = [], []
    for clip in clips.get("look-alikes") or next(iter(clips.values())):
        Q, K = fastvmt.read_qk(dit, clip.at(sigma), sigma, clip.contexts[2], config.block)
        ahead = min(config.span, len(Q) - 1) if clip.scene else 1
        i = (len(Q) - ahead) // 2
        (true,), (known,) = clip_flow(clip, torch.tensor([i]), torch.tensor([i + ahead]), Q.shape[1:3])
        pair = [x[[i, i + ahead]] for x in (Q, K)]
        flows = [true.masked_fill(~known[..., None], math.nan)]
        for side in (None, config.window):
            flows.append(changes.read_flow(*pair, replace(config, span=1, window=side))[0][0].cpu())
        still, without, within = ((flow - true)[known].norm(dim=-1).mean().item() for flow in (true * 0, *flows[1:]))
        errors.append([still, without, within, within - without])
        drawn.append((clip.video[:, picture(clip, i)], flows))
    worst = max(range(len(errors)), key=lambda n: errors[n][1])
    head = ["no flow at all", "without window", "with window", "with minus without"]
    text = "\n".join(table1.markdown("", head, {"error, tokens": texts_of(torch.tensor(errors).T)}))
    names = ["true flow" if clip.scene else "flow of the pixels",
             *(f"{name}: {error:.2f} off" for name, error in zip(head[1:], errors[worst][1:3]))]  # fmt: skip
    return text, draw_window(names, *drawn[worst])


def draw_window(names, frame, flows):
    """flows (H, W, 2) of the frame (3, h, w), the true one first; what is not known, NaN, is grey."""
    grid, longest = flows[0].shape[:2], flows[0].norm(dim=-1).nanquantile(0.95)  # a wrong match may be far longer
    figure, axes = new_figure(2, 3, 10, 0.6 + 6.6 * grid[0] / grid[1])
    side, every = frame.shape[1] / grid[0], max(1, grid[0] // 10)  # more arrows would hide the frame
    frame = ((frame + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
    y, x = (side * (fastvmt.row_column(torch.arange(grid.numel()), grid[1]).view(*grid, 2) + 0.5) - 0.5).unbind(-1)
    for (above, below), name, flow in zip(axes.T, names, flows):
        above.set_title(name)
        above.imshow(np.where(flow[..., :1].isfinite(), flow_colors(flow.nan_to_num(), longest), 0.5))
        below.imshow(frame)
        v, u = (side * flow).unbind(-1)
        below.quiver(*(z[::every, ::every] for z in (x, y, u, v)), angles="xy", scale_units="xy", scale=1,
                     color="red", width=0.006)  # fmt: skip
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    return figure


def block_qk(dit, x, sigma, context):
    """Head-averaged Q, K (F, H, W, D) of each block in turn, all of one run."""
    tokens, shared = rivals.embed(dit, x, sigma, context)
    for block in dit.blocks:
        yield [fastvmt.head_average(y[0], rivals.token_grid(dit, x)) for y in block(tokens, *shared, only_qk=True)]
        tokens = block(tokens, *shared)


def reading_errors(dit, clip, config, taus):
    """Mean error in tokens of a reference's flow (τ, levels, blocks), and that of no flow at all."""
    grid, span = rivals.token_grid(dit, clip.reference), config.span if clip.scene else 1
    true, known = clip_flow(clip, *fastvmt.frame_pairs(grid[0], span), grid[1:])
    errors = []
    for sigma in LEVELS:
        for qk in block_qk(dit, clip.at(sigma), sigma, clip.contexts[2]):
            for tau in taus:
                flow, _ = changes.read_flow(*qk, replace(config, span=span, tau=tau))
                errors.append((flow.cpu() - true)[known].norm(dim=-1).mean())
    errors = torch.stack(errors).view(len(LEVELS), -1, len(taus))
    return errors.permute(2, 0, 1), true[known].norm(dim=-1).mean()


@torch.no_grad()
def map_levels(dit, clips, args, config):
    """Fig. 9 and Table 2, of every kind of clip: the error of a reference's flow by block, noise level and τ."""
    taus, maps, texts = sorted({*TAUS, config.tau}), {}, []
    for kind, some in clips.items():
        errors, still = map(torch.stack, zip(*(reading_errors(dit, clip, config, taus) for clip in some)))
        mean = errors.mean(0)
        maps[kind] = mean, still.mean()
        blocks = errors[:, taus.index(config.tau)].permute(2, 1, 0)  # (blocks, levels, clips)
        rows = {f"block {n}": texts_of(values) for n, values in enumerate(blocks, 1)}
        texts += table1.markdown(f"{kind}, τ {config.tau:g}", [f"σ {sigma}" for sigma in LEVELS], rows)
        tau, level, block = (mean == mean.min()).nonzero()[0].tolist()
        texts.append(f"\nno flow at all: {table1.mean_and_error(still.tolist())}; least: {mean.min():.3f}, of block "
                     f"{block + 1} at σ {LEVELS[level]} and τ {taus[tau]:g}\n")  # fmt: skip
    return "\n".join(texts), draw_map(taus, maps)


def draw_map(taus, maps):
    """maps {kind: errors (τ, levels, blocks), that of no flow at all}."""
    from matplotlib.colors import LogNorm

    blocks = next(iter(maps.values()))[0].shape[2]
    extent = (0.5, blocks + 0.5, len(LEVELS) - 0.5, -0.5)
    figure, axes = new_figure(len(maps), len(taus), len(taus) * (1.6 + 0.12 * blocks) + 1, 2.4 * len(maps) + 0.4)
    for row, (kind, (errors, still)) in zip(axes, maps.items()):
        norm = LogNorm(min(errors.min(), still).item(), max(errors.max(), still).item())
        for panel, tau, values in zip(row, taus, errors):
            image = panel.imshow(values.numpy(), norm=norm, aspect="auto", extent=extent)
            panel.set(title=f"{kind}, τ {tau:g}", xlabel="block", yticks=range(len(LEVELS)), yticklabels=LEVELS)
        row[0].set_ylabel("noise level σ")
        bar = figure.colorbar(image, ax=row, label="error, tokens (red: no flow)").ax
        bar.axhline(still.item(), color="red", linewidth=3)
    return figure


FIGURES = {"window": window, "skip": skip, "map": map_levels}


def run(argv):
    parser = fastvmt.build_parser()
    parser.prog, parser.description = "python -m lab.figures", __doc__.splitlines()[0]
    add = parser.add_argument_group("figures").add_argument
    add("--only", choices=FIGURES, help="one of them")
    add("--clips", type=int, default=4, help="of the toy's, of each kind, from --seed on")
    parser.set_defaults(out=Path("figures"), seed=60000)
    args, config, model = fastvmt.parse_arguments(argv, parser)
    fastvmt.check_limits(vars(args), clips=(1, 10**6))
    is_toy = args.model == "toy"
    if is_toy == bool(args.ref) or args.mask or args.preview or args.decode or args.no_transfer:
        raise fastvmt.UserError("--ref is missing, or is the toy's, which has clips of its own; --mask, --preview, "
                                "--decode and --no-transfer are for fastvmt.py")  # fmt: skip
    for package in ["matplotlib.figure"] + ["cv2"] * (not is_toy):  # what is missing is said first
        importlib.import_module(package)
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        clips = make_clips(args, model)
        dit = model.load_dit()
    for name in [args.only] if args.only else FIGURES:
        text, figure = FIGURES[name](dit, clips, args, config)
        figure.savefig(args.out / f"{name}.png")
        print(f"{text}\ndrawn in {args.out / f'{name}.png'}\n", flush=True)


def main(argv=None):
    try:
        run(argv)
        return 0
    except BaseException as error:
        code, text = fastvmt.explain(error)
        print(f"lab.figures: {text}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
