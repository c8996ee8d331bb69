"""Quantize Phi-4: a checkpoint in, a smaller one that vLLM loads and its model card out.

    python jobs/quantize.py --scheme fp8-dynamic \\
        --model microsoft/phi-4 --output s3://bucket/phi-4-fp8/
    python jobs/quantize.py --output s3://bucket/phi-4-fp8/ \\
        --measured s3://bucket/evaluation/report.json

The second puts what jobs/evaluate.py found into the card of what the first one made.

The tools run in an environment of their own, because their pins clash with vLLM's: it is made once
and kept, or --python names one. Endpoint and credentials of the object store come from the usual
AWS variables.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

from jobs.flags import (
    Flags,
    add_config,
    add_fields,
    bare_parser,
    file_layer,
    interrupted,
    new_console,
    told,
)
from phi4ray.config import validated
from phi4ray.errors import ConfigError, Phi4rayError
from phi4ray.gpus import GIB
from phi4ray.train.quantize import quantize, tell
from phi4ray.train.scheme import QuantizeConfig, Scheme

EXIT_CODES = "exit codes: 0 the checkpoint is written, 1 failed, 2 bad arguments, 130 interrupted"

FLAGS: Flags = {
    "model": str,
    "revision": str,
    "output": str,
    "kv_cache_scheme": str,
    "group_size": int,
    "iters": int,
    "smoothing_strength": float,
    "calibration_dataset": str,
    "calibration_split": str,
    "num_samples": int,
    "max_seq_length": int,
    "seed": int,
    "python": str,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quantization that the arguments describe; returns the process's exit code."""
    arguments = parser().parse_args(argv)
    console = new_console()
    try:
        if arguments.measured is not None:
            tell(card_only(arguments), arguments.measured)
            return 0
        result = quantize(configuration(arguments), console)
    except Phi4rayError as error:
        return told(error)
    except KeyboardInterrupt:
        return interrupted("no checkpoint was written, the same command begins anew")
    console.print(
        f"{result.bytes_before / GIB:.3f} GiB → {result.bytes_after / GIB:.3f} GiB in "
        f"{result.seconds:.0f} s: {result.output}"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described, _, example = (__doc__ or "").partition("\n\n")
    result = bare_parser("quantize.py", described, f"{example}\n{EXIT_CODES}")
    add_config(result)
    add = result.add_argument
    add("--scheme", choices=get_args(Scheme), help="how weights and activations are stored")
    add(
        "--calibration",
        nargs="+",
        action="extend",
        metavar="URI",
        help="files and globs of rows with messages, prompt or text; s3:// too",
    )
    add(
        "--measured",
        default=None,
        metavar="URI",
        help="report.json of an evaluation: only puts it into the card at --output",
    )
    add_fields(result, "quantization", FLAGS, QuantizeConfig)
    return result


def card_only(arguments: argparse.Namespace) -> str:
    """The output whose card is to be written anew.

    Raises:
        ConfigError: --output is missing, or there are flags that would have no effect.
    """
    given = vars(arguments).keys() & {*FLAGS, "scheme", "calibration"}
    if given != {"output"} or arguments.config is not None:
        raise ConfigError("--measured goes with --output alone: it only writes the card anew")
    output: str = arguments.output
    return output


def configuration(arguments: argparse.Namespace) -> QuantizeConfig:
    """Merge the YAML file and flags, which win.

    Raises:
        ConfigError: names every field that is wrong, missing, or without effect on the scheme.
    """
    given = vars(arguments)
    names = (*FLAGS, "scheme", "calibration")
    flags = {name: given[name] for name in names if name in given}
    config = validated(QuantizeConfig, file_layer(arguments.config), flags)
    # Not in the model: the record of a checkpoint states all settings, its card is made of them.
    if unused := config.unused():
        raise ConfigError(f"{config.scheme} takes no notice of {', '.join(unused)}: leave that out")
    return config


if __name__ == "__main__":
    sys.exit(main())
