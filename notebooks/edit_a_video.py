# %% [markdown]
# # Edit a video with Tune-A-Video in JAX
#
# One clip and its caption go in; the same motion with another subject, place or style comes out.
# Run the cells from top to bottom. On a GPU or TPU (in Colab: *Runtime > Change runtime type*) this
# uses Stable Diffusion v1.4. On a laptop's CPU it uses a small model that comes with the package,
# and a clip drawn in that model's world. Then everything takes about two minutes.

# %%
# In Colab this installs the package. In a clone of the repository it is there already.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tav_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "tav_jax"], check=True)

# %%
from pathlib import Path

import jax
import mediapy

import tav_jax as tav

DEVICE = jax.devices()[0]
ON_ACCELERATOR = DEVICE.platform != "cpu"
IN_COLAB = importlib.util.find_spec("google.colab") if "google" in sys.modules else None
print(f"{DEVICE.device_kind}, jax {jax.__version__}, tav_jax {tav.__version__}")

# %% [markdown]
# ## The clip
#
# In Colab a button asks for your file. Elsewhere set `CLIP` to its path. If you give none, a small
# clip is drawn. The caption says what the clip shows, in a few plain words.

# %%
CLIP = None  # such as "my-clip.mp4"
CAPTION = "a man is skiing on snow"
PROMPTS = [
    "a panda is skiing on snow",
    "a man is skiing on the beach",
    "a man is skiing on snow, cartoon style",
]

if CLIP is None and IN_COLAB and ON_ACCELERATOR:
    from google.colab import files

    CLIP = next(iter(files.upload()), None)
if CLIP is None:
    from tav_jax.worlds.figures.world import FIGURES as WORLD

    CLIP = "clip.mp4"
    tav.write_video(CLIP, WORLD.render(WORLD.clips["man-skiing"], 24), fps=8)

# %% [markdown]
# ## The frames that are used
#
# Eight frames, spread over the clip. The U-Net sees them all at once.

# %%
SIDE = 512 if ON_ACCELERATOR else 64
frames = tav.read_frames(
    CLIP, n_sample_frames=8, width=SIDE, height=SIDE, sampling="uniform", fit="crop"
)
mediapy.show_images(frames, width=128, columns=8)

# %% [markdown]
# ## Tune
#
# The model's images are frozen knowledge: only the queries of its attention and the new temporal
# attention are trained, on this one clip.

# %%
if ON_ACCELERATOR:
    model = tav.load_model("CompVis/stable-diffusion-v1-4", dtype="bfloat16")
    tuned = tav.tune_clip(model, frames, CAPTION, max_train_steps=300, progress=True)
else:
    model = tav.load_model("tiny-figures")
    # So small a network learns at a higher rate.
    tuned = tav.tune_clip(
        model, frames, CAPTION, max_train_steps=40, learning_rate=5e-4, progress=True
    )

# %% [markdown]
# ## Edit
#
# The clip is inverted with DDIM to the noise that the model would make it from. Each prompt is
# sampled from that noise, so it keeps the clip's motion. A higher `guidance_scale` follows the
# prompt more and the clip less.

# %%
videos = tav.edit_clip(
    tuned,
    frames,
    PROMPTS,
    guidance_scale=12.5 if ON_ACCELERATOR else 1.5,
    num_inference_steps=50 if ON_ACCELERATOR else 20,
    progress=True,
)

# %%
titles = [CAPTION, *PROMPTS]
mediapy.show_videos(dict(zip(titles, [frames, *videos], strict=True)), fps=8, width=256, columns=2)

# %% [markdown]
# ## Keep them

# %%
Path("edits").mkdir(exist_ok=True)
for prompt, video in zip(PROMPTS, videos, strict=True):
    tav.write_video(f"edits/{prompt}.mp4", video, fps=8)
print(*sorted(Path("edits").iterdir()), sep="\n")
