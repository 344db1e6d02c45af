"""Save and load: one safetensors file, with a versioned manifest in its metadata.

The file holds every tensor of the model's ``state_dict`` once (shared tensors under their first
key). The metadata entry ``mec_embed`` is a JSON manifest: format version, the compressed modules
with layout and options, and the keys that share a tensor.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import CompressionConfig
from .layout import CodeLayout, dtype_from_name, dtype_name
from .modules import (
    CodebookSet,
    CodeTable,
    CompressedEmbedding,
    CompressedEmbeddingBag,
    DecodedBags,
    DecodedTable,
)
from .shards import is_dtensor
from .swap import Optimizers, Replacement, all_optimizers, check_held, replace_modules
from .tables import (
    Alias,
    check_model,
    find_lookups,
    find_replacements,
    plain_model,
    reasons_to_stay,
)
from .tiers import MOST_RUNS, TieredEmbedding, TieredEmbeddingBag, TierMap

#: Version 2 has tables in tiers; a file without them is written as version 1.
FORMAT_VERSION = 2
#: Entry of the metadata that holds the manifest.
KEY = "mec_embed"
#: Entry of the metadata that says, as JSON, how the command line made the file of a checkpoint.
ORIGIN = "mec_embed_origin"
_CODED = (CompressedEmbedding, CompressedEmbeddingBag)
_TIERED = (TieredEmbedding, TieredEmbeddingBag)
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (*_CODED, *_TIERED)}

Model = TypeVar("Model", bound=nn.Module)


class FormatError(ValueError):
    """A file that is not what :func:`mec_embed.save` writes, or does not fit the model."""


def save(model: nn.Module, path: str | Path) -> None:
    """Write a compressed model to one safetensors file, atomically.

    The file appears whole or not at all: an error or a kill leaves a file of the same name as it
    was.

    Args:
        model: a model with compressed tables; all of its ``state_dict`` is written, of what
            ``torch.compile`` wrapped that of the module inside.
        path: of the file.

    Raises:
        ValueError: the model holds no compressed table, extra state that JSON cannot hold, or a
            sparse tensor; a name that load() could not open.
        OSError: the file cannot be written (no space, no permission).

    Example:
        >>> save(model, "model.safetensors")  # doctest: +SKIP
    """
    check_model(model)
    tensors, manifest = contents(plain_model(model))
    with _replacing(Path(path)) as temporary:
        save_file(tensors, temporary, {KEY: json.dumps(manifest), "format": "pt"})


def contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the file of a compressed model, by their first key, and its manifest."""
    tensors, extra, shared = _unique_tensors(model)
    tables = _describe_tables(model)
    manifest = {
        "version": FORMAT_VERSION if any("tiers" in table for table in tables) else 1,
        "tables": tables,
        "shared": shared,
        "extra": extra,
    }
    return tensors, manifest


@torch.inference_mode(False)
def load(model: Model, path: str | Path, *, optimizer: Optimizers = None) -> Model:
    """Fill a fresh, uncompressed model of the same architecture from a file, in place.

    Everything is read and checked before the model is touched.

    Args:
        model: built as the saved model was before compression (its weights do not matter), on any
            device; a model that is already compressed in the same way is fine too. Tables that the
            file replaces may be on the meta device, where they take no memory: they come to the
            device of the rest.
        path: a file that :func:`save` wrote.
        optimizer: over the model's parameters, as in :func:`mec_embed.compress`.

    Returns:
        ``model``, compressed.

    Raises:
        FormatError: not such a file, truncated or damaged, of a newer format version, or of
            another architecture; what differs is named. A table of the model that
            :func:`mec_embed.compress` would leave as it is, with the reason.
        FileNotFoundError: no file.
        ValueError: other tensors on the meta device; an optimizer of another model.

    Example:
        >>> model = load(build_model(), "model.safetensors")  # doctest: +SKIP
    """
    check_model(model)
    check_held(model, optimizer)
    all_optimizers(model, optimizer)
    manifest, tensors, of_checkpoint = _read(Path(path))
    # Files that were made of a compiled model's state_dict have its names.
    compiled = any(key.startswith("_orig_mod.") for key in tensors)
    inner = model if compiled else plain_model(model)
    with _format_errors(path):
        replacements = _build_modules(inner, manifest, path)
    if of_checkpoint:
        _train_as_before(replacements)
    _check_fit(inner, replacements, tensors, manifest, path)
    _check_values(inner, replacements)
    _fill(replacements, tensors, _device_of(inner))
    _check_maps(replacements, path)
    # Inference tensors can be written to in that mode only, all others in it as well.
    written = [*inner.parameters(), *inner.buffers()]
    mode = torch.inference_mode(any(tensor.is_inference() for tensor in written))
    with mode, _values_kept(inner, replacements):
        state = tensors | manifest["extra"]
        replace_modules(inner, replacements, optimizer, lambda: inner.load_state_dict(state))
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


def _train_as_before(replacements: Iterable[tuple[Any, Any, Any]]) -> None:
    """Tables train, and give sparse gradients, as those of the model did.

    A frozen table does not share its codebooks with one that trains.
    """
    frozen: dict[CodebookSet, list[Any]] = {}
    trained: set[CodebookSet] = set()
    for _, old, new in replacements:
        trains = old.trains if isinstance(old, DecodedTable) else old.weight.requires_grad
        for part in new._tables():
            part.sparse, part.trainable = old.sparse, trains
            if trains:
                trained.add(part.codebook_set)
            else:
                frozen.setdefault(part.codebook_set, []).append(part)
    for codebook_set, parts in frozen.items():
        own = codebook_set
        if codebook_set in trained:
            with torch.device("meta"):
                own = CodebookSet(parts[0].layout, False)
        for part in parts:
            part.codebook_set = own
        if own.codebooks.is_floating_point():
            own.codebooks.requires_grad_(False)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a file; FormatError where there is none that this version can read."""
    return _read_metadata(path)[0]


def _read_metadata(path: str | Path) -> tuple[dict[str, Any], bool]:
    """The manifest, and whether the file was made of a checkpoint, by the command line."""
    if not Path(path).exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if Path(path).is_dir():
        raise FormatError(f"{path} is a folder, expected a file that mec_embed.save() wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            return _parse(metadata, path), ORIGIN in metadata
    except SafetensorError as error:
        raise FormatError(
            f"{path} is damaged or no safetensors file ({error}); save the model again"
        ) from error


def build_tables(
    manifest: dict[str, Any], tensors: dict[str, Tensor], path: str | Path
) -> list[DecodedTable]:
    """The compressed tables of a file, in the order of its manifest, without a model around them.

    Args:
        manifest: from :func:`read_manifest`.
        tensors: of the tables, under every key.
        path: of the file, for errors.

    Raises:
        FormatError: a damaged manifest, tensors that do not fit it, or a damaged map of tiers.
    """
    builder = _Builder()
    with _format_errors(path):
        tables = [builder.table(_check_entry(entry)) for entry in manifest["tables"]]
    replacements: list[Replacement] = [
        (tuple(Alias(nn.Module(), "", name) for name in entry["names"]), nn.Embedding(1, 1), table)
        for entry, table in zip(manifest["tables"], tables, strict=True)
    ]
    _check_fit(nn.Module(), replacements, tensors, {"extra": {}}, path)
    _fill(replacements, tensors, torch.device("cpu"))
    _check_maps(replacements, path)
    return tables


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors by their first key, extra state, and key -> first key for those that are shared."""
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            extra[key] = json_able(key, value)
            continue
        if is_dtensor(value):
            raise ValueError(
                f"{key!r} is a DTensor, of which this process holds a part, expected a whole "
                "tensor; load the full_tensor() of each into a plain model, and save that"
            )
        if value.layout is not torch.strided:
            raise ValueError(
                f"{key!r} is a tensor of the layout {value.layout}, which the file cannot hold, "
                "expected dense ones; register it with persistent=False, or save with torch.save()"
            )
        # What is conjugated or negated when it is read is another tensor than what it is a view of.
        value = value.resolve_conj().resolve_neg()
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


def json_able(key: str, value: Any) -> Any:
    """Extra state, if JSON gives it back as it is; else ValueError."""
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
    numbers = _Numbers()
    tables = [
        _describe_table(module, [alias.name for alias in aliases], numbers)
        for module, aliases in find_replacements(model)
    ]
    if not tables:
        raise ValueError(
            "the model holds no compressed table; call compress() first, or save it with torch or "
            "safetensors as any model"
        )
    return tables


class _Numbers:
    """Counts coded tables (tiers are such) and maps; each tensor belongs to the first user."""

    def __init__(self) -> None:
        self.coded = self.maps = 0
        self.codes: dict[int, int] = {}
        self.books: dict[int, int] = {}
        self.map_of: dict[int, int] = {}


def _describe_table(module: Any, names: list[str], numbers: _Numbers) -> dict[str, Any]:
    entry = {
        "names": names,
        "module": type(module).__name__,
        "padding_idx": module.padding_idx,
        "zero_padding": module.zero_padding,
    }
    if module.oov_row is not None:
        entry["oov_row"] = module.oov_row
    if isinstance(module, DecodedBags):
        entry |= {"mode": module.mode, "include_last_offset": module.include_last_offset}
    if not isinstance(module, _TIERED):
        return entry | _describe_codes(module, numbers)
    number, numbers.maps = numbers.maps, numbers.maps + 1
    return entry | {
        "rows": module.tier_map.rows,
        "runs": module.tier_map.runs,
        "map_of": numbers.map_of.setdefault(id(module.tier_map), number),
        "tiers": [_describe_codes(tier, numbers) for tier in module.tiers],
    }


def _describe_codes(module: Any, numbers: _Numbers) -> dict[str, Any]:
    number, numbers.coded = numbers.coded, numbers.coded + 1
    return {
        "layout": module.layout.to_dict(),
        "codebook_dtype": dtype_name(module.codebooks.dtype),
        "dtype": dtype_name(module.output_dtype.dtype),
        "sparse": module.sparse,
        "trainable": module.trainable,
        "requires_grad": module.codebooks.requires_grad,
        "codes_of": numbers.codes.setdefault(id(module.code_table), number),
        "codebooks_of": numbers.books.setdefault(id(module.codebook_set), number),
    }


def check_name(path: Path) -> None:
    """ValueError for the name of a file that could be written, but not be opened again."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{str(path)!a} is not UTF-8, and safetensors opens no such file; choose another name"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A temporary file beside ``path`` that takes its place when all went well."""
    if not path.parent.is_dir():
        text = "there is no such folder to save in; make it first"
        raise FileNotFoundError(errno.ENOENT, text, str(path.parent))
    check_name(path)
    if path.exists() and not path.is_file():
        text = "is there and no file, expected the name of a file to write"
        raise FileExistsError(errno.EEXIST, text, str(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        try:
            yield temporary
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            code = int(found[1]) if found else errno.EIO
            raise OSError(code, f"writing failed: {error}", str(path)) from error
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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    manifest, of_checkpoint = _read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged ({error}); save the model again") from error
    for key, first in manifest["shared"].items():
        if first not in tensors:
            raise FormatError(f"{path}: {key!r} shares {first!r}, which the file does not hold")
        tensors[key] = tensors[first]
    return manifest, tensors, of_checkpoint


def _parse(metadata: dict[str, str] | None, path: str | Path) -> dict[str, Any]:
    if not metadata or KEY not in metadata:
        raise FormatError(
            f"{path} is a safetensors file without a mec_embed manifest; load it with safetensors, "
            "or make one with mec_embed.save()"
        )
    try:
        manifest = json.loads(metadata[KEY])
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
    if not all(_has_names(entry) for entry in manifest["tables"]):
        raise FormatError(f"{path}: a table of the mec_embed manifest has no valid 'names'")
    return manifest


def _has_names(entry: Any) -> bool:
    names = entry.get("names") if isinstance(entry, dict) else None
    return isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)


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
        for module, aliases in find_lookups(model)
        for alias in aliases
    }
    replacements: list[Replacement] = []
    builder, reasons = _Builder(), reasons_to_stay(model, CompressionConfig(min_rows=1))
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
        new = builder.table(entry)
        _check_table(old, new, names[0], path)
        if id(old) in reasons:
            raise FormatError(
                f"{path}: table {names[0]!r} of the model must stay as it is, as compress() would "
                f"leave it: {reasons[id(old)]}; build the model as it was when saved, or make a "
                "file without this table (--exclude)"
            )
        replacements.append((aliases, old, new))
    return replacements


_TABLE_TYPES: dict[str, tuple[type, ...]] = {
    "module": (str,),
    "padding_idx": (int, type(None)),
    "zero_padding": (bool,),
    "oov_row": (int, type(None)),
}
_CODES_TYPES: dict[str, tuple[type, ...]] = {
    "layout": (dict,),
    "sparse": (bool,),
    "trainable": (bool,),
    "requires_grad": (bool,),
    "codes_of": (int,),
    "codebooks_of": (int,),
}
_MAP_TYPES: dict[str, tuple[type, ...]] = {
    "rows": (int,),
    "runs": (int, type(None)),
    "map_of": (int,),
    "tiers": (list,),
}


def _check_types(entry: dict[str, Any], types: dict[str, tuple[type, ...]]) -> None:
    for name, allowed in types.items():
        if type(entry[name]) not in allowed:
            raise ValueError(f"{name} has the type {type(entry[name]).__name__}")


def _check_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a table; ValueError or KeyError for values of the wrong type."""
    _check_types({"oov_row": None} | entry, _TABLE_TYPES)
    if issubclass(_KINDS[entry["module"]], DecodedBags):
        _check_types(entry, {"include_last_offset": (bool,)})
    if (entry["padding_idx"] or 0) < 0:
        raise ValueError(f"padding_idx {entry['padding_idx']} is no row")
    return entry


class _Builder:
    """Builds the modules that a manifest describes, on the meta device, in its order.

    On the meta device a size that a damaged manifest claims costs nothing.
    """

    def __init__(self) -> None:
        self.coded: list[Any] = []
        self.maps: list[TierMap] = []

    def table(self, entry: dict[str, Any]) -> DecodedTable:
        """The module of one table, its entry checked already but for its codes."""
        table = self._table(entry)
        table.oov_row = entry.get("oov_row")
        return table

    def _table(self, entry: dict[str, Any]) -> DecodedTable:
        name = entry["names"][0]
        options = {key: entry[key] for key in ("padding_idx", "zero_padding")} | {"name": name}
        kind = _KINDS[entry["module"]]
        if issubclass(kind, DecodedBags):
            options |= {key: entry[key] for key in ("mode", "include_last_offset")}
        if kind in _CODED:
            return self._codes(kind, entry, options)
        tier_map = self._map(entry)
        head, tail = (
            self._codes(CompressedEmbedding, tier, {"name": name}) for tier in entry["tiers"]
        )
        if head.num_embeddings + tail.num_embeddings != tier_map.rows:
            raise ValueError("the tiers do not make up the table")
        if head.embedding_dim != tail.embedding_dim:
            raise ValueError("the tiers differ in embedding_dim")
        return kind(tier_map, head, tail, **options)

    def _map(self, entry: dict[str, Any]) -> TierMap:
        _check_types(entry, _MAP_TYPES)
        rows, runs, map_of = entry["rows"], entry["runs"], entry["map_of"]
        if rows < 2 or not (runs is None or 2 <= runs <= MOST_RUNS):
            raise ValueError(f"a map of {rows} rows in {runs} runs is not possible")
        if not 0 <= map_of <= len(self.maps):
            raise ValueError(f"tables can share with earlier ones only, got {map_of}")
        with torch.device("meta"):
            own = TierMap(rows, runs)
        self.maps.append(own if map_of == len(self.maps) else self.maps[map_of])
        if (self.maps[-1].rows, self.maps[-1].runs) != (rows, runs):
            raise ValueError("tables that share a map differ in it")
        return self.maps[-1]

    def _codes(self, kind: Any, entry: dict[str, Any], options: dict[str, Any]) -> Any:
        _check_types(entry, _CODES_TYPES)
        dtype = dtype_from_name(entry["dtype"])
        layout = CodeLayout.from_dict(entry["layout"] | {"codebook_dtype": entry["codebook_dtype"]})
        number = len(self.coded)
        codes_of, books_of = entry["codes_of"], entry["codebooks_of"]
        if not (0 <= codes_of <= number and 0 <= books_of <= number):
            raise ValueError(f"tables can share with earlier ones only, got {codes_of}, {books_of}")
        with torch.device("meta"):
            own_codes, own_books = CodeTable(layout), CodebookSet(layout, entry["requires_grad"])
        codes = own_codes if codes_of == number else self.coded[codes_of].code_table
        books = own_books if books_of == number else self.coded[books_of].codebook_set
        if codes.codes.shape != own_codes.codes.shape:
            raise ValueError("tables that share codes differ in their number or bits")
        if books.codebooks.shape != own_books.codebooks.shape:
            raise ValueError("tables that share codebooks differ in their shape")
        module = kind(
            layout,
            sparse=entry["sparse"],
            dtype=dtype,
            requires_grad=entry["trainable"],
            code_table=codes,
            codebook_set=books,
            **options,
        )
        self.coded.append(module)
        return module


def _check_table(old: nn.Module, new: Any, name: str, path: str | Path) -> None:
    """FormatError unless the table in the model is what the file replaces."""
    bag = isinstance(old, (nn.EmbeddingBag, DecodedBags))
    if bag is not isinstance(new, DecodedBags):
        raise FormatError(
            f"{path}: table {name!r} was saved as {type(new).__name__}, the model has a "
            f"{type(old).__name__}"
        )
    options = ("mode", "include_last_offset") if bag else ()
    for attribute in ("num_embeddings", "embedding_dim", "padding_idx", *options):
        saved, found = getattr(new, attribute), getattr(old, attribute)
        if saved != found:
            raise FormatError(
                f"{path}: table {name!r} has {attribute}={saved}, in the model it is {found}; "
                "build the model as it was when saved (what the command line was not told: --bag, "
                "--padding-idx)"
            )


def _check_fit(
    model: nn.Module,
    replacements: list[Replacement],
    tensors: dict[str, Tensor],
    manifest: dict[str, Any],
    path: str | Path,
) -> None:
    """FormatError unless the file holds exactly the tensors of the model to be."""
    expected = _others(model.state_dict(), replacements)
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


def _others(values: Mapping[str, Any], replacements: list[Replacement]) -> dict[str, Any]:
    """What of a model's values, by their names, is not of the modules that are replaced."""
    replaced = tuple(f"{alias.name}." for aliases, _, _ in replacements for alias in aliases)
    return {key: value for key, value in values.items() if not key.startswith(replaced)}


def _check_values(model: nn.Module, replacements: list[Replacement]) -> None:
    """ValueError for tensors that stay and are on the meta device, where values would vanish."""
    state = model.state_dict()
    for key, value in _others({**dict(model.named_buffers()), **state}, replacements).items():
        if isinstance(value, Tensor) and value.is_meta:
            unsaved = "" if key in state else ", and set it: it is no part of the file"
            raise ValueError(
                f"{key!r} of the model is on the meta device and can take no value, expected there "
                "are only tables that the file replaces; call to_empty(device=..., recurse=False) "
                f"of the module that holds it first{unsaved}"
            )


def _device_of(model: nn.Module) -> torch.device:
    """That of the first tensor which has one with values; else the CPU."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


def _fill(
    replacements: list[Replacement], tensors: dict[str, Tensor], otherwise: torch.device
) -> None:
    """Give the new modules the tensors of the file, on the device of the module they replace.

    Where that is the meta device, ``otherwise``.
    """
    for aliases, old, new in replacements:
        device = next(iter([*old.parameters(), *old.buffers()])).device
        if device.type == "meta":
            device = otherwise
        for key, value in new.state_dict(keep_vars=True).items():
            if value.is_meta:
                loaded = tensors[f"{aliases[0].name}.{key}"].to(device)
                owner = new.get_submodule(key.rpartition(".")[0])
                _put(owner, key.rpartition(".")[2], loaded, value)
        for module in new.modules():
            if isinstance(module, _CODED):
                module.output_dtype = torch.empty_like(module.output_dtype, device=device)


def _check_maps(replacements: list[Replacement], path: str | Path) -> None:
    """FormatError for a map of tiers that does not lead to the rows of its tiers."""
    for aliases, _, new in replacements:
        if not isinstance(new, _TIERED):
            continue
        found = new.tier_map.popular_rows()
        if found != new.head.num_embeddings:
            raise FormatError(
                f"{path}: the map of table {aliases[0].name!r} is damaged: it has "
                f"{'contradictions' if found is None else f'{found} popular rows'}, expected "
                f"{new.head.num_embeddings} popular rows; save the model again"
            )


def _put(owner: nn.Module, name: str, loaded: Tensor, meta: Tensor) -> None:
    if isinstance(meta, nn.Parameter):
        owner.register_parameter(name, nn.Parameter(loaded, meta.requires_grad))
    else:
        owner.register_buffer(name, loaded)
