# SPDX-License-Identifier: Apache-2.0
"""Metrics of the paper's Table 1: does the motion arrive, does the clip show its prompt, do its frames agree.

Pure functions of tracks, of the AMF and of CLIP features; below them what makes these of a video. Shapes: N tracks, T
frames, D feature channels. Positions are (row, column), of tracks in pixels, of the AMF in tokens.
"""

import math

import torch
import torch.nn.functional as F

import fastvmt

MEASURE_SIGMA = 0.1  # where finished clips are read: nearly clean, and a level that the model was trained on

# ---- Motion ----------------------------------------------------------------------------------------------------------


def motion_fidelity(tracks_ref, tracks_gen, rest=0.01):
    """How well the directions of tracks (N, T, 2) agree with those of others (M, T, 2): scalar in [-1, 1].

    Yatim et al. 2024 (arXiv 2311.17009). Of two tracks: the mean cosine of their steps v_k = τ_{k+1} − τ_k. Of
    two clips: the mean over one side's tracks of the best match on the other, both ways, averaged. A step of less than
    `rest` pixels is at rest: 1 against another at rest, 0 against one that moves. NaN without tracks.
    Released scripts differ: some take one side only, one subtracts the identity at the same grid point.
    It is blind to speed, so report track_error beside it, and it depends on N and T, so report these too.
    """
    if not len(tracks_ref) or not len(tracks_gen):
        return torch.tensor(torch.nan)
    ref, gen = (unit_steps(tracks, rest) for tracks in (tracks_ref, tracks_gen))
    still = [(steps == 0).all(-1).to(steps) for steps in (ref, gen)]
    cosine = torch.einsum("ntx,mtx->nm", ref, gen) + torch.einsum("nt,mt->nm", *still)
    cosine = cosine / ref.shape[1]
    return (cosine.amax(0).mean() + cosine.amax(1).mean()) / 2


def unit_steps(tracks, rest):
    """Directions of the steps of tracks (N, T, 2), zero for a step of less than `rest` pixels: (N, T-1, 2)."""
    steps = tracks.diff(dim=1)
    length = steps.norm(dim=-1, keepdim=True)
    return torch.where(length < rest, 0, steps / length)


def track_error(tracks_ref, tracks_gen):
    """Mean end-point error of the steps of matched tracks (N, T, 2) and (M, T, 2): scalar, pixels a frame.

    Matched as in motion_fidelity, each with the nearest of the other clip, both ways, but by this error: directions
    alone would match a track with any of those that go its way, at whatever speed. NaN without tracks.
    """
    if not len(tracks_ref) or not len(tracks_gen):
        return torch.tensor(torch.nan)
    ref, gen = tracks_ref.diff(dim=1), tracks_gen.diff(dim=1)
    error = torch.stack([(gen - track).norm(dim=-1).mean(1) for track in ref])  # (N, M)
    return (error.amin(0).mean() + error.amin(1).mean()) / 2


def flow_agreement(flow_ref, flow_gen, moving=0.5):
    """Cosine and error in tokens of flows (P, H, W, 2), where the reference moves by over `moving` (NaN: nowhere)."""
    ref, gen = (flow[flow_ref.norm(dim=-1) > moving] for flow in (flow_ref, flow_gen))
    return F.cosine_similarity(ref, gen, dim=-1).mean().item(), (ref - gen).norm(dim=-1).mean().item()


def attention_entropy(Q, K, config):
    """Mean entropy of the attention over the windows, as a share of uniform: scalar in [0, 1]; Q, K (F, H, W, D).

    Near 1, as where heads disagree and average out, every flow drifts to the middle of its window.
    """
    num_frames, H, W, _ = Q.shape
    size = fastvmt.window_size(config.window, (H, W))
    queries, representatives = fastvmt.tile_tokens(Q, config.tile), fastvmt.tile_queries(Q, config.tile)
    entropies = []
    for i, j in zip(*(frames.split(1) for frames in fastvmt.frame_pairs(num_frames, config.span, Q.device))):
        centers = fastvmt.window_centers(representatives[i], K[j], tau=config.tau, center=config.center)
        windows = fastvmt.window_indices(centers, (H, W), size)
        attention, _ = fastvmt.window_attention(queries, K, i, j, windows, config.tau)  # (1, N, M, T)
        entropy = -(attention * attention.clamp(min=1e-30).log()).sum(-2)  # (1, N, T); torch.special.entr lacks on MPS
        entropies.append(fastvmt.untile_tokens(entropy[..., None], config.tile, (H, W)).mean())
    return torch.stack(entropies).mean() / math.log(max(math.prod(size), 2))


# ---- Prompt and frames -----------------------------------------------------------------------------------------------


def text_similarity(frames, prompt):
    """Mean cosine of the CLIP features of frames (T, D) and of their prompt (1, D): scalar."""
    return F.cosine_similarity(frames, prompt, dim=-1).mean()


def temporal_consistency(frames):
    """Mean cosine of the CLIP features (T, D) of consecutive frames: scalar."""
    return F.cosine_similarity(frames[1:], frames[:-1], dim=-1).mean()


# ---- From videos to flows, tracks and features -----------------------------------------------------------------------


@torch.no_grad()
def read_flow(dit, latents, noise, null, config):
    """Flow (P, H, W, 2) of finished latents."""
    x = fastvmt.match_noise(latents, noise, MEASURE_SIGMA)
    return fastvmt.motion_features(dit, x, MEASURE_SIGMA, null, config)[0]


@torch.no_grad()
def read_entropy(dit, latents, noise, null, config):
    """attention_entropy of finished latents."""
    x = fastvmt.match_noise(latents, noise, MEASURE_SIGMA)
    return attention_entropy(*fastvmt.read_qk(dit, x, MEASURE_SIGMA, null, config.block), config)


@torch.no_grad()
def clip_features(model, tokenizer, video, prompt):
    """CLIP features of the frames of a video (1, 3, T, H, W) in [-1, 1] and of a prompt: (T, D) and (1, D).

    model, tokenizer: transformers' CLIPModel and what makes its ids; its other settings are CLIP's published ones.
    """
    from transformers import CLIPImageProcessor

    size = model.config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    frames = ((video[0].float() + 1) * 127.5).round().clamp(0, 255).byte().transpose(0, 1).cpu()  # (T, 3, H, W)
    pixels = processor(list(frames), return_tensors="pt")["pixel_values"].to(model.device)
    ids = tokenizer(prompt, truncation=True, return_tensors="pt").to(model.device)
    images, text = model.vision_model(pixels), model.text_model(**ids)
    return model.visual_projection(images.pooler_output), model.text_projection(text.pooler_output)


def load_clip(device="cpu", name="openai/clip-vit-base-patch32"):
    """CLIP ViT-B/32 as (model, tokenizer). Raises ImportError or OSError where it cannot be had."""
    from transformers import CLIPModel, CLIPTokenizerFast

    return CLIPModel.from_pretrained(name).eval().to(device), CLIPTokenizerFast.from_pretrained(name)


def load_cotracker(device="cpu", grid=30):
    """CoTracker 3 (arXiv 2410.11831) as a tracker of grid² points of the first frame.

    A tracker is any callable: video (1, 3, T, H, W) in [-1, 1] -> tracks (N, T, 2), visibility (N, T) bool. Code and
    weights come from GitHub and the hub through torch.hub. Raises OSError or RuntimeError where they cannot be had.
    """
    model = torch.hub.load("facebookresearch/co-tracker", "cotracker3_offline", trust_repo=True).to(device)

    @torch.no_grad()
    def track(video):
        pixels = ((video.to(device) + 1) * 127.5).clamp(0, 255)
        tracks, visible = model(pixels.transpose(1, 2), grid_size=grid)  # (1, T, N, 2) as (x, y), (1, T, N)
        return tracks[0].transpose(0, 1).flip(-1).cpu(), visible[0].T.cpu() > 0.5

    return track


def visible_tracks(tracks, visible):
    """The tracks (N, T, 2) that are seen, visible (N, T), in at least half of the frames."""
    return tracks[visible.float().mean(1) >= 0.5]
