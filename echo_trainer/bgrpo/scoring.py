"""The reward function that TRL calls: verifier and rank to rewards, and what is logged of the beams."""

from collections.abc import Callable
from typing import Any

from .rewards import Reward, group_rewards
from .verifier import Verifier, score_of

NOT_COLUMNS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""What TRL hands to a reward function beside the columns of the rows."""


class BeamReward:
    """
    Rewards of a batch whose rows are whole groups in beam order; rank = row % G.

    TRL computes rewards before it shuffles the rows, on the rows of a process.

    Args:
        verifier: of a completion.
        reward: of (right, rank, G).
        zero_sum: see `group_rewards`.
        group_size: returns G; evaluation may have another one than training.
    """

    __name__ = "beams"  # the metrics are called `rewards/beams/mean` and `rewards/beams/std`

    def __init__(self, verifier: Verifier, reward: Reward, zero_sum: bool, group_size: Callable[[], int]):
        self.verifier, self.reward, self.zero_sum, self.group_size = verifier, reward, zero_sum, group_size

    def __call__(
        self, prompts: list[Any], completions: list[Any], log_metric: Callable[[str, float], None], **given: Any
    ) -> list[float]:
        """
        The rewards.

        Args:
            prompts, completions: of the rows.
            log_metric: TRL's: logs a figure of this batch.
            given: the other columns, each a list; and what else TRL hands over.

        Returns:
            A reward for each row. Logged of the groups: `beams/right`, the mean score; `beams/first_right`, that of
            the first beam; `beams/any_right`, of the best one; `beams/mixed`, the share that teaches something.
        """
        columns = {name: values for name, values in given.items() if name not in NOT_COLUMNS}
        scores = [
            score_of(self.verifier, prompt, completion, {name: values[i] for name, values in columns.items()})
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        size = self.group_size()
        groups = [scores[start : start + size] for start in range(0, len(scores), size)]
        log_metric("beams/right", sum(scores) / len(scores))
        for name, figure in (
            ("first_right", lambda group: group[0]),
            ("any_right", max),
            ("mixed", lambda group: float(min(group) != max(group))),
        ):
            log_metric(f"beams/{name}", sum(map(figure, groups)) / len(groups))
        return [reward for i, group in enumerate(groups) for reward in self._rewards(group, prompts[i * size])]

    def _rewards(self, group: list[float], prompt: Any) -> list[float]:
        try:
            return group_rewards(group, self.reward, self.zero_sum)
        except Exception as error:
            error.add_note(f"The beams are those of the prompt {prompt!r}, with the scores {group}.")
            raise
