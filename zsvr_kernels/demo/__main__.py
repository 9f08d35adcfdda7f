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

import torch
from torch import Tensor

import zsvr_kernels as zk
from zsvr_kernels.demo import denoise as method
from zsvr_kernels.demo import metrics
from zsvr_kernels.demo.clip import Clip, add_noise, bundled_clip

EPILOG = """examples:
  python -m zsvr_kernels.demo                               the bundled sequence, results in demo_out/
  python -m zsvr_kernels.demo IN.mp4 OUT --frames 16        add noise to a clean clip, restore it, measure
  python -m zsvr_kernels.demo NOISY/ OUT --already-noisy --sigma 20    restore a clip that is noisy already
  python -m zsvr_kernels.demo --sweep                       search each method's best bandwidth
"""


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
    add("--frames", type=int, help="read at most this many frames")
    add("--seed", type=int, default=0, help="seed of the added noise (default 0)")
    add("--backend", default="auto", help="backend of the operators (default auto)")
    add("--overwrite", action="store_true", help="replace an earlier result in OUT")
    add("--no-timing", action="store_true", help="do not time the operators")
    add("--sweep", action="store_true", help="search the bandwidths on the input and print a table")
    return result


def measure(clip: Clip, output: Tensor, flows: tuple[Tensor, Tensor], has_truth: bool) -> dict[str, float]:
    shown = output.clamp(0, 1)
    result = {"we": metrics.warping_error(shown, *flows)}
    if has_truth:
        result = {"psnr": metrics.psnr(shown, clip.frames), "ssim": metrics.ssim(shown, clip.frames), **result}
    return result


def line(values: dict[str, float]) -> str:
    parts = [f"{values['psnr']:.2f} dB", f"SSIM {values['ssim']:.3f}"] if "psnr" in values else []
    return ", ".join([*parts, f"WE {values['we']:.3f}"])


def time_operators(noisy: Tensor) -> list[list[str]]:
    """Return a table row per operator and backend: median milliseconds, interleaved, on a 48x48 crop."""
    crop = noisy[:8, :, :48, :48]
    T, (H, W) = len(crop), crop.shape[2:]
    q, k = method.tokens(method.patches(crop), 0.3)
    v = method.values(method.patches(crop))
    frames = zk.neighbors(T, (-1, 1), include_self=True, border="drop")
    flows = method.optical_flow(crop)
    links = zk.Links.from_flow(flows[0][None], flows[1][None], grid=(H, W))
    trajectories = zk.chain_links(links, window=method.WINDOW)

    def short(backend: str) -> Tensor:
        return zk.cross_frame_attention(q, k, v, frames, scale=1.0, backend=backend)

    def long(backend: str) -> Tensor:
        return zk.trajectory_attention(q, k, v, trajectories, scale=1.0, backend=backend)

    def chain(backend: str) -> zk.Trajectories:
        return zk.chain_links(links, window=method.WINDOW, backend=backend)

    operators: dict[str, Callable[[str], object]] = {
        "cross_frame_attention": short,
        "trajectory_attention": long,
        "chain_links": chain,
    }
    calls = [(name, b) for name in operators for b in ("cpu", "sdpa", "reference")]
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(4):
        for name, backend in calls:
            start = time.perf_counter()
            try:
                operators[name](backend)
            except RuntimeError:  # this backend cannot run here; explain says why
                continue
            times.setdefault((name, backend), []).append(1e3 * (time.perf_counter() - start))
    rows = []
    for op in operators:
        medians = {b: statistics.median(t[1:]) for (o, b), t in times.items() if o == op}
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
        grid += [("both", {"before_trajectory": before, "trajectory": w}) for w in (1.0, 2.0, 3.0, 5.0, 8.0)]
    rows = []
    for name, widths in tqdm(grid, desc="sweep", unit="run"):
        output = method.denoise(noisy, sigma, name, method.Bandwidths(**widths), backend=backend)
        values = measure(clip, output, flows, True)
        rows.append([name, " ".join(f"{w:g}" for w in widths.values()), f"{values['psnr']:.2f}", f"{values['we']:.4f}"])
    rows.sort(key=lambda row: (row[0], -float(row[2])))
    return table(["method", "bandwidths", "PSNR dB", "WE x1e-2"], rows)


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from zsvr_kernels.demo import report, video

    if len(arguments.paths) > 2:
        raise ValueError(f"expected IN and OUT, got {len(arguments.paths)} paths")
    if not arguments.sigma > 0:
        raise ValueError(f"--sigma must be positive, got {arguments.sigma}")
    source = pathlib.Path(arguments.paths[0]) if len(arguments.paths) == 2 else None
    out = pathlib.Path(arguments.paths[-1] if arguments.paths else "demo_out")
    if source is None and len(arguments.paths) == 1 and out.is_file():
        raise ValueError(f"{out} is a file: name the output folder too, IN OUT")
    if not arguments.sweep and (out / "metrics.json").exists() and not arguments.overwrite:
        raise FileExistsError(f"{out} holds an earlier result; pass --overwrite to replace it")

    clip = video.read_clip(source, arguments.frames) if source else bundled_clip()
    if min(clip.frames.shape[2:]) < 16:
        raise ValueError(f"frames must be at least 16x16 pixels, got {tuple(clip.frames.shape[2:])}")
    sigma, has_truth = arguments.sigma / 255, not arguments.already_noisy
    noisy = add_noise(clip.frames, sigma, arguments.seed) if has_truth else clip.frames
    if clip.flow_forward is not None and clip.flow_backward is not None:
        flows, flow_name = (clip.flow_forward, clip.flow_backward), "exact"
    else:
        # Warping errors are judged along the clean clip's flow, or along the result's where none is known.
        known = clip.frames if has_truth else method.denoise(noisy, sigma, "both", backend=arguments.backend)
        flows, flow_name = method.optical_flow(known), "DIS on the clean clip" if has_truth else "DIS on the result"
    T, _, H, W = clip.frames.shape
    sys.stdout.write(f"{source or 'bundled sequence'}: {T} frames of {W}x{H}, noise {arguments.sigma:g}/255\n\n")
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
    results = {name: measure(clip, output, flows, has_truth) for name, output in columns.items()}
    labels = {
        "noisy": "noisy",
        "spatial": "per-frame attention",
        "cross-frame": "cross-frame",
        "both": "cross-frame + trajectory",
    }
    titled = {labels[name]: output for name, output in columns.items()}
    notes = {labels[name]: line(values) for name, values in results.items()}
    if has_truth:
        titled["clean"] = clip.frames

    out.mkdir(parents=True, exist_ok=True)
    video.write_video(
        out / "before_after.mp4", report.side_by_side({n: titled[labels[n]] for n in ("noisy", "both")}), clip.fps
    )
    report.contact_sheet(out / "contact_sheet.png", titled, notes, row=int(0.55 * H))
    header = ["", *(["PSNR dB", "SSIM"] if has_truth else []), "WE x1e-2", "seconds"]
    rows = []
    for name, values in results.items():
        cells = [f"{values['psnr']:.2f}", f"{values['ssim']:.3f}"] if has_truth else []
        rows.append([labels[name], *cells, f"{values['we']:.3f}", f"{seconds[name]:.1f}"])
    quality = report.table(header, rows)
    sys.stdout.write(f"\n{quality}\n\nWE: warping error along flow ({flow_name}); lower is steadier.\n")
    record = {
        "clip": str(source or "bundled"),
        "frames": [T, H, W],
        "sigma": arguments.sigma,
        "seed": arguments.seed,
        "flow": flow_name,
        "bandwidths": asdict(method.Bandwidths()),
        "results": {n: {m: None if math.isnan(v) else v for m, v in r.items()} for n, r in results.items()},
        "seconds": seconds,
        "build": dict(zk.build_info()),
    }
    if not arguments.no_timing and min(H, W) >= 48:
        timing = time_operators(noisy)
        sys.stdout.write("\nOperators on a 48x48 crop, 8 frames, D = 80, median milliseconds:\n\n")
        sys.stdout.write(report.table(["operator", "backend", "ms", "vs reference"], timing) + "\n")
        record["operators"] = timing
    sys.stdout.write("\n")
    q, k = method.tokens(method.patches(noisy[:1, :, :16, :16]), 1.0)
    zk.explain("cross_frame_attention", q, k, k)
    video.write_text(out / "metrics.json", json.dumps(record, indent=1) + "\n")
    sys.stdout.write(f"\nlook at {out / 'contact_sheet.png'} and {out / 'before_after.mp4'}\n")
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
