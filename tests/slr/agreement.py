"""What a layer and a patched network must agree with: their originals in float64, SLR attention composed by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from networks import GroupNorm32
from torch import Tensor, nn

import zsvr_kernels as zk
from zsvr_kernels import testing

T = 3


@dataclass
class Case:
    """A self-attention module: how to build and call it, and the shape of its input for one frame."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[Any, Tensor], Tensor] = lambda module, x: module(x)
    qkv_order: str | None = None
    as_oracle: Callable[[Any], None] = lambda module: None  # what a float64 copy must be told
    settle: Callable[[Any], None] = lambda module: None  # what random weights need

    def module(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        module = randomise(self.build(), seed)
        self.settle(module)
        module = module.to(dtype)
        for part in module.modules():
            if isinstance(part, GroupNorm32) and dtype != torch.float64:
                part.float()  # as guided-diffusion's half precision leaves it
        return module

    def input(self, frames: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(frames, *self.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def layer(self, module: nn.Module, **keywords: Any) -> zk.SLRAttention:
        return zk.SLRAttention.from_attention(module, qkv_order=self.qkv_order, **keywords)

    def oracle(self, module: nn.Module) -> Any:
        double = copy.deepcopy(module).double()
        self.as_oracle(double)
        return double


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that matter: biases and norms are not 0 and 1, logits spread."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.dim() > 1:
                p.copy_(1.5 * noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


def flows(frames: int, B: int = 1, size: tuple[int, int] = (16, 24), seed: int = 3) -> tuple[Tensor, Tensor]:
    """Smooth flows of a few pixels, forth and back, that mostly agree with each other."""
    g = torch.Generator().manual_seed(seed)
    coarse = 3 * torch.randn(B * (frames - 1), 2, 2, 2, generator=g)
    flow = nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=True).unflatten(0, (B, frames - 1))
    return flow, -flow


def neutral_contexts() -> Iterator[tuple[str, zk.VideoContext | None]]:
    """Contexts under which SLR attention is the spatial self-attention it stands for."""
    yield "no context", None
    for combine in ("serial", "parallel", "joint", "cross"):
        yield f"T = 1, {combine}", zk.VideoContext(frames=1, options=zk.SLROptions(combine=combine))
    own = torch.arange(T, dtype=torch.int32)[:, None]
    yield "every frame alone", zk.VideoContext(frames=T, options=zk.SLROptions(frames=own, combine="cross"))
    yield "spatial", zk.VideoContext(*flows(T), options=zk.SLROptions(combine="spatial"))


def assert_equals_original(case: Case, dtype: torch.dtype) -> None:
    module, x = case.module(dtype), case.input(2 * T, dtype)
    with torch.no_grad():
        oracle, eager = case.call(case.oracle(module), x.double()), case.call(module, x)
        for name, context in neutral_contexts():
            testing.assert_within_budget(case.layer(module)(x, context), oracle, eager, name)


Gradients = dict[str, Tensor]


def gradients(module: nn.Module, out: Tensor) -> Gradients:
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    found = torch.autograd.grad(out, list(weights.values()), direction, allow_unused=True)
    return {name: g for name, g in zip(weights, found, strict=True) if g is not None}


def assert_gradients_agree_with(ours: Gradients, oracle: Gradients, eager: Gradients) -> None:
    """Hold the gradient of every parameter of one layer to the budget."""
    assert ours.keys() == oracle.keys() == eager.keys()
    largest = max(float(g.abs().max()) for g in oracle.values())
    for name in oracle:
        if float(oracle[name].abs().max()) > 1e-9 * largest:
            testing.assert_within_budget(ours[name], oracle[name], eager[name], name, gradient=True)
        else:  # a bias of keys: softmax does not feel it, and rounding is all there is
            eps = torch.finfo(ours[name].dtype).eps
            assert float(ours[name].abs().max()) <= 2 * (float(eager[name].abs().max()) + eps * largest), name


def assert_network_gradients_agree(ours: Gradients, oracle: Gradients, eager: Gradients) -> None:
    """Hold a network's gradients to the budget in length, all parameters at once, each relative to its own length.

    The largest error of a network is one draw of its rounding, here and in the original alike, and so is the error of a
    parameter of a few values. Single layers are held to the full budget.
    """
    assert ours.keys() == oracle.keys() == eager.keys()
    largest = max(float(g.abs().max()) for g in oracle.values())
    # A bias of keys is left out: softmax does not feel it, and rounding is all there is.
    names = [name for name in oracle if float(oracle[name].abs().max()) > 1e-9 * largest]

    def error(found: Gradients) -> float:
        parts = [
            torch.linalg.vector_norm(found[name] - oracle[name]) / torch.linalg.vector_norm(oracle[name])
            for name in names
        ]
        return float(torch.stack(parts).norm())

    eps = torch.finfo(ours[names[0]].dtype).eps
    budget = 2 * (error(eager) + eps * len(names) ** 0.5)
    assert error(ours) <= budget, f"error {error(ours):.3e}, budget {budget:.3e}, eager {error(eager):.3e}"


def assert_gradients_agree(case: Case) -> None:
    module, x = case.module(), case.input(2)
    double = case.oracle(module)
    oracle, eager = gradients(double, case.call(double, x.double())), gradients(module, case.call(module, x))
    for combine in ("serial", "joint"):
        context = zk.VideoContext(frames=1, options=zk.SLROptions(combine=combine))
        ours = gradients(module, case.layer(module)(x, context))
        assert_gradients_agree_with(ours, oracle, eager)


def assert_shares_weights(case: Case) -> None:
    module, x = case.module(), case.input(2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    layer = case.layer(module)
    ours, theirs = list(layer.parameters()), list(module.parameters())
    assert len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
    first = layer(x)
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.5)
    second = layer(x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, case.call(module, x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    torch.testing.assert_close(case.call(module, x), first, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # a copy is whole: its parts belong to each other, not to the original
        twin = copy.deepcopy(layer)
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(layer(x), first) and not torch.allclose(twin(x), first)


def compose(
    q: Tensor,  # [B, T, P, H, D], P with the prefix
    k: Tensor,
    v: Tensor,
    table: Tensor,
    trajectories: zk.Trajectories,
    options: zk.SLROptions,
    scale: float,
    prefix: int = 0,
) -> Tensor:
    """SLR attention of plain PyTorch, for clips whose tables have no empty row."""
    x, lse = testing.eager_cross_frame_attention(q, k, v, table, scale)
    if options.combine == "cross":
        return x
    inside = slice(prefix, None)
    values = x if options.combine == "serial" else v
    parts = (y[:, :, inside] for y in (q, k, values))
    sampled, lse_sampled = testing.eager_trajectory_attention(*parts, trajectories, scale)
    live = trajectories.valid & (trajectories.frames >= 0)[None, :, :, None]
    alone = (live.sum(2) == 1).repeat(q.shape[0] // live.shape[0], 1, 1)[..., None, None]
    near, lse_near = x[:, :, inside], lse[:, :, inside]
    if options.combine == "serial":
        y = sampled
    elif options.combine == "parallel":
        y = torch.where(alone, near, options.blend * near + (1 - options.blend) * sampled)
    else:
        share = torch.sigmoid(lse_near - lse_sampled)[..., None]
        y = torch.where(alone, near, share * near + (1 - share) * sampled)
    return torch.cat((x[:, :, :prefix], y), 2)


# ---- patched networks ----


@dataclass
class Network:
    """A network with self-attention: how to build and call it, what is in it, and the shape of one frame."""

    build: Callable[[], nn.Module]
    layers: list[str]
    shape: tuple[int, ...] = (3, 16, 24)
    call: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x)
    options: dict[str, Any] | None = None  # of SLROptions
    first_grid: tuple[int, int] = (8, 12)

    def model(self) -> Any:
        return randomise(self.build())

    def input(self, frames: int) -> Tensor:
        return torch.randn(frames, *self.shape, generator=torch.Generator().manual_seed(1))

    def context(self, frames: int, B: int = 1, **options: Any) -> zk.VideoContext:
        chosen = zk.SLROptions(**{**(self.options or {}), **options})
        if frames == 1:
            return zk.VideoContext(frames=1, options=chosen)
        return zk.VideoContext(*flows(frames, B, self.shape[1:]), options=chosen)


def rest(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What every module holds on its instance; hooks are copied, so that later ones show."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def assert_at_rest(model: nn.Module, before: dict[str, dict[str, Any]], ignored: tuple[str, ...] = ()) -> None:
    after = rest(model)
    assert after.keys() == before.keys()
    for name, held in before.items():
        assert after[name].keys() == held.keys(), name
        for key, value in held.items():
            if key in ignored:
                continue
            now = after[name][key]
            same = now == value if isinstance(value, dict) and key.startswith("_") and "hook" in key else None
            if same is None and isinstance(value, dict):
                same = now.keys() == value.keys() and all(now[k] is value[k] for k in value)
            if same is None:
                same = now is value or (isinstance(value, (int, float, str, tuple)) and now == value)
            assert same, f"{name}.{key}"


@contextlib.contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, Any]]:
    """Record arguments and output of the named modules' calls."""
    calls: dict[str, Any] = {}
    handles = []
    for name in names:

        def note(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            calls[name] = (args, kwargs, out)

        handles.append(model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def assert_one_frame_changes_nothing(network: Network, *combines: str) -> None:
    model, x = network.model(), network.input(2)
    with torch.no_grad():
        eager = network.call(model, x)
        oracle = network.call(copy.deepcopy(model).double(), x.double())
        for combine in combines or ("serial", "joint"):
            with zk.patched(model, network.context(1, combine=combine), expected_count=len(network.layers)):
                got = network.call(model, x)
            testing.assert_within_budget(got, oracle, eager, combine)
            assert float((got - eager).norm() / eager.norm()) <= 1e-5, combine


def assert_layers_are_slr(network: Network, context: zk.VideoContext, x: Tensor) -> zk.PatchReport:
    """Every layer of the patched network gives what its own SLRAttention gives, which is not what it gave before."""
    model = network.model()
    before, state = rest(model), {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        unpatched = network.call(model, x)
        # Hooks would disable torch's fused layers by themselves: the plain run comes first.
        with zk.patched(model, context, expected_count=len(network.layers)) as report:
            assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == state
            plain = network.call(model, x)
            with recorded(model, network.layers) as calls:
                out = network.call(model, x)
        assert torch.equal(plain, out) and not torch.allclose(out, unpatched, rtol=1e-3, atol=1e-3)
        assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == state
        assert_at_rest(model, before)
        assert sorted(calls) == sorted(network.layers) == sorted(layer.name for layer in report.patched)
        for name, (args, kwargs, got) in calls.items():
            module = model.get_submodule(name)
            original = module(*args, **kwargs)
            tokens = args[0]
            if isinstance(module, nn.MultiheadAttention):
                assert got[1] is None
                got, original = got[0], original[0]
                if not module.batch_first:
                    tokens, got, original = (y.transpose(0, 1) for y in (tokens, got, original))
            layer = zk.SLRAttention.from_attention(module, prefix=context.options.prefix)
            assert torch.equal(layer(tokens, context), got), name
            assert not torch.allclose(original, got, rtol=1e-3, atol=1e-3), name
    return report
