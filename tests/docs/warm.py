"""Runs `ftcore` commands and Python scripts in forks of one process that has imported torch and its friends already.

Without it each command of the docs would spend most of its time on imports. A command gets its own process, folder,
environment, standard streams and exit code, and runs the same `ftcore.cli` as the installed script.
`FTCORE_DOCS_COLD=1` does without.

    python warm.py serve SOCKET      the server; prints `ready`
    python warm.py ftcore ARGS       what the `ftcore` on the docs' PATH calls; the socket is in FTCORE_DOCS_SOCKET
    python warm.py script FILE       run a Python file
"""

import json
import os
import socket
import sys


def serve(path: str) -> None:
    """Import, then fork per request until killed."""
    import signal

    from ftcore.noise import quiet

    quiet()
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from trl import GRPOTrainer, SFTTrainer  # noqa: F401

    import ftcore.composition
    import ftcore.pipeline  # noqa: F401

    torch.set_num_threads(1)  # tiny models: threads cost more than they bring
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    request = json.loads(data)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    code = _run(request["kind"], request["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(str(code).encode())
    os._exit(0)


def _run(kind: str, words: list[str]) -> int:
    try:
        if kind == "ftcore":
            from ftcore import cli

            return cli.run(words)
        import runpy

        sys.path.insert(0, os.getcwd())
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def ask(kind: str, words: list[str]) -> int:
    """Have the server run it with this process's streams."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["FTCORE_DOCS_SOCKET"])
        request = {"kind": kind, "words": words, "cwd": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        code = connection.recv(16)
    return int(code or 1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
