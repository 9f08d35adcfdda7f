"""Clips and files that the tests of videos share."""

from __future__ import annotations

import errno
import pathlib
import subprocess
import sys
import textwrap

import av
import torch


def noise(frames: int = 4, size: tuple[int, int] = (48, 64), bits: int = 8, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 2**bits, (frames, channels, *size), generator=generator)
    return levels.float() / (2**bits - 1)


def smooth(frames: int, size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    small = torch.rand(1, 3, 4, 4, generator=generator)
    picture = torch.nn.functional.interpolate(small, size, mode="bilinear", align_corners=False)
    return picture.expand(frames, -1, -1, -1)


def rgb(path: pathlib.Path, clip: torch.Tensor, kind: str | None = None, **options: str) -> None:
    """Write RGB H.264 in a container of its own kind, as other programs might."""
    with av.open(str(path), "w", format=kind, options=options) as output:
        stream = output.add_stream("libx264rgb", rate=24, options={"qp": "0", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[2:], "rgb24"
        for frame in clip:
            levels = (frame * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            output.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        output.mux(stream.encode())


def leftovers(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def refused_writes(setup: str, limits: tuple[int, ...], folder: pathlib.Path) -> list[str]:
    """Return the messages of writes that the kernel's own limit on file sizes makes fail, at the first or a late one.

    Args:
        setup: statements that make a list ``calls`` from ``clip`` and ``folder``; each is to raise EFBIG.
        limits: bytes.
        folder: where they write.
    """
    script = "import pathlib, resource, signal, sys, torch\nfolder = pathlib.Path(sys.argv[1])\n"
    script += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "clip = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))\n"
    script += textwrap.dedent(setup) + textwrap.dedent(f"""
        for limit in {limits}:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
            for call in calls:
                try: call()
                except OSError as error: print(error.errno, error)
                else: print("written")
    """)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    for line in lines:
        assert line.startswith(f"{errno.EFBIG} ") and "was not written, the file grew larger" in line, line
        assert line.endswith("nothing of it was left behind"), line
    return lines
