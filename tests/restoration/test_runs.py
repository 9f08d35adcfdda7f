"""The folder of a run: the same run writes the same bytes, another one is refused, nothing is half-written."""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from zsvr import files, runs
from zsvr.flow import DIS


def settings(**options: object) -> dict[str, object]:
    return runs.config(
        {"steps": 20, "attention": {"combine": "serial", "offsets": (-1, 1)}, **options},
        inputs={"input": "ab" * 32},
        weights={"prior": "cd" * 32},
        seed=3,
        extra={"operator": {"name": "sr_avg", "scale": 4}},
    )


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(run: runs.Run) -> None:
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(3, 3, 32, 40, generator=generator)
    run.flow(clip, DIS())
    for n, frame in enumerate(clip):
        run.write_frame(n, frame)
    run.write_metrics({"psnr": 31.25, "we": math.nan, "per_frame": {"psnr": [30.0, math.inf]}, "notes": ["a"]})


def test_the_same_run_writes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        fill(runs.Run.create(tmp_path / name, settings(), command=["zsvr", "restore", "my clip.mp4"]))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a == b
    assert sorted(a)[:3] == ["command.txt", "config.json", "flow/" + next(iter((tmp_path / "a/flow").iterdir())).name]
    assert a["command.txt"] == b"zsvr restore 'my clip.mp4'\n"
    assert len(a) == 7


def test_the_order_of_options_does_not_matter_and_everything_is_recorded(tmp_path):
    one, two = settings(x=1, y=2), settings(y=2, x=1)
    assert files.to_json(one) == files.to_json(two)
    run = runs.Run.create(tmp_path / "a", one)
    assert runs.Run.create(tmp_path / "b", two).id == run.id
    found = json.loads((tmp_path / "a" / "config.json").read_text())
    assert found["options"]["attention"] == {"combine": "serial", "offsets": [-1, 1]}
    assert found["seed"] == 3 and found["inputs"] == {"input": "ab" * 32} and found["weights"] == {"prior": "cd" * 32}
    assert found["versions"]["torch"] == torch.__version__ and found["operator"]["scale"] == 4
    assert "time" not in json.dumps(found) and str(tmp_path) not in json.dumps(found)


def test_a_run_goes_on_where_it_was(tmp_path):
    run = runs.Run.create(tmp_path / "run", settings())
    fill(run)
    before = contents(tmp_path / "run")
    again = runs.Run.create(tmp_path / "run", settings())
    assert again.frames() == [0, 1, 2] and again.id == run.id and contents(tmp_path / "run") == before
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(3, 3, 32, 40, generator=generator)
    assert torch.equal(again.read_frame(1), torch.floor(clip[1] * 255 + 0.5) / 255)
    metrics = runs.Run.load(tmp_path / "run").read_metrics()
    assert metrics["psnr"] == 31.25 and math.isnan(metrics["we"]) and metrics["per_frame"] == {"psnr": [30.0, None]}


def test_sixteen_bits_are_kept(tmp_path):
    run = runs.Run.create(tmp_path / "run", settings())
    picture = torch.randint(0, 65536, (3, 8, 9)).float() / 65535
    run.write_frame(100_000, picture, depth=16)
    assert run.frames() == [100_000] and torch.equal(run.read_frame(100_000), picture)


def test_the_folder_of_another_run_is_refused_and_says_why(tmp_path):
    runs.Run.create(tmp_path / "run", settings())
    before = contents(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"another run \(options.steps: 20, now 21\)"):
        runs.Run.create(tmp_path / "run", settings(steps=21))
    other = settings()
    other["inputs"] = {"input": "ee" * 32}
    with pytest.raises(FileExistsError, match=r"inputs.input: "):
        runs.Run.create(tmp_path / "run", other)
    assert contents(tmp_path / "run") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds thesis.tex and no run"):
        runs.Run.create(tmp_path / "mine", settings())
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        runs.Run.create(tmp_path / "file", settings())
    with pytest.raises(FileNotFoundError, match="is no folder"):
        runs.Run.create(tmp_path / "missing" / "run", settings())


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of a run"):
        runs.Run.load(tmp_path)
    for text, message in (("{", "is damaged"), ("[]", "is none of a run"), ('{"format": "other"}', "is none of a run")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            runs.Run.load(tmp_path)
    run = runs.Run.create(tmp_path / "run", settings())
    with pytest.raises(FileNotFoundError, match="not finished"):
        run.read_metrics()
    with pytest.raises(FileNotFoundError, match=r"00007.png"):
        run.read_frame(7)
    assert run.frames() == []
    (run.path / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metrics.json is damaged"):
        run.read_metrics()


def test_values_that_json_does_not_know_are_refused():
    with pytest.raises(TypeError):
        settings(device=torch.device("cpu"))
    with pytest.raises(ValueError):
        settings(margin=math.nan)
    with pytest.raises(ValueError, match="must not name seed"):
        runs.config({}, inputs={}, weights={}, seed=0, extra={"seed": 1})
    with pytest.raises(ValueError, match="seed must be within"):
        runs.config({}, inputs={}, weights={}, seed=-1)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_fault_leaves_the_old_contents(tmp_path, monkeypatch, error):
    run = runs.Run.create(tmp_path / "run", settings())
    fill(run)
    before = contents(tmp_path / "run")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    for write in (
        lambda: run.write_metrics({"psnr": 1.0}),
        lambda: run.write_frame(0, torch.rand(3, 32, 40)),
        lambda: run.write_frame(9, torch.rand(3, 32, 40)),
        lambda: run.flow(torch.rand(2, 3, 32, 40), DIS()),
    ):
        with pytest.raises(type(error)) as caught:
            write()
        if isinstance(error, OSError):
            assert "the disk is full" in str(caught.value)
        assert contents(tmp_path / "run") == before
    with pytest.raises(type(error)):
        runs.Run.create(tmp_path / "new", settings())
    syncs = iter((None, error))  # a disk that is full after the first file
    monkeypatch.setattr(os, "fsync", lambda _: fail() if next(syncs) else None)
    with pytest.raises(type(error)):
        runs.Run.create(tmp_path / "newer", settings(), command=["zsvr"])
    monkeypatch.undo()
    for name in ("new", "newer"):
        assert runs.Run.create(tmp_path / name, settings(), command=["zsvr"]).frames() == []


def test_hashes_tell_names_types_shapes_and_bytes_apart(tmp_path):
    x = torch.arange(6.0)
    hashes = {
        files.hash_tensors(t)
        for t in (
            {"x": x}, {"y": x}, {"x": x.reshape(2, 3)}, {"x": x.double()}, {"x": -x}, {"x": x[:0]}, {"x": x.half()},
            {"x": x.reshape(2, 3).T}, {"x": x.bfloat16()}, {"x": x > 2},
        )
    }  # fmt: skip
    assert len(hashes) == 10
    assert files.hash_tensors({"x": x, "y": -x}) == files.hash_tensors({"y": -x, "x": x.clone()})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(b"1")
    one = files.hash_file(tmp_path / "d")
    assert files.hash_file(tmp_path / "d" / "a") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    assert files.hash_file(tmp_path / "d") != one


def test_names_that_are_no_utf8_are_recorded_and_hashed(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    run = runs.Run.create(tmp_path / "run", settings(path=name), command=["zsvr", "restore", name])
    assert runs.Run.create(tmp_path / "run", settings(path=name)).id == run.id
    assert runs.Run.load(tmp_path / "run").config["options"]["path"] == name
    assert (tmp_path / "run" / "command.txt").read_bytes() == b"zsvr restore 'caf\xe9.png'\n"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(b"1")
    one = files.hash_file(tmp_path / "folder")
    (tmp_path / "folder" / name).rename(tmp_path / "folder" / "cafe.png")
    assert files.hash_file(tmp_path / "folder") != one


def test_importing_needs_none_of_the_packages_that_are_used_inside():
    script = (
        "import sys, zsvr.degrading, zsvr.encoders, zsvr.metrics, zsvr.runs, zsvr.video\n"
        "print(sorted({'av', 'cv2', 'diffusers', 'transformers', 'safetensors', 'PIL'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
