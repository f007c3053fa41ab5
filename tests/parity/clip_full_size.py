"""Compares CLIP at its published sizes, with random weights, in transformers and here.

    python tests/parity/clip_full_size.py ViT-B/32 [ViT-L/14 ViT-H/14]

Two images and two texts. Prints the norm of each difference relative to the norm of transformers'
result, and the largest difference of cosines. Exit status 1 if one is over 1e-5. ViT-H/14 takes
8 GB of memory, 4 GB of disk for the time being, and some ten minutes of two busy cores, most of
them transformers'.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tav_jax.evaluation.clip_features import _image_features, _text_features
from tav_jax.models.clip_image import Features
from test_transformers_clip import FORWARD, our_model, relative_error, their_model

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
SIZES = {
    "ViT-B/32": {"projection_dim": 512, "text_config": {}, "vision_config": {}},
    "ViT-L/14": {
        "projection_dim": 768,
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
        },
        "vision_config": LARGE | {"num_hidden_layers": 24, "patch_size": 14},
    },
    "ViT-H/14": {
        "projection_dim": 1024,
        "text_config": LARGE | {"num_hidden_layers": 24, "hidden_act": "gelu"},
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
        },
    },
}


def errors(sizes: dict, folder: Path) -> dict[str, float]:
    """Returns each result's relative error. Both models are never in memory together."""
    torch.manual_seed(0)
    theirs = their_model(sizes)
    images = torch.randn(2, 3, 224, 224)
    ids = torch.randint(0, 49406, (2, 77))
    ids[0, 9:] = ids[1, 40:] = 49407
    image = theirs.vision_model(images).pooler_output
    text = theirs.text_model(ids).pooler_output
    expected = results_of(
        Features(theirs.visual_projection(image), image),
        Features(theirs.text_projection(text), text),
    )
    theirs.save_pretrained(folder)
    del theirs
    gc.collect()

    ours = our_model(folder)
    results = results_of(
        _image_features(ours, images.permute(0, 2, 3, 1).numpy()),
        _text_features(ours, ids.numpy()),
    )
    relative = {name: relative_error(results[name], expected[name]) for name in expected}
    # Not relative: random features are almost orthogonal, and their cosines near zero.
    difference = cosines(results) - cosines(expected)
    return relative | {"cosines": float(np.abs(difference).max())}


def results_of(image: Features, text: Features) -> dict[str, Any]:
    """Returns what is compared, by name."""
    return {
        "image features": image.projected,
        "pooled image features": image.pooled,
        "text features": text.projected,
        "pooled text features": text.pooled,
    }


def cosines(results: Mapping[str, Any]) -> np.ndarray:
    """Returns the cosine of each image and each text."""
    units = [np.asarray(results[f"{kind} features"], np.float64) for kind in ("image", "text")]
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in units]
    return units[0] @ units[1].T


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=SIZES, metavar="NAME", help=", ".join(SIZES))
    worst = 0.0
    for name in parser.parse_args(argv).names:
        with tempfile.TemporaryDirectory() as folder:
            for result, error in errors(SIZES[name], Path(folder)).items():
                print(f"{name}: {result}: {error:.1e}", flush=True)
                worst = max(worst, error)
    return int(worst > FORWARD)


if __name__ == "__main__":
    sys.exit(main())
