# SPDX-License-Identifier: Apache-2.0
"""The method's rivals in its own sampler: other training-free guidance, as features and losses of fastvmt.sample.

python -m lab.table1 --model toy --rows rivals --clips 24    # how well each transfers motion that is known
python -m lab.table1 --model toy --rows "SMM: block=4, lr=0.01 0.008"
python -m lab.table1 --model 1.3B --rows rivals --dry-run    # what each costs

Written from the papers and checked against their released code. In all of them this differs: model, noise, schedule,
CFG scale and block are the run's; AdamW is used for Adam, and its weight decay takes 1 % of the latents at most; a
learning rate that falls does so within each guided step, not over the steps. They ignore --coarse.
Shapes: F latent frames, H×W tokens a frame, C channels.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fastvmt
import wan_min

ONCE = {"use_reentrant": False, "preserve_rng_state": False}
MOST_LOGITS = 2**22  # held at once


def times(x, sigma):
    return torch.full((1,), 1000 * sigma, device=x.device)


def token_grid(dit, x):
    """F, H, W of latents x."""
    return tuple(length // patch for length, patch in zip(x.shape[2:], dit.patch_size))


def by_place(tokens, dit, x):
    """Tokens (F·H·W, C) of latents x -> (F, H, W, C)."""
    frames, rows, _ = token_grid(dit, x)
    return rearrange(tokens, "(f h w) c -> f h w c", f=frames, h=rows)


def is_reference():
    """Whether what is read is the reference, of which the sampler wants no gradient."""
    return not torch.is_grad_enabled()


# ---- DiTFlow ----


def best_flow(Q, K, anchors, targets):
    """As fastvmt.frame_flow, to each token's best key."""
    _, H, W, _ = K.shape
    best = fastvmt.window_centers(Q[anchors].flatten(1, 2), K[targets], center="argmax")  # (P, H·W, 2)
    positions = fastvmt.row_column(torch.arange(H * W, device=K.device), W)
    return (best - positions).unflatten(1, (H, W)).float()


def ditflow_features(dit, x, sigma, context, config, **options):
    """Flow (F², H, W, 2) between all frames, both ways, by attention over whole frames; the reference's by arg max.

    DiTFlow (Pondaven et al. 2025, arXiv 2412.07776; github ditflow/ditflow). The release also hands the reference's
    keys and values to its first block.
    """
    q, k = dit.qk(x, times(x, sigma), context, config.block, **options)  # (1, F·H·W, heads, D)
    Q, K = (by_place(y[0].flatten(1).float(), dit, x) for y in (q, k))  # (F, H, W, heads·D)
    # Heads side by side have the sum of their logits over √(heads·D); the release's is their mean, over √D.
    flow = best_flow if is_reference() else partial(fastvmt.frame_flow, tau=config.tau / q.shape[2] ** 0.5)
    frame = torch.arange(len(Q), device=x.device)
    anchors, targets = torch.cartesian_prod(frame, frame).unbind(1)
    chunk = max(1, MOST_LOGITS // Q[0, ..., 0].numel() ** 2)  # pairs, each with a logit for two tokens
    pairs = zip(anchors.split(chunk), targets.split(chunk))
    return torch.cat([recompute(flow, Q, K, i, j, **ONCE) for i, j in pairs])


def ditflow_losses(reference, generated, *, num_frames, config):
    """Mean squared error of the flow where the reference moves."""
    moving = (reference != 0).any(-1)  # (F², H, W)
    error = (generated - reference).square().mean(-1)  # (F², H, W)
    return ((error * moving).sum() / moving.sum().clamp(min=1),)


# ---- FlowMotion ----


def flow_motion(args):
    """Features: the clean latents x − σ·v (1, C, F, h, w) that show through x; no gradient goes through the model.

    FlowMotion (Wang et al. 2026, arXiv 2603.06289; github HKUST-LongGroup/FlowMotion). Of the result's velocity only a
    tenth is kept of what points, in a latent's channels, off the mean velocity since the run began. The release draws
    new noise for the reference in each step. ref_noise=0 is its variant with clean latents.
    """
    empty = first = start = None  # a prompt; (σ, latents) where the run and where the guided step began

    def features(dit, x, sigma, context, config, **options):
        nonlocal empty, first, start
        velocity = partial(dit.forward, x, times(x, sigma))  # a call would be timed as one of denoising
        if is_reference():
            empty = context
            return x - sigma * velocity(context)
        if start is None or sigma != start[0]:
            start = sigma, x.detach().clone()  # the optimizer moves x itself
            if first is None or sigma >= first[0]:  # or a new attempt, with less memory
                first = start
        with torch.no_grad():
            v = velocity(context)
            if args.cfg_scale != 1:
                v_empty = velocity(empty)
                v = v_empty + args.cfg_scale * (v - v_empty)
            if start is not first:
                mean = (start[1] - first[1]) / (start[0] - first[0])
                along = mean * (v * mean).sum(1, keepdim=True) / (mean.square().sum(1, keepdim=True) + 1e-8)
                v = along + 0.1 * (v - along)
        return x - sigma * v

    return features


def flow_motion_losses(reference, generated, *, num_frames, config):
    """20·MSE of the clean latents + 5·MSE of the absolute differences of their frames.

    As in the release of all ordered pairs of frames, and of neighbours once more.
    """
    frames = generated.shape[2]
    total = generated.new_zeros(())
    for d in range(1, frames):
        ref, gen = ((x[:, :, d:] - x[:, :, :-d]).abs() for x in (reference, generated))
        total = total + (3 if d == 1 else 2) * (gen - ref).square().sum()
    differences = total / ((frames**2 - 1) * generated[:, :, 0].numel())
    return (20 * F.mse_loss(generated, reference) + 5 * differences,)


# ---- SMM and MOFT ----


def embed(dit, x, sigma, context):
    """Tokens, and what else is handed to each block. Raises UserError."""
    if not hasattr(dit, "embed"):
        raise fastvmt.UserError("map, SMM and MOFT read the tokens of wan_min's models and of the toy only")
    tokens, _, shared = dit.embed(x, times(x, sigma), context)
    return tokens, shared


def block_tokens(dit, x, sigma, context, block, checkpoint=False):
    """Tokens (F, H, W, C) after a block; checkpoint as of wan_min.DiT.qk."""
    save = partial(create_selective_checkpoint_contexts, wan_min.keep_self_attention)
    options = ONCE if checkpoint == "full" else ONCE | {"context_fn": save}
    tokens, shared = embed(dit, x, sigma, context)
    for layer in dit.blocks[:block]:
        tokens = recompute(layer, tokens, *shared, **options) if checkpoint else layer(tokens, *shared)
    return by_place(tokens[0], dit, x)


def smm_features(dit, x, sigma, context, config, **options):
    """Spatial marginal means (F, C): the mean token of each frame.

    SMM (Yatim et al. 2024, arXiv 2311.17009; github diffusion-motion-transfer). The release reads a U-Net and an
    inverted reference, starts from that one's low frequencies, and goes back a step after each.
    """
    return block_tokens(dit, x, sigma, context, config.block, **options).mean((1, 2))


def smm_losses(reference, generated, *, num_frames, config):
    """1 − cosine of the means' differences between any two frames; the release adds each with itself, a constant."""
    i, j = fastvmt.frame_pairs(num_frames, num_frames, generated.device)
    return (1 - F.cosine_similarity(generated[j] - generated[i], reference[j] - reference[i], dim=-1).mean(),)


def moft_features(dit, x, sigma, context, config, **options):
    """Tokens (F, H, W, C) less their mean over frames, of the reference the 4 % of channels that tell its motion.

    MOFT (Xiao et al. 2024, arXiv 2405.14864; github xizaoqu/MOFT) as DiTFlow's release has it: those largest in the
    reference's first principal component. Its own release takes them from made-up pans, and compares means of regions.
    """
    tokens = block_tokens(dit, x, sigma, context, config.block, **options)
    tokens = tokens - tokens.mean(0)
    if not is_reference():
        return tokens, None
    flat = tokens.flatten(0, 2)
    component = torch.linalg.eigh(flat.mT @ flat).eigenvectors[:, -1]  # (C,)
    channels = component.abs().topk(int(0.04 * len(component))).indices
    return tokens[..., channels], channels


def moft_losses(reference, generated, *, num_frames, config):
    """1 − cosine of those channels, over all tokens."""
    (ref, channels), (gen, _) = reference, generated
    return (1 - F.cosine_similarity(gen[..., channels], ref, dim=-1).mean(),)


# ---- Rows of lab.table1 ----


class Rival(NamedTuple):
    make: Callable  # arguments of a run -> features for it
    losses: Callable
    settings: str  # changes of flags
    paper: str  # more of them, its paper's
    toy: str  # in place of these, the toy's: the least error with the prompt right in 13 of 20 other clips or more


DITFLOW = "guided_fraction=0.2, lr=0.002 0.001"  # DiTFlow's, who ran MOFT with them, too
FLOW_MOTION = "guided_fraction=0.2, lr=0.003 0.003"
# Tried on the toy, whose lr is 0.006 0.005 and guided fraction 0.5:
# DiTFlow: lr × 1 to 8, 5 to 20 inner steps, τ 1 to 4, guided fractions 0.3 and 0.7
# both FlowMotions: lr × ½ to 4, 3 to 20 inner steps, guided fractions 0.12 to 0.7
# SMM: blocks 3 to 6, lr × 1 to 32, 10 and 20 inner steps, a clean reference, guided fraction 0.3
# MOFT: blocks 2 to 6, lr × 1 to 8, 5 to 20 inner steps, both references, guided fractions 0.3 and 0.8
RIVALS = {
    "DiTFlow": Rival(lambda args: ditflow_features, ditflow_losses, "ref_noise=0, inner_steps=5, tau=2", DITFLOW,
                     "inner_steps=10, lr=0.024 0.02"),
    "FlowMotion": Rival(flow_motion, flow_motion_losses, "ref_noise=match, inner_steps=3", FLOW_MOTION,
                        "inner_steps=10, guided_fraction=0.3"),
    "FlowMotion, clean latents": Rival(flow_motion, flow_motion_losses, "ref_noise=0, inner_steps=3", FLOW_MOTION,
                                       "inner_steps=14, guided_fraction=0.12"),
    "SMM": Rival(lambda args: smm_features, smm_losses, "ref_noise=match, inner_steps=10",
                 "guided_fraction=0.4, lr=0.007 0.004", "block=4, lr=0.048 0.04"),
    "MOFT": Rival(lambda args: moft_features, moft_losses, "ref_noise=0, inner_steps=5", DITFLOW,
                  "block=4, inner_steps=10, lr=0.012 0.01, ref_noise=match"),
}  # fmt: skip


def row_changes(name, model, more=""):
    """A rival's changes of flags."""
    rival = RIVALS[name]
    return ", ".join(["coarse=0, interval=1", rival.settings, rival.toy if model == "toy" else rival.paper, more])


def seams(row):
    """features and losses for one run of a row, whose latents FlowMotion's remember; {} of a row that is no rival's."""
    if not hasattr(row, "rival"):
        return {}
    rival = RIVALS[row.rival]
    return {"features": rival.make(row), "losses": rival.losses}
