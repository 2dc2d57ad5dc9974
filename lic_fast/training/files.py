"""Files that are either whole or absent: atomic writes, and a log that is appended row by row."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from lic_fast.training.errors import TrainingError

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "bpp",
    "mse",
    "psnr",
    "aux_loss",
    "grad_norm",
    "lr",
    "step_seconds",
    "optimizer_seconds",
    "skipped",
)
TIMINGS = ("step_seconds", "optimizer_seconds")


def _cannot_write(path: Path, error: OSError) -> TrainingError:
    reason = error.strerror or str(error)
    return TrainingError(f"cannot write {path}: {reason}; make room or choose another place, then run again")


def make_folder(path: Path) -> None:
    """Create the folder `path` and its parents. Raises TrainingError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def atomic_write(path: Path, data: bytes) -> None:
    """Put `data` in `path` so that a reader, a crash or a full disk sees the old file or the new one.

    Raises TrainingError (its cause is the OSError) and leaves no temporary file.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed run left is overwritten
    try:
        with open(temporary, "wb", buffering=0) as file:
            _write_all(file, data)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # only POSIX lets a folder be opened and synced
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(file: io.RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]  # a short write is followed by the error that explains it


class Log:
    """log.csv, or another with `columns`: one row a step, on disk (though not synced) before the next step begins.

    Opening with `keep_until` drops the rows after that step, whole or half written, and goes on from there.
    Raises TrainingError where a row cannot be written.
    """

    def __init__(self, path: Path, keep_until: int | None = None, columns: Sequence[str] = COLUMNS) -> None:
        self.path, self.columns = path, columns
        rows = [] if keep_until is None else [row for row in read_log(path) if int(row["step"]) <= keep_until]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(path, text.getvalue().encode())
        try:
            self._file = open(path, "ab", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, row: dict[str, float | int | None]) -> None:
        """Append `row`; floats carry the 9 digits that identify an fp32 value, None is an empty cell."""
        values = ("" if value is None else value for value in map(row.get, self.columns))
        cells = (f"{value:.9g}" if isinstance(value, float) else str(value) for value in values)
        try:
            _write_all(self._file, (",".join(cells) + "\n").encode())
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Sync and close. Raises TrainingError where the disk refuses."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            self._file.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv, without a last one that a crash cut off; [] where there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    return [row for row in rows if (row.get("step") or "").isdigit() and None not in row.values()]
