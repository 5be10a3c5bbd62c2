"""Default values of each method's own fields under `config.method`. This module does not import JAX: --help is fast.

A plug-in's class has its own fields in `defaults`, and their values in `runlocal` in `small`.
"""

from typing import Any

PATCH_TARGETS: dict[str, Any] = {
    # What is predicted of a patch. Tokens of a vocabulary: kmeans (our choice), patches, projection; tokens: ids of
    # data.tokens. Pixels: norm_pix, pixel.
    "target": "kmeans",
    # Number of tokens, with that of constant patches; as BEiT's tokenizer. At most a fifth of the sampled patches.
    "vocabulary": 8192,
    "vocabulary_file": "",  # file of mae_jax cluster; '': built from training images before the first step
}
MAE: dict[str, Any] = {
    "mask_ratio": 0.75,  # share of patches that are masked (MAE Figure 5)
    "masking": "random",  # random; block: BEiT's; grid: keeps one patch of each 2 × 2 (MAE Table 1f)
    "target": "norm_pix",  # norm_pix: pixels normalized per patch; pixel; pca: 96 coefficients (MAE Table 1d)
    "decoder_width": 512,  # MAE Table 1b
    "decoder_depth": 8,  # number of blocks (MAE Table 1a)
    "decoder_heads": 16,  # number of attention heads (released code)
    "encoder_mask_tokens": False,  # True: the encoder gets mask tokens, too, the ablation of MAE Table 1c
}
BEIT: dict[str, Any] = {
    **PATCH_TARGETS,
    "masked": 75,  # number of masked patches, of 196 in BEiT's released code
    "masking": "block",  # block: blocks of at least 16 patches (BEiT 2.3); or random
}
SPLITMASK: dict[str, Any] = {
    **PATCH_TARGETS,
    "decoder_width": 768,  # as the encoder of ViT-B: our choice; the paper does not say
    "decoder_depth": 2,  # number of blocks, the paper's
    "decoder_heads": 12,  # number of attention heads, as the encoder of ViT-B: our choice
    "match_weight": 1.0,  # weight of the contrastive loss beside that of the patches: our choice; 0: off
    "temperature": 0.1,  # of the contrastive loss: our choice; the paper's value is not known to us
    "normalize": True,  # True: cosines of the descriptors (our choice); False: dot products
}
MIXEDAE: dict[str, Any] = {
    "ratio": 0.25,  # share r of its patches that an image gives to a mix of 1 / r images (the paper's default)
    "mixing": "compose",  # compose: each image in one mix; full: in all 1 / r of its group, for 1 / r times the work
    # Keys that a query attends to. topk: the K of the largest scores (homologous attention); all: naive mixing;
    # oracle: those of its own image, which only the mixing knows.
    "attention": "topk",
    "keep": 0,  # number K of these keys, the query's own included; 0: r · N, from memory of the paper, not checked
    # Blocks with that attention: all (from memory of the paper), first_half, last_half, or as '6-11', '0,2'.
    "blocks": "all",
    "segments": True,  # True: a learned embedding tells tokens of different images apart; False: the ablation
    "contrast_weight": 0.1,  # weight of the homologous contrast, from memory of the paper, not checked; 0: off
    "temperature": 0.25,  # of the contrast, from memory of the paper, not checked
    "projection": 256,  # width of the contrast's features, behind one hidden layer: our choice; 0: no projection
    "target": "norm_pix",  # as in MAE: norm_pix, pixel, pca
    "decoder_width": 512,  # as in MAE
    "decoder_depth": 8,  # number of blocks, as in MAE
    "decoder_heads": 16,  # number of attention heads, as in MAE
}
MOCE: dict[str, Any] = {
    **MAE,
    "clusters": "",  # folder of clusters, of mae_jax cluster --from=...
    "num_clusters": 0,  # number m of clusters, compared with the folder; 0: as many as it has
    "centroid_width": 0,  # width of the centroids for `plan` and `bench`, which read no clusters; 0: as the encoder
    "experts": 8,  # number E of experts in a block, from memory of the paper, not checked
    # Blocks with experts: last_two_odd (from memory of the paper), all, first_half, last_half, or as '1,3', '6-11'.
    "blocks": "last_two_odd",
    # What the gate reads. cluster: the centroid of the image's cluster; token: each token, the paper's baseline.
    "gate": "cluster",
    # Factor of the expert's output, with gate g. straight: g / stop_gradient(g), so that the first step is the MAE's
    # (our choice); value: g.
    "gate_weight": "straight",
    "noise": 1.0,  # deviation of the noise on the gates' logits in training, times 1 / E (V-MoE; our choice)
    "temperature": 1.0,  # of the gates' softmax: our choice
    "balance_weight": 0.01,  # weight of the imbalance between experts (our choice); 0: off
    "confidence_weight": 0.01,  # weight of the gates' entropy (our choice); 0: off
    "distill_weight": 0.0,  # weight of the distance to the encoder that training starts from (our choice); 0: off
}
DINO: dict[str, Any] = {  # the values are those of the released code, main_dino.py
    "out_dim": 65_536,  # number K of the head's outputs; about 1,024 for small data (our choice)
    "head_width": 2048,  # width of the head's two hidden layers
    "bottleneck": 256,  # width of the head's normalized layer before the outputs
    "local_views": 8,  # number of small views of each image
    "local_size": (96, 96),  # height, width of small views in pixels; that of large ones is data.image_size
    "global_scale": (0.4, 1.0),  # share of the image's area that a large view shows: least, largest
    "local_scale": (0.05, 0.4),  # share of the image's area that a small view shows: least, largest
    "blur": (0.1, 2.0),  # standard deviation of the blur in pixels, for views of 224; less for smaller images
    "temperature": 0.1,  # of the student's softmax
    "teacher_temperature": 0.04,  # of the teacher's softmax, after temperature_warmup
    "first_teacher_temperature": 0.04,  # of the teacher's softmax at the first step, and in evaluations
    "temperature_warmup": "0 epochs",  # duration in which the teacher's temperature changes linearly
    "momentum": 0.996,  # of the teacher's EMA per step at the start; half a cosine takes it to 1
    "center_momentum": 0.9,  # of the center's EMA per step
    "freeze_last": "1 epochs",  # duration in which the last layer's directions do not change
}
SUPERVISED: dict[str, Any] = {
    "classes": 0,  # number of classes; 0: as many as the data has
    "multi_label": False,  # True: images with any number of classes (VOC), in the batch field `labels`; needs loss=bce
    "head": "linear",  # linear; probe: behind a batch norm without scale and shift (MAE A.1)
    "head_std": 2e-5,  # standard deviation of the head's initial kernel (MAE's released code; 0.01 for probes)
    # Blocks that are trained, from the last: -1: all; 0: none, the head alone; 0.5: the last block's MLP (MAE 4.3).
    "train_blocks": -1.0,
    "loss": "cross_entropy",  # cross_entropy; bce: binary, both labels of a mixed image count whole (DeiT III)
    "smoothing": 0.0,  # label smoothing; MAE's fine-tuning: 0.1; 0: off
    "mixup": 0.0,  # α of Beta(α, α); MAE's fine-tuning: 0.8; 0: off
    "cutmix": 0.0,  # α of Beta(α, α); MAE's fine-tuning: 1.0; 0: off
    # Rows that share one draw of mixup and cutmix; 0: the whole batch. 8 is ours: timm has the rows of a device.
    "mix_group": 8,
    "erase": 0.0,  # probability of random erasing; MAE's released fine-tuning: 0.25
}
SEGMENT: dict[str, Any] = {
    "classes": 2,  # number of classes of pixels; larger values in the mask are ignored, which a run says at its start
    "background": 0,  # class around the objects, for how well attention covers these; -1: none
    # linear, on patch tokens; probe: the same behind a batch norm without scale and shift; upernet: pyramid
    # pooling and FPN of four blocks (arXiv 1807.10221).
    "head": "linear",
    "block": -1,  # block whose tokens head=linear or probe classifies; -1: the last, after the encoder's norm
    "train_blocks": 0,  # blocks that are trained with the head, from the last; -1: the whole encoder
    # Evaluation at the images' own size beside that at the model's: slide: in windows; whole: in one pass; none
    # (docs/segmentation.md).
    "test": "none",
    "stride": (0, 0),  # distance of the windows of slide, (down, across) in pixels; 0: two thirds of a window
    # Of head=upernet only, like all that follow: its four blocks, as '3,5,7,11'; auto: these of 12 blocks, '7,11,15,23'
    # of 24, and the like.
    "blocks": "auto",
    "encoder_norm": False,  # True: the encoder's norm is applied to the maps (iBOT)
    "relative_position_bias": False,  # True: a learned bias per displacement of two patches, 0 at first (BEiT, MAE)
    "head_width": 0,  # channels of the pyramid and the head; 0: as the encoder (MAE, BEiT); XCiT: 512
    "aux_width": 256,  # channels of the auxiliary head (mmsegmentation)
    "aux_weight": 0.4,  # weight of the auxiliary head's loss (mmsegmentation)
    "dropout": 0.1,  # probability that a channel is dropped before the classifiers (mmsegmentation)
    "norm": "batch",  # batch: over the global batch; layer: over the channels, our choice for batches below 8
}
DETECTION: dict[str, Any] = {  # the values are ViTDet's Mask R-CNN (arXiv 2203.16527), where nothing else is said
    "classes": 0,  # number of classes; 0: as many as the data has
    # Of the encoder.
    "train_blocks": -1,  # blocks that are trained with pyramid and heads, from the last; -1: the whole encoder
    "class_token": False,  # True: a class token goes through the encoder; it is never part of the maps
    "window": 14,  # side of the attention windows in patches; 0: all blocks attend globally
    "global_blocks": (2, 5, 8, 11),  # blocks that attend globally
    "relative_positions": True,  # True: decomposed relative positions in each block
    # Of the maps.
    "pyramid": "simple",  # simple: all maps from the last block; blocks: an FPN of the blocks in method.map_blocks
    "map_blocks": (2, 5, 8, 11),  # blocks of pyramid=blocks, as many as method.scales
    "scales": (4.0, 2.0, 1.0, 0.5),  # sides of the maps, relative to the grid of patches: 4, 2, 1 or 0.5
    # Of pyramid=blocks, in the map that is upsampled 4 times: group (arXiv 2111.11429), batch (XCiT, iBOT).
    "upsampling_norm": "group",
    "channels": 256,  # channels of the maps
    "norm": "layer",  # in pyramid and heads: layer, group, batch, none
    "box_norm": "",  # in the heads of boxes: layer, group, batch, none; '': as method.norm
    # Side of the anchors of each map in pixels. One size more than method.scales: another map of every second cell,
    # for proposals alone.
    "anchor_sizes": (32.0, 64.0, 128.0, 256.0, 512.0),
    "anchor_ratios": (0.5, 1.0, 2.0),  # height / width of anchors
    "proposal_convs": 2,  # number of 3 × 3 convolutions of the proposal head
    "anchor_samples": 256,  # anchors of an image that are trained on
    "anchor_positives": 0.5,  # largest share of positives among method.anchor_samples
    "anchor_overlaps": (0.7, 0.3),  # IoU with an object at which anchors are positive, and below which negative
    # Pixels by which an anchor may cross the image's border and be trained on; -1: any number (MMDetection's name).
    "allowed_border": -1,
    "least_overlap": 0.0,  # least IoU at which an object's best anchor is positive below method.anchor_overlaps
    "beta": 0.0,  # of the smooth L1 loss of proposals; 0: L1
    "candidates": (2000, 1000),  # most boxes of each map before suppression: in training, in evaluations
    "proposals": (1000, 1000),  # most boxes of an image after suppression: in training, in evaluations
    "proposal_overlap": 0.7,  # IoU above which suppression removes the less likely proposal
    # Of regions.
    "regions": 512,  # regions of an image that are trained on
    "region_positives": 0.25,  # largest share of positives among method.regions
    # IoU with an object at which regions are positive, for each stage; three of them: Cascade R-CNN (arXiv
    # 1712.00726).
    "stage_overlaps": (0.5,),
    "stage_weights": (1.0,),  # weights of the losses of each stage
    "samples": 0,  # RoIAlign's samples per bin and axis; 0: as many as it has cells
    "box_convs": 4,  # number of 3 × 3 convolutions of a box head
    "box_layers": 1,  # number of linear layers of a box head, after its convolutions
    "box_width": 1024,  # width of a box head's linear layers
    "class_boxes": True,  # True: a box per class; False: one for all classes
    "box_loss": "l1",  # l1, of the deltas of boxes; giou: generalized IoU of boxes
    "box_weight": 1.0,  # weight of the loss of boxes
    "mask_convs": 4,  # number of 3 × 3 convolutions of the mask head
    # Of detections.
    "score": 0.05,  # least score of a detection
    "overlap": 0.5,  # IoU above which suppression removes the less likely of two detections of a class
    "max_detections": 100,  # most detections of an image
    # What weight decay applies to. detectron2: all but the encoder's norms and positions; all; matrices: kernels,
    # tokens and positions (iBOT); kernels: kernels and tokens.
    "decayed": "detectron2",
}
TABLE: dict[str, dict[str, Any]] = {  # by the name of the method
    "beit": BEIT, "detection": DETECTION, "dino": DINO, "mae": MAE, "mixedae": MIXEDAE, "moce": MOCE,
    "segment": SEGMENT, "splitmask": SPLITMASK, "supervised": SUPERVISED}
SMALL: dict[str, Any] = {  # values of these fields in `runlocal`
    "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
    "mix_group": 4,  # where each image is there three times, the batch shows 6 of them
    "vocabulary": 64, "masked": 24, "projection": 32,
    "window": 4, "global_blocks": (1,), "map_blocks": (0, 1), "scales": (2.0, 1.0), "channels": 16,
    "anchor_sizes": (8.0, 16.0, 32.0), "candidates": (32, 32), "proposals": (32, 32), "anchor_samples": 32,
    "regions": 16, "box_convs": 1, "box_width": 32, "mask_convs": 1, "samples": 2,
    "out_dim": 64, "head_width": 32, "aux_width": 16, "bottleneck": 16, "local_views": 2, "local_size": (16, 16),
}
