"""`mellow-ds`: the commands of the toolkit by name. Answers `--help` without importing torch."""

import sys

from mellow_ds import __version__
from mellow_ds.errors import EXIT_DONE, EXIT_USER, run_command

EVALUATE = "evaluate"  # the train command in another mode
# name -> (module with `main(arguments, program)`, what it is for)
COMMANDS = {
    "train": ("mellow_ds.cli.train", "train on shards (the same as train.py)"),
    EVALUATE: ("mellow_ds.cli.train", "score a checkpoint on held-out shards"),
    "launch": ("mellow_ds.cli.launch", "start a run on several hosts, watch it, leave nothing behind"),
    "generate": ("mellow_ds.cli.generate", "answer a question about audio files"),
    "report": ("mellow_ds.cli.report", "show what a run came to"),
    "doctor": ("mellow_ds.cli.doctor", "say what will not work or will be slow, before a run is started"),
    "verify": ("mellow_ds.cli.verify", "show here that all back ends compute the same, and resume exactly"),
    "export": ("mellow_ds.cli.export", "write a step as a model folder for others"),
    "convert": ("mellow_ds.cli.convert", "bring a checkpoint of the original Mellow here"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return EXIT_DONE if arguments else EXIT_USER
    if arguments[0] == "--version":
        print(f"mellow-ds {__version__}")
        return EXIT_DONE
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see mellow-ds --help"
        print(f"error: '{name}' is not a command of mellow-ds; {hint}", file=sys.stderr)
        return EXIT_USER
    from importlib import import_module

    from mellow_ds.log import setup_logging
    from mellow_ds.world import World

    setup_logging(World())
    module = import_module(COMMANDS[name][0])
    mode = {"mode": "evaluate_checkpoint"} if name == EVALUATE else {}
    return run_command(lambda: int(module.main(rest, f"mellow-ds {name}", **mode)))


def _help() -> str:
    lines = ["usage: mellow-ds COMMAND [options]   (mellow-ds COMMAND --help tells more)", "", "commands:"]
    lines += [f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    lines += [
        "",
        "examples:",
        "  mellow-ds train --config quickstart --data.shards SHARDS",
        "  mellow-ds evaluate --config quickstart --checkpoint_path RUN/checkpoints/step-000200",
        '  mellow-ds generate --checkpoint RUN/checkpoints/step-000200 --audio a.wav --prompt "what sound is heard?"',
        "  mellow-ds export --checkpoint RUN/checkpoints/step-000200 --out my-model",
        "  mellow-ds convert --from-mellow v0.ckpt --out mellow-converted",
        "",
        "Shards are made with mellow-shards.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
