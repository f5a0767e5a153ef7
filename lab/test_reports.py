# SPDX-License-Identifier: Apache-2.0
"""Tests of what users of such programs reported: rare files, runs that meet or are stopped, unusual Pythons."""

import errno
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastvmt
from test_fastvmt import (
    DEMO,
    HERE,
    close,
    encode,
    failing,
    ffmpeg,
    folder,
    levels,
    metadata_of,
    refused,
    run_main,
    write_clip,
)  # fmt: skip

assert folder  # the fixture: each test here runs in an empty folder, too
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def program(*args, python=(), **environment):
    """The program, started; `ended` waits for it."""
    command = [sys.executable, *python, HERE / "fastvmt.py", *map(str, args)]
    return subprocess.Popen(command, text=True, env=ENVIRONMENT | environment, encoding="utf8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def ended(process):
    """Exit code and the lines of stderr without bars."""
    _, err = process.communicate(timeout=100)
    return process.returncode, [line for line in err.splitlines() if line and not re.search(r"it/s|s/it|%\|", line)]


# ---- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [False, True])
def test_an_animated_avif_is_not_its_still(alpha):
    clip = write_clip("clip.mkv", options="-c:v ffv1 -pix_fmt yuv420p".split())
    planes = "[0:v]split[c][d];[d]lutyuv=y=255:u=128:v=128,format=gray[a]"
    streams = ["-filter_complex", planes, "-map", "[c]", "-map", "[a]"] if alpha else []
    log = ffmpeg("-i", clip, *streams, *"-c:v libaom-av1 -cpu-used 8 -crf 1 in.avif".split())
    assert ffmpeg("-i", "in.avif").count("Video: av1") == 2 + 2 * alpha, log  # still and animation of each
    right = levels("in.avif")[:, :, :, -8:].mean((0, 2, 3))
    close(right, torch.arange(0.0, 130, 10), 6)


FFV1 = f"-c:v ffv1 -vf scale=flags={fastvmt.SCALER}:out_color_matrix="
HALF = "format=rgba,colorchannelmixer=aa=0.5"
VPX = f"-vf {HALF},scale=out_color_matrix=bt601:flags={fastvmt.SCALER},format=yuva420p"
COLOURS = {  # the file's ending and options of its encoder
    "sd": (".mkv", FFV1 + "bt601,format=yuv420p,setparams=colorspace=unknown"),
    "hd": (".mkv", FFV1 + "bt709,format=yuv420p,setparams=colorspace=unknown"),
    "hd tagged": (".mkv", FFV1 + "bt601,format=yuv420p,setparams=colorspace=smpte170m"),
    "full": (".mkv", FFV1 + "bt601,format=yuv420p,scale=out_range=pc,setparams=colorspace=unknown -color_range pc"),
    "bt2020": (".mkv", FFV1 + "bt2020,format=yuv420p10le,setparams=colorspace=bt2020nc"),
    "gray": (".mkv", "-c:v ffv1 -pix_fmt gray"),
    "png alpha": (".mov", f"-c:v png -vf {HALF}"),
    "vp9 alpha": (".webm", f"-c:v libvpx-vp9 -crf 4 {VPX}"),
    "vp8 alpha": (".webm", f"-c:v libvpx -b:v 9M -auto-alt-ref 0 {VPX}"),
    "palette alpha": (".mov", "-c:v png -vf format=rgba,colorkey=0x787878:0.01,split[a][b];"
                              "[a]palettegen[p];[b][p]paletteuse"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_of_all_kinds(kind):
    ending, options = COLOURS[kind]
    expected = torch.tensor([[200.0, 60, 30], [120, 120, 120]])  # left, right
    height, width = (720, 1280) if "hd" in kind else (48, 80)
    frame = np.tile(expected.byte().numpy().repeat(width // 2, 0), (5, height, 1, 1))
    if kind == "gray":
        expected[0] = 0.299 * 200 + 0.587 * 60 + 0.114 * 30
    if kind == "palette alpha":  # the right half is not there
        expected[1] = 127.5
    elif "alpha" in kind:  # on mid grey
        expected = (expected + 127.5) / 2
    halves = levels(encode("in" + ending, frame, *options.split())).chunk(2, dim=3)
    close(torch.stack([half[..., 3:-3].mean((1, 2, 3)) for half in halves]), expected, 1.6)


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_shown_as_bt709(transfer, monkeypatch):
    # By the formulas of ST 2084 and BT.2100: white is 203 cd/m² (BT.2408), a display of BT.709 has gamma 2.4 (BT.1886).
    expected = np.array([[255, 255, 255], [120, 120, 120], [30, 30, 30], [200, 60, 30], [40, 160, 90], [20, 60, 220.0]])
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    light = (expected / 255) ** 2.4 @ to_2020.T * 203  # cd/m²
    if transfer == "smpte2084":
        power = (light / 10000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    else:
        luminance = (light @ [0.2627, 0.678, 0.0593] / 1000) ** (1 / 1.2)  # of the scene; shown is its power of 1.2
        scene = light / 1000 / luminance[:, None] ** 0.2
        signal = np.where(scene <= 1 / 12, (3 * scene) ** 0.5,
                          0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073)  # fmt: skip
    frame = np.tile((signal * 65535).round().astype("<u2").repeat(16, 0), (5, 32, 1, 1))  # columns of 16 pixels
    tags = f"setparams=range=tv:colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}"
    options = f"{FFV1}bt2020,format=yuv444p12le,{tags}".split()
    path = encode("in.mkv", frame, *options, pixels="rgb48le")
    seen = levels(path, size=(32, 96))[:, 0, 4:-4].unflatten(2, (6, 16))[..., 5:-5].mean((1, 3)).T
    close(seen, torch.tensor(expected).float(), 2.1)

    read = fastvmt.read_frames  # of a build without the filter
    monkeypatch.setattr(fastvmt, "read_frames", lambda *args: read(*args[:-1], [
        option.replace("zscale", "z_scale") for option in args[-1]]))  # fmt: skip
    with pytest.raises(fastvmt.UserError, match="No such filter: 'z_scale'"):
        levels(path)


def test_interlaced_frames_have_no_combs():
    rows, columns = np.mgrid[:96, :160]
    fields = [128 + 100 * np.sin((columns - 8 * n) / 12) for n in range(18)]  # a pan of 8 columns a field
    frames = np.stack([np.where(rows % 2, second, first) for first, second in zip(fields[::2], fields[1::2])])
    frames = frames[..., None].repeat(3, 3).astype(np.uint8)
    path = encode("in.mkv", frames, "-vf", "setfield=tff", "-c:v", "ffv1", "-pix_fmt", "yuv420p")
    true = torch.tensor(np.stack(fields[::2])).expand(3, -1, -1, -1)
    close(levels(path, size=(96, 160))[:, 1:-1, :, 20:-20], true[:, 1:-1, :, 20:-20].float(), 6)


def test_rate_and_pixels_are_of_one_stream():
    small = write_clip("small.mp4")
    large = write_clip("large.mp4", 60, (96, 160), fps=30)
    ffmpeg("-i", small, "-i", large, "-map", "0", "-map", "1", "-c", "copy", "both.mkv")
    assert torch.equal(levels("both.mkv"), levels(small))


def test_files_in_a_folder_that_are_no_frames_are_told(capsys, monkeypatch):
    os.mkdir("clip")
    for n in range(6):
        Image.fromarray(np.full((32, 64), 20 * n, np.uint8)).save(f"clip/{n:05}.{('gif', 'TIFF')[n % 2]}")
    close(levels("clip").mean((0, 2, 3)), torch.arange(0.0, 100, 20), 1)
    assert capsys.readouterr().out == ""
    for name in ("00000.heic", "00001.heic", ".hidden"):
        Path("clip", name).write_text("what Pillow does not read")
    levels("clip")
    assert re.fullmatch(r"skipped in clip: 2 files that Pillow does not read, as \d+.heic\n", capsys.readouterr().out)
    shutil.copy("clip/00002.gif", "clip/00000.png")
    seen = levels("clip").mean((0, 2, 3))
    text = capsys.readouterr().out
    assert len(seen) == 5 and text.count("\n") == 2 and "clip differ in their ending only: each is read" in text
    os.mkdir("few")
    with pytest.raises(fastvmt.UserError, match="0 frames from 0 s at --fps 12, fewer than 5$"):
        levels("few")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(fastvmt.UserError, match="clip/00000.gif .*decompression bomb"):
        levels("clip")


def test_what_is_missing_is_told_before_a_model_is_looked_for(capsys, monkeypatch):
    monkeypatch.setattr(fastvmt.wan_min, "open_model", failing(AssertionError("looked for a model")))
    refused(capsys, "required: --ref, --prompt")
    refused(capsys, "required: --prompt", "--ref", "in.mp4")


# ---- Nothing lost ----------------------------------------------------------------------------------------------------


def test_of_two_runs_into_one_name_the_second_is_told_at_once(capsys, monkeypatch):
    first = program(*DEMO, "--steps", 10_000)
    assert any("guided" in line for line in first.stdout)
    Path("out.latents.safetensors").touch()  # as if it had reached that point
    before = sorted(os.listdir())
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", failing(AssertionError("waited")))
        patch.setattr(fastvmt, "read_video", failing(AssertionError("paid for something")))
        refused(capsys, "another run has out.mp4: give another --out", *DEMO)
        refused(capsys, "another run has out.mp4", *DEMO, "--decode", "x.latents.safetensors")
        refused(capsys, "another run has out.lat", *DEMO, "--decode", "out.latents.safetensors", "--out", "other.mp4")
    assert sorted(os.listdir()) == before
    os.remove("out.latents.safetensors")
    assert run_main(capsys, *DEMO, "--out", "other.mp4")[0] == 0
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert run_main(capsys, *DEMO)[0] == 0  # a killed run blocks nobody
    assert sorted(os.listdir()) == ["other.mp4", "out.mp4"]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_disks_without_locks_can_be_written(capsys, monkeypatch, error):
    monkeypatch.setattr("filelock.FileLock.acquire", failing(error))
    assert run_main(capsys, *DEMO)[::2] == (0, "") and os.listdir() == ["out.mp4"]


def test_latents_outlive_a_full_disk(capsys, monkeypatch):
    true, temporary, room = Path.write_bytes, Path("temporary").absolute(), True
    temporary.mkdir()

    def write_bytes(path, data):
        if temporary in path.parents and room:
            return true(path, data)
        true(path, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.setattr(Path, "write_bytes", write_bytes)
        code, text, err = run_main(capsys, *DEMO)
    assert code == 2 and "cannot write out.mp4 ([Errno 28] No space left on device)" in err
    told, kept = re.search(r"cannot write out.latents.safetensors, (\d+) bytes \(No space left.*\)\n"
                           r"latents kept in (\S+); if decoding fails", text).groups()  # fmt: skip
    assert os.listdir() == ["temporary"] and os.listdir("temporary") == [os.path.basename(kept)]
    assert os.path.getsize(kept) == int(told) and load_file(kept)["result"].shape == (1, 16, 2, 4, 6)
    with monkeypatch.context() as patch:
        patch.setattr(fastvmt, "sample", failing(AssertionError("sampled again")))
        assert run_main(capsys, *DEMO, "--decode", kept)[0] == 0
    assert sorted(os.listdir()) == ["out.mp4", "temporary"] and not os.listdir("temporary")
    os.remove("out.mp4")
    room = False  # nowhere, but the video may be smaller than they are
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(
        Path, "write_bytes", lambda path, data: (true if path.name == "comment" else write_bytes)(path, data)
    )
    code, text, err = run_main(capsys, *DEMO)
    assert (code, err) == (0, "") and text.count("cannot write") == 2 and "latents kept" not in text
    assert sorted(os.listdir()) == ["out.mp4", "temporary"] and not os.listdir("temporary")


def test_kept_latents_have_the_mode_of_the_umask(capsys, monkeypatch):
    monkeypatch.setattr(fastvmt, "write_video", failing(OSError("stopped")))
    mask = os.umask(0o027)
    try:
        refused(capsys, "stopped", *DEMO)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(os.stat("out.latents.safetensors").st_mode) == 0o640


def test_interrupts_end_in_one_line():
    """While modules are imported; a second one, before or while Python ends; and in between."""
    interrupt = (
        "import atexit, builtins, os, signal, sys\nstop = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
    )
    after_error = (
        "true = print\nbuiltins.print = lambda *a, file=None, **k: (true(*a, file=file, **k), file and stop())"
    )
    told = "fastvmt: cannot read no.mp4 (not a file or a folder)"
    for module, moment, code, line in (
        ("torch", "stop(), stop()", 130, "fastvmt: interrupted"),
        ("sitecustomize", "atexit.register(stop)", 2, told),
        ("sitecustomize", after_error, 130, told),
    ):
        shutil.rmtree("first", ignore_errors=True)
        os.mkdir("first")
        Path("first", f"{module}.py").write_text(interrupt + moment)
        assert ended(program(*DEMO, "--ref", "no.mp4", PYTHONPATH="first")) == (code, [line]), moment
    process = program(*DEMO, "--steps", 10_000)
    assert any("guided" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, ["fastvmt: interrupted"])
    assert os.listdir() == ["first"]


# ---- Unusual Pythons -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", ["io.StringIO(), io.StringIO()", "None, None"])
def test_streams_of_notebooks_and_windowed_pythons(streams):
    code = (
        f"import io, runpy, sys; sys.stdout, sys.stderr = {streams}; runpy.run_path(sys.argv.pop(1), None, '__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, HERE / "fastvmt.py", *DEMO], capture_output=True)
    assert done.returncode == 0 and not done.stdout + done.stderr and os.listdir() == ["out.mp4"]


def test_isolated_pythons_and_a_foreign_lab():
    for flags in (["-P"], ["-I"])[sys.version_info < (3, 11) :]:
        code, lines = ended(program(*DEMO, "--ref", "no.mp4", python=flags))
        assert code == 2 and len(lines) == 1 and "no.mp4" in lines[0], flags
    Path("foreign/lab").mkdir(parents=True)
    Path("foreign/lab/__init__.py").touch()
    for name in ("fastvmt.py", "wan_min.py"):
        shutil.copy(HERE / name, name)
    run = [sys.executable, "fastvmt.py", *DEMO, "--model", "toy"]
    done = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT | {"PYTHONPATH": "foreign"})
    assert done.returncode == 2 and done.stderr == "fastvmt: No module named 'lab.toy'\n"


def test_any_shell_and_any_name():
    """A console in cp1252, names that are not UTF-8, a reader that goes away."""
    name, prompt = os.fsdecode(b"caf\xe9 \xe7\x8b\x90 %d.mp4"), "狐 \" ' \\ = ; # fox " * 500  # 9,500 characters
    os.rename(write_clip("in.mp4"), name)
    Path("out").mkdir()
    program, environment = [sys.executable, "-u", str(HERE / "fastvmt.py")], os.environ | {"PYTHONIOENCODING": "cp1252"}
    run = [*program, *DEMO, "--ref", name, "--out", f"out/{name}", "--prompt", prompt]
    done = subprocess.run(run, capture_output=True, env=environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert "guided, ? 1." in done.stdout.decode("cp1252")
    assert os.listdir("out") == [name]
    record = metadata_of(Path("out", name).rename("out.mp4"))
    assert record["prompt"] == prompt and record["ref"] == name
    command = shlex.join([*program, *DEMO, "--out", "p.mp4"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True)
    assert done.stdout == "encoding the prompts\n" and "Traceback" not in done.stderr and "Broken" not in done.stderr
    assert done.returncode == 1 and not Path("p.mp4").exists()
