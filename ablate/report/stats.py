"""Statistics of a comparison: arms, paired seeds, curves, and what could have been seen.

`ArmFit` is the additive model  value = arm + seed + noise  with one pooled noise variance. Seeds
are paired: the same seed gives the same data order and the same initial stream in every arm, so a
seed that is lucky in one arm tends to be lucky in all, and differences are sharper than the arms'
own means. Differences use the noise variance within seeds (intra-block analysis, exact t); means
are meant for new seeds, so their variance has the seeds' variance in it (Satterthwaite). Where no
seed links the arms the model falls back to arm + noise, and `paired` says so.

Intervals are two-sided at 95%, tests at 5%, power is 80%: `LEVEL`, `ALPHA`, `POWER`. Where the
degrees of freedom are zero (one seed) limits are NaN: there is no interval, and nothing here
invents one.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats
from scipy.sparse import csgraph

from ablate.study.tune import stretch

Array = NDArray[np.float64]
NAN = float("nan")
LEVEL, ALPHA, POWER = 0.95, 0.05, 0.8
LARGEST = 1e70  # the fourth power of what is larger, the square of a variance, overflows


@dataclass(frozen=True)
class Estimate:
    """A figure with standard error, degrees of freedom and interval; NaN where there is none."""

    value: float
    se: float = NAN
    df: float = 0.0
    low: float = NAN
    high: float = NAN
    p: float = NAN  # two-sided, against zero

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def t_estimate(value: float, se: float, df: float) -> Estimate:
    """An estimate with the t interval and p-value of its standard error."""
    if not (df > 0 and math.isfinite(se)):
        return Estimate(value)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, df)) * se
    p = float(2 * stats.t.sf(abs(value) / se, df)) if se > 0 else float(value == 0)
    return Estimate(value, se, df, value - reach, value + reach, p)


# --- arms and seeds ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArmFit:
    """The additive arm + seed model, fitted. Make one with `fit_arms`."""

    arms: tuple[str, ...]
    counts: tuple[int, ...]  # runs of each arm
    n_seeds: int
    paired: bool
    means: Array  # (A,) at the average seed; equal to plain means in a complete design
    unscaled: Array  # (A, A) covariance of `means`, given the seeds, over sigma^2
    sigma: float = NAN  # standard deviation of the noise after arm and seed; NaN without df
    df: float = 0.0  # its degrees of freedom
    seed_mean_square: float = NAN  # of seeds after arms; NaN when not paired
    seed_weight: float = NAN  # E[seed_mean_square] = sigma^2 + seed_weight * seed variance
    arm_mean_square: float = NAN  # of arms after seeds, for the F test

    def index(self, arm: str) -> int:
        return self.arms.index(arm)

    def only(self, arms: Sequence[str]) -> ArmFit:
        """The same fit, speaking of some of its arms; the noise stays that of all."""
        at = [self.index(arm) for arm in arms]
        return dataclasses.replace(
            self,
            arms=tuple(arms),
            counts=tuple(self.counts[i] for i in at),
            means=self.means[at],
            unscaled=self.unscaled[np.ix_(at, at)],
            arm_mean_square=NAN,
        )

    def mean(self, arm: str) -> Estimate:
        """The arm's mean over seeds like these: its interval counts the seeds' variance too."""
        i = self.index(arm)
        value, own = float(self.means[i]), float(self.unscaled[i, i])
        if not self.df > 0:
            return Estimate(value)
        if not self.paired:
            return t_estimate(value, self.sigma * math.sqrt(own), self.df)
        # variance = own * sigma^2 + seed variance / S, as a sum of two mean squares
        from_seeds = self.seed_mean_square / (self.seed_weight * self.n_seeds)
        from_noise = self.sigma**2 * (own - 1 / (self.seed_weight * self.n_seeds))
        variance = from_seeds + from_noise
        if variance <= 0:
            return Estimate(value)
        parts = from_seeds**2 / (self.n_seeds - 1) + from_noise**2 / self.df
        return t_estimate(value, math.sqrt(variance), variance**2 / parts)

    def difference(self, arm: str, reference: str) -> Estimate:
        """mean(arm) - mean(reference), paired within seeds where the design is."""
        i, j = self.index(arm), self.index(reference)
        value = float(self.means[i] - self.means[j])
        return t_estimate(value, self._se(i, j), self.df)

    def _se(self, i: int, j: int) -> float:
        u = self.unscaled
        return self.sigma * math.sqrt(max(0.0, float(u[i, i] + u[j, j] - 2 * u[i, j])))

    def _correlation(self, reference: int) -> Array:
        """Correlation of the differences from `reference`, one row a remaining arm."""
        others = [i for i in range(len(self.arms)) if i != reference]
        contrasts = np.zeros((len(others), len(self.arms)))
        contrasts[np.arange(len(others)), others] = 1.0
        contrasts[:, reference] = -1.0
        covariance = contrasts @ self.unscaled @ contrasts.T
        scale = np.sqrt(np.diag(covariance))
        return covariance / np.outer(scale, scale)

    def against(self, reference: str) -> pd.DataFrame:
        """Every other arm minus `reference`: arm, difference, se, p, its interval (low, high), and
        adjusted: Dunnett's interval (dunnett_low, dunnett_high), dunnett_p and holm_p."""
        r = self.index(reference)
        others = {arm: self.difference(arm, reference) for arm in self.arms if arm != reference}
        rows = [(arm, reference, e.value, e.se, e.low, e.high, e.p) for arm, e in others.items()]
        columns = ["arm", "reference", "difference", "se", "low", "high", "p"]
        table = pd.DataFrame(rows, columns=columns)
        table[["dunnett_low", "dunnett_high", "dunnett_p", "holm_p"]] = NAN
        if others and self.sigma > 0:
            correlation = self._correlation(r)
            reach = many_to_one_quantile(correlation, self.df) * table["se"]
            table["dunnett_low"] = table["difference"] - reach
            table["dunnett_high"] = table["difference"] + reach
            t = (table["difference"] / table["se"]).abs()
            table["dunnett_p"] = [1 - _inside(float(x), correlation, self.df, 2) for x in t]
            table["holm_p"] = adjust(table["p"])
        return table

    def omnibus(self) -> float:
        """p-value of the F test that all arms are equal (arms after seeds); NaN without df."""
        if len(self.arms) < 2 or not self.sigma > 0:
            return NAN
        ratio = self.arm_mean_square / self.sigma**2
        return float(stats.f.sf(ratio, len(self.arms) - 1, self.df))

    def worse_than_best(self, lower_is_better: bool = True) -> dict[str, float]:
        """p-value of each arm that it is as good as the best: Hsu's multiple comparisons with the
        best, by the arm that is better by the most standard errors and the one-sided Dunnett
        distribution that takes the arm as control. NaN without df."""
        if len(self.arms) < 2 or not self.sigma > 0:
            return dict.fromkeys(self.arms, NAN)
        values = self.means if lower_is_better else -self.means
        found = {}
        for i, arm in enumerate(self.arms):
            others = [j for j in range(len(self.arms)) if j != i]
            t = max((values[i] - values[j]) / self._se(i, j) for j in others)
            found[arm] = float(1 - _inside(float(t), self._correlation(i), self.df, 1))
        return found

    def not_worse_than_best(self, lower_is_better: bool = True) -> list[str]:
        """Arms that cannot be told from the best: never a bare argmin. With probability `LEVEL` at
        least, the truly best arm is in the set (`worse_than_best`). Without df: all arms."""
        p = self.worse_than_best(lower_is_better)
        return [arm for arm in self.arms if not p[arm] < 1 - LEVEL]

    def equivalence(self, arm: str, reference: str, margin: float) -> Equivalence:
        """Two one-sided tests that arm and reference differ by less than `margin`."""
        i, j = self.index(arm), self.index(reference)
        return equivalence(float(self.means[i] - self.means[j]), self._se(i, j), self.df, margin)

    def seed_correlation(self) -> Estimate:
        """Share of a run's variance (arm apart) that its seed carries to every arm.

        The intraclass correlation ICC(3,1) by the method of moments (it can come out negative),
        with the interval of Shrout and Fleiss 1979; exact in a complete design.
        """
        if not self.paired or self.n_seeds < 2 or not self.sigma > 0:
            return Estimate(NAN)
        k, ratio = self.seed_weight, self.seed_mean_square / self.sigma**2
        upper = float(stats.f.ppf((1 + LEVEL) / 2, self.n_seeds - 1, self.df))
        lower = float(stats.f.ppf((1 - LEVEL) / 2, self.n_seeds - 1, self.df))
        value, low, high = ((f - 1) / (f + k - 1) for f in (ratio, ratio / upper, ratio / lower))
        return Estimate(value, df=self.n_seeds - 1, low=low, high=high)

    def total_sigma(self) -> float:
        """Standard deviation of single runs of one arm over seeds (noise and seed together)."""
        if not self.df > 0 or not self.paired:
            return self.sigma
        seed_variance = (self.seed_mean_square - self.sigma**2) / self.seed_weight
        return math.sqrt(max(0.0, self.sigma**2 + seed_variance))

    def minimum_detectable(self, comparisons: int = 1) -> float:
        """Smallest true difference between two arms that this design finds with `POWER`."""
        if not self.df > 0 or len(self.arms) < 2:
            return NAN
        se = float(np.median([self._se(i, 0) for i in range(1, len(self.arms))]))
        return detectable(se, self.df, comparisons)


def fit_arms(arm: Sequence[Any], seed: Sequence[Any], value: ArrayLike) -> ArmFit:
    """Fit value = arm + seed + noise. One element a run; arms keep the order of appearance.

    Runs with a value that is not finite must be left out (and reported) by the caller: ValueError.
    With one beyond `LARGEST` there are means and no noise: zero degrees of freedom, no interval.
    """
    y = np.asarray(value, dtype=np.float64)
    if y.size == 0 or not np.isfinite(y).all():
        raise ValueError("fit_arms needs at least one run and finite values only")
    arms = tuple(dict.fromkeys(map(str, arm)))
    seeds = list(dict.fromkeys(seed))
    a = np.array([arms.index(str(x)) for x in arm])
    s = np.array([seeds.index(x) for x in seed])
    X = np.eye(len(arms))[a]
    counts = X.sum(axis=0)
    paired = len(arms) > 1 and _connected(a, s, len(arms), len(seeds))

    fitted = functools.partial(ArmFit, arms, tuple(int(c) for c in counts), len(seeds), paired)
    if np.abs(y).max() > LARGEST:  # where a figure is a perplexity, a loss of 170 is enough
        return fitted(X.T @ (y / counts[a]), np.diag(1 / counts))
    plain = X.T @ y / counts
    rss_arm = float(((y - X @ plain) ** 2).sum())
    if not paired:
        df = float(len(y) - len(arms))
        between = float((counts * (plain - y.mean()) ** 2).sum())
        return fitted(
            plain,
            np.diag(1 / counts),
            sigma=math.sqrt(rss_arm / df) if df > 0 else NAN,
            df=df,
            arm_mean_square=between / max(1, len(arms) - 1),
        )

    # Seeds as deviations that sum to zero: the arms' coefficients are means at the average seed.
    Z = np.eye(len(seeds))[s]
    deviations = Z[:, 1:] - Z[:, :1]
    D = np.hstack([X, deviations])
    gram_inverse = np.linalg.inv(D.T @ D)
    coefficients = gram_inverse @ D.T @ y
    rss = float(((y - D @ coefficients) ** 2).sum())
    df = float(len(y) - D.shape[1])
    z_counts = Z.sum(axis=0)
    rss_seed = float(((y - Z @ (Z.T @ y / z_counts)) ** 2).sum())
    n = len(seeds)
    residual_Z = Z - X @ (X.T @ Z / counts[:, None])
    return fitted(
        coefficients[: len(arms)],
        gram_inverse[: len(arms), : len(arms)],
        sigma=math.sqrt(max(0.0, rss / df)) if df > 0 else NAN,
        df=df,
        seed_mean_square=(rss_arm - rss) / (n - 1) if n > 1 else NAN,
        seed_weight=float((residual_Z**2).sum()) / (n - 1) if n > 1 else NAN,
        arm_mean_square=(rss_seed - rss) / (len(arms) - 1),
    )


def _connected(a: NDArray[np.int_], s: NDArray[np.int_], n_arms: int, n_seeds: int) -> bool:
    """Whether shared seeds link every arm with every other."""
    met = np.zeros((n_arms, n_seeds), dtype=bool)
    met[a, s] = True
    return bool(csgraph.connected_components(met @ met.T, return_labels=False) == 1)


def interaction(
    arm: Sequence[Any], seed: Sequence[Any], group: Sequence[Any], value: ArrayLike
) -> float:
    """p of the F test that differences between arms are the same in every group of seeds (those
    of one GPU type, say); NaN where a group's seeds do not link its arms, or no noise is left.

    A model in which they are not is an additive one for each group on its own.
    """
    runs = pd.DataFrame({"arm": arm, "seed": seed, "group": group, "value": value})
    parts = [
        fit_arms(part["arm"].tolist(), part["seed"].tolist(), part["value"])
        for _, part in runs.groupby("group")
    ]
    whole = fit_arms(runs["arm"].tolist(), runs["seed"].tolist(), runs["value"])
    df = sum(part.df for part in parts)
    if not whole.paired or not all(part.paired for part in parts) or not 0 < df < whole.df:
        return NAN
    apart = sum(part.df * part.sigma**2 for part in parts if part.df > 0)
    if not apart > 0:
        return NAN
    extra = max(0.0, whole.df * whole.sigma**2 - apart) / (whole.df - df)
    return float(stats.f.sf(extra / (apart / df), whole.df - df, df))


# --- many comparisons ----------------------------------------------------------------------------


def _cells(correlation: Array) -> tuple[float, ...]:
    return tuple(float(x) for x in np.round(correlation, 9).ravel())


@functools.lru_cache(maxsize=256)
def _loadings(cells: tuple[float, ...]) -> tuple[float, ...]:
    """The l with correlation_ij = l_i l_j off the diagonal (principal factor iteration).

    Exact for differences from a common reference in a complete design and in one without seeds; the
    usual factor-analytic approximation (Hsu 1992) in an incomplete one.
    """
    k = math.isqrt(len(cells))
    matrix = np.array(cells).reshape(k, k)
    shared = np.full(k, 0.5)
    for _ in range(200):
        np.fill_diagonal(matrix, shared)
        values, vectors = np.linalg.eigh(matrix)
        loadings = np.abs(vectors[:, -1]) * math.sqrt(max(0.0, float(values[-1])))
        before, shared = shared, np.minimum(loadings**2, 0.999)
        if np.abs(shared - before).max() < 1e-10:
            break
    return tuple(np.sqrt(shared))


@functools.cache
def _quadrature() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Nodes and weights for a standard normal density (but for its constant) and for [-1, 1]."""
    return np.polynomial.hermite_e.hermegauss(48), np.polynomial.legendre.leggauss(48)


def _inside(t: float, correlation: Array, df: float, sides: int) -> float:
    """P(all |T_i| <= t), or P(all T_i <= t) for one side, T multivariate t.

    Integrated over the common factor and over the pooled standard deviation: deterministic, and
    quick for many arms, where the general quasi-random integral is neither.
    """
    if len(correlation) == 1:
        return float(stats.t.cdf(t, df) - (stats.t.cdf(-t, df) if sides == 2 else 0.0))
    loadings = np.array(_loadings(_cells(correlation)))
    (z, z_weight), (node, node_weight) = _quadrature()
    ends = np.sqrt(stats.chi2.ppf([1e-13, 1 - 1e-13], df) / df)
    s = ends[0] + (node + 1) / 2 * (ends[1] - ends[0])
    s_weight = node_weight / 2 * (ends[1] - ends[0]) * stats.chi2.pdf(df * s**2, df) * 2 * df * s
    own = np.sqrt(1 - loadings**2)
    common = (loadings * z[:, None] / own)[:, None, :]  # (Z, 1, k)
    reach = (t * s[:, None] / own)[None]  # (1, S, k)
    chance = special.ndtr(reach - common)
    if sides == 2:
        chance = chance - special.ndtr(-reach - common)
    return float(z_weight @ chance.prod(axis=-1) @ s_weight / math.sqrt(2 * math.pi))


@functools.lru_cache(maxsize=256)
def _quantile(cells: tuple[float, ...], df: float, sides: int) -> float:
    k = math.isqrt(len(cells))
    correlation = np.array(cells).reshape(k, k)
    tail = (1 - LEVEL) / sides
    low, high = stats.t.isf(tail, df), stats.t.isf(tail / k, df)  # one comparison; Bonferroni
    if k == 1:
        return float(low)
    return float(
        optimize.brentq(
            lambda t: _inside(t, correlation, df, sides) - LEVEL, 0.98 * low, 1.02 * high, xtol=1e-6
        )
    )


def many_to_one_quantile(correlation: Array, df: float, sides: int = 2) -> float:
    """Dunnett's critical value for differences with this correlation."""
    return _quantile(_cells(correlation), float(df), sides)


def adjust(p: Sequence[float] | pd.Series, method: Literal["holm", "bh"] = "holm") -> Array:
    """p-values adjusted across claims: Holm (family-wise) or Benjamini-Hochberg (false discovery).

    NaN stays NaN and does not count as a claim.
    """
    values = np.asarray(p, dtype=np.float64)
    result = np.full(values.shape, NAN)
    known = np.isfinite(values)
    m = int(known.sum())
    if m == 0:
        return result
    if method == "bh":
        result[known] = stats.false_discovery_control(values[known])
        return result
    at = np.flatnonzero(known)[np.argsort(values[known])]
    result[at] = np.minimum(1.0, np.maximum.accumulate(values[at] * (m - np.arange(m))))
    return result


# --- equivalence and power -----------------------------------------------------------------------


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: `holds` when the 1 - 2 `ALPHA` interval lies inside the margin."""

    p: float
    low: float
    high: float
    holds: bool


def equivalence(difference: float, se: float, df: float, margin: float) -> Equivalence:
    """Schuirmann's two one-sided t tests that |true difference| < margin."""
    if margin <= 0:
        raise ValueError(f"margin must be positive, got {margin}")
    if not (df > 0 and se > 0):
        return Equivalence(NAN, NAN, NAN, False)
    p = max(
        float(stats.t.sf((difference + margin) / se, df)),
        float(stats.t.cdf((difference - margin) / se, df)),
    )
    reach = float(stats.t.ppf(1 - ALPHA, df)) * se
    return Equivalence(p, difference - reach, difference + reach, p <= ALPHA)


def detectable(se: float, df: float, comparisons: int = 1) -> float:
    """True difference that a two-sided t test at `ALPHA` with this standard error finds with
    probability `POWER` (noncentral t); `comparisons` for Bonferroni."""
    if not df > 0:
        return NAN
    critical = float(stats.t.isf(ALPHA / comparisons / 2, df))

    def shortfall(shift: float) -> float:  # the other tail has no weight where this one has `POWER`
        return float(stats.nct.sf(critical, df, shift)) - POWER

    top = critical
    while shortfall(top) < 0:
        top *= 1.5
    return float(optimize.brentq(shortfall, 0.0, top)) * se


def minimum_detectable_effect(
    sigma: float, *, n_arms: int, n_seeds: int, correlation: float = 0.0, comparisons: int = 1
) -> float:
    """Smallest difference of two arms that a planned study finds: `n_seeds` paired seeds in each of
    `n_arms` arms, `sigma` the standard deviation of single runs over seeds, `correlation` the share
    of its variance that the seed carries to every arm, `comparisons` for Bonferroni."""
    se, df = _planned(sigma, n_arms, n_seeds, correlation)
    return detectable(se, df, comparisons)


def _planned(sigma: float, n_arms: int, n_seeds: int, correlation: float) -> tuple[float, int]:
    """Standard error of a difference of two arms, and the degrees of freedom of its noise."""
    return sigma * math.sqrt(2 * (1 - correlation) / n_seeds), (n_arms - 1) * (n_seeds - 1)


def seeds_needed(effect: float, sigma: float, *, n_arms: int, correlation: float = 0.0) -> int:
    """Fewest paired seeds whose `minimum_detectable_effect` is at most `effect`."""

    def enough(n_seeds: int) -> bool:
        given = {"n_arms": n_arms, "n_seeds": n_seeds}
        return minimum_detectable_effect(sigma, correlation=correlation, **given) <= effect

    return _fewest(enough)


def seeds_for_equivalence(
    margin: float, sigma: float, *, n_arms: int, correlation: float = 0.0
) -> int:
    """Fewest paired seeds with which two one-sided tests call two equal arms equivalent within
    `margin` with probability `POWER`."""

    def enough(n_seeds: int) -> bool:
        se, df = _planned(sigma, n_arms, n_seeds, correlation)
        reach = margin / se - float(stats.t.isf(ALPHA, df))
        return 2 * float(stats.t.cdf(reach, df)) - 1 >= POWER

    return _fewest(enough)


def _fewest(enough: Callable[[int], bool]) -> int:
    """The fewest seeds, two at least, that are enough, which more of them are too."""
    return 2 + bisect.bisect_left(range(2, 1 << 20), True, key=enough)


# --- documents and items -------------------------------------------------------------------------


def _by_cluster(values: ArrayLike, clusters: ArrayLike | None) -> Array:
    """Sums over the elements of each cluster; without clusters the values as they are."""
    plain = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return plain
    _, group = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(group, plain).astype(np.float64)


def _blocks(draws: int, n: int) -> list[int]:
    """How many draws of n elements to make at a time: about 32 MB of them."""
    block = max(1, 4_000_000 // n)
    return [min(block, draws - start) for start in range(0, draws, block)]


FEWEST = 10  # clusters of a bootstrap


def bootstrap_ratio(
    total: ArrayLike, weight: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = 2000
) -> Estimate:
    """sum(total) / sum(weight) with a percentile interval over resampled clusters.

    For nats a token over documents: `total` nats of each document (or the difference of two
    runs' nats), `weight` its tokens. For accuracy over items: correct, queries. `clusters` names
    the group of each element (a document of several pieces, a book of several questions); whole
    clusters are drawn. The interval speaks of other texts, not of other seeds, and there is none
    from fewer than FEWEST of them, which resampled tell little but themselves.
    """
    numerator, denominator = (_by_cluster(values, clusters) for values in (total, weight))
    value = float(numerator.sum() / denominator.sum())
    n = len(numerator)
    if n < FEWEST:
        return Estimate(value)
    rng = np.random.default_rng(0)
    picks = (rng.integers(n, size=(size, n)) for size in _blocks(draws, n))
    ratios = np.concatenate(
        [numerator[pick].sum(axis=1) / denominator[pick].sum(axis=1) for pick in picks]
    )
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(ratios.std(ddof=1)), n - 1, float(low), float(high))


def share_of_items(score: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Mean score of items, each between 0 and 1, by `bootstrap_ratio`. Where all are right, or all
    wrong, resampling them gives no interval: then the exact one of as many trials as there are
    clusters (Clopper and Pearson). NaN without items."""
    scores = np.asarray(score, dtype=np.float64)
    if not scores.size:
        return Estimate(NAN)
    found = bootstrap_ratio(scores, np.ones(len(scores)), clusters)
    if found.value in (0.0, 1.0) and (scores == found.value).all():
        reach = ((1 - LEVEL) / 2) ** (1 / len(np.unique(np.asarray(clusters))))
        low, high = (0.0, 1 - reach) if found.value == 0 else (reach, 1.0)
        return dataclasses.replace(found, low=low, high=high)
    return found


def paired_items(
    one: ArrayLike, other: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = 2000
) -> Estimate:
    """Mean of one - other over the same items, with an interval over resampled clusters.

    p: two-sided, of the sum of the clusters' differences when each keeps or flips its sign (a
    randomisation test: under no difference the two models' scores could be exchanged).
    """
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    found = bootstrap_ratio(difference, np.ones_like(difference), clusters, draws=draws)
    difference = _by_cluster(difference, clusters)
    own = difference[difference != 0]
    if not len(own):
        return dataclasses.replace(found, p=1.0)
    rng = np.random.default_rng(0)
    sums = np.concatenate(
        [rng.choice((-1.0, 1.0), (size, len(own))) @ own for size in _blocks(draws, len(own))]
    )
    p = (1 + (np.abs(sums) >= abs(own.sum()) - 1e-9).sum()) / (1 + draws)
    return dataclasses.replace(found, p=float(p))


def mcnemar(one: ArrayLike, other: ArrayLike) -> float:
    """Exact two-sided p of McNemar's test: right or wrong answers of two models to the same items,
    which must be independent of each other (one model each, no shared documents)."""
    a, b = np.asarray(one) > 0.5, np.asarray(other) > 0.5
    only_one, only_other = int((a & ~b).sum()), int((b & ~a).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(stats.binomtest(only_one, only_one + only_other).pvalue)


# --- a curve over shares -------------------------------------------------------------------------

# Loss over the share s of attention: a gain that saturates plus a cost that grows. Linear, given c.
FORMS: dict[str, str] = {
    "exponential": "a + b·exp(−s/c) + d·s²",
    "hyperbolic": "a + b/(1 + s/c) + d·s²",
}


def _gain(form: str, x: Array, c: ArrayLike) -> Array:
    scaled = x[..., :] / np.asarray(c, dtype=np.float64)[..., None]
    return np.exp(-scaled) if form == "exponential" else 1 / (1 + scaled)


_ACTIVE = ([0, 1, 3], [0, 1], [0, 3], [0])  # places in (a, b, c, d) that are free, given c


@functools.lru_cache(maxsize=16)
def _designs(
    form: str, shares: tuple[float, ...], roots: tuple[float, ...], scales: tuple[float, ...]
) -> list[tuple[Array, Array]]:
    """For each set of free parameters the weighted designs (K, A, k) at every c of the grid, and
    their pseudo-inverses (K, k, A)."""
    x = np.broadcast_to(np.array(shares), (len(scales), len(shares)))
    columns = np.stack([np.ones_like(x), _gain(form, x, np.array(scales)), x, x**2], axis=2)
    columns = columns * np.array(roots)[:, None]
    return [(columns[..., free], np.linalg.pinv(columns[..., free])) for free in _ACTIVE]


def _least_squares(
    form: str, x: Array, y: Array, weight: Array, scales: Array
) -> tuple[Array, Array]:
    """Best (a, b, c, d) with b, d >= 0 for each row of y (R, A); also the weighted residual sums.

    For each c of the grid the rest is linear: the unconstrained solution where it is feasible, else
    the best of those with b, d or both at zero (which is where the constrained optimum then is).
    """
    root = np.sqrt(weight)
    scaled = y * root
    rows = np.arange(len(y))
    best = np.full(len(y), np.inf)
    parameters = np.zeros((len(y), 4))
    designs = _designs(form, tuple(x), tuple(root), tuple(scales))
    for free, (design, inverse) in zip(_ACTIVE, designs, strict=True):
        solution = scaled @ inverse.transpose(0, 2, 1)  # (K, R, k)
        rss = ((scaled - solution @ design.transpose(0, 2, 1)) ** 2).sum(axis=2)  # (K, R)
        rss[(solution[..., 1:] < 0).any(axis=2)] = np.inf
        at = rss.argmin(axis=0)
        better = rss[at, rows] < best - 1e-15
        best[better] = rss[at, rows][better]
        chosen = np.zeros((len(y), 4))
        chosen[:, free] = solution[at, rows]
        chosen[:, 2] = scales[at]
        parameters[better] = chosen[better]
    return parameters, best


def _evaluate(form: str, parameters: Array, s: Array) -> Array:
    """(R, S) values of the curves at shares s."""
    a, b, _, d = (parameters[:, i : i + 1] for i in range(4))
    return a + b * _gain(form, s, parameters[:, 2]) + d * s**2


@dataclass(frozen=True)
class Curve:
    """A fitted curve over shares, its minimum with an interval, and how flat it is there."""

    form: str
    parameters: tuple[float, float, float, float]  # a, b, c, d
    optimum: Estimate  # the share with the lowest fitted value, inside the tested range
    flat: tuple[float, float]  # shares whose fitted value is not distinguishable from the optimum's
    lack_of_fit: float  # p-value that the arms scatter about the curve by noise alone
    settled: bool  # few draws have the smallest scale c of the gain that is tried, or none is seen

    @property
    def doubt(self) -> str:
        """Why the minimum and the flat range are not to be read as results; empty if they are."""
        if not self.settled:
            return "no arm lies where the gain happens, so that its scale is not determined"
        if self.lack_of_fit < 1 - LEVEL:
            return (
                f"the arms scatter about a curve more than noise does (p = {self.lack_of_fit:.2g})"
            )
        return ""

    def __call__(self, s: ArrayLike) -> Array:
        values = np.atleast_1d(np.asarray(s, dtype=np.float64))
        return _evaluate(self.form, np.array([self.parameters]), values)[0]

    @property
    def formula(self) -> str:
        return FORMS[self.form]


def fit_curve(
    fit: ArmFit, x: Mapping[str, float], *, form: str = "exponential", draws: int = 1000
) -> Curve:
    """A saturating gain plus a convex cost through the arms' means; lower is better.

    `x`: share of each arm, in [0, 1]. The interval of the optimum and the flat range come from a
    parametric bootstrap: the fitted curve plus noise of the arms' means, its variance drawn too.
    Needs five distinct shares. ValueError otherwise.
    """
    shares = np.array([float(x[arm]) for arm in fit.arms])
    if len(np.unique(shares)) < 5 or shares.min() < 0 or shares.max() > 1:
        raise ValueError("a curve needs at least five distinct shares between 0 and 1")
    span = float(shares.max() - shares.min())
    scales = np.geomspace(0.02 * span, 2 * span, 96)
    weight = 1 / np.diag(fit.unscaled)
    parameters, rss = _least_squares(form, shares, fit.means[None], weight, scales)
    grid = np.linspace(shares.min(), shares.max(), 401)
    line = _evaluate(form, parameters, grid)[0]
    at = int(np.argmin(line))
    optimum = float(grid[at])
    a, b, c, d = (float(v) for v in parameters[0])
    named = (a, b, c, d)
    settled = bool(b == 0 or c > scales[0])
    if not fit.sigma > 0:
        return Curve(form, named, Estimate(optimum), (NAN, NAN), NAN, settled)

    rng = np.random.default_rng(0)
    noise = rng.standard_normal((draws, len(shares))) / np.sqrt(weight)
    sigma = fit.sigma * np.sqrt(fit.df / rng.chisquare(fit.df, size=(draws, 1)))
    centre = _evaluate(form, parameters, shares)
    drawn, _ = _least_squares(form, shares, centre + sigma * noise, weight, scales)
    lowest = (drawn[:, 1] > 0) & (drawn[:, 2] <= scales[0])
    settled = settled and float(lowest.mean()) < 1 - LEVEL
    lines = _evaluate(form, drawn, grid)
    low, high = np.quantile(grid[lines.argmin(axis=1)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    excess = np.quantile(lines - lines[:, at : at + 1], 1 - LEVEL, axis=0)
    first, last = stretch(excess <= 0, at)
    free = len(shares) - 4
    fit_p = NAN
    if free > 0:
        fit_p = float(stats.f.sf(float(rss[0]) / free / fit.sigma**2, free, fit.df))
    return Curve(
        form,
        named,
        Estimate(optimum, low=float(low), high=float(high)),
        (float(grid[first]), float(grid[last])),
        fit_p,
        settled,
    )
