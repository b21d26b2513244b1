"""The echo of a trainer, from its options and its model; kept while both are what it was built from."""

import logging
from functools import partial
from typing import Any

from ..compat.checkpointing import require_replay
from ..compat.quantized import keep_4bit_weights
from ..method.depth import resolve_layers
from ..method.losses import EchoLoss
from ..method.network import NetworkForm
from ..passes.layers import adapted_layers, decoder_layers, find_sites
from ..passes.modules import base_model_of
from ..passes.setup import EchoSetup
from ..passes.shape import model_shape
from ..selection.use import named_layers
from .host import Host
from .lockstep import checkpoint_without_reentry, needs_lockstep
from .memory_choice import activations_dtype, computes_again
from .pass_choice import PassChoice
from .validation import check_batches, check_dataset, check_model

logger = logging.getLogger(__name__)


def set_up_echo(host: Host) -> None:
    """
    Build the echo of a trainer for model, data and options as they are now; networks that fit them are kept.

    Raises:
        ValueError: the echo cannot work with one of them.
    """
    args = host.args
    check_model(host.model, host.accelerator, args.echo_detach)
    check_batches(host.accelerator, host.padding_free)
    check_dataset(host.train_dataset, host.data_collator)
    checkpoint_without_reentry(args)
    in_step = needs_lockstep(host.accelerator, host.model)
    host.echo, host.loss_terms = _setup_for(host), loss_terms_of(args)
    shape = model_shape(host.echo, args.gradient_checkpointing, activations_dtype(args))
    tokens = args.per_device_train_batch_size * (args.max_length or 1024)
    plugin = host.accelerator.state.deepspeed_plugin
    zero3 = plugin is not None and plugin.zero_stage == 3
    again = computes_again(args.echo_memory, host.echo, shape, tokens, zero3)
    name = type(host.echo.model).__name__
    host.pass_choice = PassChoice(args.echo_pass, host.agreement, name, in_step, shape, again)


def _setup_for(host: Host) -> EchoSetup:
    """The echo's parts of the model: those it has, or new ones where they are not what the options say."""
    base = base_model_of(host.model)
    built_from = _decisive_options(host.args)
    if host.echo is not None and host.echo.model is base and host.echo.built_from == built_from:
        return host.echo
    args = host.args
    layers = decoder_layers(host.model, args.echo_layers)
    if args.gradient_checkpointing:
        require_replay(layers)
    keep_4bit_weights(host.model)
    by_name_or_cka = partial(named_layers, args, host.model, host.train_dataset, host.processing_class)
    named = host.agreement.decide(by_name_or_cka)
    sources, targets = resolve_layers(*named, len(layers), adapted_layers(base, args.echo_layers))
    sites = find_sites(base, targets, args.echo_layers)
    networks = host.networks_class(
        sites,
        n_sources=len(sources),
        hidden_size=base.config.get_text_config().hidden_size,
        form=NetworkForm(
            bottleneck=args.echo_bottleneck,
            aggregation=args.echo_aggregation,
            gate=args.echo_gate,
            gate_bias=args.echo_gate_bias,
            scale=args.echo_scale,
        ),
        seed=args.resolved_echo_seed,
    ).to(args.device)
    logger.info("Echo-LoRA: echo from layers %s to %d LoRA modules of layers %s.", sources, len(sites), targets)
    return EchoSetup(base, networks, sites, sources, args.echo_detach, args.echo_layers, built_from=built_from)


def loss_terms_of(args: Any) -> EchoLoss:
    """What the echo pass adds to the loss, from the options."""
    return EchoLoss(args.echo_kd_weight, args.echo_kd_temperature, args.echo_teacher, args.echo_loss)


def _decisive_options(args: Any) -> tuple:
    """The options that the echo networks are made of."""
    layers = (args.echo_source_layers, args.echo_target_layers)
    names = ("layers", "bottleneck", "aggregation", "gate", "gate_bias", "scale", "detach")
    return (*map(str, layers), *(getattr(args, f"echo_{name}") for name in names), args.resolved_echo_seed)
