# SPDX-License-Identifier: Apache-2.0
"""The toy: a made-up world of moving textures, its words and codec, its model, the measure of its motion.

The world knows what no real video tells: the exact motion of every clip. A DiT small enough for a laptop learns it from
prompts that name what is seen and never how it moves, so that a transferred motion can only come from the guidance.
Shapes: B clips, F frames, H×W pixels. Positions are (row, column) in pixels, motions are per frame.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file

import wan_min

FRAMES, SIZE, LARGE = 9, (48, 66), (96, 132)  # trained at SIZE only; it draws LARGE as well
COLORS = {
    "black": (0.05, 0.05, 0.05), "white": (0.95, 0.95, 0.95), "blue": (0.1, 0.3, 0.9), "green": (0.1, 0.7, 0.25),
    "red": (0.9, 0.1, 0.1), "yellow": (1.0, 0.9, 0.1), "pink": (1.0, 0.4, 0.75), "orange": (1.0, 0.55, 0.1),
}  # fmt: skip
SCALES = {"coarse": 24.0, "fine": 14.0}  # wavelength in pixels
PALETTES = ("black-white", "blue-white", "green-white", "black-blue", "black-green", "blue-green")
TEXTURES, SHAPES = ("stripes", "blobs", "checks"), ("disc", "square", "ring")
SPRITES = ("red", "yellow", "pink", "orange")  # warm, and all textures cold or grey: colour tells them apart
WORDS = (*SCALES, *PALETTES, *TEXTURES, "striped", *SPRITES, *SHAPES)
RADIUS, WORDS_MAX, MATCH_BLOCK = 10.0, 8, 5  # of a sprite; of a prompt; see matching_loss
ARCHITECTURE = dict(dim=128, ffn_dim=384, num_heads=4, num_layers=6, text_dim=len(WORDS), freq_dim=64,
                    patch_size=(1, 3, 3))  # fmt: skip

# ---- World -----------------------------------------------------------------------------------------------------------


def draw(low, high, generator):
    return low + (high - low) * torch.rand((), generator=generator).item()


def choose(items, generator):
    return items[int(torch.randint(len(items), (), generator=generator))]


def draw_velocity(largest, generator):
    """A velocity whose end point is uniform in a disc: (row, column)."""
    speed, angle = largest * draw(0, 1, generator) ** 0.5, draw(0, 2 * math.pi, generator)
    return speed * math.sin(angle), speed * math.cos(angle)


def draw_scene(generator, camera=None, sprite=None, size=SIZE):
    """What a clip shows and how it moves, as a dict of words and numbers.

    camera: "pan", "zoom", "rotation" or "still"; sprite: whether there is one; both drawn if not given. The scene's
    camera is (row velocity, column velocity, zoom rate, rotation rate), in pixels, 1 and radians counter-clockwise.
    """
    g = generator
    camera = camera or choose(["pan"] * 11 + ["zoom"] * 3 + ["rotation"] * 3 + ["still"] * 3, g)
    sprite = (camera == "still" or draw(0, 1, g) < 0.5) if sprite is None else sprite
    scene = {"scale": choose(list(SCALES), g), "palette": choose(PALETTES, g), "texture": choose(TEXTURES, g)}
    pan, zoom, rotation = draw_velocity(5.0, g), draw(-0.07, 0.07, g), draw(-0.09, 0.09, g)
    pan = pan if camera == "pan" else (0.0, 0.0)
    scene["camera"] = (*pan, zoom * (camera == "zoom"), rotation * (camera == "rotation"))
    if sprite:
        scene |= {"color": choose(SPRITES, g), "shape": choose(SHAPES, g), "striped": draw(0, 1, g) < 0.4}
        velocity = draw_velocity(4.0, g)
        room = [side / 2 - 0.7 * RADIUS - abs(v) * (FRAMES - 1) / 2 for side, v in zip(size, velocity)]  # stays in view
        scene |= {"velocity": velocity, "place": tuple(draw(-r, r, g) for r in room)}
    return scene


def describe(scene):
    """The scene's prompt."""
    text = f"{scene['scale']} {scene['palette']} {scene['texture']}"
    if "color" not in scene:
        return text
    sprite = f"{'striped ' * scene['striped']}{scene['color']} {scene['shape']}"
    return f"{text}, a{'n' * sprite.startswith('o')} {sprite}"


def waves(points, count, wavelength, generator):
    """Sum of plane waves in random directions, of unit variance, at points (..., 2): (...)."""
    angle, phase, k = torch.rand(3, count, generator=generator) * torch.tensor([[2 * math.pi], [2 * math.pi], [1]])
    k = 2 * math.pi / wavelength * (0.8 + 0.4 * k) * torch.stack([angle.sin(), angle.cos()])
    return (points @ k + phase).sin_().sum(-1) * (2 / count) ** 0.5


def draw_texture(points, kind, wavelength, generator, regular=False):
    """About how many pixels inside its second colour the texture is at points (..., 2): (...).

    One wave makes stripes, two checks, three in a triangle the round blobs of a hexagonal lattice. Slow waves bend all,
    because what is regular looks the same after many different motions. So that a small model obeys the word, mid-clip
    all lean by about 45 degrees, and the second colour takes a third of blobs, a half of checks, two thirds of stripes:
    through much noise it sees no more than such things, and by then the picture is laid out.
    regular: unbent, so that everything has exact look-alikes a wavelength away and more.
    """
    pixels = wavelength / (2 * math.pi) * (1.3 if kind == "checks" else 1)
    angle, bend = draw(0.6, 1.0, generator), 0.0 if regular else 0.8 if kind == "stripes" else 0.5
    axes = torch.tensor([[math.sin(angle), math.cos(angle)], [math.cos(angle), -math.sin(angle)]])
    points = points + 100 * torch.rand(2, generator=generator)  # or all lattices would meet the centre alike
    a, b = ((points @ axis) / pixels + bend * waves(points, 6, 1.8 * wavelength, generator) for axis in axes)
    if kind == "blobs":
        return pixels * (0.8 * (a.cos() + 2 * (a / 2).cos() * (0.75**0.5 * b).cos()) - 0.4)
    return pixels * (a.sin() + 0.5 if kind == "stripes" else a.sin() * b.sin())


def pixel_grid(size=SIZE):
    """Positions of pixels from the centre of the frame: (H, W, 2)."""
    rows, cols = (torch.arange(side) - (side - 1) / 2 for side in size)
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1)


def similarity(camera, times):
    """Linear part e^{t·zoom}·R(t·rotation) of a camera's motion (..., 4) at times (F,): (..., F, 2, 2)."""
    *_, zoom, rotation = (x[..., None] * times for x in camera.unbind(-1))
    cos, sin = zoom.exp() * rotation.cos(), zoom.exp() * rotation.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def frame_times(frames=FRAMES):
    """Time of each frame, 0 in the middle of the clip: (F,)."""
    return torch.arange(frames) - (frames - 1) / 2


def mid_clip(points, camera, times):
    """Where what is at points (H, W, 2) at each of the times (F,) is in the middle of the clip: (F, H, W, 2)."""
    points = points - (times[:, None] * camera[:2])[:, None, None]
    return torch.einsum("fxy,fhwy->fhwx", similarity(camera, -times), points)


def sprite_path(scene, times):
    """Where the sprite's centre is at times (F,): (F, 2)."""
    return torch.tensor(scene["place"]) + times[:, None] * torch.tensor(scene["velocity"])


def render(scene, generator, part=(slice(None),) * 3, size=SIZE, frames=FRAMES):
    """Video (3, F, H, W) in [-1, 1] of a scene: what is mid-clip at q is at e^{t·zoom}·R(t·rotation)·q + t·v at t.

    part: slices of the frames, rows and columns that are wanted.
    """
    times, pixels = frame_times(frames)[part[0]], pixel_grid(size)[tuple(part[1:])]
    points = mid_clip(pixels, torch.tensor(scene["camera"]), times)
    wavelength = scene.get("wavelength", SCALES[scene["scale"]])
    inside = draw_texture(points, scene["texture"], wavelength, generator, scene.get("regular", False))
    low, high = (torch.tensor(COLORS[name]) for name in scene["palette"].split("-"))
    video = low + (3 * inside).sigmoid()[..., None] * (high - low)  # (F, H, W, 3), edges about a pixel wide
    if "color" in scene:
        path = sprite_path(scene, times)
        y, x = (pixels - path[:, None, None]).unbind(-1)
        radius = torch.hypot(y, x)
        depth = {"disc": RADIUS - radius, "square": 0.9 * RADIUS - torch.maximum(y.abs(), x.abs()),
                 "ring": 0.3 * RADIUS - (radius - 0.75 * RADIUS).abs()}[scene["shape"]]  # fmt: skip
        color = torch.tensor(COLORS[scene["color"]]).expand(*depth.shape, 3)
        if scene["striped"]:
            color = color * (0.7 + 0.3 * (3 * (y * math.pi / 3).sin()).tanh())[..., None]
        video = torch.lerp(video, color, (3 * depth).sigmoid()[..., None])
    return rearrange(2 * video - 1, "f h w c -> c f h w")


# ---- Codec and words -------------------------------------------------------------------------------------------------


def encode(video):
    """Video (B, 3, F, H, W) -> latents (B, 16, F, H/2, W/2): 2×2 pixels become 12 channels, exactly; 4 are empty."""
    return F.pad(rearrange(video, "b c f (h p) (w q) -> b (p q c) f h w", p=2, q=2), (0, 0) * 3 + (0, 4))


def decode(latents):
    """Inverse of encode; the empty channels are dropped."""
    return rearrange(latents[:, :12], "b (p q c) f h w -> b c f (h p) (w q)", p=2, q=2)


def known_words(prompt):
    """The words of a prompt that the toy knows, "white and blue" being blue-white, and the others: two lists."""
    words, text = [], re.sub(r"(\w+)( and |/)(\w+)", r"\1-\3", prompt.lower())
    for word in re.findall(r"[\w-]+", text):
        palette = "-".join(sorted(word.split("-")))
        words += [palette] if palette in PALETTES else re.findall(r"\w+", word)
    known = list(dict.fromkeys(word for word in words if word in WORDS))[:WORDS_MAX]
    return known, [word for word in words if word not in (*WORDS, "a", "an", "and", "the", "of", "on", "with")]


def encode_prompts(prompts):
    """Prompts -> contexts (n, 8, words known): one vector a known word, then zeros."""
    return embed_words([known_words(prompt)[0] for prompt in prompts])


def embed_words(words):
    """Contexts (B, 8, words known) of lists of words: one vector each, then zeros."""
    context = torch.zeros(len(words), WORDS_MAX, len(WORDS))
    for row, names in zip(context, words):
        for slot, name in enumerate(names):
            row[slot, WORDS.index(name)] = 1
    return context


# ---- Model -----------------------------------------------------------------------------------------------------------


class Denoiser(wan_min.DiT):
    """The DiT, trained to tell the clean clip, from which the velocity follows.

    A token's 108 numbers of noise, which the velocity holds, would fill most of the width of so small a model.
    """

    def clean(self, x, t, context):
        """The clean clip (B, 16, F, h, w) that shows through x; arguments as of DiT.forward."""
        return super().forward(x, t, context)

    def clean_and_qk(self, x, t, context):
        """The clean clip, and q, k of MATCH_BLOCK's self-attention as of DiT.qk, from one run."""
        block, inputs = self.blocks[MATCH_BLOCK - 1], []
        hook = block.register_forward_pre_hook(lambda _, args: inputs.extend(args))
        clean = self.clean(x, t, context)
        hook.remove()
        return clean, block(*inputs, only_qk=True)

    def forward(self, x, t, context):
        return (x - self.clean(x, t, context)) / (t / 1000).clamp(min=0.05).view(-1, 1, 1, 1, 1)


# ---- Measuring what a clip shows and how it moves --------------------------------------------------------------------


def sprite_weights(video):
    """How much each pixel belongs to a sprite, told by its warm colour: (3, F, H, W) -> (F, H, W) in [0, 1]."""
    r, g, b = (video + 1) / 2
    return ((r - torch.minimum(g, b) - 0.15) / 0.3).clamp(0, 1)


def alignment_error(video, weights, cameras, gap, step):
    """How much frames differ from those `gap` later, moved back by each camera (C, 4): (C,).

    video (3, F, H, W), weights (F, H, W) of its pixels; every `step`-th row and column is compared.
    """
    times, size = frame_times(video.shape[1])[:-gap], video.shape[2:]
    here = pixel_grid(size)[::step, ::step]
    shift = times[:, None] * cameras[:, None, :2]  # (C, F, 2)
    linear = similarity(cameras, torch.tensor([float(gap)]))[:, 0]
    there = torch.einsum("cxy,cfhwy->cfhwx", linear, here - shift[:, :, None, None])
    there = there + shift[:, :, None, None] + gap * cameras[:, None, None, None, :2]
    grid = rearrange((there / (torch.tensor(size) / 2)).flip(-1), "c f h w x -> f (c h) w x")
    source = torch.cat([video, weights[None]]).transpose(0, 1)  # (F, 4, H, W)
    found = F.grid_sample(source[gap:], grid, padding_mode="border", align_corners=False)
    found = rearrange(found, "f x (c h) w -> c f x h w", c=len(cameras))
    first = source[:-gap, :, ::step, ::step]
    inside = (grid.abs() < 1 - 1 / max(size)).all(-1)
    weight = found[:, :, 3] * first[:, 3] * rearrange(inside, "f (c h) w -> c f h w", c=len(cameras))
    error = (found[:, :, :3] - first[:, :3]).square().sum(2) * weight
    return error.sum((1, 2, 3)) / (weight.sum((1, 2, 3)) + 1)


def measure_camera(video, weights=None):
    """The camera motion of a clip (3, F, H, W) under which its frames agree best: (4,), see draw_scene.

    A grid of motions is compared frame to frame; the best is refined on ever more distant frames.
    weights (F, H, W): how much each pixel counts; else as much as it is no sprite.
    """
    weights = 1 - sprite_weights(video) if weights is None else weights
    unit = torch.tensor([1.0, 1.0, 0.04, 0.04])  # of like effect on the pixels
    pans, rates, none = torch.arange(-5.25, 5.3, 0.75), torch.arange(-0.08, 0.09, 0.04), torch.zeros(1)
    slow = pans[pans.abs() < 1]
    grids = torch.cartesian_prod(pans, pans, none, none), torch.cartesian_prod(slow, slow, rates, rates)
    cameras = torch.cat(grids)
    error = torch.cat([alignment_error(video, weights, part, 1, 2) for part in cameras.split(128)])
    best = cameras[error.argmin()]
    for gap in (1, 2, 4):
        found = minimize(lambda x, gap=gap: alignment_error(video, weights, x * unit, gap, 1).sum(), best / unit)
        best = (found * unit).clamp(best - unit, best + unit)  # where hardly anything is seen it would run away
    return best


@torch.enable_grad()
def minimize(objective, x):
    """A local minimum of objective: x (1, n) -> scalar, from x (n,) on: (n,)."""
    x = x[None].clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([x], 1, 12, tolerance_grad=1e-9, tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def closure():
        x.grad = None
        error = objective(x)
        error.backward()
        return error

    optimizer.step(closure)
    return x.detach()[0]


def measure_sprite(video):
    """Velocity of the sprite of a clip (3, F, H, W): (2,), or None where a frame has none."""
    weights = sprite_weights(video)
    mass = weights.sum((1, 2))
    if mass.min() < 20:
        return None
    centers = torch.einsum("fhw,hwx->fx", weights, pixel_grid(video.shape[2:])) / mass[:, None]
    times = frame_times(video.shape[1])
    return (times @ centers) / times.square().sum()


def sprite_error(video, scene):
    """Error of the velocity of a clip's sprite, scalar; a missing sprite counts as one at rest."""
    found = measure_sprite(video)
    return ((0 if found is None else found) - torch.tensor(scene["velocity"])).norm()


def mean_speed(camera, size):
    """Mean length over the frame of the flow of a camera's motion (4,), in pixels per frame: scalar."""
    points, turn = pixel_grid(size), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    v, u, zoom, rotation = camera
    return (torch.stack([v, u]) + zoom * points + rotation * points @ turn).norm(dim=-1).mean()


def motion_error(video, scene):
    """How far a clip (3, F, H, W) is from moving as a scene does, in pixels per frame.

    Mean end-point error of the camera's flow over the frame; with a sprite, the mean of that and of sprite_error.
    """
    errors = [mean_speed(measure_camera(video) - torch.tensor(scene["camera"]), video.shape[2:])]
    if "velocity" in scene:
        errors.append(sprite_error(video, scene))
    return (sum(errors) / len(errors)).item()


def describe_motion(video):
    """The measured motion of a clip (3, F, H, W) in words and numbers."""
    row, col, zoom, rotation = measure_camera(video).tolist()
    text = f"{row:+.2f} rows {col:+.2f} columns {100 * zoom:+.1f} % {math.degrees(rotation):+.1f}° a frame"
    sprite = measure_sprite(video)
    return text if sprite is None else text + ", sprite {:+.2f} rows {:+.2f} columns".format(*sprite.tolist())


# ---- Clips to try the method on --------------------------------------------------------------------------------------


def held_out(seed, camera=None, sprite=None, size=SIZE):
    """A reference's video (3, F, H, W) and scene, and the prompt of another scene, which has a sprite if it has one."""
    g = torch.Generator().manual_seed(seed)
    # Coarse textures alone on a large canvas: pooled by 2, they are about as fine as the toy has seen.
    scale = {"scale": "coarse"} if size == LARGE else {}
    scene = draw_scene(g, camera, sprite, size) | scale
    return render(scene, g, size=size), scene, describe(draw_scene(g, camera, "velocity" in scene) | scale)


def held_out_lookalike(seed, size=SIZE):
    """As held_out, of a panning reference whose texture is a strict lattice of nothing but look-alikes.

    Its period, 22 to 28 pixels of a coarse one, is more than half a window of 5 tokens away, and no pan of a frame
    reaches half of it.
    """
    g = torch.Generator().manual_seed(seed)
    scene = draw_scene(g, "pan", False)
    scene |= {"scale": "coarse", "texture": choose(("blobs", "checks"), g), "regular": True}
    return render(scene, g, size=size), scene, describe(draw_scene(g, "pan", False))


def held_out_of_kind(seed, kind, size=SIZE):
    """held_out by what moves: a camera's "pan", "zoom" or "rotation", "still" (a sprite alone), or "look-alikes"."""
    if kind == "look-alikes":
        return held_out_lookalike(seed, size)
    return held_out(seed, kind, kind == "still", size)


def prepare(video, prompt, seed, device="cpu"):
    """What fastvmt.sample needs: noise, contexts of the prompt, of the negative and of the empty one, reference."""
    reference = encode(video[None]).to(device)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return noise, encode_prompts([prompt, "", ""]).to(device).split(1), reference


def load():
    """The trained DiT, frozen."""
    dit = Denoiser(**ARCHITECTURE)
    dit.load_state_dict(load_file(Path(__file__).with_name("weights.safetensors")))
    return dit.requires_grad_(False).eval()


# ---- The toy as a base model of fastvmt ------------------------------------------------------------------------------

WRONG_SIZE = f"the toy makes at most {FRAMES} frames of 48x66 (leave out --size, or --size 96x132)"
DEFAULTS = {  # block, tile and window as the small grid needs them
    "size": SIZE, "frames": 9, "steps": 25, "shift": 1.0, "cfg_scale": 7.0, "block": 5,
    "tile": (2, 2), "window": 5, "tau": 3.0, "lambda_window": 0.1, "guided_fraction": 0.5, "inner_steps": 20,
    "interval": 4, "lr": (0.006, 0.005),
}  # fmt: skip


def read_demo(path, num_frames, size, **options):
    """A held-out clip, with fastvmt.read_video's arguments."""
    if size not in (SIZE, LARGE):
        raise wan_min.ModelError(WRONG_SIZE)
    return held_out(0, size=size)[0][None, :, :num_frames]


class Codec:
    """encode and decode of this module, as fastvmt.run calls them; refuses clips that the toy was not trained at.

    With progress to show, the motion of what goes in and comes out is printed.
    """

    vae_tiles = False

    @staticmethod
    def encode(video, progress=None):
        if video.shape[2] > FRAMES or video.shape[3:] not in (SIZE, LARGE):
            raise wan_min.ModelError(WRONG_SIZE)
        if progress:
            print(f"motion of the reference: {describe_motion(video[0].cpu())}")
        return encode(video)

    @staticmethod
    def decode(latents, progress=None):
        video = decode(latents)
        if progress:
            print(f"motion of the result: {describe_motion(video[0].cpu())}")
        return video


def open_model(name, device="cpu", dtype=torch.float32, *, offload=False, random_weights=False):
    """The toy as a wan_min.Model. Raises ModelError for what it does not have or know."""
    if offload or random_weights:
        raise wan_min.ModelError("the toy has neither --offload nor --random-weights")

    def encode_text(prompts):
        known, unknown = known_words(", ".join(prompts))
        vocabulary = f"the toy does not know {', '.join(unknown)}; it knows {', '.join(WORDS)}"
        if not known:
            raise wan_min.ModelError(vocabulary)
        if unknown:
            print(vocabulary)
        return encode_prompts(prompts).to(device)

    return wan_min.Model(
        blocks=ARCHITECTURE["num_layers"], encode_prompts=encode_text, load_codec=lambda vae_tiles=False: Codec,
        load_dit=lambda progress=iter: wan_min.cast(load(), dtype).to(device), canvases=(SIZE, LARGE),
        max_frames=FRAMES, fps=8.0, defaults=DEFAULTS, demo=read_demo,
    )  # fmt: skip
