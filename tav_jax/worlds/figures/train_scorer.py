"""python -m tav_jax.worlds.figures.train_scorer: train a small CLIP from drawings and captions.

`evaluate` scores videos of the world's base model with it. It learns from drawings alone, spoilt as
for the detector, and never sees the held-out pairs of subject and verb.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from tav_jax.console import Parser, command, say
from tav_jax.evaluation.clip_features import image_features, text_features
from tav_jax.models.clip import CLIPTextConfig
from tav_jax.models.clip_image import CLIPConfig, CLIPModel, CLIPVisionConfig
from tav_jax.models.network import Network, init_network
from tav_jax.pretrained.clip import Clip, save_clip
from tav_jax.pretrained.model import pad_tokens
from tav_jax.pretrained.preprocess import Preprocessing, preprocess
from tav_jax.types import Params, PRNGKey, Scalar, TokenIds
from tav_jax.worlds.figures.drawing import draw_batch
from tav_jax.worlds.figures.scenes import SIZE, Scene, sample_scenes
from tav_jax.worlds.figures.train_detector import spoil
from tav_jax.worlds.figures.world import FIGURES
from tav_jax.worlds.tokenizer import write_tokenizer
from tav_jax.worlds.training_loop import Stage, init_or_restore, train

STEPS = 2_000
BATCH = 96
DRAWINGS = 20_000
CAPTIONS_PER_DRAWING = 4
LEARNING_RATE = 1.5e-3
LARGEST_SCALE = 100.0  # of cosines, as in CLIP's training
CHOICES = 100  # prompts, among which the one of an image is to be found

TEXT = CLIPTextConfig(
    vocab_size=1,  # replaced by the tokenizer's
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=24,
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
)
VISION = CLIPVisionConfig(
    hidden_size=96,
    intermediate_size=288,
    num_hidden_layers=4,
    num_attention_heads=4,
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
    image_size=SIZE,
    patch_size=8,
)
PROJECTION = 64


def init_scorer(folder: Path) -> Clip:
    """Return the untrained model. Its tokenizer is written to the folder."""
    tokenizer = write_tokenizer(folder, FIGURES.words, TEXT.max_position_embeddings)
    config = CLIPConfig(
        text_config=replace(TEXT, vocab_size=len(tokenizer)),
        vision_config=VISION,
        projection_dim=PROJECTION,
        eos_token_id=tokenizer.eos_token_id,
    )
    network = init_network(CLIPModel, config, jax.random.key(0))
    return Clip(tokenizer, network, Preprocessing(size=SIZE, crop_size=SIZE))


def draw_training_batch(
    step: int, *, clip: Clip, images: UInt8[np.ndarray, "n H W 3"], ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the spoilt images of a step, prepared for the network, and a caption's tokens each."""
    rng = np.random.default_rng((1, step))
    chosen = rng.integers(len(images), size=BATCH)
    spoilt = np.stack([spoil(rng, image) for image in images[chosen]])
    captions = ids[chosen, rng.integers(CAPTIONS_PER_DRAWING, size=BATCH)]
    return preprocess(spoilt, clip.preprocessing), captions


def contrastive_loss(
    params: dict[str, Params],
    key: PRNGKey,
    pixel_values: Float[Array, "n H W 3"],
    input_ids: TokenIds,
    *,
    network: Network[CLIPModel],
) -> Scalar:
    """Return CLIP's loss (Radford et al. 2021, arXiv:2103.00020, figure 3).

    Images whose captions are the same text are right answers to each other's captions, too.
    """
    del key
    model = network.with_params(params["clip"]).bind()
    images = _unit(model.image_features(pixel_values).projected)
    texts = _unit(model.text_features(input_ids).projected)
    scale = jnp.minimum(jnp.exp(params["clip"]["logit_scale"]), LARGEST_SCALE)
    logits = scale * images @ texts.T
    same = jnp.all(input_ids[:, None] == input_ids[None], axis=-1).astype(logits.dtype)
    targets = same / same.sum(axis=1, keepdims=True)
    by_image = optax.softmax_cross_entropy(logits, targets).mean()
    by_text = optax.softmax_cross_entropy(logits.T, targets).mean()
    return (by_image + by_text) / 2


def _unit(features: Float[Array | np.ndarray, "n p"]) -> Float[Array, "n p"]:
    features = jnp.asarray(features)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def retrieval_accuracy(clip: Clip, held_out: bool, rng: np.random.Generator) -> float:
    """Return how often the prompt of an unseen drawing is found among `CHOICES` prompts.

    Args:
        clip: The model.
        held_out: Draw the pairs of subject and verb that are kept out of the training.
        rng: Source of randomness.
    """
    scenes: list[Scene] = []
    prompts: list[str] = []
    while len(scenes) < CHOICES:
        (scene,) = sample_scenes(rng, 1, held_out=held_out)
        if (prompt := FIGURES.describe(scene)) not in prompts:
            scenes.append(scene)
            prompts.append(prompt)
    images, _ = draw_batch(scenes, rng.random(CHOICES))
    of_images = _unit(image_features(clip, images).projected)
    of_texts = _unit(text_features(clip, prompts).projected)
    return float(jnp.mean(jnp.argmax(of_images @ of_texts.T, axis=1) == jnp.arange(CHOICES)))


def train_scorer(folder: Path) -> None:
    """Train, and write the model in float16 to `folder/scorer`. A stopped training goes on."""
    clip = init_scorer(folder / "tokenizer")
    stage = Stage(
        folder / "training",
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        average_decay=0.998,
        checkpointing_steps=500,
        key=jax.random.key(1),
    )
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, DRAWINGS, held_out=False)
    images, _ = draw_batch(scenes, rng.random(DRAWINGS))
    captions = [
        FIGURES.caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_DRAWING)
    ]
    ids = pad_tokens(clip.tokenizer, captions, TEXT.max_position_embeddings)
    ids = ids.reshape(DRAWINGS, CAPTIONS_PER_DRAWING, -1)
    make_batch = partial(draw_training_batch, clip=clip, images=images, ids=ids)
    state = start = init_or_restore(stage, {"clip": clip.network.params})
    for state in train(stage, start, partial(contrastive_loss, network=clip.network), make_batch):
        average = replace(clip, network=clip.network.with_params(state.average["clip"]))
        shares = [
            f"{name} pairs {retrieval_accuracy(average, held_out, np.random.default_rng(2)):.2f}"
            for name, held_out in (("seen", False), ("held-out", True))
        ]
        say(f"{int(state.step)}: right prompt of {CHOICES}: {', '.join(shares)}")
    params = {name: x.astype(jnp.float16) for name, x in state.average["clip"].items()}
    save_clip(folder / "scorer", replace(clip, network=clip.network.with_params(params)))
    say(f"wrote {folder / 'scorer'}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default the process's own."""
    parser = Parser(
        prog="python -m tav_jax.worlds.figures.train_scorer",
        description="Train the small CLIP that scores videos of the world of figures. Run the same "
        "command again to resume an interrupted training.",
        epilog="example: python -m tav_jax.worlds.figures.train_scorer --output-dir outputs/scorer",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/scorer"), metavar="DIR")
    args = parser.parse_args(argv)
    train_scorer(args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
