"""Plan and compress a checkpoint without its model: what the command line does.

Finished groups of tables are kept in a folder beside the output until all is done.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ._version import __version__
from .budget import Group, Shape
from .checkpoints import (
    CHUNK_BYTES,
    Checkpoint,
    MemoryTensor,
    StoredTensor,
    damaged_tensors,
    lock,
    open_checkpoint,
    tie,
    write_safetensors,
)
from .compress import Draft, draft_tables, learn, note_patterns
from .config import CompressionConfig
from .counts import read_counts
from .learning.fit import EncodedRows, FittedCodes
from .learning.kmeans import require_faiss
from .modules import DecodedTable
from .report import CompressionReport
from .skeleton import (
    Progress,
    Roles,
    Skeleton,
    choose_tables,
    is_compressed,
    names_of,
    nothing_chosen,
)
from .storage import KEY, ORIGIN, build_tables, check_name, contents, json_able, read_manifest
from .swap import replace_modules
from .tables import Table, check_finite
from .warm import Earlier

#: What is in the folder of a run that was killed.
_OURS = re.compile(r"lock|fingerprint|output|[0-9a-f]{32}\.(group|new)")


@dataclass(frozen=True)
class Job:
    """What to compress and how.

    Attributes:
        checkpoint: the file.
        config: what to aim for, and which tables.
        roles: what the checkpoint does not say.
        counts: a file for :func:`read_counts`, or None.
        columns: see :func:`read_counts`.
        start_from: compressed file of an earlier version, see :func:`mec_embed.compress`; it says
            which tables, and how they are stored, and their roles where ``roles`` does not.
    """

    checkpoint: Path
    config: CompressionConfig
    roles: Roles = Roles()
    counts: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    start_from: Path | None = None

    def inputs(self, checkpoint: Checkpoint) -> list[Path]:
        """Files that are read.

        Args:
            checkpoint: that was opened.
        """
        others = (self.counts, self.start_from)
        return [*checkpoint.files, *(path for path in others if path is not None)]

    def skeleton(self, progress: Progress) -> tuple[Skeleton, dict[str, str]]:
        """The tables, and why other matrices are none."""
        checkpoint = open_checkpoint(self.checkpoint)
        if is_compressed(checkpoint):
            raise ValueError(
                f"{self.checkpoint} is compressed already; give the checkpoint it was made from"
            )
        selection, roles = self.config, self.roles
        if self.start_from is not None:
            entries = read_manifest(self.start_from)["tables"]
            tie(checkpoint, [entry["names"] for entry in entries])
            names = tuple(glob.escape(name) for entry in entries for name in entry["names"])
            selection = replace(self.config, include=names, exclude=(), min_rows=1)
            roles = _roles_of(entries).then(self.roles)
        chosen, reasons = choose_tables(checkpoint, selection)
        if not chosen:
            raise ValueError(nothing_chosen(self.checkpoint, reasons))
        self.roles.check([one for name in chosen for one in names_of(checkpoint, name)])
        zero = self.config.nonfinite == "zero"
        return Skeleton(checkpoint, chosen, roles, progress.advance, zero), reasons

    def draft(self, skeleton: Skeleton, progress: Progress) -> Draft:
        """The plan."""
        stats, earlier = None, self._earlier()
        if self.counts is not None:
            stats = read_counts(self.counts, skeleton, self.columns, progress)
        tables: list[Table] = [*skeleton.tables]
        if earlier is not None:
            earlier.choose(tables, [])
        draft = draft_tables(skeleton.model, tables, [], stats, self.config, earlier=earlier)
        others = [*skeleton.checkpoint.tensors, *skeleton.checkpoint.shared]
        others += [key.removesuffix(".weight") for key in others]
        draft.notes.extend(note_patterns(self.config, skeleton.names, others))
        return draft

    def _earlier(self) -> Earlier | None:
        """The tables of ``start_from``."""
        if self.start_from is None:
            return None
        manifest = read_manifest(self.start_from)
        modules = tables_of(open_checkpoint(self.start_from), manifest).values()
        pairs = zip(manifest["tables"], modules, strict=True)
        return Earlier({name: module for entry, module in pairs for name in entry["names"]})

    def fingerprint(self, skeleton: Skeleton, device: str | None) -> str:
        """Equal for jobs whose results are equal."""
        digest = hashlib.sha256()
        if self.counts is not None:
            with open(self.counts, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
        values = [
            __version__,
            skeleton.checkpoint.identity,
            self.config.to_dict(),
            [self.roles.bags, self.roles.paddings],
            [digest.hexdigest(), dict(self.columns)],
            None if self.start_from is None else open_checkpoint(self.start_from).identity,
            device,
        ]
        return json.dumps(values)


def _roles_of(entries: Sequence[Mapping[str, Any]]) -> Roles:
    """Roles of the tables of a manifest, which is checked when its tables are built."""
    named = [(glob.escape(name), entry) for entry in entries for name in entry["names"]]
    bags = [(name, entry) for name, entry in named if "mode" in entry]
    return Roles(
        tuple((name, (e["mode"], e.get("include_last_offset", False))) for name, e in bags),
        tuple((name, e["padding_idx"]) for name, e in named if e.get("padding_idx") is not None),
    )


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress_file` did.

    Attributes:
        report: of the tables.
        path: of the file.
        nbytes: of the file.
        resumed: groups of tables that were finished before.
    """

    report: CompressionReport
    path: Path
    nbytes: int
    resumed: int


def plan_file(job: Job, progress: Progress) -> tuple[CompressionReport, dict[str, str]]:
    """What :func:`compress_file` would do, and matrices that it would leave alone, and why."""
    skeleton, reasons = job.skeleton(progress)
    return job.draft(skeleton, progress).report(), reasons


def compress_file(
    job: Job,
    output: str | Path,
    *,
    resume: bool = True,
    device: str | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress the tables of a checkpoint into a file that :func:`mec_embed.load` takes.

    The file holds the whole model: codes and codebooks, and all other tensors as they are. It
    appears whole or not at all. What a killed run has finished is in a folder beside it,
    ``output`` with ``.partial`` behind, and is used by the next.

    Args:
        job: what to compress.
        output: the file to write.
        resume: whether to use what a run before has finished.
        device: to learn on; the CPU by default.
        progress: told what goes on.

    Raises:
        ValueError: input or options that do not fit. OSError: the output cannot be written.
    """
    started = time.perf_counter()
    output, progress = Path(output), progress or Progress()
    require_faiss()
    skeleton, _ = job.skeleton(progress)
    _check_output(output, job.inputs(skeleton.checkpoint))
    check_extra(skeleton.checkpoint)
    draft = job.draft(skeleton, progress)
    groups = draft.groups_to_learn()
    with Partial(output, job.fingerprint(skeleton, device), resume, progress) as work:
        _check_space(output, skeleton, draft, work.nbytes)
        with progress.stage("checking rows", skeleton.nbytes):
            draft.notes.extend(check_finite(skeleton.tables))
        with progress.stage("compressing", 2 * skeleton.nbytes):
            outcome = learn(draft, groups, partial(_teller, progress), device, work.fit)
        report = outcome.report(time.perf_counter() - started)
        replace_modules(
            skeleton.model,
            [
                (t.aliases, t.module, outcome.modules[t])
                for t in skeleton.tables
                if t in outcome.modules
            ],
        )
        tensors, metadata = _file_contents(skeleton, report)
        _check_unchanged(skeleton.checkpoint)
        with (
            progress.stage("writing", sum(tensor.nbytes for tensor in tensors.values())),
            _writing(output),
        ):
            write_safetensors(work.output, tensors, metadata, progress.advance)
            work.publish()
    return Compressed(report, output, output.stat().st_size, work.resumed)


def _teller(progress: Progress, group: Group) -> Callable[[str, float], None]:
    name = group.first.table.name
    return lambda stage, error: progress.say(f"{name}: {stage}, error {error:.4f}")


def _check_output(output: Path, inputs: Sequence[Path]) -> None:
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}; make it first")
    check_name(output)
    if output.is_dir():
        raise ValueError(f"{output} is a folder, expected the name of a file to write")
    if output.exists() and not output.is_file():
        raise ValueError(f"{output} is a pipe or a device, expected the name of a file to write")
    partial = _partial(output)
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise ValueError(f"{output} is also read ({path}); write to another file")
        if partial.resolve() in path.resolve().parents:
            raise ValueError(
                f"{path} is in {partial}, where a run keeps what it has finished; move it, or "
                "write to another file"
            )


def _partial(output: Path) -> Path:
    """The folder of what is finished of an output."""
    return output.with_name(f"{output.name}.partial")


def _check_space(output: Path, skeleton: Skeleton, draft: Draft, there: int) -> None:
    """OSError where the output and the finished groups would not fit on the disk."""
    pieces = sum(g.layout_bytes(shape, draft.config) for g, shape in draft.groups_to_learn())
    tables = sum(choice.nbytes for choice in draft.assignment.chosen)
    whole = skeleton.checkpoint.nbytes - skeleton.nbytes + tables
    needed = whole + max(0, pieces - there)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"not enough space: {needed:,} bytes are needed ({whole:,} for the file, the rest for "
            f"finished tables until it is written), {free:,} are free; make room or choose another "
            "folder",
            str(output.parent),
        )


def _check_unchanged(checkpoint: Checkpoint) -> None:
    if open_checkpoint(checkpoint.path).identity != checkpoint.identity:
        raise ValueError(f"{checkpoint.path} was changed while it was read; run again")


def _file_contents(
    skeleton: Skeleton, report: CompressionReport
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of the compressed file."""
    checkpoint = skeleton.checkpoint
    for table in skeleton.tables:
        for alias in table.aliases:
            if alias.parent._modules[alias.attribute] is table.module:
                # It stays as it is, and comes from the checkpoint.
                del alias.parent._modules[alias.attribute]
    modules = {name for name, _ in skeleton.model.named_modules(remove_duplicate=False)}
    replaced = {f"{table.name}.weight" for table in skeleton.tables if table.name in modules}
    if not replaced:
        raise ValueError(
            "all tables fit the budget as they are, so there is nothing to compress; raise --ratio "
            "or lower --max-bytes"
        )
    coded, manifest = contents(skeleton.model)
    tensors: dict[str, StoredTensor] = {
        key: stored for key, stored in checkpoint.tensors.items() if key not in replaced
    }
    tensors |= {key: MemoryTensor(tensor) for key, tensor in coded.items()}
    manifest["shared"] |= {k: v for k, v in checkpoint.shared.items() if v not in replaced}
    manifest["extra"] = checkpoint.extra
    origin = {
        "version": __version__,
        "checkpoint": checkpoint.path.name,
        "config": report.config.to_dict(),
        "tables": {
            table.name: {"error": table.weighted_error, "popularity": table.popularity}
            for table in report.tables
            if table.compressed
        },
    }
    metadata = {**checkpoint.metadata, "format": "pt"}
    return tensors, metadata | {KEY: json.dumps(manifest), ORIGIN: json.dumps(origin)}


def keys_of_tables(keys: Iterable[str], manifest: Mapping[str, Any]) -> defaultdict[str, list[str]]:
    """Keys below each name of each table."""
    names = {name for entry in manifest["tables"] for name in entry["names"]}
    found = defaultdict(list)
    for key in keys:
        parent = key.rpartition(".")[0]
        while parent and parent not in names:
            parent = parent.rpartition(".")[0]
        if parent:
            found[parent].append(key)
    return found


def tables_of(small: Checkpoint, manifest: dict[str, Any]) -> dict[str, DecodedTable]:
    """The tables of a compressed file by their first names; tensors are mapped.

    Raises:
        ValueError: a file that is damaged.
    """
    shared, tensors = manifest["shared"], {}
    for keys in keys_of_tables([*small.tensors, *shared], manifest).values():
        for key in keys:
            if shared.get(key, key) not in small.tensors:
                raise ValueError(f"{small.path}: {key!r} shares a tensor that is not there")
            tensors[key] = small.mapped(shared.get(key, key))
    names = [entry["names"][0] for entry in manifest["tables"]]
    return dict(zip(names, build_tables(manifest, tensors, small.path), strict=True))


def check_extra(checkpoint: Checkpoint) -> None:
    """ValueError for an entry that is no tensor, and that the file could not give back as it is."""
    for key, value in checkpoint.extra.items():
        try:
            json_able(key, value)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {error}; take it out") from error


class Partial:
    """The folder of finished groups beside an output; a context that holds it for this process.

    Args:
        output: the file that is made.
        fingerprint: what was finished under another one is of no use.
        resume: whether to use what was finished before.
        progress: told what is used.
    """

    def __init__(self, output: Path, fingerprint: str, resume: bool, progress: Progress) -> None:
        self.folder = _partial(output)
        self.output = self.folder / "output"
        self.resumed = 0
        self._final, self._fingerprint, self._progress = output, fingerprint.encode(), progress
        self._resume, self._published = resume, False

    def __enter__(self) -> Partial:
        """Take the folder, and clear it of what has no use."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is a file, expected a folder that a run before has made, or none; "
                "move it or choose another output"
            )
        with _writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        others = [path.name for path in self.folder.iterdir() if not _OURS.fullmatch(path.name)]
        if others:
            raise ValueError(
                f"{self.folder} holds {', '.join(others[:5])}, expected only what a run before has "
                "finished; move them or choose another output"
            )
        self._lock = lock(self.folder / "lock")
        self._lock.__enter__()
        known = self.folder / "fingerprint"
        if known.exists() and known.read_bytes() == self._fingerprint:
            if self._resume:
                return self
        elif known.exists() and self._resume:
            self._progress.note(f"{self.folder} is of other input or options; starting anew")
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        known.write_bytes(self._fingerprint)
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the folder go; one without finished groups is of no use."""
        try:
            if self._published or not self.nbytes:
                # While it is locked: once it is not, another run may have begun in it. Systems that
                # keep open files leave them to the next run.
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self._lock.__exit__(None, None, None)

    @property
    def nbytes(self) -> int:
        """Bytes of finished groups."""
        return sum(path.stat().st_size for path in self.folder.glob("*.group"))

    def fit(self, group: Group, shape: Shape, fit: Callable[[], FittedCodes]) -> FittedCodes:
        """The codes of a group: from the folder, or learned and put there."""
        key = json.dumps([[[*_names(f), f.tier, f.rows] for f in group.fields], shape])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.group"
        if path.exists():
            try:
                found = _read_group(path, key)
            except (ValueError, LookupError, TypeError) as error:
                # A kill leaves no such file, but losing power might.
                self._progress.note(f"{path} is damaged and made anew: {error}")
            else:
                self.resumed += 1
                self._progress.advance(group.rows * _row_bytes(group))
                return found
        temporary, fitted = path.with_suffix(".new"), fit()
        with _writing(path):
            _write_group(temporary, key, fitted)
            temporary.replace(path)
        return _read_group(path, key)

    def publish(self) -> None:
        """Put the written file in its place, all of it on the disk."""
        with open(self.output, "rb+") as file:
            os.fsync(file.fileno())
        self.output.replace(self._final)
        _sync_folder(self._final.parent)
        self._published = True


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors name what is written, and are none of a file that is missing: that is an input."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}); make room or choose another "
            "folder, where files can be made"
        ) from error


def _names(one: Any) -> list[str]:
    return [table.name for table in one.tables]


def _row_bytes(group: Group) -> int:
    return sum(table.dim * table.weight.element_size() for table in group.first.tables)


def _sync_folder(folder: Path) -> None:
    """Let a rename reach the disk; systems that cannot open folders do so by themselves."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_group(path: Path, key: str, fitted: FittedCodes) -> None:
    tensors: dict[str, StoredTensor] = {"codebooks": MemoryTensor(fitted.codebooks.cpu())}
    for number, encoded in enumerate(fitted.encoded):
        tensors[f"packed.{number}"] = MemoryTensor(encoded.packed)
    about = {
        "start_error": fitted.start_error,
        "error": fitted.error,
        "history": fitted.history,
        "encoded": [[one.perplexity, one.dead_codes, one.changed_rows] for one in fitted.encoded],
    }
    write_safetensors(path, tensors, {"key": key, "about": json.dumps(about)})


def _read_group(path: Path, key: str) -> FittedCodes:
    """What :func:`_write_group` wrote; codes are mapped, so that they take no memory.

    Raises:
        ValueError, LookupError, TypeError: it did not write this file, or not to its end.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.metadata["key"] != key or damaged_tensors(checkpoint, lambda nbytes: None) != []:
        raise ValueError("its contents are not what was written")
    about = json.loads(checkpoint.metadata["about"])
    encoded = [
        EncodedRows(checkpoint.mapped(f"packed.{number}"), tuple(perplexity), *numbers)
        for number, (perplexity, *numbers) in enumerate(about.pop("encoded"))
    ]
    codebooks = checkpoint.mapped("codebooks").clone()
    return FittedCodes(codebooks=codebooks, encoded=tuple(encoded), **about)
