"""`PublishingTrainer`: a card and pushes of our own, in the place of transformers'."""

from concurrent.futures import Future
from typing import Any

from ..compat.trainer import JointTrainer
from ..hub.push import Pushed
from .pushes import Pushes
from .save import Saver


class PublishingTrainer(JointTrainer):
    """
    Methods of `transformers.Trainer` that write a card and push.

    Attributes:
        saver: what saves.
        pushes: what pushes.
    """

    saver: Saver
    pushes: Pushes

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Write our model card and the record of the run to `output_dir`."""
        self.saver.card(dataset_name)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Look whether pushing will work, and make the repository; what is wrong is a warning here."""
        self.push_in_progress = None  # the Trainer's own bookkeeping, which stays empty
        self.pushes.preflight(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        base_model: str | None = None,
        **kwargs: Any,
    ) -> Pushed | Future | None:
        """
        Save the adapter in `output_dir`, then push it and compare its checksums.

        Args:
            commit_message: first line of the commit.
            blocking: False returns a `Future` of the result; a failure is then logged as well.
            token: write token; None takes `hub_token`, HF_TOKEN or that of `hf auth login`.
            revision: branch; None takes `hub_revision`.
            private: as in `hub.push.push_adapter`; None takes `hub_private_repo`.
            base_model: id of the base on the Hub, where the run was trained on a local folder.
            kwargs: as in `create_model_card`: `dataset_name`.

        Returns:
            What is on the Hub now; None on processes other than the first.

        Raises:
            PushError: not pushed; the files are in `output_dir`, and the message holds the command to push again.
        """
        where = {"token": token, "revision": revision, "private": private, "base_model": base_model}
        return self.pushes.push(commit_message, blocking, **where, dataset_name=kwargs.get("dataset_name"))
