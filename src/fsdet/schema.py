# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every configuration key with its type, range and default, and nothing else; `fsdet.config` reads files into it.

Sections are frozen pydantic models. `tasks/` reads the whole; other floors are handed one section at most.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: object) -> object:
    """PyYAML reads `1e-4` as text (YAML 1.1 wants a dot); a float field accepts it."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Float = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
LARGEST_SIDE = 4096
Side = Annotated[int, Field(ge=32, le=LARGEST_SIDE)]  # px of the square that images are scaled to
LOSSES = ("bbox", "cls", "dfl", "supcon", "cpe", "triplet")


class Section(BaseModel):
    """A strict, immutable group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


class Run(Section):
    dir: Annotated[str, Field(min_length=1)] = "checkpoints/run"
    seed: int = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0  # 0: as torch chooses: a thread a core, or OMP_NUM_THREADS
    deterministic: bool = False


class Augment(Section):
    """Training augmentation; validation never sees any of it."""

    mosaic: Share = 1.0  # probability
    close_mosaic: Share = 0.1  # last share of the epochs trains without mosaic
    degrees: NonNegative = 0.0
    translate: Share = 0.1
    scale: Annotated[Float, Field(ge=0, lt=1)] = 0.5
    flip: Share = 0.5  # left-right
    hsv: tuple[Share, Share, Share] = (0.015, 0.7, 0.4)
    blur: Share = 0.01
    paste: Share = 0.45  # stage 3: share of images that are base images with shots pasted on them
    whole: Share = 0.2  # stage 3: share that are whole images of shots; what is left are base images
    pastes: Count = 6  # at most so many shots on one of them
    outline: Share = 0.5  # share of pasted shots cut along their silhouette, where one is found
    match_size: Share = 1.0  # share of pasted shots that are as large as an object of the base image, not as they were
    turn: NonNegative = 15.0  # degrees either way by which silhouettes and whole images of shots turn


class Data(Section):
    path: str = ""
    image_size: Side = 640
    support_size: Side = 320
    workers: Annotated[int, Field(ge=0)] = 2
    cache: Literal["auto", "ram", "none"] = "auto"
    shots: str | None = None
    base_images: Literal["all", "no_novel"] = "all"
    augment: Augment = Augment()


class Stage(Section):
    name: Literal["base", "episodic", "finetune"] = "base"
    mode: Literal["standard", "prototype", "dual"] = "dual"
    init_from: str | None = None  # a checkpoint, or a run folder, which stands for its best.pt
    freeze: list[str] | dict[int, list[str]] = []  # prefixes, or {epoch: prefixes}
    freeze_norm: bool = False  # BatchNorm in eval throughout the stage
    # of stage 3; auto chooses one of the last three by a rehearsal and the number of shots
    recipe: Literal["given", "auto", "near", "far", "far_long"] = "given"
    forget: bool = False  # stage 3 may train without base images, and so forget the base classes


class EpisodeCfg(Section):
    ways: Annotated[int, Field(ge=0)] = 0
    shots: tuple[Count, Count] | Count = 5  # K, or [least, most] drawn per episode
    queries: Count = 16  # images per step, in every stage
    negatives: Share = 0.25  # share of queries without any of the N classes
    disguise: Share = 0.0  # share of episodes in other colours and orientation, whose classes are therefore new
    per_epoch: Count | None = None  # None: training images / queries


class Vit(Section):
    """Of model.support_encoder `vit` alone."""

    name: str = "vit_small_patch14_dinov2"  # as timm calls it
    weights: str | None = None  # its state dict in a local file, safetensors or torch; nothing is downloaded
    image_size: Annotated[int, Field(ge=8)] = 224  # px of the square crops that it sees; a multiple of its patches


class Model(Section):
    backbone: str = "yolov8n"
    weights: str | None = None
    levels: Literal["P3-P5", "P2-P5"] = "P3-P5"
    embed_dim: Annotated[int, Field(ge=8)] = 128
    reg_max: Annotated[int, Field(ge=2)] = 16
    support: Literal["anchors", "roi", "both"] = "anchors"
    proxies: bool = True  # learnable base-class prototypes beside the support's
    # what many base classes teach for others too, and few do not; auto: on from 64 base classes
    refine: bool | Literal["auto"] = False  # an MLP corrects prototypes before they are compared
    objectness: bool | Literal["auto"] = False  # a logit for each place beside the cosines of the prototype branch
    support_encoder: Literal["detector", "vit"] = "detector"  # what turns a support instance into its embedding
    vit: Vit = Vit()


class LossWeights(Section):
    bbox: NonNegative = 7.5
    cls: NonNegative = 0.5
    dfl: NonNegative = 1.5
    supcon: NonNegative = 0.0
    cpe: NonNegative = 0.0
    triplet: NonNegative = 0.0


class Loss(Section):
    weights: LossWeights = LossWeights()
    bbox: Literal["wiou_v3", "wiou_v2", "wiou_v1", "ciou"] = "ciou"
    dfl: Literal["dfl", "clamped"] = "dfl"  # clamped: as older trainings had it, for comparison; kills gradients
    supcon: Literal["supcon", "clamped"] = "supcon"
    cpe: Literal["cpe", "clamped"] = "cpe"
    supcon_tau: Positive = 0.1
    cpe_tau: Positive = 0.2
    cpe_iou: Share = 0.7  # phi: proposals with a lower IoU are not anchors of CPE
    cpe_weighting: Literal["one", "linear", "exp"] = "linear"
    triplet_margin: Positive = 0.3
    triplet_mining: Literal["batch_hard", "semi_hard"] = "batch_hard"
    pair_rows: Annotated[int, Field(ge=2)] = 512  # at most this many embeddings enter a pairwise loss


class Optim(Section):
    name: Literal["sgd", "adamw", "muon"] = "sgd"
    lr: Positive = 0.01  # with muon: of everything but convolution kernels, which SGD moves
    min_lr: NonNegative = 1e-4
    lr_scale: dict[str, NonNegative] = {}
    momentum: Share = 0.9  # SGD momentum, AdamW beta1
    weight_decay: NonNegative = 5e-4
    muon_lr: Positive = 0.02  # of convolution kernels: the length of a step of each direction of each kernel
    muon_momentum: Share = 0.95
    muon_decay: NonNegative = 0.0  # decoupled, of convolution kernels
    clip_norm: NonNegative | dict[int, NonNegative] = 10.0  # 0: no clipping; {epoch (from 1): norm}
    clip_adaptive: Literal["none", "percentile", "zscore"] = "none"  # lower than clip_norm where past norms say so
    clip_window: Count = 200  # committed steps whose norms count
    clip_percentile: Share = 0.95  # of those norms; steps above it are shortened to it
    clip_zscore: NonNegative = 3.0  # standard deviations above their mean
    accumulate: Count = 1
    epochs: Positive | None = 100
    steps: Count | None = None  # committed steps; set, it replaces epochs
    warmup_epochs: NonNegative = 3.0
    schedule: Literal["cosine", "restarts", "plateau", "constant", "linear"] = "cosine"
    restarts: Count = 3  # cycles of `restarts`
    ema: Share = 0.9999  # decay; 0 switches it off
    ema_warmup: NonNegative = 2000  # decay grows as ema * (1 - exp(-count / ema_warmup))


class Guard(Section):
    max_rejected_in_row: Count = 20
    max_rejected_share: Share = 0.2  # of the last `window` steps
    window: Count = 100
    max_rewinds: Annotated[int, Field(ge=0)] = 3  # so often a run goes back to a checkpoint before too many end it
    rewind_lr: Annotated[Float, Field(gt=0, le=1)] = 0.5  # multiplies the LR each time it goes back
    max_quarantined: Share = 0.01  # of the training's samples; more that cannot be used end the run
    rank_timeout: Positive = 1800.0  # seconds that one process waits for another, evaluations included
    loader_timeout: Positive = 600.0  # seconds without a batch after which hung loader workers are started again
    init_scale: Positive = 8192.0  # fp16 only
    growth_interval: Count | None = None  # None: a tenth of the run's steps, 20 at least and 200 at most
    min_scale: Positive = 1.0  # below: alert; abort after max_low_scale steps in a row
    max_low_scale: Count = 20
    norm_warning: Positive = 1e4
    norm_explosion: Positive = 1e5
    clip_ratio: Positive = 100.0
    clipped_share: Share = 0.5
    loss_jump: Positive = 2.0
    saturated_share: Share = 0.05  # of the rows of a clamped loss
    dfl_high: Positive = 5.0  # mean over sides; ln 16 = 2.77 knows nothing
    first_loss: Annotated[Float, Field(gt=1)] = 2.0  # factor between the first loss and its expected value
    validation_drop: Share = 0.5  # of the best validation, lost from one evaluation to the next


class Save(Section):
    every_steps: Annotated[int, Field(ge=0)] = 0  # 0: at the end of each epoch only
    every_minutes: NonNegative = 0.0
    keep: Annotated[int, Field(ge=1)] = 2


class Wandb(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "disabled"
    project: str = "fsdet"
    entity: str | None = None
    name: str | None = None
    tags: list[str] = []


class Log(Section):
    wandb: Wandb = Wandb()
    tensorboard: bool = False
    every: Count = 10  # committed steps between log rows
    probe_every: Annotated[int, Field(ge=0)] = 0  # 0: first batch only
    debug: bool = False


class Eval(Section):
    every: NonNegative = 1.0  # epochs between validations; 0: at the end only
    shots: list[Count] = [1, 3, 5, 10]
    seeds: Count = 10
    setting: Literal["gfsod", "fsod"] = "gfsod"
    metric: Literal["coco", "voc07"] = "coco"
    split: str = "test"


class Classifier(Section):
    """Of task `classifier` alone."""

    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    width: Annotated[Float, Field(gt=0, le=1)] = 1.0  # share of the backbone's channels
    weights: str | None = None  # a local state dict of torchvision's network of that name
    head: Literal["attention", "dropout"] = "attention"  # attention weighs the places of the feature map
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.3
    loss: Literal["focal", "bce"] = "focal"
    gamma: NonNegative = 2.0  # of focal
    alpha: Share | None = None  # of focal: the positives' weight; the negatives have 1 - alpha
    pos_weight: Literal["auto"] | Positive = 1.0  # of bce: of positives; auto: negatives / positives of split train
    positive: str | None = None  # of two classes, which one counts as found; None: the second by its name
    validate_data: bool = True  # decode every image before the first step


class MaskRcnnWeights(Section):
    """The five losses of Mask R-CNN, by torchvision's names without their `loss_`."""

    objectness: NonNegative = 1.0
    rpn_box_reg: NonNegative = 1.0
    classifier: NonNegative = 1.0
    box_reg: NonNegative = 1.0
    mask: NonNegative = 1.0


class MaskRcnn(Section):
    """Of task `maskrcnn` alone."""

    arch: Literal["resnet50_fpn", "resnet50_fpn_v2", "resnet18_fpn"] = "resnet50_fpn"
    weights: str | None = None  # a local state dict of torchvision's network of that name
    loss_weights: MaskRcnnWeights = MaskRcnnWeights()
    channels: Annotated[int, Field(ge=8)] = 64  # resnet18_fpn: of the pyramid and of the mask head
    box_features: Annotated[int, Field(ge=8)] = 128  # resnet18_fpn: of the box head
    width: Annotated[Float, Field(gt=0, le=1)] = 1.0  # resnet18_fpn: share of the trunk's channels


class Config(Section):
    """Everything one training is told."""

    task: Literal["fewshot", "maskrcnn", "classifier"] = "fewshot"
    run: Run = Run()
    data: Data = Data()
    stage: Stage = Stage()
    episode: EpisodeCfg = EpisodeCfg()
    model: Model = Model()
    loss: Loss = Loss()
    optim: Optim = Optim()
    guard: Guard = Guard()
    save: Save = Save()
    log: Log = Log()
    eval: Eval = Eval()
    classifier: Classifier = Classifier()
    maskrcnn: MaskRcnn = MaskRcnn()
