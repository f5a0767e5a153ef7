# SPDX-License-Identifier: Apache-2.0
"""Tests of the figures: what they measure against slow loops and known flows, and that they hold what was measured."""

import argparse
import itertools
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastvmt
import wan_min
from lab import figures, rivals, toy
from test_fastvmt import close, randn

GRID = (8, 11)


def textured(shift=(0.0, 0.0), flat=0):
    """A picture (3, 128, 176) of bent waves that is moved by pixels, its first columns flat."""
    g = torch.Generator().manual_seed(4)
    points = toy.pixel_grid((128, 176)) - torch.tensor(shift)
    picture = 0.3 * torch.stack([toy.waves(points, 40, 30.0, g) for _ in range(3)])
    picture[:, :, :flat] = 0.2
    return picture


def toy_clip(seed=60004, kind="pan", scene=True):
    video, drawn, prompt = toy.held_out_of_kind(seed, kind)
    noise, contexts, reference = toy.prepare(video, prompt, seed)
    return figures.Clip(video, drawn if scene else None, reference, noise, contexts)


def run_figures(capsys, *args):
    code = figures.main([*map(str, args)])
    out, err = capsys.readouterr()
    return code, out, "\n".join(line for line in err.splitlines() if not re.search(r"it/s|s/it|%\|", line))


# ---- Flow of pixels ----


@pytest.mark.parametrize("shift", [(0.0, 0.0), (32.0, -16.0), (-5.0, 9.6), (20.5, 37.0)])
def test_blocks_are_found_where_the_texture_went(shift):
    flow, counts = figures.match_blocks(textured(), textured(shift), GRID)
    true = torch.tensor(shift) / 16
    target = fastvmt.row_column(torch.arange(88), 11).view(*GRID, 2) + true
    inside = ((target >= 0) & (target <= torch.tensor(GRID) - 1)).all(-1)
    inner = torch.zeros(GRID, dtype=torch.bool)
    inner[1:-1, 1:-1] = True  # of the others the outer cells are made up
    outside = ((target < -0.75) | (target > torch.tensor(GRID) - 0.25)).any(-1)
    assert counts[inside & inner].float().mean() > 0.95 and counts[outside].sum() <= 0.3 * outside.sum()
    close(flow[counts & inside & inner], true.expand((counts & inside & inner).sum(), 2), 0.1)


def test_blocks_without_texture_do_not_count_and_of_look_alikes_the_nearest_does():
    _, counts = figures.match_blocks(textured(flat=80), textured(flat=80), GRID)
    assert not counts[:, :4].any() and counts[:, 6:].all()  # a block reaches half a token to each side
    y, x = (toy.pixel_grid((128, 176)) * (2 * math.pi / 32)).unbind(-1)  # repeats after two tokens
    picture = (0.5 * (y.sin() + x.cos())).expand(3, -1, -1)
    flow, counts = figures.match_blocks(picture, picture, GRID)
    assert counts.all() and flow.abs().max() < 0.01
    # What appears has no match: where it lies, or what it hides, the way back leads elsewhere.
    other = textured()
    other[:, 32:96, 64:128] = textured((300.0, 500.0))[:, 32:96, 64:128]
    _, counts = figures.match_blocks(textured(), other, GRID)
    assert counts.sum() == 88 - (~counts[1:7, 3:9]).sum() and not counts[3:5, 5:7].any()


def test_pixels_of_a_toy_pan_flow_as_its_scene_does():
    for seed in (60002, 60004):
        clip = toy_clip(seed, scene=False)
        i, j = torch.tensor([0, 3, 5]), torch.tensor([1, 4, 7])
        flow, counts = figures.clip_flow(clip, i, j, GRID)
        true, seen = figures.clip_flow(toy_clip(seed), i, j, GRID)
        error = (flow - true)[counts & seen].norm(dim=-1)
        assert (counts & seen).sum() > 0.6 * seen.sum() and error.mean() < 0.15, (seed, error.mean())
        assert true[seen].norm(dim=-1).mean() > 0.15
    flat = clip._replace(video=torch.zeros_like(clip.video))
    with pytest.raises(fastvmt.UserError, match="nothing in the pixels"):
        figures.clip_flow(flat, i, j, GRID)


def test_pictures_are_those_in_the_middle_of_latent_frames():
    video = torch.arange(9.0).expand(3, 9).view(3, 9, 1, 1)
    for frames, pictures in ((3, [0, 3, 7]), (9, range(9))):
        clip = SimpleNamespace(video=video, reference=torch.zeros(1, 16, frames, 2, 2))
        assert [figures.picture(clip, n)[0].item() for n in range(frames)] == list(pictures)


# ---- Inner steps ----


def test_inner_steps_and_their_cosines_by_a_slow_loop(monkeypatch):
    weight, goal, start = randn(2, 3, seed=1).exp(), randn(2, 3, seed=2), randn(2, 3, seed=3)
    config = fastvmt.MotionConfig(inner_steps=7, interval=3, lr=(0.3, 0.1))

    def losses(reference, generated, **options):
        return ((weight * (generated - reference).square()).sum() / 2,)

    latents, gradients = figures.inner_steps(start, 0.5, goal, lambda x, sigma: x, losses, config, 3)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([x])
    path, slow = [start], []
    for step in range(7):
        if step % 3 == 0:
            fresh = (weight * (x - goal)).detach()
        x.grad = fresh.clone()
        optimizer.param_groups[0]["lr"] = 0.3 - step * 0.2 / 6
        optimizer.step()
        path.append(x.detach().clone())
        slow.append(fresh)
    close(latents, torch.stack(path).flatten(1), 1e-6)
    close(gradients, torch.stack(slow).flatten(1), 1e-6)
    found = figures.cosines(gradients)
    for a, b in itertools.product(range(7), repeat=2):
        true = (slow[a] * slow[b]).sum() / (slow[a].norm() * slow[b].norm())
        assert found[a, b].item() == pytest.approx(true.item(), abs=1e-5)
    removed = []
    handle = SimpleNamespace(remove=lambda: removed.append(1))
    monkeypatch.setattr(figures, "register_optimizer_step_post_hook", lambda hook: handle)
    with pytest.raises(ZeroDivisionError):
        figures.inner_steps(start, 0.5, goal, lambda x, sigma: 1 / 0, losses, config, 3)
    assert removed == [1]


def test_principal_directions_keep_a_planes_distances():
    plane = torch.linalg.qr(randn(40, 2, seed=1))[0].T  # (2, n)
    flat = torch.tensor([5.0, 1.0]) * randn(3, 4, 2, seed=2)
    found = figures.principal(flat @ plane)
    close(torch.cdist(found.view(-1, 2), found.view(-1, 2)), torch.cdist(flat.view(-1, 2), flat.view(-1, 2)), 1e-3)
    close(found.norm(dim=-1), flat.norm(dim=-1), 1e-3)  # the origin, where all start, stays
    assert found[..., 0].square().sum() > found[..., 1].square().sum()  # the first is the larger one
    assert abs((found[..., 0] * found[..., 1]).sum()) < 1e-2


@pytest.mark.parametrize("ref_noise", [0.25, "match"])
def test_steps_begin_as_the_runs_do(ref_noise, monkeypatch):
    dit = wan_min.random_model(wan_min.DiT, wan_min.ARCHITECTURES["tiny"][0])
    reference, noise = randn(1, 16, 3, 4, 6, seed=1), randn(1, 16, 3, 4, 6, seed=2)
    contexts = tuple(randn(1, 8, 64, seed=n) for n in (3, 4, 5))
    clip = figures.Clip(None, None, reference, noise, contexts)
    config = fastvmt.MotionConfig(block=2, tau=30.0, guided_fraction=0.5, inner_steps=3, interval=2, lr=(0.1, 0.05),
                                  ref_noise=ref_noise)  # fmt: skip
    args = argparse.Namespace(steps=6, shift=3.0, strength=0.9, cfg_scale=2.0, offload=False, checkpoint="on")
    sigmas = wan_min.flow_sigmas(6, 3.0, 0.9)
    calls, real = [], fastvmt.guide

    def guide(x, sigma, reading, read, losses, config, frames):
        moved = real(x, sigma, reading, read, losses, config, frames)
        with torch.no_grad():
            calls.append((x, sigma, reading[0], read(x, sigma)[0], frames, config.interval, moved[0]))
        return moved

    monkeypatch.setattr(fastvmt, "guide", guide)
    fastvmt.sample(dit, noise, sigmas, *contexts[:2], cfg_scale=2.0, reference=reference, null=contexts[2],
                   config=config)  # fmt: skip
    run = calls.copy()
    assert len(run) == 3
    calls.clear()
    settings, panels = [], []
    monkeypatch.setattr(figures, "draw_skip", lambda names, shown: panels.extend(shown))
    step = figures.read_steps
    monkeypatch.setattr(figures, "read_steps", lambda *a: settings.append(a) or step(*a))
    text, _ = figures.skip(dit, {"clip": [clip]}, args, replace(config, coarse=1.0))
    assert [f"step {n + 1}, σ {sigmas[n]:.3f}" in text for n in range(3)] == [True] * 3 and len(panels) == 3
    assert settings[0][5] == [0, 1, 2]
    walks = calls[2:]  # the first are the run's, up to the last guided step
    assert [call[5] for call in walks] == [1, 2, 3, 4, 5] * 3
    for n, call in enumerate(walks):
        for found, true in zip(call[:5], run[n // 5][:5]):
            close(torch.as_tensor(found), torch.as_tensor(true), 1e-5)
    for n in range(3):
        close(walks[5 * n + 1][6], run[n][6], 1e-5)  # that of the run's own Δ


def test_skip_prints_and_draws_what_the_steps_say(monkeypatch):
    pytest.importorskip("matplotlib")
    args = argparse.Namespace(steps=5, shift=1.0, strength=1.0)
    config = fastvmt.MotionConfig(guided_fraction=0.4)
    alike = 1 - (torch.arange(6.0) - torch.arange(6.0)[:, None]).abs() / 10  # 1 − lag/10
    walks = torch.zeros(5, 7, 3)
    walks[:, :, 0] = torch.linspace(0, 4, 7)
    walks[:, :, 1] = torch.arange(5.0)[:, None] * torch.linspace(0, 1, 7)  # ends 1, 2, 3, 4 off Δ 1's, which moved 4
    steps = [(alike, walks + 9), (alike - 0.2, walks * torch.tensor([1.0, 2.0, 1.0]))]
    monkeypatch.setattr(figures, "read_steps", lambda dit, clip, *_: [(a - 0.02 * clip, w) for a, w in steps])
    text, figure = figures.skip(None, {"pan": [0, 1], "other": [5]}, args, config)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0][0::5] == ["guided step", "Δ 2 ends off Δ 1"] and len(rows) == 4
    assert rows[2] == ["step 1, σ 1.000", *(f"{0.89 - 0.1 * n:.4f} ± 0.0100" for n in range(4)),
                       *("0.25", "0.5", "0.75", "1")]  # fmt: skip
    assert rows[3][0] == "step 2, σ 0.800" and rows[3][1] == "0.6900 ± 0.0100" and rows[3][5] == "0.5"
    heat, paths = figure.axes[:2], figure.axes[2:4]
    for axes, (values, _) in zip(heat, steps):
        close(torch.tensor(axes.images[0].get_array()), values, 0)
        assert axes.images[0].get_extent() == [0.5, 6.5, 6.5, 0.5] and axes.images[0].get_clim() == (-1, 1)
    for axes, (_, walks) in zip(paths, steps):
        coordinates = figures.principal(walks - walks[0, 0])
        assert [line.get_label() for line in axes.lines] == [f"Δ = {n}" for n in range(1, 6)]
        for line, path in zip(axes.lines, coordinates):
            close(torch.tensor(line.get_xydata()).float(), path, 1e-6)
            assert path[0].abs().max() < 1e-3
    with pytest.raises(fastvmt.UserError, match="no step is guided"):
        figures.skip(None, {}, args, replace(config, guided_fraction=0.0))


# ---- Flow with and without window, and the map ----


def test_colors_tell_direction_and_length():
    pytest.importorskip("matplotlib")
    flow = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, -2.0], [2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, 9.0]])
    colors = torch.tensor(figures.flow_colors(flow, 2.0))
    close(colors[:3], torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 1]]), 1e-5)  # white; right red, left its opposite
    assert torch.cdist(colors[1:5], colors[1:5]).add(9 * torch.eye(4)).min() > 0.5
    close(colors[5:], torch.tensor([[1.0, 0.5, 0.5], [1, 0, 0]]), 1e-5)


def test_window_reads_a_pair_in_the_middle_with_and_without():
    pytest.importorskip("matplotlib")
    dit, (args, config, _) = toy.load(), fastvmt.parse_arguments(["--model", "toy", "--tau", "1", "--ref-noise", "0.3"])
    clips = [toy_clip(60001, "look-alikes"), toy_clip(60002, "look-alikes")]
    text, figure = figures.window(dit, {"pan": [], "look-alikes": clips}, args, config)
    i, j = fastvmt.frame_pairs(9, 5)
    pair = ((i == 2) & (j == 7)).nonzero().item()
    flows, errors = [], []
    for clip in clips:
        true, seen = figures.true_flow(clip.scene, i, j)
        x = fastvmt.match_noise(clip.reference, clip.noise, 0.3)
        read = [fastvmt.motion_features(dit, x, 0.3, clip.contexts[2], replace(config, window=side))[0][pair]
                for side in (None, 5)]  # fmt: skip
        true, seen = true[pair], seen[pair]
        flows.append([torch.where(seen[..., None], true, 0), *read])
        errors.append([(flow - true)[seen].norm(dim=-1).mean() for flow in (true * 0, *read)])
    true, without, within = flows[0]
    assert (without - within).abs().max() > 1e-3
    for number, column in zip(text.splitlines()[2].split("|")[2:5], torch.tensor(errors).T):
        mean, error = map(float, number.split("±"))
        assert mean == pytest.approx(column.mean().item(), abs=error / 10)
        assert error == pytest.approx(column.std().item() / 2**0.5, rel=0.05)
    longest = true.norm(dim=-1).max()
    for above, below, flow in zip(figure.axes[:3], figure.axes[3:], (true, without, within)):
        shown = torch.tensor(above.images[0].get_array()).float()
        close(shown, torch.tensor(figures.flow_colors(flow, longest)).float(), 1e-4)
        close(torch.tensor(below.images[0].get_array()), (clips[0].video[:, 2].permute(1, 2, 0) + 1) / 2, 1e-6)
        (arrows,) = below.collections
        close(torch.from_numpy(np.stack([arrows.V, arrows.U], -1)).float().view(8, 11, 2), 6 * flow, 1e-3)
        close(torch.tensor(arrows.get_offsets())[12].float(), torch.tensor([8.5, 8.5]), 1e-5)  # of the token (1, 1)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["true flow", "without window", "with window"]


def test_map_holds_the_errors_of_the_methods_own_flow():
    pytest.importorskip("matplotlib")
    dit, (args, config, _) = toy.load(), fastvmt.parse_arguments(["--model", "toy", "--tau", "2"])
    clips = {"pan": [toy_clip(60004), toy_clip(60001)], "sprite": [toy_clip(60000, "still")]}
    text, figure = figures.map_levels(dit, clips, args, config)
    i, j = fastvmt.frame_pairs(9, 5)
    titles = [f"{kind}, τ {tau}" for kind in clips for tau in (1, 2, 3, 10)]
    panels = dict(zip(titles, figure.axes))
    assert [axes.get_title() for axes in panels.values()] == titles
    for kind, block, level, tau in (("pan", 5, 0, 2), ("pan", 2, 5, 10), ("sprite", 5, 3, 1), ("sprite", 6, 7, 2)):
        errors, still = [], []
        for clip in clips[kind]:
            true, seen = figures.true_flow(clip.scene, i, j)
            sigma = figures.LEVELS[level]
            x = fastvmt.match_noise(clip.reference, clip.noise, sigma)
            settings = replace(config, block=block, tau=tau)
            flow, _ = fastvmt.motion_features(dit, x, sigma, clip.contexts[2], settings)
            errors.append((flow - true)[seen].norm(dim=-1).mean().item())
            still.append(true[seen].norm(dim=-1).mean().item())
        image, mean = panels[f"{kind}, τ {tau}"].images[0], sum(errors) / len(errors)
        assert image.get_array().shape == (8, 6)
        assert image.get_array()[level, block - 1] == pytest.approx(mean, abs=1e-4)
        assert image.get_clim() == pytest.approx((0, sum(still) / len(still)))
        left, right, bottom, top = image.get_extent()
        assert (left, right, bottom, top) == (0.5, 6.5, 7.5, -0.5)
        if tau == 2:
            table = text[text.index(f"| {kind}, τ 2 |") :].splitlines()
            assert table[0].split("|")[2 + level].strip() == f"σ {sigma}"
            assert table[1 + block].startswith(f"| block {block} |")
            number, *error = map(float, table[1 + block].split("|")[2 + level].split("±"))
            assert number == pytest.approx(mean, abs=0.006) and len(error) == len(clips[kind]) - 1
            assert float(table[9].split(": ")[1].split("±")[0]) == pytest.approx(sum(still) / len(still), abs=0.006)


def test_blocks_are_read_in_one_run():
    dit, x = toy.load(), randn(1, 16, 3, 24, 33)
    context = toy.encode_prompts([""])
    for block, qk in enumerate(figures.block_qk(dit, x, 0.5, context), 1):
        for found, true in zip(qk, fastvmt.read_qk(dit, x, 0.5, context, block)):
            close(found, true, 1e-5)
    assert block == 6
    with pytest.raises(fastvmt.UserError, match="the toy only"):
        rivals.embed(object(), x, 0.5, context)


# ---- Command line ----


def test_figures_on_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    command = "--device cpu --steps 5 --inner-steps 2 --model".split()
    tiny = [*command, *"tiny --size 32x48 --frames 9 --out".split(), tmp_path / "figures"]
    code, _, err = run_figures(capsys, *tiny)
    assert (code, err) == (2, "lab.figures: --ref is missing")
    code, out, err = run_figures(capsys, *tiny, "--ref", "demo")
    assert code == 0 and not err, err
    assert out.count("drawn in") == 3 and "| demo, τ 1 |" in out and "step 1, σ 1.000" in out
    for name in ("skip", "window", "map"):
        assert Image.open(tmp_path / "figures" / f"{name}.png").width > 400
    made = []
    monkeypatch.setattr(figures, "FIGURES", {"map": lambda dit, clips, *_: made.append(clips) or ("text", SAVED)})
    args = [*command, "toy", "--out", tmp_path, "--clips", "2", "--first", "60003"]
    code, out, err = run_figures(capsys, *args)
    assert code == 0 and out.startswith("text\n"), err
    clip = made[0]["sprite"][1]
    assert list(made[0]) == ["pan", "look-alikes", "rotation", "sprite"] and len(made[0]["pan"]) == 2
    true = toy_clip(60004, "still")
    assert clip.scene == true.scene and clip.noise.equal(true.noise) and clip.reference.equal(true.reference)
    assert all(a.equal(b) for a, b in zip(clip.contexts, true.contexts))
    for extra, message in ((["--clips", "0"], "clips must be"), (["--only", "x"], "--only"),
                           (["--size", "64x64"], "leave out --size"), (["--out", __file__], "exists")):  # fmt: skip
        code, _, err = run_figures(capsys, *args, *extra)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run_figures(capsys, *args)
    assert (code, err) == (2, "lab.figures: the figures are drawn by matplotlib: pip install matplotlib")
    assert len(made) == 1


SAVED = SimpleNamespace(savefig=lambda path: None)
