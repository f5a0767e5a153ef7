# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 1 on your own clips: what each part of the method brings and what it costs.

python -m lab.table1 --model 1.3B --refs DAVIS/JPEGImages/480p/*/ --prompts prompts.txt --out table1/
python -m lab.table1 --model toy                              # the true error of the motion, on a laptop
python -m lab.table1 --model toy --clips 24 --rows "tau=1" "interval=10" "window=none, interval=1"
python -m lab.table1 --model 1.3B --made-clips 8 --out proof/  # does it move on your GPU? no clips or metrics needed
torchrun --nproc-per-node 8 -m lab.table1 ...                 # clips spread over GPUs; --table-only once all are done
python -m lab.table1 --model 14B --dry-run                    # FLOPs and memory of a run, without a GPU
python -m lab.table1 --model 1.3B --random-weights --bench    # seconds and memory on your GPU

Each result is a line of OUT/results.jsonl, of several processes results{RANK}.jsonl, as soon as it is known. A run that
was killed goes on where it stopped. Clips are read and the VAE tiles as the command line says, in all rows: a preset's
fps and tiles are ignored.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import sys
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

import fastvmt
import wan_min
from lab import cost, effect, made, metrics, rivals, toy

ROWS = {  # name -> changes to the settings of the command line
    "full method": "",
    "w/o spatial window": "window=none",
    "w/o window loss": "lambda_window=0",
    "w/o step-skip": "interval=1",
    "w/o window and step-skip": "window=none, interval=1",
    "argmax centre": "center=argmax",
    "matched reference": "ref_noise=match",
    "clean reference": "ref_noise=0",
    "preset paper": "preset=paper",
    "preset release": "preset=release",
    "preset fast": "preset=fast",
    "no transfer": "no_transfer",
}
PAPER = ("steps=50, shift=7, cfg_scale=5.8, guided_fraction=0.2, inner_steps=10, interval=3, lr=0.003 0.002, tau=1, "
         "lambda_window=1, ref_noise=")  # fmt: skip
PAPER_ROWS = {"the paper's numbers, matched": PAPER + "match", "the paper's numbers, clean": PAPER + "0"}
ABLATION = (  # of the toy, the README's
    "no transfer", *PAPER_ROWS, "matched reference", "ref_noise=0.3", "w/o spatial window", "argmax centre",
    "w/o window loss", "lambda_window=1", "tau=1", "span=8", "guided_fraction=0.2", "steps=50", "shift=3",
    "cfg_scale=5.8", "tile=3 4", "block=1", "block=2", "block=3", "block=4", "block=6", "inner_steps=10",
    "lr=0.003 0.002", "lr=0.012 0.01", "w/o step-skip", "interval=3", "interval=5", "interval=10", "interval=20",
    "w/o window and step-skip", "velocity_interval=3", "interval=20, velocity_interval=3",
    "inner_steps=10, interval=10", "lr=0.003 0.002, interval=20", "guided_fraction=0.2, interval=20",
)  # fmt: skip
ROW_SETS = {"all": ROWS, "toy": ("w/o spatial window", "w/o window loss", "w/o step-skip", "no transfer"),
            "made": ("no transfer",), "ablation": ABLATION,
            "rivals": ("w/o spatial window", "coarse=1", *rivals.RIVALS, "no transfer")}  # fmt: skip
TOY_CAMERAS = ("pan", "pan", "zoom", "pan", "pan", "rotation", "pan", "still")
# Not in the hash of a row's settings: they change no result, or stand beside it in the result's key.
OTHERS = {"ref", "refs", "prompt", "prompts", "seed", "out", "decode", "rows", "clips", "made_clips",
          "look_alikes", "keep_videos", "table_only", "dry_run", "bench", "peak_tflops", "config"}  # fmt: skip
SHARED = {"model", "lora", "random_weights", "size", "frames", "start", "device", "dtype", "offload", "compile"}

# ---- Rows and clips --------------------------------------------------------------------------------------------------


def row_flags(changes):
    """Changes such as "window=none, lr=0.003 0.002, no_transfer" as flags of the command line."""
    flags = []
    for change in filter(None, re.split(r",\s*", changes)):
        name, _, value = change.partition("=")
        flags += ["--" + name.strip().replace("_", "-"), *value.split()]
    return flags


def make_rows(argv, args, blocks):
    """{name: arguments} of the rows that are asked for, the full method first, none twice."""
    block_rows = {f"block {n}": f"block={n}" for n in range(1, blocks + 1)}
    known, sets, rows, hashes = ROWS | PAPER_ROWS | block_rows, ROW_SETS | {"blocks": block_rows}, {}, set()
    wanted = args.rows or ["made" if args.made_clips else "toy" if args.model == "toy" else "all"]
    for name in ["full method", *(name for row in wanted for name in sets.get(row, [row]))]:
        rival, _, changes = name.partition(": ")
        known_rival = rival in rivals.RIVALS
        changes = rivals.row_changes(rival, args.model, changes) if known_rival else known.get(name, name)
        row, _ = parse_arguments([*argv, *row_flags(changes)])
        if known_rival:
            row.rival = rival
        changed = [key for key in SHARED | OTHERS - {"config"} if vars(row)[key] != vars(args)[key]]
        if changed:
            raise fastvmt.UserError(f"row {name!r}: all rows share one {changed[0]}")
        if settings_hash(row, args) not in hashes:
            rows[name] = row
            hashes.add(settings_hash(row, args))
    return rows


def settings_hash(row, args):
    """Of what decides a row's result but clip, prompt and seed; args' settings measure the flow of all rows."""
    settings = [{k: v for k, v in vars(x).items() if k not in OTHERS | {"preset"}} for x in (row, args)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def code_hash():
    """Of the method, the model and the rivals; a result of other code is not computed anew, but the table says so."""
    files = b"".join(Path(module.__file__).read_bytes() for module in (fastvmt, wan_min, rivals))
    return hashlib.sha256(files).hexdigest()[:12]


class Clip(NamedTuple):
    name: str
    seed: int  # of the noise
    prompts: list
    video: object  # () -> (1, 3, T, H, W)
    scene: dict | None = None  # of the toy's world, whose motion is known

    @property
    def slug(self):
        """Its name as a file's."""
        return re.sub(r"\W+", "-", self.name)


def make_clips(args, model):
    size, turn = fastvmt.canvas(args, model)
    lines = args.prompts.read_text().splitlines() if args.prompts else [args.prompt or ""]
    prompts = [line.strip() for line in lines if line.strip()]
    if args.made_clips:
        frames, clips = (args.frames - 1) // 4 * 4 + 1, []
        for n in range(args.made_clips):
            motion, prompt = made.motion_and_prompt(n, args.model == "toy")
            scene = made.make_scene(motion, args.seed + n, size, frames)
            video = partial(made.render, scene, args.seed + n, size, frames)
            clips.append(Clip(f"{motion}-{args.seed + n}", args.seed + n, prompts or [prompt], video, scene))
        return clips
    if args.model == "toy":
        clips = []
        kinds = ("look-alikes",) if args.look_alikes else TOY_CAMERAS
        for n, kind in zip(range(args.clips), kinds * args.clips):
            seed = args.seed + n
            video, scene, prompt = toy.held_out_of_kind(10000 + seed, kind, size)
            clips.append(Clip(f"{kind} {10000 + seed}", seed, [prompt], lambda video=video: video[None], scene))
        return clips
    refs = args.refs or [args.ref]
    if not prompts or not refs[0]:
        raise fastvmt.UserError("--refs or --prompts are missing or empty")

    read = partial(fastvmt.read_video, num_frames=args.frames, size=size, fps=args.fps or model.fps, start=args.start,
                   turn=turn)  # fmt: skip
    return [Clip(ref.rstrip("/"), args.seed, prompts, partial(read, ref)) for ref in refs]


# ---- Results ---------------------------------------------------------------------------------------------------------


def run_row(dit, counts, noise, reference, contexts, row, step=fastvmt.euler_step, **seams):
    """Latents of one row's run, {column: value} of what it cost, and its unguided part: σs, latents at the first.

    seams: of fastvmt.sample.
    """
    guided, sigmas, unguided = fastvmt.guided_steps(row.steps, row.config), [], []

    def noted(velocity, x, sigma, next_sigma):
        if sigmas and sigma >= sigmas[-1]:  # a new attempt, with less memory
            sigmas.clear()
        if len(sigmas) == guided:
            unguided[:] = [x]
        sigmas.append(sigma)
        return step(velocity, x, sigma, next_sigma)

    device = noise.device
    counts.clear()
    cost.peak_memory(device, reset=True)
    start = cost.clock(device)
    latents = fastvmt.generate(row, row.config, dit, noise, contexts, None if row.no_transfer else reference,
                               step=noted, **seams | rivals.seams(row))  # fmt: skip
    total, passes = cost.clock(device) - start, cost.run_counts(row)
    gradients = passes["gradient"] + passes.get("coarse gradient", 0)
    columns = {
        "total s": total, "guidance s": total - counts["seconds"], "denoising s": counts["seconds"],
        "gradients": gradients, "block forwards": counts["forwards"], "block backwards": counts["backwards"],
        "peak GiB": cost.peak_memory(device) / 2**30,
    }  # fmt: skip
    return latents, columns, [torch.tensor([*sigmas[guided:], 0.0]), *unguided]


def every_velocity(dit, sigmas, x, contexts, row, step=fastvmt.euler_step, **seams):
    """Latents that the unguided part of a run, from x at the first of sigmas on, leads to with every velocity."""
    return fastvmt.sample(dit, x, sigmas, *contexts[:2], cfg_scale=row.cfg_scale, step=step)


def psnr(a, b):
    """Peak signal-to-noise ratio of videos in [-1, 1], in dB."""
    return -10 * ((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean() / 4).clamp(min=1e-12).log10().item()


def flow_columns(flow_ref, flow, entropy, num_frames, args):
    """{column: value} of the flow of a result."""
    loss = fastvmt.amf_loss(flow_ref, flow, num_frames=num_frames, span=args.span, alpha=args.alpha)
    cosine, error = metrics.flow_agreement(flow_ref, flow)
    return {"L_AMF": loss.item(), "flow cosine": cosine, "flow error, tokens": error, "entropy": entropy.item()}


def motion_columns(tracker, reference):
    """Function (result, prompt) -> {column: value} of the motion of videos (1, 3, T, H, W)."""
    ref = metrics.visible_tracks(*tracker(reference))

    def measure(result, prompt):
        gen = metrics.visible_tracks(*tracker(result))
        return {"motion fidelity": metrics.motion_fidelity(ref, gen).item(),
                "track error, px a frame": metrics.track_error(ref, gen).item(), "tracks": len(gen),
                "frames": gen.shape[1]}  # fmt: skip

    return measure


def clip_columns(clip, reference):
    """Function (result, prompt) -> {column: value} of what a video (1, 3, T, H, W) shows."""

    def measure(result, prompt):
        frames, text = metrics.clip_features(*clip, result, prompt)
        return {"text similarity": metrics.text_similarity(frames, text).item(),
                "temporal consistency": metrics.temporal_consistency(frames).item()}  # fmt: skip

    return measure


def open_metrics(device):
    """List of what makes, of a reference, a function (result, prompt) -> {column: value}; says what cannot be had."""
    opened = []
    for name, load, columns in (("CoTracker", metrics.load_cotracker, motion_columns),
                                ("CLIP", metrics.load_clip, clip_columns)):  # fmt: skip
        try:
            opened.append(partial(columns, load(device)))
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{name} cannot be had, so its columns are left out ({reason})")
    return opened


def read_results(folder):
    """The results on disk, of all ranks; a last line that a killed run left torn is not read."""
    lines = [line for path in sorted(folder.glob("results*.jsonl")) for line in path.read_text().splitlines(True)]
    return [json.loads(line) for line in lines if line[-1] == "\n"]


@torch.no_grad()
def compute(rows, clips, args, model, **seams):
    """Every result of this rank that is not on disk yet; a clip's rows follow each other, so that times compare."""
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    path, device = args.out / f"results{rank if ranks > 1 else ''}.jsonl", torch.device(args.device)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without what a killed run left of its last line
    done = {tuple(line["key"]) for line in read_results(args.out)}
    jobs = [(clip, (settings_hash(row, args), clip.name, prompt, clip.seed), name)
            for clip in clips[rank::ranks] for prompt in clip.prompts for name, row in rows.items()]  # fmt: skip
    jobs = [job for job in jobs if job[1] not in done]
    if not jobs:
        return
    prompts = [prompt for clip in clips for prompt in clip.prompts]  # all, so that a resumed run's batch is the same
    prompts = list(dict.fromkeys(["", *(row.negative_prompt for row in rows.values()), *prompts]))
    contexts = dict(zip(prompts, model.encode_prompts(prompts).split(1)))
    codec, dit = model.load_codec(args.vae_tiles), model.load_dit()
    for block in dit.blocks if args.compile else ():
        block.compile()
    real_weights = args.model not in ("toy", "tiny") and not args.random_weights
    opened = open_metrics(device) if real_weights and not args.made_clips else []
    classes = effect.texture_classes(size=fastvmt.canvas(args, model)[0]) if args.model == "toy" else None
    counts, warm = cost.count_passes(dit), False
    machine = f"{cost.device_name(device)}, torch {torch.__version__}"
    for clip, jobs_of_clip in groupby(jobs, key=lambda job: job[0]):
        video = clip.video()
        if args.keep_videos:
            fastvmt.write_video(args.out / f"{clip.slug}.mp4", video, args.fps or model.fps, clip.name)
        others = [columns(video) for columns in opened]
        reference = codec.encode(video.to(device))
        noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(clip.seed)).to(device)

        flow_ref = metrics.read_flow(dit, reference, noise, contexts[""], args.config)
        for _, key, name in jobs_of_clip:
            row, prompt = rows[name], key[2]
            inputs = noise, reference, (contexts[prompt], contexts[row.negative_prompt], contexts[""])
            if not warm:  # what runs first is slow
                short = {"steps": 1, "config": replace(row.config, inner_steps=1)}
                run_row(dit, counts, *inputs, argparse.Namespace(**vars(row) | short), **seams)
                warm = True
            latents, columns, unguided = run_row(dit, counts, *inputs, row, **seams)
            # The flow with args' settings, whatever the row's, so that rows compare; the entropy with the row's.
            flow = metrics.read_flow(dit, latents, noise, contexts[""], args.config)
            entropy = metrics.read_entropy(dit, latents, noise, contexts[""], row.config)
            columns |= flow_columns(flow_ref, flow, entropy, noise.shape[2] // dit.patch_size[0], args)
            line = {"key": key, "row": name, "columns": columns, "code": code_hash(), "on": machine}
            reused = row.velocity_interval > 1 and len(unguided) > 1 and not args.made_clips
            result = codec.decode(latents) if clip.scene or others or args.keep_videos or reused else None
            if reused:
                whole = every_velocity(dit, *unguided, inputs[2], row, **seams)
                columns["PSNR to every velocity, dB"] = psnr(result, codec.decode(whole))
            if args.made_clips:
                columns |= made.error_columns(result[0], clip.scene)
            elif clip.scene:
                columns["motion error, px a frame"] = toy.motion_error(result[0].cpu(), clip.scene)
            if classes:
                columns["prompt right"] = float(effect.shows(result[0].cpu(), prompt, classes))
            for other in others:
                columns |= other(result, prompt)
            if args.keep_videos:
                line["video"] = f"{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}.mp4"
                fastvmt.write_video(args.out / line["video"], result, args.fps or model.fps, json.dumps(line))
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{clip.name}, {name}: {columns['total s']:.1f} s", flush=True)


# ---- Table -----------------------------------------------------------------------------------------------------------


def mean_and_error(values):
    """Mean ± standard error, to two digits of that; NaN values, of clips where nothing moves, are left out."""
    values = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if not len(values):
        return ""
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0
    if not error:
        return f"{values.mean():.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def markdown(title, head, rows):
    """Lines of a table; rows {name: cells}."""
    yield f"| {title} | {' | '.join(head)} |"
    yield "|---" + "|--:" * len(head) + "|"
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join(cells)} |"


def make_table(results, rows, args):
    """Markdown of the rows' results: means, then paired differences to the full method, each ± standard error."""
    cells = {name: {tuple(line["key"][1:]): line["columns"] for line in results if line["key"][0] == wanted}
             for name, wanted in ((name, settings_hash(row, args)) for name, row in rows.items())}  # fmt: skip
    columns = list(dict.fromkeys(column for row in cells.values() for cell in row.values() for column in cell))
    full = cells["full method"]

    def lines(title, values):
        texts = {}
        for name, runs in values.items():
            means = (mean_and_error([run[column] for run in runs if column in run]) for column in columns)
            texts[name] = [str(len(runs)), *means]
        return markdown(title, ["n", *columns], texts)

    differences = {name: [{column: row[key][column] - full[key][column] for column in row[key] if column in full[key]}
                          for key in row if key in full] for name, row in cells.items() if row is not full}  # fmt: skip
    parts = [lines("mean", {name: list(row.values()) for name, row in cells.items()})]
    parts += [lines("minus the full method", differences)] if differences else []
    return "\n\n".join("\n".join(part) for part in parts)


def draw(results, rows, clips, args, model):
    """A GIF in OUT for each clip and prompt with results of all rows: the reference, plain generation, the others."""
    lines, fps = {tuple(line["key"]): line for line in results}, args.fps or model.fps
    (height, width), turn = fastvmt.canvas(args, model)
    size = round(effect.GIF_WIDTH * height / width), effect.GIF_WIDTH
    read = partial(fastvmt.read_video, num_frames=args.frames, size=size, fps=fps, turn=turn)
    for clip in clips:
        for n, prompt in enumerate(clip.prompts):
            shown = {"reference": f"{clip.slug}.mp4"}
            for name, row in sorted(rows.items(), key=lambda row: row[0] != "no transfer"):
                line = lines.get((settings_hash(row, args), clip.name, prompt, clip.seed), {})
                error = line.get("columns", {}).get("motion error, %")
                shown[name if error is None else f"{name}: error {error:.0f} %"] = line.get("video")
            if all(shown.values()):
                path = args.out / f"{clip.slug}{f'-{n}' * (n > 0)}.gif"
                effect.write_gif(path, {name: read(str(args.out / file)) for name, file in shown.items()}, fps)
                print(f"drawn in {path}")


# ---- Command line ----------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = fastvmt.build_parser()
    parser.prog, parser.description = "python -m lab.table1", __doc__.splitlines()[0]
    add = parser.add_argument_group("table 1").add_argument
    add("--refs", nargs="+", help="reference clips, instead of --ref: videos, or folders of pictures")
    add("--prompts", type=Path, help="file of prompts, one a line, instead of --prompt; each is tried on every clip")
    add("--clips", type=int, default=4, help="how many clips of the toy's world")
    add("--made-clips", type=int, default=0, help="how many made-up clips of known motion, for any model, instead of "
        "--refs: what the camera of each result does is measured from its pixels")  # fmt: skip
    add("--look-alikes", action="store_true", help="of those whose texture repeats beyond the window")
    names = ", ".join(map(repr, ROWS))
    add("--rows", nargs="+", metavar="ROW", help=f"beside the full method: {names}, changes of settings such as "
        "'interval=10, tau=2', 'blocks' (each block), 'ablation' (the toy's, in the README), 'rivals' (of "
        "lab/rivals.py), 'SMM: lr=0.01 0.01' (one of these, changed)")  # fmt: skip
    add("--keep-videos", action="store_true", help="write references and results to OUT, and a GIF of all rows side by "
        "side")  # fmt: skip
    add("--table-only", action="store_true", help="the table of the results that are on disk, without a run")
    add("--random-weights", action="store_true", help="random weights for 1.3B or 14B, to study speed and memory")
    add("--dry-run", action="store_true", help="no table, but FLOPs and memory of a run of this size, and the FLOPs of "
        "--rows, without a GPU")  # fmt: skip
    add("--bench", action="store_true", help="no table, but seconds, FLOP/s and memory of each part of a run, here")
    add("--peak-tflops", type=float, help="with --bench: the card's bf16 peak, if it is not a known card")
    parser.set_defaults(out=Path("table1"))
    flags = parser.parse_args(argv)
    fastvmt.check_limits(vars(flags), clips=(1, 10**6), made_clips=(0, 10**6))
    if flags.mask or flags.preview:
        raise fastvmt.UserError("--mask and --preview are for fastvmt.py, one run at a time")
    cost.pick_gpu(flags.device)
    random_weights = flags.random_weights or flags.dry_run and flags.model != "toy"
    args, config, model = fastvmt.parse_arguments(argv, parser, random_weights=random_weights)
    args.config = config
    args.keep_videos |= args.made_clips > 0
    return args, model


def main(argv=None, then=lambda results, rows, args: None, **seams):
    """The command line, for a change of the method with its features, losses or step; give each another --out.

    then: called once the table is written.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, model = parse_arguments(argv)
        if args.dry_run or args.bench:
            rows = make_rows(argv, args, model.blocks) if args.rows else {"full method": args}
            for line in cost.bench(args, model) if args.bench else cost.dry_run(args, model, rows):
                print(line, flush=True)
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        rows = make_rows(argv, args, model.blocks)
        clips = make_clips(args, model) if args.keep_videos or not args.table_only else ()
        if not args.table_only:
            compute(rows, clips, args, model, **seams)
        if int(os.environ.get("RANK", 0)):
            return 0
        results = read_results(args.out)
        table = make_table(results, rows, args)
        if old := sum(line["code"] != code_hash() for line in results):
            table += f"\n\n{old} results in {args.out} come from another version of the code; give another --out."
        places = dict.fromkeys(line["on"] for line in results if "on" in line)
        table += "\n\n" + "; ".join([*places, f"`python -m lab.table1 {shlex.join(argv)}`"])
        (args.out / "table.md").write_text(table + "\n")
        print(table)
        if args.keep_videos:
            draw(results, rows, clips, args, model)
        then(results, rows, args)
        return 0
    except BaseException as error:
        code, text = fastvmt.explain(error)
        print(f"lab.table1: {text}" + "; the same command goes on from here" * (code != 2), file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
