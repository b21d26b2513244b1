"""The command `echo-trainer push`."""

import argparse
import sys

DESCRIPTION = """\
Push a finished run to the Hub: the adapter, its card, tokenizer, record and pictures, and nothing else of the folder.
Made if it does not exist, uploaded in one commit, tried again after passing faults, and compared by checksums.
"""
EPILOG = """\
The token is that of `hf auth login`, or HF_TOKEN; it needs write permission. Adapters that hold NaN or infinity, and
folders without an adapter, are refused. A push that asks for --private never goes to an existing public repository.

exit status:
  0  pushed, and every checksum is right
  1  not pushed; the last words say why, where the files are, and how to push again
  2  wrong options

examples:
  echo-trainer push runs/my-adapter my-name/my-adapter --private
  echo-trainer push runs/my-adapter my-adapter --base HuggingFaceTB/SmolLM2-135M-Instruct
  echo-trainer export --merged runs/my-dora merged && echo-trainer push merged my-dora-merged --model
"""


def make_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="echo-trainer push",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a finished run, or of any PEFT adapter")
    parser.add_argument("repo_id", metavar="REPO", help="NAMESPACE/NAME, or NAME in your own namespace")
    sight = parser.add_mutually_exclusive_group()
    sight.add_argument("--private", dest="private", action="store_true", default=None,
                       help="only you may see it; an existing public repository is refused")  # fmt: skip
    sight.add_argument("--public", dest="private", action="store_false",
                       help="a new repository is public (default: your account's setting)")  # fmt: skip
    parser.add_argument("--revision", help="an existing branch to commit to (default: main)")
    parser.add_argument("--base", help="id of the base model on the Hub, if the run was trained on a local folder")
    parser.add_argument("--model", action="store_true", help="DIR holds a whole model (echo-trainer export --merged)")
    parser.add_argument("--message", default="Upload adapter", help="commit message")
    parser.add_argument("--attempts", type=int, default=5, help="tries after passing faults (default: 5)")
    parser.add_argument("--timeout", type=float, default=60.0,
                        help="seconds of silence after which a request is given up (default: 60)")  # fmt: skip
    return parser


def main(arguments: list[str]) -> int:
    """Entry point of `echo-trainer push`."""
    options = make_parser().parse_args(arguments)
    from ..hub.client import Patience, PushError
    from ..hub.push import push_adapter

    try:
        pushed = push_adapter(
            options.folder,
            options.repo_id,
            private=options.private,
            revision=options.revision,
            base_model=options.base,
            whole_model=options.model,
            commit_message=options.message,
            patience=Patience(attempts=options.attempts, timeout=options.timeout),
        )
    except PushError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    for note in pushed.notes:
        print(f"Note: {note}")
    sight = "private" if pushed.private else "public"
    print(f"Pushed to {pushed.url} ({sight}): {len(pushed.files)} files, checksums compared.")
    return 0
