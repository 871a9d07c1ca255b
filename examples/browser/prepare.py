"""Makes the files that the page reads: model.onnx, model.json and a few example pictures, in eight bits.

    python prepare.py --data-dir cifar10

`cifar10/train/<class>/*` calibrate the model, `cifar10/test/<class>/*` are the examples. Any other model of
ptq4vm.models or timm goes with `--model NAME --data-dir FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import onnx

import ptq4vm
import ptq4vm.onnx
from ptq4vm.data import calibration_batches, open_dataset, read_image, transform_for
from ptq4vm.models import create_model

EXAMPLES = 4


def describe(model: Path, examples: list[str]) -> dict[str, object]:
    """Returns what the page must know of a model: JavaScript cannot read the metadata of an ONNX file."""
    properties = {each.key: each.value for each in onnx.load(model).metadata_props}
    return {
        "name": properties["ptq4vm.architecture"],
        "preprocessing": json.loads(properties["ptq4vm.preprocessing"]),
        "classes": json.loads(properties.get("ptq4vm.classes", "null")),
        "bytes": model.stat().st_size,
        "examples": examples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder of images, <split>/<class>/*")
    parser.add_argument("--model", default="vmamba_micro_32.cifar10")
    parser.add_argument("--images", type=int, default=64, help="images to calibrate with")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()

    model = create_model(options.model, pretrained=True).eval()
    images = open_dataset(options.data_dir, "train", transform_for(model))
    batches = calibration_batches(images, options.images, 32, 0)
    path = options.output / "model.onnx"
    ptq4vm.onnx.export(ptq4vm.quantize(model, batches, ptq4vm.QuantConfig()), path)

    test = open_dataset(options.data_dir, "test", transform_for(model))
    chosen = range(0, len(test), max(1, len(test) // EXAMPLES))[:EXAMPLES]
    names = [f"example{place}.png" for place in range(len(chosen))]
    for index, name in zip(chosen, names, strict=True):
        read_image(test.samples[index][0]).save(options.output / name)
    description = describe(path, names)
    (options.output / "model.json").write_text(json.dumps(description, indent=1) + "\n")
    print(f"wrote model.onnx ({description['bytes']} bytes), model.json and {len(names)} pictures to {options.output}")


if __name__ == "__main__":
    main()
