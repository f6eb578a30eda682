"""The student in service: one model file on one engine, loaded, warmed and checked before the first scan.

The order at start is: read the file and its card; choose the engine and the precision; state the memory and refuse what
does not fit; compile and warm every bucket; reproduce the golden case. Only then is the student ready.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from daemon.card import Card, CardError, Golden, ModelFile, read_model
from daemon.engines import (
    OUTPUTS,
    PRECISIONS,
    Bucket,
    Engine,
    EngineError,
    EngineFacts,
    EngineMissing,
    MemoryShort,
    PrecisionRefused,
    available_memory_bytes,
    gpu_free_bytes,
    memory_needed_bytes,
    open_engine,
    tensorrt_folder,
)
from daemon.golden import decode_volume, golden_sha256, largest_difference
from daemon.judge import judge
from daemon.prepare import Prepared, prepare
from daemon.score import Reduced, Scores, raw_scores, reduce_maps, score_reduced
from daemon.tiles import CUTS, TiledEngine, tile_shape
from daemon.words import ARTEFACTS, Maps, Refusal

AUTO = "auto"
GPU = ("tensorrt", "cuda")

StudentError = EngineError
"""What `Student.open` raises beside `CardError`: an engine that cannot be used as asked."""


class GoldenMismatch(EngineError):
    """The golden case came out differently: this engine at this precision does not compute this model."""


@dataclass(frozen=True)
class Skipped:
    """An engine that `auto` passed over, and why; from a GPU to the CPU this must be loud.

    Attributes:
        engine: its name.
        reason: one line with the remedy.
    """

    engine: str
    reason: str


def _silent(_: str) -> None:
    """Say nothing."""


class Student:
    """A loaded, warmed and checked model."""

    def __init__(self, model: ModelFile, engine: Engine, skipped: tuple[Skipped, ...] = ()) -> None:
        """Hold a model and the engine that runs it; `Student.open` makes both."""
        self._model, self._engine, self.skipped = model, engine, skipped

    @classmethod
    def open(
        cls,
        path: Path,
        engine: str = AUTO,
        precision: str = "",
        *,
        threads: int = 0,
        cache: Path | None = None,
        memory_limit_bytes: int | None = None,
        say: Callable[[str], None] = _silent,
    ) -> Student:
        """Open a model file and make it ready.

        Args:
            path: the `.onnx` file.
            engine: `auto` or one of `PRECISIONS`.
            precision: empty takes the fastest that parity admitted for the engine, else fp32.
            threads: of engines on the CPU; 0 takes the cores this process may use.
            cache: folder under which TensorRT engines were built ahead; None takes `default_cache`.
            memory_limit_bytes: refuse what needs more; None takes what the machine (or control group) has free.
            say: told what happens, one line each.

        Raises:
            CardError: the file cannot be served.
            EngineError: the engine cannot be used as asked, a bucket does not fit, or the golden case failed.
        """
        model = read_model(path)
        student = cls(model, *choose_engine(model, engine, precision, threads, cache or default_cache()))
        for skipped in student.skipped:
            say(f"engine {skipped.engine} passed over: {skipped.reason}")
        student.load_all(memory_limit_bytes, say)
        for note in student.notes:
            say(note)
        worst = student.check_golden()
        say(
            f"golden case reproduced on {student.facts.runtime} in {student.facts.precision} (largest difference {worst:.2e})"
        )
        return student

    @property
    def card(self) -> Card:
        """The contract of the model."""
        return self._model.card

    @property
    def sha256(self) -> str:
        """Hash of the model file."""
        return self._model.sha256

    @property
    def facts(self) -> EngineFacts:
        """What runs the model."""
        return self._engine.facts

    @property
    def notes(self) -> tuple[str, ...]:
        """What an operator should know of the engine."""
        return tuple(self._engine.notes)

    def describe(self) -> dict[str, str]:
        """The `engine` object of a result: provider, runtime, precision, device, and tiles where there are several."""
        return {key: str(value) for key, value in asdict(self.facts).items() if key != "tiles" or value > 1}

    def load_all(self, memory_limit_bytes: int | None = None, say: Callable[[str], None] = _silent) -> None:
        """Load every bucket, whole where that fits the memory, else in as few tiles as fit.

        Raises:
            MemoryShort: a bucket does not fit even in tiles.
            EngineError: the engine failed.
        """
        whole, shortage = self._engine, None
        for axes in ((), *CUTS):
            self._engine = TiledEngine(whole, axes) if axes else whole
            try:
                for bucket in self.card.buckets:
                    self.load(bucket, memory_limit_bytes, say)
            except MemoryShort as error:
                shortage = shortage or error
                continue
            if axes:
                say(f"memory is short: every head runs in {self.facts.tiles} tiles, slower and only nearly the same")
            return
        assert shortage is not None
        raise shortage

    def load(self, bucket: Bucket, memory_limit_bytes: int | None = None, say: Callable[[str], None] = _silent) -> None:
        """State the memory, compile one bucket and run it once.

        Raises:
            MemoryShort: the bucket does not fit.
            EngineError: the engine failed.
        """
        facts = self.facts
        need = self._need_bytes(bucket)
        free = memory_limit_bytes or (gpu_free_bytes() if facts.provider in GPU else available_memory_bytes())
        tiles = f" in {facts.tiles} tiles" if facts.tiles > 1 else ""
        room = "free memory not known" if free is None else f"{free / 2**20:.0f} MiB free"
        say(f"bucket {_text(bucket)}{tiles}: about {need / 2**20:.0f} MiB on {facts.runtime}, {room}")
        if free is not None and need > free:
            raise MemoryShort(
                f"bucket {_text(bucket)} needs about {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
                "free memory, raise the limit, or serve a model with a smaller bucket"
            )
        self._engine.load(bucket)
        self._engine.run(np.zeros(bucket, dtype=np.float32))

    def _need_bytes(self, bucket: Bucket) -> int:
        facts, engine = self.facts, self._engine
        if isinstance(engine, TiledEngine):
            whole_maps = int(np.prod(bucket)) * 4 * len(OUTPUTS + ARTEFACTS[1:])
            shape = tile_shape(bucket, engine.axes)
            return whole_maps + memory_needed_bytes(self._model, shape, facts.provider, facts.precision)
        return memory_needed_bytes(self._model, bucket, facts.provider, facts.precision)

    def run(self, prepared: Prepared) -> Maps:
        """The maps of one prepared volume, owned by the caller.

        Raises:
            EngineError: the engine failed, or no bucket of this shape is loaded.
        """
        out = self._engine.run(np.ascontiguousarray(prepared.image))
        return Maps(
            gm_probability=out["gm_probability"][0].copy(),
            task_variance=out["task_variance"][0].copy(),
            artefact_variance=out["artefact_variance"].copy(),
        )

    def reduce(self, prepared: Prepared) -> Reduced:
        """The sums of the maps of one prepared volume, taken where the maps are; no map is copied.

        Raises:
            EngineError: as `run`.
        """
        image = np.ascontiguousarray(prepared.image)
        calibration = self.card.calibration
        level = float("inf") if calibration is None else calibration.affected_variance
        masks = np.stack([prepared.native_mask, prepared.head_mask]).astype(np.float32)
        sums = self._engine.reduce(image, masks, level)
        if sums is not None:
            return Reduced.from_sums(sums)
        out = self._engine.run(image)
        maps = Maps(out["gm_probability"][0], out["task_variance"][0], out["artefact_variance"])
        return reduce_maps(maps, prepared, level)

    def score(self, prepared: Prepared) -> Scores:
        """The scores of one prepared volume, when nobody wants its maps.

        Raises:
            EngineError: as `run`.
        """
        return score_reduced(self.reduce(prepared), prepared, self.card)

    def check_golden(self) -> float:
        """Reproduce the golden case.

        Returns:
            The largest relative difference of a score.

        Raises:
            CardError: the file has none, or it is not the one its card describes.
            GoldenMismatch: a score or the verdict came out differently.
        """
        golden = self.card.golden
        if golden is None or not self._model.golden:
            raise CardError(f"{self.card.name}: no golden case inside; export the model again")
        if golden_sha256(self._model.golden) != golden.sha256:
            raise CardError(f"{self.card.name}: the golden case was altered; copy or export the file again")
        try:
            scores, verdict = golden_outcome(self, self._model.golden)
        except (Refusal, ValueError) as error:
            raise GoldenMismatch(
                f"golden case: cannot be scored on {self.facts.runtime} ({error}); choose another engine"
            ) from error
        worst = largest_difference(golden, scores)
        if not worst.relative <= golden.tolerance or verdict != golden.verdict:
            raise GoldenMismatch(_mismatch(self.facts, golden, worst.name, worst.expected, worst.got, verdict))
        return worst.relative


def choose_engine(
    model: ModelFile, engine: str, precision: str, threads: int, cache: Path
) -> tuple[Engine, tuple[Skipped, ...]]:
    """Open the engine asked for, or for `auto` the best one that is there.

    Raises:
        EngineError: the engine asked for cannot be used, or `auto` found none.
    """
    if engine != AUTO:
        return _open_admitted(model, engine, precision, threads, cache), ()
    skipped: list[Skipped] = []
    for name in PRECISIONS:
        try:
            if name == "tensorrt" and not tensorrt_folder(cache, model.sha256).is_dir():
                raise EngineMissing("no engine was built ahead; run `rescan-export tensorrt`")
            return _open_admitted(model, name, precision, threads, cache), tuple(skipped)
        except EngineError as error:
            skipped.append(Skipped(name, str(error)))
    raise EngineMissing("engine auto: none can be used: " + "; ".join(f"{s.engine}: {s.reason}" for s in skipped))


def _open_admitted(model: ModelFile, engine: str, precision: str, threads: int, cache: Path) -> Engine:
    """Open an engine at the precision asked for, else at the fastest admitted one that this machine has."""
    choices = admitted_precisions(model.card, engine, precision)
    for choice in choices[:-1]:
        try:
            return open_engine(model, engine, choice, threads, cache)
        except PrecisionRefused:
            continue
    return open_engine(model, engine, choices[-1], threads, cache)


def default_cache() -> Path:
    """Where TensorRT engines are kept: `$XDG_CACHE_HOME/rescan/tensorrt`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rescan" / "tensorrt"


def admitted_precisions(card: Card, engine: str, precision: str) -> tuple[str, ...]:
    """The precisions that may be used, fastest first: the one asked for alone, if parity admitted it.

    fp32 needs no admission: it is what the golden case and the calibration were computed in.

    Raises:
        PrecisionRefused: parity has not admitted it for this model on this engine.
    """
    admitted = ("fp32", *card.precisions.get(engine, ()))
    if not precision:
        return admitted[::-1]
    if precision in admitted or precision not in PRECISIONS.get(engine, ()):
        return (precision,)  # one that the engine does not have is refused where the engine is opened
    raise PrecisionRefused(
        f"precision: {precision} on {engine} is not admitted for this model (admitted: {', '.join(admitted)}); "
        "set one of these, or check it with `rescan-export parity --admit`"
    )


def golden_outcome(student: Student, packed: str) -> tuple[dict[str, float], str | None]:
    """Scores and verdict of a packed golden case, through the same steps as a scan.

    Returns:
        Raw scores and the flat ones, and the verdict with the card's own rule (None without a calibration).
    """
    prepared = prepare(decode_volume(packed))
    reduced = student.reduce(prepared)
    scores = score_reduced(reduced, prepared, student.card)
    values = raw_scores(reduced) | scores.flat()
    verdict = None if student.card.calibration is None else judge(scores, student.card).verdict.value
    return values, verdict


def _mismatch(
    facts: EngineFacts,
    golden: Golden,
    name: str,
    expected: float,
    got: float,
    verdict: str | None,
) -> str:
    return (
        f"golden case: {name} is {got:.6g}, expected {expected:.6g} within {100 * golden.tolerance:g} %, verdict {verdict}, "
        f"expected {golden.verdict} ({facts.runtime}, {facts.precision}); set precision fp32 or another engine, or export again"
    )


def _text(bucket: Bucket) -> str:
    return "x".join(str(n) for n in bucket)
