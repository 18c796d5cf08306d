"""Regression of latencies on any table of numeric features, one latency for each row.

Two models predict the logarithm of a positive quantity from few rows, with intervals. Both are
Gaussian processes with a trend whose coefficients are integrated out. The trend of
`GaussianRegression` is linear in the features; that of `NonNegativeRegression` is a sum of
non-negative contributions. They are implemented in numpy: with 30 rows a fit takes 10 to 50 ms
where BoTorch takes 100 to 500 ms, which matters when hundreds are fitted (cross-validation, active
learning). Source of the algebra: Rasmussen and Williams 2006, chapters 2 and 5.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float
from scipy import linalg, optimize

from flash.errors import InputError
from flash.latency.cost_model import Values
from flash.latency.prediction import Prediction, from_logs, t_quantile

Matrix = Float[np.ndarray, "n k"]
Square = Float[np.ndarray, "n m"]

MIN_NOISE = 0.01
"""Lower bound of the standard deviation of a log latency: processes differ by more than the samples
of one process show."""
_MAX_ROWS = 300
"""Greatest number of rows, evenly spaced, on which hyperparameters are optimized."""
_BATCH = 4096


class _Posterior:
    """Posterior of a zero-mean Gaussian process, given residuals of covariance `K` with noise."""

    def __init__(self, K: Square, residuals: Values) -> None:
        self._factor = linalg.cholesky(K, lower=True)
        self.weights = linalg.cho_solve((self._factor, True), residuals)
        self.residuals = residuals

    @property
    def log_likelihood(self) -> float:
        """Log density of the residuals, without the constant term."""
        return -0.5 * float(self.residuals @ self.weights) - float(
            np.log(np.diag(self._factor)).sum()
        )

    def explained(self, cross: Square) -> Values:
        """Compute the reduction of variance, for columns of covariances with the rows."""
        return (linalg.solve_triangular(self._factor, cross, lower=True) ** 2).sum(axis=0)

    def left_out(self) -> tuple[Values, Values]:
        """Return the leave-one-out residual of every row and its standard deviation."""
        variance = 1 / np.diag(self.inverse())
        return self.weights * variance, np.sqrt(variance)

    def inverse(self) -> Square:
        """Return the inverse of `K`."""
        return linalg.cho_solve((self._factor, True), np.eye(len(self.weights)))


@dataclass(frozen=True)
class _UnitCube:
    """Scaling of features to the unit cube of the fitted rows."""

    low: Values
    spread: Values

    @classmethod
    def of(cls, X: Matrix) -> "_UnitCube":
        """Return the scaling that maps these rows onto the unit cube."""
        low = X.min(axis=0)
        spread = X.max(axis=0) - low
        return cls(low, np.where(spread > 0, spread, 1.0))

    def __call__(self, X: Matrix) -> Matrix:
        return (X - self.low) / self.spread


def squared_distances(first: Matrix, second: Matrix) -> Square:
    """Compute squared Euclidean distances between the rows of `first` and of `second`."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.maximum(squares, 0.0)


def _checked(X: Matrix, y: Values, y_std: Values | None) -> tuple[Matrix, Values, Values]:
    """Validate features, latencies and errors; return float arrays, errors relative to y."""
    X, y = np.asarray(X, dtype=float), np.asarray(y, dtype=float)
    if X.ndim != 2 or y.shape != X.shape[:1] or len(y) < 2:
        raise InputError(
            f"table of shape {X.shape} with {y.shape} latencies: expected at least two rows of "
            "features and a latency for each; check the columns"
        )
    errors = np.zeros_like(y) if y_std is None else np.asarray(y_std, dtype=float)
    for name, values, legal in (
        ("features", X, np.isfinite(X)),
        ("latency", y, np.isfinite(y) & (y > 0)),
        ("y_std", errors, np.isfinite(errors) & (errors >= 0)),
    ):
        if not legal.all():
            row = int(np.argwhere(~legal)[0][0])
            raise InputError(
                f"table, row {row}: {name} {values[row]}: expected finite numbers, latencies "
                "above zero and standard errors of at least zero; repair or drop the row"
            )
    return X, y, errors / y


def _subset(n: int) -> np.ndarray:
    return np.linspace(0, n - 1, min(n, _MAX_ROWS)).round().astype(int)


def _batches(n: int) -> Iterator[slice]:
    return (slice(start, start + _BATCH) for start in range(0, n, _BATCH))


class GaussianRegression:
    """Gaussian process on log y with a linear trend and smooth deviations from it.

    The kernel is constant + linear + squared exponential with a lengthscale for each feature, on
    features scaled to the unit cube and standardized log y. The hyperparameters maximize the
    posterior density. Intervals include the noise of a measurement. They are widened until the
    leave-one-out residuals of the fitted rows have unit variance, since a posterior with point
    estimates of its hyperparameters is overconfident.
    """

    def fit(self, X: Matrix, y: Values, y_std: Values | None = None) -> Self:
        """Fit to rows `X` with latencies `y` and, if known, their standard errors `y_std`.

        Raises:
            InputError: A value is not finite, a latency is not positive, or shapes differ.
        """
        X, y, relative = _checked(X, y, y_std)
        self._unit = _UnitCube.of(X)
        self._rows = self._unit(X)
        logs = np.log(y)
        self._level, self._scale = float(logs.mean()), float(logs.std(ddof=1)) or 1.0
        known = (relative / self._scale) ** 2
        target = (logs - self._level) / self._scale
        some = _subset(len(y))
        self._theta = self._best(self._rows[some], target[some], known[some])
        noise = math.exp(self._theta[-1]) + known
        self._noise = float(noise.mean())
        K = self._kernel(self._rows, self._rows)
        self._posterior = _Posterior(K + np.diag(noise), target)
        residuals, deviations = self._posterior.left_out()
        wide = max(1.0, float(np.sqrt(((residuals / deviations) ** 2).mean())))
        # Trend and lengthscales consume degrees of freedom of the same rows.
        self._widen = t_quantile(max(len(y) - 2 * X.shape[1] - 1, 2)) * wide
        return self

    def predict(self, X: Matrix) -> Prediction:
        """Predict latencies with intervals."""
        rows = self._unit(np.asarray(X, dtype=float))
        center, variance = np.empty(len(rows)), np.empty(len(rows))
        for batch in _batches(len(rows)):
            cross = self._kernel(self._rows, rows[batch])
            center[batch] = self._posterior.weights @ cross
            variance[batch] = self._prior_variance(rows[batch]) - self._posterior.explained(cross)
        deviation = self._scale * np.sqrt(np.maximum(variance, 0) + self._noise)
        return from_logs(self._level + self._scale * center, self._widen * deviation)

    def covariance(self, first: Matrix, second: Matrix) -> Square:
        """Compute the prior covariance of log latencies, without the fitted rows."""
        return self._scale**2 * self._kernel(self._unit(first), self._unit(second))

    @property
    def noise_variance(self) -> float:
        """Variance of the measurement noise of a log latency."""
        return self._scale**2 * self._noise

    def _kernel(self, first: Matrix, second: Matrix) -> Square:
        *lengths, smooth, linear, _ = np.exp(self._theta)
        squares = squared_distances(first / lengths, second / lengths)
        return smooth * np.exp(-0.5 * squares) + linear * (1 + (first - 0.5) @ (second - 0.5).T)

    def _prior_variance(self, rows: Matrix) -> Values:
        *_, smooth, linear, _ = np.exp(self._theta)
        return smooth + linear * (1 + ((rows - 0.5) ** 2).sum(axis=1))

    @staticmethod
    def _best(rows: Matrix, target: Values, known: Values) -> Values:
        """Optimize the logs of the lengthscales and of the smooth, trend and noise variances."""
        k = rows.shape[1]
        # Lengthscales as in botorch: their logs have mean sqrt(2) + log(k)/2, deviation sqrt(3).
        middle = np.array([math.sqrt(2) + math.log(k) / 2] * k + [-2.0, 0.0, -5.0])
        spread = np.array([math.sqrt(3)] * k + [2.0, 2.0, 2.0])
        squares = (rows[:, None, :] - rows[None, :, :]) ** 2
        trend = 1 + (rows - 0.5) @ (rows - 0.5).T

        def loss(theta: Values) -> tuple[float, Values]:
            smooth = math.exp(theta[k]) * np.exp(-0.5 * squares @ np.exp(-2 * theta[:k]))
            linear = math.exp(theta[k + 1]) * trend
            noise = math.exp(theta[k + 2])
            posterior = _Posterior(smooth + linear + np.diag(noise + known), target)
            outer = np.outer(posterior.weights, posterior.weights) - posterior.inverse()
            inner = outer * smooth
            gradient = np.array([
                *(0.5 * np.einsum("ij,ijk->k", inner, squares) * np.exp(-2 * theta[:k])),
                0.5 * inner.sum(),
                0.5 * (outer * linear).sum(),
                0.5 * noise * np.trace(outer),
            ])
            away = (theta - middle) / spread
            return (
                0.5 * float(away @ away) - posterior.log_likelihood,
                away / spread - gradient,
            )

        bounds = [(-3.0, 8.0)] * k + [(-9.0, 4.0), (-4.0, 6.0), (-13.0, 1.0)]
        # Two local optima are common: only trend and noise, or only the smooth part.
        wavy = np.array([math.log(0.7)] * k + [0.0, -1.0, -6.0])
        found = [
            optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
            for start in (middle, wavy)
        ]
        return min(found, key=lambda result: result.fun).x


@dataclass(frozen=True)
class _Hyperparameters:
    """Standard deviations of coefficients, smooth factor and noise, relative to their values."""

    freedom: float
    smooth: float
    length: float
    noise: float


_PRIOR = _Hyperparameters(freedom=1.0, smooth=0.04, length=1.0, noise=0.03)
"""Hyperparameters for a device without measurements."""
# Start of the optimization: no smooth factor, and errors that are too large rather than too small.
_START = _Hyperparameters(freedom=1.0, smooth=0.0, length=1.0, noise=0.05)
_CANDIDATES = [
    _Hyperparameters(freedom, smooth, length, noise)
    for freedom, (smooth, length), noise in itertools.product(
        (0.1, 0.3, 0.6, 1.2, 2.4),
        ((0.0, 1.0), *itertools.product((0.02, 0.05, 0.12, 0.3), (0.7, 2.0))),
        (MIN_NOISE, 0.015, 0.023, 0.035, 0.055, 0.1),
    )
]
_NUM_STEPS, _SELECTION_STEPS = 8, (1, 3)
"""Number of steps of the fit, and the steps that select the hyperparameters anew."""


class NonNegativeRegression:
    """Regression of y as a sum of non-negative contributions, times a smooth factor near 1.

    Every column of X is an amount of work, which never reduces the latency: contributions are X
    times coefficients >= 0. Errors are relative, so rows of all sizes weigh the same. The
    coefficients are shrunk towards nominal ones times a common factor, by an amount that the rows
    determine: with few rows and nearly collinear columns, least squares alone would assign all work
    to one column. The residuals of log y are a Gaussian process over features Z of the rows.
    Intervals are those of `GaussianRegression`.

    Args:
        nominal: Prior cost of a unit of each column, up to a common factor. None assumes that all
            columns contribute equally on average, and adds a constant column.

    Attributes:
        multiples: Ratio of each coefficient to its nominal one, without the common factor.
        log_evidence: Log density of the fitted rows, to compare choices of `nominal`.
    """

    def __init__(self, nominal: Values | None = None) -> None:
        self._given = nominal
        self._nominal = nominal
        self._hyper = _PRIOR
        self._noise = _PRIOR.noise**2
        self._factor = 1.0
        self.multiples: Values | None = None
        self.log_evidence = -math.inf

    def fit(
        self, X: Matrix, y: Values, y_std: Values | None = None, Z: Matrix | None = None
    ) -> Self:
        """Fit to rows of work with latencies and, if known, their standard errors.

        Args:
            X: Non-negative amounts of work.
            y: Latencies.
            y_std: Standard errors of the latencies.
            Z: Features of the smooth factor; None takes X.

        Raises:
            InputError: A value is not finite, an amount is negative, a latency is not positive, a
                row has no work, or shapes differ.
        """
        X, y, relative = _checked(X, y, y_std)
        if (X < 0).any():
            row, column = np.argwhere(X < 0)[0]
            raise InputError(
                f"table, row {row}, column {column}: {X[row, column]}: expected an amount of work, "
                "not negative; use GaussianRegression for such a table"
            )
        Z = X if Z is None else np.asarray(Z, dtype=float)
        if self._given is None:
            means = np.append(X.mean(axis=0), 1.0)
            self._nominal = 1 / (np.where(means > 0, means, 1.0) * len(means))
        self._factor = 1.0
        work = self._work(X)
        if not work.any(axis=1).all():
            row = int(np.argmin(work.any(axis=1)))
            raise InputError(f"table, row {row}: expected some work, found none; drop the row")
        self._factor = float(np.exp(np.log(y / work.sum(axis=1)).mean()))
        work = self._work(X)
        self._unit = _UnitCube.of(Z)
        self._rows = self._unit(Z)
        known = relative**2
        squares = squared_distances(self._rows, self._rows)
        self._hyper, multiples = _fit_multiples(work, y, squares, known)
        self.multiples = multiples
        sums = work @ multiples
        self._A, residuals = work / sums[:, None], np.log(y / sums)
        noise = self._hyper.noise**2 + known
        self._noise = float(noise.mean())
        C = _smooth(self._hyper, squares) + np.diag(noise)
        self._smooth_weights = _Posterior(C, residuals).weights
        trend = self._hyper.freedom**2 * self._A @ self._A.T
        self._posterior = _Posterior(C + trend, residuals - self._A @ (1 - multiples))
        self.log_evidence = self._posterior.log_likelihood
        left_out, deviations = self._posterior.left_out()
        wide = max(1.0, float(np.sqrt(((left_out / deviations) ** 2).mean())))
        spent = float(np.sum(trend * self._posterior.inverse()))
        self._widen = t_quantile(max(len(y) - spent, 1.0)) * wide
        return self

    def predict(self, X: Matrix, Z: Matrix | None = None) -> Prediction:
        """Predict latencies with intervals."""
        X = np.asarray(X, dtype=float)
        Z = X if Z is None else np.asarray(Z, dtype=float)
        work, rows = self._work(X), self._unit(Z)
        sums = work @ self._multiples
        A = work / sums[:, None]
        center, variance = np.log(sums), np.empty(len(sums))
        hyper = self._hyper
        for batch in _batches(len(sums)):
            cross = _smooth(hyper, squared_distances(self._rows, rows[batch]))
            center[batch] += self._smooth_weights @ cross
            cross += hyper.freedom**2 * self._A @ A[batch].T
            variance[batch] = -self._posterior.explained(cross)
        variance += hyper.smooth**2 + hyper.freedom**2 * (A**2).sum(axis=1)
        deviation = np.sqrt(np.maximum(variance, 0.0) + self._noise)
        return from_logs(center, self._widen * deviation)

    def smooth_factor(self, Z: Matrix) -> Values:
        """Return the smooth factor on the sum of contributions."""
        cross = _smooth(self._hyper, squared_distances(self._rows, self._unit(Z)))
        return np.exp(self._smooth_weights @ cross)

    def covariance(
        self, first: Matrix, second: Matrix, Z_first: Matrix, Z_second: Matrix
    ) -> Square:
        """Compute the prior covariance of log latencies, without the fitted rows."""
        A_first, A_second = (
            work / (work @ self._multiples)[:, None] for work in map(self._work, (first, second))
        )
        if self.multiples is not None:
            Z_first, Z_second = self._unit(Z_first), self._unit(Z_second)
        smooth = _smooth(self._hyper, squared_distances(Z_first, Z_second))
        return smooth + self._hyper.freedom**2 * A_first @ A_second.T

    @property
    def noise_variance(self) -> float:
        """Variance of the measurement noise of a log latency."""
        return self._noise

    @property
    def _multiples(self) -> Values:
        """`multiples`, or ones before any fit."""
        if self.multiples is not None:
            return self.multiples
        assert self._nominal is not None
        return np.ones(len(self._nominal))

    def _work(self, X: Matrix) -> Matrix:
        """Compute the contribution of each column at nominal coefficients."""
        if self._given is None:
            X = np.concatenate([X, np.ones((len(X), 1))], axis=1)
        assert self._nominal is not None
        return self._factor * X * self._nominal


def _smooth(hyper: _Hyperparameters, squares: Square) -> Square:
    return hyper.smooth**2 * np.exp(-0.5 / hyper.length**2 * squares)


def _fit_multiples(
    work: Matrix, y: Values, squares: Square, known: Values
) -> tuple[_Hyperparameters, Values]:
    """Fit hyperparameters and multiples by Gauss-Newton steps on log y.

    The hyperparameters are selected after the first steps: at the start the smooth factor could
    explain deviations that the coefficients have yet to fit.
    """
    hyper, multiples, some = _START, np.ones(work.shape[1]), _subset(len(y))
    for step in range(_NUM_STEPS):
        sums = work @ multiples
        A, target = work / sums[:, None], 1 + np.log(y / sums)
        if step in _SELECTION_STEPS:
            hyper = _select_hyperparameters(
                A[some], target[some], squares[np.ix_(some, some)], known[some]
            )
        C = _smooth(hyper, squares) + np.diag(hyper.noise**2 + known)
        multiples = _non_negative(A, target, C, hyper.freedom)
    return hyper, multiples


def _select_hyperparameters(
    A: Matrix, target: Values, squares: Square, known: Values
) -> _Hyperparameters:
    """Select the candidate of greatest posterior density, with coefficients integrated out."""
    residuals = target - A.sum(axis=1)
    trend = A @ A.T

    def density(hyper: _Hyperparameters) -> float:
        noise = np.diag(hyper.noise**2 + known)
        K = hyper.freedom**2 * trend + _smooth(hyper, squares) + noise
        prior = 0.5 * math.log(hyper.noise / 0.02) ** 2 + 0.5 * (hyper.smooth / 0.05) ** 2
        return _Posterior(K, residuals).log_likelihood - prior

    return max(_CANDIDATES, key=density)


def _non_negative(A: Matrix, target: Values, C: Square, freedom: float) -> Values:
    """Return the multiples >= 0 of greatest posterior density (prior mean 1), given the target."""
    factor = linalg.cholesky(C, lower=True)
    white = linalg.solve_triangular(factor, np.column_stack([A, target]), lower=True)
    k = A.shape[1]
    matrix = np.concatenate([white[:, :k], np.eye(k) / freedom])
    return optimize.nnls(matrix, np.concatenate([white[:, k], np.full(k, 1 / freedom)]))[0]
