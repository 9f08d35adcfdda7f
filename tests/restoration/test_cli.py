"""The command line: what people type, what they see, exit statuses, faults that lose nothing."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from restoration_models import SIZE, moving, tiny_prior, tiny_unet
from saved_folders import saved_lpips

import zsvr
from zsvr import cli, restoration, video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a clean clip and a diffusers folder of a tiny random network."""
    root = tmp_path_factory.mktemp("cli")
    video.write(root / "clean.mkv", moving(3), lossless=True, rate=12)
    from diffusers import DDPMScheduler

    tiny_unet().save_pretrained(root / "prior" / "unet")
    DDPMScheduler().save_pretrained(root / "prior" / "scheduler")
    (root / "prior" / "model_index.json").write_text(json.dumps({
        "_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }))  # fmt: skip
    return root


def run(*arguments) -> int:
    return cli.main([str(x) for x in arguments])


def test_degrade_restore_evaluate(folder, tmp_path, capsys):
    degraded, restored = tmp_path / "small.mkv", tmp_path / "restored.mkv"
    task = ("--task", "sr_avg", "--scale", 4, "--size", SIZE)
    assert run("degrade", folder / "clean.mkv", degraded, *task) == 0
    assert video.read(degraded).frames.shape == (3, 3, SIZE // 4, SIZE // 4)
    common = ("--prior", folder / "prior", "--steps", 3, "--lossless", "--device", "cpu", "--quiet")
    assert run("restore", degraded, restored, *common, "--run", tmp_path / "run") == 0
    out = video.read(restored)
    assert out.frames.shape == (3, 3, SIZE, SIZE) and out.rate == 12
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["operator"]["name"] == "sr_avg" and config["options"]["attention.combine"] == "serial"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds"] > 0
    capsys.readouterr()
    assert run("evaluate", restored, "--reference", folder / "clean.mkv", "--json", tmp_path / "m.json") == 0
    assert "psnr" in capsys.readouterr().out.lower()
    assert json.loads((tmp_path / "m.json").read_text())


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, tmp_path, capsys):
    status = run("restore", folder / "clean.mkv", tmp_path / "out.mp4", "--prior", folder / "prior", "--task",
                 "denoise", "--sigma", 0.1, "--steps", 4, "--dry-run", "--device", "cpu", "--run",
                 tmp_path / "run")  # fmt: skip
    text = capsys.readouterr().out
    assert status == 0 and not list(tmp_path.iterdir())
    for word in ("shots", "memory", "frames fit", "time", "attention layers patched", "ddnm+"):
        assert word in text, text


def test_errors_are_one_line_and_nothing_is_overwritten(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(restoration._Window, "_step", lambda *_: pytest.fail("sampled before everything was checked"))
    out = tmp_path / "out.mp4"
    out.write_bytes(b"mine")
    clean, prior = folder / "clean.mkv", ("--prior", folder / "prior", "--device", "cpu")
    cases = [
        (("restore", clean, out, *prior, "--task", "denoise", "--sigma", 0.1), "overwrite"),
        (("restore", clean, tmp_path / "a.mp4", *prior), "name the task"),
        (("restore", tmp_path / "none.mp4", tmp_path / "a.mp4", *prior, "--task", "sr", "--scale", 2), "none.mp4"),
        (("restore", clean, tmp_path / "a.mp4", "--prior", tmp_path / "no.pt", "--task", "denoise"), "no.pt"),
        (("restore", clean, tmp_path / "a.mp4", *prior, "--task", "denoise", "--sigma", 0.1, "--set", "x.y=1"), "x.y"),
        (("restore", clean, tmp_path / "a.mp4", *prior, "--task", "upscale"), "upscale"),
        (("restore", clean, tmp_path / "a.xyz", *prior, "--task", "denoise", "--sigma", 0.1), "unknown kind of video"),
        (("restore", clean, tmp_path / "a.gif", *prior, "--task", "denoise", "--sigma", 0.1, "--lossless"), "a.gif"),
        (("degrade", clean, tmp_path / "a.mkv"), "name the task"),
    ]
    for arguments, expected in cases:
        assert run(*arguments) in (1, 2)
        said = capsys.readouterr().err
        assert expected in said and "Traceback" not in said, said
    assert out.read_bytes() == b"mine" and [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_options_of_metrics_and_prior_are_taken_and_recorded(folder, tmp_path, capsys):
    status = run("restore", folder / "clean.mkv", tmp_path / "out.mkv", "--prior", folder / "prior", "--task", "sr_avg",
                 "--scale", 2, "--synthetic", "--steps", 2, "--device", "cpu", "--quiet", "--run", tmp_path / "run",
                 "--metric", "luma=true", "--metric", "flow_source=input", "--prior-option",
                 "prediction=epsilon")  # fmt: skip
    assert status == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["options"]["luma"] is True and found["flow"]["source"] == "input"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["prior.options"] == {"prediction": "epsilon"}
    values = []
    for more in ((), ("--metric", "luma=true")):
        assert run("evaluate", tmp_path / "out.mkv", "--reference", folder / "clean.mkv", "--json",
                   tmp_path / "m.json", "--overwrite", *more) == 0  # fmt: skip
        values.append(json.loads((tmp_path / "m.json").read_text())["psnr"])
    assert values[0] != values[1]
    assert run("evaluate", tmp_path / "out.mkv", "--reference", folder / "clean.mkv", "--metric", "x=1") == 2


def test_a_device_that_is_not_there_is_an_error_of_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("bench", "--device", "cuda") == 1 and "no GPU" in capsys.readouterr().err
    assert run("bench", "--frames", "0", "--device", "cpu") == 1 and "at least 1" in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_output(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(restoration._Window, "_step", interrupt)
    status = run("restore", folder / "clean.mkv", tmp_path / "out.mp4", "--prior", folder / "prior", "--task",
                 "denoise", "--sigma", 0.1, "--steps", 3, "--device", "cpu", "--quiet")  # fmt: skip
    assert status == 130 and not list(tmp_path.iterdir()) and "interrupted" in capsys.readouterr().err


def test_info_and_help(folder, capsys):
    assert run("info") == 0 and "torch" in capsys.readouterr().out
    assert run("info", folder / "clean.mkv") == 0 and str(SIZE) in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0 and "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run("restore")
    assert stopped.value.code == 2


def test_the_example_of_the_readme_runs(capsys):
    text = (pathlib.Path(__file__).resolve().parents[2] / "python" / "zsvr" / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {"prior": tiny_prior()})
    assert "layers patched" in capsys.readouterr().out
    for line in re.findall(r"^zsvr (\w+)", text, re.MULTILINE):
        assert line in cli.COMMANDS


def test_importing_is_light():
    script = "import sys, zsvr, zsvr.cli; print(sorted({'diffusers', 'cv2', 'av', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert zsvr.restore is not None and "restore" in dir(zsvr)


def test_a_profile_adds_up(capsys):
    assert run("bench", "--width", 32, "--size", 32, "--frames", 2, "--steps", 1, "--device", "cpu") == 0
    text = capsys.readouterr().out
    for word in ("network", "attention", "guidance", "host", "outside network and attention", "reading", "writing"):
        assert word in text
    assert torch.get_default_dtype() == torch.float32


def test_restoring_a_real_clip_measures_what_needs_no_reference(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )).save_pretrained(tmp_path / "clip")  # fmt: skip
    status = run("restore", folder / "clean.mkv", tmp_path / "out.mkv", "--prior", folder / "prior", "--task",
                 "denoise", "--sigma", 0.1, "--steps", 2, "--device", "cpu", "--quiet", "--run", tmp_path / "run",
                 "--clip", tmp_path / "clip")  # fmt: skip
    assert status == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert -1 <= found["fs"] <= 1 and found["we"] >= 0 and found["psnr"] is None
    assert found["flow"]["source"] == found["options"]["flow_source"] == "input"
    assert found["seconds_per_frame"] > 0 and found["peak_memory_mb"] > 100
    assert "FS" in capsys.readouterr().out


def test_a_reference_is_prepared_as_the_input_was(folder, tmp_path, capsys):
    wide = torch.nn.functional.interpolate(moving(4), (40, 56), mode="bicubic").clamp(0, 1)
    video.write(tmp_path / "wide.mkv", wide, lossless=True, rate=12)
    status = run("restore", tmp_path / "wide.mkv", tmp_path / "out.mkv", "--prior", folder / "prior", "--task",
                 "denoise", "--sigma", 0.05, "--steps", 2, "--device", "cpu", "--quiet", "--start", 1)  # fmt: skip
    said = capsys.readouterr().err
    assert status == 0 and "56x40" in said, said
    out = video.read(tmp_path / "out.mkv").frames
    assert out.shape == (3, 3, SIZE, SIZE)
    arguments = ("evaluate", tmp_path / "out.mkv", "--reference", tmp_path / "wide.mkv", "--start", 1)
    assert run(*arguments, "--json", tmp_path / "m.json") == 0 and "note: the reference" in capsys.readouterr().err
    clean = zsvr.degrading.prepare(video.read(tmp_path / "wide.mkv").frames[1:], "square", SIZE)
    expected = float(zsvr.metrics.psnr(*(zsvr.metrics.quantize(x) for x in (out, clean))).mean())
    assert json.loads((tmp_path / "m.json").read_text())["psnr"] == pytest.approx(expected)
    assert run(*arguments, "--prepare", "none") == 1 and "56x40" in capsys.readouterr().err


def test_the_bar_is_closed_when_a_run_fails(folder, tmp_path, monkeypatch, capsys):
    bars = []
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    real = cli.Bar.__exit__

    def leave(self, *error):
        real(self, *error)
        bars.append(self.bar)

    monkeypatch.setattr(cli.Bar, "__exit__", leave)
    step, calls = restoration._Window._step, []

    def fail_later(self, *rest):
        calls.append(rest)
        if len(calls) > 1:
            raise restoration.NotFiniteError("broken")
        return step(self, *rest)

    monkeypatch.setattr(restoration._Window, "_step", fail_later)
    status = run("restore", folder / "clean.mkv", tmp_path / "out.mkv", "--prior", folder / "prior", "--task",
                 "denoise", "--sigma", 0.1, "--steps", 3, "--device", "cpu")  # fmt: skip
    assert status == 1 and "broken" in capsys.readouterr().err
    assert len(bars) == 1 and bars[0].disable  # tqdm disables a bar that is closed


def test_networks_of_metrics_are_opened_from_files(tmp_path, capsys):
    clip = torch.nn.functional.interpolate(moving(3), (64, 64), mode="bicubic").clamp(0, 1)
    for name, frames in (("clean.mkv", clip), ("out.mkv", 0.8 * clip)):
        video.write(tmp_path / name, frames, lossless=True)
    compared = ("evaluate", tmp_path / "out.mkv", "--reference", tmp_path / "clean.mkv")
    assert run(*compared, "--lpips", *saved_lpips(tmp_path), "--json", tmp_path / "m.json") == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["lpips"] > 0 and found["tlpips"] > 0 and "tLPIPS" in capsys.readouterr().out
    for option in ("--i3d", "--inception", "--clip"):
        assert run(*compared, option, tmp_path / "nothing") == 1 and "nothing" in capsys.readouterr().err


def test_a_prior_by_name_that_is_nowhere_is_an_error_that_says_where_to_put_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZSVR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    status = run("restore", folder / "clean.mkv", tmp_path / "out.mkv", "--task", "denoise", "--sigma", 0.1)
    said = capsys.readouterr().err
    assert status == 1 and "256x256_diffusion_uncond.pt" in said and str(tmp_path) in said, said
