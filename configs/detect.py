r"""Detection and instance segmentation: Mask R-CNN on a plain ViT, from any encoder (docs/detection.md).

  python -m mae_jax.main --config=configs/detect.py --workdir=runs/detect
  python -m mae_jax.main --config=configs/detect.py:vitdet_b --workdir=gs://BUCKET/vitdet_b \
      --config.init_from=gs://BUCKET/vit_b_mae --config.data.path=/data/coco

Arguments, one protocol and options after it:
  digits           the default: digits on photographs (source digit_scenes), 96 x 96; minutes on a laptop. The encoder
                   has the shape of that of init_from, if given
  vitdet_b, vitdet_l, vitdet_h
                   ViTDet (arXiv 2203.16527) as Detectron2 publishes it: 1,024 x 1,024, 100 epochs (H: 75) of COCO;
                   windowed attention, 4 blocks with global attention, decomposed relative positions, a simple pyramid,
                   layer norm
  cascade          after one of these three: Cascade R-CNN, class-agnostic boxes
  benchmarking_b, benchmarking_l
                   "Benchmarking Detection Transfer Learning with Vision Transformers" (2111.11429), the protocol of
                   MAE's table: a feature pyramid of 4 blocks, fixed positions, half a cosine, no layer decay; followed
                   by 25 or 50: as many epochs in place of 100
  ibot_cascade_b   iBOT's Cascade Mask R-CNN, 12 epochs; we take it for the protocol of MixedAE and MoCE
  xcit_3x_s, xcit_3x_b
                   XCiT's Mask R-CNN of 36 epochs, the protocol of SplitMask
  digit_scenes, fashion_scenes, coco
                   data to use in place of the protocol's own; all other fields are the protocol's
  held             trains on nine tenths of the training data and evaluates on the rest instead of the test data
  runlocal         two small steps of any of them

Published figures, not reproduced here: box AP / mask AP on COCO val2017. Figures of different protocols are not
comparable.
  vitdet           from MAE: B 51.6 / 45.9, L 55.5 / 49.2, H 56.7 / 50.2 (Detectron2's table). Cascade: 54.0 / 46.7,
                   57.6 / 50.0, 58.7 / 51.0
  benchmarking     from MAE: B 50.3 / 44.9 (25 epochs 48.1 / 43.2, 50 epochs 50.1 / 44.6), L 53.3 / 47.2; supervised
                   47.9 / 42.9 and 49.3 / 43.9; MoCo v3 47.9 / 42.7 and 49.3 / 44.0; BEiT 49.8 / 44.4 and 53.3 / 47.1
  ibot_cascade_b   iBOT 51.2 / 44.2, DINO 50.1 / 43.4, BEiT 50.1 / 43.5, supervised 49.8 / 43.2
  xcit_3x          SplitMask B, mask AP 42.1, from memory and not checked

Differences from the published protocols (`digits` is our choice as a whole):
- The mask loss is a mean over the global batch, where others average over each GPU's part.
- Batch norms are over the global batch: images in pyramids, regions in heads. benchmarking has them in both, as
  published, and group norm on upsampled maps. ibot has one in its box heads; ibot and xcit have one on upsampled maps.
- benchmarking has decomposed relative positions in each block instead of two shared tables, windows of 16 as in its
  public reimplementation, and for L the rates that are known for B.
- ibot and xcit keep the class token, which is not part of their maps. Their images are padded to 1,344 x 1,344.
- Each stage of ibot's cascade trains on all regions of the previous stage, not on a new sample, and the gradients to
  the maps are divided among the stages. Only the first stage has masks (from memory, MMDetection has a mask head per
  stage).
- The warm-up of xcit and ibot is from memory of MMDetection.
- vitdet_h accepts MAE's weights, whose patches of 14 pixels are resized to 16.
None of the protocols on COCO has been run.
"""

from functools import partial

from ml_collections import ConfigDict

from mae_jax import config as configs
from mae_jax import presets
from mae_jax.config import SHAPE, default, resolve, vit

EVAL_SPLITS = {"digit_scenes": "test", "fashion_scenes": "test", "coco": "val"}
GLOBAL = {"B": (2, 5, 8, 11), "L": (5, 11, 17, 23), "H": (7, 15, 23, 31)}  # the last block of each quarter


def get_config(arg: str = "") -> ConfigDict:
    config = default("detection")
    config.eval.update(crop_ratio=(1.0,), every="5 epochs")
    config.checkpoint.every = "5 epochs"
    config.model.update(pool="mean", remat="full")
    config.optim.betas = (0.9, 0.999)
    digits(config)
    protocols = {"digits": lambda config: None, **{f"vitdet_{size.lower()}": partial(vitdet, size=size)
                                                   for size in "BLH"},
                 "benchmarking_b": partial(benchmarking, size="B"), "benchmarking_l": partial(benchmarking, size="L"),
                 "ibot_cascade_b": ibot_cascade, "xcit_3x_s": partial(xcit_3x, size="S"),
                 "xcit_3x_b": partial(xcit_3x, size="B")}
    return resolve(config, arg, protocols, {"25": partial(epochs, count=25), "50": partial(epochs, count=50)},
                   {name: partial(data, source=name) for name in EVAL_SPLITS}, cascade=cascade, held=presets.held,
                   runlocal=runlocal)


def metric(arg: str = "") -> tuple[str, ...]:
    """Returns the metrics to report."""
    return "box_ap", "mask_ap"


def data(config: ConfigDict, source: str) -> None:
    config.data.update(source=source, eval_split=EVAL_SPLITS[source])


def digits(config: ConfigDict) -> None:
    """Sets the small detector of digits; it sets only fields that the protocols set too."""
    config.batch_size = 16
    config.data.update(source="digit_scenes", eval_split="test", image_size=(96, 96), max_objects=16, augment="none",
                       flip=False)
    config.model.update(width=96, depth=6, heads=3, patch=(8, 8), positions="learned", remat="none", auto=SHAPE)
    config.method.update(window=0, global_blocks=(), map_blocks=(1, 3, 5), relative_positions=False,
                         scales=(2.0, 1.0, 0.5), channels=48, anchor_sizes=(16.0, 28.0, 48.0), proposal_convs=1,
                         anchor_samples=64, candidates=(256, 256), proposals=(96, 96), regions=40, samples=2,
                         box_convs=0, box_layers=2, box_width=256, mask_convs=2, decayed="kernels")
    config.optim.update(lr=0.016, warmup="100 steps", clip=5.0)
    config.train.duration = "500 steps"
    config.checkpoint.every, config.eval.every = "250 steps", "500 steps"
    config.eval.max_examples = 300


def coco(config: ConfigDict, size: str, side: int, augment: str) -> None:
    """Sets what all protocols on COCO have in common, and resets the method's fields to their defaults."""
    config.data.update(source="coco", eval_split="val", image_size=(side, side), max_objects=100, augment=augment,
                       flip=True)
    config.model.update(vit(size, patch=16), remat="full", auto=())
    config.method = default("detection").method
    config.eval.max_examples = 100_000
    config.checkpoint.every = config.eval.every = "5 epochs"


def vitdet(config: ConfigDict, size: str) -> None:
    """Sets ViTDet as in Detectron2's projects/ViTDet, COCO/mask_rcnn_vitdet_{b,l,h}_*."""
    coco(config, size, 1024, "lsj")
    config.batch_size = 64
    config.model.drop_path = {"B": 0.1, "L": 0.4, "H": 0.5}[size]
    config.method.update(global_blocks=GLOBAL[size], map_blocks=GLOBAL[size],
                         decayed="all" if size == "H" else "detectron2")
    config.optim.update(lr=1e-4 * 256 / 64, warmup="250 steps", warmup_lr=1e-7, weight_decay=0.1,
                        layer_decay={"B": 0.7, "L": 0.8, "H": 0.9}[size], milestones=(8 / 9, 26 / 27), clip=0.0)
    config.train.duration = "138281 steps" if size == "H" else "184375 steps"


def cascade(config: ConfigDict) -> None:
    """Sets three stages as in Detectron2's cascade_mask_rcnn_vitdet_*."""
    config.method.update(stage_overlaps=(0.5, 0.6, 0.7), stage_weights=(1.0, 1.0, 1.0), class_boxes=False)


def benchmarking(config: ConfigDict, size: str) -> None:
    """Sets the protocol of arXiv 2111.11429, as in hustvl/MIMDet's configs/benchmarking."""
    coco(config, size, 1024, "lsj")
    config.batch_size = 64
    config.model.update(drop_path=0.1, positions="fixed", auto=("positions",))  # of MAE; those of others are learned
    config.method.update(window=16, global_blocks=GLOBAL[size], map_blocks=GLOBAL[size], pyramid="blocks", norm="batch")
    config.optim.update(lr=8e-5 * 256 / 64, warmup="0.25 epochs", weight_decay=0.1, clip=0.0)
    epochs(config, 100)


def epochs(config: ConfigDict, count: int) -> None:
    config.train.duration = f"{count} epochs"


def ibot_cascade(config: ConfigDict) -> None:
    """Sets bytedance/ibot's cascade_rcnn/vit_base_giou_4conv1f_coco_3x with the overrides of its README."""
    mmdetection(config, "B", epochs=12, milestones=(8 / 12, 11 / 12))
    config.model.drop_path = 0.2
    config.method.update(stage_overlaps=(0.5, 0.6, 0.7), stage_weights=(1.0, 0.5, 0.25), beta=1 / 9,
                         proposals=(2000, 1000), box_loss="giou", box_weight=10.0, norm="none", box_norm="batch",
                         allowed_border=0, decayed="matrices")
    config.optim.layer_decay = 0.75


def xcit_3x(config: ConfigDict, size: str) -> None:
    """Sets facebookresearch/xcit's mask_rcnn_xcit_*_3x_coco, for a plain ViT."""
    mmdetection(config, size, epochs=36, milestones=(27 / 36, 33 / 36))
    config.model.update(drop_path=0.05, drop_path_rates="constant")
    config.method.update(norm="none", box_convs=0, box_layers=2)


def mmdetection(config: ConfigDict, size: str, epochs: int, milestones: tuple[float, ...]) -> None:
    """Sets what the two protocols of MMDetection have in common: ibot_cascade and xcit_3x."""
    coco(config, size, 1344, "multi_scale")
    config.batch_size = 16
    config.method.update(class_token=True, window=0, global_blocks=(), relative_positions=False, pyramid="blocks",
                         map_blocks=(3, 5, 7, 11), proposal_convs=1, least_overlap=0.3, upsampling_norm="batch")
    config.optim.update(lr=1e-4 * 256 / 16, warmup="500 steps", warmup_lr=1e-7, weight_decay=0.05,
                        milestones=milestones, clip=0.0)
    config.train.duration = f"{epochs} epochs"


def runlocal(config: ConfigDict) -> None:
    """Shrinks the recipe as `presets.runlocal` does, with scenes of digits instead of photo crops."""
    own, wide = presets.own_data(), config.method.window
    configs.runlocal(config)
    if config.method.pyramid == "simple":
        config.method.map_blocks = (1,)
    config.method.update(window=wide and config.method.window, global_blocks=(1,) if wide else ())
    config.data.max_objects = 16
    if not own:
        config.data.source = "digit_scenes"
