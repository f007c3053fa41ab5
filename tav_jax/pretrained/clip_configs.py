"""The configs of a CLIPModel and of its CLIPImageProcessor -> ours, and back."""

from dataclasses import asdict
from typing import Any

from tav_jax.models.clip import CLIPTextConfig
from tav_jax.models.clip_image import CLIPConfig, CLIPVisionConfig
from tav_jax.pretrained.config_reader import ConfigReader, Published
from tav_jax.pretrained.configs import TEXT_DEMANDS
from tav_jax.pretrained.preprocess import Preprocessing

VISION_DEMANDS: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip_vision_model",),
    "num_channels": (3,),
}
PREPROCESSOR_DEMANDS: dict[str, tuple[Any, ...]] = {
    "default_to_square": (False,),
    "do_center_crop": (True,),
    "do_normalize": (True,),
    "do_pad": (False, None),
    "do_rescale": (True,),
    "do_resize": (True,),
    "feature_extractor_type": ("CLIPFeatureExtractor", None),
    "image_processor_type": ("CLIPImageProcessor", "CLIPImageProcessorFast", None),
    "resample": (3,),  # bicubic
}
PREPROCESSOR_IRRELEVANT = {
    "data_format",  # of the arrays that transformers returns
    "do_convert_rgb",  # our frames are RGB
    "processor_class",
}


def read_clip_config(published: Published, where: str = "config.json") -> CLIPConfig:
    """Return our config of a CLIPModel; raises as `read_unet_config` does.

    As in `read_text_config`, only what would change the features is looked at.
    """
    from tav_jax.pretrained.published_json import ClipJson, ClipTextJson, ClipVisionJson

    read = ConfigReader(published, where)
    read.demand({"model_type": ("clip",)})
    json = read.parse(ClipJson, published)
    read_text = read.section(_encoder_section(published, "text_config"))
    read_text.demand(TEXT_DEMANDS)
    text = read_text.parse(ClipTextJson, read_text.published)
    read_text.heads(text)
    read_vision = read.section(_encoder_section(published, "vision_config"))
    read_vision.demand(VISION_DEMANDS)
    vision = read_vision.parse(ClipVisionJson, read_vision.published)
    read_vision.heads(vision)
    if vision is not None and vision.patch_size > vision.image_size:
        read_vision.problem(f"patch_size: {vision.patch_size} is over image_size")
    read.finish(set(published))
    assert json is not None
    assert text is not None
    assert vision is not None
    return CLIPConfig(
        text_config=CLIPTextConfig(**text.model_dump(exclude={"eos_token_id"})),
        vision_config=CLIPVisionConfig(**vision.model_dump()),
        projection_dim=json.projection_dim,
        eos_token_id=text.eos_token_id,
    )


def _encoder_section(published: Published, name: str) -> str:
    """Return the name of the section that has the shape of an encoder.

    Older files may have two. The one with `_dict` in its name has what differs from the defaults,
    and transformers prefers it.
    """
    return name if published.get(f"{name}_dict") is None else f"{name}_dict"


def write_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """Return the published JSON of a CLIPModel."""
    text = asdict(config.text_config) | {
        "model_type": "clip_text_model",
        "eos_token_id": config.eos_token_id,
        "projection_dim": config.projection_dim,
    }
    vision = asdict(config.vision_config) | {
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "projection_dim": config.projection_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "text_config": text,
        "vision_config": vision,
    }


def read_preprocessor_config(
    published: Published, where: str = "preprocessor_config.json"
) -> Preprocessing:
    """Return how a CLIPImageProcessor prepares images; raises as `read_unet_config` does."""
    from tav_jax.pretrained.published_json import PreprocessorJson

    read = ConfigReader(published, where)
    read.demand(PREPROCESSOR_DEMANDS)
    json = read.parse(PreprocessorJson, published)
    if json is not None and json.crop_size > json.size:
        read.problem(f"crop_size: {json.crop_size} is over size, the shortest edge: {json.size}")
    read.finish(PREPROCESSOR_IRRELEVANT)
    assert json is not None
    return Preprocessing(
        size=json.size,
        crop_size=json.crop_size,
        rescale_factor=json.rescale_factor,
        image_mean=(json.image_mean[0], json.image_mean[1], json.image_mean[2]),
        image_std=(json.image_std[0], json.image_std[1], json.image_std[2]),
    )


def write_preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the published JSON of a CLIPImageProcessor."""
    side = preprocessing.crop_size
    flags = ("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize")
    return {
        "crop_size": {"height": side, "width": side},
        **dict.fromkeys(flags, True),
        "image_mean": list(preprocessing.image_mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(preprocessing.image_std),
        "resample": 3,
        "rescale_factor": preprocessing.rescale_factor,
        "size": {"shortest_edge": preprocessing.size},
    }
