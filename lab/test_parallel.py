# SPDX-License-Identifier: Apache-2.0
"""Tests of several processes: a table's clips spread over them, and one video on all of them, by gloo on a CPU."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import fastvmt
import wan_min
from lab import cost, table1

HERE = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
TABLE = "--model tiny --device cpu --frames 5 --size 32x48 --steps 1 --inner-steps 1 --made-clips 3 --lr 1 1".split()
ONE = "--model tiny --device cpu --ref demo --prompt x --frames 5 --size 48x80 --steps 4 --inner-steps 2 --interval 1"
ONE = [*ONE.split(), "--lr", "0.1", "0.1", "--guided-fraction", "0.5"]  # two guided steps that show in the frames
MASKED = [*ONE, "--mask", "mask.png", "--preview"]
COARSE = [*ONE, "--coarse", "0.5", "--velocity-interval", "2", "--checkpoint", "off"]
PLAIN = "--no-transfer"
DIT = dict(dim=48, ffn_dim=64, num_heads=4, num_layers=2, text_dim=32, freq_dim=16)
CASES = [(checkpoint, size) for checkpoint in (False, True, "full") for size in ((3, 6, 10), (2, 4, 6))]
distributed = torch.distributed.is_available() and torch.distributed.is_gloo_available()
needs_gloo = pytest.mark.skipif(not distributed, reason="needs torch.distributed with gloo")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # as the processes that are started
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance):
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert a.shape == b.shape and error <= tolerance, f"relative error {error:.3g}"  # NaN fails


# ---- Many videos -----------------------------------------------------------------------------------------------------


def test_processes_share_a_tables_clips_and_a_killed_one_goes_on(capsys, monkeypatch):
    drawn, batches, true = [], [], wan_min.random_contexts
    monkeypatch.setattr(table1, "draw", lambda results, *others: drawn.append(len(results)))
    monkeypatch.setattr(wan_min, "random_contexts", lambda texts, **more: batches.append(texts) or true(texts, **more))
    out, names = Path("shared"), ("results0.jsonl", "results1.jsonl")

    def run(out, *more):
        code = table1.main([*TABLE, *more, "--out", str(out)])
        return code, capsys.readouterr().out

    def kill():
        while other.poll() is None and not (results.exists() and results.read_bytes().count(b"\n")):
            time.sleep(0.005)
        other.kill()
        other.wait()

    results = out / names[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = [sys.executable, "-m", "lab.table1", *TABLE, "--out", str(out)]
    other = subprocess.Popen(command, env=ENVIRONMENT | {"RANK": "1", "WORLD_SIZE": "2"}, stdout=subprocess.DEVNULL)
    killer = threading.Thread(target=kill)
    killer.start()
    monkeypatch.setenv("RANK", "0")
    code, shown = run(out)
    killer.join(100)
    assert code == 0 and re.search(r"\| full method \| [23] ", shown)  # its own, and what the other had by now
    before = results.read_text()
    assert 1 <= before.count("\n") < 2, "killed too late"
    kept = before[: before.rindex("\n") + 1]
    results.write_text(kept + kept[:50])  # a line that it was killed in the middle of
    whole = (out / names[0]).read_bytes()
    monkeypatch.setenv("RANK", "1")
    (out / "table.md").unlink()
    code, shown = run(out)
    assert code == 0 and "|" not in shown and not (out / "table.md").exists()  # only rank 0 prints
    assert results.read_text().startswith(kept) and results.read_text().count("\n") == 2
    assert (out / names[0]).read_bytes() == whole  # nobody else's file is written
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    code, shown = run(out, "--table-only")
    assert code == 0 and "| full method | 3" in shown and "| no transfer | 3" in shown
    assert len(drawn) == 2 and drawn[1] == 6  # by rank 0, and of all
    assert sorted(path.name for path in out.glob("*.jsonl")) == list(names)
    assert run("alone")[0] == 0
    assert (
        batches[0] == batches[1] == batches[2] and len(batches[0]) == 5
    )  # one batch: those of three clips, empty, negative
    alone, shared = (table1.read_results(folder) for folder in (Path("alone"), out))
    assert len(alone) == len(shared) == 6
    found = {tuple(line["key"]): line["columns"] for line in shared}
    for line in alone:
        columns = found.pop(tuple(line["key"]))  # each once
        same = [name for name in line["columns"] if not name.endswith((" s", "GiB"))]
        assert len(same) > 6 and columns.keys() == line["columns"].keys()
        assert [columns[name] for name in same] == pytest.approx([line["columns"][name] for name in same], rel=1e-5)
    assert (Path("alone") / "results.jsonl").exists() and json.loads(before.splitlines()[0])["key"][3] == 1


def test_local_rank_picks_the_gpu_and_is_no_setting(monkeypatch):
    picked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", picked.append)
    cost.pick_gpu("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("cpu", "cuda:0"):
        cost.pick_gpu(name)
    assert not picked
    cost.pick_gpu("cuda")
    assert picked == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(fastvmt.UserError, match="LOCAL_RANK 2, but 2 GPUs"):
        cost.pick_gpu("cuda")
    asked, true = [], fastvmt.parse_arguments
    monkeypatch.setattr(cost, "pick_gpu", asked.append)
    monkeypatch.setattr(fastvmt, "parse_arguments", lambda *args, **more: asked.append("probe") or true(*args, **more))
    args, _ = table1.parse_arguments(TABLE)
    assert asked == ["cpu", "probe"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert table1.settings_hash(args, args) == table1.settings_hash(*[table1.parse_arguments(TABLE)[0]] * 2)


# ---- One video -------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts self-attention's forward passes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "scaled_dot_product" in op.name() and "backward" not in op.name():
            self.count += args[0].shape == args[1].shape
        return op(*args, **kwargs or {})


def probe(dit, checkpoint, x):
    """Q, K of the second block, a gradient through both, a velocity, and how often self-attention ran for Q and K."""
    t, context = torch.tensor([600.0]), randn(1, 7, 32, seed=1)
    x = x.requires_grad_()
    with Count() as attentions:
        q, k = dit.qk(x, t, context, 2, checkpoint=checkpoint)
        a, b = randn(2, *q.shape, seed=2)
        (gradient,) = torch.autograd.grad((a * q).sum() + (b * k).sum() + (q * k).sum(), x)
    with torch.no_grad():
        return q, k, gradient, dit(x, t, context), torch.tensor(attentions.count)


def make_dit():
    return wan_min.random_model(wan_min.DiT, DIT)


def mark(size, ranks):
    """Latents of a size, whose parts of the ranks' differ: what each rank has, and what all together have."""
    x = randn(1, 16, *size)
    each = [x + 0.1 * rank for rank in range(ranks)]
    rows = -(-size[1] // ranks)
    return each, torch.cat([y.split(rows, dim=3)[n] for n, y in enumerate(each) if n * rows < size[1]], dim=3)


def torchrun(ranks, task):
    """Exit code, stdout and stderr of `child` on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen([*command, "-m", "lab.test_parallel", task], env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        return process.communicate(timeout=100), process.returncode
    finally:
        if process.poll() is None:
            process.terminate()  # it ends those that it started
            process.wait()


def child(task):
    """What each process does; exits with the code of the program."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from lab import extras, parallel

    def forbidden(*args, **options):
        raise AssertionError("only rank 0 may do this")

    if os.environ["RANK"] != "0":
        for module, name in ((fastvmt, "claimed"), (fastvmt, "keep_latents"), (fastvmt, "write_video"),
                             (extras, "write_gif"), (wan_min.VAE, "decode")):  # fmt: skip
            setattr(module, name, forbidden)

    def dying(*args, **options):
        if os.environ["RANK"] == "1":
            raise fastvmt.UserError("this one dies")
        return fastvmt.motion_losses(*args, **options)

    def once(*args, **options):  # processes find each other once
        return None

    end, dist.destroy_process_group = dist.destroy_process_group, once
    flags = {"masked": MASKED, "probe": COARSE}[task]
    assert parallel.main([*flags, "--out", "out.mp4"]) == 0
    if task == "masked":
        dist.init_process_group = once
        sys.exit(parallel.main([*ONE, "--out", "dead.mp4"], losses=dying))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dit = parallel.parallelize(make_dit(), init_device_mesh("cpu", (ranks,)))
    torch.save([probe(dit, checkpoint, mark(size, ranks)[0][rank]) for checkpoint, size in CASES], f"{rank}.pt")
    end()


def failing(error):
    def fail(*args):
        raise error

    return fail


def lines_once(out):
    lines = [line for line in out.splitlines() if line]
    return len(lines) > 4 and len(set(lines)) == len(lines)


def frames_of_one_process(args):
    assert fastvmt.main([*args, "--out", "alone.mp4"]) == 0
    return iio.imread("alone.mp4").astype(int)


@needs_gloo
def test_three_processes_compute_what_one_does():
    """45 and 12 tokens, and 4 heads: the third process has none."""
    (out, err), code = torchrun(3, "probe")
    assert code == 0 and lines_once(out) and "sampling" in err, err
    ranks = [torch.load(f"{n}.pt", weights_only=True) for n in range(3)]
    for n, (checkpoint, size) in enumerate(CASES):
        true = probe(make_dit(), checkpoint, mark(size, 3)[1])
        for parts in zip(true[:-1], *(rank[n] for rank in ranks)):
            assert all(torch.equal(part, parts[1]) for part in parts[2:]), "ranks differ"
            close(parts[1], parts[0], 1e-5)
        assert [rank[n][-1].item() for rank in ranks] == ([2, 2, 0] if checkpoint == "full" else [1, 1, 0])
    assert sorted(path.name for path in Path().iterdir()) == ["0.pt", "1.pt", "2.pt", "out.mp4"]
    true, result, plain = frames_of_one_process(COARSE), iio.imread("out.mp4"), frames_of_one_process([*COARSE, PLAIN])
    assert abs(true - result).mean() < 0.02 * abs(true - plain).mean()  # AdamW makes a tiny gradient's sign a step


@needs_gloo
def test_two_processes_make_the_video_of_one_and_one_that_dies_ends_both():
    light = np.zeros((48, 80), np.uint8)
    light[:, :40] = 255
    Image.fromarray(light).save("mask.png")
    (out, err), code = torchrun(2, "masked")
    made, end, dead = out.partition("wrote out.mp4\n")
    assert end and lines_once(made), err
    files = sorted(path.name for path in Path().iterdir() if path.name != ".dead.mp4.lock")
    assert files == ["mask.png", "out.mp4", "out.preview.gif"]
    preview = iio.imread("out.preview.gif").astype(int)
    true = frames_of_one_process(MASKED)
    assert abs(preview - iio.imread("alone.preview.gif")).mean() < 2
    result, unmasked = iio.imread("out.mp4"), frames_of_one_process(ONE)
    assert abs(true - result).mean() < 0.02 * abs(true - unmasked).mean()

    assert code and "wrote" not in dead and "lab.parallel, rank 1: this one dies\n" in err
    told = re.findall(r"(?m)lab\.parallel, rank \d.*$", err)
    assert set(told) <= {"lab.parallel, rank 1: this one dies", "lab.parallel, rank 0: another rank has ended"}
    assert "]: Traceback" not in err


@needs_gloo
def test_what_does_not_go_with_several_processes_is_refused(capsys, monkeypatch):
    from lab import parallel

    for flags, message in ((["--offload"], "--offload"), (["--compile"], "--compile"), (["--decode", "x"], "--decode"),
                           ([], "torchrun"), (["--steps", "x"], "steps")):  # fmt: skip
        assert parallel.main([*ONE, *flags]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("lab.parallel, rank 0: ") and message in err and err.count("\n") == 1 and not out
    monkeypatch.setenv("RANK", "1")  # its errors are seen too, and nothing else
    assert parallel.main(["--ref"]) == 2 and "rank 1: " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "prepare", lambda argv: torch.ones(1).view(2))
        with pytest.raises(RuntimeError, match="invalid for input"):
            parallel.main(ONE)
        for reason in ("reset", "closed"):
            patch.setattr(parallel, "prepare", failing(RuntimeError(f"gloo: Connection {reason} by peer [::1]:2")))
            assert parallel.main(ONE) == 1 and "rank 1: another rank has ended\n" in capsys.readouterr().err
    monkeypatch.setattr(cost, "pick_gpu", lambda name: picked.append(name))
    for flags, checkpoint in (([], "on"), (["--checkpoint", "off"], "off")):
        picked = []
        args, _, model = parallel.prepare([*ONE, *flags])
        assert args.checkpoint == checkpoint and picked == ["cpu"]
    monkeypatch.setattr(wan_min, "random_model", lambda *args: torch.nn.Linear(1, 1))
    with pytest.raises(fastvmt.UserError, match="--model tiny"):
        parallel.prepare(ONE)[2].load_dit()


if __name__ == "__main__":
    child(sys.argv[1])
