"""Learning rates tuned for each arm: the fit over the logarithm of the rate, and what to confirm.

A first stage of a study (`study.tune`) trains every arm at five rates or more, with seeds of its
own, and reads validation A. A polynomial in x = log2(rate) is fitted to each arm's losses at the
five rates nearest its lowest: a quadratic, or a cubic where an F test over all arms wants one. The
noise variance is pooled over arms, and seeds have effects of their own. The interval of the optimum
holds every x at which a slope of zero is not rejected (Fieller's argument, which needs no linear
approximation of a ratio). An optimum at the edge of what was tried is no optimum: it is a problem,
and the second stage does not begin. No torch here: the report draws these fits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats takes a second to import

Array = NDArray[np.float64]
NAN = float("nan")

WINDOW = 5  # rates that a fit uses, nearest the lowest
LEAST = 4  # rates with a finite loss that a fit needs
LEVEL = 0.95


class Run(NamedTuple):
    """One run of the first stage; a loss that is not finite: it diverged."""

    arm: str
    rate: float
    seed: int
    loss: float


@dataclass(frozen=True)
class RateFit:
    """One arm's loss over the learning rate.

    coefficients: of 1, x, x^2, ... with x = log2(rate), valid in `window`; empty without a fit.
    optimum, low, high: rates; the interval ends at the window where it is open there (`open`).
    chosen: the rate to confirm: the optimum, or where the smooth model over arms puts it, to three
    digits. minus, plus: loss half an octave below and above `chosen`, less that at `chosen`, and
    minus_half, plus_half: half of their 95% intervals. problem: why there is no optimum.
    """

    arm: str
    coefficients: tuple[float, ...] = ()
    window: tuple[float, float] = (NAN, NAN)
    optimum: float = NAN
    low: float = NAN
    high: float = NAN
    open: bool = False
    chosen: float = NAN
    minus: float = NAN
    minus_half: float = NAN
    plus: float = NAN
    plus_half: float = NAN
    problem: str | None = None

    def loss(self, rate: float) -> float:
        x = math.log2(rate)
        return float(sum(c * x**k for k, c in enumerate(self.coefficients)))


@dataclass(frozen=True)
class Tuning:
    """The fits of all arms. sigma, df: pooled noise. degree: of the polynomials. smooth_p: that the
    optima scatter about the smooth model by noise alone; NaN without one."""

    fits: tuple[RateFit, ...]
    sigma: float
    df: int
    degree: int
    smooth: str
    smooth_p: float = NAN

    @property
    def problems(self) -> list[str]:
        return [f"arm '{f.arm}': {f.problem}" for f in self.fits if f.problem]

    def rates(self) -> dict[str, float]:
        return {f.arm: f.chosen for f in self.fits}

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Tuning:
        """Back from `plain`, or from JSON, where NaN is null."""

        def number(value: Any) -> Any:
            return NAN if value is None else tuple(value) if isinstance(value, list) else value

        keep = ("arm", "problem")
        fits = tuple(
            RateFit(**{k: v if k in keep else number(v) for k, v in fit.items()})
            for fit in plain["fits"]
        )
        rest = {k: number(v) for k, v in plain.items() if k != "fits"}
        return cls(fits=fits, **rest)


def grid(centre: float, points: int, octaves: float) -> list[float]:
    """Rates around a centre, which is one of them; an even number has one more below it."""
    return [centre * 2 ** (octaves * (k - points // 2)) for k in range(points)]


def tune(
    runs: Iterable[Run], *, smooth: str = "none", places: Mapping[str, float] | None = None
) -> Tuning:
    """Fit every arm. `places`: the swept factor of each arm, for `smooth` 'linear', 'quadratic'."""
    runs = list(runs)
    arms = list(dict.fromkeys(run.arm for run in runs))
    problems: dict[str, str] = {}
    used: list[Run] = []
    windows: dict[str, tuple[float, float]] = {}
    for arm in arms:
        own = [run for run in runs if run.arm == arm]
        found = _window(own)
        if isinstance(found, str):
            problems[arm] = found
            continue
        windows[arm] = (min(found), max(found))
        used += [run for run in own if run.rate in found and math.isfinite(run.loss)]
    model = _model(used, list(windows)) if windows else None
    fits = [
        RateFit(arm, problem=problems[arm])
        if model is None or arm in problems
        else _optimum(arm, model, windows[arm])
        for arm in arms
    ]
    smooth_p = NAN
    if smooth != "none" and model is not None and not any(f.problem for f in fits):
        fits, smooth_p = _smoothed(fits, model, smooth, places or {})
    sigma, df, degree = (model.sigma, model.df, model.degree) if model else (NAN, 0, 2)
    chosen = [f if f.problem or model is None else _sensitivity(f, model) for f in fits]
    return Tuning(tuple(chosen), sigma, df, degree, smooth, smooth_p)


def _window(own: Sequence[Run]) -> list[float] | str:
    """The rates to fit an arm with, or why it has no optimum inside them."""
    tried = sorted({run.rate for run in own})
    losses = {r: [run.loss for run in own if run.rate == r] for r in tried}
    means = {r: float(np.mean(v)) for r, v in losses.items() if np.isfinite(v).all()}
    if len(means) < LEAST:
        return (
            f"only {len(means)} of {len(tried)} learning rates ended with a finite loss, and a fit "
            f"needs {LEAST}; lower train.lr or study.tune.octaves"
        )
    rates = list(means)
    best = min(range(len(rates)), key=lambda i: means[rates[i]])
    if best in (0, len(rates) - 1):
        side, other = ("lowest", "lower") if best == 0 else ("highest", "higher")
        also = " (those above it diverged)" if best and rates[-1] < tried[-1] else ""
        # around this rate half of the rates are those that were tried, whose runs count again
        advice = f"a {other} train.lr, such as train.lr={rates[best]!r},"
        advice = "a smaller study.tune.octaves" if also else advice
        return (
            f"its loss is lowest at the {side} learning rate that was tried, {rates[best]:.3g}"
            f"{also}, so the optimum may lie beyond; give {advice} or more study.tune.points"
        )
    first = min(max(0, best - WINDOW // 2), max(0, len(rates) - WINDOW))
    return rates[first : first + WINDOW]


@dataclass(frozen=True)
class _Model:
    """The pooled least squares fit: arms' polynomials in x - middle, and seed effects."""

    arms: list[str]
    degree: int
    middle: float
    beta: Array
    inverse: Array  # (X'X)^-1
    sigma: float
    df: int

    def part(self, arm: str) -> tuple[Array, Array]:
        """Coefficients of an arm and their covariance over sigma^2."""
        k = self.degree + 1
        at = slice(self.arms.index(arm) * k, (self.arms.index(arm) + 1) * k)
        return self.beta[at], self.inverse[at, at]

    def reach(self) -> float:
        return float(special.stdtrit(self.df, (1 + LEVEL) / 2)) * self.sigma if self.df > 0 else NAN

    def powers(self, x: Array | float, derivative: bool = False) -> Array:
        """(..., degree + 1): 1, u, u^2, ... at u = x - middle, or their derivatives."""
        u = np.asarray(x, dtype=np.float64)[..., None] - self.middle
        k = np.arange(self.degree + 1)
        return k * u ** np.maximum(k - 1, 0) if derivative else u**k


def _model(runs: Sequence[Run], arms: list[str]) -> _Model:
    quadratic, cubic = _least_squares(runs, arms, 2), _least_squares(runs, arms, 3)
    if cubic.df < 3:
        return quadratic
    gain = quadratic.sigma**2 * quadratic.df - cubic.sigma**2 * cubic.df
    terms = quadratic.df - cubic.df
    ratio = gain / terms / cubic.sigma**2 if cubic.sigma > 0 else 0.0
    return cubic if float(special.fdtrc(terms, cubic.df, ratio)) < 1 - LEVEL else quadratic


def _least_squares(runs: Sequence[Run], arms: list[str], degree: int) -> _Model:
    x = np.log2([run.rate for run in runs])
    middle = float(x.mean())
    powers = (x - middle)[:, None] ** np.arange(degree + 1)
    arm = np.eye(len(arms))[[arms.index(run.arm) for run in runs]]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    seed = np.eye(len(seeds))[[seeds.index(run.seed) for run in runs]]
    blocks = (arm[:, :, None] * powers[:, None, :]).reshape(len(runs), -1)
    design = np.hstack([blocks, seed[:, 1:] - seed[:, :1]])
    y = np.array([run.loss for run in runs])
    inverse = np.linalg.pinv(design.T @ design)
    beta = inverse @ design.T @ y
    df = len(y) - int(np.linalg.matrix_rank(design))
    rss = float(((y - design @ beta) ** 2).sum())
    return _Model(arms, degree, middle, beta, inverse, math.sqrt(rss / df) if df > 0 else NAN, df)


def _optimum(arm: str, model: _Model, window: tuple[float, float]) -> RateFit:
    beta, covariance = model.part(arm)
    ends = np.log2(window)
    x = np.linspace(ends[0], ends[1], 2001)
    values = model.powers(x) @ beta
    at = int(values.argmin())
    plain = np.polynomial.Polynomial(beta)(np.polynomial.Polynomial([-model.middle, 1.0]))
    fit = RateFit(arm, tuple(float(c) for c in plain.coef), window)
    if at in (0, len(x) - 1):
        return replace(
            fit,
            problem=f"the fitted loss has no minimum between the learning rates {window[0]:.3g} "
            f"and {window[1]:.3g}; give more study.tune.points or another study.tune.octaves",
        )
    slopes = model.powers(x, derivative=True)
    spread = np.sqrt(np.einsum("ij,jk,ik->i", slopes, covariance, slopes))
    flat = np.abs(slopes @ beta) <= model.reach() * spread  # NaN reach: nowhere
    first, last = stretch(flat, at)
    interval = (2.0 ** x[first], 2.0 ** x[last]) if model.df > 0 else (NAN, NAN)
    optimum = float(2.0 ** x[at])
    return replace(
        fit,
        optimum=optimum,
        low=float(interval[0]),
        high=float(interval[1]),
        open=bool(model.df > 0 and (first == 0 or last == len(x) - 1)),
        chosen=float(f"{optimum:.3g}"),
    )


def stretch(inside: NDArray[np.bool_], at: int) -> tuple[int, int]:
    """The first and the last place of the run of true values that goes through a place."""
    first = last = at
    while first > 0 and inside[first - 1]:
        first -= 1
    while last < len(inside) - 1 and inside[last + 1]:
        last += 1
    return first, last


def _smoothed(
    fits: list[RateFit], model: _Model, smooth: str, places: Mapping[str, float]
) -> tuple[list[RateFit], float]:
    """Optima as a polynomial of the swept factor, weighted by how well each is known."""
    degree = 2 if smooth == "quadratic" else 1
    p = np.array([float(places[f.arm]) for f in fits])
    p = (p - p.mean()) / (p.std() or 1.0)
    x = np.log2([f.optimum for f in fits])
    errors = []
    for f, at in zip(fits, x, strict=True):
        beta, covariance = model.part(f.arm)
        slope = model.powers(at, derivative=True)
        k = np.arange(2, model.degree + 1)
        curvature = float((k * (k - 1) * beta[2:] * (at - model.middle) ** (k - 2)).sum())
        errors.append(model.sigma * math.sqrt(slope @ covariance @ slope) / curvature)
    weight = 1 / np.maximum(np.array(errors), 1e-9)
    design = p[:, None] ** np.arange(degree + 1)
    beta, *_ = np.linalg.lstsq(design * weight[:, None], x * weight, rcond=None)
    line = design @ beta
    free = len(fits) - degree - 1
    q = float((((x - line) * weight) ** 2).sum())
    p_value = float(special.fdtrc(free, model.df, q / free)) if free > 0 and model.df > 0 else NAN
    result = []
    for f, value in zip(fits, line, strict=True):
        chosen = float(f"{2.0**value:.3g}")
        if f.window[0] <= chosen <= f.window[1]:
            result.append(replace(f, chosen=chosen))
        else:
            why = (
                f"the smooth model over arms puts its optimum at {chosen:.3g}, beyond the learning "
                f"rates {f.window[0]:.3g} to {f.window[1]:.3g}; give study.tune.smooth=none"
            )
            result.append(replace(f, problem=why))
    return result, p_value


def _sensitivity(fit: RateFit, model: _Model) -> RateFit:
    """Loss half an octave to both sides of the chosen rate, less that at it."""
    beta, covariance = model.part(fit.arm)
    centre = math.log2(fit.chosen)
    found = []
    for side in (-0.5, 0.5):
        contrast = model.powers(centre + side) - model.powers(centre)
        half = model.reach() * math.sqrt(max(0.0, float(contrast @ covariance @ contrast)))
        found += [float(contrast @ beta), half]
    minus, minus_half, plus, plus_half = found
    return replace(fit, minus=minus, minus_half=minus_half, plus=plus, plus_half=plus_half)
