"""Tests of fastvmt.py and wan_min.py: slow loops over the equations, known motion, and independent oracles.

pip install -r requirements.txt pytest diffusers transformers && python -m pytest -q

Method
  The equations      AMF and its gradient (eqs. 1-5), the losses (eqs. 5-7), the paper's numbers
  Known motion       flow of shifted textures and a still clip; the paper's Fig. 5
  Step-skip          optimize_latent against AdamW written out (eqs. 9-10)
  Guided sampler     Algorithm 1: features, losses (eq. 8), step, CFG; what is refused
  Device, memory     tensors on one device only; peak memory at the paper's shape
Model
  DiT                schedule, Q and K, recomputation, offloading; diffusers
  Video VAE          diffusers; tiles
  Text, checkpoints  UMT5 and tokens: transformers; official layout, hub
Run
  Videos             read_video, write_video
  Command line       flags, notices, errors, what is left behind; README
"""

import argparse
import collections
import hashlib
import html
import inspect
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
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
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
torch.meta = getattr(torch, "meta", None) or argparse  # any module: torch 2.5 asks for it before it recomputes there


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b, tolerance):
    assert a.shape == b.shape, (a.shape, b.shape)
    error = (a - b).abs().max().item()
    assert error <= tolerance, f"max abs error {error:.3g}"  # NaN fails


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


# ---- Method: the equations, in float64 -------------------------------------------------------------------------------


def slow_amf(Q, K, span, tile, window, tau, center):
    """Sec. 3.2 in loops: {(i, j): (flow (H, W, 2), mean key of each tile's window (N, D))}."""
    num_frames, H, W, D = Q.shape
    lh, lw = (H, W) if window is None else (min(window, H), min(window, W))
    grid, out = list(product(range(H), range(W))), {}
    for i, j in product(range(num_frames), repeat=2):
        if not 1 <= j - i <= span:
            continue
        flow, means = {}, []
        for a, b in product(range(0, H, tile[0]), range(0, W, tile[1])):
            query = Q[i, min(a + tile[0] // 2, H - 1), min(b + tile[1] // 2, W - 1)]
            logits = (K[j] @ query).tolist()  # no gradient flows through the choice of window
            if center == "argmax":
                cy, cx = max(grid, key=lambda p: logits[p[0]][p[1]])
            else:
                attention = [math.exp(logits[r][c] * tau / math.sqrt(D)) for r, c in grid]
                cy = round(sum(w * r for w, (r, c) in zip(attention, grid)) / sum(attention))
                cx = round(sum(w * c for w, (r, c) in zip(attention, grid)) / sum(attention))
            top, left = min(max(cy - lh // 2, 0), H - lh), min(max(cx - lw // 2, 0), W - lw)
            places = [(r, c) for r in range(top, top + lh) for c in range(left, left + lw)]
            keys = torch.stack([K[j, r, c] for r, c in places])
            means.append(keys.mean(0))
            for r, c in product(range(a, min(a + tile[0], H)), range(b, min(b + tile[1], W))):
                weights = (keys @ Q[i, r, c] / math.sqrt(D) * tau).exp()
                flow[r, c] = weights @ torch.tensor(places).double() / weights.sum() - torch.tensor([r, c])
        out[i, j] = torch.stack([flow[p] for p in grid]).view(H, W, 2), torch.stack(means)
    return out


@pytest.mark.parametrize("num_frames, H, W, span, tile, window, tau, center", [
    (2, 1, 1, 5, (3, 4), 21, 1.0, "soft"),
    (2, 3, 4, 1, (3, 4), None, 1.0, "soft"),
    (3, 7, 9, 5, (3, 4), 3, 1.0, "soft"),
    (3, 7, 9, 2, (3, 4), 4, 2.5, "argmax"),
    (4, 6, 5, 2, (2, 2), 5, 0.7, "soft"),
    (3, 5, 11, 9, (4, 3), 7, 1.0, "argmax"),
    (7, 4, 3, 3, (5, 2), 3, 1.0, "soft"),
    (2, 9, 2, 1, (1, 1), 3, 1.0, "soft"),
    (3, 5, 6, 2, (3, 4), 21, 1.3, "argmax"),
    (3, 1, 13, 2, (3, 4), 5, 1.0, "soft"),
])  # fmt: skip
def test_amf_and_its_gradient_equal_the_equations(monkeypatch, num_frames, H, W, span, tile, window, tau, center):
    Q, K = ((randn(num_frames, H, W, 6, seed=s).double() * 1.7).requires_grad_() for s in (1, 2))
    args = dict(span=span, tile=tile, window=window, tau=tau, center=center)

    def with_gradients(flow, key_mean):
        a, b = (randn(*x.shape, seed=s).double() for s, x in enumerate((flow, key_mean)))
        return flow, key_mean, *torch.autograd.grad((flow * a).sum() + (key_mean * b).sum(), (Q, K))

    slow = slow_amf(Q, K, **args)
    pairs = sorted(slow, key=lambda pair: (pair[1] - pair[0], pair[0]))
    assert torch.stack(fastvmt.frame_pairs(num_frames, span), 1).tolist() == [list(pair) for pair in pairs]
    true = with_gradients(*(torch.stack([slow[pair][n] for pair in pairs]) for n in (0, 1)))
    if window is None or window >= max(H, W):
        monkeypatch.setattr(fastvmt, "window_centers", None)  # the whole frame needs no windows
    for max_logits in (1, 3 * (H * W) ** 2, 2**21):  # one pair at a time, a few, all
        ours = with_gradients(*fastvmt.attention_motion_flow(Q, K, **args, max_logits=max_logits))
        for a, b in zip(ours, true):
            close(a, b, 1e-10)


@pytest.mark.parametrize("window", [3, None])
def test_amf_and_its_gradient_are_fp32_or_better(window):
    """The same of bf16 and of fp32, under autocast too."""
    x = randn(2, 3, 5, 6, 8).bfloat16().requires_grad_()
    results = []
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            flow, key_mean = fastvmt.attention_motion_flow(*x.to(dtype), window=window)
        results.append([flow, key_mean, torch.autograd.grad(flow.square().sum(), x)[0].float()])
    for full, *others in zip(*results):
        assert all(a.dtype == torch.float32 and torch.equal(a, full) for a in others)


def test_head_average_is_over_heads():
    x = randn(2 * 3 * 5, 4, 6).bfloat16()
    close(fastvmt.head_average(x, (2, 3, 5)), x.float().mean(1).view(2, 3, 5, 6), 1e-6)  # in fp32


@pytest.mark.parametrize("num_frames, span", [(2, 5), (3, 1), (5, 2), (7, 3), (7, 5), (4, 9)])
def test_losses_equal_the_equations(num_frames, span):
    pairs = list(zip(*(x.tolist() for x in fastvmt.frame_pairs(num_frames, span))))
    ref, gen = (randn(len(pairs), 3, 5, 2, seed=s).double().requires_grad_() for s in (1, 2))
    weights = randn(len(pairs), 3, 5, seed=3).double().relu()  # half of the tokens do not count
    for weight in (None, weights[0], weights):  # the paper's, one for all pairs, one for each
        loss = fastvmt.amf_loss(ref, gen, num_frames=num_frames, span=span, alpha=0.3, weight=weight)
        counts, true = torch.ones_like(weights) if weight is None else weight.expand_as(weights), 0
        for p, (i, j) in enumerate(pairs):
            decay = 1 - 0.3 * (j - i - 1) / max(span - 1, 1)
            for r, c in product(range(3), range(5)):
                true += counts[p, r, c] * decay * ((ref[p, r, c] - gen[p, r, c]) ** 2).sum() / counts.sum()
        close(loss, true, 1e-12)
        assert torch.autograd.grad(loss, (ref, gen), allow_unused=True)[0] is None  # the reference is detached

    key_mean = randn(len(pairs), 4, 6, dtype=torch.float64)
    for squared in (False, True):
        true = 0
        for anchor in range(num_frames):
            targets = range(anchor + 1, min(anchor + span - 1, num_frames - 1) + 1)
            for tile, (a, b) in product(range(4), zip(targets, targets[1:])):
                change = key_mean[pairs.index((anchor, b)), tile] - key_mean[pairs.index((anchor, a)), tile]
                size = float((change**2).sum()) if squared else math.sqrt((change**2).sum())
                true += size / (num_frames * 4 * (len(targets) - 1))
        ours = fastvmt.window_loss(key_mean, num_frames=num_frames, span=span, squared=squared)
        assert math.isclose(ours.item(), true, abs_tol=1e-12)


def test_the_defaults_are_the_papers():
    settings = dict(
        block=15, tile=(3, 4), window=21, span=5, tau=1.0, center="soft", alpha=0.2, lambda_amf=5.0, lambda_window=1.0,
        squared=False, guided_fraction=0.2, inner_steps=10, interval=3, lr=(0.003, 0.002), ref_noise=0.0,
        coarse=0.0,
    )  # fmt: skip
    assert asdict(MotionConfig()) == settings
    seen = set()
    for function in (fastvmt.attention_motion_flow, fastvmt.window_centers, fastvmt.amf_loss, fastvmt.window_loss,
                     fastvmt.optimize_latent):  # fmt: skip
        for name, parameter in inspect.signature(function).parameters.items():
            name = {"steps": "inner_steps"}.get(name, name)
            if parameter.kind == parameter.KEYWORD_ONLY and name in settings:
                assert parameter.default == settings[name], (function.__name__, name)
                seen.add(name)
    unseen = {"block", "lambda_amf", "lambda_window", "guided_fraction", "ref_noise", "coarse"}
    assert settings.keys() - seen == unseen


# ---- Method: known motion --------------------------------------------------------------------------------------------


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
    x = moving_texture(5, (7, 9), (0, 0)).requires_grad_()
    flow, key_mean = fastvmt.attention_motion_flow(x, x, window=5, tau=4.0)
    close(flow, torch.zeros_like(flow), 0.05)
    loss = fastvmt.window_loss(key_mean, num_frames=5)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()  # not NaN, where the norm has its kink


def test_window_corrects_a_false_far_match():
    """The paper's Fig. 5: a look-alike far away fools the full-frame AMF, the window leaves it out."""
    Q = moving_texture(2, (9, 28), (0, 1))
    K = Q.clone()
    K[1, 4, 25] = 2 * Q[0, 3, 4]  # a louder copy of one token, 20 columns off
    for window, found in ((None, [1.0, 21.0]), (7, [0.0, 1.0])):
        flow, _ = fastvmt.attention_motion_flow(Q, K, span=1, window=window, tau=4.0, center="argmax")
        close(flow[0, 3, 4], torch.tensor(found), 0.1)


# ---- Method: step-skip optimizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, interval", [(10, 3), (10, 1), (7, 4), (1, 3), (6, 6), (3, 9)])
def test_step_skip_counts_and_reuses_gradients(steps, interval):
    """Against AdamW written out (Loshchilov & Hutter), fed the gradients of eq. 9."""
    start, target, lr = randn(5, seed=1), randn(5, seed=2), (0.3, 0.1)
    calls, weight = [], torch.ones(5, requires_grad=True)

    def objective(x):
        calls.append(x)
        return (weight * (x - target) ** 4).sum()

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
    assert weight.grad is None  # the latent is the only leaf


def test_a_bf16_latent_is_moved_in_fp32():
    x, target = randn(50).bfloat16(), randn(50, seed=1)
    moved = [fastvmt.optimize_latent(start, lambda x: (x - target).square().sum()) for start in (x, x.float())]
    assert moved[0].dtype == torch.float32 and torch.equal(*moved) and (moved[0] != x).all()
    assert fastvmt.optimize_latent(x.double(), lambda x: x.sum()).dtype == torch.float64


# ---- Method: guided sampler, on a tiny random model ------------------------------------------------------------------

TINY = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=4, text_dim=16, freq_dim=16)
CONFIG = MotionConfig(block=3, window=5, tile=(2, 3), span=3)
NOISE = randn(1, 16, 5, 12, 16, seed=3)
REFERENCE = moving_texture(5, (12, 16), (1, 1), dim=16, scale=4.0).permute(3, 0, 1, 2)[None].contiguous()  # latents
CONTEXT, NEGATIVE, NULL = randn(3, 1, 7, 16, seed=4)  # of the three prompts


@pytest.fixture(scope="module")
def dit():
    return random_model(DiT, TINY)


def sample(dit, noise=NOISE, sigmas=wan_min.flow_sigmas(2), context=CONTEXT, negative=NEGATIVE, **options):
    guidance = dict(reference=REFERENCE, null=NULL, config=CONFIG)
    return fastvmt.sample(dit, noise, sigmas, context, negative, **guidance | options)


def test_plain_sampling_is_euler_with_cfg(dit):
    x, sigmas = NOISE, wan_min.flow_sigmas(3)
    for a, b in zip(sigmas, sigmas[1:]):
        t = 1000 * a[None]
        positive, other = dit(x, t, CONTEXT), dit(x, t, NEGATIVE)
        x = x + (b - a) * (other + 5.8 * (positive - other))
    plain = sample(dit, sigmas=sigmas, reference=None, null=None)
    close(plain, x, 1e-4)
    # At strength 1 a reference that is not followed leaves no trace.
    assert torch.equal(sample(dit, sigmas=sigmas, config=MotionConfig(guided_fraction=0.0)), plain)
    one_step = partial(sample, dit, sigmas=wan_min.flow_sigmas(1), reference=None)
    t = torch.tensor([1000.0])
    close(one_step(negative=None, cfg_scale=1), NOISE - dit(NOISE, t, CONTEXT), 1e-5)
    close(one_step(cfg_scale=0), NOISE - dit(NOISE, t, NEGATIVE), 1e-5)
    two = torch.cat([NOISE, NOISE.flip(2)])  # a batch
    together = one_step(two, context=CONTEXT.expand(2, -1, -1), negative=NEGATIVE.expand(2, -1, -1))
    close(together, torch.cat([one_step(x) for x in two.split(1)]), 1e-4)


@pytest.mark.parametrize("coarse", [0.0, 1.0])
def test_guidance_lowers_the_loss(dit, coarse):
    config, seen = replace(CONFIG, coarse=coarse, tau=3.0, guided_fraction=0.5, lr=(0.02, 0.02)), []
    sample(dit, sigmas=wan_min.flow_sigmas(4, 1.0, 0.8), config=config, callback=lambda *args: seen.append(args[2]))
    assert seen[2:] == [None, None]
    for losses in seen[:2]:
        assert losses.shape == (4, 3)  # ⌈10/3⌉ gradients in the first half of the steps
        assert losses[-1][0] < 0.6 * losses[0][0]


@pytest.mark.parametrize("ref_noise, levels", [("match", [0.8, 0.6]), (0.0, [0.0]), (0.4, [0.4])])
def test_algorithm_1(dit, ref_noise, levels):
    """Which latents, noise level and prompt are read, what step and callback are handed, and in which order."""
    order, seen, sigmas = [], collections.defaultdict(list), [0.8, 0.6, 0.4, 0.2, 0.0]
    config = replace(CONFIG, guided_fraction=0.5, inner_steps=3, interval=2, lr=(0.01, 0.01), ref_noise=ref_noise)

    def note(kind, *values):
        order.append(kind)
        seen[kind].append(values)

    def features(model, x, sigma, text, settings, **options):
        assert model is dit and settings is config and (text is NULL or text is CONTEXT)
        assert torch.is_grad_enabled() is (text is CONTEXT)
        reading = {"mean": x.mean((2, 3, 4))}  # of any kind, as long as `losses` knows it
        note("reference" if text is NULL else "result", x.detach().clone(), sigma, options, reading)
        return reading

    def losses(reference, generated, *, num_frames, config):
        assert reference is seen["reference"][-1][3] and generated is seen["result"][-1][3]
        assert num_frames == 5 and config.ref_noise == ref_noise
        return (generated["mean"] - reference["mean"] - 1).square().sum(), torch.ones(())

    def step(velocity, x, sigma, next_sigma):
        t = torch.tensor([1000 * sigma])
        close(velocity(x, sigma), -4 * dit(x, t, NEGATIVE) + 5 * dit(x, t, CONTEXT), 1e-4)  # CFG is inside
        note("step", x, sigma, next_sigma)
        return x - 1

    result = sample(dit, sigmas=torch.tensor(sigmas), cfg_scale=5, config=config, features=features, losses=losses,
                    step=step, checkpoint="full", callback=partial(note, "callback"))  # fmt: skip
    guided = ["result", "result", "step", "callback"]  # two gradients
    again = ["reference"] * (len(levels) - 1)
    assert order == ["reference", *guided, *again, *guided, *["step", "callback"] * 2]
    for (x, sigma, options, _), level in zip(seen["reference"], levels):
        assert sigma == pytest.approx(level) and not options
        close(x, (1 - level) * REFERENCE + level * NOISE, 1e-5)
    close(seen["result"][0][0], 0.2 * REFERENCE + 0.8 * NOISE, 1e-5)
    assert [call[1] for call in seen["result"]] == pytest.approx([0.8, 0.8, 0.6, 0.6])
    assert all(call[2] == {"checkpoint": "full"} for call in seen["result"])
    assert [call[1:] for call in seen["step"]] == [pytest.approx(pair) for pair in zip(sigmas, sigmas[1:])]
    assert [call[0] for call in seen["callback"]] == [0, 1, 2, 3] and result is seen["callback"][-1][1]
    for (before, sigma, _), (_, after, _, clean) in zip(seen["step"], seen["callback"]):
        assert torch.equal(after, before - 1)
        close(clean, before - sigma / 0.2, 1e-4)  # as the step's velocity would be 1/0.2
    histories = [call[2] for call in seen["callback"]]
    assert histories[2:] == [None, None]
    for history in histories[:2]:
        assert history.shape == (2, 2) and (history[:, 1] == 1).all() and history[1, 0] < history[0, 0]
    assert not torch.equal(seen["step"][0][0], seen["result"][0][0])  # the step starts where guidance ends


@pytest.mark.parametrize("patch, center", [((1, 2, 2), "argmax"), ((1, 2, 4), "soft"), ((1, 3, 2), "soft"),
                                           ((2, 3, 4), "argmax")])  # fmt: skip
def test_features_and_losses_follow_the_settings(patch, center):
    """The grid of tokens is the latents' over the patch's, whatever its shape."""
    grid = 5 // patch[0], 12 // patch[1], 16 // patch[2]
    noise, reference = (x[:, :, : grid[0] * patch[0]] for x in (NOISE, REFERENCE))
    model = random_model(DiT, TINY | dict(patch_size=patch))
    amf_settings = dict(span=3, tile=(2, 3), window=3, tau=3.0, center=center)
    config = MotionConfig(**amf_settings, block=2, alpha=0.5, squared=True, lambda_amf=2.0, lambda_window=0.5)
    reading = fastvmt.motion_features(model, reference, 0.3, CONTEXT, config)
    q, k = (part[0].mean(1).view(*grid, 24) for part in model.qk(reference, torch.tensor([300.0]), CONTEXT, 2))
    for ours, true in zip(reading, fastvmt.attention_motion_flow(q, k, **amf_settings)):
        close(ours, true, 1e-4)
    flow, key_mean = reading
    other = randn(*flow.shape)
    total, amf, window = fastvmt.motion_losses((other, None), reading, num_frames=grid[0], config=config)
    assert amf == fastvmt.amf_loss(other, flow, num_frames=grid[0], span=3, alpha=0.5)
    assert window == fastvmt.window_loss(key_mean, num_frames=grid[0], span=3, squared=True)
    assert total.item() == pytest.approx(2 * amf.item() + 0.5 * window.item())
    with pytest.raises(TypeError, match="nonsense"):  # options reach DiT.qk
        fastvmt.motion_features(model, reference, 0.3, CONTEXT, config, nonsense=True)
    latents = sample(model, noise, reference=reference, config=config)
    assert latents.shape == noise.shape and latents.isfinite().all()


@pytest.mark.parametrize("sigma, level", [(0.0, 0.0), (0.5, 1 / 3), (0.97, 0.97 / 1.03), (1.0, 1.0)])
def test_pooled_latents_are_those_of_a_lower_noise_level(sigma, level):
    """(1−σ′)·z + σ′·ε of the pooled clean latents z, with ε of unit variance and not correlated with its neighbours."""
    clean, patch = randn(1, 16, 9, 48, 66, seed=1), (1, 2, 3)
    mean = (clean[..., ::2, ::2] + clean[..., 1::2, ::2] + clean[..., ::2, 1::2] + clean[..., 1::2, 1::2]) / 4
    pooled, found = fastvmt.pool_latents(fastvmt.match_noise(clean, randn(*clean.shape), sigma), sigma, patch)
    assert found == pytest.approx(level) and pooled.shape == mean.shape
    left = pooled - (1 - level) * mean
    close(left.var(), torch.tensor(level**2), 0.01)
    assert (left[..., 1:] * left[..., :-1]).mean().abs() < 0.01
    # Rows and columns that fill no token of 2 and 3 pooled latents are cropped.
    odd, _ = fastvmt.pool_latents(clean[..., :47, :65], 0.0, patch)
    close(odd, mean[..., :22, :30], 1e-6)
    x = randn(1, 2, 2, 5, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fastvmt.pool_latents(x, 0.6, (1, 2, 1))[0], x)  # by finite differences


@pytest.mark.parametrize("coarse, pooled", [(0.0, 0), (0.4, 1), (0.6, 2), (1.0, 3)])
@pytest.mark.parametrize("ref_noise", ["match", 0.4])
def test_coarse_guided_steps_read_pooled_latents(dit, coarse, pooled, ref_noise):
    """First pooled ones, then whole ones, of the result and of its reference, which is read anew where this changes."""
    sigmas, read, order = [0.9, 0.8, 0.7, 0.6, 0.5, 0.0], [], []
    config = replace(CONFIG, guided_fraction=0.6, coarse=coarse, ref_noise=ref_noise, inner_steps=2, interval=1)

    def features(model, x, sigma, text, settings, **options):
        read.append(("reference" if text is NULL else "result", x.detach().clone(), sigma, options))
        return fastvmt.motion_features(model, x, sigma, text, settings, **options)

    sample(dit, sigmas=torch.tensor(sigmas), config=config, features=features, checkpoint=True)
    for number, sigma in enumerate(sigmas[:3]):
        small = number < pooled
        if number in (0, pooled) or ref_noise == "match":
            level = sigma if ref_noise == "match" else ref_noise
            order.append(("reference", level, small, {}))
        order += [("result", sigma, small, {"checkpoint": True})] * 2
    assert len(read) == len(order)
    for (kind, x, sigma, options), (true_kind, level, small, true_options) in zip(read, order):
        assert (kind, options) == (true_kind, true_options)
        true, true_level = fastvmt.match_noise(REFERENCE, NOISE, level), level
        if small:
            true, true_level = fastvmt.pool_latents(true, level, (1, 2, 2))
        assert sigma == pytest.approx(true_level) and x.shape == true.shape
        if kind == "reference" or level == 0.9 and x is read[1][1]:  # as the sampler starts
            close(x, true, 1e-5)


def test_bf16_latents_are_computed_with_in_fp32(dit):
    noise, reference, config = NOISE.bfloat16(), REFERENCE.bfloat16(), replace(CONFIG, ref_noise="match")
    run = partial(sample, dit, sigmas=torch.tensor([0.7, 0.0]), config=config)
    half, full = run(noise, reference=reference), run(noise.float(), reference=reference.float())
    assert half.dtype == torch.float32 and torch.equal(half, full)


def test_guided_steps():
    for steps, fraction, guided in [(50, 0.2, 10), (50, 0.0, 0), (4, 0.2, 1), (100, 0.07, 7), (7, 1.0, 7)]:
        assert fastvmt.guided_steps(steps, MotionConfig(guided_fraction=fraction)) == guided


def test_bad_arguments_of_the_method(dit):
    two = torch.cat([NOISE, NOISE])
    for noise, change in ((NOISE, dict(null=None)), (NOISE, dict(reference=REFERENCE[:, :, :1])),
                          (two, dict(reference=two))):  # fmt: skip
        with pytest.raises(ValueError, match="reference.*noise's shape, a single clip, .*null"):
            sample(dit, noise, **change)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        fastvmt.optimize_latent(randn(5), lambda x: x.sum())
    nan = math.nan
    refused = dict(
        block=[0], tile=[(0, 4), (3, 0)], window=[0, 2.5], span=[0], interval=[0], inner_steps=[0], center=["middle"],
        ref_noise=["clean", -0.1, 1.1, nan, None], tau=[nan], alpha=[nan], lambda_amf=[math.inf], lambda_window=[nan],
        guided_fraction=[nan, -0.1, 1.1], coarse=[nan, -0.1, 1.1], lr=[(0.1, nan), (-0.1, 0.1)],
    )  # fmt: skip
    for name, values in refused.items():
        for value in values:
            with pytest.raises(fastvmt.UserError, match=name):
                MotionConfig(**{name: value})
    x = randn(3, 4, 5, 6)
    for message, Q, K, change in (("at least", x[:1], x[:1], {}), ("at least", x, x, dict(span=0)),
                                  ("at least", x, x, dict(window=0)), ("'soft'", x, x, dict(center="bogus")),
                                  ("one shape", x, x[:2], {}), ("one shape", x, x[:, :, :4], {})):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fastvmt.attention_motion_flow(Q, K, **change)


# ---- Method: device and memory. On "meta" tensors have shapes but no numbers, so that none can be read back ----------


class Tensors(TorchDispatchMode):
    """Sees every tensor that is made inside: those of one or more dimensions must be on the device that is named.

    (Numbers, such as AdamW's count of steps, may stay on the host.) `peak` is the most bytes that lived at once.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.live, self.peak = device, weakref.WeakSet(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() and x.numel():
                assert x.device.type == self.device, f"{op} made a tensor {tuple(x.shape)} on {x.device}"
                self.live.add(x.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.live))
        return out


def test_the_method_stays_on_its_device():
    noise, reference, context, negative, null = (x.to("meta") for x in (NOISE, REFERENCE, CONTEXT, NEGATIVE, NULL))
    flow, weight = torch.empty(9, 6, 8, 2, device="meta"), torch.empty(6, 8, device="meta")
    with torch.device("meta"):
        dit = DiT(**TINY).requires_grad_(False)
    for checkpoint, change in ((False, dict(center="argmax", window=None, squared=True)),
                               (True, dict(ref_noise="match"))):  # fmt: skip
        config, losses = replace(CONFIG, inner_steps=2, interval=1, **change), []
        with Tensors("meta"):
            latents = sample(dit, noise, context=context, negative=negative, reference=reference, null=null,
                             config=config, checkpoint=checkpoint,
                             callback=lambda *args, losses=losses: losses.append(args[2]))  # fmt: skip
        assert latents.is_meta and latents.shape == noise.shape and losses[0].is_meta and losses[1] is None
    with Tensors("meta"):
        assert fastvmt.amf_loss(flow, flow, num_frames=5, span=3, weight=weight).is_meta
        with pytest.raises(AssertionError, match="on cpu"):
            torch.arange(3)


def test_the_papers_shape_takes_no_more_memory_than_told():
    """81 frames of 480x832: 21 latent frames of 30×52 tokens in 130 tiles; all keys gathered at once are 2.6 GB."""
    Q, K = (torch.empty(21, 30, 52, 128, device="meta", requires_grad=True) for _ in range(2))
    with Tensors("meta") as tensors:
        flow, key_mean = fastvmt.attention_motion_flow(Q, K)
        forward = tensors.peak
        torch.autograd.grad(flow.sum() + key_mean.sum(), (Q, K))
    assert flow.shape == (95 - 5, 30, 52, 2) and key_mean.shape == (90, 130, 128)
    assert forward < 17 * 2**25 and tensors.peak < 39 * 2**25  # twelve pairs at a time: 350 MB of keys


# ---- Model: DiT, on random weights under the official names ----------------------------------------------------------


def test_flow_sigmas():
    for steps, shift, strength in [(50, 7.0, 1.0), (4, 1.0, 0.75), (1, 3.0, 0.5)]:
        s = np.linspace(strength, 0, steps + 1)
        true = torch.tensor(shift * s / (1 + (shift - 1) * s)).float()
        close(wan_min.flow_sigmas(steps, shift, strength), true, 1e-7)
    assert wan_min.flow_sigmas(50)[0] == 1 and wan_min.flow_sigmas(50)[-1] == 0


@pytest.mark.parametrize("block", [1, 3, 4])
def test_qk_equals_the_full_forward(dit, monkeypatch, block):
    x, t = NOISE.clone().requires_grad_(), torch.tensor([700.0])
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: calls.append((q, k)) or attention(q, k, v))
    dit(x, t, CONTEXT)
    true = [part.transpose(1, 2) for part in calls[2 * (block - 1)]]  # self- and cross-attention take turns
    weights = [randn(*part.shape, seed=5) for part in true]

    def gradient(parts):
        return torch.autograd.grad(sum((w * part).sum() for w, part in zip(weights, parts)), x)[0]

    expected = gradient(true)
    for checkpoint in (False, True, "full"):
        ours = dit.qk(x, t, CONTEXT, block, checkpoint=checkpoint)
        for a, b in zip(ours, true):
            assert a.shape == (1, 5 * 6 * 8, 2, 24)
            close(a, b, 1e-6)
        close(gradient(ours), expected, 1e-4 * expected.abs().max().item())


def test_qk_needs_nothing_after_them(dit):
    t, other = torch.tensor([300.0]), random_model(DiT, TINY)
    other.blocks = other.blocks[:2]
    for part in (other.head, other.blocks[1].cross_attn, other.blocks[1].ffn, other.blocks[1].self_attn.v):
        for p in part.parameters():
            p.fill_(math.nan)
    assert all(map(torch.equal, dit.qk(NOISE, t, CONTEXT, 2), other.qk(NOISE, t, CONTEXT, 2)))
    for block in (0, 5):
        with pytest.raises(ValueError, match=f"block {block} .*1 to 4"):
            dit.qk(NOISE, t, CONTEXT, block)
    with pytest.raises(ValueError, match="do not divide"):
        dit(NOISE[..., 1:], t, CONTEXT)


def test_tokens_stay_contiguous(dit):
    """Strides of another order pass through all blocks: additions are then 12 times slower, every norm copies."""
    seen = []
    hooks = [block.register_forward_hook(lambda _, args, out: seen.extend([args[0], out])) for block in dit.blocks]
    dit(NOISE, torch.tensor([300.0]), CONTEXT)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 8 and all(tokens.is_contiguous() for tokens in seen)


def test_recomputation_spares_self_attention(dit):
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "scaled_dot_product" in op.name() and "backward" not in op.name():
                counts["self" if args[0].shape == args[1].shape else "cross"] += 1
            return op(*args, **(kwargs or {}))

    x = NOISE.clone().requires_grad_()
    for checkpoint, own, cross in ((False, 3, 3), (True, 3, 6), ("full", 6, 6)):
        counts = {"self": 0, "cross": 0}
        with Count():
            q, k = dit.qk(x, torch.tensor([700.0]), CONTEXT, 4, checkpoint=checkpoint)
            (q[:, :9] * k[:, 9:18]).sum().backward()
        assert counts == {"self": own, "cross": cross}


def watch_copies(monkeypatch):
    """List of how many numbers are on the device, the CPU too, after each copy that offloading makes to it."""
    live, peak, true = weakref.WeakSet(), [], torch.Tensor.to

    def spy(self, *args, **kwargs):
        out = true(self, *args, **kwargs)
        if kwargs.get("copy"):
            live.add(out)
            peak.append(sum(p.numel() for p in live))
        return out

    monkeypatch.setattr(torch.Tensor, "to", spy)
    return peak


def test_offload_streams_two_blocks_at_most_and_changes_nothing(dit, monkeypatch):
    streamed, peak = random_model(DiT, TINY), watch_copies(monkeypatch)
    streamed, block = wan_min.offload_blocks(streamed, "cpu"), list(dit.blocks[0].parameters())
    assert torch.equal(*(sample(model, checkpoint=True) for model in (dit, streamed)))
    assert max(peak) == 2 * sum(p.numel() for p in block) and len(peak) > 50
    peak.clear()
    q, _ = streamed.qk(NOISE.clone().requires_grad_(), torch.ones(1), CONTEXT, 4, checkpoint=True)
    q.sum().backward()
    assert len(peak) <= 11 * len(block)  # 8 runs; the next block is mostly there already
    assert all(p.is_meta for p in streamed.blocks.parameters())


def perturbed(module, seed=1):
    """Random weights with no zeros or ones left, so that every parameter shows in the output."""
    for n, p in enumerate(module.parameters()):
        p.add_(randn(*p.shape, seed=seed + n) * 0.05)
    return module


@pytest.mark.parametrize("heads, head_dim", [(2, 24), (3, 16), (1, 128)])
def test_dit_equals_diffusers(heads, head_dim):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert

    sizes = TINY | dict(dim=heads * head_dim, num_heads=heads, num_layers=2)
    ours = perturbed(random_model(DiT, sizes))
    for name, p in ours.named_parameters():
        if re.search(r"patch_embedding|attn\.[qko]|ffn\.2", name):
            p.mul_(1e-3)  # so that the eps of every norm shows
    true = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=2,
        cross_attn_norm=True, rope_max_seq_len=32)  # fmt: skip
    true.load_state_dict(convert(dict(ours.state_dict())))
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


# ---- Model: video VAE ------------------------------------------------------------------------------------------------


def test_vae_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers as convert

    ours, true = perturbed(random_model(VAE, dict(dim=4))), diffusers.AutoencoderKLWan(base_dim=4)
    true.load_state_dict(convert(dict(ours.state_dict())))
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (true.config.latents_mean, true.config.latents_std))
    for shape in [(2, 3, 9, 16, 24), (1, 3, 1, 24, 16), (1, 3, 13, 8, 16)]:
        video = (randn(*shape) * 0.5).clamp(-1, 1)
        with torch.no_grad():
            latents = ours.encode(video)
            close(latents, (true.encode(video).latent_dist.mode() - mean) / std, 1e-4)
            decoded = ours.decode(latents)
            close(decoded, true.decode(latents * std + mean).sample, 1e-4)
        assert decoded.shape == video.shape and decoded.std() > 0.1 and latents.std() > 0.1


def test_vae_refuses_odd_videos_and_keeps_no_chunk():
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


def test_out_of_memory_has_many_names():
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


# ---- Model: text and checkpoints -------------------------------------------------------------------------------------


def test_umt5_equals_transformers():
    transformers = pytest.importorskip("transformers")
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
    ids, mask = randn(2, 200).mul(20).long() % 100, torch.ones(2, 200).long()
    mask[0, 150:] = 0
    with torch.no_grad():
        out = ours(ids, mask)
        theirs = true(ids, attention_mask=mask).last_hidden_state
    close(out * mask[..., None], theirs * mask[..., None], 1e-4)
    assert 0.3 < out.std() < 3


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
TEXT_ENCODER = dict(vocab=298, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2)


def write_checkpoint(path, shards=0):
    """A tiny checkpoint in the official layout; returns the modules that it came from."""
    arguments, vae = wan_min.ARCHITECTURES["tiny"]
    parts = {DiT: arguments, VAE: vae, TextEncoder: TEXT_ENCODER}
    modules = {cls: perturbed(random_model(cls, sizes, seed=7)) for cls, sizes in parts.items()}
    weights, folder = modules[DiT].state_dict(), Path(path)
    folder.mkdir(parents=True)
    names = sorted(weights)
    for n in range(shards or 1):
        file = f"diffusion_pytorch_model-{n + 1:05}-of-{shards:05}.safetensors" if shards else DIT_FILE
        save_file({name: weights[name] for name in names[n :: shards or 1]}, folder / file)
    official = {"in_dim": 16, "out_dim": 16, "eps": 1e-6, "text_len": 512, "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(arguments | official | {"VAE": vae, "TextEncoder": TEXT_ENCODER}))
    torch.save(modules[VAE].state_dict(), folder / VAE_FILE)
    torch.save(modules[TextEncoder].state_dict(), folder / TEXT_FILE)
    write_tokenizer(folder / TOKENIZER_FILE)
    return modules


@pytest.mark.parametrize("model", ["1.3B", "14B"])
def test_without_config_the_width_tells_the_layout(monkeypatch, model):
    write_checkpoint("model")
    os.remove("model/config.json")
    with torch.device("meta"):
        weights = DiT(**wan_min.ARCHITECTURES[model][0]).state_dict()
    monkeypatch.setattr(wan_min, "load_file", lambda path: weights)
    dit = wan_min.load(DiT, Path("model"), "meta")
    assert {name: p.shape for name, p in dit.state_dict().items()} == {name: p.shape for name, p in weights.items()}
    del weights["blocks.29.modulation"]
    with pytest.raises(ModelError, match="Missing key"):
        wan_min.load(DiT, Path("model"), "meta")


@pytest.mark.parametrize("shards, prefix", [(0, None), (3, None), (0, ""), (0, "model.diffusion_model.")])
def test_a_checkpoint_gives_its_modules(monkeypatch, shards, prefix):
    modules, counts, name, offload = write_checkpoint("model", shards), [], "model", shards > 0
    for kind in ("_old", ".fp16", *["-00001-of-00002"] * (not shards)):
        other = {key: p + 1 for key, p in modules[DiT].state_dict().items()}
        save_file(other, f"model/diffusion_pytorch_model{kind}.safetensors")
    if prefix is not None:
        name = "model/wan2.1.safetensors"
        save_file({prefix + key: p for key, p in load_file(f"model/{DIT_FILE}").items()}, name)
        os.remove(f"model/{DIT_FILE}")
        monkeypatch.setitem(wan_min.ARCHITECTURES, "1.3B", wan_min.ARCHITECTURES["tiny"])
    model = open_model(name, "cpu", torch.bfloat16, offload=offload)
    assert model[4:7] == (((480, 832), (832, 480)), 81, 16.0) and model.blocks == 4
    assert model.defaults == {"negative_prompt": wan_min.NEGATIVE_PROMPT}
    tokenizer = Tokenizer.from_file(f"model/{TOKENIZER_FILE}")
    contexts = model.encode_prompts(["a red  fox &amp; snow", ""])
    for context, text in zip(contexts, ["a red fox & snow", ""]):
        ids = torch.tensor([tokenizer.encode(text).ids])
        true = modules[TextEncoder](ids, torch.ones_like(ids))[0]
        close(context, F.pad(true, (0, 0, 0, 512 - len(true))), 1e-5)
    codec, video = model.load_codec(), randn(1, 3, 5, 16, 16).clamp(-1, 1)
    latents = modules[VAE].encode(video)
    close(codec.encode(video), latents, 1e-5)
    close(codec.decode(latents), modules[VAE].decode(latents), 1e-5)
    dit = model.load_dit(counting(counts))
    assert counts == [len(modules[DiT].state_dict())]
    assert all(p.is_meta is offload for p in dit.blocks.parameters())
    dtypes = {name: p.dtype for name, p in dit.named_parameters()}
    for name, dtype in dtypes.items():
        fp32 = re.search(r"^(time_|head)|modulation|norm", name)
        assert dtype == (torch.float32 if fp32 else torch.bfloat16), name
    random = random_model(DiT, wan_min.ARCHITECTURES["tiny"][0], dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in random.named_parameters()} == dtypes
    inputs = randn(1, 16, 2, 4, 6), torch.tensor([500.0]), contexts[:1]
    assert torch.equal(dit(*inputs), wan_min.cast(modules[DiT], torch.bfloat16)(*inputs))
    assert not any(p.requires_grad for p in dit.parameters())
    half = {name: p.bfloat16() for name, p in modules[TextEncoder].state_dict().items()}
    torch.save(half, f"model/{TEXT_FILE}")
    assert wan_min.load(TextEncoder, Path("model")).norm.weight.dtype == torch.bfloat16
    assert model.encode_prompts(["a"]).dtype == torch.float32


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
    text = write_checkpoint("good")[TextEncoder].state_dict()
    fp8 = text | {"norm.weight": text["norm.weight"].to(torch.float8_e4m3fn)}
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    lost = ["blocks.1.modulation", "blocks.2.ffn.0.weight", "blocks.3.ffn.0.weight", "head.head.bias"]

    def lose(names):
        save_file({name: p for name, p in load_file(DIT_FILE).items() if name not in names}, DIT_FILE)

    def retoken(end, tokens):
        tokenizer = Tokenizer.from_str(Path(TOKENIZER_FILE).read_text().replace("</s>", end))
        tokenizer.add_tokens(tokens)
        tokenizer.save(TOKENIZER_FILE)

    def double(shard):
        shutil.copy(DIT_FILE, shard)
        os.rename(DIT_FILE, shard.replace("2-", "1-"))

    def cut(name, keep=0.7):
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: int(len(data) * keep)])

    cases = [  # what the message must say, and what is done in the folder
        ('Missing key(s) in state_dict: "{}", "{}", "{}", "head.'.format(*lost), lose, lost),
        ("'i2v' model", Path("config.json").write_text, '{"model_type": "i2v"}'),
        ("is in fp8: only the official layout can be read, as Wan-AI", torch.save, fp8, TEXT_FILE),
        ("without diffusion_pytorch_model*.safetensors", os.rename, DIT_FILE, "lora.safetensors"),
        ("without the google/umt5-xxl/tokenizer.json", retoken, "<e>", []),
        ("umt5-xxl/tokenizer.json of models_t5", retoken, "</s>", ["more"]),
        ("-00001-of-00002.safetensors is missing", os.rename, DIT_FILE, shard),
        ("holds its DiT twice", double, shard),
        ("VAE.pth is missing or damaged (Weights only", torch.save, {"a": Path()}, VAE_FILE),
        *((f"{name} is missing", os.remove, name) for name in (VAE_FILE, TOKENIZER_FILE)),
        *((f"{name} is missing", cut, name) for name in ("config.json", DIT_FILE, VAE_FILE, TOKENIZER_FILE)),
        (f"{TEXT_FILE} is missing", cut, TEXT_FILE, 0.0),
    ]  # fmt: skip
    for n, (message, spoil, *args) in enumerate(cases):
        shutil.copytree(tmp_path / "good", tmp_path / str(n))
        monkeypatch.chdir(tmp_path / str(n))
        spoil(*args)
        with pytest.raises(ModelError, match=re.escape(message)) as caught:
            open_model(os.getcwd()).encode_prompts([""])  # before the reference is encoded
        assert "\n" not in str(caught.value)


def test_names_that_are_no_checkpoint_are_explained(monkeypatch):
    monkeypatch.setitem(wan_min.ARCHITECTURES, "1.3B", wan_min.ARCHITECTURES["tiny"])
    weights = write_checkpoint("cache/snapshots/0")[DiT].state_dict()
    save_file(weights, "Wan2_2.safetensors")
    save_file({"q.lora_A.weight": torch.ones(1)}, "lora.safetensors")
    save_file({"scaled_fp8": torch.ones(1).to(torch.float8_e4m3fn)}, "fp8.safetensors")
    save_file(weights | {"patch_embedding.weight": torch.ones(96, 36, 1, 2, 2)}, "i2v.safetensors")
    Path("wan.gguf").touch()
    Path("models/loras").mkdir(parents=True)
    for name, message in {
        "lora.safetensors": "is not Wan 2.1's DiT .*Missing.*the official layout.* Wan-AI/Wan2.1-T2V-1.3B, .*LoRA",
        "wan.gguf": "not a .safetensors", "Wan2_2.safetensors": "not .* of Wan 2.1",
        "i2v.safetensors": "is not Wan 2.1's DiT .*96, 36, 1", "fp8.safetensors": "is in fp8",
        "models": "models is without diffusion_", "cache": "cache: give --model cache/snapshots/0$",
        "nowhere/wan.safetensors": "unknown model", "a/b/c": "unknown", "~/wan": "unknown",
        "nonsense": "unknown model 'nonsense': .*1.3B, 14B, tiny",
    }.items():  # fmt: skip
        with pytest.raises(ModelError, match=message):
            open_model(name)


def fake_hub(monkeypatch, folder="model", fail=None):
    """What open_model asks huggingface_hub for: a list of calls. `fail` is raised where the network is needed."""
    calls = []

    def call(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        if fail:
            raise fail
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", call)
    return calls


def test_weights_from_the_hub(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    write_checkpoint("model")
    calls = fake_hub(monkeypatch)
    for name, repo in (("14B", "Wan-AI/Wan2.1-T2V-14B"), ("some/repo", "some/repo")):
        calls.clear()
        model = open_model(name)
        assert model.blocks == 4 and calls == [(repo, ("config.json",))]
        model.load_codec(), model.load_dit(), model.encode_prompts(["a"])
        assert [call[0] for call in calls[1:]] == [repo]  # once, when needed
    needed = ["config.json", "diffusion_pytorch_model-00001-of-00006.safetensors", "Wan2.1_VAE.pth",
              "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"]  # fmt: skip
    official = [*needed, "README.md", "diffusion_pytorch_model.safetensors.index.json"]
    assert list(filter_repo_objects(official, allow_patterns=calls[-1][1])) == needed
    assert wan_min.REPOS[fastvmt.build_parser().get_default("model")] == "Wan-AI/Wan2.1-T2V-1.3B"
    shutil.copy(f"model/{DIT_FILE}", "lone.safetensors")
    monkeypatch.setitem(wan_min.ARCHITECTURES, "1.3B", wan_min.ARCHITECTURES["tiny"])
    model = open_model("lone.safetensors")
    model.load_codec(), model.load_dit(), model.encode_prompts(["a"])
    assert calls[-1][0] == "Wan-AI/Wan2.1-T2V-1.3B"
    assert list(filter_repo_objects(official, allow_patterns=calls[-1][1])) == needed[:1] + needed[2:]  # no DiT
    Path("model", VAE_FILE).write_text("")
    with pytest.raises(ModelError, match="Wan2.1_VAE.pth is missing"):
        open_model("some/repo").load_dit()  # all parts are checked before one is read


def test_failures_of_the_hub_are_told_with_the_way_out(monkeypatch):
    from huggingface_hub.utils import GatedRepoError

    for message, error in {"reset by peer more.*run it again, it resumes": ConnectionResetError("reset by peer\nmore"),
                           "check the spelling.*hf auth": GatedRepoError.__new__(GatedRepoError)}.items():  # fmt: skip
        fake_hub(monkeypatch, fail=error)
        with pytest.raises(ModelError, match=f"^owner/name .*{message}"):
            open_model("owner/name")
    fake_hub(monkeypatch, ".")
    with pytest.raises(ModelError, match="owner/name is without config.json"):
        open_model("owner/name")


def test_hub_cache_is_used_offline():
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": os.getcwd()}
    code = "import wan_min; m = wan_min.open_model('14B'); print(m.blocks, len(m.load_dit().blocks))"
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                  cwd=HERE)  # fmt: skip
    message = run().stderr.splitlines()[-1]
    for part in ("ModelError", "Wan-AI/Wan2.1-T2V-14B", "go online", "--local-dir", "HF_HOME"):
        assert part in message
    repo, commit = Path("hub/models--Wan-AI--Wan2.1-T2V-14B"), "0" * 40
    for name in ("refs", "snapshots"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    write_checkpoint(repo / "snapshots" / commit, shards=2)
    assert run().stdout == "4 4\n"


def test_tokens_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    import ftfy

    write_checkpoint("model")
    file = f"model/{TOKENIZER_FILE}"
    ours, true = Tokenizer.from_file(file), transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="</s>")
    prompts, lengths = ["", "a red fox", "  a \n red\tfox ", "<a> &amp;amp; fox", "红狐狸在雪中奔跑，狐狸。",
                        "🦊 runs 🏔️", "?!...,,", "fox " * 2000], []  # fmt: skip
    for prompt in prompts:
        clean = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
        ids = wan_min.tokenize(prompt, ours)
        assert ids == true(clean, truncation=True, max_length=512).input_ids and ids[-1] == 1
        lengths.append(len(ids))
    assert lengths[:2] == [1, 4] and lengths[-1] == 512
    contexts = wan_min.encode_prompts(prompts, Path("model"))
    assert contexts.shape == (len(prompts), 512, 64) and contexts.isfinite().all()
    assert (contexts.abs().sum(-1) > 0).sum(1).tolist() == lengths  # zero past the words and the end token


class Characters:
    """A tokenizer of one id a character, which shows the text that it was given."""

    def encode(self, text, add_special_tokens):
        return argparse.Namespace(ids=list(text))

    def token_to_id(self, token):
        return token


def test_prompts_are_cleaned_as_officially_and_a_cut_is_told(capsys):
    for prompt, clean in {
        "a dog’s tail — “happy”": "a dog's tail — \"happy\"", "a dogâ€™s tail": "a dog's tail",  # mojibake
        "\x1b[36;44ma red\x1b[0m fox": "a red fox", "ａ　ｒｅｄ　ｆｏｘ": "a red fox", "ﬁre &amp;lt; x": "fire < x",
        "a\udce9 fox": "a\ufffd fox",  # from a byte that is not UTF-8
    }.items():  # fmt: skip
        assert "".join(wan_min.tokenize(prompt, Characters())) == clean + "</s>"
    for length, told in ((511, ""), (512, "prompt cut to 512 of its 513 tokens: " + 30 * "x" + "...\n")):
        assert len(wan_min.tokenize("x" * length, Characters())) == 512
        assert capsys.readouterr().out == told


# ---- Run: videos -----------------------------------------------------------------------------------------------------


def ffmpeg(*args, frames=b""):
    """Its messages; the frames are what it reads from "-"."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", *map(str, args)]
    return subprocess.run(command, input=frames, capture_output=True).stderr.decode(errors="replace")


def encode(path, frames, *options, fps=12, pixels="rgb24"):
    """Write frames (T, h, w, 3), of those pixels, as a video."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", pixels, "-s", size, "-r", fps, "-i", "-"]
    log = ffmpeg(*source, *options, path, frames=frames.tobytes())
    assert os.path.exists(path), log
    return path


def write_clip(path, num_frames=14, size=(48, 80), fps=12, options=()):
    """A clip with a bright left half, whose frame n has brightness 10n on the right."""
    frames = np.full((num_frames, *size, 3), 200, np.uint8)
    frames[:, :, size[1] // 2 :] = (np.arange(num_frames) * 10)[:, None, None, None]
    return encode(path, frames, *options, fps=fps)


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
def test_reading_videos(caplog, kind):
    ending, rate, fps, start, options = READING[kind]
    path, flat = Path("in" + ending), Path("flat" + ending)
    write_clip(flat, size=(101, 67) if kind == "odd" else (48, 80), options=options.split(), fps=rate)
    if kind in ("sound", "late"):
        ffmpeg("-copyts", "-i", flat, *SINE, "-map", "0", "-map", "1", path)
    elif kind == "rotated":
        ffmpeg("-display_rotation", "90", "-i", flat, "-c", "copy", path)
    elif kind == "resized":  # the second half
        for filters in ("select=lt(n\\,7)", "select=gte(n\\,7),scale=40:64"):
            ffmpeg("-i", flat, "-vf", filters, *H264.split(), "part.h264")
            with path.open("ab") as file:
                file.write(Path("part.h264").read_bytes())
    else:
        flat.rename(path)
    seen = levels(path, fps=fps, start=start, turn=True)
    assert not caplog.text  # imageio has nothing to say
    portrait = kind in ("rotated", "odd", "narrow")
    gap = {"variable": 2 / 12, "paused": 30}.get(kind, 0)
    times = [n / min(rate, 50) * (1 + 4 * (kind == "tick")) + (n >= 6) * gap for n in range(14)]  # of the file's frames
    count = min(round((times[-1] + times[1] - start) * fps), 81)
    assert seen.shape == (3, (count - 1) // 4 * 4 + 1, *((64, 32) if portrait else (32, 64)))
    seen = seen.transpose(2, 3).flip(3) if kind == "rotated" else seen  # by 90° counter-clockwise
    right, left = seen[:, :, :, -8:].mean((0, 2, 3)), seen[:, :, :, :8].mean()
    # The nearest in time, so that a rounded time stamp changes nothing at the file's own rate.
    shown = [max(k for k, time in enumerate(times) if (time - start) * fps < n + 0.5 - 1e-6) for n in range(len(right))]
    close(right, torch.tensor([10.0 * k for k in shown]), 6)
    assert left == pytest.approx(200, abs=6)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".ts", ".avi"])
def test_a_start_inside_a_long_video(ending):
    frames = np.tile(np.arange(0, 240, 10, np.uint8)[:, None, None, None], (5, 16, 16, 3))
    path = encode("in" + ending, frames, "-g", "50", *H264.split(), fps=5)
    for start in (0.6, 3.4, 18.25):
        seen = levels(path, fps=5, size=(32, 32), num_frames=5, start=start)
        close(seen.mean((0, 2, 3)), torch.tensor([(math.floor(start * 5) + n) % 24 * 10.0 for n in range(5)]), 4)


def test_a_folder_of_pictures_is_a_video():
    folder, shades = Path("a %d:b"), [127.5, 40, *range(50, 180, 10)]  # of x%d1 and so on
    folder.mkdir()
    Image.new("RGBA", (96, 48)).save(folder / "x%d1.png")  # transparent
    for n, shade in enumerate(shades[1:], 2):
        kind = ("tif", "webp", "PNG", "jpg", "bmp")[n % 5]
        picture = Image.new("L", (48, 96) if n == 7 else (94 + n, 48), shade)
        picture.convert("RGBA" if kind == "PNG" else "RGB").save(folder / f"x%d{n}.{kind}")
    Image.fromarray(np.full((48, 96), shades[2] * 256, np.uint16)).save(folder / "x%d3.png")
    (folder / "x%d3.jpg").unlink()
    (folder / "x%d12.PNG").write_bytes((folder / "x%d13.jpg").read_bytes())  # a JPEG, whatever its name says
    shades[11] = shades[12]
    (folder / "._x%d3.png").write_text("no picture")
    assert levels(folder, fps=30, turn=True).shape == (3, 13, 32, 64)  # as the first picture, which is not portrait
    seen = levels(folder, fps=30)
    close(seen.mean((0, 2, 3)), torch.tensor(shades[:13]), 1.6)
    assert torch.equal(levels(folder, fps=8, start=0.5, num_frames=9), seen[:, 4:])
    with pytest.raises(fastvmt.UserError, match="has 4 frames from 0.37 s"):
        levels(folder, fps=30, start=0.37)
    (folder / "notes.txt").write_text("no picture")
    (folder / "x%d4.bmp").write_bytes(b"BM no picture")
    with pytest.raises(fastvmt.UserError, match="x%d4.bmp"):
        levels(folder)
    demo = levels("demo")
    folder.rename("demo")
    assert torch.equal(levels("demo"), demo)


def test_frames_are_covered_and_cropped_at_the_centre():
    frames = np.zeros((5, 60, 40, 3), np.uint8)
    frames[:, 20:40] = 255  # the middle third
    noise = np.random.default_rng(0).integers(0, 256, (5, 256, 512, 3), np.uint8)
    tall, wide, large = (encode(f"{n}.mkv", x, "-c:v", "ffv1", "-pix_fmt", "gbrp")
                         for n, x in enumerate((frames, frames.swapaxes(1, 2), noise)))  # fmt: skip
    seen = levels(tall)  # to 96x64, rows 32 to 64 kept
    assert seen.shape == (3, 5, 32, 64) and seen[:, :, 2:-2].min() > 253
    close(levels(wide, size=(64, 32)), seen.transpose(2, 3), 2)
    assert levels(wide, size=(64, 32), turn=True).shape == (3, 5, 64, 32)  # a landscape is not turned
    os.mkdir("photos")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # shown turned clockwise
    for n, frame in enumerate(frames):
        Image.fromarray(np.rot90(frame)).save(f"photos/{n}.png", exif=exif)
    close(levels("photos"), seen, 2)
    assert levels(large).std() < 25  # a mean of about 8x8 pixels, not one of them


def test_names_and_unreadable_references(monkeypatch):
    clip = Path(write_clip("in.mp4")).read_bytes()
    for name in ("-y.mp4", "a%03d.mp4", "http:a.mp4", "a\nb '\".mp4", "狐狸.MP4", os.fsdecode(b"caf\xe9.mp4")):
        Path(name).write_bytes(clip)
        assert levels(name).shape[1] == 13
    Path("text.mp4").write_bytes(b"no video")
    Path("half.mp4").write_bytes(clip[: len(clip) // 2])
    ffmpeg(*SINE, "-f", "lavfi", "-i", "color=s=64x64", "-map", "0", "-map", "1", "-c:v", "png", "-frames:v", "1",
           "-disposition:v", "attached_pic", "mirror.mp4")  # fmt: skip
    assert "attached pic" in ffmpeg("-i", "mirror.mp4")  # its cover is no video; its name, no error
    os.mkfifo("fifo")
    write_clip("burst.mp4", num_frames=8, fps=60)
    assert levels("burst.mp4", fps=60).shape[1] == 5

    def refused(message, name, **options):
        with pytest.raises(fastvmt.UserError, match=rf"\A.*{name} .*{message}.*\Z"):  # in one line
            levels(name, **options)

    for name in ("no.mp4", "fifo", "%04d.png", "-"):
        refused(r"\(not a file or a folder", name)
    for name in ("text.mp4", "half.mp4"):
        refused(r"\(.*Invalid data", name)
    refused(r"\(.*matches no streams", "mirror.mp4")
    refused("has 0 frames from 9.5 s", "in.mp4", start=9.5)
    refused("2 frames from 0 s at --fps 16, .* own rate is 60", "burst.mp4", fps=16)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    refused("No such file.*/nowhere/ffmpeg", "in.mp4")


def test_the_demo_slides_right_and_down():
    video = fastvmt.read_video("demo", 9, (240, 416))
    assert video.shape == (1, 3, 9, 240, 416)
    spectrum = torch.fft.fft2(video[0].mean(0))
    for n in range(1, 9):
        shift = torch.fft.ifft2(spectrum[n] * spectrum[0].conj()).real.flatten().argmax()
        rows, cols = divmod(int(shift), 416)
        assert 2 * n <= rows <= 5 * n and 3 * n <= cols <= 7 * n, (n, rows, cols)


def metadata_of(path):
    ffmpeg("-i", path, "-f", "ffmetadata", "metadata.txt")
    text = Path("metadata.txt").read_text(errors="surrogateescape")
    os.remove("metadata.txt")
    comment = re.search(r"^comment=(.*)$", text, re.MULTILINE)[1]
    return json.loads(re.sub(r"\\([=;#\\])", r"\1", comment))


SMOOTH = F.interpolate(randn(1, 3, 3, 4, 6), (9, 62, 98), mode="trilinear").clamp(-0.8, 0.8)


def test_video_survives_writing(capfd):
    link, out = Path("link.mp4"), Path("folder/o.mp4")
    link.symlink_to("folder/o.mp4")  # is written through, also where it leads to nothing yet
    out.parent.mkdir()
    with fastvmt.scratch(link) as scratch:
        assert Path(scratch).parent == out.parent.resolve()  # on one disk
    comment = json.dumps({"prompt": "狐 = a; # \\ 'b'\n" * 9000, "ref": "caf\udce9.mp4"}, ensure_ascii=False)
    fastvmt.write_video(link, SMOOTH, 24, comment)
    assert link.is_symlink() and os.listdir(out.parent) == ["o.mp4"]
    assert metadata_of(out) == json.loads(comment)
    again = fastvmt.read_video(out, 9, (31, 49), fps=24)
    close(again.mean((0, 2, 3, 4)), SMOOTH.mean((0, 2, 3, 4)), 0.003)  # colours are not a level off
    assert again.shape[2] == 9 and (again - F.avg_pool3d(SMOOTH, (1, 2, 2))).abs().mean() < 0.02
    assert re.search(r"yuv420p\(tv, bt709(, progressive)?\)", ffmpeg("-i", out))  # and players are told which they are
    assert out.read_bytes().index(b"moov") < out.read_bytes().index(b"mdat")  # plays while it loads
    assert capfd.readouterr().err == ""  # ffmpeg has nothing to say


def test_a_failure_to_write_leaves_the_old_video(monkeypatch):
    import imageio_ffmpeg

    fastvmt.write_video("o.mp4", SMOOTH, 24)
    limit, real = os.path.getsize("o.mp4") // 1024, imageio_ffmpeg.get_ffmpeg_exe()
    Path("o.mp4").write_text("an older result")
    Path("in_the_way.mp4").mkdir()
    script = Path("ffmpeg").absolute()
    script.touch(0o755)

    def refused(message, path="o.mp4"):
        with pytest.raises(fastvmt.UserError, match=message):
            fastvmt.write_video(path, SMOOTH, 24)
        assert sorted(os.listdir()) == ["ffmpeg", "in_the_way.mp4", "o.mp4"]
        assert Path("o.mp4").read_text() == "an older result"

    refused("Is a directory.*in_the_way", "in_the_way.mp4")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    for body in ("exit 1", f"ulimit -f {limit}; trap '' XFSZ; exec {real} \"$@\""):  # as on a full disk
        script.write_text("#!/bin/sh\n" + body)
        refused("cannot write o.mp4 .*disk full")


# ---- Run: command line -----------------------------------------------------------------------------------------------


def run_main(capsys, *args):
    """Exit code, stdout and stderr, without bars, of the program in this process."""
    code = fastvmt.main([str(a) for a in args])
    out = capsys.readouterr()
    lines = [line for line in out.err.splitlines() if line and not re.search(r"it/s|s/it|%\|", line)]
    return code, out.out, "\n".join(lines)


def refused(capsys, message, *args, code=2):
    """Assert that the program ends with one line that holds the message; its standard output."""
    done, out, err = run_main(capsys, *args)
    assert done == code and message.lower() in err.lower(), (args, err)
    assert len(err.splitlines()) == 1 and len(err) < 500, err
    return out


DEMO = shlex.split("--ref demo --prompt 'a red fox' --model tiny --steps 2 --inner-steps 2 --device cpu --size 32x48 "
                   "--frames 5")  # fmt: skip


def failing(error):
    """A function that raises it."""

    def fail(*args, **kwargs):
        raise error

    return fail


def test_command_line_makes_the_video(capsys):
    write_clip("in.mp4")
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
2 steps, 4 passes; 1 to 1 guided, σ 1\.000 to 1\.000, gradients: 1
latents kept in 0/out\.latents\.safetensors; .*
wrote 0/out\.mp4
"""
    assert re.fullmatch(expected, text), text


def test_the_run_is_its_parts(capsys, monkeypatch):
    """Which latents and settings the video and the printed lines are made of; changes of the method arrive."""
    written = {}
    monkeypatch.setattr(fastvmt, "write_video", lambda path, video, *_: written.update({str(path): video}))
    flags = "--frames 9 --seed 5 --strength 0.7 --steps 3 --guided-fraction 0.5 --velocity-interval 2"
    args, config, model = fastvmt.parse_arguments([*DEMO, *flags.split(), "--negative-prompt", "blur"])
    video, codec, dit = fastvmt.read_video("demo", 9, (32, 48)), model.load_codec(), model.load_dit()
    reference, (context, negative, null) = codec.encode(video), model.encode_prompts(["a red fox", "blur", ""]).split(1)
    noise, sigmas = randn(*reference.shape, seed=5), wan_min.flow_sigmas(3, 7.0, 0.7)

    def losses(reference, generated, **_):
        return ((generated[0] - reference[0]).abs().mean(),)

    for seams in ({}, {"losses": losses, "step": lambda velocity, x, *_: x + velocity(x, 0.5)}):
        fastvmt.run(args, config, model, **seams)
        guidance = dict(reference=reference, null=null, config=config)
        latents = fastvmt.sample(dit, noise, sigmas, context, negative, **guidance, **seams)
        close(written["out.mp4"], codec.decode(latents), 1e-4)
        text = capsys.readouterr().out
        assert f"1 to 2 guided, σ {sigmas[0]:.3f} to {sigmas[1]:.3f}" in text and text.count("guided") == 1


def test_the_whole_path_stays_on_its_device(monkeypatch):
    """Prompts, video to latents, guided sampling, latents to video; all from a checkpoint's files."""
    forward, load = TextEncoder.forward, wan_min.load

    def watched(*args):
        with Tensors("meta"):
            return forward(*args)

    monkeypatch.setattr(TextEncoder, "forward", watched)
    monkeypatch.setattr(wan_min, "load", lambda cls, folder, device="cpu", *a: load(cls, folder, "cpu", *a).to(device))
    write_checkpoint("m")
    video, config = torch.empty(1, 3, 5, 32, 48, device="meta"), MotionConfig(block=2, inner_steps=1)
    for offload in (False, True):
        model = open_model("m", "meta", torch.bfloat16, offload=offload)
        contexts, codec, dit = model.encode_prompts(["a red fox", "", ""]), model.load_codec(), model.load_dit()
        with Tensors("meta"):
            reference = codec.encode(video)
            latents = sample(dit, torch.empty_like(reference), context=contexts[:1], negative=contexts[1:2],
                             reference=reference, null=contexts[2:], config=config, checkpoint=offload)  # fmt: skip
            decoded = codec.decode(latents)
        assert decoded.is_meta and decoded.shape == video.shape and contexts.is_meta and contexts.shape[:2] == (3, 512)


@pytest.mark.parametrize("computed", [[0, 1, 2, 5, 8], range(0, 9, 2), range(9)])
def test_velocities_extend_the_line_of_the_last_two(computed):
    """In σ; the one velocity that is known stays."""
    sigmas, asked, used = [9.0, 8.5, 8.0, 6.0, 5.0, 4.5, 2.0, 1.0, 0.5, 0.0], [], []

    def velocity(x, sigma):
        asked.append(sigma)
        return sigma**2

    def once(velocity, x, sigma, next_sigma):
        used.append(velocity(x, sigma))

    step = fastvmt.reuse_velocities(once, [number in computed for number in range(9)])
    for number, sigma in enumerate(sigmas[:9]):
        step(velocity, None, sigma, sigmas[number + 1])
        known = [sigmas[n] for n in computed if n <= number][-2:]
        # The line through a² and b² at a and b has slope a + b.
        true = known[-1] ** 2 + (sigma - known[-1]) * sum(known) * (len(known) > 1)
        assert used[-1] == pytest.approx(true)
    assert asked == [sigmas[number] for number in computed]


def test_a_step_may_ask_twice_for_velocities():
    asked, used = [], []

    def heun(velocity, x, sigma, next_sigma):
        used.append((velocity(x, sigma), velocity(x, next_sigma)))

    step = fastvmt.reuse_velocities(heun, [True, False] * 2)
    for sigma in (4.0, 3.0, 2.0, 1.0):
        step(lambda x, sigma: asked.append(sigma) or sigma**2, None, sigma, sigma - 1)
    assert asked == [4, 3, 2, 1] and used == [(16, 9), (9, 2), (4, 1), (1, -2)]


def test_user_errors(capsys, monkeypatch):
    write_clip("in.mp4")
    os.link("in.mp4", "same.mp4")
    write_clip("short.mp4", num_frames=3, fps=16)
    Path("text.mp4").write_text("no video")
    for name in ("empty", "out/p.mp4", "out/q.latents.safetensors"):
        Path(name).mkdir(parents=True)
    save_file({"other": torch.ones(1, 16, 2, 4, 6)}, "other.safetensors")
    save_file({"result": torch.ones(2, 3)}, "flat.safetensors")
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(wan_min, "random_contexts", failing(AssertionError("told before anything is loaded")))
    out_of_range = ("--steps 0", "--fps 0", "--fps nan", "--start -1", "--seed -1", "--shift 0", "--strength 1.5")
    cases = {flag: flag[2:].split()[0] + " must be " for flag in out_of_range} | {  # flags, what the message must name
        "--frames 4": "frames must be int from 5 to 10000, not 4",
        "--ref no.mp4": "no.mp4",
        "--ref empty": "0 frames",
        "--ref short.mp4": "3 frames",
        "--start 1": "from 1 s",
        "--prompt ' '": "the prompt is empty",
        "--prompt " + "fox" * 3334: "characters",
        "--size axb": "HxW",
        "--no-such-flag": "--no-such-flag",
        "--model nonsense": "unknown model 'nonsense'",
        "--model nonsense --steps 0": "steps must",  # before the hub is asked
        "--model empty": "without diffusion_pytorch_model*.safetensors",
        "--block 5": "block must be int from 1 to 4, not 5",
        "--ref-noise 2": "ref_noise must be float from 0.0 to 1.0 or 'match', not 2",
        "--out missing/o.mp4": "cannot write missing/o.latents.safetensors (No such file",
        "--out o.avi": ".mp4",
        "--out in.mp4": "not be the reference",
        "--out same.mp4": "not be the reference",
        f"--out {'a' * 250}.mp4": "latents.safetensors (File name too long)",
        "--out out/p.mp4": "is a folder",
        "--out out/q.mp4": "q.latents.safetensors is a folder",
        "--compile --offload": "exclude each other",
        f"--ref {'a' * 300}": "not a file or a folder",
        "--ref 'no\nsuch'": "no such",
        "--size 10x48": "size must be int from 32 to 10000 or None, not 10",
        "--size=-32x48": "size must be int from 32 to 10000 or None, not -32",
        "--lr 0.1 nan": "lr must be float from 0.0 to 1000000000.0, not nan",
        "--device abacus": "device abacus cannot be used",
        "--device meta": "device meta cannot be used",
        "--device hpu": "device hpu cannot be used",
        "--prompt -fox": "--prompt=…",
        "--out": "expected one argument, or --out=…",
        "--decode text.mp4": "header",
        "--decode no.safetensors": "no.safetensors",
        "--decode other.safetensors": "holds no latents of this",
        "--decode flat.safetensors": "holds no latents of this",
    }
    for flags, message in cases.items():
        refused(capsys, message, *DEMO, "--ref", "in.mp4", *shlex.split(flags))
    assert sorted(Path().rglob("*")) == before


def test_help_shows_every_setting_with_default_and_source(capsys):
    with pytest.raises(SystemExit):
        fastvmt.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.index(" --ref ") < text.index(" --model ") < text.index(" --block ") < text.index(" --seed ")
    text = text.split("the method:")[1].split(" clip and sampling:")[0]
    for f in fields(MotionConfig):
        shown = re.search(rf" --{f.name.replace('_', '-')} (.*?) \(default: (.*?)\)(?= --|$)", text)
        assert re.search(r"(eq|Sec|App)\.|not the paper's", shown[1]) and shown[2] == str(f.default), shown


def test_a_new_setting_becomes_a_flag(monkeypatch):
    """Of any kind, tuples of any length too: whoever adds one changes nothing else."""

    @dataclass
    class Longer:
        span: int = 5  # temporal span (eq. 3)
        blocks: tuple = (1, 2, 3)  # three blocks (here)
        weights: tuple = ()  # as many as there are (here)

    monkeypatch.setattr(fastvmt, "MotionConfig", Longer)
    parser = fastvmt.build_parser()
    assert "three blocks (here) (default: (1, 2, 3))" in parser.format_help()
    args = parser.parse_args("--blocks 4 5 6 --weights 0.5 2".split())
    assert (args.blocks, args.weights, args.span) == ([4, 5, 6], [0.5, 2.0], 5)
    assert parser.parse_args([]).weights == () and parser.parse_args(["--weights"]).weights == []


def test_every_flag_arrives(capsys, monkeypatch):
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

    def run(flags):
        assert run_main(capsys, *DEMO, *shlex.split(flags))[0] == 0
        assert seen["contexts"] == [0, 1, 2]
        return seen["config"]

    monkeypatch.setattr(wan_min, "random_contexts", encode)
    monkeypatch.setattr(fastvmt, "sample", sample)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    monkeypatch.setattr(VAE, "tiled", lambda *args: seen.update(tile=args[4]) or tiled(*args))
    settings = dict(block=2, tile=(2, 5), window=7, span=4, tau=1.5, center="argmax", alpha=0.1, lambda_amf=2.0,
                    lambda_window=3.0, squared=True, guided_fraction=0.5, inner_steps=4, interval=2, lr=(0.1, 0.2),
                    ref_noise=0.3, coarse=0.4)  # fmt: skip
    assert set(settings) == {f.name for f in fields(MotionConfig)}
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
    common = dict(strength=1, steps=50, shift=7, cfg_scale=5.8, fps=None, size=None, vae_tiles=False)
    assert (common | {"frames": 81}).items() <= defaults.items()
    release = dict(span=3, alpha=1 / 7, lambda_window=1 / 1560, lr=(0.003, 0.0021), ref_noise="match")
    for flags, settings, others in (  # the model's own defaults, under a preset's, under flags
        ("", {}, {"frames": 33}),
        ("--preset paper", {"ref_noise": "match"}, {"vae_tiles": True}),  # of Algorithm 1 and Sec. 4.1
        ("--preset release --no-vae-tiles", release, {"strength": 0.75, "fps": 15}),
        ("--preset release --strength 1 --ref-noise 0.2 --lr 0.1 0.2", release | dict(lr=(0.1, 0.2), ref_noise=0.2),
         {"fps": 15, "vae_tiles": True}),
        ("--preset fast", dict(coarse=0.5, interval=20), {"velocity_interval": 3}),
        ("--window none --tile 2 2 --ref-noise match", dict(window=None, tile=(2, 2), ref_noise="match"), {}),
    ):  # fmt: skip
        args, config, _ = fastvmt.parse_arguments(["--model", "tiny", *flags.split()])
        assert config == MotionConfig(**dict(block=3, window=3) | settings), flags
        assert (common | others).items() <= vars(args).items(), flags


def test_notices(capsys):
    write_clip("in.mp4", num_frames=7, fps=16)
    write_clip("tall.mp4", size=(80, 48), fps=16)
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


def test_provenance(capsys, monkeypatch):
    write_clip("in.mp4")
    code, text, err = run_main(capsys, *DEMO, "--ref", Path("in.mp4").absolute(),
                               *"--fps 8 --lambda-window 0.25 --seed 5".split())  # fmt: skip
    assert code == 0 and not err and sorted(os.listdir()) == ["in.mp4", "out.mp4"] and "wrote out.mp4\n" in text
    record = metadata_of("out.mp4")
    known = dict(prompt="a red fox", seed=5, model="tiny", steps=2, fps=8.0, ref="in.mp4", lambda_window=0.25, span=5,
                 lr=[0.003, 0.002], block=3, window=3, ref_noise=0.0, shift=7.0, ai_generated=True, vae_tiles=False,
                 torch=torch.__version__)  # fmt: skip
    assert {name: record[name] for name in known} == known
    assert set(MotionConfig().__dict__) < set(record) and os.getcwd() not in json.dumps(record)
    assert "8 fps" in ffmpeg("-i", "out.mp4")
    tiled, full = VAE.tiled, failing(OUT_OF_MEMORY[0])  # the fall back to tiles changes the result
    monkeypatch.setattr(VAE, "tiled", lambda *args: tiled(*args) if args[4] else full())
    assert run_main(capsys, *DEMO)[0] == 0 and metadata_of("out.mp4")["vae_tiles"] is True


def test_nothing_is_lost_when_decoding_fails(capsys, monkeypatch):
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
        assert metadata_of("out.mp4")["prompt"] == "a red fox"


def test_a_killed_run_leaves_whole_files_or_none(capsys):
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


def test_failures_during_sampling(capsys, monkeypatch):
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


def test_memory_is_found_by_recomputation(capsys, monkeypatch):
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


def test_readme_code_runs(dit):
    """Its two changes make other videos; its example writes one."""
    changes, example = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    scope = {}
    exec(changes, scope)
    results = [sample(dit, **change) for change in ({}, {"losses": scope["by_speed"]}, {"step": scope["heun"]})]
    assert all(x.isfinite().all() for x in results)
    assert all(not torch.equal(a, b) for a, b in combinations(results, 2))
    exec(example, {})
    assert fastvmt.read_video("out.mp4", 81, (64, 112)).shape == (1, 3, 9, 64, 112)
