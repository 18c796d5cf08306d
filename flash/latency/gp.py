"""The paper's predictor: a Gaussian process on whole models.

Source: arXiv:2603.15954, stage 1 of the search: about 800 measurements gave a cross-validated R2
of 0.97. The paper states neither features nor kernel; here: depth, both widths (as logarithms) and
the shares of full and sliding layers, each scaled to the unit cube of the training models; target
log latency; a linear mean and botorch's default kernel, whose lengthscale prior suits few points.
Logs and shares turn a sum over layers into nearly a plane, which the linear mean takes: on a
synthetic device with 41 models R2 rose from 0.84 (raw values and counts, constant mean) to 0.99.
"""

from collections.abc import Sequence
from typing import Self, cast

import numpy as np
import torch
from jaxtyping import Float

from flash.arch import ArchSpec, Attention
from flash.latency.prediction import Prediction, Values, from_logs, t_quantile

NUM_FEATURES = 5
_LEAST_NOISE = 0.01
"""Standard deviation of log latency below which known noise is not believed: processes differ by
more than the samples of one process show."""
_BATCH = 1024


def features(specs: Sequence[ArchSpec]) -> Float[np.ndarray, "n 5"]:
    """Logs of depth, model_dim and ffn_dim; shares of full and of sliding layers."""
    full, sliding = Attention.full_attention, Attention.sliding_attention
    values = np.array(
        [
            (
                spec.num_layers,
                spec.model_dim,
                spec.ffn_dim,
                spec.layer_types.count(full),
                spec.layer_types.count(sliding),
            )
            for spec in specs
        ],
        dtype=float,
    ).reshape(-1, NUM_FEATURES)
    shares = values[:, 3:] / values[:, :1]
    return np.concatenate([np.log(values[:, :3]), shares], axis=1)


class GaussianProcess:
    """SingleTaskGP in float64 on log latency; the interval includes the noise of a measurement.

    Hyperparameters are point estimates and the features leave out the order of the layers, so the
    bare posterior is too sure of itself: its deviation is widened until the leave-one-out
    residuals of the training models have unit variance.
    """

    def fit(
        self, specs: Sequence[ArchSpec], values_ms: Values, errors_ms: Values | None = None
    ) -> Self:
        """Maximise the marginal likelihood; `errors_ms`, when given, fix the noise."""
        # Imported here: two seconds that the other predictors need not pay.
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.means import LinearMean
        from gpytorch.mlls import ExactMarginalLogLikelihood

        x, values = features(specs), np.asarray(values_ms, dtype=float)
        self._low = x.min(axis=0)
        spread = x.max(axis=0) - self._low
        self._spread = np.where(spread > 0, spread, 1.0)
        y = np.log(values)
        self._level, self._scale = float(y.mean()), float(y.std(ddof=1)) or 1.0
        noise = None
        if errors_ms is not None:
            relative = np.maximum(np.asarray(errors_ms, dtype=float) / values, _LEAST_NOISE)
            noise = _column((relative / self._scale) ** 2)
        self._model = SingleTaskGP(
            self._inputs(x),
            _column((y - self._level) / self._scale),
            noise,
            outcome_transform=None,
            mean_module=LinearMean(NUM_FEATURES).double(),
        )
        fit_gpytorch_mll(ExactMarginalLogLikelihood(self._model.likelihood, self._model))
        freedom = max(len(values) - NUM_FEATURES - 1, 1)
        self._widen = t_quantile(freedom) * max(1.0, self._left_out_deviation())
        return self

    def predict(self, specs: Sequence[ArchSpec]) -> Prediction:
        """Latencies with intervals."""
        mean, deviation = [], []
        with torch.no_grad():
            for batch in self._inputs(features(specs)).split(_BATCH):
                posterior = self._model.posterior(batch, observation_noise=True)
                mean.append(posterior.mean[:, 0].numpy())
                deviation.append(posterior.variance[:, 0].sqrt().numpy())
        center = self._level + self._scale * np.concatenate(mean)
        return from_logs(center, self._widen * self._scale * np.concatenate(deviation))

    def _left_out_deviation(self) -> float:
        """Root mean square of leave-one-out residuals in units of their predicted deviations.

        Source: Rasmussen and Williams 2006, eq. 5.12, with the hyperparameters kept.
        """
        from gpytorch.distributions import MultivariateNormal

        model = self._model.train()
        x, y = model.train_inputs[0], model.train_targets
        with torch.no_grad():
            prior = cast(MultivariateNormal, model.likelihood(model(x), x))
            precision = torch.linalg.inv(prior.covariance_matrix)
            residuals = precision @ (y - prior.mean) / precision.diagonal().sqrt()
        model.eval()
        return float((residuals**2).mean().sqrt())

    def _inputs(self, x: Float[np.ndarray, "n 5"]) -> torch.Tensor:
        return torch.from_numpy((x - self._low) / self._spread)


def _column(values: Values) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=float))[:, None]
