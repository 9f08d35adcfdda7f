"""Networks that diffusers or transformers saved in a folder: loaded whole, from local files, or not at all."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import torch

from zsvr import weights

STEMS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model", "pytorch_model")}


def variants(folder: pathlib.Path, library: str) -> dict[str | None, list[pathlib.Path]]:
    """Return the files of weights in a folder by variant (None: the plain one), sharded or not."""
    pattern = re.compile(
        rf"(?:{'|'.join(STEMS[library])})(?:\.([^.]+?))?(?:-\d+-of-\d+)?(?:\.([^.]+))?\.(?:safetensors|bin)"
    )
    found: dict[str | None, list[pathlib.Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            found.setdefault(match[1] or match[2], []).append(path)
    return found


@contextlib.contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep a library from logging what is raised here, or is left out on purpose."""
    logging = importlib.import_module(f"{library}.utils.logging")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load(
    kind: Any,
    folder: pathlib.Path,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    is_variant_needed: bool = True,
    has_other_parts: bool = False,
    **options: Any,
) -> Any:
    """Load a network, in evaluation mode and without gradients of weights; safetensors first, nothing is executed.

    Args:
        kind: class of diffusers or transformers.
        folder: where it saved ``config.json`` and weights.
        dtype: of the weights.
        variant: of the files of weights, as in ``diffusion_pytorch_model.fp16.safetensors``.
        is_variant_needed: if not, the plain files do where there are none of the variant.
        has_other_parts: the files may hold weights that ``kind`` does not have.
        options: more of ``from_pretrained``.

    Raises:
        FileNotFoundError: no weights, or none of the variant.
        ValueError: they are damaged, of other shapes, some are missing, or they belong to another network.
    """
    library = kind.__module__.partition(".")[0]
    found = variants(folder, library)
    if not found:
        names = " or ".join(f"{stem}.*" for stem in STEMS[library])
        raise FileNotFoundError(f"{folder} has no weights ({names}, .safetensors or .bin)")
    if variant not in found and not is_variant_needed and None in found:
        variant = None
    if variant not in found:
        named = sorted(name for name in found if name is not None)
        if variant is None:
            advice = f"of the variants {named} only: name one, variant={named[0]!r}"
        else:
            advice = f"of {' and '.join([*(['no variant'] if None in found else []), *named])}, none of {variant!r}"
        raise FileNotFoundError(f"{folder} has weights {advice}")
    files = found[variant]
    has_safe = any(path.suffix == ".safetensors" for path in files)
    key = "torch_dtype" if library == "diffusers" else "dtype"
    options |= {key: dtype, "variant": variant, "use_safetensors": has_safe, "local_files_only": True}
    try:
        with _quiet(library):
            model, report = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # each library has its own for damaged files
        used = [path for path in files if (path.suffix == ".safetensors") == has_safe]
        raise ValueError(f"{folder}: the weights of the {kind.__name__} cannot be read: {_why(used, error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks weights of the {kind.__name__}: {_some(missing)}")
    if not has_other_parts and (others := sorted(report["unexpected_keys"])):
        raise ValueError(
            f"{folder} has weights that the {kind.__name__} of its config.json does not have: {_some(others)}"
        )
    return model.eval().requires_grad_(False)


def _some(names: list[str]) -> str:
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _why(files: list[pathlib.Path], error: Exception) -> str:
    """Return the reason of the first file that is no file of weights at all, else the error's."""
    for path in files:
        try:
            if path.suffix == ".safetensors":
                import safetensors

                with safetensors.safe_open(str(path), framework="pt"):
                    pass
            else:
                weights.load(path, mmap=False)
        except ValueError as damaged:
            return str(damaged)
        except Exception as damaged:
            return f"{path.name}: {weights.reason(path, damaged)}"
    return " ".join(str(error).split("If you want to")[0].split())
