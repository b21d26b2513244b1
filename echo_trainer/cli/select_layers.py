"""`echo-trainer select-layers`: layer selection for the model and the data of a recipe."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl import DatasetMixtureConfig

from ..config import EchoSFTConfig
from ..recipe.arguments import AdapterArguments, DataArguments, make_parser, parse
from ..recipe.data import load_data
from ..recipe.training import load_model
from ..rendering.forms import RowOptions
from ..rendering.rendering import Rendering
from ..selection.select import LayerSelection, select_layers
from ..selection.use import echo_layers

SURE = 0.9
"""Share of bootstrap draws from which on a chosen layer is not called doubtful."""


@dataclass
class SelectionArguments:
    """Options of layer selection."""

    ratio: float = field(default=0.5, metadata={"help": "Share of the layers to choose, in (0, 1]."})
    n_samples: int = field(default=128, metadata={"help": "Training samples to read."})
    n_bootstrap: int = field(default=200, metadata={"help": "Draws of the bootstrap over samples."})
    debiased: bool = field(default=False, metadata={"help": "Rank by the debiased CKA instead of the published one."})
    pooling: str | None = field(default=None, metadata={"help": "'last', 'cls' or 'mean'; None: 'last' for decoders."})


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer select-layers`."""
    classes = (SelectionArguments, DataArguments, EchoSFTConfig, AdapterArguments, DatasetMixtureConfig)
    parser = make_parser(
        "echo-trainer select-layers",
        classes,
        description="Choose the layers of a model that change the representation of your data most (CKA), with "
        "intervals and stability. Takes a recipe and the options of `echo-trainer sft`; writes layer_selection.json "
        "and layer_selection.png into output_dir.",
    )
    options, data, config, adapter, mixture = parse(arguments, parser, classes)
    if adapter.model_name_or_path is None:
        raise ValueError("No model: give `model_name_or_path` (an id on the Hub or a local folder).")
    dataset = load_data(data, mixture)[data.dataset_train_split]
    model, tokenizer = load_model(adapter, config)
    selection = select_layers(
        model,
        dataset,
        processing_class=tokenizer,
        ratio=options.ratio,
        debiased=options.debiased,
        pooling=options.pooling,
        n_samples=options.n_samples,
        n_bootstrap=options.n_bootstrap,
        max_length=config.max_length,
        seed=config.seed,
        rendering=Rendering(RowOptions.of(config), tokenizer),
    )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    selection.to_json(folder / "layer_selection.json")
    selection.plot(folder / "layer_selection.png")
    console = Console()
    console.print(table(selection))
    unsure = [layer for layer in selection.layers if selection.stability[layer] < SURE]
    if unsure:
        console.print(
            f"{selection.n_samples} samples do not decide the choice: layers {unsure} were chosen in less than "
            f"{SURE:.0%} of the bootstrap draws. More samples (--n_samples) may choose others."
        )
    sources, targets = echo_layers(selection)
    console.print(f"adapt:  layers {selection.layers}   (in a recipe: lora_layers: cka)")
    console.print(f"echo:   from layers {sources} to layers {targets}   (echo_source_layers, echo_target_layers: cka)")
    console.print(f"Written: {folder}/layer_selection.json, {folder}/layer_selection.png")
    return 0


def table(selection: LayerSelection) -> Table:
    """Importance, interval and stability of every layer."""
    shown = Table(title=f"{len(selection.layers)} of {selection.num_layers} layers, {selection.n_samples} samples")
    for column in ("layer", "chosen", "importance", "95 % interval", "stability"):
        shown.add_column(column, justify="right")
    for layer in range(selection.num_layers):
        low, high = selection.intervals[layer]
        shown.add_row(
            str(layer),
            "x" if layer in selection.layers else "",
            f"{selection.importance[layer]:.4f}",
            f"{low:.4f} to {high:.4f}",
            f"{selection.stability[layer]:.2f}",
        )
    return shown
