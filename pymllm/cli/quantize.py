"""`pymllm quantize`: write another checkpoint of a model, quantised by rules, that other programs read too."""

from __future__ import annotations

import argparse
from pathlib import Path

from pymllm.cli.options import ABOUT_RULES, add_common_options, add_rule_options, positive
from pymllm.cli.output import print_json, say, show

EXAMPLES = """METHOD is for every layer in the model's blocks that no --quant names; embeddings, the head, routers and
norms keep their weights. Without it, only what --quant names changes. If a run was stopped (Ctrl+C too), the same
command goes on where it was.

examples:
  pymllm quantize org/name OUT int4
  pymllm quantize org/name OUT int4:group_size=64 --quant 'lm_head=int8'
  pymllm quantize org/name OUT.gguf Q4_K_M
  pymllm quantize org/name OUT --quant '**.layers.**=int4'
  pymllm quantize org/name OUT --quant '**.layers.**=awq' --calibrate text.txt
  pymllm quantize org/name OUT --quant '**.mlp.**=fp8' --quant '**.self_attn.**=int8'
  pymllm quantize org/name OUT.gguf --quant '**=gguf:type=Q4_K'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm quantize MODEL OUT [METHOD] [options]", EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="a folder, or a hub id org/name")
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        help="the folder, or .gguf file, to write: new, or of a stopped run",
    )
    parser.add_argument(
        "method",
        nargs="?",
        metavar="METHOD",
        help="int4, int8:group_size=64, awq, fp8, ..., or for OUT.gguf Q4_K_M, Q8_0, ...: for the layers of all blocks "
        "that no --quant names",
    )
    group = parser.add_argument_group("what to write", ABOUT_RULES)
    add_rule_options(group, "'**.layers.**=int4:scale=mse'")
    group.add_argument(
        "--format",
        choices=("auto", "awq", "gptq", "gptq_v2", "modelopt", "mlx", "mxfp4", "compressed-tensors", "gguf"),
        default="auto",
        help="the checkpoint's format; auto: gguf if OUT ends in .gguf, awq, gptq or mlx if all rules ask for it, "
        "mxfp4 likewise for gpt-oss, else compressed-tensors",
    )
    group.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="the largest weight file; default: 5GB"
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="a text file to run the model on: integer weights are then rounded to suit the inputs that layers get",
    )
    group.add_argument(
        "--algorithm",
        choices=("auto", "awq", "gptq"),
        default="auto",
        help="how weights are rounded; auto: awq for the format awq, else gptq",
    )
    group.add_argument(
        "--act-order", action="store_true", help="gptq: round the inputs that matter most first"
    )
    group.add_argument(
        "--calibration-tokens",
        type=positive,
        default=16384,
        metavar="N",
        help="tokens of the text; default: 16384",
    )
    group.add_argument(
        "--window",
        type=positive,
        default=512,
        metavar="N",
        help="tokens of the text that run together; default: 512",
    )
    parser.add_argument(
        "--restart", action="store_true", help="throw away what an unfinished run with other options left"
    )
    parser.add_argument("--json", action="store_true", help="every layer as JSON (docs/quantizing.md)")
    add_common_options(parser)


def execute(args: argparse.Namespace) -> int:
    if not (args.quant or args.method):
        args.parser.error(
            "say what to quantise: METHOD for the whole model, e.g. int4, or --quant PATTERN=METHOD"
        )
    from pymllm.quantization.rules import is_method_alone

    if args.method and not is_method_alone(args.method):
        args.parser.error(f"METHOD has no pattern before it; for some layers say --quant {args.method!r}")
    try:
        return _quantize(args)
    except KeyboardInterrupt as stop:
        say(f"\n{stop}" if stop.args else "\nStopped before anything was written.")
        return 130


def _quantize(args: argparse.Namespace) -> int:
    from pymllm.writing.quantize_checkpoint import expand_rules, quantize_checkpoint

    expanded = expand_rules(
        args.model, args.out, [*(args.quant or []), *([args.method] if args.method else [])], args.revision
    )
    if expanded.said:
        say(expanded.said)
    written = quantize_checkpoint(
        args.model,
        args.out,
        expanded.rules,
        format=args.format,
        shard_size=args.shard_size,
        calibrate=args.calibrate,
        algorithm=args.algorithm,
        act_order=args.act_order,
        calibration_tokens=args.calibration_tokens,
        window=args.window,
        restart=args.restart,
        revision=args.revision,
    )
    if args.json:
        print_json(written.to_dict())
    else:
        show(str(written))
    return 0
