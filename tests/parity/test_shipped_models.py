"""The shipped base models in PyTorch: diffusers draws the same image from the same noise."""

import numpy as np
import pytest

from tav_jax.pipeline import decode_latents, random_latents, sample_latents
from tav_jax.pretrained.hub import SHIPPED
from tav_jax.pretrained.model import load_model

torch = pytest.importorskip("torch")

# diffusers' own import warns of torch's renamed parts.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("name", "size", "prompt"),
    [
        ("tiny-scenes", 32, "a yellow square is moving right on sand"),
        ("tiny-figures", 64, "a panda is skiing on snow"),
    ],
)
def test_diffusers_draws_the_same_image(name, size, prompt, recwarn):
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(
        SHIPPED[name], torch_dtype=torch.float32, local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    model = load_model(name)
    model = model.with_unet(
        model.unet.with_config(attention_scope="spatial")  # one frame: any scope is the same
    )
    noise = random_latents(model, [3], 1, size, size)
    latents = sample_latents(model, noise, [prompt], guidance_scale=3.0, num_inference_steps=20)
    ours = np.asarray(decode_latents(model, latents))[0, 0] / 2 + 0.5
    image = theirs(
        prompt,
        height=size,
        width=size,
        latents=torch.tensor(np.moveaxis(np.asarray(noise)[0], -1, 1)),
        guidance_scale=3.0,
        num_inference_steps=20,
        output_type="np",
    ).images[0]
    np.testing.assert_allclose(np.clip(ours, 0, 1), image, atol=2e-3)
    assert image.std() > 0.1
