"""Regression of latencies on any table of numeric features, one latency for each row.

Two models predict the logarithm of a positive quantity from few rows, with intervals. Both are
Gaussian processes with a trend whose coefficients are integrated out. The trend of
`GaussianRegression` is linear in the features, for y or for log y; that of `NonNegativeRegression`
is a sum of non-negative contributions. They are implemented in numpy: with 50 rows a fit takes 10
to 150 ms where one of BoTorch takes 100 to 500 ms, which matters when hundreds are fitted
(cross-validation, active learning). Source of the algebra: Rasmussen and Williams 2006, chapters 2
and 5.
"""

import dataclasses
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
_RIDGE = 0.1
"""Weight of the prior where the trend of y is first linearized, in rows of unit relative error."""
_FLOOR = 0.3
"""Lower bound of a trend of y, relative to the smallest fitted latency: it has to stay positive."""
_LINEARIZATIONS = 2
"""Times that a trend of y is linearized anew; with four more, errors were the same."""
_FOLDS, _MAX_REFITTED = 5, 100
"""Folds that widen intervals, and the most rows for which hyperparameters are refitted there."""


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


@dataclass(frozen=True)
class _LogTrend:
    """Trend of log y that is linear in the features."""

    def basis(self, rows: Matrix) -> Matrix:
        """Derivatives of the trend by its coefficients."""
        return _columns(rows)

    def offset(self, rows: Matrix) -> Values:
        """Trend at coefficients of zero."""
        return np.zeros(len(rows))


@dataclass(frozen=True)
class _SumTrend:
    """Trend of y that is linear in the features, as that of a sum of costs is.

    Its logarithm is linearized at `coefficients`. The prior mean of the coefficients is a constant
    y at the level of the rows.

    Attributes:
        coefficients: Coefficients of y in units of the level.
        scale: Unit of the log latencies.
        floor: Lower bound of y in units of the level, far from the rows.
    """

    coefficients: Values
    scale: float
    floor: float

    @classmethod
    def start(cls, rows: Matrix, relative_y: Values, scale: float) -> "_SumTrend":
        """Linearize at a ridge regression of relative errors; `relative_y` is y over the level."""
        columns = _columns(rows)
        constant = np.eye(columns.shape[1])[0]
        matrix = np.concatenate([columns / relative_y[:, None], _RIDGE * np.eye(len(constant))])
        target = np.concatenate([np.ones(len(rows)), _RIDGE * constant])
        coefficients = np.linalg.lstsq(matrix, target, rcond=None)[0]
        return cls(coefficients, scale, _FLOOR * float(relative_y.min()))

    def moved(self, change: Values) -> "_SumTrend":
        """Linearize at the prior mean plus `change`, in units of log latencies."""
        constant = np.eye(len(change))[0]
        return dataclasses.replace(self, coefficients=constant + self.scale * change)

    def basis(self, rows: Matrix) -> Matrix:
        """Derivatives of the linearized trend by its coefficients."""
        return _columns(rows) / self._sums(rows)[:, None]

    def offset(self, rows: Matrix) -> Values:
        """Linearized trend at the prior mean of the coefficients."""
        sums = self._sums(rows)
        return (np.log(sums) + 1 / sums - _columns(rows) @ self.coefficients / sums) / self.scale

    def _sums(self, rows: Matrix) -> Values:
        return np.maximum(_columns(rows) @ self.coefficients, self.floor)


def _columns(rows: Matrix) -> Matrix:
    return np.column_stack([np.ones(len(rows)), rows - 0.5])


@dataclass(frozen=True)
class _Trended:
    """Posterior of log latencies under one trend, given its hyperparameters.

    Attributes:
        trend: Trend and the point at which it is linearized.
        theta: Logs of the lengthscales and of the smooth, trend and noise variances.
        loss: Negative log density of the rows and the hyperparameters.
        rows: Fitted rows.
        posterior: Posterior of the deviations from `trend.offset`.
        noise: Mean variance of the noise.
    """

    trend: _LogTrend | _SumTrend
    theta: Values
    loss: float
    rows: Matrix
    posterior: _Posterior
    noise: float

    @classmethod
    def of(
        cls, trend: _LogTrend | _SumTrend, rows: Matrix, target: Values, known: Values
    ) -> "_Trended":
        """Fit the hyperparameters, and then the point of linearization by Gauss-Newton steps."""
        some = _subset(len(rows))
        basis, shifted = trend.basis(rows), target - trend.offset(rows)
        theta, loss = _optimized(rows[some], basis[some], shifted[some], known[some])
        noise = math.exp(theta[-1]) + known

        def given(trend: _LogTrend | _SumTrend) -> _Posterior:
            basis = trend.basis(rows)
            K = _covariance(theta, rows, rows, basis, basis)
            return _Posterior(K + np.diag(noise), target - trend.offset(rows))

        posterior = given(trend)
        for _ in range(_LINEARIZATIONS):
            if isinstance(trend, _LogTrend):
                break
            trend = trend.moved(math.exp(theta[-2]) * trend.basis(rows).T @ posterior.weights)
            posterior = given(trend)
        return cls(trend, theta, loss, rows, posterior, float(noise.mean()))

    def predict(self, rows: Matrix) -> tuple[Values, Values]:
        """Compute the mean and the standard deviation of measured log latencies."""
        center, variance = self.trend.offset(rows), np.empty(len(rows))
        *_, smooth, linear, _ = np.exp(self.theta)
        own = self.trend.basis(self.rows)
        for batch in _batches(len(rows)):
            basis = self.trend.basis(rows[batch])
            cross = _covariance(self.theta, self.rows, rows[batch], own, basis)
            center[batch] += self.posterior.weights @ cross
            prior = smooth + linear * (basis**2).sum(axis=1)
            variance[batch] = prior - self.posterior.explained(cross)
        return center, np.sqrt(np.maximum(variance, 0) + self.noise)


def _covariance(
    theta: Values, first: Matrix, second: Matrix, first_basis: Matrix, second_basis: Matrix
) -> Square:
    *lengths, smooth, linear, _ = np.exp(theta)
    squares = squared_distances(first / lengths, second / lengths)
    return smooth * np.exp(-0.5 * squares) + linear * first_basis @ second_basis.T


def _optimized(rows: Matrix, basis: Matrix, target: Values, known: Values) -> tuple[Values, float]:
    """Optimize the logs of the lengthscales and of the smooth, trend and noise variances.

    Returns:
        The best values, and their negative log posterior density.
    """
    k = rows.shape[1]
    # Lengthscales as in botorch: their logs have mean sqrt(2) + log(k)/2, deviation sqrt(3).
    middle = np.array([math.sqrt(2) + math.log(k) / 2] * k + [-6.0, 0.0, -5.0])
    spread = np.array([math.sqrt(3)] * k + [3.0, 2.0, 2.0])
    squares = (rows[:, None, :] - rows[None, :, :]) ** 2
    trend = basis @ basis.T

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
    best = min(found, key=lambda result: result.fun)
    return best.x, float(best.fun)


class GaussianRegression:
    """Gaussian process on log y around a linear trend, with smooth deviations from it.

    The trend is linear in the features, and its coefficients are integrated out. It is a trend of
    y, as latencies are sums of costs, or of log y: the one under which the fitted rows are more
    probable. Deviations have a squared exponential kernel with a lengthscale for each feature.
    Features are scaled to the unit cube, and log y is standardized. The hyperparameters maximize
    the posterior density. Intervals include the noise of a measurement. They are widened until the
    residuals of left-out rows have unit variance, since a posterior with point estimates of its
    hyperparameters is overconfident. If the rows are few, the hyperparameters are estimated anew
    without the left-out rows.
    """

    def fit(self, X: Matrix, y: Values, y_std: Values | None = None) -> Self:
        """Fit to rows `X` with latencies `y` and, if known, their standard errors `y_std`.

        Raises:
            InputError: A value is not finite, a latency is not positive, or shapes differ.
        """
        X, y, relative = _checked(X, y, y_std)
        self._fit_mean(X, y, relative)
        if len(y) <= _MAX_REFITTED:
            residuals = _refitted_residuals(X, y, relative)
        else:
            left_out, deviations = self._model.posterior.left_out()
            residuals = left_out / deviations
        self._widen = t_quantile(len(y) - 1) * max(1.0, float(np.sqrt((residuals**2).mean())))
        return self

    def _fit_mean(self, X: Matrix, y: Values, relative: Values) -> None:
        """Fit everything but the widening of intervals."""
        self._unit = _UnitCube.of(X)
        rows, logs = self._unit(X), np.log(y)
        self._level, self._scale = float(logs.mean()), float(logs.std(ddof=1)) or 1.0
        sums = _SumTrend.start(rows, np.exp(logs - self._level), self._scale)
        target, known = (logs - self._level) / self._scale, (relative / self._scale) ** 2
        found = [_Trended.of(trend, rows, target, known) for trend in (_LogTrend(), sums)]
        self._model = min(found, key=lambda model: model.loss)

    def predict(self, X: Matrix) -> Prediction:
        """Predict latencies with intervals."""
        center, deviation = self.log_moments(X)
        return from_logs(center, self._widen * deviation)

    def log_moments(self, X: Matrix) -> tuple[Values, Values]:
        """Compute the mean and the standard deviation of measured log latencies, not widened."""
        center, deviation = self._model.predict(self._unit(np.asarray(X, dtype=float)))
        return self._level + self._scale * center, self._scale * deviation

    def covariance(self, first: Matrix, second: Matrix) -> Square:
        """Compute the prior covariance of log latencies, without the fitted rows."""
        rows = [self._unit(each) for each in (first, second)]
        bases = [self._model.trend.basis(each) for each in rows]
        return self._scale**2 * _covariance(self._model.theta, *rows, *bases)

    @property
    def noise_variance(self) -> float:
        """Variance of the measurement noise of a log latency."""
        return self._scale**2 * self._model.noise


def _refitted_residuals(X: Matrix, y: Values, relative: Values) -> Values:
    """Compute standardized residuals of log y in cross-validation with `_FOLDS` folds."""
    n = len(y)
    fold_of = np.random.default_rng(0).permutation(n) % min(n, _FOLDS)
    residuals = np.zeros(n)
    for fold in range(min(n, _FOLDS)):
        out = fold_of == fold
        if (~out).sum() < 2:  # one row has no spread; the intervals of two are infinite or nearly
            continue
        other = GaussianRegression()
        other._fit_mean(X[~out], y[~out], relative[~out])
        center, deviation = other.log_moments(X[out])
        residuals[out] = (np.log(y[out]) - center) / deviation
    return residuals


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
