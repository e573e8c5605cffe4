"""Converts a Hugging Face checkpoint to a hybrid GGUF file: finds the lazy layers, converts, quantizes, reports.

Upstream's converter does the converting (`upstream`), llama-quantize the quantizing (`quantization`). The files grow
in a hidden folder beside their destination and are moved only when they are complete, so whatever ends the conversion, under
the final name there is either a finished file or nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lt_gguf import calibration
from lt_gguf.calibration import Calibration, Texts
from lt_gguf.checkpoint import resolver
from lt_gguf.checkpoint.folder import CARD, check_weights, license_of, read_config
from lt_gguf.conversion import naming, quantization
from lt_gguf.conversion.options import Options
from lt_gguf.conversion.running import flag_converted, open_converted
from lt_gguf.conversion.upstream import ConversionError, Plan, UpstreamConverter
from lt_gguf.gguf.file import GGUFModel
from lt_gguf.memory.budget import smallest_number
from lt_gguf.memory.sizes import format_bytes
from lt_gguf.models import hub
from lt_gguf.report import plots
from lt_gguf.report.folder import check_destination, write_report
from lt_gguf.report.model_card import kv_rows, model_card
from lt_gguf.report.report import Report
from lt_gguf.runtime.supervised import hidden_folder
from lt_gguf.selection import Model, Request, Selection
from lt_gguf.selection.base import LONGEST_COMPARED
from lt_gguf.selection.evidence import Candidates
from lt_gguf.selection.trained import Trained
from lt_gguf.selection.within_budget import select_within
from lt_gguf.spec import CacheRecommendation, Provenance, StreamingSpec
from lt_gguf.spec.in_config import read_spec

__all__ = ["ConversionError", "Converted", "Progress", "convert"]

Progress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much (0: unknown)


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote; in a dry run, what it would write.

    Args:
        files: the GGUF files (several if the model is split).
        plan: the model, and its files as they are before quantization.
        selection: the layers that stream and why; `None` in a dry run if they would have to be measured.
        spec: what the files say; `None` as `selection`.
        report_folder: where the report and the model card are, if there are any.
        recommended: what the files recommend for the KV cache, `None`: nothing.
    """

    files: tuple[Path, ...]
    plan: Plan
    selection: Selection | None = None
    spec: StreamingSpec | None = None
    report_folder: Path | None = None
    recommended: CacheRecommendation | None = None


def convert(
    model: str | os.PathLike[str],
    outfile: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = lambda what, done, total: None,
    **options: Any,
) -> Converted:
    """Writes a checkpoint as a GGUF file whose metadata says which layers stream.

    Args:
        model: folder of a Hugging Face checkpoint, or its id on the hub.
        outfile: file to write, `{ftype}` in its name stands for the type of the weights; or a folder, in which upstream
            names the file. Else the checkpoint's own folder, of a model on the hub the current one.
        progress: is called with what is being done, and how much of it is done.
        options: fields of `Options`, as in `convert(folder, select="interleave-odd", quantize="Q4_K_M")`.

    Raises:
        ValueError: a wrong argument, or a checkpoint that can't be converted (`ConversionError`).
        OSError: a file can't be read or written, or the hub can't be reached.
        ImportError: what upstream's converter or the measurement needs isn't installed.
    """
    return _Conversion(os.fspath(model), outfile, Options(**options), progress).run()


@dataclass(frozen=True)
class _Measured:
    ratios: np.ndarray  # float64 (samples, layers), NaN where a layer wasn't measured
    calibration: Calibration


class _Conversion:
    """One conversion: what is known from the start, and its steps."""

    _texts: Texts  # once something is to be measured

    def __init__(self, model: str, outfile: str | os.PathLike[str] | None, options: Options, progress: Progress) -> None:
        options.check()
        self.name, self.options, self.progress = model, options, progress
        self.strategy = options.strategy
        self.type_name = None if options.quantize is None else quantization.check(options.quantize, options.imatrix)
        self.hub_id = model if hub.is_hub_id(model) else None
        if options.remote and self.hub_id is None:
            raise ValueError(f"{model}: must be a hub id such as ORGANISATION/NAME, for --remote")
        if self.hub_id is None:  # before a name is looked for in it
            resolver.resolve(model)
        self.folder, self.file_name = self._destination(Path() if self.hub_id else Path(model), outfile)
        self.checkpoint = resolver.resolve(model, options.remote, options.mistral_format)
        self.config = read_config(model, self.checkpoint, options.mistral_format)
        self.strategy = options.strategy_for(self.config)
        if not options.remote:
            check_weights(model, self.checkpoint, options.mistral_format)

    def run(self) -> Converted:
        measured = None
        if self.strategy.measures and not self.options.dry_run:
            self._prepare_measuring()
            measured = self._measure() if self.strategy.needs_ratios else None
        with hidden_folder(self.folder, ".converting-") as hidden:
            with self._start_upstream(hidden) as upstream:
                plan = upstream.plan()
                names = self._check_plan(plan)
                files = tuple(self.folder / name for name in names)
                recommended = self._recommended(plan.model)
                if self.strategy.measures and self.options.dry_run:
                    return Converted(files, plan, recommended=recommended)
                if self.strategy.measures_hybrid:
                    self._check_measurable(plan.model)
                    metadata = {}
                else:
                    result = self._choose(plan.model, measured)
                    if self.options.dry_run:
                        return Converted(files, plan, result.selection, result.spec, recommended=recommended)
                    metadata = result.spec.to_metadata(plan.model.architecture) | self._provenance(result).to_metadata()
                    metadata |= {} if recommended is None else recommended.to_metadata(plan.model.architecture)
                upstream.write(metadata, partial(self.progress, "Converting"))
            finished = hidden / "converted"
            if self.strategy.measures_hybrid:
                first = finished / plan.files[0].name
                result = self._choose_by_running(first, plan.model, measured)
                with self._named_errors():
                    copying = partial(self.progress, "Copying")
                    finished = flag_converted(first, result.spec, self._provenance(result), recommended, copying)
            if self.type_name is not None:
                finished = self._quantize(finished, plan, names)
            # note: the first one last, without it the others are no model
            for name in reversed(names):
                (finished / name).replace(self.folder / name)
        folder = self._report_folder(self.folder, names[0])
        if folder is not None:
            self._write_report(folder, result, files, plan.model)
        return Converted(files, plan, result.selection, result.spec, folder, recommended)

    def _prepare_measuring(self) -> None:
        """Reads the calibration texts, and raises what is wrong whatever the model is."""
        if (length := self.options.calibration_length) is not None:
            calibration.check_length(length, self.options.sink, self.options.window)
        self._texts = calibration.read_texts(self.options.calibration, self.options.calibration_field)

    def _measure(self) -> _Measured:
        """Measures lazy ratios, after all that can be checked before is."""
        try:
            from lt_gguf.checkpoint import checks
            from lt_gguf.hf import analysis
        except ImportError as error:
            raise ImportError(f"to measure lazy ratios, {error.name} is needed: pip install 'lt-gguf[convert]'") from None

        options = self.options
        if not options.no_report:
            plots.check()
        config = checks.read_config(self.checkpoint)
        analysis.choose_dtype(options.dtype, config, analysis.choose_device(options.device))
        with hidden_folder(self.folder, ".converting-") as hidden, self._start_upstream(hidden) as upstream:
            plan = upstream.plan()
        self._check_plan(plan)
        self._recommended(plan.model)
        self._check_measurable(plan.model)
        length = self._length(plan.model)
        tokenize, first = analysis.load_tokenizer(self.checkpoint)
        samples = calibration.cut_samples(self._texts, tokenize, first, options.samples, length)
        ratios = analysis.measure(
            self.checkpoint,
            samples,
            sink=options.sink,
            window=options.window,
            w_last=options.w_last,
            device=options.device,
            dtype=options.dtype,
            progress=lambda what, done, total: self.progress(f"Measuring {what}", done, total),
        )
        return _Measured(ratios, Calibration(self._texts.name, self._texts.sha256, options.samples, length))

    def _check_measurable(self, model: GGUFModel) -> None:
        """Raises now what would be wrong when everything has been measured."""
        with self._named_errors():
            model.check_can_stream()
        self._check_budget(model)
        self._length(model)

    def _length(self, model: GGUFModel) -> int:
        """Tokens of a calibration prompt. Raises ValueError if they are too few."""
        most = model.n_ctx_train or calibration.DEFAULT_LENGTH
        length = self.options.calibration_length or min(calibration.DEFAULT_LENGTH, most)
        calibration.check_length(length, self.options.sink, max(self.options.window, *self.options.windows, 0))
        return length

    def _start_upstream(self, hidden: Path) -> UpstreamConverter:
        """Upstream's converter, on its way to write into the folder `converted` in `hidden`."""
        self.progress("Reading the checkpoint", 0, 0)
        converted = hidden / "converted"
        converted.mkdir()
        checkpoint = os.path.abspath(self.checkpoint)
        if self.options.remote:
            checkpoint = self.name
        elif self.hub_id is not None:
            # note: upstream takes the model's name from its folder's, which in the cache is the hash of a commit
            link = hidden / self.hub_id.split("/")[1]
            link.symlink_to(self.checkpoint.resolve())
            checkpoint = str(link)
        arguments = [checkpoint, "--outfile", str(converted / self.file_name), *self.options.upstream_arguments()]
        return UpstreamConverter(self.name, arguments, hidden, self.options.verbose, self.options.trust_remote_code)

    def _check_plan(self, plan: Plan) -> list[str]:
        """The names of the files to write. Raises OSError or ValueError if something is in the way of a file or the report."""
        # note: where upstream chose the name, it says the type of the weights
        names = [file.name for file in plan.files]
        if self.type_name is not None and not self.file_name:
            names = [naming.with_type(name, self.type_name) for name in names]
        for name in names:
            self._check_absent(self.folder / name)
        self._check_report(self.folder, names[0])
        needed = plan.n_bytes
        if self.strategy.measures_hybrid:
            needed += plan.n_bytes  # it is converted, measured, and copied with its streaming layers
        if self.type_name is not None:
            bytes_each = 4 if self.options.outtype == "f32" else 2
            needed += quantization.least_bytes(self.type_name, plan.n_bytes // bytes_each)
        free = shutil.disk_usage(self.folder).free
        if needed > free and not self.options.dry_run:
            raise OSError(f"{self.folder}: has {format_bytes(free)} free, needs at least {format_bytes(needed)} for {names[0]}")
        return names

    def _check_can_stream(self, model: GGUFModel, spec: StreamingSpec) -> None:
        with self._named_errors():
            model.check_can_stream(spec)

    def _recommended(self, model: GGUFModel) -> CacheRecommendation | None:
        """What the files are to recommend for the cache. Raises ConversionError: the model can't have such a cache."""
        with self._named_errors():
            found = self.options.recommended(model.n_layer, model.n_layer_main)
            model.check_recommended(found)
            return found

    def _check_budget(self, model: GGUFModel) -> None:
        """Refuses a budget that no number of layers keeps, before anything is measured."""
        options = self.options
        if options.budget is None or options.ctx is None:
            return
        with self._named_errors():
            smallest_number(
                model.kv_shape,
                options.budget,
                options.ctx,
                n_embd=model.n_embd,
                may_stream=model.may_stream,
                sink=options.sink,
                window=options.window,
                prefill=options.prefill,
                cache_type=options.kv_cache_type,
                cache_keep=options.kept_layers(model.n_layer_main),
            )

    def _choose(self, model: GGUFModel, measured: _Measured | None, candidates: Candidates | None = None) -> Report:
        selection = self._select(model, measured, candidates)
        spec = selection.spec(model.n_layer, self.options.prefill)
        self._check_can_stream(model, spec)
        if recommended := self._recommended(model):
            with self._named_errors():
                recommended.check(spec)
        return self._report(model, spec, selection, measured)

    def _choose_by_running(self, file: Path, model: GGUFModel, measured: _Measured | None) -> Report:
        """Chooses by what is measured on the converted file."""
        settings = self.options, self._texts, self._length(model), self.progress
        with self._named_errors(), open_converted(file, model.n_layer, *settings) as candidates:
            return self._choose(model, measured, candidates)

    def _select(self, model: GGUFModel, measured: _Measured | None, candidates: Candidates | None) -> Selection:
        options = self.options
        name = self.hub_id or self.checkpoint.resolve().name
        with self._named_errors():
            request = Request(
                Model(model.architecture, name, model.n_layer, model.n_layer_main, self.config, model.may_stream),
                fraction=options.fraction,
                max_loss=options.tolerated_loss,
                max_kl=options.max_kl,
                ratios=None if measured is None else measured.ratios,
                layers=options.layers,
                threshold=options.threshold,
                sink=options.sink,
                window=options.window,
                windows=options.windows,
                n_ctx=options.ctx or min(model.n_ctx_train or LONGEST_COMPARED, LONGEST_COMPARED),
                candidates=candidates,
            )
            if options.budget is None or options.ctx is None:
                return self.strategy.select(request)
            model.check_can_stream()
            return select_within(
                self.strategy,
                request,
                model.kv_shape,
                options.budget,
                options.ctx,
                n_embd=model.n_embd,
                prefill=options.prefill,
                cache_type=options.kv_cache_type,
                cache_keep=options.kept_layers(model.n_layer_main),
            )

    def _quantize(self, converted: Path, plan: Plan, names: list[str]) -> Path:
        """Quantizes what was converted; returns the folder of the quantized files."""
        assert self.type_name is not None
        quantized = converted.with_name("quantized")
        quantized.mkdir()
        with self._named_errors():
            quantization.quantize(
                converted / plan.files[0].name,
                quantized / (naming.whole(names[0]) if len(names) > 1 else names[0]),
                self.type_name,
                imatrix=self.options.imatrix,
                is_split=len(names) > 1,
                progress=lambda done, total: self.progress("Quantizing", done, total),
            )
        return quantized

    def _report(self, model: GGUFModel, spec: StreamingSpec, selection: Selection, measured: _Measured | None) -> Report:
        return Report(
            self.hub_id or self.checkpoint.resolve().name,
            model.architecture,
            spec,
            selection,
            self.strategy.share(self.options.fraction) if self.options.budget is None else None,
            *((None, None, None) if measured is None else self._as_reported(measured)),
        )

    def _provenance(self, result: Report) -> Provenance:
        """How the layers were chosen: as the report says, or as the config of a checkpoint that was trained to stream does."""
        found = read_spec(self.config, result.spec.n_layer) if isinstance(self.strategy, Trained) else None
        return result.provenance if found is None else found[1]

    def _as_reported(self, measured: _Measured) -> tuple[int, tuple[tuple[float, ...], ...], Calibration]:
        return self.options.w_last, tuple(map(tuple, measured.ratios.tolist())), measured.calibration

    def _report_folder(self, beside: Path, first_file: str) -> Path | None:
        """Where the report of a file in the folder `beside` goes; `None` if there is to be none."""
        if self.options.report is not None:
            return self.options.report
        if self.options.no_report or not self.strategy.measures:
            return None
        return beside / f"{naming.whole(first_file).removesuffix('.gguf')}-report"

    def _write_report(self, folder: Path, result: Report, files: tuple[Path, ...], model: GGUFModel) -> None:
        self.progress("Writing the report", 0, 0)
        write_report(result, folder, self.options.overwrite)
        said = str(self.config.get("_name_or_path", ""))
        base_model = self.hub_id or (said if hub.is_hub_id(said) else self.checkpoint.resolve().name)
        recommended = self._recommended(model)
        rows = kv_rows(model.kv_shape, result.spec, recommended=recommended) if model.why_not_streaming is None else ()
        card = model_card(result, files, base_model, license_of(self.checkpoint), rows, recommended=recommended)
        unfinished = folder / f".{CARD}.{os.getpid()}"
        try:
            unfinished.write_text(card, encoding="utf-8")
            unfinished.replace(folder / CARD)
        finally:
            unfinished.unlink(missing_ok=True)

    def _destination(self, default: Path, outfile: str | os.PathLike[str] | None) -> tuple[Path, str]:
        """The folder to write into, and the file's name in it, empty if upstream is to name it."""
        outfile = default if outfile is None else Path(outfile)
        if outfile.is_dir():
            return outfile, ""
        if not outfile.parent.is_dir():
            raise ValueError(f"{outfile}: the folder {outfile.parent} doesn't exist")
        # note: before quantization upstream knows only the type that it is quantized from
        name = outfile.name if self.type_name is None else naming.fill(outfile.name, self.type_name)
        if not self.options.is_split and not re.search(r"[{}]", name):
            self._check_absent(outfile.parent / name)
            self._check_report(outfile.parent, name)
        return outfile.parent, name

    def _check_absent(self, file: Path) -> None:
        if file.exists() and not self.options.overwrite:
            raise FileExistsError(f"{file}: exists, remove it or use --overwrite")

    def _check_report(self, beside: Path, first_file: str) -> None:
        folder = self._report_folder(beside, first_file)
        if folder is not None:
            check_destination(folder, self.options.overwrite)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Puts the checkpoint's name before what is wrong with it."""
        try:
            yield
        except ConversionError:
            raise
        except ValueError as error:
            raise ConversionError(f"{self.name}: {error}") from None
