# SPDX-License-Identifier: Apache-2.0
"""Tests of the figures: what they measure against slow loops and known flows, and that they hold what was measured."""

import argparse
import itertools
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import reduce
from PIL import Image

import fastvmt
import wan_min
from lab import figures, made, rivals, toy
from test_fastvmt import close, randn


def toy_clip(seed=60004, kind="pan", scene=True):
    video, drawn, prompt = toy.held_out_of_kind(seed, kind)
    noise, contexts, reference = toy.prepare(video, prompt, seed)
    return figures.Clip(video, drawn if scene else None, reference, noise, contexts)


def run_figures(capsys, *args):
    code = figures.main([*map(str, args)])
    out, err = capsys.readouterr()
    return code, out, "\n".join(line for line in err.splitlines() if not re.search(r"it/s|s/it|%\|", line))


# ---- Flow of pixels ----


def test_pixels_flow_as_a_scene_does_that_is_known():
    pytest.importorskip("cv2")
    size, grid, i, j = (192, 256), (24, 32), 6, 9
    times = toy.frame_times(17)
    for seed, motion in enumerate(("moves-right", "moves-up", "turns-left", "zooms-in")):
        scene = made.make_scene(motion, seed, size, 17)
        video, pixels = made.render(scene, seed, size, 17)[0], toy.pixel_grid(size)
        camera = torch.tensor(scene["camera"])
        points = toy.mid_clip(pixels, camera, times[[i]])[0]
        turned = torch.einsum("xy,hwy->hwx", toy.similarity(camera, times[[j]])[0], points)
        there = turned + times[j] * camera[:2]
        true = reduce(there - pixels, "(h a) (w b) c -> h w c", "mean", h=24, w=32) / 8
        away = (2 * there / torch.tensor(size)).abs().amax(-1)  # over 1: out of view
        inside = reduce(away, "(h a) (w b) -> h w", "max", h=24, w=32) < 0.95
        outside = reduce(away, "(h a) (w b) -> h w", "min", h=24, w=32) > 1.01
        flow, known = figures.pixel_flow(video[:, i], video[:, j], grid)
        assert true[inside].norm(dim=-1).mean() > 0.7
        assert known[inside].float().mean() > 0.95 and not known[outside].any(), motion
        assert outside.any() or motion == "zooms-in"
        assert (flow - true)[inside & known].norm(dim=-1).mean() < 0.15, motion
    other = video[:, i].clone()
    other[:, 64:128, 96:160] = randn(1, 64, 64, seed=1)
    _, known = figures.pixel_flow(video[:, i], other, grid)
    assert known[9:15, 13:19].float().mean() < 0.7 and known[:6].all()  # what appears has no match to come back from


def test_a_true_flow_is_seen_where_it_ends_in_view_and_not_behind_the_sprite():
    rest, i, j = torch.tensor([0.0, 0.25]), torch.tensor([3]), torch.tensor([4])  # tokens a frame
    scene = {"camera": (0.0, 1.5, 0.0, 0.0)}
    flow, seen = figures.true_flow(scene, i, j)
    close(flow, rest.expand_as(flow), 1e-5)
    assert seen[:, :, :-1].all() and not seen[:, :, -1].any()
    flow, seen = figures.true_flow(scene | {"color": "red", "place": (3.0, 0.0), "velocity": (0.0, -6.0)}, i, j)
    row = slice(3, 5)  # the sprite is at column 6 on the first frame, at 5 on the second, and two tokens wide each way
    close(flow[0, row, 5:8], torch.tensor([0.0, -1.0]).expand(2, 3, 2), 1e-5)
    close(flow[0, row, :4], rest.expand(2, 4, 2), 1e-5)
    assert seen[0, row, 5:8].all() and not seen[0, row, 4].any() and seen[0, row, :3].all()


def test_flow_of_pixels_is_between_the_pictures_of_neighbours(monkeypatch):
    pairs, video = [], torch.arange(9.0).expand(3, 1, 1, 9).permute(0, 3, 1, 2)
    clip = figures.Clip(video, None, randn(1, 16, 3, 24, 33, seed=1), randn(1, 16, 3, 24, 33, seed=2),
                        toy.encode_prompts(["", "", ""]).split(1))  # fmt: skip

    def flow(first, second, grid):
        pairs.append((first[0].item(), second[0].item()))
        return torch.full((*grid, 2), float(len(pairs))), torch.ones(grid, dtype=torch.bool)

    monkeypatch.setattr(figures, "pixel_flow", flow)
    flows, known = figures.clip_flow(clip, *fastvmt.frame_pairs(3, 1), (2, 3))
    assert pairs == [(0, 3), (3, 7)] and flows[:, 1, 2, 0].tolist() == [1, 2] and known.shape == (2, 2, 3)
    drawn, (args, config, _) = [], fastvmt.parse_arguments(["--model", "toy"])
    monkeypatch.setattr(figures, "draw_window", lambda names, *rest: drawn.append(names))
    figures.window(toy.load(), {"clip": [clip]}, args, config)
    assert pairs[2:] == [(3, 7)] and drawn[0][0] == "flow of the pixels"
    errors, still = figures.reading_errors(toy.load(), clip, config, [3])
    assert pairs[3:] == [(0, 3), (3, 7)] and errors.shape == (1, 8, 6)
    assert still.item() == pytest.approx(2**0.5 * (4 + 5) / 2)


def test_pictures_are_those_in_the_middle_of_latent_frames():
    video = torch.zeros(3, 9, 1, 1)
    for frames, pictures in ((3, [0, 3, 7]), (9, range(9))):
        clip = SimpleNamespace(video=video, reference=torch.zeros(1, 16, frames, 2, 2))
        assert [figures.picture(clip, n) for n in range(frames)] == list(pictures)


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
    found, shares = figures.principal(flat @ plane)
    axes = flat.view(-1, 2).T @ flat.view(-1, 2)
    close(shares, torch.linalg.eigvalsh(axes).flip(0) / axes.trace(), 1e-5)
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
    calls, recomputed, real = [], [], fastvmt.guide

    def guide(x, sigma, reading, read, losses, config, frames):
        moved = real(x, sigma, reading, read, losses, config, frames)
        with torch.no_grad():
            calls.append((x, sigma, reading[0], read(x, sigma)[0], frames, config.interval, moved[0]))
            recomputed.append(read.keywords["checkpoint"])
        return moved

    monkeypatch.setattr(fastvmt, "guide", guide)
    fastvmt.sample(dit, noise, sigmas, *contexts[:2], cfg_scale=2.0, reference=reference, null=contexts[2],
                   config=config)  # fmt: skip
    run = calls.copy()
    assert len(run) == 3 and not any(recomputed)
    calls.clear()
    recomputed.clear()
    settings, panels = [], {}
    monkeypatch.setattr(figures, "draw_skip", panels.update)
    step = figures.read_steps
    monkeypatch.setattr(figures, "read_steps", lambda *a: settings.append(a) or step(*a))
    text, _ = figures.skip(dit, {"clip": [clip]}, args, replace(config, coarse=1.0))
    assert [f"step {n + 1}, σ {sigmas[n]:.3f}" in text for n in range(3)] == [True] * 3 and len(panels) == 3
    assert settings[0][5] == [0, 1, 2]
    for alike, *_ in panels.values():  # of Δ 1: with others some gradients would be the same
        assert alike.diagonal(1).max() < 0.9999
    walks = calls[2:]  # the first are the run's, up to the last guided step
    assert all(recomputed)
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
    lag = torch.arange(6.0) - torch.arange(6.0)[:, None]
    alike = 1 - lag.abs() / 10 + (torch.arange(6.0) - 2.5 - lag / 2) / 10  # 1 − lag/10 on average over a diagonal
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
        coordinates, _ = figures.principal(walks - walks[0, 0])
        assert [line.get_label() for line in axes.lines] == [f"Δ = {n}" for n in range(1, 6)]
        for line, path in zip(axes.lines, coordinates):
            close(torch.tensor(line.get_xydata()).float(), path, 1e-6)
            assert path[0].abs().max() < 1e-3
        assert axes.get_aspect() == 1
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
    errors = torch.tensor([[*row, row[2] - row[1]] for row in errors])
    for number, column in zip(text.splitlines()[2].split("|")[2:6], errors.T):
        mean, error = map(float, number.split("±"))
        assert mean == pytest.approx(column.mean().item(), abs=error / 10)
        assert error == pytest.approx(column.std().item() / 2**0.5, rel=0.05)
    worst = errors[:, 1].argmax().item()
    assert worst == 0  # so that drawing the last would be seen
    true, without, within = flows[worst]
    assert (without - within).abs().max() > 1e-3
    seen = figures.true_flow(clips[0].scene, i, j)[1][pair]
    longest = true[seen].norm(dim=-1).quantile(0.95)
    for above, below, flow in zip(figure.axes[:3], figure.axes[3:], (true, without, within)):
        shown = torch.tensor(above.images[0].get_array()).float()
        colors = torch.tensor(figures.flow_colors(flow, longest)).float()
        close(shown, torch.where(seen[..., None] | (flow is not true), colors, 0.5), 1e-4)
        close(torch.tensor(below.images[0].get_array()), (clips[0].video[:, 2].permute(1, 2, 0) + 1) / 2, 1e-6)
        (arrows,) = below.collections
        drawn = torch.from_numpy(np.stack([arrows.V, arrows.U], -1)).float().view(8, 11, 2)
        hidden = ~seen & (flow is true)
        assert np.broadcast_to(arrows.Umask, 88).tolist() == hidden.flatten().tolist() and arrows.pivot == "tail"
        close(drawn[~hidden], 6 * flow[~hidden], 1e-3)
        close(torch.tensor(arrows.get_offsets())[12].float(), torch.tensor([8.5, 8.5]), 1e-5)  # of the token (1, 1)
    titles = ["true flow", *(f"{name} window: {errors[worst, n]:.2f} off" for n, name in ((1, "without"), (2, "with")))]
    assert [axes.get_title() for axes in figure.axes[:3]] == titles and seen.any() and not seen.all()


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
        shown = [panel.images[0].get_array() for title, panel in panels.items() if title.startswith(kind)]
        least, still = min(x.min() for x in shown), sum(still) / len(still)
        assert image.get_clim() == pytest.approx((least, max(x.max() for x in shown)))
        bar = [axes for axes in figure.axes if "red" in axes.get_ylabel()][kind == "sprite"]
        assert bar.lines[-1].get_ydata()[0] == pytest.approx(still)
        assert image.norm(2 * least) - image.norm(least) == pytest.approx(image.norm(4 * least) - image.norm(2 * least))
        left, right, bottom, top = image.get_extent()
        assert (left, right, bottom, top) == (0.5, 6.5, 7.5, -0.5)
        if tau == 2:
            table = text[text.index(f"| {kind}, τ 2 |") :].splitlines()
            assert table[0].split("|")[2 + level].strip() == f"σ {sigma}"
            assert table[1 + block].startswith(f"| block {block} |")
            number, *error = map(float, table[1 + block].split("|")[2 + level].split("±"))
            assert number == pytest.approx(mean, abs=0.006) and len(error) == len(clips[kind]) - 1
            assert float(re.split("[:±;]", table[9])[1]) == pytest.approx(still, abs=0.006)
            best = re.search(r"least: ([\d.]+), of block (\d+) at σ ([\d.]+) and τ (\d+)", table[9]).groups()
            at = figures.LEVELS.index(float(best[2])), int(best[1]) - 1
            assert float(best[0]) == pytest.approx(least, abs=6e-4)
            assert panels[f"{kind}, τ {best[3]}"].images[0].get_array()[at] == least


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


def test_a_real_clip_is_read_as_the_flags_say(monkeypatch):
    video, tiled = randn(1, 3, 9, 32, 48, seed=1), []
    args = argparse.Namespace(model="1.3B", ref="a/b.mp4", frames=13, fps=None, start=1.5, vae_tiles=True, prompt="fox",
                              negative_prompt="bad", device="cpu", seed=3, size=None)  # fmt: skip
    codec = SimpleNamespace(encode=lambda video: video[:, :, ::4, ::8, ::8])
    model = SimpleNamespace(load_codec=lambda tiles: tiled.append(tiles) or codec, fps=12.0, demo=None,
                            canvases=[(32, 48), (48, 32)], encode_prompts=toy.encode_prompts)  # fmt: skip
    reads = []
    monkeypatch.setattr(fastvmt, "read_video", lambda *args, **options: reads.append((args, options)) or video)
    (name, (clip,)), *others = figures.make_clips(args, model).items()
    assert (name, others, tiled) == ("b.mp4", [], [True]) and clip.video.equal(video[0]) and clip.scene is None
    assert reads == [(("a/b.mp4", 13, (32, 48)), dict(fps=12.0, start=1.5, turn=True))]
    model.demo, args.ref = lambda path, *_, **__: video + 1, "demo"
    assert figures.make_clips(args, model)["demo"][0].video.equal(video[0] + 1)


def test_figures_on_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    command = "--device cpu --steps 5 --inner-steps 2 --model".split()
    tiny = [*command, *"tiny --size 32x48 --frames 9 --out".split(), tmp_path / "figures"]
    code, _, err = run_figures(capsys, *tiny)
    assert code == 2 and err.startswith("lab.figures: --ref is missing")
    for wrong in ("--no-transfer", "--preview", "--mask=x", "--decode=x"):
        code, _, err = run_figures(capsys, *tiny, "--ref", "demo", wrong)
        assert code == 2 and wrong.split("=")[0] in err and len(err.splitlines()) == 1
    pytest.importorskip("cv2")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)
        code, _, err = run_figures(capsys, *tiny, "--ref", "demo")
        assert code == 2 and "cv2" in err and not (tmp_path / "figures").exists()
    code, out, err = run_figures(capsys, *tiny, "--ref", "demo")
    assert code == 0 and not err, err
    assert out.count("drawn in") == 3 and "| demo, τ 1 |" in out and "step 1, σ 1.000" in out
    for name in ("skip", "window", "map"):
        assert Image.open(tmp_path / "figures" / f"{name}.png").width > 400
    made = []
    monkeypatch.setattr(figures, "FIGURES", {"map": lambda dit, clips, *_: made.append(clips) or ("text", SAVED)})
    args = [*command, "toy", "--out", tmp_path, "--clips", "2", "--seed", "60003"]
    code, out, err = run_figures(capsys, *args)
    assert code == 0 and out.startswith("text\n"), err
    clip = made[0]["sprite"][1]
    assert list(made[0]) == ["pan", "look-alikes", "rotation", "sprite"] and len(made[0]["pan"]) == 2
    true = toy_clip(60004, "still")
    assert clip.scene == true.scene and clip.noise.equal(true.noise) and clip.reference.equal(true.reference)
    assert all(a.equal(b) for a, b in zip(clip.contexts, true.contexts))
    for extra, message in ((["--clips", "0"], "clips must be"), (["--only", "x"], "--only"),
                           (["--size", "64x64"], "leave out --size"), (["--out", __file__], "exists"),
                           (["--ref", "demo"], "clips of its own")):  # fmt: skip
        code, _, err = run_figures(capsys, *args, *extra)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run_figures(capsys, *args)
    assert code == 2 and err.startswith("lab.figures: ") and "matplotlib" in err and len(err.splitlines()) == 1
    assert len(made) == 1


SAVED = SimpleNamespace(savefig=lambda path: None)
