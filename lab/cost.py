# SPDX-License-Identifier: Apache-2.0
"""What a run costs: counted on tensors without data, or measured on this machine. Used by lab.table1.

The FLOPs are those of matrix products, convolutions and attention, whose backward pass recomputes QKᵀ.
"""

import math
import os
import re
import time
import weakref
from collections import Counter
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import fastvmt
import wan_min
from lab import changes, rivals

GUIDANCE = ("coarse reference pass", "coarse gradient", "reference pass", "gradient")
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71}  # bf16

# ---- Time and memory -------------------------------------------------------------------------------------------------


def clock(device):
    """Seconds, read once the device has done all that was asked of it."""
    torch.zeros(1, device=device).item()
    return time.perf_counter()


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pick_gpu(name):
    """Make "cuda" the GPU of this process's LOCAL_RANK: an index would be part of the settings. Raises UserError."""
    if name == "cuda" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= count:
            raise fastvmt.UserError(f"LOCAL_RANK {rank}, but {count} GPUs: a process needs its own")
        torch.cuda.set_device(rank)


def peak_memory(device, reset=False):
    """Peak bytes since the last reset: allocated on a CUDA device, else of the process, on Linux (elsewhere 0)."""
    if torch.device(device).type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):  # TypeError: a sandbox's /proc may not tell the peak
        return 0


def count_passes(dit):
    """A Counter: the DiT's seconds in velocities, its block forwards (recomputed ones not), its block backwards."""
    counts = Counter()

    def passed(block, inputs, out):
        if isinstance(out, torch.Tensor):  # not the Q and K of a block that ends there
            counts["forwards"] += 1
            if out.requires_grad:
                out.register_hook(lambda gradient: counts.update(["backwards"]))

    for block in dit.blocks:
        block.register_forward_hook(passed)
    dit.register_forward_pre_hook(lambda dit, inputs: counts.update(seconds=-clock(inputs[0].device)))
    dit.register_forward_hook(lambda dit, inputs, out: counts.update(seconds=clock(out.device)))
    return counts


# ---- FLOPs and memory without a GPU ----------------------------------------------------------------------------------

aten = torch.ops.aten
FORMULAS = flop_registry | {  # attention on CPU tensors counts as it does on a GPU
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward],
}  # fmt: skip


class Cost(TorchDispatchMode):
    """Counts the FLOPs of what runs inside, and the most bytes that its tensors and the `held` ones took at once.

    What is on the device "meta" takes none: it stands for host memory.
    """

    def __init__(self, held=()):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.storages = set()
        for tensor in held:
            self.hold(tensor)

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.storages and tensor.device.type != "meta":
            self.storages.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, id(storage), storage.nbytes())

    def release(self, name, nbytes):
        self.storages.remove(name)
        self.live -= nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._to_copy.default and args[0].is_meta:
            func = aten.empty_like.default  # torch 2.5 copies no meta tensor to another device
        out = func(*args, **kwargs or {})
        if func.overloadpacket in FORMULAS:
            self.flops += FORMULAS[func.overloadpacket](*args, **kwargs or {}, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.hold(leaf)
        return out


class Inline:
    """In place of offload_blocks' thread: like it without the modes of a checkpoint, but with those that count here."""

    def __init__(self, threads):
        pass

    def submit(self, call, *args):
        modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, (FakeTensorMode, Cost))]
        with _disable_current_modes(), ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            result = call(*args)
        return SimpleNamespace(result=lambda: result)


def dit_phases(dit, noise, context, config, checkpoint, features=fastvmt.motion_features, losses=fastvmt.motion_losses):
    """{name: function without arguments} of the DiT's part of a run, each once; of coarse reading if there is any."""
    grid = rivals.token_grid(dit, noise)
    small, _ = fastvmt.pool_latents(noise, 0.9, dit.patch_size)
    features = partial(features, dit, sigma=0.9, context=context, config=config)
    own, t = losses is fastvmt.motion_losses, torch.full((1,), 900.0, device=noise.device)
    reading = (torch.zeros(2, device=noise.device), None) if own else features(noise)
    QK = torch.randn(2, *grid, dit.head.head.in_features // dit.num_heads, device=noise.device)

    def gradient(x, read):
        def objective(x):
            return losses(reading, read(x), num_frames=grid[0], config=config)[0]

        return fastvmt.optimize_latent(x, objective, steps=1)

    read = partial(features, checkpoint=checkpoint)
    coarse = {"coarse reference pass": lambda: features(small), "coarse gradient": lambda: gradient(small, read)}
    flow = {"of it AMF, losses, optimizer": lambda: gradient(QK, lambda x: changes.read_flow(*x, config))}
    return (coarse if config.coarse else {}) | {
        "reference pass": lambda: features(noise),
        "gradient": lambda: gradient(noise, read),
        **(flow if own else {}),
        "velocity": lambda: dit(noise, t, context),
    }


def run_counts(args):
    """How often a run does each of the phases."""
    config = args.config
    first = fastvmt.guided_steps(args.steps, config)
    guided = 0 if args.no_transfer else first
    coarse = fastvmt.coarse_steps(guided, config)
    fine = guided - coarse
    gradients = math.ceil(config.inner_steps / config.interval)  # in a guided step

    def references(steps):
        return steps if config.ref_noise == "match" else min(steps, 1)

    velocities = first + math.ceil((args.steps - first) / args.velocity_interval)
    velocities *= 1 if args.cfg_scale == 1 else 2
    counts = {"encode": 1, "coarse reference pass": references(coarse), "coarse gradient": coarse * gradients,
              "reference pass": references(fine), "gradient": fine * gradients,
              "of it AMF, losses, optimizer": fine * gradients, "velocity": velocities, "decode": 1}  # fmt: skip
    return {name: times for name, times in counts.items() if config.coarse or "coarse" not in name}


def latent_shape(args, model):
    """Shapes of a run's video and latents."""
    ((height, width), _), frames = fastvmt.canvas(args, model), (args.frames - 1) // 4 + 1
    return (1, 3, 4 * frames - 3, height, width), (1, 16, frames, height // 8, width // 8)


@cache
@torch.no_grad()
def count_codec(name, video_shape, shape):
    """FLOPs and peak bytes of the VAE's part of a run, as count returns them."""
    flops, peaks = {}, {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = wan_min.VAE(**wan_min.ARCHITECTURES[name][1])
        for phase, convert, size in (("encode", vae.encode, video_shape), ("decode", vae.decode, shape)):
            x = torch.empty(size)
            with Cost([*vae.parameters(), x]) as cost:
                convert(x)
            flops[phase], peaks[phase] = [cost.flops], [cost.peak]
    return flops, peaks


@torch.no_grad()
def count(args, model):
    """{phase: [FLOPs]}, and {phase: [peak bytes with all stored, with recomputation, with --offload]}."""
    if args.model not in wan_min.ARCHITECTURES:
        raise fastvmt.UserError(f"--dry-run and --bench know {', '.join(wan_min.ARCHITECTURES)}, not {args.model}")
    arguments = wan_min.ARCHITECTURES[args.model][0]
    config, dtype = args.config, torch.float32 if args.dtype == "fp32" else torch.bfloat16
    video_shape, shape = latent_shape(args, model)
    flops, peaks = map(dict, count_codec(args.model, video_shape, shape))

    def record(name, phase, held):
        with Cost(held) as cost:
            phase()
        flops.setdefault(name, []).append(cost.flops)
        peaks.setdefault(name, []).append(cost.peak)

    for checkpoint, offload in ((False, False), (True, False), ("full", True)):  # as fastvmt.generate does
        with torch.device("meta"):
            dit = wan_min.cast(wan_min.DiT(**arguments), dtype).requires_grad_(False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            with Cost(), patch.object(wan_min, "ThreadPoolExecutor", Inline):
                dit = wan_min.offload_blocks(dit, "cpu") if offload else dit.to("cpu")
            noise, context = torch.empty(shape), torch.empty(1, wan_min.TEXT_LENGTH, dit.text_embedding[0].in_features)
            seams = rivals.seams(args)
            for name, phase in dit_phases(dit, noise, context, config, checkpoint, **seams).items():
                record(name, phase, [*dit.parameters(), noise, context])
            if not checkpoint:  # what the release computes more than once
                block, (tokens, _, shared) = dit.blocks[0], dit.embed(noise, torch.ones(1), context)
                record("block", partial(block, tokens, *shared), ())
                block.self_attn.o = torch.nn.Identity()  # its recomputation ends before the output projection
                record("self-attention", partial(block.self_attn, *[tokens.to(dtype)] * 2, shared[2]), ())
    return flops, peaks


def dry_run(args, model, rows):
    """Markdown lines of FLOPs and memory of a run of this size, weights included; nothing is computed.

    rows: {name: arguments} of runs, whose FLOPs follow.
    """
    counted = {}

    def count_once(row):
        config = row.config  # what of it decides a pass's FLOPs
        reading = config.block, config.span, config.tile, config.window, config.coarse > 0
        reading += getattr(row, "rival", None), row.cfg_scale == 1
        counted[reading] = counted.get(reading) or count(row, model)
        return counted[reading]

    flops, peaks = count_once(args)
    counts = run_counts(args)
    yield "| | times | TFLOP | recomputing | GiB, all stored | recomputing | and --offload |"
    yield "|---" + "|--:" * 6 + "|"
    for name, times in counts.items():
        tera, giga = [f"{x / 1e12:.4g}" for x in flops[name]], [f"{x / 2**30:.1f}" for x in peaks[name]]
        tera, giga = tera + tera[:1] * (3 - len(tera)), giga + giga[:1] * (3 - len(giga))
        yield f"| {name} | {times} | {tera[0]} | {tera[1]} | {' | '.join(giga)} |"
    yield "\n| a guided step | TFLOP | GiB, all stored | recomputing | and --offload |"
    yield "|---" + "|--:" * 4 + "|"
    for name, row in rows.items():
        (flops, peaks), counts = count_once(row), run_counts(row)
        guided = [phase for phase in GUIDANCE if counts.get(phase)]
        if guided:
            tera = sum(counts[phase] * flops[phase][0] for phase in guided) / 1e12
            giga = [f"{max(modes) / 2**30:.1f}" for modes in zip(*(peaks[phase] for phase in guided))]
            steps = fastvmt.guided_steps(row.steps, row.config)
            yield f"| {name} | {tera / steps:.4g} | {' | '.join(giga)} |"
    # Whole passes: what guidance costs that reads Q and K with a hook and lets the DiT run to its end. The authors'
    # release stops after 20 blocks; a gradient recomputes those it needs, and in each the self-attention once more.
    # Neither reads coarsely: such passes are counted as they are here. A rival's own release is another matter.
    yield "\n| run, PFLOP | guidance | denoising | all | share | whole passes | their share | release | its share |"
    yield "|---" + "|--:" * 8 + "|"
    first = None
    for name, row in rows.items():
        (flops, _), counts = count_once(row), run_counts(row)
        rest = flops["velocity"][0] - flops["reference pass"][0]
        beyond = max(model.blocks - 20, 0) * flops["block"][0]
        again = row.config.block * (flops["block"][0] + flops["self-attention"][0])
        cost = {phase: counts[phase] * flops[phase][0] / 1e15 for phase in counts if phase in flops}
        guidance, denoising = sum(cost.get(phase, 0) for phase in GUIDANCE), cost["velocity"]
        whole = guidance + denoising + cost["encode"] + cost["decode"]
        passes = counts["reference pass"] + counts["gradient"]
        hooked = whole + passes * rest / 1e15
        release = hooked + (counts["gradient"] * again - passes * beyond) / 1e15
        first = first or whole
        totals = (whole, hooked) if hasattr(row, "rival") else (whole, hooked, release)
        numbers = guidance, denoising, *(x for total in totals for x in (total, total / first))
        yield f"| {name} | {' | '.join(f'{x:.3g}' for x in numbers)} |"


# ---- On this machine -------------------------------------------------------------------------------------------------


@torch.no_grad()
def bench(args, model, repeat=2):
    """Markdown lines of seconds, FLOP/s and memory of each part of a run, beside what the dry run says."""
    device, config = torch.device(args.device), args.config
    args.dtype = args.dtype or ("fp32" if device.type == "cpu" else "bf16")
    flops, dry = count(args, model)
    card = device_name(device)
    peak = args.peak_tflops or next((value for name, value in PEAK_TFLOPS.items() if name in card), 0)
    checkpoint = "full" if args.offload else args.checkpoint == "on"
    mode = 2 if args.offload else int(checkpoint)
    counts, seconds, (video_shape, shape) = run_counts(args), {}, latent_shape(args, model)
    context, video = model.encode_prompts(["x"]), torch.rand(video_shape, device=device) * 2 - 1
    noise = torch.randn(shape, device=device)
    yield f"{card}, {args.model}, {args.dtype}, {shape[2]} latent frames of {video_shape[3]}x{video_shape[4]}"
    yield "\n| | times | s | TFLOP | TFLOP/s | of the peak | GiB | dry run's GiB |\n|---" + "|--:" * 7 + "|"

    def measure(phases):
        for name, phase in phases.items():
            phase()  # what runs first is slow
            times = []
            peak_memory(device, reset=True)
            for _ in range(repeat):
                start = clock(device)
                phase()
                times.append(clock(device) - start)
            seconds[name], work = min(times), flops[name][min(mode, len(flops[name]) - 1)] / 1e12
            rate = work / seconds[name]
            share = f"{rate / peak:.0%}" if peak else ""
            here, foretold = (x / 2**30 for x in (peak_memory(device), dry[name][min(mode, len(dry[name]) - 1)]))
            numbers = " | ".join(f"{x:.3g}" for x in (counts[name], seconds[name], work, rate))
            yield f"| {name} | {numbers} | {share} | {here:.3g} | {foretold:.3g} |"

    codec = model.load_codec(True)  # in tiles, as the dry run counts them
    yield from measure({"encode": partial(codec.encode, video), "decode": partial(codec.decode, noise)})
    del codec, video
    dit = model.load_dit()
    for block in dit.blocks if args.compile else ():
        block.compile()
    yield from measure(dit_phases(dit, noise, context, config, checkpoint))
    guidance, denoising = (sum(counts[name] * seconds[name] for name in names if name in counts)
                           for names in (GUIDANCE, ("velocity",)))  # fmt: skip
    yield f"\nA run: guidance {guidance:.3g} s, denoising {denoising:.3g} s."
