# SPDX-License-Identifier: Apache-2.0
"""The paper's figures that are claims about the method, with their numbers; drawn by matplotlib, 3.7 or newer.

python -m lab.figures --model toy --out figures/                          # all three
python -m lab.figures --model toy --only map --clips 32 --out figures/
python -m lab.figures --model 1.3B --ref clip.mp4 --out figures/

skip.png (Figs. 2b, 3): how alike inner gradients are, and where reused ones lead. window.png (Fig. 5): a flow with and
without window. map.png (Fig. 9, Table 2): which block, noise level and τ read a reference's flow. The toy's true flow
is known; in its place stands the flow of a real clip's pixels, between neighbouring latent frames, by block matching.
Shapes: J inner steps; F latent frames, H×W tokens, P frame pairs. Flows are (row, column) in tokens.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastvmt
import wan_min
from lab import changes, rivals, table1, toy, train

KINDS = {"pan": "pan", "look-alikes": "look-alikes", "rotation": "rotation", "sprite": "still"}  # of the toy's clips
INTERVALS, LAGS, LEVELS, TAUS = (1, 2, 3, 4, 5), (1, 2, 3, 4), (0.0, 0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0), (1, 3, 10)


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

    if args.model == "toy" and not args.ref:
        seeds = range(args.first, args.first + args.clips)
        return {kind: [make(*toy.held_out_of_kind(seed, moves, size), seed) for seed in seeds]
                for kind, moves in KINDS.items()}  # fmt: skip
    if not args.ref:
        raise fastvmt.UserError("--ref is missing")
    read = args.ref == "demo" and model.demo or fastvmt.read_video
    video = read(args.ref, args.frames, size, fps=args.fps or model.fps, start=args.start, turn=turn)
    return {Path(args.ref).name: [make(video[0], None, args.prompt or "", args.seed)]}


# ---- What a clip's flow is ----


def true_flow(scene, i, j, size=toy.SIZE):
    """Flow (P, H, W, 2) of frame pairs i, j of a toy's scene, and where (P, H, W) the match is wholly in view."""
    matches = train.token_matches(scene, [slice(None)] * 3, size)[i, :, j]  # (P, S, S)
    share, (H, W) = matches.sum(-1), (side // 6 for side in size)
    position = fastvmt.row_column(torch.arange(H * W), W).float()
    flow = (matches @ position) / share.clamp(min=1e-6)[..., None] - position
    return flow.view(-1, H, W, 2), (share > 0.999).view(-1, H, W)


def pixel_blocks(picture, grid):
    """Blocks of two tokens' side around every quarter of a token: (3, h, w) -> (4H−3, 4W−3, 192)."""
    cells = F.interpolate(picture[None], [4 * side for side in grid], mode="bilinear", antialias=True)
    cells = F.pad(cells, (2, 2, 2, 2), mode="replicate")  # so that the first block's middle is the first token's
    return F.unfold(cells, 8)[0].mT.unflatten(0, (4 * grid[0] - 3, -1))


def match_blocks(first, second, grid):
    """Flow (H, W, 2) from a picture (3, h, w) to another by matching blocks, and where (H, W) it counts.

    That is where the block has texture, and its match's own match lies within half a token of it. Of places that look
    alike the nearest is taken: a token of distance costs as much as 2 % of the block's contrast.
    """
    a, b = (pixel_blocks(picture, grid) for picture in (first, second))
    here, there, tokens = a.flatten(0, 1), b.flatten(0, 1), a[::4, ::4].flatten(0, 1)
    places = fastvmt.row_column(torch.arange(len(here), device=a.device), a.shape[1])  # in quarters of a token
    start = places.view(*a.shape[:2], 2)[::4, ::4].flatten(0, 1)  # (S, 2)

    def search(blocks, others, start):
        """Squared distances (S, places), less what is the same for all others, and the best place's index (S,)."""
        cost = others.square().sum(1) - 2 * blocks @ others.mT
        contrast = blocks.var(1, keepdim=True) * blocks.shape[1]
        away = torch.cdist(start.float(), places.float())
        return cost, cost.addcmul(away, contrast, value=0.02 / 4).argmin(1)

    cost, best = search(tokens, there, start)
    _, back = search(there[best], here, places[best])
    cost = F.pad(cost.unflatten(1, a.shape[:2]), (1, 1, 1, 1), value=math.inf)
    n, row, column = torch.arange(len(tokens)), *(places[best] + 1).unbind(1)
    least, offsets = cost[n, row, column], []
    for down, right in ((1, 0), (0, 1)):  # to the bottom of a parabola through the neighbours; NaN at the edge
        before, after = cost[n, row - down, column - right], cost[n, row + down, column + right]
        offsets.append((before - after) / (before - 2 * least + after) / 2)
    flow = (places[best] - start + torch.stack(offsets, 1).nan_to_num(0, 0, 0).clamp(-0.5, 0.5)) / 4
    textured = tokens.unflatten(1, (3, -1)).std(-1).amax(1) > 0.05
    counts = textured & ((places[back] - start).abs().amax(1) <= 2)
    return flow.unflatten(0, grid).cpu(), counts.unflatten(0, grid).cpu()


def picture(clip, frame):
    """The picture (3, h, w) in the middle of those that a latent frame covers."""
    ratio = (clip.video.shape[1] - 1) // (clip.reference.shape[2] - 1)  # Wan's first frame covers one, the others four
    return clip.video[:, max(ratio * frame - (ratio - 1) // 2, 0)].to(clip.reference.device)


def clip_flow(clip, i, j, grid):
    """True flow (P, H, W, 2) of pairs i, j, or that of the pixels, and where (P, H, W) it is known."""
    if clip.scene:
        return true_flow(clip.scene, i, j, clip.video.shape[2:])
    pairs = zip(i.tolist(), j.tolist())
    matches = [match_blocks(picture(clip, first), picture(clip, second), grid) for first, second in pairs]
    flow, known = map(torch.stack, zip(*matches))
    if not known.any():
        raise fastvmt.UserError("nothing in the pixels of --ref can be followed")
    return flow, known


def token_grid(dit, x):
    return tuple(length // patch for length, patch in zip(x.shape[2:], dit.patch_size))


# ---- Figures: each returns its numbers as Markdown, and the picture ----


def new_figure(rows, columns, width, height):
    """A figure, and its axes (rows, columns)."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise fastvmt.UserError("the figures are drawn by matplotlib: pip install matplotlib") from None
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def markdown(title, head, rows):
    """Lines of a table; rows {name: values by clip (columns, clips)}."""
    yield f"| {title} | {' | '.join(head)} |"
    yield "|---" + "|--:" * len(head) + "|"
    for name, values in rows.items():
        yield f"| {name} | {' | '.join(table1.mean_and_error(x.tolist()) for x in values)} |"


def inner_steps(x, *args):
    """Latents (J+1, n) before and after each inner step of fastvmt.guide, and gradients (J, n); arguments as its."""
    seen = []

    def note(optimizer, *_):
        (latents,) = optimizer.param_groups[0]["params"]
        seen.append(torch.stack([latents.detach(), latents.grad]).flatten(1).cpu())

    hook = register_optimizer_step_post_hook(note)
    try:
        fastvmt.guide(x, *args)
    finally:
        hook.remove()
    latents, gradients = torch.stack(seen, 1)
    return torch.cat([x.flatten()[None].cpu(), latents]), gradients


def cosines(gradients):
    """(J, n) -> (J, J)"""
    unit = F.normalize(gradients, dim=1)
    return unit @ unit.mT


def principal(points):
    """Coordinates (..., 2) of points (..., n) along their first two principal directions through the origin."""
    flat = points.flatten(0, -2)
    values, vectors = torch.linalg.eigh(flat @ flat.mT)
    return (vectors * values.clamp(min=0).sqrt())[:, [-1, -2]].unflatten(0, points.shape[:-1])


def read_steps(dit, clip, args, config, sigmas, shown):
    """Gradients' cosines (J, J) and trajectories (Δ, J+1, n) of the shown ones of a run's guided steps."""
    checkpoint = "full" if args.offload else args.checkpoint == "on"
    starts = [clip.at(sigmas[0].item())]
    fastvmt.sample(dit, clip.noise, sigmas, *clip.contexts[:2], cfg_scale=args.cfg_scale, reference=clip.reference,
                   null=clip.contexts[2], config=config, checkpoint=checkpoint,
                   callback=lambda number, x, *_: starts.append(x))  # fmt: skip
    for number in shown:
        sigma = sigmas[number].item()
        level = sigma if config.ref_noise == "match" else config.ref_noise
        read = partial(fastvmt.motion_features, dit, config=config)
        with torch.no_grad():
            reading = read(clip.at(level), level, clip.contexts[2])
        read = partial(read, context=clip.contexts[0], checkpoint=checkpoint)
        walks, gradients = zip(*(inner_steps(starts[number], sigma, reading, read, fastvmt.motion_losses,
                                             replace(config, interval=interval), token_grid(dit, clip.noise)[0])
                                 for interval in INTERVALS))  # fmt: skip
        yield cosines(gradients[0]), torch.stack(walks)


def skip(dit, clips, args, config):
    """Figs. 2b and 3, of pans: the first, the middle and the last guided step."""
    guided = fastvmt.guided_steps(args.steps, config)
    if not guided:
        raise fastvmt.UserError("no step is guided: give another --guided-fraction")
    config = replace(config, guided_fraction=1.0, coarse=0.0)
    sigmas = wan_min.flow_sigmas(args.steps, args.shift, args.strength)[:guided]
    shown = sorted({0, guided // 2, guided - 1})
    names = [f"step {number + 1}, σ {sigmas[number]:.3f}" for number in shown]
    numbers, panels = [], []
    for clip in next(iter(clips.values())):
        for alike, walks in read_steps(dit, clip, args, config, sigmas, shown):
            ends = walks[:, -1]
            away = (ends[1:] - ends[0]).norm(dim=1) / (ends[0] - walks[0, 0]).norm()
            numbers.append(torch.cat([torch.stack([alike.diagonal(lag).mean() for lag in LAGS]), away]))
            if len(panels) < len(shown):
                panels.append((alike, principal(walks - walks[0, 0])))
    numbers = torch.stack(numbers).view(-1, len(shown), len(numbers[0])).permute(1, 2, 0)
    head = [f"cosine, {lag} apart" for lag in LAGS] + [f"Δ {n} ends off Δ 1" for n in INTERVALS[1:]]
    return "\n".join(markdown("guided step", head, dict(zip(names, numbers)))), draw_skip(names, panels)


def draw_skip(names, panels):
    """panels: for each name cosines (J, J), and trajectories (Δ, J+1, 2)."""
    figure, axes = new_figure(2, len(names), 3.3 * len(names) + 1, 6.5)
    for (above, below), name, (alike, walks) in zip(axes.T, names, panels):
        last = len(alike) + 0.5
        image = above.imshow(alike.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", extent=(0.5, last, last, 0.5))
        above.locator_params(integer=True)
        above.set(title=name, xlabel="inner step", ylabel="inner step")
        for interval, walk in zip(INTERVALS, walks):
            below.plot(*walk.T, marker=".", label=f"Δ = {interval}")
        below.set(xlabel="first component", ylabel="second component")
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
    """Fig. 5, of look-alikes: the flow between two frames in the middle, the toy's as far apart as the span."""
    sigma = 0.0 if config.ref_noise == "match" else config.ref_noise
    errors, shown = [], None
    for clip in clips.get("look-alikes") or next(iter(clips.values())):
        Q, K = fastvmt.read_qk(dit, clip.at(sigma), sigma, clip.contexts[2], config.block)
        ahead = min(config.span, len(Q) - 1) if clip.scene else 1
        i = (len(Q) - ahead) // 2
        (true,), (known,) = clip_flow(clip, torch.tensor([i]), torch.tensor([i + ahead]), Q.shape[1:3])
        pair = [x[[i, i + ahead]] for x in (Q, K)]
        read = [replace(config, span=1, window=side) for side in (None, config.window)]
        found = [changes.read_flow(*pair, settings)[0][0].cpu() for settings in read]
        errors.append(torch.stack([(flow - true)[known].norm(dim=-1).mean() for flow in (true * 0, *found)]))
        shown = shown or (picture(clip, i), [true * known[..., None], *found])
    head = ("no flow at all", "without window", "with window")
    text = "\n".join(markdown("", head, {"error, tokens": torch.stack(errors, 1)}))
    return text, draw_window("true flow" if clip.scene else "flow of the pixels", *shown)


def draw_window(name, frame, flows):
    """flows (H, W, 2) of the frame (3, h, w): the true one, without and with window."""
    grid, longest = flows[0].shape[:2], flows[0].norm(dim=-1).max()
    figure, axes = new_figure(2, 3, 10, 0.6 + 6.6 * grid[0] / grid[1])
    side, every = frame.shape[1] / grid[0], max(1, grid[0] // 12)  # more arrows would hide the frame
    frame = ((frame + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    y, x = (side * (fastvmt.row_column(torch.arange(grid.numel()), grid[1]).view(*grid, 2) + 0.5) - 0.5).unbind(-1)
    for (above, below), title, flow in zip(axes.T, (name, "without window", "with window"), flows):
        above.set_title(title)
        above.imshow(flow_colors(flow, longest))
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
        yield [fastvmt.head_average(y[0], token_grid(dit, x)) for y in block(tokens, *shared, only_qk=True)]
        tokens = block(tokens, *shared)


def reading_errors(dit, clip, config, taus):
    """Mean error in tokens of a reference's flow (τ, levels, blocks), and that of no flow at all."""
    grid, span = token_grid(dit, clip.reference), config.span if clip.scene else 1
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
        maps[kind] = errors.mean(0), still.mean()
        rows = errors[:, taus.index(config.tau)].permute(2, 1, 0)  # (blocks, levels, clips)
        names = [f"block {n}" for n in range(1, len(rows) + 1)]
        texts += markdown(f"{kind}, τ {config.tau:g}", [f"σ {sigma}" for sigma in LEVELS], dict(zip(names, rows)))
        texts.append(f"\nno flow at all: {table1.mean_and_error(still.tolist())}\n")
    return "\n".join(texts), draw_map(taus, maps)


def draw_map(taus, maps):
    """maps {kind: errors (τ, levels, blocks), that of no flow at all}."""
    blocks = next(iter(maps.values()))[0].shape[2]
    options = dict(vmin=0, aspect="auto", extent=(0.5, blocks + 0.5, len(LEVELS) - 0.5, -0.5))
    figure, axes = new_figure(len(maps), len(taus), len(taus) * (1.6 + 0.12 * blocks) + 1, 2.4 * len(maps) + 0.4)
    for row, (kind, (errors, still)) in zip(axes, maps.items()):
        for panel, tau, values in zip(row, taus, errors):
            image = panel.imshow(values.numpy(), vmax=still, **options)
            panel.set(title=f"{kind}, τ {tau:g}", xlabel="block", yticks=range(len(LEVELS)), yticklabels=LEVELS)
        row[0].set_ylabel("noise level σ")
        figure.colorbar(image, ax=row, label="error, tokens")
    return figure


FIGURES = {"map": map_levels, "window": window, "skip": skip}


def run(argv):
    parser = fastvmt.build_parser()
    parser.prog, parser.description = "python -m lab.figures", __doc__.splitlines()[0]
    add = parser.add_argument_group("figures").add_argument
    add("--only", choices=FIGURES, help="one of them")
    add("--clips", type=int, default=4, help="of the toy's, of each kind")
    add("--first", type=int, default=60000, help="seed of the first of these")
    parser.set_defaults(out=Path("figures"))
    args, config, model = fastvmt.parse_arguments(argv, parser)
    fastvmt.check_limits(vars(args), clips=(1, 10**6), first=(0, 2**62))
    new_figure(1, 1, 1, 1)  # what is missing is said first
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
