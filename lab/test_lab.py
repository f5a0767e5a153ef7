# SPDX-License-Identifier: Apache-2.0
"""Tests of the lab: the toy, its training and measurements, the paper's Table 1, metrics and costs."""

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastvmt
import wan_min
from lab import changes, cost, effect, figures, frontier, made, metrics, table1, toy, train
from test_fastvmt import HERE, close, moving_texture, randn, run_main, write_clip

# ---------------------------------------------------------------------------------------------------------------------
# The toy
# ---------------------------------------------------------------------------------------------------------------------


STILL = {"scale": "coarse", "palette": "blue-white", "texture": "blobs", "camera": (0.0, 0.0, 0.0, 0.0)}
SPRITE = {"color": "red", "shape": "disc", "striped": False, "velocity": (0.5, -1.0), "place": (2.0, 3.0)}


def frames(seed=3, **changes):
    return toy.render(STILL | changes, torch.Generator().manual_seed(seed))


def test_world_moves_as_its_scenes_say():
    still = frames()
    assert still.shape == (3, 9, 48, 66) and still.abs().max() <= 1 and torch.equal(still[:, 0], still[:, 8])
    pan = frames(camera=(1.0, -2.0, 0.0, 0.0))  # a row down and two columns left, each frame
    close(pan[:, 1, 1:, :-2], pan[:, 0, :-1, 2:], 1e-4)
    close(pan[:, 4], still[:, 4], 1e-6)
    zoom = frames(camera=(0.0, 0.0, math.log(3) / 4, 0.0))  # at the end three times as large as in the middle
    close(zoom[:, 8, 1::3, 1::3], zoom[:, 4, 16:32, 22:44], 1e-4)
    turn = frames(camera=(0.0, 0.0, 0.0, math.pi / 8))  # a quarter turn from the middle to the end, counter-clockwise
    close(turn[:, 8, :, 9:57], turn[:, 4, :, 9:57].rot90(1, (1, 2)), 1e-4)
    weights = toy.sprite_weights(frames(**SPRITE))
    for n in range(9):
        rows, cols = torch.nonzero(weights[n] > 0.5).double().mean(0).tolist()
        assert rows == pytest.approx(23.5 + 2 + 0.5 * (n - 4), abs=0.3)
        assert cols == pytest.approx(32.5 + 3 - 1.0 * (n - 4), abs=0.3)


def test_world_looks_as_its_words_say():
    red, yellow = (frames(**SPRITE | {"color": color})[:, 4] for color in ("red", "yellow"))
    texture, disc = (frames()[0, 4] + 0.8) / 1.7, (yellow - red)[1] / 1.6  # shares of white in blue, of the disc
    for share in (texture, disc):
        assert 0.5 < share.diff(dim=-1).abs().max() < 0.9  # edges about a pixel wide
    for seed, period in ((1, 22), (4, 28)):  # checks and blobs of look-alikes
        frame = toy.held_out_lookalike(seed)[0][:, 4]
        difference = {(y, x): (frame - frame.roll((y, x), (1, 2)))[:, 28:, 28:].abs().mean()
                      for y, x in itertools.product(range(29), repeat=2) if y + x > 20}  # fmt: skip
        nearest = min(difference, key=difference.get)
        assert difference[nearest] < 0.05 and math.hypot(*nearest) == pytest.approx(period, abs=0.8)


def test_motion_is_measured_as_rendered():
    classes, right = effect.texture_classes(240), []
    for n, camera in enumerate(["pan", "zoom", "rotation", "still"] * 3):
        video, scene, _ = toy.held_out_of_kind(n, camera)
        assert toy.motion_error(video, scene) < (0.5 if scene["texture"] == "stripes" else 0.05), (n, scene)
        assert ("velocity" in scene) == (camera == "still")
        right.append(effect.shows(video, toy.describe(scene), classes))
    assert sum(right) >= 11
    for words in (("fine", "coarse"), ("black-blue", "blue-white"), ("stripes", "checks"), (", a red square", "")):
        assert right[-1] and not effect.shows(video, toy.describe(scene).replace(*words), classes), words
    assert not effect.shows(torch.full((3, 9, 48, 66), -0.9), "fine black-white stripes", classes)  # black alone
    camera = (4.3, -2.6, 0.0, 0.0)
    noisy = frames(camera=camera) + 0.5 * randn(3, 9, 48, 66)  # only distant frames tell its motion so exactly
    assert toy.motion_error(noisy, STILL | {"camera": camera}) < 0.1


def test_motion_error_by_hand(monkeypatch):
    """The flow of a camera over the frame, and a missing sprite, which counts as one at rest."""
    (video, scene, _), (y, x) = toy.held_out(5, "still", False), toy.pixel_grid().unbind(-1)
    error = torch.hypot(0.3 + 0.01 * y - 0.02 * x, 0.4 + 0.01 * x + 0.02 * y).mean().item()
    assert toy.motion_error(video, scene | {"camera": (0.3, 0.4, 0.01, 0.02)}) == pytest.approx(error, abs=0.01)
    scene["velocity"] = 3.0, 4.0
    assert toy.motion_error(video, scene) == pytest.approx(2.5, abs=0.01)
    monkeypatch.setattr(toy, "measure_camera", lambda video: torch.tensor([1.0, -2.0, 0.03, math.pi / 180]))
    assert toy.describe_motion(video) == "+1.00 rows -2.00 columns +3.0 % +1.0° a frame"
    for kind, error in (("pan", 5**0.5), ("zoom", 3), ("rotation", 1), ("still", 5)):
        assert effect.component_error(video, scene, kind) == pytest.approx(error)
    for count, found in ((39, False), (41, True)):
        patch = torch.full((3, 9, 48, 66), -1.0)
        patch[0, :, 0, :count] = -0.4  # a red of 0.3, which is half a sprite's
        assert (toy.measure_sprite(patch) is not None) == found


def test_toy_codec_and_words():
    video = randn(2, 3, 9, 48, 66)
    latents = toy.encode(video)
    assert latents.shape == (2, 16, 9, 24, 33) and not latents[:, 12:].any()
    assert torch.equal(toy.decode(latents + F.pad(randn(2, 4, 9, 24, 33), (0, 0) * 3 + (12, 0))), video)
    assert latents[1, :3, 4, 5, 6].tolist() == video[1, :, 4, 10, 12].tolist()
    known, unknown = toy.known_words("Fine white and blue stripes, and a golden striped-disc of stripes")
    assert known == ["fine", "blue-white", "stripes", "striped", "disc"] and unknown == ["golden"]
    assert toy.known_words("blobs - a ring") == (["blobs", "ring"], [])
    assert toy.describe(STILL | SPRITE | {"color": "orange"}) == "coarse blue-white blobs, an orange disc"
    noise, contexts, reference = toy.prepare(video[0], "red", 5)
    assert noise.equal(randn(1, 16, 9, 24, 33, seed=5)) and reference.equal(latents[:1])
    assert [x.sum() for x in contexts] == [1, 0, 0]
    context = toy.encode_prompts(["a red disc", "", "disc"])
    assert context.shape == (3, 8, len(toy.WORDS)) and context.sum() == 3 and not context[1].any()
    assert torch.equal(context[0, 1], context[2, 0]) and not torch.equal(context[0, 0], context[0, 1])
    for seed in range(50):
        scene = toy.draw_scene(torch.Generator().manual_seed(seed))
        known, unknown = toy.known_words(toy.describe(scene))
        assert not unknown and len(known) == 3 + ("color" in scene) * (2 + scene.get("striped", 0))


def test_toy_training_lowers_the_loss(tmp_path, capsys):
    stages = (40, 1, (5, 24, 36), 0.8, 0.7, 1.0, 1.0), (10, 1, (9, 48, 66), 0.8, 0.0, 0.5, 0.0)
    train.train(tmp_path / "w.safetensors", stages, log=10)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 5 and losses[3] < 0.95 * losses[0] and losses[4] < losses[1], losses
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    from safetensors.torch import load_file

    weights, shipped = (load_file(path) for path in (tmp_path / "w.safetensors", HERE / "lab/weights.safetensors"))
    assert {k: (v.shape, v.dtype) for k, v in weights.items()} == {k: (v.shape, v.dtype) for k, v in shipped.items()}
    train.train(tmp_path / "on.safetensors", [(1, 1, (1, 24, 36), 0.8, 0.0, 0.0, 0.0)], tmp_path / "w.safetensors")
    assert all(torch.equal(x, weights[name]) for name, x in load_file(tmp_path / "on.safetensors").items())
    assert {v.dtype for v in shipped.values()} == {torch.bfloat16}
    assert not shipped["patch_embedding.weight"][:, 12:].any()  # the empty channels are neither read ...
    assert not shipped["head.head.weight"].unflatten(0, (9, 16))[:, 12:].any()  # ... nor written


def test_toy_matches_follow_the_content():
    """Token centres, moved as token_matches says, show on the other frame what they show on their own."""
    centers = F.avg_pool2d(toy.pixel_grid().permute(2, 0, 1), 6).flatten(1).T  # (S, 2)
    for camera in ("pan", "zoom", "rotation", "still"):
        g = torch.Generator().manual_seed(2)
        scene = toy.draw_scene(g, camera, camera == "still")
        matches = train.token_matches(scene, (slice(1, 9), slice(None), slice(None)))
        video = toy.render(scene, g)[:, 1:]
        assert matches.shape == (8, 88, 8, 88) and not matches.diagonal(dim1=0, dim2=2).any()
        for i, j in ((0, 1), (5, 2)):
            share = matches[i, :, j]
            found = share @ centers
            inner = (found.abs() < torch.tensor([20.9, 29.9])).all(1)  # those beside are clamped
            known = inner & (share.sum(1) > 0.99)
            assert known.sum() > 30
            edge = torch.tensor([24.0, 33.0])
            grids = [(x / edge).flip(-1)[None, None] for x in (centers, found)]
            here, there = (F.grid_sample(video[None, :, n], grid, align_corners=False)[0, :, 0]
                           for n, grid in zip((i, j), grids))  # fmt: skip
            assert (here - there).abs().mean(0)[known].mean() < 0.06 < 0.2 < (here - here.roll(3, 1)).abs().mean()
    i, j = fastvmt.frame_pairs(9, 5)
    flow, seen = figures.true_flow(STILL | {"camera": (1.4, -2.0, 0.0, 0.0)}, i, j)
    true = (j - i)[:, None, None, None] * torch.tensor([1.4, -2.0]) / 6
    target = true + fastvmt.row_column(torch.arange(88), 11).view(8, 11, 2)
    assert seen.equal(((target >= 0) & (target <= torch.tensor([7, 10]))).all(-1))
    close(flow, true.expand_as(flow), 1e-5)


def test_toy_matching_loss():
    """Each token matches two of a frame's three: the attention to them is that of the heads' means, frame by frame."""
    matches = torch.eye(6).roll(1, 0).view(1, 2, 3, 2, 3)
    matches = 0.5 * matches + 0.5 * matches.roll(1, -1)
    k = torch.eye(6)[None, :, None].expand(1, 6, 2, 6) * torch.tensor([0.5, 1.5])[:, None]
    for sharpness in (50.0, 1.0, -50.0):
        q = sharpness * matches.view(1, 6, 1, 6).expand(1, 6, 2, 6)
        expected = math.log(2 + math.exp(-sharpness * 0.5 / 6**0.5))
        assert train.matching_loss(q, k, matches).item() == pytest.approx(expected, abs=1e-4)
    dit, x = toy.load(), randn(2, 16, 3, 6, 9)
    t, context = torch.tensor([20.0, 700.0]), toy.encode_prompts(["a disc", "red"])
    clean, qk = dit.clean_and_qk(x, t, context)
    for a, b in zip(qk, dit.qk(x, t, context, toy.MATCH_BLOCK)):
        assert torch.equal(a, b)
    assert not dit.blocks[toy.MATCH_BLOCK - 1]._forward_pre_hooks  # training would pile them up
    close(dit(x, t, context), (x - clean) / torch.tensor([0.05, 0.7]).view(2, 1, 1, 1, 1), 1e-5)


def test_toy_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--ref", "demo", "--model", "toy", "--device", "cpu", "--steps", "2"]
    code, text, err = run_main(capsys, *args, "--prompt", "fine black and white checks under a purple sky")
    assert code == 0 and not err, err
    assert "the toy does not know under, purple, sky; it knows coarse, fine" in text
    motions = [re.search(f"motion of the {name}: (.*)", text)[1] for name in ("reference", "result")]
    assert motions[0] == toy.describe_motion(toy.held_out(0)[0]) != motions[1]
    ref = write_clip(tmp_path / "in.mp4", num_frames=30)
    code, text, err = run_main(capsys, *args, "--ref", ref, "--frames", "6", "--prompt", "fine green-white blobs")
    assert code == 0 and "5 frames of 48x66 at 8 fps" in text and "does not know" not in text
    large = [*args, "--size", "96x132", "--steps", "1", "--no-transfer", "--prompt", "coarse blue-white stripes"]
    for extra, motion in (([], toy.describe_motion(toy.held_out(0, size=toy.LARGE)[0])), (["--ref", ref], "")):
        code, text, err = run_main(capsys, *large, *extra)
        assert code == 0 and "9 frames of 96x132 at 8 fps" in text and "portrait" not in text and motion in text, err
    for extra, message in (
        (["--prompt", "a fox"], "does not know fox; it knows coarse"),
        (["--ref", ref, "--size", "64x66", "--prompt", "red"], "leave out --size, or --size 96x132"),
        (["--size", "64x66", "--prompt", "red"], "leave out --size, or --size 96x132"),
        (["--ref", ref, "--frames", "13", "--prompt", "red"], "at most 9 frames"),
        (["--offload", "--prompt", "red"], "neither --offload nor --random-weights"),
    ):
        code, _, err = run_main(capsys, *args, *extra)
        assert code == 2 and message in err and len(err.splitlines()) == 1, (extra, err)


def test_the_toys_flow_points_along_the_motion():
    # Not the toy's own τ, at which the flow tends to whole tokens.
    dit, (_, config, _) = toy.load(), fastvmt.parse_arguments(["--model", "toy", "--tau", "2"])
    for seed, pan in enumerate([(3.0, 0.5), (-0.5, -4.0), (-3.0, 3.0)]):
        latents = toy.encode(frames(seed, camera=(*pan, 0.0, 0.0))[None])
        x = fastvmt.match_noise(latents, randn(*latents.shape), 0.1)
        flow, _ = fastvmt.motion_features(dit, x, 0.1, toy.encode_prompts([""]), config)
        i, j = fastvmt.frame_pairs(9, config.span)
        for offset in (1, 2):
            found = 6 * flow[j - i == offset].mean((0, 1, 2))  # in pixels
            true = offset * torch.tensor(pan)
            assert torch.cosine_similarity(found, true, dim=0) > 0.95, (pan, found)
            assert 0.5 < found.norm() / true.norm() < 1.2, (pan, found)


def test_the_method_moves_the_toy():
    """The one test of what all this is for. What is wrong alike in both videos' flow, only the test above can tell."""
    dit, (args, config, _) = toy.load(), fastvmt.parse_arguments(["--model", "toy", "--steps", "10"])
    errors = []
    for seed, camera in zip((30001, 30003, 30004), ("pan", "zoom", "still")):
        _, scene, _, results = effect.generate(dit, seed, camera, args, config)
        errors.append([toy.motion_error(result, scene) for result in results])
    plain, guided = torch.tensor(errors).mean(0)
    assert guided < 0.5 * plain, errors


def test_effect_says_what_it_measures(monkeypatch):
    for name, stub in (
        ("texture_classes", dict),
        ("generate", lambda dit, seed, camera, args, config: (None, seed, seed, [4, 1])),  # errors of plain and guided
        ("component_error", lambda result, seed, camera: result + seed % 2.0),
        ("shows", lambda result, seed, classes: result == 4 or seed % 2 == 1),
    ):
        monkeypatch.setattr(effect, name, stub)
    lines = list(effect.table(None, argparse.Namespace(size=toy.SIZE), None, 2, 0))
    assert lines[2] == "| pan, px | 2 | 4.50 ± 0.71 | 1.50 ± 0.71 | 0.33 |"
    assert lines[-1] == "\nPrompt right: plain 8 of 8, and of these 4 guided; guided 4."


# ---- The lab ---------------------------------------------------------------------------------------------------------


def pan_tracks(*velocity):
    return randn(18, 1, 2) + torch.arange(5.0)[:, None] * torch.tensor(velocity)


def test_motion_measures_equal_their_definitions():
    ref, gen = randn(4, 6, 2, seed=1, dtype=torch.float64), randn(3, 6, 2, seed=2, dtype=torch.float64)
    ref[0, 2] = ref[0, 1]  # one step at rest

    def cosine(x, y):
        length = np.linalg.norm(x) * np.linalg.norm(y)
        return x @ y / length if length else 0

    def error(x, y):
        return np.linalg.norm(x - y)

    for measure, of_steps, best in ((metrics.motion_fidelity, cosine, max), (metrics.track_error, error, min)):
        table = [[np.mean([of_steps(*steps) for steps in zip(np.diff(a, axis=0), np.diff(b, axis=0))])
                  for b in gen.numpy()] for a in ref.numpy()]  # fmt: skip
        expected = (np.mean([best(row) for row in table]) + np.mean([best(column) for column in zip(*table)])) / 2
        assert measure(ref, gen).item() == measure(gen, ref).item() == pytest.approx(expected)
        assert measure(ref[:0], gen).isnan() and measure(ref, gen[:0]).isnan()


def test_what_is_at_rest_and_what_is_seen():
    still = pan_tracks(0, 0)
    jitter = still + 0.001 * randn(*still.shape)  # a tracker's noise is no motion
    assert [metrics.motion_fidelity(still, x) for x in (still, jitter, pan_tracks(0.01, 0.02))] == [1, 1, 0]
    tracks, seen = randn(2, 100, 2), torch.arange(100) < torch.tensor([[50], [49]])
    assert metrics.visible_tracks(tracks, seen).equal(tracks[:1])


def test_cotracker_is_handed_pixels_and_hands_out_rows_first(monkeypatch):
    def model(pixels, grid_size):
        assert pixels.shape == (1, 5, 3, 24, 48) and pixels.min() == 0 and pixels.max() == 255 and grid_size == 30
        return torch.tensor([1.0, 2.0]).expand(1, 5, 2, 2), torch.tensor([0.45, 0.55]).expand(1, 5, 2)

    model.to = lambda device: model
    monkeypatch.setattr(torch.hub, "load", lambda repo, name, trust_repo: model)
    tracks, visible = metrics.load_cotracker()(randn(1, 3, 5, 24, 48))
    assert tracks.equal(torch.tensor([2.0, 1.0]).expand(2, 5, 2))
    assert visible.equal(torch.tensor([[False], [True]]).expand(2, 5))


def test_clip_metrics():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=size | {"vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model, asked = transformers.CLIPModel(config).eval(), []
    ids = transformers.BatchEncoding({"input_ids": torch.tensor([[97, 5, 6, 98]]), "attention_mask": torch.ones(1, 4)})

    def tokenizer(prompt, **options):
        asked.append((prompt, options["truncation"]))
        return ids

    clip = randn(1, 3, 5, 24, 48).tanh()
    frames, prompt = metrics.clip_features(model, tokenizer, clip, "a word")
    assert asked == [("a word", True)] and frames.shape == (5, 16) and prompt.shape == (1, 16)
    pixels = F.interpolate(clip[0].transpose(0, 1), (32, 64), mode="bicubic", antialias=True)[..., 16:48]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # as OpenAI published them
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        outputs = model(pixel_values=((pixels + 1) / 2 - mean) / std, **ids)
    close(F.normalize(frames), outputs.image_embeds, 0.01)
    close(F.normalize(prompt), outputs.text_embeds, 1e-5)
    assert metrics.temporal_consistency(torch.eye(2)[[0, 0, 1]]) == 0.5  # of neighbours


TABLE = "--model tiny --ref demo --prompt x --device cpu --frames 9 --size 32x48 --steps 3 --inner-steps 4".split()


def run_table(capsys, *args):
    code = table1.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, re.sub(r"\r?sampling: .*\n?", "", err)  # without the bars


def read_table(text):
    """{(header of the table, row): {column: text}}."""
    cells = {}
    for part in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line[0] == "|"]
        cells |= {(lines[0][0], row[0]): dict(zip(lines[0], row)) for row in lines[2:]}
    return cells


def test_table_counts_what_each_row_does(tmp_path, capsys):
    # 3 steps of 2 velocities through 4 blocks, the first guided; block 3 is read, so that 2 are run for it.
    counts = {"full method": (2, 24 + 2 * 3, 2 * 2), "w/o step-skip": (4, 24 + 2 * 5, 2 * 4), "no transfer": (0, 24, 0),
              "lambda_window=0, tau=2": (2, 24 + 2 * 3, 2 * 2), "block=2": (2, 24 + 3, 2),
              "no_transfer, tau=2, alpha=0.5": (0, 24, 0), "velocity_interval=3": (2, 16 + 2 * 3, 2 * 2)}  # fmt: skip
    rows = [*counts][1:] + ["interval=3"]  # which is the full method's
    args = [*TABLE, "--tau", "30"]  # or flows of random weights hardly differ
    code, out, err = run_table(capsys, *args, "--out", tmp_path, "--checkpoint", "on", "--rows", *rows)
    assert code == 0 and not err, err
    table = read_table((tmp_path / "table.md").read_text())
    assert out.endswith((tmp_path / "table.md").read_text())
    assert [row for title, row in table if title == "mean"] == list(counts)
    for name, expected in counts.items():
        cells = table["mean", name]
        assert tuple(int(cells[n]) for n in ("gradients", "block forwards", "block backwards")) == expected, name
        total, guidance, denoising = (float(cells[column]) for column in ("total s", "guidance s", "denoising s"))
        assert total == pytest.approx(guidance + denoising, rel=0.01) and guidance > 0 and denoising > 0
    near = "PSNR to every velocity, dB"
    assert [bool(table["mean", name][near]) for name in counts] == [name == "velocity_interval=3" for name in counts]
    full, plain, other = (table["mean", name] for name in ("full method", "no transfer", rows[-3]))
    assert table["minus the full method", "w/o step-skip"]["gradients"] == "2"
    assert float(plain["guidance s"]) < 0.5 * float(full["guidance s"])
    assert [plain[n] == other[n] for n in ("L_AMF", "flow cosine", "entropy")] == [True, True, False]  # measured alike


def test_reused_velocities_are_compared_with_the_same_run_without(monkeypatch):
    """From its first unguided step on, also after an attempt that ran out of memory."""
    args, model = table1.parse_arguments([*TABLE, "--steps", "6", "--shift", "1", "--guided-fraction", "0.4"])
    context, negative, null = model.encode_prompts(["a cat", "blurred", ""]).split(1)
    dit, noise, reference = model.load_dit(), randn(1, 16, 3, 6, 8), randn(1, 16, 3, 6, 8, seed=1)
    inputs = dit, cost.count_passes(dit), noise, reference, (context, negative, null)
    true, attempts = fastvmt.sample, itertools.count()

    def sample(*inputs, **options):
        if next(attempts) == 1:
            options["callback"] = lambda number, *_: number < 2 or run_out()
        return true(*inputs, **options)

    def run_out():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fastvmt, "sample", sample)
    whole, _, _ = table1.run_row(*inputs, args)
    args.velocity_interval = 3
    latents, _, unguided = table1.run_row(*inputs, args)
    assert len(unguided[0]) == 4 and (latents - whole).abs().max() > 0.01
    assert table1.every_velocity(dit, *unguided, inputs[-1], args).equal(whole)
    assert table1.psnr(torch.zeros(3), torch.full((3,), 0.2)) == pytest.approx(20)
    assert table1.psnr(torch.ones(3), torch.full((3,), 3.0)) == pytest.approx(120)  # white is white


def test_rows_reach_the_sampler(tmp_path, capsys, monkeypatch):
    seen, true = [], fastvmt.sample

    def spy(dit, noise, sigmas, *contexts, **options):
        seen.append((sigmas, contexts, options))
        assert noise.equal(randn(*noise.shape, seed=3))
        return true(dit, noise, sigmas, *contexts, **options)

    monkeypatch.setattr(fastvmt, "sample", spy)
    tiled = wan_min.VAE.tiled
    monkeypatch.setattr(wan_min.VAE, "tiled", lambda *args: tiled(*args) if args[4] else pytest.fail("not in tiles"))
    rows = ["window=none, tile=2 4, lr=0.1 0.05", "no_transfer, strength=0.5", "strength=0.5,cfg_scale=1",
            "steps=2, negative_prompt=blurred"]  # fmt: skip
    args = "--strength 0.9 --seed 3 --checkpoint on --vae-tiles --keep-videos --negative-prompt".split()
    assert run_table(capsys, *TABLE, "--out", tmp_path, *args, "", "--rows", *rows)[0] == 0
    assert len(list(tmp_path.glob("*.mp4"))) == 6
    (shown,) = tmp_path.glob("*.gif")
    assert iio.imread(shown).shape == (9, 180 + 24, 6 * 270, 3) and shown.with_suffix(".mp4").exists()  # and five rows
    (_, contexts, full), (_, _, first), (plain, _, none), (start, _, last), (short, others, _) = seen[1:]  # warmed up
    assert first["config"] == dataclasses.replace(full["config"], window=None, tile=(2, 4), lr=(0.1, 0.05))
    assert none["reference"] is None and plain[0] == 1  # from pure noise, whatever the strength
    assert last["reference"] is not None and start.equal(wan_min.flow_sigmas(3, 7.0, 0.5)) and last["cfg_scale"] == 1
    assert len(short) == 3 and full["checkpoint"] is True
    prompt, empty = contexts
    assert full["null"].equal(empty) and not prompt.equal(empty)
    assert others[0].equal(prompt) and not others[1].equal(prompt) and not others[1].equal(empty)
    losses = changes.directions
    assert (
        table1.main([*TABLE, "--out", str(tmp_path / "directions"), *args, "", "--rows", "tau=2"], losses=losses) == 0
    )
    assert seen[-1][2]["losses"] is losses
    for row, word in (("taus=1", "taus"), ("frames=5", "frames"), ("block=9", "block must"), ("seed=1", "seed"),
                      ("tau=x", "tau"), ("compile", "compile"), ("preview", "--mask and --preview are"),
                      ("mask=m.png", "--mask and --preview are")):  # fmt: skip
        code, out, err = run_table(capsys, *TABLE, "--out", tmp_path, "--rows", row)
        assert code == 2 and word in err and err.count("\n") == 1 and "goes on" not in err, err


def test_random_weights_are_no_checkpoints(monkeypatch):
    monkeypatch.setattr(wan_min, "find_checkpoint", None)
    for flags in ("--random-weights", "--dry-run"):
        assert table1.parse_arguments(["--model", "14B", "--device", "cpu", flags])[1].blocks == 40


def test_velocities_of_both_results_are_reused(monkeypatch):
    flags = "--model toy --device cpu --steps 6 --strength 0.9 --velocity-interval 3 --size 96x132"
    args, config, _ = fastvmt.parse_arguments(flags.split())
    asked = []
    monkeypatch.setattr(fastvmt, "reuse_velocities", lambda *found: asked.append(found) or found[0])
    monkeypatch.setattr(fastvmt, "sample", lambda dit, noise, *a, **options: noise)
    assert effect.generate(toy.load(), 5, "pan", args, config)[0].shape == (3, 9, 96, 132)
    assert asked == [(fastvmt.euler_step, [True, True, True, True, False, False])] * 2


def test_the_table_reads_its_clips_as_told(tmp_path):
    refs = [str(write_clip(tmp_path / name, 30, (80, 48))) for name in ("a.mp4", "b.mp4")]
    args = [*TABLE[:2], *"--device cpu --frames 9 --start 0.5 --fps 6 --refs".split(), *refs]
    for more, shape in (([], (112, 64)), (["--size", "64x80"], (64, 80))):  # turned like the reference, if not told
        clips = table1.make_clips(*table1.parse_arguments([*args, "--prompt", "x", *more]))
        assert [clip.name for clip in clips] == refs
        video = clips[1].video()
        assert video.shape == (1, 3, 9, *shape)
        right = (video[0, 0, :, 20:-20, -8:].mean((1, 2)) + 1) * 127.5
        close(right, 60 + 20.0 * torch.arange(9), 4)  # every second frame from the sixth on


def test_a_killed_table_goes_on_and_computes_nothing_twice(tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    args = [*TABLE, "--rows", "w/o window loss", "tau=2", "--prompts", prompts, "--out"]
    true, calls, most = table1.run_row, [], [7]  # the warm-up, then 2 prompts of 3 rows

    def run_row(*inputs):
        calls.append(inputs)
        if len(calls) > most[0]:
            raise KeyboardInterrupt
        return true(*inputs)

    def run(name, *more):
        calls.clear()
        outcome = run_table(capsys, *args, tmp_path / name, *more)
        lines = table1.read_results(tmp_path / name)
        return *outcome, [(line["key"], line["columns"]["L_AMF"]) for line in lines]

    monkeypatch.setattr(table1, "run_row", run_row)
    whole = run("whole")[3]
    assert len(calls) == 7 and len({tuple(key) for key, _ in whole}) == 6
    results, most[0] = tmp_path / "killed" / "results.jsonl", 2
    for done in (1, 2, 3):
        code, _, err, found = run("killed")
        assert code == 130 and "interrupted; the same command goes on" in err and found == whole[:done]
        with results.open("a") as file:
            file.write(results.read_text()[:50])  # a line that it was killed in the middle of
    most[0] = 7
    assert run("killed")[3] == whole and len(calls) == 1 + 3
    monkeypatch.setattr(wan_min, "random_model", None)  # what is on disk needs no model
    assert run("killed")[0] == 0 and not calls
    text = results.read_text().replace(table1.code_hash(), "older")
    results.write_text(text + text[:50])
    code, out, *_ = run("killed", "--table-only")
    assert code == 0 and not calls and "6 results" in out and "another version of the code" in out


def test_tables_numbers_by_hand():
    assert table1.mean_and_error([1.0, 2.0, 4.5]) == "2.5 ± 1.0"  # standard deviation 1.80, over √3
    assert table1.mean_and_error([0.5, math.nan]) == "0.5" and table1.mean_and_error([math.nan]) == ""
    assert table1.mean_and_error([3, 3, 3]) == "3" and table1.mean_and_error([0.1234, 0.1236]) == "0.12350 ± 0.00010"

    def make_rows(*argv):
        args, model = table1.parse_arguments(argv)
        return args, table1.make_rows(argv, args, model.blocks)

    args, rows = make_rows(*TABLE, "--rows", "tau=2")
    full, changed = (table1.settings_hash(row, args) for row in rows.values())
    for change, same in (({"negative_prompt": "y"}, False), ({"preset": "x", "seed": 1}, True)):
        other = argparse.Namespace(**vars(args) | change)
        for pair in ((other, args), (args, other)):  # a row's settings, and those that its flow is measured with
            assert (table1.settings_hash(*pair) == full) == same, change
    blocks = {name: row.block for name, row in make_rows(*TABLE, "--rows", "blocks")[1].items()}
    assert blocks == {"full method": 3, "block 1": 1, "block 2": 2, "block 4": 4}
    ablation = make_rows(*"--model toy --device cpu --rows ablation".split())[1]
    assert len(ablation) == 1 + len(table1.ABLATION)
    paper, toys = ablation["the paper's numbers, clean"], ablation["full method"].config
    kept = {name: getattr(toys, name) for name in ("block", "tile", "window")}
    assert paper.config == dataclasses.replace(fastvmt.MotionConfig(), **kept) and paper.steps == 50
    for name, change in (("matched reference", {"ref_noise": "match"}), ("w/o spatial window", {"window": None}),
                         ("w/o window loss", {"lambda_window": 0})):  # fmt: skip
        assert ablation[name].config == dataclasses.replace(toys, **change)
    lines = [{"key": [row, clip, "x", 0], "columns": {"error": value}} for row, clip, value in (
        (full, "a", 1.0), (full, "b", 5.0), (changed, "a", 1.5), (changed, "b", 6.5), (changed, "c", 9.0),
        ("else", "a", 7.0))]  # fmt: skip
    lines[0]["columns"]["tracks"] = 4
    table = read_table(table1.make_table(lines, rows, args))
    assert table["mean", "full method"] == {"mean": "full method", "n": "2", "error": "3.0 ± 2.0", "tracks": "4"}
    assert table["mean", "tau=2"]["n"] == "3"
    paired = {"minus the full method": "tau=2", "n": "2", "error": "1.00 ± 0.50", "tracks": ""}  # of clips a and b
    assert table["minus the full method", "tau=2"] == paired


def test_table_of_the_toy_and_its_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(effect, "texture_classes", lambda size: "coarse")
    monkeypatch.setattr(effect, "shows", lambda video, prompt, classes: classes in prompt)
    monkeypatch.setattr(toy, "motion_error", lambda video, scene: video.clamp(-1, 1).mean().item() + scene["camera"][2])
    args = "--model toy --device cpu --steps 1 --inner-steps 1 --clips 3 --keep-videos --seed 7 --rows".split()
    assert run_table(capsys, *args, "block 2", "--out", tmp_path)[::2] == (0, "")
    lines = table1.read_results(tmp_path)
    rows = ["full method", "block 2"]
    cases = [("pan", 10007), ("pan", 10008), ("zoom", 10009)]
    assert [(line["key"][1], line["row"]) for line in lines] == [(f"{c} {s}", row) for c, s in cases for row in rows]
    for line in lines:
        camera, seed = line["key"][1].split()
        video, scene, prompt = toy.held_out(int(seed), camera, False)
        assert line["key"][2:] == [prompt, int(seed) - 10000]
        assert line["columns"]["prompt right"] == ("coarse" in prompt)
        written = fastvmt.read_video(str(tmp_path / line["video"]), 9, video.shape[2:])
        error = toy.motion_error(written[0], scene)
        assert line["columns"]["motion error, px a frame"] == pytest.approx(error, abs=0.03)
    assert len({line["video"] for line in lines}) == len(lines)
    parsed, model = table1.parse_arguments([*args, "block 2", "--look-alikes"])
    video, scene, prompt = toy.held_out_lookalike(10009)
    clip = table1.make_clips(parsed, model)[2]
    assert clip[:3] == ("look-alikes 10009", 9, [prompt]) and clip.scene == scene and clip.video()[0].equal(video)
    large = table1.make_clips(*table1.parse_arguments([*args, "block 2", "--size", "96x132"]))
    assert large[0].scene == toy.held_out(10007, "pan", False, toy.LARGE)[1]
    for clip in large:
        assert clip.video().shape == (1, 3, 9, 96, 132)
        assert clip.scene["scale"] == clip.prompts[0].split()[0] == "coarse"


def test_columns_of_real_videos(monkeypatch, capsys):
    def track(tracks):  # in place of a video
        return tracks, torch.ones(tracks.shape[:2])

    monkeypatch.setattr(metrics, "load_cotracker", lambda device: track)
    monkeypatch.setattr(metrics, "load_clip", lambda device: (_ for _ in ()).throw(OSError("no network\nat all")))
    (opened,) = table1.open_metrics("cpu")
    assert capsys.readouterr().out == "CLIP cannot be had, so its columns are left out (no network)\n"
    columns = opened(pan_tracks(1, 2))(pan_tracks(2, 4)[:7], "x")
    assert columns == {"motion fidelity": pytest.approx(1), "track error, px a frame": pytest.approx(5**0.5),
                       "tracks": 7, "frames": 5}  # fmt: skip
    monkeypatch.setattr(metrics, "clip_features", lambda *a: (torch.eye(2), torch.eye(2)[:1]))
    columns = table1.clip_columns(("model", "tokenizer"), None)(None, "x")
    assert columns == {"text similarity": 0.5, "temporal consistency": 0}


# ---- Made clips ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_toy(monkeypatch):
    """So that a canvas of 100x132 is twice the toy's, and the tests are fast."""
    monkeypatch.setattr(toy, "LARGE", toy.SIZE)


def made_clip(motion, seed=0, size=(100, 132), frames=41):
    scene = made.make_scene(motion, seed, size, frames)
    return scene, made.render(scene, seed, size, frames)[0]


def test_made_clips_move_as_they_say_and_are_measured(small_toy):
    clips, looks = {}, set()
    for seed, motion in enumerate(made.MOTIONS):
        scene, video = clips[motion] = made_clip(motion, seed)
        looks.add((scene["scale"], scene["palette"], scene["texture"]))
        assert made.error_columns(video, scene)["motion error, %"] < 2, scene
        assert scene["wavelength"] == 2 * toy.SCALES[scene["scale"]]
    assert len(looks) > 4
    finer = made.render(scene | {"wavelength": scene["wavelength"] / 2}, seed, (100, 132), 41)[0]
    assert 1.6 < finer.diff(dim=2).abs().mean() / video.diff(dim=2).abs().mean() < 2.4
    for motion, (down, right) in {"moves-right": (0, 1), "moves-left": (0, -1),
                                  "moves-down": (1, 0), "moves-up": (-1, 0)}.items():  # fmt: skip
        _, video = clips[motion]
        close(video[:, 5].roll((down, right), (1, 2))[:, 1:-1, 1:-1], video[:, 6, 1:-1, 1:-1], 1e-3)
    for motion, column, total in (("zooms-in", 2, math.log(1.75)), ("zooms-out", 2, -math.log(1.75)),
                                  ("turns-left", 3, 0.7), ("turns-right", 3, -0.7)):  # fmt: skip
        assert clips[motion][0]["camera"][column] == pytest.approx(total / 40), motion


def test_measuring_made_clips_is_not_misled(small_toy):
    scene, video = made_clip("moves-up", 3)
    still = video[:, :1].expand(-1, 41, -1, -1)
    assert made.measure(still).abs().max() < 1e-3
    assert made.error_columns(still, scene) == {"motion error, px a frame": pytest.approx(1, abs=0.01),
                                                "motion error, %": pytest.approx(100, abs=1)}  # fmt: skip
    warm = torch.stack([torch.ones_like(video[0]), *video[1:] - 1])  # what the toy would take for sprites
    assert toy.sprite_weights(warm).min() > 0.9
    assert made.error_columns(warm, scene)["motion error, %"] < 2
    noisy = video + 0.6 * randn(*video.shape)
    assert made.error_columns(noisy, scene)["motion error, %"] < 10


def test_made_clips_are_measured_as_the_toys():
    video, scene, _ = toy.held_out(2, "pan", False)
    for off in ((0.0, 0.0, 0.0, 0.0), (0.6, -0.3, 0.0, 0.0), (0.0, 0.0, 0.02, -0.01)):
        other = scene | {"camera": tuple(a + b for a, b in zip(scene["camera"], off))}
        found = made.error_columns(video, other)["motion error, px a frame"]
        assert found == pytest.approx(toy.motion_error(video, other), abs=0.02), off
    made.make_scene("moves-up", 0, (480, 832), 9)
    with pytest.raises(fastvmt.UserError, match="--frames 9"):  # it would move too fast
        made.make_scene("moves-up", 0, (480, 832), 8)


def test_gifs_of_made_clips_keep_to_their_limit(tmp_path, monkeypatch):
    clips = {name: randn(1, 3, 81, 40, 270, seed=n).clamp(-1, 1) for n, name in enumerate(("reference", "plain"))}
    effect.write_gif(tmp_path / "a.gif", clips, 16)
    pixels = iio.imread(tmp_path / "a.gif")
    assert pixels.shape == (27, 64, 540, 3)  # every third frame
    close(torch.tensor(pixels[1, 24:, :270].mean()) / 127.5 - 1, clips["reference"].mean(), 0.05)
    captions = pixels[:, :24] > 127
    left, right = captions[0, :, :270], captions[0, :, 270:]
    assert left.sum() > 1.3 * right.sum() > 100 and (captions != captions[0]).mean() < 0.01  # "reference" and "plain"
    monkeypatch.setattr(effect, "GIF_BYTES", (tmp_path / "a.gif").stat().st_size // 3)
    effect.write_gif(tmp_path / "b.gif", clips, 16)
    assert (tmp_path / "b.gif").stat().st_size <= effect.GIF_BYTES and len(iio.imread(tmp_path / "b.gif")) == 7
    lengths = []
    for name in "ab":
        with Image.open(tmp_path / f"{name}.gif") as image:
            lengths.append(image.n_frames * image.info["duration"] / 1000)
    assert lengths == pytest.approx([81 / 16] * 2, rel=0.1)


def test_table_of_made_clips_goes_on_and_is_enough_to_paste(tmp_path, capsys, monkeypatch):
    args = "--model tiny --device cpu --frames 12 --size 32x48 --steps 1 --inner-steps 1".split()
    args += [*"--lr 1 1 --made-clips 2 --seed 5 --out".split(), tmp_path]  # or the two results hardly differ
    true, calls, most = table1.run_row, [], [4]  # the warm-up and three results
    monkeypatch.setattr(effect, "GIF_WIDTH", 96)

    def run_row(*inputs):
        calls.append(inputs)
        if len(calls) > most[0]:
            raise KeyboardInterrupt
        return true(*inputs)

    monkeypatch.setattr(table1, "run_row", run_row)
    assert run_table(capsys, *args)[0] == 130
    before = table1.read_results(tmp_path)
    assert len(before) == 3
    most[0] = 99
    code, out, err = run_table(capsys, *args)
    assert (code, err) == (0, "") and len(calls) == 5 + 2  # the last result, warmed up
    lines = table1.read_results(tmp_path)
    assert lines[:3] == before and len(lines) == 4
    keys = [(f"{motion}-{5 + n}", made.PROMPTS[n], 5 + n) for n, motion in enumerate(("moves-right", "zooms-in"))]
    assert [(line["row"], *line["key"][1:]) for line in lines] == [
        (row, *key) for key in keys for row in ("full method", "no transfer")]  # fmt: skip
    for line in lines:
        name, _, seed = line["key"][1:]
        scene = made.make_scene(name.rpartition("-")[0], seed, (32, 48), 9)
        reference, result = (fastvmt.read_video(str(tmp_path / file), 9, (32, 48), fps=16)[0]
                             for file in (f"{name}.mp4", line["video"]))  # fmt: skip
        assert (reference - made.render(scene, seed, (32, 48), 9)[0]).abs().mean() < 0.1
        assert result.shape == (3, 9, 32, 48)
        shown = iio.imread(tmp_path / f"{name}.gif")
        assert shown.shape == (9, 64 + 24, 3 * 96, 3)
        columns = (torch.tensor(shown[:, 24:]) / 127.5 - 1).chunk(3, dim=2)
        for place, file in ((0, f"{name}.mp4"), (2 - (line["row"] == "no transfer"), line["video"])):
            true = fastvmt.read_video(str(tmp_path / file), 9, (64, 96), fps=16)[0].permute(1, 2, 3, 0)
            apart = [(true - column).abs().mean() for column in columns]
            assert apart[place] < 0.1 and apart[place] < 0.6 * min(apart[:place] + apart[place + 1 :]), apart
    text = (tmp_path / "table.md").read_text()
    for part in ("motion error, %", "minus the full method", f"cpu, torch {torch.__version__}",
                 "python -m lab.table1 --model tiny --device cpu"):  # fmt: skip
        assert part in text
    calls.clear()
    (tmp_path / "moves-right-5.gif").unlink()
    code, out, _ = run_table(capsys, *args, "--made-clips", 1, "--table-only")
    assert code == 0 and not calls and (tmp_path / "moves-right-5.gif").exists()
    assert read_table(out)["mean", "full method"]["n"] == "2"  # of however many clips


def test_columns_of_made_clips_are_of_the_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(effect, "texture_classes", lambda size: {})
    measured = []
    monkeypatch.setattr(made, "error_columns", lambda video, scene: measured.append((video, scene)) or dict.fromkeys(
        ("motion error, px a frame", "motion error, %"), float(len(measured))))  # fmt: skip
    monkeypatch.setattr(table1, "every_velocity", None)  # would cost as many passes as are left out
    args = "--model toy --device cpu --steps 3 --velocity-interval 2 --inner-steps 1 --made-clips 1 --out".split()
    assert run_table(capsys, *args, tmp_path)[0] == 0
    for (video, scene), line in zip(measured, table1.read_results(tmp_path)):
        assert scene == made.make_scene("moves-right", 0, toy.SIZE, 9)
        close(fastvmt.read_video(str(tmp_path / line["video"]), 9, toy.SIZE, fps=8)[0], video.clamp(-1, 1), 0.6)
        known, unknown = toy.known_words(line["key"][2])
        assert len(known) == 3 and not unknown  # not the prompts of real scenes
    parsed, model = table1.parse_arguments([*args, str(tmp_path), "--made-clips", "9", "--prompt", "red"])
    clips = table1.make_clips(parsed, model)
    assert len({clip.name for clip in clips}) == 9 and clips[8].name == "moves-right-8"
    assert all(clip.prompts == ["red"] for clip in clips)


def test_cost_counts_attention_and_live_memory():
    with torch.enable_grad():
        q, k, v = (randn(1, 2, 64, 16, seed=n).requires_grad_() for n in range(3))
        with cost.Cost([q, k, v]) as forward:
            out = F.scaled_dot_product_attention(q, k, v)
        product = 2 * 2 * 64 * 64 * 16
        assert forward.flops == 2 * product and forward.peak >= 4 * out.nbytes
        with cost.Cost() as backward:
            out.sum().backward()
    assert backward.flops == 5 * product  # QKᵀ once more
    with cost.Cost([q]) as memory:
        for _ in range(3):
            x = torch.zeros(1000)
            y = x.view(10, 100)[0].add(1)  # a view takes nothing
            del x, y
        torch.empty(10**6, device="meta")  # in host memory
    assert memory.peak == q.nbytes + 4400 and memory.live == q.nbytes
    assert not 0 < cost.peak_memory("cpu") < 2**26


def test_dry_run_and_bench(capsys, monkeypatch):
    args = "--model tiny --device cpu --frames 5 --size 32x48 --cfg-scale 1 --steps 10 --guided-fraction 0.3".split()
    parsed, model = table1.parse_arguments([*args, "--dtype", "fp32"])
    matched, _ = table1.parse_arguments([*args, "--ref-noise", "match"])
    assert cost.run_counts(matched)["reference pass"] == 3
    flops, peaks = counted = cost.count(parsed, model)
    blocks = []
    monkeypatch.setattr(cost, "count", lambda args, model: blocks.append(args.config.block) or counted)
    code, out, err = run_table(capsys, *args, "--dry-run", "--rows", "ref_noise=match, interval=1",
                               "no_transfer, velocity_interval=3", "block=2", "window=2")  # fmt: skip
    assert code == 0 and not err, err
    assert blocks == [3, 2, 3]  # what differs in what it computes is counted anew
    parsed.frames = 8
    assert [shape[2] for shape in cost.latent_shape(parsed, model)] == [5, 2]
    tables = read_table(out)
    table = {row: list(cells.values()) for (title, row), cells in tables.items() if not title}
    assert [cells[1] for cells in table.values()] == ["1", "1", "12", "12", "10", "1"]
    tokens, dim, ffn = 2 * 2 * 3, 96, 192
    attention, context = 2 * 2 * tokens * (tokens + 512) * dim, 2 * 512 * 2 * dim * dim
    linear = 2 * tokens * dim * (6 * dim + 2 * ffn)
    embedded = 2 * 512 * dim * (64 + dim) + 2 * 2 * tokens * dim * 64 + 2 * dim * (32 + dim + 6 * dim)
    assert flops["velocity"][0] == 4 * (attention + context + linear) + embedded
    # Block 3 is read, so two blocks run forward and, of latents alone, backward.
    backward = flops["gradient"][0] - flops["reference pass"][0]
    assert backward == pytest.approx(2 * (2.5 * attention + linear), rel=0.1)
    assert flops["gradient"][1] - flops["gradient"][0] == pytest.approx(2 * (attention + context + linear), rel=0.1)
    name = {phase: flops[phase][0] for phase in flops}
    rows = {"full method": (12, 1, 10), "ref_noise=match, interval=1": (30, 3, 10),
            "no_transfer, velocity_interval=3": (0, 0, 6)}  # fmt: skip
    # The release recomputes blocks 1 to 3 and, within each, queries, keys, values and their attention.
    block = attention + context + linear
    again = 3 * (block + name["self-attention"])
    assert name["self-attention"] == 4 * tokens * tokens * dim + 3 * 2 * tokens * dim * dim
    whole = []
    for row, (gradients, references, velocities) in rows.items():
        guidance = gradients * name["gradient"] + references * name["reference pass"]
        denoising, rest = velocities * name["velocity"], name["velocity"] - name["reference pass"]
        whole.append(guidance + denoising + name["encode"] + name["decode"])
        hooked = whole[-1] + (gradients + references) * rest
        release = hooked + gradients * again
        unit = whole[0] / 1e15
        true = [guidance, denoising, *(x for total in (whole[-1], hooked, release) for x in (total, total / unit))]
        cells = [float(text) for text in list(tables["run, PFLOP", row].values())[1:]]
        assert cells == pytest.approx([x / 1e15 for x in true], rel=0.006), row
    (*_, line) = cost.dry_run(parsed, model._replace(blocks=22), {"": parsed})  # the release runs 20 of them
    release = whole[0] + 13 * (name["velocity"] - name["reference pass"] - 2 * block) + 12 * again
    assert float(line.split("|")[-3]) == pytest.approx(release / 1e15, rel=0.006)
    stored, recomputed, offloaded = peaks["gradient"]
    dit = wan_min.random_model(wan_min.DiT, wan_min.ARCHITECTURES["tiny"][0])
    block = sum(p.nbytes for p in dit.blocks[0].parameters())
    assert stored > recomputed and 2 * block <= recomputed - offloaded < 4 * block  # two of four are there at most
    seconds = itertools.count()
    monkeypatch.setattr(cost, "clock", lambda device: next(seconds) ** 2)  # each run takes 4 s longer than the last
    code, out, err = run_table(capsys, *args, "--bench", "--checkpoint", "on", "--peak-tflops", "100")
    assert code == 0 and not err, err
    rows = {row: {n: float(x.strip("%")) for n, x in cells.items() if n} for (_, row), cells in read_table(out).items()}
    assert set(rows) == set(table) and [cells["s"] for cells in rows.values()] == [1, 9, 17, 25, 33, 41]
    assert rows["gradient"]["TFLOP"] == pytest.approx(flops["gradient"][1] / 1e12, rel=0.006)
    for cells in rows.values():
        assert cells["TFLOP/s"] == pytest.approx(cells["TFLOP"] / cells["s"], rel=0.01) and cells["of the peak"] == 0
    assert f"A run: guidance {17 + 12 * 25} s, denoising {10 * 41} s." in out
    assert not any(x in y for x, y in itertools.combinations(cost.PEAK_TFLOPS, 2))  # the first that fits a card counts
    monkeypatch.undo()
    assert run_table(capsys, "--model", "toy", "--bench")[:2] == (2, "")


def test_coarse_passes_cost_what_they_do_at_half_the_size(capsys):
    args = "--model tiny --device cpu --frames 5 --cfg-scale 1 --steps 10 --guided-fraction 0.3 --coarse 0.6".split()
    large, model = table1.parse_arguments([*args, "--size", "64x96", "--ref-noise", "match"])
    flops, peaks = cost.count(large, model)
    small, small_peaks = cost.count(table1.parse_arguments([*args, "--size", "32x48", "--coarse", "0"])[0], model)
    counts = {"coarse reference pass": 2, "coarse gradient": 8, "reference pass": 1, "gradient": 4}  # of 3 steps
    for phase, times in counts.items():
        assert cost.run_counts(large)[phase] == times
        if "coarse" in phase:
            assert flops[phase] == small[phase[7:]] and peaks[phase][0] < 1.1 * small_peaks[phase[7:]][0], phase
    command = [*args, "--size", "64x96", "--ref-noise", "match", "--dry-run", "--rows"]
    code, out, err = run_table(capsys, *command, "coarse=0")
    assert code == 0 and not err, err
    tables = read_table(out)
    assert [cells["times"] for (title, _), cells in tables.items() if not title] == list("128144") + ["10", "1"]
    guidance = sum(flops[phase][0] * times for phase, times in counts.items()) / 1e15
    rest = (10 * flops["velocity"][0] + flops["encode"][0] + flops["decode"][0]) / 1e15
    hooked = 5 * (flops["velocity"][0] - flops["reference pass"][0]) / 1e15  # passes that the pipeline of others has
    cells = tables["run, PFLOP", "full method"]
    for column, true in (("guidance", guidance), ("all", guidance + rest), ("whole passes", guidance + rest + hooked)):
        assert float(cells[column]) == pytest.approx(true, rel=0.006), column
    fine = (12 * flops["gradient"][0] + 3 * flops["reference pass"][0]) / 1e15
    assert float(tables["run, PFLOP", "coarse=0"]["guidance"]) == pytest.approx(fine, rel=0.006)
    _, out, _ = run_table(capsys, *command, "coarse=0.6", "--coarse", "0")
    assert read_table(out)["run, PFLOP", "coarse=0.6"]["guidance"] == cells["guidance"]


def test_frontier_prices_and_draws_each_setting(tmp_path, capsys, monkeypatch):
    phases = ("encode", "decode", "reference pass", "gradient", "velocity", "coarse reference pass", "coarse gradient",
              "of it AMF, losses, optimizer")  # fmt: skip
    flops = {phase: [10**15 * n] for n, phase in enumerate(phases, 1)}
    asked = []

    def compute(rows, clips, args, model):
        asked.append((args, rows))
        lines = [{"key": [table1.settings_hash(row, args), f"clip {n}", "x", 0], "columns": {frontier.COLUMN: error},
                  "code": ""}
                 for name, errors in (("full method", (0.5, 1.5, 9.0)), ("preset fast", (2.0, 2.0)))
                 for n, error in enumerate(errors) for row in [rows[name]]]  # fmt: skip
        (args.out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    pytest.importorskip("matplotlib")
    real, drawn = frontier.draw, []
    monkeypatch.setattr(frontier, "draw", lambda points: drawn.append(real(points)) or drawn[-1])
    monkeypatch.setattr(frontier, "prices", lambda: flops)
    monkeypatch.setattr(table1, "compute", compute)
    assert frontier.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    ((args, rows),) = asked
    assert args.size == toy.LARGE and args.clips == 24 and len(rows) == 1 + len(frontier.ROWS)
    # 13 of 25 steps are guided, by 5 gradients each; of fast, 6 by a coarse one and 7 by one; then 4 of 12 velocities.
    full, fast = 1 + 2 + 3 + 65 * 4 + 50 * 5, 1 + 2 + 6 + 6 * 7 + 3 + 7 * 4 + 34 * 5
    table = read_table(capsys.readouterr().out.strip())
    assert table["", "full method"] == {
        "": "full method",
        "PFLOP": f"{full}.0",
        "error, px a frame": "1.00 ± 0.50",
        "clips": "2",
    }
    assert table["", "preset fast"]["PFLOP"] == f"{fast}.0" and [title for title, _ in table].count("") == 2
    (figure,) = drawn
    (axes,) = figure.axes
    for bars, label, number, (x, y, spread, color) in zip(axes.containers, figure.legends[0].texts, axes.texts, (
            (full, 1.0, 0.5, "navy"), (fast, 2.0, 0.0, "darkorange"))):  # fmt: skip
        point, _, (bar,) = bars.lines
        assert point.get_xydata().tolist() == [[x, y]] and point.get_color() == number.get_color() == color
        assert bar.get_segments()[0].tolist() == [[x, y - spread], [x, y + spread]] and number.xy == (x, y)
        assert label.get_text().startswith(f"{number.get_text()}  ") and f"{x}.0 PFLOP" in label.get_text()
    assert [text.get_text() for text in axes.texts] == ["1", "2"] and "preset fast" in label.get_text()
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0 and Image.open(tmp_path / "frontier.png").width == 1160
    assert frontier.measure([], rows, args, flops) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert frontier.main(["--out", str(tmp_path), "--device", "cpu", "--table-only"]) == 2
    out, err = capsys.readouterr()
    assert "preset fast" in out and err.startswith("lab.table1: ") and "matplotlib" in err and err.count("\n") == 1


def test_flow_agreement():
    ref = torch.zeros(1, 2, 3, 2)
    ref[0, 0] = torch.tensor([0.0, 2.0])
    gen = torch.full((1, 2, 3, 2), 9.0)  # where the reference rests, it does not count
    gen[0, 0] = torch.tensor([[0.0, 3.0], [0.0, -2.0], [2.0, 0.0]])
    cosine, error = metrics.flow_agreement(ref, gen)
    assert cosine == pytest.approx(0) and error == pytest.approx((1 + 4 + 8**0.5) / 3)
    assert metrics.flow_agreement(ref, ref) == pytest.approx((1, 0))
    assert math.isnan(metrics.flow_agreement(gen * 0, gen)[0])


def test_entropy_of_attention_in_shares_of_uniform():
    Q, K = torch.zeros(3, 2, 4, 5), torch.zeros(3, 2, 4, 5)
    Q[..., 0] = 40

    def entropy(**options):
        return metrics.attention_entropy(Q, K, fastvmt.MotionConfig(span=1, **options)).item()

    for window in (None, 2):
        assert entropy(window=window) == pytest.approx(1)  # all keys are alike
    K[..., 0], K[:, 1, 2, 0] = -9, 1
    assert entropy(window=None) == pytest.approx(0, abs=1e-6)  # one key has all attention, the others 0
    K[:, 0, 3, 0] = 1
    assert entropy(window=None) == pytest.approx(math.log(2) / math.log(8))  # two of eight
    assert entropy(window=2, center="argmax", tile=(2, 4)) == pytest.approx(0.5)  # two of four
    assert entropy(window=1) == 0
    K[:, 0, 3, 0] = 0.9  # τ sharpens
    assert entropy(window=None, tau=2.0) < entropy(window=None, tau=1.0) - 0.05


# ---- Changes of the method -------------------------------------------------------------------------------------------


def test_changes_run_and_change_the_result():
    model = wan_min.open_model("tiny")
    reference = randn(1, 16, 5, 8, 14)
    context, negative, null = model.encode_prompts(["a", "", "b"]).split(1)
    dit, config = model.load_dit(), fastvmt.MotionConfig(block=3, window=3, tau=9.0)
    options = [{}, *({seam: change} for seam, found in changes.CHANGES.items() for change in found)]
    results = []
    for change in options:
        torch.manual_seed(0)
        results.append(fastvmt.sample(dit, randn(1, 16, 5, 8, 14, seed=1), wan_min.flow_sigmas(2), context, negative,
                                      reference=reference, null=null, config=config, **change))  # fmt: skip
    assert len(results) == 8 and all(x.isfinite().all() for x in results)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(results, 2))


def test_changes_do_what_they_say():
    config = fastvmt.MotionConfig(block=1, span=2, window=5, tile=(2, 2), tau=4.0)
    flow_ref, flow_gen = randn(5, 6, 8, 2), randn(5, 6, 8, 2, seed=1)  # of 4 frames

    def loss(change, gen, ref=flow_ref):
        return change((ref, None), (gen, None), num_frames=4, config=config)[0].item()

    inside, outside = flow_gen.clone(), flow_gen.clone()
    inside[:, 2:, 3:] += 1
    outside[:, :2] += 1
    assert loss(changes.directions, 3 * flow_ref) == pytest.approx(0, abs=1e-6)
    assert loss(changes.directions, -flow_ref) == pytest.approx(2)
    moving = torch.zeros(5, 6, 8, 2)
    moving[:, 0, 0] = 10.0
    errors = [moving.clone(), moving.clone()]
    errors[0][:, 0, 0] += 1  # where the reference moves
    errors[1][:, 5, 5] += 1
    ratio = loss(changes.by_speed, errors[0], moving) / loss(changes.by_speed, errors[1], moving)
    assert ratio == pytest.approx((200**0.5 + 0.1) / 0.1)

    class Heads:  # a texture that moves a column a frame; of two heads one sees it louder
        patch_size = (1, 1, 1)

        def qk(self, x, t, context, block):
            assert t == 500
            tokens = moving_texture(4, (6, 8), (0, block), scale=6.0).flatten(0, 2)
            return [torch.stack([tokens, tokens / 2], dim=1)[None]] * 2

    x = torch.zeros(1, 1, 4, 6, 8)
    inner = (slice(None), slice(1, -1), slice(2, -4))
    true = fastvmt.motion_features(Heads(), x, 0.5, None, config)
    for a, b in zip(changes.three_best(Heads(), x, 0.5, None, config), true):
        assert a.shape == b.shape
    flow, key_mean = changes.three_best(Heads(), x, 0.5, None, config)
    close(flow[inner], true[0][inner], 0.1)
    K = 0.75 * moving_texture(4, (6, 8), (0, 1), scale=6.0)  # the heads' mean
    for p, (i, j) in enumerate(fastvmt.list_pairs(4, 2)):
        for n, query in enumerate(fastvmt.tile_queries(K, (2, 2))[i]):
            scores = (K[j] @ query).flatten().tolist()
            best = sorted(range(48), key=lambda token: -scores[token])[:3]
            top = min(max(round(sum(token // 8 for token in best) / 3) - 2, 0), 1)
            left = min(max(round(sum(token % 8 for token in best) / 3) - 2, 0), 3)
            close(key_mean[p, n], K[j, top : top + 5, left : left + 5].mean((0, 1)), 1e-5)
    flow, key_mean = changes.per_head(Heads(), x, 0.5, None, config)
    texture = moving_texture(4, (6, 8), (0, 1), scale=6.0)
    for head, loudness in enumerate((1, 0.5)):
        alone = fastvmt.attention_motion_flow(*[texture * loudness] * 2, span=2, window=5, tile=(2, 2), tau=4.0)
        close(flow[:, 6 * head : 6 * head + 6], alone[0], 1e-5)
        close(key_mean[:, 12 * head : 12 * head + 12], alone[1], 1e-5)
    flow, key_mean = changes.several_blocks(Heads(), x, 0.5, None, dataclasses.replace(config, block=2))
    assert flow[:, 6:][inner][0, ..., 1].mean() > flow[:, :6][inner][0, ..., 1].mean() + 0.5  # two columns, and one

    def solve(step, steps):  # dx/dσ = x from 1 to 0
        x = torch.ones((), dtype=torch.float64)
        for n in range(steps, 0, -1):
            x = step(lambda x, sigma: x, x, n / steps, (n - 1) / steps)
        return abs(x.item() - math.exp(-1))

    assert 3 < solve(changes.heun, 16) / solve(changes.heun, 32) < 5
    assert 1.5 < solve(fastvmt.euler_step, 16) / solve(fastvmt.euler_step, 32) < 2.5
    clean = randn(100_000)
    x = changes.ancestral(lambda x, sigma: (x - clean) / sigma, randn(100_000, seed=1), 0.8, 0.6)
    rest = x - 0.4 * clean
    assert abs(rest.std() - 0.6) < 0.01 and abs((rest * clean).mean()) < 0.01
