"""The names of the coming fastvmt on today's; goes with the merge (table1.py and cost.py then call fastvmt's own)."""

import torch

import fastvmt
import wan_min

offload_blocks = wan_min.offload


def window_loss(key_mean, *, num_frames, span=5, squared=False):
    """As the coming one: without nonzero, whose result has no shape where tensors have no data."""
    lengths = [num_frames - d for d in range(1, min(span + 1, num_frames))]
    by_offset = key_mean.split(lengths)[: span - 1]
    loss = key_mean.new_zeros(())
    for i in range(num_frames):
        path = [means[i] for means in by_offset if i < len(means)]
        if len(path) > 1:
            change = torch.stack(path).diff(dim=0)
            loss = loss + (change.square().sum(-1) if squared else torch.linalg.vector_norm(change, dim=-1)).mean()
    return loss / num_frames


fastvmt.window_loss = window_loss


def build_parser():
    return fastvmt.build_parser({})


def parse_arguments(argv, parser):
    known = fastvmt.Parser(add_help=False)
    known.add_argument("--model", default="1.3B")
    name = known.parse_known_args(argv)[0].model
    parser.set_defaults(**{k: v for k, v in fastvmt.PRESETS.get(name, {}).items() if k != "canvas"})
    args = parser.parse_args(argv)
    if args.negative_prompt is None:
        args.negative_prompt = fastvmt.NEGATIVE_PROMPT
    dtype = fastvmt.DTYPES[args.dtype or ("fp32" if args.device == "cpu" else "bf16")]
    model = None if args.dry_run else fastvmt.find_model(args)
    canvas = fastvmt.PRESETS.get(name, {}).get("canvas", (480, 832))

    def encode_prompts(prompts):
        if name == "toy":
            return fastvmt.load_toy().encode_prompts(prompts).to(args.device)
        if model in wan_min.ARCHITECTURES:
            return wan_min.random_contexts(len(prompts), model, args.device)
        return wan_min.encode_prompts(prompts, model, args.device, offloaded=args.offload)

    def load_dit(progress=iter):
        dit = fastvmt.load_dit(model, "cpu" if args.offload else args.device, dtype)
        return wan_min.offload(dit, args.device) if args.offload else dit

    blocks = 6 if name == "toy" else wan_min.dit_layers(name if args.dry_run else model)
    tuple_ = dict(blocks=blocks, encode_prompts=encode_prompts, load_dit=load_dit, canvases=(canvas,), fps=16.0,
                  load_codec=lambda: fastvmt.load_codec(model, args.device))  # fmt: skip
    return args, type("Model", (), {k: staticmethod(v) if callable(v) else v for k, v in tuple_.items()})


def read_reference(args, model):
    return fastvmt.read_reference(args)


@torch.no_grad()
def measured_flow(dit, latents, noise, null, config):
    return fastvmt.noised_flow(dit, latents, noise, null, config)
