"""Processes forked from one that has imported what they need: the programs that tests start, without the imports.

Within :func:`processes`, ``subprocess.Popen`` forks ``[sys.executable, "-c", PROGRAM, …]`` and
``[sys.executable, "-m", MODULE, …]``, for a MODULE of :data:`MODULES`, from a template process. What was forked so
forks the MODULES itself, as a run does with its engines. Everything else is as after an exec: the new process is a
child of the process that asked for it (so owners, exit codes and PR_SET_PDEATHSIG are as a user's), it has the working
directory, environment, open files, session and signals that were asked for, and /proc shows its own command line and
environment.

How it becomes a child of the process that asked: a template is a child of that process, forked before it did anything
else. The template forks a process that forks the new one and ends, while the process that asked is the reaper of its
orphaned descendants. So each process that may start others keeps a template: pytest, a run, and each rank of a run.

Processes that ``multiprocessing`` spawns (vLLM's workers) are forked in the same way.

What an exec reads and a fork does not: GLIBC_TUNABLES, MALLOC_*, and OpenMP's settings but the number of threads.
Tests about starting and ending processes start real ones.

``tests.te.machine`` is another template, of processes on a machine with a fake GPU.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import multiprocessing.util
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "recipes.train",
    "recipes.prepare",
    "recipes.evaluate",
    "recipes.evaluate_folders",
    "recipes.export",
    "recipes.plan",
    "rollout.engine_server",
    "recipes.preflight",
    "recipes.preflight.vllm_simulation",
    "recipes.preflight.weight_sync",
    "tests.gpu.node_ranks_on_cpu",
    "tests.megatron_ext.memory_worker",
    "tests.megatron_ext.vl_twins",
    "tests.megatron_ext.worker",
    "tests.recipes.apart_jobs",
    "tests.recipes.engine_node_job",
    "tests.recipes.ppo_worker",
    "tests.recipes.steps",
    "tests.rollout.family_twins",
    "tests.rollout.grid_twins",
    "tests.rollout.in_flight_engine",
    "tests.rollout.shipped",
    "tests.rollout.sleeping_engine",
    "tests.rollout.speculating",
    "tests.rollout.test_fake_cuda",
    "tests.rollout.test_network",
    "tests.rollout.test_quantised",
    "tests.rollout.test_vllm_families",
    "tests.rollout.test_vllm_vision",
    "tests.rollout.vllm_processes",
    "tests.te.examine",
    "tests.te.fake_judge",
    "tests.te.gpu_suite",
    "tests.te.on_fake_gpu",
}
RANKS_START_ENGINES = {"recipes.train", "recipes.evaluate", "tests.rollout.family_twins"}
IMPORTED = (
    "recipes.training.setup",
    "recipes.training.stages",
    "vllm.v1.engine.llm_engine",
    # vLLM imports these when it needs them.
    "vllm.model_executor.model_loader.base_loader",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
# Room for the command line and the environment that /proc shows, see write_over.
ROOM = {"arguments": 16 << 10, "environment": 32 << 10}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MESSAGE_BYTES = 1 << 20
PID_BYTES = 20

libc = ctypes.CDLL(None, use_errno=True)
execute_child: Callable[..., None] = subprocess.Popen._execute_child  # type: ignore[attr-defined]
spawn: Callable[..., int] = multiprocessing.util.spawnv_passfds
fork = os.fork


def prctl(option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


class Template:
    """The asking side. ``connection`` leads to a child of this process that waits in :func:`serve`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.owner = os.getpid()
        self.lock = threading.Lock()

    def start(self, request: dict[str, Any], files: list[int]) -> int:
        """The new process's pid."""
        reading, writing = os.pipe()
        with self.lock:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self.connection, [pickle.dumps(request)], [*files, writing])
                os.close(writing)
                # Empty when the template, or what it forked, died before it answered.
                answer = os.read(reading, PID_BYTES)
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0)
        os.close(reading)
        if not answer:
            raise RuntimeError(f"{request['arguments']} could not begin, see standard error")
        return int(answer)


templates: dict[str, Template] = {}  # by their program
program = "tests.warm"  # whose template is asked
in_a_test = False  # within processes()


def install() -> None:
    """From now on ``subprocess.Popen`` forks the MODULES, and ``multiprocessing`` what it spawns."""
    subprocess.Popen._execute_child = fork_child  # type: ignore[attr-defined]
    multiprocessing.util.spawnv_passfds = fork_spawned


@contextlib.contextmanager
def processes(of: str | None = None) -> Iterator[None]:
    """For the block, ``subprocess.Popen`` forks the MODULES and programs that are given as text, from the template of
    the program ``of`` if one is given."""
    global in_a_test, program
    install()
    in_a_test, former = True, program
    program = of or former
    try:
        yield
    finally:
        in_a_test, program = False, former
        subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
        multiprocessing.util.spawnv_passfds = spawn


def fork_child(process: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, *rest: Any) -> None:
    pass_fds, cwd, env, _, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[:12]
    start_new_session, process_group = rest[-2:]
    words = [] if isinstance(args, (str, bytes, os.PathLike)) else [os.fspath(word) for word in args]
    is_module = words[:2] == [sys.executable, "-m"] and words[2] in MODULES
    is_program = words[:2] == [sys.executable, "-c"] and in_a_test
    is_warm = (is_module or is_program) and not shell and process_group == -1
    if is_warm and program not in templates:
        templates[program] = first_template()
    template = templates.get(program)
    if not is_warm or template is None or template.owner != os.getpid():
        execute_child(process, args, executable, preexec_fn, close_fds, *rest)
        return
    standard = [descriptor if given == -1 else given for descriptor, given in enumerate((p2cread, c2pwrite, errwrite))]
    request = {
        "arguments": words,
        "environment": dict(os.environ if env is None else env),
        "folder": os.getcwd() if cwd is None else os.fspath(cwd),
        "files": [0, 1, 2, *pass_fds],
        "new session": start_new_session,
        "signal mask": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "before": preexec_fn,
        "owner": os.getpid(),
    }
    process.pid = template.start(request, [*standard, *pass_fds])
    process._child_created = True
    process._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def fork_spawned(path: Any, args: Sequence[Any], passfds: Sequence[int]) -> int:
    """In the place of multiprocessing.util.spawnv_passfds; the new process's pid."""
    words = [os.fsdecode(word) for word in args]
    # Not multiprocessing's resource tracker.
    is_worker = words[-1] == "--multiprocessing-fork"
    if is_worker and program not in templates:
        templates[program] = first_template()
    template = templates.get(program)
    if not is_worker or template is None or template.owner != os.getpid():
        return spawn(path, args, passfds)
    files = [0, 1, 2, *sorted(map(int, passfds))]
    request = {
        # Between them are the interpreter's options.
        "arguments": [words[0], *words[words.index("-c") :]],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
        "new session": False,
        "signal mask": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "before": None,
        "owner": os.getpid(),
    }
    return template.start(request, files)


def first_template() -> Template:
    """Start the process that imports everything; seconds."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | {"ROOM": "x" * ROOM["environment"], "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", program, str(theirs.fileno()), str(os.getpid()), "x" * ROOM["arguments"]],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    return Template(ours)


def keep_a_template() -> None:
    """For a process that has just been forked and may start others."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner = os.getpid()
    if fork() == 0:
        die_with(owner)
        serve(theirs)
    theirs.close()
    templates.clear()
    templates[program] = Template(ours)


def fork_and_keep_a_template() -> int:
    """In the place of ``os.fork`` in what forks ranks that start engines, and sets their number of threads."""
    pid = fork()
    if pid == 0:
        take_threads()
        keep_a_template()
    return pid


def die_with(owner: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:
        os._exit(1)


def serve(connection: socket.socket) -> None:
    """Fork what is asked for until the owner has ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    nothing = os.open(os.devnull, os.O_RDWR)
    place_files({0: nothing, 1: nothing, 2: nothing, 3: connection.detach()})
    connection = socket.socket(fileno=3)
    while True:
        message, files, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 64)
        if not message:
            os._exit(0)
        between = fork()
        if between == 0:
            between = os.getpid()
            try:
                if fork() == 0:
                    become(pickle.loads(message), files, between)
            finally:
                os._exit(0)
        os.waitpid(between, 0)
        for file in files:
            os.close(file)


def become(request: dict[str, Any], files: list[int], between: int) -> None:
    """Be the process that is asked for, as soon as the process ``between`` has ended. Does not return."""
    while os.getppid() == between:
        os.sched_yield()
    if os.getppid() != request["owner"]:  # which has died
        os._exit(1)
    answer = 1 + max(request["files"])
    place_files(dict(zip([*request["files"], answer], files, strict=True)))
    try:
        prepare(request)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os.write(answer, str(os.getpid()).encode())
    os.close(answer)
    code = 1
    try:
        run(request["arguments"])
        code = 0
    except SystemExit as ended:
        code = exit_code(ended)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def prepare(request: dict[str, Any]) -> None:
    if request["new session"]:
        os.setsid()
    os.chdir(request["folder"])
    environment = request["environment"]
    os.environ.clear()
    os.environ.update(environment)
    write_over(request["arguments"], environment)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["before"] is not None:
        request["before"]()
    signal.pthread_sigmask(signal.SIG_SETMASK, request["signal mask"])

    standard_input = os.fdopen(0, closefd=False)
    for name in ("stdin", "__stdin__"):
        setattr(sys, name, standard_input)
    at_once = bool(environment.get("PYTHONUNBUFFERED"))
    for name, file in (("stdout", 1), ("stderr", 2)):
        lines = at_once or file == 2 or os.isatty(file)
        stream = os.fdopen(file, "w", buffering=1 if lines else -1, errors="backslashreplace", closefd=False)
        stream.reconfigure(write_through=at_once)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    imported_from = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = list(dict.fromkeys([request["folder"], *imported_from, *sys.path]))

    random.seed()
    take_threads()
    torch._dynamo.config.disable = environment.get("TORCH_COMPILE_DISABLE") == "1"


def take_threads() -> None:
    """As OpenMP does when it is loaded."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


def place_files(files: dict[int, int]) -> None:
    """Have each number lead to what its value leads to now, and close everything else."""
    first = 1 + max([*files, *files.values()])
    for number, file in files.items():
        os.dup2(file, first + number, inheritable=False)
    for number in files:
        os.dup2(first + number, number)
    last = 3
    for number in sorted(n for n in files if n >= 3):
        os.closerange(last, number)
        last = number + 1
    os.closerange(last, 1 << 20)


def write_over(arguments: list[str], environment: dict[str, str]) -> None:
    """Put these in the place of the first process's, where /proc/PID/cmdline and environ are read."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # proc(5): arg_start is field 48, and the state, field 3, is the first here.
    arguments_start, arguments_end, environment_start, environment_end = map(int, fields[45:49])
    for start, end, words in (
        (arguments_start, arguments_end, arguments),
        (environment_start, environment_end, [f"{name}={value}" for name, value in environment.items()]),
    ):
        text = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def run(arguments: list[str]) -> None:
    """``python -m MODULE …`` or ``python -c PROGRAM …``."""
    global in_a_test
    _, option, what, *rest = arguments
    in_a_test = False
    sys.orig_argv = list(arguments)
    keep_a_template()
    if option == "-c":
        sys.argv = ["-c", *rest]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
        return
    sys.argv = [what, *rest]
    if what in RANKS_START_ENGINES:
        os.fork = fork_and_keep_a_template
    runpy.run_module(what, run_name="__main__", alter_sys=True)


def exit_code(ended: SystemExit) -> int:
    if ended.code is None:
        return 0
    if isinstance(ended.code, int):
        return ended.code & 0xFF
    print(ended.code, file=sys.stderr)
    return 1


def load() -> None:
    for module in IMPORTED:
        importlib.import_module(module)


def main(load: Callable[[], None]) -> None:
    """Be a template that has done ``load``."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    die_with(int(sys.argv[2]))
    gc.disable()
    load()
    gc.enable()
    gc.freeze()
    install()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would miss them"
    serve(connection)


if __name__ == "__main__":
    # Not as __main__, whose place another module takes.
    from tests import warm

    warm.main(warm.load)
