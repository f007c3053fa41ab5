"""A tuned model for the Hub: its files with a model card, and their upload.

The card's front matter has the keys of the published library
(https://huggingface.co/Tune-A-Video-library), by which the Hub and other programs find the base
model and the caption.
"""

import html
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from tav_jax.errors import UserError
from tav_jax.runs.adapters import NAME_ON_HUB, portable, write_adapter
from tav_jax.runs.config import TuneConfig, dump_config
from tav_jax.runs.overview import sheet_of
from tav_jax.runs.pipelines import CONFIG_NAME, write_pipeline
from tav_jax.runs.run import Run
from tav_jax.runs.samples import BESIDE
from tav_jax.text import one_line, shorten

CARD = "README.md"
IMAGES = "samples"  # the folder of the card's pictures
LICENSE = "creativeml-openrail-m"  # of Stable Diffusion 1.x, whose weights a tuned model goes on
LICENSED = ("CompVis/stable-diffusion-v1", "stable-diffusion-v1-5/", "runwayml/stable-diffusion-v1")
TAGS = ["tune-a-video", "text-to-video", "video-editing", "stable-diffusion", "jax"]


def write_publication(
    run: Run,
    folder: Path,
    *,
    form: str,
    step: int,
    repo: str,
    dtype: str,
    latents: bool,
    license_name: str | None = None,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Write what is uploaded: the model, its card, its settings and pictures.

    Args:
        run: The run.
        folder: The folder to fill.
        form: "adapter" or "pipeline".
        step: The checkpoint.
        repo: The repository's id, which the card's commands name.
        dtype: See `write_adapter`.
        latents: See `write_adapter`.
        license_name: The licence by its name on the Hub. By default that of Stable Diffusion 1.x if
            that is the base model, and otherwise none.
        scores: The mean score of the videos by metric.
    """
    config = portable(run.config)
    if form == "pipeline":
        write_pipeline(run, folder, step)
    else:
        write_adapter(run, folder / NAME_ON_HUB, step=step, dtype=dtype, latents=latents)
        (folder / CONFIG_NAME).write_text(dump_config(config), encoding="utf-8")
    pictures = _copy_pictures(run, step, folder / IMAGES)
    card = model_card(
        config, pictures, form=form, repo=repo, license_name=license_name, scores=scores or {}
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def _copy_pictures(run: Run, step: int, folder: Path) -> list[str]:
    """Copy the contact sheet and the small video of a checkpoint's samples; return their names."""
    samples = run.samples(step)
    sources = [sheet_of(samples), samples / f"{BESIDE}.gif"]
    names = []
    for source in sources:
        if source.is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / source.name)
            names.append(f"{folder.name}/{source.name}")
    return names


def model_card(
    config: TuneConfig,
    pictures: list[str],
    *,
    form: str,
    repo: str,
    license_name: str | None = None,
    scores: Mapping[str, float] | None = None,
) -> str:
    """Return a model card in Markdown with its front matter.

    Args:
        config: The run's settings, without paths of this machine.
        pictures: Names of pictures in the repository.
        form: See `write_publication`.
        repo: See `write_publication`.
        license_name: See `write_publication`.
        scores: See `write_publication`.
    """
    from huggingface_hub import ModelCardData

    base, caption = config.pretrained_model_path, config.train_data.prompt
    if license_name is None and base.startswith(LICENSED):
        license_name = LICENSE
    # Only a Hub id is a link. A folder's name on the author's machine says nothing to others.
    is_hub_id = base.count("/") == 1
    data = ModelCardData(
        license=license_name,
        base_model=base if is_hub_id else None,
        tags=TAGS,
        library_name="tav_jax",
        pipeline_tag="text-to-video",
        training_prompt=" ".join(caption.split()),  # a line "---" would end the front matter
        inference=False,
        base_model_relation=("adapter" if form == "adapter" else "finetune") if is_hub_id else None,
    )
    train, validation = config.train_data, config.validation_data
    lines = [
        "---",
        data.to_yaml(line_break="\n").rstrip(),
        "---",
        "",
        f"# {escape(shorten(caption, 100)) or 'Tune-A-Video'}",
        "",
        f"[Tune-A-Video](https://arxiv.org/abs/2212.11565) of {escape(base)} on one clip, "
        f"{escape(train.video_path)}: {train.n_sample_frames} frames of "
        f"{train.width}x{train.height}, {config.max_train_steps} steps. Its caption is:",
        "",
        f"> {escape(caption)}",
        "",
        "## Use",
        "",
        "```bash",
        *_commands(form, repo),
        "```",
    ]
    if pictures:
        lines += ["", "## Samples", ""]
        if validation.prompts:
            lines += [*(f"- {escape(prompt)}" for prompt in validation.prompts), ""]
        lines += [f"![{escape(Path(name).stem)}]({name})" for name in pictures]
    if scores:
        lines += ["", "## Metrics", "", "| metric | mean |", "|---|---|"]
        lines += [f"| {escape(name)} | {value:.4g} |" for name, value in scores.items()]
    return "\n".join([*lines, ""])


def _commands(form: str, repo: str) -> list[str]:
    if form == "adapter":
        return [
            "pip install tav_jax",
            f'python -m tav_jax.sample --adapter {repo} --prompt "..."',
        ]
    return [
        "pip install tav_jax",
        f"python -c \"import tav_jax; model = tav_jax.load_model('{repo}')\"",
    ]


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text)


def check_login() -> str:
    """Return the user's name on the Hub.

    Raises:
        UserError: Nobody is logged in, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().whoami()["name"])
    except Exception as error:  # no token, an old one, no network: each has its own class
        raise UserError(
            f"--push: the Hub does not know who you are: {one_line(str(error), 200)}; "
            "`hf auth login` logs in with a token that may write"
        ) from None


def upload(folder: Path, repo: str, *, is_private: bool) -> str:
    """Upload a folder's files to a repository, created if there is none, and return its address.

    Raises:
        UserError: The Hub refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=is_private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo, commit_message="Tune-A-Video, written by tav_jax"
        )
    except Exception as error:
        raise UserError(
            f"--push: {repo}: the Hub refuses it: {one_line(str(error), 200)}"
        ) from None
    return str(address)
