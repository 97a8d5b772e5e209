"""How long a step takes: fitted to the steps that were measured, so that chunks can be sized by it.

seconds = base + per_token * tokens + per_context * context, where `context` counts the cached
tokens that the step's sequences attend to. Least squares over the recent past.
"""

from __future__ import annotations

_MEMORY = 0.99
# Steps before the model is believed.
_MIN_STEPS = 8
# In squared units of the features: keeps the fit defined while all steps were alike.
_RIDGE = 1e-6


class StepTimeModel:
    """Recursive least squares with forgetting: sums are kept, and solved when asked."""

    def __init__(self) -> None:
        self._steps = 0
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """Take in one measured step."""
        self._steps += 1
        features = (1.0, float(tokens), float(context))
        for i, left in enumerate(features):
            self._targets[i] = _MEMORY * self._targets[i] + left * seconds
            row = self._products[i]
            for j, right in enumerate(features):
                row[j] = _MEMORY * row[j] + left * right

    def predict(self, tokens: int, context: int) -> float | None:
        """Seconds that a step would take; None while too few were seen."""
        if self._steps < _MIN_STEPS:
            return None
        base, per_token, per_context = self._solve()
        return base + per_token * tokens + per_context * context

    def tokens_within(self, seconds: float, context: int) -> int | None:
        """The most tokens that a step may have to end in time; None while it cannot be told."""
        if self._steps < _MIN_STEPS:
            return None
        base, per_token, per_context = self._solve()
        if per_token <= 0:
            return None
        return max(0, int((seconds - base - per_context * context) / per_token))

    def added(self, tokens: int) -> float | None:
        """Seconds by which so many tokens more make steps longer; None while it cannot be told.

        From below: what they attend to is left out.
        """
        return None if self._steps < _MIN_STEPS else self._solve()[1] * tokens

    def _solve(self) -> tuple[float, float, float]:
        """Gaussian elimination on the normal equations; a negative cost is none."""
        rows = [[*row, target] for row, target in zip(self._products, self._targets, strict=True)]
        for i in range(3):
            rows[i][i] += _RIDGE * (1.0 + rows[i][i])
        for i in range(3):
            for j in range(i + 1, 3):
                factor = rows[j][i] / rows[i][i]
                rows[j] = [b - factor * a for a, b in zip(rows[i], rows[j], strict=True)]
        solution = [0.0] * 3
        for i in (2, 1, 0):
            known = sum(rows[i][j] * solution[j] for j in range(i + 1, 3))
            solution[i] = (rows[i][3] - known) / rows[i][i]
        base, per_token, per_context = (max(0.0, value) for value in solution)
        return base, per_token, per_context
