"""`echo-trainer sft`: a run from a recipe and the command line, on TRL's own argument classes and parser."""

from ..recipe.arguments import make_parser, parse
from ..recipe.training import run
from .dry_run import dry_run
from .short_help import short_help

DRY_RUN = {"--dry-run", "--dry_run"}


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer sft`."""
    if {"-h", "--help"} & set(arguments):
        print(short_help())
        return 0
    parser = make_parser(
        description="Fine-tune with Echo-LoRA. `--config RECIPE` takes a YAML file or the name of a recipe that ships "
        "with echo_trainer; any field below can be given as well and overrides the recipe.",
    )
    if "--help-all" in arguments:
        parser.print_help()
        return 0
    if DRY_RUN & set(arguments):
        return dry_run(parse([word for word in arguments if word not in DRY_RUN], parser))
    run(*parse(arguments, parser))
    return 0
