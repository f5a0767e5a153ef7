# SPDX-License-Identifier: Apache-2.0
"""Wan in the Diffusers layout as a base model of fastvmt: Wan 2.1, Wan 2.2 TI2V-5B and A14B, with LoRAs or quantised.

python fastvmt.py --model diffusers:Wan-AI/Wan2.1-T2V-1.3B-Diffusers --ref in.mp4 --prompt "..."  # or diffusers:FOLDER

All but reading Q and K is left to Diffusers. That a model opens does not show that motion transfers on it: block and
temperature were chosen for Wan 2.1. Shapes as in wan_min.py.
"""

import os
import warnings
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as recompute

import wan_min
from wan_min import ModelError


class Found(Exception):
    """Ends a forward pass where what it was run for is known: its arguments."""


class StopAtAttention(TorchFunctionMode):
    """Ends a forward pass at its first attention, with that one's query and key (B, N, S, D)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args)) | kwargs
            raise Found(named["query"], named["key"])
        return func(*args, **kwargs)


def block_qk(block, *args):
    """Self-attention q, k (B, S, N, D) of a block, post-norm and post-RoPE; no attention is computed."""
    try:
        with StopAtAttention():
            block.forward(*args)  # a compiled block would not stop
    except Found as found:
        return [x.transpose(1, 2) for x in found.args]
    raise ModelError("Q and K are read at PyTorch's own attention: leave Diffusers' attention backend native")


def block_inputs(transformer, *args):
    """What a transformer hands to its first block: tokens (B, S, dim), and what all blocks share."""

    def stop(block, inputs):
        raise Found(*inputs)

    hook = transformer.blocks[0].register_forward_pre_hook(stop)
    try:
        transformer(*args)
    except Found as found:
        return found.args
    finally:
        hook.remove()


class DiT(nn.Module):
    """Transformers behind wan_min.DiT's calls; of two, the second is for time steps below `boundary`."""

    def __init__(self, experts, boundary):
        super().__init__()
        self.experts, self.boundary = nn.ModuleList(experts), boundary
        self.patch_size = tuple(experts[0].config.patch_size)

    @property
    def blocks(self):
        return [block for expert in self.experts for block in expert.blocks]

    def inputs(self, x, t, context):
        """The expert of the time step t (B,), and its arguments."""
        expert = self.experts[-1 if t[0] < self.boundary else 0]
        # One time for all tokens, also of TI2V-5B: each token's own would be the same, and take a gigabyte.
        return expert, x.to(expert.dtype), t, context.to(expert.dtype)

    def forward(self, x, t, context):
        """Velocity (B, C, F, h, w) fp32, as wan_min.DiT's."""
        expert, *args = self.inputs(x, t, context)
        return expert(*args, return_dict=False)[0].float()

    def qk(self, x, t, context, block, *, checkpoint=False):
        """As wan_min.DiT.qk."""
        expert, *args = self.inputs(x, t, context)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        if checkpoint != "full":
            policy = wan_min.keep_self_attention
            options["context_fn"] = partial(recompute.create_selective_checkpoint_contexts, policy)
        run = partial(recompute.checkpoint, **options) if checkpoint else lambda layer, *args: layer(*args)
        tokens, *shared = block_inputs(expert, *args)
        for layer in expert.blocks[: block - 1]:
            tokens = run(layer, tokens, *shared)
        return run(partial(block_qk, expert.blocks[block - 1]), tokens, *shared)


def add_lora(pipe, path):
    """Merge a LoRA into the transformer's weights, where it costs no time."""
    wan_min.read(path, pipe.load_lora_weights)
    if not pipe.get_active_adapters():
        raise ModelError(f"{path} holds no LoRA of this model")
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()


def make_codec(vae, vae_tiles):
    """wan_min.make_codec of a pipeline's VAE; its tiles are Diffusers' own."""
    mean, std = (torch.tensor(vae.config[f"latents_{x}"], device=vae.device).view(-1, 1, 1, 1) for x in ("mean", "std"))

    @torch.no_grad()
    def convert(call, x, tile="its own", progress=iter):
        if tile:
            vae.enable_tiling()
        return call(x)

    return wan_min.make_codec(SimpleNamespace(
        encode=partial(convert, lambda video: (vae.encode(video).latent_dist.mode() - mean) / std),
        decode=partial(convert, lambda latents: vae.decode(latents * std + mean).sample),
    ), vae_tiles)  # fmt: skip


def open_model(name, device="cpu", dtype=torch.float32, *, offload=False, random_weights=False, lora=None,
               prepare=lambda pipe: pipe):  # fmt: skip
    """The WanPipeline of diffusers:FOLDER, or of a hub repo id, as a wan_min.Model. Raises ModelError.

    Cheap: reads the parts' config.json. prepare(pipe) -> pipe may change or replace its transformers; lora is a file.
    """
    needed = ["diffusers", "accelerate", "transformers", "ftfy"] + ["peft"] * bool(lora)
    missing = [package for package in needed if not find_spec(package)]
    if missing:
        raise ModelError(f"--model {name} needs more packages: pip install {' '.join(missing)}")
    from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline, WanTransformer3DModel

    path, device = name.removeprefix("diffusers:"), torch.device(device)
    index = wan_min.read(path, DiffusionPipeline.load_config)  # which parts there are
    boundary = 1000 * (index.get("boundary_ratio") or 0)
    if index["_class_name"] != "WanPipeline":
        raise ModelError(f"{path} is a {index['_class_name']}: of Diffusers' pipelines only WanPipeline can be used")
    if random_weights:
        raise ModelError(f"{name} has neither --random-weights nor --dry-run")
    if lora and boundary:
        raise ModelError(f"{path} has two transformers: say in Python which of them a LoRA is for (README)")
    if lora and not os.path.isfile(lora):
        raise ModelError(f"--lora {lora} is not a file")
    transformer = wan_min.read(path, partial(WanTransformer3DModel.load_config, subfolder="transformer"))
    vae = wan_min.read(path, partial(AutoencoderKLWan.load_config, subfolder="vae"))

    def load(*parts, dtype):
        """The pipeline with these parts only."""
        others = {part: None for part, kind in index.items() if isinstance(kind, list) and part not in parts}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch_dtype, as older versions call it
            return wan_min.read(path, partial(WanPipeline.from_pretrained, torch_dtype=dtype, **others))

    @torch.no_grad()
    def encode_prompts(prompts):
        pipe = load("tokenizer", "text_encoder", dtype=torch.bfloat16)
        if offload and device.type != "cpu":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
        options = {"do_classifier_free_guidance": False, "max_sequence_length": wan_min.TEXT_LENGTH, "device": device}
        return pipe.encode_prompt(prompts, **options)[0].float()

    def load_codec(vae_tiles=False):
        return make_codec(load("vae", dtype=torch.float32).vae.to(device), vae_tiles)

    def load_dit(progress=iter):
        pipe = load("transformer", "transformer_2", dtype=dtype)
        if lora:
            add_lora(pipe, lora)
        pipe = prepare(pipe)
        experts = [pipe.transformer, pipe.transformer_2] if boundary else [pipe.transformer]
        for expert in experts:
            expert.requires_grad_(False)
            if offload:
                wan_min.offload_blocks(expert, device)
                expert.scale_shift_table.data = expert.scale_shift_table.to(device)  # in none of its modules
            else:
                expert.to(device)
        return DiT(experts, boundary)

    size, max_frames, fps, defaults = (480, 832), 81, 16.0, {"negative_prompt": wan_min.NEGATIVE_PROMPT}
    if index.get("expand_timesteps"):  # Wan 2.2 TI2V-5B
        size, max_frames, fps, defaults = (704, 1280), 121, 24.0, defaults | {"frames": 121}
    if boundary:
        defaults |= {"ref_noise": "match"}  # a clean reference would be read by the other transformer
    multiple = vae.get("scale_factor_spatial", 8) * transformer["patch_size"][1]
    return wan_min.Model(transformer["num_layers"], encode_prompts, load_codec, load_dit, (size, size[::-1]),
                         max_frames, fps, defaults, multiple=multiple)  # fmt: skip
