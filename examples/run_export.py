"""Answers as the service does, from an exported adapter and files of raw inputs: a line of JSON for each.

    python run_export.py model.onnx input…        # images, or texts in UTF-8

Needs numpy, onnxruntime, pillow and tokenizers.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
task, labels, how = about["task"], json.loads(about["labels"]), json.loads(about["preprocessing"])
tokenizer = Tokenizer.from_str(about["tokenizer"]) if "tokenizer" in about else None


def tokens(path):
    with open(path, encoding="utf-8", newline="") as file:
        text = tokenizer.encode(how["prompt"] + file.read())
    return {"ids": np.array([text.ids]), "mask": np.array([text.attention_mask])}


def pixels(path):
    seen = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.new("RGB", seen.size, "white")
    image.paste(seen, mask=seen)
    long = how["crop_mode"] == "fold" and max(image.size) >= 2 * min(image.size)
    square = (folded if long else centre)(image, how["size"], Image.Resampling[how["interpolation"].upper()])
    return {"rgb": np.asarray(square)[None]}


def centre(image, size, method):
    # Of an image near a square, as timm's evaluation transform cuts it.
    resized = int(size / how["crop"])
    if how["crop_mode"] == "squash":
        image = image.resize((resized, resized), method)
    sides = np.array(image.size)
    scaled = (resized * sides / min(sides)).astype(int)
    first = np.round((scaled - size) / 2)
    (left, top), (right, bottom) = first * sides / scaled, np.minimum((first + size) * sides / scaled, sides)
    narrow = image.resize((size, image.height), method, (left, 0, right, image.height))
    return narrow.resize((size, size), method, (0, top, size, bottom))


def folded(image, size, method):
    # All of a long image, in parts below each other; of a tall one, side by side.
    turn = 1 if image.width >= image.height else -1
    parts = min(size, round((max(image.size) / min(image.size)) ** 0.5))
    strip = image.resize((size * parts, -(-size // parts))[::turn], method)
    square = Image.new("RGB", (size, size))
    for part in range(parts):
        square.paste(strip, (-size * part, size * part // parts)[::turn])
    return square


for path in sys.argv[2:]:
    found = session.run(None, pixels(path) if about["kind"] == "image" else tokens(path))
    answer = {output.name: row[0].tolist() for output, row in zip(session.get_outputs(), found, strict=True)}
    for name in {"probabilities", "assigned", "uncertain"} & answer.keys():
        answer[name] = dict(zip(labels, answer[name], strict=True))
    if task == "classification":
        answer["label"] = labels[answer.pop("answer")]
    print(json.dumps(answer))
