"""The weights of the principles for a query: fixed weights, or those of a learned router.

SafeWork-R1 weights its value models by a routing vector that depends on the query. Its report does not describe how the
vector is computed. Ours is a multinomial logistic regression. Its inputs are the values of the prompt alone, and its
output is the probability that each principle is the one that matters. It is learned from rows whose label names that
principle (``rollout.guidance.fit_router``).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rollout.guidance import decisions
from rollout.guidance.settings import GuidanceConfig


@dataclass(frozen=True)
class LogisticRouter:
    """A fitted multinomial logistic regression."""

    principles: list[str]
    # [principles, values].
    coefficients: list[list[float]]
    # [principles].
    intercepts: list[float]
    # The number of rows that it was fitted on.
    rows: int
    # The number of held-out rows, and the accuracy on them.
    held_out: int
    accuracy: float


@dataclass(frozen=True)
class Router:
    """Returns the weights of the principles for a query."""

    # The weights of every query if there is no learned router, and of a query without values. Their sum is 1.
    fixed: tuple[float, ...]
    learned: LogisticRouter | None = None

    @property
    def reads_values(self) -> bool:
        """Whether the weights depend on the query's values."""
        return self.learned is not None

    def weights(self, query_values: Sequence[float] | None) -> tuple[float, ...]:
        """Return the weights of the principles, whose sum is 1."""
        if self.learned is None or query_values is None:
            return self.fixed
        logits = np.array(self.learned.coefficients) @ np.array(query_values) + self.learned.intercepts
        return tuple(softmax(logits[None])[0].tolist())


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last dimension."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


def fit(
    values: np.ndarray, labels: np.ndarray, classes: int, penalty: float, tolerance: float = 1e-9
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a multinomial logistic regression by Newton's method.

    It minimises the summed negative log-likelihood + penalty/2 · the sum of all squared coefficients. The penalty
    includes the intercepts, which makes the solution unique.

    Args:
        values: [rows, values]; labels: [rows], class numbers.

    Returns: coefficients [classes, values], intercepts [classes]. Raises ValueError if it does not converge.
    """
    rows = len(values)
    features = np.concatenate([values, np.ones((rows, 1))], axis=1)
    width = features.shape[1]
    targets = np.eye(classes)[labels]
    weights = np.zeros((classes, width))

    def loss(at: np.ndarray) -> float:
        probabilities = softmax(features @ at.T)
        return float(-np.log(probabilities[np.arange(rows), labels]).sum() + penalty / 2 * (at**2).sum())

    for _ in range(100):
        probabilities = softmax(features @ weights.T)
        gradient = (probabilities - targets).T @ features + penalty * weights
        if np.abs(gradient).max() < tolerance * rows:
            return weights[:, :-1], weights[:, -1]
        # d²loss / d(class a, feature i) d(class b, feature j)
        curvature = np.einsum("na,ab->nab", probabilities, np.eye(classes))
        curvature -= np.einsum("na,nb->nab", probabilities, probabilities)
        hessian = np.einsum("nab,ni,nj->aibj", curvature, features, features).reshape(classes * width, -1)
        hessian += penalty * np.eye(classes * width)
        step = np.linalg.solve(hessian, gradient.ravel()).reshape(classes, width)
        size = 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-10:
            size /= 2
        weights = weights - size * step
    raise ValueError("the router's regression did not converge: use a larger fit_router.penalty")


def open_router(config: GuidanceConfig) -> Router:
    """Return the router that the configuration names. Raises ValueError for a file that does not fit."""
    principles = config.values.principles
    fixed = decisions.normalised(config.weights, principles)
    if config.router is None:
        return Router(fixed)
    try:
        learned = LogisticRouter(**json.loads(Path(config.router).read_text()))
        shape = (np.shape(learned.coefficients), np.shape(learned.intercepts))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"guidance.router={config.router!r}: {error}; give a file of fit_router") from error
    count = len(principles)
    if learned.principles != list(principles) or shape != ((count, count), (count,)):
        raise ValueError(
            f"guidance.router={config.router!r}: it is for the principles {learned.principles}, and "
            f"guidance.values.principles={list(principles)}: fit it again"
        )
    return Router(fixed, learned)


def write(router: LogisticRouter, path: Path) -> None:
    """Write the router. Raises FileExistsError if the file exists, because a file is never replaced."""
    with path.open("x") as file:
        json.dump(asdict(router), file, indent=1)
