"""The `rescan-export` command: `onnx`, `checkpoint`, `card`, `parity`, `tensorrt`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from daemon import NOTICE, __version__
from daemon.card import CardError
from daemon.engines import PRECISIONS, EngineError
from daemon.words import Verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed; wrong usage ends with 2 in the argument parser.
    """
    args = build_parser().parse_args(argv)
    # It warns of torchvision, which is not needed; torch resets levels when it is imported, so the logger is switched off.
    logging.getLogger("torch.onnx._internal.exporter._registration").disabled = True
    from export.graph import GraphError
    from export.onnx import ExportError

    try:
        return int(args.func(args))
    except (CardError, EngineError, ExportError, GraphError, ValueError) as error:
        print(f"rescan-export {args.command}: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="rescan-export", description="Make, check and prepare model files.", epilog=NOTICE
    )
    parser.add_argument("--version", action="version", version=f"rescan-export {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_onnx(commands)
    _add_checkpoint(commands)
    _add_card(commands)
    _add_parity(commands)
    _add_tensorrt(commands)
    return parser


def _add_onnx(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("onnx", help="student checkpoint -> one .onnx file with its card")
    parser.add_argument("checkpoint", type=Path, help="student.pt of `rescan-train cascade`")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="JSON facts for the card: name, version, temperature, calibration, evaluation, training",
    )
    parser.add_argument("--temperature", type=float, help="divisor of the logits; default: of --calibration, else 1")
    parser.add_argument(
        "--upsampling",
        choices=("resize", "transpose"),
        default="resize",
        help="form of the trilinear x2 (default %(default)s)",
    )
    parser.add_argument(
        "--anatomy",
        default="formula",
        help="head of the golden case: `formula` (default), `builtin`, or label maps as for rescan-train",
    )
    parser.set_defaults(func=_onnx)


def _onnx(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from export.golden import golden_volume
    from export.onnx import export_student, read_facts, training_facts
    from training.network import load_network

    if not args.checkpoint.is_file():
        raise ValueError(f"{args.checkpoint}: no such file; give a checkpoint made by `rescan-train cascade`")
    network, checkpoint = load_network(args.checkpoint)
    facts = read_facts(args.calibration)
    facts = replace(facts, training=training_facts(checkpoint) | facts.training)
    if args.temperature is not None:
        facts = replace(facts, temperature=args.temperature)
    card = export_student(network, args.out, facts, golden_volume(args.anatomy), args.upsampling)
    print(
        f"{args.out}: {args.out.stat().st_size} bytes, {card.weights} weights, operators {', '.join(card.operators)}, "
        f"calibration {'inside' if card.calibration else 'none: it cannot be served yet'}",
        file=sys.stderr,
    )
    if card.golden is not None and card.golden.verdict == Verdict.CANNOT_JUDGE:
        print(
            "the golden case is refused, so its verdict tells engines apart less well; export with --anatomy builtin",
            file=sys.stderr,
        )
    return 0


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("checkpoint", help="one .onnx file -> a student checkpoint to train further")
    parser.add_argument("file", type=Path, help="a model file")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .pt file to write")
    parser.set_defaults(func=_checkpoint)


def _checkpoint(args: argparse.Namespace) -> int:
    from daemon.card import read_model
    from export.unfold import read_graph, unfold
    from training.network import save_network

    model = read_model(args.file)
    network = unfold(read_graph(model.data), model.card.temperature)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_network(network, args.out, stage="student", origin=f"{model.card.name} {model.card.version}")
    print(f"{args.out}: the student of {args.file.name}, for rescan-train cascade --start", file=sys.stderr)
    return 0


def _add_card(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("card", help="embed another calibration or evaluation; the graph stays as it is")
    parser.add_argument("file", type=Path, help="a model file")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON facts, as for `onnx`")
    parser.add_argument("-o", "--out", type=Path, help="where to write; default: in place")
    parser.set_defaults(func=_card)


def _card(args: argparse.Namespace) -> int:
    from export.onnx import recalibrate

    out = args.out or args.file
    card = recalibrate(args.file, out, args.calibration)
    golden = card.golden
    print(
        f"{out}: card of {card.name} {card.version} renewed, golden verdict {golden and golden.verdict}",
        file=sys.stderr,
    )
    return 0


def _add_parity(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("parity", help="compare every engine and precision that is present with the reference")
    parser.add_argument("file", type=Path, help="a model file")
    parser.add_argument("--checkpoint", type=Path, help="compare with torch on this checkpoint as well")
    parser.add_argument(
        "--volumes", type=Path, nargs="*", default=[], help="DICOM folders or NIfTI files of real heads"
    )
    parser.add_argument("--engines", nargs="*", choices=tuple(PRECISIONS), help="default: all that are present")
    parser.add_argument("--admit", action="store_true", help="write the precisions that passed into the card")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON on stdout")
    parser.set_defaults(func=_parity)


def _parity(args: argparse.Namespace) -> int:
    from export.parity import command

    return command(args)


def _add_tensorrt(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("tensorrt", help="build TensorRT engines ahead of the first scan")
    parser.add_argument("file", type=Path, help="a model file")
    parser.add_argument("--cache", type=Path, help="folder of the engines; default: where the daemon looks for them")
    parser.add_argument("--precision", choices=PRECISIONS["tensorrt"], default="tf32", help="default %(default)s")
    parser.set_defaults(func=_tensorrt)


def _tensorrt(args: argparse.Namespace) -> int:
    from export.tensorrt import command

    return command(args)


if __name__ == "__main__":
    sys.exit(main())
