# SPDX-License-Identifier: Apache-2.0
"""Tests of lab/diffusers_model.py on tiny random pipelines, against wan_min and the pipelines themselves."""

import argparse
import functools
import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import fastvmt
import wan_min
from test_fastvmt import close, perturbed, randn, refused, run_main, watch_copies, write_tokenizer

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from diffusers.loaders import single_file_utils  # noqa: E402

from lab import diffusers_model, table1  # noqa: E402

TINY = wan_min.ARCHITECTURES["tiny"][0]
RECENT = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 36)  # Wan 2.2's tiles are wrong before
KINDS = ["2.1", "5B", "A14B"] if RECENT else ["2.1"]


def make_transformer(seed=0, channels=16):
    """Wan's DiT of random weights, and Diffusers' of the same."""
    sizes = TINY | dict(in_dim=channels, out_dim=channels)
    ours = perturbed(wan_min.random_model(wan_min.DiT, sizes, seed=seed), seed=100 + seed)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=channels, out_channels=channels, text_dim=64,
        freq_dim=32, ffn_dim=192, num_layers=4)  # fmt: skip
    theirs.load_state_dict(single_file_utils.convert_wan_transformer_to_diffusers(dict(ours.state_dict())))
    return ours, theirs


def make_vae(kind):
    """Wan 2.1's VAE of random weights and Diffusers' of the same, or for 5B the latter alone, of 16 x 16 pixels."""
    if kind != "5B":
        ours, theirs = wan_min.random_model(wan_min.VAE, dict(dim=8)), diffusers.AutoencoderKLWan(base_dim=8)
        theirs.load_state_dict(single_file_utils.convert_wan_vae_to_diffusers(dict(ours.state_dict())))
        return ours, theirs
    mean, std = randn(48).tolist(), (1 + randn(48, seed=1).square()).tolist()
    return None, diffusers.AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, latents_mean=mean, latents_std=std, is_residual=True, in_channels=12,
        out_channels=12, patch_size=2, scale_factor_spatial=16)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a pipeline of each kind, and wan_min's modules of the same weights: DiTs and VAE."""
    root, modules = tmp_path_factory.mktemp("pipelines"), {}
    write_tokenizer(root / "tokenizer.json")
    torch.manual_seed(0)
    config = transformers.UMT5Config(vocab_size=298, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    parts = dict(
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_file=str(root / "tokenizer.json"), eos_token="</s>",
                                                       pad_token="<pad>"),
        text_encoder=transformers.UMT5EncoderModel(config),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    for kind in KINDS:
        options = {"5B": {"expand_timesteps": True}, "A14B": {"boundary_ratio": 0.875}}.get(kind, {})
        (dit, transformer), (vae, theirs) = make_transformer(channels=48 if kind == "5B" else 16), make_vae(kind)
        dits = [dit]
        if kind == "A14B":
            second, options["transformer_2"] = make_transformer(seed=1)
            dits.append(second)
        diffusers.WanPipeline(transformer=transformer, vae=theirs, **parts, **options).save_pretrained(root / kind)
        modules[kind] = root / kind, dits, vae
    return modules


@pytest.fixture(params=KINDS)
def case(request, saved):
    """A kind, its folder, its name and opened model, and wan_min's DiTs of the same weights."""
    kind, (folder, dits, _) = request.param, saved[request.param]
    name, channels = f"diffusers:{folder}", 48 if kind == "5B" else 16
    model = diffusers_model.open_model(name)
    return SimpleNamespace(kind=kind, folder=folder, name=name, model=model, dits=dits, channels=channels)


def inputs(channels, seed=0):
    """Latents of 3 frames of 3 x 4 tokens, and a context."""
    return randn(1, channels, 3, 6, 8, seed=seed), randn(1, 20, 64, seed=seed + 1)


def test_a_guided_run_equals_wan_min(saved, tmp_path, monkeypatch):
    folder, (dit,), vae = saved["2.1"]
    monkeypatch.chdir(tmp_path)
    videos = []
    monkeypatch.setattr(fastvmt, "write_video", lambda path, video, *rest: videos.append(video))
    flags = (
        f"--model diffusers:{folder} --ref demo --device cpu --frames 9 --size 48x64 --block 3 --window 3 --steps 4 "
    )
    flags += "--guided-fraction 0.5 --inner-steps 4 --strength 0.9"
    args, config, model = fastvmt.parse_arguments([*flags.split(), "--prompt", "a red fox"])
    tiny = model._replace(load_dit=lambda progress: dit, load_codec=lambda tiles: wan_min.make_codec(vae, tiles))
    for opened in (model, tiny):
        fastvmt.run(args, config, opened)
    args.no_transfer = True
    fastvmt.run(args, config, model)
    theirs, ours, plain = videos
    assert theirs.shape == (1, 3, 9, 48, 64)
    close(theirs, ours, 1e-4)
    assert (theirs - plain).abs().max() > 0.01


def test_sampling_equals_the_pipelines_own(case):
    pipe = diffusers.WanPipeline.from_pretrained(case.folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.to(torch.bfloat16)
    prompts = ["a red  fox &amp; snow", "b"]
    unit = 16 if case.kind == "5B" else 8
    noise = randn(1, case.channels, 3, 6, 8)
    true = pipe(*prompts, height=6 * unit, width=8 * unit, num_frames=9, num_inference_steps=4, guidance_scale=4.0,
                latents=noise, output_type="pt").frames  # (1, T, 3, H, W)  # fmt: skip
    context, negative = case.model.encode_prompts(prompts).split(1)
    assert context.shape == (1, 512, 64) and not torch.equal(context, negative)
    if case.kind == "A14B":
        assert pipe.scheduler.sigmas[0] > 0.875 > pipe.scheduler.sigmas[1]  # both transformers have steps
    with torch.no_grad():
        sigmas = pipe.scheduler.sigmas
        latents = fastvmt.sample(case.model.load_dit(), noise, sigmas, context, negative, cfg_scale=4.0)
    codec = case.model.load_codec()
    video = codec.decode(latents)
    close((video.transpose(1, 2) + 1) / 2, true, 1e-4)
    assert true.std() > 0.05
    mean, std = (torch.tensor(pipe.vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    close(codec.encode(video) * std + mean, pipe.vae.encode(video).latent_dist.mode(), 1e-4)


def test_q_and_k_are_those_of_a_full_pass(case, monkeypatch):
    dit, (x, context) = case.model.load_dit(), inputs(case.channels)
    attention, calls = F.scaled_dot_product_attention, []

    def spy(query, key, *args, **kwargs):
        if query.shape == key.shape:
            calls.append((query.transpose(1, 2), key.transpose(1, 2)))
        return attention(query, key, *args, **kwargs)

    for number, t in ((0, 876.0), (-1, 874.0)):  # about A14B's boundary
        time, oracle = torch.tensor([t]), case.dits[number]
        calls.clear()
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
            velocity = dit(x, time, context)
        assert velocity.dtype == torch.float32 and len(calls) == 4
        close(velocity, oracle(x, time, context).detach(), 1e-4)
        for block in range(1, 5):
            parts = dit.qk(x, time, context, block)
            for part, full, ours in zip(parts, calls[block - 1], oracle.qk(x, time, context, block)):
                assert part.shape == (1, 3 * 3 * 4, 4, 24)
                close(part, full, 1e-6)
                close(part, ours, 1e-4)
    for (f, h, w), token in (((0, 0, 0), 0), ((1, 3, 4), 18), ((2, 5, 7), 35)):
        moved = x.clone()
        moved[0, 5, f, h, w] += 1
        for a, b in zip(dit.qk(x, time, context, 1), dit.qk(moved, time, context, 1)):
            assert (a != b).flatten(2).any(-1).nonzero().tolist() == [[0, token]]


def gradient(dit, x, t, context, **options):
    """Of a sum of Q and K of block 4, and how often self-attention ran."""
    count = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "scaled_dot_product" in op.name() and "backward" not in op.name() and args[0].shape == args[1].shape:
                count.append(op)
            return op(*args, **(kwargs or {}))

    x = x.clone().requires_grad_()
    with Count():
        parts = dit.qk(x, t, context, 4, **options)
        loss = sum((randn(*part.shape, seed=7 + n) * part).sum() for n, part in enumerate(parts))
        return torch.autograd.grad(loss, x)[0], len(count)


def test_gradients_are_alike_in_all_modes(case):
    (x, context), t = inputs(case.channels), torch.tensor([600.0])
    expected, _ = gradient(case.dits[-1], x, t, context)
    streamed = diffusers_model.open_model(case.name, offload=True).load_dit()
    dit = case.model.load_dit()
    runs = [(dit, False, 3), (dit, True, 3), (dit, "full", 6), (streamed, True, 3), (streamed, "full", 6)]
    for module, checkpoint, attentions in runs:
        found, count = gradient(module, x, t, context, checkpoint=checkpoint)
        close(found, expected, 1e-4 * expected.abs().max().item())
        assert count == attentions
    assert torch.equal(dit(x, t, context), streamed(x, t, context))
    assert all(p.is_meta for block in streamed.blocks for p in block.parameters())
    assert not any(p.requires_grad for p in [*dit.parameters(), *streamed.parameters()])


def test_two_blocks_at_most_are_on_the_device(saved, monkeypatch):
    folder, (dit,), _ = saved["2.1"]
    streamed = diffusers_model.open_model(f"diffusers:{folder}", offload=True).load_dit()
    peak = watch_copies(monkeypatch)
    x, context = inputs(16)
    gradient(streamed, x, torch.tensor([600.0]), context, checkpoint="full")
    assert max(peak) == 2 * sum(p.numel() for p in dit.blocks[0].parameters())


def test_compiled_blocks_give_the_same(saved):
    dit, (x, context) = diffusers_model.open_model(f"diffusers:{saved['2.1'][0]}").load_dit(), inputs(16)
    arguments = x, torch.tensor([600.0]), context
    with torch.no_grad():
        plain = dit(*arguments), *dit.qk(*arguments, 3)
        for block in dit.blocks:
            block.compile(backend="eager")
        for a, b in zip(plain, (dit(*arguments), *dit.qk(*arguments, 3))):
            close(a, b, 1e-5)


def test_bf16_keeps_what_diffusers_keeps_in_fp32(case):
    model = diffusers_model.open_model(case.name, dtype=torch.bfloat16)
    half, (x, context), t = model.load_dit(), inputs(case.channels), torch.tensor([600.0])
    assert {p.dtype for p in half.parameters()} == {torch.float32, torch.bfloat16}
    assert half(x, t, context).dtype == torch.float32
    full = case.model.load_dit()
    for a, b in zip(
        (half(x, t, context), *half.qk(x, t, context, 3)), (full(x, t, context), *full.qk(x, t, context, 3))
    ):
        assert (a - b).norm() < 0.03 * b.norm()


def test_parts_are_loaded_one_at_a_time(case, monkeypatch):
    classes = transformers.UMT5EncoderModel, diffusers.AutoencoderKLWan, diffusers.WanTransformer3DModel
    alive, seen = weakref.WeakSet(), []
    for cls in classes:

        @functools.wraps(cls.__init__)
        def init(self, *args, true=cls.__init__, **kwargs):
            true(self, *args, **kwargs)
            alive.add(self)

        monkeypatch.setattr(cls, "__init__", init)

    def spy(self, *args, true=classes[0].forward, **kwargs):
        seen.append([(type(module), module.dtype) for module in alive])
        return true(self, *args, **kwargs)

    monkeypatch.setattr(classes[0], "forward", spy)
    gc.disable()  # memory should be free at once
    try:
        case.model.encode_prompts(["x"])
        assert seen == [[(classes[0], torch.bfloat16)]] and not alive
        codec = case.model.load_codec()
        assert [(type(module), module.dtype) for module in alive] == [(classes[1], torch.float32)]
        del codec
        gc.collect()  # as any of make_codec, it holds itself
        dit = case.model.load_dit()
        assert [type(module) for module in alive] == [classes[2]] * len(case.dits)
        del dit
        assert not alive
    finally:
        gc.enable()


def test_a_model_says_what_it_was_trained_on(case):
    negative, model = {"negative_prompt": wan_min.NEGATIVE_PROMPT}, case.model
    expected = {
        "2.1": ((480, 832), 81, 16.0, negative, 16),
        "5B": ((704, 1280), 121, 24.0, negative | {"frames": 121}, 32),
        "A14B": ((480, 832), 81, 16.0, negative | {"ref_noise": "match"}, 16),
    }[case.kind]
    size, *rest = expected
    assert (model.canvases, model.blocks) == ((size, size[::-1]), 4)
    assert [model.max_frames, model.fps, model.defaults, model.multiple] == rest
    rounded = {16: (112, 96), 32: (128, 96)}[model.multiple]
    assert fastvmt.canvas(argparse.Namespace(size=(115, 90)), model) == (rounded, False)
    assert fastvmt.canvas(argparse.Namespace(size=size), model) == (size, False)


def test_the_vae_in_tiles(case):
    height = 544 if case.kind == "5B" else 272  # of 2 x 2 pixels together in 5B
    video = F.interpolate(randn(1, 3, 1, 17, 2), (1, height, 32), mode="trilinear").clamp(-1, 1)
    whole, tiled = case.model.load_codec(), case.model.load_codec(True)
    assert (whole.vae_tiles, tiled.vae_tiles) == (False, True)
    latents = whole.encode(video)
    for a, b in ((latents, tiled.encode(video)), (whole.decode(latents), tiled.decode(latents))):
        assert 0 < (a - b).norm() < 0.5 * a.norm()


def test_prepare_and_a_lora_change_the_weights(saved, tmp_path):
    folder, (dit,), _ = saved["2.1"]
    (x, context), t = inputs(16), torch.tensor([600.0])
    other, transformer = make_transformer(seed=2)

    def prepare(pipe):
        pipe.transformer = transformer
        return pipe

    model = diffusers_model.open_model(f"diffusers:{folder}", prepare=prepare)
    close(model.load_dit()(x, t, context).detach(), other(x, t, context), 1e-4)
    pytest.importorskip("peft", reason="peft is not installed")
    low, high = randn(2, 96, seed=3) * 0.3, randn(96, 2, seed=4) * 0.3
    name = "transformer.blocks.1.attn1.to_q.lora_"
    save_file({f"{name}A.weight": low, f"{name}B.weight": high}, tmp_path / "lora.safetensors")
    dit.blocks[1].self_attn.q.weight += high @ low
    for offload in (False, True):
        model = diffusers_model.open_model(
            f"diffusers:{folder}", offload=offload, lora=str(tmp_path / "lora.safetensors")
        )
        changed = model.load_dit()(x, t, context)
        close(changed, dit(x, t, context), 1e-4)
    dit.blocks[1].self_attn.q.weight -= high @ low
    assert (changed - dit(x, t, context)).abs().max() > 1e-3
    save_file({"unet.x.lora_A.weight": low, "unet.x.lora_B.weight": high}, tmp_path / "other.safetensors")
    with pytest.raises(wan_min.ModelError, match="other.safetensors holds no LoRA of this model"):
        diffusers_model.open_model(f"diffusers:{folder}", lora=str(tmp_path / "other.safetensors")).load_dit()


def test_the_command_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--ref", "demo", "--prompt", "a red fox", "--model", case.name, "--device", "cpu", "--size", "70x90"]
    flags += "--frames 5 --steps 2 --inner-steps 1 --block 2 --window 3".split()
    code, out, err = run_main(capsys, *flags, "--vae-tiles", "--checkpoint", "on", "--dtype", "bf16", "--offload")
    assert code == 0 and "--size is rounded to 64x96" in out and "wrote out.mp4" in out and not err, err


def test_what_cannot_be_used_is_named(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    index = json.loads((saved["2.1"][0] / "model_index.json").read_text())
    (tmp_path / "empty").mkdir()
    for name, change in (("i2v", {"_class_name": "WanImageToVideoPipeline"}), ("two", {"boundary_ratio": 0.875})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps(index | change))
    one = f"diffusers:{saved['2.1'][0]}"
    flags = ["--ref", "demo", "--prompt", "x", "--device", "cpu", "--model"]
    refused(capsys, "i2v is a WanImageToVideoPipeline: ", *flags, "diffusers:i2v")
    refused(capsys, "empty is missing or damaged (Error no file named model_index.json", *flags, "diffusers:empty")
    refused(capsys, "block must be int from 1 to 4, not 15", *flags, one)
    refused(capsys, "without diffusion_pytorch_model*.safetensors: ", *flags, saved["2.1"][0])
    refused(capsys, "or diffusers:DIR", *flags, saved["2.1"][0])
    refused(capsys, "--lora is for diffusers: models", *flags, "tiny", "--lora", "x")
    monkeypatch.setattr(diffusers_model, "find_spec", lambda package: package != "peft")
    refused(capsys, "needs more packages: pip install peft", *flags, one, "--lora", "x")
    monkeypatch.setattr(diffusers_model, "find_spec", lambda package: package not in ("accelerate", "diffusers"))
    refused(capsys, "needs more packages: pip install diffusers accelerate", *flags, one)
    monkeypatch.setattr(diffusers_model, "find_spec", lambda package: True)
    refused(capsys, "--lora x is not a file", *flags, one, "--lora", "x")
    refused(capsys, "has two transformers", *flags, "diffusers:two", "--lora", "two/model_index.json")
    argv = [*flags, one, "--block", "2", "--rows", "lora=two/model_index.json"]
    with pytest.raises(fastvmt.UserError, match="all rows share one lora"):
        table1.make_rows(argv, table1.parse_arguments(argv)[0], 4)
    with pytest.raises(wan_min.ModelError, match="neither --random-weights"):
        diffusers_model.open_model(one, random_weights=True)
    with pytest.raises(wan_min.ModelError, match="attention backend"):
        diffusers_model.run_block(SimpleNamespace(forward=lambda tokens: tokens), randn(1, 2, 3), True)
