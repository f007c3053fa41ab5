"""A small model in one file, with the tensor names of the original Stable Diffusion release."""

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_name(name: str, layers: int, attention: list[bool]) -> str:
    """Returns the original name of a U-Net's tensor.

    Args:
        name: Its name in the Hub's layout.
        layers: Residual blocks of a level on the way down; there is one more on the way up.
        attention: Whether each level on the way up has attention.
    """
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match:
        way, level, kind, index, rest = match.groups()
        level, index = int(level), int(index)
        if way == "down":
            at = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
            prefix = f"input_blocks.{at}"
        else:
            at = level * (layers + 1) + (layers if kind == "upsamplers" else index)
            prefix = f"output_blocks.{at}"
        if kind == "downsamplers":
            return f"{prefix}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"{prefix}.{2 if attention[level] else 1}.{rest}"
        new = f"{prefix}.{0 if kind == 'resnets' else 1}"
    else:
        new = next(theirs for ours, theirs in OUTER.items() if name.startswith(f"{ours}."))
        rest = name.removeprefix(next(o for o in OUTER if name.startswith(f"{o}."))).strip(".")
    module, _, leaf = rest.rpartition(".")
    return ".".join(filter(None, [new, RESNET.get(module, module), leaf]))


def vae_name(name: str, levels: int) -> str:
    """Returns the original name of a VAE's tensor."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)

    def up(match: re.Match) -> str:
        return f"up.{levels - 1 - int(match[1])}.{match[2]}"

    name = re.sub(r"up_blocks\.(\d+)\.(.*)", up, name)
    name = re.sub(r"(up\.\d+)\.resnets\.(\d+)", r"\1.block.\2", name)
    name = name.replace(".upsamplers.0.", ".upsample.").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        start, rest = name.split("mid_block.attentions.0.")
        module, _, leaf = rest.rpartition(".")
        name = f"{start}mid.attn_1.{VAE_ATTENTION[module]}.{leaf}"
    return name


def original_tensors(
    folder: Path, *, layers: int, attention: list[bool], levels: int
) -> dict[str, np.ndarray]:
    """Returns all tensors of a model's folder, with their original names and layouts.

    Args:
        folder: The model.
        layers: See `unet_name`.
        attention: See `unet_name`.
        levels: Levels of the VAE.
    """
    tensors = {}
    for name, tensor in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        tensors[f"model.diffusion_model.{unet_name(name, layers, attention)}"] = tensor
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        original = vae_name(name, levels)
        is_projection = ".attn_1." in original and tensor.ndim == 2
        tensors[f"first_stage_model.{original}"] = (
            tensor[:, :, None, None] if is_projection else tensor
        )
    for name, tensor in load_file(folder / "text_encoder/model.safetensors").items():
        tensors[f"cond_stage_model.transformer.{name}"] = tensor
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
