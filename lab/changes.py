# SPDX-License-Identifier: Apache-2.0
"""Seven changes of the method, each a function that `fastvmt.sample`, or `fastvmt.main`, is handed as an argument.

python -m lab.changes    # the toy with each of them, and how its result moves (two minutes)

    fastvmt.main(["--ref", "in.mp4", "--prompt", "a red fox runs through snow"], losses=by_speed)
"""

from dataclasses import replace

import torch
from einops import einsum

import fastvmt
import wan_min
from fastvmt import amf_loss, attention_motion_flow, head_average, motion_features

# ---- features=: what is read of the latents ----


def several_blocks(dit, x, sigma, context, config, **options):
    """Two DiT blocks: their flows as of one frame twice as high, over which the losses average."""
    blocks = max(config.block - 1, 1), config.block
    readings = [motion_features(dit, x, sigma, context, replace(config, block=n), **options) for n in blocks]
    flows, key_means = zip(*readings)
    return torch.cat(flows, dim=1), torch.cat(key_means, dim=1)


def read_flow(Q, K, config):
    """attention_motion_flow as motion_features calls it."""
    return attention_motion_flow(Q, K, span=config.span, tile=config.tile, window=config.window, tau=config.tau,
                                 center=config.center)  # fmt: skip


def per_head(dit, x, sigma, context, config, **options):
    """Each head's own flow in place of the flow of the heads' mean."""
    grid = [length // patch for length, patch in zip(x.shape[2:], dit.patch_size)]
    q, k = dit.qk(x, torch.full((1,), 1000 * sigma, device=x.device), context, config.block, **options)
    readings = []
    for head in range(q.shape[2]):
        Q = head_average(q[0, :, [head]], grid)
        K = head_average(k[0, :, [head]], grid)
        readings.append(read_flow(Q, K, config))
    flows, key_means = zip(*readings)
    return torch.cat(flows, dim=1), torch.cat(key_means, dim=1)


def three_best(dit, x, sigma, context, config, **options):
    """Another window rule, put together from the method's parts: centred on the mean of the three best keys.

    All pairs at once: at 81 frames of 480x832 their keys take 2.6 GB.
    """
    Q, K = fastvmt.read_qk(dit, x, sigma, context, config.block, **options)  # (F, H, W, D) each
    frames, H, W, _ = Q.shape
    size = fastvmt.window_size(config.window, (H, W))
    i, j = fastvmt.frame_pairs(frames, config.span, x.device)
    representatives = fastvmt.tile_queries(Q, config.tile)[i]  # (P, N, D)
    logits = einsum(representatives, K[j], "p n d, p h w d -> p n h w").flatten(2)
    best = fastvmt.row_column(logits.topk(3).indices, W)  # (P, N, 3, 2)
    centers = best.float().mean(-2).round().long()
    windows = fastvmt.window_indices(centers, (H, W), size)  # (P, N, M)
    positions = fastvmt.row_column(torch.arange(H * W, device=x.device), W).view(1, H, W, 2)
    tokens = fastvmt.tile_tokens(positions, config.tile)[0]  # (N, T, 2)
    queries = fastvmt.tile_tokens(Q, config.tile)  # (F, N, T, D)
    flow, key_mean = fastvmt.window_flow(queries, K, i, j, windows, tokens, config.tau)
    return fastvmt.untile_tokens(flow, config.tile, (H, W)), key_mean


# ---- losses=: how two readings are compared; these three leave L_window out ----


def by_speed(reference, generated, *, num_frames, config):
    """Tokens count by how fast the reference moves there."""
    (flow_ref, _), (flow_gen, _) = reference, generated
    speed = flow_ref.norm(dim=-1) + 0.1  # (P, H, W), in tokens; what rests counts a little
    loss = amf_loss(flow_ref, flow_gen, num_frames=num_frames, span=config.span, alpha=config.alpha, weight=speed)
    return (loss,)


def directions(reference, generated, *, num_frames, config):
    """Directions count, lengths do not."""
    (flow_ref, _), (flow_gen, _) = reference, generated
    loss = 1 - torch.cosine_similarity(flow_ref, flow_gen, dim=-1).mean()
    return (loss,)


# ---- step=: the sampler ----


def heun(velocity, x, sigma, next_sigma):
    """Heun's method: the mean of the velocities at both ends of the step, except in the last step."""
    v = velocity(x, sigma)
    ahead = x + (next_sigma - sigma) * v
    if next_sigma > 0:
        v = (v + velocity(ahead, next_sigma)) / 2
    return x + (next_sigma - sigma) * v


def ancestral(velocity, x, sigma, next_sigma):
    """Fresh noise in each step, seeded by torch.manual_seed: the clean latents predicted at sigma, noised again."""
    clean = x - sigma * velocity(x, sigma)
    return fastvmt.match_noise(clean, torch.randn_like(x), next_sigma)


CHANGES = {"features": (several_blocks, per_head, three_best), "losses": (by_speed, directions),
           "step": (heun, ancestral)}  # fmt: skip


def main():
    from lab import toy

    args, config, _ = fastvmt.parse_arguments(["--model", "toy", "--device", "cpu"])
    dit = toy.load()
    video, _, prompt = toy.held_out(0)
    noise, (context, negative, null), reference = toy.prepare(video, prompt, seed=0)
    sigmas = wan_min.flow_sigmas(args.steps, args.shift)
    print(f"{'reference':15}", toy.describe_motion(video))
    for options in ({}, *({seam: change} for seam, changes in CHANGES.items() for change in changes)):
        torch.manual_seed(0)  # of the ancestral sampler
        latents = fastvmt.sample(dit, noise, sigmas, context, negative, cfg_scale=args.cfg_scale, reference=reference,
                                 null=null, config=config, **options)  # fmt: skip
        name = next((change.__name__ for change in options.values()), "unchanged")
        print(f"{name:15}", toy.describe_motion(toy.decode(latents)[0]), flush=True)


if __name__ == "__main__":
    main()
