# SPDX-License-Identifier: Apache-2.0
"""Wan in the Diffusers layout as a base model of fastvmt: Wan 2.1, Wan 2.2 TI2V-5B and A14B, LoRAs, quantised weights.

python fastvmt.py --model diffusers:Wan-AI/Wan2.1-T2V-1.3B-Diffusers  # or diffusers:FOLDER

That a model opens does not show that motion transfers on it.
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

import wan_min
from wan_min import ModelError


class Found(Exception):
    """Ends a forward pass, with what it was run for."""


class StopAtAttention(TorchFunctionMode):
    """Ends a forward pass at its first attention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            found = dict(zip(("query", "key"), args)) | kwargs
            raise Found(found["query"], found["key"])
        return func(*args, **kwargs)


def run_block(block, *inputs):
    """As wan_min.Block.forward, whose last argument is only_qk."""
    *inputs, only_qk = inputs
    if not only_qk:
        return block(*inputs)
    try:
        with StopAtAttention():
            block.forward(*inputs)  # eagerly, even if it is compiled
    except Found as found:
        return [x.transpose(1, 2) for x in found.args]  # (B, S, N, D)
    raise ModelError("Q and K cannot be read: leave Diffusers' attention backend native")


def embed(transformer, *inputs):
    """As wan_min.DiT.embed: what a transformer hands to its first block."""

    def stop(block, inputs):
        raise Found(*inputs)

    hook = transformer.blocks[0].register_forward_pre_hook(stop)
    try:
        transformer(*inputs)
    except Found as found:
        tokens, *shared = found.args
        return tokens, None, shared
    finally:
        hook.remove()


class DiT(nn.Module):
    """Transformers as a wan_min.DiT; of two, the second is for time steps below `boundary`."""

    def __init__(self, experts, boundary):
        super().__init__()
        self.experts, self.boundary = nn.ModuleList(experts), boundary
        self.patch_size = tuple(experts[0].config.patch_size)

    @property
    def blocks(self):
        return [block for expert in self.experts for block in expert.blocks]

    def choose(self, x, t, context):
        """The expert of t (B,), and its inputs."""
        expert = self.experts[-1 if t[0] < self.boundary else 0]
        # One time for all tokens, also of TI2V-5B: each token's own would be the same, and take a gigabyte.
        return expert, x.to(expert.dtype), t, context.to(expert.dtype)

    def forward(self, x, t, context):
        expert, *inputs = self.choose(x, t, context)
        return expert(*inputs, return_dict=False)[0].float()

    def qk(self, x, t, context, block, **options):
        """As wan_min.DiT.qk, whose code runs on this expert."""
        expert, *inputs = self.choose(x, t, context)
        blocks = [partial(run_block, layer) for layer in expert.blocks]
        dit = SimpleNamespace(embed=partial(embed, expert), blocks=blocks)
        return wan_min.DiT.qk(dit, *inputs, block, **options)


def make_codec(vae, vae_tiles):
    """wan_min.make_codec of a pipeline's VAE; its tiles are Diffusers' own."""
    statistics = vae.config.latents_mean, vae.config.latents_std
    mean, std = torch.tensor(statistics, device=vae.device).view(2, -1, 1, 1, 1)

    @torch.no_grad()
    def run(convert, x, tile=True, progress=iter):
        if tile:
            vae.enable_tiling()
        return convert(x)

    encode = partial(run, lambda video: (vae.encode(video).latent_dist.mode() - mean) / std)
    decode = partial(run, lambda latents: vae.decode(latents * std + mean).sample)
    return wan_min.make_codec(SimpleNamespace(encode=encode, decode=decode), vae_tiles)


def open_model(name, device="cpu", dtype=torch.float32, *, offload=False, random_weights=False, lora=None,
               prepare=lambda pipe: pipe):  # fmt: skip
    """The WanPipeline of diffusers:FOLDER, or of a hub repo id, as a wan_min.Model. Raises ModelError.

    Cheap: reads configs. lora is a file; prepare(pipe) -> pipe may change or replace the transformers.
    """
    needed = "diffusers accelerate transformers ftfy" + " peft" * bool(lora)
    missing = [package for package in needed.split() if not find_spec(package)]
    if missing:
        raise ModelError(f"--model {name} needs more packages: pip install {' '.join(missing)}")
    from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline, WanTransformer3DModel

    warnings.filterwarnings("ignore", "`torch_dtype`")  # so older versions call it
    path, device = name.removeprefix("diffusers:"), torch.device(device)
    index = wan_min.read(path, DiffusionPipeline.load_config)
    boundary = 1000 * (index.get("boundary_ratio") or 0)
    if index["_class_name"] != "WanPipeline":
        raise ModelError(f"{path} is a {index['_class_name']}: only WanPipeline can be used")
    if random_weights:
        raise ModelError(f"{name} has neither --random-weights nor --dry-run")
    if lora and boundary:
        raise ModelError(f"{path} has two transformers: add LoRAs in Python (README)")
    if lora and not os.path.isfile(lora):
        raise ModelError(f"--lora {lora} is not a file")
    config = wan_min.read(path, partial(WanTransformer3DModel.load_config, subfolder="transformer"))
    vae_config = wan_min.read(path, partial(AutoencoderKLWan.load_config, subfolder="vae"))

    def load(*parts, dtype=torch.float32):
        """The pipeline with these parts only."""
        others = {part: None for part, kind in index.items() if isinstance(kind, list) and part not in parts}
        return wan_min.read(path, partial(WanPipeline.from_pretrained, torch_dtype=dtype, **others))

    @torch.no_grad()
    def encode_prompts(prompts):
        pipe = load("tokenizer", "text_encoder", dtype=torch.bfloat16)
        if offload and device.type != "cpu":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
        contexts, _ = pipe.encode_prompt(prompts, None, False, max_sequence_length=wan_min.TEXT_LENGTH, device=device)
        return contexts.float()

    def load_dit(progress=iter):
        pipe = load("transformer", "transformer_2", dtype=dtype)
        if lora:
            wan_min.read(lora, pipe.load_lora_weights)
            if not pipe.get_active_adapters():
                raise ModelError(f"{lora} holds no LoRA of this model")
            pipe.fuse_lora(components=["transformer"])  # where it costs no time
            pipe.unload_lora_weights()
        pipe = prepare(pipe)
        experts = [pipe.transformer, pipe.transformer_2] if boundary else [pipe.transformer]
        for expert in experts:
            expert.requires_grad_(False)
            place = wan_min.offload_blocks if offload else nn.Module.to
            place(expert, device)
            expert.scale_shift_table.data = expert.scale_shift_table.to(device)  # offloading moves modules
        return DiT(experts, boundary)

    size, frames, fps, defaults = (480, 832), 81, 16.0, {"negative_prompt": wan_min.NEGATIVE_PROMPT}
    if index.get("expand_timesteps"):  # Wan 2.2 TI2V-5B
        size, frames, fps = (704, 1280), 121, 24.0
        defaults |= {"frames": frames}
    if boundary:
        defaults |= {"ref_noise": "match"}  # a clean reference would be read by the other transformer
    return wan_min.Model(
        blocks=config["num_layers"], encode_prompts=encode_prompts, load_dit=load_dit,
        load_codec=lambda vae_tiles=False: make_codec(load("vae").vae.to(device), vae_tiles),
        canvases=(size, size[::-1]), max_frames=frames, fps=fps, defaults=defaults,
        multiple=vae_config.get("scale_factor_spatial", 8) * config["patch_size"][1],
    )  # fmt: skip
