"""VideoContext: a clip's flow, links, trajectories and history per token grid; the only thing here that has state."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import validation
from zsvr_kernels.correction import LinkHistory, correct_links
from zsvr_kernels.links import Links
from zsvr_kernels.ops.chain_links import chain_links
from zsvr_kernels.options import CorrectionOptions, SLROptions
from zsvr_kernels.sampling import Grid, sites
from zsvr_kernels.trajectories import Trajectories

Device = torch.device | str
_FORMAT = "zsvr_kernels.VideoContext 1"


class VideoContext:
    """What SLR attention needs to know of a clip: optical flow, and what follows from it on every token grid.

    Links, trajectories and frame tables are built when a layer first asks for them and kept for all layers and steps.
    Links may get better while sampling goes on (`CorrectionOptions`): a forward reads the committed history and notes
    better links as pending; `step` commits them once, when the step is over, so that a forward that is run again
    (activation checkpointing) finds the same links.

    Args:
        flow_forward, flow_backward: floating ``[B, T-1, 2, Hi, Wi]``, (dx, dy) in pixels from frame i to i+1 and back.
            Both None: no trajectories; then only ``combine`` "cross" and "spatial" run, and ``frames`` is required.
        options: see `SLROptions`; None: the defaults.
        occ_forward, occ_backward: bool ``[B, T-1, Hi, Wi]``, true where occluded; instead of the forward-backward
            check.
        frames: T, where there is no flow.
        ids: absolute numbers of the frames, rising, where they are a window of a longer clip. Pairs that are not
            adjacent have no links.
        size: height and width, in pixels of any unit, of what the network sees (for a latent network: the latent).
            Layers that get tokens without a grid take the first of ``size/1, size/2, size/4, ...`` (rounded up) with as
            many sites. None: the flow's size.
        grids: token grids ``(Hg, Wg)`` to try before those.
        cache_device: where links, trajectories and history rest between uses, for instance "cpu" for long clips on a
            GPU. None: where the flow is.

    Raises:
        TypeError, ValueError: tensors that do not fit each other, unknown options.

    Example:
        >>> flow = torch.zeros(1, 7, 2, 64, 64)
        >>> context = zsvr_kernels.VideoContext(flow, flow)
        >>> context.trajectories((16, 16)).positions.shape
        torch.Size([1, 8, 8, 256, 2])
    """

    def __init__(
        self,
        flow_forward: Tensor | None = None,
        flow_backward: Tensor | None = None,
        *,
        options: SLROptions | None = None,
        occ_forward: Tensor | None = None,
        occ_backward: Tensor | None = None,
        frames: int | None = None,
        ids: Sequence[int] | None = None,
        size: Grid | None = None,
        grids: Iterable[Grid] = (),
        cache_device: Device | None = None,
    ) -> None:
        if (flow_forward is None) != (flow_backward is None):
            raise ValueError("give both flow_forward and flow_backward, or neither")
        if (occ_forward is None) != (occ_backward is None):
            raise ValueError("give both occ_forward and occ_backward, or neither")
        self._flow: dict[str, Tensor] = {}
        if flow_forward is None or flow_backward is None:
            if frames is None:
                raise ValueError("without flow, say how many frames the clip has: VideoContext(frames=T)")
            if occ_forward is not None:
                raise ValueError("occlusion without flow means nothing: give the flow too")
            self._clips, self._frames = 1, validation.check_int("frames", frames, 1)
        else:
            for name, x in (("flow_forward", flow_forward), ("flow_backward", flow_backward)):
                validation.check_tensor(name, x, 5, "[B, T-1, 2, Hi, Wi]")
                validation.check_dtype(name, x, *validation.FLOATS)
                if x.shape[2] != 2 or min(x.shape[0], *x.shape[3:]) < 1:
                    raise ValueError(f"{name} must be [B, T-1, 2, Hi, Wi], got shape {tuple(x.shape)}")
                validation.check_shape(name, x, tuple(flow_forward.shape), "as flow_forward")
                validation.check_device(name, x, flow_forward, "flow_forward")
                self._flow[name] = x.detach()
            self._clips, self._frames = flow_forward.shape[0], flow_forward.shape[1] + 1
            if frames is not None and frames != self._frames:
                raise ValueError(f"flow is for {self._frames} frames, got frames = {frames}")
            if occ_forward is not None and occ_backward is not None:
                shape = (*flow_forward.shape[:2], *flow_forward.shape[3:])
                for name, x in (("occ_forward", occ_forward), ("occ_backward", occ_backward)):
                    validation.check_tensor(name, x, 4, "[B, T-1, Hi, Wi]")
                    validation.check_dtype(name, x, torch.bool)
                    validation.check_shape(name, x, shape, "[B, T-1, Hi, Wi]")
                    validation.check_device(name, x, flow_forward, "flow_forward")
                    self._flow[name] = x
        self._ids = list(range(self._frames)) if ids is None else [validation.check_int("ids", n, 0) for n in ids]
        self._is_window = ids is not None
        self._size = None if size is None else validation.check_grid(size)
        if self._size is None and self._flow:
            self._size = tuple(self._flow["flow_forward"].shape[3:])  # type: ignore[assignment]
        self._grids = [validation.check_grid(g) for g in grids]
        self._given: dict[Grid, Links] = {}
        self._cache_device = None if cache_device is None else torch.device(cache_device)
        self._k, self._K = 0, 1
        self._in_step = False
        self.reset()
        self.configure(SLROptions() if options is None else options)

    # ---- what the clip is ----

    @property
    def clips(self) -> int:
        """Number of clips B that the flow describes; a batch may hold a multiple (guidance branches)."""
        return self._clips

    @property
    def frames(self) -> int:
        """Number of frames T."""
        return self._frames

    @property
    def ids(self) -> list[int]:
        """Absolute numbers of the frames."""
        return list(self._ids)

    @property
    def options(self) -> SLROptions:
        """The options; change them with `configure`."""
        return self._options

    @property
    def has_flow(self) -> bool:
        """Whether there are trajectories."""
        return bool(self._flow or self._given)

    @property
    def device(self) -> torch.device:
        """Where the flow is, and where trajectories are given out unless a device is asked for."""
        for x in self._flow.values():
            return x.device
        for links in self._given.values():
            return links.forward.device
        return torch.device("cpu")

    @property
    def progress(self) -> float:
        """Share of sampling done, k/K."""
        return self._k / self._K

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held: flow, links, trajectories (with the index of their backward, once built), history."""

        def total(tensors: Iterable[Tensor]) -> int:
            return sum(x.numel() * x.element_size() for x in tensors)

        links = [x for n in (*self._links.values(), *self._given.values()) for x in _link_tensors(n).values()]
        trajectories = [
            x for t in self._trajectories.values() for x in (t.positions, t.valid, t.frames, *(t.kept_index() or ()))
        ]
        memories = (*self._history.values(), *self._pending.values())
        return {
            "flow": total(self._flow.values()),
            "links": total(links),
            "trajectories": total(trajectories),
            "history": total(x for h in memories for x in h.tensors().values()),
        }

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.nbytes.items())
        grids = ", ".join(f"{h}x{w}" for h, w in sorted(self._links)) or "none yet"
        return f"VideoContext(B={self.clips}, T={self.frames}, k={self._k}/{self._K}, grids: {grids}; {held})"

    # ---- options and state ----

    def configure(self, options: SLROptions) -> None:
        """Change the options; what depends on them is built anew, and history is forgotten if links change."""
        if not isinstance(options, SLROptions):
            raise TypeError(f"options must be zsvr_kernels.SLROptions, got {type(options).__name__}")
        table = options.table(self.frames, self._ids if self._is_window else None)
        old = getattr(self, "_options", None)
        self._options = options
        self._tables: dict[torch.device, Tensor] = {torch.device("cpu"): table.cpu()}
        if old is None or old.link_options() != options.link_options():
            self._links: dict[Grid, Links] = {}
            self.reset()
        self._trajectories: dict[Grid, Trajectories] = {}
        self._shared: dict[Grid, tuple[str, Trajectories]] = {}

    def begin_step(self, k: int, K: int) -> None:
        """Say that step k of K (0..K-1) begins: it fixes the progress k/K. What was pending is dropped.

        A step that is executed again (time travel) is begun again.
        """
        K = validation.check_int("K", K, 1)
        k = validation.check_int("k", k, 0)
        if k >= K:
            raise ValueError(f"k must be within 0..K-1 = 0..{K - 1}, got {k}")
        self._k, self._K, self._in_step = k, K, True
        self._pending: dict[str, LinkHistory] = {}
        self._shared = {}

    def commit(self) -> None:
        """End the step, after its backward: pending links become the history that the next step reads."""
        self._history.update(self._pending)
        self._pending, self._in_step, self._shared = {}, False, {}

    @contextlib.contextmanager
    def step(self, k: int, K: int) -> Iterator[VideoContext]:
        """Run one sampling step: ``with context.step(k, K): ...``; commits at the end, not after an exception."""
        self.begin_step(k, K)
        try:
            yield self
        except BaseException:
            self._pending, self._in_step, self._shared = {}, False, {}
            raise
        self.commit()

    def reset(self) -> None:
        """Forget history and progress: another clip begins, or the flow was estimated anew."""
        self._history: dict[str, LinkHistory] = {}
        self._pending = {}
        self._shared = {}
        self._k, self._K, self._in_step = 0, 1, False

    # ---- what layers ask for ----

    def table(self, device: Device | None = None) -> Tensor:
        """Return the frame table, int32 ``[T, R]``."""
        where = self.device if device is None else torch.device(device)
        if where not in self._tables:
            self._tables[where] = next(iter(self._tables.values())).to(where)
        return self._tables[where]

    def grid_of(self, tokens: int) -> Grid:
        """Return the token grid with that many sites: one of ``grids``, else the first halving of ``size``.

        Raises:
            ValueError: there is none; the message says what was tried.
        """
        for grid in self._grids:
            if grid[0] * grid[1] == tokens:
                return grid
        tried = list(self._grids)
        if self._size is not None:
            h, w = self._size
            n = 1
            while True:
                grid = (math.ceil(h / n), math.ceil(w / n))
                if grid[0] * grid[1] == tokens:
                    return grid
                tried.append(grid)
                if grid[0] * grid[1] < tokens or max(grid) == 1:
                    break
                n *= 2
        raise ValueError(
            f"no token grid has {tokens} sites; tried {', '.join(f'{a}x{b}' for a, b in tried) or 'none'}. Name it: "
            "VideoContext(..., grids=[(Hg, Wg)]), or size=(height, width) of the network's input; class tokens are "
            "counted out by SLROptions(prefix=n)"
        )

    def set_links(self, links: Links) -> None:
        """Use these links on their grid instead of what the flow gives; forgets history.

        Raises:
            TypeError, ValueError: not links, or links for other clips or another number of frames.
        """
        if not isinstance(links, Links):
            raise TypeError(f"links must be zsvr_kernels.Links, got {type(links).__name__}")
        expected = (self.clips, self.frames - 1)
        if tuple(links.forward.shape[:2]) != expected:
            raise ValueError(f"links must be for [B, T-1] = {expected}, got {tuple(links.forward.shape[:2])}")
        self._given[links.grid] = links
        self._links.pop(links.grid, None)
        self._trajectories.pop(links.grid, None)
        self.reset()

    def links(self, grid: Grid, device: Device | None = None) -> Links:
        """Return the uncorrected links on a token grid, from the flow or as set.

        Raises:
            ValueError: the clip has neither.
        """
        grid = validation.check_grid(grid)
        if grid not in self._links:
            self._links[grid] = self._rest(self._build(grid))
        return self._links[grid].to(self.device if device is None else device)

    def trajectories(self, grid: Grid, device: Device | None = None) -> Trajectories:
        """Return the trajectories of the uncorrected links on a token grid."""
        grid = validation.check_grid(grid)
        where = self.device if device is None else torch.device(device)
        if grid not in self._trajectories:
            self._trajectories[grid] = self._rest(self._chain(self.links(grid, where)))
        kept = self._trajectories[grid]
        return kept if kept.positions.device == where else kept.to(where)

    @torch.compiler.disable
    def corrected(self, name: str, grid: Grid, features: Tensor) -> Trajectories:
        """Return the trajectories for one layer at the current step, its links corrected by its features.

        Outside a step, before admission and with correction switched off they are those of the flow. The better links
        become pending under the layer's name (``history_scope`` "grid": under the grid, by its first layer of the
        step).

        Args:
            name: of the layer; its history is kept under it.
            grid: ``(Hg, Wg)``.
            features: ``[B, T, P, C]``, what the layer compares; see ``CorrectionOptions.feature``.
        """
        correct = self._options.correct
        if not correct.enabled or not self._in_step or self._k < correct.first_admitted(self._K):
            return self.trajectories(grid, features.device)
        by_grid = correct.history_scope == "grid"
        if by_grid and grid in self._shared and self._shared[grid][0] != name:
            return self._shared[grid][1]
        key = f"{grid[0]}x{grid[1]}" if by_grid else f"{name}/{grid[0]}x{grid[1]}"
        history = self._history.get(key)
        if features.dim() == 4 and features.stride(3) != 1:
            features = features.contiguous()
        with torch.no_grad():
            links, pending = correct_links(
                self.links(grid, features.device),
                features,
                None if history is None else history.to(features.device),
                k=self._k,
                K=self._K,
                options=correct,
                backend="auto",
            )
            trajectories = self._chain(links)
        if pending is not None:
            self._pending[key] = self._rest(pending)
        if by_grid:
            self._shared[grid] = (name, trajectories)
        return trajectories

    @torch.compiler.disable
    def uses_features(self) -> bool:
        """Return whether `corrected` would look at features now; if not, they need not be computed."""
        correct = self._options.correct
        return correct.enabled and self._in_step and self._k >= correct.first_admitted(self._K)

    def history(self) -> dict[str, LinkHistory]:
        """Return the committed history by key: ``"<layer>/<Hg>x<Wg>"``, or ``"<Hg>x<Wg>"`` per grid."""
        return dict(self._history)

    def _rest(self, x: Any) -> Any:
        return x if self._cache_device is None else x.to(self._cache_device)

    def _chain(self, links: Links) -> Trajectories:
        o = self._options
        return chain_links(links, window=o.window, rounding=o.rounding, link_rule=o.link_rule)

    def _build(self, grid: Grid) -> Links:
        if grid in self._given:
            return self._given[grid]
        if not self._flow:
            raise ValueError(
                "this context has no flow, so there are no trajectories: give flow_forward and flow_backward, or use "
                'SLROptions(combine="cross")'
            )
        flow = self._flow
        links = Links.from_flow(
            flow["flow_forward"],
            flow["flow_backward"],
            grid=grid,
            occ_forward=flow.get("occ_forward"),
            occ_backward=flow.get("occ_backward"),
            **self._options.link_options(),
        )
        gap = torch.tensor([b - a != 1 for a, b in zip(self._ids, self._ids[1:], strict=False)], dtype=torch.bool)
        if bool(gap.any()):
            own = sites(grid, device=links.forward.device)
            gap = gap.to(links.forward.device)
            links = dataclasses.replace(
                links,
                forward=torch.where(gap[None, :, None, None], own, links.forward),
                backward=torch.where(gap[None, :, None, None], own, links.backward),
                valid_forward=links.valid_forward & ~gap[None, :, None],
                valid_backward=links.valid_backward & ~gap[None, :, None],
            )
        return links

    # ---- other contexts ----

    def window(self, start: int, stop: int) -> VideoContext:
        """Return a context for frames start..stop-1, with caches and history of its own; its flow shares memory."""
        start, stop = validation.check_int("start", start, 0), validation.check_int("stop", stop, 1)
        if not start < stop <= self.frames:
            raise ValueError(f"a window must be within 0..{self.frames}, got {start}..{stop}")
        result = VideoContext(
            **{name: x[:, start : stop - 1] for name, x in self._flow.items()},
            options=self._options,
            frames=stop - start,
            ids=self._ids[start:stop],
            size=self._size,
            grids=self._grids,
            cache_device=self._cache_device,
        )
        result._clips = self._clips
        for links in self._given.values():
            part = {name: x[:, start : stop - 1] for name, x in _link_tensors(links).items()}
            result.set_links(Links(**part, grid=links.grid))
        return result

    def to(self, device: Device) -> VideoContext:
        """Move flow, caches and history to a device; returns the same context."""
        self._flow = {name: x.to(device) for name, x in self._flow.items()}
        self._given = {grid: links.to(device) for grid, links in self._given.items()}
        if self._cache_device is None:
            self._links = {grid: links.to(device) for grid, links in self._links.items()}
            self._trajectories = {grid: t.to(device) for grid, t in self._trajectories.items()}
            self._history = {key: h.to(device) for key, h in self._history.items()}
            self._pending = {key: h.to(device) for key, h in self._pending.items()}
        self._shared = {}
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write flow, given links, committed history, options and step to a safetensors file.

        The file is written under a temporary name in the same folder and moved, so an earlier one is never half lost.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            ValueError: options that hold a function, which a file cannot.
        """
        tensors = {f"flow/{name}": x for name, x in self._flow.items()}
        for (Hg, Wg), links in self._given.items():
            tensors |= {f"links/{Hg}x{Wg}/{name}": x for name, x in _link_tensors(links).items()}
        for key, history in self._history.items():
            tensors |= {f"history/{key}/{name}": x for name, x in history.tensors().items()}
        options = _options_to_json(self._options, tensors)
        facts = {
            "options": options,
            "frames": self._frames,
            "clips": self._clips,
            "ids": self._ids if self._is_window else None,
            "size": self._size,
            "grids": self._grids,
            "k": self._k,
            "K": self._K,
        }
        metadata = {"format": _FORMAT, "facts": json.dumps(facts)}
        target = pathlib.Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            _safetensors().save_file({n: x.contiguous().cpu() for n, x in tensors.items()}, str(partial), metadata)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: Device = "cpu", cache_device: Device | None = None
    ) -> VideoContext:
        """Return the context that `save` wrote.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            ValueError: the file is not one of `save`.
        """
        safetensors = _safetensors()
        with safetensors.safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} holds {metadata.get('format', 'no format')!r}, expected {_FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata["facts"])
        flow = {n.removeprefix("flow/"): x for n, x in tensors.items() if n.startswith("flow/")}
        result = cls(
            **flow,
            options=_options_from_json(facts["options"], tensors),
            frames=facts["frames"],
            ids=facts["ids"],
            size=facts["size"],
            grids=facts["grids"],
            cache_device=cache_device,
        )
        result._clips = validation.check_int("clips", facts["clips"], 1)
        grouped: dict[str, dict[str, Tensor]] = {}
        for name, x in tensors.items():
            group, _, field = name.rpartition("/")
            grouped.setdefault(group, {})[field] = x
        for group, parts in grouped.items():
            if group.startswith("links/"):
                Hg, Wg = (int(n) for n in group.removeprefix("links/").split("x"))
                result.set_links(Links.from_positions(**parts, grid=(Hg, Wg)))
        for group, parts in grouped.items():
            if group.startswith("history/"):
                result._history[group.removeprefix("history/")] = result._rest(LinkHistory(**parts))
        result._k, result._K = facts["k"], facts["K"]
        return result


def _link_tensors(links: Links) -> dict[str, Tensor]:
    return {name: getattr(links, name) for name in ("forward", "backward", "valid_forward", "valid_backward")}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "saving and loading a VideoContext needs safetensors: pip install safetensors"
        ) from error

    class Both:
        safe_open = staticmethod(safetensors.safe_open)
        save_file = staticmethod(safetensors.torch.save_file)

    return Both


def _options_to_json(options: SLROptions, tensors: dict[str, Tensor]) -> dict[str, Any]:
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    values["correct"] = dataclasses.asdict(options.correct)
    if isinstance(options.frames, Tensor):
        tensors["options/frames"] = options.frames
        values["frames"] = None
    for name, value in values.items():
        if callable(value):
            raise ValueError(f"options.{name} is a function, which cannot be saved: use names, patterns or a tensor")
    return values


def _options_from_json(values: dict[str, Any], tensors: dict[str, Tensor]) -> SLROptions:
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    values["correct"] = CorrectionOptions(**values["correct"])
    if "options/frames" in tensors:
        values["frames"] = tensors["options/frames"].cpu()
    return SLROptions(**values)
