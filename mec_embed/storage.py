"""Save and load: one safetensors file, with a versioned manifest in its metadata.

The file holds every tensor of the model's ``state_dict`` once (shared tensors under their first
key). The metadata entry ``mec_embed`` is a JSON manifest: format version, the compressed modules
with layout and options, and the keys that share a tensor.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .layout import CodeLayout, dtype_from_name, dtype_name
from .modules import CodebookSet, CodeTable, CompressedEmbedding, CompressedEmbeddingBag
from .swap import Optimizers, Replacement, all_optimizers, replace_modules
from .tables import EMBEDDINGS, check_model, find_modules

FORMAT_VERSION = 1
_KEY = "mec_embed"
_EXTRA = "_extra_state"
_KINDS = (CompressedEmbedding, CompressedEmbeddingBag)

Model = TypeVar("Model", bound=nn.Module)


class FormatError(ValueError):
    """A file that is not what :func:`mec_embed.save` writes, or does not fit the model."""


def save(model: nn.Module, path: str | Path) -> None:
    """Write a compressed model to one safetensors file, atomically.

    The file appears whole or not at all: an error or a kill leaves a file of the same name as it
    was.

    Args:
        model: a model with compressed tables; all of its ``state_dict`` is written.
        path: of the file.

    Raises:
        ValueError: the model holds no compressed table, or extra state that JSON cannot hold.
        OSError: the file cannot be written (no space, no permission).

    Example:
        >>> save(model, "model.safetensors")  # doctest: +SKIP
    """
    check_model(model)
    tensors, extra, shared = _unique_tensors(model)
    manifest = {
        "version": FORMAT_VERSION,
        "tables": _describe_tables(model),
        "shared": shared,
        "extra": extra,
    }
    with _replacing(Path(path)) as temporary:
        save_file(tensors, temporary, {_KEY: json.dumps(manifest), "format": "pt"})


def load(model: Model, path: str | Path, *, optimizer: Optimizers = None) -> Model:
    """Fill a fresh, uncompressed model of the same architecture from a file, in place.

    Everything is read and checked before the model is touched.

    Args:
        model: built as the saved model was before compression (its weights do not matter), on any
            device; a model that is already compressed in the same way is fine too.
        path: a file that :func:`save` wrote.
        optimizer: over the model's parameters, as in :func:`mec_embed.compress`.

    Returns:
        ``model``, compressed.

    Raises:
        FormatError: not such a file, truncated or damaged, of a newer format version, or of
            another architecture; what differs is named.
        FileNotFoundError: no file.

    Example:
        >>> model = load(build_model(), "model.safetensors")  # doctest: +SKIP
    """
    check_model(model)
    all_optimizers(model, optimizer)
    manifest, tensors = _read(Path(path))
    with _format_errors(path):
        replacements = _build_modules(model, manifest, path)
    _check_fit(model, replacements, tensors, manifest, path)
    _fill(replacements, tensors)
    with _values_kept(model, replacements):
        state = tensors | manifest["extra"]
        replace_modules(model, replacements, optimizer, lambda: model.load_state_dict(state))
    return model


@contextmanager
def _values_kept(model: nn.Module, replacements: list[Replacement]) -> Iterator[None]:
    """Put values back if the model refuses its state (``set_extra_state`` can)."""
    tables = {id(tensor) for _, old, _ in replacements for tensor in [*old.parameters()]}
    values = [*model.parameters(), *model.buffers()]
    before = [(t, t.detach().clone()) for t in values if id(t) not in tables]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a file; FormatError where there is none that this version can read."""
    try:
        with safe_open(path, framework="pt") as file:
            return _parse(file.metadata(), path)
    except SafetensorError as error:
        raise FormatError(
            f"{path} is damaged or no safetensors file ({error}); save the model again"
        ) from error


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors by their first key, extra state, and key -> first key for those that are shared."""
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            extra[key] = _json_able(key, value)
            continue
        identity = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and identity in seen:
            shared[key] = seen[identity]
        else:
            seen[identity] = key
            tensors[key] = value.contiguous()
    # Tensors that overlap without being the same are refused by safetensors: give each its own.
    storages: set[int] = set()
    for key, value in tensors.items():
        if value.untyped_storage().data_ptr() in storages:
            tensors[key] = value.clone()
        storages.add(value.untyped_storage().data_ptr())
    return tensors, extra, shared


def _json_able(key: str, value: Any) -> Any:
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"state_dict entry {key!r} is a {type(value).__name__}, which the file cannot hold; extra "
        "state must be tensors or plain JSON values"
    )


def _describe_tables(model: nn.Module) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = []
    codes: dict[int, int] = {}
    books: dict[int, int] = {}
    for module, aliases in find_modules(model, _KINDS):
        number = len(tables)
        entry = {
            "names": [alias.name for alias in aliases],
            "module": type(module).__name__,
            "layout": module.layout.to_dict(),
            "codebook_dtype": dtype_name(module.codebooks.dtype),
            "dtype": dtype_name(module.output_dtype.dtype),
            "padding_idx": module.padding_idx,
            "zero_padding": module.zero_padding,
            "sparse": module.sparse,
            "trainable": module.trainable,
            "requires_grad": module.codebooks.requires_grad,
            "codes_of": codes.setdefault(id(module.code_table), number),
            "codebooks_of": books.setdefault(id(module.codebook_set), number),
        }
        if isinstance(module, CompressedEmbeddingBag):
            entry |= {"mode": module.mode, "include_last_offset": module.include_last_offset}
        tables.append(entry)
    if not tables:
        raise ValueError(
            "the model holds no compressed table; call compress() first, or save it with torch or "
            "safetensors as any model"
        )
    return tables


@contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A temporary file beside ``path`` that takes its place when all went well."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        try:
            yield temporary
        except SafetensorError as error:
            raise OSError(errno.EIO, f"writing failed: {error}", str(path)) from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    manifest = read_manifest(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged ({error}); save the model again") from error
    for key, first in manifest["shared"].items():
        if first not in tensors:
            raise FormatError(f"{path}: {key!r} shares {first!r}, which the file does not hold")
        tensors[key] = tensors[first]
    return manifest, tensors


def _parse(metadata: dict[str, str] | None, path: str | Path) -> dict[str, Any]:
    if not metadata or _KEY not in metadata:
        raise FormatError(
            f"{path} is a safetensors file without a mec_embed manifest; load it with safetensors, "
            "or make one with mec_embed.save()"
        )
    try:
        manifest = json.loads(metadata[_KEY])
        version = manifest["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: the mec_embed manifest is damaged ({error!r})") from error
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: format version must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}; this mec_embed reads up to {FORMAT_VERSION}: "
            "upgrade it"
        )
    for name, kind in (("tables", list), ("shared", dict), ("extra", dict)):
        if not isinstance(manifest.get(name), kind):
            raise FormatError(f"{path}: the mec_embed manifest has no valid {name!r}")
    if not all(isinstance(first, str) for first in manifest["shared"].values()):
        raise FormatError(f"{path}: the mec_embed manifest has no valid 'shared'")
    return manifest


@contextmanager
def _format_errors(path: str | Path) -> Iterator[None]:
    """What a damaged manifest makes fail is said to be its fault."""
    try:
        yield
    except FormatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FormatError(f"{path}: the mec_embed manifest is damaged ({error!r})") from error


def _build_modules(
    model: nn.Module, manifest: dict[str, Any], path: str | Path
) -> list[Replacement]:
    """(aliases, old module, new module) for every table of the file; codes and codebooks empty."""
    places = {
        alias.name: (module, aliases)
        for module, aliases in find_modules(model, (*EMBEDDINGS, *_KINDS))
        for alias in aliases
    }
    replacements: list[Replacement] = []
    built: list[Any] = []
    for entry in manifest["tables"]:
        names = _check_entry(entry)["names"]
        if names[0] not in places:
            raise FormatError(
                f"{path} holds a table {names[0]!r}, which the model does not have; it has "
                f"{', '.join(sorted(places)) or 'no embedding'}"
            )
        old, aliases = places[names[0]]
        if any(old is earlier for _, earlier, _ in replacements):
            raise FormatError(f"{path} holds the table {names[0]!r} twice")
        if sorted(alias.name for alias in aliases) != sorted(names):
            raise FormatError(
                f"{path}: table {names[0]!r} has the names {names}, in the model it has "
                f"{[alias.name for alias in aliases]}; share the same modules as when saving"
            )
        new = _build_module(entry, built)
        _check_table(old, new, names[0], path)
        built.append(new)
        replacements.append((aliases, old, new))
    return replacements


_ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "names": (list,),
    "module": (str,),
    "layout": (dict,),
    "padding_idx": (int, type(None)),
    "zero_padding": (bool,),
    "sparse": (bool,),
    "trainable": (bool,),
    "requires_grad": (bool,),
    "codes_of": (int,),
    "codebooks_of": (int,),
}


def _check_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a table; ValueError or KeyError for values of the wrong type."""
    types = dict(_ENTRY_TYPES)
    if entry["module"] == CompressedEmbeddingBag.__name__:
        types["include_last_offset"] = (bool,)
        if entry["mode"] not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be 'sum', 'mean' or 'max', got {entry['mode']!r}")
    for name, allowed in types.items():
        if type(entry[name]) not in allowed:
            raise ValueError(f"{name} has the type {type(entry[name]).__name__}")
    if not dtype_from_name(entry["dtype"]).is_floating_point:
        raise ValueError(f"dtype must be floating, got {entry['dtype']!r}")
    return entry


def _build_module(entry: dict[str, Any], built: list[Any]) -> nn.Module:
    layout = CodeLayout.from_dict(entry["layout"] | {"codebook_dtype": entry["codebook_dtype"]})
    number = len(built)
    codes_of, books_of = entry["codes_of"], entry["codebooks_of"]
    if not (0 <= codes_of <= number and 0 <= books_of <= number):
        raise ValueError(f"tables can share with earlier ones only, got {codes_of}, {books_of}")
    # On the meta device a size that a damaged manifest claims costs nothing.
    with torch.device("meta"):
        own_codes, own_books = CodeTable(layout), CodebookSet(layout, entry["requires_grad"])
    options: dict[str, Any] = {
        "padding_idx": entry["padding_idx"],
        "zero_padding": entry["zero_padding"],
        "sparse": entry["sparse"],
        "dtype": dtype_from_name(entry["dtype"]),
        "requires_grad": entry["trainable"],
        "name": entry["names"][0],
        "code_table": own_codes if codes_of == number else built[codes_of].code_table,
        "codebook_set": own_books if books_of == number else built[books_of].codebook_set,
    }
    kinds = {kind.__name__: kind for kind in _KINDS}
    if entry["module"] == CompressedEmbeddingBag.__name__:
        options |= {name: entry[name] for name in ("mode", "include_last_offset")}
    return kinds[entry["module"]](layout, **options)


def _check_table(old: nn.Module, new: Any, name: str, path: str | Path) -> None:
    """FormatError unless the table in the model is what the file replaces."""
    bag = isinstance(old, (nn.EmbeddingBag, CompressedEmbeddingBag))
    if bag is not isinstance(new, CompressedEmbeddingBag):
        raise FormatError(
            f"{path}: table {name!r} was saved as {type(new).__name__}, the model has a "
            f"{type(old).__name__}"
        )
    for attribute in ("num_embeddings", "embedding_dim", "padding_idx"):
        saved, found = getattr(new, attribute), getattr(old, attribute)
        if saved != found:
            raise FormatError(
                f"{path}: table {name!r} has {attribute}={saved}, in the model it is {found}; "
                "build the model as it was when saved"
            )


def _check_fit(
    model: nn.Module,
    replacements: list[Replacement],
    tensors: dict[str, Tensor],
    manifest: dict[str, Any],
    path: str | Path,
) -> None:
    """FormatError unless the file holds exactly the tensors of the model to be."""
    expected = {
        key: value
        for key, value in model.state_dict().items()
        if not any(
            key.startswith(f"{alias.name}.") for aliases, _, _ in replacements for alias in aliases
        )
    }
    for aliases, _, new in replacements:
        for alias in aliases:
            expected |= {f"{alias.name}.{key}": v for key, v in new.state_dict().items()}
    found = tensors.keys() | manifest["extra"].keys()
    twice = sorted(tensors.keys() & manifest["extra"].keys())
    if twice:
        raise FormatError(f"{path} holds {twice[:5]} as tensor and as extra state")
    missing, unknown = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or unknown:
        raise FormatError(
            f"{path} does not fit the model: the file lacks {missing[:5] or 'nothing'}, the model "
            f"lacks {unknown[:5] or 'nothing'}; build the model as it was when saved"
        )
    for key, value in expected.items():
        if not isinstance(value, Tensor):
            continue
        if key not in tensors:
            raise FormatError(f"{path}: {key!r} is extra state, the model needs a tensor")
        saved = tensors[key]
        if saved.shape != value.shape or saved.dtype != value.dtype:
            raise FormatError(
                f"{path}: {key!r} is {tuple(saved.shape)} {saved.dtype}, the model needs "
                f"{tuple(value.shape)} {value.dtype}; build the model as it was when saved"
            )


def _fill(replacements: list[Replacement], tensors: dict[str, Tensor]) -> None:
    """Give the new modules the tensors of the file, on the device of the module they replace."""
    for aliases, old, new in replacements:
        device = next(iter([*old.parameters(), *old.buffers()])).device
        for key, value in new.state_dict(keep_vars=True).items():
            if value.is_meta:
                loaded = tensors[f"{aliases[0].name}.{key}"].to(device)
                owner = new.get_submodule(key.rpartition(".")[0])
                _put(owner, key.rpartition(".")[2], loaded, value)
        new.output_dtype = new.output_dtype.to(device)


def _put(owner: nn.Module, name: str, loaded: Tensor, meta: Tensor) -> None:
    if isinstance(meta, nn.Parameter):
        owner.register_parameter(name, nn.Parameter(loaded, meta.requires_grad))
    else:
        owner.register_buffer(name, loaded)
