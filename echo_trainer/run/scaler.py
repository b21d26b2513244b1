"""Watch over the scaler of fp16: by skipping steps it finds its scale; when it skips every step the run is over."""

from ..method.losses import NonFiniteLossError
from .host import Host

MAX_SKIPPED_IN_A_ROW = 30
"""The run ends when the fp16 scaler skips so many optimizer steps in a row; each halves its scale, 2**16 at first."""


class ScalerWatch:
    """Looks at the scale now and then: reading it waits for the device."""

    def __init__(self, host: Host):
        self.host = host
        self._seen: tuple[int, float] | None = None  # optimizer step, scale

    def look(self) -> None:
        """
        Stop when the scaler has skipped every optimizer step since its scale was last looked at.

        Not by `accelerator.optimizer_step_was_skipped`: it is never true for a fused optimizer, the default.

        Raises:
            NonFiniteLossError: it has.
        """
        step, scaler = self.host.state.global_step, self.host.accelerator.scaler
        if scaler is None or (self._seen is not None and step < self._seen[0] + MAX_SKIPPED_IN_A_ROW):
            return
        scale = scaler.get_scale()
        if self._seen is not None:
            seen_at, before = self._seen
            if scale <= before * scaler.get_backoff_factor() ** (step - seen_at):
                raise NonFiniteLossError(
                    f"The last {step - seen_at} optimizer steps, up to step {step}, were all skipped: their gradients "
                    f"are not finite whatever the scale of fp16 (it is {scale:g} by now). No weight was changed by "
                    f"them. Use bf16=True instead of fp16, or a lower echo_learning_rate, or no echo "
                    f"(echo_p_start=0 and echo_p_end=0)."
                )
        self._seen = (step, scale)
