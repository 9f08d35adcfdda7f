"""``python -m zsvr_kernels.demo [IN] [OUT]``: denoise a clip with the attention operators and show what it gives."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import zsvr_kernels as zk
from zsvr_kernels.backends import Call, choose
from zsvr_kernels.demo import denoise as method
from zsvr_kernels.demo import drift, metrics
from zsvr_kernels.demo.clip import Clip, add_noise, bundled_clip

EPILOG = """examples:
  python -m zsvr_kernels.demo                               the bundled sequence, results in demo_out/
  python -m zsvr_kernels.demo IN.mp4 OUT --frames 16        add noise to a clean clip, restore it, measure
  python -m zsvr_kernels.demo NOISY/ OUT --already-noisy --sigma 20    restore a clip that is noisy already
  python -m zsvr_kernels.demo NOISY/ OUT --reference CLEAN/ --sigma 20  and measure against the clean clip
  python -m zsvr_kernels.demo IN.mp4 OUT --size 256         reduce large frames first
  python -m zsvr_kernels.demo --sweep                       search each method's best bandwidth
"""

OUTPUTS = ("before_after.mp4", "contact_sheet.png", "metrics.json", "report.md")
OPERATIONS = ("cross_frame_attention", "trajectory_attention", "chain_links")  # that denoising consists of
LABELS = {
    "noisy": "noisy",
    "spatial": "per-frame attention",
    "cross-frame": "cross-frame",
    "both": "cross-frame + trajectory",
}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m zsvr_kernels.demo",
        description="Trainless video denoising by attention over patch tokens: within a frame, across neighbouring "
        "frames, and along optical-flow trajectories.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("paths", nargs="*", metavar="IN OUT", help="video file or folder of pictures, and the output folder")
    add("--sigma", type=float, default=25.0, help="standard deviation of the noise in 1/255 (default 25)")
    add("--already-noisy", action="store_true", help="the input has noise of --sigma: add none, measure no PSNR")
    add("--reference", metavar="CLEAN", help="clean clip of the same size: the input is degraded already, measure both")
    add("--frames", type=int, help="read at most this many frames")
    add("--size", type=int, help="reduce frames whose longest side is longer than this, by area averaging")
    add("--seed", type=int, default=0, help="seed of the added noise (default 0)")
    add("--backend", default="auto", help="auto, cpu or reference, for all three operators (default auto)")
    add("--overwrite", action="store_true", help="replace an earlier result in OUT")
    add("--no-timing", action="store_true", help="do not time the operators")
    add("--no-drift", action="store_true", help="do not measure how features of a U-Net drift")
    add("--sweep", action="store_true", help="search the bandwidths on the input and print a table")
    return result


def measure(clip: Clip, output: Tensor, flows: tuple[Tensor, Tensor], has_truth: bool) -> dict[str, float]:
    shown, truth = metrics.quantize(output), metrics.quantize(clip.frames)
    result = {"we": metrics.warping_error(shown, *flows)}
    if has_truth:
        result = {"psnr": metrics.psnr(shown, truth), "ssim": metrics.ssim(shown, truth), **result}
    return result


def line(values: dict[str, float]) -> str:
    parts = [f"{values['psnr']:.2f} dB", f"SSIM {values['ssim']:.3f}"] if "psnr" in values else []
    return ", ".join([*parts, f"WE {values['we']:.3f} x1e-2"])


def operator_calls(noisy: Tensor, backend: str = "auto") -> dict[str, tuple[Callable[[], object], tuple[Any, ...]]]:
    """Return, for every operator the demo uses, a call on ``noisy`` and its arguments for `explain`."""
    T, (H, W) = len(noisy), noisy.shape[2:]
    q, k = method.tokens(method.patches(noisy), 0.3)
    v = method.values(method.patches(noisy))
    frames = zk.neighbors(T, (-1, 1), include_self=True, border="drop")
    flows = method.optical_flow(noisy)
    links = zk.Links.from_flow(flows[0][None], flows[1][None], grid=(H, W))
    window = min(method.WINDOW, T - 1)
    trajectories = zk.chain_links(links, window=window)
    return {
        "cross_frame_attention": (
            lambda: zk.cross_frame_attention(q, k, v, frames, scale=1.0, backend=backend),
            (q, k, v, frames),
        ),
        "trajectory_attention": (
            lambda: zk.trajectory_attention(q, k, v, trajectories, scale=1.0, backend=backend),
            (q, k, v, trajectories),
        ),
        "chain_links": (lambda: zk.chain_links(links, window=window, backend=backend), (links.forward,)),
    }


def time_operators(noisy: Tensor) -> list[list[str]]:
    """Return a table row per operator and backend: milliseconds on ``noisy``.

    After one call to warm up, backends run in turn, three times; the reference, much slower, once.
    """
    small = noisy[:, :, :16, :16]
    times: dict[tuple[str, str], list[float]] = {}
    runs = {b: operator_calls(noisy, b) for b in ("cpu", "sdpa", "reference")}
    for call, _ in operator_calls(small, "reference").values():
        call()
    for turn in range(4):
        for name in OPERATIONS:
            for backend, calls in runs.items():
                if backend == "reference" and turn != 1:
                    continue
                start = time.perf_counter()
                try:
                    calls[name][0]()
                except RuntimeError:  # this backend cannot run here; explain says why
                    continue
                if turn > 0:
                    times.setdefault((name, backend), []).append(1e3 * (time.perf_counter() - start))
    rows = []
    for op in OPERATIONS:
        medians = {b: statistics.median(t) for (o, b), t in times.items() if o == op}
        for backend, value in medians.items():
            rows.append([op, backend, f"{value:.2f}", f"{medians['reference'] / value:.1f}x"])
    return rows


def sweep(clip: Clip, noisy: Tensor, sigma: float, flows: tuple[Tensor, Tensor], backend: str) -> str:
    """Return a table of each method's PSNR and WE over its bandwidths."""
    from tqdm import tqdm

    from zsvr_kernels.demo.report import table

    grid: list[tuple[str, dict[str, float]]] = []
    for width in (0.4, 0.45, 0.5, 0.55, 0.6):
        grid.append(("spatial", {"spatial": width}))
        grid.append(("cross-frame", {"cross_frame": width}))
    for before in (0.2, 0.25, 0.3, 0.35):
        grid += [("both", {"before_trajectory": before, "trajectory": w}) for w in (2.0, 3.0, 5.0, 8.0, 12.0, 20.0)]
    rows = []
    for name, widths in tqdm(grid, desc="sweep", unit="run"):
        output = method.denoise(noisy, sigma, name, method.Bandwidths(**widths), backend=backend)
        values = measure(clip, output, flows, True)
        rows.append([name, " ".join(f"{w:g}" for w in widths.values()), f"{values['psnr']:.2f}", f"{values['we']:.4f}"])
    rows.sort(key=lambda row: (row[0], -float(row[2])))
    return table(["method", "bandwidths", "PSNR dB", "WE x1e-2"], rows)


def check(arguments: argparse.Namespace) -> tuple[pathlib.Path | None, pathlib.Path]:
    """Return (input or None, output folder), or raise before anything is read or computed."""
    if len(arguments.paths) > 2:
        raise ValueError(f"expected IN and OUT, got {len(arguments.paths)} paths")
    if not arguments.sigma > 0:
        raise ValueError(f"--sigma must be positive, got {arguments.sigma}")
    for name, least in (("frames", 1), ("size", 16)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    for op in OPERATIONS:
        choose(arguments.backend, Call(op, "cpu", torch.float32, None if op == "chain_links" else method.DIM))
    source = pathlib.Path(arguments.paths[0]) if len(arguments.paths) == 2 else None
    out = pathlib.Path(arguments.paths[-1] if arguments.paths else "demo_out")
    if out.is_file():
        raise ValueError(f"{out} is a file: name the output folder too, IN OUT")
    if source is None and (arguments.reference or arguments.already_noisy):
        raise ValueError("--reference and --already-noisy need an input: name both IN and OUT")
    earlier = [name for name in OUTPUTS if (out / name).exists()]
    if earlier and not arguments.sweep and not arguments.overwrite:
        raise FileExistsError(f"{out} holds an earlier result ({', '.join(earlier)}); pass --overwrite to replace it")
    return source, out


def read(arguments: argparse.Namespace, source: pathlib.Path | None) -> tuple[Clip, Tensor]:
    """Return the clean clip, or the degraded one where no clean one is known, and the frames to restore."""
    from zsvr_kernels.demo import video

    clip = video.read_clip(source, arguments.frames, arguments.size) if source else bundled_clip()
    if arguments.reference:
        clean = video.read_clip(pathlib.Path(arguments.reference), arguments.frames, arguments.size)
        if clean.frames.shape != clip.frames.shape:
            sizes = [f"{x.shape[0]} frames of {x.shape[3]}x{x.shape[2]}" for x in (clip.frames, clean.frames)]
            raise ValueError(f"the input has {sizes[0]}, --reference has {sizes[1]}: they must be the same")
        clip, noisy = Clip(clean.frames, fps=clip.fps), clip.frames
    elif arguments.already_noisy:
        noisy = clip.frames
    else:
        noisy = add_noise(clip.frames, arguments.sigma / 255, arguments.seed)
    if min(clip.frames.shape[2:]) < 16:
        raise ValueError(f"frames must be at least 16x16 pixels, got {tuple(clip.frames.shape[2:])}")
    return clip, noisy


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from zsvr_kernels.demo import report, video

    source, out = check(arguments)
    clip, noisy = read(arguments, source)
    sigma, has_truth = arguments.sigma / 255, bool(arguments.reference) or not arguments.already_noisy
    T, _, H, W = noisy.shape
    kind = "assumed noise" if noisy is clip.frames or arguments.reference else "added noise"
    title = f"{source or 'bundled sequence'}: {T} frames of {W}x{H}, {kind} {arguments.sigma:g}/255\n"
    sys.stdout.write(f"{title}\n")
    if clip.flow_forward is not None and clip.flow_backward is not None:
        flows, flow_name = (clip.flow_forward, clip.flow_backward), "exact"
    elif has_truth:
        flows, flow_name = method.optical_flow(clip.frames), "DIS on the clean clip"
    if arguments.sweep:
        if not has_truth:
            raise ValueError("--sweep needs a clean clip to compare with")
        sys.stdout.write(sweep(clip, noisy, sigma, flows, arguments.backend) + "\n")
        return 0

    columns, seconds = {"noisy": noisy}, {"noisy": 0.0}
    with tqdm(total=method.work(tuple(noisy.shape)), desc="denoise", unit="tile") as bar:
        for name in method.METHODS:
            start = time.perf_counter()
            columns[name] = method.denoise(noisy, sigma, name, backend=arguments.backend, progress=bar.update)
            seconds[name] = time.perf_counter() - start
    if not has_truth:
        flows, flow_name = method.optical_flow(columns["both"]), "DIS on the result"
    values = {name: measure(clip, output, flows, has_truth) for name, output in columns.items()}
    titled = {LABELS[name]: output for name, output in columns.items()}
    notes = {LABELS[name]: line(found) for name, found in values.items()}
    if has_truth:
        titled["clean"] = clip.frames
        notes["clean"] = line({"we": measure(clip, clip.frames, flows, False)["we"]})

    header = ["", *(["PSNR dB", "SSIM"] if has_truth else []), "WE x1e-2", "seconds"]
    rows = []
    for name, found in values.items():
        cells = [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}"] if has_truth else []
        rows.append([LABELS[name], *cells, f"{found['we']:.3f}", f"{seconds[name]:.1f}"])
    quality = report.table(header, rows)
    parts = [f"{quality}\n\nWE: warping error along flow ({flow_name}); lower is steadier.\n"]
    sys.stdout.write(f"\n{parts[-1]}\n")
    record: dict[str, Any] = {
        "clip": str(source or "bundled"),
        "reference": arguments.reference,
        "frames": [T, H, W],
        "sigma": arguments.sigma,
        "seed": arguments.seed,
        "flow": flow_name,
        "bandwidths": asdict(method.Bandwidths()),
        "results": {n: {m: None if math.isnan(v) else v for m, v in r.items()} for n, r in values.items()},
        "seconds": seconds,
        "build": dict(zk.build_info()),
    }
    if not arguments.no_drift and T > 1:
        seen = clip.frames if has_truth else columns["both"]
        record["drift"] = drift.measure(clip, noisy, seen, arguments.backend)
        parts.append(drift.text(record["drift"], flow_name))
        sys.stdout.write(f"{parts[-1]}\n")
    crop = noisy[:8, :, :48, :48]
    if not arguments.no_timing and min(H, W) >= 48:
        record["operators"] = time_operators(crop)
        parts.append(
            f"Operators on a 48x48 crop of {len(crop)} frame{'s' if len(crop) > 1 else ''}, head dim {method.DIM}, "
            "forward, milliseconds:\nmedian of 3 calls in turn after one to warm up; reference: one call.\n\n"
            + report.table(["operator", "backend", "ms", "vs reference"], record["operators"])
            + "\n"
        )
        sys.stdout.write(f"{parts[-1]}\n")
    for op, (_, inputs) in operator_calls(crop[..., :16, :16]).items():
        zk.explain(op, *inputs)
    with video.results(out) as folder:
        pair = {name: titled[LABELS[name]] for name in ("noisy", "both")}
        video.write_video(folder / OUTPUTS[0], report.side_by_side(pair), clip.fps)
        report.contact_sheet(folder / OUTPUTS[1], titled, notes, row=int(0.55 * H))
        (folder / OUTPUTS[2]).write_text(json.dumps(record, indent=1) + "\n")
        (folder / OUTPUTS[3]).write_text("\n".join([title, *parts]))
    sys.stdout.write(
        f"\nlook at {out / 'contact_sheet.png'} and {out / 'before_after.mp4'}; these tables: {out / 'report.md'}\n"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    missing = [name for name in ("av", "cv2", "PIL", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"the demo needs {', '.join(missing)}: pip install 'zsvr_kernels[demo]'\n")
        return 2
    try:
        with torch.no_grad():
            return run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; nothing was overwritten\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
