# SPDX-License-Identifier: AGPL-3.0-or-later
"""torchvision's Mask R-CNN on COCO instances: five losses, a rate for each part, AP of boxes and of masks."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fsdet.config import Config
from fsdet.data import sources
from fsdet.data.batch import InstanceBatch
from fsdet.data.collate import to_tensor
from fsdet.data.images import read_rgb
from fsdet.data.report import Report
from fsdet.data.shapes import mask_of, moved, tight
from fsdet.data.sources import DataSet
from fsdet.data.store import AUTO_BYTES, ImageStore
from fsdet.data.transforms import Sample, colour, random_affine, warp
from fsdet.errors import DataError, counted, explain
from fsdet.evaluation.masks import MaskScorer
from fsdet.models.maskrcnn import InstanceDetector
from fsdet.pictures import Picture, episode_sheet, plot_labels
from fsdet.pictures import colour as shade
from fsdet.tasks import initial
from fsdet.tasks.supply import ImageTask, chunks, evenly, over_readable, spread
from fsdet.types import Detections, ImageRecord, LossReport

log = logging.getLogger("fsdet")
USUAL_CLASSES = 80  # a model is counted for, when its data are not there to say
SHOWN_FROM = 0.5  # score from which a detection is drawn
PRESETS = {1000: "configs/maskrcnn/under_1000.yaml", 10_000: "configs/maskrcnn/under_10000.yaml"}  # below so many
MIN_PIXELS = 4  # of a mask that is left after an image was moved


class MaskRcnnTask(ImageTask):
    """What a training step means for Mask R-CNN; satisfies `types.Task`."""

    name = "maskrcnn"
    best_metric = "val/fitness"  # mean of mask AP50 and AP

    def __init__(self, config: Config, data: DataSet) -> None:
        super().__init__(config, data)
        self.spec = spec_of(config, len(data.names))
        self.model = InstanceDetector(self.spec)
        self.weights = config.maskrcnn.loss_weights.model_dump()

    def param_groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        return self.model.groups()

    def batch(self, index: int) -> InstanceBatch:
        made, ids, replaced = self.supply.made(index, self._instances)
        images, boxes, labels, masks = zip(*made, strict=True)
        pixels = to_tensor(images, self.supply.size)
        return InstanceBatch(index, pixels, labels, ids, boxes, masks, replaced=replaced)

    def _instances(self, rng: np.random.Generator, index: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """One training image, and boxes, labels and masks of what is left of its objects once it has been moved."""
        store, jitter, size = self.supply.store, self.supply.jitter, self.supply.size
        sample, record = store.sample(index), store.records[index]
        h, w = sample.image.shape[:2]
        matrix = random_affine(rng, jitter, (w / 2, h / 2), size)
        numbered = Sample(sample.image, sample.boxes, np.arange(len(sample.boxes)))
        out = warp(numbered, matrix, size)
        shapes = [shape for shape, crowd in zip(record.shapes, record.crowd, strict=True) if not crowd]
        onto = matrix * [w / record.size[1], h / record.size[0], 1.0]  # masks are as large as the file says
        masks = [moved(mask_of(shapes[i], record.size), onto, size) for i in out.labels]
        left = [i for i, mask in enumerate(masks) if mask.sum() >= MIN_PIXELS]
        labels = torch.from_numpy(sample.labels[out.labels[left]].astype(np.int64))
        kept = np.stack([masks[i] for i in left]) if left else np.zeros((0, size, size), np.uint8)
        return colour(rng, out.image, jitter), torch.from_numpy(tight(kept)), labels, torch.from_numpy(kept)

    def losses(self, batch: InstanceBatch) -> LossReport:
        targets = [{"boxes": b, "labels": c + 1, "masks": m}
                   for b, c, m in zip(batch.boxes, batch.labels, batch.masks, strict=True)]  # fmt: skip
        raw, levels = self.model.losses(list(batch.images), targets)
        weighted = {name: self.weights[name] * value for name, value in raw.items()}
        count = torch.full((), float(len(batch.images)), device=batch.images.device)
        objects = sum(len(c) for c in batch.labels)
        return LossReport(sum(weighted.values()), raw, weighted, dict.fromkeys(raw, len(batch.images)), objects, count,
                          probe_at=tuple(t for t in levels if t.requires_grad),
                          image_ids=batch.image_ids)  # fmt: skip

    def expected_initial(self, report: LossReport) -> Mapping[str, float]:
        """objectness and mask: a coin, ln 2. classifier: every class alike, the background among them."""
        return {"objectness": math.log(2), "mask": math.log(2), "classifier": math.log(len(self.data.names) + 1)}

    @cached_property
    def judge(self) -> "Judge":
        return Judge(self.config, self.data, evenly(self.data.split(self.split)))

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """{val/mask/AP50, val/mask/AP, val/box/AP50, val/box/AP, val/fitness}."""
        found = self.judge.figures(model)
        return {f"val/{name}": value for name, value in found.items()} | {
            "val/fitness": (found["mask/AP50"] + found["mask/AP"]) / 2
        }

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        labels = folder.parent / "labels.png"
        if not labels.exists():
            plot_labels(self.supply.store.records, self.data.names, labels)
        return [self.judge.sheet(model, folder / f"step_{step:06d}.jpg", f"step {step}, validation images")]

    def describe(self) -> Mapping[str, Any]:
        return {"task": self.name, "model": self.spec, "classes": list(self.data.names),
                "image_size": self.config.data.image_size, "data": str(self.config.data.path)}  # fmt: skip


class Judge:
    """Images, and how well a model does on them; no randomness, no augmentation, masks at the size of the files."""

    def __init__(self, config: Config, data: DataSet, records: Sequence[ImageRecord]) -> None:
        self.names = data.names
        self.store = ImageStore(records, config.data.image_size, AUTO_BYTES)
        self.scorer, self.filled = MaskScorer(self.store.records, len(data.names)), False

    @torch.inference_mode()
    def detections(self, model: InstanceDetector, indices: Sequence[int]) -> tuple[list[Detections], list[np.ndarray]]:
        """What is found in images of the split, and its masks [n, H, W] bool."""
        device = next(model.parameters()).device
        found, masks = [], []
        for part in chunks(len(indices)):
            records = [self.store.records[indices[i]] for i in part]
            images = [to_tensor([self.store.sample(indices[i]).image], 0)[0].to(device) for i in part]
            for one in model.detect(images, [r.size for r in records]):
                branch = torch.zeros(len(one["labels"]), dtype=torch.uint8, device=device)
                found.append(Detections(one["boxes"], one["scores"], one["labels"], branch))
                masks.append(one["masks"].cpu().numpy())
        return found, masks

    def figures(self, model: InstanceDetector) -> Mapping[str, float]:
        """{mask/AP50, mask/AP, box/AP50, box/AP}, and recall of boxes at IoU .5."""
        self.filled = self.filled or self.store.fill() > 0
        found, masks = over_readable(self.store, lambda: self.detections(model, range(len(self.store.records))))
        if len(found) != self.scorer.num_images:  # an image has been left out
            self.scorer = MaskScorer(self.store.records, len(self.names))
        boxes, outlines = self.scorer.score(found), self.scorer.score_masks(found, masks)
        return {"mask/AP50": outlines.ap50(), "mask/AP": outlines.ap(), "box/AP50": boxes.ap50(), "box/AP": boxes.ap(),
                "box/recall": boxes.recall()}  # fmt: skip

    def sheet(self, model: InstanceDetector, path: Path, title: str) -> Path:
        """Fixed images with the masks and boxes found in them, true boxes dashed."""
        return episode_sheet([], over_readable(self.store, lambda: self.pictures(model)), path, title=title)

    def pictures(self, model: InstanceDetector) -> list[Picture]:
        chosen = spread(len(self.store.records))
        pictures = []
        for i, found, masks in zip(chosen, *self.detections(model, chosen), strict=True):
            kept = (found.scores >= SHOWN_FROM).cpu().numpy()
            labels, scores = found.labels.cpu().numpy()[kept].tolist(), found.scores.cpu().numpy()[kept].tolist()
            image = read_rgb(self.store.records[i].path).astype(np.float32)
            for label, mask in zip(labels, masks[kept], strict=True):
                image[mask] = 0.5 * image[mask] + 0.5 * np.float32(shade(label))
            texts = [f"{self.names[c]} {s:.2f}" for c, s in zip(labels, scores, strict=True)]
            boxes = found.boxes.cpu().numpy()[kept]
            pictures.append(Picture(image.astype(np.uint8), boxes, texts, labels, self.store.records[i].boxes))
        return pictures


def spec_of(config: Config, classes: int) -> dict[str, Any]:
    m = config.maskrcnn
    return {"arch": m.arch, "classes": classes, "image_size": config.data.image_size, "channels": m.channels,
            "box_features": m.box_features, "width": m.width}  # fmt: skip


def read(config: Config) -> DataSet:
    """The data set with its outlines; an object without one is left out, and the report says how many were."""
    data = sources.load(config.data.path, shapes=True)
    splits = {s: [r.kept(np.array([shape is not None for shape in r.shapes], bool)) for r in data.split(s)]
              for s in data.splits}  # fmt: skip
    if "train" in splits and not any(r.shapes for r in splits["train"]):
        raise DataError(explain("a COCO json with `segmentation`", "no outline in split train", config.data.path,
                                "export the instances with their polygons or run lengths"))  # fmt: skip
    return DataSet(data.root, data.base, data.novel, splits, data.report, data.name)


def create(config: Config, data: DataSet, *, resume: bool) -> tuple[MaskRcnnTask, str | None]:
    task = MaskRcnnTask(config, data)
    return task, None if resume else initial.start(task, config.stage.init_from, config.maskrcnn.weights, "maskrcnn")


def restored(values: Mapping[str, Any]) -> InstanceBatch:
    return InstanceBatch.restored(values)


def network(spec: Mapping[str, Any], where: str) -> InstanceDetector:
    return InstanceDetector(spec)


def planned(config: Config) -> tuple[Mapping[str, Any], str]:
    path, classes, where = config.data.path, USUAL_CLASSES, "assumed"
    if path and Path(path).expanduser().exists():
        listed = sources.plan(path, Report())
        classes, where = len((listed.base or sources.load(path).base) + listed.novel), path
    return spec_of(config, classes), f"Mask R-CNN {config.maskrcnn.arch}, {counted(classes, 'class', 'es')} ({where})"


def told(spec: Mapping[str, Any]) -> str:
    return f"Mask R-CNN {spec['model']['arch']}, {counted(len(spec['classes']), 'class', 'es')}"


def advice(data: DataSet) -> str:
    count = len(data.split("train"))
    name = next((name for most, name in PRESETS.items() if count < most), "configs/maskrcnn_coco.yaml")
    return f"{counted(count, 'training image')}: {name} has safe settings for a fine-tuning on so many"


def inputs(config: Config) -> Sequence[tuple[int, int]]:
    return [(config.episode.queries, config.data.image_size)]


def look(model: nn.Module, images: Tensor) -> Any:
    return model.detect(list(images), [tuple(image.shape[1:]) for image in images])


def practice(model: nn.Module, images: Tensor) -> Tensor:
    """One object in the middle of each image."""
    height, width = images.shape[2:]
    box = torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]])
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": mask}
    return sum(model.losses(list(images), [target] * len(images))[0].values())


def judge(model: nn.Module, config: Config, data: DataSet, split: str, folder: Path | None) -> Mapping[str, Any]:
    """AP of boxes and masks on a split, and a sheet of its images in `folder`."""
    judge = Judge(config, data, data.split(split))
    if folder is not None:
        judge.sheet(model, folder / "episodes" / f"eval_{split}.jpg", f"images of split {split}")
    return {"metrics": dict(judge.figures(model)), "images": len(judge.store.records)}
