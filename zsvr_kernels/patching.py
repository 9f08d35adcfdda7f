"""patched(): put SLR attention in place of every self-attention of somebody else's model, for the length of a block."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zsvr_kernels import backends, opaque
from zsvr_kernels.adapters import Adapter, adapt, adapter_for
from zsvr_kernels.adapters.guided_diffusion_block import GuidedDiffusionBlock
from zsvr_kernels.context import VideoContext
from zsvr_kernels.options import SLROptions
from zsvr_kernels.sampling import Grid
from zsvr_kernels.slr import SLRAttention, attend, needs_grid

_patched_now: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class PatchedLayer:
    """One attention layer of a patched model.

    Attributes:
        name: path of the module in the model.
        kind: structure it was recognised by.
        heads, head_dim: H and D; 0 where the layer was not taken apart.
        reason: why it was left alone, or None if it is patched.
        grid: token grid, once seen.
        backend: what runs cross-frame and trajectory attention, once seen.
        note: what the last call did instead of SLR attention, or None.
        calls: how often it ran.
    """

    name: str
    kind: str
    heads: int = 0
    head_dim: int = 0
    reason: str | None = None
    grid: Grid | None = None
    backend: str | None = None
    note: str | None = None
    calls: int = 0
    adapter: Adapter | None = field(default=None, repr=False)

    @property
    def is_patched(self) -> bool:
        """Whether SLR attention is in its place."""
        return self.reason is None


@dataclass
class PatchReport:
    """What `patched` did: one line per attention layer that it found. ``str(report)`` is a table."""

    layers: list[PatchedLayer]

    @property
    def patched(self) -> list[PatchedLayer]:
        """The layers that run SLR attention."""
        return [layer for layer in self.layers if layer.is_patched]

    @property
    def skipped(self) -> list[PatchedLayer]:
        """The layers that were left alone; each says why in ``reason``."""
        return [layer for layer in self.layers if not layer.is_patched]

    def __str__(self) -> str:
        rows = [("layer", "structure", "grid", "heads", "head dim", "backend", "patched")]
        for x in self.layers:
            rows.append(
                (
                    x.name or "(the model)",
                    x.kind,
                    "x".join(map(str, x.grid)) if x.grid else "-",
                    str(x.heads or "-"),
                    str(x.head_dim or "-"),
                    x.backend or "-",
                    f"no: {x.reason}" if x.reason else f"yes ({x.note})" if x.note else "yes",
                )
            )
        widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
        lines.append(f"{len(self.patched)} of {len(self.layers)} attention layers patched")
        return "\n".join(lines)

    def verify(self) -> None:
        """Raise RuntimeError if anything has replaced a patched layer's processor or forward since."""
        lost = [x.name for x in self.patched if x.adapter is not None and not x.adapter.is_installed()]
        if lost:
            raise RuntimeError(
                f"{len(lost)} patched layers were replaced after patching: {_few(lost)}. Something set other "
                "attention processors (attention slicing, xFormers, LoRA, set_attn_processor): do that before "
                "zsvr_kernels.patched"
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _find(root: nn.Module) -> Iterator[tuple[str, nn.Module, type[Adapter] | None]]:
    """Yield every attention of a known structure, and every SLRAttention (with None), outermost only."""
    inside: list[str] = []
    for name, module in root.named_modules():
        if any(name.startswith(f"{outer}." if outer else "") for outer in inside):
            continue
        if "_orig_mod" in module._modules:  # compiled: what it wraps comes next
            continue
        kind = adapter_for(module)
        if isinstance(module, SLRAttention) or kind is not None:
            inside.append(name)
            yield name, module, None if isinstance(module, SLRAttention) else kind


def _survey(root: nn.Module, options: SLROptions, qkv_order: str | None) -> list[PatchedLayer]:
    layers = []
    for path, module, kind in _find(root):
        name = ".".join(part for part in path.split(".") if part != "_orig_mod")
        if kind is None:
            layers.append(PatchedLayer(name, "SLRAttention", reason="it is SLR attention: hand it the context"))
            continue
        if module in _patched_now:
            raise RuntimeError(
                f"{name or 'the model'} is patched already: leave the first zsvr_kernels.patched block first"
            )
        reason = kind.refusal(module, name) or options.takes(name)
        if reason is not None:
            layers.append(PatchedLayer(name, kind.kind, reason=reason))
            continue
        adapter = adapt(module, qkv_order=qkv_order if kind is GuidedDiffusionBlock else None)
        layers.append(PatchedLayer(name, kind.kind, adapter.heads, adapter.head_dim, adapter=adapter))
    return layers


def _begin(layer: PatchedLayer, context: VideoContext, x: Tensor) -> tuple[bool, Grid | None]:
    """Note a call; return whether SLR attention runs, and on which grid (None: it needs none)."""
    layer.calls += 1
    options = context.options
    adapter = layer.adapter
    assert adapter is not None
    is_active = options.is_active(context.progress)
    tokens = x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1] - options.prefix
    grid = (x.shape[2], x.shape[3]) if x.dim() == 4 else None
    layer.note = None if callable(options.layers) else options.takes_grid(layer.name, grid or (1, tokens))
    if x.dim() == 3:
        try:
            grid = context.grid_of(tokens)
        except ValueError:
            needs = needs_grid(options) and is_active and context.frames > 1
            if layer.note is None and (needs or callable(options.layers)):
                raise
    layer.grid = grid
    if callable(options.layers) and grid is not None:
        layer.note = options.takes_grid(layer.name, grid)
    if layer.note is None and not is_active:
        layer.note = f"progress {context.progress:.2f} is outside active = {options.active}"
    if layer.note is not None:
        return False, grid
    if layer.backend is None:
        names = []
        walks = options.combine == "trajectory" or (needs_grid(options) and context.frames > 1)
        for op in ("cross_frame_attention", "trajectory_attention")[: 2 if walks else 1]:
            call = backends.Call(op, x.device.type, x.dtype, adapter.head_dim, torch.is_grad_enabled())
            names.append(backends.choose(options.backend, call))
        layer.backend = "/".join(dict.fromkeys(names))
    return True, grid


class _Runner:
    """What a patched layer calls in place of its forward or of its processor."""

    def __init__(self, layer: PatchedLayer, context: VideoContext) -> None:
        assert layer.adapter is not None
        self.layer, self.context, self.adapter = layer, context, layer.adapter
        self.number = opaque.number_of(layer.adapter.module)
        self.original: Any = None
        self.is_open = True
        opaque.open_layer(self.number, self._alone, layer.adapter.out_channels)

    def close(self) -> None:
        self.is_open = False
        opaque.close_layer(self.number)

    def __call__(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            call = self.adapter.read_call(*args, **kwargs)
            if call is not None and not call[1] and not torch.is_autocast_enabled(call[0].device.type):
                return self.adapter.wrap(opaque.run(call[0], self.number))
        return self._run(original, *args, **kwargs)

    def _alone(self, x: Tensor) -> Tensor:
        runs, grid = _begin(self.layer, self.context, x)
        return self._attend(x, grid) if runs else self.adapter.call_original(self.original, x)

    @torch.compiler.disable
    def _run(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_open:  # code that was compiled within the block has kept it
            return original(*args, **kwargs)
        call = self.adapter.read_call(*args, **kwargs)
        if call is None:
            self.layer.calls += 1
            self.layer.note = "called as cross-attention"
            return original(*args, **kwargs)
        x, inputs = call
        runs, grid = _begin(self.layer, self.context, x)
        return self.adapter.wrap(self._attend(x, grid, **inputs)) if runs else original(*args, **kwargs)

    def _attend(self, x: Tensor, grid: Grid | None, **inputs: Any) -> Tensor:
        prefix = self.context.options.prefix
        return attend(self.adapter, x, self.context, grid=grid, prefix=prefix, name=self.layer.name, **inputs)


@contextlib.contextmanager
def patched(
    model: nn.Module | Any,
    context: VideoContext,
    options: SLROptions | None = None,
    *,
    expected_count: int | None = None,
    qkv_order: str | None = None,
    verify: bool = True,
) -> Iterator[PatchReport]:
    """Run a model with SLR attention in place of its spatial self-attention, for the length of a ``with`` block.

    Self-attention layers are found by structure: diffusers ``Attention`` (through its processor; ``attn2`` and other
    cross-attention stay as they are), guided-diffusion ``AttentionBlock``, LDM ``CrossAttention``, timm ``Attention``,
    ``torch.nn.MultiheadAttention``. Weights and state dict do not change. Frames are folded into the batch.

    Args:
        model: a module, or a diffusers pipeline (its ``unet``).
        context: of the clip; its options say which layers are taken and how they attend.
        options: instead of the context's, until the block ends.
        expected_count: number of layers that must be patched.
        qkv_order: of guided-diffusion blocks; see `SLRAttention.from_attention`.
        verify: check before every call of the model, compiled or not, that nothing has replaced a patched layer, and
            after the first that each ran exactly once. A network that runs a layer twice, or not at all, needs False.

    Yields:
        A `PatchReport`: print it, or look into ``report.layers``.

    Raises:
        TypeError: not a module.
        RuntimeError: nothing was patched, another number than expected, a layer is patched already; later, a layer
            that was replaced or has not run.

    Compiled models, compiled before or within the block, run the patch and are themselves again after it. In inference
    a layer is one operation to the compiler; where a gradient is needed and under autocast the graph breaks around it.
    Attention dropout is not applied. The README of ``zsvr_kernels/adapters`` lists what is recognised and refused.

    Example:
        >>> layer = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> flow, x = torch.zeros(1, 7, 2, 64, 64), torch.randn(8, 256, 64)
        >>> with zsvr_kernels.patched(layer, zsvr_kernels.VideoContext(flow, flow)) as report:
        ...     y, _ = layer(x, x, x)
        >>> len(report.patched)
        1
    """
    if not isinstance(model, nn.Module):
        model = getattr(model, "unet", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or a pipeline with a unet, got {type(model).__name__}")
    if not isinstance(context, VideoContext):
        raise TypeError(f"context must be zsvr_kernels.VideoContext, got {type(context).__name__}")
    root = getattr(model, "_orig_mod", model)
    layers = _survey(root, context.options if options is None else options, qkv_order)
    report = PatchReport(layers)
    if not report.patched:
        found = f"\n{report}" if layers else " and found no attention of a known structure"
        raise RuntimeError(f"nothing to patch: looked through {type(root).__name__}{found}")
    if expected_count is not None and len(report.patched) != expected_count:
        raise RuntimeError(f"expected {expected_count} layers to patch, found {len(report.patched)}\n{report}")

    with contextlib.ExitStack() as stack:
        if options is not None:
            before = context.options
            stack.callback(context.configure, before)
            context.configure(options)
        if "torch._dynamo" in sys.modules and any(isinstance(m, nn.TransformerEncoderLayer) for m in root.modules()):
            torch.compiler.reset()  # its choice of the fused path is compiled in, whatever hooks come later
        for layer in report.patched:
            assert layer.adapter is not None
            module = layer.adapter.module
            _patched_now.add(module)
            stack.callback(_patched_now.discard, module)
            runner = _Runner(layer, context)
            stack.callback(runner.close)
            runner.original = layer.adapter.original()
            stack.callback(layer.adapter.install(runner))
        if verify:
            for handle in _watch(root, report):
                stack.callback(handle.remove)
        yield report


def _watch(model: nn.Module, report: PatchReport) -> list[Any]:
    """Check the patch before every call of the model, and that each layer ran once after the first."""
    is_first = True

    @torch.compiler.disable
    def before(*_: Any) -> None:
        report.verify()
        if is_first:
            for layer in report.patched:
                layer.calls = 0

    @torch.compiler.disable
    def after(*_: Any) -> None:
        nonlocal is_first
        if not is_first:
            return
        is_first = False
        wrong = [f"{x.name} ({x.calls})" for x in report.patched if x.calls != 1]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} patched layers did not run exactly once in the model's first call: {_few(wrong)}. "
                "Either something bypasses them (a fused fast path, another attention processor), or the network runs "
                "them otherwise by design: then patched(..., verify=False)"
            )

    return [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
