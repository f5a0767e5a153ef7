# SPDX-License-Identifier: Apache-2.0
"""Trains the toy: flow matching on clips made on the fly, and a loss that asks attention to look at the same content.

    python -m lab.train --compile

writes lab/weights.safetensors after two hours on two CPU cores. The last stage alone goes on from --start.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file

from lab import toy


def draw_batch(count, generator, shape=(toy.FRAMES, *toy.SIZE)):
    """Training clips: latents (B, 16, F, h, w), contexts (B, 8, words) and token_matches of each, (B, ...).

    shape: of the part of the clips that is taken, at random places. A word, or all of them, may be missing.
    """
    scenes = [toy.draw_scene(generator) for _ in range(count)]
    full = (toy.FRAMES, *toy.SIZE)
    starts = [[int(toy.draw(0, length - n + 1, generator)) for length, n in zip(full, shape)] for _ in scenes]
    parts = [[slice(a, a + n) for a, n in zip(start, shape)] for start in starts]
    video = torch.stack([toy.render(scene, generator, part) for scene, part in zip(scenes, parts)])
    words = [[w for w in toy.known_words(toy.describe(s))[0] if toy.draw(0, 1, generator) > 0.05] for s in scenes]
    context = toy.embed_words([w if toy.draw(0, 1, generator) > 0.1 else [] for w in words])
    return toy.encode(video), context, torch.stack([token_matches(s, part) for s, part in zip(scenes, parts)])


def token_points(scene, part, size=toy.SIZE):
    """Where the content of each token is on each frame, in tokens: (F, H, W, F, 2), and where it is not hidden.

    The sprite hides what it covers. part: as of toy.render.
    """
    camera, times = torch.tensor(scene["camera"]), toy.frame_times()[part[0]]
    side = 2 * toy.ARCHITECTURE["patch_size"][1]  # of a token, in pixels
    centers = F.avg_pool2d(toy.pixel_grid(size)[tuple(part[1:])].permute(2, 0, 1), side).permute(1, 2, 0)  # (H, W, 2)
    points = torch.einsum("gxy,fhwy->fhwgx", toy.similarity(camera, times), toy.mid_clip(centers, camera, times))
    points = points + times[:, None] * camera[:2]
    known = torch.ones(points.shape[:-1], dtype=bool)
    if "color" in scene:
        path = toy.sprite_path(scene, times)
        inside = (centers - path[:, None, None]).norm(dim=-1) < toy.RADIUS  # (F, H, W)
        hidden = (points - path).norm(dim=-1) < toy.RADIUS
        carried = centers[:, :, None] + (path - path[:, None])[:, None, None]
        points = torch.where(inside[..., None, None], carried, points)
        known = inside[..., None] | ~hidden
    return (points - centers[0, 0]) / side, known


def token_matches(scene, part, size=toy.SIZE):
    """Where the content of each token is on each frame, shared among the four tokens around it: (F, S, F, S).

    Zero where it is out of view or hidden by the sprite, and from a frame to itself.
    """
    points, known = token_points(scene, part, size)
    size = torch.tensor(points.shape[1:3])
    itself = torch.eye(len(points), dtype=bool)[:, None, None]
    known = known & ~itself & ((points > -0.5) & (points < size - 0.5)).all(-1)
    points = points.clamp(min=0).minimum(size - 1)
    row, col = (F.relu(1 - (points[..., n, None] - torch.arange(size[n])).abs()) for n in (0, 1))
    share = row[..., :, None] * col[..., None, :] * known[..., None, None]
    return rearrange(share, "f h w g y x -> f (h w) g (y x)")


def matching_loss(q, k, matches):
    """Cross-entropy of attention with the true matches (B, F, S, F, S), of q and k (B, F·S, heads, D): scalar.

    It stands for what we assume that a big video model learns from its data. The attention is what the AMF reads: of
    the heads' means, over one frame at a time.
    """
    q, k = (x.mean(2).unflatten(1, matches.shape[1:3]) for x in (q, k))
    attention = torch.einsum("bfqd,bgkd->bfqgk", q, k) / q.shape[-1] ** 0.5
    return -(attention.log_softmax(-1) * matches).sum() / matches.sum().clamp(min=1)


def orthogonalize(g):
    """Nearest semi-orthogonal matrices of g (n, r, c), about: Muon's five Newton-Schulz steps."""
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if g.shape[1] <= g.shape[2] else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for matrices, all of one shape at a time. torch.optim.Muon's bfloat16 takes a CPU as long as the model."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = torch.stack([p.grad for p in params])
                state = self.state[params[0]].setdefault("momentum", torch.zeros_like(grads))
                state.lerp_(grads, 1 - group["momentum"])
                update = orthogonalize(grads.lerp(state, group["momentum"]))
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(u, alpha=group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


STAGES = (  # steps, clips a step, their (frames, rows, columns), noise, jitter, learning rates' shares at start and end
    (3000, 12, (1, *toy.SIZE), 0.8, 0.0, 1.0, 1.0),  # frames alone teach the words in many cheap steps
    (4000, 4, (3, *toy.SIZE), 0.8, 0.7, 1.0, 1.0),  # short clips, the textures and the matches
    (9500, 2, (toy.FRAMES, *toy.SIZE), 0.8, 0.0, 0.7, 0.0),
    (9000, 2, (toy.FRAMES, *toy.SIZE), 1.6, 0.0, 0.5, 0.0),  # more noise, where sprites find their places
)


def train(out, stages=STAGES, start=None, seed=0, rates=(2e-3, 0.02), log=100, compile=False):
    """Flow matching on clips made on the fly, and matching_loss; saves the weights' moving average as bf16 to `out`.

    start: a file of weights to go on from. rates: learning rates of AdamW and, for the matrices of the blocks, Muon.
    A stage's noise is the mean logit of its noise levels, its jitter their spread over a clip's frames: cleaner frames
    help to find the content of noisier ones.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    dit = toy.Denoiser(**toy.ARCHITECTURE)
    with torch.no_grad():  # the empty channels: never read, never written
        dit.patch_embedding.weight[:, 12:] = 0
        for p in (dit.head.head.weight, dit.head.head.bias):
            p.unflatten(0, (-1, 16))[:, 12:] = 0
    if start is not None:
        dit.load_state_dict(load_file(start))
    matrices = [p for p in dit.blocks.parameters() if p.ndim == 2]
    others = [p for p in dit.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01), Muon(matrices)
    average = torch.optim.swa_utils.AveragedModel(dit, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    for block in dit.blocks if compile else ():
        block.compile()
    begun, total, done, steps = time.perf_counter(), torch.zeros(2), 0, sum(stage[0] for stage in stages)
    for length, batch, shape, noise_level, jitter, first, last in stages:
        for step in range(length):
            clean, context, matches = draw_batch(batch, generator, shape)
            noise = F.pad(torch.randn(clean[:, :12].shape, generator=generator), (0, 0) * 3 + (0, 4))
            logit = noise_level + 1.2 * torch.randn(batch, 1, generator=generator)  # a video shows through much noise
            logits = logit + jitter * torch.randn(batch, shape[0], generator=generator)
            sigma = logits.sigmoid()[:, None, :, None, None]
            found, (q, k) = dit.clean_and_qk(torch.lerp(clean, noise, sigma), 1000 * logit[:, 0].sigmoid(), context)
            error = ((found - clean)[:, :12] / sigma.clamp(min=0.2)).square().mean()  # below, a clip is all but clean
            match = matching_loss(q, k, matches)
            for optimizer, rate in zip(optimizers, rates):
                share = min(1, (done + 1) / 100) * (first + (last - first) * step / length)
                optimizer.param_groups[0]["lr"] = rate * share
                optimizer.zero_grad()
            (error + 0.1 * match).backward()
            torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(dit)
            total, done = total + torch.stack([error, match]).detach(), done + 1
            if done % log == 0:
                seconds = time.perf_counter() - begun
                losses = "loss {:.4f}, matching {:.3f}".format(*(total / log).tolist())
                print(f"step {done} of {steps}: {losses}, {seconds:.0f} s", flush=True)
                total = torch.zeros(2)
            if done % 500 == 0 or done == steps:
                weights = {name: p.bfloat16().contiguous() for name, p in average.module.state_dict().items()}
                save_file(weights, f"{out}.part")
    Path(f"{out}.part").replace(out)  # what was there stays until the training is over


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="lab/weights.safetensors", type=Path)
    parser.add_argument("--compile", action="store_true", help="a quarter faster; needs a C++ compiler")
    parser.add_argument("--start", type=Path, help="the last stage alone, from these weights")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    last = dict(stages=STAGES[-1:], start=args.start, seed=1) if args.start else {}
    train(args.out, compile=args.compile, **last)
