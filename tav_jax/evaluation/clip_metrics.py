"""The CLIP metrics of published benchmarks, as functions of one video's features.

Each benchmark measures in its own way, so values of different rows must not be compared.

| metric                  | function              | features    | network            | value       |
|-------------------------|-----------------------|-------------|--------------------|-------------|
| `clip_text.loveu`       | `text_alignment`      | `projected` | ViT-L/14           | 0 to 100    |
| `clip_frames.loveu`     | `pairwise_similarity` | `projected` | ViT-L/14           | 0 to 100    |
| `pick_score.loveu`      | `text_alignment`      | `projected` | PickScore          | about 20    |
| `clip_frames.fatezero`  | `temporal_similarity` | `projected` | ViT-B/32           | 0 to 1      |
| `clip_accuracy.fatezero`| `prompt_accuracy`     | `projected` | ViT-B/32           | 0 to 1      |
| `clip_frames.v2vbench`  | `clamped_similarity`  | `pooled`    | ViT-L/14           | 0 to 1      |
| `clip_text.v2vbench`    | `text_alignment`      | `projected` | ViT-L/14           | 0 to 100    |

LOVEU-TGVE-2023 (Wu et al. 2023, arXiv:2310.16003) resizes all frames by `resize_as_loveu` first.
FateZero is Qi et al. 2023 (arXiv:2303.09535), V2VBench is Sun et al. 2024 (arXiv:2407.07111). A
benchmark's value is the mean over its videos.
"""

import numpy as np
from jaxtyping import Float, UInt8

from tav_jax.errors import UserError
from tav_jax.pretrained.preprocess import resize

LOVEU_SIDE = 480


def resize_as_loveu(frames: UInt8[np.ndarray, "f H W 3"]) -> UInt8[np.ndarray, "f 480 480 3"]:
    """Return frames at 480x480, whatever their proportions."""
    return np.stack([resize(frame, LOVEU_SIDE, LOVEU_SIDE) for frame in frames])


def text_alignment(
    frames: Float[np.ndarray, "f p"], prompt: Float[np.ndarray, "p"], scale: float
) -> float:
    """Return the mean over frames of scale * cos(frame, prompt). It may be negative.

    Args:
        frames: Features of the frames.
        prompt: Features of the prompt.
        scale: `Clip.scale`.
    """
    return float(scale * np.mean(_unit(frames) @ _unit(prompt)))


def pairwise_similarity(frames: Float[np.ndarray, "f p"]) -> float:
    """Return 100 times the mean of cos(e_i, e_j) over all ordered pairs of different frames."""
    units = _several(frames)
    cosines = units @ units.T
    np.fill_diagonal(cosines, 0)
    return float(100 * np.sum(cosines) / (len(units) * (len(units) - 1)))


def temporal_similarity(frames: Float[np.ndarray, "f p"]) -> float:
    """Return the mean of cos(e_i, e_i+1) over consecutive frames."""
    return float(np.mean(_consecutive_cosines(frames)))


def clamped_similarity(frames: Float[np.ndarray, "f d"]) -> float:
    """Return the mean of max(0, cos(e_i, e_i+1)) over consecutive frames."""
    return float(np.mean(np.maximum(_consecutive_cosines(frames), 0)))


def prompt_accuracy(
    frames: Float[np.ndarray, "f p"],
    source_prompt: Float[np.ndarray, "p"],
    prompt: Float[np.ndarray, "p"],
) -> float:
    """Return the share of frames that are at least as near to the prompt as to the source prompt.

    As published: P(prompt) >= P(source prompt), where P is the softmax over both scores.
    """
    units = _unit(frames)
    return float(np.mean(units @ _unit(prompt) >= units @ _unit(source_prompt)))


def _consecutive_cosines(frames: Float[np.ndarray, "f p"]) -> Float[np.ndarray, "g"]:
    units = _several(frames)
    return np.sum(units[:-1] * units[1:], axis=-1)


def _several(frames: Float[np.ndarray, "f p"]) -> Float[np.ndarray, "f p"]:
    """Return features of unit length, of two frames at least."""
    if len(frames) < 2:
        raise UserError("the similarity of frames needs two frames at least, the video has one")
    return _unit(frames)


def _unit(features: Float[np.ndarray, "*axes p"]) -> Float[np.ndarray, "*axes p"]:
    """Return features of unit length, in float64."""
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)
