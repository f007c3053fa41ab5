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
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from torch_unet3d import UNet3D, freeze_all_but_trained, guided_step, tune_step


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def peak_device_bytes() -> int:
    return torch.cuda.max_memory_allocated()


class Theirs:
    """The steps under one of PyTorch's attentions, with weights that mean nothing yet.

    In bfloat16 it is the published mixed precision: encoders and what stays frozen are stored so,
    what trains is float32 and the U-Net is tuned under autocast. To sample, all of it is bfloat16
    and there is no autocast, as in the published inference.

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
        channels_last: bool = False,
        compiled: bool = False,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.setting, self.device = setting, setting["device"]
        self.dtype = getattr(torch, setting["dtype"])
        on_gpu = self.device == "cuda"
        if on_gpu:
            torch.backends.cudnn.benchmark = True  # shapes stay as they are
            torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as on our side
        self.compiled = compiled
        self.name = attention + " + channels-last" * channels_last + " + compiled" * compiled

        self.unet = UNet3D(setting["unet"], attention, setting["gradient_checkpointing"])
        self.vae = AutoencoderKL.from_config(setting["vae"])
        self.text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(setting["text_encoder"]))
        layout = torch.channels_last if channels_last else torch.preserve_format
        for network in (self.unet, self.vae, self.text_encoder):
            # torch's own: diffusers' warns of parts that are to stay in float32, and names none.
            nn.Module.to(network, device=self.device, dtype=self.dtype, memory_format=layout)
        for encoder in (self.vae, self.text_encoder):
            encoder.eval().requires_grad_(False)
        self.trained = freeze_all_but_trained(self.unet)
        self.float32 = {name: p.detach().float() for name, p in self.trained.items()}
        self._hold_trained_in(torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=setting["learning_rate"],
            weight_decay=setting["weight_decay"],
            fused=on_gpu or None,
        )
        if compiled:
            for network in (self.unet, self.vae.encoder, self.text_encoder):
                network.compile()
        self.pixel_values = self._video(inputs["pixel_values"]).to(self.dtype)
        self.input_ids = self._tensor(inputs["input_ids"])
        self.latents = self._video(inputs["latents"])
        self.context = self._tensor(inputs["context"])
        self.negative_context = self._tensor(inputs["negative_context"])
        self.alphas_cumprod = self._tensor(inputs["alphas_cumprod"])

    def _tensor(self, x) -> Tensor:
        return torch.tensor(np.asarray(x), device=self.device)

    def _video(self, x) -> Tensor:
        """Returns our video `b f h w c` as PyTorch's `b c f h w`."""
        return self._tensor(np.moveaxis(np.asarray(x), -1, 1).copy())

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
                {
                    names[k.removeprefix("text_model.")]: torch.tensor(v)
                    for k, v in published.items()
                }
            )
        self.batch = (
            self._video(draw.latents),
            self._video(draw.noise),
            self._tensor(draw.timesteps).long(),
            self._tensor(context),
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
        latents = latents.float() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(
            0, len(self.alphas_cumprod), (len(latents),), device=latents.device
        )
        return self._tune(latents, noise, timesteps, context)

    def tuning(self) -> tuple[Tensor, Tensor]:
        """The network's part of it."""
        return self._tune(*self.batch)

    def _tune(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        self._hold_trained_in(torch.float32)
        result = tune_step(
            self._under_autocast,
            self.optimizer,
            *batch,
            self.alphas_cumprod,
            self.setting["max_grad_norm"],
        )
        self._wait()
        return result

    def guided(self) -> Tensor:
        self._hold_trained_in(self.dtype)
        latents = guided_step(
            self._in_dtype,
            self.latents,
            1,
            -1,  # before the first timestep
            self.context,
            self.negative_context,
            self.setting["guidance_scale"],
            self.alphas_cumprod,
        )
        self._wait()
        return latents

    def _under_autocast(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.unet(*inputs)

    def _in_dtype(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return self.unet(latents.to(self.dtype), timesteps, context.to(self.dtype)).float()

    def _hold_trained_in(self, dtype: torch.dtype) -> None:
        for name, parameter in self.trained.items():
            if parameter.dtype != dtype:
                parameter.data = self.float32[name].to(dtype)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
