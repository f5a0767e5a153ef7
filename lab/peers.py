# SPDX-License-Identifier: Apache-2.0
"""Time and memory of Wan's parts here and in diffusers, with the same random weights at the 1.3B's width.

python -m lab.peers    # pip install diffusers; a few minutes on a CPU
"""

import argparse
import time

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders import single_file_utils

import wan_min
from lab import cost

WIDTHS = dict(dim=1536, num_heads=12, ffn_dim=8960, text_dim=4096)
VAE_WIDTH = 96


def seconds(device):
    """Of this process on a CPU, so that other programs disturb little; else of the clock."""
    return time.process_time() if device.type == "cpu" else cost.clock(device)


def load_into(theirs, ours, convert):
    """theirs with the weights of ours, in the same precisions as diffusers' from_pretrained would load them."""
    theirs.load_state_dict(convert({name: p.float() for name, p in ours.state_dict().items()}))
    weight = next(p for p in ours.parameters() if p.ndim > 1)  # its first convolution's
    for name, p in theirs.requires_grad_(False).named_parameters():
        kept = any(part in name for part in theirs._keep_in_fp32_modules or ())
        p.data = p.data.to(weight.device, torch.float32 if kept else weight.dtype)
    return theirs.eval()


def velocities(device, dtype, blocks, shape):
    """{name: function} of one velocity by either, of latents of this shape."""
    ours = wan_min.random_model(wan_min.DiT, WIDTHS | {"num_layers": blocks}, device, dtype)
    dim, heads, ffn_dim, text_dim = WIDTHS.values()
    theirs = WanTransformer3DModel(num_attention_heads=heads, attention_head_dim=dim // heads, ffn_dim=ffn_dim,
                                   text_dim=text_dim, num_layers=blocks, cross_attn_norm=True)  # fmt: skip
    theirs = load_into(theirs, ours, single_file_utils.convert_wan_transformer_to_diffusers)
    x, context = torch.randn(shape, device=device), torch.randn(1, wan_min.TEXT_LENGTH, text_dim, device=device)
    t = torch.tensor([900.0], device=device)
    return {"ours": lambda: ours(x, t, context),
            "diffusers": lambda: theirs(x.to(dtype), t, context.to(dtype), return_dict=False)[0].float()}  # fmt: skip


def codecs(device, shape):
    """{name: function} of encoding by either, and of decoding, of whole frames."""
    ours = wan_min.random_model(wan_min.VAE, dict(dim=VAE_WIDTH), device)
    theirs = load_into(AutoencoderKLWan(base_dim=VAE_WIDTH), ours, single_file_utils.convert_wan_vae_to_diffusers)
    mean, std = (torch.tensor(x, device=device).view(1, 16, 1, 1, 1)
                 for x in (theirs.config.latents_mean, theirs.config.latents_std))  # fmt: skip
    z = torch.randn(shape, device=device)
    video = torch.rand(1, 3, 4 * shape[2] - 3, 8 * shape[3], 8 * shape[4], device=device) * 2 - 1
    encode = {"ours": lambda: ours.encode(video, tile=None),
              "diffusers": lambda: (theirs.encode(video).latent_dist.mode() - mean) / std}  # fmt: skip
    decode = {"ours": lambda: ours.decode(z, tile=None), "diffusers": lambda: theirs.decode(z * std + mean).sample}
    return encode, decode


def compare(calls, device, rounds):
    """Cells of a line: relative difference of the outputs, ratio of the times with its range, tensors' peaks in GiB."""
    outs, peaks, times = {}, {}, {name: [] for name in calls}
    for name, call in calls.items():  # what runs first is slow
        with cost.Cost() as count:
            outs[name] = call()
        peaks[name] = count.peak / 2**30
    for turn in range(rounds):
        for name in sorted(calls, reverse=turn % 2):
            start = seconds(device)
            calls[name]()
            times[name].append(seconds(device) - start)
    ours, theirs = (torch.tensor(times[name]) for name in calls)
    ratio, difference = ours / theirs, (outs["ours"] - outs["diffusers"]).norm() / outs["diffusers"].norm()
    yield from (f"{difference:.1e}", f"{ours.median():.2f}", f"{theirs.median():.2f}")
    yield f"{ratio.median():.3f} [{ratio.min():.3f}, {ratio.max():.3f}]"
    yield from (f"{peaks[name]:.2f}" for name in calls)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=2, help="of the 30")
    parser.add_argument("--latents", type=int, nargs=3, default=(2, 30, 52), help="frames, rows and columns")
    parser.add_argument("--vae-latents", type=int, nargs=3, default=(3, 10, 16), help="the same for the VAE")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    print("| | difference | ours, s | diffusers, s | ours/diffusers | ours, GiB | diffusers, GiB |")
    print("|---" + "|--:" * 6 + "|")
    for name, dtype in (("velocity, fp32", torch.float32), ("velocity, bf16", torch.bfloat16)):
        line = compare(velocities(device, dtype, args.blocks, (1, 16, *args.latents)), device, args.rounds)
        print(f"| {name} | {' | '.join(line)} |", flush=True)
    for name, calls in zip(("encode", "decode"), codecs(device, (1, 16, *args.vae_latents))):
        print(f"| {name} | {' | '.join(compare(calls, device, args.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
