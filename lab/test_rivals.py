# SPDX-License-Identifier: Apache-2.0
"""Tests of the rivals: their losses against slow loops, what they reach and cost, and their rows of Table 1."""

import argparse
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

import fastvmt
import wan_min
from lab import cost, rivals, table1
from lab.test_lab import TABLE, read_table, run_table
from test_fastvmt import close, randn

GRID, HEADS, SHAPE = (3, 4, 6), 4, (1, 16, 3, 8, 12)
CONFIG = fastvmt.MotionConfig(block=3, tau=20.0)
ARGS = argparse.Namespace(cfg_scale=3.0)
POSITIONS = [*itertools.product(*map(range, GRID))]  # (frame, row, column) of each token, in their order


@pytest.fixture(scope="module")
def dit():
    return wan_min.random_model(wan_min.DiT, wan_min.ARCHITECTURES["tiny"][0])


def contexts(n):
    return randn(1, 8, 64, seed=100 + n)


def make_seams(name):
    return rivals.seams(argparse.Namespace(rival=name, **vars(ARGS)))


def read_pair(dit, name, sigma=0.5, config=CONFIG):
    """A rival's readings of a reference and of a result, and its loss."""
    seams = make_seams(name)
    with torch.no_grad():
        reference = seams["features"](dit, randn(*SHAPE, seed=1), sigma, contexts(0), config)
    with torch.enable_grad():
        generated = seams["features"](dit, randn(*SHAPE, seed=2), sigma, contexts(1), config)
    (loss,) = seams["losses"](reference, generated, num_frames=GRID[0], config=config)
    return reference, generated, loss


def tokens_after(dit, block, seed, context):
    """Tokens (F, H, W, C) after a block of a whole run of the DiT."""
    found = []
    hook = dit.blocks[block - 1].register_forward_hook(lambda layer, inputs, out: found.append(out))
    dit(randn(*SHAPE, seed=seed), torch.tensor([500.0]), context)
    hook.remove()
    return found[0][0].view(*GRID, -1)


def cosine(a, b):
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def test_ditflow_by_a_slow_loop(dit, monkeypatch):
    def attention(seed, context):
        """Logits (S, S), the mean over heads."""
        q, k = dit.qk(randn(*SHAPE, seed=seed), torch.tensor([500.0]), context, 3)
        heads = [q[0, :, n] @ k[0, :, n].mT / q.shape[-1] ** 0.5 for n in range(HEADS)]
        return sum(heads) / HEADS

    errors = []
    ref, gen = attention(1, contexts(0)), attention(2, contexts(1))
    places = torch.tensor([place[1:] for place in POSITIONS], dtype=torch.float32)
    for n, (_, *place) in enumerate(POSITIONS):
        for frame in range(GRID[0]):
            there = [m for m, position in enumerate(POSITIONS) if position[0] == frame]
            target = places[there][ref[n, there].argmax()]
            if target.tolist() != [float(x) for x in place]:
                found = (20 * gen[n, there]).softmax(0) @ places[there]
                errors += (found - target).square().tolist()
    assert 100 < len(errors) < 2 * 72 * 3  # some are at rest
    loss = read_pair(dit, "DiTFlow")[2]
    close(loss, torch.tensor(errors).mean(), 1e-4)
    real, chunks = fastvmt.frame_flow, []
    monkeypatch.setattr(fastvmt, "frame_flow", lambda *args, **named: chunks.append(1) or real(*args, **named))
    monkeypatch.setattr(rivals, "MOST_LOGITS", 24**2 * 4)
    close(read_pair(dit, "DiTFlow")[2], loss, 1e-6)
    assert len(chunks) == 3  # of 4, 4 and 1 pair
    still = torch.zeros(9, 4, 6, 2)
    assert rivals.ditflow_losses(still, still + 1, num_frames=3, config=CONFIG) == (0,)  # nothing to follow


def test_flow_motions_loss_by_a_slow_loop():
    ref, gen = randn(1, 2, 4, 2, 3, seed=1), randn(1, 2, 4, 2, 3, seed=2)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j] + [(i, i + 1) for i in range(3)]
    error = [((gen[:, :, j] - gen[:, :, i]).abs() - (ref[:, :, j] - ref[:, :, i]).abs()).square() for i, j in pairs]
    true = 20 * (gen - ref).square().mean() + 5 * torch.stack(error).mean()
    (loss,) = rivals.flow_motion_losses(ref, gen, num_frames=4, config=CONFIG)
    close(loss, true, 1e-5)


def test_flow_motion_reads_clean_latents_without_a_gradient_through_the_model(dit):
    features = rivals.flow_motion(ARGS)
    read = partial(features, dit, config=CONFIG)
    reference, x = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)

    def velocity(x, sigma, context):
        return dit(x, torch.tensor([1000 * sigma]), context)

    def guided(x, sigma):
        empty = velocity(x, sigma, contexts(0))
        return empty + 3 * (velocity(x, sigma, contexts(1)) - empty)

    def regulated(x, start, sigma):
        v, mean = guided(x, sigma), (start - first) / (sigma - 0.9)
        for f, h, w in itertools.product(*map(range, SHAPE[2:])):
            a, b = v[0, :, f, h, w], mean[0, :, f, h, w]
            along = (a @ b) / (b @ b) * b
            v[0, :, f, h, w] = along + (a - along) / 10
        return v

    with torch.no_grad():
        close(read(reference, 0.9, contexts(0)), reference - 0.9 * velocity(reference, 0.9, contexts(0)), 1e-5)
        close(read(reference, 0.0, contexts(0)), reference, 0)
    first, moved = x.clone(), x + 0.1 * randn(*SHAPE, seed=3)
    later, later_moved = randn(*SHAPE, seed=4), randn(*SHAPE, seed=5)
    for _ in range(2):  # the second time as if there had been too little memory
        x.copy_(first)
        close(read(x, 0.9, contexts(1)), x - 0.9 * guided(x, 0.9), 1e-5)
        x.copy_(moved)  # as the optimizer does
        close(read(x, 0.9, contexts(1)), moved - 0.9 * guided(moved, 0.9), 1e-5)
        for latents in (later, later_moved):  # both steps go by where the guided step began
            close(read(latents, 0.7, contexts(1)), latents - 0.7 * regulated(latents, later, 0.7), 1e-4)
    x.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(read(x, 0.7, contexts(1)).sum(), x)
    close(gradient, torch.ones(SHAPE), 0)
    features = rivals.flow_motion(argparse.Namespace(cfg_scale=1))
    calls = []
    hook = dit.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    features(dit, reference, 0.9, contexts(1), CONFIG)
    hook.remove()
    assert len(calls) == 1


def test_smm_by_a_slow_loop(dit):
    ref, gen = (tokens_after(dit, 3, n + 1, contexts(n)).mean((1, 2)) for n in range(2))
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    true = sum(1 - cosine(gen[j] - gen[i], ref[j] - ref[i]) for i, j in pairs) / len(pairs)
    close(read_pair(dit, "SMM")[2], true, 1e-5)


def test_moft_by_a_slow_loop(dit):
    ref, gen = (tokens_after(dit, 3, n + 1, contexts(n)) for n in range(2))
    ref, gen = ((x - sum(x) / 3).reshape(72, 96) for x in (ref, gen))
    strength = torch.linalg.svd(ref)[2][0].abs()
    channels = sorted(range(96), key=lambda n: -strength[n])[:3]
    true = sum(1 - cosine(gen[n, channels], ref[n, channels]) for n in range(72)) / 72
    close(read_pair(dit, "MOFT")[2], true, 1e-4)


@pytest.mark.parametrize("name", ["SMM", "DiTFlow"])
def test_checkpoints_change_nothing(dit, name):
    gradients, work = [], []
    for checkpoint in (False, True, "full"):
        seams, x = make_seams(name), randn(*SHAPE, seed=2).requires_grad_()
        reference = read_pair(dit, name)[0]
        with torch.enable_grad(), cost.Cost() as counted:
            generated = seams["features"](dit, x, 0.5, contexts(1), CONFIG, checkpoint=checkpoint)
            (loss,) = seams["losses"](reference, generated, num_frames=3, config=CONFIG)
            gradients += torch.autograd.grad(loss, x)
        work.append(counted.flops)
    assert work[0] < work[1] < work[2]  # "full" runs self-attention again, too
    assert gradients[0].abs().max() > 1e-6
    for gradient in gradients[1:]:
        close(gradient, gradients[0], 1e-6)


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_the_reference_itself_has_no_loss_and_a_guided_step_lowers_it(dit, name):
    config = replace(CONFIG, tau=1e5)  # at which the soft flow is that of the arg max
    seams = make_seams(name)
    x = randn(*SHAPE, seed=1)
    with torch.no_grad():
        reference = seams["features"](dit, x, 0.9, contexts(0), config)
    with torch.enable_grad():
        same = seams["features"](dit, x, 0.9, contexts(0), config)
        other = seams["features"](dit, randn(*SHAPE, seed=2), 0.9, contexts(0), config)
    loss, far = (seams["losses"](reference, y, num_frames=3, config=config)[0].item() for y in (same, other))
    assert abs(loss) < 1e-5 and far > 0.1
    row = table1.make_rows(*rows_of("--model", "tiny"))[name]
    config, seams = replace(row.config, block=3), make_seams(name)
    read = partial(seams["features"], dit, config=config)
    with torch.no_grad():
        reference = read(randn(*SHAPE, seed=1), 0.9, contexts(0))
    read_result = partial(read, context=contexts(1))
    x = randn(*SHAPE, seed=2)
    moved, history = fastvmt.guide(x, 0.9, reference, read_result, seams["losses"], config, 3)
    assert len(history) == config.inner_steps  # a gradient each
    with torch.enable_grad():
        after = seams["losses"](reference, read_result(moved, 0.9), num_frames=3, config=config)[0].item()
    assert after < history[-1, 0] < history[0, 0] and 0 < (moved - x).abs().max() < 0.1


def test_tokens_of_other_models_cannot_be_read():
    with pytest.raises(fastvmt.UserError, match="the toy only"):
        rivals.smm_features(object(), randn(*SHAPE), 0.5, contexts(0), CONFIG)


def rows_of(*argv, rows="rivals"):
    argv = [*argv, "--device", "cpu", "--rows", rows]
    args, model = table1.parse_arguments(argv)
    return argv, args, model.blocks


def test_rows_have_their_papers_settings():
    tiny, toys = (table1.make_rows(*rows_of("--model", *argv)) for argv in (["tiny", "--coarse", "1"], ["toy"]))
    names = ["full method", "w/o spatial window", "coarse=1", *rivals.RIVALS, "no transfer"]
    assert [*tiny] == [name for name in names if name != "coarse=1"] and [*toys] == names
    assert tiny["SMM"].coarse == 0 and tiny["no transfer"].coarse == 1
    for name, (fraction, steps, lr, noise) in {
        "DiTFlow": (0.2, 5, (0.002, 0.001), 0), "FlowMotion": (0.2, 3, (0.003, 0.003), "match"),
        "FlowMotion, clean latents": (0.2, 3, (0.003, 0.003), 0), "SMM": (0.4, 10, (0.007, 0.004), "match"),
        "MOFT": (0.2, 5, (0.002, 0.001), 0),
    }.items():  # fmt: skip
        config = tiny[name].config
        assert (config.guided_fraction, config.inner_steps, config.lr, config.ref_noise) == (fraction, steps, lr, noise)
        assert config.interval == 1 and config.block == 3
    _, changed = table1.make_rows(*rows_of("--model", "tiny", rows="SMM: block=1, inner_steps=7")).values()
    config = changed.config
    assert (changed.rival, config.block, config.inner_steps, config.lr) == ("SMM", 1, 7, (0.007, 0.004))
    plain = argparse.Namespace(**vars(tiny["SMM"]))
    hashes = {table1.settings_hash(row, tiny["full method"]) for row in tiny.values()}
    for plain.rival in rivals.RIVALS:  # of the same settings otherwise
        hashes.add(table1.settings_hash(plain, tiny["full method"]))
    assert len(hashes) == len(tiny) + len(rivals.RIVALS) - 1


def test_rows_run_and_are_priced(tmp_path, capsys, monkeypatch):
    args = [*TABLE, "--steps", "5", "--block", "2", "--tau", "30"]
    ticks = itertools.count()
    monkeypatch.setattr(cost, "clock", lambda device: next(ticks))
    code, out, err = run_table(capsys, *args, "--out", tmp_path, "--rows", *rivals.RIVALS)
    assert code == 0 and not err, err
    table = read_table(out)
    # 5 steps of 2 velocities through 4 blocks; the first is guided, of SMM the second, too. Then the references.
    counts = {"DiTFlow": (5, 40 + 5 + 1, 5), "FlowMotion": (3, 40 + 24 + 4, 0), "SMM": (20, 40 + 40 + 4, 40),
              "FlowMotion, clean latents": (3, 40 + 24 + 4, 0), "MOFT": (5, 40 + 10 + 2, 10)}  # fmt: skip
    for name, expected in counts.items():
        cells = table["mean", name]
        assert tuple(int(cells[n]) for n in ("gradients", "block forwards", "block backwards")) == expected, name
        assert float(cells["denoising s"]) == 10, name  # of a clock that counts: FlowMotion's velocities are none
    results = table1.read_results(tmp_path)
    assert len({line["columns"]["L_AMF"] for line in results}) == len(results) == 6
    real = cost.count

    def count(args, model):
        flops, peaks = real(args, model)
        return flops, {phase: [1000 * n for n in modes] for phase, modes in peaks.items()}  # or all are 0.0 GiB

    monkeypatch.setattr(cost, "count", count)
    args += ["--frames", "5", "--dry-run", "--rows", "FlowMotion", "SMM", "no_transfer"]
    code, out, err = run_table(capsys, *args)
    assert code == 0 and not err, err
    cells = {row: cells for (title, row), cells in read_table(out).items() if title == "a guided step"}
    assert [*cells] == ["full method", "FlowMotion", "SMM"]
    parsed, model = table1.parse_arguments(args)
    smm, peaks = cost.count(table1.make_rows(args, parsed, model.blocks)["SMM"], model)
    velocity = smm["velocity"][0] / 1e12  # FlowMotion's: a reference and three readings of two
    assert float(cells["FlowMotion"]["TFLOP"]) == pytest.approx(7 * velocity, rel=0.002)
    true = (10 * smm["gradient"][0] + 1 * smm["reference pass"][0]) / 1e12
    assert float(cells["SMM"]["TFLOP"]) == pytest.approx(true, rel=0.002)
    tokens, dim, ffn = 2 * 2 * 3, 96, 192
    attention, linear = 2 * 2 * tokens * (tokens + 512) * dim, 2 * tokens * dim * (6 * dim + 2 * ffn)
    backward = smm["gradient"][0] - smm["reference pass"][0]
    assert backward == pytest.approx(2 * (2.5 * attention + linear), rel=0.1)  # of both blocks
    giga = [f"{n / 2**30:.1f}" for n in peaks["gradient"]]
    assert [*cells["SMM"].values()][2:] == giga
