"""Default values of each method's own fields under `config.method`. This module does not import JAX: --help is fast.

A plug-in's class has its own fields in `defaults`, and their values in `runlocal` in `small`.
"""

from typing import Any

PATCH_TARGETS: dict[str, Any] = {
    "target": "kmeans",  # tokens: kmeans, patches, projection, tokens (of data.tokens); pixels: norm_pix, pixel
    "vocabulary": 8192,  # how many tokens, that of constant patches among them
    "vocabulary_file": "",  # that mae_jax cluster wrote; '': built of training images before the first step
}
MAE: dict[str, Any] = {
    "mask_ratio": 0.75,
    "masking": "random",  # random, block (BEiT's), grid (one patch kept of each 2 × 2); MAE Table 1f
    "target": "norm_pix",  # norm_pix, pixel, pca (MAE Table 1d)
    "decoder_width": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "encoder_mask_tokens": False,  # the ablation of MAE Table 1c
}
BEIT: dict[str, Any] = {
    **PATCH_TARGETS,
    "masked": 75,  # of 196 patches
    "masking": "block",  # or random
}
SPLITMASK: dict[str, Any] = {
    **PATCH_TARGETS,
    "decoder_width": 768,  # as the encoder of ViT-B: the article does not say
    "decoder_depth": 2,
    "decoder_heads": 12,
    "match_weight": 1.0,  # of the contrastive loss beside that of the patches; 0: off
    "temperature": 0.1,  # of the contrastive loss, on cosines; the article's value is not known to us
    "normalize": True,  # cosines of the descriptors; False: products
}
MIXEDAE: dict[str, Any] = {
    "ratio": 0.25,  # r: the share of its patches that an image gives to a mixed sequence (the article's default)
    "mixing": "compose",  # each image in one mix; or full: in G of them, with G times the work
    "attention": "topk",  # homologous; all: naive mixing; oracle: the true sources, which only the mixing knows
    "keep": 0,  # K, keys that a query keeps, itself included; 0: r · N, which the article is taken to mean
    "blocks": "all",  # with that attention, likewise: first_half, last_half, '6-11', '0,2'
    "segments": True,  # a learned embedding tells tokens of different images apart; the ablation leaves it out
    "contrast_weight": 0.1,  # of the homologous contrast; remembered of the article, not checked; 0: off
    "temperature": 0.25,  # of the contrast, likewise
    "projection": 256,  # width of the contrast's features, behind one hidden layer: our choice; 0: none
    "target": "norm_pix",
    "decoder_width": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
}
MOCE: dict[str, Any] = {
    **MAE,
    "clusters": "",  # the folder that `python -m mae_jax cluster --from=...` wrote
    "num_clusters": 0,  # m; 0: as many as it has
    "centroid_width": 0,  # of its centroids; 0: as wide as they are
    "experts": 8,  # E; remembered of the article, not checked
    "blocks": "last_two_odd",  # those with experts, or '1,3', '6-11', 'all', 'last_half'; remembered likewise
    "gate": "cluster",  # or token: a sparse mixture that chooses for each token, what the article contrasts with
    "gate_weight": "straight",  # the expert's output times g / stop_gradient(g); or value: times g
    "noise": 1.0,  # deviation of what is added to the gates' logits in training, times 1 / E (V-MoE)
    "temperature": 1.0,  # of the gates' softmax
    "balance_weight": 0.01,  # of the experts' imbalance; this and the two below are our choice
    "confidence_weight": 0.01,  # of the gates' entropy
    "distill_weight": 0.0,  # of the distance to the encoder that training starts from
}
DINO: dict[str, Any] = {
    "out_dim": 65_536,  # K, of the head; about 1,024 for small data
    "head_width": 2048,
    "bottleneck": 256,
    "local_views": 8,  # small views of each image
    "local_size": (96, 96),  # height, width in pixels
    "global_scale": (0.4, 1.0),  # share of the image's area
    "local_scale": (0.05, 0.4),
    "blur": (0.1, 2.0),  # standard deviation in pixels, of views of 224; smaller images want less
    "temperature": 0.1,  # of the student
    "teacher_temperature": 0.04,
    "first_teacher_temperature": 0.04,  # rises to the other during temperature_warmup
    "temperature_warmup": "0 epochs",
    "momentum": 0.996,  # of the teacher; half a cosine takes it to 1
    "center_momentum": 0.9,
    "freeze_last": "1 epochs",  # how long the directions of the head's last layer stay
}
SUPERVISED: dict[str, Any] = {
    "classes": 0,  # 0: as many as the data has
    "multi_label": False,  # images with any number of classes, in the batch field `labels` (VOC)
    "head": "linear",  # or probe: behind a batch norm without scale and shift (MAE A.1)
    "head_std": 2e-5,  # deviation of the head's first kernel; as published 0.01 for probes
    "train_blocks": -1.0,  # the last so many blocks learn; -1: all; 0: the head alone; 0.5: the last block's MLP
    "loss": "cross_entropy",  # or bce: binary, both labels of a mixed image counting whole (DeiT III)
    "smoothing": 0.0,  # of labels
    "mixup": 0.0,  # α of Beta(α, α); 0: off
    "cutmix": 0.0,
    "mix_group": 8,  # rows that share one draw of the two; 0: the whole batch. 8 is ours: timm has a device's
    "erase": 0.0,  # probability of random erasing
}
SEGMENT: dict[str, Any] = {
    "classes": 2,  # of the pixels, as numbers from 0; pixels of higher numbers are ignored
    "background": 0,  # the class around things, for how well attention covers them; -1: none
    "head": "linear",  # or upernet: pyramid pooling and a feature pyramid of four blocks (arXiv 1807.10221)
    "block": -1,  # of a linear head: whose tokens are classified; -1: the last, after the encoder's norm
    "train_blocks": 0,  # how many of the last blocks learn with the head; -1: the whole encoder
    # How images are evaluated besides at the model's size: slide, whole: at their own (docs/segmentation.md); none.
    "test": "none",
    "stride": (0, 0),  # pixels from window to window of slide, down and across; 0: two thirds of a window
    # All that follows is of upernet. Its four maps are of blocks such as '3,5,7,11'; auto: these of 12, '7,11,15,23' of
    # 24, and the like.
    "blocks": "auto",
    "encoder_norm": False,  # the encoder's norm is applied to the maps (iBOT)
    "relative_position_bias": False,  # a learned bias for each displacement of two patches, 0 at first (BEiT, MAE)
    "head_width": 0,  # of the pyramid; 0: as the encoder
    "aux_width": 256,  # of the auxiliary head
    "aux_weight": 0.4,  # of its loss
    "dropout": 0.1,  # of whole channels, before the classifiers
    "norm": "batch",  # over the global batch; or layer, over the channels: our choice for batches below 8
}
DETECTION: dict[str, Any] = {  # the values are ViTDet's Mask R-CNN (arXiv 2203.16527), where nothing else is said
    "classes": 0,  # 0: as many as the data has
    # Of the encoder.
    "train_blocks": -1,  # how many of the last blocks learn with pyramid and heads; -1: the whole encoder
    "class_token": False,  # whether it goes through the encoder; the maps are of patches alone
    "window": 14,  # patches per side of windows that do not see each other; 0: all blocks see all
    "global_blocks": (2, 5, 8, 11),  # blocks that see all
    "relative_positions": True,  # decomposed, of each block
    # Of the maps.
    "pyramid": "simple",  # of the last block; blocks: a feature pyramid of method.map_blocks
    "map_blocks": (2, 5, 8, 11),
    "scales": (4.0, 2.0, 1.0, 0.5),  # of the maps, times the grid of patches: 4, 2, 1 or 0.5
    "channels": 256,
    "norm": "layer",  # in pyramid and heads; or group, batch, none
    "box_norm": "",  # of the heads of boxes; '': the same
    # Of proposals. One more size than scales: a further map of every second cell, for proposals alone.
    "anchor_sizes": (32.0, 64.0, 128.0, 256.0, 512.0),  # pixels, of each map
    "anchor_ratios": (0.5, 1.0, 2.0),  # height / width
    "proposal_convs": 2,
    "anchor_samples": 256,  # of an image, to train on
    "anchor_positives": 0.5,  # of these at most
    "anchor_overlaps": (0.7, 0.3),  # IoU from which on anchors are positive, and below which they are negative
    "least_overlap": 0.0,  # IoU that an object's best anchor must reach to be positive below that
    "beta": 0.0,  # of the smooth L1 loss of proposals; 0: L1
    "candidates": (2000, 1000),  # of each map, before suppression; in training, and in evaluations
    "proposals": (1000, 1000),  # likewise, after it
    "proposal_overlap": 0.7,  # IoU above which suppression takes the less likely one
    # Of regions.
    "regions": 512,  # of an image, to train on
    "region_positives": 0.25,  # of these at most
    "stage_overlaps": (0.5,),  # IoU from which on regions are positive; three of them: Cascade R-CNN (arXiv 1712.00726)
    "stage_weights": (1.0,),  # of each stage's losses
    "samples": 0,  # of RoIAlign, per bin and axis; 0: as many as it has cells
    "box_convs": 4,
    "box_layers": 1,  # linear ones behind these
    "box_width": 1024,  # of the linear layers
    "class_boxes": True,  # boxes move otherwise for each class
    "box_loss": "l1",  # of what moves boxes; or giou: of boxes
    "box_weight": 1.0,  # of the loss of boxes
    "mask_convs": 4,
    # Of detections.
    "score": 0.05,  # that they must exceed
    "overlap": 0.5,  # IoU above which suppression takes the less likely one of a class
    "max_detections": 100,  # of an image
    # Of weight decay. detectron2: all but the encoder's norms and positions; all; kernels: kernels and tokens.
    "decayed": "detectron2",
}
TABLE: dict[str, dict[str, Any]] = {  # by the name of the method
    "beit": BEIT, "detection": DETECTION, "dino": DINO, "mae": MAE, "mixedae": MIXEDAE, "moce": MOCE,
    "segment": SEGMENT, "splitmask": SPLITMASK, "supervised": SUPERVISED}
SMALL: dict[str, Any] = {  # what `runlocal` makes of them
    "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
    "mix_group": 4,  # where each image is there three times, the batch shows 6 of them
    "vocabulary": 64, "masked": 24, "projection": 32,
    "window": 4, "global_blocks": (1,), "map_blocks": (0, 1), "scales": (2.0, 1.0), "channels": 16,
    "anchor_sizes": (8.0, 16.0, 32.0), "candidates": (32, 32), "proposals": (32, 32), "anchor_samples": 32,
    "regions": 16, "box_convs": 1, "box_width": 32, "mask_convs": 1, "samples": 2,
    "out_dim": 64, "head_width": 32, "aux_width": 16, "bottleneck": 16, "local_views": 2, "local_size": (16, 16),
}
