"""The folder of a report: `report.json`, pictures of the lazy ratios, and `report.md`, a section for a model card."""

from __future__ import annotations

import json
from pathlib import Path

from lt_gguf.gguf.unfinished import unfinished_folder
from lt_gguf.report import loss_plots, plots
from lt_gguf.report.caches import loss_over_memory
from lt_gguf.report.model_card import streaming_section
from lt_gguf.report.report import Report

REPORT = "report.json"
SECTION = "report.md"
BARS = "lazy_ratio"
HEAT_MAP = "lazy_ratio_by_sample"
LOSS = "loss"
LOSS_BY_LAYER = "loss_by_layer"
LOSS_OVER_MEMORY = "loss_over_memory"
_PICTURES = (BARS, HEAT_MAP, LOSS, LOSS_BY_LAYER, LOSS_OVER_MEMORY)
FILES = (*(f"{stem}.{suffix}" for stem in _PICTURES for suffix in ("png", "svg")), SECTION, REPORT)


def write_report(report: Report, folder: Path, overwrite: bool = False) -> list[Path]:
    """Writes a report, its pictures and the section for a model card into a folder, which is made if need be.

    Returns:
        The files; no pictures if nothing was measured.

    Raises:
        ValueError: there is a report already, or the folder is a file.
        OSError: it can't be written; nothing of it is there then.
        ImportError: matplotlib is missing, and something was measured.
    """
    check_destination(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(folder if folder.exists() else folder.parent, prefix=f".{folder.name}.") as hidden:
        unfinished = hidden / "report"  # note: unlike the hidden one it is made for all who may read here
        unfinished.mkdir()
        names = _write_into(report, unfinished)
        if folder.exists():
            for name in FILES:  # note: report.json is the last, so whoever sees it sees its pictures
                if name in names:
                    (unfinished / name).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
        else:
            unfinished.rename(folder)
    return [folder / name for name in names]


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raises ValueError if no report can be written into `folder`: long before there is one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, must be a folder for the report")
    existing = [] if overwrite else [name for name in FILES if (folder / name).exists()]
    if existing:
        raise ValueError(f"{folder / existing[-1]}: exists, remove it, name another folder or use --overwrite")


def _write_into(report: Report, folder: Path) -> list[str]:
    if report.ratios is not None:
        mean, layers = report.mean_ratios, report.spec.layers
        assert mean is not None  # their mean
        plots.save(plots.lazy_ratio_bars(mean, layers, f"Lazy ratios of {report.model}", report.conditions), folder / BARS)
        title = f"Lazy ratios of {report.model} by sample"
        plots.save(plots.ratio_heat_map(report.ratios, layers, title, report.conditions), folder / HEAT_MAP)
    if loss_plots.pictures_of_loss(report):
        plots.save(loss_plots.loss_curve(report), folder / LOSS)
        plots.save(loss_plots.loss_strip(report), folder / LOSS_BY_LAYER)
    if report.caches is not None:
        plots.save(loss_over_memory(report, report.caches), folder / LOSS_OVER_MEMORY)
    (folder / SECTION).write_text(streaming_section(report), encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return [name for name in FILES if (folder / name).exists()]
