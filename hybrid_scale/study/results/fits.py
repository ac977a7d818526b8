"""Power laws of a positive quantity against model size: y = a N^-b, with an interval of b, and a refusal where it says nothing.

Least squares in logarithms over one value a size, as 2403.18684 and 2508.17400 fit theirs. A law has no offset: a
curve that falls towards a floor isn't one, however well a line fits its first half. So the first question is whether
the logarithms bend (a t test of the second-degree coefficient, n - 3 degrees of freedom), and only of those that
don't is an exponent stated. With a scatter of 2 % around the curve, seven sizes from 0.5B to 72B and a floor of a
tenth to a half of the first value, 80 to 98 % are refused; a true law is refused as often as BENDS says.
Knows no run and no metric.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

FEWEST_SIZES = 4
RESAMPLES = 9_999
WIDEST = 1.0
"""Widest interval of an exponent that is stated, in units of the exponent: [.27, .43] is .46 wide, [.03, 1.14] is 1.9."""

FARTHEST = 0.5
"""Largest relative error of the largest size, predicted from the smaller ones, with which a power law is believed at all."""


BENDS = 0.1
"""Largest p of the test of curvature with which a law is refused: a false refusal costs less than an exponent of no law."""


@dataclass(frozen=True)
class LeftOut:
    """One size predicted from the others."""

    size: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative to the measured value."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class PowerLaw:
    """y = `factor` * size^-`exponent`. Where there is a `refusal`, no exponent may be stated."""

    sizes: tuple[float, ...]
    values: tuple[float, ...]
    refusal: str = ""
    factor: float | None = None
    exponent: float | None = None
    low: float | None = None
    high: float | None = None
    """Bootstrap interval of the exponent."""
    bend: float | None = None
    """p of no curvature in logarithms; small where the values are no power law."""
    scatter: float | None = None
    """Standard deviation around the fitted law, relative to it."""
    left_out: tuple[LeftOut, ...] = ()

    def at(self, size: float) -> float:
        assert self.factor is not None
        assert self.exponent is not None
        return float(self.factor * size**-self.exponent)

    @property
    def prediction_error(self) -> float | None:
        """Median of the absolute relative errors when each size is predicted from the others."""
        return float(np.median([abs(each.error) for each in self.left_out])) if self.left_out else None

    @property
    def largest(self) -> LeftOut | None:
        """The largest size, predicted from the smaller ones: what an extrapolation is worth."""
        return max(self.left_out, key=lambda each: each.size, default=None)


def power_law(
    sizes: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PowerLaw:
    """Fit; whatever forbids a statement is in `refusal`, not an error. `sizes`: distinct, in any order."""
    order = np.argsort(sizes, kind="stable")
    size, value = np.asarray(sizes, np.float64)[order], np.asarray(values, np.float64)[order]
    facts = (tuple(map(float, size)), tuple(map(float, value)))
    if (value <= 0).any():
        at = float(size[value <= 0][0])
        return PowerLaw(*facts, f"the value at {at:.3g} parameters isn't above 0: no power law can be fitted")
    if len(size) < FEWEST_SIZES:
        return PowerLaw(*facts, f"{len(size)} sizes; an exponent needs at least {FEWEST_SIZES}")
    x, y = np.log(size), np.log(value)
    slope, intercept = _line(x, y)
    low, high = _bootstrap_t(x, y, level, resamples, seed)
    left_out = _left_out(size, value)
    curve, bend = curvature(x, y)
    scatter = float(np.sqrt(((y - intercept - slope * x) ** 2).sum() / (len(x) - 2)))
    law = PowerLaw(*facts, "", math.exp(intercept), -slope, -high, -low, bend, scatter, left_out)
    return replace(law, refusal=_no_law(curve, bend, left_out[-1]) or _no_exponent(law))


def curvature(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Second-degree coefficient of the least-squares parabola, and the two-sided p of none. Needs four points."""
    terms = np.vander(x - x.mean(), 3)
    inverse = np.linalg.pinv(terms)
    coefficients = inverse @ y
    left, freedom = y - terms @ coefficients, len(x) - 3
    error = math.sqrt(float(left @ left) / freedom * float(inverse[0] @ inverse[0]))
    bend, exact = float(coefficients[0]), 1e-12 * max(1.0, float(np.abs(y).max()))
    if abs(bend) * float(((x - x.mean()) ** 2).max()) <= exact:
        return bend, 1.0
    return bend, float(2 * stats.t.sf(abs(bend) / error, freedom)) if error else 0.0


def _no_law(curve: float, bend: float, largest: LeftOut) -> str:
    """Why the values follow no power law at all."""
    if bend <= BENDS:
        how = "flatten towards the large sizes" if curve > 0 else "fall faster and faster"
        return f"no power law: in logarithms the values {how} (p = {bend:.2g} of a straight line)"
    if abs(largest.error) > FARTHEST:
        return f"no power law: the largest size, predicted from the smaller ones, is missed by {largest.error:+.0%}"
    return ""


def _no_exponent(law: PowerLaw) -> str:
    """Why the values say too little of an exponent."""
    assert law.exponent is not None
    assert law.low is not None
    assert law.high is not None
    interval, width = f"its interval [{law.low:.2f}, {law.high:.2f}]", law.high - law.low
    about = f"{len(law.sizes)} sizes over a factor of {law.sizes[-1] / law.sizes[0]:.3g} with a scatter of {law.scatter:.1%}"
    if not math.isfinite(width):
        return f"the interval has no end: {about}"
    if law.low <= 0 <= law.high:
        return f"{interval} contains 0: no trend with size is shown"
    if width > WIDEST * abs(law.exponent):
        return f"{interval} is wider than the exponent itself ({law.exponent:.2f}): {about}"
    return ""


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    return slope, float(y.mean() - slope * x.mean())


def _bootstrap_t(x: np.ndarray, y: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """Interval of the slope by the studentised residual bootstrap (Efron & Tibshirani 1993, section 12.5).

    Residuals are freed of their leverage and centred. Sizes scatter around the line by chance of questions and of training and
    because the law is only nearly true; all three are in the residuals. Errors that all sizes share move the factor alone. With
    few points some resamples fit exactly: their t is infinite, and with too many of them so is the interval.
    """
    slope, intercept = _line(x, y)
    centred = x - x.mean()
    spread, freedom = float(centred @ centred), len(x) - 2
    residual = y - intercept - slope * x
    if np.abs(residual).max() <= 1e-12 * max(1.0, np.abs(y).max()):
        return slope, slope
    free = residual / np.sqrt(1 - 1 / len(x) - centred**2 / spread)
    free -= free.mean()
    drawn = free[np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))]
    moved = drawn @ centred / spread
    left = drawn - drawn.mean(1, keepdims=True) - moved[:, None] * centred
    errors = np.sqrt((left**2).sum(1) / freedom / spread)
    exact = errors <= 1e-9 * np.abs(free).max() / math.sqrt(spread)
    t = np.where(exact, np.where(moved > 0, np.inf, -np.inf), moved / np.where(exact, 1.0, errors))
    t[exact & (np.abs(moved) <= 1e-12)] = 0.0
    error = math.sqrt(float(residual @ residual) / freedom / spread)
    below, above = np.sort(t)[[_place(resamples, (1 - level) / 2), _place(resamples, (1 + level) / 2)]]
    return float(slope - above * error), float(slope - below * error)


def _place(count: int, share: float) -> int:
    return min(count - 1, round(share * (count - 1)))


def _left_out(size: np.ndarray, value: np.ndarray) -> tuple[LeftOut, ...]:
    found = []
    for n in range(len(size)):
        others = np.arange(len(size)) != n
        slope, intercept = _line(np.log(size[others]), np.log(value[others]))
        found.append(LeftOut(float(size[n]), float(value[n]), float(math.exp(intercept) * size[n] ** slope)))
    return tuple(found)
