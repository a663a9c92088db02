"""The `trainguard` command: one subcommand for each public function.

It parses, calls that function, prints, and answers with an exit code: 0 done (and, for `screen` and `audit`, nothing
found), 3 poison or a backdoor found, 4 undecided, 2 wrong use or unusable input.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from trainguard.files import results_in, visible, writable_folder
from trainguard.options import (
    above_zero,
    add_data_options,
    at_least_one,
    columns,
    given,
    names,
    path,
    reading,
    seed,
    seeds,
    share,
    share_or_none,
)

DONE, WRONG_USE, FOUND, UNDECIDED, INTERRUPTED = 0, 2, 3, 4, 130
VERDICTS_BY = ("trainguard screen", "trainguard audit", "trainguard purify")  # what they answer with is not DONE
VERDICT_CODES = {"clean": DONE, "poisoned": FOUND, "backdoored": FOUND, "undecided": UNDECIDED}


class WrongUse(ValueError):
    """The command line itself cannot be understood."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line and an exception, not a page of usage and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise `WrongUse` with the message and where to read more."""
        raise WrongUse(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the words after `trainguard`; `sys.argv` unless given.

    Returns:
        The exit code.
    """
    command = "trainguard"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a class name that the terminal cannot show must not hide the verdict
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = build_parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
        command = f"trainguard {arguments.command}"
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError as error:  # the reader of our output went away, as `head` does
        _write_nowhere()
        if command not in VERDICTS_BY:
            return DONE
        print(f"{command}: stopped before its end: {one_line(error)}", file=sys.stderr)
        return WRONG_USE
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("TRAINGUARD_TRACEBACK"):
            raise
        print(f"{command}: {one_line(error)}", file=sys.stderr)
        return WRONG_USE


def _joined(words: Sequence[str]) -> list[str]:
    """The words with numbers that begin with a minus joined to their option, which argparse would take for options."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--bounds", "--mean", "--std") and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def one_line(error: BaseException) -> str:
    """An error as one line of text, with its kind where the message alone says nothing."""
    return visible(" ".join(str(error).split())) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    """All subcommands; importing nothing of what they run."""
    parser = OneLineParser(
        prog="trainguard",
        description="Train image classifiers on data you did not make: screen for poison, train clean, purify.",
        epilog="Exit codes: 0 done, nothing found; 3 poison or a backdoor found; 4 undecided, or purify gave the model "
        "back as it came; 2 wrong use or unusable input; 130 interrupted. TRAINGUARD_TRACEBACK=1 shows where an error "
        "came from.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)
    for add in (_add_demo, _add_screen, _add_purify, _add_audit, _add_drill, _add_report):
        add(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version, which is looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and stop")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from trainguard import __version__

        print(f"trainguard {__version__}")
        parser.exit()


def _subcommand(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    return parser


def _write_nowhere() -> None:
    """From here on, as the reader of our output went away."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_data(arguments: argparse.Namespace, name: str, beside: bool = False):
    """The data set of that name; `beside` another one, of which a folder without splits is all."""
    import datasets

    from trainguard.sources import has_split, open_data

    datasets.disable_progress_bars()  # ours are enough
    alone = beside and Path(name).is_dir() and not has_split(Path(name), arguments.split)
    return open_data(
        name,
        split="train" if alone else arguments.split,
        **columns(arguments),
        size=arguments.size,
    )


def _show(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """The short summary table at the end of a command, on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(Text(what), Text(visible(value)))
    try:
        Console().print(table)
    except (BrokenPipeError, SystemExit):  # rich's way to end where nobody reads; the exit code is still to come
        _write_nowhere()


def _add_demo(commands: argparse._SubParsersAction) -> None:
    summary = "poison a bundled set of real images, train on it unguarded and guarded, and show the difference"
    parser = _subcommand(commands, "demo", _demo, summary)
    parser.add_argument("--out", type=path, help="folder for the table and the pictures (default: trainguard-demo)")


def _demo(arguments: argparse.Namespace) -> int:
    from trainguard.drill.demo import run_demo

    run_demo(out=arguments.out, seed=arguments.seed, progress=arguments.progress)
    return DONE


DATA_HELP = "image folder, parquet file or folder, Hugging Face data set on disk or by name"
DEFENSES_HELP = "names with commas between them, all (while training), or repairs (of finished models)"


def _add_screen(commands: argparse._SubParsersAction) -> None:
    parser = _subcommand(commands, "screen", _screen, "look for backdoor poison in a set of labelled images")
    parser.add_argument("data", metavar="DATA", type=os.path.expanduser, help=DATA_HELP)
    parser.add_argument(
        "--model", help="the model that will be trained, a timm or torchvision name, to check it against the data"
    )
    parser.add_argument("--out", type=path, required=True, help="folder for the result and its report")
    parser.add_argument(
        "--epochs",
        type=at_least_one,
        help="of the training to come: they set how long probes learn (default: 24)",
    )
    parser.add_argument(
        "--budget", type=above_zero, default=0.5, help="share of its passes that the probes get (default: %(default)s)"
    )
    parser.add_argument("--preset", default="default", help="default, or paper for AdvrBD as published")
    parser.add_argument("--state-dir", type=path, help="folder to resume from after an interruption")
    add_data_options(parser)


def _screen(arguments: argparse.Namespace) -> int:
    import trainguard

    dataset = _open_data(arguments, arguments.data)
    _outside("--state-dir", arguments.state_dir, arguments.data)
    _ready(arguments.out, arguments.data, "result.json")
    result = trainguard.screen(
        dataset,
        arguments.model,
        epochs=arguments.epochs,
        budget=arguments.budget,
        seed=arguments.seed,
        preset=arguments.preset,
        **reading(arguments),
        state_dir=arguments.state_dir,
        progress=arguments.progress,
    )
    result.save(arguments.out)
    page = result.report(arguments.out / "report.html", dataset=dataset)
    _show("Screening", [*result.rows(), ("saved in", str(arguments.out)), ("report", str(page))])
    return VERDICT_CODES[result.verdict]


def _ready(out: Path, data: str, own: str) -> None:
    """Refuse, before the work, a folder that cannot take a result or would spoil something."""
    _outside("--out", out, data)
    if others := results_in(out, besides=own):
        raise WrongUse(f"--out {out} holds another result already ({', '.join(others)}): choose another folder")
    writable_folder(out)


def _outside(option: str, place: Path | None, data: str) -> None:
    """Refuse a place for results, or for what is kept on the way, that lies in the data."""
    if place is not None and Path(data).is_dir() and place.resolve().is_relative_to(Path(data).resolve()):
        raise WrongUse(
            f"{option} {place} lies in {data}, and would be read as data the next time: choose a folder outside"
        )


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=os.path.expanduser,
        help="weights: safetensors, or a state dict without code",
    )
    parser.add_argument("--arch", required=True, help="what the weights belong to: a timm or torchvision name")
    parser.add_argument("--data", type=os.path.expanduser, required=True, help=DATA_HELP)
    parser.add_argument("--eps", type=above_zero, help="radius of the perturbation, in [0, 1] pixels (default: 0.024)")
    add_data_options(parser)


def _add_purify(commands: argparse._SubParsersAction) -> None:
    parser = _subcommand(commands, "purify", _purify, "erase a backdoor from a finished model")
    _add_checkpoint_options(parser)
    parser.add_argument("--out", type=path, required=True, help="where to write the purified weights (.safetensors)")
    parser.add_argument("--clean", action="store_true", help="the data are known to be clean: one round is enough")
    parser.add_argument("--validation", type=os.path.expanduser, help="images to be trusted, to judge accuracy on")
    parser.add_argument("--max-accuracy-loss", type=share_or_none, help="accuracy that may be lost (default: 0.15)")
    parser.add_argument("--state-dir", type=path, help="folder to resume from after an interruption")


def _purify(arguments: argparse.Namespace) -> int:
    from trainguard.checkpoints import weights_path
    from trainguard.purification import purify_checkpoint

    _outside("--out", arguments.out, arguments.data)
    _outside("--state-dir", arguments.state_dir, arguments.data)
    options = given(arguments, "eps", "max_accuracy_loss")
    if arguments.validation is not None:
        options["validation"] = _open_data(arguments, arguments.validation, beside=True)
    outcome = purify_checkpoint(
        arguments.checkpoint,
        arch=arguments.arch,
        data=_open_data(arguments, arguments.data),
        out=arguments.out,
        clean=arguments.clean,
        seed=arguments.seed,
        state_dir=arguments.state_dir,
        progress=arguments.progress,
        **options,
        **reading(arguments),
    )
    _show("Purification", [*outcome.rows(), ("saved in", str(weights_path(arguments.out)))])
    return DONE if outcome.changed else UNDECIDED


def _add_audit(commands: argparse._SubParsersAction) -> None:
    parser = _subcommand(commands, "audit", _audit, "ask whether a finished model has a backdoor")
    _add_checkpoint_options(parser)
    parser.add_argument("--images", type=at_least_one, help="images to try the model on (default: 1000)")
    parser.add_argument("--out", type=path, help="folder for the result and its report")


def _audit(arguments: argparse.Namespace) -> int:
    from trainguard.purification import audit_checkpoint

    data = _open_data(arguments, arguments.data)
    if arguments.out:
        _ready(arguments.out, arguments.data, "audit.json")
    result = audit_checkpoint(
        arguments.checkpoint,
        arch=arguments.arch,
        data=data,
        seed=arguments.seed,
        progress=arguments.progress,
        **given(arguments, "eps", "images"),
        **reading(arguments),
    )
    rows = list(result.rows())
    if arguments.out:
        result.save(arguments.out)
        rows += [("saved in", str(arguments.out)), ("report", str(result.report(arguments.out / "report.html")))]
    _show("Audit", rows)
    return VERDICT_CODES[result.verdict]


def _add_drill(commands: argparse._SubParsersAction) -> None:
    summary = "poison copies of a data set in known ways and measure what the guard does about it"
    parser = _subcommand(commands, "drill", _drill, summary)
    parser.add_argument("data", metavar="DATA", type=os.path.expanduser, help=DATA_HELP + "; or digits")
    parser.add_argument("--attacks", type=names, required=True, help="such as badnets,blend; or all (docs/attacks.md)")
    parser.add_argument("--defenses", type=names, required=True, help=DEFENSES_HELP)
    parser.add_argument("--model", default="resnet9", help="the model to train (default: %(default)s)")
    parser.add_argument("--out", type=path, required=True, help="folder for the cells, the table and the report")
    parser.add_argument("--epochs", type=at_least_one, default=30, help="of each training (default: %(default)s)")
    parser.add_argument("--budget", type=above_zero, default=0.5, help="as for screen (default: %(default)s)")
    parser.add_argument("--seeds", type=seeds, help="repetitions, with commas between them, instead of --seed")
    parser.add_argument("--rows", type=at_least_one, help="use the first so many training images")
    parser.add_argument("--size", type=at_least_one, help="scale images to SIZE x SIZE pixels (default: the first's)")
    parser.add_argument("--no-flip", dest="flip", action="store_false", help="never mirror images: digits, signs")
    parser.add_argument("--device", help="where to train (default: an accelerator, if there is one)")
    parser.add_argument("--test", type=os.path.expanduser, help="test set, where DATA has none (default: a fifth)")
    parser.add_argument("--image-column", help="column of the images, where there are several")
    parser.add_argument("--label-column", help="column of the labels, where there are several")
    parser.add_argument("--test-rows", type=at_least_one, help="use the first so many test images")
    parser.add_argument("--rate", type=share, default=0.05, help="share of poisoned samples (default: %(default)s)")
    parser.add_argument("--cover-rate", type=share, help="share of cover samples, instead of each attack's own")
    parser.add_argument("--target", type=int, default=1, help="label that the poison gets (default: %(default)s)")
    parser.add_argument("--source", type=int, default=0, help="class that a class-bound trigger works on (default: 0)")
    parser.add_argument("--trigger-file", type=path, help="picture to use as the trigger, where an attack has one")


def _drill(arguments: argparse.Namespace) -> int:
    from trainguard.drill.runner import run_drill
    from trainguard.report import build

    for data in filter(None, (arguments.data, arguments.test)):
        _outside("--out", arguments.out, data)
    run_drill(
        arguments.data,
        attacks=arguments.attacks,
        defenses=arguments.defenses,
        model=arguments.model,
        out=arguments.out,
        epochs=arguments.epochs,
        budget=arguments.budget,
        seeds=arguments.seeds or (arguments.seed,),
        rows=arguments.rows,
        test=arguments.test,
        test_rows=arguments.test_rows,
        size=arguments.size,
        flip=arguments.flip,
        device=arguments.device,
        rate=arguments.rate,
        target=arguments.target,
        source=arguments.source,
        cover_rate=arguments.cover_rate,
        trigger_file=arguments.trigger_file,
        **columns(arguments),
        progress=arguments.progress,
    )
    print(f"report: {build(arguments.out, arguments.out / 'report.html')}")
    return DONE


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report", help="make the page of a saved result", description="Make the page of a saved result."
    )
    parser.set_defaults(run=_report)
    parser.add_argument("result", metavar="RESULT_DIR", help="folder of screen, audit or drill, file of purify")
    parser.add_argument("--out", type=path, required=True, help="the HTML file to write")


def _report(arguments: argparse.Namespace) -> int:
    from trainguard.report import build

    print(build(arguments.result, arguments.out))
    return DONE
