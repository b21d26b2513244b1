"""A run before it runs: what its recipe comes to, computed without weights, a device or a file that is written.

The model is built on the meta device from its configuration, so its layers, the echo's sites and every parameter are
counted as in the run. Rows are rendered and tokenised as in the run, the first ones only; what they cost is estimated
by `method/costs.py`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model
from transformers import AutoConfig
from trl import DatasetMixtureConfig, get_peft_config
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..compat.building import empty_model
from ..config import EchoSFTConfig
from ..method.aggregation import AGGREGATIONS
from ..method.costs import Cost
from ..method.depth import resolve_layers
from ..method.network import EchoNetworks, NetworkForm
from ..method.routing import RoutingSchedule
from ..method.sites import EchoSite
from ..options import CKA, PRESETS
from ..passes.echo import forms_for
from ..passes.layers import adapted_layers, decoder_layers, find_sites
from ..passes.setup import EchoSetup
from ..rendering.forms import RowOptions
from ..rendering.inference import disagreements, without_chat_template
from ..rendering.rendering import Rendering
from ..run.collate import EchoCollator
from ..run.decode import DecodedBatch, documents_of
from ..selection.lora_config import lora_config_kwargs
from ..selection.select import number_of_layers
from ..selection.use import baseline_layers
from .arguments import AdapterArguments, DataArguments
from .data import load_data
from .estimate import costs_of, cut, steps_of
from .training import check_base, load_tokenizer, refuse_finished

LOOKED_AT = 256
"""Rows that are tokenised, the first ones of the training split."""
SHOWN = 3
"""Rows that are shown."""


@dataclass(frozen=True)
class Preview:
    """
    What a run comes to.

    Attributes:
        options: those that differ from their defaults, presets filled in.
        model: class of the model, and its number of parameters.
        layers: number of decoder layers.
        sources, targets, sites: the echo's layers, and how many modules it is added to; empty and 0 without one.
        trainable: parameters of the adapter.
        networks: parameters of the echo networks.
        notes: what cannot be known before the run.
        rows, lost, tokens: training rows, the share of those looked at that lose their answer, mean tokens of a row.
        steps, rate: optimizer steps, and the learning rate at its highest.
        batch, per_step: rows of a global batch, micro-batches a step and process.
        schedule: routing probability at the first, the middle and the last step, and the mean over all.
        costs: of a mean micro-batch by pass: "plain", and with an echo each that may run, all samples routed.
        proved: what the proof at the first step compares, in words; None without an echo.
        examples: the first rows as the model sees them.
        warnings: what the template check has found.
    """

    options: dict[str, Any]
    model: tuple[str, int]
    layers: int
    sources: list[int]
    targets: list[int]
    sites: int
    trainable: int
    networks: int
    notes: list[str]
    rows: int | None
    lost: float
    tokens: float
    steps: int
    rate: float
    batch: int
    per_step: int
    schedule: tuple[float, float, float, float]
    costs: dict[str, Cost]
    proved: str | None
    examples: DecodedBatch
    warnings: list[str]


def preview(
    data: DataArguments, config: EchoSFTConfig, adapter: AdapterArguments, mixture: DatasetMixtureConfig
) -> Preview:
    """
    Look at a run; arguments as for `training.run`.

    Raises:
        ValueError: what the run would refuse: an option, the model, the data, or a finished run in its folder.
        FileNotFoundError: the file of the data is not there.
    """
    if not data.overwrite_output_dir:
        refuse_finished(config, False)
    if adapter.model_name_or_path is not None:
        check_base(adapter.model_name_or_path, adapter.model_revision, config.trust_remote_code)
    tokenizer = load_tokenizer(adapter, config)
    splits = load_data(data, mixture)
    if data.dataset_train_split not in splits:
        raise ValueError(f"The dataset has no split {data.dataset_train_split!r}; it has {sorted(splits)}.")
    dataset = splits[data.dataset_train_split]
    rendering = Rendering(RowOptions.of(config), tokenizer)
    raw = [row for row, _ in zip(dataset, range(LOOKED_AT), strict=False)]
    if not raw:
        raise ValueError("The training split has no rows.")
    examples, lost = cut(rendering.examples(raw), config)
    tokens = sum(len(example["input_ids"]) for example in examples) / len(examples)
    rows = len(dataset) - config.echo_held_out if hasattr(dataset, "__len__") else None
    steps, per_step, world = steps_of(rows, lost, tokens, config)

    model, notes = _model(adapter, config)
    notes += without_chat_template(raw[0], rendering)
    base = model.get_base_model()
    setup, sources, targets = _echo(base, config, notes)
    flat = bool(config.packing or config.padding_free)
    collator = EchoCollator(
        DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or 0, padding_free=flat),
        config.echo_positions,
    )
    schedule = RoutingSchedule(0, float(config.echo_p_start), float(config.echo_p_end), steps)
    middle, mean = schedule.probability(steps // 2), (config.echo_p_start + config.echo_p_end) / 2
    draft = collator.draft_with_all(examples[:SHOWN])
    routed = draft.segments.routable_D.tolist() if config.echo_enabled else None
    return Preview(
        options=_changed(data, config, adapter),
        model=(type(base).__name__, sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)),
        layers=len(decoder_layers(base, config.echo_layers)),
        sources=sources,
        targets=targets,
        sites=len(setup.sites) if config.echo_enabled else 0,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        networks=network_parameters(setup.sites, base, _form(config), len(sources)) if config.echo_enabled else 0,
        notes=notes,
        rows=rows,
        lost=lost,
        tokens=tokens,
        steps=steps,
        rate=config.learning_rate,
        batch=config.per_device_train_batch_size * per_step * world,
        per_step=per_step,
        schedule=(schedule.probability(0), middle, schedule.probability(steps - 1), mean),
        costs=costs_of(setup, config, collator, examples),
        proved=_proved(config) if config.echo_enabled else None,
        examples=documents_of(draft.batch, getattr(tokenizer, "tokenizer", tokenizer), routed),
        warnings=disagreements(raw[0], rendering, {tokenizer.eos_token_id} - {None}),
    )


def network_parameters(sites: Sequence[EchoSite], model: Any, form: NetworkForm, n_sources: int) -> int:
    """Parameters of the echo networks of a model: counted from their shapes, none is made."""
    hidden, width = model.config.get_text_config().hidden_size, form.bottleneck
    gated = form.gate == "sigmoid"
    each = [(1 + gated) * width * (hidden + site.out_features) + gated * site.out_features + 1 for site in sites]
    start = AGGREGATIONS[form.aggregation].start
    return sum(each) + (start(n_sources, hidden).numel() if start is not None else 0)


def _form(config: EchoSFTConfig) -> NetworkForm:
    return NetworkForm(
        bottleneck=config.echo_bottleneck,
        aggregation=config.echo_aggregation,
        gate=config.echo_gate,
        gate_bias=config.echo_gate_bias,
        scale=config.echo_scale,
    )


def _model(adapter: AdapterArguments, config: EchoSFTConfig) -> tuple[Any, list[str]]:
    """The adapted model without weights, and what cannot be known without them."""
    options = {"revision": adapter.model_revision, "trust_remote_code": config.trust_remote_code}
    if adapter.model_name_or_path is None:
        raise ValueError("No model: give `model_name_or_path` (an id on the Hub or a local folder).")
    base, notes = empty_model(AutoConfig.from_pretrained(adapter.model_name_or_path, **options)), []
    lora: Any = get_peft_config(adapter)
    lora.init_lora_weights = True  # others look at the weights
    if adapter.lora_layers is not None:
        depth = base.config.get_text_config().num_hidden_layers
        count, how = number_of_layers(adapter.lora_layers_ratio, depth), adapter.lora_layers
        if how == CKA:
            notes.append(f"Layers are chosen by CKA when the run begins; shown for the last {count} of {depth}.")
            how = "last"
        fields = lora_config_kwargs(base, baseline_layers(how, depth, count, config.seed), lora.target_modules)
        for name, value in fields.items():
            setattr(lora, name, value)
    return get_peft_model(base, lora, low_cpu_mem_usage=True), notes


def _echo(base: Any, config: EchoSFTConfig, notes: list[str]) -> tuple[EchoSetup, list[int], list[int]]:
    """The echo's parts of a model, without its networks; without an echo what the sizes are taken from."""
    named = []
    for name in ("echo_source_layers", "echo_target_layers"):
        value = getattr(config, name)
        if value == CKA:
            notes.append(f"{name} is chosen by CKA when the run begins; shown by depth.")
            value = None
        named.append(value)
    adapted = adapted_layers(base, config.echo_layers)
    if config.echo_enabled:
        wanted, given = named
        sources, targets = resolve_layers(wanted, given, len(decoder_layers(base, config.echo_layers)), adapted)
    else:
        sources, targets = [], adapted[:1]
    # Its size is counted (`network_parameters`): made here it would take memory, and only a step needs it.
    none = EchoNetworks([], 1, 1, NetworkForm(bottleneck=1, aggregation="weighted"), seed=0)
    sites = find_sites(base, targets, config.echo_layers)
    setup = EchoSetup(base, none, sites, sources, bool(config.echo_detach), config.echo_layers)
    return setup, sources, targets if config.echo_enabled else []


def _proved(config: EchoSFTConfig) -> str:
    names = list(dict.fromkeys(form.option for form in forms_for(str(config.echo_pass))))
    first, *others = names
    otherwise = f"else the {others[0]} pass, proved alike" if others else "else the run stops"
    return (
        f"Before the first step at most two rows of the first batch go through both passes with an echo of zero, "
        f"without gradients. Where the {first} pass agrees up to rounding it runs; {otherwise}. The log, "
        f"echo_run.json and the card say which."
    )


def _changed(data: DataArguments, config: EchoSFTConfig, adapter: AdapterArguments) -> dict[str, Any]:
    """Options with another value than where nothing is said, and those that a preset has filled."""
    found = {}
    for values in (data, adapter, config):
        untold = type(values)()
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            filled = values is config and config.echo_enabled and field.name in PRESETS[config.echo_preset]
            if not field.name.endswith("token") and (filled or value != getattr(untold, field.name)):
                found[field.name] = value
    return found
