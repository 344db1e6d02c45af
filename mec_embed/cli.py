"""The command line ``mec-embed``: compress a checkpoint without its model's code."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ._version import __version__
from .checkpoints import Checkpoint, open_checkpoint
from .compress import check_device
from .config import CompressionConfig
from .offline import Job, compress_file, plan_file
from .skeleton import (
    ROWS_BY_NAME,
    ROWS_BY_SHAPE,
    ROWS_PER_COLUMN,
    Progress,
    Roles,
    choose_tables,
    is_compressed,
)
from .verify import origin_of, stored_tables, verify_file

FINE, DIFFERENT, WRONG_INPUT, MACHINE, INTERRUPTED = 0, 1, 2, 3, 130
#: Lines of things left alone that are listed in a text; JSON has all.
_LISTED = 10

_CODES = f"""\
exit codes:
  {FINE}    all went well
  {DIFFERENT}    verify: the files differ, or an error is above --max-error
  {WRONG_INPUT}    wrong use or input: an option, a file that is missing or damaged, counts
       that do not fit, rows that hold NaN, a budget that cannot be met
  {MACHINE}    the machine said no: no space, no permission, no memory, faiss is not installed
  {INTERRUPTED}  interrupted by Ctrl-C
"""

_MAIN = f"""\
Compress the embedding tables of a checkpoint into bit-packed codes and small codebooks, without
the code of its model. The tables are read in pieces, so they may be larger than memory.

examples:
  mec-embed inspect model.safetensors                       which tables are there
  mec-embed plan model.safetensors --ratio 50               what would be done
  mec-embed compress model.safetensors --freq counts.npz --ratio 50 -o small.safetensors
  mec-embed verify small.safetensors model.safetensors --freq counts.npz

Then, in Python, with a model that is built as for the checkpoint:
  model = mec_embed.load(build_model(), "small.safetensors")

{_CODES}"""

_TABLES = f"""\
which tables:
  A table is the weight of a module: a matrix named NAME.weight, in a module that holds nothing
  else. Without --include, it needs {ROWS_BY_SHAPE:,} rows (--min-rows) and {ROWS_PER_COLUMN} times
  as many rows as columns. With --include, its name decides. `mec-embed plan` shows what is
  chosen and what is not. --ratio is that of the chosen tables.

checkpoints:
  .safetensors; the .index.json of a sharded one; PyTorch files that load with weights_only=True
  (a state_dict, or one under "state_dict", "model_state_dict" or "model"). Keys that share one
  tensor are taken for one module with several names; --exclude tables that are tied to others.

counts (--freq):
  counts.npz, by numpy.savez(path, **{{"embedding.user": counts}}): how often each row occurs in
  the training data, one array of as many numbers as the table has rows, under the table's name,
  its last part, or a pattern such as "embedding.*" for tables of equal rows. Arrays of savez stay
  on the disk; those of savez_compressed are read into memory. Or a .parquet file of ids, whose
  columns are named as the tables (or --column COLUMN=TABLE). Without counts all rows weigh alike.
"""

_PLAN = f"""\
Say what `mec-embed compress` would do: layouts and exact bytes. Nothing is learned or written.

examples:
  mec-embed plan model.safetensors --freq counts.npz --ratio 50
  mec-embed plan model.safetensors --include 'embedding.*' --exclude '*.position'
  mec-embed plan model.pt --ratio 50 --codebook-dtype int8 --json

{_TABLES}
{_CODES}"""

_COMPRESS = f"""\
Compress the tables of a checkpoint. The output holds the whole model: codes and codebooks, and all
other tensors as they are; mec_embed.load(model, path) takes it on a model that is built as for the
checkpoint.

examples:
  mec-embed compress model.safetensors --freq counts.npz --ratio 50 -o small.safetensors
  mec-embed compress model.safetensors.index.json --codebook-dtype int8 -o small.safetensors
  mec-embed compress model.pt --padding-idx '*=0' --bag 'history.*=sum' -o small.safetensors
  mec-embed compress monday.safetensors --start-from sunday-small.safetensors -o small.safetensors

what a checkpoint does not say:
  A checkpoint holds neither which tables are nn.EmbeddingBag nor their padding rows, and load()
  refuses a file that differs from the model in that: say it with --bag and --padding-idx. With
  --start-from, what the earlier file says of a table holds where these say nothing.

files:
  The output appears whole or not at all, in the place of one of the same name. What a killed run
  has finished is kept in OUTPUT.partial; the same command goes on from there. Peak memory is about
  20 bytes a row of the largest table beside some 200 MB, however wide its rows.

{_TABLES}
{_CODES}"""

_INSPECT = f"""\
Say what a file holds: tables, layouts, bytes and metadata of a compressed file; tables that could
be compressed of any other checkpoint. Reads the header only.

examples:
  mec-embed inspect small.safetensors
  mec-embed inspect model.safetensors --json

{_CODES}"""

_VERIFY = f"""\
Compare a compressed file with the checkpoint that it was made from: checksums of all its tensors,
other tensors bit by bit, and the error of each table (squared, relative to the variance of its
rows), decoded in pieces. With counts, errors are weighted as when it was compressed and must be
those that the file notes; without, nothing but --max-error judges them.

examples:
  mec-embed verify small.safetensors model.safetensors
  mec-embed verify small.safetensors model.safetensors --freq counts.npz --max-error 0.2

{_CODES}"""


class Bars(Progress):
    """Progress as bars on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._interval = self._said = 0.0

    @contextmanager
    def stage(self, what: str, total: int) -> Iterator[None]:
        """See :class:`Progress`."""
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": self._quiet}
        # A log gets a line now and then, a terminal a bar that moves.
        self._interval = 0.1 if sys.stderr.isatty() else 10.0
        options["mininterval"] = self._interval
        with tqdm(total=total, desc=what, file=sys.stderr, **options) as self._bar:
            yield
            # Some rows are read twice, those of tables that were finished before are not.
            self.advance(total)
        self._bar = None

    def advance(self, nbytes: int) -> None:
        """See :class:`Progress`."""
        if self._bar is not None:
            self._bar.update(max(0, min(nbytes, self._bar.total - self._bar.n)))

    def say(self, text: str) -> None:
        """See :class:`Progress`."""
        if self._bar is not None:
            due = time.monotonic() > self._said + self._interval
            self._said = time.monotonic() if due else self._said
            self._bar.set_postfix_str(_shown(text), refresh=due)

    def note(self, text: str) -> None:
        """See :class:`Progress`."""
        if not self._quiet:
            tqdm.write(f"note: {_shown(text)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2, raised by argparse, for wrong options)."""
    _open_streams()
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who read the output went away; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MACHINE
    except KeyboardInterrupt:
        more = "; the same command goes on from here" if options.command == "compress" else ""
        return _failed(options, f"interrupted{more}", INTERRUPTED)
    except (FileNotFoundError, NotADirectoryError) as error:
        return _failed(options, f"{error.filename}: no such file", WRONG_INPUT)
    except IsADirectoryError as error:
        return _failed(options, f"{error.filename} is a folder, expected a file", WRONG_INPUT)
    except ValueError as error:
        return _failed(options, str(error), WRONG_INPUT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(options, f"{where}{error.strerror or error}", MACHINE)
    except MemoryError:
        return _failed(options, "there is not enough memory", MACHINE)
    except RuntimeError as error:
        if isinstance(error.__cause__, ImportError):
            return _failed(options, str(error), MACHINE)
        if not any(part in str(error) for part in ("allocate memory", "out of memory")):
            raise
        return _failed(options, f"there is not enough memory ({error})", MACHINE)


def _open_streams() -> None:
    """Let what the shell has closed lead nowhere, and not into the next file that is opened."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _failed(options: argparse.Namespace, text: str, code: int) -> int:
    sys.stderr.write(f"mec-embed {options.command}: error: {_shown(text)}\n")
    return code


def _shown(text: str) -> str:
    """Text on one line that cannot steer a terminal: names of tables come from others' files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _out(text: str) -> None:
    text = "\n".join(map(_shown, text.split("\n")))
    # A terminal that cannot show a table's name shows its number; JSON is ASCII.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


# --- commands ------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
    report, left_alone = plan_file(_job(options), Bars(options.quiet))
    if options.json:
        _out(_json({"report": report.to_dict(), "left_alone": left_alone}))
    else:
        _out("\n".join([str(report), *_listed("left alone", left_alone)]))
    return FINE


def _compress(options: argparse.Namespace) -> int:
    done = compress_file(
        _job(options),
        options.output,
        resume=options.resume,
        device=options.device,
        progress=Bars(options.quiet),
    )
    if options.json:
        about = {"file": str(done.path), "bytes": done.nbytes, "resumed_groups": done.resumed}
        _out(_json({**about, "report": done.report.to_dict()}))
    else:
        _out(f"{done.report}\nwrote {done.path}: {done.nbytes:,} bytes")
    return FINE


def _inspect(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.file)
    about = _about(checkpoint)
    about |= _compressed_tables(checkpoint) if about["compressed"] else _candidates(checkpoint)
    if options.json:
        _out(_json(about))
        return FINE
    lines = _columns(_table_lines(about["tables"]))
    lines += [
        f"{about['file']}: {about['file_bytes']:,} bytes = {about['table_bytes']:,} in "
        f"{len(about['tables'])} tables + {about['other_tensor_bytes']:,} in other tensors + "
        f"{about['header_bytes']:,} of header"
    ]
    lines += [_shown(f"{name}: {text}") for name, text in about["metadata"].items()]
    _out("\n".join([*lines, *_listed("left alone", about.get("left_alone", {}))]))
    return FINE


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    file_bytes = sum(size for _, size, _, _ in checkpoint.identity)
    metadata = {k: v for k, v in checkpoint.metadata.items() if not k.startswith("mec_embed")}
    origin = {k: v for k, v in origin_of(checkpoint).items() if k in ("version", "checkpoint")}
    return {
        "file": str(checkpoint.path),
        "compressed": is_compressed(checkpoint),
        "file_bytes": file_bytes,
        "tensors": len(checkpoint.tensors),
        "tensor_bytes": checkpoint.nbytes,
        "header_bytes": file_bytes - checkpoint.nbytes,
        "metadata": metadata | {f"made by mec_embed, {k}": v for k, v in origin.items()},
    }


def _compressed_tables(checkpoint: Checkpoint) -> dict[str, Any]:
    tables = [{**asdict(table), "bytes": table.nbytes} for table in stored_tables(checkpoint)]
    return _with_bytes(checkpoint, tables)


def _candidates(checkpoint: Checkpoint) -> dict[str, Any]:
    chosen, reasons = choose_tables(checkpoint, CompressionConfig(min_rows=ROWS_BY_SHAPE))
    tables = [
        {
            "names": [name],
            "rows": stored.shape[0],
            "dim": stored.shape[1],
            "dtype": stored.dtype_name,
            "bytes": stored.nbytes,
        }
        for name, stored in chosen.items()
    ]
    return {**_with_bytes(checkpoint, tables), "left_alone": reasons}


def _with_bytes(checkpoint: Checkpoint, tables: list[dict[str, Any]]) -> dict[str, Any]:
    nbytes = sum(table["bytes"] for table in tables)
    return {
        "tables": tables,
        "table_bytes": nbytes,
        "other_tensor_bytes": checkpoint.nbytes - nbytes,
    }


def _table_lines(tables: list[dict[str, Any]]) -> list[list[str]]:
    """Header and one line a table; columns that no table has are left out."""
    names = ["layout", "codebook_dtype", "dtype", "code_bytes", "codebook_bytes", "other_bytes"]
    names = ["rows", "dim", *(name for name in names if tables and name in tables[0]), "bytes"]
    lines = [["table", *(name.replace("_", " ") for name in names)]]
    lines += [
        [" = ".join(table["names"]), *(str(table[name]) for name in names)] for table in tables
    ]
    if tables and "error" in tables[0]:
        lines[0].append("error")
        for line, table in zip(lines[1:], tables, strict=True):
            line.append(_number(table["error"]))
    return lines


def _verify(options: argparse.Namespace) -> int:
    counts, columns = _counts(options)
    found = verify_file(
        options.file,
        options.checkpoint,
        counts=counts,
        columns=columns,
        max_error=options.max_error,
        tables_only=options.tables_only,
        progress=Bars(options.quiet),
    )
    if options.json:
        _out(_json({**asdict(found), "fine": not found.differences}))
    else:
        header = ["table", "weighted error", "as reported", "unweighted error"]
        body = [
            [table.name, *map(_number, (table.weighted, table.reported, table.unweighted))]
            for table in found.tables
        ]
        lines = _columns([header, *body])
        lines += [f"note: {note}" for note in found.notes]
        lines += [_shown(f"different: {difference}") for difference in found.differences]
        _out("\n".join([*lines, "the files differ" if found.differences else "all is well"]))
    return DIFFERENT if found.differences else FINE


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _columns(lines: list[list[str]]) -> list[str]:
    """Lines as text, the first column to the left and the others to the right."""
    lines = [[*map(_shown, line)] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _listed(what: str, reasons: dict[str, str]) -> list[str]:
    lines = [_shown(f"{what}: {key}: {reason}") for key, reason in reasons.items()]
    more = [f"{what}: {len(lines) - _LISTED} more (--json lists them)"]
    return lines[:_LISTED] + (more if len(lines) > _LISTED else [])


def _json(values: dict[str, Any]) -> str:
    return json.dumps(_known(values), indent=2)


def _known(value: Any) -> Any:
    """The value with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _known(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- options -------------------------------------------------------------------------------------


def _job(options: argparse.Namespace) -> Job:
    return Job(
        options.checkpoint,
        _config(options),
        Roles(tuple(options.bag), tuple(options.padding_idx)),
        *_counts(options),
        options.start_from,
    )


def _config(options: argparse.Namespace) -> CompressionConfig:
    """The configuration: of --config, other options above it."""
    names = (
        "ratio",
        "max_bytes",
        "codes",
        "codebook_dtype",
        "nonfinite",
        "popularity",
        "tiers",
        "share_codebooks",
        "epochs",
        "seed",
    )
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in ("include", "exclude"):
        if getattr(options, name):
            given[name] = tuple(getattr(options, name))
    values = _json_of(options.config) if options.config else {}
    try:
        if "ratio" in given or "max_bytes" in given:
            for name in ("ratio", "max_bytes", "num_subvectors", "codebook_size"):
                values.pop(name, None)
        values |= given
        named = tuple(values.get("include", ("*",))) != ("*",)
        usual = ROWS_BY_NAME if named else ROWS_BY_SHAPE
        if options.min_rows is not None or "min_rows" not in values:
            values["min_rows"] = usual if options.min_rows is None else options.min_rows
        return CompressionConfig.from_dict(values)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{options.config or 'the options'}: {error}") from error


def _json_of(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError where it holds none."""
    advice = "write one with CompressionConfig.to_json()"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__}, expected an object of settings; {advice}"
        )
    return values


def _counts(options: argparse.Namespace) -> tuple[Path | None, dict[str, str]]:
    """The file of counts, and its columns."""
    if options.column and options.freq is None:
        raise ValueError("--column goes with --freq FILE, a parquet file; give it too")
    return options.freq, dict(options.column)


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.rpartition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _padding(text: str) -> tuple[str, int]:
    name, value = _pair(text)
    try:
        return name, int(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected NAME=ROW, got {text!r}") from error


def _bag(text: str) -> tuple[str, tuple[str, bool]]:
    name, value = _pair(text)
    mode, _, last = value.partition(",")
    if mode not in ("sum", "mean", "max") or last not in ("", "last"):
        raise argparse.ArgumentTypeError(
            f"expected NAME=sum, NAME=mean or NAME=max, perhaps with ',last', got {text!r}"
        )
    return name, (mode, bool(last))


def _device(text: str) -> str:
    try:
        check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _described(argparse.ArgumentParser, _MAIN, prog="mec-embed")
    parser.add_argument("--version", action="version", version=f"mec-embed {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text, run, add in (
        ("inspect", _INSPECT, _inspect, _add_inspect),
        ("plan", _PLAN, _plan, _add_job),
        ("compress", _COMPRESS, _compress, _add_compress),
        ("verify", _VERIFY, _verify, _add_verify),
    ):
        help_text = text.partition(".")[0].partition(":")[0]
        command = _described(commands.add_parser, text, name=name, help=help_text)
        add(command)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--quiet", action="store_true", help="no progress or notes on stderr")
        command.set_defaults(run=run)
    return parser


def _described(make: Any, text: str, **options: Any) -> argparse.ArgumentParser:
    """A parser with the first paragraph of its text above the options and the rest below."""
    description, _, epilog = text.partition("\n\n")
    parser: argparse.ArgumentParser = make(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="compressed file or checkpoint")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="compressed file")
    parser.add_argument("checkpoint", type=Path, help="that it was made from")
    _add_counts(parser)
    parser.add_argument(
        "--max-error", type=float, metavar="X", help="largest error of a table that is fine"
    )
    parser.add_argument(
        "--tables-only",
        action="store_true",
        help="do not compare other tensors (for a model that was trained since)",
    )


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    _add_job(parser)
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="discard what a killed run has finished",
    )
    parser.add_argument("--device", type=_device, help="to learn on, such as cuda (default: cpu)")


def _add_counts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--freq", type=Path, metavar="FILE", help="counts (.npz) or ids (.parquet)")
    parser.add_argument(
        "--column",
        type=_pair,
        action="append",
        default=[],
        metavar="COLUMN=TABLE",
        help="column of a parquet file that holds a table's ids; may be repeated",
    )


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint to compress")
    _add_counts(parser)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--ratio", type=float, help="bytes before / bytes after (default: 50)")
    target.add_argument("--max-bytes", type=int, metavar="N", help="bytes after, instead")
    target.add_argument(
        "--start-from",
        type=Path,
        metavar="FILE",
        help="compressed file of an earlier version, instead: keep its layouts and most codes",
    )
    _add_tables(parser)
    learning = parser.add_argument_group("how")
    learning.add_argument("--codes", choices=("additive", "product"))
    learning.add_argument(
        "--codebook-dtype",
        choices=("float32", "float16", "bfloat16", "int8"),
        help="default: that of the table; int8 is smallest, and frozen",
    )
    learning.add_argument(
        "--nonfinite",
        choices=("error", "zero"),
        help="rows that hold NaN or infinity are an error, or such entries are taken as zero",
    )
    learning.add_argument(
        "--popularity", choices=("sqrt", "linear", "log", "none"), help="weight of a row's count"
    )
    learning.add_argument(
        "--no-tiers",
        dest="tiers",
        action="store_const",
        const=False,
        help="the same bits for all rows of a table",
    )
    learning.add_argument(
        "--no-shared-codebooks",
        dest="share_codebooks",
        action="store_const",
        const=False,
        help="codebooks of its own for each table",
    )
    learning.add_argument("--epochs", type=int, metavar="N", help="of the MEC objective")
    learning.add_argument("--seed", type=int, metavar="N")
    learning.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="CompressionConfig as JSON; options given here win",
    )


def _add_tables(parser: argparse.ArgumentParser) -> None:
    tables = parser.add_argument_group("tables (patterns as in a shell; options may be repeated)")
    for name in ("include", "exclude"):
        tables.add_argument(f"--{name}", action="append", metavar="PATTERN", help=f"{name} tables")
    tables.add_argument(
        "--min-rows",
        type=int,
        metavar="N",
        help=f"default: {ROWS_BY_SHAPE}, or {ROWS_BY_NAME} with --include",
    )
    tables.add_argument(
        "--bag",
        type=_bag,
        action="append",
        default=[],
        metavar="PATTERN=MODE[,last]",
        help="tables of an nn.EmbeddingBag: sum, mean or max; ',last': include_last_offset",
    )
    tables.add_argument(
        "--padding-idx",
        type=_padding,
        action="append",
        default=[],
        metavar="PATTERN=ROW",
        help="tables with a padding row, such as '*=0'",
    )
