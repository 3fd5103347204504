# SPDX-License-Identifier: AGPL-3.0-or-later
"""The published base/novel class splits: VOC 1-3 (Kang et al. 2019), COCO 60/20 (novel: the classes that VOC has)."""

from fsdet.errors import DataError, did_you_mean, explain

VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_NOVEL = {
    "voc1": ("bird", "bus", "cow", "motorbike", "sofa"),
    "voc2": ("aeroplane", "bottle", "cow", "horse", "sofa"),
    "voc3": ("boat", "cat", "motorbike", "sheep", "sofa"),
}
COCO = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip
COCO_NOVEL = (1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 44, 62, 63, 64, 67, 72)
SPLITS = (*VOC_NOVEL, "coco")
SPELLINGS = {  # VOC's word: COCO's
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "pottedplant": "potted plant",
    "sofa": "couch", "tvmonitor": "tv",
}  # fmt: skip


def other_spelling(name: str) -> str | None:
    """What COCO calls VOC's class `name`, or VOC COCO's; None where they agree or do not have it."""
    return {**SPELLINGS, **{coco: voc for voc, coco in SPELLINGS.items()}}.get(name)


def named_split(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(base names, novel names) of `voc1`, `voc2`, `voc3` or `coco`.

    VOC names are alphabetical inside each part, COCO names follow the category ids, as published.

    Raises:
        DataError: another name.
    """
    if isinstance(name, str) and name in VOC_NOVEL:
        return tuple(n for n in VOC if n not in VOC_NOVEL[name]), VOC_NOVEL[name]
    if name == "coco":
        novel = tuple(COCO[key] for key in COCO_NOVEL)
        return tuple(n for n in COCO.values() if n not in novel), novel
    advice = f"use one of them.{did_you_mean(str(name), SPLITS)}"
    raise DataError(explain(f"one of {', '.join(SPLITS)}", f"'{name}'", "split", advice))
