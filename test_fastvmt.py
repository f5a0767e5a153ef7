"""Tests of fastvmt.py and wan_min.py: slow loops over the equations, known motion, and independent oracles.

pip install -r requirements.txt pytest diffusers transformers && python -m pytest -q
"""

import argparse
import dataclasses
import hashlib
import html
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastvmt
import wan_min
from fastvmt import MotionConfig
from wan_min import TEXT_FILE, TOKENIZER_FILE, VAE, VAE_FILE, DiT, ModelError, TextEncoder, open_model, random_model

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # of programs that are started; tensors here are too small to share
torch.set_num_threads(1)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b, tolerance):
    assert a.shape == b.shape, (a.shape, b.shape)
    error = (a - b).abs().max().item()
    assert error <= tolerance, f"max abs error {error:.3g}"  # NaN fails


# ---- The method against slow loops over the equations, in float64 ----------------------------------------------------


def slow_amf(Q, K, span, tile, window, tau, center):
    """Sec. 3.2 in loops: {(i, j): (flow (H, W, 2), [mean key of each tile])}."""
    Q, K = Q.double().numpy(), K.double().numpy()
    num_frames, H, W, D = Q.shape
    lh, lw = (H, W) if window is None else (min(window, H), min(window, W))
    out = {}
    for i, j in itertools.product(range(num_frames), repeat=2):
        if not 1 <= j - i <= span:
            continue
        flow, means = np.full((H, W, 2), np.nan), []
        for a, b in itertools.product(range(0, H, tile[0]), range(0, W, tile[1])):
            query = Q[i, min(a + tile[0] // 2, H - 1), min(b + tile[1] // 2, W - 1)]
            logits = np.array([[query @ K[j, r, c] for c in range(W)] for r in range(H)])
            if center == "argmax":
                cy, cx = np.unravel_index(logits.argmax(), logits.shape)
            else:
                attention = np.exp(logits * tau / math.sqrt(D))
                attention /= attention.sum()
                cy = round(sum(attention[r, c] * r for r in range(H) for c in range(W)))
                cx = round(sum(attention[r, c] * c for r in range(H) for c in range(W)))
            top, left = min(max(cy - lh // 2, 0), H - lh), min(max(cx - lw // 2, 0), W - lw)
            places = [(r, c) for r in range(top, top + lh) for c in range(left, left + lw)]
            means.append(np.mean([K[j, r, c] for r, c in places], axis=0))
            for r, c in itertools.product(range(a, min(a + tile[0], H)), range(b, min(b + tile[1], W))):
                weights = np.array([math.exp(Q[i, r, c] @ K[j, y, x] / math.sqrt(D) * tau) for y, x in places])
                flow[r, c] = weights @ np.array(places) / weights.sum() - (r, c)
        out[i, j] = flow, means
    return out


AMF_CASES = [  # frames, H, W, span, tile, window, tau, center
    (2, 1, 1, 5, (3, 4), 21, 1.0, "soft"),
    (2, 3, 4, 1, (3, 4), None, 1.0, "soft"),
    (3, 7, 9, 5, (3, 4), 3, 1.0, "soft"),
    (3, 7, 9, 2, (3, 4), 4, 2.5, "argmax"),
    (4, 6, 5, 2, (2, 2), 5, 0.7, "soft"),
    (3, 5, 11, 9, (4, 3), 7, 1.0, "argmax"),
    (7, 4, 3, 3, (5, 2), 3, 1.0, "soft"),
    (2, 9, 2, 1, (1, 1), 3, 1.0, "soft"),
    (3, 5, 6, 2, (3, 4), 21, 1.0, "argmax"),
    (3, 1, 13, 2, (3, 4), 5, 1.0, "soft"),
]


@pytest.mark.parametrize("case", AMF_CASES, ids=str)
def test_amf_equals_the_equations(case):
    num_frames, H, W, span, tile, window, tau, center = case
    Q, K = (randn(num_frames, H, W, 6, seed=s, dtype=torch.float64) * 1.7 for s in (1, 2))
    args = dict(span=span, tile=tile, window=window, tau=tau, center=center)
    slow = slow_amf(Q, K, **args)
    i, j = fastvmt.frame_pairs(num_frames, span)
    pairs = list(zip(i.tolist(), j.tolist()))
    assert pairs == sorted(slow, key=lambda pair: (pair[1] - pair[0], pair[0]))
    for max_logits in (1, 3 * (H * W) ** 2, 2**21):  # one pair at a time, a few, all
        flow, key_mean = fastvmt.attention_motion_flow(Q, K, **args, max_logits=max_logits)
        close(flow, torch.tensor(np.stack([slow[p][0] for p in pairs])), 1e-10)
        close(key_mean, torch.tensor(np.stack([slow[p][1] for p in pairs])), 1e-10)


def test_amf_gradient_equals_that_of_the_equations():
    """Against autograd of dense, masked attention, whose window is held fixed."""
    Q, K = (randn(3, 5, 7, 4, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2))
    flow, key_mean = fastvmt.attention_motion_flow(Q, K, span=2, tile=(3, 4), window=3, max_logits=600)
    a, b = randn(*flow.shape, dtype=torch.float64), randn(*key_mean.shape, dtype=torch.float64)
    grads = torch.autograd.grad((flow * a).sum() + (key_mean * b).sum(), (Q, K))
    total = 0
    positions = torch.cartesian_prod(torch.arange(5.0), torch.arange(7.0)).double()
    for p, (i, j) in enumerate(zip(*fastvmt.frame_pairs(3, 2))):
        queries = fastvmt.tile_queries(Q.detach(), (3, 4))
        centers = fastvmt.window_centers(queries[i][None], K.detach()[j][None])
        index = fastvmt.window_indices(centers, (5, 7), (3, 3))[0]  # (N, M)
        for r, c in itertools.product(range(5), range(7)):
            tile = r // 3 * 2 + c // 4
            keys = K[j].flatten(0, 1)[index[tile]]
            attention = (keys @ Q[i, r, c] / 2).softmax(0)
            total = total + ((attention @ positions[index[tile]] - torch.tensor([r, c])) * a[p, r, c]).sum()
        for tile in range(4):
            total = total + (K[j].flatten(0, 1)[index[tile]].mean(0) * b[p, tile]).sum()
    for ours, true in zip(grads, torch.autograd.grad(total, (Q, K))):
        close(ours, true, 1e-10)


def test_amf_keeps_no_gathered_keys_for_the_backward_pass():
    Q, K = (randn(4, 9, 8, 16, seed=s).requires_grad_() for s in (1, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        fastvmt.attention_motion_flow(Q, K, span=3, window=7)
    assert sum(kept) < 6 * 6 * 49 * 16  # pairs, tiles, window, D


def test_the_full_frame_needs_no_windows(monkeypatch):
    monkeypatch.setattr(fastvmt, "window_centers", None)
    Q, K = randn(2, 3, 4, 5, 6)
    for window in (None, 5, 9):  # no window is larger than the frame
        flow, _ = fastvmt.attention_motion_flow(Q, K, window=window)
        close(flow, fastvmt.attention_motion_flow(Q, K, window=None)[0], 0)
    with pytest.raises(TypeError):
        fastvmt.attention_motion_flow(Q, K, window=4)


@pytest.mark.parametrize("window", [3, None])
def test_amf_is_fp32_or_better(window):
    Q, K = randn(2, 3, 5, 6, 8).bfloat16()

    def read(*qk):
        return fastvmt.attention_motion_flow(*qk, window=window)

    full = read(Q.float(), K.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = read(Q.float(), K.float())
    for other in (read(Q, K), under_autocast):
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(other, full))
    q = Q.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read(q, K.float())[0]
    gradients = [torch.autograd.grad(flow.square().sum(), q)[0] for flow in (found, read(q, K.float())[0])]
    assert torch.equal(*gradients)  # the attention is computed again


def test_tiles_partition_the_grid_and_return():
    for (H, W), tile in itertools.product([(1, 1), (3, 4), (7, 9), (5, 13)], [(3, 4), (1, 1), (4, 2), (9, 20)]):
        x = torch.arange(2.0 * H * W).view(2, H, W, 1)
        tiles = fastvmt.tile_tokens(x + 1, tile)
        assert tiles.shape == (2, math.ceil(H / tile[0]) * math.ceil(W / tile[1]), tile[0] * tile[1], 1)
        assert (tiles != 0).sum() == x.numel()
        assert torch.equal(fastvmt.untile_tokens(tiles, tile, (H, W)), x + 1)
        position = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1)[None]
        true = [(min(a + tile[0] // 2, H - 1), min(b + tile[1] // 2, W - 1))
                for a in range(0, H, tile[0]) for b in range(0, W, tile[1])]  # fmt: skip
        assert fastvmt.tile_queries(position, tile)[0].tolist() == [list(p) for p in true]


def test_window_is_shifted_into_the_grid_not_cropped():
    centers = torch.tensor([[[0, 0], [2, 3], [5, 8], [3, 7]]])
    windows = fastvmt.window_indices(centers, (6, 9), (3, 5))[0]
    assert windows[:, 0].tolist() == [0, 9 + 1, 3 * 9 + 4, 2 * 9 + 4]
    assert windows[1].tolist() == [10, 11, 12, 13, 14, 19, 20, 21, 22, 23, 28, 29, 30, 31, 32]


def test_head_average_is_over_heads():
    x = randn(2 * 3 * 5, 4, 6).bfloat16()
    mean = fastvmt.head_average(x, (2, 3, 5))
    assert mean.dtype == torch.float32
    for f, h, w in itertools.product(range(2), range(3), range(5)):
        close(mean[f, h, w], x[(f * 3 + h) * 5 + w].float().mean(0), 1e-6)


@pytest.mark.parametrize("num_frames, span", [(2, 5), (3, 1), (5, 2), (7, 3), (7, 5), (4, 9)])
def test_losses_equal_the_equations(num_frames, span):
    i, j = fastvmt.frame_pairs(num_frames, span)
    pairs = list(zip(i.tolist(), j.tolist()))
    ref, gen = (randn(len(pairs), 3, 5, 2, seed=s, dtype=torch.float64) for s in (1, 2))
    true = 0
    for p, (a, b) in enumerate(pairs):
        weight = 1 - 0.3 * (b - a - 1) / (span - 1) if span > 1 else 1
        for r, c in itertools.product(range(3), range(5)):
            true += weight * float(((ref[p, r, c] - gen[p, r, c]) ** 2).sum()) / (len(pairs) * 15)
    assert math.isclose(fastvmt.amf_loss(ref, gen, num_frames=num_frames, span=span, alpha=0.3).item(), true)
    mask = torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0], [0.0] * 5, [3.0, 0.0, 0.0, 0.0, 0.0]])  # three tokens count
    true = 0
    for p, (a, b) in enumerate(pairs):
        errors = [((ref[p, r, c] - gen[p, r, c]) ** 2).sum().item() for r, c in ((0, 1), (0, 4), (2, 0))]
        decay = 1 - 0.3 * (b - a - 1) / max(span - 1, 1)
        true += decay * (2 * errors[0] + errors[1] + 3 * errors[2]) / 6 / len(pairs)
    options = dict(num_frames=num_frames, span=span, alpha=0.3)
    for weight in (mask, mask.expand(len(pairs), 3, 5)):  # one for all pairs, one for each
        assert math.isclose(fastvmt.amf_loss(ref, gen, weight=weight, **options).item(), true)
    weights, true = randn(len(pairs), 3, 5, seed=3, dtype=torch.float64).abs(), 0
    for p, (a, b) in enumerate(pairs):
        for r, c in itertools.product(range(3), range(5)):
            error = weights[p, r, c] * ((ref[p, r, c] - gen[p, r, c]) ** 2).sum()
            true += (1 - 0.3 * (b - a - 1) / max(span - 1, 1)) * error.item() / weights.sum().item()
    assert math.isclose(fastvmt.amf_loss(ref, gen, weight=weights, **options).item(), true)

    key_mean = randn(len(pairs), 4, 6, dtype=torch.float64)
    for squared in (False, True):
        true = 0
        for anchor in range(num_frames):
            targets = range(anchor + 1, min(anchor + span - 1, num_frames - 1) + 1)
            for tile, (a, b) in itertools.product(range(4), zip(targets, targets[1:])):
                change = key_mean[pairs.index((anchor, b)), tile] - key_mean[pairs.index((anchor, a)), tile]
                size = float((change**2).sum()) if squared else math.sqrt((change**2).sum())
                true += size / (num_frames * 4 * (len(targets) - 1))
        ours = fastvmt.window_loss(key_mean, num_frames=num_frames, span=span, squared=squared)
        assert math.isclose(ours.item(), true, abs_tol=1e-12)


def test_losses_weights_and_gradients():
    ref, gen = (randn(9, 3, 5, 2, seed=s).requires_grad_() for s in (1, 2))
    key_mean = randn(9, 4, 6).requires_grad_()
    config = MotionConfig(span=3, lambda_amf=2.0, lambda_window=0.5)  # 5 frames, span 3: 9 pairs
    readings = (ref, key_mean.detach() + 1), (gen, key_mean)
    total, amf, window = fastvmt.motion_losses(*readings, num_frames=5, config=config)
    assert total.item() == pytest.approx(2 * amf.item() + 0.5 * window.item())
    assert torch.autograd.grad(total, (ref, gen, key_mean), allow_unused=True)[0] is None  # the reference is detached
    still = torch.ones(9, 4, 6, requires_grad=True)
    fastvmt.window_loss(still, num_frames=5, span=3).backward()
    assert torch.equal(still.grad, torch.zeros_like(still))  # and not NaN, where the norm has its kink


# ---- Ground truth: clips whose motion is known -----------------------------------------------------------------------


def moving_texture(num_frames, grid, velocity, dim=32, scale=8.0):
    """Features (F, H, W, dim) of a random texture that moves by velocity (rows, columns) a frame."""
    (H, W), margin = grid, num_frames * max(abs(v) for v in velocity)
    texture = F.normalize(randn(H + 2 * margin, W + 2 * margin, dim), dim=-1) * scale
    frames = []
    for n in range(num_frames):
        top, left = margin - n * velocity[0], margin - n * velocity[1]
        frames.append(texture[top : top + H, left : left + W])
    return torch.stack(frames)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("velocity", [(1, 0), (0, -1), (-1, 2)])
def test_known_motion_is_found(velocity, window):
    x = moving_texture(4, (15, 24), velocity)
    flow, _ = fastvmt.attention_motion_flow(x, x, span=2, window=window, tau=4.0, center="argmax")
    for p, (i, j) in enumerate(zip(*fastvmt.frame_pairs(4, 2))):
        inner = flow[p, 4:-4, 4:-8]  # tiles whose query leaves the frame may go wrong
        close(inner, torch.tensor(velocity).float().expand_as(inner) * (j - i), 0.05)


def test_static_clip_has_no_flow_and_no_window_loss():
    x = moving_texture(5, (7, 9), (0, 0))
    flow, key_mean = fastvmt.attention_motion_flow(x, x, window=5, tau=4.0)
    close(flow, torch.zeros_like(flow), 0.05)
    assert fastvmt.window_loss(key_mean, num_frames=5).item() == 0


def test_window_corrects_a_false_far_match():
    """The paper's Fig. 5: a look-alike far away fools the full-frame AMF, the window leaves it out."""
    Q = moving_texture(2, (9, 28), (0, 1))
    K = Q.clone()
    K[1, 4, 25] = 2 * Q[0, 3, 4]  # a louder copy of one token, 20 columns off
    args = dict(span=1, tau=4.0, center="argmax")
    full, _ = fastvmt.attention_motion_flow(Q, K, window=None, **args)
    local, _ = fastvmt.attention_motion_flow(Q, K, window=7, **args)
    close(full[0, 3, 4], torch.tensor([1.0, 21.0]), 0.1)
    close(local[0, 3, 4], torch.tensor([0.0, 1.0]), 0.1)


# ---- Step-skip optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, interval", [(10, 3), (10, 1), (7, 4), (1, 3), (6, 6), (3, 9)])
def test_step_skip_counts_and_reuses_gradients(steps, interval):
    """Against AdamW written out (Loshchilov & Hutter), fed the gradients of eq. 9."""
    start, target, lr = randn(5, seed=1), randn(5, seed=2), (0.3, 0.1)
    calls = []

    def objective(x):
        calls.append(x)
        return ((x - target) ** 4).sum()

    result = fastvmt.optimize_latent(start, objective, steps=steps, interval=interval, lr=lr)
    assert len(calls) == math.ceil(steps / interval)
    x, m, v = start.double(), 0, 0
    for k in range(steps):
        if k % interval == 0:
            gradient = 4 * (x - target) ** 3
        rate = lr[0] + (lr[1] - lr[0]) * (k / (steps - 1) if steps > 1 else 0)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        x = x - rate * 0.01 * x - rate * step
    close(result.double(), x, 1e-5)
    assert torch.equal(start, randn(5, seed=1)) and not result.requires_grad


def test_a_bf16_latent_is_moved_in_fp32():
    x, target = randn(50).bfloat16(), randn(50, seed=1)
    moved = [fastvmt.optimize_latent(start, lambda x: (x - target).square().sum()) for start in (x, x.float())]
    assert moved[0].dtype == torch.float32 and torch.equal(*moved) and (moved[0] != x).all()
    assert fastvmt.optimize_latent(x.double(), lambda x: x.sum()).dtype == torch.float64


def test_inference_mode_is_refused_in_words():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="torch.no_grad"):
        fastvmt.optimize_latent(randn(5), lambda x: x.sum())


def test_interval_1_is_plain_adamw_and_the_latent_the_only_leaf():
    weight, x = randn(4, 4).requires_grad_(), randn(4, seed=1)
    result = fastvmt.optimize_latent(x, lambda x: (weight @ x).square().sum(), steps=4, interval=1, lr=(0.1, 0.1))
    plain = x.clone().requires_grad_()
    optimizer = torch.optim.AdamW([plain], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (weight.detach() @ plain).square().sum().backward()
        optimizer.step()
    close(result, plain.detach(), 1e-6)
    assert weight.grad is None


# ---- The DiT's Q and K, and the sampler, on a tiny random model ------------------------------------------------------

TINY = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=4, text_dim=16, freq_dim=16)
CONFIG = MotionConfig(block=3, window=5, tile=(2, 3), span=3)


@pytest.fixture(scope="module")
def dit():
    return wan_min.random_model(wan_min.DiT, TINY)


@pytest.fixture(scope="module")
def clip():
    """Noise, clean reference latents, and the three prompts' contexts."""
    texture = moving_texture(5, (12, 16), (1, 1), dim=16, scale=4.0)
    contexts = randn(3, 1, 7, 16, seed=4)
    return randn(1, 16, 5, 12, 16, seed=3), texture.permute(3, 0, 1, 2)[None].contiguous(), *contexts


def attention_inputs(monkeypatch):
    """Record the q and k of every attention as (B, heads, S, D), in the order of the calls."""
    calls, true = [], F.scaled_dot_product_attention

    def spy(q, k, *args, **kwargs):
        calls.append((q, k))
        return true(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("block", [1, 3, 4])
def test_qk_equals_the_full_forward(dit, clip, monkeypatch, block):
    x, t, context = clip[0].clone().requires_grad_(), torch.tensor([700.0]), clip[2]
    calls = attention_inputs(monkeypatch)
    dit(x, t, context)
    true = [part.transpose(1, 2) for part in calls[2 * (block - 1)]]  # self- and cross-attention take turns
    for checkpoint in (False, True):
        ours = dit.qk(x, t, context, block, checkpoint=checkpoint)
        for a, b in zip(ours, true):
            assert a.shape == (1, 5 * 6 * 8, 2, 24)
            close(a, b, 1e-6)
        weights = [randn(*part.shape, seed=5) for part in true]
        grads = [torch.autograd.grad(sum((w * part).sum() for w, part in zip(weights, parts)), x, retain_graph=True)[0]
                 for parts in (ours, true)]  # fmt: skip
        close(grads[0], grads[1], 1e-4 * grads[1].abs().max().item())
        assert grads[1].abs().max() > 0


def test_qk_needs_nothing_after_them(dit, clip):
    x, t, context = clip[0], torch.tensor([300.0]), clip[2]
    before = dit.qk(x, t, context, 2)
    other = wan_min.random_model(wan_min.DiT, TINY)
    other.blocks = other.blocks[:2]
    for part in (other.head, other.blocks[1].cross_attn, other.blocks[1].ffn, other.blocks[1].self_attn.v):
        for p in part.parameters():
            p.fill_(math.nan)
    for a, b in zip(before, other.qk(x, t, context, 2)):
        assert torch.equal(a, b)
    for block in (0, 5):
        with pytest.raises(ValueError, match=f"block {block} .*1 to 4"):
            dit.qk(x, t, context, block)


def test_tokens_stay_contiguous(dit, clip):
    """Strides of another order pass through all blocks: additions are then 12 times slower, every norm copies."""
    seen = []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.extend([args[0], out])) for block in dit.blocks]
    dit(clip[0], torch.tensor([300.0]), clip[2])
    for hook in hooks:
        hook.remove()
    assert len(seen) == 8 and all(tokens.is_contiguous() for tokens in seen)


def test_checkpointing_changes_nothing(dit, clip):
    noise, reference, context, negative, null = clip
    results = [fastvmt.sample(dit, noise, wan_min.flow_sigmas(2), context, negative, reference=reference, null=null,
                              config=CONFIG, checkpoint=checkpoint) for checkpoint in (False, True)]  # fmt: skip
    close(*results, 1e-6)


def test_recomputation_spares_self_attention(dit, clip):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "scaled_dot_product" in op.name() and "backward" not in op.name():
                counts["self" if args[0].shape == args[1].shape else "cross"] += 1
            return op(*args, **(kwargs or {}))

    x, grads = clip[0].clone().requires_grad_(), []
    for checkpoint, own, cross in ((False, 3, 3), (True, 3, 6), ("full", 6, 6)):
        counts = {"self": 0, "cross": 0}
        with Count():
            q, k = dit.qk(x, torch.tensor([700.0]), clip[2], 4, checkpoint=checkpoint)
            grads.append(torch.autograd.grad((q[:, :9] * k[:, 9:18]).sum(), x)[0])
        assert counts == {"self": own, "cross": cross}
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2]) and grads[0].abs().max() > 0


def test_offload_streams_two_blocks_at_most_and_changes_nothing(clip, monkeypatch):
    noise, reference, context, negative, null = clip
    plain, streamed = (wan_min.random_model(wan_min.DiT, TINY) for _ in range(2))
    live, peak = weakref.WeakSet(), []
    true = torch.Tensor.to

    def spy(self, *args, **kwargs):  # the copies to the device, which is the CPU too
        out = true(self, *args, **kwargs)
        if kwargs.get("copy"):
            live.add(out)
            peak.append(sum(p.numel() for p in live))
        return out

    monkeypatch.setattr(torch.Tensor, "to", spy)
    streamed = wan_min.offload_blocks(streamed, "cpu")
    run = dict(reference=reference, null=null, config=CONFIG, checkpoint=True)
    results = [fastvmt.sample(model, noise, wan_min.flow_sigmas(2), context, negative, **run)
               for model in (plain, streamed)]  # fmt: skip
    assert torch.equal(*results)
    block = sum(p.numel() for p in plain.blocks[0].parameters())
    assert max(peak) == 2 * block and len(peak) > 50
    peak.clear()
    q, _ = streamed.qk(noise.clone().requires_grad_(), torch.ones(1), context, 4, checkpoint=True)
    q.sum().backward()
    assert len(peak) <= 11 * len(list(plain.blocks[0].parameters()))  # 8 runs; the next block is mostly there already
    assert all(p.is_meta for p in streamed.blocks.parameters())


def test_plain_sampling_is_euler_with_cfg(dit, clip):
    noise, reference, context, negative, null = clip
    sigmas = wan_min.flow_sigmas(3)
    x = noise.clone()
    for a, b in zip(sigmas, sigmas[1:]):
        t = torch.full((1,), 1000 * a.item())
        positive, other = dit(x, t, context), dit(x, t, negative)
        x = x + (b - a) * (other + 5.8 * (positive - other))
    plain = fastvmt.sample(dit, noise, sigmas, context, negative)
    close(plain, x, 1e-4)
    # At strength 1 a reference that is not followed leaves no trace.
    unguided = MotionConfig(guided_fraction=0.0)
    ours = fastvmt.sample(dit, noise, sigmas, context, negative, reference=reference, null=null, config=unguided)
    assert torch.equal(ours, plain)
    x, sigmas = noise, wan_min.flow_sigmas(1)
    close(fastvmt.sample(dit, x, sigmas, context, None, cfg_scale=1), x - dit(x, torch.tensor([1000.0]), context), 1e-5)
    opposite = fastvmt.sample(dit, x, sigmas, context, negative, cfg_scale=0)  # the negative prompt alone
    close(opposite, x - dit(x, torch.tensor([1000.0]), negative), 1e-5)
    assert fastvmt.sample(dit, x.bfloat16(), sigmas, context, None, cfg_scale=1).dtype == torch.float32


def test_guidance_lowers_the_loss(dit, clip):
    noise, reference, context, negative, null = clip
    steps = []

    def callback(step, x, losses):
        steps.append(losses)

    config = dataclasses.replace(CONFIG, tau=3.0, guided_fraction=0.5, lr=(0.02, 0.02))
    sigmas = wan_min.flow_sigmas(4, shift=1.0, strength=0.8)
    fastvmt.sample(dit, noise, sigmas, context, negative, reference=reference, null=null, config=config,
                   callback=callback)  # fmt: skip
    assert steps[2:] == [None, None]
    for losses in steps[:2]:
        assert losses.shape == (4, 3)  # ⌈10/3⌉ gradients in the first half of the steps
        assert losses[-1][0] < 0.6 * losses[0][0]
        for total, amf, window in losses.tolist():
            assert total == pytest.approx(5 * amf + window, rel=1e-5)


def test_seams_are_handed_what_they_need(dit, clip):
    """Features of any kind reach the losses as they are; the step's velocity has CFG inside."""
    noise, reference, context, negative, null = clip
    sigmas, seen = wan_min.flow_sigmas(4, 1.0, 0.8), []
    config = dataclasses.replace(CONFIG, guided_fraction=0.5, inner_steps=4, interval=2, lr=(0.001, 0.001))

    def features(dit, x, sigma, text, config, **options):
        seen.append(("features", sigma, text is null, options))
        return {"mean": x.mean((2, 3, 4))}

    def losses(of_reference, generated, *, num_frames, config):
        assert of_reference["mean"].equal(reference.mean((2, 3, 4))) and num_frames == 5 and config.tau == 1
        return ((generated["mean"] - of_reference["mean"]).square().sum(), torch.ones(()))

    def midpoint(velocity, x, sigma, next_sigma):
        t = torch.full((1,), 1000 * sigma)
        close(velocity(x, sigma), -4 * dit(x, t, negative) + 5 * dit(x, t, context), 1e-4)
        seen.append(("step", sigma, next_sigma, x))
        return x - 1

    def callback(number, x, history):
        seen.append(("callback", number, x, history))

    result = fastvmt.sample(dit, noise, sigmas, context, negative, cfg_scale=5, reference=reference, null=null,
                            config=config, features=features, losses=losses, step=midpoint, checkpoint="full",
                            callback=callback)  # fmt: skip
    kinds = [call[0] for call in seen]
    guided = ["features"] * 2 + ["step", "callback"]  # two gradients a guided step
    assert kinds == ["features", *guided, *guided, "step", "callback", "step", "callback"]
    assert seen[0][1:] == (0, True, {}) and seen[1][1:] == (pytest.approx(0.8), False, {"checkpoint": "full"})
    steps, calls = [[call for call in seen if call[0] == kind] for kind in ("step", "callback")]
    assert [step[1:3] for step in steps] == [pytest.approx(pair) for pair in zip(sigmas.tolist(), sigmas[1:].tolist())]
    assert all(call[2].equal(step[3] - 1) for step, call in zip(steps, calls)) and result.equal(calls[-1][2])
    assert [call[1] for call in calls] == [0, 1, 2, 3] and calls[2][3] is None
    assert calls[0][3].shape == (2, 2) and (calls[0][3][:, 1] == 1).all() and calls[0][3][1, 0] < calls[0][3][0, 0]


def test_sampler_features_of_the_reference(clip):
    """Which latents, noise level and prompt the reference's and the result's features are read at (Algorithm 1)."""
    noise, reference, context, negative, null = clip

    class Spy:
        patch_size, qk_calls = (1, 2, 2), None

        def __call__(self, x, t, context):
            return torch.zeros_like(x)

        def qk(self, x, t, context, block, checkpoint=False):
            self.qk_calls.append((x.detach().clone(), t.item(), context, block, torch.is_grad_enabled(), checkpoint))
            q = x[..., ::2, ::2].flatten(2).transpose(1, 2)[:, :, None]
            return q, q

    sigmas, spy = wan_min.flow_sigmas(10, shift=3.0, strength=0.9), Spy()
    run = dict(reference=reference, null=null, checkpoint=True)
    for mode, references in (("match", 2), (0.0, 1), (0.4, 1)):
        spy.qk_calls = []
        config = MotionConfig(block=7, inner_steps=4, interval=2, ref_noise=mode)
        fastvmt.sample(spy, noise, sigmas, context, negative, config=config, **run)
        of_reference = [c for c in spy.qk_calls if c[2] is null]
        of_result = [c for c in spy.qk_calls if c[2] is context]
        assert (len(of_reference), len(of_result)) == (references, 4) and len(spy.qk_calls) == references + 4
        assert all(c[3] == 7 for c in spy.qk_calls) and not any(c[4] for c in of_reference)
        assert all(c[4] and c[5] for c in of_result)
        for sigma, (x, t, *_) in zip(sigmas.tolist(), of_reference):
            level = sigma if mode == "match" else mode
            assert t == pytest.approx(1000 * level)
            close(x, (1 - level) * reference + level * noise, 1e-5)
        assert [c[1] for c in of_result] == pytest.approx([1000 * sigmas[n].item() for n in (0, 0, 1, 1)])
        close(of_result[0][0], (1 - sigmas[0]) * reference + sigmas[0] * noise, 1e-5)


def test_features_and_losses_follow_the_settings(dit, clip):
    noise, reference, context, _, null = clip
    config = MotionConfig(block=2, tile=(2, 3), window=5, span=3, tau=3.0, center="argmax", alpha=0.5, squared=True)
    for center, x, sigma, text in (("argmax", reference, 0.3, context), ("soft", noise, 0.7, null)):
        flow, key_mean = fastvmt.motion_features(dit, x, sigma, text, dataclasses.replace(config, center=center))
        q, k = (part[0].mean(1).view(5, 6, 8, 24) for part in dit.qk(x, torch.tensor([1000 * sigma]), text, 2))
        true = fastvmt.attention_motion_flow(q, k, span=3, tile=(2, 3), window=5, tau=3.0, center=center)
        close(flow, true[0], 1e-4)
        close(key_mean, true[1], 1e-4)
    ref = randn(*flow.shape)
    _, amf, window = fastvmt.motion_losses((ref, None), (flow, key_mean), num_frames=5, config=config)
    assert amf == fastvmt.amf_loss(ref, flow, num_frames=5, span=3, alpha=0.5)
    assert window == fastvmt.window_loss(key_mean, num_frames=5, span=3, squared=True)


@pytest.mark.parametrize("patch", [(1, 2, 4), (1, 3, 2), (2, 3, 4)])
def test_patches_of_any_shape(clip, patch):
    """Rows and columns of tokens are those of the latents over the patch's, frames too."""
    noise, reference, context, negative, null = clip
    noise, reference = noise[:, :, :4], reference[:, :, :4]
    dit = wan_min.random_model(wan_min.DiT, TINY | dict(patch_size=patch))
    frames, rows, cols = grid = 4 // patch[0], 12 // patch[1], 16 // patch[2]
    config = dataclasses.replace(CONFIG, window=3)
    flow, _ = fastvmt.motion_features(dit, reference, 0.5, null, config)
    q, k = (part[0].mean(1).view(*grid, 24) for part in dit.qk(reference, torch.tensor([500.0]), null, 3))
    close(flow, fastvmt.attention_motion_flow(q, k, span=3, tile=(2, 3), window=3)[0], 1e-4)
    assert flow.shape == (len(fastvmt.frame_pairs(frames, 3)[0]), rows, cols, 2)
    latents = fastvmt.sample(dit, noise, wan_min.flow_sigmas(2), context, negative, reference=reference, null=null,
                             config=config)  # fmt: skip
    assert latents.shape == noise.shape and latents.isfinite().all()


def test_guided_steps():
    for steps, fraction, guided in [(50, 0.2, 10), (50, 0.0, 0), (4, 0.2, 1), (100, 0.07, 7), (7, 1.0, 7)]:
        assert fastvmt.guided_steps(steps, MotionConfig(guided_fraction=fraction)) == guided


def test_bad_arguments_of_the_method(clip, dit):
    noise, reference, context, negative, null = clip
    two = torch.cat([noise, noise])
    for start, kwargs in ((noise, dict(reference=reference)), (noise, dict(reference=reference[:, :, :1], null=null)),
                          (two, dict(reference=two, null=null))):  # fmt: skip
        with pytest.raises(ValueError, match="reference.*noise, one clip, .*null"):
            fastvmt.sample(dit, start, wan_min.flow_sigmas(2), context, negative, **kwargs)
    for change in (dict(block=0), dict(tile=(0, 4)), dict(tile=(3, 0)), dict(window=0), dict(span=0), dict(interval=0),
                   dict(inner_steps=0), dict(center="middle"), dict(ref_noise="clean"), dict(ref_noise=-0.1),
                   dict(ref_noise=1.1), dict(ref_noise=math.nan), dict(ref_noise=None), dict(tau=math.nan),
                   dict(alpha=math.nan), dict(lambda_amf=math.inf), dict(lambda_window=math.nan),
                   dict(guided_fraction=math.nan), dict(lr=(0.1, math.nan)), dict(lr=(-0.1, 0.1))):  # fmt: skip
        with pytest.raises(fastvmt.UserError, match=[*change][0]):
            MotionConfig(**change)
    x = randn(3, 4, 5, 6)
    for message, Q, K, kwargs in (("at least", x[:1], x[:1], {}), ("at least", x, x, dict(span=0)),
                                  ("at least", x, x, dict(window=0)), ("'soft'", x, x, dict(center="bogus")),
                                  ("one shape", x, x[:2], {}), ("one shape", x, x[:, :, :4], {})):  # fmt: skip
        for window in (3, None):
            with pytest.raises(ValueError, match=message):
                fastvmt.attention_motion_flow(Q, K, **dict(window=window) | kwargs)
    with pytest.raises(ValueError, match="do not divide"):
        dit(noise[..., 1:], torch.ones(1), context)


def test_batches_without_a_reference_are_sampled(clip, dit):
    noise, _, context, negative, _ = clip
    two, sigmas = torch.cat([noise, noise.flip(2)]), wan_min.flow_sigmas(2)
    together = fastvmt.sample(dit, two, sigmas, context.expand(2, -1, -1), negative.expand(2, -1, -1))
    for n in (0, 1):
        close(together[n : n + 1], fastvmt.sample(dit, two[n : n + 1], sigmas, context, negative), 1e-4)


def test_a_bf16_reference_is_computed_with_in_fp32(clip, dit):
    noise, reference, context, negative, null = clip
    half = reference.bfloat16()
    results = [fastvmt.sample(dit, noise, wan_min.flow_sigmas(2, 1.0, 0.7), context, negative, reference=x, null=null,
                              config=CONFIG) for x in (half, half.float())]  # fmt: skip
    assert results[0].dtype == torch.float32 and torch.equal(*results)


def test_the_defaults_are_the_papers():
    assert dataclasses.asdict(MotionConfig()) == dict(
        block=15, tile=(3, 4), window=21, span=5, tau=1.0, center="soft", alpha=0.2, lambda_amf=5.0, lambda_window=1.0,
        squared=False, guided_fraction=0.2, inner_steps=10, interval=3, lr=(0.003, 0.002), ref_noise=0.0,
    )  # fmt: skip
    seen = set()
    for function, names in ((fastvmt.attention_motion_flow, "span tile window tau center"), (fastvmt.amf_loss,
        "span alpha"), (fastvmt.window_loss, "span squared"), (fastvmt.optimize_latent, "inner_steps interval lr"),
        (fastvmt.window_centers, "tau center")):  # fmt: skip
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        defaults["inner_steps"] = defaults.pop("steps", None)
        for name in names.split():
            assert defaults[name] == getattr(MotionConfig(), name), (function.__name__, name)
        seen |= set(names.split())
    assert seen == {f.name for f in dataclasses.fields(MotionConfig)} - {
        "block", "lambda_amf", "lambda_window", "guided_fraction", "ref_noise"}  # fmt: skip


# ---- Purity and memory: on the device "meta" tensors have shapes but no numbers, so that nothing can be read back ----


class Tensors(TorchDispatchMode):
    """Sees every tensor that is made inside: those of one or more dimensions must be on the device that is named.

    (Numbers, such as AdamW's count of steps, may stay on the host.) `peak` is the most bytes that lived at once.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.live, self.peak, self.seen = device, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() and x.numel():
                assert x.device.type == self.device, f"{op} made a tensor {tuple(x.shape)} on {x.device}"
                self.count(x.untyped_storage())
        return out

    def count(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, nbytes):
        self.live -= nbytes


def test_the_method_makes_every_tensor_on_its_device_and_reads_none_back():
    sizes = (1, 16, 5, 12, 16), (1, 16, 5, 12, 16), (1, 7, 16), (1, 7, 16), (1, 7, 16)
    with torch.device("meta"):
        dit = wan_min.DiT(**TINY | dict(num_layers=2)).requires_grad_(False)
        noise, reference, context, negative, null = (torch.empty(size) for size in sizes)
        flow = torch.empty(9, 6, 8, 2)
        weight = torch.empty(6, 8)
    sigmas = wan_min.flow_sigmas(2)
    with Tensors("meta"):
        for checkpoint, change in ((False, dict(center="argmax", window=None, squared=True)),
                                   (True, dict(ref_noise="match"))):  # fmt: skip
            config, losses = dataclasses.replace(CONFIG, block=2, inner_steps=2, interval=1, **change), []
            latents = fastvmt.sample(dit, noise, sigmas, context, negative, reference=reference, null=null,
                                     config=config, checkpoint=checkpoint,
                                     callback=lambda step, x, found, losses=losses: losses.append(found))  # fmt: skip
            assert latents.is_meta and latents.shape == noise.shape and losses[0].is_meta and losses[1] is None
        assert fastvmt.amf_loss(flow, flow, num_frames=5, span=3, weight=weight).is_meta
    with Tensors("meta"), pytest.raises(AssertionError, match="on cpu"):
        torch.arange(3)


def test_the_whole_path_makes_every_tensor_on_the_device_asked_for(tmp_path, monkeypatch):
    """Prompts, video to latents, guided sampling, latents to video; all from a checkpoint's files."""
    true, load, sigmas = wan_min.TextEncoder.forward, wan_min.load, wan_min.flow_sigmas(1)

    def watched(*args):
        with Tensors("meta"):
            return true(*args)

    monkeypatch.setattr(wan_min.TextEncoder, "forward", watched)
    monkeypatch.setattr(wan_min, "load", lambda cls, folder, device="cpu", *a: load(cls, folder, "cpu", *a).to(device))
    write_checkpoint(tmp_path / "m")
    for offload in (False, True):
        model = wan_min.open_model(str(tmp_path / "m"), "meta", torch.bfloat16, offload=offload)
        video = torch.empty(1, 3, 5, 32, 48, device="meta")
        contexts = model.encode_prompts(["a red fox", "", ""])
        codec, dit = model.load_codec(), model.load_dit()
        with Tensors("meta"):
            reference = codec.encode(video)
            latents = fastvmt.sample(dit, torch.empty_like(reference), sigmas, *contexts.split(1)[:2],
                                     reference=reference, null=contexts[2:], checkpoint=offload,
                                     config=MotionConfig(block=2, inner_steps=1))  # fmt: skip
            decoded = codec.decode(latents)
        assert decoded.is_meta and decoded.shape == video.shape and contexts.is_meta and contexts.shape[:2] == (3, 512)


def test_the_papers_shape_takes_no_more_memory_than_told():
    """81 frames of 480x832: 21 latent frames of 30×52 tokens in 130 tiles; all keys gathered at once are 2.6 GB."""
    Q, K = (torch.empty(21, 30, 52, 128, device="meta", requires_grad=True) for _ in range(2))
    with Tensors("meta") as tensors:
        flow, key_mean = fastvmt.attention_motion_flow(Q, K)
        forward = tensors.peak
        torch.autograd.grad(flow.sum() + key_mean.sum(), (Q, K))
    assert flow.shape == (95 - 5, 30, 52, 2) and key_mean.shape == (90, 130, 128)
    assert forward < 7 * 2**25 and tensors.peak < 11 * 2**25  # three pairs at a time: 90 MB of keys


def test_flow_sigmas():
    for steps, shift, strength in [(50, 7.0, 1.0), (4, 1.0, 0.75), (1, 3.0, 0.5)]:
        s = np.linspace(strength, 0, steps + 1)
        true = torch.tensor(shift * s / (1 + (shift - 1) * s)).float()
        close(wan_min.flow_sigmas(steps, shift, strength), true, 1e-7)
    assert wan_min.flow_sigmas(50)[0] == 1 and wan_min.flow_sigmas(50)[-1] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Wan 2.1 against diffusers and transformers, on random weights under the official names
# ---------------------------------------------------------------------------------------------------------------------


def perturbed(module, seed=1):
    """Random weights with no zeros or ones left, so that every parameter shows in the output."""
    for n, p in enumerate(module.parameters()):
        p.add_(randn(*p.shape, seed=seed + n) * 0.05)
    return module


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed: parity with it is not checked")


@pytest.mark.parametrize("heads, head_dim", [(2, 24), (3, 16), (1, 128)])
def test_dit_equals_diffusers(diffusers, heads, head_dim):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert

    sizes = TINY | dict(dim=heads * head_dim, num_heads=heads, num_layers=2)
    ours = perturbed(random_model(DiT, sizes))
    for name, p in ours.named_parameters():
        if re.search(r"patch_embedding|attn\.[qko]|ffn\.2", name):
            p.mul_(1e-3)  # so that the eps of every norm shows
    true = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=2,
        cross_attn_norm=True, rope_max_seq_len=32)  # fmt: skip
    true.load_state_dict(convert({name: p.clone() for name, p in ours.state_dict().items()}), strict=True)
    x, t, context = randn(2, 16, 3, 10, 14), torch.tensor([37.25, 912.0]), randn(2, 9, 16)
    with torch.no_grad():
        out = ours(x, t, context)
        close(out, true(x, t, context, return_dict=False)[0], 1e-4)
    assert 0.3 < out.std() < 3


def test_bf16_stays_close_to_fp32():
    """Diffusers' DiT of these weights and inputs is off by 0.8 %."""
    sizes = dict(dim=256, ffn_dim=512, num_heads=2, num_layers=6, text_dim=64, freq_dim=64)
    full = random_model(DiT, sizes)
    half = wan_min.cast(random_model(DiT, sizes), torch.bfloat16)
    inputs = randn(1, 16, 3, 12, 16), torch.tensor([600.0]), randn(1, 16, 64)
    assert (half(*inputs) - full(*inputs)).norm() < 0.005 * full(*inputs).norm()
    for ours, true in zip(half.qk(*inputs, 4), full.qk(*inputs, 4)):
        assert (ours.float() - true).norm() < 0.006 * true.norm()


def test_vae_equals_diffusers(diffusers):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers as convert

    ours, true = perturbed(random_model(VAE, dict(dim=4))), diffusers.AutoencoderKLWan(base_dim=4)
    true.load_state_dict(convert({name: p.clone() for name, p in ours.state_dict().items()}), strict=True)
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (true.config.latents_mean, true.config.latents_std))
    for shape in [(2, 3, 9, 16, 24), (1, 3, 1, 24, 16), (1, 3, 13, 8, 16)]:
        video = (randn(*shape) * 0.5).clamp(-1, 1)
        with torch.no_grad():
            latents = ours.encode(video)
            close(latents, (true.encode(video).latent_dist.mode() - mean) / std, 1e-4)
            decoded = ours.decode(latents)
            close(decoded, true.decode(latents * std + mean).sample, 1e-4)
        assert decoded.shape == video.shape and decoded.std() > 0.1 and latents.std() > 0.1


def test_vae_refuses_odd_videos_and_keeps_no_more_than_it_needs():
    vae, video = random_model(VAE, dict(dim=4)), torch.zeros(1, 3, 13, 16, 16)
    for part, message in ((video[:, :, :12], "4k\\+1"), (video[..., :12], "multiples of 8")):
        with pytest.raises(ValueError, match=message):
            vae.encode(part)
    conv, cache = wan_min.CausalConv3d(2, 2, (3, 3, 3)), {}
    conv(randn(1, 2, 8, 4, 4), cache)
    assert cache[conv].untyped_storage().nbytes() == 4 * cache[conv].numel()  # the rest of the chunk is let go
    assert torch.equal(wan_min.ChannelNorm(4, 2)(torch.zeros(1, 4, 2, 2)), torch.zeros(1, 4, 2, 2))


def counting(counts):
    """A progress that notes how much work it is handed."""
    return lambda work: counts.append(len(work)) or work


def test_vae_tiles_blend_to_the_untiled_result():
    for size, tile, stride, unit in [(60, 30, 15, 8), (104, 52, 26, 1), (64, 30, 15, 8), (31, 30, 15, 1), (9, 4, 4, 8),
                                     (7, 30, 15, 2), (24, 5, 15, 1)]:  # fmt: skip
        total = torch.zeros(size * unit)
        for part in wan_min.blend_tiles(size, tile, stride, (3, unit)):
            assert len(part.weights) == min(tile, size) * unit and (part.weights > 0).all()
            total[part.output] += part.weights
            assert part.input.start * unit == part.output.start * 3 and part.input.stop * unit == part.output.stop * 3
        close(total, torch.ones(size * unit), 1e-6)
    for axis in ((10, 6, 4, (8, 1)), (5, 3, 2, (1, 2))):  # the ramp is one of output: latents, or pixels
        assert wan_min.blend_tiles(*axis)[1].weights.tolist() == pytest.approx([0.25, 0.75, 1, 1, 1, 1])
    vae = random_model(VAE, dict(dim=4))
    for part in (vae.encoder, vae.decoder):  # attention over a whole tile cannot equal that over the whole frame
        part.middle[1].proj.weight.zero_()
    latents, video = randn(1, 16, 2, 3, 40), randn(1, 3, 5, 24, 320).clamp(-1, 1)
    for convert, x, unit in ((vae.decode, latents, 8), (vae.encode, video, 1)):
        counts, whole = [], convert(x, tile=None)
        tiled = convert(x, (30, 24), (15, 16), counting(counts))  # columns 0 to 24 and 16 to 40
        assert counts == [4]  # two tiles of two latent frames
        assert not torch.equal(whole, tiled) and (whole - tiled).abs().mean() < 0.02 * whole.std()
        for far in (slice(None, 6 * unit), slice(-6 * unit, None)):  # from where tiles meet
            close(whole[..., far], tiled[..., far], 1e-3)


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]
OUT_OF_MEMORY += map(RuntimeError, (
    "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
    "GET was unable to find an engine to execute this computation", "Invalid buffer size: 9.02 GB",
    "MPS backend out of memory (MPS allocated: 5 GB)", "unable to mmap 8 bytes from <x>: Cannot allocate memory (12)",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
))  # fmt: skip
OTHERS = [ValueError("CUDA error: out of memory"), RuntimeError("CUDA error: an illegal memory access was encountered"),
          RuntimeError("the file out of memory.mp4 is damaged")]  # fmt: skip


def test_out_of_memory_is_told_by_all_its_names():
    assert all(map(wan_min.out_of_memory, OUT_OF_MEMORY)) and not any(map(wan_min.out_of_memory, OTHERS))


def test_the_codec_tiles_only_where_the_frame_does_not_fit(capsys, monkeypatch):
    true, tiles, held = VAE.tiled, [], []

    def limited(self, layers, x, out, tile, *args):
        tiles.append((tile, args[0]))
        if tile is None and failure:
            activation = torch.ones(2)
            held.append(weakref.ref(activation))
            raise RuntimeError(failure)
        assert all(ref() is None for ref in held)  # the failed attempt's tensors are gone
        return true(self, layers, x, out, tile, *args)

    monkeypatch.setattr(VAE, "tiled", limited)
    video, latents = randn(1, 3, 5, 32, 32).clamp(-1, 1), randn(1, 16, 2, 4, 4)
    whole, paper = (None, (15, 26)), ((30, 52), (15, 26))  # tile and stride
    notice = "out of memory: the VAE goes on in tiles\n"
    for text, flags, expected in (("", {}, [whole, whole]), ("MPS backend out of memory", {}, [whole, paper, paper]),
                                  ("", {"vae_tiles": True}, [paper, paper])):  # fmt: skip
        failure, codec, counts = text, open_model("tiny").load_codec(**flags), []
        tiles.clear()
        for convert, x in ((codec.encode, video), (codec.decode, latents)):
            convert(x, progress=counting(counts))
        assert tiles == expected and counts == [2, 2] and codec.vae_tiles is (paper in expected)
        assert capsys.readouterr().out == notice * (len(expected) == 3)
    failure = "shape mismatch"
    with pytest.raises(RuntimeError, match="shape mismatch"):
        open_model("tiny").load_codec().encode(video)


def test_umt5_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: parity not checked")
    sizes = dict(vocab=100, dim=32, dim_attn=48, dim_ffn=40, num_heads=3, num_layers=2)
    ours = perturbed(random_model(TextEncoder, sizes))
    config = transformers.UMT5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=40, num_layers=2, num_heads=3,
                                     feed_forward_proj="gated-gelu")  # fmt: skip
    true = transformers.UMT5EncoderModel(config).eval()
    renamed, weights = {}, ours.state_dict()
    for name in true.state_dict():
        own = name
        for theirs, part in {"encoder.block": "blocks", "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2",
                             "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
                             "layer.0.SelfAttention": "attn", "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
                             "layer.1.DenseReluDense.wi_1": "ffn.fc1", "layer.1.DenseReluDense.wo": "ffn.fc2",
                             "encoder.final_layer_norm": "norm", "encoder.embed_tokens": "token_embedding",
                             "shared": "token_embedding"}.items():  # fmt: skip
            own = own.replace(theirs, part)
        renamed[name] = weights[own]
    true.load_state_dict(renamed)
    ids, mask = torch.randint(0, 100, (2, 200), generator=torch.Generator().manual_seed(0)), torch.ones(2, 200).long()
    mask[0, 150:] = 0
    with torch.no_grad():
        out = ours(ids, mask)
        theirs = true(ids, attention_mask=mask).last_hidden_state
    close(out * mask[..., None], theirs * mask[..., None], 1e-4)
    assert 0.3 < out.std() < 3


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints in the official layout, and prompts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, model, digest", [
    (DiT, "1.3B", "f497a13f822fae02"), (DiT, "14B", "91bb4bff513bbc8f"),
    (VAE, "1.3B", "3d5b088112ea6071"), (TextEncoder, "1.3B", "6be56588df891113"),
])  # fmt: skip
def test_parameters_have_the_official_names_and_shapes(cls, model, digest):
    """The digests are of the official files' headers."""
    with torch.device("meta"):
        module = cls(**wan_min.ARCHITECTURES[model][0]) if cls is DiT else cls()
    lines = [f"{name} {tuple(p.shape)}" for name, p in sorted(module.state_dict().items())]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(digest), lines


def write_tokenizer(path):
    """A small Unigram tokenizer of UMT5's kind: sentencepiece spaces, byte fallback, </s> = 1 at the end."""
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [*special, *(f"<0x{n:02X}>" for n in range(256)), *"▁ ▁a ▁red ▁fox ▁snow ▁runs".split()]
    pieces += "abcdefghijklmnopqrstuvwxyz狐狸,.!&<"
    vocab = [(piece, 0.0 if n < 3 else -float(len(pieces) - n % 7)) for n, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


DIT_FILE = "diffusion_pytorch_model.safetensors"
TEXT_ENCODER = dict(vocab=512, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2)


def write_checkpoint(folder, shards=0):
    """A tiny checkpoint in the official layout; returns the modules that it came from."""
    arguments, vae = wan_min.ARCHITECTURES["tiny"]
    parts = {DiT: arguments, VAE: vae, TextEncoder: TEXT_ENCODER}
    modules = {cls: perturbed(random_model(cls, sizes, seed=7)) for cls, sizes in parts.items()}
    weights = modules[DiT].state_dict()
    folder.mkdir()
    names = sorted(weights)
    for n in range(shards or 1):
        file = f"diffusion_pytorch_model-{n + 1:05}-of-{shards:05}.safetensors" if shards else DIT_FILE
        save_file({name: weights[name] for name in names[n :: shards or 1]}, folder / file)
    official = {"in_dim": 16, "out_dim": 16, "eps": 1e-6, "text_len": 512, "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(arguments | official | {"vae": vae, "text_encoder": TEXT_ENCODER}))
    torch.save(modules[VAE].state_dict(), folder / VAE_FILE)
    torch.save(modules[TextEncoder].state_dict(), folder / TEXT_FILE)
    write_tokenizer(folder / TOKENIZER_FILE)
    return modules


@pytest.mark.parametrize("shards", [0, 3])
def test_a_checkpoint_gives_the_video_of_its_modules(folder, capsys, monkeypatch, shards):
    modules, written = write_checkpoint(folder / "model", shards), []
    monkeypatch.setattr(fastvmt, "write_video", lambda path, video, *_: written.append(video))
    done = run_main(capsys, *DEMO, "--model", folder / "model", "--prompt", "a red  fox &amp; snow",
                    "--negative-prompt", "runs", "--block", "3")  # fmt: skip
    assert done[0] == 0, done
    tokenizer, contexts = Tokenizer.from_file(str(folder / "model" / TOKENIZER_FILE)), []
    for text in ("a red fox & snow", "runs", ""):
        ids = torch.tensor([tokenizer.encode(text).ids])
        encoded = modules[TextEncoder](ids, torch.ones_like(ids))
        contexts.append(F.pad(encoded, (0, 0, 0, 512 - ids.shape[1])))
    vae, noise = modules[VAE], randn(1, 16, 2, 4, 6)
    latents = fastvmt.sample(modules[DiT], noise, wan_min.flow_sigmas(2), *contexts[:2], null=contexts[2],
                             reference=vae.encode(fastvmt.read_video("demo", 5, (32, 48), fps=16.0)),
                             config=MotionConfig(block=3, inner_steps=2))  # fmt: skip
    close(written[0], vae.decode(latents), 1e-4)
    assert written[0].std() > 0.05


@pytest.mark.parametrize("model", ["1.3B", "14B"])
def test_without_config_the_official_layout_of_that_width_is_expected(tmp_path, monkeypatch, model):
    write_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with torch.device("meta"):
        weights = DiT(**wan_min.ARCHITECTURES[model][0]).state_dict()
    monkeypatch.setattr(wan_min, "load_file", lambda path: weights)
    dit = wan_min.load(DiT, tmp_path / "model", "meta")
    assert {name: p.shape for name, p in dit.state_dict().items()} == {name: p.shape for name, p in weights.items()}
    del weights["blocks.29.modulation"]
    with pytest.raises(ModelError, match="Missing key"):
        wan_min.load(DiT, tmp_path / "model", "meta")


@pytest.mark.parametrize("offload", [False, True])
def test_open_model(tmp_path, offload):
    modules, counts = write_checkpoint(tmp_path / "model"), []
    half = {name: p.bfloat16() for name, p in modules[TextEncoder].state_dict().items()}
    torch.save(half, tmp_path / "model" / TEXT_FILE)
    assert wan_min.load(TextEncoder, tmp_path / "model").norm.weight.dtype == torch.bfloat16
    model = open_model(str(tmp_path / "model"), "cpu", torch.bfloat16, offload=offload)
    assert model[4:7] == (((480, 832), (832, 480)), 81, 16.0) and model.blocks == 4
    assert model.defaults == {"negative_prompt": wan_min.NEGATIVE_PROMPT}
    dit, context = model.load_dit(counting(counts)), model.encode_prompts(["a red fox"])
    assert counts == [len(modules[DiT].state_dict())] and context.dtype == torch.float32
    assert all(p.is_meta is offload for p in dit.blocks.parameters())
    dtypes = {name: p.dtype for name, p in dit.named_parameters()}
    for name, dtype in dtypes.items():
        fp32 = re.search(r"^(time_|head)|modulation|norm", name)
        assert dtype == (torch.float32 if fp32 else torch.bfloat16), name
    random = random_model(DiT, wan_min.ARCHITECTURES["tiny"][0], dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in random.named_parameters()} == dtypes
    inputs, full = (randn(1, 16, 2, 4, 6), torch.tensor([500.0]), context), modules[DiT]
    assert torch.equal(dit(*inputs), wan_min.cast(full, torch.bfloat16)(*inputs))
    assert not any(p.requires_grad for p in dit.parameters())


def test_models_of_random_weights():
    model = open_model("tiny")
    assert (model.canvases, model.blocks) == (((64, 112), (112, 64)), 4)
    assert model.defaults == dict(frames=33, block=3, window=3, negative_prompt=wan_min.NEGATIVE_PROMPT)
    contexts = model.encode_prompts(["a red fox", "", "a blue fox", "a red fox", "caf\udce9"])
    assert contexts.shape == (5, 512, 64) and contexts.dtype == torch.float32
    assert torch.equal(contexts[0], contexts[3])
    for n in (1, 2, 4):
        assert abs(contexts[n].std() - 1) < 0.02 and (contexts[0] * contexts[n]).mean().abs() < 0.02
    for name, blocks in (("1.3B", 30), ("14B", 40)):
        large = open_model(name, random_weights=True)
        assert large.encode_prompts([""]).shape == (1, 512, 4096) and large.blocks == blocks
    with pytest.raises(ModelError, match="1.3B, 14B, tiny, not some/repo"):
        open_model("some/repo", random_weights=True)


def test_unusable_checkpoints_are_refused(tmp_path, monkeypatch):
    text = write_checkpoint(tmp_path / "good")[TextEncoder].state_dict()
    fp8 = text | {"norm.weight": text["norm.weight"].to(torch.float8_e4m3fn)}
    lost = ["blocks.1.modulation", "blocks.2.ffn.0.weight", "blocks.3.ffn.0.weight", "head.head.bias"]

    def lose(names):
        save_file({name: p for name, p in load_file(DIT_FILE).items() if name not in names}, DIT_FILE)

    def cut(name, keep=0.7):
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: int(len(data) * keep)])

    cases = [  # what the message must say, and what is done in the folder
        ('Missing key(s) in state_dict: "{}", "{}", "{}", "head.'.format(*lost), lose, lost),
        ("'i2v' model", Path("config.json").write_text, '{"model_type": "i2v"}'),
        ("is a Diffusers checkpoint: only the official layout can be read, as Wan-AI/Wan2.1-T2V-1.3B", os.rename,
         VAE_FILE, "model_index.json"),
        ("with an fp8 text encoder", os.rename, TEXT_FILE, "models_t5_umt5-xxl-enc-fp8.pth"),
        ("is in fp8", torch.save, fp8, TEXT_FILE),
        ("without diffusion_pytorch_model*.safetensors", os.remove, DIT_FILE),
        ("without google/umt5-xxl/tokenizer.json", os.remove, TOKENIZER_FILE),
        ("Wan2.1_VAE.pth is damaged (Weights only", torch.save, {"a": Path()}, VAE_FILE),
        *((f"{name} is damaged", cut, name)
          for name in ("config.json", DIT_FILE, VAE_FILE, TOKENIZER_FILE)),
        (f"{TEXT_FILE} is damaged", cut, TEXT_FILE, 0.0),
    ]  # fmt: skip
    for n, (message, spoil, *args) in enumerate(cases):
        shutil.copytree(tmp_path / "good", tmp_path / str(n))
        monkeypatch.chdir(tmp_path / str(n))
        spoil(*args)
        with pytest.raises(ModelError, match=re.escape(message)) as caught:
            open_model(os.getcwd()).encode_prompts([""])  # before the reference is encoded
        assert "\n" not in str(caught.value)


def test_names_that_are_no_checkpoint_are_told_what_they_are(folder):
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.ones(1)}, "motion.safetensors")
    Path("wan.gguf").touch()
    Path("models").mkdir()
    for name, message in {
        "motion.safetensors": "motion.safetensors is a LoRA: .* Wan-AI/Wan2.1-T2V-1.3B", "wan.gguf": "is a GGUF",
        "models/foo": "unknown model 'models/foo'", "nowhere/wan.safetensors": "unknown model",
        "a/b/c": "unknown model", "~/wan": "unknown model", "nonsense": "unknown model 'nonsense': .*1.3B, 14B, tiny",
    }.items():  # fmt: skip
        with pytest.raises(ModelError, match=message):
            open_model(name)


def fake_hub(monkeypatch, folder, files=(), fail=None):
    """What open_model asks huggingface_hub for: a list of calls. `fail` is raised where the network is needed."""
    calls = []

    def call(name, repo, **options):
        calls.append((name, repo, options))
        if fail:
            raise fail
        return files if name == "list_repo_files" else str(folder)

    for name in ("list_repo_files", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", partial(call, name))
    return calls


def test_weights_from_the_hub(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    write_checkpoint(tmp_path / "model")
    calls = fake_hub(monkeypatch, tmp_path / "model")
    for name, repo in (("14B", "Wan-AI/Wan2.1-T2V-14B"), ("some/repo", "some/repo")):
        calls.clear()
        model = open_model(name)
        assert model.blocks == 4 and calls == [("snapshot_download", repo, {"allow_patterns": "config.json"})]
        model.load_codec(), model.load_dit(), model.encode_prompts(["a"])
        assert [call[:2] for call in calls[1:]] == [("snapshot_download", repo)]  # once, when needed
    needed = ["config.json", "diffusion_pytorch_model-00001-of-00006.safetensors", "Wan2.1_VAE.pth",
              "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"]  # fmt: skip
    official = [*needed, "README.md", "diffusion_pytorch_model.safetensors.index.json"]
    assert list(filter_repo_objects(official, allow_patterns=calls[-1][2]["allow_patterns"])) == needed
    assert wan_min.REPOS[fastvmt.build_parser().get_default("model")] == "Wan-AI/Wan2.1-T2V-1.3B"
    (tmp_path / "model" / VAE_FILE).write_text("")
    with pytest.raises(ModelError, match="Wan2.1_VAE.pth is damaged"):
        open_model("some/repo").load_dit()  # all parts are checked before one is read


def test_failures_of_the_hub_are_one_line_with_the_way_out(tmp_path, monkeypatch):
    from huggingface_hub.utils import GatedRepoError

    for message, error in {"reset by peer more.*run it again, it resumes": ConnectionResetError("reset by peer\nmore"),
                           "check the spelling.*hf auth": GatedRepoError.__new__(GatedRepoError)}.items():  # fmt: skip
        fake_hub(monkeypatch, tmp_path, fail=error)
        with pytest.raises(ModelError, match=f"^owner/name .*{message}"):
            open_model("owner/name")
    for file, kind in {"transformer/config.json": "Diffusers", "high_noise_model/config.json": "Wan 2.2",
                       "Wan2_1_bf16.safetensors": "repackaged", "a.txt": "not a checkpoint"}.items():  # fmt: skip
        calls = fake_hub(monkeypatch, tmp_path, files=["README.md", file])
        with pytest.raises(ModelError, match=f"owner/name is .*{kind}.*Wan-AI/Wan2.1-T2V-1.3B"):
            open_model("owner/name")
        assert [call[0] for call in calls] == ["snapshot_download", "list_repo_files"]


def test_hub_cache_is_used_offline_and_its_absence_is_one_line(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = "import wan_min; m = wan_min.open_model('14B'); print(m.blocks, len(m.load_dit().blocks))"
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                  cwd=HERE)  # fmt: skip
    message = run().stderr.splitlines()[-1]
    for part in ("ModelError", "Wan-AI/Wan2.1-T2V-14B", "go online", "--local-dir", "HF_HOME"):
        assert part in message
    repo, commit = tmp_path / "hub" / "models--Wan-AI--Wan2.1-T2V-14B", "0" * 40
    for name in ("refs", "snapshots"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    write_checkpoint(repo / "snapshots" / commit, shards=2)
    assert run().stdout == "4 4\n"


def test_tokens_equal_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: parity not checked")
    import ftfy

    write_checkpoint(tmp_path / "model")
    file = str(tmp_path / "model" / TOKENIZER_FILE)
    ours, true = Tokenizer.from_file(file), transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="</s>")
    prompts, lengths = ["", "a red fox", "  a \n red\tfox ", "<a> &amp;amp; fox", "红狐狸在雪中奔跑，狐狸。",
                        "🦊 runs 🏔️", "?!...,,", "fox " * 2000], []  # fmt: skip
    for prompt in prompts:
        clean = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
        ids = wan_min.tokenize(prompt, ours)
        assert ids == true(clean, truncation=True, max_length=512).input_ids and ids[-1] == 1
        lengths.append(len(ids))
    assert lengths[:2] == [1, 4] and lengths[-1] == 512
    contexts = wan_min.encode_prompts(prompts, tmp_path / "model")
    assert contexts.shape == (len(prompts), 512, 64) and contexts.isfinite().all()
    assert (contexts.abs().sum(-1) > 0).sum(1).tolist() == lengths  # zero past the words and the end token


class Characters:
    """A tokenizer of one id a character, which shows the text that it was given."""

    def encode(self, text, add_special_tokens):
        return argparse.Namespace(ids=list(text))

    def token_to_id(self, token):
        return token


def test_prompts_are_cleaned_as_by_the_official_code_and_a_cut_is_told(capsys):
    for prompt, clean in {
        "a dog’s tail — “happy”": "a dog's tail — \"happy\"", "a dogâ€™s tail": "a dog's tail",  # mojibake
        "\x1b[36;44ma red\x1b[0m fox": "a red fox", "ａ　ｒｅｄ　ｆｏｘ": "a red fox", "ﬁre &amp;lt; x": "fire < x",
        "a\udce9 fox": "a\ufffd fox",  # from a byte that is not UTF-8
    }.items():  # fmt: skip
        assert "".join(wan_min.tokenize(prompt, Characters())) == clean + "</s>"
    for length, told in ((511, ""), (512, "prompt cut to 512 of its 513 tokens: " + 30 * "x" + "...\n")):
        assert len(wan_min.tokenize("x" * length, Characters())) == 512
        assert capsys.readouterr().out == told


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def ffmpeg(*args):
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace").stderr


def write_clip(path, num_frames=14, size=(48, 80), fps=12, options=()):
    """A clip with a bright left half, whose frame n has brightness 10n on the right."""
    raw = np.zeros((num_frames, *size, 3), np.uint8)
    raw[:, :, : size[1] // 2] = 200
    raw[:, :, size[1] // 2 :] = (np.arange(num_frames) * 10)[:, None, None, None]
    source = path.with_suffix(".rgb")
    source.write_bytes(raw.tobytes())
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}", "-r", fps, "-i", source, *options, path)
    assert path.exists()
    return path


def run_main(capsys, *args):
    """Exit code, stdout and stderr, without bars, of the program in this process."""
    code = fastvmt.main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, "\n".join(line for line in out.err.splitlines() if line and not re.search(r"it/s|s/it", line))


def refused(capsys, message, *args, code=2):
    """Assert that the program ends with one line that holds the message; its standard output."""
    done, out, err = run_main(capsys, *args)
    assert done == code and message.lower() in err.lower(), (args, err)
    assert len(err.splitlines()) == 1 and len(err) < 500, err
    return out


@pytest.fixture
def folder(tmp_path):
    """An empty folder to run in: results are out.mp4 there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        yield tmp_path


DEMO = shlex.split("--ref demo --prompt 'a red fox' --model tiny --steps 2 --inner-steps 2 --device cpu --size 32x48 "
                   "--frames 5")  # fmt: skip


def failing_once(function):
    """It, but that its first call finds the memory full."""
    calls = iter([True])

    def call(*args):
        if next(calls, False):
            raise OUT_OF_MEMORY[0]
        return function(*args)

    return call


def failing(error):
    """A function that raises it."""

    def fail(*args, **kwargs):
        raise error

    return fail


def test_command_line_makes_the_video(folder, capsys):
    write_clip(folder / "in.mp4", fps=12)
    outputs = []
    for n, extra in enumerate(([], [], ["--seed", "1"], ["--no-transfer"])):
        Path(str(n)).mkdir()
        args = [*DEMO, "--ref", "in.mp4", "--out", f"{n}/out.mp4", "--size", "32x64", "--frames", "11", *extra]
        if n == 0:
            done = subprocess.run([sys.executable, HERE / "fastvmt.py", *args], capture_output=True, text=True)
            assert done.returncode == 0 and "sampling: 100%" in done.stderr, done.stderr
            text = done.stdout
        else:
            assert run_main(capsys, *args)[::2] == (0, "")
        assert os.listdir(str(n)) == ["out.mp4"]
        outputs.append(Path(f"{n}/out.mp4").read_bytes())
    assert outputs[0] == outputs[1] and len(set(outputs[1:])) == 3
    info = ffmpeg("-i", "0/out.mp4", "-f", "null", "-")
    assert all(s in info for s in ("Video: h264", "yuv420p", "64x32", "16 fps", "frame=    9")), info
    expected = r"""encoding the prompts
encoding the reference, 9 frames of 32x64 at 16 fps
loading the DiT
guiding steps 1 to 1 of 2, σ 1\.000 to 1\.000
latents kept in 0/out\.latents\.safetensors; .*
wrote 0/out\.mp4
"""
    assert re.fullmatch(expected, text), text


def test_the_run_is_its_parts(folder, capsys, monkeypatch):
    """Which latents and settings the videos and the printed lines are made of; changes of the method arrive."""
    written = {}
    monkeypatch.setattr(fastvmt, "write_video", lambda path, video, *_: written.update({str(path): video}))
    flags = "--frames 9 --compare c.mp4 --seed 5 --strength 0.7 --steps 3 --guided-fraction 0.5 --velocity-interval 2"
    args, config, model = fastvmt.parse_arguments([*DEMO, *flags.split(), "--negative-prompt", "blur"])
    video, codec, dit = fastvmt.read_video("demo", 9, (32, 48)), model.load_codec(), model.load_dit()
    reference, (context, negative, null) = codec.encode(video), model.encode_prompts(["a red fox", "blur", ""]).split(1)
    noise, sigmas = randn(*reference.shape, seed=5), wan_min.flow_sigmas(3, 7.0, 0.7)

    def losses(reference, generated, **_):
        return ((generated[0] - reference[0]).abs().mean(),)

    for seams in ({}, {"losses": losses, "step": lambda velocity, x, *_: x + velocity(x, 0.5)}):
        fastvmt.run(args, config, model, **seams)
        latents = fastvmt.sample(dit, noise, sigmas, context, negative, reference=reference, null=null, config=config,
                                 **seams)  # fmt: skip
        result = codec.decode(latents)
        close(written["out.mp4"], result, 1e-4)
        pair = torch.cat([video, result], dim=-1)  # below 240 rows both are enlarged, here eight times
        close(written["c.mp4"], pair.repeat_interleave(8, 3).repeat_interleave(8, 4), 1e-4)
        text = capsys.readouterr().out
        assert f"steps 1 to 2 of 3, σ {sigmas[0]:.3f} to {sigmas[1]:.3f}" in text and text.count("guiding") == 1


@pytest.mark.parametrize(
    "guided, interval, computed", [(2, 3, (0, 1, 2, 5, 8)), (0, 2, (0, 2, 4, 6, 8)), (3, 1, range(9))]
)
def test_velocities_are_reused_after_the_guided_steps(guided, interval, computed):
    asked = []

    def velocity(x, sigma):
        asked.append(sigma)
        return torch.full_like(x, sigma)

    def twice(velocity, x, sigma, next_sigma):  # as Heun's method asks twice
        return x + velocity(x, sigma) + velocity(x, sigma + 0.5)

    step, x, last = fastvmt.reuse_velocities(twice, guided, interval), torch.zeros(1), 0
    for number in range(9):
        x = step(velocity, x, number, number + 1)
        last = number if number in computed else last
        expected = last + (last + 0.5) if number in computed else 2 * (last + 0.5)
        assert x.item() == expected, number
        x = torch.zeros(1)
    assert asked == [sigma for number in computed for sigma in (number, number + 0.5)]


def test_user_errors(folder, capsys, monkeypatch):
    write_clip(folder / "in.mp4")
    write_clip(folder / "short.mp4", num_frames=3, fps=16)
    Path("text.mp4").write_text("no video")
    for name in ("empty", "out/p.mp4", "out/q.latents.safetensors"):
        Path(name).mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(wan_min, "random_contexts", failing(AssertionError("told before anything is loaded")))
    out_of_range = ("--steps 0", "--fps 0", "--fps nan", "--start -1", "--seed -1", "--shift 0", "--strength 1.5")
    cases = {flag: flag[2:] for flag in out_of_range} | {  # flags, what the message must name
        "--frames 4": "frames 4 is not between 5 and",
        "--ref no.mp4": "no.mp4",
        "--ref empty": "0 frames",
        "--ref short.mp4": "3 frames",
        "--start 1": "from 1 s",
        "--prompt ' '": "prompt is missing, or the prompt is empty",
        "--prompt " + "fox" * 3334: "characters",
        "--size axb": "HxW",
        "--no-such-flag": "--no-such-flag",
        "--model nonsense": "unknown model 'nonsense'",
        "--model nonsense --steps 0": "steps 0",  # before the hub is asked
        "--model empty": "without diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5",
        "--block 5": "block 5 is outside the model's 1 to 4",
        "--ref-noise 2": "ref_noise must be a noise level from 0 to 1",
        "--out missing/o.mp4": "missing",
        "--out o.avi": ".mp4",
        "--out in.mp4": "not the reference",
        f"--out {'a' * 250}.mp4": "name too long",
        "--out out/p.mp4": "is a folder",
        "--out out/q.mp4": "q.latents.safetensors is a folder",
        "--compare out.mp4": "not the reference",
        "--compile --offload": "exclude each other",
        f"--ref {'a' * 300}": "not a file or a folder",
        "--ref 'no\nsuch'": "no such",
        "--size 10x48": "10x48 has a side below 32",
        "--size=-32x48": "-32x48 has a side below 32",
        "--lr 0.1 nan": "lr nan",
        "--device abacus": "device abacus cannot be used",
        "--decode text.mp4": "header",
        "--decode no.safetensors": "no.safetensors",
    }
    for flags, message in cases.items():
        refused(capsys, message, *DEMO, "--ref", "in.mp4", *shlex.split(flags))
    refused(capsys, "--ref", "--prompt", "a fox", "--model", "tiny")
    full = shutil.disk_usage(folder)._replace(free=2**26)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    refused(capsys, "128 MiB", *DEMO)
    assert sorted(folder.rglob("*")) == before


def test_help_shows_every_setting_with_default_and_source(capsys):
    with pytest.raises(SystemExit):
        fastvmt.main(["--help"])
    text = " ".join(capsys.readouterr().out.split()).split("options:")[1]
    for f in dataclasses.fields(MotionConfig):
        shown = re.search(rf" --{f.name.replace('_', '-')} (.*?) \(default: (.*?)\)(?= --|$)", text)
        assert re.search(r"(eq|Sec|App)\.", shown[1]) and shown[2] == str(f.default), shown


def test_a_new_setting_becomes_a_flag(monkeypatch):
    """Of any kind, tuples of any length too: whoever adds one changes nothing else."""

    @dataclasses.dataclass
    class Longer:
        span: int = 5  # temporal span (eq. 3)
        blocks: tuple = (1, 2, 3)  # three blocks (here)
        weights: tuple = ()  # as many as there are (here)
        name: str = "a"  # what it is called (here)

    monkeypatch.setattr(fastvmt, "MotionConfig", Longer)
    parser = fastvmt.build_parser()
    assert "three blocks (here) (default: (1, 2, 3))" in parser.format_help()
    args = parser.parse_args("--blocks 4 5 6 --weights 0.5 2 --name b".split())
    assert (args.blocks, args.weights, args.name, args.span) == ([4, 5, 6], [0.5, 2.0], "b", 5)
    assert parser.parse_args([]).weights == () and parser.parse_args(["--weights"]).weights == []


def test_every_flag_arrives(folder, capsys, monkeypatch):
    """At the method, the text encoder, the DiT and the video."""
    seen, prompts, compiled, tiled = {}, [], [], VAE.tiled

    def encode(texts, text_dim, device):
        prompts.append(texts)
        return torch.arange(3.0)[:, None, None].expand(3, 1, 64)

    def sample(dit, noise, sigmas, context, negative, **kwargs):
        seen.update(kwargs, noise=noise, first=sigmas[0].item(), steps=len(sigmas) - 1)
        seen["dtype"] = dit.blocks[0].self_attn.q.weight.dtype
        seen["contexts"] = [x.mean().item() for x in (context, negative, kwargs["null"])]
        return torch.zeros_like(noise)

    def run(flags=""):
        assert run_main(capsys, *DEMO, *shlex.split(flags))[0] == 0
        assert seen["contexts"] == [0, 1, 2]
        return seen["config"]

    monkeypatch.setattr(wan_min, "random_contexts", encode)
    monkeypatch.setattr(fastvmt, "sample", sample)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    monkeypatch.setattr(VAE, "tiled", lambda *args: seen.update(tile=args[4]) or tiled(*args))
    settings = dict(block=2, tile=(2, 5), window=7, span=4, tau=1.5, center="argmax", alpha=0.1, lambda_amf=2.0,
                    lambda_window=3.0, squared=True, guided_fraction=0.5, inner_steps=4, interval=2, lr=(0.1, 0.2),
                    ref_noise=0.3)  # fmt: skip
    assert set(settings) == {f.name for f in dataclasses.fields(MotionConfig)}
    flags = "--frames 7 --steps 9 --cfg-scale 3 --strength 0.5 --shift 1 --seed 3"
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        flags += " --" + " ".join([name.replace("_", "-"), *map(str, values)])
    assert run(flags) == MotionConfig(**settings)
    assert (seen["steps"], seen["first"], seen["cfg_scale"]) == (9, 0.5, 3.0)
    assert torch.equal(seen["noise"], randn(1, 16, 2, 4, 6, seed=3))
    assert run("--preset release").span == 3 and "15 fps" in ffmpeg("-i", "out.mp4")
    for flags, negative in (
        ("", wan_min.NEGATIVE_PROMPT),
        ("--negative-prompt '' --dtype bf16", ""),
        ("--negative-prompt blur --no-transfer --strength 0.5 --compile --vae-tiles", "blur"),
    ):
        compiled.clear()
        run(flags)
        assert prompts[-1] == ["a red fox", negative, ""]
        assert (seen["reference"] is None) is ("--no-transfer" in flags) and seen["first"] == 1
        assert seen["tile"] == ((30, 52) if "vae-tiles" in flags else None)
        assert seen["dtype"] == (torch.bfloat16 if "bf16" in flags else torch.float32)
        assert compiled == [wan_min.Block] * 4 * ("--compile" in flags)


def test_presets():
    defaults = vars(fastvmt.build_parser().parse_args([]))
    assert dataclasses.asdict(MotionConfig()).items() <= defaults.items()
    common = dict(strength=1, steps=50, shift=7, cfg_scale=5.8, fps=None, size=None, vae_tiles=False)
    assert (common | {"frames": 81}).items() <= defaults.items()
    release = dict(span=3, alpha=1 / 7, lambda_window=1 / 1560, lr=(0.003, 0.0021), ref_noise="match")
    for flags, settings, others in (  # the model's own defaults, under a preset's, under flags
        ("", {}, {"frames": 33}),
        ("--preset paper", {"ref_noise": "match"}, {"vae_tiles": True}),  # of Algorithm 1 and Sec. 4.1
        ("--preset release --no-vae-tiles", release, {"strength": 0.75, "fps": 15}),
        ("--preset release --strength 1 --ref-noise 0.2 --lr 0.1 0.2", release | dict(lr=(0.1, 0.2), ref_noise=0.2),
         {"fps": 15, "vae_tiles": True}),
        ("--window none --tile 2 2 --ref-noise match", dict(window=None, tile=(2, 2), ref_noise="match"), {}),
    ):  # fmt: skip
        args, config, _ = fastvmt.parse_arguments(["--model", "tiny", *flags.split()])
        assert config == MotionConfig(**dict(block=3, window=3) | settings), flags
        assert (common | others).items() <= vars(args).items(), flags


def test_notices(folder, capsys):
    write_clip(folder / "in.mp4", num_frames=7, fps=16)
    write_clip(folder / "tall.mp4", size=(80, 48), fps=16)
    shorter = "only 5 frames: the reference is shorter than --frames"
    longer = "the model was trained on clips of up to 5 frames"
    portrait = "--size is rows x columns: this is a portrait video"
    for flags, limit, notices, shape in (
        ("--ref in.mp4 --frames 8", 81, [], "5 frames of 64x112"),
        ("--ref in.mp4 --frames 9", 81, [shorter], "5 frames of 64x112"),
        ("--ref demo --frames 9", 5, [longer], "9 frames of 64x112"),
        ("--ref demo --frames 5 --size 33x79", 5, ["--size is rounded to 32x80"], "5 frames of 32x80"),
        ("--ref demo --frames 5 --size 112X64", 81, [portrait], "5 frames of 112x64"),
        ("--ref tall.mp4 --frames 5 --size 64x112", 81, [], "5 frames of 64x112"),
        ("--ref tall.mp4 --frames 5", 81, [], "5 frames of 112x64"),  # turned, as no size was asked for
    ):
        args, config, model = fastvmt.parse_arguments(["--prompt", "fox", "--model", "tiny", *flags.split()])
        codec = argparse.Namespace(encode=failing(StopIteration))  # what follows is not needed
        model = model._replace(max_frames=limit, load_codec=lambda *_, codec=codec: codec)
        with pytest.raises(StopIteration):
            fastvmt.run(args, config, model)
        expected = [*notices, "encoding the prompts", f"encoding the reference, {shape} at 16 fps"]
        assert capsys.readouterr().out.splitlines() == expected, flags


def encode(path, raw, *options, fps=12):
    """Write uint8 (T, h, w, 3), or 10-bit planes with their -pix_fmt and -s in options, as a video."""
    source = path.with_suffix(".raw")
    source.write_bytes(raw.tobytes())
    shape = ["-pix_fmt", "rgb24", "-s", f"{raw.shape[2]}x{raw.shape[1]}"] if raw.dtype == np.uint8 else options[:4]
    log = ffmpeg("-f", "rawvideo", *shape, "-r", fps, "-i", source, *options[4 * (raw.dtype != np.uint8) :], path)
    source.unlink()
    assert path.exists(), log
    return path


def levels(path, *, fps=12, size=(32, 64), num_frames=81, **options):
    """What read_video sees, (3, T, H, W) from 0 to 255."""
    video = fastvmt.read_video(path, num_frames, size, fps=fps, **options)
    assert video.dtype == torch.float32 and video.shape[0] == 1
    return (video[0] + 1) * 127.5


SINE = ["-f", "lavfi", "-t", "3", "-i", "sine"]
H264 = "-c:v libx264 -bf 2"
READING = {  # the file's ending, its rate, the rate and start asked for, options of its encoder
    "sound": (".mp4", 12, 12, 0, ""),
    "rotated": (".mp4", 12, 12, 0, ""),
    "variable": (".mp4", 12, 12, 0, "-vf setpts=PTS+2/12/TB*gte(N\\,6) -fps_mode vfr"),
    "paused": (".mp4", 12, 12, 0, "-vf setpts=PTS+30/TB*gte(N\\,6) -fps_mode vfr"),
    "fast": (".mp4", 48, 16, 0, ""),
    "slow": (".mp4", 12, 30, 0, ""),
    "odd": (".mp4", 12, 12, 0, "-pix_fmt yuv444p"),
    "late": (".mp4", 12, 12, 0, "-vf setpts=PTS+0.5/TB"),
    "gif": (".gif", 10, 10, 0, "-pix_fmt yuv420p"),
    "tick": (".gif", 100, 10, 0, ""),
    "narrow": (".mp4", 12, 12, 0, "-vf setsar=1/4"),
    "start": (".mp4", 12, 12, 0.25, ""),
    "no time stamps": (".avi", 12, 12, 0, H264),
    "between two frames": (".avi", 12, 9, 0.32, H264),
    "elementary stream": (".m2v", 25, 25, 0.2, "-b:v 9M"),
    "webp": (".webp", 10, 10, 0, "-lossless 1"),
    "resized": (".h264", 12, 12, 0, H264),
}


@pytest.mark.parametrize("kind", READING)
def test_reading_videos(tmp_path, caplog, kind):
    ending, rate, fps, start, options = READING[kind]
    path, flat = tmp_path / f"in{ending}", tmp_path / f"flat{ending}"
    write_clip(flat, size=(101, 67) if kind == "odd" else (48, 80), options=options.split(), fps=rate)
    if kind in ("sound", "late"):
        ffmpeg("-copyts", "-i", flat, *SINE, "-map", "0", "-map", "1", path)
    elif kind == "rotated":
        ffmpeg("-display_rotation", "90", "-i", flat, "-c", "copy", path)
    elif kind == "resized":  # the second half
        for part, filters in (("a", "select=lt(n\\,7)"), ("b", "select=gte(n\\,7),scale=40:64")):
            ffmpeg("-i", flat, "-vf", filters, *H264.split(), tmp_path / f"{part}.h264")
        path.write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    else:
        flat.rename(path)
    seen = levels(path, fps=fps, start=start, turn=True)
    assert not caplog.text  # imageio has nothing to say
    portrait = kind in ("rotated", "odd", "narrow")
    gap = {"variable": 2 / 12, "paused": 30}.get(kind, 0)
    times = [n / min(rate, 50) * (1 + 4 * (kind == "tick")) + (n >= 6) * gap for n in range(14)]  # of the file's frames
    count = min(round((times[-1] + times[1] - start) * fps), 81)
    assert seen.shape == (3, (count - 1) // 4 * 4 + 1, *((64, 32) if portrait else (32, 64))), seen.shape
    seen = seen.transpose(2, 3).flip(3) if kind == "rotated" else seen  # by 90° counter-clockwise
    right, left = seen[:, :, :, -8:].mean((0, 2, 3)), seen[:, :, :, :8].mean()
    # The nearest in time, so that a rounded time stamp changes nothing at the file's own rate.
    shown = [max(k for k, time in enumerate(times) if (time - start) * fps < n + 0.5 - 1e-6) for n in range(len(right))]
    close(right, torch.tensor([10.0 * k for k in shown]), 6)
    assert left == pytest.approx(200, abs=6)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".ts", ".avi"])
def test_a_start_inside_a_long_video(tmp_path, ending):
    raw = np.tile(np.arange(0, 240, 10, np.uint8)[:, None, None, None], (5, 16, 16, 3))
    path = encode(tmp_path / f"in{ending}", raw, "-g", "50", *H264.split(), fps=5)
    for start in (0.6, 3.4, 18.25):
        seen = levels(path, fps=5, size=(32, 32), num_frames=5, start=start)
        close(seen.mean((0, 2, 3)), torch.tensor([(math.floor(start * 5) + n) % 24 * 10.0 for n in range(5)]), 4)


RED_AND_GREY = np.zeros((5, 48, 80, 3), np.uint8)
RED_AND_GREY[:, :, :40], RED_AND_GREY[:, :, 40:] = (200, 60, 30), 120
HALF = "format=rgba,colorchannelmixer=aa=0.5"
VPX = f"-vf {HALF},scale=out_color_matrix=bt601:flags={fastvmt.SCALER},format=yuva420p"
COLOURS = {  # the file's ending, the matrix it is written with, its tag and pixels, or other options
    "sd": (".mkv", "bt601", "unknown", "yuv420p", ""),
    "hd": (".mkv", "bt709", "unknown", "yuv420p", ""),
    "hd tagged": (".mkv", "bt601", "smpte170m", "yuv420p", ""),
    "full": (".mkv", "bt601", "unknown", "yuv420p,scale=out_range=pc", "-color_range pc"),
    "bt2020": (".mkv", "bt2020", "bt2020nc", "yuv420p10le", ""),
    "gray": (".mkv", None, None, None, "-c:v ffv1 -pix_fmt gray"),
    "png alpha": (".mov", None, None, None, f"-c:v png -vf {HALF}"),
    "vp9 alpha": (".webm", None, None, None, f"-c:v libvpx-vp9 -crf 4 {VPX}"),
    "vp8 alpha": (".webm", None, None, None, f"-c:v libvpx -b:v 9M -auto-alt-ref 0 {VPX}"),
    "palette alpha": (".mov", None, None, None, "-c:v png -vf format=rgba,colorkey=0x787878:0.01,split[a][b];"
                                                "[a]palettegen[p];[b][p]paletteuse"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_of_all_kinds(tmp_path, kind):
    raw = RED_AND_GREY.repeat(15, 1).repeat(16, 2) if "hd" in kind else RED_AND_GREY
    ending, matrix, tag, pixels, options = COLOURS[kind]
    if matrix:
        scale = f"scale=out_color_matrix={matrix}:flags={fastvmt.SCALER}"
        options += f" -c:v ffv1 -vf {scale},format={pixels},setparams=colorspace={tag}"
    path = encode(tmp_path / f"in{ending}", raw, *options.split())
    expected = torch.tensor([[200.0, 60, 30], [120, 120, 120]])
    if kind == "gray":
        expected[0] = 0.299 * 200 + 0.587 * 60 + 0.114 * 30
    if kind == "palette alpha":  # the right half is not there
        expected[1] = 127.5
    elif "alpha" in kind:  # on mid grey
        expected = (expected + 127.5) / 2
    left, right = (part[..., 3:-3].mean((1, 2, 3)) for part in levels(path).chunk(2, dim=3))
    close(torch.stack([left, right]), expected, 1.6)


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_shown_as_bt709(tmp_path, transfer, monkeypatch):
    # By the formulas of ST 2084 and BT.2100: white is 203 cd/m² (BT.2408), a display of BT.709 has gamma 2.4 (BT.1886).
    expected = np.array([[255, 255, 255], [120, 120, 120], [30, 30, 30], [200, 60, 30], [40, 160, 90], [20, 60, 220.0]])
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    light = (expected / 255) ** 2.4 @ to_2020.T * 203  # cd/m²
    weights = np.array([0.2627, 0.678, 0.0593])
    if transfer == "smpte2084":
        power = (light / 10000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        luminance = (light @ weights / 1000) ** (1 / 1.2)  # of the scene; the display shows its power of 1.2
        scene = light / 1000 / luminance[:, None] ** 0.2
        signal = np.where(scene <= 1 / 12, (3 * scene) ** 0.5,
                          0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073)  # fmt: skip
    luma = signal @ weights
    chroma = np.stack([(signal[:, 2] - luma) / 1.8814, (signal[:, 0] - luma) / 1.4746])
    planes = np.stack([luma * 876 + 64, *(chroma * 896 + 512)]).round().astype("<u2")  # (3, colours)
    frame = planes[:, None].repeat(32, 1).repeat(16, 2)  # a column of 16 pixels for each
    tags = f"setparams=range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}"
    path = encode(tmp_path / "in.mkv", np.stack([frame] * 5), "-pix_fmt", "yuv444p10le", "-s", "96x32",
                  "-c:v", "ffv1", "-vf", tags)  # fmt: skip
    seen = levels(path, size=(32, 96))[:, 0, 4:-4].unflatten(2, (6, 16))[..., 5:-5].mean((1, 3)).T
    close(seen, torch.tensor(expected).float(), 3.2)  # ten bits are coarse in the dark

    read = fastvmt.read_frames  # of a build without the filter
    monkeypatch.setattr(fastvmt, "read_frames", lambda *args: read(*args[:-1], [
        option.replace("zscale", "z_scale") for option in args[-1]]))  # fmt: skip
    with pytest.raises(fastvmt.UserError, match="No such filter: 'z_scale'"):
        levels(path)


def test_interlaced_frames_have_no_combs(tmp_path):
    rows, columns = np.mgrid[:96, :160]
    fields = [128 + 100 * np.sin((columns - 8 * n) / 12) for n in range(18)]  # a pan of 8 columns a field
    raw = np.stack([np.where(rows % 2, second, first) for first, second in zip(fields[::2], fields[1::2])])
    raw = raw[..., None].repeat(3, 3).astype(np.uint8)
    path = encode(tmp_path / "in.mkv", raw, "-vf", "setfield=tff", "-c:v", "ffv1", "-pix_fmt", "yuv420p")
    seen = levels(path, size=(96, 160))
    combs = (seen[:, 1:-1, 1:-1] - (seen[:, 1:-1, 2:] + seen[:, 1:-1, :-2]) / 2).abs().mean()
    assert combs < 2, combs  # 27 with the combs
    close(seen[:, :, ::2, 20:-20], torch.tensor(raw[:, ::2, 20:-20]).permute(3, 0, 1, 2).float(), 4)


def test_rate_and_pixels_are_of_one_stream(tmp_path):
    small = write_clip(tmp_path / "small.mp4", fps=12)
    dark = encode(tmp_path / "dark.mp4", np.zeros((60, 96, 160, 3), np.uint8), fps=30)
    ffmpeg("-i", small, "-i", dark, "-map", "0", "-map", "1", "-c", "copy", tmp_path / "both.mkv")
    assert torch.equal(levels(tmp_path / "both.mkv"), levels(small))


def test_a_folder_of_pictures_is_a_video(tmp_path, capsys, monkeypatch):
    from PIL import Image

    folder, shades = tmp_path / "a %d:b", range(40, 180, 10)
    folder.mkdir()
    for n, shade in enumerate(shades):
        name = f"x%d{n + 2}." + ("PNG", "jpg", "bmp", "webp", "tif")[n % 5]
        picture = Image.new("RGBA", (96 + n, 48) if n != 5 else (48, 96), (shade,) * 3 + (255,))
        kind = "JPEG" if n == 10 else None  # whatever its name says
        (picture if n in (0, 5) else picture.convert("RGB")).save(folder / name, kind)
    Image.new("RGBA", (96, 48), (0, 0, 0, 0)).save(folder / "x%d1.png")
    Image.fromarray(np.full((48, 96), 50 * 256, np.uint16)).save(folder / "x%d3.png")
    (folder / "x%d3.jpg").unlink()
    (folder / "._x%d3.png").write_text("no picture")
    assert levels(folder, fps=30, turn=True).shape == (3, 13, 32, 64)  # as the first picture, which is not portrait
    assert not capsys.readouterr().out
    seen = levels(folder, fps=30)
    close(seen.mean((0, 2, 3)), torch.tensor([127.5, *shades[:12]]), 1.6)
    assert torch.equal(levels(folder, fps=8, start=0.5, num_frames=9), seen[:, 4:])
    with pytest.raises(fastvmt.UserError, match="has 3 frames from 0.4 s"):
        levels(folder, fps=30, start=0.4)
    Image.new("L", (96, 48)).save(folder / "x%d4.png")  # a mask
    levels(folder)
    (folder / "notes.txt").write_text("no picture")
    levels(folder)
    text = capsys.readouterr().out
    assert "16 files, 16 pictures for Pillow, 15 names" in text and "17 files, 16 pictures" in text
    (folder / "x%d4.bmp").write_bytes(b"BM no picture")
    with pytest.raises(fastvmt.UserError, match="x%d4.bmp"):
        levels(folder)
    monkeypatch.chdir(tmp_path)
    demo = levels("demo")
    folder.rename("demo")
    assert torch.equal(levels("demo"), demo)


def test_frames_are_covered_and_cropped_at_the_centre(tmp_path):
    raw = np.zeros((5, 60, 40, 3), np.uint8)
    raw[:, 20:40] = 255  # the middle third
    lossless = partial(encode, tmp_path / "in.mkv")
    options = ["-c:v", "ffv1", "-pix_fmt", "gbrp"]
    tall = levels(lossless(raw, *options))  # to 96x64, rows 32 to 64 kept
    assert tall.shape == (3, 5, 32, 64) and tall[:, :, 2:-2].min() > 253
    wide = np.ascontiguousarray(raw.transpose(0, 2, 1, 3))
    close(levels(lossless(wide, *options), size=(64, 32)), tall.transpose(2, 3), 2)
    assert levels(tmp_path / "in.mkv", size=(64, 32), turn=True).shape == (3, 5, 64, 32)  # a landscape is not turned
    noise = np.random.default_rng(0).integers(0, 256, (5, 256, 512, 3), np.uint8)
    assert levels(lossless(noise, *options)).std() < 25  # a mean of about 8x8 pixels, not one of them


def test_names_and_unreadable_references(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "in.mp4").read_bytes()
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "a%03d.mp4", "http:a.mp4", "a\nb '\".mp4", "狐狸.MP4", os.fsdecode(b"caf\xe9.mp4")):
        Path(name).write_bytes(clip)
        assert levels(name).shape[1] == 13
    for name, content in (("text.mp4", b"no video"), ("half.mp4", clip[: len(clip) // 2])):
        Path(name).write_bytes(content)
    ffmpeg(*SINE, "-f", "lavfi", "-i", "color=s=64x64", "-map", "0", "-map", "1", "-c:v", "png", "-frames:v", "1",
           "-disposition:v", "attached_pic", "song.mp4")  # fmt: skip
    assert "attached pic" in ffmpeg("-i", "song.mp4")  # a picture of its cover is no video
    os.mkfifo("fifo")
    causes = dict.fromkeys(["no.mp4", "fifo", "%04d.png", "-"], "not a file or a folder")
    causes |= {"text.mp4": "Invalid data", "half.mp4": "Invalid data", "song.mp4": "matches no streams"}
    for name, cause in causes.items():
        with pytest.raises(fastvmt.UserError, match=rf"\A.* {name} \(.*{cause}.*\Z"):  # in one line
            levels(name)
    with pytest.raises(fastvmt.UserError, match="has 0 frames from 9.5 s"):
        levels("in.mp4", start=9.5)
    write_clip(tmp_path / "burst.mp4", num_frames=8, fps=60)
    assert levels("burst.mp4", fps=60).shape[1] == 5
    with pytest.raises(fastvmt.UserError, match=r"2 frames from 0 s at --fps 16 \(own: 60\)"):
        levels("burst.mp4", fps=16)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(fastvmt.UserError, match="No such file.*/nowhere/ffmpeg"):
        levels("in.mp4")


def test_video_survives_writing_and_failure_leaves_the_old(tmp_path, monkeypatch, capfd):
    import imageio_ffmpeg

    video = F.interpolate(randn(1, 3, 3, 4, 6), (9, 62, 98), mode="trilinear").clamp(-0.8, 0.8)  # smooth
    (tmp_path / "link.mp4").symlink_to("folder/o.mp4")  # is written through, also where it leads to nothing yet
    (tmp_path / "folder").mkdir()
    assert fastvmt.partial_path(tmp_path / "link.mp4").parent == tmp_path / "folder"  # on one disk
    comment = json.dumps({"prompt": "狐 = a; # \\ 'b'\n" * 900, "ref": "caf\udce9.mp4"}, ensure_ascii=False)
    fastvmt.write_video(tmp_path / "link.mp4", video, 24, comment)
    out = tmp_path / "folder" / "o.mp4"
    assert (tmp_path / "link.mp4").is_symlink() and [p.name for p in out.parent.iterdir()] == ["o.mp4"]
    assert metadata_of(out) == json.loads(comment)
    again = fastvmt.read_video(out, 9, (31, 49), fps=24)
    small = F.avg_pool3d(video, (1, 2, 2))
    assert again.shape[2] == 9 and (again - small).abs().mean() < 0.02
    close(again.mean((0, 2, 3, 4)), video.mean((0, 2, 3, 4)), 0.003)  # colours are not a level off
    assert re.search(r"yuv420p\(tv, bt709(, progressive)?\)", ffmpeg("-i", out))  # and players are told which they are
    assert out.read_bytes().index(b"moov") < out.read_bytes().index(b"mdat")  # plays while it loads

    assert capfd.readouterr().err == ""  # ffmpeg has nothing to say
    size = out.stat().st_size
    out.write_text("an older result")
    for value in (math.nan, math.inf):
        broken = video.clone()
        broken[0, 1, 8, 3, 5] = value
        with pytest.raises(fastvmt.UserError, match="finite"):
            fastvmt.write_video(out, broken, 24)
    (tmp_path / "in_the_way.mp4").mkdir()
    with pytest.raises(fastvmt.UserError, match="Is a directory.*in_the_way"):
        fastvmt.write_video(tmp_path / "in_the_way.mp4", video, 24)
    real, script = imageio_ffmpeg.get_ffmpeg_exe(), tmp_path / "ffmpeg"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    for body in ("exit 1", f"ulimit -f {size // 1024}; trap '' XFSZ; exec {real} \"$@\""):  # as on a full disk
        script.write_text("#!/bin/sh\n" + body)
        script.chmod(0o755)
        with pytest.raises(fastvmt.UserError, match="cannot write .*o.mp4 .*disk full"):
            fastvmt.write_video(out, video, 24, comment)
        assert [p.name for p in out.parent.iterdir()] == ["o.mp4"] and out.read_text() == "an older result"


def metadata_of(path):
    ffmpeg("-i", path, "-f", "ffmetadata", path.with_suffix(".txt"))
    text = path.with_suffix(".txt").read_text(errors="surrogateescape")
    path.with_suffix(".txt").unlink()
    comment = re.search(r"^comment=(.*)$", text, re.MULTILINE)[1]
    return json.loads(re.sub(r"\\([=;#\\])", r"\1", comment))


def test_provenance_and_comparison(folder, capsys, monkeypatch):
    prompt = 'a "red" fox; snow = white # 狐狸 \\ {}'
    write_clip(folder / "in.mp4")
    code, text, err = run_main(capsys, *DEMO, "--prompt", prompt, "--ref", folder / "in.mp4", "--compare", "c.mp4",
                               *"--fps 8 --lambda-window 0.25 --seed 5".split())  # fmt: skip
    assert code == 0 and not err and sorted(os.listdir()) == ["c.mp4", "in.mp4", "in.rgb", "out.mp4"]
    assert "wrote out.mp4 and c.mp4\n" in text
    for name in ("out.mp4", "c.mp4"):
        record = metadata_of(Path(name))
        known = dict(prompt=prompt, seed=5, model="tiny", steps=2, fps=8.0, ref="in.mp4", lambda_window=0.25, span=5,
                     lr=[0.003, 0.002], block=3, window=3, ref_noise=0.0, shift=7.0, ai_generated=True,
                     torch=torch.__version__)  # fmt: skip
        assert {name: record[name] for name in known} == known
        assert set(MotionConfig().__dict__) < set(record) and str(folder) not in json.dumps(record)
        assert record["vae_tiles"] is False
    assert "768x256" in ffmpeg("-i", "c.mp4") and "8 fps" in ffmpeg("-i", "c.mp4")
    monkeypatch.setattr(VAE, "tiled", failing_once(VAE.tiled))  # the fall back to tiles changes the result
    assert run_main(capsys, *DEMO)[0] == 0 and metadata_of(Path("out.mp4"))["vae_tiles"] is True


def test_the_demo_slides_right_and_down():
    video = fastvmt.read_video("demo", 9, (240, 416))
    assert video.shape == (1, 3, 9, 240, 416)
    spectrum = torch.fft.fft2(video[0].mean(0))
    for n in range(1, 9):
        shift = torch.fft.ifft2(spectrum[n] * spectrum[0].conj()).real.flatten().argmax()
        rows, cols = divmod(int(shift), 416)
        assert 2 * n <= rows <= 5 * n and 3 * n <= cols <= 7 * n, (n, rows, cols)


def test_nothing_is_lost_when_decoding_fails(folder, capsys, monkeypatch):
    assert run_main(capsys, *DEMO)[0] == 0
    read = partial(fastvmt.read_video, "out.mp4", 5, (32, 48))
    whole = read()
    for error, message, code in ((KeyboardInterrupt(), "interrupted", 130), (OSError("disk is full"), "full", 2)):
        os.remove("out.mp4")
        with monkeypatch.context() as patch:
            patch.setattr(fastvmt, "write_video", failing(error))
            text = refused(capsys, message, *DEMO, code=code)
        assert os.listdir() == ["out.latents.safetensors"]
        flags = re.search(r"the same flags and (--decode \S+) finish it", text)[1].split()
        with monkeypatch.context() as patch:
            patch.setattr(fastvmt, "sample", failing(AssertionError("sampled again")))
            assert run_main(capsys, *DEMO, *flags)[::2] == (0, "")
        assert os.listdir() == ["out.mp4"] and torch.equal(read(), whole)
        assert metadata_of(Path("out.mp4"))["prompt"] == "a red fox"


def test_a_killed_run_leaves_whole_files_or_none(folder, capsys):
    """Killed when latents or video are written, but not yet under their names."""
    kill = """
import os, signal, sys
from pathlib import Path
import fastvmt

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

moment, true = sys.argv.pop(1), Path.replace
Path.replace = lambda part, path: killed() if Path(path).suffix == moment else true(part, path)
fastvmt.main(sys.argv[1:])
"""
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    for moment, names in ((".safetensors", []), (".mp4", ["out.latents.safetensors"])):
        done = subprocess.run([sys.executable, "-c", kill, moment, *DEMO], capture_output=True, env=environment)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [name for name in os.listdir() if not name.startswith(".")] == names, moment
    assert load_file(names[0])["result"].shape == (1, 16, 2, 4, 6)
    before = Path(names[0]).read_bytes()
    refused(capsys, "what a stopped run kept", *DEMO)  # it would replace and then delete them
    assert Path(names[0]).read_bytes() == before


def test_failures_during_sampling(folder, capsys, monkeypatch):
    forward, times = DiT.forward, iter(range(100))
    for error in (MemoryError(), RuntimeError("CUDA error: out of memory")):
        with monkeypatch.context() as patch:
            patch.setattr(fastvmt, "sample", failing(error))
            refused(capsys, "--checkpoint on, --offload", *DEMO, code=1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="illegal memory access"):
        patch.setattr(fastvmt, "sample", failing(OTHERS[1]))
        run_main(capsys, *DEMO)  # a bug, which the user cannot fix
    monkeypatch.setattr(DiT, "forward", lambda *args: forward(*args) * (math.nan if next(times) >= 4 else 1))
    refused(capsys, "not finite after step 3 of 5", *DEMO, "--steps", "5")
    assert not os.listdir()


def test_memory_is_found_by_recomputation(folder, capsys, monkeypatch):
    true, seen, held = fastvmt.sample, [], []

    def sample(*args, checkpoint, **kwargs):
        seen.append(checkpoint)
        if not checkpoint:
            activation = torch.ones(2)
            held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError()
        assert all(ref() is None for ref in held)  # the failed try's tensors are gone
        return true(*args, checkpoint=checkpoint, **kwargs)

    monkeypatch.setattr(fastvmt, "sample", sample)
    for flags, code, expected in (
        ("", 0, [False, True]), ("--checkpoint on", 0, [True]), ("--offload", 0, ["full"]),
        ("--checkpoint off", 1, [False]), ("--no-transfer", 1, [False]),  # which has no gradient to recompute for
    ):  # fmt: skip
        seen.clear()
        done, text, _ = run_main(capsys, *DEMO, *flags.split())
        assert done == code and seen == expected
        assert ("out of memory: again with --checkpoint on" in text) is (len(seen) == 2)


def test_any_shell_and_any_name(folder):
    """A console in cp1252, names that are not UTF-8, a reader that goes away."""
    name, prompt = os.fsdecode(b"caf\xe9 \xe7\x8b\x90 %d.mp4"), "狐 \" ' \\ = ; # fox " * 500  # 9,500 characters
    write_clip(folder / "in.mp4").rename(name)
    Path("out").mkdir()
    program, environment = [sys.executable, "-u", str(HERE / "fastvmt.py")], os.environ | {"PYTHONIOENCODING": "cp1252"}
    run = [*program, *DEMO, "--ref", name, "--out", f"out/{name}", "--prompt", prompt]
    done = subprocess.run(run, capture_output=True, env=environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert "steps 1 to 1 of 2, ? 1." in done.stdout.decode("cp1252")
    assert os.listdir("out") == [name]
    record = metadata_of(Path("out", name).rename("out.mp4"))
    assert record["prompt"] == prompt and record["ref"] == name
    command = shlex.join([*program, *DEMO, "--out", "p.mp4"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True)
    assert done.stdout == "encoding the prompts\n" and "Traceback" not in done.stderr and "Broken" not in done.stderr
    assert done.returncode == 1 and not Path("p.mp4").exists()


def test_readme_code_runs(dit, clip, monkeypatch, tmp_path):
    """Its two changes make other videos of the tiny model; its example writes one."""
    changes, example = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    scope, (noise, reference, context, negative, null) = {}, clip
    exec(changes, scope)
    results = [fastvmt.sample(dit, noise, wan_min.flow_sigmas(2), context, negative, reference=reference, null=null,
                              config=CONFIG, **change)
               for change in ({}, {"losses": scope["by_speed"]}, {"step": scope["heun"]})]  # fmt: skip
    assert all(x.isfinite().all() for x in results)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert fastvmt.read_video("out.mp4", 81, (64, 112)).shape == (1, 3, 9, 64, 112)
