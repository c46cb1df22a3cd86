"""Prodigy's scalars: one estimate of the distance to the solution, in float64."""

from __future__ import annotations

import dataclasses
import math
import sys

SMALLEST_SQUARE = 1e-30
"""What ||s||_2^2 counts as at least, in the inner-product estimate."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What holds d back.

    Attributes:
        growth_rate: Largest factor by which it may rise in a step.
        max_d: Its largest value.
        is_frozen: d and d_max stay as they are.
    """

    growth_rate: float
    max_d: float
    is_frozen: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """The scalars of one d, of the whole model or of a group, as prodigyopt's groups hold them.

    Attributes:
        d: The estimate.
        d_max: The largest one so far, before ``growth_rate`` and ``max_d``.
        d_numerator: The running numerator; 0 for the inner-product estimate.
        k: Steps so far.
    """

    d: float
    d_max: float
    d_numerator: float
    k: float

    def as_prodigy(
        self, change: float, s_norm: float, *, beta3: float, d_coef: float, d0: float, limits: Limits
    ) -> Estimate:
        """After a step: ``change`` is that of the numerator, ``s_norm`` is ||s||_1; at 0 d stays as it is.

        So it does where the sums overflowed, and the change does not count: a NaN in here would never leave.
        """
        if not math.isfinite(change) or not math.isfinite(s_norm):
            change = s_norm = 0.0
        d_numerator = self.d_numerator * beta3 + change
        after = dataclasses.replace(self, d_numerator=d_numerator, k=self.k + 1)
        if limits.is_frozen or s_norm == 0.0:
            return after
        d_hat = d_coef * d_numerator / s_norm
        grown_from = max(self.d, d_hat) if self.d == d0 else self.d
        d_max = max(self.d_max, d_hat)
        return dataclasses.replace(after, d=min(d_max, grown_from * limits.growth_rate, limits.max_d), d_max=d_max)

    def as_inner_product(self, product: float, s_square: float, *, limits: Limits) -> Estimate:
        """After a step: ``product`` is lr * <g, s> over all groups, ``s_square`` is ||s||_2^2.

        Where they overflowed d stays as it is.
        """
        after = dataclasses.replace(self, k=self.k + 1)
        if limits.is_frozen or not math.isfinite(product) or not math.isfinite(s_square):
            return after
        d_hat = self.d + abs(product) / (self.d * max(s_square, SMALLEST_SQUARE))
        d = _finite(min(d_hat, self.d * limits.growth_rate, limits.max_d))
        return dataclasses.replace(after, d=d, d_max=max(self.d_max, d))

    def written(self, changes: dict[str, float]) -> Estimate:
        """With what a person wrote. A d on its own is d_max too, and moves the numerator: the estimate goes on there.

        Otherwise the next d^ would be the old one, and d would jump back to it, or never leave it.
        """
        after = dataclasses.replace(self, **changes)
        if "d" in changes and "d_max" not in changes:
            after = dataclasses.replace(after, d_max=after.d)
        if "d" in changes and "d_numerator" not in changes:
            scaled = self.d_numerator / self.d * after.d
            after = dataclasses.replace(after, d_numerator=_finite(scaled))
        return after


def bias_correction(beta1: float, beta2: float, k: float) -> float:
    """sqrt(1 - beta2^(k+1)) / (1 - beta1^(k+1))."""
    return math.sqrt(1.0 - math.pow(beta2, k + 1)) / (1.0 - math.pow(beta1, k + 1))


def _finite(value: float) -> float:
    return min(max(value, -sys.float_info.max), sys.float_info.max)
