"""The command line: ``zsvr restore | degrade | evaluate | info | bench``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from zsvr_kernels.version import __version__

EXAMPLES = """examples:
  zsvr degrade clean.mp4 small.mkv --task sr --scale 4          make a degraded clip; operator and values beside it
  zsvr restore small.mkv restored.mp4 --prior 256x256_diffusion_uncond.pt
  zsvr restore noisy.mp4 out.mp4 --prior MODEL --task denoise --sigma 0.1 --prepare none
  zsvr restore in.mp4 out.mp4 --prior MODEL --task inpaint --operator mask='"mask.png"' --preset best
  zsvr restore in.mp4 out.mp4 --prior MODEL --task sr --scale 4 --set attention.combine='"joint"' --dry-run
  zsvr evaluate restored.mp4 --reference clean.mp4
"""
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def _assignment(text: str) -> tuple[str, Any]:
    """Return name and value of ``name=value``; the value is JSON, or else the text itself."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _operator_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("degradation")
    group.add_argument("--task", help="denoise, sr, deblur, inpaint, colorize, lowlight, or an operator's name")
    group.add_argument("--scale", type=int, help="of super-resolution")
    group.add_argument("--sigma", type=float, default=0.0, help="standard deviation of the noise, in [0, 1] units")
    group.add_argument("--operator", type=_assignment, action="append", default=[], metavar="NAME=VALUE",
                       help="an argument of the operator, value as JSON; may be repeated")  # fmt: skip


def _video_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("video")
    group.add_argument("--start", type=int, default=0, help="first frame")
    group.add_argument("--stop", type=int, help="frame after the last one")
    group.add_argument("--prepare", choices=("square", "none"), default="square",
                       help="square (default): centre crop and resize to the size that the prior was trained at; "
                       "none: leave frames as they are")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def _metric_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metrics")
    group.add_argument("--metric", type=_assignment, action="append", default=[], metavar="NAME=VALUE",
                       help="how metrics are taken: luma=true, flow_source=input, ...; may be repeated")  # fmt: skip
    group.add_argument("--clip", help="folder of a CLIP model, for frame similarity (FS)")
    group.add_argument("--lpips", nargs=2, metavar=("ALEXNET", "HEADS"),
                       help="weights of torchvision's alexnet and of LPIPS 0.1, for LPIPS and tLPIPS")  # fmt: skip
    group.add_argument("--inception", help="weights of FID's Inception (needs torch-fidelity), for FID")
    group.add_argument("--i3d", help="weights of I3D (RGB, Kinetics-400), for FVD of 16-frame clips")


def _networks(options: argparse.Namespace) -> dict[str, Any]:
    """Return the networks that metrics look through, as `zsvr.metrics.evaluate` takes them."""
    from zsvr import encoders
    from zsvr.i3d import i3d
    from zsvr.temporal.semantic import open_clip_encoder

    found: dict[str, Any] = {}
    if options.clip:
        found["encoder"] = open_clip_encoder(options.clip)
    if options.lpips:
        found["lpips"] = encoders.LPIPS(*options.lpips)
    if options.inception:
        found["inception"] = encoders.inception(options.inception)
    if options.i3d:
        found["i3d"] = i3d(options.i3d)
    return found


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        "zsvr", description="Zero-shot video restoration with a pre-trained image diffusion model.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"zsvr {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    restore = command("restore", "Restore a degraded clip.")
    restore.add_argument("input", help="video or folder of pictures")
    restore.add_argument("output", help=".mp4, .mkv, .webm, .gif, or a folder of PNG (no suffix)")
    restore.add_argument("--prior", default="adm256",
                         help="ADM checkpoint (.pt, .safetensors), diffusers folder, or a name; default: adm256, "
                         "256x256_diffusion_uncond.pt in $ZSVR_WEIGHTS, ~/.cache/zsvr or here")  # fmt: skip
    restore.add_argument("--prior-option", type=_assignment, action="append", default=[], metavar="NAME=VALUE",
                         help="of the checkpoint, such as qkv_order=new; may be repeated")  # fmt: skip
    _operator_arguments(restore)
    _video_arguments(restore)
    method = restore.add_argument_group("method")
    method.add_argument("--host", default="auto", help="auto, ddnm, ddnm+, gdp, dps")
    method.add_argument("--host-option", type=_assignment, action="append", default=[], metavar="NAME=VALUE")
    method.add_argument("--preset", default="paper", help="temporal parts: none, batch_consistent, paper, best, ...")
    method.add_argument("--set", type=_assignment, action="append", default=[], metavar="NAME=VALUE", dest="changes",
                        help="option of the temporal parts, such as guidance.gain=0.02; may be repeated")  # fmt: skip
    method.add_argument("--steps", type=int, help="sampling steps; default: the host's")
    method.add_argument("--spacing", choices=("leading", "trailing", "linspace"), default="leading")
    method.add_argument("--travel", type=int, nargs=2, default=(1, 1), metavar=("LENGTH", "REPEAT"))
    method.add_argument("--latent-host", choices=("project", "none"), default="project")
    method.add_argument("--latent-every", type=int, default=5)
    method.add_argument("--flow-path", help="weights (raft_large) or folder of .flo files (given)")
    method.add_argument("--seed", type=int, default=0)
    method.add_argument("--synthetic", action="store_true", help="the input is clean: degrade it first, then measure")
    _metric_arguments(restore)
    running = restore.add_argument_group("running")
    running.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    running.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    running.add_argument("--expected-count", type=int,
                         help="attention layers to be replaced, if not what is known of the network")  # fmt: skip
    running.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    running.add_argument("--run", help="folder that keeps config, flow, frames and metrics")
    running.add_argument("--lossless", action="store_true", help="write RGB that reads back bit-exactly")
    running.add_argument("--dry-run", action="store_true", help="check everything, time one step, print the plan")
    running.add_argument("--quiet", action="store_true", help="no progress bar")

    degrade = command("degrade", "Degrade a clean clip; the operator and the exact values are kept beside it.")
    degrade.add_argument("input", help="clean video or folder of pictures")
    degrade.add_argument("output", help="video (.mkv, .mp4) or folder")
    _operator_arguments(degrade)
    _video_arguments(degrade)
    degrade.add_argument("--size", type=int, default=256, help="side for --prepare square")
    degrade.add_argument("--seed", type=int, default=0)

    evaluate = command("evaluate", "Compare a restored clip with the clean one.")
    evaluate.add_argument("output", help="restored video or folder")
    evaluate.add_argument("--reference", required=True, help="clean video or folder")
    evaluate.add_argument("--start", type=int, default=0, help="first frame of the reference that was restored")
    evaluate.add_argument("--stop", type=int, help="frame after the last one")
    evaluate.add_argument("--prepare", choices=("square", "none"), default="square",
                          help="square (default): crop and resize a reference of another size as `zsvr restore` "
                          "does, where the output is square")  # fmt: skip
    _metric_arguments(evaluate)
    evaluate.add_argument("--json", help="file for the results")
    evaluate.add_argument("--overwrite", action="store_true")

    info = command("info", "Print versions, devices and what is installed; or what a video is.")
    info.add_argument("path", nargs="?", help="a video or folder of pictures")

    bench = command("bench", "Profile sampling steps: network, attention, guidance, host, everything else.")
    bench.add_argument("--prior", help="checkpoint or folder; default: a network of ADM's layout with random weights")
    bench.add_argument("--width", type=int, default=64, help="channels of the random network (ADM: 256)")
    bench.add_argument("--size", type=int, default=128, help="side of the frames")
    bench.add_argument("--frames", type=int, default=4)
    bench.add_argument("--steps", type=int, default=2, help="sampling steps that are timed")
    bench.add_argument("--host", default="ddnm")
    bench.add_argument("--device")
    bench.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    return top


class Bar:
    """A progress bar with ETA on stderr; silent where stderr is no terminal or tqdm is missing."""

    def __init__(self, quiet: bool) -> None:
        self.bar: Any = None
        self.quiet = quiet or not sys.stderr.isatty()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, report: Any) -> None:
        if self.quiet:
            return
        if self.bar is None:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                self.quiet = True
                return
            self.bar = tqdm(total=report.total, unit="step")
        self.bar.update(report.done - self.bar.n)
        self.bar.set_postfix_str(f"t={report.training_step}")


def _arguments_of_operator(options: argparse.Namespace) -> dict[str, Any]:
    given = dict(options.operator)
    return given if options.scale is None else {"scale": options.scale, **given}


def _restore(options: argparse.Namespace, command: Sequence[str]) -> int:
    from zsvr import metrics, pipeline, video
    from zsvr.planning import needed_bytes, plan
    from zsvr.restoration import Sampling
    from zsvr.temporal.settings import Temporal

    measures = metrics.MetricOptions(**dict(options.metric))
    networks = _networks(options)
    if not options.dry_run:
        video.check_target(options.output, lossless=options.lossless, overwrite=options.overwrite)
    arguments = _arguments_of_operator(options)
    job = pipeline.open_job(
        options.input, prior=options.prior, prior_options=dict(options.prior_option), task=options.task,
        operator=arguments or None, host=options.host, host_options=dict(options.host_option),
        temporal=Temporal.preset(options.preset, dict(options.changes)),
        sampling=Sampling(options.steps, options.spacing, tuple(options.travel), options.latent_host,
                          options.latent_every),
        noise_std=options.sigma, mode="synthetic" if options.synthetic else "real", prepare=options.prepare,
        seed=options.seed, start=options.start, stop=options.stop, flow_path=options.flow_path,
        run=None if options.dry_run else options.run,
        device=options.device, dtype=options.dtype, compile=options.compile, expected_count=options.expected_count,
        command=tuple(command),
    )  # fmt: skip
    for note in job.notes:
        _say(f"note: {note}")
    if options.dry_run:
        _print(str(plan(job)))
        return OK
    needed, fitting = needed_bytes(job)
    frames = max(len(shot) for shot in job.restoration.shots)
    _say(f"{frames} frames at a time need {needed / 1e9:.2f} GB beside the weights; about {fitting} would fit")
    if fitting < frames:
        raise MemoryError(
            f"{frames} frames do not fit into the free memory of {job.restoration.y.device}: restore fewer at a time "
            f"(--stop {options.start + max(fitting, 1)}), in bf16 (--dtype bf16), or smaller ones"
        )
    with Bar(options.quiet) as bar:
        result = job.start(bar)
    for note in video.write(
        options.output, result.frames, rate=result.rate, times=result.times, sound=result.sound,
        lossless=options.lossless, overwrite=options.overwrite,
    ):  # fmt: skip
        _say(f"note: {note}")
    clip = job.restoration
    if result.clean is None:  # then the degraded clip's flow is the only one there is
        measures = dataclasses.replace(measures, flow_source="input")
    found = metrics.evaluate(
        result.frames, result.clean, options=measures, preview=clip.operator.preview(clip.y).float().cpu(),
        seconds_per_frame=result.seconds / len(result.frames), peak_memory_mb=metrics.peak_memory_mb(clip.y.device),
        **networks,
    )  # fmt: skip
    _print(metrics.table({"restored": found}))
    if job.run is not None:
        job.run.write_metrics(found | {"seconds": result.seconds, "options": dataclasses.asdict(measures)})
    _say(f"{options.output}: {len(result.frames)} frames in {result.seconds:.1f} s")
    return OK


def _degrade(options: argparse.Namespace, command: Sequence[str]) -> int:
    from zsvr import degrading, operators, video

    if options.task is None:
        raise ValueError(f"name the task: --task {', '.join(sorted(operators.TASKS))}, or an operator's name")
    clip = video.read(options.input, options.start, options.stop)
    clean = degrading.prepare(clip.frames, options.prepare, options.size)
    operator = operators.make(options.task, **_arguments_of_operator(options))
    measured = degrading.degrade(clean, operator, noise_std=options.sigma, seed=options.seed, first=options.start)
    notes = degrading.save(
        options.output, measured, rate=clip.rate, times=clip.times, sound=clip.sound, overwrite=options.overwrite
    )
    for note in (*clip.notes, *degrading.describe_preparation(clip.frames, clean), *notes):
        _say(f"note: {note}")
    shape = "x".join(map(str, (measured.y.shape[3], measured.y.shape[2])))
    _say(f"{options.output}: {len(measured.y)} frames of {shape}, {operator}")
    return OK


def _evaluate(options: argparse.Namespace, command: Sequence[str]) -> int:
    from zsvr import degrading, metrics, runs, video
    from zsvr.files import check_free, to_json, write_text

    measures = metrics.MetricOptions(**dict(options.metric))
    if options.json:
        check_free(options.json, overwrite=options.overwrite)
    output = video.read(options.output).frames
    reference = video.read(options.reference, options.start, options.stop).frames
    H, W = output.shape[2:]
    if options.prepare == "square" and H == W and reference.shape[2:] != output.shape[2:]:
        prepared = degrading.prepare(reference, "square", H)
        _say(f"note: the reference's {degrading.describe_preparation(reference, prepared)[0]}")
        reference = prepared
    found = metrics.evaluate(output, reference, options=measures, **_networks(options))
    found["options"] = dataclasses.asdict(measures)
    _print(metrics.table({pathlib.Path(options.output).name: found}))
    if options.json:
        write_text(options.json, to_json(runs.finite(found)), overwrite=options.overwrite)
    return OK


def _info(options: argparse.Namespace, command: Sequence[str]) -> int:
    import zsvr_kernels
    from zsvr import runs, video

    if options.path:
        _print("\n".join(f"{name:<10} {value}" for name, value in vars(video.probe(options.path)).items()))
        return OK
    _print(str(zsvr_kernels.build_info()))
    _print("\n".join(f"{name:<26}{value}" for name, value in runs.versions().items()))
    return OK


def _bench(options: argparse.Namespace, command: Sequence[str]) -> int:
    from zsvr.profiling import profile

    _print(str(profile(
        prior=options.prior, width=options.width, size=options.size, frames=options.frames, steps=options.steps,
        host=options.host, device=options.device, dtype=options.dtype,
    )))  # fmt: skip
    return OK


COMMANDS = {"restore": _restore, "degrade": _degrade, "evaluate": _evaluate, "info": _info, "bench": _bench}


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 (it failed), 2 (wrong usage), 130 (interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    started = time.monotonic()
    try:
        return COMMANDS[options.command](options, ["zsvr", *given])
    except KeyboardInterrupt:
        _say(f"interrupted after {time.monotonic() - started:.0f} s; nothing was half-written")
        return INTERRUPTED
    except (
        ValueError,
        TypeError,
        LookupError,
        OSError,
        ArithmeticError,
        MemoryError,
        RuntimeError,
        ImportError,
    ) as error:
        if options.debug:
            raise
        text = str(error) or type(error).__name__
        _say(f"zsvr {options.command}: {text}")
        return USAGE if isinstance(error, TypeError) else FAILED


if __name__ == "__main__":
    raise SystemExit(main())
