"""The console script `llama3`. Imports little, so that Ctrl-C at any moment finds it running."""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Parse the command line, call the verb, and end as `run_command` says."""
    try:
        from llama.commands.run import interrupt_at_once, run_command

        interrupt_at_once("llama3")
    except KeyboardInterrupt:
        print("\nllama3: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if "_LLAMA3_COMPLETE" in os.environ:  # the shell asks for completions
        from llama.commands.parser import make_app

        make_app()(prog_name="llama3")
    run_command(_call, "llama3")


def _call() -> None:
    from llama.commands.parser import parse
    from llama.commands.run import raise_interrupts

    gc.disable()  # torch's modules stay: looking for garbage in them costs a fifth of the start
    try:
        call = parse(sys.argv[1:])
        gc.freeze()  # nor are they looked through later, between tokens and at the end
    finally:
        gc.enable()
    raise_interrupts()
    call()


if __name__ == "__main__":
    main()
