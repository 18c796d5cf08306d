"""Facts about the regressions on plain tables, as HAT publishes them."""

import csv

import numpy as np
import pytest

from flash.errors import InputError
from flash.latency.prediction import score
from flash.latency.regression import GaussianRegression, NonNegativeRegression

SIZES = {
    "encoder_layer_num": [6],
    "encoder_embed_dim": [512, 640],
    "encoder_ffn_embed_dim_avg": [1024, 2048, 3072],
    "encoder_self_attention_heads_avg": [4, 8],
    "decoder_layer_num": [1, 2, 3, 4, 5, 6],
    "decoder_embed_dim": [512, 640],
    "decoder_ffn_embed_dim_avg": [1024, 2048, 3072],
    "decoder_self_attention_heads_avg": [4, 8],
}


def write_table(path, rows, rng):
    """Write a table in the format of HAT for a device with known latencies."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*SIZES, "latency_mean", "latency_std"])
        for _ in range(rows):
            row = {name: int(rng.choice(values)) for name, values in SIZES.items()}
            per_layer = 1 + 2e-3 * row["decoder_ffn_embed_dim_avg"]
            per_layer += 4e-6 * row["decoder_embed_dim"] ** 2
            per_layer += 0.1 * row["decoder_self_attention_heads_avg"]
            encoder = 4 + 3e-6 * row["encoder_embed_dim"] * row["encoder_ffn_embed_dim_avg"]
            truth = encoder + row["decoder_layer_num"] * per_layer
            measured = truth * np.exp(0.02 * rng.standard_normal())
            writer.writerow([*row.values(), f"{measured:.5f}", f"{0.02 * measured:.5f}"])


def read_table(path):
    table = np.genfromtxt(path, delimiter=",", names=True)
    X = np.stack([table[name] for name in SIZES], axis=1)
    return X, table["latency_mean"], table["latency_std"]


@pytest.mark.parametrize(
    ("regression", "mape_pct"), [(GaussianRegression, 3.0), (NonNegativeRegression, 4.0)]
)
def test_a_table_from_a_file_is_learned_with_intervals_that_hold(tmp_path, regression, mape_pct):
    write_table(tmp_path / "latency.csv", 700, np.random.default_rng(0))
    X, y, y_std = read_table(tmp_path / "latency.csv")
    scores = score(regression().fit(X[:120], y[:120], y_std[:120]).predict(X[120:]), y[120:])
    assert scores.mape_pct < mape_pct
    assert scores.r2 > 0.95
    assert 0.84 <= scores.coverage_90 <= 0.97


def sum_of_costs(X, rng):
    return 1 + X @ np.linspace(0.5, 4, X.shape[1]) ** 2


def product_of_factors(X, rng):
    return np.exp(X @ np.linspace(0.05, 0.3, X.shape[1]))


def sum_with_interactions(X, rng):
    return 6 + X[:, :4].sum(axis=1) + X[:, 4] * X[:, 5] + 0.7 * np.maximum(X[:, 6] - 1, 0)


def linear_fit(X, y):
    """Least squares of relative errors, of y or of log y: a function that predicts."""

    def columns(rows):
        return np.column_stack([np.ones(len(rows)), rows])

    of_y = np.linalg.lstsq(columns(X) / y[:, None], np.ones(len(y)), rcond=None)[0]
    of_log = np.linalg.lstsq(columns(X), np.log(y), rcond=None)[0]
    return lambda rows: (columns(rows) @ of_y, np.exp(columns(rows) @ of_log))


@pytest.mark.parametrize("truth", [sum_of_costs, product_of_factors, sum_with_interactions])
def test_fifty_rows_give_a_linear_trend_and_intervals_that_hold(truth):
    coverage, mape, linear = [], [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        X = rng.choice([0.0, 1.0, 2.0, 3.0], (350, 8))
        y = truth(X, rng) * np.exp(0.02 * rng.standard_normal(len(X)))
        scores = score(GaussianRegression().fit(X[:50], y[:50]).predict(X[50:]), y[50:])
        coverage.append(scores.coverage_90)
        mape.append(scores.mape_pct)
        fits = linear_fit(X[:50], y[:50])(X[50:])
        linear.append([100 * np.mean(np.abs(each / y[50:] - 1)) for each in fits])
    assert 0.85 <= np.mean(coverage) <= 0.95
    assert np.mean(mape) < 1.1 * np.mean(linear, axis=0).min()


def test_contributions_are_recovered_and_none_is_negative():
    rng = np.random.default_rng(0)
    X = rng.uniform(1, 2, (40, 3))
    y = X @ [3.0, 0.0, 1.0] * np.exp(0.01 * rng.standard_normal(40))
    fitted = NonNegativeRegression(np.array([1.0, 1.0, 1.0])).fit(X, y)
    assert fitted.multiples is not None
    assert (fitted.multiples >= 0).all()
    np.testing.assert_allclose(fitted.multiples[2] / fitted.multiples[0], 1 / 3, atol=0.1)
    assert fitted.multiples[1] < 0.1 * fitted.multiples[0]


def test_columns_that_repeat_each_other_share_the_cost():
    rng = np.random.default_rng(0)
    work = rng.uniform(1, 10, 8)
    X = np.stack([work, 2 * work], axis=1)
    fitted = NonNegativeRegression(np.ones(2)).fit(X, 6 * work)
    assert fitted.multiples is not None
    np.testing.assert_allclose(fitted.multiples, fitted.multiples[0], rtol=1e-3)
    np.testing.assert_allclose(fitted.predict(X).mean, 6 * work, rtol=1e-3)


def test_a_prediction_is_the_same_in_any_unit():
    rng = np.random.default_rng(0)
    X, Z = rng.uniform(1, 10, (20, 4)), rng.uniform(0, 1, (20, 2))
    y = X @ [1.0, 2.0, 0.5, 0.1] * np.exp(0.02 * rng.standard_normal(20))
    fits = [
        NonNegativeRegression(np.ones(4)).fit(unit * X, 1e3 * y, None, Z).predict(unit * X, Z).mean
        for unit in (1.0, 1e-6)
    ]
    np.testing.assert_allclose(fits[0], fits[1], rtol=1e-6)


def test_measurements_with_large_errors_count_less():
    rng = np.random.default_rng(0)
    X = rng.uniform(1, 10, (30, 1))
    y = 2 * X[:, 0]
    y[:10] *= 1.5
    errors = np.where(np.arange(30) < 10, 0.5, 0.01) * y
    for regression in (GaussianRegression(), NonNegativeRegression(np.ones(1))):
        predicted = regression.fit(X, y, errors).predict(X[10:]).mean
        np.testing.assert_allclose(predicted, y[10:], rtol=0.03)


@pytest.mark.parametrize("regression", [GaussianRegression, NonNegativeRegression])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y: (X, np.append(y[:-1], 0.0)), "row 4: latency"),
        (lambda X, y: (X * np.nan, y), "row 0: features"),
        (lambda X, y: (X, y[:-1]), "a latency for each"),
    ],
)
def test_a_bad_row_is_named(regression, change, message):
    X, y = change(np.arange(1.0, 11.0).reshape(5, 2), np.arange(1.0, 6.0))
    with pytest.raises(InputError, match=message):
        regression().fit(X, y)


def test_negative_work_is_refused():
    X = np.array([[1.0, 2.0], [1.0, -2.0], [2.0, 2.0]])
    with pytest.raises(InputError, match="row 1, column 1: -2.0"):
        NonNegativeRegression().fit(X, np.ones(3))


def test_a_row_without_work_is_refused():
    with pytest.raises(InputError, match="row 1: expected some work"):
        NonNegativeRegression(np.ones(2)).fit(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones(2))
