# SPDX-License-Identifier: Apache-2.0
"""One video on several GPUs: each holds all weights and a part of the tokens, as in Ulysses (arXiv 2309.14509).

torchrun --nproc-per-node 4 -m lab.parallel --ref in.mp4 --prompt "..."     # flags of fastvmt.py

Between attentions a rank has all heads of some tokens, within self-attention all tokens of some heads. The sampler and
the AMF run unchanged on every rank, on whole latents, Q and K; rank 0 alone prints and writes. n ranks.
"""

import os
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastvmt
import wan_min
from lab import cost


class Finished(Exception):
    """Ends a rank that neither decodes nor writes."""


def reshard(x, mesh, source, target, shape):
    """This rank's part of a tensor of a shape under placement target; x: its part under source. Differentiable."""
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(x, mesh, [source], run_check=False, shape=torch.Size(shape), stride=stride)
    return whole.redistribute(placements=[target]).to_local()


def shard(x, mesh, dim):
    """This rank's part, along dim, of what every rank has."""
    return reshard(x, mesh, Replicate(), Shard(dim), x.shape)


def gather(x, mesh, dim, size):
    """The whole of what each rank has a part of; size: of dim. The gradient of every rank's copy must be the same."""
    return reshard(x, mesh, Shard(dim), Replicate(), (*x.shape[:dim], size, *x.shape[dim + 1 :]))


def parallelize(dit, mesh):
    """Make a wan_min.DiT compute on the ranks of a mesh what it did on one; returns it."""
    embed, qk, size = dit.embed, dit.qk, 0  # size: tokens of all ranks

    def embed_part(x, t, context):
        nonlocal size
        # All take each rank's rows of x, and of its gradient: else differences in rounding would add up.
        x = gather(shard(x, mesh, 3), mesh, 3, x.shape[3])
        tokens, time, (modulation, context, rope) = embed(x, t, context)
        size = tokens.shape[1]
        return shard(tokens, mesh, 1), time, (modulation, context, shard(rope, mesh, 0))

    def attend(q, k, v):  # (B, N, S/n, D) each
        shape = 3, *q.shape[:2], size, q.shape[3]
        q, k, v = reshard(torch.stack([q, k, v]), mesh, Shard(3), Shard(2), shape).unbind()  # (B, N/n, S, D)
        out = F.scaled_dot_product_attention(q, k, v) if q.numel() else q  # a rank without heads: a GPU's fails
        return reshard(out, mesh, Shard(1), Shard(2), shape[1:])

    dit.embed = embed_part
    dit.qk = lambda *args, **options: [gather(x, mesh, 1, size) for x in qk(*args, **options)]
    dit.head.register_forward_hook(lambda head, inputs, out: gather(out, mesh, 1, size))
    for block in dit.blocks:
        block.self_attn.attend = attend
    return dit


def prepare(argv):
    """fastvmt.run's arguments on this rank. Raises UserError for what does not go with several."""
    parser = fastvmt.build_parser(required=True)
    cost.pick_gpu(parser.parse_args(argv).device)
    args, config, model = fastvmt.parse_arguments(argv, parser)
    for flag in ("decode", "offload", "compile"):
        if getattr(args, flag):
            raise fastvmt.UserError(f"--{flag} needs python fastvmt.py")
    if "RANK" not in os.environ:
        raise fastvmt.UserError("start it with torchrun --nproc-per-node 2 -m lab.parallel")
    if args.checkpoint == "auto":  # a rank that tried again, with less memory, would leave the others waiting
        args.checkpoint = "on"

    def load_dit(progress=iter):
        dit = model.load_dit(progress)
        if not isinstance(dit, wan_min.DiT):
            raise fastvmt.UserError(f"--model {args.model} needs python fastvmt.py")
        return parallelize(dit, init_device_mesh(torch.device(args.device).type, (dist.get_world_size(),)))

    return args, config, model._replace(load_dit=load_dit)


def follow(args, config, model, step=fastvmt.euler_step, **seams):
    """fastvmt.run up to the last step, without claims or files."""

    def until_last(velocity, x, sigma, next_sigma):
        x = step(velocity, x, sigma, next_sigma)
        if next_sigma == 0:
            raise Finished
        return x

    args.preview = False
    with suppress(Finished):
        fastvmt.transfer(args, config, model, args.out / "none", step=until_last, **seams)


@torch.no_grad()
def main(argv=None, **seams):
    """fastvmt.main on each process that torchrun started. Returns the exit code."""
    rank, out, err = int(os.environ.get("RANK", 0)), sys.stdout, sys.stderr
    if rank:
        out = err = open(os.devnull, "w")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            args, config, model = prepare(argv)
            dist.init_process_group(timeout=timedelta(days=1))  # torchrun ends all when one ends
            (follow if rank else fastvmt.run)(args, config, model, **seams)
            dist.destroy_process_group()
        return 0
    except BaseException as error:
        lost = "by peer" in str(error)  # its own line says why
        code, text = (1, "another rank has ended") if lost else fastvmt.explain(error)
        print(f"lab.parallel, rank {rank}: {text}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
