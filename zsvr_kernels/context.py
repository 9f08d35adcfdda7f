"""VideoContext: a clip's flow, links, trajectories and history per token grid; the only thing here that has state."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import context_file, validation
from zsvr_kernels.correction import LinkHistory, check_history, correct_links
from zsvr_kernels.links import Links
from zsvr_kernels.ops.chain_links import chain_links
from zsvr_kernels.options import SLROptions
from zsvr_kernels.sampling import Grid
from zsvr_kernels.trajectories import Trajectories

Device = torch.device | str
LONGEST_CLIP = 2**20  # frame tables are made in Python


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
        self._flow: dict[str, Tensor] = {}
        if flow_forward is None or flow_backward is None:
            if frames is None:
                raise ValueError("without flow, say how many frames the clip has: VideoContext(frames=T)")
            if occ_forward is not None or occ_backward is not None:
                raise ValueError("occlusion without flow means nothing: give the flow too")
            self._clips, self._frames = 1, validation.check_int("frames", frames, 1)
            if self._frames > LONGEST_CLIP:
                raise ValueError(f"frames must be at most {LONGEST_CLIP}, got {frames}")
        else:
            validation.check_flow(flow_forward, flow_backward, occ_forward, occ_backward)
            self._clips, self._frames = flow_forward.shape[0], flow_forward.shape[1] + 1
            if self._clips < 1:
                raise ValueError(f"flow must be of at least one clip, got shape {tuple(flow_forward.shape)}")
            if frames is not None and validation.check_int("frames", frames) != self._frames:
                raise ValueError(f"flow is for {self._frames} frames, got frames = {frames}")
            self._flow = {"flow_forward": flow_forward.detach(), "flow_backward": flow_backward.detach()}
            if occ_forward is not None and occ_backward is not None:
                self._flow |= {"occ_forward": occ_forward, "occ_backward": occ_backward}
        self._ids = list(range(self._frames)) if ids is None else [validation.check_int("ids", n, 0) for n in ids]
        if len(self._ids) != self._frames or any(a >= b for a, b in itertools.pairwise(self._ids)):
            raise ValueError(f"ids must be T = {self._frames} rising frame numbers, got {self._ids}")
        self._is_window = ids is not None
        self._size = None if size is None else validation.check_grid(size)
        if self._size is None and self._flow:
            self._size = tuple(self._flow["flow_forward"].shape[3:])  # type: ignore[assignment]
        self._grids = [validation.check_grid(g) for g in grids]
        self._given: dict[Grid, Links] = {}
        self._cache_device = None if cache_device is None else _device(cache_device)
        self._links: dict[Grid, Links] = {}
        self._trajectories: dict[Grid, Trajectories] = {}
        self._shared: dict[Grid, tuple[str, Trajectories]] = {}  # per grid, this step: by which layer, and its result
        self._history: dict[str, LinkHistory] = {}
        self._pending: dict[str, LinkHistory] = {}
        self._options: SLROptions | None = None
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
        assert self._options is not None
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
        """Bytes held, by kind; a tensor that is held twice counts once.

        ``"flow"``: 8 bytes for a pixel of each of ``B*(T-1)`` pairs and each direction in float32, 1 for given
        occlusion. ``"links"``: ``18 B (T-1) P`` per token grid. ``"trajectories"``: ``9 B T L P + 4 T L`` per grid, and
        the index of their backward and the records of GPU kernels once they are built. ``"history"``:
        ``26 B (T-1) P`` per layer (or grid), twice that within a step.
        """
        links = [x for n in (*self._links.values(), *self._given.values()) for x in n.tensors().values()]
        chained = (*self._trajectories.values(), *(t for _, t in self._shared.values()))
        memories = (*self._history.values(), *self._pending.values())
        return {
            "flow": _bytes(self._flow.values()),
            "links": _bytes(links),
            "trajectories": _bytes(x for t in chained for x in (t.positions, t.valid, t.frames, *t.kept())),
            "history": _bytes(x for h in memories for x in h.tensors().values()),
        }

    def __repr__(self) -> str:
        held = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.nbytes.items())
        grids = ", ".join(f"{h}x{w}" for h, w in sorted(self._links)) or "none yet"
        return f"VideoContext(B={self.clips}, T={self.frames}, k={self._k}/{self._K}, grids: {grids}; {held})"

    # ---- options and state ----

    def configure(self, options: SLROptions) -> None:
        """Change the options. What depends on a changed one is built anew when it is next asked for.

        History is forgotten if links change, or what their history means (``feature``, ``history_scope``).
        """
        if not isinstance(options, SLROptions):
            raise TypeError(f"options must be zsvr_kernels.SLROptions, got {type(options).__name__}")
        table = options.table(self.frames, self._ids if self._is_window else None)
        old, self._options = self._options, options
        self._tables: dict[torch.device, Tensor] = {torch.device("cpu"): table.cpu()}
        self._shared = {}
        if old is None:
            return
        is_new = old.link_options() != options.link_options()
        if is_new:
            self._links = {}
        if is_new or old.chain_options() != options.chain_options():
            self._trajectories = {}
        meaning = [(o.correct.feature, o.correct.history_scope) for o in (old, options)]
        if is_new or meaning[0] != meaning[1]:
            self._forget()

    def begin_step(self, k: int, K: int) -> None:
        """Say that step k of K (0..K-1) begins: it fixes the progress k/K. What was pending is dropped.

        A step that is executed again (time travel) is begun again.
        """
        self._k, self._K = validation.check_step(k, K)
        self._in_step = True
        self._pending, self._shared = {}, {}

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
        self._forget()
        self._k, self._K, self._in_step = 0, 1, False

    def _forget(self) -> None:
        self._history, self._pending, self._shared = {}, {}, {}

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
            TypeError, ValueError: not links, or links for other clips or another number of frames. Without flow the
                first links say how many clips there are.
        """
        if not isinstance(links, Links):
            raise TypeError(f"links must be zsvr_kernels.Links, got {type(links).__name__}")
        validation.check_links(**links.tensors(), grid=links.grid)
        B, pairs = links.forward.shape[:2]
        if pairs != self.frames - 1 or B < 1 or (self.has_flow and self.clips != B):
            expected = f"[{self.clips if self.has_flow else 'B'}, {self.frames - 1}]"
            raise ValueError(f"links must be for [B, T-1] = {expected}, got [{B}, {pairs}]")
        self._clips = B
        self._given[links.grid] = links
        self._links.pop(links.grid, None)
        self._trajectories.pop(links.grid, None)
        self._forget()

    def links(self, grid: Grid, device: Device | None = None) -> Links:
        """Return the uncorrected links on a token grid, from the flow or as set.

        Raises:
            ValueError: the clip has neither.
        """
        grid = validation.check_grid(grid)
        if grid not in self._links:
            with _lasting():
                self._links[grid] = self._rest(self._build(grid))
        return self._links[grid].to(self.device if device is None else device)

    def trajectories(self, grid: Grid, device: Device | None = None) -> Trajectories:
        """Return the trajectories of the uncorrected links on a token grid."""
        grid = validation.check_grid(grid)
        where = self.device if device is None else torch.device(device)
        if grid not in self._trajectories:
            with _lasting():
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
        if not self.uses_features():
            return self.trajectories(grid, features.device)
        correct = self.options.correct
        by_grid = correct.history_scope == "grid"
        if by_grid and grid in self._shared and self._shared[grid][0] != name:
            return self._shared[grid][1]
        key = context_file.grid_to_text(grid) if by_grid else f"{name}/{context_file.grid_to_text(grid)}"
        history = self._history.get(key)
        with _lasting():
            links, pending = correct_links(
                self.links(grid, features.device),
                features,
                None if history is None else history.to(features.device),
                k=self._k,
                K=self._K,
                options=correct,
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
        return self._in_step and self.options.correct.is_admitted(self._k, self._K)

    def history(self) -> dict[str, LinkHistory]:
        """Return the committed history by key: ``"<layer>/<Hg>x<Wg>"``, or ``"<Hg>x<Wg>"`` per grid."""
        return dict(self._history)

    def _rest(self, x: Any) -> Any:
        return x if self._cache_device is None else x.to(self._cache_device)

    def _chain(self, links: Links) -> Trajectories:
        return chain_links(links, **self.options.chain_options())

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
            **self.options.link_options(),
        )
        gap = torch.tensor([b - a != 1 for a, b in itertools.pairwise(self._ids)], dtype=torch.bool)
        return links.cut(gap) if bool(gap.any()) else links

    # ---- other contexts ----

    def window(self, start: int, stop: int) -> VideoContext:
        """Return a context for frames start..stop-1, with caches and history of its own; its flow shares memory."""
        start, stop = validation.check_int("start", start, 0), validation.check_int("stop", stop, 1)
        if not start < stop <= self.frames:
            raise ValueError(f"a window must be within 0..{self.frames}, got {start}..{stop}")
        result = VideoContext(
            **{name: x[:, start : stop - 1] for name, x in self._flow.items()},
            options=self.options,
            frames=stop - start,
            ids=self._ids[start:stop],
            size=self._size,
            grids=self._grids,
            cache_device=self._cache_device,
        )
        for links in self._given.values():
            part = {name: x[:, start : stop - 1] for name, x in links.tensors().items()}
            result.set_links(Links(**part, grid=links.grid))
        return result

    def to(self, device: Device) -> VideoContext:
        """Move flow, caches and history to a device; returns the same context."""
        self._flow = {name: x.to(device) for name, x in self._flow.items()}
        self._given = {grid: links.to(device) for grid, links in self._given.items()}
        if self._cache_device is None:
            self._links = {grid: self._given.get(grid) or links.to(device) for grid, links in self._links.items()}
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
        values, groups = context_file.options_to_json(self.options)
        groups |= {"flow": self._flow}
        groups |= {f"links/{context_file.grid_to_text(grid)}": links.tensors() for grid, links in self._given.items()}
        groups |= {f"history/{key}": history.tensors() for key, history in self._history.items()}
        facts = {
            "options": values,
            "frames": self._frames,
            "ids": self._ids if self._is_window else None,
            "size": self._size,
            "grids": self._grids,
            "k": self._k,
            "K": self._K,
        }
        context_file.write(path, groups, facts)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: Device = "cpu", cache_device: Device | None = None
    ) -> VideoContext:
        """Return the context that `save` wrote, between two steps. Nothing in the file is executed.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            FileNotFoundError: there is no such file.
            ValueError: the file is not one of `save`, or is damaged.
        """
        groups, facts = context_file.read(path, device)
        try:
            arguments: dict[str, Any] = {name: facts[name] for name in ("frames", "ids", "size", "grids")}
            options = context_file.options_from_json(facts["options"], groups)
            result = cls(**(arguments | groups.get("flow", {})), options=options, cache_device=cache_device)
            for group, parts in groups.items():
                if group.startswith("links/"):
                    grid = context_file.grid_from_text(group.removeprefix("links/"))
                    result.set_links(Links.from_positions(**parts, grid=grid))
            for group, parts in groups.items():
                if group.startswith("history/"):
                    history, (Hg, Wg) = LinkHistory(**parts), context_file.grid_from_text(group.rpartition("/")[2])
                    check_history(history, result.clips, result.frames - 1, Hg * Wg, history.forward)
                    result._history[group.removeprefix("history/")] = result._rest(history)
            result.begin_step(facts["k"], facts["K"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold a whole VideoContext: {error}") from error
        result._in_step = False
        return result


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())


def _device(device: Device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device: {error}") from None


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """Build what is kept: without graph, and fit for a later backward also if this call is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
