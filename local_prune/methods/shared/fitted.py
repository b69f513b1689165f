"""What methods share that fit the weights that stay: the least-squares problem of the layer, solved with damping."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from local_prune.pruner import Task
from local_prune.statistics import Damped, LeastSquares, solved
from supernet.candidates import Candidate


class FittedPruner:
    """A method whose candidates are made of the damped least-squares problem of their layer. A subclass says how.

    Attributes:
        damping: Ridge towards the dense weight, as a fraction of the Hessian's mean diagonal.
    """

    damping: float

    def statistics(self, dense: Tensor, width: int) -> LeastSquares:
        """The sums of the least-squares problem."""
        d_out, d_in = dense.shape
        return LeastSquares.zeros(d_in, d_out, dense.device)

    def fitted(self, problem: Damped, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """The candidates of a damped problem, one a level; called again with more damping where a step fails.

        Args:
            problem: The sums over the calibration tokens, with the ridge.
            task: The unit.
            kept: What each level keeps, falling, without the dense level; at least one.
        """
        raise NotImplementedError

    def candidates(self, task: Task, kept: Sequence[int]) -> list[Candidate]:
        """One candidate a level, with the weights that were fitted."""
        if not kept:
            return []
        statistics = task.statistics
        assert isinstance(statistics, LeastSquares)

        def solve(problem: Damped) -> list[Candidate]:
            return self.fitted(problem, task, kept)

        return solved(statistics, task.dense.T, self.damping, task.where, solve)
