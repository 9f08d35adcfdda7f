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

    @property
    def out_channels(self) -> int:
        """Return the channels of the layer's output."""
        return self.channels

    def original(self) -> Callable[..., Any]:
        """Return what `install` is about to replace, as something to call with the arguments of the forward."""
        return getattr(self.module, self._slot())

    def call_original(self, original: Callable[..., Any], x: Tensor) -> Tensor:
        """Return what the module gave without the patch, in `begin`'s layout."""
        return original(x)

    def install(self, run: Run) -> Callable[[], None]:
        """Make the module call ``run(original, *args, **kwargs)`` instead of its forward; return what undoes it.

        The forward is replaced on the instance, below the hook of accelerate where there is one.
        """
        own, name = self.module.__dict__, self._slot()
        original = self.original()
        was_own = name in own

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(original, *args, **kwargs)

        def undo() -> None:
            for slot in self._slots():  # a hook that came or went since has moved it from one to the other
                if own.get(slot) is forward:
                    if was_own or slot != self.forward_name:
                        own[slot] = original
                    else:
                        del own[slot]

        own[name] = self._installed = forward
        return undo

    def is_installed(self) -> bool:
        """Return whether the module still calls what `install` put in its place."""
        own = self.module.__dict__
        return any(own.get(slot) is self._installed for slot in self._slots())

    def _slot(self) -> str:
        return next(n for n in self._slots() if n in self.module.__dict__ or n == self.forward_name)

    def _slots(self) -> tuple[str, ...]:
        """Return where the forward may be, the innermost first: accelerate's hooks move it to ``_old_forward``."""
        return ("_old_forward", "forward") if self.forward_name == "forward" else (self.forward_name,)

    _installed: object = None


Run = Callable[..., Any]  # run(original, *args, **kwargs)


def _only(x: Tensor) -> Tensor:
    return x


def check_no_more(kind: str, *arguments: object) -> None:
    """Raise ValueError if a module's forward got further arguments that say anything."""
    if any(x is not None and x is not False and not (isinstance(x, int) and x == 0) for x in arguments):
        raise ValueError(
            f"SLR attention in place of a {kind} takes the input alone: leave out masks, position embeddings and other "
            "arguments, or leave this layer unpatched"
        )


def unknown_parts(module: nn.Module, *known: str) -> str | None:
    """Return a refusal that names the module's parameters and weighted submodules beside the known ones, or None."""
    parts = [name for name, x in module._parameters.items() if x is not None]
    parts += [name for name, x in module.named_children() if next(x.parameters(), None) is not None]
    unknown = [name for name in parts if name not in known]
    return f"it has parts that such a layer does not have: {', '.join(unknown)}" if unknown else None


def is_linear(x: object) -> bool:
    """Return whether a submodule maps channels as `torch.nn.Linear` does, by its features (LoRA layers do, too)."""
    return isinstance(x, nn.Module) and hasattr(x, "in_features") and hasattr(x, "out_features")


def to_tokens(x: Tensor) -> Tensor:
    """Return ``[N, P, C]`` of ``[N, C, ...]``, a view."""
    return x.flatten(2).mT
