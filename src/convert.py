"""Turn a model file into another form: python -m src.convert IN OUT."""

from __future__ import annotations

import argparse
import sys

from .run import command

PURPOSE = """Turn a model file into another form. IN is any model file (.pth or .safetensors: published, packed or
dense); the ending of OUT says what is written:

  .pth          the published format
  .safetensors  packed: codes at log2(k) bits, with everything that rebuilds the network
  .onnx         weights as codebook and codes (Gather), checked with onnxruntime
  .mlpackage    Core ML, weights as table and codes

With --dense the weights are dequantized first, for programs that know nothing of codes.

With --model.reestimate_norms True the running statistics of its batch norms are taken anew from the images of
--calibration.images FOLDER, which need no labels: they put right much of what quantizing has changed, and fit a network
to other images. Of the settings calibration.*, seed and device count (docs/settings.md)."""
READ = ("model.reestimate_norms", "calibration.", "seed", "device")
"""Keys of the settings, and with a dot at the end a section of them."""
UNREAD = ("calibration.use", "calibration.memory")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments, keys = command.split_settings(sys.argv[1:] if argv is None else argv, ("seed", "device"))
    options = _parser().parse_args(arguments)

    def job() -> int:
        """Torch takes seconds to load: only when the command line is known to be good."""
        settings = command.settings_of(keys, READ, UNREAD) if keys else None
        from . import recipes
        from .recipes.convert import ConvertOptions

        wanted = ConvertOptions(
            dense=options.dense,
            entropy_coding=options.entropy,
            arch=options.arch,
            image_size=options.image_size,
            overwrite=options.overwrite,
            size=options.size,
            opset=options.opset,
            exporter=options.exporter,
            fit=options.fit,
        )
        return recipes.convert(options.source, options.target, wanted, settings)

    return command.guarded(job)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command.program(__package__, "convert"),
        description=PURPOSE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help="the model file to read")
    parser.add_argument("target", metavar="OUT", help="the file to write")
    parser.add_argument("--dense", action="store_true", help="write dequantized weights")
    parser.add_argument(
        "--entropy",
        action="store_true",
        help="entropy-code the codes of a packed file, layer by layer, where that is smaller",
    )
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="the architecture (default: what the file says, or the first that its tensors fit)",
    )
    parser.add_argument(
        "--image_size",
        type=command.positive,
        default=0,
        metavar="N",
        help="side of the images that trace and check a graph, and of the only ones that a Core ML package takes "
        "(default: what the network is made for)",
    )
    parser.add_argument(
        "--size",
        choices=("auto", "free", "fixed"),
        default="auto",
        help="images of any size, or of --image_size only, for an ONNX graph (default: any where the network can)",
    )
    parser.add_argument("--opset", type=command.positive, metavar="N", help="of an ONNX graph (default: 18)")
    parser.add_argument(
        "--exporter",
        choices=("auto", "torchscript", "dynamo"),
        default="auto",
        help="which of torch's makes an ONNX graph (default: dynamo, which needs onnxscript, where torchscript cannot)",
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="re-quantize to 256 centroids what has more, which Core ML cannot hold, instead of writing it densely",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser


if __name__ == "__main__":
    sys.exit(main())
