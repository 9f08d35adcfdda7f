"""What an adapter is: the parts of somebody's attention layer around the attention itself."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Adapter(abc.ABC):
    """One attention module of a known structure, taken apart into what happens before and after the attention.

    An adapter holds no weights: it calls the module's own submodules, so that offloading hooks, quantised layers and
    fine-tuned weights keep working.

    Attributes:
        kind: name of the structure, for reports.
        module: the attention module.
        channels, heads, head_dim: C of the tokens, H and D.
        scale: factor on the logits, or None for ``D ** -0.5``.
    """

    kind: str
    module: nn.Module
    channels: int
    heads: int
    head_dim: int
    scale: float | None = None

    @classmethod
    @abc.abstractmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Return whether the module has this adapter's structure, whatever its library's version."""

    @classmethod
    def refusal(cls, module: nn.Module, name: str = "") -> str | None:
        """Return why a recognised module cannot be replaced (cross-attention, for instance), or None."""
        return None

    @abc.abstractmethod
    def begin(self, x: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        """Return the normalised tokens ``[N, P, C]`` that enter the projections, and what `finish` needs.

        ``x`` is ``[N, C, Hg, Wg]`` or ``[N, P, C]``; ``inputs`` are the further arguments of the module's forward.
        """

    @abc.abstractmethod
    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each ``[N, P, H, D]`` with D dense, from tokens ``[N, P, C]``."""

    @abc.abstractmethod
    def finish(self, y: Tensor, state: Any) -> Tensor:
        """Return the layer's output in x's layout from attention's ``y [N, P, H, D]``."""

    # ---- in place: what patching needs ----

    forward_name = "forward"  # the method that patching replaces on the instance

    def read_call(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]] | None:
        """Return x and `begin`'s inputs from the arguments of the module's own forward.

        None: this call is none of ours (cross-attention, for instance), the original must run.

        Raises:
            ValueError: self-attention with something SLR attention has no place for, such as a mask.
        """
        return _only(*args, **kwargs), {}

    def wrap(self, out: Tensor) -> Any:
        """Return what the module's own forward returns."""
        return out

    def install(self, run: Run) -> Callable[[], None]:
        """Make the module call ``run(original, *args, **kwargs)`` instead of its forward; return what undoes it.

        The forward is replaced on the instance, below the hook of accelerate where there is one.
        """
        module, name = self.module, self._slot()
        original = getattr(module, name)
        was_own = name in module.__dict__

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(original, *args, **kwargs)

        def undo() -> None:
            if module.__dict__.get(name) is forward:
                if was_own:
                    module.__dict__[name] = original
                else:
                    del module.__dict__[name]

        module.__dict__[name] = forward
        self._installed = forward
        return undo

    def is_installed(self) -> bool:
        """Return whether the module still calls what `install` put in its place."""
        return self.module.__dict__.get(self._slot()) is self._installed

    def _slot(self) -> str:
        return "_old_forward" if "_old_forward" in self.module.__dict__ else self.forward_name

    _installed: object = None


Run = Callable[..., Any]  # run(original, *args, **kwargs)


def _only(x: Tensor) -> Tensor:
    return x


def is_linear(x: object) -> bool:
    """Return whether a submodule maps channels as `torch.nn.Linear` does, by its features (LoRA layers do, too)."""
    return isinstance(x, nn.Module) and hasattr(x, "in_features") and hasattr(x, "out_features")


def to_tokens(x: Tensor) -> Tensor:
    """Return ``[N, P, C]`` of ``[N, C, ...]``, a view."""
    return x.flatten(2).mT
