"""What state the server is in, from the engine's messages; decisions only, no sockets."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from octavo.wire import Failed, Load, Progress, Ready


class State(StrEnum):
    """The states that /octavo/load, the operator and the metrics all name alike."""

    STARTING = "Starting"
    READY = "Ready"
    DRAINING = "Draining"
    FAILED = "Failed"


class Lifecycle:
    """Folds messages into a state. `clock` is monotonic seconds."""

    def __init__(self, *, hung_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hung_after = hung_after
        self.state = State.STARTING
        self.progress = Progress(phase="import", ratio=0.0)
        self.engine: Ready | None = None
        self.failure: Failed | None = None
        self.load: Load | None = None
        self._text_ready = False
        self._seconds: dict[str, float] = {}
        self._phase_at = self._progress_at = clock()
        self._load_at = clock()
        self._alive_at = clock()
        self._in_flight = 0

    def on_begun(self, at: float) -> None:
        """The engine's process was started at `at`, before anybody could listen to it."""
        self._phase_at = at

    def on_progress(self, progress: Progress) -> None:
        """Note a step of the start; only a change counts against a stall."""
        if (progress.phase, progress.ratio) != (self.progress.phase, self.progress.ratio):
            self._progress_at = self._clock()
        if progress.phase != self.progress.phase:
            self._end_phase()
        self.progress = progress

    def _end_phase(self) -> None:
        now, phase = self._clock(), self.progress.phase
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._phase_at
        self._phase_at = now

    @property
    def start_seconds(self) -> dict[str, float]:
        """What the start has taken so far, by phase."""
        seconds = dict(self._seconds)
        if self.engine is None:
            phase = self.progress.phase
            seconds[phase] = seconds.get(phase, 0.0) + self._clock() - self._phase_at
        return {phase: round(taken, 3) for phase, taken in seconds.items()}

    def on_ready(self, engine: Ready) -> None:
        """The engine produced a real token."""
        self._end_phase()
        self.engine = engine
        self.progress = Progress(self.progress.phase, ratio=1.0, eta_s=0.0)
        self._progress_at = self._clock()
        self._maybe_ready()

    def on_text_ready(self) -> None:
        """The tokenizer is loaded."""
        self._text_ready = True
        self._maybe_ready()

    def _maybe_ready(self) -> None:
        if self.state is State.STARTING and self.engine is not None and self._text_ready:
            self._alive_at = self._clock()
            self.state = State.READY

    def on_failed(self, failure: Failed) -> None:
        """The engine or the model cannot serve; the first failure is the one to tell."""
        if self.failure is None:
            self.failure = failure
        self.state = State.FAILED

    def on_drain(self) -> None:
        """SIGTERM came."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING

    def on_load(self, load: Load) -> None:
        """Keep the scheduler's state; steps that move are the sign of life."""
        now = self._clock()
        idle = not self._in_flight and not load.running and not load.waiting
        if self.load is None or load.steps != self.load.steps or idle:
            self._alive_at = now
        self.load = load
        self._load_at = now

    def on_output(self) -> None:
        """A token came out."""
        self._alive_at = self._clock()

    def on_in_flight(self, count: int) -> None:
        """Note how many requests the engine holds; waiting for work is not hanging."""
        if self._in_flight == 0 and count > 0:
            self._alive_at = self._clock()
        self._in_flight = count

    @property
    def has_work(self) -> bool:
        """Whether the engine has something to do."""
        return self._in_flight > 0

    @property
    def hung(self) -> bool:
        """Work, and no step for too long."""
        return self.has_work and self._clock() - self._alive_at > self._hung_after

    @property
    def serving(self) -> bool:
        """Whether a new request may come in."""
        return self.state is State.READY and not self.hung

    def start_stalled_for(self) -> float:
        """Seconds since the start last made progress; 0 once it is over."""
        if self.engine is not None or self.state is not State.STARTING:
            return 0.0
        return self._clock() - self._progress_at

    def load_age(self) -> float:
        """Seconds since the engine last reported its load."""
        return self._clock() - self._load_at
