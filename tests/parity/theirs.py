"""PyTorch's side of `speed.py`: the published steps with diffusers' and transformers' encoders.

No JAX here, nor anything that imports it: its libraries would count in PyTorch's peak memory.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from torch_unet3d import UNet3D, freeze_all_but_trained, guided_step, tune_step


def to_torch(x) -> Tensor:
    return torch.tensor(np.asarray(x))


def video_to_torch(x) -> Tensor:
    """Returns our video `b f h w c` as PyTorch's `b c f h w`."""
    return to_torch(np.moveaxis(np.asarray(x), -1, 1).copy())


class Theirs:
    """The steps under one of PyTorch's attentions, with weights that mean nothing yet.

    Args:
        setting, inputs: As `speed.py` has them: what both sides compute with.
        attention: That of the U-Net; the encoders' is the fused one, their libraries' default.
    """

    def __init__(
        self,
        setting: Mapping[str, Any],
        inputs: Mapping[str, np.ndarray],
        attention: str,
        *,
        compiled: bool = False,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.setting, self.attention = setting, attention + (", compiled" if compiled else "")
        self.unet = UNet3D(setting["unet"], attention)
        self.vae = AutoencoderKL.from_config(setting["vae"])
        self.text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(setting["text_encoder"]))
        for encoder in (self.vae, self.text_encoder):
            encoder.eval().requires_grad_(False)
        self.trained = freeze_all_but_trained(self.unet)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=setting["learning_rate"],
            weight_decay=setting["weight_decay"],
        )
        if compiled:
            for network in (self.unet, self.vae.encoder, self.text_encoder):
                network.compile()
        self.pixel_values = video_to_torch(inputs["pixel_values"])
        self.input_ids = to_torch(inputs["input_ids"])
        self.latents = video_to_torch(inputs["latents"])
        self.context = to_torch(inputs["context"])
        self.negative_context = to_torch(inputs["negative_context"])
        self.alphas_cumprod = to_torch(inputs["alphas_cumprod"])

    def take_over(self, tensors: Mapping[str, Mapping[str, np.ndarray]], draw, context) -> None:
        """Loads our weights, and what `tuning` trains on: our first draw and text states.

        Args:
            tensors: Of each network, in the published layout and under the published names.
        """
        for part, published in tensors.items():
            network = getattr(self, part)
            # A CLIPTextModel has lost its `text_model.` with transformers 5.6.
            names = {name.removeprefix("text_model."): name for name in network.state_dict()}
            network.load_state_dict(
                {names[k.removeprefix("text_model.")]: to_torch(v) for k, v in published.items()}
            )
        self.batch = (
            video_to_torch(draw.latents),
            video_to_torch(draw.noise),
            to_torch(draw.timesteps).long(),
            to_torch(context),
        )

    @torch.no_grad()
    def encode(self) -> tuple[Any, Tensor]:
        """Returns the posterior of all frames, `(b f) c h w`, and the caption's text states."""
        posterior = self.vae.encode(rearrange(self.pixel_values, "b c f H W -> (b f) c H W"))
        return posterior.latent_dist, self.text_encoder(self.input_ids).last_hidden_state

    def whole(self) -> tuple[Tensor, Tensor]:
        """A step as published: clip and caption encoded again, the rest drawn anew."""
        posterior, context = self.encode()
        latents = rearrange(posterior.sample(), "(b f) c h w -> b c f h w", b=len(context))
        latents = latents * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, len(self.alphas_cumprod), (len(latents),))
        return self._tune(latents, noise, timesteps, context)

    def tuning(self) -> tuple[Tensor, Tensor]:
        """The network's part of it."""
        return self._tune(*self.batch)

    def _tune(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        return tune_step(
            self.unet,
            self.optimizer,
            *batch,
            self.alphas_cumprod,
            self.setting["max_grad_norm"],
        )

    def guided(self) -> Tensor:
        return guided_step(
            self.unet,
            self.latents,
            1,
            -1,  # before the first timestep
            self.context,
            self.negative_context,
            self.setting["guidance_scale"],
            self.alphas_cumprod,
        )
