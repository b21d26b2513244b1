"""`BeamGRPOTrainer`: `trl.GRPOTrainer` on the beams of each prompt. Reads as the diagram in `bgrpo/__init__.py`.

| differs from TRL | by |
|---|---|
| completions are beams, best first | `beams`, in the place of TRL's generation |
| rewards are those of a verifier and the rank | `scoring`, as TRL's only reward function |
| a run resumed between two generations is the same run | `resumption` |
| the final adapter is verified, described, moved into place whole | `run.save` |
| only listed files are pushed, and no failure is silent | `run.pushes` |

Advantages, ratio, clipping, KL and loss are TRL's.
"""

import inspect
import logging
from typing import Any

from trl import GRPOTrainer

from ..compat.beams import BeamJointTrainer, require_beam_joints
from ..compat.versions import warn_of_newer
from ..run.agreement import Agreement
from ..run.publishing import PublishingTrainer
from ..run.pushes import Pushes
from ..run.resume import find_checkpoint
from ..run.save import Saver
from .beams import Beams, constraints_of
from .config import BeamGRPOConfig
from .record import beam_record
from .refuse import as_beam_config, refuse_arguments, refuse_few_prompts, refuse_no_step, refuse_wide_beams
from .resumption import Resumption
from .rewards import make_reward
from .scoring import BeamReward
from .start import copied_as_it_is, refuse_other_reference
from .verifier import Verifier

logger = logging.getLogger(__name__)


class BeamGRPOTrainer(BeamJointTrainer):
    """
    Rank-aware beam GRPO: GRPO whose group is the beams of one beam search, rewarded by their rank.

    ```python
    from echo_trainer import BeamGRPOConfig, BeamGRPOTrainer

    trainer = BeamGRPOTrainer(
        model="my-sft-model",
        verifier=lambda prompt, completion, row: completion.strip() == row["answer"],
        args=BeamGRPOConfig(output_dir="out"),
        train_dataset=dataset,  # a column "prompt", and what the verifier needs
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        model: a causal language model, an adapter on one (`PeftModel`), or the name of a model.
        verifier: (prompt, completion, row) -> True, False, or a score from 0 to 1; see `bgrpo.verifier`.
        args: a [`BeamGRPOConfig`].
        train_dataset, and the others: those of `trl.GRPOTrainer`, without `reward_funcs`.

    Raises:
        ValueError: an argument or an option cannot work with beams; nothing is written.
        RuntimeError: the installed TRL has no place for beams.
    """

    _tag_names = ["trl", "grpo", "bgrpo"]
    _name = "BGRPO"
    args: BeamGRPOConfig
    saver: Saver
    pushes: Pushes
    echo = None  # for `run.save`: there is no echo, and no engine that shards one

    def __init__(self, model: Any, verifier: Verifier, args: BeamGRPOConfig | None = None, *more: Any, **options: Any):
        names = [name for name in inspect.signature(GRPOTrainer.__init__).parameters if name != "self"]
        names = [name for name in names if name not in ("model", "reward_funcs", "args")]
        if "reward_funcs" in options:
            raise ValueError(
                "`reward_funcs` is given. Rewards of beams are made of what a verifier says and of the rank: pass "
                "`verifier`, a callable (prompt, completion, row), and choose `beam_reward` in BeamGRPOConfig."
            )
        if not callable(verifier):
            raise ValueError(
                f"`verifier` is {verifier!r}. Pass a callable (prompt, completion, row) that returns True or False."
            )
        require_beam_joints()
        warn_of_newer()
        call = {**dict(zip(names, more, strict=False)), **options, "model": model, "args": as_beam_config(args, model)}
        refuse_arguments(call)
        config = call["args"]
        refuse_few_prompts(call.get("train_dataset"), config)
        self.verifier = verifier
        self.accuracy: list[dict[str, Any]] | None = None  # of `accuracy.compare`, for the card
        self.dataset_name: str | None = None
        self.staging_folder: str | None = None
        self.agreement = Agreement()
        self.beams, self.resumption = Beams(self), Resumption(self)
        self.saver, self.pushes = Saver(self, beam_record), Pushes(self)
        reward = make_reward(config.beam_reward, config.beam_decay, config.beam_wrong)
        rewards: Any = BeamReward(verifier, reward, config.beam_zero_sum, lambda: self.group_size)
        with copied_as_it_is(model):
            super().__init__(**call, reward_funcs=rewards)
        if self.ref_model is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which split both
            reference = self.accelerator.unwrap_model(self.ref_model)
            refuse_other_reference(self.model, reference, config.beta)
        if found := constraints_of(self.model.generation_config, self.generation_kwargs):
            logger.warning(
                "The model's generation_config has %s, so beams are not its most probable completions: they are what "
                "the model would answer with these rules, which the loss does not know. If that is not meant, set "
                "them to None in model.generation_config (generation_config.json of a folder).",
                ", ".join(f"{name}={value}" for name, value in found.items()),
            )
        width = max(self.num_generations, self.num_generations_eval)
        refuse_wide_beams(width, self.model.config.get_text_config().vocab_size, len(self.eos_token_ids))

    @property
    def group_size(self) -> int:
        """G: rows of a prompt, in training or, while the model is evaluated, in evaluation."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        Train as TRL does, on beams.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True (or "true", "last") for the last whole one in
                `output_dir`: what was being written when a run was killed is passed over with a warning.

        Raises:
            ValueError: there is no whole checkpoint, it is not of such a run, or was made with other options; or a
                streamed dataset has too few prompts for one step.
        """
        found = self.agreement.decide(lambda: find_checkpoint(self.args.output_dir, resume_from_checkpoint))
        self.resumption.begin()
        result = super().train(found, *args, **kwargs)
        refuse_no_step(self.state, self.args)
        self.pushes.after_training()
        return result

    create_model_card = PublishingTrainer.create_model_card
    init_hf_repo = PublishingTrainer.init_hf_repo
    push_to_hub: Any = PublishingTrainer.push_to_hub
