"""The statistics against SciPy and statsmodels where they overlap."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from ablate.report.stats import (
    ArmFit,
    adjust,
    bootstrap_ratio,
    detectable,
    equivalence,
    fit_arms,
    fit_curve,
    interaction,
    many_to_one_quantile,
    minimum_detectable_effect,
)


def design(
    rng: np.random.Generator, arms: int, seeds: int, drop: int = 0, effect: float = 0.01
) -> pd.DataFrame:
    """Runs of every arm with every seed, less a few at random."""
    rows = [
        {"arm": f"a{i}", "seed": j, "value": 2.0 + effect * i}
        for i in range(arms)
        for j in range(seeds)
    ]
    table = pd.DataFrame(rows)
    luck = rng.normal(0, 0.02, seeds)
    table["value"] += luck[table["seed"]] + rng.normal(0, 0.01, len(table))
    return table.drop(index=rng.choice(len(table), drop, replace=False)).reset_index(drop=True)


def fit(table: pd.DataFrame) -> ArmFit:
    return fit_arms(table["arm"].tolist(), table["seed"].tolist(), table["value"].tolist())


@pytest.mark.parametrize(("arms", "seeds", "drop"), [(4, 3, 0), (5, 6, 4), (3, 8, 5), (2, 2, 0)])
def test_differences_are_those_of_least_squares(arms: int, seeds: int, drop: int) -> None:
    table = design(np.random.default_rng(arms), arms, seeds, drop)
    model = smf.ols("value ~ C(arm) + C(seed)", table).fit()
    ours = fit(table)
    assert ours.paired
    assert ours.df == model.df_resid
    assert ours.sigma == pytest.approx(np.sqrt(model.scale))
    for arm in sorted(set(table["arm"]) - {"a0"}):
        name = f"C(arm)[T.{arm}]"
        estimate = ours.difference(arm, "a0")
        assert estimate.value == pytest.approx(model.params[name])
        assert estimate.se == pytest.approx(model.bse[name])
        assert (estimate.low, estimate.high) == pytest.approx(tuple(model.conf_int().loc[name]))
        assert estimate.p == pytest.approx(model.pvalues[name])
    assert ours.omnibus() == pytest.approx(anova_lm(model, typ=2).loc["C(arm)", "PR(>F)"])


@pytest.mark.filterwarnings("ignore:The design matrix is rank-deficient")  # groups hold seeds
@pytest.mark.parametrize("drop", [0, 3])
def test_interaction_is_the_f_test_of_nested_models(drop: int) -> None:
    table = design(np.random.default_rng(drop), 4, 7, drop)
    table["group"] = np.where(table["seed"] < 3, "one", "other")
    table.loc[(table["arm"] == "a2") & (table["group"] == "one"), "value"] += 0.02
    reduced = smf.ols("value ~ C(arm) + C(seed)", table).fit()
    full = smf.ols("value ~ C(arm) * C(group) + C(seed)", table).fit()
    ours = interaction(*(table[c].tolist() for c in ("arm", "seed", "group", "value")))
    assert ours == pytest.approx(anova_lm(reduced, full).loc[1, "Pr(>F)"])


def test_interaction_needs_seeds_enough_in_the_groups() -> None:
    table = design(np.random.default_rng(0), 3, 2)
    columns = (table[c].tolist() for c in ("arm", "seed", "seed", "value"))
    assert np.isnan(interaction(*columns))


def test_two_arms_are_the_paired_t_test() -> None:
    table = design(np.random.default_rng(0), 2, 7)
    first, second = (table.loc[table["arm"] == a, "value"].to_numpy() for a in ("a0", "a1"))
    expected = stats.ttest_rel(second, first)
    ours = fit(table).difference("a1", "a0")
    assert ours.p == pytest.approx(expected.pvalue)
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_without_shared_seeds_it_is_the_one_way_model() -> None:
    table = design(np.random.default_rng(1), 4, 5)
    table["seed"] = range(len(table))
    model = smf.ols("value ~ C(arm) - 1", table).fit()
    ours = fit(table)
    assert not ours.paired
    assert np.isnan(ours.seed_correlation().value)
    for arm in ("a0", "a3"):
        mean = ours.mean(arm)
        low, high = model.conf_int().loc[f"C(arm)[{arm}]"]
        assert (mean.low, mean.high) == pytest.approx((low, high))
    groups = [table.loc[table["arm"] == f"a{i}", "value"] for i in range(4)]
    assert ours.omnibus() == pytest.approx(stats.f_oneway(*groups).pvalue)


def test_dunnett_is_scipys_on_independent_arms() -> None:
    rng = np.random.default_rng(2)
    groups = [rng.normal(0.6 * (i == 2), 1, n) for i, n in enumerate((6, 4, 7, 5))]
    arms = np.repeat([f"a{i}" for i in range(4)], [len(g) for g in groups])
    ours = fit_arms(arms, range(len(arms)), np.concatenate(groups)).against("a0")
    expected = stats.dunnett(*groups[1:], control=groups[0], rng=np.random.default_rng(0))
    interval = expected.confidence_interval()
    assert ours["dunnett_p"].to_numpy() == pytest.approx(expected.pvalue, abs=2e-3)
    assert ours["dunnett_low"].to_numpy() == pytest.approx(interval.low, abs=5e-3)
    assert ours["dunnett_high"].to_numpy() == pytest.approx(interval.high, abs=5e-3)


def test_dunnetts_table() -> None:
    # Dunnett 1964 and 1955, 5%, four treatments, 20 degrees of freedom
    correlation = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    assert many_to_one_quantile(correlation, 20) == pytest.approx(2.65, abs=0.005)
    assert many_to_one_quantile(correlation, 20, sides=1) == pytest.approx(2.30, abs=0.006)


def test_dunnett_of_unequal_correlations_is_the_multivariate_t() -> None:
    table = design(np.random.default_rng(4), 5, 5, drop=6)
    ours = fit(table)
    correlation = ours._correlation(0)
    t = many_to_one_quantile(correlation, ours.df)
    law = stats.multivariate_t(loc=np.zeros(4), shape=correlation, df=ours.df)
    box = law.cdf(np.full(4, t), lower_limit=np.full(4, -t), maxpts=200_000, random_state=1)
    assert box == pytest.approx(0.95, abs=2e-3)


def test_holm_and_false_discovery_are_statsmodels() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.6, 0.011]
    assert adjust(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert adjust(p, "bh") == pytest.approx(multipletests(p, method="fdr_bh")[1])
    with_gap = adjust([0.01, float("nan"), 0.04])
    assert np.isnan(with_gap[1])
    assert with_gap[[0, 2]] == pytest.approx([0.02, 0.04])


def test_equivalence_is_statsmodels_tost() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, 12), rng.normal(0.1, 1, 12)
    paired = fit_arms(["a"] * 12 + ["b"] * 12, [*range(12)] * 2, np.concatenate([a, b]))
    for margin in (0.3, 0.9, 2.0):
        expected = ttost_paired(b, a, -margin, margin)[0]
        ours = paired.equivalence("b", "a", margin)
        assert ours.p == pytest.approx(expected)
        assert ours.holds == (expected <= 0.05)
        assert ours.holds == (-margin < ours.low and ours.high < margin)
    apart = fit_arms(["a"] * 12 + ["b"] * 12, range(24), np.concatenate([a, b]))
    expected = ttost_ind(b, a, -0.9, 0.9)[0]
    assert apart.equivalence("b", "a", 0.9).p == pytest.approx(expected)
    with pytest.raises(ValueError, match="margin must be positive"):
        equivalence(0.0, 1.0, 5, 0.0)


def test_detectable_effect_is_statsmodels_power() -> None:
    for n in (3, 6, 20):
        expected = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
        assert detectable(1 / np.sqrt(n), n - 1) == pytest.approx(expected, rel=1e-4)
    # the planning numbers: noise 0.004, correlation 0.3, six shares
    plan = {"n_arms": 6, "correlation": 0.3}
    for seeds, single, corrected in ((3, 0.008, 0.011), (6, 0.0055, 0.007)):
        one = minimum_detectable_effect(0.004, n_seeds=seeds, **plan)
        all_ = minimum_detectable_effect(0.004, n_seeds=seeds, comparisons=5, **plan)
        assert one == pytest.approx(single, rel=0.07)
        assert all_ == pytest.approx(corrected, rel=0.07)


def test_detectable_of_a_fit_is_that_of_its_plan() -> None:
    ours = fit(design(np.random.default_rng(6), 4, 5))
    correlation = ours.seed_correlation().value
    planned = minimum_detectable_effect(
        ours.total_sigma(), n_arms=4, n_seeds=5, correlation=correlation
    )
    assert ours.minimum_detectable() == pytest.approx(planned)


def test_seed_correlation_is_the_variance_components() -> None:
    table = design(np.random.default_rng(7), 5, 12, effect=0.0)
    table["value"] *= 100  # statsmodels' optimiser wants variances near 1
    mixed = sm.MixedLM.from_formula("value ~ C(arm)", table, groups="seed").fit(reml=True)
    seed_variance = float(mixed.cov_re.iloc[0, 0])
    ours = fit(table)
    expected = seed_variance / (seed_variance + mixed.scale)
    assert ours.seed_correlation().value == pytest.approx(expected, rel=1e-3)
    assert ours.total_sigma() == pytest.approx(np.sqrt(seed_variance + mixed.scale), rel=1e-3)
    # the intervals of the means have the seeds' variance in them, as the mixed model's have
    assert ours.mean("a0").se == pytest.approx(float(mixed.bse["Intercept"]), rel=1e-3)


def test_one_seed_gives_no_interval() -> None:
    ours = fit_arms(["a", "b", "c"], [0, 0, 0], [1.0, 2.0, 3.0])
    assert ours.df == 0
    assert ours.mean("b").value == 2.0
    assert np.isnan(ours.mean("b").low)
    assert np.isnan(ours.difference("b", "a").high)
    assert np.isnan(ours.omnibus())
    assert np.isnan(ours.minimum_detectable())
    assert ours.not_worse_than_best() == ["a", "b", "c"]
    assert ours.against("a")["dunnett_p"].isna().all()


def test_a_run_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite values only"):
        fit_arms(["a", "b"], [0, 0], [1.0, float("nan")])


def test_a_missing_run_does_not_bias_an_arm() -> None:
    # seed 1 is unlucky everywhere and arm b lacks it: b must not look better for that
    values = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 1.1, ("c", 0): 1.2, ("c", 1): 2.2}
    arms, seeds = zip(*values, strict=True)
    ours = fit_arms(arms, seeds, list(values.values()))
    assert ours.difference("b", "a").value == pytest.approx(0.1)
    assert ours.mean("b").value == pytest.approx(1.6)


def test_bootstrap_over_documents() -> None:
    rng = np.random.default_rng(8)
    tokens = rng.integers(20, 2000, 60)
    nats = tokens * (2.5 + rng.normal(0, 0.4, 60))
    ours = bootstrap_ratio(nats, tokens, draws=4000)
    expected = stats.bootstrap(
        (nats, tokens),
        lambda n, t, axis: n.sum(axis) / t.sum(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert ours.value == pytest.approx(nats.sum() / tokens.sum())
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=0.012)


def test_bootstrap_draws_whole_clusters() -> None:
    # ten copies of each document say no more than one
    values = np.random.default_rng(9).normal(0, 1, 30)
    copies = np.repeat(values, 10)
    alone = bootstrap_ratio(values, np.ones(30))
    clustered = bootstrap_ratio(copies, np.ones(300), clusters=np.repeat(np.arange(30), 10))
    blind = bootstrap_ratio(copies, np.ones(300))
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high))
    assert blind.half_width < 0.5 * clustered.half_width


def test_a_curve_needs_five_shares() -> None:
    ours = fit_arms(["a", "b", "c", "d"] * 2, [0] * 4 + [1] * 4, np.arange(8.0))
    with pytest.raises(ValueError, match="five distinct shares"):
        fit_curve(ours, {"a": 0, "b": 0.1, "c": 0.2, "d": 0.3})


def test_an_exact_curve_is_found() -> None:
    s = np.array([0, 0.04, 0.08, 0.15, 0.25, 0.35, 0.5])
    truth = 2.0 + 0.05 * np.exp(-s / 0.03) + 0.1 * s**2
    arms = [f"{v}" for v in s]
    curve = fit_curve(fit_arms(arms, [0] * len(s), truth), dict(zip(arms, s, strict=True)))
    grid = np.linspace(0, 0.5, 5001)
    best = grid[np.argmin(2.0 + 0.05 * np.exp(-grid / 0.03) + 0.1 * grid**2)]
    assert curve.optimum.value == pytest.approx(best, abs=0.004)
    assert curve(s) == pytest.approx(truth, abs=2e-4)
    assert np.isnan(curve.optimum.low)  # one seed: no interval


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e80, 1e160, 1e307])
def test_figures_whose_squares_overflow_have_means_and_no_interval(scale: float) -> None:
    arms, seeds = ["a", "a", "b", "b"], [0, 1, 0, 1]
    fit = fit_arms(arms, seeds, scale * np.array([1.0, 3.0, 4.0, 16.0]))
    assert fit.mean("b").value == pytest.approx(10 * scale)
    difference = fit.difference("b", "a")
    assert difference.value == pytest.approx(8 * scale)
    assert np.isnan([difference.low, difference.p, fit.mean("a").high, fit.omnibus()]).all()
    assert fit.not_worse_than_best() == ["a", "b"]


def test_a_curve_that_only_falls_has_its_optimum_at_the_edge() -> None:
    s = np.linspace(0, 0.5, 6)
    arms = [f"{v}" for v in s]
    curve = fit_curve(fit_arms(arms, [0] * 6, 2 - 0.1 * s), dict(zip(arms, s, strict=True)))
    assert curve.optimum.value == 0.5


def test_a_gain_that_no_arm_shows_settles_nothing() -> None:
    """All that attention does is done by the first share tried: how soon is not to be known."""
    rng = np.random.default_rng(0)
    s = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    arms = [f"{v}" for v in s] * 3
    seeds = np.repeat([0, 1, 2], len(s))
    loss = np.where(np.array(arms, dtype=float) > 0, 3.45, 3.5) + rng.normal(0, 0.001, len(arms))
    curve = fit_curve(fit_arms(arms, seeds, loss), dict(zip(arms, np.tile(s, 3), strict=True)))
    assert not curve.settled
    assert "no arm lies where the gain happens" in curve.doubt


def test_arms_that_scatter_about_a_curve_settle_nothing() -> None:
    rng = np.random.default_rng(0)
    s = np.array([0, 0.04, 0.08, 0.15, 0.25, 0.35, 0.5])
    arms = [f"{v}" for v in s] * 3
    seeds = np.repeat([0, 1, 2], len(s))
    truth = 2.0 + 0.05 * np.exp(-s / 0.05) + 0.1 * s**2
    places = dict(zip(arms, np.tile(s, 3), strict=True))
    noise = rng.normal(0, 0.001, len(arms))
    smooth = fit_curve(fit_arms(arms, seeds, np.tile(truth, 3) + noise), places)
    assert smooth.doubt == ""
    bumpy = truth + 0.01 * np.array([0, 1, -1, 1, -1, 1, 0])
    curve = fit_curve(fit_arms(arms, seeds, np.tile(bumpy, 3) + noise), places)
    assert "scatter about a curve" in curve.doubt


def test_worse_than_the_best_of_two_arms_is_a_one_sided_t_test() -> None:
    table = design(np.random.default_rng(5), 2, 6, effect=0.005)
    p = fit(table).worse_than_best()
    a, b = (table.loc[table["arm"] == name, "value"].to_numpy() for name in ("a0", "a1"))
    assert p["a1"] == pytest.approx(stats.ttest_rel(b, a, alternative="greater").pvalue)
    assert p["a0"] == pytest.approx(stats.ttest_rel(a, b, alternative="greater").pvalue)


def test_worse_than_the_best_is_dunnetts_test_from_above() -> None:
    table = design(np.random.default_rng(8), 4, 5)
    table["seed"] = np.arange(len(table))  # groups without pairs, as SciPy's test has them
    groups = {name: g.to_numpy() for name, g in table.groupby("arm")["value"]}
    p = fit(table).worse_than_best()
    for arm, control in groups.items():
        others = [g for name, g in groups.items() if name != arm]
        want = stats.dunnett(*others, control=control, alternative="less", rng=0)
        assert p[arm] == pytest.approx(want.pvalue.min(), abs=2e-3)
