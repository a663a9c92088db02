"""A result, live or saved, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

import trainguard
from trainguard.checkpoints import weights_path
from trainguard.data.samples import Key
from trainguard.evidence import Evidence, collect_evidence
from trainguard.files import read_record, results_in, write_atomically
from trainguard.report import audit, drill, purification, screening
from trainguard.report.export import write_decisions
from trainguard.report.parts import Share, percentage, shown, sort_key
from trainguard.results import ScreenResult
from trainguard.warning import warn

Columns = dict[str, Any]


def build(
    result: Any,
    path: str | Path,
    dataset: Any = None,
    image_column: Key | None = None,
    label_column: Key | None = None,
) -> Path:
    """Write the page of a result; beside that of a screening, the decisions as a table.

    Args:
        result: a `ScreenResult`, `AuditResult` or `PurifyResult`, or the folder or file that its `save` wrote, or the
            folder of a drill.
        path: the HTML file. Next to a screening's `report.html` lie `keep.csv` and `keep.parquet`; next to any other
            name `X.html`, `X.keep.csv` and `X.keep.parquet`.
        dataset: the screened data, to show images where the result has kept none.
        image_column: as screening was told, where it was.
        label_column: likewise.

    Returns:
        `path`.

    Raises:
        ValueError: `path` is of another kind, `result` is nothing that a page can be made of, or `dataset` is not what
            was screened.
        StateError: the page cannot be written.
    """
    path, columns = Path(path), {"image_column": image_column, "label_column": label_column}
    if path.suffix.lower() not in ("", ".html", ".htm") or path.is_dir():
        raise ValueError(f"{path} cannot become a page: name an .html file to write")
    if not path.suffix and path.is_file() and not path.read_bytes()[:20].lower().startswith(b"<!doctype html"):
        raise ValueError(f"{path} is there already and is no page: name an .html file to write")
    if isinstance(result, str | Path):
        kind, content = _of(Path(result), dataset, columns)
    else:
        kind, content = _content(result, dataset, columns)
    if kind == "screening":
        content["export"] = write_decisions(content["result"], path)
    page = _render(f"{kind}.html.j2", content)
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes
    return path


def _of(place: Path, dataset: Any, columns: Columns) -> tuple[str, dict[str, Any]]:
    """See `_content`; of a record that somebody may have changed or cut short."""
    loaded = _load(place)
    try:
        return _content(loaded, dataset, columns)
    except (ArithmeticError, AttributeError, IndexError, KeyError, MemoryError, TypeError) as error:
        raise ValueError(f"{place} holds no whole record of this version ({type(error).__name__}: {error})") from error


def _content(result: Any, dataset: Any, columns: Columns) -> tuple[str, dict[str, Any]]:
    """Which template, and what it shows."""
    if isinstance(result, ScreenResult):
        return "screening", screening.context(result, _evidence(result, dataset, columns)) | {"result": result}
    from trainguard.purification.results import AuditResult, PurifyResult

    if isinstance(result, AuditResult):
        return "audit", audit.context(result)
    if isinstance(result, PurifyResult):
        return "purification", purification.context(result.to_dict())
    if isinstance(result, Mapping) and result.get("kind") == "purify":
        return "purification", purification.context(result)
    if is_dataclass(result) and not isinstance(result, type) and hasattr(result, "cells"):
        result = asdict(result)  # a drill; the report stands below it and knows only its record
    if isinstance(result, Mapping) and "cells" in result:
        return "drill", drill.context(result)
    raise TypeError(f"expected a ScreenResult, AuditResult, PurifyResult or a saved one, got {type(result).__name__}")


def _evidence(result: ScreenResult, dataset: Any, columns: Columns) -> Evidence | None:
    if result.evidence is not None or dataset is None:
        return result.evidence
    from trainguard.data.loaders import readable
    from trainguard.data.store import ImageStore, open_images

    store = dataset if isinstance(dataset, ImageStore) else open_images(readable(dataset), on_error="skip", **columns)
    if not np.array_equal(store.labels, result.labels):
        raise ValueError("the labels of dataset= are not those that were screened: pass the data set that was screened")
    if store.fingerprint != result.fingerprint:
        warn("the images of dataset= are not those that were screened, or are read in another way: the page shows them")
    return collect_evidence(
        store, result.score, result.suspect, result.labels, result.proposed, thresholds=result.thresholds
    )


def _load(place: Path) -> Any:
    """What lies in a folder, or in a file that `PurifyResult.save` wrote."""
    kinds = results_in(place)
    if len(kinds) > 1:
        raise ValueError(f"{place} holds several results ({', '.join(kinds)}): put each into a folder of its own")
    if (place / "result.json").is_file():
        return ScreenResult.load(place)
    if (place / "audit.json").is_file():
        from trainguard.purification.results import AuditResult

        return AuditResult.load(place)
    if (place / "drill.json").is_file():
        return read_record(place / "drill.json")
    if not place.is_dir():
        beside = [weights_path(place).with_suffix(".json"), place.with_suffix(".json")]
        records = [record for record in beside if record.is_file()][:1]
    else:
        records = [
            record
            for record in sorted(place.glob("[!.]*.json"))  # what begins with a dot was left by a killed save
            if '"purify"' in record.read_text(errors="replace")
        ]
    found = [record for record in map(read_record, records) if record.get("kind") == "purify"]
    if len(found) > 1:
        raise ValueError(f"{place} holds {len(found)} purifications: pass the file of one of them")
    if found:
        return found[0]
    raise ValueError(f"{place} holds no result: pass what screen, audit, purify or drill wrote")


def _render(template: str, content: dict[str, Any]) -> str:
    own = {"version": trainguard.__version__, "style": _asset("style.css"), "script": _asset("page.js")}
    return _templates().get_template(template).render(own | content)


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("trainguard.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(shown=shown, sort_key=sort_key, percentage=percentage)
    environment.tests["share"] = lambda value: isinstance(value, Share)
    return environment


def _asset(name: str) -> Markup:
    """One of our own files, which needs no escaping."""
    return Markup(files("trainguard.report").joinpath("templates", name).read_text(encoding="utf-8"))
