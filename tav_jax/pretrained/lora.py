"""LoRAs: low-rank changes of a text encoder's and a U-Net's weights.

For some linear layers and convolutions a file has two factors, `down` (r x in) and `up` (out x r).
They change the layer's weight (Hu et al. 2021, arXiv:2106.09685, eq. 3):

    W + scale * alpha / r * up @ down

| written by            | names of a layer's factors                                              |
|-----------------------|-------------------------------------------------------------------------|
| kohya's sd-scripts    | `lora_unet_mid_block_..._to_q.lora_down.weight`, `.lora_up.weight`;     |
|                       | `lora_te_text_model_...` of the text encoder                            |
| diffusers before 0.22 | `unet.mid_block. ... .attn1.processor.to_q_lora.down.weight`,           |
|                       | `text_encoder. ... .q_proj.lora_linear_layer.down.weight`               |
| diffusers with PEFT   | `unet.mid_block. ... .attn1.to_q.lora_A.weight`, `.lora_B.weight`       |

alpha is a tensor of its own, `.alpha`, or in the header, `lora_adapter_metadata`. Without it alpha
is r. Which layer a name means is found in the list of our parameters, not by rules of renaming.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tav_jax.errors import UserError
from tav_jax.models.clip import CLIPTextConfig, CLIPTextModel
from tav_jax.models.network import in_modules, parameter_shapes
from tav_jax.models.unet import UNet3DConditionModel, UNetConfig
from tav_jax.pretrained.pickled import read_pickled
from tav_jax.pretrained.weights import TEMPORAL, read_safetensors, tensor_name, to_parameter
from tav_jax.reading import parse_json
from tav_jax.text import brief, shorten

ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.alpha": "alpha",
    ".lora_linear_layer.alpha": "alpha",
    ".lora.alpha": "alpha",
    ".alpha": "alpha",
}
"""What a tensor is to its layer, by the end of its name. The first that fits counts."""

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
}
"""The network of a layer. diffusers' first LoRAs are of the U-Net alone, without a prefix."""

# The text encoder's layers in LoRAs of diffusers before 0.17.
OLD_LAYERS = {
    "self_attn_to_q": "self_attn_q_proj",
    "self_attn_to_k": "self_attn_k_proj",
    "self_attn_to_v": "self_attn_v_proj",
    "self_attn_to_out": "self_attn_out_proj",
}

UNSUPPORTED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with Tucker's decomposition",
    "lora_te1_": "SDXL",
    "lora_te2_": "SDXL",
    "text_encoder_2.": "SDXL",
}
"""Kinds of files that are refused, by what names of tensors have in them."""

SDXL_CONTEXT = 2048  # width of its text states
METADATA = "lora_adapter_metadata"
MOST_ALPHA = 1e9
MOST_OF_A_KIND = 3  # tensors that a message names
MOST_CHARACTERS = 490  # of a message


class Change(NamedTuple):
    """What a LoRA adds to one weight.

    Args:
        path: The LoRA's file, for messages.
        name: The weight's name in a checkpoint.
        shape: Its shape there.
        down: The first factor, in PyTorch's layout.
        up: The second factor.
        scale: The LoRA's scale times alpha / r.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    down: np.ndarray
    up: np.ndarray
    scale: float

    def value(self) -> np.ndarray:
        """Return it in the layout of our parameters, float32."""
        with np.errstate(over="ignore", invalid="ignore"):  # which is an error with a name below
            product = self.up.reshape(len(self.up), -1) @ self.down.reshape(len(self.down), -1)
            product = np.float32(self.scale) * product
        if not np.isfinite(product).all():
            raise UserError(f"{self.path}: what it adds to {self.name} is not finite")
        return to_parameter(self.name, product.reshape(self.shape))[1]


class Lora(NamedTuple):
    """The changes of a LoRA, by the names of our parameters."""

    text_encoder: dict[str, Change]
    unet: dict[str, Change]


def read_loras(
    files: Sequence[tuple[str | Path, float]], text: CLIPTextConfig, unet: UNetConfig
) -> list[Lora]:
    """Return LoRAs for a model, each with its scale.

    Args:
        files: Path and scale of each.
        text: The text encoder's config.
        unet: The U-Net's config.

    Raises:
        UserError: Files are missing, damaged, of another kind or for another model. All are listed.
    """
    if not files:
        return []
    layers = {
        "text_encoder": _layers_of(CLIPTextModel, text),
        "unet": _layers_of(UNet3DConditionModel, unet),
    }
    loras, problems = [], []
    for path, scale in files:
        try:
            loras.append(_read_lora(Path(path), scale, layers))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return loras


def change_of(changes: Sequence[Mapping[str, Change]]) -> Callable[[str], np.ndarray | None]:
    """Return a function that gives what is added to the parameter of a name, or None.

    Args:
        changes: Of each LoRA the changes of one network.
    """

    def change(name: str) -> np.ndarray | None:
        values = [one[name].value() for one in changes if name in one]
        return sum(values[1:], values[0]) if values else None

    return change


class _Layer(NamedTuple):
    """A layer that a LoRA may change: its weight's name here, and its shape in PyTorch's layout."""

    name: str
    shape: tuple[int, ...]


_Layers = Mapping[str, Mapping[str, _Layer]]


def _layers_of(module_class: type, config: Any) -> dict[str, _Layer]:
    """Return a network's layers by their names with `_` for every dot."""
    layers = {}
    for name, leaf in parameter_shapes(module_class, config).items():
        if name.endswith(".kernel") and not in_modules(name, TEMPORAL):
            *sides, inputs, outputs = leaf.shape
            flat = name.removesuffix(".kernel").replace(".", "_")
            layers[flat] = _Layer(name, (outputs, inputs, *sides))
    return layers


def _read_lora(path: Path, scale: float, layers_of: _Layers) -> Lora:
    tensors, metadata = _read_file(path)
    if not any(_split(key)[1] or _unsupported(key) for key in tensors):
        has = f"it has {shorten(min(tensors), 120)}" if tensors else "it has no tensors"
        raise UserError(f"{shorten(str(path), 150)}: not a LoRA: {has}")
    problems: dict[str, list[str]] = {}

    def refuse(kind: str, what: str) -> None:
        problems.setdefault(kind, []).append(what)

    layers: dict[tuple[str, _Layer], dict[str, tuple[str, np.ndarray]]] = {}
    refused = set()
    for key, tensor in sorted(tensors.items()):
        named, part = _split(key)
        place = _find(named, layers_of)
        if kind := _unsupported(key):
            refuse(f"{kind} is not supported", key)
        elif part is None or place is None:
            refuse("unknown", key)
        elif part in layers.setdefault(place, {}):
            refuse("twice, under two names", key)
        elif problem := _wrong_values(part, tensor):
            refuse(problem, key)
            refused.add(place)
        else:
            layers[place][part] = key, tensor

    find_scale = _scales(metadata, path)
    lora = Lora({}, {})
    for (network, layer), parts in layers.items():
        if (network, layer) in refused:
            continue
        if not {"down", "up"} <= parts.keys():
            refuse("without a factor", next(iter(parts.values()))[0])
            continue
        (key, down), (_, up) = parts["down"], parts["up"]
        if problem := _wrong_shapes(down.shape, up.shape, layer.shape):
            refuse(problem, f"{key} {list(down.shape)}, {list(up.shape)} for {list(layer.shape)}")
            continue
        name, rank = tensor_name(layer.name), len(down)
        if "alpha" in parts:
            factor = (float(parts["alpha"][1].item()) or rank) / rank  # 0 means r, as for kohya
        else:
            factor = find_scale(network, name.removesuffix(".weight"), rank)
        down, up = down.astype(np.float32), up.astype(np.float32)
        change = Change(path, name, layer.shape, down, up, scale * factor)
        getattr(lora, network)[layer.name] = change
    if problems:
        raise UserError(_message(path, problems))
    return lora


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return a file's tensors, and the metadata of its header if it has one."""
    if path.suffix == ".safetensors":
        # kohya's programs may store alpha as an integer.
        tensors, metadata = read_safetensors(path, any_type=lambda name: name.endswith(".alpha"))
    else:
        tensors, metadata = read_pickled(path), {}
    as_numbers = {
        key: tensor.astype(np.float32) if tensor.dtype == jnp.bfloat16 else tensor
        for key, tensor in tensors.items()
    }
    return as_numbers, metadata


def _split(key: str) -> tuple[str, str | None]:
    """Return a tensor's layer, and what the tensor is to it; None if that is unknown."""
    for ending, part in ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), part
    return key, None


def _unsupported(key: str) -> str | None:
    """Return the kind of file that a tensor's name is from, if it is one that is refused."""
    return next((kind for part, kind in UNSUPPORTED.items() if part in key), None)


def _wrong_values(part: str, tensor: np.ndarray) -> str | None:
    """Return what is wrong about a tensor's values, or None."""
    if tensor.dtype.kind not in ("fiu" if part == "alpha" else "f"):
        return f"{tensor.dtype} is no type of weights"
    if part == "alpha" and tensor.size != 1:
        return "more than one number"
    return None if np.isfinite(tensor).all() else "not all values are finite"


def _find(named: str, layers_of: _Layers) -> tuple[str, _Layer] | None:
    """Return the network and the layer that a name in a file means, or None."""
    prefix = next((prefix for prefix in PREFIXES if named.startswith(prefix)), "unet.")
    network = PREFIXES[prefix]
    flat = named.removeprefix(prefix).replace(".processor", "").replace(".", "_")
    for old, new in OLD_LAYERS.items():
        if flat.endswith(old):
            flat = flat.removesuffix(old) + new
    layers = layers_of[network]
    # `to_out` is a list of a linear layer and a dropout. transformers from 5.6 has no `text_model`.
    for candidate in (flat, f"{flat}_0", f"text_model_{flat}"):
        if candidate in layers:
            return network, layers[candidate]
    return None


def _wrong_shapes(
    down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]
) -> str | None:
    """Return what is wrong about factors' shapes, or None."""
    if len(down) not in (2, 4) or len(up) not in (2, 4) or not down[0]:
        return "wrong shape"
    inputs, kernel = down[1], down[2:] or (1, 1)
    if inputs == SDXL_CONTEXT != weight[1]:
        return "the text states of SDXL, which is not supported"
    if up[1] != down[0]:
        return "the factors' ranks differ"
    if (up[0], inputs, *kernel) != (*weight, 1, 1)[:4] or up[2:] not in ((), (1, 1)):
        return "wrong shape"
    return None


def _scales(metadata: Mapping[str, str], path: Path) -> Callable[[str, str, int], float]:
    """Return a function that gives alpha / r of a layer by its network, module and rank."""
    settings: dict[str, Any] = {}
    if METADATA in metadata:
        settings = parse_json(metadata[METADATA], f"{path}: {METADATA}")

    def factor(network: str, module: str, rank: int) -> float:
        def get(key: str, default: Any) -> Any:
            return settings.get(f"{network}.{key}", default)

        if get("use_dora", False):
            raise UserError(f"{path}: {METADATA}: DoRA is not supported")
        alpha = get("lora_alpha", rank)
        patterns = get("alpha_pattern", {})
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            # PEFT takes it for a regular expression; programs write modules' names.
            if f".{module}".endswith(f".{pattern.removeprefix('^')}"):
                alpha = value
                break
        # JSON may have numbers of any length.
        if type(alpha) not in (int, float) or not abs(alpha) < MOST_ALPHA:
            raise UserError(f"{path}: {METADATA}: lora_alpha is {brief(alpha)}, no number")
        return alpha / (math.sqrt(rank) if get("use_rslora", False) else rank)

    return factor


def _message(path: Path, problems: Mapping[str, list[str]]) -> str:
    """Return what is wrong with a file, with as many names of each kind as there is room for."""
    heading = f"{shorten(str(path), 150)}: not a LoRA that this model takes:"
    for most in range(MOST_OF_A_KIND, 0, -1):
        message = "\n".join([heading, *_lines(problems, most)])
        if len(message) <= MOST_CHARACTERS:
            break
    return message


def _lines(problems: Mapping[str, list[str]], most: int) -> Iterator[str]:
    for kind, keys in sorted(problems.items()):
        more = f" and {len(keys) - most} more" if len(keys) > most else ""
        yield f"  {kind}: {', '.join(shorten(key, 120) for key in keys[:most])}{more}"
