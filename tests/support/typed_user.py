"""What a typed user writes, for the type checker; nothing runs it."""

from typing import Literal, assert_type

from datasets import Dataset

from echo_trainer import DistillOptions, EchoSFTConfig, EchoSFTTrainer


def by_depth(dataset: Dataset) -> EchoSFTTrainer:
    args = EchoSFTConfig(output_dir="out", echo_source_layers=[24, 25], echo_target_layers=None)
    assert_type(args.echo_source_layers, list[int] | Literal["depth", "cka", "above"] | None)
    assert_type(args.output_dir, str)
    return EchoSFTTrainer(model="model", args=args, train_dataset=dataset)


def by_importance(dataset: Dataset) -> EchoSFTConfig:
    args = EchoSFTConfig("out", echo_source_layers="cka", echo_target_layers="cka")
    trainer = EchoSFTTrainer("model", args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=True)
    return assert_type(trainer.args, EchoSFTConfig)


def refused(dataset: Dataset) -> None:
    EchoSFTConfig("out", echo_source_layers="last")  # pyright: ignore[reportArgumentType]  no such choice
    EchoSFTConfig("out", echo_target_layers=[0.5])  # pyright: ignore[reportArgumentType]  no index
    EchoSFTTrainer("model", data=dataset)  # pyright: ignore[reportCallIssue]  no such argument


def carried_over(trainer: EchoSFTTrainer, prompts: Dataset) -> EchoSFTTrainer:
    trainer.unlabeled_dataset = prompts
    return assert_type(trainer.distill(DistillOptions(ratio="1:2"), max_steps=150), EchoSFTTrainer)
