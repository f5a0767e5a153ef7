# SPDX-License-Identifier: Apache-2.0
"""Tests of --mask, --preview and of what a run tells of its progress."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import fastvmt
import wan_min
from fastvmt import MotionConfig, UserError
from lab import effect, extras, toy

HERE = Path(fastvmt.__file__).parent

DEMO = ["--model", "tiny", "--prompt", "a red fox", "--ref", "demo", "--size", "32x48", "--frames", "9",
        "--steps", "6", "--device", "cpu", "--guided-fraction", "0.3", "--inner-steps", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save_picture(path, light, mode="L"):
    """A picture of light (H, W) in [0, 1]."""
    Path(path).parent.mkdir(exist_ok=True)
    Image.fromarray((np.asarray(light) * 255).round().astype(np.uint8)).convert(mode).save(path)


def left_half(rows=32, cols=48):
    light = np.zeros((rows, cols))
    light[:, : cols // 2] = 1
    return light


# ---- Mask ------------------------------------------------------------------------------------------------------------


def test_a_masks_picture_video_or_folder_is_read_like_the_reference():
    video, left = torch.zeros(1, 3, 9, 32, 48), torch.from_numpy(left_half()).float().expand(1, 9, -1, -1)
    save_picture("m.png", left_half(64, 96))  # covers the size
    wide = np.zeros((64, 200))
    wide[:, :100] = wide[:, 190:] = 1
    save_picture("m.jpg", wide, "RGB")  # what lies beyond is cut
    clear = Image.fromarray(np.full((32, 48, 4), 255, np.uint8))
    clear.putalpha(Image.fromarray((left_half() * 255).astype(np.uint8)))
    clear.save("clear.png")  # what is transparent does not count
    for name, near in (("m.png", 0.02), ("m.jpg", 0.05), ("clear.png", 1e-6)):
        found = extras.read_mask(name, video, 16.0, 3.0)  # a picture is there at any time
        assert found.shape == left.shape and found.dtype == torch.float32
        inner = (found - left)[..., [*range(22), *range(26, 48)]]  # but for the resampled edge
        assert inner.abs().max() < near, name
    for n in range(12):
        save_picture(f"moving/{n}.png", np.full((32, 48), n / 12))
    found = extras.read_mask("moving", video, 16.0, 2 / 16)[0, :, 5, 5]
    assert torch.allclose(found, torch.arange(2, 11) / 12, atol=3e-3)
    Path("clear").mkdir()
    for n in range(9):
        clear.save(f"clear/{n}.png")
    still = extras.read_mask("clear.png", video, 16.0, 0.0)
    assert torch.equal(extras.read_mask("clear", video, 16.0, 0.0), still)
    Image.fromarray(np.full((32, 48), 32896, np.uint16)).save("deep.png")  # 16 bits
    assert (extras.read_mask("deep.png", video, 16.0, 0.0) - 0.5).abs().max() < 0.01
    Image.open("m.png").save("m.gif")  # of one frame
    assert (extras.read_mask("m.gif", video, 16.0, 1.0) - left)[..., [*range(22), *range(26, 48)]].abs().max() < 0.02
    images = [Image.fromarray(np.full((32, 48), 20 * n, np.uint8)) for n in range(12)]
    images[0].save("moving.gif", save_all=True, append_images=images[1:], duration=100)
    found = 255 * extras.read_mask("moving.gif", video, 10.0, 0.0)[0, :, 5, 5]
    assert torch.allclose(found, 20.0 * torch.arange(9), atol=4)
    fastvmt.write_video("m.mp4", 2 * left[:, None].expand(-1, 3, -1, -1, -1) - 1, 16.0)
    assert (extras.read_mask("m.mp4", video, 16.0, 0.0) - left).abs()[..., [*range(20), *range(28, 48)]].max() < 0.06


@pytest.mark.parametrize("name, start, message", [
    ("none.png", 0, "cannot read none.png"), ("text.png", 0, "cannot read text.png"),
    ("folder", 4 / 16, "the mask folder has 6 frames, the reference 9"),
    ("folder", 2.0, "the mask folder has 0 frames"),
])  # fmt: skip
def test_a_mask_that_says_nothing_is_refused(name, start, message):
    Path("text.png").write_text("no picture")
    for n in range(10):
        save_picture(f"folder/{n}.png", left_half())
    with pytest.raises(UserError, match=message):
        extras.read_mask(name, torch.zeros(1, 3, 9, 32, 48), 16.0, start)


def test_latents_frames_are_pooled_as_the_vae_sees_them():
    """Of 4k+1 frames the first is one latent frame and each next four another; as many latents as frames stay."""
    video = torch.arange(9.0).view(1, 9, 1, 1).expand(-1, -1, 4, 6)
    assert extras.pool_frames(video, (3, 2, 3))[0, :, 1, 2].tolist() == [0, 2.5, 6.5]
    assert torch.equal(extras.pool_frames(video, (9, 4, 6)), video)


def test_the_loss_sees_only_what_the_mask_shows():
    """Two motions: the left half's flow is wrong by 1, the right half's by 2 tokens."""
    config, num_frames = MotionConfig(span=2, lambda_amf=5.0, lambda_window=3.0), 3
    left = torch.zeros(1, 9, 32, 48)
    left[..., :24] = 1
    reference, key_mean = torch.zeros(1, 16, 3, 8, 12), randn(3, 6, 8)  # anchors 0, 1, 0

    def loss(mask, grid=(4, 6)):
        flow_ref, wrong = randn(3, *grid, 2), torch.zeros(3, *grid, 2)
        wrong[:, :, : grid[1] // 2, 0], wrong[:, :, grid[1] // 2 :, 0] = 1, 2
        losses = extras.mask_losses(mask, reference)
        return losses((flow_ref, None), (flow_ref + wrong, key_mean), num_frames=num_frames, config=config)

    # The pairs at distance 2 count 1 − α: (2 + 0.8) / 3 of the mean.
    decay = (2 + 0.8) / 3
    for grid in ((4, 6), (2, 4)):  # latents that are pooled have fewer tokens
        assert loss(left, grid)[1].item() == pytest.approx(1 * decay, abs=1e-5)
        assert loss(1 - left, grid)[1].item() == pytest.approx(4 * decay, abs=1e-5)
        assert loss(torch.ones_like(left), grid)[1].item() == pytest.approx(2.5 * decay, abs=1e-5)
    total, amf, window = loss(left)
    assert total.item() == pytest.approx((5 * amf + 3 * window).item())
    assert window == fastvmt.window_loss(key_mean, num_frames=num_frames, span=2)
    last = torch.zeros(1, 9, 32, 48)
    last[:, 5:] = 1  # the last latent frame is no anchor
    for black in (last, torch.zeros(1, 9, 32, 48)):
        with pytest.raises(UserError, match="black"):
            loss(black)
    moving = torch.zeros(1, 9, 32, 48)  # white on the left in the first latent frame, on the right in the second
    moving[:, 0, :, :24], moving[:, 1:5, :, 24:] = 1, 1
    assert loss(moving)[1].item() == pytest.approx((1 + 4 + 0.8 * 1) / 3, abs=1e-5)  # anchors 0, 1, 0


def test_masks_of_the_toy_are_its_sprite_and_all_but_it(monkeypatch):
    """Which masks, and the table's means and paired differences: each result's errors are its place in the order."""
    asked, results = [], []
    args, config, _ = fastvmt.parse_arguments("--model toy --device cpu".split())
    monkeypatch.setattr(extras, "mask_losses", lambda mask, reference: asked.append(mask) or len(asked))

    def generate(args, config, dit, noise, contexts, reference, losses=None):
        results.append((reference is not None, losses))
        return noise

    monkeypatch.setattr(fastvmt, "generate", generate)
    monkeypatch.setattr(effect, "component_error", lambda *_: len(results) * 1.0)
    title, *rows = effect.masks(None, args, config, 2, 78300)
    assert results == [
        (False, None),
        (True, None),
        (True, 1),
        (True, 2),
        (False, None),
        (True, None),
        (True, 3),
        (True, 4),
    ]
    video, scene, _ = toy.held_out(78300, "pan", True)
    assert asked[0].shape == (1, 9, 48, 66) and torch.equal(asked[0] + asked[1], torch.ones(1, 9, 48, 66))
    row, col = (round(x + side / 2) for x, side in zip(scene["place"], (48, 66)))
    assert asked[0][0, 4, row, col] > 0.9 or scene["shape"] == "ring"
    # Of both clips 1, 2, 3, 4 and 5, 6, 7, 8: the differences to no mask are -1, 0, 1 and 2.
    cells = [row.split(" | ")[1] for row in rows]
    assert cells == [f"{mean}.00 ± 2.00 ({change:+}.00 ± 0.00)" for mean, change in ((3, -1), (4, 0), (5, 1), (6, 2))]
    assert title.startswith("| 2 clips | background")


# ---- Preview ---------------------------------------------------------------------------------------------------------


def test_colors_of_latents_are_fitted_to_the_reference():
    """The toy's latents are its pixels, so the fit is near exact, also of latents that it has not seen."""
    video, other = randn(1, 3, 9, 48, 66), toy.held_out(78301)[0][None]
    colors = extras.fit_colors(toy.encode(video), video)
    found = extras.latent_columns(toy.encode(other)) @ colors
    small = torch.nn.functional.avg_pool3d(other, (1, 2, 2))
    assert (found - small[0].movedim(0, -1)).abs().max() < 0.02
    black = extras.fit_colors(toy.encode(video.mean(1, keepdim=True).expand(-1, 3, -1, -1, -1)), video)
    assert black.abs().max() < 1  # a grey reference's latents say little of colours, and that little is not blown up


def test_a_preview_is_a_moving_picture_written_whole(capsys, monkeypatch):
    video = toy.held_out(78300)[0][None]
    reference = toy.encode(video)
    watch = extras.open_preview(Path("out.preview.gif"), reference, video, 8.0)
    watch(reference)
    gif = Image.open("out.preview.gif")
    assert gif.n_frames == 9 and gif.size == (330, 240) and gif.info["duration"] == 120 and gif.info["loop"] == 0
    for frame, true in zip(ImageSequence.Iterator(gif), video[0].movedim(0, -1)):
        near = Image.fromarray(((true + 1) * 127.5).byte().numpy()).resize((330, 240))
        difference = np.asarray(frame.convert("RGB"), float) - np.asarray(near, float)
        assert np.abs(difference).mean() < 12
    before = Path("out.preview.gif").read_bytes()

    def fail(*args, **options):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    for _ in range(2):
        watch(-reference)  # the run goes on, with the one before
    assert capsys.readouterr().out == "no preview in out.preview.gif (No space left on device)\n"  # said once
    assert Path("out.preview.gif").read_bytes() == before and os.listdir() == ["out.preview.gif"]


# ---- A run -----------------------------------------------------------------------------------------------------------


def test_mask_and_preview_from_the_command_line(capsys, monkeypatch):
    written, masks = [], []
    write_gif, mask_losses = extras.write_gif, extras.mask_losses
    monkeypatch.setattr(extras, "write_gif", lambda path, *args: written.append(str(path)) or write_gif(path, *args))
    monkeypatch.setattr(extras, "mask_losses", lambda *args: masks.append(args[0]) or mask_losses(*args))
    save_picture("m.png", left_half())
    for flags in ([], ["--mask", "m.png"], ["--preview"], ["--preview", "--no-transfer", "--steps", "11"]):
        assert fastvmt.main([*DEMO, *flags]) == 0, capsys.readouterr()
    assert len(masks) == 1 and torch.equal(masks[0][0, 8], torch.from_numpy(left_half()).float())
    # After both guided steps and every fifth: 1, 2 and 5 of 6; 5 and 10 of 11.
    assert written == ["out.preview.gif"] * 5 and Image.open("out.preview.gif").n_frames == 3
    capsys.readouterr()
    for flags, message in ((["--mask", "none.png"], "cannot read none.png"),
                           (["--mask", "m.png", "--no-transfer"], "exclude each other")):  # fmt: skip
        command = [sys.executable, HERE / "fastvmt.py", *DEMO, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stdout == ""  # before expensive work
    args, _, _ = fastvmt.parse_arguments([*DEMO, "--mask", "m.png"])
    assert args.mask == Path("m.png")  # so the mp4's comment has its name alone, like the output's


def test_the_clean_estimate_is_that_of_the_velocity():
    """x̂₀ = x − σ·v, of the x that guidance leaves."""
    model = wan_min.open_model("tiny")
    context, negative, null = model.encode_prompts(["a", "b", ""]).split(1)
    noise, reference, sigmas = randn(1, 16, 3, 4, 6), randn(1, 16, 3, 4, 6, seed=1), torch.tensor([0.9, 0.6, 0.0])
    config, seen, asked = MotionConfig(block=2, window=3, inner_steps=1, guided_fraction=0.5), [], []

    def step(velocity, x, sigma, next_sigma):
        asked.append(x - sigma * velocity(x, sigma))
        return fastvmt.euler_step(velocity, x, sigma, next_sigma)

    fastvmt.sample(model.load_dit(), noise, sigmas, context, negative, reference=reference, null=null, config=config,
                   step=step, callback=lambda *args: seen.append(args[3]))  # fmt: skip
    assert all(torch.allclose(found, clean, atol=1e-4) for found, clean in zip(seen, asked)) and len(seen) == 2
    assert torch.allclose(seen[1], asked[1])


@pytest.mark.parametrize("cfg_scale, coarse, transfer", [(5.0, 0.0, True), (5.0, 0.5, True), (1.0, 0.0, False)])
def test_progress_counts_what_steps_cost(capsys, monkeypatch, cfg_scale, coarse, transfer):
    """In passes of the DiT: a gradient of 2 of 4 blocks takes as long as 1.5, a coarse one a seventh of that."""
    places = []

    class Bar:
        def __init__(self, total, **options):
            places.append(total)
            self.n = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def set_postfix(self, shown, refresh):
            self.shown = shown

        def update(self, more):
            self.n += more
            places.append((self.n, self.shown["step"], "loss" in self.shown))

    flags = f"--block 2 --inner-steps 4 --interval 2 --velocity-interval 3 --cfg-scale {cfg_scale} --coarse {coarse}"
    args, config, model = fastvmt.parse_arguments([*DEMO, *flags.split()])
    dit, calls, passed = model.load_dit(), [], []
    dit.register_forward_hook(lambda *_: calls.append(1))
    contexts = model.encode_prompts(["a", "b", ""]).split(1)
    noise, reference = randn(1, 16, 3, 8, 12), randn(1, 16, 3, 8, 12, seed=1) if transfer else None
    monkeypatch.setattr(fastvmt, "tqdm", Bar)
    qk = dit.qk
    monkeypatch.setattr(dit, "qk", lambda x, *args, **kwargs: passed.append(x.requires_grad) or qk(x, *args, **kwargs))
    fastvmt.generate(args, config, dit, noise, contexts, reference)
    total, *seen = places
    one = 2 if cfg_scale > 1 else 1
    guided = [2 * 1.5 * (1 / 7 if coarse else 1), 2 * 1.5] if transfer else [0, 0]
    costs = [one + guided[0], one + guided[1], one, 0, 0, one]
    assert total == pytest.approx(sum(costs))
    assert [n for n, *_ in seen] == pytest.approx([sum(costs[: n + 1]) for n in range(6)])
    assert [step for _, step, _ in seen] == [f"{n}/6" for n in range(1, 7)]
    assert [loss for *_, loss in seen] == [transfer] * 2 + [False] * 4
    out = capsys.readouterr().out
    assert f"6 steps, {4 * one} passes" in out and len(calls) == 4 * one
    assert ("; 1 to 2 guided, σ 1.000 to 0.972, gradients: 4" in out) == transfer and passed.count(True) == 4 * transfer
